"""
The folders of runs, where checkpoint.py does the usual things alone: which folder may become a run's, how a
run is moved aside, where a folder is that was renamed, which checkpoint is the best if out_dir/best does not
say it, and which run was trained last.
"""
import errno
import glob
import json
import math
import os
import re
import shlex
import shutil
import stat
import sys
import threading
from contextlib import suppress

import checkpoint
from checkpoint import CLAIMED, checkpoints, is_at, read_json
from configurator import ROOT, UserError

# What minnow writes into the folder of a run. All else in it is the user's and stays where it is
OURS = re.compile(r'step_\d{8,}(\.tmp|\.damaged)?|(settings\.json|log\.jsonl|best|wandb_id)(\.tmp)?|'
                  r'diverged\.txt(\.tmp)?|lock|wandb')
# The mark of a run: a settings.json that has all of these, or a checkpoint with a manifest
SETTINGS = {'out_dir', 'init_from', 'max_iters', 'n_layer', 'n_embd', 'block_size'}
# Files of a shell or a scheduler, which may be there before a run begins: nohup.out, slurm-7.log, job.o7
LOGS = re.compile(r'.*\.(log|out|err|[oe]\d+)|(std|train|job|slurm-)?(out|err|output|log|console|diverged)'
                  r'[\w-]*\.txt', re.IGNORECASE)
# What a file system or a desktop puts into every folder
SYSTEM = {'lost+found', '.snapshot', '.DS_Store', '.gitkeep', '.gitignore', '.keep'}


# -----------------------------------------------------------------------------
# Which folder may become a run's

def is_run(folder):
    """Whether a folder has the mark of a run."""
    with suppress(UserError):
        if read_json(os.path.join(folder, 'settings.json')).keys() >= SETTINGS:
            return True
    with suppress(UserError):
        for path in checkpoints(folder):
            with suppress(UserError):
                if read_json(os.path.join(path, 'manifest.json')).keys() >= {'step', 'files'}:
                    return True
    return False


def check_own(out_dir):
    """
    Raise UserError unless a folder is the one of a run, or holds nothing but logs of a shell, and is none in
    which users work.
    """
    to_do = 'give a folder of its own, as --out_dir=out/NAME'
    real = os.path.realpath(out_dir)
    for path, name in [('/', 'the root'), ('~', 'your home'), (ROOT, 'the folder of minnow itself'),
                       ('.', 'the folder in which you are')]:
        if real == os.path.realpath(os.path.expanduser(path)):
            raise UserError(f'out_dir={out_dir}: is {name}: {to_do}')
    path = os.path.join(out_dir, 'lock')
    if os.path.lexists(path) and not stat.S_ISREG(os.lstat(path).st_mode):
        raise UserError(f'{path}: is no regular file: {to_do}')
    if is_run(out_dir):
        return
    for name in sorted(os.listdir(out_dir)):
        path = os.path.join(out_dir, name)
        if name == 'lock' and not os.path.getsize(path):  # of a start that was killed
            continue
        if os.path.isdir(path) and is_run(path):
            raise UserError(f'out_dir={out_dir}: holds other runs, as {name}: {to_do}')
        if not is_log(path):
            raise UserError(f'out_dir={out_dir}: holds {name}, and is not the folder of a run: {to_do}')


def is_log(path, depth=5):
    """Whether this is a log of a shell, a scheduler or torchrun, a folder of such logs, or of the system."""
    name = os.path.basename(path)
    if name in SYSTEM:
        return True
    found = os.lstat(path)
    if stat.S_ISDIR(found.st_mode) and depth:
        names = os.listdir(path)
        return bool(names) and all(is_log(os.path.join(path, name), depth - 1) for name in names)
    if not stat.S_ISREG(found.st_mode):
        return False
    for fd in (1, 2):  # train.py > out/run/anything
        with suppress(OSError):  # closed
            if os.path.samestat(found, os.fstat(fd)):
                return True
    return LOGS.fullmatch(name) is not None


# -----------------------------------------------------------------------------
# The beginning of a run: what was there before

def set_aside(out_dir, step, settings):
    """
    Move the run in out_dir aside, if there is another one and this one does not go on from it after `step`.
    Else rename later checkpoints, which are damaged, and write out_dir/best again if it is damaged.
    """
    found = checkpoints(out_dir)
    if step and found:  # none: it goes on with the schedule of another run
        for folder in found:
            if checkpoint.step_of(folder) > step:
                shutil.rmtree(folder + '.damaged', ignore_errors=True)
                os.rename(folder, folder + '.damaged')
        folder, loss = checkpoint.best(out_dir)
        if folder:
            entry = {'checkpoint': os.path.basename(folder), 'val_loss': loss}
            checkpoint.replace_json(os.path.join(out_dir, 'best'), entry)
        return
    is_other = bool(found)
    with suppress(UserError):
        stored = read_json(os.path.join(out_dir, 'settings.json'))
        is_other = is_other or stored != json.loads(json.dumps(settings))
    if is_other:
        aside = move_aside(os.path.realpath(out_dir))
        print(f'the run that was in {out_dir} is now in {aside}', flush=True)


def move_aside(folder):
    """
    Move what minnow wrote into a new folder beside this one, FOLDER.old1, or, if none can be made there (a
    mounted volume), into FOLDER/old1; returns it. The checkpoints go first, the oldest of them at first: what
    is left after a crash is still a run.
    """
    for base in (f'{folder}.old', os.path.join(folder, 'old')):
        names = [name for name in os.listdir(folder) if OURS.fullmatch(name) and name != 'lock']
        names.sort(key=lambda name: (not name.startswith('step_'), name == 'settings.json', len(name), name))
        aside = ''
        try:
            aside = new_number(base)
            for name in names:
                os.rename(os.path.join(folder, name), os.path.join(aside, name))
        except OSError as error:
            with suppress(OSError):  # some are in it
                os.rmdir(aside)
            if base.startswith(folder + os.sep) or error.errno not in ELSEWHERE:
                raise
            continue
        checkpoint.sync(aside)
        checkpoint.sync(folder)
        return aside


ELSEWHERE = {errno.EXDEV, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG}


def new_number(base):
    """Make the first folder of base1, base2, … that is not there."""
    number = 1
    while True:
        with suppress(FileExistsError):
            os.mkdir(f'{base}{number}')
            return f'{base}{number}'
        number += 1


# -----------------------------------------------------------------------------
# A folder that is no longer where it was

REGAIN = threading.Lock()  # --async_save has a thread that writes


class Moved(UserError):
    """The folder of the run that trains in out_dir was renamed. .folder: where it is now"""
    folder = ''


def follow(error, s):
    """Let a run write into the folder to which its out_dir was moved: it is still locked."""
    CLAIMED[error.folder] = CLAIMED.pop(s.out_dir)
    s.out_dir = error.folder
    if s.async_save:  # scale
        from features.scale import background  # scale
        background.close()  # scale: it met the same error


def regain(out_dir):
    """
    Lock a claimed out_dir again whose lock was removed by hand. Raises UserError if another process holds it,
    Moved if the folder was renamed, and UserError if it was removed.
    """
    with REGAIN:
        folder, held, made = CLAIMED[out_dir]
        path = os.path.join(out_dir, 'lock')
        if is_at(folder, out_dir):
            if is_at(held, path):
                return
            with checkpoint.writing(path, 'give another --out_dir'):
                again = checkpoint.lock(path)
            if again is None:
                raise checkpoint.is_busy(out_dir)
            os.close(held)
            CLAIMED[out_dir] = folder, again, made
            return
    where = place_of(folder)
    if where is None:
        other = ', and another folder is there now' * os.path.lexists(out_dir)
        raise UserError(f'out_dir={out_dir}: was removed while this run trained in it{other}: '
                        'its checkpoints are gone')
    error = Moved(f'out_dir={out_dir}: was renamed while this run trained in it: its checkpoints are in '
                  f'{where} now: go on with {shlex.quote(f"--out_dir={where}")}')
    error.folder = where
    raise error


def place_of(fd):
    """The path of an open folder, wherever it was moved; None if it was removed or cannot be found."""
    with suppress(OSError, ValueError):
        if sys.platform == 'darwin':
            import fcntl
            path = os.fsdecode(fcntl.fcntl(fd, fcntl.F_GETPATH, bytes(1024)).rstrip(b'\0'))
        else:
            path = os.readlink(f'/proc/self/fd/{fd}')
        if is_at(fd, path):
            return path
    return None


# -----------------------------------------------------------------------------
# Which checkpoint, which run

def recover_best(out_dir, is_sure=False):
    """
    (directory, validation loss) of the best checkpoint that is there, by log.jsonl and, where that was cut,
    by val_loss.json; (None, None) if none was evaluated. Raises UserError if out_dir/best is damaged and the
    others say nothing; is_sure: also if out_dir/best could not be read for now.
    """
    path = os.path.join(out_dir, 'best')
    problem = None
    try:
        if os.path.lexists(path):
            read_json(path)
    except UserError as error:
        problem = error
    if problem and is_sure:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
            with suppress(IsADirectoryError), os.fdopen(fd, 'rb', buffering=0) as f:
                f.read(1)
        except OSError:
            raise problem from None
    losses = {}
    try:
        records = checkpoint.read_records(os.path.join(out_dir, 'log.jsonl'))
    except OSError as error:
        raise UserError(f'{path} and log.jsonl: {error.strerror}') from None
    for record in records:
        loss = record.get('val_loss')
        if type(loss) in (int, float) and math.isfinite(loss):
            losses[record['step']] = loss
    found = {folder: losses.get(checkpoint.step_of(folder), stored_loss(folder))
             for folder in checkpoints(out_dir)}
    found = {folder: loss for folder, loss in found.items() if loss is not None}
    if found:
        folder = min(found, key=found.get)
        return folder, found[folder]
    if problem:
        raise UserError(f'{problem}; nor does log.jsonl say which checkpoint is the best: '
                        f'remove {path} to go on without')
    return None, None


def stored_loss(folder):
    """The loss in val_loss.json of a checkpoint that was the best once; None without one."""
    with suppress(UserError):
        loss = read_json(os.path.join(folder, 'val_loss.json')).get('val_loss')
        if type(loss) in (int, float):
            return loss
    return None


DEPTH = 4  # of a run under out/: out/sweeps/NAME/RUN has three


def last_run(top='out'):
    """The run in or under `top` with the newest checkpoint; says which. Raises UserError if there is none."""
    times = {}
    for depth in range(DEPTH):
        for folder in glob.glob(os.path.join(glob.escape(top), *['*'] * depth)):
            with suppress(OSError, UserError):  # of others, or removed in between
                found = checkpoints(folder)
                if found:
                    times[folder] = os.stat(found[0]).st_mtime
    if not times:
        raise UserError(f'out_dir: none is given, and there is no run in {top}: give --out_dir=DIR')
    newest = max(times, key=times.get)
    print(f'out_dir={newest}: the last run trained; --out_dir=DIR takes another', file=sys.stderr, flush=True)
    return newest
