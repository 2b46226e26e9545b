"""
Tokens → token files, which an interrupted run continues, and the folder in which they are made. batches.py
reads them.
"""
import errno
import json
import os
import re
import stat
from contextlib import contextmanager, suppress

from checkpoint import lock, replace_json, sha256, sync
from configurator import UserError

SHARD_TOKENS = 100_000_000  # the task that reaches it closes the shard


def write_all(f, data):
    """Write all bytes to an unbuffered file: the system may take a part of them at a time."""
    data = memoryview(data)
    while data:
        data = data[f.write(data):]


class Split:
    """
    The token files of train or val, for appending. shards: their entries in meta.json; the last one may be
    unfinished: it has no sha256.
    """

    def __init__(self, folder, name, dtype, shards):
        self.folder, self.name, self.itemsize, self.shards = folder, name, dtype.itemsize, shards
        self.files = ()  # the .bin and the .idx of the last shard while they are open
        if shards and 'sha256' not in shards[-1]:
            self.open('r+b')

    def open(self, mode):
        shard = self.shards[-1]
        sizes = shard['tokens'] * self.itemsize, shard['documents'] * 8
        # unbuffered: what a full disk refuses is not written, and refused, once more when the files are
        # closed
        self.files = [open(os.path.join(self.folder, name), mode, buffering=0) for name in files_of(shard)]
        for f, size in zip(self.files, sizes):
            if f.seek(0, os.SEEK_END) < size:
                raise UserError(f'{f.name}: shorter than it was: it is deleted, '
                                'run the same command to start again')
            f.seek(size)
            f.truncate()  # what was written after the last record of the progress is made again

    def write(self, ids, starts, size, may_close):
        """
        Append the tokens of a task, whose documents start at `starts` among them and have `size` bytes of
        text.
        may_close: whether its last document ends with it.
        """
        if not self.files:
            name = f'{self.name}_{len(self.shards):05d}.bin'
            self.shards.append({'file': name, 'tokens': 0, 'documents': 0, 'bytes': 0})
            self.open('wb')
        shard = self.shards[-1]
        write_all(self.files[0], ids.tobytes())
        write_all(self.files[1], (starts + shard['tokens']).astype('<u8').tobytes())
        shard['tokens'] += len(ids)
        shard['documents'] += len(starts)
        shard['bytes'] += size
        if may_close and shard['tokens'] >= SHARD_TOKENS:
            self.close()

    def sync(self):
        for f in self.files:
            os.fsync(f.fileno())

    def close(self):
        """Finish the last shard."""
        if not self.files:
            return
        self.sync()
        for f in self.files:
            f.close()
        hashes = [sha256(f.name) for f in self.files]
        shard = self.shards[-1]
        shard.update(bytes_on_disk=shard['tokens'] * self.itemsize, sha256=hashes[0], idx_sha256=hashes[1])
        self.files = ()


def files_of(shard):
    """The names of the two files of a shard."""
    return [shard['file'], shard['file'].removesuffix('bin') + 'idx']


def totals(shards):
    """The entry of meta.json for a side with these shards."""
    counts = {key: sum(shard[key] for shard in shards) for key in ('tokens', 'documents', 'bytes')}
    return {**counts, 'shards': shards}


def is_count(value):
    return type(value) is int and 0 <= value < 2 ** 62


def has_counts(entry, names=('tokens', 'documents', 'bytes')):
    return isinstance(entry, dict) and all(is_count(entry.get(name)) for name in names)


# -----------------------------------------------------------------------------
# The folder in which a data set is made

MARK = '.prepare'  # a file that is written first into a folder in which a data set is made
OWN = re.compile(r'(train|val)_\d{5,9}\.(bin|idx|mask)|(meta|progress)\.json(\..{0,40}tmp)?|'
                 r'tokenizer\.(model|json|bin)|vocab\.txt|' + re.escape(MARK))


def is_free(out):
    """
    Whether a data set can be made here: nothing exists, or an empty folder, or one with an interrupted run.
    """
    if not os.path.isdir(out):
        return not os.path.lexists(out)
    names = set(os.listdir(out)) - {'lost+found'}  # an empty volume has that
    if '.part' in names:  # a run that was stopped while it put its files in place
        names = {name for name in names - {'.part'} if name == 'meta.json' or not OWN.fullmatch(name)}
    return not names


def check_own(part):
    """Raise UserError unless all that is in the work folder `part` was written by prepare.py, or nothing."""
    names = os.listdir(part)
    foreign = [name for name in sorted(names) if not OWN.fullmatch(name)
               or not stat.S_ISREG(os.lstat(os.path.join(part, name)).st_mode)]
    if names and not (MARK in names or has_progress(part)):
        foreign = foreign or sorted(names)
    if foreign:
        raise UserError(f'{part}: holds {foreign[0]!r:.100}, which prepare.py did not write: '
                        'move it away, or choose another --out')


def has_progress(part):
    """Whether a folder has a progress.json: earlier versions wrote no other mark."""
    try:
        with open(os.path.join(part, 'progress.json'), encoding='utf-8') as f:
            return {'source', 'tasks'} <= json.load(f).keys()
    except (OSError, ValueError, AttributeError, RecursionError):
        return False


def clear(part):
    """Remove what prepare.py wrote from a work folder, except the mark."""
    for name in os.listdir(part):
        if OWN.fullmatch(name) and name != MARK:
            os.unlink(os.path.join(part, name))


def remove(part):
    """Remove a work folder, unless somebody else's files are in it by now."""
    clear(part)
    with suppress(OSError):
        os.unlink(os.path.join(part, MARK))
        os.rmdir(part)


def work_folder(out):
    """
    The folder in which the data set `out` is made: one beside it, which is then renamed; or, if `out` exists,
    inside it, because it may be a mounted volume or a link, which cannot be replaced.
    """
    return os.path.join(out, '.part') if os.path.isdir(out) else f'{out}.part'


@contextmanager
def locked(out):
    """
    The work folder of `out`, locked for this process. After a UserError it is removed; after other errors it
    stays for the next run. Raises UserError if somebody else's files are in it.
    """
    part = work_folder(out)
    if os.path.lexists(part) and (os.path.islink(part) or not os.path.isdir(part)):
        raise UserError(f'{part}: is no folder of prepare.py: move it away, or choose another --out')
    os.makedirs(part, exist_ok=True)
    held = lock(part)
    if held is None:
        raise UserError(f'out={out}: another process is preparing it: wait for that one, '
                        'or choose another --out')
    try:
        check_own(part)
        try:
            with open(os.path.join(part, MARK), 'w') as f:
                f.write('prepare.py makes a data set in this folder, and may delete it\n')
            if not is_free(out) or work_folder(out) != part:
                raise UserError(f'out={out}: was made while this command started: run it again')
            yield part
        except UserError:
            remove(part)
            if os.path.dirname(part).endswith('.parts'):
                with suppress(OSError):  # other parts are in it
                    os.rmdir(os.path.dirname(part))
            raise
    finally:
        os.close(held)


def publish(part, out, meta, tokenizer_files):
    """
    Write meta.json into the folder `part`, whose token files are flushed to disk, and make it the data set
    `out`.
    """
    replace_json(os.path.join(part, 'meta.json'), meta)
    for name in tokenizer_files:
        sync(os.path.join(part, name))
    sync(part)
    move(part, out)


def move(part, out):
    """
    Make a complete folder `part` the data set `out`. If `part` is inside of `out`, the files are moved up,
    meta.json last, because a folder without it is not a data set. Raises OSError if a file is in the way.
    """
    if os.path.basename(part) != '.part':
        try:
            os.rename(part, out)
        except OSError as error:
            raise OSError(error.errno, error.strerror, out) from None  # that is in the way, not `part`
        for name in ('progress.json', MARK):
            with suppress(FileNotFoundError):
                os.unlink(os.path.join(out, name))
        sync(os.path.dirname(os.path.abspath(out)))
        return
    names = set(os.listdir(part)) - {'progress.json', MARK}
    names = sorted(names, key=lambda name: (name == 'meta.json', name))
    for name in names:
        if os.path.lexists(os.path.join(out, name)):
            raise OSError(errno.EEXIST, os.strerror(errno.EEXIST), os.path.join(out, name))
    for name in names:
        if name == 'meta.json':
            sync(out)
        os.rename(os.path.join(part, name), os.path.join(out, name))
    remove(part)
    sync(out)
