"""
The files of a data set in the middle of a run: many shards, files that change, and a disk that fails.
"""
import errno
import json
import os
import resource
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, sha256, write_dataset

import batches
from batches import DataError, Mixture, TokenFiles
from configurator import UserError


def write_shards(folder, count):
    """A data set of one document of 8 tokens in each of many shards."""
    folder.mkdir()
    shards = []
    for n in range(count):
        np.append(np.arange(7), 63).astype('<u2').tofile(folder / f'train_{n:05d}.bin')
        np.zeros(1, '<u8').tofile(folder / f'train_{n:05d}.idx')
        shards.append({'file': f'train_{n:05d}.bin', 'tokens': 8, 'documents': 1, 'bytes_on_disk': 16,
                       'sha256': sha256(folder / 'train_00000.bin'),
                       'idx_sha256': sha256(folder / 'train_00000.idx')})
    split = {'tokens': 8 * count, 'documents': count, 'bytes': 8 * count, 'shards': shards}
    (folder / 'meta.json').write_text(json.dumps(
        {'format': 1, 'tokenizer': {'kind': 'byte'}, 'vocab_size': 64, 'eot': 63, 'dtype': 'uint16',
         'splits': {'train': split}}))
    return str(folder)


MANY = """
import os, sys
from batches import OPEN_FILES, Mixture
data = Mixture({name: 1 for name in sys.argv[2:]}, 'train', 6, 1, sys.argv[1])
x, _ = data.rows(range(1000))
assert (x >= 0).all() and OPEN_FILES == 64
"""


@pytest.mark.parametrize('packing', ['stream', 'document'])
def test_a_corpus_has_more_shards_than_a_process_may_open(tmp_path, packing):
    folders = [write_shards(tmp_path / name, 300) for name in ('a', 'b')]
    limit = lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128))  # noqa: E731
    done = subprocess.run([sys.executable, '-c', MANY, packing, *folders], cwd=ROOT, preexec_fn=limit,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_too_many_open_files_are_said_to_be_that(tmp_path, monkeypatch):
    files = TokenFiles(write_shards(tmp_path / 'd', 3), 'train')

    def refuse(*args, **more):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    with monkeypatch.context() as patch:
        patch.setattr('builtins.open', refuse)
        with pytest.raises(DataError, match='Too many open files: raise the limit of open files'):
            files.read(0, 8)
    assert len(files.read(0, 8)) == 8


@pytest.mark.parametrize('code, words', [(errno.EIO, 'Input/output error: the disk failed'),
                                         (errno.ESTALE, 'Stale file handle: it was replaced')])
def test_a_disk_that_fails_is_one_line(tmp_path, monkeypatch, code, words):
    files = TokenFiles(write_shards(tmp_path / 'd', 3), 'train')

    def fail(*args):
        raise OSError(code, os.strerror(code))
    with monkeypatch.context() as patch:
        patch.setattr(os, 'pread', fail)
        with pytest.raises(DataError, match=f'train_00001.bin: {words}'):
            files.read(8, 4)
    assert len(files.read(8, 4)) == 4


@pytest.mark.parametrize('harm, words', [
    (lambda path: os.truncate(path, 4), 'has 4 bytes now where 16 are expected|was truncated'),
    (lambda path: path.unlink(), 'No such file or directory: put the data set back'),
    (lambda path: (path.unlink(), os.mkfifo(path)), 'is a folder, a pipe or a device'),
    (lambda path: path.write_bytes(bytes(16)), 'was changed during the run: put the data set back')])
@pytest.mark.parametrize('is_open', [False, True])
def test_a_file_that_changes_is_one_line(tmp_path, harm, words, is_open):
    files = TokenFiles(write_shards(tmp_path / 'd', 3), 'train')
    if is_open:
        files.read(8, 2)
    harm(tmp_path / 'd' / 'train_00001.bin')
    if is_open and not words.startswith('has'):  # it is read as it was opened, until others are
        files.read(8, 2)
        batches.opened.cache_clear()
    with pytest.raises(DataError, match=f'train_00001.bin: {words}'):
        files.read(8, 8)


def test_the_same_file_copied_once_more_is_the_same_file(tmp_path):
    files = TokenFiles(write_shards(tmp_path / 'd', 3), 'train')
    before = files.read(0, 24)
    shutil.copytree(tmp_path / 'd', tmp_path / 'copy')
    shutil.rmtree(tmp_path / 'd')
    os.rename(tmp_path / 'copy', tmp_path / 'd')
    batches.opened.cache_clear()
    assert np.array_equal(files.read(0, 24), before)


@pytest.mark.parametrize('packing', ['aligned', 'document'])
def test_an_index_is_read_at_the_start_and_never_mapped(tmp_path, packing):
    write_dataset(tmp_path / 'd')
    data = Mixture(str(tmp_path / 'd'), 'train', 16, 1, packing)
    for path in (tmp_path / 'd').glob('*.idx'):
        os.truncate(path, 0)
    assert data.rows(range(100))[0].shape == (100, 16)


@pytest.mark.parametrize('change', [
    lambda starts: starts[::-1], lambda starts: starts + 1, lambda starts: starts * 10 ** 6,
    lambda starts: starts * 0, lambda starts: np.append(starts[:-1], 2 ** 64 - 1),
    lambda starts: np.append(starts[:1], starts[:-1] - 2 ** 63)])
def test_an_index_that_is_no_index_is_refused_though_its_hash_is_right(tmp_path, change):
    write_dataset(tmp_path / 'd', shards=2)
    path, meta = tmp_path / 'd' / 'train_00001.idx', json.loads((tmp_path / 'd' / 'meta.json').read_text())
    with np.errstate(over='ignore'):
        change(np.fromfile(path, '<u8')).astype('<u8').tofile(path)
    meta['splits']['train']['shards'][1]['idx_sha256'] = sha256(path)
    (tmp_path / 'd' / 'meta.json').write_text(json.dumps(meta))
    with pytest.raises(UserError, match='train_00001.idx: does not rise from 0 to the end of its .bin'):
        Mixture(str(tmp_path / 'd'), 'train', 16, 1, 'document')


@pytest.mark.parametrize('change, words', [
    (lambda meta: meta['splits']['train'].update(tokens=7), 'splits.train.tokens'),
    (lambda meta: meta['splits']['train'].update(documents=7), 'splits.train.documents'),
    (lambda meta: meta['splits']['train']['shards'][0].update(tokens=7), 'splits.train.shards.tokens'),
    (lambda meta: meta['splits']['train']['shards'][0].update(documents=0), 'splits.train.shards.documents'),
    (lambda meta: meta['splits']['train']['shards'][0].update(documents=7), 'splits.train.documents'),
    (lambda meta: meta['splits']['train']['shards'][0].pop('idx_sha256'), 'splits.train'),
    (lambda meta: meta['splits']['train']['shards'].append(7), 'splits.train'),
    (lambda meta: meta.update(dtype='uint32'), 'splits.train')])
def test_counts_that_disagree_are_one_line(tmp_path, change, words):
    write_dataset(tmp_path / 'd')
    meta = json.loads((tmp_path / 'd' / 'meta.json').read_text())
    change(meta)
    (tmp_path / 'd' / 'meta.json').write_text(json.dumps(meta))
    with pytest.raises(UserError, match=f'meta.json: {words}.* has an invalid value'):
        TokenFiles(str(tmp_path / 'd'), 'train')


def test_what_a_checkpoint_needs_of_the_data_is_read_at_the_start(tmp_path):
    (tmp_path / 'd').mkdir()
    np.arange(1000, dtype='<u2').tofile(tmp_path / 'd' / 'train.bin')  # nanoGPT's: the hash is of its bytes
    data = Mixture(str(tmp_path / 'd'), 'train', 16, 1)
    before = data.fingerprint()
    shutil.rmtree(tmp_path / 'd')
    assert data.fingerprint() == before and data.tokenizer_files == {}
