"""
Figures of a prepared data set for the summary of prepare.py: unused tokens, unknown tokens, the longest
documents, and how often the text of an end-of-text token occurs inside of documents.
"""
import heapq
import os
import re

import numpy as np

import prepare
from features.bpe import UNTRAINED
from features.text.sources import printable
from features.text.splits import divide
from tokenizer import EOT

LONGEST = 5  # documents that are listed


def count_literals(texts, tokenizer):
    """{text of an end-of-text token: number of occurrences in the texts}."""
    names = {EOT, tokenizer.eot_text}
    return {name: sum(text.count(name) for text in texts) for name in names}


def longest_of(lengths, places):
    """
    [(tokens, place)] of the longest documents. lengths: tokens of each, int64; places: for example
    'notes.txt:1'.
    """
    order = np.argsort(-lengths, kind='stable')[:LONGEST]
    return [(int(lengths[n]), places[n]) for n in order]


def figures_of(found, folder, meta, s, tokenizer, seconds):
    """
    The figures of documents [(where, text)] whose token files were written into a folder by one process in
    `seconds`.
    """
    texts = [text for _, text in found]
    say_untrained(texts, s.tokenizer)
    places = {'train': [], 'val': []}
    for where, text in found:
        if text and not text.isspace():
            for side, _ in divide(text, s):
                places[side].append(where)
    used, unknown, longest = np.zeros(tokenizer.vocab_size, bool), 0, []
    for side in places:
        ids = np.fromfile(os.path.join(folder, f'{side}_00000.bin'), prepare.dtype_of(tokenizer))
        starts = np.fromfile(os.path.join(folder, f'{side}_00000.idx'), '<u8').astype(np.int64)
        used[ids] = True
        unknown += int(np.count_nonzero(ids == tokenizer.unk))
        longest += longest_of(np.diff(starts, append=len(ids)), places[side])
    tokens, size = (sum(split[key] for split in meta['splits'].values()) for key in ('tokens', 'bytes'))
    return {'unused': 1 - used.mean(), 'unknown': unknown / tokens,
            'empty': sum(not text or text.isspace() for text in texts),
            'longest': heapq.nlargest(LONGEST, longest), 'literal': count_literals(texts, tokenizer),
            'speed': size / 1e6 / seconds, 'num_proc': 1}


class Figures:
    """
    The figures of a run with several processes. They are kept in `progress`, a dict that is written as JSON,
    so that a resumed run has the figures of all its documents.
    """

    def __init__(self, progress, vocab_size):
        self.progress = progress
        for name, value in {'empty': 0, 'unknown': 0, 'literal': {}, 'used': '', 'longest': [],
                            'length': 0}.items():
            progress.setdefault(name, value)  # length: tokens of the long document that is read just now
        self.used = np.zeros(vocab_size, bool)  # whether each token occurs
        if progress['used']:
            bits = np.frombuffer(bytes.fromhex(progress['used']), np.uint8)
            self.used |= np.unpackbits(bits, count=vocab_size).astype(bool)

    def add(self, task, tokens, notes):
        """Add the notes that workers.tokenize() returned for a task."""
        for ids, _, _ in tokens.values():
            self.used[ids] = True
        longest = notes['longest']
        if task.side:  # a part of a long document: the whole counts, at its last part
            (length, where), = longest
            self.progress['length'] = length + (0 if task.starts else self.progress['length'])
            longest = [(self.progress['length'], where)] if task.ends else []
        before = [tuple(entry) for entry in self.progress['longest']]
        self.progress['longest'] = heapq.nlargest(LONGEST, before + longest)
        self.progress['empty'] += notes['empty']
        self.progress['unknown'] += notes['unknown']
        for name, times in notes['literal'].items():
            self.progress['literal'][name] = self.progress['literal'].get(name, 0) + times

    def store(self):
        """Write the figures into `progress`."""
        self.progress['used'] = np.packbits(self.used).tobytes().hex()

    def summary(self, tokens):
        """The figures for print_figures(). tokens: their total number."""
        progress = self.progress
        return {'unused': 1 - self.used.mean(), 'unknown': progress['unknown'] / max(tokens, 1),
                'empty': progress['empty'], 'longest': progress['longest'], 'literal': progress['literal']}


def is_figures(progress):
    """Whether the record of an earlier run has figures that this one can go on with."""
    counts = [progress.get(name, 0) for name in ('empty', 'unknown', 'length')]
    literal, longest = progress.get('literal', {}), progress.get('longest', [])
    if not isinstance(literal, dict) or not isinstance(longest, list):
        return False
    for entry in longest:
        if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[1], str):
            return False
        counts.append(entry[0])
    if not all(type(count) is int for count in (*counts, *literal.values())):
        return False
    used = progress.get('used', '')
    return isinstance(used, str) and re.fullmatch('([0-9a-f]{2})*', used) is not None


def say_untrained(texts, tokenizer):
    """Print a line if bpe:N is trained on texts with a character that sentencepiece cannot be trained on."""
    count = sum(text.count(UNTRAINED) for text in texts)
    if count and tokenizer.startswith('bpe:'):
        print(f'tokenizer={tokenizer}: it is trained without U+2585 ({count:,} in the text), '
              'and encodes it as bytes')


def print_figures(meta, figures):
    """Print the figures in prepare.py's summary. figures: None for a data set that was already complete."""
    if 'entropy' in meta:
        print(f'    the entropy of the source is {meta["entropy"]:.4f} nats a token: no model can do better')
    if not figures:
        return
    print(f'    {figures["unused"]:.1%} of the vocabulary never used; '
          f'{figures["empty"]:,} empty documents left out')
    if figures['unknown']:
        print(f'    {figures["unknown"]:.1%} of the tokens are unknown text that the tokenizer cannot encode')
    for name, times in sorted(figures['literal'].items()):
        if times:
            print(f'    {name} occurs {times:,} times inside documents: '
                  'it is plain text there and ends no document')
    if figures.get('not_read'):
        print(f'    {figures["not_read"]}')
    print('    the longest documents:')
    for length, where in figures['longest']:
        print(f'        {length:>11,} tokens  {printable(where)}')
    print(f'    {figures["seconds"]:.1f} s, '
          f'{figures["speed"]:.1f} MB/s with {figures["num_proc"]} process(es)')
