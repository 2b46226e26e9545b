"""
Rows of conversations, from the data sets that prepare.py makes with --messages. Only the assistant's turns
are targets.

A row holds as many conversations as fit, masked from each other (packing=document: one per row); those of a
row are the same in every epoch. A conversation that is longer than a row is cut at its end. train.py prints
how many are.
"""
import os
from bisect import bisect_right

import numpy as np

from batches import VERIFY_UP_TO, DataFile, Source, is_count
from configurator import UserError


class ChatSource(Source):
    """A Source whose rows are lists of conversations, each (tokens, mask) of the same length."""

    def __init__(self, name, split, block_size, packing, objective):
        super().__init__(name, split, block_size, packing, bos=())
        if objective is not None:
            raise UserError(f'dataset={name}: holds conversations, which train a decoder with '
                            'objective=causal: leave objective out')
        check_meta(self.files)
        self.masks = [open_mask(self.files, shard) for shard in self.files.shards]
        lengths = np.minimum(np.diff(self.files.bounds), self.length)
        self.targets = self.count_targets()
        found = np.flatnonzero(self.targets)  # the others would train nothing
        if not len(found):
            raise UserError(f'{self.files.folder}: no turn of the assistant fits block_size={block_size} '
                            f'in its {split} split: raise block_size')
        if packing == 'document':
            self.packed, self.until = found, np.arange(len(found)) + 1
        else:
            from features.t5.pairs import pack
            self.packing = 'conversations'
            order, self.until = pack(lengths[found] - 1, block_size)
            self.packed = found[order]
        self.rows = len(self.until)

    def count_targets(self):
        """The number of targets in each conversation, cut to a row, (documents,) int64."""
        counts, bounds = [], self.files.bounds
        for number, file in enumerate(self.masks):
            first, end = self.files.starts[number:number + 2]
            starts = bounds[np.searchsorted(bounds, first):np.searchsorted(bounds, end)] - first
            ends = np.minimum(np.append(starts[1:], end - first), starts + self.length)
            mask = np.append(np.frombuffer(file.read(0, end - first), np.uint8), 0)
            # reduceat() sums from each number to the next: from a start to its end, and on to the next start
            spans = np.stack([np.minimum(starts + 1, ends), ends], axis=1).ravel()
            counts.append(np.add.reduceat(mask, spans, dtype=np.int64)[::2] * (ends - starts > 1))
        return np.concatenate(counts)

    def row(self, number, noise=0):
        first = self.until[number - 1] if number else 0
        return [self.conversation(n) for n in self.packed[first:self.until[number]]]

    def conversation(self, number):
        """(tokens, mask), int64 and uint8, of a conversation, cut to a row."""
        first, end = self.files.document(number)
        tokens = self.files.read(first, min(end - first, self.length))
        shard = bisect_right(self.files.starts, first) - 1
        data = self.masks[shard].read(first - self.files.starts[shard], len(tokens))
        return tokens, np.frombuffer(data, np.uint8)

    def batch(self, rows, height=0):
        """
        x, y and, where a row holds several, pieces (B, T) int64. y: -1 for all but the assistant's tokens.
        pieces: the index of each token's conversation in its row.
        """
        shape = max(len(rows), height), self.block_size
        x, y, pieces = np.zeros(shape, np.int64), np.full(shape, -1, np.int64), np.zeros(shape, np.int64)
        for n, conversations in enumerate(rows):
            begin = 0
            for number, (tokens, mask) in enumerate(conversations):
                end = begin + len(tokens) - 1
                x[n, begin:end] = tokens[:-1]
                y[n, begin:end] = np.where(mask[1:], tokens[1:], -1)
                pieces[n, end:] = number + 1
                begin = end
        return (x, y) if self.packing == 'document' else (x, y, pieces)

    def tokens_per_row(self):
        return float(self.targets.sum() / self.rows)

    def bytes_per_token(self):
        return 0  # the targets stand for a part of the text alone

    def too_long(self):
        """A line about conversations that are cut; '' if all fit."""
        lengths = np.diff(self.files.bounds)
        cut, silent = int((lengths > self.length).sum()), int((self.targets == 0).sum())
        if not cut:
            return ''
        line = (f'{self.name}, {self.files.split}: {cut:,} of {len(lengths):,} conversations are longer than '
                f'{self.length} tokens and are cut there; the longest has {lengths.max():,}')
        return line + f'; {silent:,} keep no turn of the assistant and are left out' * bool(silent)


def check_meta(files):
    """Raise UserError for an invalid field of meta.json that only conversations have."""
    chat, path = files.meta['chat'], os.path.join(files.folder, 'meta.json')
    is_valid = (type(chat) is dict and type(chat.get('chat_template')) is str
                and type(chat.get('names')) is dict and type(chat.get('ends')) is list
                and all(is_count(token) and token < files.vocab_size for token in chat['ends'])
                and all(type(shard.get('mask_sha256')) is str for shard in files.shards))
    if not is_valid:
        raise UserError(f'{path}: chat has an invalid value: prepare the data set again')


def open_mask(files, shard):
    """The mask file of a shard, checked like the others."""
    path = os.path.join(files.folder, shard['file'].removesuffix('.bin') + '.mask')
    size = shard['bytes_on_disk'] // files.dtype.itemsize
    return DataFile(path, size, shard['mask_sha256'], size <= VERIFY_UP_TO)
