"""Hostile data: prepared folders, nanoGPT's folders, and the corpora that prepare.py reads."""

import bz2
import gzip
import hashlib
import json
import lzma
import os
import pickle
import struct
import zlib
from functools import cache
from pathlib import Path

import numpy as np
from cases import (
    ESCAPES,
    PAGE,
    SPECIAL,
    TINY,
    TRAIN,
    Case,
    Runs,
    case,
    clear,
    documents,
    edit,
    fields,
    fifo,
    folder,
    hole,
    inside,
    link,
    payload,
    put,
)

CASES = []
META, BIN, INDEX = 'data/meta.json', 'data/train_00000.bin', 'data/train_00000.idx'
BY_DOCUMENT = (*TRAIN, '--packing=document')
NAMES = dict(names=('data',))

# -----------------------------------------------------------------------------
# meta.json

CASES += documents(META, 'meta.json', TRAIN, accepted=('it with a byte-order mark',))


def meta(name, how, *commands, **more):
    CASES.append(case(name, 'meta.json', META, how, *(commands or (TRAIN,)), **more))


def shard(**changed):
    """A function that changes the first shard of the training split."""

    def change(value):
        value['splits']['train']['shards'][0] |= changed

    return edit(change)


for key, values in {
    'format': (2, '1', None, [1], -1),
    'vocab_size': (0, -1, 2**40, True, '257', None, 2.5, [257]),
    'eot': (257, -1, '256', 10**30),
    'bos': (10**9, 'x'),
    'dtype': ('object', 'float32', 'uint64', 'int64', ['uint16'], None, 'O', ESCAPES),
    'splits': (None, [], 'x', {}, {'train': []}, {'train': {'shards': {}}}, {'train': {'shards': []}}),
    'tokenizer': (
        None,
        'byte',
        [],
        {},
        {'kind': 7},
        {'kind': ['byte']},
        {'kind': 'byte', 'files': []},
        {'kind': 'byte', 'reserved': -1},
        {'kind': 'byte', 'reserved': 10**9},
    ),
}.items():
    for value in values:
        meta(f'{key} = {ascii(value)[:40]}', fields(**{key: value}), names=('meta.json', 'data'))
for name in (
    '../outside/secret.bin',
    '../run/step_00000002/model.safetensors',
    '/dev/zero',
    '/etc/passwd',
    '',
    '.',
    'a\0.bin',
    'meta.json',
    'x' * 5000 + '.bin',
    ESCAPES + '.bin',
    '\ud800.bin',
    7,
    None,
    ['train_00000.bin'],
):
    meta(f'a shard is called {ascii(name)[:40]}', shard(file=name), **NAMES)
for key, values in {
    'bytes_on_disk': (-2, 3, 10**15, True, '16024', 2**70, None, 1e4),
    'documents': (-1, 10**12, 'x', 161, True),
    'sha256': ('0' * 64, 7, [], None),
    'idx_sha256': ('0' * 64, 7, None),
}.items():
    for value in values:
        meta(f'{key} of a shard = {ascii(value)[:40]}', shard(**{key: value}), BY_DOCUMENT, **NAMES)
meta(
    'names the same shard twice',
    edit(lambda value: value['splits']['train']['shards'].append(value['splits']['train']['shards'][0])),
    expected='either',
)
meta(
    'has 100,000 shards that are not there',
    edit(
        lambda value: value['splits']['train'].update(
            shards=[{'file': f'x{n}.bin', 'bytes_on_disk': 2, 'documents': 0} for n in range(10**5)]
        )
    ),
    names=('x0.bin', 'meta.json'),
)
meta('has no validation split', edit(lambda value: value['splits'].pop('val') and None), names=('val',))
for name in ('../outside/secret.txt', '../home/.ssh/id_ed25519', '/dev/zero', 'a\0b', '..', 'x' * 5000):
    meta(f'tokenizer.files names {ascii(name)[:40]}', inside('tokenizer', files={name: '0' * 64}), **NAMES)
meta(
    'counts that are texts',
    edit(lambda value: value['splits']['train'].update(tokens='x', documents='y', bytes=7)),
    names=('meta.json',),
    expected='either',
)

# -----------------------------------------------------------------------------
# .bin and .idx, with a meta.json that agrees


def tokens(name, how, path=BIN, agrees=True, command=BY_DOCUMENT, **more):
    def write(box):
        target = Path(box, path)
        put(target, how)
        if agrees:
            data = target.read_bytes()
            digest = hashlib.sha256(data).hexdigest()
            is_bin = path == BIN
            shard(
                **(
                    {'sha256': digest, 'bytes_on_disk': len(data)}
                    if is_bin
                    else {'idx_sha256': digest, 'documents': len(data) // 8}
                )
            )(Path(box, META))

    CASES.append(
        Case(
            f'{path}: {name}',
            os.path.splitext(path)[1],
            write,
            [command],
            **{'names': (os.path.basename(path), 'meta.json'), 'may_leave': True} | more,
        )
    )


def index_of(change):
    def write(path):
        starts = np.fromfile(path, '<i8')
        change(starts).astype('<i8').tofile(path)

    return write


for name, how in {
    'a login page': PAGE,
    'empty': b'',
    'tokens beyond the vocabulary': b'\xff\xff' * 8012,
    'a pickle': payload(),
}.items():
    tokens(name, how, names=('train_00000', 'data'))
    tokens(f'{name}, with the old meta.json', how, agrees=False)
for name, how in SPECIAL.items():
    for path in (BIN, INDEX):
        tokens(name, how, path, agrees=False)
for name, how in {
    'half of it': lambda path: os.truncate(path, 8012),
    'a byte too few': lambda path: os.truncate(path, 16023),
    'a byte too many': lambda path: path.write_bytes(path.read_bytes() + b'\0'),
}.items():
    tokens(name, how, agrees=False)
for name, change in {
    'starts backwards': lambda starts: starts[::-1],
    'starts out of order': lambda starts: np.r_[starts[:5], starts[9], starts[6:]],
    'starts beyond the file': lambda starts: np.r_[starts[:-1], 10**12],
    'negative starts': lambda starts: np.r_[starts[:-1], -5],
    'starts of 2**63 - 1': lambda starts: np.r_[starts[:-1], 2**63 - 1],
    'all starts are 0': lambda starts: starts * 0,
    'the first start is not 0': lambda starts: starts + 3,
    'fewer starts': lambda starts: starts[:5],
    'starts at the end': lambda starts: starts * 0 + 8012,
    'one start': lambda starts: starts[:1] + 10**9,
}.items():
    tokens(name, index_of(change), INDEX)
tokens('7 bytes', b'1234567', INDEX, **NAMES)
tokens('a text', PAGE, INDEX)


OF_CHAT = ('train.py', '--dataset=data_chat', '--out_dir=out/new', *TINY, '--block_size=128')
for name, how in {
    'empty': b'',
    'too short': b'\1' * 10,
    'of 255': b'\xff' * 3000,
    'a pipe': fifo,
    'a folder': folder,
    'a link to /dev/zero': link('/dev/zero'),
    'no file': clear,
}.items():
    CASES.append(case(name, '.mask', 'data_chat/train_00000.mask', how, OF_CHAT))
CASES += [
    case(name, 'meta.json', 'data_chat/meta.json', how, OF_CHAT)
    for name, how in {
        'chat is a list': fields(chat=[]),
        'chat is null': fields(chat=None),
        'chat is a text': fields(chat='x'),
        'ends of chat outside': edit(lambda value: value['chat'].update(ends=[10**9])),
        'a template that is a number': edit(lambda value: value['chat'].update(chat_template=7)),
    }.items()
]

# -----------------------------------------------------------------------------
# nanoGPT

NANO = ('train.py', '--dataset=nano', '--out_dir=out/new', *TINY)


def opcode(data):
    return b'\x80\x04' + data + b'.'


def calls(function, *args):
    class Calls:
        def __reduce__(self):
            return function, args

    return pickle.dumps({'vocab_size': Calls()})


def laughs(depth=40):
    """Lists of ten times the same list: 10**40 items in a kilobyte."""
    value = ['x']
    for _ in range(depth):
        value = [value] * 10
    return value


LETTERS = {n: chr(97 + n) for n in range(26)}
PICKLES = {
    'runs a program': payload(),
    'runs a program, by protocol 0': pickle.dumps({'a': Runs()}, 0),
    'opens a file': calls(open, 'executed', 'w'),
    'evaluates': calls(eval, "open('executed', 'w')"),
    'imports': calls(__import__, 'os'),
    'gets an attribute': calls(getattr, 'x', 'upper'),
    'asks for a module': b"cos\nsystem\n(S'touch executed'\ntR.",
    'asks for a class': b"(ios\nsystem\nS'touch executed'\n.",
    'by an extension': opcode(b'\x82\x01'),
    'by a persistent name': b'Pevil\n.',
    'in a list': pickle.dumps([Runs()]),
    'of a bytearray': pickle.dumps(bytearray(5), 5),
    '4 GB of bytes': opcode(b'\x8e' + struct.pack('<Q', 2**32)),
    '2**62 bytes': opcode(b'\x8e' + struct.pack('<Q', 2**62)),
    'a long number': opcode(b'\x8b' + struct.pack('<i', 2**31 - 1)),
    'a negative length': opcode(b'\x8b' + struct.pack('<i', -5)),
    'a text of 4 GB': opcode(b'\x8d' + struct.pack('<Q', 2**32)),
    'a frame of 2**62 bytes': opcode(b'\x95' + struct.pack('<Q', 2**62)),
    'bytearray of 2**40': b'\x80\x05\x96' + struct.pack('<Q', 2**40) + b'.',
    'a memo of 2**31': opcode(b'Nr' + struct.pack('<I', 2**31 - 1)),
    'a version from the future': b'\x80\xff}.',
    'open lists': b'\x80\x04' + b']' * 10**6 + b'.',
    'half of it': pickle.dumps({'itos': LETTERS})[:20],
    'empty': b'',
    'a login page': PAGE,
    'lists in lists': pickle.dumps({'itos': laughs()}),
    'a list': pickle.dumps([1]),
    'a text': pickle.dumps('x'),
    'nothing': pickle.dumps(None),
    'an empty dictionary': pickle.dumps({}),
    'stack underflow': b'.',
    'pops too much': b'\x80\x0400.',
}
for name, value in {
    'itos is a number': {'itos': 5},
    'itos of 10**15 tokens': {'vocab_size': 10**15, 'itos': LETTERS},
    'itos is too short': {'vocab_size': 500, 'itos': LETTERS},
    'itos is a text': {'itos': 'abc', 'vocab_size': 90},
    'itos has text as numbers': {'itos': {'0': 'a'}},
    'vocab_size is true': {'vocab_size': True},
    'vocab_size is 0': {'vocab_size': 0},
    'vocab_size is negative': {'vocab_size': -3},
    'vocab_size is a text': {'vocab_size': '65'},
    'vocab_size is NaN': {'vocab_size': float('nan')},
    'vocab_size is 10**300': {'vocab_size': 10**300},
    'vocab_size is 1': {'vocab_size': 1},
    'itos has half a surrogate pair': {'itos': {n: chr(0xD800 + n) for n in range(60)}},
}.items():
    PICKLES[name] = pickle.dumps(value)
for name, how in PICKLES.items():
    expected = 'either' if name in ('an empty dictionary', 'itos has half a surrogate pair') else 'refused'
    CASES.append(case(name, 'meta.pkl', 'nano/meta.pkl', how, NANO, expected=expected, names=('nano',)))
for name, how in SPECIAL.items():
    CASES.append(case(name, 'meta.pkl', 'nano/meta.pkl', how, NANO))
    CASES.append(case(name, 'train.bin', 'nano/train.bin', how, NANO, names=('nano',)))
for name, how in {
    'empty': b'',
    'one byte': b'x',
    'a login page': PAGE,
    'tokens beyond the vocabulary': b'\xff\xff' * 1000,
    'a pickle': payload(),
    'int64': np.arange(60).astype('<i8').tobytes() * 50,
    'NUL bytes': bytes(4000),
}.items():
    CASES.append(case(name, 'train.bin', 'nano/train.bin', how, NANO, names=('nano',)))
CASES.append(
    case(
        'uint32',
        'train.bin',
        'nano/train.bin',
        (np.arange(2000) % 60).astype('<u4').tobytes(),
        NANO,
        names=('nano',),
    )
)  # val is uint16

# -----------------------------------------------------------------------------
# Corpora

PREPARE = ('prepare.py', 'text/a.txt', '--tokenizer=byte', '--out=out/d', '--val_fraction=0.2')


def corpus(name, path, how, expected='refused', *more, kind=None, like=PREPARE, **others):
    args = ('prepare.py', path, *PREPARE[2:], *more)
    CASES.append(
        case(
            name, kind or os.path.splitext(path)[1], path, how, args, expected=expected, like=[like], **others
        )
    )


for name in sorted(SPECIAL.keys() - {'4 GB of nothing'}):  # NUL is a character like others
    corpus(
        name,
        'text/a.txt',
        SPECIAL[name],
        'accepted' if name == "a link to a user's file" else 'refused',
        names=('a.txt',),
    )
TEXTS = {
    'empty': (b'', 'refused'),
    'only a byte-order mark': (b'\xef\xbb\xbf', 'refused'),
    'only blanks': (b' \n' * 1000, 'either'),
    'a login page': (PAGE, 'accepted'),
    'not UTF-8': (b'a\xff' * 100, 'refused'),
    'UTF-16': ('hello\n'.encode('utf-16') * 100, 'refused'),
    'NUL bytes': (bytes(1000), 'accepted'),
    'half a surrogate pair': (b'\xed\xa0\x80' * 10, 'refused'),
    'overlong UTF-8': (b'\xc0\xaf' * 10, 'refused'),
    'terminal escapes': (ESCAPES.encode() * 100, 'accepted'),
    'a line of 20 MB': (b'x' * 20_000_000, 'accepted'),
    '100,000 separators': (b'<|endoftext|>\n' * 100_000, 'refused'),
    'a separator in blanks': ((b' ' * 10**6 + b'<|endoftext|>' + b' ' * 10**6 + b'\n') * 3, 'accepted'),
    'only carriage returns': (b'a\r' * 1000, 'accepted'),
    'a pickle': (payload(), 'refused'),
    'special tokens': (b'</s><|endoftext|><s>[UNK]' * 100, 'accepted'),
    'letters that turn': ('\u202e\u2066abc'.encode() * 100, 'accepted'),
    'marks on marks': (('a' + '\u0301' * 50_000).encode(), 'accepted'),
    'line separators of Unicode': ('a\u2028b\u2029c\x85'.encode() * 100, 'accepted'),
}
for name, (data, expected) in TEXTS.items():
    corpus(name, 'text/a.txt', data, expected)
for name in (
    'a\nb.txt',
    f'{ESCAPES.replace(";", "_")}.txt',
    'x' * 240 + '.txt',
    '-rf.txt',
    '$(touch executed).txt',
    '`touch executed`.txt',
    "';touch executed;'.txt",
    '\u202etxt.txt',
    'A.TXT',
    'a.txt.txt',
    '.txt.txt',
    '[a].txt',
    '{a}.txt',
    '*.txt',
    ' .txt',
    'a.txt\u2028.txt',
):
    corpus(
        f'called {ascii(name)[:40]}',
        f'text/odd/{name}',
        lambda path: (path.parent.mkdir(), path.write_text('a small cat\n' * 200)),
        'accepted',
        kind='names of corpora',
    )
    corpus(
        f'not UTF-8, called {ascii(name)[:40]}',
        f'text/odd/{name}',
        lambda path: (path.parent.mkdir(), path.write_bytes(b'\xff' * 50)),
        kind='names of corpora',
        names=('.txt', '.TXT'),
    )


def in_folder(name, act, expected='accepted', names=('inner',)):
    """A folder of corpora with something odd in it beside good files."""

    def write(box):
        where = Path(box, 'many/inner')
        where.mkdir(parents=True)
        (where / 'good.txt').write_text('a small cat\n' * 20_000)
        act(where)

    args = ('prepare.py', 'many/inner', *PREPARE[2:])
    CASES.append(
        Case(f'many/inner: {name}', 'folders of corpora', write, [args], expected, names, like=[PREPARE])
    )


in_folder('a named pipe', lambda where: os.mkfifo(where / 'a.txt'))
in_folder('a link to /dev/zero', lambda where: (where / 'a.txt').symlink_to('/dev/zero'))
in_folder('a link to the folder itself', lambda where: (where / 'a').symlink_to('.'))
in_folder('a link to the parent', lambda where: (where / 'a').symlink_to('..'))
in_folder('a link to nothing', lambda where: (where / 'a.txt').symlink_to('nothing'), 'refused')
in_folder('a link to itself', lambda where: (where / 'a.txt').symlink_to('a.txt'), 'refused')
in_folder('a folder that is called a.txt', lambda where: (where / 'a.txt').mkdir())
in_folder(
    'a name that is not UTF-8',
    lambda where: Path(os.fsdecode(os.fsencode(where) + b'/\xff.txt')).write_text('a small cat\n'),
)
in_folder(
    'a name of escapes',
    lambda where: (where / f'{ESCAPES.replace(";", "_")}.doc').write_text('a small cat\n'),
)
in_folder('2,000 files', lambda where: [(where / f'{n}.txt').write_text(f'cat {n}') for n in range(2000)])
in_folder('folders 300 deep', lambda where: os.makedirs(where / '/'.join('d' * 300)))
in_folder('a pickle', lambda where: (where / 'a.pkl').write_bytes(payload()))
in_folder('a program', lambda where: (where / 'data.py').write_text("open('executed', 'w')"))
in_folder(
    'a program that has a name of ours',
    lambda where: (where / '__init__.py').write_text("open('executed', 'w')"),
)

# -----------------------------------------------------------------------------
# Compressed

HONEST = b'a small cat sat on a mat\n' * 400


@cache
def bomb(kind):
    """About 1.5 GB of the same letter, in kilobytes."""
    size = 2**26
    if kind == 'gz':
        return gzip.compress(b'a' * size, 9) * 24
    if kind == 'bz2':
        return bz2.compress(b'a' * size) * 24
    if kind == 'xz':
        return lzma.compress(b'a' * size) * 24
    # zst: a frame of blocks that repeat one byte 128 KB times, 4 bytes each
    block = struct.pack('<I', (2**17 << 3) | 1 << 1)[:3] + b'a'
    last = struct.pack('<I', (2**17 << 3) | 1 << 1 | 1)[:3] + b'a'
    return b'\x28\xb5\x2f\xfd\x00\x58' + block * 12_000 + last


def lying_xz():
    """An .xz that asks for a dictionary of 4 GB - 1."""
    data = bytearray(lzma.compress(HONEST))
    at = data.index(b'\x21\x01', 12)  # LZMA2, a byte of properties
    data[at + 2] = 40
    size = (data[12] + 1) * 4
    data[12 + size - 4 : 12 + size] = struct.pack('<I', zlib.crc32(bytes(data[12 : 12 + size - 4])))
    return bytes(data)


ZST = b'\x28\xb5\x2f\xfd'
PACKED = {
    'gz': gzip.compress,
    'bz2': bz2.compress,
    'xz': lzma.compress,
    'zst': lambda data: __import__('zstandard').ZstdCompressor().compress(data),
}
for ending, pack in PACKED.items():
    path = f'text/z.txt.{ending}'
    for name, how, expected in (
        ('good', lambda pack: pack(HONEST), 'accepted'),
        ('empty', lambda pack: b'', 'refused'),
        ('not compressed', lambda pack: HONEST, 'refused'),
        ('a login page', lambda pack: PAGE, 'refused'),
        ('half of it', lambda pack: pack(HONEST)[:-20], 'refused'),
        ('bytes after it', lambda pack: pack(HONEST) + b'evil', 'refused'),
        ('twice', lambda pack: pack(HONEST) * 2, 'accepted'),
        ('of nothing', lambda pack: pack(b''), 'refused'),
        ('of bytes that are not UTF-8', lambda pack: pack(b'\xff' * 99), 'refused'),
        ('compressed twice', lambda pack: pack(pack(HONEST)), 'refused'),
        ('of a pickle', lambda pack: pack(payload()), 'refused'),
        (
            'a bit flipped',  # .zst need not have a checksum
            lambda pack: bytes(b ^ (n == 30) * 4 for n, b in enumerate(pack(HONEST))),
            'either',
        ),
        ('NUL bytes', lambda pack: bytes(100), 'refused'),
    ):
        corpus(name, path, lambda path, how=how, pack=pack: path.write_bytes(how(pack)), expected)
    for name, how in {
        'a pipe': fifo,
        'a folder': folder,
        'a link to /dev/zero': link('/dev/zero'),
        '4 GB of nothing': hole,
    }.items():
        corpus(name, path, how)
    corpus('1.5 GB in kilobytes', path, lambda path, ending=ending: path.write_bytes(bomb(ending)))
    corpus(
        '1.5 GB of .jsonl in kilobytes',
        f'text/z.jsonl.{ending}',
        lambda path, ending=ending: path.write_bytes(bomb(ending)),
        kind=f'.{ending}',
    )
corpus('a dictionary of 4 GB', 'text/z.txt.xz', lying_xz(), 'either')
corpus(
    'a window of 2 GB',
    'text/z.txt.zst',
    lambda path: path.write_bytes(ZST + b'\x00' + bytes([21 << 3]) + b'\x01\x00\x00'),
    expected='refused',
)
corpus(
    'a frame that says 2**62 bytes',
    'text/z.txt.zst',
    lambda path: path.write_bytes(ZST + b'\xe0' + struct.pack('<Q', 2**62) + b'\x01\x00\x00'),
)
corpus(
    'skippable frames',
    'text/z.txt.zst',
    lambda path: path.write_bytes((b'\x50\x2a\x4d\x18' + struct.pack('<I', 4) + b'evil') * 1000),
)
corpus(
    'a file name of 1 MB in its header',
    'text/z.txt.gz',
    lambda path: path.write_bytes(
        b'\x1f\x8b\x08\x08' + bytes(6) + b'x' * 10**6 + b'\0' + gzip.compress(HONEST)[10:]
    ),
    expected='accepted',
)

# -----------------------------------------------------------------------------
# Parquet


def parquet(columns, **options):
    def write(path):
        import pyarrow
        import pyarrow.parquet

        table = columns() if callable(columns) else pyarrow.table(columns)
        pyarrow.parquet.write_table(table, path, **options)

    return write


def repeated():
    """100,000 rows of the same megabyte, 100 GB in all."""
    import pyarrow

    words = pyarrow.array(['a small cat ' * 80_000])
    return pyarrow.table(
        {'text': pyarrow.DictionaryArray.from_arrays(pyarrow.array(np.zeros(100_000, np.int32)), words)}
    )


def not_utf8():
    import pyarrow

    return pyarrow.table({'text': pyarrow.array([b'a\xff'] * 50, pyarrow.binary()).view(pyarrow.string())})


def footer(data):
    return b'PAR1' + data + struct.pack('<I', len(data)) + b'PAR1'


PARQUETS = {
    'good': (parquet({'text': [f'a small cat {n}' for n in range(300)]}), 'accepted'),
    'without rows': (parquet({'text': ['x'][:0]}), 'refused'),
    'empty': (b'', 'refused'),
    'a login page': (PAGE, 'refused'),
    'only its sign': (b'PAR1', 'refused'),
    'its sign twice': (b'PAR1PAR1', 'refused'),
    'a footer longer than it': (b'PAR1' + struct.pack('<I', 2**31) + b'PAR1', 'refused'),
    'a footer of zeros': (footer(bytes(1000)), 'refused'),
    'a footer of nested lists': (footer(b'\x19' * 100_000), 'refused'),
    'a footer of nested structures': (footer(b'\x1c' * 100_000), 'refused'),
    'a footer of a list of 2**31': (footer(b'\x15\x02\x29\xfc\xff\xff\xff\xff\x07'), 'refused'),
    'a pickle': (payload(), 'refused'),
    'a column of numbers': (parquet({'text': [1, 2]}), 'refused'),
    'a column of lists': (parquet({'text': [['x']]}), 'refused'),
    'a column of bytes': (parquet({'text': [b'x']}), 'refused'),
    'another column': (parquet({'evil': ['x']}), 'refused'),
    'a column of escapes': (parquet({ESCAPES: ['x']}), 'refused'),
    'two columns of a name': (
        lambda path: __import__('pyarrow.parquet').parquet.write_table(
            __import__('pyarrow').Table.from_arrays(
                [__import__('pyarrow').array(['a' * 500])] * 2, names=['text', 'text']
            ),
            path,
        ),
        'either',
    ),
    'null in all rows': (parquet({'text': [None, 'x'][:1] * 50}), 'refused'),
    'not UTF-8': (parquet(not_utf8), 'refused'),
    '100 GB in kilobytes': (parquet(repeated), 'refused'),
    'half of it': (
        lambda path: (parquet({'text': ['a small cat'] * 300})(path), os.truncate(path, 200)),
        'refused',
    ),
    'encrypted': (b'PARE' + bytes(100) + struct.pack('<I', 50) + b'PARE', 'refused'),
}
for name, (how, expected) in PARQUETS.items():
    corpus(name, 'text/z.parquet', how, expected, names=('z.parquet', 'val_fraction'))
for name, how in SPECIAL.items():
    corpus(name, 'text/z.parquet', how)

# -----------------------------------------------------------------------------
# Lines of JSON: texts, pairs, conversations

ROWS = ('prepare.py', 'text/rows.jsonl', *PREPARE[2:])
PAIRS = ('prepare.py', 'text/pairs.jsonl', '--source=source', '--target=target', *PREPARE[2:])
CHATS = ('prepare.py', 'text/chats.jsonl', '--messages', *PREPARE[2:])
DOORS = {'rows': ROWS, 'pairs': PAIRS, 'chats': CHATS}
for name, args in DOORS.items():
    for base in documents(
        f'text/{name}.jsonl', f'.jsonl ({name})', args, accepted=('it twice',)
    ):
        if base.name.endswith('it in quotes of Python'):
            continue
        CASES.append(base)
LINES = {  # a line for each reader
    'text is a number': {'text': 5},
    'text is a list': {'text': ['x']},
    'text is an object': {'text': {}},
    'text is true': {'text': True},
    'no text': {'body': 'x'},
    'text in capitals': {'TEXT': 'x'},
    'half a surrogate pair': {'text': '\ud800'},
    'a field of escapes': {ESCAPES: 'x'},
    '1,000 fields': {str(n): 'x' for n in range(1000)},
}
for name, row in LINES.items():
    corpus(
        name,
        'text/rows.jsonl',
        lambda path, row=row: path.write_text(path.read_text() + json.dumps(row) + '\n'),
        kind='.jsonl (rows)',
    )
for name, text in {
    'a number of 5,000 digits': '{"text": ' + '9' * 5000 + '}',
    'NaN': '{"text": NaN}',
    'a list in 100,000 others': '[' * 100_000 + ']' * 100_000,
    'a text in 100,000 lists': '{"text": ' + '[' * 100_000 + ']' * 100_000 + '}',
    'a comma too many': '{"text": "x",}',
}.items():
    corpus(
        f'a line with {name}',
        'text/rows.jsonl',
        lambda path, text=text: path.write_text(path.read_text() + text + '\n'),
        kind='.jsonl (rows)',
    )
for name, text in {
    'a line of 20 MB': '{"text": "' + 'x ' * 10**7 + '"}',
    'a NUL in a text': '{"text": "a\\u0000b"}',
    'a field twice': '{"text": "a", "text": "b"}',
    'text of null': '{"text": null}',
    'an empty text': '{"text": ""}',
    '100,000 empty lines': '\n' * 100_000,
    'line separators of Unicode': '{"text": "a\u2028b"}',
    'escapes': json.dumps({'text': ESCAPES}),
    'no newline at its end': '{"text": "x"}',
}.items():
    corpus(
        name,
        'text/rows.jsonl',
        lambda path, text=text: path.write_text(path.read_text() + text),
        'accepted',
        kind='.jsonl (rows)',
    )
for name, row in {
    'no target': {'source': 'x'},
    'a target of numbers': {'source': 'x', 'target': 5},
    'a target that is a list of numbers': {'source': 'x', 'target': [5]},
    'half a surrogate pair': {'source': 'x', 'target': '\udfff'},
    'a source that is an object': {'source': {}, 'target': 'y'},
}.items():
    corpus(
        name,
        'text/pairs.jsonl',
        lambda path, row=row: path.write_text(path.read_text() + json.dumps(row) + '\n'),
        'refused',
        *PAIRS[2:4],
        kind='.jsonl (pairs)',
    )
A, U = {'role': 'assistant', 'content': 'yes'}, {'role': 'user', 'content': 'no'}
for name, row in {
    'messages are a text': {'messages': 'x'},
    'messages are empty': {'messages': []},
    'messages are an object': {'messages': {}},
    'messages of texts': {'messages': ['x']},
    'messages of null': {'messages': [None]},
    'a role that is a list': {'messages': [{'role': [], 'content': 'x'}]},
    'an unknown role': {'messages': [{'role': ESCAPES, 'content': 'x'}]},
    'content that is a list': {'messages': [U | {'content': ['x']}, A]},
    'content that is null': {'messages': [U, A | {'content': None}]},
    'no content': {'messages': [{'role': 'user'}, A]},
    'half a surrogate pair': {'messages': [U | {'content': '\ud800'}, A]},
    'no assistant': {'messages': [U]},
    'the assistant first': {'messages': [A, U]},
    'a turn in 900 lists': {'messages': [json.loads('[' * 900 + ']' * 900)]},
    'both shapes': {'conversations': 5},
}.items():
    corpus(
        name,
        'text/chats.jsonl',
        lambda path, row=row: path.write_text(path.read_text() + json.dumps(row) + '\n'),
        'refused',
        '--messages',
        kind='.jsonl (chats)',
    )
for name, row in {
    'special tokens in a message': {'messages': [U | {'content': '<|endoftext|></s><|im_end|>'}, A]},
    'our hidden signs': {'messages': [U | {'content': '\ue001\ue001 5\ue002 \ue0010\ue002'}, A]},
    'a template in a message': {
        'messages': [U | {'content': "{{ ''.__class__ }}{% for i in range(10**9) %}{% endfor %}"}, A]
    },
    'a message of 5 MB': {'messages': [U | {'content': 'x ' * 2_500_000}, A]},
}.items():
    corpus(
        name,
        'text/chats.jsonl',
        lambda path, row=row: path.write_text(path.read_text() + json.dumps(row) + '\n'),
        'accepted',
        '--messages',
        kind='.jsonl (chats)',
    )

# what is left of an earlier preparation
for name, how in {
    'a page': PAGE,
    'empty': b'',
    'a list': b'[]',
    'a pipe': fifo,
    'a folder': folder,
    'a link to /dev/zero': link('/dev/zero'),
    'open brackets': b'[' * 10**5,
}.items():

    def write(box, how=how):
        (Path(box) / 'out/d').mkdir()
        put(Path(box) / 'out/d/meta.json', how)

    CASES.append(
        Case(f'out/d/meta.json: {name}', 'meta.json', write, [PREPARE], names=('out/d',), may_leave=True)
    )
