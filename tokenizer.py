"""
Text ↔ token ids: bytes, characters, tiktoken, sentencepiece; with features/hf tokenizer.json and WordPiece.

    tokenizer = new_tokenizer('gpt2')
    tokenizer.vocab_size, tokenizer.eot      # 50257, 50256: the id that ends every document
    tokenizer.encode('Hello world')          # [15496, 995]; special tokens are neither added nor recognised
    tokenizer.decode([15496, 995])           # 'Hello world'; takes any id below vocab_size
    description = tokenizer.save(folder)     # for meta.json and checkpoints; writes the tokenizer's files
    load_tokenizer(description, folder)      # the same tokenizer again; checks the hashes of the files
"""
import copy
import hashlib
import itertools
import json
import os
import re
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np

from checkpoint import open_regular
from configurator import UserError

KINDS = 'byte, char, gpt2, cl100k_base, o200k_base, bpe:4096 (made of the text), FILE.model .json .txt .bin'
TIKTOKEN = ('gpt2', 'cl100k_base', 'o200k_base')
FILES = {'.model': 'sentencepiece', '.json': 'tokenizers', '.txt': 'wordpiece', '.bin': 'llama2.c'}
EOT = '<|endoftext|>'  # the end-of-text token of kinds that have no other name for it


@dataclass(frozen=True)
class PromptFormat:
    """The special tokens that a model saw around a text in training, and so needs around a prompt."""
    bos: tuple = ()  # (id,) before the first token of a document
    prefix: tuple = ()  # before a text that is read before another is written,
    suffix: tuple = ()  # and after it
    ends: tuple = ()  # tokens that end a text; () = the tokenizer's end of text
    chat_template: str = ''  # how a conversation is written (Jinja); '' = not known
    names: tuple = ()  # ((name, text), …) of the special tokens in it, as bos_token

    def add_to(self, ids, eot):
        """Add these ids around `ids`; eot if there are none. A bos or suffix of eot is not doubled."""
        before, after = [*self.bos, *self.prefix], list(self.suffix)
        if before == [eot] and ids[:1] == [eot]:
            before = []
        if after == [eot] and ids[-1:] == [eot]:
            after = []
        return [*before, *ids, *after] or [eot]

    def trained(self, eot):
        """The same after training on documents that end with eot: it ends a text too, beside other tokens."""
        if not self.ends or eot is None or eot in self.ends:
            return self
        return replace(self, ends=(*self.ends, eot))

    def as_json(self):
        """What JSON holds of it, in state.json; from_json() reads it."""
        return {'bos': list(self.bos), 'ends': list(self.ends), 'chat_template': self.chat_template,
                'names': dict(self.names)}


def from_json(fields, bos=()):
    """The PromptFormat of what as_json() returned, {} for an empty one; bos: in place of its own, if any."""
    return PromptFormat(bos=tuple(bos or fields.get('bos', ())), ends=tuple(fields.get('ends', ())),
                        chat_template=fields.get('chat_template', ''),
                        names=tuple(fields.get('names', {}).items()))


class Tokenizer:
    """
    Base class. Each kind has its own encode(text) and decode(ids). eot: id of the end-of-text token or None;
    files: {name: bytes} to store with the data; unk: id of unknown text, -1 = any text can be encoded; more:
    further fields of its description.
    """
    eot_text = EOT  # how the library writes the end-of-text token; in a document, this is ordinary text
    prompt_format = PromptFormat()  # sample.load() gives the tokenizer of a network that of its training

    def __init__(self, kind, vocab_size, eot, files=None, unk=-1, **more):
        self.kind, self.vocab_size, self.eot = kind, vocab_size, eot
        self.files, self.unk, self.more = files or {}, unk, more

    def describe(self):
        """A description of the tokenizer as JSON; equal descriptions mean equal tokenizers."""
        files = {name: hashlib.sha256(data).hexdigest() for name, data in self.files.items()}
        found = dict(kind=self.kind, vocab_size=self.vocab_size, eot=self.eot, files=files, **self.more)
        return {**found, 'sha256': hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()}

    def save(self, folder):
        """Write the tokenizer's files into `folder`. Returns its description."""
        for name, data in self.files.items():
            with open(os.path.join(folder, name), 'wb') as f:
                f.write(data)
        return self.describe()

    def encode_documents(self, texts, special=False):
        """
        (ids of all texts, each followed by an end-of-text token; number of ids per text), int64 arrays.
        special: whether the name of a special token in a text is that token.
        """
        if not special:  # text
            from features.text.pieces import encode_documents  # text: long texts in parts, twice as fast
            return encode_documents(self, texts)  # text
        encode = self.encode_special if special else self.encode
        ids = [encode(text) + [self.eot] for text in texts]
        lengths = np.array([len(document) for document in ids], np.int64)
        return np.array(list(itertools.chain.from_iterable(ids)), np.int64), lengths

    def ordinary_size(self):
        """The size of the vocabulary, without special tokens at its end: a network may do without these."""
        return self.vocab_size

    def special_tokens(self):
        """{name: id} of the tokens that stand for no text, as the end of text."""
        return {} if self.eot is None else {self.eot_text: self.eot}

    def encode_special(self, text):
        """The ids of a prompt: the name of a special token in it is that token."""
        specials = self.special_tokens()
        names = sorted(specials, key=len, reverse=True)
        ids = []
        for part in re.split(f'({"|".join(map(re.escape, names))})', text) if names else [text]:
            if part in specials:
                ids.append(specials[part])
            elif part:
                ids += self.encode_after(part) if ids else self.encode(part)
        return ids

    def encode_after(self, text):
        """The ids of a text that stands after a special token."""
        return self.encode(text)

    def bos(self):
        """(id,) of the token that the tokenizer's own library adds before a text; () if it adds none."""
        return ()

    def start(self):
        """(id,) of the start token of a document in training: bos(), or BERT's [CLS]; () = none."""
        return self.bos()

    def ends(self):
        """The tokens that end a text which a network writes; () = none."""
        own = () if self.eot is None else (self.eot,)
        return self.prompt_format.ends or own

    def with_format(self, prompt_format):
        """The same tokenizer with another prompt format."""
        other = copy.copy(self)
        other.prompt_format = prompt_format
        return other

    def check_ids(self, ids):
        """Raise UserError for an id outside the vocabulary: libraries would wrap around or crash."""
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise UserError(f'token {i} is outside the vocabulary of {self.vocab_size} of the '
                                f'{self.kind} tokenizer: the ids are of another one')


# -----------------------------------------------------------------------------
# The kinds

class ByteTokenizer(Tokenizer):
    """The bytes of UTF-8; 256 is the end-of-text token."""

    def __init__(self):
        super().__init__('byte', 257, 256)

    def encode(self, text):
        return list(text.encode())

    def decode(self, ids):
        self.check_ids(ids)
        return b''.join(bytes([i]) if i < 256 else EOT.encode() for i in ids).decode(errors='replace')


class CharTokenizer(Tokenizer):
    """One token per character of `chars`, then the end-of-text token, unless eot=False (as in nanoGPT)."""

    def __init__(self, chars, eot=True):
        if any(len(c) != 1 for c in chars) or len(set(chars)) != len(chars):
            raise UserError('char tokenizer: its vocabulary must be single characters, each once')
        super().__init__('char', len(chars) + eot, len(chars) if eot else None, chars=''.join(chars))
        self.spelling = list(chars) + [EOT] * eot
        self.ids = np.full(0x110000, -1, np.int32)  # code point → id
        self.ids[[ord(c) for c in chars]] = range(len(chars))

    def encode(self, text):
        codes = np.frombuffer(text.encode('utf-32-le', 'surrogatepass'), np.uint32)
        ids = self.ids[codes]
        if len(ids) and ids.min() < 0:
            reason = f'is not among the {len(self.more["chars"])} characters of this char tokenizer'
            raise UserError(f'character {chr(codes[ids.argmin()])!r} {reason}: leave it out, '
                            'or prepare the data with --tokenizer=byte')
        return ids.tolist()

    def decode(self, ids):
        self.check_ids(ids)
        return ''.join(self.spelling[i] for i in ids)


class TiktokenTokenizer(Tokenizer):
    """A tiktoken encoding. tiktoken downloads it once and caches it (in TIKTOKEN_CACHE_DIR, if set)."""

    def __init__(self, name):
        import tiktoken

        from features.text.tokenizers import check_cache  # text
        check_cache()  # text
        try:
            self.encoding = tiktoken.get_encoding(name)
        except (OSError, ValueError) as error:  # no network; a damaged file
            reason = f'tiktoken could not load it ({type(error).__name__})'
            raise UserError(f'tokenizer={name}: {reason}: connect to the network once, or set '
                            'TIKTOKEN_CACHE_DIR to its folder, or use --tokenizer=bpe:4096') from None
        super().__init__(name, self.encoding.n_vocab, self.encoding.eot_token)

    def encode(self, text):
        return self.encoding.encode_ordinary(text)

    def decode(self, ids):
        self.check_ids(ids)
        pieces = []
        for i in ids:
            with suppress(KeyError):  # some ids of cl100k_base and o200k_base are not in use
                pieces.append(self.encoding.decode_single_token_bytes(i))
        return b''.join(pieces).decode(errors='replace')

    def special_tokens(self):
        names = sorted(self.encoding.special_tokens_set)
        return {name: self.encoding.encode_single_token(name) for name in names}

    def encode_special(self, text):
        return self.encoding.encode(text, allowed_special='all')


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model. eot: the end-of-text token, None = its eos piece."""

    def __init__(self, data, where='tokenizer.model', eot=None):
        import sentencepiece
        try:
            self.sp = sentencepiece.SentencePieceProcessor(model_proto=data or b'?')
            pieces = self.sp.id_to_piece(list(range(self.sp.vocab_size())))
            if max(map(len, [*pieces, self.sp.decode([max(0, self.sp.unk_id())])]), default=0) > 2 ** 16:
                raise RuntimeError('a token of megabytes')
        except (RuntimeError, UnicodeDecodeError, IndexError):
            raise UserError(f'{where}: not a sentencepiece model') from None
        n, eot = self.sp.vocab_size(), self.sp.eos_id() if eot is None else eot
        if eot < 0:
            raise UserError(f'{where}: this model has no end-of-text piece (its eos_id is -1): '
                            'use one that has, or --tokenizer=bpe:4096')
        self.eot_text = self.sp.id_to_piece(eot) if eot < n else ''  # beyond: an added token
        super().__init__('sentencepiece', n, eot, {'tokenizer.model': data}, self.sp.unk_id())
        # A model that keeps all blanks, and adds none, can write any text but ▁, its sign for the space
        blanks, encode = ' a\n  b\t ', self.sp.encode
        self.sign = None
        if self.sp.decode(encode(blanks)) == blanks and encode('so it') == encode('so') + encode(' it'):
            self.sign = [self.sp.piece_to_id(f'<0x{byte:02X}>') for byte in '▁'.encode()]

    def encode(self, text):
        if not self.sign or '▁' not in text:
            return self.sp.encode(text)
        ids = []
        for part in text.split('▁'):
            ids += self.sp.encode(part) + self.sign
        return ids[:-len(self.sign)]

    def encode_after(self, text):
        if self.sign:
            return self.encode(text)
        # Without the blank that the model sets before a text: it stands before a newline, and both are cut
        # off, as transformers does
        ids, cut = self.encode('\n' + text), self.encode('\n')
        return ids[len(cut):] if ids[:len(cut)] == cut else self.encode(text)

    def decode(self, ids):
        self.check_ids(ids)
        return self.sp.decode([int(i) for i in ids])

    def special_tokens(self):
        control = {self.sp.id_to_piece(i): i for i in range(self.vocab_size) if self.sp.is_control(i)}
        return control | ({self.eot_text: self.eot} if self.eot_text else {})

    def bos(self):
        return (self.sp.bos_id(),) if self.sp.bos_id() >= 0 else ()


# -----------------------------------------------------------------------------
# New, trained, loaded

def needs_text(kind):
    """Whether this kind is trained on the text. Raises UserError for an unknown kind or a missing file."""
    if kind.startswith('bpe:'):
        if not re.fullmatch(r'[1-9]\d{0,8}', kind[4:], re.ASCII):
            raise UserError(f'tokenizer={kind}: takes the size of the vocabulary, as in bpe:4096')
        return True
    if kind not in ('byte', 'char', *TIKTOKEN):
        if not kind.lower().endswith(tuple(FILES)):
            raise UserError(f'tokenizer={kind}: no such tokenizer; there are {KINDS}')
        if not os.path.isfile(kind):
            raise UserError(f'tokenizer={kind}: no such file')
    return kind == 'char'


def new_tokenizer(kind, texts=()):
    """Make a tokenizer of a kind, see KINDS. `char` and `bpe:N` are made from `texts`, an iterable of str."""
    if needs_text(kind) and kind != 'char':
        from features.bpe import train_bpe
        return train_bpe(texts, int(kind[4:]))
    if kind == 'char':
        return CharTokenizer(sorted(set().union(*texts)))
    if kind in ('byte', *TIKTOKEN):
        return described({'kind': kind})
    data = read_file(kind)
    description = {'kind': FILES[kind[kind.rindex('.'):].lower()]}
    if description['kind'] == 'sentencepiece':  # hf
        from features.hf.prompts import tokens_beside  # hf
        description |= tokens_beside(kind, data)  # hf
    return described(description, data, kind)


def read_file(path):
    """The bytes of a tokenizer's file. Raises UserError for what is no regular file of up to 64 MiB."""
    with open_regular(path) as f:
        data = f.read(2 ** 26 + 1)
    if len(data) > 2 ** 26:  # those of published models have up to 35 million bytes
        raise UserError(f'{path}: has more than 64 MiB: not the file of a tokenizer')
    return data


def load_tokenizer(description, folder):
    """Load the tokenizer of a description from save(). Its file is read from `folder` and verified."""
    path, data = folder, b''
    try:
        for name, sha256 in description.get('files', {}).items():  # one at most
            path = os.path.join(folder, os.path.basename(name))
            data = read_file(path)
            if hashlib.sha256(data).hexdigest() != sha256:
                raise UserError(f'{path}: not the tokenizer that this was made with (by its hash): fix it')
        tokenizer = described(description, data, path)
        found = tokenizer.describe()['sha256']
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(f'{folder}: not as described there ({error!r}): prepare the data again') from None
    if description.get('sha256', found) != found:
        raise UserError(f'{folder}: not the {tokenizer.kind} tokenizer described: prepare the data again')
    return tokenizer


def described(description, data=b'', path=''):
    """The tokenizer of a description. data: the bytes of its file, which is at `path`."""
    kind = description['kind']
    if kind in ('unknown', 'llama2.c') or description.get('reserved') or 'added' in description:  # text
        from features.text.tokenizers import described_here  # text
        return described_here(description, data, path)  # text
    if kind == 'byte':
        return ByteTokenizer()
    if kind == 'char':
        return CharTokenizer(description['chars'], description['eot'] is not None)
    if kind in TIKTOKEN:
        return TiktokenTokenizer(kind)
    if kind == 'sentencepiece':
        return SentencePieceTokenizer(data, path, description.get('eot'))
    if kind in ('tokenizers', 'wordpiece'):  # hf
        from features.hf.tokenizer_json import JsonTokenizer  # hf
        return JsonTokenizer(kind, data, path, description.get('vocab_size'), description.get('eot'))  # hf
    raise UserError(f'{path}: its tokenizer is of kind {kind}, which this minnow does not know: update it')
