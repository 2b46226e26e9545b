"""
What tokenizer.py needs rarely: a tokenizer with reserved tokens, one that is not known, comparisons, advice.
"""
import itertools
import os
import re

from configurator import UserError
from tokenizer import TIKTOKEN, Tokenizer, described, load_tokenizer


class Reserved(Tokenizer):
    """
    The tokenizer `inner` with `count` additional tokens at its end, <0>, <1>, …, which no text is encoded to:
    for objectives that mask (prepare.py --reserve=100).
    """

    def __init__(self, inner, count):
        super().__init__(inner.kind, inner.vocab_size + count, inner.eot, inner.files, inner.unk,
                         **inner.more, reserved=count)
        self.inner, self.eot_text = inner, inner.eot_text
        self.encode, self.encode_documents = inner.encode, inner.encode_documents
        self.special_tokens, self.encode_special = inner.special_tokens, inner.encode_special
        self.bos, self.start = inner.bos, inner.start

    def decode(self, ids):
        self.check_ids(ids)
        first, text = self.inner.vocab_size, ''
        for is_reserved, group in itertools.groupby(map(int, ids), lambda i: i >= first):
            if is_reserved:
                text += ''.join(f'<{i - first}>' for i in group)
            else:
                text += self.inner.decode(list(group))
        return text


class UnknownTokenizer(Tokenizer):
    """Stands for a tokenizer of which only the size is known (nanoGPT's meta.pkl): it refuses all text."""

    def __init__(self, vocab_size):
        super().__init__('unknown', vocab_size, None)

    def encode(self, text):
        raise UserError('the tokenizer of this network is not known, its data had a vocab_size alone: '
                        'no text can be read or written with it; prepare the data with prepare.py, '
                        'or put itos into meta.pkl, and train again')

    decode = encode


def described_here(description, data, path):
    """Like tokenizer.described(), for a tokenizer of this file."""
    count = description.get('reserved', 0)
    if count:
        inner = {**description, 'reserved': 0, 'vocab_size': description['vocab_size'] - count}
        return Reserved(described(inner, data, path), count)
    return UnknownTokenizer(description['vocab_size'])


# -----------------------------------------------------------------------------
# Compared

TEXTS = (
    'Once upon a time, there was a little girl who lived in a village near the forest.',
    "It doesn't matter: 12 lazy dogs ran 3.14159 times around the house in 1984!",
    'for i in range(len(values)): total += values[i] ** 2',
    'The mitochondria of eukaryotic cells regulate calcium signalling through phosphorylation.',
    'Über den Fluß führte früher eine schmale Straße.',
    'Le garçon a déjà mangé la crème brûlée.',
    'El niño pequeño corría por la montaña.',
    'В начале было слово.',
    'Η γάτα κοιμάται.',
    '你好，世界',
    'こんにちは世界',
    '안녕하세요',
    'مرحبا بالعالم',
    'नमस्ते दुनिया',
)

def same_ids(wanted, found, is_padded=False):
    """
    Whether two tokenizers, (description, folder of its files) each, encode TEXTS to the same ids; they may be
    stored in different formats. is_padded: they may have different numbers of tokens. Raises UserError if one
    of them is unknown or cannot be read.
    """
    kinds = wanted[0]['kind'], found[0]['kind']
    if kinds[0] == kinds[1]:
        sizes = {description.get('vocab_size') for description, _ in (wanted, found)} - {None}
        if len(sizes) > 1 and not is_padded:
            return False
        if wanted[0] == found[0] or kinds[0] in TIKTOKEN:
            return True
    if 'unknown' in kinds:
        raise UserError('one of them is not known')
    one, other = load_tokenizer(*wanted), load_tokenizer(*found)
    chars = [tokenizer.more['chars'] for tokenizer in (one, other) if tokenizer.kind == 'char']
    if len(chars) == 2:
        return chars[0] == chars[1]
    for text in (*TEXTS, *''.join(chars)):
        try:
            if one.encode(text) != other.encode(text):
                return False
        except UserError:  # a character that one of them does not have
            continue
    return True


# -----------------------------------------------------------------------------
# Advice

def explain(error):
    """
    An explanation of this error of sentencepiece's trainer, and what to do; '' if the error is not known.
    """
    low = re.search(r'smaller than required_chars. \d+ vs (\d+)', error)
    high = re.search(r'too high .* <= (\d+)', error)
    if low:
        return (f'too small for the bytes and the common characters of this text, which take {low[1]}: '
                f'use a larger one, bpe:{max(512, 2 * int(low[1]))} for instance')
    if high:
        return f'too large for so little text: use at most bpe:{high[1]}, or byte'
    if 'sentences_.empty()' in error:  # it drops the newlines at the end of a piece
        return 'the text has nothing to be trained on: use byte'
    return ''


def options_of(description, folder):
    """
    The options of prepare.py that give data this tokenizer, whose files are in `folder`: ['--tokenizer=…',
    '--reserve=…']. {}: the tokenizer of weights from elsewhere, whatever file is there.
    """
    names = [*description.get('files', ()), 'tokenizer.json', 'tokenizer.model', 'spiece.model']
    kind = description.get('kind', 'unknown').replace('unknown', 'FILE')
    if description.get('files') or not description:
        for name in reversed(names):
            path = os.path.join(folder, name)
            if os.path.isfile(path):
                kind = path
    return [f'--tokenizer={kind}', f'--reserve={description.get("reserved", 0)}']
