"""
Tokens → token files, which an interrupted run continues, and the folder in which they are made. batches.py
reads them.
"""
import os
import shutil
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


# -----------------------------------------------------------------------------
# The folder in which a data set is made

def is_free(out):
    """
    Whether a data set can be made here: nothing exists, or an empty folder, or one with an interrupted run.
    """
    if not os.path.isdir(out):
        return not os.path.lexists(out)
    names = os.listdir(out)
    # an empty volume has that
    return 'meta.json' not in names and ('.part' in names or set(names) <= {'lost+found'})


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
    stays for the next run.
    """
    part = work_folder(out)
    os.makedirs(part, exist_ok=True)
    held = lock(part)
    if held is None:
        raise UserError(f'out={out}: another process is preparing it: wait for that one, '
                        'or choose another --out')
    try:
        yield part
    except UserError:
        shutil.rmtree(part)
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
    Make a complete folder `part` the data set `out`. If `out` exists, the files are moved into it, meta.json
    last, because a folder without it is not a data set.
    """
    if not os.path.isdir(out):
        os.rename(part, out)
        with suppress(FileNotFoundError):
            os.unlink(os.path.join(out, 'progress.json'))
        sync(os.path.dirname(os.path.abspath(out)))
        return
    for name in sorted(os.listdir(part), key=lambda name: (name == 'meta.json', name)):
        if name == 'meta.json':
            sync(out)
        if name != 'progress.json':
            os.rename(os.path.join(part, name), os.path.join(out, name))
    shutil.rmtree(part)
    sync(out)
