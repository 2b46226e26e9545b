"""
The run of prepare.py for everything but some megabytes of plain text: a corpus of any size and kind is read
task by task, tokenized in several processes, and written to shards. An interrupted run is resumed where it
stopped; neither that nor the number of processes changes a byte of the result.
"""
import os
import time
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import replace
from itertools import islice
from types import SimpleNamespace

from tqdm import tqdm

import prepare as core
from checkpoint import read_json, replace_json
from configurator import UserError
from features.text.figures import Figures, is_figures, say_untrained
from features.text.pairs import PAIR, check_end_of_text, check_sections, has_pairs
from features.text.parts import part_folder, place_of
from features.text.pieces import ANYWHERE, cut_of
from features.text.reader import TASK_SIZE, Reader, documents
from features.text.sources import find_files, folder_of, not_read, usual_fraction
from features.text.splits import check_sides, choose_from, is_few, tasks_to_choose_from
from features.text.synthetic import entropy_of
from features.text.tokenfiles import (
    MARK,
    Split,
    clear,
    files_of,
    has_counts,
    is_free,
    locked,
    move,
    publish,
    totals,
)
from features.text.tokenizers import Reserved
from features.text.workers import cores, in_order
from tokenizer import load_tokenizer, needs_text, new_tokenizer

# bytes of plain text that prepare.py itself reads into memory; for more, a second process pays
IN_MEMORY = 2 ** 24
# characters that bpe:N is trained on, spread evenly over the text: 3 s and 200 MB of memory
SAMPLE_SIZE = 2 ** 25
READER = 2  # parts that were made by another version of reader.py may overlap with these
VAL_BYTES = 2_000_000  # default limit of the text for validation: about 500,000 tokens
SAVE_EVERY = 10  # seconds between two records of the progress


def is_needed(s, out):
    """
    Whether settings need more than prepare.py does itself: a new folder from a few plain .txt and .jsonl
    files.
    """
    if not out or os.path.lexists(out) or os.path.lexists(f'{out}.part'):
        return True
    if s.num_proc > 1 or has_pairs(s) or s.reserve or s.part:
        return True
    total = 0
    for path in s.sources:
        kind = core.kind_of(path)
        if not kind or not os.path.isfile(path) or not os.access(path, os.R_OK):
            return True
        size = os.path.getsize(path)
        # long documents are cut in parts, on which bpe:N is trained
        if kind == 'text' and size > 2 * TASK_SIZE:
            return True
        total += size
    return total > IN_MEMORY


def prepare(s, out):
    """
    Prepare the sources of the settings `s`, or resume an interrupted run. out: the output folder, '' = the
    default. Raises UserError. Returns the same as prepare.prepare().
    """
    out = out or folder_of(s.sources)
    if not out:
        raise UserError(f'out: name the folder to make for {" ".join(s.sources)}, as in --out=data/mine')
    try:
        needs_text(s.tokenizer)  # raises UserError for a wrong name, before any download
        left_out = {}
        files = find_files(s.sources, left_out)
        by_default = s.val_fraction is None
        unlimited = s.val_fraction or usual_fraction(s.sources)
        s = replace(s, val_fraction=limited(unlimited, files) if by_default else unlimited)
        source = describe(s, files)
        if s.part:
            out = part_folder(out, *place_of(s))
        if not is_free(out):
            return out, finished(out, source, unlimited), None
        with locked(out) as part:
            meta, figures = run(s, files, source, out, part, by_default)
        if figures:
            figures['not_read'] = not_read(left_out)
        return out, meta, figures
    except BrokenProcessPool:
        raise UserError('num_proc: a worker was killed, perhaps because memory ran out: lower --num_proc; '
                        'the same command continues from there') from None
    except OSError as error:
        raise UserError(f'{error.filename or out}: {error.strerror or error}: fix that, or make room; '
                        'the same command continues from there') from None


def limited(share, files):
    """The default val_fraction: `share`, or less for large files. An evaluation may read the whole split."""
    size = sum(os.path.getsize(path) for path, _ in files)
    return min(share, float(f'{VAL_BYTES / max(size, 1):.1g}'))


def describe(s, files):
    """Like prepare.describe(), with the settings of this feature that are used."""
    source = core.describe(s, files)
    inputs = source.pop('inputs')
    for name in ('source', 'target', 'prompt_template', 'reserve'):
        if getattr(s, name):
            source[name] = getattr(s, name)
    source['inputs'] = inputs
    if s.part:
        source['part'] = s.part
        source['reader'] = READER
        paths = [path for path, _ in files] + [s.tokenizer] * os.path.isfile(s.tokenizer)
        source['files'] = [[os.path.basename(path), os.path.getsize(path)] for path in paths]
    return source


def finished(out, source, unlimited):
    """
    meta.json of an existing folder, if it was made from the same inputs with the same settings. unlimited:
    val_fraction before the limit for large files. Raises UserError if it was made from others.
    """
    try:
        meta = read_json(os.path.join(out, 'meta.json'))
    except UserError:
        meta = {}
    found = meta.get('source')
    if not isinstance(found, dict) or not os.path.isfile(os.path.join(out, 'meta.json')):
        raise UserError(f'out={out}: exists, and was not made by prepare.py: choose another --out')
    if found.get('val_fraction') == unlimited:
        source = source | {'val_fraction': unlimited}
    changed = [key for key in source | found if found.get(key) != source.get(key)]
    if changed:
        with_what = f'with {changed[0]}={found.get(changed[0])}'
        if changed[0] == 'inputs':
            with_what = 'from other input files'
        raise UserError(f'out={out}: exists, and was prepared {with_what}: delete it, '
                        'or choose another --out')
    check_complete(out)
    return meta


def check_complete(out):
    """Raise UserError if a file of the data set `out` is missing or damaged, or its counts are no counts."""
    from batches import DataFile, read_meta
    meta = read_meta(out)
    splits = meta['splits']
    if meta.get('split') not in ('document', 'tail') or splits.keys() != {'train', 'val'}:
        raise UserError(f'{out}: its meta.json is not as prepare.py writes it: prepare the data set again')
    for split in splits.values():
        if not all(map(has_counts, (split, *split['shards']))):
            raise UserError(f'{out}: its meta.json has no counts: prepare the data set again')
        for shard in split['shards']:
            for name, size in zip(files_of(shard), (shard['bytes_on_disk'], 8 * shard['documents'])):
                DataFile(os.path.join(out, name), size)


# -----------------------------------------------------------------------------
# Settled once, for all tasks: the split and the tokenizer

def begin(s, files, source, part, by_default):
    """
    A new progress record: how documents are split, and the tokenizer, whose files are written to `part`.
    """
    if set(os.listdir(part)) - {MARK}:
        print(f'{part}: left by a run with other settings or inputs; starting over')
        clear(part)
    check_sections(s, files)
    tokenizer = None
    if not needs_text(s.tokenizer):  # a missing one is found before the text is read
        tokenizer = new_tokenizer(s.tokenizer)
    split = s.split
    if split == 'auto':
        split = 'tail' if is_few(s, files) else 'document'
    chosen = None
    if split == 'document':
        chosen = choose_from(tasks_to_choose_from(files, s), s, by_default)
    if not tokenizer:
        texts = sample(Reader(files, s), s)
        say_untrained(texts, s.tokenizer)
        tokenizer = new_tokenizer(s.tokenizer, texts)
    if has_pairs(s):
        check_end_of_text(tokenizer, s.tokenizer)
    if s.reserve:
        tokenizer = Reserved(tokenizer, s.reserve)
    return {'source': source, 'split': split, 'chosen': chosen, 'tokenizer': tokenizer.save(part), 'tasks': 0,
            'position': 0, 'shards': {'train': [], 'val': []}}


def sample(reader, s):
    """Texts to train a tokenizer on: all text for char; for bpe:N a sample, spread evenly over the text."""
    chars, kept, stride = set(), [], 1
    for number, task in enumerate(progress_bar('first pass', reader, reader.tasks(ANYWHERE))):
        if s.tokenizer == 'char':
            for _, text in documents(task, s):
                chars.update(text.replace(PAIR, ''))
        elif number % stride == 0:
            kept.append([text.replace(PAIR, '\n') for _, text in documents(task, s)])
            if sum(len(text) for texts in kept for text in texts) > SAMPLE_SIZE:
                kept, stride = kept[::2], 2 * stride  # every other task, of those that follow too
    texts = sorted(chars) or [text for texts in kept for text in texts]
    if all(not text or text.isspace() for text in texts):
        raise UserError(f'{" ".join(s.sources)}: no text in it')
    return texts


def progress_bar(what, reader, items, done=0):
    """Yield the items, and show how much of its files the reader has read, with MB/s and the time left."""
    with tqdm(desc=what, initial=max(0, done - reader.first), total=reader.last - reader.first, unit='B',
              unit_scale=True, disable=None) as bar:
        for item in items:
            yield item
            bar.update(max(0, reader.position - reader.first) - bar.n)


# -----------------------------------------------------------------------------
# The run

def run(s, files, source, out, part, by_default):
    """Tokenize into the folder `part`, then make it `out`. Returns (meta.json, figures for the summary)."""
    meta = recorded(os.path.join(part, 'meta.json'))
    if meta.get('source') == source:  # a run was interrupted when everything was done
        move(part, out)
        check_complete(out)
        return meta, None
    progress = recorded(os.path.join(part, 'progress.json'))
    if progress.get('source') != source or not is_progress(progress):
        progress = begin(s, files, source, part, by_default)
    s = replace(s, split=progress['split'])
    chosen = progress.get('chosen')
    s.chosen = None if chosen is None else frozenset(chosen)
    tokenizer = load_tokenizer(progress['tokenizer'], part)
    reader = Reader(files, s, place_of(s))
    if progress['tasks']:
        done, size = progress['position'] - reader.first, reader.last - reader.first
        print(f'{part}: goes on after {done / 1e6:,.1f} of {size / 1e6:,.1f} MB')

    figures = Figures(progress, tokenizer.vocab_size)
    seconds, speed, num_proc = tokenize_all(s, reader, tokenizer, progress, part, figures)
    splits = {name: totals(shards) for name, shards in progress['shards'].items()}
    if not s.part:
        check_sides(splits, s, progress['empty'])
    meta = core.meta_of(s, tokenizer, progress['tokenizer'], splits, source)
    if has_pairs(s):
        del meta['splits'], meta['source']
        meta |= {'pairs': True, 'splits': splits, 'source': source}
    meta |= entropy_of(s.sources, s.tokenizer)
    publish(part, out, meta, tokenizer.files)
    tokens = sum(split['tokens'] for split in splits.values())
    return meta, figures.summary(tokens) | {'seconds': seconds, 'speed': speed, 'num_proc': num_proc}


def tokenize_all(s, reader, tokenizer, progress, part, figures):
    """
    Tokenize and write the remaining tasks, and save the progress regularly. Returns (seconds, MB of text per
    second, number of processes).
    """
    dtype = core.dtype_of(tokenizer)
    splits = {name: Split(part, name, dtype, shards) for name, shards in progress['shards'].items()}
    save(progress, part, splits, figures)
    started = saved = time.monotonic()
    before = text_bytes(progress)
    # starting a process takes as long as 8 MB of text
    num_proc = s.num_proc or max(1, min(cores(), (reader.last - reader.first) // (8 * TASK_SIZE)))
    tasks = islice(reader.tasks(cut_of(tokenizer)), progress['tasks'], None)
    settings = SimpleNamespace(**vars(s))  # a class that is put together from several cannot be pickled
    with closing(in_order(tasks, num_proc, (settings, progress['tokenizer'], part))) as results:
        for task, (tokens, notes) in progress_bar('tokenizing', reader, results, progress['position']):
            for name, (ids, starts, size) in tokens.items():
                if len(ids):
                    splits[name].write(ids, starts, size, task.ends)
            figures.add(task, tokens, notes)
            progress['tasks'] += 1
            progress['position'] = reader.position
            if time.monotonic() - saved > SAVE_EVERY:
                save(progress, part, splits, figures)
                saved = time.monotonic()
    for split in splits.values():
        split.close()
    seconds = time.monotonic() - started
    return seconds, (text_bytes(progress) - before) / 1e6 / seconds, num_proc


def save(progress, part, splits, figures):
    """Write the progress, after its tokens are on disk."""
    for split in splits.values():
        split.sync()
    figures.store()
    replace_json(os.path.join(part, 'progress.json'), progress)


def text_bytes(progress):
    return sum(shard['bytes'] for shards in progress['shards'].values() for shard in shards)


def recorded(path):
    """The dict in a JSON file of an earlier run; {} if there is none."""
    try:
        return read_json(path, most=2 ** 30)
    except UserError:
        return {}


def is_progress(progress):
    """Whether a record has what save() writes. Its file names must not lead out of the folder."""
    chosen, shards = progress.get('chosen'), progress.get('shards')
    if progress.get('split') not in ('document', 'tail') or not has_counts(progress, ('tasks', 'position')):
        return False
    if not (chosen is None or isinstance(chosen, list) and all(type(number) is int for number in chosen)):
        return False
    if not isinstance(progress.get('tokenizer'), dict) or not isinstance(shards, dict):
        return False
    if shards.keys() != {'train', 'val'} or not all(isinstance(entries, list) for entries in shards.values()):
        return False
    for side, entries in shards.items():
        for n, shard in enumerate(entries):
            if not has_counts(shard) or shard.get('file') != f'{side}_{n:05d}.bin':
                return False
    return is_figures(progress)
