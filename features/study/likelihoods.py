"""
Log-likelihoods of continuations. Consecutive pairs whose texts begin alike, as the choices of one question,
are read in one row: the common beginning once, then the branches, masked from each other.
An encoder-decoder reads the context with its encoder, once for all choices, and its decoder writes the
continuation.

    score(model, [([1, 5, 9], [7]), ([1, 5, 9], [8, 2])], device, dtype)   # [(nats, greedy), (nats, greedy)]
"""
import math
from dataclasses import dataclass, field

import torch
from tqdm import tqdm

from configurator import UserError
from model import autocast
from sample import NOT_FINITE

CONTEXTS = 'contexts (one for each choice)'  # the word for them in lines about cut contexts
# per batch: on a CPU, activations that fit its caches; a tenth faster than 8192
BATCH_TOKENS = {'cpu': 1024, 'cuda': 8192}

# -----------------------------------------------------------------------------
# Rows

@dataclass
class Branch:
    """A context and its continuation."""
    number: int  # in the list of pairs
    ids: list[int]  # of both, without what does not fit; with a source, of the continuation alone
    length: int  # tokens of the continuation
    source: list[int] | None = None  # the context, if an encoder reads it
    places: list[int] = field(default_factory=list)  # in the row, of the tokens that predict it

    def targets(self):
        return self.ids[len(self.ids) - self.length:]


@dataclass
class Row:
    """One row of a batch: the common beginning of its branches, then the rest of each."""
    branches: list[Branch]
    shared: int  # tokens of the common beginning
    size: int  # tokens in all. The last token of a branch predicts nothing, so it is not read

    def join(self, branch, block_size):
        """Take in a branch if that saves a quarter of its tokens and the row still fits. Returns whether."""
        length = len(branch.ids) - 1
        shared = min(self.shared, begin_alike(self.branches[0].ids[:-1], branch.ids[:-1]))
        size = self.size + (len(self.branches) - 1) * (self.shared - shared) + length - shared
        if size > min(block_size, self.size + 0.75 * length):
            return False
        self.branches.append(branch)
        self.shared = shared
        self.size = size
        return True

    def layout(self):
        """Lists of the row's tokens: ids, positions, numbers of their branches. Sets the branches' places."""
        ids = self.branches[0].ids[:self.shared]
        positions = list(range(self.shared))
        owners = [0] * self.shared
        for number, branch in enumerate(self.branches, 1):
            rest = branch.ids[self.shared:-1]
            places = [*range(self.shared), *range(len(ids), len(ids) + len(rest))]
            branch.places = places[len(places) - branch.length:]
            ids = ids + rest
            positions += range(self.shared, self.shared + len(rest))
            owners += [number] * len(rest)
        return ids, positions, owners


def begin_alike(a, b):
    """The number of tokens that two lists have in common at their beginnings."""
    for n, (x, y) in enumerate(zip(a, b)):
        if x != y:
            return n
    return min(len(a), len(b))


def can_share(cfg):
    """Whether branches can be masked from each other: position and mask of each token are given to blocks."""
    return cfg.position in ('rope', 'learned', 'none')


def rows_of(branches, cfg):
    """
    The Rows of a list of Branches. A branch joins the row of the one before it if that saves tokens and the
    row still fits the context.
    """
    rows = []
    may_share = can_share(cfg)
    for branch in branches:
        if not (rows and may_share and rows[-1].join(branch, cfg.block_size)):
            length = len(branch.ids) - 1
            rows.append(Row([branch], length, length))
    return rows


# -----------------------------------------------------------------------------
# Rows of an encoder-decoder

@dataclass
class Question:
    """Branches of one source."""
    branches: list[Branch]

    @property
    def source(self):
        return self.branches[0].source

    @property
    def size(self):
        """Tokens in all: every continuation looks at a copy of the source."""
        return sum(len(branch.source) + branch.length for branch in self.branches)


def questions_of(branches):
    """The Questions of a list of Branches. A branch joins the one before it if their sources are equal."""
    questions = []
    for branch in branches:
        if questions and questions[-1].source == branch.source:
            questions[-1].branches.append(branch)
        else:
            questions.append(Question([branch]))
    return questions


# -----------------------------------------------------------------------------
# Scores

@torch.no_grad()
def score(model, pairs, device, dtype, batch_tokens=0, what='scored', cuts=None, start=0):
    """
    [(log-likelihood of the continuation in nats, whether greedy decoding would generate it)] of pairs (ids of
    a context, ids of a continuation), in their order.
    The longest rows go first, rows of similar length together. Only the positions that predict a continuation
    pass through the head, which saves most of the time with a large vocabulary.
    A context that is too long is truncated at its beginning. cuts: the Cuts that counts this, for a caller
    that reports it; without one, a line reports it here. start: the token with which the decoder of an
    encoder-decoder begins.
    Raises UserError for a continuation that is longer than the context length of the model, and for a
    log-likelihood that is not finite.
    """
    from features.text.cuts import Cuts
    cfg = model.cfg
    has_encoder = cfg.n_encoder_layer > 0
    T = cfg.target_limit if has_encoder else cfg.block_size
    batch_tokens = batch_tokens or BATCH_TOKENS.get(device.type, 8192)
    own = Cuts(CONTEXTS) if cuts is None else cuts
    branches = []
    for n, (context, continuation) in enumerate(pairs):
        length = len(continuation)
        if length > T:
            raise UserError(f'a continuation of {length} tokens is longer than the {T} that the '
                            'network reads')
        if has_encoder:
            own.add(len(context), cfg.source_limit)
            branches.append(Branch(n, continuation, length, context[-cfg.source_limit:]))
        else:
            own.add(len(context), T + 1 - length)
            branches.append(Branch(n, (context + continuation)[-T - 1:], length))
    rows = questions_of(branches) if has_encoder else rows_of(branches, cfg)
    rows.sort(key=lambda row: (-row.size, row.branches[0].ids))
    out = [None] * len(branches)
    with tqdm(total=len(branches), desc=what, disable=None, leave=False) as bar:
        while rows:
            count = max(1, batch_tokens // max(1, rows[0].size))
            batch = rows[:count]
            rows = rows[count:]
            if has_encoder:
                found = score_questions(model, batch, start, device, dtype)
            else:
                found = score_batch(model, batch, device, dtype)
            for number, result in found:
                if not math.isfinite(result[0]):
                    raise UserError(f'{what}: the log-likelihood of item {number} is {result[0]}: '
                                    f'{NOT_FINITE}')
                out[number] = result
                bar.update()
    if own.cut and cuts is None:
        reads = f'encoder reads {cfg.source_limit}' if has_encoder else f'network reads {T}'
        print(f'{what}: the {reads} tokens: {own.line()}', flush=True)
    return out


def score_batch(model, rows, device, dtype):
    """[(number of a branch, its result in score())] of a batch of Rows, the widest first."""
    width = rows[0].size
    x = torch.zeros(len(rows), width, dtype=torch.int64)  # (B, width)
    positions = torch.zeros_like(x)
    owners = torch.zeros_like(x)
    for n, row in enumerate(rows):
        ids, numbers, owner = row.layout()
        x[n, :len(ids)] = torch.tensor(ids)
        positions[n, :len(ids)] = torch.tensor(numbers)
        owners[n, :len(ids)] = torch.tensor(owner)
    asked = []  # places in the batch, as one list of B·width tokens
    targets = []
    for n, row in enumerate(rows):
        for branch in row.branches:
            asked += [n * width + place for place in branch.places]
            targets += branch.targets()
    tree = None
    if any(len(row.branches) > 1 for row in rows):
        tree = Branches(positions.to(device), owners.to(device), model.cfg.window)
    # a place in a common beginning may be asked for by several branches
    places, which = torch.tensor(asked).to(device).unique(return_inverse=True)
    targets = torch.tensor(targets).to(device)  # (all asked,)
    with autocast(device, dtype):
        hidden = model.hidden(x.to(device), tree).flatten(0, 1)  # (B·width, C)
        logits = model.logits(hidden[places])  # (places, V)
    # not logsumexp, which is nearer to the truth by 1e-5 a token: lm-eval takes log_softmax
    nats = logits.log_softmax(-1)[which, targets]
    greedy = logits.argmax(-1)[which] == targets
    return results([branch for row in rows for branch in row.branches], nats, greedy)


def score_questions(model, questions, start, device, dtype):
    """[(number of a branch, its result in score())] of a batch of Questions."""
    from features.t5.network import EncoderOutput
    from features.t5.sampling import pad
    branches = [branch for question in questions for branch in question.branches]
    which = [n for n, question in enumerate(questions) for _ in question.branches]
    x = torch.zeros(len(branches), max(branch.length for branch in branches), dtype=torch.int64)  # (B, T)
    is_asked = torch.zeros_like(x, dtype=torch.bool)
    for n, branch in enumerate(branches):
        x[n, :branch.length] = torch.tensor([start, *branch.ids[:-1]])
        is_asked[n, :branch.length] = True
    targets = torch.tensor([token for branch in branches for token in branch.ids])
    with autocast(device, dtype):
        encoded = model.encode(pad([question.source for question in questions], device))
        encoded = EncoderOutput(*(t[which] for t in encoded))  # a row for every branch
        hidden = model.hidden(x.to(device), encoded=encoded)  # (B, T, C)
        logits = model.logits(hidden[is_asked.to(device)])  # (all asked, V)
    targets = targets.to(device)
    nats = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    return results(branches, nats, logits.argmax(-1) == targets)


def results(branches, nats, greedy):
    """
    [(number of a branch, its result in score())]. nats, greedy: of the tokens of the branches' continuations,
    one after another.
    """
    lengths = [branch.length for branch in branches]
    out = []
    for branch, its_nats, its_greedy in zip(branches, nats.split(lengths), greedy.split(lengths)):
        out.append((branch.number, (its_nats.double().sum().item(), bool(its_greedy.all()))))
    return out


class Branches:
    """
    In the place of a KVCache: positions of the tokens and masks, for rows with branches. Keeps nothing.
    positions, owners: (B, T), as Row.layout() has them. window: as in ModelConfig.
    """

    def __init__(self, positions, owners, window):
        self.positions = positions
        seen = (owners[:, None, :] == 0) | (owners[:, None, :] == owners[:, :, None])
        self.mask = seen.tril()[:, None]  # (B, 1, T, T)
        distance = positions[:, :, None] - positions[:, None, :]
        self.local_mask = self.mask & (distance < window)[:, None]  # of blocks with a window

    def update(self, layer, k, v):
        return k, v
