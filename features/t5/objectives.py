"""
Objectives: turn a row of tokens into a source (the input) and a target (to predict).

    prefix     a row is split at random: the source is its beginning, the target its end
    ul2        denoising (Tay et al. 2022, arXiv 2205.05131): spans of the source are masked, and the target
               contains them. Each row uses one of several denoisers, drawn at random by their weights
    seq2seq    pairs of prepare.py (pairs.py)

An encoder-decoder reads the source with its encoder. A decoder-only model reads the source before the target,
and the loss is computed on the target only. The mask is a function of the integer `noise`, which is a hash of
(seed, sample): in training, the masks differ in each epoch; in validation, they are always the same.
"""
from dataclasses import dataclass

import numpy as np

from batches import Source, splitmix
from configurator import UserError

# regular, sequential, extreme: the first reserved tokens tell the network the denoiser's mode; the sentinels
# of masked spans count down from the last reserved token
MODES = ('R', 'S', 'X')


@dataclass(frozen=True)
class Denoiser:
    span: float  # mean length of a masked span, in tokens; 0 = the end of the row, of a random length
    rate: float  # share of the row that is masked; with span=0 its mean, up to 0.5
    weight: float  # how often
    mode: str = ''  # one of MODES, whose token begins the source; '' = none


DENOISERS = {
    't5': [Denoiser(3, 0.15, 1)],  # Raffel et al. 2020, arXiv 1910.10683
    # UL2R, Tay et al. 2022, arXiv 2210.11399: 25% R, 50% S, 25% X, of long spans or of half the tokens
    'ul2r': [
        Denoiser(3, 0.15, 0.25, 'R'),
        Denoiser(0, 0.25, 0.5, 'S'),
        Denoiser(32, 0.15, 0.125, 'X'),
        Denoiser(3, 0.5, 0.125, 'X')],
    # the seven of UL2's table 1
    'ul2': [
        Denoiser(3, 0.15, 1, 'R'),
        Denoiser(8, 0.15, 1, 'R'),
        Denoiser(0, 0.25, 1, 'S'),
        Denoiser(3, 0.5, 1, 'X'),
        Denoiser(8, 0.5, 1, 'X'),
        Denoiser(64, 0.15, 1, 'X'),
        Denoiser(64, 0.5, 1, 'X')],
}


def parse_denoisers(denoisers):
    """[Denoiser, …] from a name or a list of lists. Raises ValueError."""
    if isinstance(denoisers, str):
        if denoisers not in DENOISERS:
            raise ValueError(f'denoisers={denoisers}: takes {", ".join(DENOISERS)}, or [[span, rate, '
                             'weight, mode], …]')
        return DENOISERS[denoisers]
    if not denoisers:
        raise ValueError('denoisers=[]: give one at least')
    for entry in denoisers:
        if not is_denoiser(entry):
            raise ValueError(f'denoisers: {entry}: takes [span, rate, weight] and perhaps a mode: '
                             'span 0 or at least 1, 0 < rate < 1 (with span 0 up to 0.5), weight above 0, '
                             f'mode one of {", ".join(MODES)}')
    return [Denoiser(*entry) for entry in denoisers]


def is_denoiser(entry):
    """Whether a value is [span, rate, weight] or [span, rate, weight, mode], each in its range."""
    if not isinstance(entry, (list, tuple)) or len(entry) not in (3, 4):
        return False
    if not all(type(number) in (int, float) for number in entry[:3]):
        return False
    span, rate, weight = entry[:3]
    if span != 0 and not 1 <= span < 1e6:
        return False
    if not 0 < rate < 1 or not 0 < weight < 1e6:
        return False
    if span == 0 and rate > 0.5:
        return False
    return len(entry) == 3 or entry[3] in MODES


# -----------------------------------------------------------------------------
# Which objective

@dataclass(frozen=True)
class Objective:
    """The settings of the objective, for Mixture() and open_source() of batches.py."""
    kind: str  # prefix, ul2 or seq2seq
    source_size: int = 0  # tokens that the encoder reads; 0 = a decoder alone
    denoisers: str | list = 'ul2r'
    start: int | None = None  # token with which the decoder beside an encoder begins; None = the end of text


def find_objective(settings, cfg, form=None):
    """
    The Objective of a run; None for next-token prediction in a decoder. settings: train.py's as a dict, or
    those of a stored run; a run from before there were objectives is causal. Weights of others have none: an
    encoder-decoder then reads pairs. cfg: the ModelConfig, or train.py's settings. form: the PromptFormat of
    the model that the run began with; None = random weights.
    """
    source_size = getattr(cfg, 'source_context', 0)
    kind = settings.get('objective', 'seq2seq' if source_size else 'causal')
    if kind == 'causal' and not source_size:
        return None
    start = form.bos[0] if form is not None and form.bos else None
    return Objective(kind, source_size, settings.get('denoisers', 'ul2r'), start)


def open_source_for(objective, name, split, block_size, packing):
    """The Source of a corpus for an Objective. Raises UserError if they do not match."""
    if objective.kind == 'causal':
        raise UserError(f'dataset={name}: objective=causal: leaves the encoder without a source: '
                        'set objective=ul2, prefix or seq2seq, or n_encoder_layer=0')
    if objective.kind == 'seq2seq':
        from features.t5.pairs import PairSource
        return PairSource(objective, name, split, block_size, packing)
    return DenoisingSource(objective, name, split, block_size, packing)


def more_inputs(model, arrays):
    """
    {name: tensor} of the inputs of a batch besides x and y, for the forward pass: an encoder's source (B, S),
    or, for packed pairs, the index of each token's pair (B, T). arrays: a list of one, or of none.
    """
    if not arrays:
        return {}
    name = 'pieces' if getattr(model, 'encoder', None) is None else 'source'
    return {name: arrays[0]}


# -----------------------------------------------------------------------------
# Masking

def count_masked(length, d):
    """(masked tokens, spans) for a row of `length` tokens, at least 2."""
    masked = min(max(round(length * d.rate), 1), length - 1)
    spans = min(max(round(masked / d.span), 1), masked, length - masked)
    return masked, spans


def split_at_random(length, pieces, rng):
    """(pieces,) int64 of at least 1 that sum to `length`; all splits are equally likely."""
    cuts = np.sort(rng.permutation(length - 1)[:pieces - 1]) + 1
    return np.diff(cuts, prepend=0, append=length)


def mask_spans(length, d, rng):
    """Which tokens of a row are masked, (length,) bool: kept pieces and masked spans alternate (as in T5)."""
    masked, spans = count_masked(length, d)
    kept = split_at_random(length - masked, spans, rng)
    lengths = np.stack([kept, split_at_random(masked, spans, rng)], axis=1).ravel()
    return np.repeat(np.arange(2 * spans) % 2 == 1, lengths)


def denoise(tokens, d, rng, reserved, eot):
    """
    (source, target) int64 from a row of tokens (L,). In the source, a sentinel replaces each masked span; the
    target is each sentinel followed by its span. Both end with eot. reserved: (first, last) of the reserved
    tokens.
    """
    first, last = reserved
    mode = []
    if d.mode:
        mode = [first + MODES.index(d.mode)]
    if len(tokens) < 2:
        return np.array([*mode, eot]), np.append(tokens, eot)
    if not d.span:
        longest = max(1, min(len(tokens) - 1, round(2 * d.rate * len(tokens))))
        cut = len(tokens) - rng.integers(1, longest + 1)
        return np.concatenate([mode, tokens[:cut], [eot]]).astype(np.int64), np.append(tokens[cut:], eot)
    mask = mask_spans(len(tokens), d, rng)
    begins = mask & ~np.concatenate([[False], mask[:-1]])  # the first token of each span
    sentinels = last - (np.cumsum(begins) - 1)  # of the span that a token is in
    source = np.where(begins, sentinels, tokens)[begins | ~mask]
    target = np.insert(tokens[mask], np.flatnonzero(begins[mask]), sentinels[begins])
    return np.concatenate([mode, source, [eot]]).astype(np.int64), np.append(target, eot)


class Masking:
    """
    Turns rows of tokens into (source, target), for objective=prefix and ul2. length: tokens per row, as many
    as fit the model. Raises UserError if no row fits or the tokenizer has too few reserved tokens.
    """

    def __init__(self, kind, block_size, source_size, denoisers, meta):
        check_kind(kind)
        self.T, self.S = block_size, source_size
        self.denoisers = [Denoiser(0, 0.5, 1)] if kind == 'prefix' else parse_denoisers(denoisers)
        self.eot = meta.get('eot')
        if self.eot is None:
            raise UserError(f'objective={kind}: the tokenizer of the data set has no end of text: '
                            'prepare it with another')
        count = meta['tokenizer'].get('reserved', 0)
        self.reserved = meta['vocab_size'] - count, meta['vocab_size'] - 1
        self.length = 0
        for length in range(2, 2 * (block_size + source_size)):
            if all(self.fits(length, d) for d in self.denoisers):
                self.length = length
        if not self.length:
            raise UserError(f'block_size={block_size}, source_size={source_size}: no row is short enough for '
                            f'objective={kind}: raise them')
        needed = self.count_reserved()
        if needed > count:
            raise UserError(f'objective=ul2: rows of {self.length} tokens take {needed} reserved tokens, '
                            f'it has {count}: prepare it with --reserve={needed}')
        weights = np.array([d.weight for d in self.denoisers], float)
        # a number below until[n] draws denoiser n or one before it
        self.until = np.cumsum(weights) / weights.sum()

    def fits(self, length, d):
        """Whether the source and the target of a row of `length` tokens fit the model."""
        if d.span:
            masked, spans = count_masked(length, d)
            source = length - masked + spans
        else:
            masked, spans = min(length - 1, round(2 * d.rate * length)), 0  # of the longest target,
            source = length - 1  # and of the longest source
        marks = bool(d.mode) + 1  # the mode and the end of text
        if self.S:
            return source + marks <= self.S and masked + spans + 1 <= self.T
        return length + 2 * spans + marks + 1 <= self.T + 1

    def count_reserved(self):
        """The number of reserved tokens that the rows need: the modes, and a sentinel per span."""
        modes = len(MODES) if any(d.mode for d in self.denoisers) else 0
        spans = [count_masked(self.length, d)[1] for d in self.denoisers if d.span]
        return modes + max(spans, default=0)

    def example(self, tokens, noise):
        """(source, target), int64, from a row of tokens. noise: the random seed for denoiser and mask."""
        rng = np.random.Generator(np.random.PCG64(noise))
        number = int(np.searchsorted(self.until, rng.random(), 'right'))
        d = self.denoisers[min(number, len(self.denoisers) - 1)]
        return denoise(tokens, d, rng, self.reserved, self.eot)


def check_kind(kind):
    """Raise UserError for an objective that has no code here, so that it does not act as another one."""
    if kind not in ('causal', 'prefix', 'ul2', 'seq2seq'):
        raise UserError(f'objective={kind}: has no code in objectives.py: use causal, prefix, ul2 or seq2seq')


# -----------------------------------------------------------------------------
# Rows

class DenoisingSource(Source):
    """A Source whose rows are (source, target), split or masked by a Masking."""

    def __init__(self, objective, name, split, block_size, packing):
        super().__init__(name, split, block_size, packing, bos=())
        try:
            self.masking = Masking(objective.kind, block_size, objective.source_size, objective.denoisers,
                                   self.files.meta)
        except UserError as error:
            raise UserError(f'dataset={name}: {error}') from None
        self.start = self.masking.eot if objective.start is None else objective.start
        self.length = self.stride = self.masking.length
        if packing != 'document':
            self.rows = -(-self.files.tokens // self.stride)  # rounded up

    def row(self, number, noise=0):
        return self.masking.example(super().row(number, noise), splitmix(noise, 1))

    def batch(self, rows, height=0):
        """x, y (B, T), and for an encoder also source (B, S)."""
        if self.masking.S:
            return encoder_batch(rows, self.block_size, self.masking.S, self.start, height)
        x, y, _ = decoder_batch([[row] for row in rows], self.block_size, height)
        return x, y

    def bytes_per_token(self):
        return 0  # a target stands for a part of the text alone


def encoder_batch(examples, T, S, start, height=0):
    """
    x, y (B, T), source (B, S) int64 of B source–target pairs, or `height` if that is more. x begins with the
    token `start`.
    y: -1 where there is no target; source: -1 for padding. A padding row has a source of one token.
    """
    height = max(len(examples), height)
    x, y = np.zeros((height, T), np.int64), np.full((height, T), -1, np.int64)
    sources = np.full((height, S), -1, np.int64)
    sources[len(examples):, 0] = 0
    for n, (source, target) in enumerate(examples):
        x[n, 0] = start
        x[n, 1:len(target)] = target[:-1]
        y[n, :len(target)] = target
        sources[n, :len(source)] = source
    return x, y, sources


def decoder_batch(rows, T, height=0):
    """
    x, y, pieces (B, T) int64 of B rows, each a list of concatenated source–target pairs, or `height` if that
    is more. y: -1 where there is no target. pieces: the index of each token's pair in its row.
    """
    height = max(len(rows), height)
    x, y = np.zeros((height, T), np.int64), np.full((height, T), -1, np.int64)
    pieces = np.zeros((height, T), np.int64)
    for n, pairs in enumerate(rows):
        begin = 0
        for number, (source, target) in enumerate(pairs):
            tokens = np.concatenate([source, target])
            end = begin + len(tokens) - 1
            read = max(0, len(source) - 1)  # tokens after which the next one is no target
            x[n, begin:end] = tokens[:-1]
            y[n, begin + read:end] = tokens[read + 1:]
            pieces[n, end:] = number + 1
            begin = end
    return x, y, pieces
