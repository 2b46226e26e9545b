"""
Tokens → shards, and the parts of a corpus that several machines prepared → one data set (python prepare.py --merge=OUT). batches.py reads them.
"""
import os
import re
import shutil
from contextlib import suppress

from tqdm import tqdm

from checkpoint import replace_json, sha256, sync, write_all
from configurator import UserError
from tokenizer import load_tokenizer

SHARD_TOKENS = 100_000_000  # a shard is closed by the task that brings it here


class Split:
    """The token files of one split, appended to. `shards`: what meta.json will say of them; the last one may be unfinished."""

    def __init__(self, folder, name, dtype, shards):
        self.folder, self.name, self.itemsize, self.shards, self.files = folder, name, dtype.itemsize, shards, ()
        if shards and 'sha256' not in shards[-1]:
            self.open('r+b')

    def open(self, mode):
        shard = self.shards[-1]
        # unbuffered: what a full disk refuses is not written again, and refused again, when the files are closed
        self.files = [open(os.path.join(self.folder, name), mode, buffering=0) for name in files_of(shard)]
        for f, size in zip(self.files, (shard['tokens'] * self.itemsize, shard['documents'] * 8)):
            if f.seek(0, os.SEEK_END) < size:
                raise UserError(f'{f.name}: shorter than it was: it is deleted, run the same command to start again')
            f.seek(size)
            f.truncate()  # what came after the last record of progress is made again

    def write(self, ids, starts, size, may_close):
        """Append the tokens of a task, whose documents start at `starts` and have `size` bytes of text; may_close: the last of them ends with it."""
        if not self.files:
            self.shards.append({'file': f'{self.name}_{len(self.shards):05d}.bin', 'tokens': 0, 'documents': 0, 'bytes': 0})
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
        """Finish the shard."""
        if self.files:
            self.sync()
            for f in self.files:
                f.close()
            hashes = [sha256(f.name) for f in self.files]
            shard = self.shards[-1]
            shard.update(bytes_on_disk=shard['tokens'] * self.itemsize, sha256=hashes[0], idx_sha256=hashes[1])
            self.files = ()


def files_of(shard):
    return [shard['file'], shard['file'][:-len('bin')] + 'idx']


def totals(shards):
    """What meta.json says of a split with these shards."""
    return {key: sum(shard[key] for shard in shards) for key in ('tokens', 'documents', 'bytes')} | {'shards': shards}


# -----------------------------------------------------------------------------
# Parts → one

def parts_folder(out):
    return f'{out}.parts'


def part_folder(out, number, count):
    """Where part `number` of `count` of the data set `out` is made."""
    return os.path.join(parts_folder(out), f'{number}_of_{count}')


def find_parts(out):
    """The folders of all parts, in the order of the corpus. Raises UserError that names those that are missing."""
    parent = parts_folder(out)
    names = [re.fullmatch(r'([1-9]\d*)_of_([1-9]\d*)', name) for name in (os.listdir(parent) if os.path.isdir(parent) else ())]
    parts = {(int(m[2]), int(m[1])) for m in names if m}
    if not parts:
        raise UserError(f'merge={out}: no parts in {parent}: make them with --out={out} --part=1/N to N/N')
    counts = sorted({count for count, _ in parts})
    if len(counts) > 1:
        raise UserError(f'merge={out}: {parent} has parts of {" and of ".join(map(str, counts))}: delete those that do not belong to it')
    missing = [n for n in range(1, counts[0] + 1) if (counts[0], n) not in parts]
    if missing:
        raise UserError(f'merge={out}: part {", ".join(map(str, missing[:10]))}{" and more" * (len(missing) > 10)} of {counts[0]} missing in {parent}: '
                        f'make it with --part={missing[0]}/{counts[0]}')
    return [part_folder(out, n, counts[0]) for n in range(1, counts[0] + 1)]


def read_parts(folders):
    """meta.json of the parts, which have to be of one corpus. Raises UserError that names the setting in which one is not."""
    from batches import read_meta
    metas = [read_meta(folder) for folder in folders]
    for n, (folder, meta) in enumerate(zip(folders, metas), 1):
        try:
            is_sound = is_part(meta, f'{n}/{len(folders)}')
            source, first = ({**m['source'], 'inputs': '', 'part': ''} for m in (meta, metas[0]))  # machines may have copies, which have other times
            changed = next((key for key in first | source if first.get(key) != source.get(key)), None)
            changed = changed or next((key for key in metas[0] | meta if key not in ('source', 'splits') and metas[0].get(key) != meta.get(key)), None)
        except (KeyError, TypeError, AttributeError):
            is_sound = False
        if not is_sound:
            raise UserError(f'{folder}: is not the part that its name says: make it again')
        if changed:
            what = 'from other input files' if changed == 'files' else f'with another {changed}'
            raise UserError(f'{folder}: was prepared {what} than {folders[0]}: make one of them again')
    return metas


def is_part(meta, name):
    """Whether a meta.json is that of the part `name`, as 3/64, with all that join() reads. Raises KeyError and TypeError for missing fields."""
    if meta['source']['part'] != name or meta['splits'].keys() != {'train', 'val'} or meta['split'] not in ('document', 'tail'):
        return False
    if not all(isinstance(text, str) for text in (*meta['source']['sources'], meta['source'].get('target', ''))):
        return False
    shards = [shard for split in meta['splits'].values() for shard in split['shards']]
    counts = [shard.get(field) for shard in shards for field in ('tokens', 'documents', 'bytes')]
    return all({'sha256', 'idx_sha256'} <= shard.keys() for shard in shards) and all(type(count) is int for count in counts)


def join(folders, metas, part):
    """
    Put the shards of parts into the folder `part`, one after the other: the data set that one machine would have made, but for where its shards end. Files
    are linked, so that they take no room twice, or copied where they cannot be. Returns meta.json. Raises UserError for a damaged one.
    """
    load_tokenizer(metas[0]['tokenizer'], folders[0])
    for name in metas[0]['tokenizer'].get('files', ()):
        take(os.path.join(folders[0], name), os.path.join(part, name))
    splits = {name: [] for name in metas[0]['splits']}
    todo = [(folder, name, shard) for folder, meta in zip(folders, metas) for name, split in meta['splits'].items() for shard in split['shards']]
    for folder, name, shard in tqdm(todo, desc='merging', unit='shard', disable=None):
        renamed = shard | {'file': f'{name}_{len(splits[name]):05d}.bin'}
        for old, new, digest in zip(files_of(shard), files_of(renamed), (shard['sha256'], shard['idx_sha256'])):
            path = os.path.join(folder, old)
            take(path, os.path.join(part, new))
            if sha256(os.path.join(part, new)) != digest:
                raise UserError(f'{path}: its contents do not match the hash in meta.json (damaged file): make {folder} again')
        splits[name].append(renamed)
    source = {key: value for key, value in metas[0]['source'].items() if key not in ('part', 'files')}
    return metas[0] | {'splits': {name: totals(shards) for name, shards in splits.items()}, 'source': source}


def take(path, to):
    """The same file under another name, without a copy if the file system can."""
    try:
        os.link(path, to)
    except FileNotFoundError:
        raise
    except OSError:
        shutil.copyfile(path, to)
        sync(to)


# -----------------------------------------------------------------------------
# The folder that a data set is made in, and its name

def is_free(out):
    """Whether a data set can be made here: there is nothing, an empty folder, or one in which a run was stopped."""
    if not os.path.isdir(out):
        return not os.path.lexists(out)
    names = os.listdir(out)
    return 'meta.json' not in names and ('.part' in names or set(names) <= {'lost+found'})  # an empty volume has that


def work_folder(out):
    """
    Where the data set `out` is made: in a folder beside it, which then gets its name; or inside, if `out` is there already.
    It may be a mounted volume or a link, which no folder can take the place of.
    """
    return os.path.join(out, '.part') if os.path.isdir(out) else f'{out}.part'


def publish(part, out, meta, tokenizer_files):
    """Give the folder `part`, whose token files are flushed, its meta.json, and make it the data set `out`."""
    replace_json(os.path.join(part, 'meta.json'), meta)
    for path in [os.path.join(part, name) for name in tokenizer_files] + [part]:
        sync(path)
    move(part, out)


def move(part, out):
    """Make a finished folder `part` the data set `out`. Where `out` is there, its meta.json comes last: without it, it is none."""
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
