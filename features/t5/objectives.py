"""
What a row of tokens asks of a network: a source to be read and a target to be written.

    causal     nothing is read, the row is written
    prefix     a row is cut anywhere; its beginning is read, its end written
    ul2        denoising (Tay et al. 2022, arXiv 2205.05131): what is masked is written. Each row has one of several denoisers, by their weights
    seq2seq    prepare.py's pairs: the source is read, the target written

An encoder-decoder reads with its encoder; a decoder alone reads the source before the target, and its loss is of the target only. What
is masked is a function of the number `noise`, and that of (seed, sample): every epoch masks anew, validation always the same.

Pairs that are too long are cut, each side at its end. An encoder reads source_size tokens, and block_size
tokens are written. A decoder alone has block_size + 1 tokens for both: each side has half of them, and what
the other leaves. So a long target never takes the place of the source that it answers. train.py says at its
start how many are cut.
"""
from dataclasses import dataclass
from typing import Literal

import numpy as np

from configurator import UserError

MODES = ('R', 'S', 'X')  # regular, sequential, extreme: the first reserved tokens say to the network which it is; sentinels count down from the last one


@dataclass(frozen=True)
class Denoiser:
    span: float  # mean length of what is masked in one piece, in tokens; 0: the end of the row, of a random length
    rate: float  # share of the row that is masked; with span 0 its mean, up to 0.5
    weight: float  # how often
    mode: str = ''  # one of MODES, whose token begins the source; '' = none


DENOISERS = {
    't5': [Denoiser(3, 0.15, 1)],  # Raffel et al. 2020, arXiv 1910.10683
    # UL2R, Tay et al. 2022, arXiv 2210.11399: 25% R, 50% S, 25% X, of long spans or of half the tokens
    'ul2r': [Denoiser(3, 0.15, 0.25, 'R'), Denoiser(0, 0.25, 0.5, 'S'), Denoiser(32, 0.15, 0.125, 'X'), Denoiser(3, 0.5, 0.125, 'X')],
    # the seven of UL2's table 1
    'ul2': [*(Denoiser(span, 0.15, 1, 'R') for span in (3, 8)), Denoiser(0, 0.25, 1, 'S'),
            *(Denoiser(span, rate, 1, 'X') for span, rate in ((3, 0.5), (8, 0.5), (64, 0.15), (64, 0.5)))],
}


@dataclass
class ObjectiveConfig:
    objective: Literal['causal', 'prefix', 'ul2', 'seq2seq'] = 'causal'  # what is trained: the next token; the end of a row after its beginning; what was
    # masked, of which prepare.py --reserve=100 makes the tokens; or the targets of prepare.py --source=…
    # --target=…, each after its source
    denoisers: str | list = 'ul2r'  # of objective=ul2: t5, ul2r, ul2, or [[span, rate, weight, mode], …] as in objectives.py

    def check(self):
        """Raise ValueError for what is no list of denoisers."""
        parse(self.denoisers)


def parse(denoisers):
    """[Denoiser, …] of a name or a list of lists. Raises ValueError."""
    if isinstance(denoisers, str):
        if denoisers not in DENOISERS:
            raise ValueError(f'denoisers={denoisers}: takes {", ".join(DENOISERS)}, or [[span, rate, weight, mode], …]')
        return DENOISERS[denoisers]
    out = []
    for entry in denoisers:
        sound = isinstance(entry, (list, tuple)) and len(entry) in (3, 4) and all(type(n) in (int, float) for n in entry[:3])
        sound = sound and (entry[0] == 0 or 1 <= entry[0] < 1e6) and 0 < entry[1] < 1 and 0 < entry[2] < 1e6
        sound = sound and (entry[0] or entry[1] <= 0.5)
        if not sound or list(entry[3:]) not in ([], *([mode] for mode in MODES)):
            raise ValueError(f'denoisers: {entry}: takes [span, rate, weight] and perhaps a mode: span 0 or at least 1, 0 < rate < 1 (with span 0 up to 0.5), '
                             f'weight above 0, mode one of {", ".join(MODES)}')
        out.append(Denoiser(*entry))
    if not out:
        raise ValueError('denoisers=[]: give one at least')
    return out


# -----------------------------------------------------------------------------
# Masking

def counts(length, d):
    """(masked tokens, spans) of a row of `length` tokens, at least 2."""
    masked = min(max(round(length * d.rate), 1), length - 1)
    return masked, min(max(round(masked / d.span), 1), masked, length - masked)


def part(length, pieces, rng):
    """`length` in so many random pieces of at least 1, every way alike likely: int64 (pieces,)."""
    cuts = np.sort(rng.permutation(length - 1)[:pieces - 1]) + 1
    return np.diff(cuts, prepend=0, append=length)


def masked(length, d, rng):
    """Which tokens of a row are masked, bool (length,): pieces that stay and spans in turn, beginning with one that stays (T5's way)."""
    number, spans = counts(length, d)
    lengths = np.stack([part(length - number, spans, rng), part(number, spans, rng)], axis=1).ravel()
    return np.repeat(np.arange(2 * spans) % 2 == 1, lengths)


def denoise(tokens, d, rng, reserved, eot):
    """
    (source, target) of tokens (L,) int64: every masked span is one sentinel in the source, and itself after its sentinel in the target; both end with
    eot. reserved: (first, last) of the reserved tokens.
    """
    first, last = reserved
    mode = [first + MODES.index(d.mode)] if d.mode else []
    if len(tokens) < 2:
        return np.array([*mode, eot]), np.append(tokens, eot)
    if not d.span:
        cut = len(tokens) - rng.integers(1, max(2, min(len(tokens), round(2 * d.rate * len(tokens)) + 1)))
        return np.concatenate([mode, tokens[:cut], [eot]]).astype(np.int64), np.append(tokens[cut:], eot)
    mask = masked(len(tokens), d, rng)
    begins = mask & ~np.concatenate([[False], mask[:-1]])
    sentinels = last - (np.cumsum(begins) - 1)  # of the span that a token is in
    source = np.where(begins, sentinels, tokens)[begins | ~mask]
    target = np.insert(tokens[mask], np.flatnonzero(begins[mask]), sentinels[begins])
    return np.concatenate([mode, source, [eot]]).astype(np.int64), np.append(target, eot)


# -----------------------------------------------------------------------------
# Rows

class Objective:
    """
    Rows of tokens → what the network is trained on. length: tokens of a row to be read; stride: from where one row begins to where the next does;
    is_pairs: a row is a whole document.
    """

    def __init__(self, kind, block_size, source_size=0, denoisers='ul2r', meta=None):
        meta = meta or {}
        check_kind(kind)
        self.kind, self.T, self.S, self.is_pairs = kind, block_size, source_size, kind == 'seq2seq'
        self.length, self.stride = block_size + 1, block_size
        if kind == 'causal' and source_size:
            raise UserError('objective=causal: gives an encoder nothing to read: set objective=ul2, prefix or seq2seq, or n_encoder_layer=0')
        if kind in ('causal', 'seq2seq'):
            if self.is_pairs and not meta.get('pairs'):
                raise UserError('objective=seq2seq: there are no pairs in it: prepare it with --source=FIELD --target=FIELD')
            if self.is_pairs and source_size == 1:
                raise UserError('source_size=1: has no room for a source, only for its end: raise it')
            if self.is_pairs and not source_size and block_size < 3:
                raise UserError(f'block_size={block_size}: has no room for a source and a target: raise it')
            self.eot = meta.get('eot')
            return
        self.denoisers, self.eot = [Denoiser(0, 0.5, 1)] if kind == 'prefix' else parse(denoisers), meta.get('eot')
        if self.eot is None:
            raise UserError(f'objective={kind}: the tokenizer of the data set has no end of text: prepare it with another')
        count = meta['tokenizer'].get('reserved', 0)
        self.reserved = meta['vocab_size'] - count, meta['vocab_size'] - 1
        fitting = [n for n in range(2, 2 * (block_size + source_size)) if all(self.fits(n, d) for d in self.denoisers)]
        if not fitting:
            raise UserError(f'block_size={block_size}, source_size={source_size}: no row is short enough for objective={kind}: raise them')
        self.length = self.stride = fitting[-1]
        needed = len(MODES) * any(d.mode for d in self.denoisers) + max([counts(self.length, d)[1] for d in self.denoisers if d.span], default=0)
        if needed > count:
            raise UserError(f'objective=ul2: rows of {self.length} tokens take {needed} reserved tokens, it has {count}: prepare it with '
                            f'--reserve={needed}')
        weights = np.array([d.weight for d in self.denoisers], float)
        self.until = np.cumsum(weights) / weights.sum()

    def fits(self, length, d):
        number, spans = counts(length, d) if d.span else (min(length - 1, round(2 * d.rate * length)), 0)
        source = length - (number if d.span else 1) + spans + bool(d.mode) + 1
        target = number + spans + 1
        if self.S:
            return source <= self.S and target <= self.T
        return length + 2 * spans + bool(d.mode) + 2 <= self.T + 1

    def source_length(self, tokens):
        """How many of the tokens of a pair are its source, with the end of text after it."""
        return int(np.flatnonzero(tokens == self.eot)[0]) + 1

    def pair_room(self, source, target):
        """(room for the source, room for the target) in a row, in tokens. source, target: their lengths."""
        if self.S:
            return self.S, self.T
        row = self.T + 1  # the last token is written, never read
        for_source = max(row - row // 2, row - target)
        return for_source, row - min(source, for_source)

    def example(self, tokens, noise):
        """(source, target), int64, of the tokens of a row."""
        if self.kind == 'causal':
            return tokens[:0], tokens
        if self.is_pairs:
            length = self.source_length(tokens)
            source, target = tokens[:length], tokens[length:]
            for_source, for_target = self.pair_room(len(source), len(target))
            if len(source) > for_source:
                source = np.append(source[:for_source - 1], self.eot)
            return source, target[:for_target]
        rng = np.random.Generator(np.random.PCG64(noise))
        d = self.denoisers[min(int(np.searchsorted(self.until, rng.random(), 'right')), len(self.denoisers) - 1)]
        return denoise(tokens, d, rng, self.reserved, self.eot)

    def batch(self, examples, height=0, is_packed=False):
        """
        x, y (B, T) int64, and with an encoder source (B, S), also to `height` rows; or, is_packed, of lists of examples that share a row, pieces (B, T):
        which one of them a token is of. y: -1 where there is no target, source: -1 where a row is at its end (a row of padding alone has one token to read).
        """
        height = max(len(examples), height)
        x, y = np.zeros((height, self.T), np.int64), np.full((height, self.T), -1, np.int64)
        if not self.S:
            pieces = np.zeros((height, self.T), np.int64)
            for n, together in enumerate(examples if is_packed else [[example] for example in examples]):
                begin = 0
                for piece, (source, target) in enumerate(together):
                    row, read = np.concatenate([source, target]), max(0, len(source) - 1)
                    end = begin + len(row) - 1
                    x[n, begin:end], y[n, begin + read:end], pieces[n, end:] = row[:-1], row[read + 1:], piece + 1
                    begin = end
            return (x, y, pieces) if is_packed else (x, y)
        sources = np.full((height, self.S), -1, np.int64)
        sources[len(examples):, 0] = 0
        for n, (source, target) in enumerate(examples):
            x[n, 0], x[n, 1:len(target)], y[n, :len(target)] = self.eot, target[:-1], target
            sources[n, :len(source)] = source
        return x, y, sources


def check_kind(kind):
    """Raise UserError for an objective that no code here acts on: it must not work as another one in silence."""
    if kind not in ('causal', 'prefix', 'ul2', 'seq2seq'):
        raise UserError(f'objective={kind}: has no code in objectives.py: use causal, prefix, ul2 or seq2seq')


def around(kind, denoisers, meta):
    """(ids before, ids after) a text that a network trained so is to read before it writes; of meta.json vocab_size, eot and tokenizer are looked at."""
    check_kind(kind)
    if kind == 'causal':
        return (), ()
    is_marked = kind == 'ul2' and any(d.mode == 'S' for d in parse(denoisers))
    first = meta['vocab_size'] - meta['tokenizer'].get('reserved', 0)
    return (first + MODES.index('S'),) * is_marked, (meta['eot'],)


def stored_begin(state):
    """(id,) of the start token that a network was trained with, from its state.json; () if there was none."""
    return tuple(state.get('begin', ()))


def make_objective(s, meta):
    """The Objective of train.py's settings for a data set with this meta.json. Raises UserError where they do not fit."""
    return Objective(s.objective, s.block_size, getattr(s, 'source_context', 0), s.denoisers, meta)


def stored_objective(settings, cfg, meta):
    """The same of a network's ModelConfig and the settings that its run stored; one from before there were objectives is causal."""
    return Objective(settings.get('objective', 'causal'), cfg.block_size, getattr(cfg, 'source_context', 0), settings.get('denoisers', 'ul2r'), meta)
