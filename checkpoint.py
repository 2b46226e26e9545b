"""
Checkpoints: atomic, verified, without pickle.

    out_dir/step_00001000/model.safetensors   the weights
                          optimizer.pt        tensors only, loaded with weights_only=True
                          state.json          step, settings, tokenizer: whatever else resuming needs
                          manifest.json       sizes and sha256 of the rest, written last
                          tokenizer.…         the tokenizer's files, if it has any: a checkpoint can be moved
                                              alone
    out_dir/best                              which checkpoint has the lowest validation loss, and that loss

A checkpoint is written under a temporary name, flushed to disk, then renamed. So a directory named step_… is
complete, unless it was damaged later. Loading verifies it and falls back to the newest sound one. fault()
marks the points where tests kill the process.
"""
import hashlib
import json
import os
import re
import shutil
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path

from configurator import UserError, from_dict, without_removed

# -----------------------------------------------------------------------------
# Files that are there whole or not at all
#
# Every function here raises OSError where the system refuses: a full disk, a quota, a limit, a broken disk.
# torch is imported where it is needed: the processes of prepare.py do without it, as it takes seconds to
# import.

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


def write_json(path, value):
    with open(path, 'w', encoding='utf-8') as f:
        json.dump(value, f, indent=1)


def write_tensors(path, tensors, metadata=None):
    """Write {name: tensor} as safetensors."""
    import safetensors.torch
    try:
        safetensors.torch.save_file(tensors, path, metadata)
    except safetensors.SafetensorError as error:  # it has the number of the system's error in its text alone
        found = re.search(r'\(os error (\d+)\)', str(error))
        if not found:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1]))) from None


def write_torch(path, value):
    """torch.save() to a file."""
    import torch
    with open(path, 'wb') as f:
        watched = Watched(f)
        try:
            torch.save(value, watched)
        except RuntimeError:  # "unexpected pos": torch does not say what went wrong
            if watched.error is None:
                raise
            raise watched.error from None


class Watched:
    """An open file that remembers the OSError of its last write."""

    def __init__(self, file):
        self.file, self.error, self.flush = file, None, file.flush

    def write(self, data):
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise


@contextmanager
def replacing(path, mode='w', suffix='.tmp'):
    """
    Open a file that replaces `path` once it is complete and on disk ('w': text, 'wb': bytes). On any error,
    the old file stays and no other file is left. suffix: ending of the temporary name.
    """
    encoding, newline = (None, None) if 'b' in mode else ('utf-8', '')
    if os.path.exists(path) and not os.path.isfile(path):  # /dev/stdout: nothing can take its place
        with open(path, mode, encoding=encoding, newline=newline) as f:
            yield f
        return
    path = os.path.realpath(path)  # a link stays a link
    temporary = path + suffix
    try:
        with open(temporary, mode, encoding=encoding, newline=newline) as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise


def replace_text(path, text):
    with replacing(path) as f:
        f.write(text)


def replace_json(path, value):
    replace_text(path, json.dumps(value, indent=1))


def write_all(f, data):
    """Write all bytes to an unbuffered file; the system may accept only a part at a time."""
    data = memoryview(data)
    while data:
        data = data[f.write(data):]


def append(path, text):
    """Append text to a file: all of it or, on an error, nothing."""
    with open(path, 'ab', buffering=0) as f:
        size = f.tell()
        try:
            write_all(f, text.encode())
        except OSError:
            with suppress(OSError):
                f.truncate(size)
            raise


def sha256(path):
    with open(path, 'rb') as f:
        return hashlib.file_digest(f, 'sha256').hexdigest()


# -----------------------------------------------------------------------------
# Folders

@contextmanager
def new_folder(path, setting='to'):
    """
    Make a folder that gets the name `path` once it is complete. Raises UserError, which names the setting, if
    `path` exists or cannot be written.
    """
    if os.path.exists(path) and not (os.path.isdir(path) and not os.listdir(path)):
        raise UserError(f'{setting}={path}: is there already: give a new folder')
    parent = os.path.dirname(os.path.abspath(path))
    with writing(f'{setting}={path}', 'give another folder, or make room'):
        os.makedirs(parent, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=parent) as temporary:
            folder = os.path.join(temporary, 'folder')
            os.mkdir(folder)
            yield folder
            for name in (*os.listdir(folder), '.'):
                sync(os.path.join(folder, name))
            os.rename(folder, path)
            sync(parent)


# -----------------------------------------------------------------------------
# Belong to one process

def lock(path):
    """
    Lock a folder, or a file that is made for it. Returns a descriptor to close at the end, or None if another
    process holds the lock. The lock ends with the process. If the file system has no locks (NFS has none for
    folders), every process gets it.
    """
    import fcntl  # here: on Windows, which has none, configurator.py has to speak first
    while True:
        fd = os.open(path, os.O_RDONLY if os.path.isdir(path) else os.O_RDWR | os.O_CREAT)
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
    """Whether an opened file is the one at this path."""
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except OSError:
        return False


# -----------------------------------------------------------------------------
# Save

def fault(point, step=None, value=None):
    """
    Do nothing and return `value`. For tests: the environment variable FAULT makes a fault happen at this
    point.
    """
    if 'FAULT' in os.environ:  # scale
        from features.scale import faults  # scale
        return faults.at(point, step, value)  # scale
    return value


def write(folder, step, weights, optimizer_state, state, other_files=()):
    """
    Write the files of a checkpoint into a new folder, and flush them to the disk. weights: {name: tensor};
    state: whatever json can write; other_files: paths to copy. Raises OSError.
    """
    os.makedirs(folder)
    fault('save:begin', step)
    tensors = {name: t.detach().contiguous() for name, t in weights.items()}
    write_tensors(os.path.join(folder, 'model.safetensors'), tensors)
    fault('save:weights', step)
    write_torch(os.path.join(folder, 'optimizer.pt'), optimizer_state)
    fault('save:optimizer', step)
    write_json(os.path.join(folder, 'state.json'), state)
    fault('save:state', step)
    for path in other_files:
        shutil.copy(path, folder)
    files = {}
    for name in sorted(os.listdir(folder)):
        path = os.path.join(folder, name)
        sync(path)
        files[name] = {'size': os.path.getsize(path), 'sha256': sha256(path)}
    fault('save:manifest', step)
    write_json(os.path.join(folder, 'manifest.json'), {'step': step, 'files': files})
    sync(os.path.join(folder, 'manifest.json'))
    sync(folder)
    fault('save:flushed', step)


def save(out_dir, step, weights, optimizer_state, state, other_files=(), keep=2):
    """
    Write out_dir/step_{step}, then remove older checkpoints except the newest `keep` and the best one. The
    arguments are those of write(). Returns the directory. Raises UserError if it could not be written, or if
    a weight is NaN or infinite.
    """
    final = os.path.join(out_dir, f'step_{step:08d}')
    temporary = final + '.tmp'
    check_finite(weights, final)
    shutil.rmtree(temporary, ignore_errors=True)  # left by a crash
    to_do = 'make room, then run the same command to resume; older checkpoints are untouched'
    try:
        with writing(final, to_do):
            write(temporary, step, weights, optimizer_state, state, other_files)
            shutil.rmtree(final, ignore_errors=True)  # the same step again, after a resume from an older one
            os.rename(temporary, final)
            fault('save:renamed', step)
            sync(out_dir)
    except Exception:  # half a checkpoint only takes up room
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    prune(out_dir, keep)
    fault('save:end', step)
    return final


def check_finite(weights, where):
    """Raise UserError if a number in {name: tensor} is NaN or infinite."""
    broken = first_not_finite(weights)
    if broken:
        raise UserError(f'{where}: not written, as {broken} is not finite: lower the learning rate; '
                        'older checkpoints are untouched')


def first_not_finite(weights):
    """The name of the first tensor in {name: tensor} with a NaN or infinite number; None if there is none."""
    return next((name for name, t in weights.items() if t.is_floating_point() and not is_finite(t)), None)


def is_finite(t, size=2 ** 24):
    """
    Whether all numbers of a tensor are finite. Reads `size` numbers at a time, because isfinite() allocates
    1.7 times its input.
    """
    return all(part.isfinite().all() for part in t.detach().reshape(-1).split(size))


def prune(out_dir, keep):
    """
    Remove checkpoints except the newest `keep` sound ones and the best one, and incomplete folders that a
    crash left.
    """
    sound = 0
    for folder in checkpoints(out_dir):
        if sound >= keep and folder != best(out_dir)[0]:
            fault('save:prune')
            shutil.rmtree(folder, ignore_errors=True)
        elif is_sound(folder):
            sound += 1
    for name in os.listdir(out_dir):
        if re.fullmatch(r'step_\d{8,}\.tmp', name):
            shutil.rmtree(os.path.join(out_dir, name), ignore_errors=True)


def is_sound(folder, known={}):  # noqa: B006 — what was found out lasts as long as the process
    """
    Whether damage() finds nothing. Checked again only if the size or time of a file has changed: reading all
    files is as expensive as writing them.
    """
    try:
        with os.scandir(folder) as entries:
            look = sorted((entry.name, entry.stat().st_size, entry.stat().st_mtime_ns) for entry in entries)
    except OSError:
        return False
    if known.get(folder, (None,))[0] != look:
        known[folder] = look, damage(folder) is None
    return known[folder][1]


def mark_best(out_dir, step, val_loss, keep=2):
    """
    Write to out_dir/best that the checkpoint of `step` is the best one, if that checkpoint was written. The
    previous best one may then be removed.
    """
    path = os.path.join(out_dir, 'best')
    if not os.path.isdir(os.path.join(out_dir, f'step_{step:08d}')):
        return
    with writing(path, 'make room, then run the same command to resume'):
        replace_json(path, {'checkpoint': f'step_{step:08d}', 'val_loss': val_loss})
    prune(out_dir, keep)


def prepare_out_dir(out_dir, step, settings):
    """
    Make out_dir and write settings.json. A new run moves an existing run aside, to out_dir.old1 and so on. A
    run that resumes after `step` moves later checkpoints, which are damaged, aside as step_….damaged.
    """
    with writing(f'out_dir={out_dir}', 'make room, or give another'):
        set_aside(out_dir, step, settings)
        os.makedirs(out_dir, exist_ok=True)
    write_settings(out_dir, settings)


def write_settings(out_dir, settings):
    """Write settings.json."""
    with writing(f'out_dir={out_dir}', 'make room, or give another'):
        replace_json(os.path.join(out_dir, 'settings.json'), settings)


CLAIMED = {}  # out_dir: its lock


def claim(out_dir):
    """
    Lock out_dir, if it exists, until release(), so that no other process trains in it. Raises UserError if
    one does.
    """
    path = os.path.join(out_dir, 'lock')
    if not os.path.isdir(out_dir) or out_dir in CLAIMED and is_at(CLAIMED[out_dir], path):
        return
    try:
        held = lock(path)
    except OSError as error:
        raise UserError(f'out_dir={out_dir}: {error.strerror}: give another') from None
    if held is None:
        raise UserError(f'out_dir={out_dir}: another process is training in it: wait for that one, '
                        'or give another')
    if out_dir in CLAIMED:  # the folder that it was of was moved aside
        os.close(CLAIMED[out_dir])
    CLAIMED[out_dir] = held


def release(out_dir):
    """Unlock out_dir after everything is written."""
    if out_dir in CLAIMED:
        path, held = os.path.join(out_dir, 'lock'), CLAIMED.pop(out_dir)
        if is_at(held, path):
            os.unlink(path)
        os.close(held)


def set_aside(out_dir, step, settings):
    if step and checkpoints(out_dir):  # none: it goes on with the schedule of another run
        for newer in checkpoints(out_dir):
            if int(os.path.basename(newer)[len('step_'):]) > step:
                shutil.rmtree(newer + '.damaged', ignore_errors=True)
                os.rename(newer, newer + '.damaged')
        return
    try:
        with open(os.path.join(out_dir, 'settings.json'), encoding='utf-8') as f:
            other_run = json.load(f) != json.loads(json.dumps(settings))
    except (OSError, ValueError):
        other_run = False
    if checkpoints(out_dir) or other_run:
        aside = next(path for n in range(1, 10 ** 6)
                     if not os.path.exists(path := f'{out_dir.rstrip("/")}.old{n}'))
        os.rename(out_dir, aside)
        Path(aside, 'lock').unlink(missing_ok=True)  # that of this process, which takes one of the new folder
        print(f'the run that was in {out_dir} is now in {aside}', flush=True)


# -----------------------------------------------------------------------------
# Find and load

def checkpoints(out_dir):
    """Checkpoint directories of a run, newest first."""
    names = sorted((n for n in os.listdir(out_dir) if re.fullmatch(r'step_\d{8,}', n)),
                   key=lambda n: -int(n[5:])) if os.path.isdir(out_dir) else []
    return [os.path.join(out_dir, n) for n in names]


def best(out_dir):
    """(directory, validation loss) of the best checkpoint; (None, None) if there is none yet."""
    try:
        with open(os.path.join(out_dir, 'best'), encoding='utf-8') as f:
            entry = json.load(f)
        folder = os.path.join(out_dir, entry['checkpoint'])
        return (folder, entry['val_loss']) if os.path.isdir(folder) else (None, None)
    except (OSError, ValueError, KeyError, TypeError):
        return None, None


def damage(folder):
    """A short description of what is wrong with a checkpoint directory; None if it is undamaged."""
    try:
        with open(os.path.join(folder, 'manifest.json'), encoding='utf-8') as f:
            files = json.load(f)['files']
        for name, entry in files.items():
            path = os.path.join(folder, name)
            if os.path.getsize(path) != entry['size'] or sha256(path) != entry['sha256']:
                return f'{name} does not match the manifest'
    except OSError as error:
        return f'{os.path.basename(error.filename or folder)}: {error.strerror or error}'
    except (ValueError, KeyError, TypeError, AttributeError):
        return 'manifest.json is not readable'
    return None


def find(where, which='last'):
    """
    The directory of a sound checkpoint. `where`: a checkpoint, or an out_dir, from which `which` is taken:
    'last' or 'best' (the last one if there is no best). If it is damaged, this is reported and the newest
    sound checkpoint is taken. Raises UserError if none is sound.
    """
    if which not in ('last', 'best'):
        raise UserError(f'which={which}: has no code in checkpoint.py: use last or best')
    if os.path.isfile(os.path.join(where, 'manifest.json')):
        candidates = [where]
    else:
        candidates = checkpoints(where)
        if which == 'best' and best(where)[0] in candidates:
            candidates.sort(key=lambda folder: folder != best(where)[0])
    if where.startswith('hf:'):
        raise UserError(f'{where}: takes a training run or a checkpoint of ours here')
    if not candidates:
        raise UserError(f'{where}: no checkpoint in it' if os.path.isdir(where)
                        else f'{where}: no such directory; give the out_dir of a training run')
    for folder in candidates:
        problem = damage(folder)
        if problem is None:
            return folder
        print(f'{folder}: {problem}; skipped', flush=True)
    raise UserError(f'{where}: no checkpoint in it is sound ({os.path.basename(candidates[0])}: '
                    f'{damage(candidates[0])}): restore one from a copy, or choose another --out_dir')


def load_state(folder):
    """Read state.json of a checkpoint. Raises UserError for a model that this version cannot compute."""
    path = os.path.join(folder, 'state.json')
    with open(path, encoding='utf-8') as f:
        state = json.load(f)
    if 'model' in state:
        state['model'] = without_removed(state['model'], path)
    return state


def read_weights(folder):
    """{name: tensor} of a checkpoint."""
    import safetensors.torch
    return safetensors.torch.load_file(os.path.join(folder, 'model.safetensors'))


def load_weights(model, weights, where):
    """
    Copy {name: tensor} into `model`. The names and shapes must match exactly. Raises UserError that names the
    first mismatch.
    """
    own = model.state_dict()
    for name in sorted(weights.keys() | own.keys()):
        found, wanted = (list(tensors[name].shape) if name in tensors else 'no such tensor'
                         for tensors in (weights, own))
        if found != wanted:
            raise UserError(f'{where}: {name}: found {found}, the network has {wanted}: '
                            'these are the weights of another network')
    model.load_state_dict(weights)


# -----------------------------------------------------------------------------
# Networks

def read_model(where, which='best', encoder=False, untie=False):
    """
    (ModelConfig, {name: tensor}, folder) of a checkpoint directory, of a run's `which` checkpoint, or of
    hf:FOLDER. An adapter is merged into its base; untie=True first gives the head its own matrix. encoder:
    whether the caller supports encoder-decoders. Raises UserError if it does not, and for an adapter that
    cannot be merged.
    """
    if is_foreign(where):  # hf
        from features.hf import reading  # hf
        cfg, weights = reading.load(where)  # hf
        check_kind(where, cfg, encoder)  # hf
        return cfg, weights, reading.find(where)  # hf
    from model import ModelConfig
    folder = find(where, which)
    state = load_state(folder)
    if 'base' in state:  # lora
        from features.lora import load  # lora
        cfg, weights = load.read_merged(where, folder, state, untie)  # lora
        check_kind(where, cfg, encoder)  # lora
        return cfg, weights, folder  # lora
    cfg = from_dict(ModelConfig, state['model'], os.path.join(folder, 'state.json'))
    check_kind(where, cfg, encoder)
    return cfg, read_weights(folder), folder


def load_model(where, which='best', encoder=False):
    """
    (the model in eval mode, its folder), from the same sources as read_model(). An adapter that cannot be
    merged is kept as separate layers.
    """
    if not is_foreign(where):
        folder = find(where, which)
        state = load_state(folder)
        if 'base' in state:  # lora
            from features.lora import load  # lora
            model = load.load_adapted(state, folder)  # lora
            check_kind(where, model.cfg, encoder)  # lora
            return model, folder  # lora
    cfg, weights, folder = read_model(where, which, encoder)
    return fill(cfg, weights, folder), folder


def tokenizer_of(where, folder):
    """
    (description, folder of its files) of the tokenizer of the model that read_model() read from `where`.
    """
    if is_foreign(where):  # hf
        from features.hf import reading  # hf
        return reading.tokenizer(where)  # hf
    return load_state(folder)['tokenizer'], folder


GPT2_NAMES = ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl')  # as nanoGPT's init_from has them


def is_foreign(where):
    """Whether `where` names a Hugging Face model: hf:FOLDER, or a published GPT-2."""
    return where.startswith('hf:') or where in GPT2_NAMES


def shorten(weights, cfg):
    """Cut the learned positions of the weights to the context length of this ModelConfig."""
    if cfg.position == 'learned':
        longest = cfg.block_size
        if cfg.n_encoder_layer:  # t5
            longest = max(longest, cfg.source_context)  # t5
        return weights | {'wpe.weight': weights['wpe.weight'][:longest]}
    return weights


def fill(cfg, weights, where):
    """
    A model with this ModelConfig and these weights, in eval mode. Raises UserError if the weights do not
    match.
    """
    from model import make_model
    model = make_model(cfg, init=False)
    load_weights(model, weights, where)
    return model.eval()


def check_kind(where, cfg, encoder):
    if cfg.n_encoder_layer and not encoder:
        raise UserError(f'{where}: is an encoder-decoder (n_encoder_layer={cfg.n_encoder_layer}), '
                        'this takes a decoder alone: sample.py runs it')
