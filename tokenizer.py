"""
Text ↔ token ids: bytes, characters, tiktoken, sentencepiece, tokenizer.json and WordPiece behind one small interface.

    tokenizer = new_tokenizer('gpt2')
    tokenizer.vocab_size, tokenizer.eot      # 50257, 50256: the id that ends every document
    tokenizer.encode('Hello world')          # [15496, 995]; special tokens are neither added nor recognised
    tokenizer.decode([15496, 995])           # 'Hello world'; takes any id below vocab_size
    description = tokenizer.save(folder)     # for meta.json and checkpoints; the tokenizer's files go into the folder
    load_tokenizer(description, folder)      # the same tokenizer again, hashes checked

What a library does well is left to it; this file makes the six kinds answer alike. Reserved() gives any of them tokens that no text has.
"""
import copy
import hashlib
import io
import itertools
import json
import os
import re
from dataclasses import dataclass

import numpy as np

from configurator import UserError

KINDS = 'byte, char, gpt2, cl100k_base, o200k_base, bpe:4096 (trained on the text), FILE.model, FILE.json or FILE.txt'
TIKTOKEN = ('gpt2', 'cl100k_base', 'o200k_base')
EOT = '<|endoftext|>'  # the end of text, for kinds that have no name of their own for it
EOT_NAMES = (EOT, '</s>', '<eos>', '<|end_of_text|>', '<|eot_id|>', '[SEP]')  # what tokenizer.json files call it

UNTRAINED = '\u2585'  # sentencepiece's trainer drops every text with this sign: it is trained without, and writes it as bytes
PIECE = 2 ** 14  # characters of a long text that are encoded at a time
# Where a text may be parted so that its pieces have the ids of the whole
ANYWHERE = re.compile('')
BEFORE_BLANK = re.compile(r'(?<=[^\W\d_])(?=[ \n])')  # after a letter, before a space or newline
WORD_END, LAST_WORD, NOT_ASCII = re.compile(r'(?<=[A-Za-z])(?=[ \n])'), re.compile(r'(?s:.*)[A-Za-z](?=[ \n])'), re.compile(r'[^\x00-\x7f]+')
BEFORE_SPACE = re.compile(r'(?<=[^\W\d_])(?= )')


@dataclass(frozen=True)
class PromptFormat:
    """The token ids that a network saw around a text in training, and so takes around a prompt."""
    bos: tuple = ()  # (id,) before the first token of a document
    prefix: tuple = ()  # before a text that is read before another is written,
    suffix: tuple = ()  # and after it

    def add_to(self, ids, eot):
        """The ids with these around them, eot if there is nothing; a bos or suffix of eot is not doubled."""
        before, after = [*self.bos, *self.prefix], list(self.suffix)
        if before == [eot] and ids[:1] == [eot]:
            before = []
        if after == [eot] and ids[-1:] == [eot]:
            after = []
        return [*before, *ids, *after] or [eot]


class Tokenizer:
    """
    What all kinds share. cut: one of the rules above, None = never part a text; files: {name: bytes} to keep with the data;
    unk: the token for what the tokenizer cannot write, -1 = it can write anything.
    """
    eot_text = EOT  # how the library writes the end of text; the same letters in a document are ordinary text
    prompt_format = PromptFormat()  # sample.load() gives the tokenizer of a network that of its training

    def __init__(self, kind, vocab_size, eot, cut, files=None, unk=-1, **more):
        self.kind, self.vocab_size, self.eot, self.cut, self.unk = kind, vocab_size, eot, cut, unk
        self.files, self.more = files or {}, more

    def describe(self):
        """What identifies the tokenizer, as JSON: equal descriptions are equal tokenizers."""
        files = {name: hashlib.sha256(data).hexdigest() for name, data in self.files.items()}
        description = {'kind': self.kind, 'vocab_size': self.vocab_size, 'eot': self.eot, 'files': files, **self.more}
        return {**description, 'sha256': fingerprint(description)}

    def save(self, folder):
        """Write the tokenizer's files into `folder`; returns its description."""
        for name, data in self.files.items():
            with open(os.path.join(folder, name), 'wb') as f:
                f.write(data)
        return self.describe()

    def encode_long(self, text):
        """
        The ids of encode(text), piece by piece: less memory, and twice as fast with sentencepiece and WordPiece on a novel.
        (Unigram models do better so: their float32 scores lose precision over a million characters.)
        """
        ids, start = [], 0
        while self.cut and len(text) - start > 2 * PIECE and (place := self.cut.search(text, start + PIECE)):
            ids += self.encode(text[start:place.start()])
            start = place.start()
        return ids + self.encode(text[start:])

    def encode_documents(self, texts):
        """(ids of all texts with the end of text after each, int64; how many each has), for prepare.py."""
        ids = [self.encode_long(text) + [self.eot] for text in texts]
        lengths = np.array([len(document) for document in ids], np.int64)
        return np.fromiter(itertools.chain.from_iterable(ids), np.int64, lengths.sum()), lengths

    def bos(self):
        """(id,) of the token that the tokenizer's own library puts before a text, () if there is none. prepare.py puts none."""
        return ()

    def start(self):
        """(id,) of the token that can begin a document in training: bos(), or BERT's [CLS]; () without one."""
        return self.bos()

    def context(self, ids=()):
        """The ids that a network reads before it predicts what follows a text with these ids: never none."""
        return [*self.prompt_format.bos, *ids] or [self.eot or 0]

    def with_format(self, prompt_format):
        """The same tokenizer with another prompt format."""
        other = copy.copy(self)
        other.prompt_format = prompt_format
        return other

    def check_ids(self, ids):
        """Raise UserError for an id outside the vocabulary, where libraries wrap around or crash."""
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise UserError(f'token {i} is outside the vocabulary of {self.vocab_size} of the {self.kind} tokenizer: the ids are of another one')


def options_of(description, folder):
    """
    The options of prepare.py that give data this tokenizer, whose files are in `folder`: ['--tokenizer=…', '--reserve=…']. {}: of
    weights of others, whatever tokenizer file is there.
    """
    kind = description.get('kind', 'unknown').replace('unknown', 'FILE')
    if description.get('files') or not description:
        names = [*description.get('files', ()), 'tokenizer.json', 'tokenizer.model', 'spiece.model']
        paths = [os.path.join(folder, name) for name in names]
        kind = next((path for path in paths if os.path.isfile(path)), kind)
    return [f'--tokenizer={kind}', f'--reserve={description.get("reserved", 0)}']


PROBE = (
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
    Whether two tokenizers, (description, folder of its files) each, give a text the same ids. They may be kept
    in different formats, so both encode PROBE. is_padded: of one format, they may have different numbers of
    tokens. Raises UserError where one of them is not known or cannot be read.
    """
    (one, _), (other, _) = wanted, found
    if one['kind'] == other['kind']:
        sizes = {description['vocab_size'] for description in (one, other) if 'vocab_size' in description}
        if len(sizes) > 1 and not is_padded:
            return False
        if one == other or one['kind'] in TIKTOKEN:
            return True
    if 'unknown' in (one['kind'], other['kind']):
        raise UserError('one of them is not known')
    one, other = load_tokenizer(*wanted), load_tokenizer(*found)
    chars = [tokenizer.more['chars'] for tokenizer in (one, other) if tokenizer.kind == 'char']
    if len(chars) == 2:
        return chars[0] == chars[1]
    for text in (*PROBE, *''.join(chars)):
        try:
            if one.encode(text) != other.encode(text):
                return False
        except UserError:  # a character that one of them does not have
            continue
    return True


def fingerprint(description):
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()


def cut_rule(encode, pieces):
    """Where a text may be parted for a tokenizer with these pieces: nowhere if one of them can span a letter and the space after it."""
    if any(re.search(r'[^\W\d_] |\ufffd ', piece) for piece in pieces):  # U+FFFD: the end of a character, perhaps of a letter
        return None
    return BEFORE_SPACE if encode('so it') == encode('so') + encode(' it') else None


# -----------------------------------------------------------------------------
# The kinds

class ByteTokenizer(Tokenizer):
    """The bytes of UTF-8, and 256 for the end of text."""

    def __init__(self):
        super().__init__('byte', 257, 256, ANYWHERE)

    def encode(self, text):
        return list(text.encode())

    def decode(self, ids):
        self.check_ids(ids)
        return b''.join(bytes([i]) if i < 256 else EOT.encode() for i in ids).decode(errors='replace')


class CharTokenizer(Tokenizer):
    """One token for each of `chars`, in their order; the end of text comes last, if there is one (nanoGPT has none)."""

    def __init__(self, chars, eot=True):
        super().__init__('char', len(chars) + eot, len(chars) if eot else None, ANYWHERE, chars=''.join(chars))
        self.spelling = list(chars) + [EOT] * eot
        self.ids = np.full(0x110000, -1, np.int32)  # code point → id
        self.ids[[ord(c) for c in chars]] = range(len(chars))

    def encode(self, text):
        codes = np.frombuffer(text.encode('utf-32-le', 'surrogatepass'), np.uint32)
        ids = self.ids[codes]
        if len(ids) and ids.min() < 0:
            raise UserError(f'character {chr(codes[ids.argmin()])!r} is not among the {len(self.more["chars"])} characters of this char tokenizer: '
                            'leave it out, or prepare the data with --tokenizer=byte')
        return ids.tolist()

    def decode(self, ids):
        self.check_ids(ids)
        return ''.join(self.spelling[i] for i in ids)


class TiktokenTokenizer(Tokenizer):
    """An encoding of tiktoken, which downloads it once and keeps it (in TIKTOKEN_CACHE_DIR, if set)."""

    def __init__(self, name):
        import tiktoken
        try:
            self.encoding = tiktoken.get_encoding(name)
        except (OSError, ValueError) as error:  # no network; a damaged file
            raise UserError(f'tokenizer={name}: tiktoken could not load it ({type(error).__name__}): connect to the network once, '
                            'or set TIKTOKEN_CACHE_DIR to a folder that has it, or use --tokenizer=bpe:4096') from None
        # its patterns end a word before the blank that follows it, so that is where a text can be parted
        super().__init__(name, self.encoding.n_vocab, self.encoding.eot_token, BEFORE_BLANK)
        self.words = None

    def encode_documents(self, texts):
        if self.kind != 'gpt2':
            return super().encode_documents(texts)
        self.words = self.words or Words(self)
        return self.words.encode(texts)

    def encode(self, text):
        return self.encoding.encode_ordinary(text)

    def decode(self, ids):
        self.check_ids(ids)
        return b''.join(self.spell(i) for i in ids).decode(errors='replace')

    def spell(self, i):
        try:
            return self.encoding.decode_single_token_bytes(i)
        except KeyError:  # some ids of cl100k_base and o200k_base are not in use
            return b''


class Words:
    """
    GPT-2's tokens of many texts at once, the same as tiktoken's, three times as fast where a text is ASCII: where words begin is found for a megabyte at a
    time in numpy, and a word of up to 15 bytes that is a token is found in a table by its bytes. Only the other words go through the BPE,
    once each. The pattern that is followed here:  '(?:[sdmt]|ll|ve|re)| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+
    """
    LETTER, DIGIT, BLANK, OTHER, END = range(5)  # classes of bytes; END: 255, the end of a text, and 254, a stretch that is not ASCII
    BITS = 18  # of the table's size: 6 MB. Of two tokens in one place the commoner, with the lower id, keeps it

    def __init__(self, tokenizer):
        self.tokenizer, self.cache, encoding = tokenizer, {}, tokenizer.encoding
        self.classes = np.full(256, self.OTHER, np.uint8)
        for name, chars in ((self.LETTER, b'abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ'), (self.DIGIT, b'0123456789'),
                            (self.BLANK, b' \t\n\v\f\r'), (self.END, b'\xfe\xff')):
            self.classes[list(chars)] = name
        self.masks = np.array([2 ** (8 * n) - 1 for n in range(9)], np.uint64)  # the first n bytes of a word of 8
        tokens = {i: encoding.decode_single_token_bytes(i) for i in reversed(range(encoding.eot_token))}
        ids = [i for i, token in tokens.items() if len(token) <= 15 and token.isascii()] + [encoding.eot_token]
        tokens[encoding.eot_token] = b'\xff'
        keys = b''.join(tokens[i].ljust(15, b'\0') + bytes([len(tokens[i])]) for i in ids)
        first, second = np.frombuffer(keys, '<u8').reshape(-1, 2).T
        self.first, self.second = np.zeros((2, 2 ** self.BITS), np.uint64)
        self.ids = np.full(2 ** self.BITS, -1, np.int32)
        place = self.place(first, second)
        self.first[place], self.second[place], self.ids[place] = first, second, ids

    def without(self, text, stretches):
        """A text with the character 254 for every stretch that is not ASCII, from the end of a word to the end of another; those go to `stretches`."""
        parts, at = [], 0
        for found in NOT_ASCII.finditer(text):
            if found.end() > at:
                word = LAST_WORD.match(text, max(at, found.start() - 200), found.start())
                start, end = word.end() if word else at, WORD_END.search(text, found.end())
                parts += [text[at:start], '\xfe']
                stretches.append(text[start:end.start() if end else len(text)])
                at = start + len(stretches[-1])
        return ''.join(parts) + text[at:]

    def place(self, first, second):
        """Where in the table a word is, by its first 8 bytes and by the next 7 with its length."""
        mixed = (first ^ (second * np.uint64(0xC2B2AE3D27D4EB4F))) * np.uint64(0x9E3779B97F4A7C15)
        return (mixed >> np.uint64(64 - self.BITS)).astype(np.int64)

    def starts(self, data):
        """Where the words of the bytes `data` start, every END being one."""
        kind = self.classes[data]
        before, blank, solid = kind[:-1], kind == self.BLANK, (kind != self.BLANK) & (kind != self.END)
        start = np.ones(len(data), bool)
        start[1:] = (kind[1:] != before) | (kind[1:] == self.END)
        start[:-1] |= blank[:-1] & solid[1:]  # the last blank before a word is not one with those before it,
        start[1:] &= ~((data[:-1] == ord(' ')) & solid[1:])  # and a space is one with the word
        quote = np.flatnonzero(data[1:-1] == ord("'")) + 1  # 's 'd 'm 't 'll 've 're, unless the quote is part of a word
        quote = quote[start[quote]]
        if len(data) > 1 and data[0] == ord("'"):
            quote = np.append(0, quote)
        one, two = data[quote + 1], data[np.minimum(quote + 2, len(data) - 1)]
        length = np.where(np.isin(one, list(b'sdmt')), 1, 0)
        for a, b in (b'll', b've', b're'):
            length[(one == a) & (two == b)] = 2
        quote, length = quote[length > 0], length[length > 0]
        start[quote + 1] = False
        start[quote + 1 + length] = True
        return np.flatnonzero(start)

    def encode(self, texts):
        """(ids of all texts with the end of text after each, how many each has)."""
        stretches = []  # what is not ASCII, in order
        data = b''.join(part for text in texts for part in ((text if text.isascii() else self.without(text, stretches)).encode('latin-1'), b'\xff'))
        padded = np.frombuffer(data + bytes(16), np.uint8)
        start = self.starts(padded[:len(data)])
        length = np.diff(start, append=len(data))
        eights = np.ndarray(len(data) + 9, '<u8', padded, strides=(1,))  # the 8 bytes from every place on
        first = eights[start] & self.masks[np.minimum(length, 8)]
        second = eights[start + 8] & self.masks[np.clip(length - 8, 0, 7)] | length.astype(np.uint64) << np.uint64(56)
        place = self.place(first, second)
        known = (self.first[place] == first) & (self.second[place] == second) & (length <= 15)
        rest = np.flatnonzero(~known)
        if len(self.cache) > 2 ** 17:
            self.cache = {}  # memory stays the same
        stretches = iter(stretches)
        others = [self.word(data[a:a + n]) if data[a] < 254 else self.tokenizer.encode_long(next(stretches))
                  for a, n in zip(start[rest].tolist(), length[rest].tolist())]
        count = np.ones(len(start), np.int64)
        count[rest] = [len(ids) for ids in others]
        end = np.cumsum(count)
        out = np.zeros(end[-1] if len(end) else 0, np.int64)
        out[end[known] - 1] = self.ids[place[known]]
        mine = np.repeat(~known, count)
        out[mine] = np.fromiter(itertools.chain.from_iterable(others), np.int64)
        return out, np.diff(end[padded[start] == 255], prepend=0)

    def word(self, data):
        """The ids of one word."""
        if data not in self.cache:
            self.cache[data] = self.tokenizer.encode(data.decode())
        return self.cache[data]


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model; the end of text is its eos piece."""

    def __init__(self, data, where='tokenizer.model'):
        import sentencepiece
        try:
            self.sp = sentencepiece.SentencePieceProcessor(model_proto=data or b'?')
        except RuntimeError:
            raise UserError(f'{where}: not a sentencepiece model') from None
        n, eot = self.sp.vocab_size(), self.sp.eos_id()
        if eot < 0:
            raise UserError(f'{where}: this model has no end-of-text piece (its eos_id is -1): use one that has, or --tokenizer=bpe:4096')
        self.eot_text = self.sp.id_to_piece(eot)
        cut = cut_rule(self.sp.encode, [self.sp.id_to_piece(i).replace('▁', ' ') for i in range(n)])
        super().__init__('sentencepiece', n, eot, cut, {'tokenizer.model': data}, self.sp.unk_id())
        # A model that keeps every blank can write any text but sentencepiece's own sign for the space, ▁: that goes as bytes
        lossless = self.cut == BEFORE_SPACE and self.sp.decode(self.sp.encode(' a\n  b\t ')) == ' a\n  b\t '
        self.sign = [self.sp.piece_to_id(f'<0x{byte:02X}>') for byte in '▁'.encode()] if lossless else None

    def encode(self, text):
        if not self.sign or '▁' not in text:
            return self.sp.encode(text)
        ids = []
        for part in text.split('▁'):
            ids += self.sp.encode(part) + self.sign
        return ids[:-len(self.sign)]

    def decode(self, ids):
        self.check_ids(ids)
        return self.sp.decode([int(i) for i in ids])

    def bos(self):
        return (self.sp.bos_id(),) if self.sp.bos_id() >= 0 else ()


class JsonTokenizer(Tokenizer):
    """A tokenizer of the tokenizers library: a tokenizer.json, or a BERT vocabulary (vocab.txt)."""

    def __init__(self, kind, data, where, size=None):
        try:
            import tokenizers
        except ImportError:
            raise UserError(f'{where}: reading it takes the tokenizers library: pip install tokenizers') from None
        if kind == 'wordpiece':
            self.tokenizer = wordpiece(tokenizers, data, where, size)
        else:
            try:
                self.tokenizer = tokenizers.Tokenizer.from_str(data.decode('utf-8-sig'))
            except Exception as error:  # the library raises nothing narrower
                raise UserError(f'{where}: not a tokenizer.json ({error})') from None
        self.tokenizer.encode_special_tokens = True  # their text, met in a document, is ordinary text
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        for name in ('dropout', 'alpha', 'nbest_size'):  # of BPE and Unigram: they draw the pieces of a word at random
            if getattr(self.tokenizer.model, name, None) is not None:
                setattr(self.tokenizer.model, name, None)
        vocab = self.tokenizer.get_vocab()
        self.eot_text = next((name for name in EOT_NAMES if name in vocab), None)
        if self.eot_text is None:
            raise UserError(f'{where}: no end-of-text token in it, none of {", ".join(EOT_NAMES)}: add one to the vocabulary')
        pieces = self.tokenizer.decode_batch([[i] for i in vocab.values()], skip_special_tokens=False)
        super().__init__(kind, max(vocab.values()) + 1, vocab[self.eot_text], cut_rule(self.encode, pieces),
                         {'tokenizer.json' if kind == 'tokenizers' else 'vocab.txt': data}, vocab.get('[UNK]', vocab.get('<unk>', -1)))

    def encode(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids):
        self.check_ids(ids)
        return self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)

    def bos(self):
        before, after = self.added()
        return before if not after else ()  # BERT's [CLS] and [SEP] belong to a text that is complete

    def start(self):
        if self.kind == 'wordpiece':  # a vocab.txt does not say so, but BERT's own code begins with [CLS]
            first = self.tokenizer.token_to_id('[CLS]')
            return () if first is None else (first,)
        return self.added()[0]

    def added(self):
        """(ids before, ids after) that the library puts around a text: Llama's <s> before it, T5's </s> after it."""
        text = self.tokenizer.encode('a')
        of_text = [n for n, special in enumerate(text.special_tokens_mask) if not special]
        if not of_text:  # it cannot write an a: a single token stands before it, unless it is the end of text
            is_first = len(text.ids) == 1 and text.ids != [self.eot]
            return tuple(text.ids) * is_first, ()
        if of_text[0] > 1:
            return (), ()
        return tuple(text.ids[:of_text[0]]), tuple(text.ids[of_text[-1] + 1:])


class Reserved(Tokenizer):
    """A tokenizer with `count` tokens more, its last ones, that no text is encoded to: for what objectives.py masks. They are written <0>, <1>, …"""

    def __init__(self, inner, count):
        super().__init__(inner.kind, inner.vocab_size + count, inner.eot, inner.cut, inner.files, inner.unk, **inner.more, reserved=count)
        self.inner, self.encode, self.encode_documents, self.bos = inner, inner.encode, inner.encode_documents, inner.bos
        self.eot_text = inner.eot_text
        self.start = inner.start

    def decode(self, ids):
        self.check_ids(ids)
        first, text = self.inner.vocab_size, ''
        for is_reserved, some in itertools.groupby(map(int, ids), lambda i: i >= first):
            some = list(some)
            text += ''.join(f'<{i - first}>' for i in some) if is_reserved else self.inner.decode(some)
        return text


class UnknownTokenizer(Tokenizer):
    """Stands for a tokenizer of which only the number of tokens is known (nanoGPT's meta.pkl): it refuses all text."""

    def __init__(self, vocab_size):
        super().__init__('unknown', vocab_size, None, None)

    def encode(self, text):
        raise UserError('the tokenizer of this network is not known, its data had a vocab_size alone: no text can be '
                        'read or written with it; prepare the data with prepare.py, or put itos into meta.pkl, and '
                        'train again')

    decode = encode


def wordpiece(tokenizers, data, where, size=None):
    """
    BERT's tokenizer for the pieces of a vocab.txt, one a line, read as the tokenizers library does; cased if a piece has an
    upper-case letter. size: that of the vocabulary, where a description has it.
    """
    lines = data.decode('utf-8-sig', errors='replace').removesuffix('\n').split('\n')
    vocab = {line.rstrip() or line: i for i, line in enumerate(lines)}  # a piece of nothing but blanks keeps its place
    if size is not None and size != len(lines):  # made when U+2028 and others ended a line too
        vocab = {piece: i for i, piece in enumerate(data.decode(errors='replace').splitlines())}
    if '[UNK]' not in vocab or '[SEP]' not in vocab:
        raise UserError(f'{where}: not a BERT vocabulary (a piece a line, [UNK] and [SEP] among them); for text to prepare, name it as a source')
    cased = any(piece != piece.lower() for piece in vocab if not piece.startswith('['))
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocab, unk_token='[UNK]'))
    tokenizer.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=not cased)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = tokenizers.decoders.WordPiece()
    return tokenizer


# -----------------------------------------------------------------------------
# New, trained, loaded

def needs_text(kind):
    """Is this kind made from the text to be tokenized? Raises UserError for a kind that does not exist or a file that is missing."""
    if kind.startswith('bpe:'):
        if not re.fullmatch(r'[1-9]\d{0,8}', kind[4:], re.ASCII):
            raise UserError(f'tokenizer={kind}: takes the size of the vocabulary, as in bpe:4096')
        return True
    if kind not in ('byte', 'char', *TIKTOKEN):
        if not kind.lower().endswith(('.model', '.json', '.txt')):
            raise UserError(f'tokenizer={kind}: no such tokenizer; there are {KINDS}')
        if not os.path.isfile(kind):
            raise UserError(f'tokenizer={kind}: no such file')
    return kind == 'char'


def new_tokenizer(kind, texts=()):
    """
    The tokenizer that `kind` names, see KINDS. `char` and `bpe:N` are made from `texts`, an iterable of str.
    Raises UserError for what cannot be had.
    """
    if needs_text(kind):
        return char_tokenizer(sorted(set().union(*texts))) if kind == 'char' else train_bpe(texts, int(kind[4:]))
    if kind == 'byte':
        return ByteTokenizer()
    if kind in TIKTOKEN:
        return TiktokenTokenizer(kind)
    with open(kind, 'rb') as f:
        data = f.read()
    if kind.lower().endswith('.model'):
        return SentencePieceTokenizer(data, kind)
    return JsonTokenizer('tokenizers' if kind.lower().endswith('.json') else 'wordpiece', data, kind)


def char_tokenizer(chars, eot=True):
    """A token for every character of `chars`, in that order, and one for the end of text unless eot is False (nanoGPT's meta.pkl)."""
    chars = list(chars)
    if any(len(c) != 1 for c in chars) or len(set(chars)) != len(chars):
        raise UserError('char tokenizer: its vocabulary must be single characters, each once')
    return CharTokenizer(chars, eot)


def train_bpe(texts, vocab_size):
    """
    Train a sentencepiece BPE that can write any text: pieces for all 256 bytes, no blank lost or added, a digit at a time.
    The same texts in the same order give the same model, byte for byte. Raises UserError if vocab_size is too small or too large.
    """
    import sentencepiece
    model = io.BytesIO()
    # whole texts rather than lines, so that ".\n" can become a piece: 4% fewer tokens on stories, 7% on Python.
    # In stretches, because the trainer aborts at a word of 65,536 characters
    stretches = (text[i:i + 10_000] for text in texts for i in range(0, len(text), 10_000))
    pieces = (piece for stretch in stretches for piece in stretch.split(UNTRAINED) if piece)
    first = next(pieces, None)
    nothing = UserError(f'tokenizer=bpe:{vocab_size}: the text has nothing that it can be trained on: '
                        'use byte')
    if first is None:
        raise nothing
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=itertools.chain([first], pieces), model_writer=model,
            model_type='bpe', vocab_size=vocab_size, byte_fallback=True, character_coverage=0.9995,
            normalization_rule_name='identity', add_dummy_prefix=False, remove_extra_whitespaces=False, allow_whitespace_only_pieces=True,
            split_digits=True, unk_id=0, eos_id=1, eos_piece=EOT, bos_id=-1, pad_id=-1,
            max_sentence_length=2 ** 20, num_threads=1, minloglevel=2)
    except RuntimeError as error:
        low, high = re.search(r'smaller than required_chars. \d+ vs (\d+)', str(error)), re.search(r'too high .* <= (\d+)', str(error))
        if low:
            raise UserError(f'tokenizer=bpe:{vocab_size}: too small for the bytes and the common characters of this text, which take {low[1]}: '
                            f'use a larger one, bpe:{max(512, 2 * int(low[1]))} for instance') from None
        if high:
            raise UserError(f'tokenizer=bpe:{vocab_size}: too large for so little text: use at most bpe:{high[1]}, or byte') from None
        if 'sentences_.empty()' in str(error):  # it drops the newlines at the end of a piece
            raise nothing from None
        raise UserError(f'tokenizer=bpe:{vocab_size}: sentencepiece could not train it ({error})') from None
    return SentencePieceTokenizer(model.getvalue())


def described(description, files, folder):
    """The tokenizer of a description and {name: bytes} of the files it has in `folder`."""
    kind = description['kind']
    if kind == 'byte':
        tokenizer = ByteTokenizer()
    elif kind == 'char':
        tokenizer = char_tokenizer(description['chars'], description['eot'] is not None)
    elif kind == 'unknown':
        tokenizer = UnknownTokenizer(description['vocab_size'])
    elif kind in TIKTOKEN:
        tokenizer = TiktokenTokenizer(kind)
    elif kind == 'sentencepiece':
        (name, data), = files.items()
        tokenizer = SentencePieceTokenizer(data, os.path.join(folder, name))
    elif kind in ('tokenizers', 'wordpiece'):
        (name, data), = files.items()
        size = description['vocab_size'] - description.get('reserved', 0)
        tokenizer = JsonTokenizer(kind, data, os.path.join(folder, name), size)
    else:
        raise UserError(f'{folder}: its tokenizer is of kind {kind}, which this minnow does not know: update it')
    return Reserved(tokenizer, description['reserved']) if description.get('reserved') else tokenizer


def load_tokenizer(description, folder):
    """The tokenizer of a description that save() returned, its files read from `folder` and checked. Raises UserError."""
    kind, files = description['kind'], {}
    for name, sha256 in description.get('files', {}).items():
        path = os.path.join(folder, name)
        try:
            with open(path, 'rb') as f:
                files[name] = f.read()
        except OSError as error:
            raise UserError(f'{path}: {error.strerror}: the tokenizer belongs beside its data; prepare the data again') from None
        if hashlib.sha256(files[name]).hexdigest() != sha256:
            raise UserError(f'{path}: not the tokenizer that this was made with (its hash differs): restore the file, or prepare the data again')
    try:
        tokenizer = described(description, files, folder)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f'{folder}: no {kind} tokenizer is as the one described there ({error!r}): prepare the data again') from None
    if description.get('sha256', tokenizer.describe()['sha256']) != tokenizer.describe()['sha256']:
        raise UserError(f'{folder}: the {kind} tokenizer found here is not the one described there: prepare the data again')
    return tokenizer
