"""
Hostile files, each written by a few lines of code into a copy of the honest folders (honest.py):

    CASES: [Case(name, format, write, commands, expected, …)]

Some are an attacker's, some those of a bad day. documents() stand in the place of any file that is read as
JSON; the other modules have what is hostile to one format only.
"""

import gzip
import json
import os
import pickle
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from honest import LLAMA, TINY, newest, seal

# -----------------------------------------------------------------------------
# A case


@dataclass
class Case:
    name: str
    format: str
    write: Callable  # writes the hostile file into the folder that it is given
    commands: list  # command lines that read it
    expected: str = 'refused'  # or accepted: the file is harmless, or damage that minnow mends by itself; or
    # either: harmless, and refused where the command needs it
    names: tuple = ()  # a refusal has one of these in its line
    like: list | None = None  # command lines that do the same with honest files, if others do
    own: tuple = ()  # folders and files beside out/ that the commands may change
    typed: str = ''  # on their standard input
    environment: dict = field(default_factory=dict)
    may_leave: bool = False  # the file is read in the middle of a run, whose folder stays
    secret_is_shown: bool = False  # the command line itself names a link to it


def case(name, format, path, how, *commands, expected='refused', names=None, sealed=False, **more):
    """
    A Case whose file is `path`. how: its bytes, or a function that writes it. sealed: it is in a checkpoint,
    whose manifest then agrees with it; older checkpoints and `best` are removed: nothing else is read.
    """

    def write(box):
        target = Path(box, path)
        if sealed:
            only_newest(target.parents[1])
        put(target, how)
        if sealed:
            seal(target.parent)

    if names is None:
        names = (os.path.basename(path),)
    return Case(f'{path}: {name}', format, write, list(commands), expected, tuple(names), **more)


def only_newest(run):
    import shutil

    kept = newest(run)
    for path in run.glob('step_*'):
        if path != kept:
            shutil.rmtree(path)
    Path(run, 'best').unlink(missing_ok=True)


def put(path, how):
    """Write bytes to a path, or let a function do so."""
    path = Path(path)
    if isinstance(how, bytes):
        clear(path)
        path.write_bytes(how)
    else:
        how(path)


def clear(path):
    import shutil

    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif path.is_symlink() or path.exists():
        path.unlink()


def edit(change):
    """A function that changes the value in a JSON file: change(value) returns it, or None if in place."""

    def write(path):
        value = json.loads(path.read_text())
        changed = change(value)
        path.write_text(json.dumps(value if changed is None else changed))

    return write


def fields(**changed):
    """A function that sets fields of the object in a JSON file."""
    return edit(lambda value: value | changed)


def inside(key, **changed):
    """A function that sets fields of an object inside the one in a JSON file."""
    return edit(lambda value: value | {key: value[key] | changed})


def without(*keys):
    return edit(lambda value: {key: value[key] for key in value if key not in keys})


# -----------------------------------------------------------------------------
# In the place of any file

PAGE = (
    b'<!DOCTYPE html>\n<html><head><title>Sign in</title></head>\n'
    b'<body><form action="/login"></form></body></html>\n'
)
ESCAPES = '\x1b]52;c;ZXZpbA==\x07\x1b[2J\x9b31m'


class Runs:
    """What a pickle of it calls."""

    def __reduce__(self):
        return os.system, ('touch executed',)


def payload():
    return pickle.dumps({'vocab_size': Runs()})


def link(target):
    def write(path):
        clear(path)
        path.symlink_to(target)

    return write


def fifo(path):
    clear(path)
    os.mkfifo(path)


def folder(path):
    clear(path)
    path.mkdir()


def socket_(path):
    clear(path)
    here = os.getcwd()
    os.chdir(path.parent)  # the name of a socket has 107 bytes at most
    try:
        with socket.socket(socket.AF_UNIX) as s:
            s.bind(path.name)
    finally:
        os.chdir(here)


def hole(path, size=2**32):
    """A file of 4 GB that takes no room."""
    clear(path)
    with open(path, 'wb') as f:
        f.truncate(size)


def outside(path):
    """A link to a file of the user."""
    clear(path)
    path.symlink_to(
        os.path.relpath(
            path.parents[len(path.relative_to(box_of(path)).parents) - 1] / 'outside/secret.txt', path.parent
        )
    )


def box_of(path):
    """The folder of the case that a path lies in: it has a folder outside/."""
    return next(parent for parent in path.parents if (parent / 'outside').is_dir())


def of(change):
    """A function that writes change(bytes of the honest file)."""
    return lambda path: path.write_bytes(change(path.read_bytes()))


# name: (what to write, whether it is a special file)
SPECIAL = {
    'a named pipe': fifo,
    'a folder': folder,
    'a socket': socket_,
    'a link to /dev/zero': link('/dev/zero'),
    'a link to itself': lambda path: link(path.name)(path),
    'a link to nothing': link('nothing'),
    "a link to a user's file": outside,
    '4 GB of nothing': hole,
}
BYTES = {
    'empty': b'',
    'only blanks': b' \n\t \r\n',
    'only a byte-order mark': b'\xef\xbb\xbf',
    'a login page': PAGE,
    '1,000 NUL bytes': b'\0' * 1000,
    'a pickle that runs a program': payload(),
    'a zip': b'PK\x03\x04' + bytes(26),
    'bytes that are not UTF-8': b'{"a": "\xff\xfe\xfd"}',
}
JSON = {
    'null': b'null',
    'true': b'true',
    'a number': b'12',
    'a text': b'"step_00000001"',
    'a list': b'[1, 2]',
    'NaN': b'NaN',
    '1e999': b'1e999',
    'a number of 5,000 digits': b'9' * 5000,
    'a field with a number of 5,000 digits': b'{"vocab_size": ' + b'9' * 5000 + b'}',
    '100,000 open brackets': b'[' * 100_000,
    '100,000 brackets': b'[' * 100_000 + b']' * 100_000,
    '100,000 open objects': b'{"a":' * 100_000,
    'an object in 100,000 others': b'{"a":' * 100_000 + b'1' + b'}' * 100_000,
    'an empty object': b'{}',
    'a field of half a surrogate pair': b'{"\\ud800": "\\udfff"}',
    'a field of terminal escapes': json.dumps({ESCAPES: ESCAPES, 'model_type': ESCAPES}).encode(),
    'a field of 100,000 characters': json.dumps({'a' * 100_000: 1}).encode(),
    'half of it': of(lambda data: data[: len(data) // 2]),
    'it twice': of(lambda data: data + b'\n' + data),
    'it with a comment': of(lambda data: b'// settings\n' + data),
    'it in quotes of Python': of(lambda data: repr(json.loads(data)).encode()),
    'it in UTF-16': of(lambda data: data.decode().encode('utf-16')),
    'it in UTF-32': of(lambda data: data.decode().encode('utf-32')),
    'it compressed': of(gzip.compress),
    'it with NUL bytes between': of(lambda data: b'\0'.join([data[:9], data[9:]])),
}
HARMLESS = {
    'it with a byte-order mark': of(lambda data: b'\xef\xbb\xbf' + data),
    'it with each field twice': of(
        lambda data: (
            b'{' + data.strip()[1:-1] + b',' + data.strip()[1:-1] + b'}' if data.strip()[1:-1] else data
        )
    ),
    'it with 1 MB of blanks': of(lambda data: b' ' * 2**20 + data),
    'it with line ends of Windows': of(lambda data: data.replace(b'\n', b'\r\n')),
}


# files that need not be there are passed over where they are no regular files
NEEDLESS = (
    'a named pipe',
    'a folder',
    'a socket',
    'a link to /dev/zero',
    'a link to itself',
    'a link to nothing',
)


def documents(path, format, *commands, accepted=(), either=(), **more):
    """
    Cases of every document in the place of the JSON file `path`. accepted and either: names of those with
    this expectation, beside HARMLESS, which are accepted. A field that is there twice may be refused.
    """
    expected = dict.fromkeys([*HARMLESS, *accepted], 'accepted')
    expected |= dict.fromkeys(['it with each field twice', *either], 'either')
    return [
        case(name, format, path, how, *commands, expected=expected.get(name, 'refused'), **more)
        for name, how in (SPECIAL | BYTES | JSON | HARMLESS).items()
    ]


# -----------------------------------------------------------------------------
# Commands

CPU = ('--device=cpu',)
FEW = ('--max_new_tokens=2', '--num_samples=1', *CPU)
SAMPLE = ('sample.py', '--out_dir=run', *FEW)
RESUME = ('train.py', '--out_dir=run', '--dataset=data', '--max_iters=3', *TINY[:7], *TINY[8:], *LLAMA)
INHERIT = ('surgery.py', 'inherit', '--from=run', '--out_dir=out/new', '--layers=0')
EXPORT = ('hub.py', 'export', '--out_dir=run', '--to=out/hf')
LOSS = ('eval.py', 'loss', '--out_dir=run', *CPU)
COMPARE = ('compare.py', 'run', 'run_bpe', '--picture=')
WEIGHTS = ('analyze.py', 'weights', '--out_dir=run', '--picture=')
TRAIN = ('train.py', '--dataset=data', '--out_dir=out/new', *TINY, *LLAMA)
OF_HF = ('sample.py', '--init_from=hf:hf', *FEW)

import cases_checkpoints  # noqa: E402 — they use the above
import cases_data  # noqa: E402
import cases_foreign  # noqa: E402
import cases_study  # noqa: E402

CASES = [*cases_checkpoints.CASES, *cases_data.CASES, *cases_foreign.CASES, *cases_study.CASES]
