"""
Parts: a corpus that several machines prepare, a stretch of the files each, and that is then merged into one
data set.

    python prepare.py 'fineweb/*.parquet' --tokenizer=gpt2 --out=data/fineweb --part=3/64
    python prepare.py --merge=data/fineweb      # when all 64 parts are in data/fineweb.parts

For bpe:N and char each machine reads the text of all parts first; a FILE.model that was trained before avoids
that. A file of which a part is needed is read from its start.
"""
import os
import re
import shutil

from tqdm import tqdm

import prepare
from checkpoint import open_regular, sha256, sync
from configurator import UserError
from features.text.figures import print_figures
from features.text.settings import TextConfig
from features.text.splits import check_sides
from features.text.tokenfiles import clear, files_of, is_free, locked, publish, totals, work_folder
from tokenizer import load_tokenizer


def main(s):
    """Prepare a part, or merge all parts, and print the summary."""
    if s.merge:
        out, meta, count = merge(s.merge.rstrip('/'))
        state = f'made of {count} parts; {parts_folder(out)} can be deleted'
        prepare.summary(out, meta, None, state)
        return
    out, meta, figures = prepare.prepare(s)
    print(f'{out}: {"ready" if figures else "already prepared"}')
    for side, split in meta['splits'].items():
        print(f'    {side:5} {split["documents"]:>12,} documents {split["tokens"]:>15,} tokens '
              f'{split["bytes"]:>16,} bytes of text {len(split["shards"]):>4} shard(s)')
    tokens, size = (sum(split[key] for split in meta['splits'].values()) for key in ('tokens', 'bytes'))
    if not tokens:
        print('    a part without text')
        return
    kind = meta['tokenizer']['kind']
    print(f'    {size / tokens:.3f} bytes a token; tokenizer {kind} of {meta["vocab_size"]:,}, '
          f'{meta["dtype"]}; split by {meta["split"]}')
    print_figures(meta, figures)
    print('next: the other parts, '
          f'then python prepare.py --merge={os.path.dirname(out).removesuffix(".parts")}')


def place_of(s):
    """(number, count) of the part to prepare: (1, 1) = everything."""
    if not s.part:
        return 1, 1
    number, count = s.part.split('/')
    return int(number), int(count)


def parts_folder(out):
    return f'{out}.parts'


def part_folder(out, number, count):
    """The folder of part `number` of `count` of the data set `out`."""
    return os.path.join(parts_folder(out), f'{number}_of_{count}')


# -----------------------------------------------------------------------------
# The parts are all there, and of one corpus

def find_parts(out):
    """The folders of all parts, in the order of the corpus. Raises UserError that names the missing ones."""
    parent = parts_folder(out)
    parts = set()  # {(count, number)}
    for name in os.listdir(parent) if os.path.isdir(parent) else []:
        found = re.fullmatch(r'([1-9]\d*)_of_([1-9]\d*)', name)
        if found:
            parts.add((int(found[2]), int(found[1])))
    if not parts:
        raise UserError(f'merge={out}: no parts in {parent}: make them with --out={out} --part=1/N to N/N')
    counts = sorted({count for count, _ in parts})
    if len(counts) > 1:
        several = ' and of '.join(map(str, counts))
        raise UserError(f'merge={out}: {parent} has parts of {several}: '
                        'delete those that do not belong to it')
    count = counts[0]
    missing = [number for number in range(1, count + 1) if (count, number) not in parts]
    if missing:
        names = ', '.join(map(str, missing[:10])) + ' and more' * (len(missing) > 10)
        raise UserError(f'merge={out}: part {names} of {count} missing in {parent}: '
                        f'make it with --part={missing[0]}/{count}')
    return [part_folder(out, number, count) for number in range(1, count + 1)]


def read_parts(folders):
    """meta.json of all parts. Raises UserError for a part of another corpus or with other settings."""
    from batches import read_meta
    metas = [read_meta(folder) for folder in folders]
    for number, (folder, meta) in enumerate(zip(folders, metas), 1):
        try:
            is_sound = is_part(meta, f'{number}/{len(folders)}')
            changed = difference(meta, metas[0])
        except (KeyError, TypeError, AttributeError):
            is_sound = False
        if not is_sound:
            raise UserError(f'{folder}: is not the part that its name says: make it again')
        if changed:
            what = 'from other input files' if changed == 'files' else f'with another {changed}'
            raise UserError(f'{folder}: was prepared {what} than {folders[0]}: make one of them again')
    return metas


def is_part(meta, name):
    """
    Whether this is meta.json of the part `name`, for example 3/64, with everything that join() reads. Raises
    KeyError or TypeError for a missing field.
    """
    source, splits = meta['source'], meta['splits']
    if (source['part'] != name or splits.keys() != {'train', 'val'}
            or meta['split'] not in ('document', 'tail')):
        return False
    if not all(isinstance(text, str) for text in (*source['sources'], source.get('target', ''))):
        return False
    for split in splits.values():
        for shard in split['shards']:
            if not {'sha256', 'idx_sha256'} <= shard.keys():
                return False
            if not all(type(shard.get(name)) is int for name in ('tokens', 'documents', 'bytes')):
                return False
    return True


def difference(meta, first):
    """The name of what makes two parts' meta.json differ that has to be the same; '' if nothing does."""
    own = {'part': '', 'inputs': ''}  # each machine may have its own copy of the files, with other times
    ours, theirs = {**meta['source'], **own}, {**first['source'], **own}
    for key in theirs | ours:
        if theirs.get(key) != ours.get(key):
            return key
    for key in first | meta:
        if key not in ('source', 'splits') and first.get(key) != meta.get(key):
            return key
    return ''


# -----------------------------------------------------------------------------
# Parts → one

def merge(out):
    """
    Make the data set `out` from its parts, which are kept. Raises UserError. Returns (folder, meta.json,
    number of parts).
    """
    if not is_free(out):
        raise UserError(f'merge={out}: exists: delete it first')
    part = work_folder(out)
    if os.path.exists(os.path.join(part, 'progress.json')):
        raise UserError(f'merge={out}: {part} holds an interrupted run without --part: resume it, '
                        'or delete that first')
    folders = find_parts(out)
    metas = read_parts(folders)
    try:
        with locked(out) as part:
            clear(part)  # of a merge that was interrupted
            meta = join(folders, metas, part)
            settings = {name: meta['source'][name] for name in ('sources', 'target', 'val_fraction')
                        if name in meta['source']}
            check_sides(meta['splits'], TextConfig(**settings, split=meta['split']))
            publish(part, out, meta, meta['tokenizer'].get('files', ()))
    except OSError as error:
        raise UserError(f'{error.filename or out}: {error.strerror or error}: fix that, or make room, '
                        'and run the same command') from None
    return out, meta, len(folders)


def join(folders, metas, part):
    """
    Put the shards of all parts into the folder `part`: the data set that one machine would have made, except
    that shards end elsewhere. Files are hard-linked, so that they need no extra space, or copied if that is
    not possible. Returns meta.json. Raises UserError for a damaged part.
    """
    load_tokenizer(metas[0]['tokenizer'], folders[0])
    for name in metas[0]['tokenizer'].get('files', ()):
        take(os.path.join(folders[0], name), os.path.join(part, name))
    todo = []
    for folder, meta in zip(folders, metas):
        for side, split in meta['splits'].items():
            todo += [(folder, side, shard) for shard in split['shards']]
    splits = {side: [] for side in metas[0]['splits']}
    for folder, side, shard in tqdm(todo, desc='merging', unit='shard', disable=None):
        renamed = {**shard, 'file': f'{side}_{len(splits[side]):05d}.bin'}
        for old, new, digest in zip(files_of(shard), files_of(renamed),
                                    (shard['sha256'], shard['idx_sha256'])):
            take(os.path.join(folder, old), os.path.join(part, new))
            if sha256(os.path.join(part, new)) != digest:
                raise UserError(f'{folder}/{old}: its contents do not match the hash in meta.json (damaged '
                                f'file): make {folder} again')
        splits[side].append(renamed)
    own = ('part', 'reader', 'files')
    source = {key: value for key, value in metas[0]['source'].items() if key not in own}
    return {**metas[0], 'splits': {side: totals(shards) for side, shards in splits.items()}, 'source': source}


def take(path, to):
    """Hard-link a file, or copy it if the file system has no links. Raises UserError if it is no file."""
    open_regular(path).close()
    try:
        os.link(os.path.realpath(path), to)
    except OSError:
        shutil.copyfile(path, to)
        sync(to)
