"""
Token files → batches. The order of the data is a function, not a state:

    batch = f(seed, global sample number)

so that resuming needs one integer, any number of ranks and micro-batches sees the same global batch, and evaluation
never disturbs training. Nothing is held in memory but open files, and which pairs share a row: 1e11 windows cost as much as ten.

    data = Mixture({'tinystories': 100, 'dolly': 20}, 'train', block_size=256, seed=1)
    x, y = data.rows(range(32))   # (32, 256) int64 each; y is x one token on, -1 where there is no target; for an encoder, a source too;
                                  # of packed pairs, the number of the pair that each token is of
"""
import hashlib
import json
import math
import os
import pickle
import shlex
from bisect import bisect_left, insort
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from math import lcm, log
from typing import Literal

import numpy as np
import torch

from configurator import FilePath, UserError
from device import autocast, zero
from features.t5.objectives import Objective, ObjectiveConfig
from features.text.cuts import Cuts
from features.text.download import CORPORA
from features.text.sources import HERE
from features.text.tokenizers import options_of
from tokenizer import same_ids

LOOK_AT = 5000  # pairs read at the start, at most, to count those that are cut (0.1 s)
VERIFY_UP_TO = 2 ** 28  # bytes: smaller data sets have their hashes checked at every start (0.2 s), larger ones their sizes


@dataclass
class DataConfig(ObjectiveConfig):
    dataset: FilePath | dict = 'stdlib'  # name under data/, or a folder; a mixture: {'tinystories': 100, 'dolly': 20}
    mix_by: Literal['tokens', 'documents'] = 'tokens'  # what the weights of a mixture count
    packing: Literal['stream', 'aligned', 'document'] = 'stream'  # a row is: the next block_size tokens of the stream;
    # the same from the first document start among them (a row once an epoch, but some tokens twice and as many never);
    # or one document after a start token (the tokenizer's beginning of text, or else the end of text), padded
    # and masked, a random crop when too long. Pairs: as many as fit, the same
    # in every epoch, each seeing itself alone; an encoder reads one a row
    verify_data: bool = False  # check the hashes of large data sets too


# -----------------------------------------------------------------------------
# Shuffling without an index

def permute(i, n, key):
    """
    The place of i under a keyed permutation of range(n), for an int64 array i: a 6-round Feistel network over the next
    even number of bits, walked until it lands inside (Black & Rogaway 2002, "Ciphers with arbitrary finite domains").
    """
    half = max(1, (int(n - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    keys = [np.uint64(splitmix(key * 6 + r)) for r in range(6)]
    out = i.astype(np.uint64)
    walk = np.arange(len(out))  # entries not yet inside range(n); at most 4 times n to walk in, so a few turns
    while len(walk):
        left, right = out[walk] >> np.uint64(half), out[walk] & mask
        for k in keys:
            left, right = right, left ^ (mix(right ^ k) & mask)
        out[walk] = left << np.uint64(half) | right
        walk = walk[out[walk] >= n]
    return out.astype(np.int64)


def mix(x):
    """The finaliser of splitmix64 on uint64 arrays."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def splitmix(*numbers):
    """A 64-bit hash of integers: one seed out of (seed, epoch, …)."""
    state = 0
    for number in numbers:
        state = int(mix(np.array([(state + number + 0x9E3779B97F4A7C15) % 2 ** 64], dtype=np.uint64))[0])
    return state


# -----------------------------------------------------------------------------
# Token files

class TokenFiles:
    """
    One split ('train' or 'val') of a prepared folder: `.tokens` and `.documents` in all shards together, read by position.

    A folder of prepare.py (train_00000.bin …, .idx, meta.json) or of nanoGPT (train.bin, val.bin, perhaps meta.pkl).
    Raises UserError for a missing, empty or damaged one.
    """

    def __init__(self, folder, split, verify=False):
        self.folder, self.split = folder, split
        self.meta = read_meta(folder)
        self.vocab_size, self.dtype = self.meta['vocab_size'], np.dtype(self.meta['dtype']).newbyteorder('<')
        info = self.meta['splits'].get(split) or {'shards': []}
        self.paths = [os.path.join(folder, shard['file']) for shard in info['shards']]
        self.files, sizes, self.index = [], [], []
        total = sum(shard['bytes_on_disk'] for shard in info['shards'])
        for path, shard in zip(self.paths, info['shards']):
            self.files.append(open_checked(path, shard['bytes_on_disk'], shard.get('sha256') if verify or total <= VERIFY_UP_TO else None))
            sizes.append(shard['bytes_on_disk'] // self.dtype.itemsize)
            self.index.append(np.empty(0, np.uint64))
            if shard.get('documents'):
                idx = path[:-len('.bin')] + '.idx'
                open_checked(idx, 8 * shard['documents'], shard['idx_sha256'] if verify or total <= VERIFY_UP_TO else None).close()
                self.index[-1] = np.memmap(idx, '<u8', 'r')
        self.starts = np.cumsum([0] + sizes)  # where each shard begins
        self.doc_starts = np.cumsum([0] + [len(i) for i in self.index])
        self.tokens, self.documents = int(self.starts[-1]), int(self.doc_starts[-1])
        self.bytes = info.get('bytes', 0)  # of text; 0 = not known
        if self.tokens < 2:
            raise UserError(f'{folder}: its {split} split holds no tokens to train on: prepare it again with more text (python prepare.py --help)')

    def read(self, start, length):
        """Tokens [start, start + length), fewer at the end of the split. Bounded reads, so memory does not grow as with a memmap."""
        parts, shard = [], int(np.searchsorted(self.starts, start, 'right')) - 1
        while length > 0 and shard < len(self.files):
            offset = start - int(self.starts[shard])
            n = min(length, int(self.starts[shard + 1]) - start)
            data = os.pread(self.files[shard].fileno(), n * self.dtype.itemsize, offset * self.dtype.itemsize)
            part = np.frombuffer(data, self.dtype)
            if len(part) != n:
                raise UserError(f'{self.paths[shard]}: became shorter while in use: prepare it again')
            if n and int(part.max()) >= self.vocab_size:
                raise UserError(f'{self.paths[shard]}: token {int(part.max())} near position {offset} is beyond the vocabulary of {self.vocab_size}: '
                                'the file is damaged or of another tokenizer; prepare it again')
            parts.append(part)
            start, length, shard = start + n, length - n, shard + 1
        return np.concatenate(parts).astype(np.int64) if parts else np.empty(0, np.int64)

    def pieces(self, size=2 ** 16):
        """Bytes from the ends and 62 places between them of every file whose hash meta.json does not have."""
        unknown = [(file, shard['bytes_on_disk']) for file, shard in zip(self.files, self.meta['splits'][self.split]['shards']) if 'sha256' not in shard]
        return b''.join(os.pread(file.fileno(), size, max(0, length - size) * n // 63) for file, length in unknown for n in range(64))

    def document(self, number):
        """(first, last + 1) token position of a document."""
        shard = int(np.searchsorted(self.doc_starts, number, 'right')) - 1
        local, index = number - int(self.doc_starts[shard]), self.index[shard]
        end = int(index[local + 1]) if local + 1 < len(index) else int(self.starts[shard + 1] - self.starts[shard])
        return int(self.starts[shard]) + int(index[local]), int(self.starts[shard]) + end

    def next_document(self, position):
        """Position of the first document that starts at or after `position`, or None."""
        shard = int(np.searchsorted(self.starts, position, 'right')) - 1
        while shard < len(self.index):
            index = self.index[shard]
            local = int(np.searchsorted(index, max(0, position - int(self.starts[shard]))))
            if local < len(index):
                return int(self.starts[shard]) + int(index[local])
            shard += 1
        return None


def open_checked(path, size, sha256):
    """The opened file, its size and (if given) its hash checked. Raises UserError."""
    try:
        file = open(path, 'rb')
    except OSError as error:
        raise UserError(f'{path}: {error.strerror}: prepare the data set again') from None
    found = os.fstat(file.fileno()).st_size
    if found != size:
        raise UserError(f'{path}: has {found} bytes where {size} are expected: prepare the data set again')
    if sha256 and hashlib.file_digest(file, 'sha256').hexdigest() != sha256:
        raise UserError(f'{path}: its contents do not match the hash in meta.json (damaged file): prepare the data set again')
    return file


def find_folder(name):
    """data/NAME, or NAME itself when it is a folder. Raises UserError that says which command makes it."""
    for folder in (os.path.join('data', name), name):
        if os.path.isdir(folder):
            return folder
    corpora = {source.removeprefix('synthetic:'): source for source in (*HERE, *CORPORA)}
    out = name if os.path.dirname(name) else os.path.join('data', name)
    command = ['python', 'prepare.py', 'FILE_OR_FOLDER', f'--out={out}']
    if name in corpora:
        command = ['python', 'prepare.py', corpora[name]]
    elif name.removesuffix('_char') in corpora:  # nanoGPT's shakespeare_char
        command = ['python', 'prepare.py', corpora[name.removesuffix('_char')], '--tokenizer=char', f'--out={out}']
    elif os.path.isfile(name):
        stem = os.path.basename(name).partition('.')[0] or 'mine'
        command = ['python', 'prepare.py', name, f'--out=data/{stem}']
        raise UserError(f'dataset={name}: is a file: first run: {shlex.join(command)}, then give --dataset={stem}')
    raise UserError(f'dataset={name}: no such data set; first run: {shlex.join(command)}')


def advice(wanted, folder, files):
    """
    How to prepare the data of the TokenFiles `files` with the tokenizer `wanted`, a description, whose files are in `folder`:
    'with OPTIONS: COMMAND'.
    """
    found, source = files.meta['tokenizer'], files.meta.get('source')
    same = [{key: value for key, value in d.items() if key not in ('reserved', 'vocab_size', 'sha256')} for d in (wanted, found)]
    tokenizer, reserve = options_of(wanted, folder)
    if wanted.get('kind') == 'char' and same[0] != same[1]:  # no file holds its characters
        return 'together with the text of the other, so that both have the same characters, or both with --tokenizer=byte'
    options = [tokenizer] * (same[0] != same[1]) + [reserve] * (wanted.get('reserved', 0) != found.get('reserved', 0))
    source = source if isinstance(source, dict) else {}
    sources = source.get('sources')
    if not isinstance(sources, list) or not all(isinstance(path, str) for path in sources):
        sources = ['FILE_OR_FOLDER']
    usual = {'text_key': 'text', 'source': '', 'target': '', 'prompt_template': '', 'val_fraction': 0.01, 'split': 'auto', 'errors': 'strict'}
    kept = [f'--{name}={source[name]}'.replace('\n', '\\n') for name in usual if source.get(name, usual[name]) != usual[name]]
    command = ['python', 'prepare.py', *sources, *kept, tokenizer, *[reserve] * bool(wanted.get('reserved')), f'--out={files.folder.rstrip("/")}2']
    return f'with {" and ".join(options or [tokenizer])}: {shlex.join(command)}'


def real_folders(dataset):
    """A setting `dataset` with folders in place of names, equal for all spellings: {folder: weight}. A name without a folder stays."""
    found = {}
    for name, weight in (dataset if isinstance(dataset, dict) else {dataset: 1}).items():
        try:
            found[os.path.realpath(find_folder(name))] = weight
        except UserError:
            found[name] = weight
    return found


def read_meta(folder):
    """meta.json of a prepared folder; for nanoGPT's, the same made from train.bin, val.bin and meta.pkl. Raises UserError for what cannot be."""
    path = os.path.join(folder, 'meta.json')
    if not os.path.exists(path):
        return of_nanogpt(folder)
    try:
        with open(path, encoding='utf-8-sig') as f:
            meta = json.load(f)
        if meta['format'] != 1:
            raise UserError(f'{path}: format {meta["format"]} is newer than this minnow: update it')
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f'{path}: not a valid meta.json ({error}): prepare the data set again') from None
    problem = wrong(meta)
    if problem:
        raise UserError(f'{path}: {problem} is not what it can be: prepare the data set again')
    return meta


# nanoGPT's folders: train.bin, val.bin, perhaps meta.pkl. Neither says how wide a token is.

GPT2 = {'kind': 'gpt2'}  # the tokenizer that nanoGPT assumes where there is no meta.pkl
GPT2_TOKENS = 50257
CLEAR, CLEAR_ZERO = 256, 16  # different values with small upper halves, or with upper halves of 0, that make a file uint32


def of_nanogpt(folder):
    """The content of meta.json for a folder of nanoGPT's. Raises UserError for one that takes a guess to read."""
    paths = {split: os.path.join(folder, f'{split}.bin') for split in ('train', 'val')}
    paths = {split: path for split, path in paths.items() if os.path.isfile(path)}
    if 'train' not in paths:
        raise UserError(f'{folder}: neither meta.json nor train.bin in it: prepare it (python prepare.py --help)')
    try:
        tokenizer, vocab_size = nanogpt_tokenizer(os.path.join(folder, 'meta.pkl'))
        width = nanogpt_width(paths.values(), vocab_size)
    except OSError as error:
        raise UserError(f'{error.filename}: {error.strerror}: prepare the data set again') from None
    splits = {}
    for split, path in paths.items():
        size = os.path.getsize(path) // width * width
        splits[split] = {'shards': [{'file': f'{split}.bin', 'bytes_on_disk': size}]}
    dtype = f'uint{8 * width}'
    return {'format': 1, 'tokenizer': tokenizer, 'vocab_size': vocab_size, 'dtype': dtype, 'splits': splits}


def nanogpt_tokenizer(path):
    """
    (description of the tokenizer, vocab_size) by a meta.pkl: its characters where it lists them; GPT-2's where there
    is no meta.pkl, as nanoGPT has it, or one that names 50,257 tokens and nothing else; otherwise the tokenizer is
    not known. Raises UserError for a strange meta.pkl.
    """
    pkl = read_pickle(path) if os.path.exists(path) else {}
    try:
        itos = pkl.get('itos')
        vocab_size = pkl.get('vocab_size', GPT2_TOKENS if itos is None else len(itos))
        if type(vocab_size) is not int or not 1 <= vocab_size <= 2 ** 32:
            raise UserError(f'{path}: vocab_size={vocab_size!r}: takes a number of tokens: prepare the data again')
        names = None if itos is None else [itos[i] for i in range(vocab_size)]
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise UserError(f'{path}: not as nanoGPT writes it ({error!r}): prepare the data set again') from None
    if names is None and vocab_size == GPT2_TOKENS:
        return GPT2, vocab_size
    if names and all(isinstance(c, str) and len(c) == 1 for c in names) and len(set(names)) == len(names):
        return {'kind': 'char', 'chars': ''.join(names), 'eot': None}, vocab_size
    # no itos, or one of words or pieces: how they are joined is not said
    return {'kind': 'unknown', 'vocab_size': vocab_size}, vocab_size


def nanogpt_width(paths, vocab_size):
    """Bytes of a token in all of these files, 2 or 4. Raises UserError where they differ or that stays unclear."""
    widths = {path: width_of(path, vocab_size) for path in paths}
    known = set(widths.values()) - {0}
    if known == {2, 4}:
        raise UserError(f'{" and ".join(widths)}: one is uint16, the other uint32: prepare the data again')
    few = 64 if known else 0  # bytes that may be unclear by chance, beside a file that is clear
    unclear = [path for path, width in widths.items() if not width and os.path.getsize(path) > few]
    if unclear and known != {4}:
        raise UserError(f'{unclear[0]}: every other uint16 in it is 0: it may be uint32, or uint16 with such a text: '
                        'prepare it with prepare.py, or write it as uint16 with more text')
    return max(known, default=2)


def width_of(path, vocab_size):
    """
    Bytes of a token in a file, 2 or 4, by 64 places of it; 0 if both are possible. uint32 read as uint16 has a small
    number after every token, uint16 read as uint32 has tokens beyond the vocabulary. Raises UserError where neither
    fits.
    """
    words = look_into(path)
    highest = {2: max((words & 0xFFFF).max(initial=0), (words >> 16).max(initial=0)), 4: words.max(initial=0)}
    is_wide = vocab_size > 2 ** 16  # uint32 for sure,
    upper, values = (words >> 16).max(initial=0), len(np.unique(words))
    if upper < 8 and values >= CLEAR or upper == 0 and values >= CLEAR_ZERO:
        is_wide = True  # as no text has a token below 8, or token 0, at every other place
        if not words[1::2].any():
            raise UserError(f'{path}: every other uint32 in it is 0, as in int64: write uint16 or uint32')
    fits = [2] if not is_wide and highest[2] < vocab_size else []
    if highest[4] < vocab_size and os.path.getsize(path) % 4 == 0:
        fits.append(4)
    if not fits:
        whose = 'of GPT-2, which is assumed where there is no meta.pkl'
        if os.path.exists(os.path.join(os.path.dirname(path), 'meta.pkl')):
            whose = 'that meta.pkl names'
        token = highest[4 if is_wide else 2]
        as_what = ', as uint32' * (vocab_size > 2 ** 16)
        raise UserError(f'{path}: holds token {token}, beyond the {vocab_size:,} tokens {whose}: '
                        f'write a meta.pkl with the right vocab_size, or prepare the data again{as_what}')
    return fits[0] if len(fits) == 1 else 0


def look_into(path, places=64, size=2 ** 12):
    """Pieces of a file from its beginning to its end, all of a small one, as uint32."""
    room = max(0, os.path.getsize(path) // 8 * 8 - size)
    starts = sorted({room * n // (places - 1) // 8 * 8 for n in range(places)})
    with open(path, 'rb') as f:
        data = b''.join(os.pread(f.fileno(), size, start) for start in starts)
    return np.frombuffer(data[:len(data) // 4 * 4], '<u4')


def remark(name, files):
    """A line about a data set whose tokenizer is assumed or not known, '' for others; files: TokenFiles."""
    if files.meta['tokenizer']['kind'] == 'unknown':
        return f'{name}: its tokenizer is not known, only its {files.vocab_size:,} tokens: no samples are drawn'
    if files.meta['tokenizer'] == GPT2:
        return f'{name}: its tokenizer is taken for GPT-2\'s, as nanoGPT does'
    return ''


def wrong(meta):
    """The first field of a meta.json that holds what it cannot; None if there is none. Names of files are of the folder itself: nothing leads out of it."""
    def is_count(value, least=0):
        return type(value) is int and least <= value < 2 ** 62

    def is_name(value):
        return isinstance(value, str) and value not in ('', '.', '..') and os.path.basename(value) == value and '\0' not in value

    def are_shards(shards):
        return isinstance(shards, list) and all(
            isinstance(shard, dict) and is_name(shard.get('file')) and shard['file'].endswith('.bin') and is_count(shard.get('bytes_on_disk'))
            and shard['bytes_on_disk'] % np.dtype(meta['dtype']).itemsize == 0 and is_count(shard.get('documents', 0))
            and all(isinstance(shard.get(name, ''), str) for name in ('sha256', 'idx_sha256')) and ('idx_sha256' in shard or not shard.get('documents'))
            for shard in shards)
    tokenizer = meta.get('tokenizer')
    if not isinstance(tokenizer, dict) or not isinstance(tokenizer.get('kind'), str) or not is_count(tokenizer.get('reserved', 0)):
        return 'tokenizer'
    if not isinstance(tokenizer.get('files', {}), dict) or not all(map(is_name, tokenizer.get('files', ()))):
        return 'tokenizer.files'
    if not is_count(meta.get('vocab_size'), tokenizer.get('reserved', 0) + 1) or meta['vocab_size'] > 2 ** 32:
        return 'vocab_size'
    for name in ('eot', 'bos'):
        if meta.get(name) is not None and (not is_count(meta[name]) or meta[name] >= meta['vocab_size']):
            return name
    if meta.get('dtype') not in ('uint16', 'uint32'):
        return 'dtype'
    if not isinstance(meta.get('splits'), dict):
        return 'splits'
    for name, split in meta['splits'].items():
        if not isinstance(split, dict) or not are_shards(split.get('shards')) or not is_count(split.get('bytes', 0)):
            return f'splits.{name}'
    return None


class PlainUnpickler(pickle.Unpickler):
    """Reads pickles of dicts, lists, strings and numbers; whatever would import or call something is refused."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f'it refers to {module}.{name}')


def read_pickle(path):
    with open(path, 'rb') as f:
        try:
            return PlainUnpickler(f).load()
        except Exception as error:  # a hostile file may raise anything
            raise UserError(f'{path}: not a plain dictionary ({error}): it is not loaded') from None


# -----------------------------------------------------------------------------
# Rows

class Source:
    """
    One corpus as numbered rows of tokens: row(i) for i in range(len), the whole split once. Their length, block_size + 1 tokens, and what
    they ask of the network is the objective's: causal, or what objective(meta.json) makes.

    begin: the start token before every document, (id,) or (), where a row is a document and the objective is
    causal; None = that of the data set. A network that was trained without one is evaluated without one.
    """

    def __init__(self, name, split, block_size, packing, verify=False, objective=None, begin=None):
        self.name = name
        self.files = TokenFiles(find_folder(name), split, verify)
        try:
            self.objective = objective(self.files.meta) if objective else Objective('causal', block_size)
        except UserError as error:
            raise UserError(f'dataset={name}: {error}') from None
        if packing not in ('stream', 'aligned', 'document'):
            raise UserError(f'packing={packing}: has no code in batches.py: use stream, aligned or document')
        if self.objective.is_pairs:
            packing = 'document' if self.objective.S or packing == 'document' else 'pairs'
        self.packing = packing
        self.begin = ()
        if packing == 'document' and self.objective.kind == 'causal':
            self.begin = start_token(self.files.meta) if begin is None else tuple(begin)
        if packing != 'stream' and not self.files.documents:
            raise UserError(f"packing={packing}: {name} has no .idx of its documents (a nanoGPT folder?): use packing=stream")
        overlap = self.objective.length - self.objective.stride
        self.rows = self.files.documents if packing == 'document' else -(-(self.files.tokens - overlap) // self.objective.stride)
        if packing == 'pairs':
            self.together, self.until = fill(np.minimum(self.document_lengths(), block_size + 1) - 1, block_size)
            self.rows = len(self.until)

    def row(self, number, noise=0):
        """Up to objective.length tokens, int64. `noise` picks the crop of a document that is too long."""
        length, stride = self.objective.length, self.objective.stride
        if self.packing in ('document', 'pairs'):
            first, end = self.files.document(number)
            start = first - len(self.begin)  # the start token is the document's first one
            room = 0 if self.objective.is_pairs else end - start - length
            if room > 0:
                start += splitmix(noise) % (room + 1)
                end = start + length
            if start >= first:  # a crop from the middle has no start token: nothing begins there
                return self.files.read(start, end - start)
            return np.append(self.begin, self.files.read(first, end - first))
        start = number * stride
        if self.packing == 'aligned':
            document = self.files.next_document(start)
            start = document if document is not None and document < min(start + stride, self.files.tokens - 1) else start
        return self.files.read(start, length)

    def example(self, number, noise):
        """(what is read, what is written) of a row, int64 each, of packed pairs a list. `noise` decides the crop and what is masked."""
        if self.packing == 'pairs':
            return [self.objective.example(self.row(n), 0) for n in self.together[self.until[number - 1] if number else 0:self.until[number]]]
        return self.objective.example(self.row(number, noise), splitmix(noise, 1))

    def batch(self, examples, height=0):
        """The arrays of examples, as Objective.batch() has them."""
        return self.objective.batch(examples, height, is_packed=self.packing == 'pairs')

    def bytes_per_token(self):
        """Bytes of text a target stands for; 0 where that is not known, or only a part of the text is a target."""
        return self.files.bytes / self.files.tokens if self.objective.kind == 'causal' and not self.files.meta.get('pairs') else 0

    def document_lengths(self):
        """Tokens of every document, int64."""
        return np.concatenate([np.diff(np.append(index, end)) for index, end in zip(self.files.index, np.diff(self.files.starts))]).astype(np.int64)

    def too_long(self):
        """A line on the documents that are longer than a row; '' where all fit, or rows are no documents."""
        where = f'{self.name}, {self.files.split}'
        if self.objective.is_pairs:
            return self.too_long_pairs(where)
        if self.packing != 'document':
            return ''
        lengths, room = self.document_lengths() + len(self.begin), self.objective.length
        count = int((lengths > room).sum())
        cuts = Cuts('documents', len(lengths), count, room, room, int(lengths.max()) - room)
        return f'{where}: {cuts.line()} (packing=document: a random part of each)' if cuts.cut else ''

    def too_long_pairs(self, where):
        """too_long() for pairs. Those that may be cut are read, LOOK_AT at most: a source ends at its eot."""
        T, S = self.objective.T, self.objective.S
        shortest = min(S, T) + 1 if S else T + 2  # pair that may be cut, in tokens
        numbers, seen = np.flatnonzero(self.document_lengths() >= shortest), self.files.documents
        if len(numbers) > LOOK_AT:
            numbers = numbers[:LOOK_AT]
            seen = int(numbers[-1]) + 1
        sources, targets = Cuts('sources', seen - len(numbers)), Cuts('targets', seen - len(numbers))
        cut = 0
        for number in numbers:
            tokens = self.row(number)
            source = self.objective.source_length(tokens)
            target = len(tokens) - source
            for_source, for_target = self.objective.pair_room(source, target)
            sources.add(source, for_source)
            targets.add(target, for_target)
            cut += source > for_source or target > for_target
        if not cut:
            return ''
        seen = f'{seen:,}' if seen == self.files.documents else f'the first {seen:,}'
        sizes = f'block_size={T}, source_size={S}' if S else f'block_size={T}'
        lines = '; '.join(cuts.line() for cuts in (sources, targets) if cuts.cut)
        return f'{where}: {cut:,} of {seen} pairs do not fit {sizes}: {lines}'

    def tokens_per_row(self):
        """Mean number of targets in a row."""
        if self.packing not in ('document', 'pairs'):
            return (self.files.tokens - 1) / self.rows
        targets = self.document_lengths() + len(self.begin) - 1  # all tokens of a row but its first
        if not (targets > 0).any():
            raise UserError(f'packing=document: no document of {self.name} has more than one token: use packing=stream')
        return float(np.minimum(targets, self.objective.stride).sum() / self.rows)


def start_token(meta):
    """
    (id,) of the token that begins a document of a data set with this meta.json: the tokenizer's beginning of
    text (BOS, [CLS]), or the end of text where meta.json names none; () without either.
    """
    for name in ('bos', 'eot'):
        if meta.get(name) is not None:
            return (meta[name],)
    return ()


def described(begin):
    """The tokens before every document, in words."""
    return f'with token {begin[0]}' if begin else 'without a start token'


def fill(lengths, room):
    """
    Which of them share a row of `room`: (their numbers, row after row; where each row ends), int64. The longest are put in first, each into the fullest
    row that still has room for it (best-fit decreasing: at most 11/9 of the fewest rows, Johnson et al. 1974, SIAM J. Comput. 3).
    """
    rows, with_space, spaces = [], {}, []  # spaces: how much is left in rows, sorted; with_space: in which
    for number in np.argsort(-lengths, kind='stable').tolist():
        at = bisect_left(spaces, lengths[number])
        if at < len(spaces):
            space = spaces[at]
            row = with_space[space].pop()
            if not with_space[space]:
                del spaces[at]
        else:
            space, row = room, len(rows)
            rows.append([])
        rows[row].append(number)
        left = space - int(lengths[number])
        if not with_space.setdefault(left, []):
            insort(spaces, left)
        with_space[left].append(row)
    rows.sort(key=min)  # in the order of the files, as other rows are
    return np.concatenate(rows).astype(np.int64), np.cumsum([len(row) for row in rows])


class Mixture:
    """
    The training data: sample i of the run → a row of one of the sources.

    Every source goes through all its rows exactly once an epoch, each epoch in another order. Among any first n samples,
    each source has its share of n, give or take one for every other source.
    """

    def __init__(self, dataset, split, block_size, seed, packing='stream', mix_by='tokens', verify=False,
                 objective=None, begin=None):
        weights = dataset if isinstance(dataset, dict) else {dataset: 1}
        for name, w in weights.items() or [('', 0)]:
            if not isinstance(name, str) or isinstance(w, bool) or not isinstance(w, (int, float)) or not 1e-6 <= w <= 1e6:
                raise UserError(f'dataset={dataset}: a mixture takes names, and for each a number between 1e-6 and 1e6')
        if mix_by not in ('tokens', 'documents'):
            raise UserError(f'mix_by={mix_by}: has no code in batches.py: use tokens or documents')
        self.seed = seed
        self.sources = []
        for name in weights:
            self.sources.append(Source(name, split, block_size, packing, verify, objective, begin))
        packing, self.begin = self.sources[0].packing, self.sources[0].begin
        same_tokenizer(self.sources)
        shares = [Fraction(str(w)) for w in weights.values()]
        if mix_by == 'documents' and packing != 'document':
            # w documents of a source are w * (its tokens per document / tokens per row) rows
            if not all(s.files.documents for s in self.sources):
                raise UserError('mix_by=documents: a source has no .idx of its documents (a nanoGPT folder?): use mix_by=tokens')
            shares = [w * Fraction(s.rows, s.files.documents) for w, s in zip(shares, self.sources)]
        elif mix_by == 'tokens' and packing in ('document', 'pairs'):  # whose rows are not full alike
            shares = [w / Fraction(s.tokens_per_row()).limit_denominator(10 ** 6) for w, s in zip(shares, self.sources)]
        scale = lcm(*(w.denominator for w in shares))
        self.shares = [int(w * scale) for w in shares]  # integers: the draw below is exact for any i

    @property
    def vocab_size(self):
        return self.sources[0].files.vocab_size

    def locate(self, i):
        """Sample i → (source, how many samples of that source came before): source k takes its share of what 0…k-1 left."""
        left = sum(self.shares)
        for k, share in enumerate(self.shares):
            before = i * share // left
            if (i + 1) * share // left > before:
                return k, before
            i, left = i - before, left - share
        raise AssertionError('the last source takes all that is left')

    def rows(self, samples):
        """x, y (len(samples), block_size) int64, and for an encoder or packed pairs one more, of global sample numbers: a function of them and the seed."""
        places = [self.locate(int(i)) for i in samples]
        out = [None] * len(places)
        for k, source in enumerate(self.sources):
            mine = [(n, j) for n, (which, j) in enumerate(places) if which == k]
            for epoch in {j // source.rows for _, j in mine}:
                slots = [(n, j % source.rows) for n, j in mine if j // source.rows == epoch]
                numbers = permute(np.array([j for _, j in slots]), source.rows, splitmix(self.seed, k, epoch))
                for (n, _), number in zip(slots, numbers):
                    out[n] = source.example(int(number), noise=splitmix(self.seed, k, epoch, int(number)))
        return self.sources[0].batch(out)

    def epochs(self, samples):
        """How often the first `samples` samples go through each source: {name: epochs}."""
        return {s.name: samples * share / sum(self.shares) / s.rows for s, share in zip(self.sources, self.shares)}

    def bits_per_byte(self, nats_per_token):
        """The loss in bits per byte of text, over the whole of the sources; None where they do not know their bytes, or tokens are read and not written."""
        return nats_per_token / log(2) / self.bytes_per_token if self.bytes_per_token else None

    @cached_property
    def bytes_per_token(self):
        """Bytes of text that a target stands for, over the whole of the sources; 0 unless all know theirs."""
        rates = [s.bytes_per_token() for s in self.sources]
        if not all(rates):
            return 0
        if len(rates) == 1:
            return rates[0]
        targets = [share * s.tokens_per_row() for share, s in zip(self.shares, self.sources)]  # of packing=document, rows are not full alike
        return sum(rate * n for rate, n in zip(rates, targets)) / sum(targets)

    def fingerprint(self):
        """{source: what its files hold, as a hash}, to notice that a data set was changed during a run."""
        def text(source):
            meta = {key: value for key, value in source.files.meta.items() if key != 'bos'}
            if meta['tokenizer']['kind'] == 'unknown':  # once taken for GPT-2's: runs from then still go on
                meta['tokenizer'] = GPT2
            begin = f'begin {list(source.begin)}' if source.begin else ''
            packed = 'packed' * (source.packing == 'pairs')  # once they were padded
            return json.dumps(meta, sort_keys=True) + packed + begin
        return {s.name: hashlib.sha256(text(s).encode() + s.files.pieces()).hexdigest() for s in self.sources}


def same_tokenizer(sources):
    """Raise UserError unless the tokens of all sources are the same."""
    first = sources[0]
    for source in sources[1:]:
        ours, theirs = first.files.meta['tokenizer'], source.files.meta['tokenizer']
        is_same = ours == theirs
        with suppress(UserError):  # not known, or not to be had here
            is_same = is_same or same_ids((ours, first.files.folder), (theirs, source.files.folder))
        if not is_same or source.files.vocab_size != first.files.vocab_size:
            raise UserError(f'dataset: {first.name} and {source.name} were prepared with different tokenizers ({ours["kind"]}, {theirs["kind"]}): '
                            f'prepare {source.name} {advice(ours, first.files.folder, source.files)}')
        if source.begin != first.begin:
            raise UserError(f'dataset: documents of {first.name} begin {described(first.begin)}, those of '
                            f'{source.name} {described(source.begin)}: prepare both again')


# -----------------------------------------------------------------------------
# Validation: the same rows in the same order, whatever the training does

def validation_rows(source, count):
    """The numbers of the rows to evaluate on: `count` of them, the same for every run, spread over the split; 0 = all."""
    if not count or count >= source.rows:
        return np.arange(source.rows)
    return np.sort(permute(np.arange(count), source.rows, 0))


def validation_batch(source, numbers, height):
    """As Mixture.rows() for row numbers of a Source, `height` rows; what is cropped or masked is the same each time."""
    return source.batch([source.example(int(i), noise=int(i)) for i in numbers], height)


# -----------------------------------------------------------------------------
# The loss on the validation split

EVAL_ROWS = 12  # rows of each of eval_iters, nanoGPT's default batch: the loss does not depend on batch_size


@torch.no_grad()
def evaluate(model, sources, s, ranks, stop=False):
    """
    {'val_loss', 'val_bpb' and the same per source as 'val_loss/NAME', …}: nats per token and bits per byte of text over the
    same rows every time, each token weighing the same, computed by all ranks together. A source that does not know its bytes has no
    val_bpb, and a mixture with such a source has no total. stop: true as soon as it is to be left; None then, on all ranks.
    """
    model.eval()
    out, all_nats, all_targets, all_bytes = {}, 0.0, 0.0, 0.0
    all_known = all(source.bytes_per_token() for source in sources)
    for source in sources:
        numbers, nats, targets = validation_rows(source, EVAL_ROWS * s.eval_iters), zero(ranks.device), 0
        mine, most = numbers[ranks.rank::ranks.world], -(-len(numbers) // ranks.world)  # all ranks make as many passes, some perhaps an empty one
        height = min(4 * s.batch_size, most)  # without gradients, four times the rows fit
        for loss, count in batch_losses(model, source, mine, height, ranks.device, s.dtype, -(-most // height)):
            nats, targets = nats + loss, targets + count
            ranks.alive()
            if ranks.any(stop):
                break
        nats, targets, stopped = ranks.sum(nats.item(), targets, bool(stop))
        if stopped:
            model.train()
            return None
        text_bytes = targets * source.bytes_per_token()
        all_nats, all_targets, all_bytes = all_nats + nats, all_targets + targets, all_bytes + text_bytes
        if len(sources) > 1:
            out |= losses(nats, targets, text_bytes, '/' + source.name)
    model.train()
    return losses(all_nats, all_targets, all_bytes if all_known else 0) | out


def batch_losses(model, source, numbers, height, device, dtype, passes=None):
    """Yield (summed loss in nats, which stays on the device; how many targets) of `height` rows of a data.Source at a time, so many times if asked."""
    for i in range(0, len(numbers) if passes is None else passes * height, height):
        x, y, *read = (torch.from_numpy(a).to(device) for a in validation_batch(source, numbers[i:i + height], height))
        with autocast(device, dtype):
            loss = model(x, y, reduction='sum', **reading(model, read))
        yield loss, int((y >= 0).sum())


def reading(model, more):
    """What else a model's forward pass is to be told of rows: what its encoder reads, or which of several pairs a token is of; {} where `more` is empty."""
    return dict(zip(('pieces' if getattr(model, 'encoder', None) is None else 'source',), more))


def losses(nats, targets, text_bytes, suffix=''):
    """{'val_loss', 'val_bpb'} with a suffix: summed nats over targets, and in bits over bytes of text; 0 bytes: they are not known."""
    out = {'val_loss' + suffix: nats / max(targets, 1)}
    if text_bytes:
        out['val_bpb' + suffix] = nats / math.log(2) / text_bytes
    return out


# -----------------------------------------------------------------------------
# The batches of a step

class Batches:
    """
    The micro-batches of this rank in a step, [(first sample number, x, y[, more]), …]. A thread reads those of the next
    step while this one is computed.
    """

    def __init__(self, data, s, ranks):
        self.data, self.s, self.ranks = data, s, ranks
        self.thread = ThreadPoolExecutor(1)
        self.ahead = {}  # {step: its future}

    def __call__(self, step):
        """(the micro-batches of this rank, how many targets are in them)."""
        now = self.ahead.pop(step, None) or self.thread.submit(self.read, step)
        self.ahead = {step + 1: self.thread.submit(self.read, step + 1)}
        return now.result()

    def read(self, step):
        out = []
        targets = 0
        for samples in micro_batches(self.s, step, self.ranks.rank, self.ranks.world):
            arrays = self.data.rows(samples)
            targets += int((arrays[1] >= 0).sum())
            tensors = [torch.from_numpy(array) for array in arrays]
            if self.ranks.device.type == 'cuda':
                tensors = [t.pin_memory() for t in tensors]  # then the copy to the GPU waits for nothing
            out.append((samples[0], *tensors))
        return out, targets


def micro_batches(s, step, rank, world):
    """
    The global sample numbers of this rank's micro-batches in a step, as ranges: contiguous, so that any split of the same
    rows is the same batch.
    """
    rows = s.batch_size * s.gradient_accumulation_steps // world  # of this rank
    size = min(s.batch_size, rows)
    while rows % size:
        size -= 1
    first = (step * world + rank) * rows
    return [range(i, i + size) for i in range(first, first + rows, size)]
