"""
nanoGPT's data folders: train.bin, val.bin and perhaps meta.pkl, read as they are. Neither file says how wide
a token is, so the width is found by looking into them. meta.pkl is read without running any code in it.
"""
import io
import json
import os
import pickle
import pickletools

import numpy as np

from checkpoint import open_regular
from configurator import UserError

GPT2 = {'kind': 'gpt2'}  # the tokenizer that nanoGPT assumes where there is no meta.pkl
GPT2_TOKENS = 50257
CLEAR = 256  # a file is uint32 if so many different values in it have small upper halves,
CLEAR_ZERO = 16  # or so many have upper halves of 0


def describe_folder(folder):
    """The content of meta.json for a nanoGPT folder. Raises UserError if it would have to guess."""
    paths = {}
    for split in ('train', 'val'):
        path = os.path.join(folder, f'{split}.bin')
        if os.path.isfile(path):
            paths[split] = path
    try:
        tokenizer, vocab_size = read_tokenizer(os.path.join(folder, 'meta.pkl'))
        width = find_width(paths.values(), vocab_size)
    except OSError as error:
        raise UserError(f'{error.filename or folder}: {error.strerror}: prepare the data set again') from None
    splits = {}
    for split, path in paths.items():
        size = os.path.getsize(path) // width * width
        splits[split] = {'shards': [{'file': f'{split}.bin', 'bytes_on_disk': size}]}
    dtype = f'uint{8 * width}'
    return {'format': 1, 'tokenizer': tokenizer, 'vocab_size': vocab_size, 'dtype': dtype, 'splits': splits}


def describe_sources(sources, ranks):
    """Print a line about each Source whose tokenizer is assumed or unknown."""
    for source in sources:
        files = source.files
        if 'sha256' in files.shards[0]:  # not a folder of nanoGPT
            continue
        if files.meta['tokenizer']['kind'] == 'unknown':
            ranks.say(f'data: {source.name}: its tokenizer is not known, '
                      f'only its {files.vocab_size:,} tokens: no samples are drawn')
        elif files.meta['tokenizer'] == GPT2:
            ranks.say(f"data: {source.name}: its tokenizer is taken for GPT-2's, as nanoGPT does")


def identify(files):
    """
    (text, iterator over bytes) that Mixture.fingerprint() hashes for TokenFiles without hashes: the data of a
    meta.json, and 64 pieces of 64 KB of each file.
    """
    meta = {key: value for key, value in files.meta.items() if key != 'bos'}
    if meta['tokenizer']['kind'] == 'unknown':  # it was once taken for GPT-2's: those runs still resume
        meta['tokenizer'] = GPT2
    return json.dumps(meta, sort_keys=True), pieces_of(files)


def pieces_of(files, size=2 ** 16):
    for file, shard in zip(files.files, files.shards):
        if 'sha256' not in shard:
            for n in range(64):
                yield file.read(max(0, file.size - size) * n // 63, min(size, file.size))


# -----------------------------------------------------------------------------
# The tokenizer: meta.pkl

def read_tokenizer(path):
    """
    (description of the tokenizer, vocab_size) of a meta.pkl: its characters if it lists some; GPT-2's if
    there is no meta.pkl, as in nanoGPT, or one with 50,257 tokens and nothing else; otherwise unknown. Raises
    UserError for an invalid meta.pkl.
    """
    pkl = {}
    if os.path.lexists(path):  # a broken link is an error
        pkl = read_pickle(path)
    try:
        itos = pkl.get('itos')
        default = GPT2_TOKENS if itos is None else len(itos)
        vocab_size = pkl.get('vocab_size', default)
        if type(vocab_size) is not int or not 1 <= vocab_size <= 2 ** 32:
            shown = vocab_size if type(vocab_size) is int else type(vocab_size).__name__
            raise UserError(f'{path}: vocab_size={shown}: takes a number of tokens: '
                            'prepare the data again')
        names = None if itos is None else [itos[i] for i in range(vocab_size)]
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise UserError(f'{path}: not as nanoGPT writes it ({error!r}): prepare the data set again') from None
    if names is None and vocab_size == GPT2_TOKENS:
        return GPT2, vocab_size
    if names and all(isinstance(c, str) and len(c) == 1 for c in names) and len(set(names)) == len(names):
        return {'kind': 'char', 'chars': ''.join(names), 'eot': None}, vocab_size
    # no itos, or one of words or pieces: nothing says how they are joined
    return {'kind': 'unknown', 'vocab_size': vocab_size}, vocab_size


# What a pickle of dicts, lists, texts and numbers consists of. No import, no call; no tuple, as nested ones
# overflow the stack of Python when they are hashed
PLAIN = set('''PROTO FRAME STOP MARK POP NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1
    UNICODE BINUNICODE SHORT_BINUNICODE EMPTY_DICT DICT SETITEM SETITEMS EMPTY_LIST LIST APPEND APPENDS
    MEMOIZE PUT BINPUT LONG_BINPUT GET BINGET LONG_BINGET'''.split())
PICKLED = 2 ** 23  # bytes at most: 20 times those of a vocabulary of Chinese characters


def read_pickle(path):
    """The value in a pickle of plain values; memory and time grow with the file, whatever it says."""
    with open_regular(path) as f:
        data = f.read(PICKLED + 1)
    try:
        if len(data) > PICKLED:
            raise ValueError(f'it has more than {PICKLED:,} bytes')
        for code, argument, _ in pickletools.genops(data):
            if code.name not in PLAIN:
                raise ValueError(f'it has {code.name} {"" if argument is None else argument!r:.60}'.rstrip())
        # that of Python: the one of C makes room for the largest number of a value, 8 bytes each
        return pickle._Unpickler(io.BytesIO(data)).load()
    except Exception as error:  # a hostile file may raise anything
        raise UserError(f'{path}: not a plain dictionary ({error}): it is not loaded') from None


# -----------------------------------------------------------------------------
# The width of a token

def find_width(paths, vocab_size):
    """Bytes per token in all of these files, 2 or 4. Raises UserError if that is unclear."""
    widths = {path: find_width_of(path, vocab_size) for path in paths}
    known = set(widths.values()) - {0}
    if known == {2, 4}:
        raise UserError(f'{" and ".join(widths)}: one is uint16, the other uint32: prepare the data again')
    few = 64 if known else 0  # bytes that may be unclear by chance, beside a file that is clear
    unclear = [path for path, width in widths.items() if not width and os.path.getsize(path) > few]
    if unclear and known != {4}:
        raise UserError(f'{unclear[0]}: every other uint16 in it is 0: it may be uint32, or uint16 with such '
                        'a text: prepare it with prepare.py, or write it as uint16 with more text')
    return max(known, default=2)


def find_width_of(path, vocab_size):
    """
    Bytes per token in a file, 2 or 4, from 64 samples of it; 0 if both are possible. uint32 read as uint16
    has a small number after every token; uint16 read as uint32 has tokens outside the vocabulary. Raises
    UserError if neither fits.
    """
    words = look_into(path)
    upper, lower = words >> 16, words & 0xFFFF
    highest_upper, highest, values = upper.max(initial=0), words.max(initial=0), len(np.unique(words))
    highest_half = max(highest_upper, lower.max(initial=0))
    is_wide = vocab_size > 2 ** 16
    if highest_upper < 8 and values >= CLEAR or highest_upper == 0 and values >= CLEAR_ZERO:
        is_wide = True  # no text has a token below 8, or token 0, at every other place
        if not words[1::2].any():
            raise UserError(f'{path}: every other uint32 in it is 0, as in int64: write uint16 or uint32')
    can_be_16 = not is_wide and highest_half < vocab_size
    can_be_32 = highest < vocab_size and os.path.getsize(path) % 4 == 0
    if not can_be_16 and not can_be_32:
        whose = 'of GPT-2, which is assumed where there is no meta.pkl'
        if os.path.exists(os.path.join(os.path.dirname(path), 'meta.pkl')):
            whose = 'that meta.pkl names'
        token = highest if is_wide else highest_half
        as_what = ', as uint32' if vocab_size > 2 ** 16 else ''
        raise UserError(f'{path}: holds token {token}, beyond the {vocab_size:,} tokens {whose}: '
                        f'write a meta.pkl with the right vocab_size, or prepare the data again{as_what}')
    if can_be_16 and can_be_32:
        return 0
    return 2 if can_be_16 else 4


def look_into(path, places=64, size=2 ** 12):
    """Samples of a file from its beginning to its end, the whole file if it is small, as uint32."""
    room = max(0, os.path.getsize(path) // 8 * 8 - size)
    starts = sorted({room * n // (places - 1) // 8 * 8 for n in range(places)})
    with open(path, 'rb') as f:
        data = b''.join(os.pread(f.fileno(), size, start) for start in starts)
    return np.frombuffer(data[:len(data) // 4 * 4], '<u4')
