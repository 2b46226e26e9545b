"""
Checkpoints: atomic, verified, without pickle.

    out_dir/step_00001000/model.safetensors   the weights
                          optimizer.pt        the moments, read without torch.load()
                          state.json          step, settings, tokenizer: whatever else resuming needs
                          manifest.json       sizes and sha256 of the rest, written last
                          tokenizer.…         the tokenizer's files, if any: a checkpoint can be moved alone
                          val_loss.json       the validation loss of one that was the best, if `best` is lost
    out_dir/best                              which checkpoint has the lowest validation loss, and that loss
    out_dir/log.jsonl                         losses and speed, one JSON object per line

A checkpoint is written under a temporary name, flushed to disk, then renamed. So a directory named step_… is
complete, unless it was damaged later. Loading verifies it and falls back to the newest sound one. torch is
imported where it is used: the processes of prepare.py need none.
"""
import errno
import hashlib
import json
import math
import os
import re
import shutil
import stat
from contextlib import contextmanager, suppress

from configurator import UserError, process_age

# -----------------------------------------------------------------------------
# Files and folders that are there whole or not at all. Where the system refuses, as on a full disk: OSError

@contextmanager
def writing(what, to_do):
    """Turn an OSError raised inside into a UserError: `what` could not be written, and what to do."""
    try:
        yield
    except BrokenPipeError:  # no file: run_main() knows what to do
        raise
    except OSError as error:
        reason = error.strerror or error
        if isinstance(error.filename, str):
            reason = f'{error.filename}: {reason}'
        raise UserError(f'{what}: could not be written ({reason}): {to_do}') from None


def sync(path):
    """Flush a file or a folder to the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def replacing(path, mode='w', suffix='.tmp', is_given=False):
    """
    Open a file that replaces `path` once it is complete and on disk ('w': text, 'wb': bytes). On any error,
    the old file stays and no other file is left. suffix: ending of the temporary name. is_given: the user
    gave this path, so a link is followed, and a device is written to; else both are replaced.
    """
    encoding = None if 'b' in mode else 'utf-8'
    if is_given and os.path.exists(path) and not os.path.isfile(path):  # /dev/stdout
        with open(path, mode, encoding=encoding) as f:
            yield f
        return
    path = os.path.realpath(path) if is_given else os.fspath(path)
    temporary = path + (f'.{os.getpid()}' if is_given else '') + suffix
    if not is_given:  # it is ours, left by a crash
        with suppress(FileNotFoundError):
            os.unlink(temporary)
    f = open(temporary, mode.replace('w', 'x'), encoding=encoding)
    try:
        with f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise


def replace_text(path, text, is_given=False):
    with replacing(path, is_given=is_given) as f:
        f.write(text)


def replace_json(path, value, is_given=False):
    replace_text(path, json.dumps(value, indent=1), is_given)


def write_tensors(path, tensors, metadata=None):
    """Write {name: tensor} as safetensors. The library's file is for its owner alone, whatever the umask."""
    import safetensors.torch
    with open(path, 'wb') as f:
        mode = stat.S_IMODE(os.fstat(f.fileno()).st_mode)
    try:
        safetensors.torch.save_file(tensors, path, metadata)
        os.chmod(path, mode)
    except safetensors.SafetensorError as error:  # the system's error is in its text alone
        raise OSError(str(error)) from None


def write_torch(path, value):
    """torch.save() to a file."""
    import torch
    with open(path, 'wb') as f:
        try:
            torch.save(value, f)
        except RuntimeError as error:  # "unexpected pos": torch was closing its file after the system's error
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def append(path, text):
    """Append text to a file, on a line of its own: all of it or, on an error, nothing."""
    f = open(path, 'a+b')
    size = f.seek(0, os.SEEK_END)
    try:
        with f:
            f.seek(max(0, size - 1))
            f.write(b'\n' * (f.read() not in (b'', b'\n')) + text.encode())
    except OSError:
        with suppress(OSError):
            os.truncate(path, size)
        raise


def sha256(path):
    with open(path, 'rb') as f:
        return hashlib.file_digest(f, 'sha256').hexdigest()


# -----------------------------------------------------------------------------
# Files that somebody else may have written

def open_regular(path):
    """
    Open a regular file to read its bytes. Raises UserError if it cannot be read, and for a folder, a named
    pipe or a device before it is opened: reading these may never end.
    """
    try:
        if stat.S_ISREG(os.stat(path).st_mode):
            return open(path, 'rb', opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK))
        reason = 'is a folder, a pipe or a device, takes a regular file'
    except OSError as error:
        reason = error.strerror or error
    except ValueError as error:  # a path with a null character
        reason = error
    raise UserError(f'{path}: {reason}')


def own_file(folder, name, sha256=None):
    """
    The path of a file in `folder` whose name came out of a file. Raises UserError for a name that leads
    elsewhere, for what is no regular file, and for another content than that of this hash.
    """
    if not is_file_name(name):
        raise UserError(f'{folder}: {name!r:.100} is not the name of a file in this folder')
    path = os.path.join(folder, name)
    with open_regular(path) as f:
        if sha256 is not None and hashlib.file_digest(f, 'sha256').hexdigest() != sha256:
            raise UserError(f'{path}: does not have the hash that is written beside its name: restore it')
    return path


def read_files(folder, files):
    """{name: bytes} of the files in `folder` that own_file() finds by {name: sha256}."""
    contents = {}
    for name, sha256 in files.items():
        with open(own_file(folder, name, sha256), 'rb') as f:
            contents[name] = f.read()
    return contents


def is_file_name(name):
    return (type(name) is str and name not in ('', '.', '..') and os.path.basename(name) == name
            and '\0' not in name and len(name) < 256)


def read_json(path, kind=dict, most=2 ** 23, **how):
    """
    The value in a JSON file of at most `most` bytes; it must be a `kind`. A byte-order mark is dropped.
    Raises UserError that names the file for whatever is wrong with it, such as NaN or the same field twice.
    how: json.loads() takes it, for a file of others: features/foreign_json.py.
    """
    with open_regular(path) as f:
        data = f.read(most + 1)
    try:
        if len(data) > most:
            raise ValueError(f'it has more than {most:,} bytes')
        value = json.loads(data.decode('utf-8-sig'), **{'object_pairs_hook': unique, **how})
        check_values(value)
    except (ValueError, RecursionError, MemoryError) as error:
        raise UserError(f'{path}: not readable as JSON: {error}') from None
    if type(value) is not kind:
        raise UserError(f'{path}: holds a {type(value).__name__}, takes a {kind.__name__}')
    return value


def unique(pairs):
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError('a field is there twice')
    return fields


def check_values(value):
    """Raise ValueError for NaN and numbers beyond 1e308, by the field, and for more than 100 levels."""
    level = [('', value)]
    for _ in range(100):
        deeper = []
        for name, each in level:
            if isinstance(each, dict):
                deeper += each.items()
            elif isinstance(each, list):
                deeper += [(name, item) for item in each]
            elif type(each) in (int, float) and not abs(each) < 1e308:
                raise ValueError(f'{name}: takes a finite number')
        level = deeper
    if level:
        raise ValueError('it is nested more than 100 levels deep')


# -----------------------------------------------------------------------------
# Save

def write(folder, step, weights, optimizer_state, state, other_files=()):
    """
    Write a checkpoint into a new folder, and flush it to the disk. weights: {name: tensor}; state: whatever
    json can write; other_files: {name: bytes}. Raises OSError.
    """
    os.mkdir(folder)
    tensors = {name: t.detach().contiguous() for name, t in weights.items()}
    write_tensors(os.path.join(folder, 'model.safetensors'), tensors)
    write_torch(os.path.join(folder, 'optimizer.pt'), optimizer_state)
    replace_json(os.path.join(folder, 'state.json'), state)
    for name, data in dict(other_files).items():
        with open(os.path.join(folder, name), 'wb') as f:
            f.write(data)
    files = {}
    for name in sorted(os.listdir(folder)):
        path = os.path.join(folder, name)
        sync(path)
        files[name] = {'size': os.path.getsize(path), 'sha256': sha256(path)}
    replace_json(os.path.join(folder, 'manifest.json'), {'step': step, 'files': files})
    sync(folder)


def save(out_dir, step, weights, optimizer_state, state, other_files=(), keep=2):
    """Write out_dir/step_{step}, then prune(). Returns the directory. Raises UserError if it cannot."""
    final = os.path.join(out_dir, f'step_{step:08d}')
    temporary = final + '.tmp'
    to_do = 'make room, then run the same command to resume; older checkpoints are untouched'
    check_finite(weights, final)
    check_claim(out_dir)
    shutil.rmtree(temporary, ignore_errors=True)  # left by a crash
    with suppress(OSError):
        os.unlink(temporary)
    try:
        with writing(final, to_do):
            if out_dir not in CLAIMED:
                os.makedirs(out_dir, exist_ok=True)
            write(temporary, step, weights, optimizer_state, state, other_files)
            check_claim(out_dir)
            shutil.rmtree(final, ignore_errors=True)  # the same step again, after a resume from an older one
            os.rename(temporary, final)
            sync(out_dir)
    except Exception:  # half a checkpoint only takes up room
        check_claim(out_dir)  # or it is that of another run
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    prune(out_dir, keep)
    return final


def check_finite(weights, where):
    """Raise UserError if a number in {name: tensor} is NaN or infinite."""
    broken = first_not_finite(weights)
    if broken:
        raise UserError(f'{where}: not written, as {broken} is not finite: lower the learning rate; '
                        'older checkpoints are untouched')


def first_not_finite(weights, size=2 ** 24):
    """The name of the first tensor in {name: tensor} with a NaN or infinite number; None if there is none."""
    for name, t in weights.items():
        for part in t.detach().reshape(-1).split(size):  # isfinite() allocates 1.7 times its input
            if not part.isfinite().all():
                return name
    return None


def prune(out_dir, keep):
    """Remove all but the newest `keep` sound checkpoints and the best one, and folders that a crash left."""
    check_claim(out_dir)
    sound = 0
    with suppress(UserError):  # the best one is not known: all stay
        for folder in checkpoints(out_dir):
            if sound >= keep and folder != best(out_dir, is_sure=True)[0]:
                shutil.rmtree(folder, ignore_errors=True)
            elif is_sound(folder):
                sound += 1
    for name in os.listdir(out_dir):
        if re.fullmatch(r'step_\d{8,}\.tmp', name):
            shutil.rmtree(os.path.join(out_dir, name), ignore_errors=True)


def is_sound(folder, known={}):  # noqa: B006 — what was found out lasts as long as the process
    """Whether damage() finds nothing. The files are read again only if a size or a time has changed."""
    try:
        with os.scandir(folder) as entries:
            look = sorted((entry.name, entry.stat().st_size, entry.stat().st_mtime_ns) for entry in entries
                          if not entry.name.startswith('val_loss.json'))
    except OSError:
        return False
    if known.get(folder, (None,))[0] != look:
        known[folder] = look, damage(folder) is None
    return known[folder][1]


def mark_best(out_dir, step, val_loss, keep=2):
    """Name the checkpoint of `step`, if it was written, in out_dir/best; the previous best may be removed."""
    name = f'step_{step:08d}'
    check_claim(out_dir)
    if os.path.isdir(os.path.join(out_dir, name)):
        path = os.path.join(out_dir, 'best')
        with writing(path, 'make room, then run the same command to resume'):
            replace_json(os.path.join(out_dir, name, 'val_loss.json'), {'val_loss': val_loss})
            replace_json(path, {'checkpoint': name, 'val_loss': val_loss})
        prune(out_dir, keep)


# -----------------------------------------------------------------------------
# A folder that belongs to one process, and to one run. For what seldom happens to it: features/run_folders.py

def lock(path):
    """
    Lock a folder, or a file made for it, until the process ends. Returns a descriptor to close before that,
    None if another process holds the lock. A file system without locks (NFS: for folders) grants all.
    """
    import fcntl  # here: on Windows, which has none, configurator.py has to speak first
    flags = os.O_RDONLY if os.path.isdir(path) else os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
    while True:
        fd = os.open(path, flags)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return None
        except OSError:
            return fd
        if is_at(fd, path):
            return fd
        os.close(fd)  # another process let it go and removed it in between


def is_at(fd, path):
    """Whether an opened file or folder is the one at this path."""
    with suppress(OSError):
        return os.path.samestat(os.fstat(fd), os.stat(path))
    return False


CLAIMED = {}  # out_dir: descriptors of the folder and of its lock, and the folders made for it


def claim(out_dir):
    """
    Lock out_dir until release(), and make it first if need be. Raises UserError if another process trains in
    it, and for a folder that is neither empty nor a run's.
    """
    if out_dir in CLAIMED:
        return check_claim(out_dir)
    made = []
    folder = held = None
    try:
        with writing(f'out_dir={out_dir}', 'give another'):
            while folder is None:
                made += make_folders(out_dir)
                with suppress(FileNotFoundError):  # another start was refused, and removed what it had made
                    folder = lock(os.path.join(out_dir, '.'))
                    if folder is None:
                        raise is_busy(out_dir)
            own = os.path.realpath(out_dir)
            if os.listdir(folder) or own in (os.getcwd(), os.path.realpath(os.path.expanduser('~'))):
                from features.run_folders import check_own
                check_own(out_dir)
            held = lock(os.path.join(out_dir, 'lock'))
            if held is None:
                raise is_busy(out_dir)
    finally:
        CLAIMED[out_dir] = folder, held, made
        if held is None:
            release(out_dir)


def make_folders(path):
    """Make a folder and those above it; of a link, the folder it points to. Returns them, innermost first."""
    if os.path.islink(path):
        path = os.path.realpath(path)
        missing = [path] * (not os.path.isdir(path))
        for folder in missing:
            os.mkdir(folder)  # no more: its disk may not be mounted
        return missing
    missing = []
    above = path.rstrip('/')
    while above and not os.path.isdir(above):
        missing.append(above)
        above = os.path.dirname(above)
    os.makedirs(path, exist_ok=True)
    return missing


def is_busy(out_dir):
    return UserError(f'out_dir={out_dir}: another process is training in it: wait for that one, '
                     'or give another')


def check_claim(out_dir):
    """Raise UserError if the folder that this process has claimed is no longer the one at out_dir."""
    if out_dir in CLAIMED:
        folder, held, _ = CLAIMED[out_dir]
        if not (is_at(folder, out_dir) and is_at(held, os.path.join(out_dir, 'lock'))):
            from features.run_folders import regain
            regain(out_dir)


def release(out_dir):
    """Unlock out_dir after everything is written. Folders that were made for nothing are removed."""
    if out_dir in CLAIMED:
        folder, held, made = CLAIMED.pop(out_dir)
        if held is not None:
            with suppress(OSError):
                if os.path.samestat(os.fstat(held), os.stat('lock', dir_fd=folder)):
                    os.unlink('lock', dir_fd=folder)
            os.close(held)
        for path in made:
            with suppress(OSError):  # it is not empty
                os.rmdir(path)
        if folder is not None:
            os.close(folder)


def prepare_out_dir(out_dir, step, settings):
    """
    Claim out_dir and write settings.json. A new run moves an existing run aside, to out_dir.old1 and so on. A
    run that resumes after `step` renames later checkpoints, which are damaged, to step_….damaged.
    """
    claim(out_dir)
    CLAIMED[out_dir][2].clear()  # from here on they stay
    with writing(f'out_dir={out_dir}', 'make room, or give another'):
        if os.listdir(out_dir) != ['lock']:
            from features.run_folders import set_aside
            set_aside(out_dir, step, settings)
        replace_json(os.path.join(out_dir, 'settings.json'), settings)
    if 'RANK' in os.environ:  # scale: torchrun has started this process
        from features.scale import restarts  # scale
        restarts.remember(out_dir)  # scale


# -----------------------------------------------------------------------------
# Find and load

def checkpoints(out_dir):
    """Checkpoint directories of a run, newest first."""
    if not os.path.isdir(out_dir):
        return []
    try:
        names = [name for name in os.listdir(out_dir) if re.fullmatch(r'step_\d{8,}', name)]
    except OSError as error:
        raise UserError(f'{out_dir}: {error.strerror}') from None
    return [os.path.join(out_dir, name) for name in sorted(names, key=step_of, reverse=True)]


def step_of(folder):
    """The step that a checkpoint directory is named after."""
    return int(folder.rpartition('_')[2])


def best(out_dir, is_sure=False):
    """
    (directory, validation loss) of the best checkpoint; (None, None) if there is none yet. Where out_dir/best
    does not say it, log.jsonl and val_loss.json do. Raises UserError if none is readable; is_sure: if the
    first is not.
    """
    found = checkpoints(out_dir)
    with suppress(UserError, KeyError, TypeError):
        entry = read_json(os.path.join(out_dir, 'best'))
        folder, loss = os.path.join(out_dir, entry['checkpoint']), entry['val_loss']
        if folder in found and type(loss) in (int, float):
            return folder, loss
    if not found:
        return None, None
    from features.run_folders import recover_best
    return recover_best(out_dir, is_sure)


def damage(folder):
    """A short description of what is wrong with a checkpoint directory; None if it is undamaged."""
    try:
        files = read_json(os.path.join(folder, 'manifest.json'))['files']
        for name in ('model.safetensors', 'optimizer.pt', 'state.json', *files):
            if name not in files:
                return f'{name} is not in manifest.json'
            entry = files[name]
            path = own_file(folder, name)
            if os.path.getsize(path) != entry['size'] or sha256(path) != entry['sha256']:
                return f'{name} does not match the manifest'
    except UserError as error:
        return str(error).removeprefix(folder).lstrip('/: ')
    except OSError as error:
        return f'{os.path.basename(error.filename or folder)}: {error.strerror or error}'
    except (KeyError, TypeError, AttributeError):
        return 'manifest.json is not that of a checkpoint'
    return None


def find(where, which='last'):
    """
    The directory of a sound checkpoint. `where`: a checkpoint, or an out_dir, from which `which` is taken:
    'last' or 'best' (the last one if there is no best). If it is damaged, this is reported and the newest
    sound checkpoint is taken. Raises UserError if none is sound.
    """
    if which not in ('last', 'best'):
        raise UserError(f'which={which}: has no code in checkpoint.py: use last or best')
    if where.startswith('hf:'):
        raise UserError(f'{where}: must be a training run or a checkpoint of minnow here')
    candidates = checkpoints(where)
    if os.path.isfile(os.path.join(where, 'manifest.json')):
        candidates = [where]
    elif which == 'best':
        try:
            first, _ = best(where)
            candidates.sort(key=lambda folder: folder != first)
        except UserError as error:
            print(f'{error}; the last one is taken', flush=True)
    for folder in candidates:
        problem = damage(folder)
        if problem is None:
            return folder
        if os.strerror(errno.EACCES) in problem:
            raise UserError(f'{folder}: {problem}: ask its owner to run chmod -R a+rX on it')
        print(f'{folder}: {problem}; skipped', flush=True)
    if candidates:
        first = f'{os.path.basename(candidates[0])}: {damage(candidates[0])}'
        raise UserError(f'{where}: no checkpoint in it is undamaged ({first}): restore one from a copy, '
                        'or choose another --out_dir')
    if os.path.isdir(where) and not CLAIMED.get(where, [[]])[-1]:  # claim() has made it
        raise UserError(f'{where}: no checkpoint in it')
    raise UserError(f'{where}: no such directory; give the out_dir of a training run')


def load_state(folder):
    """Read state.json of a checkpoint. Raises UserError that names the first field that is invalid."""
    from features.stored import checked
    path = os.path.join(folder, 'state.json')
    return checked(read_json(path), path)


def read_weights(folder):
    """{name: tensor} of a checkpoint. Raises UserError for a file that cannot be read."""
    from features.tensors import open_tensors
    file = open_tensors(os.path.join(folder, 'model.safetensors'))
    return {name: file.get_tensor(name) for name in file.keys()}


def load_weights(model, weights, where, assign=False):
    """
    Copy {name: tensor} into `model`: every tensor, no other, each of the same shape; learned positions beyond
    its context are left out. assign: the tensors become the model's own. Raises UserError that names the
    first that is not.
    """
    own = model.state_dict()
    if 'wpe.weight' in own and 'wpe.weight' in weights:
        weights = weights | {'wpe.weight': weights['wpe.weight'][:len(own['wpe.weight'])]}
    for name in sorted(weights.keys() | own.keys()):
        found, wanted = (list(tensors[name].shape) if name in tensors else 'no such tensor'
                         for tensors in (weights, own))
        if found != wanted:
            raise UserError(f'{where}: {name}: found {found}, the network has {wanted}: '
                            'these are the weights of another network')
    if assign:
        weights = {name: t.to(own[name].dtype) for name, t in weights.items()}
    model.load_state_dict(weights, assign=assign)


# -----------------------------------------------------------------------------
# The log of a run

class Log:
    """log.jsonl in out_dir, one JSON object per line, and Weights & Biases if enabled. Only rank 0 writes."""
    EARLIER = {}  # path: seconds of the run before this process
    TO_DO = 'make room, then run the same command to resume'

    def __init__(self, s, step, ranks):
        self.is_on = ranks.first
        self.wandb = None
        self.seconds = 0.0
        self.evaluated = -1  # step of the last evaluation
        if not self.is_on:
            return
        self.out_dir = s.out_dir
        self.path = os.path.join(s.out_dir, 'log.jsonl')
        lowest = best(s.out_dir)[1]
        records = []
        for record in read_records(self.path):
            # What came after the checkpoint happens again. So does the evaluation of that step if it was the
            # best one, and a full disk kept out_dir/best from saying so
            is_lost = 'val_loss' in record and (lowest is None or record['val_loss'] < lowest)
            if record['step'] < step or (record['step'] == step > 0 and not is_lost):
                records.append(record)
        check_claim(s.out_dir)
        with writing(self.path, self.TO_DO):
            replace_text(self.path, ''.join(json.dumps(record) + '\n' for record in records))
        before = records[-1].get('seconds', 0.0) if records else 0.0  # of the processes before this one,
        self.seconds = self.EARLIER.setdefault(self.path, before)  # which a rewound run has counted already
        self.evaluated = max((r['step'] for r in records if 'val_loss' in r), default=-1)
        if s.wandb_log:  # study
            from features.study import wandb_log  # study
            self.wandb = wandb_log.start(s)  # study

    def write(self, step, **values):
        """Add a record; values that are None, NaN or infinite are left out."""
        if not self.is_on:
            return
        record = {'step': step}
        for name, value in values.items():
            if value is not None and not (isinstance(value, float) and not math.isfinite(value)):
                record[name] = value
        record['seconds'] = round(self.seconds + process_age(), 3)
        check_claim(self.out_dir)
        with writing(self.path, self.TO_DO):
            append(self.path, json.dumps(record) + '\n')
        if self.wandb:  # study
            self.wandb.send(record)  # study


def read_records(path):
    """The records of a log.jsonl, without truncated or damaged lines; [] if there is no file."""
    if not os.path.lexists(path):
        return []
    from features.records import read
    return read(path)
