"""
Any text becomes the same bytes, whatever the processes and interruptions; what is there under its name is
whole.
"""
import argparse
import bz2
import gzip
import inspect
import itertools
import json
import lzma
import os
import re
import signal
import subprocess
import sys
import time
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import zstandard
from conftest import ROOT, run
from hypothesis import given
from hypothesis import settings as property_settings
from hypothesis import strategies as st

import prepare
from batches import Source, TokenFiles
from configurator import UserError, run_main
from features.text import pipeline
from features.text import reader as reading
from features.text.pieces import cut_of
from features.text.reader import Reader, documents
from features.text.settings import TextConfig
from features.text.sources import find_files
from features.text.splits import choose_from, tasks_to_choose_from
from prepare import divide, hash_of, separate
from tokenizer import load_tokenizer, new_tokenizer

WORDS = sorted(set(inspect.getsource(argparse).split(' '))) + ['très', '中文', '😀']


def story(seed, words=40):
    rng = np.random.default_rng(seed)
    return ' '.join(rng.choice(WORDS, words))


def write_jsonl(path, texts, key='text'):
    Path(path).write_text(''.join(json.dumps({key: text}) + '\n' for text in texts))
    return str(path)


def do(out, *given, **settings):
    """Prepare without the command line; returns meta.json."""
    return prepare.prepare(TextConfig(sources=[str(path) for path in given], out=str(out),
                                      **{'tokenizer': 'byte', 'num_proc': 1, **settings}))[1]


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def data_files(folder):
    return {name: data for name, data in contents(folder).items() if name != 'meta.json'}


def read(folder, split):
    """The texts of a split, through batches.py and the tokenizer."""
    files = TokenFiles(str(folder), split)
    tokenizer = load_tokenizer(files.meta['tokenizer'], folder)
    ends = [files.read(files.document(n)[1] - 1, 1)[0] for n in range(files.documents)]
    assert set(ends) == {tokenizer.eot}  # every document ends with the end-of-text token
    assert sum(files.document(n)[1] - files.document(n)[0] for n in range(files.documents)) == files.tokens
    return [tokenizer.decode(files.read(a, b - a - 1))
            for a, b in (files.document(n) for n in range(files.documents))]


# --- the format ---

def test_the_bytes_on_disk(tmp_path):
    """Readable by anyone who knows this test."""
    write_jsonl(tmp_path / 'x.jsonl', ['hello', '', 'é', ' \n', 'good bye'])
    meta = do(tmp_path / 'out', tmp_path / 'x.jsonl', split='tail', val_fraction=0.5)
    assert np.fromfile(tmp_path / 'out' / 'train_00000.bin', '<u2').tolist() == [*b'he', 256, *b'good', 256]
    assert np.fromfile(tmp_path / 'out' / 'train_00000.idx', '<u8').tolist() == [0, 3]
    assert (np.fromfile(tmp_path / 'out' / 'val_00000.bin', '<u2').tolist()
            == [*b'llo', 256, *'é'.encode(), 256, *b' bye', 256])
    assert np.fromfile(tmp_path / 'out' / 'val_00000.idx', '<u8').tolist() == [0, 4, 7]
    assert sorted(contents(tmp_path / 'out')) == ['meta.json', 'train_00000.bin', 'train_00000.idx',
                                                  'val_00000.bin', 'val_00000.idx']
    assert json.loads((tmp_path / 'out' / 'meta.json').read_text()) == meta
    assert ({key: meta[key] for key in ('format', 'vocab_size', 'eot', 'dtype')}
            == {'format': 1, 'vocab_size': 257, 'eot': 256, 'dtype': 'uint16'})
    digest = {name: sha256(data).hexdigest() for name, data in contents(tmp_path / 'out').items()}
    assert meta['splits']['train'] == {'tokens': 8, 'documents': 2, 'bytes': 6, 'shards': [
        {'file': 'train_00000.bin', 'tokens': 8, 'documents': 2, 'bytes': 6, 'bytes_on_disk': 16,
         'sha256': digest['train_00000.bin'], 'idx_sha256': digest['train_00000.idx']}]}
    assert meta['splits']['val']['bytes'] == 3 + 2 + 4


def test_meta_json_names_the_start_token_that_the_tokenizer_has(tmp_path):
    write_jsonl(tmp_path / 'x.jsonl', ['hello', 'good bye', 'once', 'twice'])
    letters = 'abcdefghijklmnopqrstuvwxyz'
    (tmp_path / 'vocab.txt').write_text(
        '\n'.join(['[PAD]', '[UNK]', '[SEP]', '[CLS]', *letters, *(f'##{c}' for c in letters)]) + '\n')
    for reserve in (0, 4):
        meta = do(tmp_path / f'bert{reserve}', tmp_path / 'x.jsonl', tokenizer=str(tmp_path / 'vocab.txt'),
                  val_fraction=0.5, split='tail', reserve=reserve)
        assert (meta['bos'], meta['eot']) == (3, 2) and 'bos' not in meta['tokenizer']
        source = Source(str(tmp_path / f'bert{reserve}'), 'train', 16, 'document')
        assert all(source.row(n)[0] == 3 and source.row(n)[-1] == 2 for n in range(source.rows))
    assert 'bos' not in do(tmp_path / 'bytes', tmp_path / 'x.jsonl', split='tail', val_fraction=0.5)


def test_large_vocabularies_take_32_bits_and_small_ones_16(tmp_path):
    """A token beyond 65,535 in uint16 would wrap to another one in silence."""
    pieces = ['[UNK]', '[SEP]', *(f'w{i}x' for i in range(65_534)), 'last']
    write_jsonl(tmp_path / 'x.jsonl', ['last w0x last'] * 10)
    for size, dtype in ((65_536, 'uint16'), (65_537, 'uint32')):
        (tmp_path / 'vocab.txt').write_text('\n'.join(pieces[:size - 1] + ['last']))
        meta = do(tmp_path / dtype, tmp_path / 'x.jsonl', tokenizer=str(tmp_path / 'vocab.txt'), split='tail',
                  val_fraction=0.3)
        assert (meta['dtype'], meta['vocab_size']) == (dtype, size)
        assert np.fromfile(tmp_path / dtype / 'train_00000.bin', dtype)[0] == size - 1


def test_a_token_beyond_the_vocabulary_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare.new_tokenizer('byte').__class__, 'encode', lambda self, text: [70_000])
    write_jsonl(tmp_path / 'x.jsonl', ['hello', 'world'])
    with pytest.raises(UserError, match='gave a token beyond its vocabulary of 257'):
        do(tmp_path / 'out', tmp_path / 'x.jsonl')


# --- the split ---

def test_shakespeare_is_cut_where_nanogpt_cuts_it(tmp_path):
    text = (story(1, 5000) + '\n')[:20_001]
    (tmp_path / 'input.txt').write_text(text)
    meta = do(tmp_path / 'out', tmp_path / 'input.txt', tokenizer='char', val_fraction=0.1)
    n = int(len(text) * 0.9)
    stoi = {c: i for i, c in enumerate(sorted(set(text)))}
    for split, part in (('train', text[:n]), ('val', text[n:])):
        assert (np.fromfile(tmp_path / 'out' / f'{split}_00000.bin', '<u2').tolist()
                == [stoi[c] for c in part] + [len(stoi)])
    assert meta['split'] == 'tail' and int(1115394 * (1 - 0.1)) == 1003854


def test_equal_documents_are_on_one_side_in_any_order(tmp_path):
    texts = [story(n, 8) for n in range(2000)] + [story(n, 8) for n in range(0, 2000, 3)]
    write_jsonl(tmp_path / 'a.jsonl', texts)
    write_jsonl(tmp_path / 'b.jsonl', texts[::-1])
    meta = do(tmp_path / 'a', tmp_path / 'a.jsonl', val_fraction=0.2)
    do(tmp_path / 'b', tmp_path / 'b.jsonl', val_fraction=0.2)
    train, val = (read(tmp_path / 'a', split) for split in ('train', 'val'))
    assert not set(train) & set(val) and sorted(train + val) == sorted(texts) and meta['split'] == 'document'
    assert abs(len(set(val)) / 2000 - 0.2) < 0.03
    assert read(tmp_path / 'b', 'val') == val[::-1]


def choose(s, files, by_default):
    return choose_from(tasks_to_choose_from(files, s), s, by_default)


@pytest.mark.parametrize('count', [2, 3, 10, 50, 300])
def test_few_documents_have_a_fair_share_for_validation(tmp_path, count):
    texts = [story(n, 5 + n % 40) for n in range(count)] + [story(1, 6)] * (count // 10)
    path = write_jsonl(tmp_path / 'x.jsonl', texts)
    do(tmp_path / 'out', path)
    train, val = (read(tmp_path / 'out', split) for split in ('train', 'val'))
    assert not set(train) & set(val) and sorted(train + val) == sorted(texts)
    size = sum(map(len, texts))
    if count >= 10:
        assert abs(sum(map(len, val)) / max(0.01 * size, min(0.1 * size, 20_000)) - 1) < 0.3
    else:
        assert val == [min(texts, key=len)]
    s = TextConfig(split='document', val_fraction=0.01)
    write_jsonl(tmp_path / 'y.jsonl', texts[::-1])  # in any order
    assert choose(s, find_files([path]), True) == choose(s, find_files([str(tmp_path / 'y.jsonl')]), True)


@pytest.mark.parametrize('fraction', [0.05, 0.1, 0.3, 0.45, 0.9, 0.97])
def test_both_sides_have_some_of_few_documents(tmp_path, fraction):
    """Hashes alone left one side without any, now and then."""
    for seed in range(8):
        sizes = np.random.default_rng(seed).integers(1, 60, 20)
        texts = [story(1000 * seed + n, size) for n, size in enumerate(sizes)]
        s = TextConfig(split='document', val_fraction=fraction)
        chosen = choose(s, find_files([write_jsonl(tmp_path / 'x.jsonl', texts)]), False)
        assert chosen == [number for number in chosen if number in {hash_of(text) for text in texts}]
        assert 0 < len(chosen) < 20
        share = sum(len(text) for text in texts if hash_of(text) in chosen) / sum(map(len, texts))
        assert fraction / 2 - 0.04 < share < 1.26 * fraction


def test_one_long_document_among_short_ones_is_not_what_validates(tmp_path):
    short = [story(n, 20) for n in range(20)]
    for seed in range(20):
        long = f'{seed} ' + 'word ' * 5000
        files = find_files([write_jsonl(tmp_path / 'x.jsonl', [*short, long])])
        chosen = choose(TextConfig(split='document', val_fraction=0.01), files, True)
        assert 0 < len(chosen) <= 10 and hash_of(long) not in chosen


def test_enough_documents_are_divided_by_their_hashes_alone(tmp_path):
    """Data sets of many documents are what they were before few ones had a rule."""
    texts = [story(n, 3) for n in range(1000)]
    files = find_files([write_jsonl(tmp_path / 'x.jsonl', texts)])
    fewer = find_files([write_jsonl(tmp_path / 'y.jsonl', [*texts[1:], '', ' \n'])])
    s = TextConfig(split='document', val_fraction=0.01)
    assert choose(s, files, True) is None and choose(s, fewer, True) is not None
    assert [divide(text, s)[0][0] for text in texts] == ['val' if hash_of(text) < 0.01 * 2 ** 64 else 'train'
                                                         for text in texts]
    assert choose(TextConfig(split='document', val_fraction=0.3), fewer, False) is None


def test_documents_that_are_all_equal_have_no_split(tmp_path):
    for count in (1, 7):
        words = 'with split=document: give more documents that differ, or use --split=tail'
        with pytest.raises(UserError, match=rf'nothing for val of {count} document\(s\) {words}'):
            do(tmp_path / 'out', write_jsonl(tmp_path / 'x.jsonl', ['the same'] * count))


def test_few_tokens_for_validation_are_said(command):
    write_jsonl('x.jsonl', [story(n) for n in range(9)])
    _, out, _ = command('x.jsonl', '--out=d', '--tokenizer=byte')
    assert ' tokens, too few for a reliable loss: give more text, or a larger --val_fraction\n' in out
    write_jsonl('y.jsonl', [story(n) for n in range(100)])
    assert 'rely' not in command('y.jsonl', '--out=e', '--tokenizer=byte')[1]


def test_of_large_files_about_two_megabytes_are_for_validation(tmp_path, monkeypatch):
    """By default: an evaluation of the whole split would take as long as the training."""
    path = write_jsonl(tmp_path / 'x.jsonl', [f'story {n}' for n in range(2500)])
    monkeypatch.setattr(pipeline, 'IN_MEMORY', 0)
    monkeypatch.setattr(pipeline, 'VAL_BYTES', os.path.getsize(path) / 200)
    meta = do(tmp_path / 'out', path)
    assert meta['source']['val_fraction'] == 0.005 and 2 <= meta['splits']['val']['documents'] <= 30
    parts = [do(tmp_path / 'parts', path, part=f'{n}/2')['source']['val_fraction'] for n in (1, 2)]
    assert parts == [0.005] * 2
    assert do(tmp_path / 'given', path, val_fraction=0.05)['source']['val_fraction'] == 0.05
    monkeypatch.setattr(pipeline, 'VAL_BYTES', os.path.getsize(path))
    old = do(tmp_path / 'old', path)
    assert old['source']['val_fraction'] == 0.01  # as ever
    monkeypatch.setattr(pipeline, 'VAL_BYTES', os.path.getsize(path) / 200)
    assert do(tmp_path / 'old', path) == old  # what was prepared with the former default is found to be done
    with pytest.raises(UserError, match='prepared with val_fraction=0.05'):
        do(tmp_path / 'given', path)


def test_auto_is_tail_for_few_texts_and_document_for_many(tmp_path):
    for n in range(3):
        (tmp_path / f'{n}.txt').write_text(story(n))
    assert do(tmp_path / 'out1', tmp_path)['split'] == 'tail'
    (tmp_path / 'many.txt').write_text('\n<|endoftext|>\n'.join(story(n) for n in range(400)))
    assert do(tmp_path / 'out2', tmp_path / 'many.txt', val_fraction=0.1)['split'] == 'document'
    assert do(tmp_path / 'out3', write_jsonl(tmp_path / 'x.jsonl', map(story, range(50))),
              val_fraction=0.3)['split'] == 'document'


# --- sources ---

def test_every_kind_of_file_gives_the_same_documents(tmp_path, monkeypatch):
    pyarrow, parquet = pytest.importorskip('pyarrow'), pytest.importorskip('pyarrow.parquet')
    monkeypatch.setattr(reading, 'TASK_SIZE', 700)
    texts = [story(n) for n in range(60)]
    plain = Path(write_jsonl(tmp_path / 'x.jsonl', texts)).read_bytes()
    half = plain.index(b'\n', len(plain) // 2) - 5  # two streams in a file, joined in the middle of a line
    (tmp_path / 'x.jsonl.gz').write_bytes(gzip.compress(plain[:half]) + gzip.compress(plain[half:]))
    (tmp_path / 'x.jsonl.bz2').write_bytes(bz2.compress(plain[:half]) + bz2.compress(plain[half:]))
    (tmp_path / 'x.jsonl.xz').write_bytes(lzma.compress(plain[:half]) + lzma.compress(plain[half:]))
    (tmp_path / 'x.ndjson').write_bytes(plain)
    (tmp_path / 'x.jsonl.zst').write_bytes(zstandard.compress(plain[:half])
                                           + zstandard.compress(plain[half:]))
    separated = '\n<|endoftext|>\n'.join(texts) + '\n<|endoftext|>\n'
    (tmp_path / 'x.txt').write_text(separated)
    (tmp_path / 'x.txt.gz').write_bytes(
        gzip.compress(separated.replace('\n<|', '\r\n<|').replace('|>\n', '|>\r\n').encode('utf-8-sig')))
    parquet.write_table(pyarrow.table({'id': range(60), 'text': texts}), tmp_path / 'x.parquet',
                        row_group_size=7)
    for path in sorted(tmp_path.glob('x.*')):
        s = TextConfig(split='document', val_fraction=0.1)
        reader = Reader(find_files([str(path)]), s)
        found = [text for task in reader.tasks(None) for _, text in documents(task, s)]
        stripped = [text.strip('\r\n') for text in texts]
        assert [text.strip('\r\n') for text in found] == stripped, path
        assert reader.position == reader.total == path.stat().st_size


PACKERS = {'gz': gzip.compress, 'bz2': bz2.compress, 'xz': lzma.compress, 'zst': zstandard.compress}


@pytest.mark.parametrize('ending', PACKERS)
def test_packed_files_may_have_several_streams_and_zeros_behind_them(tmp_path, monkeypatch, ending):
    pack, path = PACKERS[ending], tmp_path / f'x.txt.{ending}'
    one, two, none = pack(b'one ' * 9), pack(b'two'), pack(b'')
    for size in (16, 2 ** 20):
        monkeypatch.setattr(reading, 'TASK_SIZE', size)  # a byte at a time, and all at once
        for data in (one + two, one + bytes(512) + two, none + one + none + two + none, one + two + bytes(1),
                     one + two + bytes(1024), one + bytes(3) + two + bytes(4)):
            path.write_bytes(data)
            reader = Reader([(str(path), 'text')], TextConfig())
            assert b''.join(reader.blocks(str(path))) == b'one ' * 9 + b'two' and reader.position == len(data)
        behind = 'bytes after its end'
        for data, words in ((one + b'x', behind), (one + b'some garbage' * 9, behind),
                            (one + bytes(9) + b'{}', behind), (bytes(512), 'damaged'),
                            (one + two[:-1], f'is truncated|{behind}'), (b'', 'is truncated')):
            path.write_bytes(data)
            with pytest.raises(UserError, match=f'^{path}: .*({words})'):
                list(Reader([(str(path), 'text')], TextConfig()).blocks(str(path)))


class InBlocks(Reader):
    """Reads the bytes `data` in blocks of these sizes, over and over, whatever the path."""

    def __init__(self, data, sizes, **settings):
        super().__init__([], TextConfig(**settings))
        self.data, self.sizes = data, sizes

    def blocks(self, path):
        start = 0
        for size in itertools.cycle(self.sizes):
            if start >= len(self.data):
                return
            yield self.data[start:start + size]
            start += size


def test_a_separator_is_a_line_with_blanks_beside_it_at_most():
    end = '<|endoftext|>'
    text = (f'one\n{end}\ntwo {end}\n' + 'x' * 200 + f'{end}\n{end} {end}\n \t{end}\t \n{end}\n' + 'é' * 70
            + f'\r\n{end}\r\n'
            f'three\r{end}\rfour\n\n{end}  \r\n' + ' ' * 51 + f'{end}\n{end}')
    expected = ['one', f'two {end}\n' + 'x' * 200 + f'{end}\n{end} {end}', '', 'é' * 70, 'three', 'four\n',
                ' ' * 51 + end]
    for size in (1, 2, 13, 14, 50, 127, 128, 129, 255, 256, 257, 1000):
        assert [part[0] for part in InBlocks(text.encode(), [size]).parts('x.txt', None)] == expected, size
    assert separate(text) == expected


PIECES = ['<|endoftext|>', '<|endoftext|>\n', '\n<|endoftext|>', '\n', '\r', '\r\n', ' ', '\t', ' ' * 20,
          ' ' * 49, 'x', 'é', '\u2028', '\x0c', 'y' * 120, 'z' * 260]


@property_settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(st.lists(st.sampled_from(PIECES), max_size=25), st.lists(st.integers(1, 300), min_size=1, max_size=4),
       st.sampled_from(['', '\ufeff']))
def test_separators_are_found_wherever_a_block_ends(pieces, sizes, mark):
    """The documents of the whole text, parted where the rule says, whatever the blocks that it comes in."""
    text = ''.join(pieces)
    *whole, rest = re.split(r'(?<![^\r\n])[ \t]{0,50}<\|endoftext\|>[ \t]{0,50}(?:\r\n|\r|\n|\Z)', text)
    expected = ([document.removesuffix('\n').removesuffix('\r') for document in whole]
                + [rest] * bool(rest or not whole))
    assert [part[0] for part in InBlocks((mark + text).encode(), sizes).parts('x.txt', None)] == expected
    assert separate(mark + text) == expected
    # the rule of earlier versions, where both agree
    once = re.split(r'^<\|endoftext\|>\r?(?:\n|\Z)', text, flags=re.MULTILINE)
    if len(once) == len(whole) + 1:
        assert once == [*whole, rest]


def test_documents_of_files_that_were_put_together_have_no_byte_order_mark():
    end = '<|endoftext|>'
    text = f'\ufeffone\n{end}\n\ufefftwo\n\ufeff{end}\n\ufeff {end}\nth\ufeffree\n x\ufeff{end}\n\ufeff'
    expected = ['one', 'two', '', f'th\ufeffree\n x\ufeff{end}\n\ufeff']
    for size in (1, 2, 3, 5, 13, 14, 50, 1000):
        assert [part[0] for part in InBlocks(text.encode(), [size]).parts('x.txt', None)] == expected, size
    assert separate(text) == expected


def test_texts_parted_by_any_separator_are_as_many_documents(tmp_path):
    for line in ('<|endoftext|>', ' <|endoftext|>', '<|endoftext|>\t', '\t <|endoftext|> '):
        for end in ('\n', '\r\n', '\r'):
            text = (end + line + end).join(story(n) for n in range(220))
            assert len(list(InBlocks(text.encode(), [4000]).parts('x.txt', None))) == 220, (line, end)
    (tmp_path / 'x.txt').write_text(text)
    meta = do(tmp_path / 'out', tmp_path / 'x.txt', val_fraction=0.3)
    assert meta['split'] == 'document' and sum(split['documents'] for split in meta['splits'].values()) == 220


def test_the_text_of_an_end_is_counted(command):
    Path('vocab.txt').write_text('\n'.join(['[UNK]', '[SEP]', 'cat', '<', '|', '>', '[', ']']))
    write_jsonl('x.jsonl', ['cat <|endoftext|> cat <|endoftext|> cat', 'cat [SEP]', 'cat'] * 10)
    for tokenizer, times in (('byte', '<|endoftext|> occurs 20 times'),
                             ('vocab.txt', '[SEP] occurs 10 times')):
        code, out, _ = command('x.jsonl', f'--out={tokenizer[0]}', f'--tokenizer={tokenizer}', '--split=tail',
                               '--val_fraction=0.01')
        assert (code == 0 and f'    {times} inside documents: '
                'it is plain text there and ends no document\n' in out), out
        assert ('[SEP] occurs' in out) == (tokenizer != 'byte') and '<|endoftext|> occurs 20 times' in out
        assert json.loads(Path(tokenizer[0], 'meta.json').read_text())['splits']['train']['documents'] == 30
    write_jsonl('y.jsonl', ['cat'] * 5)
    assert ('occurs'
            not in command('y.jsonl', '--out=y', '--tokenizer=byte', '--split=tail', '--val_fraction=0.5')[1])


def make_files(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b'')


def test_folders_and_globs_are_taken_in_order_and_by_kind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_files(tmp_path, 'd/b/2.txt', 'd/b/1.jsonl', 'd/a.txt.gz', 'd/a/x.TXT', 'd/a/y.NDJSON.Xz',
               'd/b-c/3.txt')
    every = [('d/a.txt.gz', 'text'), ('d/a/x.TXT', 'text'), ('d/a/y.NDJSON.Xz', 'lines'),
             ('d/b-c/3.txt', 'text'), ('d/b/1.jsonl', 'lines'), ('d/b/2.txt', 'text')]
    left_out = {}
    for source in ('d', 'd/**', 'd/*', '**', 'd/**/*', '[d]'):
        assert find_files([source], left_out) == every and not left_out, source
    assert find_files(['d/*/*.txt']) == find_files(['**/*/*.txt']) == [every[3], every[5]]
    assert find_files(['**/b/*']) == find_files(['d/b*/[12].*']) == every[4:]
    assert find_files([str(tmp_path / '**' / '?.TXT')]) == [(str(tmp_path / 'd/a/x.TXT'), 'text')]
    with pytest.raises(UserError, match='no such file or folder'):
        find_files(['d/**/*.parquet'])


def test_a_folder_with_the_signs_of_a_glob_in_its_name_is_itself(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_files(tmp_path, 'd [1]/a.txt', 'd [1]/b/*.txt', 'd 1/a.txt')
    assert find_files(['d [1]']) == [('d [1]/a.txt', 'text'), ('d [1]/b/*.txt', 'text')]
    assert find_files(['d [1]/*.txt']) == [('d [1]/a.txt', 'text')]
    assert find_files(['d [1]/b/*.txt']) == [('d [1]/b/*.txt', 'text')]
    assert find_files(['d [12]/*.txt']) == [('d 1/a.txt', 'text')]


def test_what_is_not_read_is_said(tmp_path, command):
    make_files(tmp_path / 'd', 'readme.md', 'c.parquet.gz', 'x.pdf', 'sub/y.PDF', '.ipynb_checkpoints/a.txt',
               '.hidden.txt', 'Makefile')
    os.mkfifo(tmp_path / 'd' / 'pipe.txt')
    said = ("not read: 2 .pdf (d/sub/y.PDF), 2 hidden (d/.hidden.txt), 1 .md (d/readme.md), "
            "1 .parquet.gz (d/c.parquet.gz), 1 not a file (d/pipe.txt), 1 without ending (d/Makefile); "
            "to read .md, give a glob that ends so: '**/*.md'")
    code, _, err = command('d', '--out=o')
    assert code == 2 and err == f'prepare.py: d: no .txt, .jsonl or .parquet in it; {said}\n'
    Path('d/z.txt').write_text('some text')
    code, out, _ = command('d', '--out=o', '--tokenizer=byte', '--val_fraction=0.5')
    assert code == 0 and f'    {said}\n' in out
    assert find_files(['d/readme.md']) == find_files(['d/**/*.md']) == [('d/readme.md', 'text')]


def test_linked_folders_are_followed_and_every_file_is_read_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_files(tmp_path, 'd/sub/a.txt', 'd/b.txt', 'else/where/c.txt', 'else/d.txt')
    for name, target in (('0_sub', 'sub'), ('self', '.'), ('up', '../d'), ('0.txt', 'b.txt'),
                         ('linked', '../else'), ('sub/again', '../../else/where'),
                         ('sub/around', '../sub'), ('z.txt', '../else/d.txt'), ('.gone', 'gone')):
        os.symlink(target, tmp_path / 'd' / name)
    every = ['d/b.txt', 'd/linked/d.txt', 'd/linked/where/c.txt', 'd/sub/a.txt']
    for source in ('d', 'd/**/*.txt', 'd/**'):
        found = [path for path, _ in find_files([source])]
        assert [os.path.realpath(path)
                for path in found] == [os.path.realpath(path) for path in every], source
        assert found[0] == 'd/b.txt' and found[3] == 'd/sub/a.txt'
    left_out = {}
    assert ([path for path, _ in find_files(['d/*.txt'], left_out)] == ['d/b.txt', 'd/z.txt']
            and left_out == {'linked twice': [1, 'd/0.txt']})


def test_what_cannot_be_read_in_a_folder_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_files(tmp_path, 'd/a.txt', 'd/sub/b.txt')
    for link, target in (('d/gone', 'nowhere'), ('d/gone.txt', '../nowhere.txt'),
                         ('d/sub/round.txt', 'round.txt')):
        os.symlink(target, link)
        for source in ('d', 'd/**', link, link[:-1] + '?'):
            with pytest.raises(UserError, match=f'^{link}: a broken link'):
                find_files([source])
        os.unlink(link)
    listdir, access = os.listdir, os.access

    def closed(path):
        if str(path).endswith('sub'):
            raise PermissionError(13, 'Permission denied', path)
        return listdir(path)
    monkeypatch.setattr(os, 'listdir', closed)  # chmod does not stop root
    for source in ('d', 'd/*/*.txt', 'd/**/*.txt'):
        with pytest.raises(UserError, match='^d/sub: Permission denied'):
            find_files([source])
    monkeypatch.setattr(os, 'listdir', listdir)
    monkeypatch.setattr(os, 'access',
                        lambda path, mode: access(path, mode) and not str(path).endswith('b.txt'))
    for source in ('d', 'd/**/*.txt', 'd/sub/b.txt'):
        with pytest.raises(UserError, match='^d/sub/b.txt: Permission denied'):
            find_files([source])


def test_a_file_name_that_is_no_text_is_no_fault(tmp_path, command):
    path = os.fsdecode(b'd/caf\xe9\n.txt')
    os.mkdir('d')
    Path(path).write_text('some text ' * 30)
    Path(path + '.pdf').write_text('')
    code, out, err = command('d', '--out=o', '--tokenizer=byte', '--val_fraction=0.5')
    assert (code == 0 and r"caf\udce9\n.txt:1" in out
            and r"1 .pdf ('d/caf\udce9\n.txt.pdf')" in out), (out, err)


def test_several_fields_are_joined_and_empty_ones_left_out(tmp_path):
    (tmp_path / 'x.jsonl').write_text('{"a": "one", "b": "two"}\n\n{"a": null, "b": "three"}\n'
                                      '{"a": "", "b": null}\n')
    do(tmp_path / 'out', tmp_path / 'x.jsonl', text_key='a,b', split='tail', val_fraction=0.5)
    assert ([a + b for a, b in zip(*(read(tmp_path / 'out', split) for split in ('train', 'val')))]
            == ['one\ntwo', 'three'])


@pytest.mark.parametrize('size', [10, 1000])
def test_lines_of_jsonl_end_at_a_newline_alone(tmp_path, monkeypatch, size):
    """
    Signs that Python's splitlines() takes for an end are text; a byte order mark is none, wherever files were
    joined.
    """
    monkeypatch.setattr(reading, 'TASK_SIZE', size)
    texts = [f'a{sign}b' for sign in '\u2028\u2029\x85']
    lines = [json.dumps({'text': text}, ensure_ascii=False) for text in texts]
    (tmp_path / 'x.jsonl').write_bytes(f'\ufeff{lines[0]}\r\n\x0c\r\n\ufeff{lines[1]}\n\n'
                                       f'\ufeff{lines[2]}'.encode())
    s = TextConfig()
    found = [pair for task in Reader(find_files([str(tmp_path / 'x.jsonl')]), s).tasks(None)
             for pair in documents(task, s)]
    assert ([text for _, text in found] == texts
            and [where.rpartition(':')[2] for where, _ in found] == ['1', '3', '5'])


def test_the_standard_library_is_a_corpus(tmp_path):
    found = find_files(['stdlib'])
    names = [os.path.basename(path) for path, _ in found]
    assert (found == find_files(['stdlib']) and {'os.py', 'argparse.py', 'typing.py'} <= set(names)
            and len(found) > 300)
    assert not any('/test' in path or 'site-packages' in path for path, _ in found)
    topics = [pair for pair in found if pair[1] == 'topics']
    (_, chapters), = [(task, documents(task, None)) for task in Reader(topics, TextConfig()).tasks(None)]
    assert len(chapters) > 50 and all(':' in where and text for where, text in chapters)


# --- long documents come in parts ---

@pytest.mark.parametrize('split', ['tail', 'document'])
@pytest.mark.parametrize('kind', ['byte', 'bpe'])
def test_a_long_document_has_the_tokens_of_the_whole(tmp_path, monkeypatch, kind, split):
    texts = [story(1, 3000), story(2, 5), story(3, 2000), story(4, 900)]
    for n, text in enumerate(texts[:2]):
        (tmp_path / f'{n}.txt').write_text(text)
    (tmp_path / '2.txt').write_text('\n<|endoftext|>\n'.join(texts[2:]))
    if kind == 'bpe':
        new_tokenizer('bpe:400', texts).save(tmp_path)
        kind = str(tmp_path / 'tokenizer.model')
    s = TextConfig(split=split, val_fraction=0.45)
    do(tmp_path / 'whole', tmp_path / '*.txt', tokenizer=kind, split=split, val_fraction=0.45)
    monkeypatch.setattr(reading, 'TASK_SIZE', 512)
    tasks = list(Reader(find_files([str(tmp_path / '*.txt')]), s).tasks(cut_of(new_tokenizer(kind))))
    assert sum(bool(task.side) for task in tasks) > 20
    monkeypatch.setattr(prepare, 'HASHED', 256)  # at most what the first part holds
    meta = do(tmp_path / 'parts', tmp_path / '*.txt', tokenizer=kind, split=split.replace('tail', 'auto'),
              val_fraction=0.45)
    if split == 'tail':
        assert data_files(tmp_path / 'whole') == data_files(tmp_path / 'parts')
        assert meta['splits']['train']['documents'] == meta['splits']['val']['documents'] == 4
    else:
        for side in ('train', 'val'):
            assert read(tmp_path / 'parts', side) == [text for text in texts if divide(text, s)[0][0] == side]


@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
def test_memory_does_not_grow_with_the_text(tmp_path):
    """Five times the text, in a file of one document and in one of many: the same peak."""
    peaks = []
    for size in (4, 20):
        (tmp_path / f'{size}.txt').write_text((story(size, 2000) + '\n') * (size * 10))
        write_jsonl(tmp_path / f'{size}.jsonl', [story(size, 300)] * (size * 100))
        args = [tmp_path / f'{size}.txt', tmp_path / f'{size}.jsonl', f'--out={tmp_path / str(size)}',
                '--tokenizer=byte', '--num_proc=1', '--split=tail']
        code = ('import prepare; from features.text import pipeline, reader; reader.TASK_SIZE = '
                'pipeline.IN_MEMORY = 2 ** 17; prepare.main(); print(open("/proc/self/status").read())')
        done = run('-c', code, *args)
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout.partition('VmHWM:')[2].split()[0]) / 1024)
    assert peaks[1] < peaks[0] + 15, peaks


# --- in memory or in a pipeline ---

FILES = {
    'few documents': ['few.jsonl'],
    'many documents': ['many.jsonl', 'few.jsonl'],
    'one text': ['one.txt'],
    'texts': ['many.txt', 'one.txt', 'marked.txt'],
    'texts and lines': ['one.txt', 'few.jsonl', 'marked.txt'],
}


@pytest.mark.parametrize('tokenizer', ['byte', 'char', 'bpe:400'])
@pytest.mark.parametrize('names', FILES)
def test_what_is_read_into_memory_has_the_bytes_of_the_pipeline(tmp_path, monkeypatch, capsys, names,
                                                                tokenizer):
    write_jsonl(tmp_path / 'few.jsonl',
                [*map(story, range(30)), '', ' \t', f'{story(7)} <|endoftext|> \u2585'])
    write_jsonl(tmp_path / 'many.jsonl', [story(n, 12) for n in range(1200)])
    (tmp_path / 'one.txt').write_text(story(1, 3000))
    (tmp_path / 'many.txt').write_text('\n<|endoftext|>\n'.join(story(n) for n in range(300)))
    (tmp_path / 'marked.txt').write_text('\ufeffone\r\n \t<|endoftext|> \r\n\ufefftwo\n<|endoftext|>\n')
    given = [tmp_path / name for name in FILES[names]]
    found = []
    for limit, is_used in ((2 ** 24, False), (0, True)):
        monkeypatch.setattr(pipeline, 'IN_MEMORY', limit)
        out = tmp_path / f'{limit}'
        settings = TextConfig(sources=[str(path) for path in given], out=str(out), tokenizer=tokenizer)
        assert pipeline.is_needed(settings, settings.out) == is_used
        _, meta, figures = prepare.prepare(settings)
        prepare.summary(str(out), meta, {**figures, 'seconds': 1, 'speed': 1})
        found.append((contents(out), capsys.readouterr().out.replace(str(out), 'OUT')))
    assert found[0] == found[1]


# --- whatever the processes and the interruptions ---

# small tasks, and a record of progress after each: what a large corpus meets in hours happens in a second
SMALL = ('import prepare; from features.text import pipeline, reader, tokenfiles; reader.TASK_SIZE = 4000; '
         'tokenfiles.SHARD_TOKENS = 30_000; pipeline.SAVE_EVERY = 0; '
         'prepare.run_main(prepare.main)')


@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
    """Sources of several kinds, and what an undisturbed run makes of them."""
    folder = tmp_path_factory.mktemp('corpus')
    write_jsonl(folder / 'a.jsonl', [story(n) for n in range(300)])
    (folder / 'b.txt').write_text(story(99, 3000))
    (folder / 'c.txt.gz').write_bytes(
        gzip.compress('\n<|endoftext|>\n'.join(story(n + 5000) for n in range(200)).encode()))
    args = ([str(folder / name) for name in ('a.jsonl', 'b.txt', 'c.txt.gz')]
            + ['--tokenizer=bpe:400', '--val_fraction=0.1'])
    done = run('-c', SMALL, *args, f'--out={folder / "out"}', '--num_proc=1')
    assert done.returncode == 0, done.stderr
    return args, contents(folder / 'out')


def test_two_processes_write_the_same_bytes_as_one(corpus, tmp_path):
    args, expected = corpus
    done = run('-c', SMALL, *args, f'--out={tmp_path / "out"}', '--num_proc=2')
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / 'out') == expected and len(expected) > 10


@pytest.mark.parametrize('num_proc', [1, 2])
def test_a_killed_run_goes_on_to_the_same_bytes(corpus, tmp_path, num_proc):
    args, expected = corpus
    command = [sys.executable, '-c', SMALL, *args, f'--out={tmp_path / "out"}', f'--num_proc={num_proc}']
    kills = 0
    for wanted in (5, 30):
        with subprocess.Popen(command, env=os.environ | {'PYTHONPATH': str(ROOT)},
                              stdout=subprocess.DEVNULL) as process:
            while process.poll() is None and tasks_done(tmp_path) < wanted:
                time.sleep(0.002)
            children = Path(f'/proc/{process.pid}/task/{process.pid}/children')
            children = children.read_text().split() if children.exists() else []
            process.kill()
        kills += process.returncode == -signal.SIGKILL
        assert not (tmp_path / 'out').exists()
        deadline = time.time() + 10
        while any(alive(pid) for pid in children):  # the workers leave with their parent
            assert time.time() < deadline, 'orphaned workers'
            time.sleep(0.01)
    assert kills == 2
    done = run('-c', SMALL, *args, f'--out={tmp_path / "out"}', '--num_proc=1')
    assert done.returncode == 0 and 'goes on after' in done.stdout, done.stdout + done.stderr
    assert contents(tmp_path / 'out') == expected and os.listdir(tmp_path) == ['out']


# the same with a rest after each record of the progress, so that a signal meets it at work however busy the
# machine is
UNHURRIED = SMALL.replace('prepare.run_main',
                          "import time; write = pipeline.replace_json; pipeline.replace_json = lambda *a: "
                          "(write(*a), time.sleep(0.05)); prepare.run_main")


def tasks_done(folder):
    try:
        return json.loads((folder / 'out.part' / 'progress.json').read_text())['tasks']
    except (OSError, ValueError):
        return 0


def alive(pid):
    try:
        return Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0] != 'Z'
    except OSError:
        return False


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGHUP, signal.SIGTERM], ids=lambda n: n.name)
def test_a_signal_ends_in_one_line_and_goes_on_later(corpus, tmp_path, number):
    args, expected = corpus
    command = [sys.executable, '-c', UNHURRIED, *args, f'--out={tmp_path / "out"}', '--num_proc=2']
    environment = os.environ | {'PYTHONPATH': str(ROOT)}
    # a shell's background jobs, perhaps these tests, ignore it
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, start_new_session=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    while process.poll() is None and tasks_done(tmp_path) < 5:
        time.sleep(0.002)
    os.killpg(process.pid, number)  # as a terminal does: to the workers too
    began = time.time()
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 128 + number and time.time() - began < 5
    assert errors == f'-c: stopped by {number.name}; run the same command again\n'
    assert run('-c', SMALL, *args, f'--out={tmp_path / "out"}', '--num_proc=1').returncode == 0
    assert contents(tmp_path / 'out') == expected


@pytest.mark.skipif(sys.platform != 'linux', reason='finds the workers in /proc')
def test_a_killed_worker_is_one_line_and_loses_nothing(corpus, tmp_path):
    args, expected = corpus
    command = [sys.executable, '-c', UNHURRIED, *args, f'--out={tmp_path / "out"}', '--num_proc=2']
    with subprocess.Popen(command, env=os.environ | {'PYTHONPATH': str(ROOT)}, stderr=subprocess.PIPE,
                          text=True) as process:
        while process.poll() is None and tasks_done(tmp_path) < 5:
            time.sleep(0.002)
        workers = Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text().split()
        os.kill(int(workers[-1]), signal.SIGKILL)  # as the kernel does when memory runs out
        errors = process.stderr.read()
    assert process.returncode == 2 and len(errors.splitlines()) == 1, errors
    assert 'a worker was killed, perhaps because memory ran out: lower --num_proc' in errors
    assert run('-c', SMALL, *args, f'--out={tmp_path / "out"}', '--num_proc=1').returncode == 0
    assert contents(tmp_path / 'out') == expected


def test_a_full_disk_is_one_line_and_loses_nothing(corpus, tmp_path):
    args, expected = corpus
    limit = ('import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); '
             'resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000)); ')
    done = run('-c', limit + SMALL, *args, f'--out={tmp_path / "out"}', '--num_proc=1')
    assert (done.returncode == 2 and len(done.stderr.splitlines()) == 1 and 'File too large' in done.stderr
            and 'make room' in done.stderr)
    assert not (tmp_path / 'out').exists()
    assert run('-c', SMALL, *args, f'--out={tmp_path / "out"}', '--num_proc=1').returncode == 0
    assert contents(tmp_path / 'out') == expected


def test_other_settings_start_over(tmp_path, capsys):
    path = write_jsonl(tmp_path / 'x.jsonl', map(story, range(50)))
    do(tmp_path / 'ref', path, val_fraction=0.3)
    (tmp_path / 'out.part').mkdir()
    (tmp_path / 'out.part' / 'progress.json').write_text(
        json.dumps({'source': {'sources': ['other']}, 'tasks': 3}))
    (tmp_path / 'out.part' / 'train_00000.bin').write_bytes(b'half')
    do(tmp_path / 'out', path, val_fraction=0.3)
    assert contents(tmp_path / 'out') == contents(tmp_path / 'ref')
    assert 'left by a run with other settings' in capsys.readouterr().out


def test_a_second_run_finds_it_done_and_refuses_anything_else(tmp_path):
    path = write_jsonl(tmp_path / 'x.jsonl', map(story, range(50)))
    do(tmp_path / 'out', path, val_fraction=0.3)
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / 'out').iterdir()}
    _, meta, figures = prepare.prepare(TextConfig(sources=[path], out=str(tmp_path / 'out'), tokenizer='byte',
                                                  val_fraction=0.3))
    assert figures is None and meta['splits']['train']['documents'] > 0
    for settings, message in (({'tokenizer': 'char'}, 'with tokenizer=byte'),
                              ({'val_fraction': 0.2}, 'with val_fraction=0.3')):
        with pytest.raises(UserError,
                           match=f'exists, and was prepared {message}: delete it, or choose another --out'):
            do(tmp_path / 'out', path, **{'val_fraction': 0.3, **settings})
    write_jsonl(path, map(story, range(51)))
    with pytest.raises(UserError, match='prepared from other input files'):
        do(tmp_path / 'out', path, val_fraction=0.3)
    make_files(tmp_path, 'mine/notes.txt')
    os.symlink('nowhere', tmp_path / 'gone')
    for name in ('mine', 'mine/notes.txt', 'gone'):
        with pytest.raises(UserError, match='exists, and was not made by prepare.py'):
            do(tmp_path / name, path)
    assert (before == {p.name: p.stat().st_mtime_ns for p in (tmp_path / 'out').iterdir()}
            and os.listdir(tmp_path / 'mine') == ['notes.txt'])
    assert sorted(os.listdir(tmp_path)) == ['gone', 'mine', 'out', 'x.jsonl']


@pytest.mark.parametrize('kind', ['empty', 'volume', 'link', 'here'])
def test_an_empty_folder_is_filled(tmp_path, monkeypatch, kind):
    """It may be a mounted volume: no folder is renamed onto it, and nothing is written beside it."""
    path = write_jsonl(tmp_path / 'x.jsonl', map(story, range(50)))
    do(tmp_path / 'ref', path, val_fraction=0.3)
    (tmp_path / 'place' / 'out').mkdir(parents=True)
    out = tmp_path / 'place' / 'out'
    if kind == 'volume':
        (out / 'lost+found').mkdir()
    if kind == 'link':
        os.symlink(out, tmp_path / 'link')
    if kind == 'here':
        monkeypatch.chdir(out)
    given = {'link': tmp_path / 'link', 'here': '.'}.get(kind, out)
    with pytest.raises(UserError, match='no field story'):
        do(given, path, val_fraction=0.3, text_key='story')
    assert set(os.listdir(out)) <= {'lost+found'}
    before = sorted(os.listdir(tmp_path))
    meta = do(given, path, val_fraction=0.3)
    if kind == 'volume':
        os.rmdir(out / 'lost+found')
    assert (contents(out) == contents(tmp_path / 'ref') and sorted(os.listdir(tmp_path)) == before
            and os.listdir(tmp_path / 'place') == ['out'])
    assert do(given, path, val_fraction=0.3) == meta


@pytest.mark.parametrize('there', [True, False])
def test_a_run_that_was_stopped_while_it_put_its_files_in_place_goes_on(tmp_path, monkeypatch, there):
    path = write_jsonl(tmp_path / 'x.jsonl', map(story, range(50)))
    do(tmp_path / 'ref', path, val_fraction=0.3)
    out, rename = tmp_path / 'out', os.rename
    if there:
        out.mkdir()
    for _ in range(4):
        left = [int(there)]  # one file is moved each time, meta.json in the end

        def stopped(*args):
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            rename(*args)
        monkeypatch.setattr(os, 'rename', stopped)
        with pytest.raises(KeyboardInterrupt):
            do(out, path, val_fraction=0.3)
        assert not (out / 'meta.json').exists()
    monkeypatch.setattr(os, 'rename', rename)
    do(out, path, val_fraction=0.3)
    assert contents(out) == contents(tmp_path / 'ref') and not (tmp_path / 'out.part').exists()


def test_two_runs_do_not_write_one_folder(tmp_path):
    import fcntl
    path = write_jsonl(tmp_path / 'x.jsonl', map(story, range(50)))
    (tmp_path / 'out.part').mkdir()
    fd = os.open(tmp_path / 'out.part', os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    with pytest.raises(UserError, match='another process is preparing it'):
        do(tmp_path / 'out', path)
    assert (tmp_path / 'out.part').is_dir()  # it is the other's
    os.close(fd)
    do(tmp_path / 'out', path, val_fraction=0.3)


# --- the tokenizer goes with the data ---

def test_bpe_is_kept_beside_the_data_and_serves_other_data(tmp_path):
    path = write_jsonl(tmp_path / 'x.jsonl', map(story, range(300)))
    first = do(tmp_path / 'a', path, tokenizer='bpe:400')
    again = do(tmp_path / 'b', path, tokenizer='bpe:400')
    more = write_jsonl(tmp_path / 'y.jsonl', map(story, range(300, 400)))
    other = do(tmp_path / 'c', more, tokenizer=str(tmp_path / 'a' / 'tokenizer.model'), val_fraction=0.2)
    # so that a mixture of them is one vocabulary
    assert first['tokenizer'] == again['tokenizer'] == other['tokenizer']
    assert contents(tmp_path / 'a')['tokenizer.model'] == contents(tmp_path / 'c')['tokenizer.model']
    assert (sorted(read(tmp_path / 'a', 'train') + read(tmp_path / 'a', 'val'))
            == sorted(map(story, range(300))))


def test_what_bpe_is_trained_without_is_said(command):
    write_jsonl('x.jsonl', [f'{story(n)} \u2585' for n in range(300)])
    code, out, _ = command('x.jsonl', '--out=d', '--tokenizer=bpe:400')
    assert (code == 0 and 'tokenizer=bpe:400: it is trained without U+2585 (300 in the text), '
            'and encodes it as bytes\n' in out)
    assert all(text.endswith(' \u2585') for text in read('d', 'train'))


def test_a_large_text_is_sampled_evenly(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, 'TASK_SIZE', 1000)
    monkeypatch.setattr(pipeline, 'SAMPLE_SIZE', 10_000)
    path = write_jsonl(tmp_path / 'x.jsonl', [f'{n} ' * 50 for n in range(1000)])
    numbers = [int(text.split()[0])
               for text in pipeline.sample(Reader([(path, 'lines')], TextConfig()), TextConfig())]
    assert sum(len(f'{n} ' * 50) for n in numbers) <= 10_000 and len(numbers) > 20
    assert np.histogram(numbers, 4, (0, 1000))[0].min() > 0


# --- the command ---

@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Run the command line in an empty folder; returns (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def command(*args):
        monkeypatch.setattr(sys, 'argv', ['prepare.py', *map(str, args)])
        try:
            run_main(prepare.main)
            code = 0
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()
    return command


def test_the_summary_says_what_a_person_wants(command, tmp_path):
    write_jsonl('x.jsonl', [story(n, 100 if n == 7 else 20) for n in range(300)] + [''])
    code, out, err = command('x.jsonl', '--out=data/mine', '--tokenizer=bpe:400')
    assert code == 0 and not err, err
    for part in ('data/mine: ready', 'train', 'documents', 'bytes a token',
                 'of the vocabulary never used', '1 empty documents', 'MB/s',
                 'tokens  x.jsonl:8', 'train begins: ', 'next: python train.py --dataset=mine'):
        assert part in out, out
    code, out, err = command('x.jsonl', '--out=data/mine', '--tokenizer=bpe:400')
    assert code == 0 and 'data/mine: already prepared' in out and not err


def test_what_a_tokenizer_cannot_write_is_told(command):
    Path('vocab.txt').write_text('\n'.join(['[UNK]', '[SEP]', 'cat', 'dog']))
    write_jsonl('x.jsonl', ['cat dog fox dog cat dog fox dog'] * 9)
    _, out, _ = command('x.jsonl', '--out=d', '--tokenizer=vocab.txt', '--split=tail', '--val_fraction=0.5')
    assert '20.0% of the tokens are unknown text that the tokenizer cannot encode' in out


BAD = {  # command line → what the one line says
       'missing.jsonl --out=d': 'missing.jsonl: no such file or folder',
       'shakespear': 'did you mean shakespeare?',
       'x.jsonl': 'out: name the folder to make',
       'empty/ --out=d': 'empty/: no .txt, .jsonl or .parquet in it',
       'notes.pdf --out=d': 'notes.pdf: takes .txt, .jsonl or .parquet',
       'blank.jsonl --out=d --tokenizer=byte': 'blank.jsonl: no text in it, 2 empty documents',
       'blank.jsonl --out=d': 'blank.jsonl: no text in it',
       'latin.txt --out=d': r'latin.txt: byte 15 is not UTF-8: convert the file, or use --errors=replace',
       'latin.jsonl --out=d': r'latin.jsonl: byte 33 is not UTF-8',
       'cut.txt --out=d': 'cut.txt: byte 4 is not UTF-8',
       'broken.jsonl --out=d': 'broken.jsonl:3: broken JSON',
       'list.jsonl --out=d': 'list.jsonl:1: takes an object with a field for the text, got a list',
       'x.jsonl --out=d --text_key=story': 'x.jsonl:1: no field story; it has text: set --text_key',
       'number.jsonl --out=d': 'number.jsonl:1: field text holds a int, not text',
       'half.jsonl --out=d': 'half.jsonl:1: text has half a surrogate pair',
       'x.parquet --out=d --text_key=story': 'x.parquet: no column story; it has text: set --text_key',
       'broken.parquet --out=d': 'broken.parquet: not a valid .parquet',
       'cut.txt.gz --out=d': 'cut.txt.gz: is truncated',
       'cut.txt.zst --out=d': 'cut.txt.zst: is truncated',
       'cut.txt.bz2 --out=d': 'cut.txt.bz2: is truncated',
       'cut.txt.xz --out=d': 'cut.txt.xz: is truncated',
       'broken.txt.gz --out=d': 'broken.txt.gz: damaged',
       'broken.txt.bz2 --out=d': 'broken.txt.bz2: damaged',
       'broken.txt.xz --out=d': 'broken.txt.xz: damaged',
       'broken.txt.zst --out=d': 'broken.txt.zst: damaged',
       'x.jsonl --out=d --tokenizer=morse': 'tokenizer=morse: no such tokenizer; there are byte, char, gpt2',
       'x.jsonl --out=d --tokenizer=none.model': 'tokenizer=none.model: no such file',
       'x.jsonl --out=d --tokenizer=bpe:10': 'tokenizer=bpe:10: too small',
       'x.jsonl --out=d --tokenizer=bpe:99999': 'tokenizer=bpe:99999: too large for so little text',
       'x.jsonl --out=d --tokenizer=byte --val_fraction=0.0001': 'nothing for val of 20 document(s) '
       'with split=document: use another --val_fraction, or',
       'x.jsonl --out=d --tokenizer=byte --val_fraction=0.9999': 'leaves nothing for train',
       'x.jsonl --out=d --val_fraction=1': 'val_fraction=1.0: takes a number between 0 and 1',
       'x.jsonl --out=d --num_proc=-1': 'num_proc=-1',
       'x.jsonl --out=d --tokeniser=byte': '--tokeniser: no such setting; did you mean tokenizer?',
       'x.jsonl --out=d --split=half': "--split: got 'half', takes auto | document | tail",
       'x.jsonl --out=notes.pdf/d --tokenizer=byte': 'notes.pdf',
}


@pytest.mark.parametrize('args', BAD)
def test_bad_input_is_one_line_and_nothing_is_written(command, tmp_path, args):
    pyarrow, parquet = pytest.importorskip('pyarrow'), pytest.importorskip('pyarrow.parquet')
    write_jsonl('x.jsonl', map(story, range(20)))
    os.mkdir('empty')
    Path('notes.pdf').write_text('# Notes')
    write_jsonl('blank.jsonl', ['', ' \n'])
    Path('latin.txt').write_bytes(b'plain, then caf\xe9 ole')
    Path('latin.jsonl').write_bytes(b'{"text": "fine"}\n{"text": "caf\xc3\xa9 \xe9"}\n')
    Path('cut.txt').write_bytes(b'good' + '中'.encode()[:2])
    Path('broken.jsonl').write_text('{"text": "a"}\n\n{"text": "b"\n')
    Path('list.jsonl').write_text('["a"]\n')
    Path('number.jsonl').write_text('{"text": 5}\n')
    Path('half.jsonl').write_text('{"text": "\\ud83d"}\n')
    parquet.write_table(pyarrow.table({'text': ['a']}), 'x.parquet')
    Path('broken.parquet').write_bytes(b'PAR1 no parquet PAR1')
    text = story(1, 5000).encode()
    for ending, pack in (('gz', gzip.compress), ('bz2', bz2.compress), ('xz', lzma.compress),
                         ('zst', zstandard.compress)):
        packed = pack(text)
        Path(f'cut.txt.{ending}').write_bytes(packed[:len(packed) // 2])
        Path(f'broken.txt.{ending}').write_bytes(packed[:20] + b'\xff\x13\xff' * 30 + packed[110:])
    before = sorted(os.listdir())
    code, out, err = command(*args.split())
    assert code == 2 and len(err.splitlines()) == 1 and not out, (code, out, err)
    assert err.startswith('prepare.py: ') and BAD[args] in err, err
    assert sorted(os.listdir()) == before


def test_an_empty_source_is_not_the_working_directory(command):
    Path('x.txt').write_text(story(1))
    code, _, err = command('', '--out=d', '--tokenizer=byte')
    assert code == 2 and 'sources: one is empty' in err and os.listdir() == ['x.txt']


def test_errors_replace_goes_on(command):
    Path('latin.txt').write_bytes(b'plain, then caf\xe9 ole ' * 20)
    Path('half.jsonl').write_text('{"text": "x\\ud83dy and more"}\n{"text": "caf\\u00e9 ' + '"}\n')
    code, _, err = command('latin.txt', 'half.jsonl', '--out=d', '--tokenizer=byte', '--errors=replace',
                           '--split=tail', '--val_fraction=0.5')
    assert code == 0, err
    train = read('d', 'train')
    assert train[0].startswith('plain, then caf\ufffd ole ') and train[1].startswith('x\ufffdy')


def test_settings_of_this_feature_load_no_torch():
    """Loading it takes a second and 300 MB; the settings of other features do."""
    code = ("import sys, prepare; from configurator import configure; from features import with_features; "
            "s = configure(with_features(prepare.Settings, 'text'), ['--source=a', '--target=b']); "
            "assert s.target == 'b' and 'torch' not in sys.modules")
    subprocess.run([sys.executable, '-c', code], cwd=ROOT, check=True)
