"""
The order of the data is a function: exactly once an epoch, the same for any split into ranks, nothing to
save.
"""
import hashlib
import json
import os
import pickle
import shlex
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import give_tokenizer, sha256, write_dataset

import batches
import prepare
from batches import (
    Mixture,
    Source,
    TokenFiles,
    find_folder,
    permute,
    read_meta,
    validation_batch,
    validation_rows,
)
from configurator import UserError
from features.bpe import train_bpe
from features.hf.tokenizer_json import to_json
from features.text.nanogpt import identify
from tokenizer import new_tokenizer

# --- the shuffle ---


def shuffled(n, key):
    return [permute(i, n, key) for i in range(n)]


@pytest.mark.parametrize('n', [*range(1, 70), 127, 128, 129, 1000, 4095, 4097, 16385])
def test_permute_is_a_permutation(n):
    assert sorted(shuffled(n, 7)) == list(range(n))


def test_permute_differs_by_key_and_stays_as_it_is():
    a, b = np.array(shuffled(1000, 1)), np.array(shuffled(1000, 2))
    assert (a == b).sum() < 20 and abs(np.corrcoef(np.arange(1000), a)[0, 1]) < 0.1
    # a run resumed with a later version must see the same order
    assert a[:10].tolist() == [985, 253, 909, 777, 499, 390, 189, 25, 48, 470]


def test_a_hundred_billion_windows_cost_nothing():
    began = time.perf_counter()
    out = [permute(i, 10 ** 11, 3) for i in range(512)]
    assert time.perf_counter() - began < 0.1 and len(set(out)) == 512 and max(out) > 5e10


# --- token files ---

@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp('corpus') / 'c'
    return str(folder), write_dataset(folder, documents=97, shards=3)


def test_reads_cross_shards_and_documents_are_found(corpus):
    folder, docs = corpus
    files, stream = TokenFiles(folder, 'train'), np.concatenate(docs['train']).astype(np.int64)
    assert files.tokens == len(stream) and files.documents == 97
    for start, length in [(0, 10), (0, len(stream)), (len(stream) - 3, 10), (len(stream), 5)]:
        assert np.array_equal(files.read(start, length), stream[start:start + length])
    for number in range(97):
        start, end = files.document(number)
        assert np.array_equal(stream[start:end], docs['train'][number])


# --- rows ---

@pytest.mark.parametrize('block_size', [1, 8, 31, 5000])
def test_an_epoch_of_the_stream_has_every_token_as_a_target_exactly_once(corpus, block_size):
    folder, docs = corpus
    data, stream = Mixture(folder, 'train', block_size, seed=1), np.concatenate(docs['train'])
    n = data.sources[0].rows
    x, y = data.rows(range(n))
    assert n == 1 or y[y >= 0].tolist() != stream[1:].tolist()  # shuffled
    order = shuffled(n, key_of(data, 0))
    assert np.array_equal(y[np.argsort(order)][y[np.argsort(order)] >= 0], stream[1:])
    assert np.array_equal(x[:, 1:][y[:, 1:] >= 0], y[:, :-1][y[:, 1:] >= 0])


def key_of(data, epoch):
    from batches import splitmix
    return splitmix(data.seed, 0, epoch)


def test_each_epoch_has_another_order_and_the_seed_too(corpus):
    a, b = Mixture(corpus[0], 'train', 16, seed=1), Mixture(corpus[0], 'train', 16, seed=2)
    n = a.sources[0].rows
    first, second = a.rows(range(n))[0], a.rows(range(n, 2 * n))[0]
    assert not np.array_equal(first, second) and not np.array_equal(first, b.rows(range(n))[0])
    assert np.array_equal(np.sort(first.view(f'V{first.itemsize * 16}').ravel()),
                          np.sort(second.view(f'V{first.itemsize * 16}').ravel()))


def test_any_split_into_calls_gives_the_same_rows(corpus):
    data = Mixture({corpus[0]: 1}, 'train', 16, seed=3)
    whole = data.rows(range(100, 140))
    for size in (1, 3, 8):
        parts = [data.rows(range(i, min(i + size, 140))) for i in range(100, 140, size)]
        assert all(np.array_equal(w, np.concatenate(p)) for w, p in zip(whole, zip(*parts)))


def test_aligned_rows_begin_with_a_document(corpus):
    folder, docs = corpus
    data, starts = (Mixture(folder, 'train', 64, seed=1, packing='aligned'),
                    {tuple(d[:3]) for d in docs['train']})
    x, y = data.rows(range(data.sources[0].rows))
    # documents are shorter than 64 here, so each window has a start
    assert all(tuple(row[:3]) in starts for row in x)
    assert abs((y >= 0).sum() / data.sources[0].files.tokens - 1) < 0.1
    source, stream = Source(folder, 'train', 5, 'aligned'), np.concatenate(docs['train'])
    starts = np.cumsum([0] + [len(d) for d in docs['train']])
    for number in range(source.rows):
        begun = starts[(starts >= 5 * number) & (starts < min(5 * number + 5, len(stream) - 1))]
        start = begun[0] if len(begun) else 5 * number
        assert np.array_equal(source.row(number), stream[start:start + 6])


def test_document_rows_are_padded_masked_and_cropped(corpus):
    folder, docs = corpus
    data = Mixture(folder, 'train', 30, seed=1, packing='document')
    x, y = data.rows(range(97))
    # 63: the end of text, which stands before every document too
    begun = [np.append(63, d) for d in docs['train']]
    whole = {tuple(d) for d in begun}
    crops = {tuple(d[i:i + 31]) for d in begun for i in range(len(d) - 30)}
    for row_x, row_y in zip(x, y):
        n = (row_y >= 0).sum()
        row = (*row_x[:n], row_y[n - 1])
        assert (row in (whole if len(row) < 31 else whole | crops) and (row_y[n:] == -1).all()
                and (row_x[n:] == 0).all())
    again = Mixture(folder, 'train', 30, seed=1, packing='document').rows(range(97 * 3))[0]
    # another crop each epoch
    assert np.array_equal(again[:97], x) and len({tuple(r) for r in again}) > len({tuple(r) for r in x})


def with_meta(folder, to, **fields):
    """A copy of a prepared folder whose meta.json has these fields too; None: not at all."""
    shutil.copytree(folder, to)
    meta = read_meta(folder) | fields
    (to / 'meta.json').write_text(json.dumps({key: value for key, value in meta.items()
                                              if value is not None}))
    return str(to)


@pytest.mark.parametrize('fields, bos', [({}, (63,)), ({'bos': 5}, (5,)), ({'eot': None}, ()),
                                         ({'bos': 5, 'eot': None}, (5,))], ids=str)
def test_a_document_begins_with_the_start_token_and_each_of_its_tokens_is_a_target_once(corpus, tmp_path,
                                                                                        fields, bos):
    docs, folder = corpus[1], with_meta(corpus[0], tmp_path / 'c', **fields)
    for split in ('train', 'val'):
        source = Source(folder, split, 64, 'document')
        x, y = validation_batch(source, range(source.rows))
        assert source.bos == bos
        for row_x, row_y, d in zip(x, y, docs[split], strict=True):
            row = np.append(bos, d).astype(int)
            assert (np.array_equal(row_x[:len(row) - 1], row[:-1])
                    and np.array_equal(row_y[row_y >= 0], row[1:]))
        assert source.tokens_per_row() * source.rows == pytest.approx((y >= 0).sum())
        if bos:  # the start token is no target, so bits per byte are exact
            assert (y >= 0).sum() * source.bytes_per_token() == pytest.approx(source.files.bytes)
        assert Source(folder, split, 64, 'stream').bos == ()
    x, y = Mixture(folder, 'train', 64, seed=1, packing='document').rows(range(97))
    assert (x[:, 0] == bos[0]).all() if bos else len(set(x[:, 0])) > 1


def test_a_crop_has_the_start_token_only_where_the_document_begins(tmp_path):
    docs = write_dataset(tmp_path / 'c', documents=30)['train']
    source = Source(str(tmp_path / 'c'), 'train', 8, 'document')
    number = int(np.argmax([len(d) for d in docs]))
    begun = np.append(63, docs[number])
    places = [tuple(begun[n:n + 9]) for n in range(len(begun) - 8)]
    crops = [tuple(source.row(number, noise)) for noise in range(100 * len(places))]
    counts = np.array([crops.count(place) for place in places])
    # each place alike, the first one too
    assert counts.sum() == len(crops) and (abs(counts - 100) < 50).all()
    fits = next(n for n, d in enumerate(docs) if len(d) == 8)
    assert source.row(fits).tolist() == [63, *docs[fits]]  # a document of block_size tokens is whole


def test_a_checkpoint_decides_what_its_rows_begin_with(corpus):
    old = Source(corpus[0], 'val', 64, 'document', bos=())
    assert (np.array_equal(old.row(0), corpus[1]['val'][0])
            and old.tokens_per_row() == np.mean([len(d) - 1 for d in corpus[1]['val']]))
    assert Source(corpus[0], 'val', 64, 'document', bos=[7]).row(0)[0] == 7
    assert Source(corpus[0], 'val', 64, 'stream', bos=[7]).bos == ()


def test_the_fingerprint_knows_the_start_token_where_rows_have_one(corpus, tmp_path):
    other = with_meta(corpus[0], tmp_path / 'c', bos=5)

    def prints(packing, **more):
        return [list(Mixture(folder, 'train', 16, seed=1, packing=packing, **more).fingerprint().values())[0]
                for folder in (corpus[0], other)]
    assert len(set(prints('stream'))) == 1 and len(set(prints('document'))) == 2
    assert prints('document', bos=()) == prints('stream')


def test_a_start_token_that_cannot_be_is_refused(corpus, tmp_path):
    for n, bos in enumerate((64, -1, 'x', True)):
        with pytest.raises(UserError, match='bos has an invalid value'):
            read_meta(with_meta(corpus[0], tmp_path / str(n), bos=bos))
    other = with_meta(corpus[0], tmp_path / 'other', bos=5)
    with pytest.raises(UserError,
                       match='begin with token 63, those of .*other with token 5: prepare both again'):
        Mixture({corpus[0]: 1, other: 1}, 'train', 16, seed=1, packing='document')
    Mixture({corpus[0]: 1, other: 1}, 'train', 16, seed=1)


def test_documents_that_are_cropped_are_counted(corpus):
    folder, docs = corpus
    long = [1 + len(d) for d in docs['train'] if 1 + len(d) > 33]  # with the start token
    assert Source(folder, 'train', 32, 'document').too_long() == (
        f'{folder}, train: {len(long)} of 97 documents cut to 33 tokens, losing up to {max(long) - 33} '
        '(packing=document: a random part of each)')
    assert (f'{sum(len(d) > 33 for d in docs["train"])} of 97'
            in Source(folder, 'train', 32, 'document', bos=()).too_long())
    assert Source(folder, 'train', 60, 'document').too_long() == ''
    for packing in ('stream', 'aligned'):
        assert Source(folder, 'train', 8, packing).too_long() == ''


# --- mixtures ---

@pytest.fixture(scope='module')
def three(tmp_path_factory):
    folder = tmp_path_factory.mktemp('three')
    for n, documents in enumerate((40, 150, 90)):
        write_dataset(folder / f'd{n}', documents=documents, seed=n)
    return [str(folder / f'd{n}') for n in range(3)]


def test_weights_are_met_exactly_and_each_source_goes_through_its_rows_once(three):
    data = Mixture(dict(zip(three, (100, 20, 0.5))), 'train', 16, seed=1)
    places = [data.locate(i) for i in range(20000)]
    counts = np.zeros(3)
    for i, (k, j) in enumerate(places):
        assert j == counts[k]  # consecutive: no row left out, none twice
        counts[k] += 1
        assert (np.abs(counts - (i + 1) * np.array([100, 20, 0.5]) / 120.5) <= 2).all()
    assert data.locate(10 ** 15)[1] > 0  # far out, at the same price


@pytest.mark.parametrize('packing', ['stream', 'document'])
def test_weights_count_tokens(tmp_path, packing):
    write_dataset(tmp_path / 'a', documents=100, seed=1)
    write_dataset(tmp_path / 'b', documents=60, seed=2)
    data = Mixture({str(tmp_path / 'a'): 3, str(tmp_path / 'b'): 1}, 'train', 16, seed=1, packing=packing)
    tokens = np.zeros(2)
    for i in range(2000):
        k, _ = data.locate(i)
        tokens[k] += data.sources[k].tokens_per_row()
    assert abs(tokens[0] / tokens[1] / 3 - 1) < 0.02


@pytest.mark.parametrize('dataset, words', [
    ({'x': 0}, 'a mixture takes'), ({}, 'a mixture takes'), ({'x': 'many'}, 'a mixture takes'),
    ({1: 2}, 'a mixture takes'), ({'x': 1e400}, 'a mixture takes'),
    ('nowhere', 'python prepare.py FILE_OR_FOLDER --out=data/nowhere')])
def test_a_mixture_that_cannot_be_is_refused(dataset, words):
    with pytest.raises(UserError, match=words):
        Mixture(dataset, 'train', 16, seed=1)


def test_a_packing_without_code_does_not_work_as_another_one(dataset):
    with pytest.raises(UserError, match='^packing=new: has no code in batches.py: '):
        Mixture(dataset, 'train', 8, 0, packing='new')


def test_sources_of_different_tokenizers_are_refused(three, tmp_path):
    write_dataset(tmp_path / 'other', vocab_size=65)
    with pytest.raises(UserError, match='different tokenizers'):
        Mixture({three[0]: 1, str(tmp_path / 'other'): 1}, 'train', 16, seed=1)


def test_sources_of_one_tokenizer_in_two_formats_are_mixed(three, tmp_path):
    bpe = train_bpe(['once upon a time there was a cat'] * 20, 300)
    (tmp_path / 'bpe.json').write_text(to_json(bpe), encoding='utf-8')
    for name, tokenizer in (('a', bpe), ('b', new_tokenizer(str(tmp_path / 'bpe.json')))):
        write_dataset(tmp_path / name)
        give_tokenizer(tmp_path / name, tokenizer)
    assert Mixture({str(tmp_path / 'a'): 1, str(tmp_path / 'b'): 1}, 'train', 16, seed=1).vocab_size == 300


def refusal(function, *args):
    with pytest.raises(UserError) as error:
        function(*args)
    return str(error.value)


@pytest.fixture
def follow(tmp_path, monkeypatch):
    """Does what a message says last: runs the command of prepare.py at its end. Returns its settings."""
    monkeypatch.chdir(tmp_path)
    rows = [{'story': f'story {n} of many', 'text': f'the text of number {n}, with more words'}
            for n in range(40)]
    (tmp_path / 'my text.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))

    def follow(message):
        words = shlex.split(message[message.index('python prepare.py'):].partition(', then')[0])
        args = [word.replace('FILE_OR_FOLDER', 'my text.jsonl') for word in words[1:]]
        if not any(word.startswith('--tokenizer') for word in words):
            args.append('--tokenizer=byte')  # the text is too short for bpe:4096
        monkeypatch.setattr(sys, 'argv', args)
        prepare.main()
        return words[2:]
    return follow


def test_a_missing_data_set_is_told_how_to_be_made(follow):
    for name in ('mine', 'some where/else', 'data/other', 'my text.jsonl'):
        message = refusal(find_folder, name)
        follow(message)
        assert find_folder(message.partition('--dataset=')[2] or name)
    for name, command in (('stdlib', 'stdlib'), ('tinystories', 'tinystories'),
                          ('markov2', 'synthetic:markov2'),
                          ('shakespeare_char', 'shakespeare --tokenizer=char --out=data/shakespeare_char')):
        assert (refusal(find_folder, name) == f'dataset={name}: no such data set; first run: '
                f'python prepare.py {command}')


@pytest.mark.parametrize('first, second, told', [
    ('--tokenizer=byte', '--tokenizer=bpe:294', '--tokenizer=byte'),
    ('--tokenizer=bpe:290', '--tokenizer=byte', '--tokenizer=data/first/tokenizer.model'),
    ('--tokenizer=bpe:290 --reserve=5', '--tokenizer=bpe:294',
     '--tokenizer=data/first/tokenizer.model and --reserve=5'),
    ('--tokenizer=byte --reserve=5', '--tokenizer=byte', '--reserve=5'),
    ('--tokenizer=byte', '--tokenizer=byte --reserve=5', '--reserve=0')])
def test_data_of_another_tokenizer_are_told_how_to_be_prepared(follow, first, second, told):
    given = "'my text.jsonl' --val_fraction=0.2"
    follow(f'python prepare.py {given} {first} --out=data/first')
    follow(f'python prepare.py {given} {second} --text_key=story --out=data/second')
    message = refusal(Mixture, {'first': 1, 'second': 1}, 'train', 16, 1)
    assert f': prepare second with {told}: python prepare.py ' in message and '\n' not in message
    settings = follow(message)
    assert '--text_key=story' in settings and settings[-1] == '--out=data/second2'
    assert Mixture({'first': 1, 'second2': 1}, 'train', 16, 1).vocab_size


def test_characters_of_another_text_cannot_be_had(follow):
    follow("python prepare.py 'my text.jsonl' --tokenizer=char --out=data/first")
    follow("python prepare.py 'my text.jsonl' --tokenizer=char --text_key=story --out=data/second")
    assert 'prepare second together with the text of the other' in refusal(Mixture, {'first': 1, 'second': 1},
                                                                           'train', 16, 1)


# --- validation ---

def test_bits_per_byte_is_nats_over_ln_2_and_the_bytes_of_a_token(corpus):
    data = Mixture(corpus[0], 'train', 16, seed=1)  # its meta.json says one byte a token
    assert abs(data.bits_per_byte(np.log(2) * 3) - 3) < 1e-12


def test_bits_per_byte_of_a_mixture_are_over_its_targets_not_its_rows(tmp_path):
    """Documents of 2 and of 20 targets, a row each, and of 1 and 3 bytes a token."""
    for name, length, width in ('short', 3, 1), ('long', 21, 3):
        tokens = np.full(20 * length, 5, '<u2')
        (tmp_path / name).mkdir()
        tokens.tofile(tmp_path / name / 'train_00000.bin')
        np.arange(0, len(tokens), length).astype('<u8').tofile(tmp_path / name / 'train_00000.idx')
        shard = {'file': 'train_00000.bin', 'documents': 20, 'bytes_on_disk': 2 * len(tokens),
                 'idx_sha256': sha256(tmp_path / name / 'train_00000.idx')}
        meta = {'format': 1, 'tokenizer': {'kind': 'byte'}, 'vocab_size': 64, 'dtype': 'uint16',
                'splits': {'train': {'bytes': width * len(tokens), 'shards': [shard]}}}
        (tmp_path / name / 'meta.json').write_text(json.dumps(meta))
    data = Mixture({str(tmp_path / 'short'): 1, str(tmp_path / 'long'): 1}, 'train', 32, 0, 'document')
    assert data.bits_per_byte(np.log(2)) == pytest.approx(1 / 2)  # as many targets of 1 as of 3 bytes


def test_validation_covers_the_split_or_a_fixed_part_of_it(corpus):
    source = Source(corpus[0], 'val', 16, 'stream')
    _, y = validation_batch(source, validation_rows(source, 0), 0)
    assert (y >= 0).sum() == source.files.tokens - 1
    some = validation_rows(source, 5)
    assert (len(set(some)) == 5 and np.array_equal(some, validation_rows(source, 5))
            and max(some) < source.rows)


# --- nanoGPT's folders ---

def test_a_nanogpt_folder_is_read_without_running_its_pickle(tmp_path):
    chars = 'abc\n'
    np.arange(400, dtype=np.uint16).__mod__(4).tofile(tmp_path / 'train.bin')
    np.arange(40, dtype=np.uint16).__mod__(4).tofile(tmp_path / 'val.bin')
    (tmp_path / 'meta.pkl').write_bytes(pickle.dumps(
        {'vocab_size': 4, 'stoi': {c: i for i, c in enumerate(chars)}, 'itos': dict(enumerate(chars))}))
    meta = read_meta(str(tmp_path))
    assert meta['vocab_size'] == 4 and meta['tokenizer']['chars'] == chars
    assert Mixture(str(tmp_path), 'train', 16, seed=1).rows([0])[0].shape == (1, 16)

    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / 'canary',)
    (tmp_path / 'meta.pkl').write_bytes(pickle.dumps(Evil()))
    with pytest.raises(UserError, match='meta.pkl'):
        read_meta(str(tmp_path))
    assert not (tmp_path / 'canary').exists()


def write_nanogpt(folder, tokens, dtype, pkl=None):
    """nanoGPT's train.bin and val.bin, with meta.pkl if there is to be one."""
    for split in ('train', 'val'):
        np.asarray(tokens).astype(dtype).tofile(folder / f'{split}.bin')
    if pkl is not None:
        (folder / 'meta.pkl').write_bytes(pickle.dumps(pkl))


@pytest.mark.parametrize('dtype, below, pkl, kind', [
    ('<u4', 100277, {'vocab_size': 100277}, 'unknown'),
    ('<u4', 1500, {'vocab_size': 1500}, 'unknown'),
    ('<u4', 65, {'vocab_size': 65}, 'unknown'),
    ('<u4', 65, {'itos': {n: chr(33 + n) for n in range(65)}}, 'char'),
    ('<u4', 50257, None, 'gpt2'),
    ('<u2', 50257, None, 'gpt2'),
    ('<u2', 50257, {'vocab_size': 50257}, 'gpt2'),
    ('<u2', 1500, {'vocab_size': 1500}, 'unknown'),
    ('<u2', 50, {'vocab_size': 50}, 'unknown'),
    ('<u2', 60000, {'vocab_size': 60000}, 'unknown'),
    ('<u2', 3, {'vocab_size': 3, 'itos': ['a', 'the', 'of']}, 'unknown'),  # words: not the characters a, t, h
    ('<u2', 3, {'itos': {0: 'a', 1: 'b', 2: 'c'}}, 'char'),
])
def test_the_width_of_nanogpts_tokens_is_found_and_no_tokenizer_made_up(tmp_path, dtype, below, pkl, kind):
    tokens = np.random.default_rng(0).integers(below, size=4001)
    write_nanogpt(tmp_path, tokens, dtype, pkl)
    files = TokenFiles(str(tmp_path), 'train')
    assert np.array_equal(files.read(0, 5000), tokens) and files.meta['tokenizer']['kind'] == kind


@pytest.mark.parametrize('tokens, dtype, pkl, words', [
    (range(1, 3000), '<u2', {'vocab_size': 100277},
     'train.bin: holds token .* beyond the 100,277 tokens that meta.pkl names.*as uint32'),
    ([50257] * 100, '<u2', None, 'train.bin: holds token 50257, beyond the 50,257 tokens of GPT-2'),
    (range(66000, 67000), '<u4', None, 'beyond the 50,257 tokens of GPT-2'),
    ([1, 0, 2, 0] * 100, '<u2', {'vocab_size': 3}, 'every other uint16 in it is 0'),
    ([1, 2] * 100, '<u4', {'vocab_size': 3}, 'every other uint16 in it is 0'),
    (range(1, 1000), '<i8', {'vocab_size': 1000}, 'every other uint32 in it is 0, as in int64'),
    ([1, 2] * 100, '<u2', {'vocab_size': 0}, 'meta.pkl: vocab_size=0'),
])
def test_a_nanogpt_folder_that_can_be_read_in_no_way_or_in_two_is_refused(tmp_path, tokens, dtype, pkl,
                                                                          words):
    write_nanogpt(tmp_path, list(tokens), dtype, pkl)
    with pytest.raises(UserError, match=words):
        read_meta(str(tmp_path))


def test_a_nanogpt_folder_of_two_widths_is_refused(tmp_path):
    tokens = np.random.default_rng(0).integers(1500, size=4000)
    write_nanogpt(tmp_path, tokens, '<u2', {'vocab_size': 1500})
    tokens.astype('<u4').tofile(tmp_path / 'val.bin')
    with pytest.raises(UserError, match='one is uint16, the other uint32'):
        read_meta(str(tmp_path))


def test_the_width_of_a_large_file_is_found_by_a_few_pieces_of_it(tmp_path, monkeypatch):
    tokens, sizes, read = np.random.default_rng(0).integers(50000, size=2 ** 20), [], os.pread
    write_nanogpt(tmp_path, tokens, '<u4')
    monkeypatch.setattr(os, 'pread', lambda fd, size, at: sizes.append((at, size)) or read(fd, size, at))
    assert read_meta(str(tmp_path))['dtype'] == 'uint32'
    assert sum(size for _, size in sizes) <= 2 * 2 ** 18 and max(sizes)[0] > 0.99 * 4 * len(tokens)


def test_a_run_that_took_an_unknown_tokenizer_for_gpt2s_still_finds_its_data_unchanged(tmp_path):
    write_nanogpt(tmp_path, np.arange(1000) % 50, '<u2', {'vocab_size': 50})
    data = Mixture(str(tmp_path), 'train', 8, 1)
    before = {'format': 1, 'tokenizer': {'kind': 'gpt2'}, 'vocab_size': 50, 'dtype': 'uint16', 'splits': {
        split: {'shards': [{'file': f'{split}.bin', 'bytes_on_disk': 2000}]} for split in ('train', 'val')}}
    text, pieces = identify(data.sources[0].files)
    assert text == json.dumps(before, sort_keys=True)
    wanted = hashlib.sha256(text.encode() + b''.join(pieces)).hexdigest()
    assert list(data.fingerprint().values()) == [wanted]


def test_a_byte_order_mark_before_meta_json_is_taken_off(tmp_path):
    write_dataset(tmp_path / 'd')
    (tmp_path / 'd' / 'meta.json').write_bytes(b'\xef\xbb\xbf' + (tmp_path / 'd' / 'meta.json').read_bytes())
    assert read_meta(str(tmp_path / 'd'))['vocab_size'] == 64


# --- damage ---

def damaged(folder, change):
    write_dataset(folder)
    change(folder)
    return TokenFiles(str(folder), 'train').read(0, 10 ** 6)


def change_meta(**changes):
    def change(folder):
        meta = json.loads((folder / 'meta.json').read_text())
        (folder / 'meta.json').write_text(json.dumps(meta | changes))
    return change


def flip_a_bit(folder):
    data = bytearray((folder / 'train_00001.bin').read_bytes())
    data[100] ^= 4
    (folder / 'train_00001.bin').write_bytes(data)


@pytest.mark.parametrize('change, words', [
    (lambda f: (f / 'train_00001.bin').write_bytes(b'12'), 'train_00001.bin: has 2 bytes'),
    (flip_a_bit, 'train_00001.bin: its contents do not match the hash'),
    (lambda f: (f / 'train_00000.bin').unlink(), 'train_00000.bin: No such file'),
    (lambda f: (f / 'train_00000.idx').write_bytes(b''), 'train_00000.idx: has 0 bytes'),
    (lambda f: (f / 'train_00000.idx').write_bytes(bytes(len((f / 'train_00000.idx').read_bytes()))),
     'train_00000.idx: its contents do not match'),
    (lambda f: (f / 'meta.json').write_text('{'), 'meta.json: not readable'),
    (lambda f: (f / 'meta.json').unlink(), 'neither meta.json nor train.bin'),
    (change_meta(vocab_size=10, eot=9), 'is beyond the vocabulary of 10'),
    (change_meta(vocab_size='64'), 'meta.json: vocab_size has an invalid value'),
    (change_meta(dtype='float64'), 'meta.json: dtype has an invalid value'),
    (change_meta(splits={'train': {'shards': [{'file': '../train_00000.bin', 'bytes_on_disk': 10}]}}),
     'splits.train has an invalid value'),
    # it would be copied beside checkpoints
    (change_meta(tokenizer={'kind': 'sentencepiece', 'files': {'../../secret': ''}}),
     'tokenizer.files has an invalid value'),
    (change_meta(splits={}), 'its train split holds no tokens'),
    (change_meta(format=2), 'format 2 is newer'),
])
def test_a_damaged_data_set_is_refused_with_the_files_name(tmp_path, change, words):
    with pytest.raises(UserError, match=words):
        damaged(tmp_path / 'd', change)


def test_the_hashes_of_large_splits_are_not_checked(tmp_path, monkeypatch):
    monkeypatch.setattr(batches, 'VERIFY_UP_TO', 100)
    assert len(damaged(tmp_path / 'd', flip_a_bit)) > 100


def test_other_tokens_of_the_same_number_are_another_data_set_also_without_hashes(tmp_path):
    prints = []
    for n, byte in enumerate((b'\1\0', b'\1\0', b'\2\0')):
        (tmp_path / str(n)).mkdir()
        (tmp_path / str(n) / 'train.bin').write_bytes(b'\1\0' * 300_000 + byte + b'\1\0' * 50)
        prints.append(*Mixture(str(tmp_path / str(n)), 'train', 8, 1).fingerprint().values())
    assert prints[0] == prints[1] != prints[2]


def test_a_strange_meta_pkl_is_refused_in_one_line(tmp_path):
    (tmp_path / 'train.bin').write_bytes(b'\1\0' * 100)
    for pkl in ([1], {'vocab_size': 'many'}, {'vocab_size': 3, 'itos': {0: 'a'}}):
        (tmp_path / 'meta.pkl').write_bytes(pickle.dumps(pkl))
        with pytest.raises(UserError, match='meta.pkl'):
            TokenFiles(str(tmp_path), 'train')
