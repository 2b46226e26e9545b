"""
GPT-2's tokens of many texts at once: the same ids as tiktoken's, three times as fast where a text is ASCII.

Where words begin is found in numpy, for a megabyte of text at a time. A word of up to 15 bytes that is a
token is found by its bytes in a table. Only the other words go through the BPE, once each. The pattern that
is followed:

    '(?:[sdmt]|ll|ve|re)| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+
"""
import itertools
import re

import numpy as np

from features.text.pieces import encode_long

# Classes of bytes. END: 255, the end of a text, and 254, which stands for a stretch that is not ASCII
LETTER, DIGIT, BLANK, OTHER, END = range(5)
CLASSES = {
    LETTER: b'abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ',
    DIGIT: b'0123456789',
    BLANK: b' \t\n\v\f\r',
    END: b'\xfe\xff',
}
# the table has 2**18 places: 6 MB. Of two tokens in one place the one with the lower id, the commoner, stays
TABLE_BITS = 18
CACHE = 2 ** 17  # words that are remembered, at most

NOT_ASCII = re.compile(r'[^\x00-\x7f]+')
WORD_END = re.compile(r'(?<=[A-Za-z])(?=[ \n])')
LAST_WORD = re.compile(r'(?s:.*)[A-Za-z](?=[ \n])')


def words_of(tokenizer):
    """The Words of a tokenizer, made once and cached."""
    if not hasattr(tokenizer, 'words'):
        tokenizer.words = Words(tokenizer)
    return tokenizer.words


class Words:
    """The tables for a TiktokenTokenizer of gpt2."""

    def __init__(self, tokenizer):
        self.tokenizer, encoding = tokenizer, tokenizer.encoding
        self.cache = {}  # bytes of a word → its ids
        self.classes = np.full(256, OTHER, np.uint8)
        for name, chars in CLASSES.items():
            self.classes[list(chars)] = name
        # the first n bytes of a word of 8
        self.masks = np.array([2 ** (8 * n) - 1 for n in range(9)], np.uint64)
        words = {}  # id → bytes, the lowest ids last
        for i in reversed(range(encoding.eot_token)):
            token = encoding.decode_single_token_bytes(i)
            if len(token) <= 15 and token.isascii():
                words[i] = token
        words[encoding.eot_token] = b'\xff'
        keys = b''.join(word.ljust(15, b'\0') + bytes([len(word)]) for word in words.values())
        first, second = np.frombuffer(keys, '<u8').reshape(-1, 2).T
        self.first, self.second = np.zeros((2, 2 ** TABLE_BITS), np.uint64)
        self.ids = np.full(2 ** TABLE_BITS, -1, np.int32)
        place = place_of(first, second)
        self.first[place], self.second[place] = first, second
        self.ids[place] = list(words)

    def encode(self, texts):
        """
        (ids of all texts, each followed by the end-of-text token; number of ids per text), int64 arrays.
        """
        stretches, parts = [], []  # stretches: texts that are not ASCII, in order
        for text in texts:
            plain = text if text.isascii() else take_out(text, stretches)
            parts += [plain.encode('latin-1'), b'\xff']
        data = b''.join(parts)
        padded = np.frombuffer(data + bytes(16), np.uint8)
        start = self.starts(padded[:len(data)])
        length = np.diff(start, append=len(data))
        first, second = self.keys(padded, start, length, len(data))
        place = place_of(first, second)
        known = (self.first[place] == first) & (self.second[place] == second) & (length <= 15)

        rest = np.flatnonzero(~known)  # words that are not in the table
        others = self.encode_words(data, start[rest].tolist(), length[rest].tolist(), iter(stretches))
        count = np.ones(len(start), np.int64)  # ids of each word
        count[rest] = [len(ids) for ids in others]
        end = np.cumsum(count)
        out = np.zeros(end[-1] if len(end) else 0, np.int64)
        out[end[known] - 1] = self.ids[place[known]]
        out[np.repeat(~known, count)] = np.fromiter(itertools.chain.from_iterable(others), np.int64)
        return out, np.diff(end[padded[start] == 255], prepend=0)

    def starts(self, data):
        """The positions where the words of the bytes `data` start. Each END is a word."""
        kind = self.classes[data]
        blank = kind == BLANK
        solid = (kind != BLANK) & (kind != END)
        start = np.ones(len(data), bool)
        start[1:] = (kind[1:] != kind[:-1]) | (kind[1:] == END)
        # The last blank before a word does not belong to the blanks before it; a space belongs to the word
        # behind it
        start[:-1] |= blank[:-1] & solid[1:]
        start[1:] &= ~((data[:-1] == ord(' ')) & solid[1:])
        self.split_contractions(data, start)
        return np.flatnonzero(start)

    def split_contractions(self, data, start):
        """Change `start` for 's 'd 'm 't 'll 've 're, unless the quote is inside a word."""
        quote = np.flatnonzero(data[1:-1] == ord("'")) + 1
        quote = quote[start[quote]]
        if len(data) > 1 and data[0] == ord("'"):
            quote = np.append(0, quote)
        one = data[quote + 1]  # the bytes behind the quote
        two = data[np.minimum(quote + 2, len(data) - 1)]
        length = np.where(np.isin(one, list(b'sdmt')), 1, 0)
        for a, b in (b'll', b've', b're'):
            length[(one == a) & (two == b)] = 2
        quote, length = quote[length > 0], length[length > 0]
        start[quote + 1] = False
        start[quote + 1 + length] = True

    def keys(self, padded, start, length, size):
        """
        The first 8 bytes of words, and the next 7 with the length, uint64 each. size: bytes of text without
        padding.
        """
        eights = np.ndarray(size + 9, '<u8', padded, strides=(1,))  # the 8 bytes from every place on
        first = eights[start] & self.masks[np.minimum(length, 8)]
        second = eights[start + 8] & self.masks[np.clip(length - 8, 0, 7)]
        return first, second | length.astype(np.uint64) << np.uint64(56)

    def encode_words(self, data, starts, lengths, stretches):
        """The ids of words that are not in the table, and of the stretches for which a byte of 254 stands."""
        if len(self.cache) > CACHE:
            self.cache = {}
        found = []
        for start, length in zip(starts, lengths):
            word = data[start:start + length]
            if word[0] == 254:
                found.append(encode_long(self.tokenizer, next(stretches)))
                continue
            if word not in self.cache:
                self.cache[word] = self.tokenizer.encode(word.decode())
            found.append(self.cache[word])
        return found


def take_out(text, stretches):
    """
    Replace every non-ASCII part of a text, extended to word boundaries, by the character 254. The parts are
    appended to `stretches`.
    """
    parts, at = [], 0
    for found in NOT_ASCII.finditer(text):
        if found.end() > at:
            word = LAST_WORD.match(text, max(at, found.start() - 200), found.start())
            start = word.end() if word else at
            end = WORD_END.search(text, found.end())
            parts += [text[at:start], '\xfe']
            stretches.append(text[start:end.start() if end else len(text)])
            at = start + len(stretches[-1])
    return ''.join(parts) + text[at:]


def place_of(first, second):
    """The position in the table of a word with these keys()."""
    mixed = (first ^ (second * np.uint64(0xC2B2AE3D27D4EB4F))) * np.uint64(0x9E3779B97F4A7C15)
    return (mixed >> np.uint64(64 - TABLE_BITS)).astype(np.int64)
