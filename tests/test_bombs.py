"""
Small files that grow: memory and time are bounded by what is on disk, and the message is one line.
"""
import bz2
import gzip
import lzma
import pickle
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from conftest import ROOT
from test_prepare import do, story, write_jsonl

from batches import read_meta
from configurator import UserError
from features.text import reader
from features.text.pieces import BEFORE_SPACE
from features.text.reader import Reader
from features.text.settings import TextConfig


def measured(function):
    """(function(), the most bytes that Python held during it)."""
    tracemalloc.start()
    try:
        return function(), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def refused(path, words, **settings):
    def attempt():
        with pytest.raises(UserError, match=words) as error:
            do(path.parent / 'out', path, **settings)
        return str(error.value)
    message, most = measured(attempt)
    assert '\n' not in message and str(path) in message
    assert most < 300e6
    assert sorted(name.name for name in path.parent.iterdir()) == [path.name]


def pack_zst(data):
    import zstandard
    return zstandard.compress(data, 3)


@pytest.mark.parametrize('ending', ['txt', 'jsonl'])
@pytest.mark.parametrize('kind, pack', [
    ('bz2', bz2.compress), ('xz', lambda data: lzma.compress(data, preset=0)), ('gz', gzip.compress),
    ('zst', pack_zst)])
def test_a_packed_file_that_grows_a_thousandfold_is_refused(tmp_path, kind, pack, ending):
    path = tmp_path / f'x.{ending}.{kind}'
    path.write_bytes(pack(bytes(10 ** 7)) * 30)  # 300 MB
    refused(path, r'bytes of it unpack to more than')


@pytest.mark.parametrize('kind, pack', [('bz2', bz2.compress), ('gz', gzip.compress), ('zst', pack_zst)])
def test_small_repeated_text_is_read_whatever_it_grows_by(tmp_path, kind, pack):
    text = story(1, 200) + '\n'
    (tmp_path / f'x.txt.{kind}').write_bytes(pack(text.encode() * 3000))
    meta = do(tmp_path / 'out', tmp_path / f'x.txt.{kind}')
    assert sum(split['bytes'] for split in meta['splits'].values()) == 3000 * len(text.encode())


def test_one_endless_line_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(reader, 'LONGEST', 2 ** 24)
    path = tmp_path / 'x.jsonl'
    with open(path, 'wb') as f:
        f.write(b'{"text": "fine"}\n')
        f.truncate(10 ** 10)  # a file with a hole
    refused(path, r'x.jsonl:2: is a line of more than 16,777,216 bytes')


def test_an_endless_document_that_cannot_be_cut_is_refused_in_linear_time(tmp_path, monkeypatch):
    monkeypatch.setattr(reader, 'LONGEST', 2 ** 24)
    path = tmp_path / 'x.txt'
    with open(path, 'wb') as f:
        f.truncate(10 ** 10)
    s = TextConfig(sources=[str(path)])
    with pytest.raises(UserError, match='x.txt: has a document of more than 16,777,216 characters'):
        list(Reader([(str(path), 'text')], s).parts(str(path), BEFORE_SPACE))


def parquet(path, strings, counts=1, **more):
    pa = pytest.importorskip('pyarrow')
    pq = pytest.importorskip('pyarrow.parquet')
    column = pa.DictionaryArray.from_arrays(pa.array(np.zeros(counts, np.int32)), pa.array(strings))
    pq.write_table(pa.table({'text': column}), path, compression='zstd', **more)
    return path


@pytest.mark.parametrize('strings, count', [(['\0' * 50_000_000], 1), (['x' * 5_000_000], 2000),
                                            (['x' * 100], 400_000)])
def test_a_parquet_that_grows_a_thousandfold_is_refused(tmp_path, strings, count):
    refused(parquet(tmp_path / 'x.parquet', strings, count), 'bytes of it unpack to more than')


def test_a_parquet_of_nothing_or_of_something_else_is_one_line(tmp_path):
    pa = pytest.importorskip('pyarrow')
    pq = pytest.importorskip('pyarrow.parquet')
    nulls = pa.array([None, None], pa.string())
    for number, (table, words) in enumerate((
            (pa.table({'text': pa.array([], pa.string())}), 'no text in it'),
            (pa.table({}), 'no column text'),
            (pa.table({'id': [1, 2]}), 'no column text; it has id'),
            (pa.table({'text': nulls}), 'no text in it'),
            (pa.table({'text': [1, 2]}), 'holds a int, not text'),
            (pa.table({'text': [{'a': 'b'}]}), 'holds a dict, not text'),
            (pa.table({'text': [['a'], ['b']]}), 'holds a list, not text'))):
        path = tmp_path / f'{number}.parquet'
        pq.write_table(table, path)
        with pytest.raises(UserError, match=words) as error:
            do(tmp_path / 'out', path)
        assert '\n' not in str(error.value)
    whole = parquet(tmp_path / 'y.parquet', [story(1)], 50).read_bytes()
    for end in range(1, len(whole), 37):
        (tmp_path / 'z.parquet').write_bytes(whole[:end])
        with pytest.raises(UserError, match='z.parquet: not a valid .parquet'):
            do(tmp_path / 'out', tmp_path / 'z.parquet')


READ = """
import sys
from configurator import UserError
from features.text.reader import Reader
from features.text.settings import TextConfig
for path in sys.argv[1:]:
    try:
        print(sum(1 for _ in Reader([(path, 'parquet')], TextConfig(sources=[path])).parquet(path)))
    except UserError as error:
        print(str(error).replace('\\n', 'TWO LINES'))
"""


def test_a_parquet_whose_footer_lies_is_one_line_and_never_fewer_rows(tmp_path):
    """In a process of its own: where a type contradicts the figures of its column, pyarrow may abort."""
    pa = pytest.importorskip('pyarrow')
    pq = pytest.importorskip('pyarrow.parquet')
    pq.write_table(pa.table({'text': [f'a small cat {n}' for n in range(300)]}), tmp_path / 'x')
    data = (tmp_path / 'x').read_bytes()
    begin = len(data) - 8 - int.from_bytes(data[-8:-4], 'little')
    body, footer = data[:begin], data[begin:]
    column, rows = b'\x15\x0c\x25\x02\x18\x04text', b'\x16\xd8\x04'  # its type and repetition; 300
    lies = [footer.replace(column, b'\x15' + bytes([kind]) + column[2:]) for kind in range(0, 16, 2)]
    lies += [footer.replace(column, column[:3] + bytes([kind]) + column[4:]) for kind in (0, 4, 6, 127)]
    assert footer.count(column) == 1 and footer.count(rows) >= 3
    places = [place for place in range(len(footer)) if footer[place:].startswith(rows)]
    lies += [footer[:place] + b'\x16' + other + footer[place + 3:] for place in places
             for other in (b'\xd6\x04', b'\xda\x04', b'\x81\x00', b'\xfe\x7f')]
    for number, lie in enumerate(lies):
        (tmp_path / f'{number}.parquet').write_bytes(body + lie)
    paths = [str(tmp_path / f'{number}.parquet') for number in range(len(lies))]
    done = subprocess.run([sys.executable, '-c', READ, *paths], cwd=ROOT, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) == len(paths), done
    for path, line in zip(paths, lines):
        assert line == '300' or line.startswith(f'{path}: ') and 'restore it' in line, line
    assert any('has 300 rows where it says' in line for line in lines), lines


@pytest.mark.parametrize('data', [
    b'\x80\x04Nr\xff\xff\xff\x7f.',  # room for 2**31 values
    b'\x80\x04\x8e' + (2 ** 40).to_bytes(8, 'little') + b'.',  # bytes that are not there
    b'\x80\x04\x8d' + (2 ** 33).to_bytes(8, 'little') + b'.',
    b'\x80\x05\x96' + (2 ** 33).to_bytes(8, 'little') + b'.',
    b'\x80\x04]' + b'\x94h\x00a' * 10,
    b'\x80\x04)' + b'\x85' * 10 ** 6 + b'.',  # tuples in tuples
    b'(' * 10 ** 6, b'', b'.', b'N.', b'\x80\xff.', b'\x00' * 100,
    b'cos\nsystem\n(S"touch canary"\ntR.', bytes(2 ** 23 + 1)])
def test_a_hostile_meta_pkl_is_one_line_and_takes_no_memory(tmp_path, data):
    (tmp_path / 'train.bin').write_bytes(b'\1\0' * 100)
    (tmp_path / 'meta.pkl').write_bytes(data)

    def attempt():
        with pytest.raises(UserError, match='meta.pkl: '):
            read_meta(str(tmp_path))
    assert measured(attempt)[1] < 100e6


def test_a_vocab_size_that_would_be_endless_text_is_not_shown(tmp_path):
    value = []
    for _ in range(40):
        value = [value, value]
    (tmp_path / 'train.bin').write_bytes(b'\1\0' * 100)
    (tmp_path / 'meta.pkl').write_bytes(pickle.dumps({'vocab_size': value}))
    with pytest.raises(UserError, match='vocab_size=list'):
        read_meta(str(tmp_path))


def test_honest_files_are_what_they_were(tmp_path):
    texts = [story(n, 40) for n in range(300)]
    plain = write_jsonl(tmp_path / 'x.jsonl', texts)
    data = (tmp_path / 'x.jsonl').read_bytes()
    whole = do(tmp_path / 'whole', plain, val_fraction=0.2)['splits']
    for kind, pack in (('gz', gzip.compress), ('bz2', bz2.compress), ('xz', lzma.compress)):
        half = data.index(b'\n', len(data) // 2)
        (tmp_path / f'x.jsonl.{kind}').write_bytes(pack(data[:half]) + pack(data[half:]) + bytes(512))
        meta = do(tmp_path / kind, tmp_path / f'x.jsonl.{kind}', val_fraction=0.2)
        assert meta['splits'] == whole
