"""
What tokenizer.py needs rarely: a tokenizer with reserved or added tokens, one that is not known, comparisons,
advice.
"""
import itertools
import os
import re
import tempfile

from checkpoint import open_regular
from configurator import UserError
from tokenizer import TIKTOKEN, Tokenizer, described, load_tokenizer

CACHED = 2 ** 26  # bytes of a file in the cache of tiktoken; the largest has 4 MB


class Extended(Tokenizer):
    """
    The tokenizer `inner` with further tokens after its own. names: {id: text} of these; size: of the whole
    vocabulary; more: further fields of the description.
    """

    def __init__(self, inner, names, size, eot, **more):
        super().__init__(inner.kind, size, eot, inner.files, inner.unk, **inner.more, **more)
        self.inner, self.names = inner, names
        self.eot_text = names.get(eot, inner.eot_text)
        self.bos, self.start = inner.bos, inner.start

    def is_own(self, i):
        return i in self.names or i >= self.inner.vocab_size

    def decode(self, ids):
        self.check_ids(ids)
        text = ''
        for is_own, group in itertools.groupby(map(int, ids), self.is_own):
            group = list(group)
            if is_own:
                text += ''.join(self.names.get(i, '') for i in group)
            elif not text:
                text = self.inner.decode(group)
            else:  # twice the first token: the space at its beginning is dropped only once
                text += self.inner.decode(group[:1] + group)[len(self.inner.decode(group[:1])):]
        return text


class Reserved(Extended):
    """
    The tokenizer `inner` with `count` additional tokens at its end, <0>, <1>, …, which no text is encoded to:
    for objectives that mask (prepare.py --reserve=100).
    """

    def __init__(self, inner, count):
        names = {inner.vocab_size + n: f'<{n}>' for n in range(count)}
        super().__init__(inner, names, inner.vocab_size + count, inner.eot, reserved=count)
        self.encode, self.encode_documents = inner.encode, inner.encode_documents
        self.special_tokens, self.encode_special = inner.special_tokens, inner.encode_special


class Added(Extended):
    """
    A sentencepiece tokenizer with the tokens that the files beside it add: added = {name: id}, special = the
    names of those that are no ordinary text. The others are tokens in every text, as in transformers.
    """

    def __init__(self, inner, added, special, eot):
        size = max([inner.vocab_size - 1, *added.values()]) + 1
        names = {i: name for name, i in added.items()}
        super().__init__(inner, names, size, eot, added=added, special=special)
        plain = sorted(added.keys() - set(special), key=len, reverse=True)
        self.plain = re.compile(f'({"|".join(map(re.escape, plain))})') if plain else None
        if any(' ' in name for name in plain):
            self.cut = None  # a long text may not be cut inside a name: see pieces.py

    def encode(self, text):
        return self.with_names(text, self.inner.encode)

    def encode_after(self, text):
        return self.with_names(text, self.inner.encode_after)

    def with_names(self, text, encode):
        """The ids of a text in which names are tokens; encode: for what stands before the first one."""
        ids = []
        for part in self.plain.split(text) if self.plain else [text]:
            if part in self.more['added'] and part not in self.more['special']:
                ids.append(self.more['added'][part])
            elif part:
                ids += encode(part)
            encode = self.inner.encode_after
        return ids

    def special_tokens(self):
        own = {name: self.more['added'][name] for name in self.more['special']}
        return self.inner.special_tokens() | own

    def ordinary_size(self):
        specials = {self.more['added'][name] for name in self.more['special']}
        size = self.vocab_size
        while size - 1 in specials and size > self.inner.vocab_size:
            size -= 1
        return size


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
    inner = dict(description)
    count = inner.pop('reserved', 0)
    if count:
        inner['vocab_size'] -= count
        return Reserved(described(inner, data, path), count)
    added = inner.pop('added', None)
    if added is not None:
        return Added(described(inner, data, path), added, inner.pop('special'), inner['eot'])
    if description['kind'] == 'llama2.c':
        from features.text.llama2c import Llama2c
        return Llama2c(data, path)
    return UnknownTokenizer(description['vocab_size'])


def check_cache():
    """
    Raise UserError if a file in tiktoken's cache, by default in the folder for temporary files, is none:
    tiktoken would wait for a named pipe, and read a device to its end. It compares the hashes of the files.
    """
    default = os.path.join(tempfile.gettempdir(), 'data-gym-cache')
    folder = os.environ.get('TIKTOKEN_CACHE_DIR', os.environ.get('DATA_GYM_CACHE_DIR', default))
    for name in os.listdir(folder) if os.path.isdir(folder) else ():
        if not re.fullmatch('[0-9a-f]{40}', name):
            continue
        path = os.path.join(folder, name)
        with open_regular(path) as f:
            if f.seek(0, os.SEEK_END) > CACHED:
                raise UserError(f'{path}: has more than {CACHED:,} bytes, more than any file of tiktoken: '
                                'delete it')


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
