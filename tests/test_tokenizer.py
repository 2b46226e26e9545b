"""
Every tokenizer gives its library's ids, takes any text and any id, and comes back from its description as it
was.
"""
import argparse
import hashlib
import inspect
import itertools
import json
import os
import random
import struct

import numpy as np
import pytest
import sentencepiece
import tiktoken
import tokenizers
from tiktoken_ext import openai_public

from configurator import UserError
from features.bpe import train_bpe
from features.hf.tokenizer_json import JsonTokenizer, to_json
from features.text import pieces as module
from features.text.pieces import cut_of, encode_long
from features.text.tokenizers import Reserved, same_ids
from tokenizer import CharTokenizer, load_tokenizer, new_tokenizer

STORY = ('One day, a little girl named Lily found a needle in her room.\n'
         'She knew it was sharp.  "Mom," she said, "look!"\n\n\tIt\'s 1234 o\'clock.\n')
LONG = STORY * 3 + inspect.getsource(argparse)[:30_000]  # to train on
HARD = ['', ' ', '\n', '\0', 'Hello  world \n\n\t x\r\n  ', 'naïve café e\u0301', '中文没有空格。',
        '😀👩‍👩‍👧 x',
        '▁a▁▁ b▁', '<|endoftext|> <s></s> <unk> [SEP] <0x41>', '\ufeff\u200b\u2028\ufffd', 'a' * 3000,
        ' ' * 300, '1' * 50, '\U0010ffff\ue000']


def random_text(rng, length):
    return ''.join(rng.choice(['a', 'b', 'the', ' ', ' ', '\n', '.', '\t', '  ', '7', 'é', '中', '😀', '▁',
                               "'s", '/', '\r\n']) for _ in range(length))


@pytest.fixture
def toy_tiktoken(monkeypatch):
    """
    tiktoken's own encodings, patterns and special tokens, over a small table of merges: nothing is
    downloaded.
    """
    found = ({STORY.encode()[i:i + n] for n in (2, 3, 4) for i in range(len(STORY) - n)}
             | {b'\n\n', b'  ', b'.\n', b'\n/'})
    words = [bytes([i]) for i in range(256)] + sorted(found, key=lambda b: (len(b), b))
    filled = words + [i.to_bytes(5, 'big') for i in range(50256 - len(words))]
    monkeypatch.setattr(openai_public, 'data_gym_to_mergeable_bpe_ranks',
                        lambda **_: {b: i for i, b in enumerate(filled)})
    monkeypatch.setattr(openai_public, 'load_tiktoken_bpe',
                        lambda *_, **__: {b: i for i, b in enumerate(words)})
    monkeypatch.setattr(tiktoken.registry, 'ENCODINGS', {})


def write_llama2c(folder, sp):
    """A sentencepiece model as a tokenizer.bin of llama2.c."""
    pieces = [sp.id_to_piece(i).replace('▁', ' ').encode() for i in range(sp.vocab_size())]
    pieces[1], pieces[2] = b'\n<s>\n', b'\n</s>\n'
    data = [struct.pack('<i', max(map(len, pieces)))]
    data += [struct.pack('<fi', sp.get_score(i), len(piece)) + piece for i, piece in enumerate(pieces)]
    (folder / 'tok500.bin').write_bytes(b''.join(data))


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    """Small vocabulary files as users bring them, made by their libraries."""
    folder = tmp_path_factory.mktemp('vocabularies')
    lines = LONG.split('\n')
    # T5's kind: unigram, text normalised, a space put before it; and Mistral's: BPE, bytes, text as it is but
    # for that space
    for name, options in {'t5': {'model_type': 'unigram', 'vocab_size': 200}, 'mistral': {
            'model_type': 'bpe', 'vocab_size': 500, 'byte_fallback': True,
            'normalization_rule_name': 'identity', 'remove_extra_whitespaces': False}}.items():
        with open(folder / f'{name}.model', 'wb') as f:
            sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=f,
                                                     minloglevel=2, **options)
    write_llama2c(folder, sentencepiece.SentencePieceProcessor(model_file=str(folder / 'mistral.model')))
    with open(folder / 'noeos.model', 'wb') as f:
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=f, minloglevel=2,
                                                 vocab_size=200, eos_id=-1)
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator([LONG], vocab_size=400, special_tokens=['<|endoftext|>'], show_progress=False)
    bpe.enable_truncation(5)
    bpe.save(str(folder / 'tokenizer.json'))
    bpe.train_from_iterator([LONG], vocab_size=400, special_tokens=['<end>'], show_progress=False)
    bpe.save(str(folder / 'noeos.json'))
    letters = 'abcdefghijklmnopqrstuvwxyz0123456789'
    pieces = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', *letters, *'.,!"\'', *(f'##{c}' for c in letters),
              'little', 'girl']
    (folder / 'uncased.txt').write_text('\n'.join(pieces) + '\n')
    (folder / 'cased.txt').write_text('\n'.join([*pieces, 'Lily', 'O', 'S', 'M', 'I']) + '\n')
    return folder


@pytest.fixture
def every_kind(files, toy_tiktoken):
    names = 't5.model', 'mistral.model', 'tok500.bin', 'tokenizer.json', 'cased.txt', 'uncased.txt'
    return {**{kind: new_tokenizer(kind) for kind in ('byte', 'gpt2', 'cl100k_base', 'o200k_base')},
            **{name: new_tokenizer(str(files / name)) for name in names},
            'char': new_tokenizer('char', [LONG, *HARD]), 'bpe': new_tokenizer('bpe:400', [LONG]),
            'no eot': CharTokenizer('abc', eot=False)}


# --- the start of a document ---

def test_a_document_starts_with_the_tokenizer_s_own_beginning_of_text(every_kind, files, tmp_path):
    starts = {name: tokenizer.start() for name, tokenizer in every_kind.items()}
    sp = every_kind['mistral.model'].sp
    assert starts.pop('mistral.model') == (sp.bos_id(),) and sp.bos_id() >= 0
    for name in ('cased.txt', 'uncased.txt'):
        tokenizer = every_kind[name]
        assert (starts.pop(name) == (tokenizer.tokenizer.token_to_id('[CLS]'),)
                == Reserved(tokenizer, 3).start())
    t5 = every_kind['t5.model']
    assert starts.pop('t5.model') == t5.bos()
    assert starts.pop('tok500.bin') == (1,)
    assert set(starts.values()) == {()}
    theirs = tokenizers.Tokenizer.from_file(str(files / 'tokenizer.json'))
    special = [('<|endoftext|>', theirs.token_to_id('<|endoftext|>')), ('a', theirs.token_to_id('a'))]
    for around in 'a $A', 'a $A <|endoftext|>', '$A <|endoftext|>', '<|endoftext|> $A', '<|endoftext|> a $A':
        theirs.post_processor = tokenizers.processors.TemplateProcessing(single=around,
                                                                         special_tokens=special)
        theirs.save(str(tmp_path / 'tokenizer.json'))
        tokenizer = new_tokenizer(str(tmp_path / 'tokenizer.json'))
        before = around.partition('$A')[0].split()
        assert tokenizer.bos() == tuple(theirs.token_to_id(name) for name in before)
        assert tokenizer.start() == tokenizer.bos()


# --- round trips ---

def test_bytes_and_subwords_write_any_text(every_kind):
    rng = random.Random(1)
    for kind in ('byte', 'gpt2', 'cl100k_base', 'o200k_base', 'bpe', 'char', 'tokenizer.json', 'tok500.bin'):
        for text in HARD + [STORY] + [random_text(rng, n) for n in range(1, 60)] * (kind != 'char'):
            assert every_kind[kind].decode(every_kind[kind].encode(text)) == text, (kind, text)


def test_the_text_of_special_tokens_is_ordinary_text(every_kind):
    for kind, t in every_kind.items():
        if kind != 'no eot':
            assert t.eot not in t.encode(STORY + '<|endoftext|></s>[SEP]'), kind


def test_every_id_decodes_and_no_other(every_kind):
    for kind, t in every_kind.items():
        for i in [*range(min(t.vocab_size, 700)), t.vocab_size - 1, t.eot or 0]:
            assert isinstance(t.decode([i]), str)
        assert isinstance(t.decode(range(min(t.vocab_size, 700))), str)
        for i in (t.vocab_size, -1):
            with pytest.raises(UserError, match=f'token {i} is outside the vocabulary'):
                t.decode([0, i])
        assert t.eot is None or 0 <= t.eot < t.vocab_size, kind


def test_a_growing_text_only_grows(every_kind):
    """sample.py shows the new characters of decode(ids so far), but for an unfinished one at the end."""
    for kind, t in every_kind.items():
        ids, shown = t.encode('abc' if kind == 'no eot' else 'they do not 中😀 end. One, ok (x)'), ''
        for n in range(1, len(ids) + 1):
            text = t.decode(ids[:n]).rstrip('\ufffd')
            assert text.startswith(shown), kind
            shown = text


# --- the libraries' ids ---

def test_ids_are_the_library_s(every_kind, files):
    for name in ('gpt2', 'cl100k_base', 'o200k_base'):
        library = tiktoken.get_encoding(name)
        assert every_kind[name].encode(STORY) == library.encode_ordinary(STORY)
        assert (every_kind[name].vocab_size, every_kind[name].eot) == (library.n_vocab, library.eot_token)
    for name in ('t5.model', 'mistral.model'):
        library = sentencepiece.SentencePieceProcessor(model_file=str(files / name))
        for text in [STORY, *HARD]:
            assert every_kind[name].encode(text) == library.encode(text)
        assert (every_kind[name].vocab_size, every_kind[name].eot) == (library.vocab_size(), library.eos_id())
    library = tokenizers.Tokenizer.from_file(str(files / 'tokenizer.json'))
    library.no_truncation()
    assert every_kind['tokenizer.json'].encode(STORY) == library.encode(STORY).ids
    assert every_kind['tokenizer.json'].eot == library.token_to_id('<|endoftext|>')
    for name, lower in (('uncased.txt', True), ('cased.txt', False)):
        library = tokenizers.BertWordPieceTokenizer(str(files / name), lowercase=lower)
        assert every_kind[name].encode(STORY) == library.encode(STORY, add_special_tokens=False).ids
        assert (every_kind[name].eot == library.token_to_id('[SEP]')
                and every_kind[name].unk == library.token_to_id('[UNK]'))
    assert ('Lily found' in every_kind['cased.txt'].decode(every_kind['cased.txt'].encode('Lily found'))
            .replace(' ##', ''))


def read_llama2c(path):
    """(bytes, scores) of the tokens of a tokenizer.bin."""
    data, at, pieces, scores = path.read_bytes(), 4, [], []
    while at < len(data):
        score, length = struct.unpack_from('<fi', data, at)
        at += 8 + length
        pieces.append(data[at - length:at])
        scores.append(score)
    return pieces, scores


def llama2c_encode(text, pieces, scores):
    """The ids of encode() of llama2.c's run.c: of two neighbours, those with the best score merge first."""
    ids = [pieces.index(b' ')] if text else []
    for character in text:
        spelled = character.encode()
        ids += [pieces.index(spelled)] if spelled in pieces else [byte + 3 for byte in spelled]
    while True:
        best = None
        for n in range(len(ids) - 1):
            both = pieces[ids[n]] + pieces[ids[n + 1]]
            if both in pieces and (best is None or scores[pieces.index(both)] > best[0]):
                best = scores[pieces.index(both)], n, pieces.index(both)
        if best is None:
            return ids
        ids[best[1]:best[1] + 2] = [best[2]]


def llama2c_decode(ids, pieces):
    """What run.c writes: a space after <s> is left out."""
    out = b''
    for before, i in itertools.pairwise([1, *ids]):
        if 3 <= i < 259:
            out += bytes([i - 3])
        elif i not in (1, 2):
            out += pieces[i][before == 1 and pieces[i].startswith(b' '):]
    return out.decode()


def test_a_tokenizer_of_llama2c_has_the_ids_and_the_text_of_its_program(files):
    t, (pieces, scores) = new_tokenizer(str(files / 'tok500.bin')), read_llama2c(files / 'tok500.bin')
    theirs = new_tokenizer(str(files / 'mistral.model'))
    rng = random.Random(3)
    for text in [STORY, *HARD[:-3], ' a', '  a b', '<0x0A>', *(random_text(rng, 30) for _ in range(100))]:
        text = text[:200]
        ids = t.encode(text)
        assert ids == llama2c_encode(text, pieces, scores), repr(text)
        assert t.decode(ids) == t.decode([1, *ids]) == text
        assert '▁' in text or ids == theirs.encode(text)
    for _ in range(200):
        whole = [*range(3, 131), *range(259, 500)]  # not a part of a character
        ids = [rng.choice(whole) if rng.random() < 0.7 else 1 for _ in range(8)]
        assert t.decode(ids) == llama2c_decode(ids, pieces), ids
    assert (t.vocab_size, t.eot, t.bos(), t.special_tokens()) == (500, 2, (1,), {'<s>': 1, '</s>': 2})
    assert t.encode_special('Lily</s>the') == theirs.encode_special('Lily</s>the')


@pytest.mark.parametrize('harm', [
    lambda data: data[:-1], lambda data: data + b'\0', lambda data: b'', lambda data: data[:40],
    lambda data: data.replace(b'<0x07>', b'<0x08>', 1), lambda data: data[:4] + b'\xff' * 8 + data[12:],
    lambda data: b'\1\0' * 3000], ids=range(7))
def test_a_file_that_is_no_tokenizer_of_llama2c_is_refused(harm, files, tmp_path):
    path = tmp_path / 'x.bin'
    path.write_bytes(harm((files / 'tok500.bin').read_bytes()))
    with pytest.raises(UserError, match='x.bin: not a tokenizer.bin of llama2.c'):
        new_tokenizer(str(path))


@pytest.mark.parametrize('harm', [{'dropout': 0.9}, {'dropout': 1.0}, {'alpha': 0.1, 'nbest_size': 9}],
                         ids=str)
@pytest.mark.parametrize('reserve', [0, 3])
def test_nothing_in_a_tokenizer_json_is_left_to_chance(files, tmp_path, harm, reserve):
    """The ids are those of the same file without dropout, sampling, truncation and padding."""
    plain = json.loads((files / 'tokenizer.json').read_text()) | {'truncation': None}
    if 'alpha' in harm:
        vocab = [['<unk>', 0.0], *([piece, -len(piece) ** 0.5] for piece in plain['model']['vocab'])]
        plain['model'] = {'type': 'Unigram', 'unk_id': 0, 'vocab': vocab, 'byte_fallback': False}
    drawn = plain | {'model': plain['model'] | harm, 'truncation': {'direction': 'Right', 'max_length': 3,
                                                                    'strategy': 'LongestFirst', 'stride': 0},
                     'padding': {'strategy': {'Fixed': 50}, 'direction': 'Right', 'pad_to_multiple_of': None,
                                 'pad_id': 0, 'pad_type_id': 0, 'pad_token': 'x'}}
    kinds = []
    for name, value in (('plain', plain), ('drawn', drawn)):
        (tmp_path / f'{name}.json').write_text(json.dumps(value))
        kinds.append(new_tokenizer(str(tmp_path / f'{name}.json')))
    expected, t = kinds
    # it is kept as it came
    assert (t.describe()['files']
            == {'tokenizer.json': hashlib.sha256((tmp_path / 'drawn.json').read_bytes()).hexdigest()})
    t = load_tokenizer(t.save(tmp_path), tmp_path)
    t = Reserved(t, reserve) if reserve else t
    assert (cut_of(t), t.bos()) == (cut_of(expected), expected.bos())
    for text in [STORY, *HARD[:9]]:
        assert t.encode(text) == t.encode(text) == expected.encode(text)
    ids, _ = t.encode_documents([STORY] * 3)
    assert ids.tolist() == [*expected.encode(STORY), t.eot] * 3
    assert to_json(kinds[1]) == to_json(expected)


PIECES = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', 'a', *'\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e', 'the',
          'cat', '##s']


@pytest.mark.parametrize('end', ['\n', '\r\n', ' \n'])
@pytest.mark.parametrize('mark', ['', '\ufeff'])
@pytest.mark.parametrize('last', ['', 'end'])
def test_a_piece_of_a_bert_vocabulary_is_a_line(tmp_path, end, mark, last):
    """
    A line ends at \\n, as in the library: other signs that Python's splitlines() takes for an end are pieces.
    """
    path = tmp_path / 'vocab.txt'
    path.write_bytes((mark + end.join([*PIECES, last])).encode())
    path.with_suffix('.plain').write_bytes(end.join([*PIECES, last]).encode())
    t = new_tokenizer(str(path))
    library = tokenizers.BertWordPieceTokenizer(str(path.with_suffix('.plain')), lowercase=True)
    for text in ('the cats a', 'A cat\u2028\x85\x0cthe end', '\u2029'):
        assert t.encode(text) == library.encode(text, add_special_tokens=False).ids
    assert t.encode('the cat') == [PIECES.index('the'), PIECES.index('cat')]
    assert t.vocab_size == len(PIECES) + (last == 'end') and t.eot == 3 and t.unk == 1


def test_a_vocabulary_that_was_read_in_more_lines_still_loads(tmp_path):
    """Before, U+2028 made two lines: what was prepared or trained so keeps its ids."""
    data = '\n'.join(PIECES).encode()
    old = JsonTokenizer('wordpiece', '\n'.join('\n'.join(PIECES).splitlines()).encode(), 'vocab.txt')
    for reserve in (0, 5):
        tokenizer = Reserved(old, reserve) if reserve else old
        tokenizer.files = {'vocab.txt': data}
        again = load_tokenizer(tokenizer.save(tmp_path), tmp_path)
        assert (again.describe() == tokenizer.describe() and again.encode('the cat') == old.encode('the cat')
                != new_tokenizer(str(tmp_path / 'vocab.txt')).encode('the cat'))


def test_gpt2_s_ids_of_many_documents_are_the_library_s(toy_tiktoken):
    """
    Where words begin is found in numpy there: every rule of the pattern, at every place of a text, next to
    everything.
    """
    t, rng = new_tokenizer('gpt2'), random.Random(0)
    atoms = list("sdmtlverSE09 '.\"\n\t\r\v\f\0\x1c\x7f-") + ["'s", "'ll", "'ve", "'re", " '", '  ', '\n\n',
                                                              ' \n', 'girl', 'é', '’', 'x' * 40]
    atoms += ['!' * 15, '!' * 16]
    for _ in range(60):
        some = atoms[:rng.randint(5, len(atoms))]
        texts = ([''.join(rng.choice(some) for _ in range(rng.randint(1, 30))) for _ in range(50)]
                 + [STORY, "'", "'s", ' '])
        ids, lengths = t.encode_documents(texts)
        assert lengths.sum() == len(ids)
        for text, document in zip(texts, np.split(ids, np.cumsum(lengths)[:-1])):
            assert document.tolist() == t.encoding.encode_ordinary(text) + [t.eot], repr(text)


def test_documents_of_every_kind_end_with_the_end_of_text(every_kind):
    for kind, t in every_kind.items():
        if kind != 'no eot':
            ids, lengths = t.encode_documents(['one', 'ok'])
            assert (ids.tolist() == [*t.encode('one'), t.eot, *t.encode('ok'), t.eot]
                    and lengths.tolist() == [len(t.encode('one')) + 1, len(t.encode('ok')) + 1])
        assert [len(a) for a in t.encode_documents([])] == [0, 0]


def test_a_byte_order_mark_before_a_vocabulary_is_no_part_of_its_first_piece(tmp_path):
    (tmp_path / 'vocab.txt').write_bytes(b'\xef\xbb\xbf[PAD]\n[UNK]\n[SEP]\na\n')
    assert new_tokenizer(str(tmp_path / 'vocab.txt')).decode([0, 3]) == '[PAD] a'


def test_tokenizers_are_compared_by_what_they_do_not_by_how_they_are_kept(tmp_path):
    stories = ['once upon a time there was a cat who lived in a house by the river'] * 20
    made = {'bpe': train_bpe(stories, 320),
            'other': train_bpe(['the river carried the lamp and the wagon was mended'] * 20, 320),
            'byte': new_tokenizer('byte'), 'char': new_tokenizer('char', ['the cat']),
            'chars': new_tokenizer('char', ['the dog'])}
    for name in ('bpe', 'byte', 'char'):
        (tmp_path / f'{name}.json').write_text(to_json(made[name]), encoding='utf-8')
        made[f'{name}.json'] = new_tokenizer(str(tmp_path / f'{name}.json'))
    made['reserved'] = Reserved(made['bpe'], 5)
    known = {}
    for name, tokenizer in made.items():
        folder = tmp_path / 'saved' / name
        folder.mkdir(parents=True)
        known[name] = tokenizer.save(folder), str(folder)
    alike = {frozenset(pair) for pair in (('bpe', 'bpe.json'), ('byte', 'byte.json'), ('char', 'char.json'),
                                          ('bpe.json', 'reserved'))}
    for one, other in itertools.combinations(known, 2):
        assert same_ids(known[one], known[other]) == ({one, other} in alike), (one, other)
    assert same_ids(known['bpe'], known['reserved'], is_padded=True)
    # without loading it
    assert same_ids(({'kind': 'gpt2'}, ''), ({'kind': 'gpt2', 'vocab_size': 50257, 'eot': 50256}, ''))
    with pytest.raises(UserError, match='not known'):
        same_ids(({'kind': 'unknown', 'vocab_size': 320}, ''), known['bpe'])


def test_char_ids_are_nanogpt_s():
    """nanoGPT numbers the sorted characters, and has no end-of-text token; ours comes after them."""
    t = new_tokenizer('char', ['hello', 'world'])
    assert (t.encode('hold') == [sorted(set('helloworld')).index(c) for c in 'hold']
            and (t.vocab_size, t.eot) == (8, 7))
    assert t.decode([*t.encode('hold'), t.eot]) == 'hold<|endoftext|>'
    # what batches.py makes of a meta.pkl
    old = load_tokenizer({'kind': 'char', 'chars': 'dehlorw', 'eot': None}, '.')
    assert old.encode('hold') == t.encode('hold') and (old.vocab_size, old.eot) == (7, None)
    with pytest.raises(UserError, match="character 'é' is not among the 7 characters"):
        t.encode('héllo')


# --- long texts in pieces ---

def test_pieces_of_a_long_text_have_the_ids_of_the_whole(every_kind, monkeypatch):
    monkeypatch.setattr(module, 'PIECE', 3)
    rng = random.Random(2)
    for kind, t in every_kind.items():
        if kind in ('char', 'no eot'):
            continue
        for text in [STORY, *HARD] + [random_text(rng, 80) for _ in range(100)]:
            assert encode_long(t, text) == t.encode(text), (kind, text)
    assert all([cut_of(every_kind[kind]) for kind in ('byte', 'gpt2', 'cl100k_base', 'o200k_base', 't5.model',
                                                      'bpe', 'cased.txt', 'tokenizer.json')])
    # it puts a space before every text, so that pieces would gain one
    assert cut_of(every_kind['mistral.model']) is None


# --- bpe:N ---

def test_bpe_is_the_same_byte_for_byte_every_time():
    texts = [LONG, 'Another story.\n' * 30, '中文 ' * 200]
    a, b = (new_tokenizer('bpe:400', texts) for _ in range(2))
    assert a.files == b.files and a.vocab_size == 400
    assert a.files != new_tokenizer('bpe:400', texts[::-1] + ['more text']).files


def test_bpe_keeps_blanks_and_parts_digits():
    t = new_tokenizer('bpe:400', [LONG, ' 2024 1234' * 500])
    assert len(t.encode('        raise')) < len('        raise') / 2  # runs of spaces are pieces
    assert len(t.encode('20241234')) == 8
    assert t.eot not in range(2, 258) and t.decode([t.eot]) == ''


@pytest.mark.parametrize('text', ['x' * 200_000, '字' * 70_000 + 'abc ' * 1000])
def test_bpe_survives_words_longer_than_its_trainer_takes(text):
    t = new_tokenizer('bpe:300', [text, LONG[:800]])
    assert t.decode(t.encode(text)) == text


@pytest.mark.parametrize('sign', ['\u2585', '\u2581', '\u2047', '\0', '\t', '\r\n', '\x1c',
                                  '\x7f', '\u2028', '\ufeff', '\ufffd', '\ue000', '\U0010ffff',
                                  '</s>', '<|endoftext|>', '<unk>', '<0x41>'])
def test_bpe_is_trained_on_text_with_any_sign(sign):
    """
    As many tokens as with another sign in its place, but for what the sign itself takes; and nothing is lost.
    """
    def text_with(sign):
        rng = random.Random(0)
        words = [''.join(rng.choice('abcdefgh') for _ in range(5)) for _ in range(20)]
        return ''.join(rng.choice(words) + (' ' if n % 6 else f' {sign}{sign} ') for n in range(2500))
    trained, usual = (new_tokenizer('bpe:340', [text_with(kind)]) for kind in (sign, '\u2584'))
    for text in (text_with(sign), sign, sign * 3, f'{sign}a{sign} {sign}', sign * 30_000):
        assert trained.decode(trained.encode(text)) == text
    assert len(trained.encode(text_with(''))) <= 1.15 * len(usual.encode(text_with('')))


def test_bpe_of_nothing_but_its_trainer_s_sign_is_refused():
    with pytest.raises(UserError, match='bpe:300: the text has nothing to be trained on: use byte'):
        new_tokenizer('bpe:300', ['\u2585\u2585', ''])
    with pytest.raises(UserError, match='bpe:300: the text has nothing to be trained on: use byte'):
        new_tokenizer('bpe:300', ['\u2585\n\u2585\n'])


def test_bpe_says_which_sizes_work():
    with pytest.raises(UserError, match=r'bpe:200: too small .* use a larger one, bpe:\d+'):
        new_tokenizer('bpe:200', [STORY])
    with pytest.raises(UserError,
                       match=r'bpe:50000: too large for so little text: use at most bpe:(\d+)') as error:
        new_tokenizer('bpe:50000', [STORY])
    largest = error.value.args[0].partition('at most ')[2].partition(',')[0]
    assert new_tokenizer(largest, [STORY]).vocab_size == int(largest[4:])
    for size in ('many', '0', '', '-5', '9' * 20, '9' * 5000):
        with pytest.raises(UserError, match='takes the size of the vocabulary'):
            new_tokenizer(f'bpe:{size}', [STORY])


# --- saved and loaded ---

def test_a_description_brings_the_tokenizer_back(every_kind, tmp_path):
    for number, (kind, t) in enumerate(every_kind.items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        description = json.loads(json.dumps(t.save(folder)))
        assert (description == t.describe()
                and {'kind', 'vocab_size', 'eot', 'files', 'sha256'} <= description.keys())
        again = load_tokenizer(description, folder)
        text = 'abc' if kind == 'no eot' else STORY
        assert again.describe() == description and again.encode(text) == t.encode(text)
        assert sorted(description['files']) == sorted(p.name for p in folder.iterdir())


def test_the_same_vocabulary_is_the_same_tokenizer_wherever_its_file_lies(files, tmp_path):
    (tmp_path / 'other.model').write_bytes((files / 'mistral.model').read_bytes())
    assert (new_tokenizer(str(tmp_path / 'other.model')).describe()
            == new_tokenizer(str(files / 'mistral.model')).describe())


def test_the_ending_of_a_vocabulary_may_have_capitals(files, tmp_path):
    for name in ('mistral.model', 'tokenizer.json', 'cased.txt'):
        (tmp_path / name.upper()).write_bytes((files / name).read_bytes())
        assert (new_tokenizer(str(tmp_path / name.upper())).describe()
                == new_tokenizer(str(files / name)).describe())


def test_a_changed_or_missing_file_is_refused(files, tmp_path):
    description = new_tokenizer(str(files / 'mistral.model')).save(tmp_path)
    path = tmp_path / 'tokenizer.model'
    path.write_bytes((files / 't5.model').read_bytes())
    with pytest.raises(UserError, match=r'tokenizer\.model: not the tokenizer that this was made with'):
        load_tokenizer(description, tmp_path)
    path.unlink()
    with pytest.raises(UserError, match=r'tokenizer\.model: No such file'):
        load_tokenizer(description, tmp_path)
    with pytest.raises(UserError, match='not the char tokenizer described'):
        load_tokenizer({**new_tokenizer('char', ['abc']).describe(), 'chars': 'abd'}, tmp_path)
    with pytest.raises(UserError, match='kind morse'):
        load_tokenizer({'kind': 'morse', 'eot': 0}, tmp_path)


# --- what cannot be had ---

def test_refusals_say_what_to_change(files, tmp_path, monkeypatch):
    (tmp_path / 'text.txt').write_text('Just\na\ntext\n')
    (tmp_path / 'broken.json').write_text('{"a": 1}')
    (tmp_path / 'empty.model').write_bytes(b'')
    (tmp_path / 'broken.model').write_bytes(b'no model at all')
    for kind, message in {'morse': r'no such tokenizer; there are byte, char, gpt2,',
                          'missing.model': 'no such file', tmp_path / 'text.txt': 'not a BERT vocabulary',
                          tmp_path / 'broken.json': r'not a tokenizer\.json', tmp_path / 'empty.model': 'not '
                          'a sentencepiece model', tmp_path / 'broken.model': 'not a sentencepiece model',
                          files / 'noeos.model': 'no end-of-text piece',
                          files / 'noeos.json': 'no end-of-text token'}.items():
        with pytest.raises(UserError, match=message):
            new_tokenizer(str(kind))

    def offline(*_, **__):
        raise ConnectionError('no network')
    monkeypatch.setattr(openai_public, 'load_tiktoken_bpe', offline)
    monkeypatch.setattr(tiktoken.registry, 'ENCODINGS', {})
    with pytest.raises(UserError, match='cl100k_base: tiktoken could not load it'):
        new_tokenizer('cl100k_base')
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(files))
    os.mkfifo(files / ('0' * 40))  # tiktoken would wait for it
    with pytest.raises(UserError, match='0: is a folder, a pipe'):
        new_tokenizer('cl100k_base')
    (files / ('0' * 40)).unlink()
    monkeypatch.setitem(__import__('sys').modules, 'tokenizers', None)
    with pytest.raises(UserError, match='pip install tokenizers'):
        new_tokenizer(str(files / 'tokenizer.json'))


def test_a_sentencepiece_model_whose_tokens_have_megabytes_is_one_line(tmp_path):
    """Each character that it does not know would be decoded to a megabyte."""
    from sentencepiece import sentencepiece_model_pb2
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(train_bpe(['a small cat'] * 20, 270).files['tokenizer.model'])
    new = {'an unknown one': lambda: setattr(proto.trainer_spec, 'unk_surface', 'x' * 10 ** 6),
           'a piece': lambda: setattr(proto.pieces[-1], 'piece', 'x' * 10 ** 6)}
    for name, change in new.items():
        change()
        path = tmp_path / f'{name}.model'
        path.write_bytes(proto.SerializeToString())
        proto.trainer_spec.unk_surface = ' '
        with pytest.raises(UserError, match='not a sentencepiece model'):
            new_tokenizer(str(path))
