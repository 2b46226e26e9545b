"""tokenizer.json has the ids of the tokenizer that it was made from, whatever kind that is."""
import pytest
import tokenizers

from configurator import UserError
from features.bpe import train_bpe
from features.hf import tokenizer_json
from features.hf.tokenizer_json import JsonTokenizer, last_merge, to_json
from tokenizer import ByteTokenizer, CharTokenizer, SentencePieceTokenizer, TiktokenTokenizer, new_tokenizer

TEXTS = ['Once upon a time there was a cat.', '  two  blanks,\n\n\ttabs   ', "it's 12345 <|endof",
         'naïve façade — 你好 🙂', '\r\n \x00', '']


def same(ours, texts=TEXTS, end='<|endoftext|>'):
    theirs = tokenizers.Tokenizer.from_str(to_json(ours))
    for text in texts:
        ids = ours.encode(text)
        assert theirs.encode(text, add_special_tokens=False).ids == ids
        assert theirs.decode(ids, skip_special_tokens=False) == ours.decode(ids)
    # as a special token, it is recognised there
    assert theirs.encode(end, add_special_tokens=False).ids == [ours.eot]


def test_bytes():
    same(ByteTokenizer())


def test_characters():
    same(CharTokenizer('\n abcdeé🙂'), ['a bad cab', 'é🙂\n', ''])
    without_end = CharTokenizer('abc', eot=False)
    assert (tokenizers.Tokenizer.from_str(to_json(without_end)).encode('cab', add_special_tokens=False).ids
            == [2, 0, 1])


def test_our_own_bpe():
    same(train_bpe(['once upon a time there was a cat in 1234', 'the naïve cat was there\n\n  twice'] * 30,
                   320))


@pytest.mark.parametrize('settings',
                         [dict(model_type='unigram', vocab_size=60, hard_vocab_limit=False),
                          dict(model_type='bpe', vocab_size=300, byte_fallback=True, hard_vocab_limit=False),
                          dict(model_type='unigram', vocab_size=300, byte_fallback=True,
                               hard_vocab_limit=False, add_dummy_prefix=False)], ids=str)
def test_sentencepiece_of_others(settings):
    import io

    import sentencepiece
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(
        ['once upon a time there was a cat', 'the cat was there', 'a cat, a time'] * 30),
                                             model_writer=model, eos_id=1, unk_id=0, bos_id=-1, pad_id=-1,
                                             minloglevel=2, **settings)
    ours = SentencePieceTokenizer(model.getvalue())
    theirs = tokenizers.Tokenizer.from_str(to_json(ours))
    # compatibility characters are normalised
    for text in ('once upon a time', 'the cat  was\nthere ', ' a cat, a time', 'the ﬁrst ｃａｔ'):
        assert theirs.encode(text, add_special_tokens=False).ids == ours.encode(text)


def test_wordpiece_and_what_is_a_tokenizer_json_already():
    same(JsonTokenizer('wordpiece', '\n'.join(['[UNK]', '[SEP]', 'a', 'c', '##a', '##t', 'Cat']).encode(),
                       'vocab.txt'), ['a cat', 'Cat'], '[SEP]')


def test_gpt2():
    try:
        tokenizer = new_tokenizer('gpt2')
    except UserError:
        pytest.skip('tiktoken has no copy of it here')
    same(tokenizer)


def test_tiktoken_of_any_ranks():
    """A small encoding, made here: no download."""
    import tiktoken
    ranks = {bytes([b]): b for b in range(256)}
    for token in (b'th', b'he', b'the', b' t', b' the', b'in', b'ing', b'\xc3\xa9', b'  '):
        ranks[token] = len(ranks)
    ours = TiktokenTokenizer.__new__(TiktokenTokenizer)
    ours.encoding = tiktoken.Encoding(
        'tiny', pat_str=r" ?\p{L}+| ?\p{N}+|\s+|[^\s\p{L}\p{N}]+", mergeable_ranks=ranks,
        special_tokens={'<|endoftext|>': len(ranks)})
    super(TiktokenTokenizer, ours).__init__('tiny', len(ranks) + 1, len(ranks))
    same(ours)
    same(ours, ['the thing, théthe   things'])
    assert (last_merge(b' the', ranks[b' the'], ranks) == (b' ', b'the')
            and last_merge(b'the', ranks[b'the'], ranks) == (b'th', b'e'))


def test_a_file_is_parsed_once_and_its_second_form_made_when_it_is_needed(monkeypatch):
    data = to_json(ByteTokenizer()).encode()
    read = []
    from_str = tokenizers.Tokenizer.from_str

    class Counted:
        from_str = staticmethod(lambda text: read.append(text) or from_str(text))

    monkeypatch.setattr(tokenizers, 'Tokenizer', Counted)
    first, second = (JsonTokenizer('tokenizers', data, 'tokenizer.json') for _ in range(2))
    assert first.decode(second.encode_special('a cat')) == 'a cat'
    assert len(read) == 1
    assert second.encode('<|endoftext|>') == list(b'<|endoftext|>')
    assert len(read) == 2
    _, vocab = tokenizer_json.read(tokenizers, data, 'tokenizer.json')
    assert vocab is tokenizer_json.read(tokenizers, data, 'tokenizer.json')[1]  # neither is made twice
