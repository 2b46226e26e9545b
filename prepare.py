"""
Any text → token files.

    python prepare.py                                             # the Python standard library of this machine: no download
    python prepare.py shakespeare --tokenizer=char --out=data/shakespeare_char
    python prepare.py tinystories --tokenizer=gpt2
    python prepare.py talks.jsonl --source=abstract --target=summary --out=data/talks                 # pairs: the one is read, the other written
    python prepare.py asked.jsonl --prompt_template='Q: {question}\nA: ' --target=answer --out=data/asked
    python prepare.py stdlib_docstrings                                                               # a function's code → what it says it does
    python prepare.py notes/ 'chats/*.jsonl.gz' --text_key=prompt,response --out=data/mine --tokenizer=bpe:8192

A source is a file, a folder or a glob of .txt (a document each, or several parted by lines of <|endoftext|> alone), .jsonl or .ndjson (a
document a line) and .parquet (a document a row), all but the last also as .gz, .bz2, .xz or .zst. Folders are read at any depth, linked
ones too; hidden files are not read. The summary says what was left out. .md, .markdown, .rst and .text are read as .txt where a file or a glob is
given that ends so. Or a source is a named corpus, see download.py, or a Markov chain of known entropy, see synthetic.py.

    OUT/train_00000.bin …, val_00000.bin …   token ids, little-endian, uint16 (uint32 from 65,537 tokens on); a document ends with the
                                             end-of-text token and lies in one shard
        train_00000.idx …, val_00000.idx …   uint64: where the documents of the shard start, in tokens
        meta.json                            the tokenizer, counts, sizes and hashes

    python prepare.py 'fineweb/*.parquet' --tokenizer=gpt2 --out=data/fineweb --part=3/64             # a machine for each part: OUT.parts/3_of_64
    python prepare.py --merge=data/fineweb                                                            # then all of them, one after the other

OUT appears when it is whole; an empty folder of that name is filled. A run that was stopped goes on where it was when the same
command is given again, and neither that nor the number of processes changes a byte of the result. Memory stays the same however much
text there is, but for the longest line.
"""
import heapq
import json
import multiprocessing
import multiprocessing.connection
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from hashlib import sha256
from itertools import islice
from typing import Literal

import numpy as np
from tqdm import tqdm

from checkpoint import lock, replace_json
from configurator import FilePath, UserError, configure, run_main
from features.text import synthetic
from features.text.download import CORPORA
from features.text.sources import (
    HERE,
    PAIR,
    SECTIONS,
    TASK_SIZE,
    Reader,
    check_template,
    divide,
    documents,
    fields_of,
    find_files,
    hash_of,
    not_read,
    printable,
)
from features.text.tokenfiles import (
    Split,
    find_parts,
    is_free,
    join,
    move,
    part_folder,
    parts_folder,
    publish,
    read_parts,
    totals,
    work_folder,
)
from tokenizer import ANYWHERE, EOT, UNTRAINED, Reserved, load_tokenizer, needs_text, new_tokenizer

SAMPLE_SIZE = 2 ** 25  # characters that bpe:N is trained on, spread evenly over the input: 3 s and 200 MB of memory
VAL_BYTES = 2_000_000  # most bytes for validation by default: some 500,000 tokens
VAL_SIZE = 20_000  # characters for validation of a small corpus, if that is more than val_fraction: some 5,000 tokens
SAVE_EVERY = 10  # seconds between records of the progress


@dataclass
class Settings:
    positional = 'sources'
    chosen = None  # no setting: of few documents, the hashes of those for validation, see choose()
    sources: list[FilePath] = field(default_factory=lambda: ['stdlib'])  # files, folders, globs, or one of
    # stdlib, stdlib_docstrings, shakespeare, tinystories, openwebtext, fineweb_edu, pubmed, synthetic:markov, synthetic:markov2, synthetic:markov3
    out: FilePath = ''  # the folder to make; '' = data/NAME for a single named corpus
    tokenizer: FilePath = 'bpe:4096'  # byte, char, gpt2, cl100k_base, o200k_base, FILE.model (sentencepiece), FILE.json (tokenizers), FILE.txt (BERT
    # vocabulary), or bpe:N, trained on the text itself: 4096 suits models of a few million parameters, and downloads nothing
    text_key: str = 'text'  # field of .jsonl and .parquet with the text; several are joined with a newline: prompt,response
    source: str = ''  # for pairs: the field of what is read, and
    target: str = ''  # of what is to be written; a document is then the source, end of text, the target, end of text (objective=seq2seq)
    prompt_template: str = ''  # in place of source: what is read, with fields in braces, '### Instruction:\n{instruction}\n\n{input}\n\n### Response:\n';
    # a paragraph whose fields are empty is left out; typed as start of sample.py: \n is a new line
    reserve: int = 0  # further tokens that no text has, for objective=ul2: 100 do for rows of 512 tokens
    val_fraction: float | None = None  # share for validation; None = 0.01, but 0.05 for stdlib and synthetic, 0.1 for
    # shakespeare, more of few documents, and of large files what makes about 2 MB
    split: Literal['auto', 'document', 'tail'] = 'auto'  # document: a hash of a document decides its side, so that equal
    # ones are on the same; where that leaves fewer than 10 to expect, some that are together about the share. tail: the last
    # characters of every document; auto = tail for .txt with fewer than 200 documents in all
    errors: Literal['strict', 'replace'] = 'strict'  # bytes that are not UTF-8: stop and name them, or read them as U+FFFD
    num_proc: int = 0  # processes; 0 = one for every core
    part: str = ''  # 3/64: the third of 64 parts alone, a stretch of the files: each on a machine of its own, perhaps, all with the same --out. bpe:N and
    # char read all of the text on each of them first, a FILE.model that was trained before does not; within a file a part is read from the file's start
    merge: FilePath = ''  # then the folder to make of all parts: --merge=OUT, and nothing beside it

    def check(self):
        """Raise ValueError for values that cannot work."""
        if '' in self.sources:  # which would be all of the working directory
            raise ValueError('sources: one is empty, an unset variable perhaps: name a file or a folder')
        if self.val_fraction is not None and not 0 < self.val_fraction < 1:
            raise ValueError(f'val_fraction={self.val_fraction}: takes a number between 0 and 1')
        if self.source and self.prompt_template:
            raise ValueError(f'source={self.source}: the fields that are read are in prompt_template: leave one of them out')
        if bool(self.source or self.prompt_template) != bool(self.target):
            raise ValueError(f'source={self.source or self.prompt_template}, target={self.target}: a pair has both: give both fields, or none')
        check_template(self.prompt_template)
        if 'stdlib_docstrings' in self.sources and (len(self.sources) > 1 or self.target):
            raise ValueError('sources: stdlib_docstrings has pairs already: prepare it alone, without source and target')
        if self.pairs and self.split == 'tail':
            raise ValueError('split=tail: cuts documents in two, which pairs do not bear: use split=document')
        if not 0 <= self.reserve <= 10000:
            raise ValueError(f'reserve={self.reserve}: takes 0 to 10000')
        if self.num_proc < 0:
            raise ValueError(f'num_proc={self.num_proc}: takes a number of processes, or 0 for one on every core')
        found = re.fullmatch(r'(\d{1,6})/(\d{1,6})', self.part)
        if self.part and not (found and 1 <= int(found[1]) <= int(found[2])):
            raise ValueError(f'part={self.part}: takes a part and how many there are, as in 3/64')
        beside = sorted(getattr(self, 'given', set()) - {'merge'})
        if self.merge and beside:
            raise ValueError(f'{beside[0]}={getattr(self, beside[0])}: --merge=OUT is all that putting parts together takes: leave it out')

    @property
    def place(self):
        """(number, count) of the part: (1, 1) for the whole."""
        return tuple(map(int, self.part.split('/'))) if self.part else (1, 1)

    @property
    def pairs(self):
        """Whether documents are pairs of a source and a target."""
        return bool(self.target) or 'stdlib_docstrings' in self.sources


# -----------------------------------------------------------------------------
# Tasks → tokens, in the workers

WORKER = {}  # settings and tokenizer of this process: too large to send with every task


def tokenize(task):
    """
    The tokens of a task: {'train': (ids, where documents start in them, bytes of text), 'val': …}, and for the summary
    the number of empty documents, of unknown tokens, [(tokens, file:number)] of the longest documents, and how often the
    text of an end-of-text token occurs in them, {text: times}.
    """
    s, tokenizer = WORKER['s'], WORKER['tokenizer']
    texts, empty = {'train': [], 'val': []}, 0
    literal = dict.fromkeys((EOT, tokenizer.eot_text), 0)
    for where, text in documents(task, s):
        for name in literal:
            literal[name] += text.count(name)
        if not task.side and (not text or text.isspace()):
            empty += 1
            continue
        for split, part in [(task.side, text)] if task.side else divide(text, s):
            texts[split].append((where, part))
    out, unknown, longest = {}, 0, []
    for split, found in texts.items():
        parts = [text.split(PAIR) if s.pairs else [text] for _, text in found]
        ids, lengths = tokenizer.encode_documents([part for pair in parts for part in pair])
        lengths = np.add.reduceat(lengths, np.cumsum([0] + [len(pair) for pair in parts[:-1]])) if found and s.pairs else lengths
        if len(ids) and not 0 <= ids.min() <= ids.max() < tokenizer.vocab_size:  # the cast to uint16 would wrap without a word
            raise UserError(f'{found[0][0]}: the tokenizer gave a token beyond its vocabulary of {tokenizer.vocab_size}: its file is damaged')
        starts = np.cumsum(lengths) - lengths if task.starts else lengths[:0]
        if len(lengths) and not task.ends:  # the end of the document, and its token, come with another part
            ids, lengths = ids[:-1], lengths - 1
        unknown += int(np.count_nonzero(ids == tokenizer.unk))
        longest += [(int(lengths[i]), found[i][0]) for i in np.argsort(-lengths, kind='stable')[:5]]
        out[split] = ids.astype(dtype_of(tokenizer)), starts, sum(len(pair[-1].encode()) for pair in parts)
    return out, empty, unknown, heapq.nlargest(5, longest), literal


def dtype_of(tokenizer):
    return np.dtype('<u2' if tokenizer.vocab_size <= 2 ** 16 else '<u4')


def set_up(s, description, folder):
    WORKER.update(s=s, tokenizer=load_tokenizer(description, folder))


def start_worker(*arguments):
    parent = multiprocessing.parent_process()  # one that was killed cannot stop its workers: they watch it
    threading.Thread(target=lambda: multiprocessing.connection.wait([parent.sentinel]) and os._exit(1), daemon=True).start()
    os.environ['TOKENIZERS_PARALLELISM'] = 'false'  # one thread for a process
    set_up(*arguments)


def in_order(function, tasks, num_proc, arguments):
    """Yield (task, function(task)) in the order of the tasks, with a few in flight, by processes that were set up with `arguments`."""
    if num_proc == 1:
        set_up(*arguments)
        for task in tasks:
            yield task, function(task)
        return
    waiting = deque()
    # spawned, not forked: that is safe beside threads, and the same on macOS
    pool = ProcessPoolExecutor(num_proc, multiprocessing.get_context('spawn'), start_worker, arguments)
    try:
        for task in tasks:
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # Ctrl-C is for this process: what it starts here never sees one
            waiting.append((task, pool.submit(function, task)))
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
            if len(waiting) > 3 * num_proc:
                task, future = waiting.popleft()
                yield task, future.result()
        for task, future in waiting:
            yield task, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


# -----------------------------------------------------------------------------
# The run

def prepare(s):
    """
    Prepare the sources of the settings `s`, going on where an interrupted run stopped. Raises UserError.
    Returns (folder, meta.json, figures for the summary or None if the folder held just that already).
    """
    named = s.sources[0] if len(s.sources) == 1 and s.sources[0] in (*HERE, *CORPORA) else None
    out = s.out.rstrip('/') or (os.path.join('data', named.removeprefix('synthetic:')) if named else '')
    if not out:
        find_files([source for source in s.sources if source not in CORPORA])  # a misspelt name is the likelier mistake
        raise UserError(f'out: name the folder to make for {" ".join(s.sources)}, as in --out=data/mine')
    by_default = s.val_fraction is None
    try:
        needs_text(s.tokenizer)  # a wrong name is found before any download
        left_out = {}
        files = find_files(s.sources, left_out)
        former = s.val_fraction or ({'shakespeare': 0.1} | dict.fromkeys(HERE, 0.05)).get(named, 0.01)
        s = replace(s, val_fraction=capped(former, files) if by_default else former)
        source = describe(s, files)
        if s.part:
            out = part_folder(out, *s.place)
        if not is_free(out):
            return out, finished(out, source, former), None
        meta, figures = locked(out, lambda part: run(s, files, source, out, part, by_default))
        return out, meta, figures and figures | {'not_read': not_read(left_out)}
    except BrokenProcessPool:
        raise UserError('num_proc: a worker was killed, out of memory perhaps: lower --num_proc; the same command goes on from there') from None
    except OSError as error:
        raise UserError(f'{error.filename or out}: {error.strerror or error}: mend that, or make room; the same command goes on from there') from None


def capped(share, files):
    """The default val_fraction of these files: `share`, or less if they are large. An evaluation may read the whole split."""
    size = sum(os.path.getsize(path) for path, _ in files)
    return min(share, float(f'{VAL_BYTES / max(size, 1):.1g}'))


def describe(s, files):
    """What decides the result, as JSON: the settings, and the inputs by name, size and time."""
    stats = [(path, os.stat(path)) for path in [path for path, _ in files] + ([s.tokenizer] if os.path.isfile(s.tokenizer) else [])]
    inputs = json.dumps([(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats])
    return {'sources': s.sources, 'tokenizer': s.tokenizer, 'text_key': s.text_key, 'val_fraction': s.val_fraction, 'split': s.split, 'errors': s.errors,
            # as folders from before these have none
            **{name: getattr(s, name) for name in ('source', 'target', 'prompt_template', 'reserve') if getattr(s, name)},
            'inputs': sha256(inputs.encode()).hexdigest(),
            **({'part': s.part, 'files': [[os.path.basename(path), stat.st_size] for path, stat in stats]} if s.part else {})}


def finished(out, source, former):
    """
    meta.json of an existing folder, if it was made from the same inputs with the same settings, or with the val_fraction
    `former`, the default before it had a limit. Raises UserError.
    """
    try:
        with open(os.path.join(out, 'meta.json'), encoding='utf-8-sig') as f:
            meta = json.load(f)
        if meta['source'].get('val_fraction') == former:
            source = source | {'val_fraction': former}
        changed = next((key for key in source | meta['source'] if meta['source'].get(key) != source.get(key)), None)
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f'out={out}: exists, and was not made by prepare.py: choose another --out') from None
    if changed:
        what = 'from other input files' if changed == 'inputs' else f'with {changed}={meta["source"].get(changed)}'
        raise UserError(f'out={out}: exists, and was prepared {what}: delete it, or choose another --out')
    return meta


def locked(out, make):
    """make(its work folder), for this process alone. Bad input leaves nothing behind, other faults what the next run can use."""
    part = work_folder(out)
    os.makedirs(part, exist_ok=True)
    mine = lock(part)
    if mine is None:
        raise UserError(f'out={out}: another process is preparing it: wait for that one, or choose another --out')
    try:
        return make(part)
    except UserError:
        shutil.rmtree(part)
        if os.path.dirname(part).endswith('.parts'):
            with suppress(OSError):  # there are others
                os.rmdir(os.path.dirname(part))
        raise
    finally:
        os.close(mine)


def begin(s, files, source, part, by_default):
    """A new record of progress: how to split is settled, and the tokenizer made."""
    left = os.listdir(part)
    if left:
        print(f'{part}: left by a run with other settings or inputs; starting over')
    for name in left:
        os.unlink(os.path.join(part, name))
    plain, fields = next((path for path, kind in files if kind in ('text', 'topics')), None), ','.join(fields_of(s))
    if s.pairs and plain and set(fields.split(',')) - set(SECTIONS):
        raise UserError(f'{plain}: has no fields {fields}: pairs are read from .jsonl and .parquet, or from .txt with the sections {", ".join(SECTIONS)}')
    tokenizer = None if needs_text(s.tokenizer) else new_tokenizer(s.tokenizer)  # found missing before the text is read
    split = s.split if s.split != 'auto' else 'tail' if few_documents(s, files) else 'document'
    chosen = choose(s, files, by_default) if split == 'document' else None
    if not tokenizer:
        texts = sample(s, files)
        signs = sum(text.count(UNTRAINED) for text in texts)
        if signs and s.tokenizer != 'char':
            print(f'tokenizer={s.tokenizer}: it is trained without U+2585 ({signs:,} in the text), and writes it as bytes')
        tokenizer = new_tokenizer(s.tokenizer, texts)
    if s.pairs and tokenizer.eot is None:
        raise UserError(f'tokenizer={s.tokenizer}: has no end of text, which parts the source of a pair from its target: use another')
    tokenizer = Reserved(tokenizer, s.reserve) if s.reserve else tokenizer
    return {'source': source, 'split': split, 'chosen': chosen, 'tokenizer': tokenizer.save(part), 'tasks': 0, 'position': 0,
            'shards': {'train': [], 'val': []}, 'empty': 0, 'unknown': 0, 'literal': {}, 'used': '', 'longest': [], 'length': 0}


def few_documents(s, files):
    """Are these .txt files with fewer than 200 documents together?"""
    reader = Reader(files, s)
    if s.pairs or len(files) >= 200 or any(kind != 'text' for _, kind in files):
        return False
    return sum(islice((1 for path, _ in files for _, starts, _ in reader.parts(path, ANYWHERE) if starts), 200)) < 200


def choose(s, files, by_default):
    """
    Of few documents, the hashes of those for validation; None where there are enough for the hash of each to decide by itself.
    They have about val_fraction of the text; by default VAL_SIZE characters, if that is more, up to a tenth of the text.
    Equal documents are on one side, and both sides have one if not all are equal. It is the same for every part.
    """
    rarer = min(s.val_fraction, 1 - s.val_fraction)
    sizes, count = {}, 0  # {hash: characters of the documents that have it}
    for task in Reader(files, replace(s, split='document')).tasks(ANYWHERE):
        for _, text in documents(task, s):
            if task.starts and (task.side or text.strip()):
                number, count = hash_of(text), count + 1
                sizes.setdefault(number, 0)
            if task.side or text.strip():
                sizes[number] += len(text)
        if count * rarer >= 10 or count >= 1000:
            return None
    if not count or not by_default and count * rarer < 0.5:  # that is asked for
        return None
    if len(sizes) == 1:
        return []  # check_sides() refuses it
    total = sum(sizes.values())
    wanted = s.val_fraction * total
    if by_default:
        wanted = max(wanted, min(total / 10, VAL_SIZE))
    most = max(1, int(len(sizes) * max(0.5, s.val_fraction)))
    room = min(1.25 * wanted, total - min(sizes.values()))  # something is left for train
    chosen, size = [], 0
    for number in sorted(sizes):
        if size < wanted and len(chosen) < most and size + sizes[number] <= room:
            chosen.append(number)
            size += sizes[number]
    return chosen or [min(sizes, key=lambda number: (sizes[number], number))]


def sample(s, files):
    """Texts to make a tokenizer from: every character for char; for bpe:N a part of the text, spread evenly over it."""
    reader, chars, kept, stride = Reader(files, s), set(), [], 1
    for number, task in enumerate(progress_bar('first pass', reader, reader.tasks(ANYWHERE))):
        if s.tokenizer == 'char':
            chars.update(*(text.replace(PAIR, '') for _, text in documents(task, s)))
        elif number % stride == 0:
            kept.append([text.replace(PAIR, '\n') for _, text in documents(task, s)])
            if sum(len(text) for texts in kept for text in texts) > SAMPLE_SIZE:  # too much: keep every other task, and go on like that
                kept, stride = kept[::2], 2 * stride
    texts = sorted(chars) or [text for texts in kept for text in texts]
    if all(not text or text.isspace() for text in texts):
        raise UserError(f'{" ".join(s.sources)}: no text in it')
    return texts


def progress_bar(what, reader, items, done=0):
    """Yield the items on, and show how much of its files the reader has read, with MB/s and the time left."""
    with tqdm(desc=what, initial=max(0, done - reader.first), total=reader.last - reader.first, unit='B', unit_scale=True, disable=None) as bar:
        for item in items:
            yield item
            bar.update(max(0, reader.position - reader.first) - bar.n)


def run(s, files, source, out, part, by_default):
    """Tokenize into the folder `part`, then make it `out`; returns (meta.json, figures for the summary)."""
    if os.path.exists(os.path.join(part, 'meta.json')):  # a run was stopped when it was all done
        from batches import read_meta
        meta = read_meta(part)
        if meta.get('source') == source:
            move(part, out)
            return meta, None
    try:
        with open(os.path.join(part, 'progress.json'), encoding='utf-8') as f:
            progress = json.load(f)
    except (OSError, ValueError):
        progress = {}
    if progress.get('source') != source:
        progress = begin(s, files, source, part, by_default)
    progress.setdefault('literal', {})  # an older run had none
    s = replace(s, split=progress['split'])
    s.chosen = None if progress.get('chosen') is None else frozenset(progress['chosen'])
    reader = Reader(files, s, s.place)
    if progress['tasks']:
        print(f'{part}: goes on after {(progress["position"] - reader.first) / 1e6:,.1f} of {(reader.last - reader.first) / 1e6:,.1f} MB')
    tokenizer = load_tokenizer(progress['tokenizer'], part)
    dtype = dtype_of(tokenizer)
    splits = {name: Split(part, name, dtype, shards) for name, shards in progress['shards'].items()}
    used = np.zeros(tokenizer.vocab_size, bool)
    if progress['used']:
        used |= np.unpackbits(np.frombuffer(bytes.fromhex(progress['used']), np.uint8), count=len(used)).astype(bool)

    def save():
        for split in splits.values():
            split.sync()
        progress['used'] = np.packbits(used).tobytes().hex()
        replace_json(os.path.join(part, 'progress.json'), progress)

    save()
    started = saved = time.monotonic()
    before = sum(shard['bytes'] for split in splits.values() for shard in split.shards)
    num_proc = s.num_proc or max(1, min(cores(), (reader.last - reader.first) // (8 * TASK_SIZE)))  # starting one takes as long as some MB of text
    tasks = islice(reader.tasks(tokenizer.cut), progress['tasks'], None)
    with closing(in_order(tokenize, tasks, num_proc, (s, progress['tokenizer'], part))) as results:
        for task, (tokens, empty, unknown, longest, literal) in progress_bar('tokenizing', reader, results, progress['position']):
            for name, (ids, starts, size) in tokens.items():
                if len(ids):
                    splits[name].write(ids, starts, size, task.ends)
                    used[ids] = True
            if task.side:  # a part: the whole document counts
                (tokens_here, where), = longest
                progress['length'] = tokens_here + (0 if task.starts else progress['length'])
                longest = [(progress['length'], where)] if task.ends else []
            progress['longest'] = heapq.nlargest(5, [tuple(entry) for entry in progress['longest']] + longest)
            progress['empty'] += empty
            progress['unknown'] += unknown
            for name, times in literal.items():
                progress['literal'][name] = progress['literal'].get(name, 0) + times
            progress['tasks'] += 1
            progress['position'] = reader.position
            if time.monotonic() - saved > SAVE_EVERY:
                save()
                saved = time.monotonic()
    for split in splits.values():
        split.close()
    seconds = time.monotonic() - started

    found = {name: totals(split.shards) for name, split in splits.items()}
    if not s.part:
        check_sides(found, s, progress['empty'])
    bos = {'bos': tokenizer.start()[0]} if tokenizer.start() else {}
    meta = {'format': 1, 'tokenizer': progress['tokenizer'], 'vocab_size': tokenizer.vocab_size,
            'eot': tokenizer.eot, **bos, 'dtype': dtype.name,
            'split': s.split, **({'pairs': True} if s.pairs else {}), 'splits': found, 'source': source, **synthetic.entropy_of(s.sources, s.tokenizer)}
    publish(part, out, meta, tokenizer.files)
    size, tokens = (sum(split[key] for split in found.values()) for key in ('bytes', 'tokens'))
    return meta, {'unused': 1 - used.mean(), 'unknown': progress['unknown'] / max(tokens, 1), 'empty': progress['empty'], 'longest': progress['longest'],
                  'literal': progress['literal'],
                  'seconds': seconds, 'speed': (size - before) / 1e6 / seconds, 'num_proc': num_proc}


def check_sides(splits, s, empty=0):
    """Raise UserError where there is nothing to train on, or to validate with."""
    for name, other in (('train', 'val'), ('val', 'train')):
        if not splits[name]['tokens']:
            if not splits[other]['tokens']:
                raise UserError(f'{" ".join(s.sources)}: no text in it' + f', {empty} empty documents' * (empty > 0))
            advice = 'use another --val_fraction' if s.chosen is None else 'give more, that differ'
            if s.split == 'document' and not s.pairs:
                advice += ', or use --split=tail'
            raise UserError(f'val_fraction={s.val_fraction}: leaves nothing for {name} of {splits[other]["documents"]} document(s) '
                            f'with split={s.split}: {advice}')


def merge(out):
    """
    Make the data set `out` of the parts of it that were prepared with --part. They stay where they are. Raises UserError.
    Returns (folder, meta.json, figures for the summary).
    """
    if not is_free(out):
        raise UserError(f'merge={out}: exists: delete it first')
    part = work_folder(out)
    if os.path.exists(os.path.join(part, 'progress.json')):
        raise UserError(f'merge={out}: {part} holds what a run without --part has done: let it go on, or delete that first')
    folders = find_parts(out)
    metas = read_parts(folders)

    def make(part):
        for name in os.listdir(part):  # of a merge that was stopped
            os.unlink(os.path.join(part, name))
        meta = join(folders, metas, part)
        of = {name: meta['source'][name] for name in ('sources', 'target', 'val_fraction') if name in meta['source']}
        check_sides(meta['splits'], Settings(**of, split=meta['split']))
        publish(part, out, meta, meta['tokenizer'].get('files', ()))
        return meta
    try:
        return out, locked(out, make), {'parts': len(folders)}
    except OSError as error:
        raise UserError(f'{error.filename or out}: {error.strerror or error}: mend that, or make room, and run the same command') from None


def cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()


def summary(out, meta, figures):
    """What a person wants to know of a prepared data set."""
    splits, description, dtype = meta['splits'], meta['tokenizer'], np.dtype(meta['dtype']).newbyteorder('<')
    parts = (figures or {}).get('parts')
    print(f'{out}: ' + (f'made of {parts} parts; {parts_folder(out)} can be deleted' if parts else 'ready' if figures else 'already prepared'))
    for name, split in splits.items():
        print(f'    {name:5} {split["documents"]:>12,} documents {split["tokens"]:>15,} tokens '
              f'{split["bytes"]:>16,} bytes of text {len(split["shards"]):>4} shard(s)')
    size, tokens = (sum(split[key] for split in splits.values()) for key in ('bytes', 'tokens'))
    if not tokens:
        return print('    a part without text')
    rate = f'{tokens / sum(split["documents"] for split in splits.values()):,.0f} tokens a pair' if meta.get('pairs') else f'{size / tokens:.3f} bytes a token'
    print(f'    {rate}; tokenizer {description["kind"]} of {meta["vocab_size"]:,}, {dtype.name}; split by {meta["split"]}')
    if splits['val']['tokens'] < 1000 and not meta['source'].get('part'):
        print(f'    val has {splits["val"]["tokens"]:,} tokens, few for a loss to rely on: give more text, or a larger --val_fraction')
    if 'entropy' in meta:
        print(f'    the entropy of the source is {meta["entropy"]:.4f} nats a token: no model can do better')
    if figures and not parts:
        print(f'    {figures["unused"]:.1%} of the vocabulary never used; {figures["empty"]:,} empty documents left out')
        if figures['unknown']:
            print(f'    {figures["unknown"]:.1%} of the tokens stand for what the tokenizer cannot write')
        for name, times in sorted(figures['literal'].items()):
            if times:
                print(f'    {name} occurs {times:,} times inside documents: it is plain text there and ends no document')
        if figures['not_read']:
            print(f'    {figures["not_read"]}')
        print('    the longest documents:')
        for n, where in figures['longest']:
            print(f'        {n:>11,} tokens  {printable(where)}')
        print(f'    {figures["seconds"]:.1f} s, {figures["speed"]:.1f} MB/s with {figures["num_proc"]} process(es)')
    if meta['source'].get('part'):
        return print(f'next: the other parts, then python prepare.py --merge={os.path.dirname(out).removesuffix(".parts")}')
    with open(os.path.join(out, 'train_00000.bin'), 'rb') as f:
        ids = np.frombuffer(f.read(60 * dtype.itemsize), dtype)
    print(f'    train begins: {load_tokenizer(description, out).decode(ids)!r}')
    rest = '--objective=seq2seq' if meta.get('pairs') else '--minutes=5'  # the defaults are those of a day on a GPU
    print(f'next: python train.py --dataset={out.removeprefix("data/")} {rest}')


def main():
    s = configure(Settings)
    try:
        summary(*(merge(s.merge.rstrip('/')) if s.merge else prepare(s)))
    except KeyboardInterrupt:
        print('prepare.py: stopped; the same command goes on from here', file=sys.stderr)
        raise


if __name__ == '__main__':
    run_main(main)
