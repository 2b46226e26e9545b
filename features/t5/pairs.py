"""
Source–target pairs, objective=seq2seq: rows of the data sets that prepare.py makes with --source=FIELD
--target=FIELD.

A pair that is too long is truncated, each side at its end. An encoder has room for source_size tokens, its
decoder for block_size. A decoder-only model has room for block_size + 1 tokens in total: each side gets half,
plus what the other side does not need. So a long target never displaces its source. train.py prints how many
pairs are truncated.

A row of a decoder holds as many pairs as fit, masked from each other (packing=document: one pair per row);
the pairs of a row are the same in every epoch. An encoder reads one pair per row.
"""
from bisect import bisect_left, insort

import numpy as np

from batches import Source
from configurator import UserError
from features.t5.objectives import decoder_batch, encoder_batch

LOOK_AT = 5000  # pairs read at the start, at most, to count those that are cut (0.1 s)


class PairSource(Source):
    """A Source whose rows are pairs: (source, target), or a list of those packed into one row."""

    def __init__(self, objective, name, split, block_size, packing):
        super().__init__(name, split, block_size, packing, bos=())
        self.source_size = objective.source_size
        self.eot = self.files.meta.get('eot')
        self.start = self.eot if objective.start is None else objective.start
        if not self.files.meta.get('pairs'):
            raise UserError(f'dataset={name}: objective=seq2seq: there are no pairs in it: '
                            'prepare it with --source=FIELD --target=FIELD')
        if self.source_size == 1:
            raise UserError(f'dataset={name}: source_size=1: has no room for a source, '
                            'only for its end: raise it')
        if not self.source_size and block_size < 3:
            raise UserError(f'dataset={name}: block_size={block_size}: '
                            'has no room for a source and a target: raise it')
        if self.source_size or packing == 'document':
            self.packing, self.rows = 'document', self.files.documents
        else:
            lengths = np.minimum(np.diff(self.files.bounds), block_size + 1) - 1
            self.packing, (self.packed, self.until) = 'pairs', pack(lengths, block_size)
            self.rows = len(self.until)

    def row(self, number, noise=0):
        if self.packing == 'document':
            return self.pair(number)
        first = self.until[number - 1] if number else 0
        return [self.pair(n) for n in self.packed[first:self.until[number]]]

    def pair(self, number):
        """(source, target), int64, of pair `number`, truncated to fit."""
        return cut_pair(self.tokens(number), self.block_size, self.source_size, self.eot)

    def tokens(self, number):
        first, end = self.files.document(number)
        return self.files.read(first, end - first)

    def batch(self, rows, height=0):
        """x, y (B, T), for an encoder also source (B, S), for packed pairs also pieces (B, T)."""
        if self.source_size:
            return encoder_batch(rows, self.block_size, self.source_size, self.start, height)
        if self.packing == 'pairs':
            return decoder_batch(rows, self.block_size, height)
        x, y, _ = decoder_batch([[row] for row in rows], self.block_size, height)
        return x, y

    def bytes_per_token(self):
        return 0  # a target stands for a part of the text alone

    def too_long(self):
        """A line about truncated pairs, '' if all fit. Reads at most LOOK_AT of the long ones."""
        from features.text.cuts import Cuts
        T, S = self.block_size, self.source_size
        shortest = min(S, T) + 1 if S else T + 2  # pair that may be cut, in tokens
        numbers, seen = np.flatnonzero(np.diff(self.files.bounds) >= shortest), self.files.documents
        if len(numbers) > LOOK_AT:
            numbers = numbers[:LOOK_AT]
            seen = int(numbers[-1]) + 1
        sources, targets = Cuts('sources', seen - len(numbers)), Cuts('targets', seen - len(numbers))
        count = 0
        for number in numbers:
            tokens = self.tokens(number)
            source = source_length(tokens, self.eot)
            target = len(tokens) - source
            for_source, for_target = share_room(T, S, source, target)
            sources.add(source, for_source)
            targets.add(target, for_target)
            count += source > for_source or target > for_target
        if not count:
            return ''
        of = f'{seen:,}' if seen == self.files.documents else f'the first {seen:,}'
        sizes = f'block_size={T}, source_size={S}' if S else f'block_size={T}'
        lines = '; '.join(cuts.line() for cuts in (sources, targets) if cuts.cut)
        return f'{self.name}, {self.files.split}: {count:,} of {of} pairs do not fit {sizes}: {lines}'


def cut_pair(tokens, block_size, source_size, eot):
    """(source, target), int64, from the tokens of a pair, truncated to fit a row."""
    length = source_length(tokens, eot)
    source, target = tokens[:length], tokens[length:]
    for_source, for_target = share_room(block_size, source_size, len(source), len(target))
    if len(source) > for_source:
        source = np.append(source[:for_source - 1], eot)
    return source, target[:for_target]


def source_length(tokens, eot):
    """The length of the source in a pair's tokens: up to and including the first end-of-text token."""
    return int(np.flatnonzero(tokens == eot)[0]) + 1


def share_room(block_size, source_size, source, target):
    """(room for the source, room for the target) in a row, in tokens; source, target: their lengths."""
    if source_size:
        return source_size, block_size
    row = block_size + 1  # the last token is written, never read
    for_source = max(row - row // 2, row - target)
    return for_source, row - min(source, for_source)


def pack(lengths, room):
    """
    Pack `lengths` into rows of `room`: (their indices, row after row; the end of each row), int64. Best-fit
    decreasing: the longest first, each into the fullest row with enough room (at most 11/9 of the optimal
    number of rows, Johnson et al. 1974, SIAM J. Comput. 3).
    """
    # spaces: the room left in rows, sorted; with_space: the rows that have it
    rows, with_space, spaces = [], {}, []
    for number in np.argsort(-lengths, kind='stable').tolist():
        at = bisect_left(spaces, lengths[number])
        if at < len(spaces):
            space = spaces[at]
            row = with_space[space].pop()
            if not with_space[space]:
                del spaces[at]
        else:
            space, row = room, len(rows)
            rows.append([])
        rows[row].append(number)
        left = space - int(lengths[number])
        if not with_space.setdefault(left, []):
            insort(spaces, left)
        with_space[left].append(row)
    rows.sort(key=min)  # in the order of the files, as other rows are
    return np.concatenate(rows).astype(np.int64), np.cumsum([len(row) for row in rows])
