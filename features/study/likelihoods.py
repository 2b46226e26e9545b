"""
Log-likelihoods of continuations. Consecutive pairs whose texts begin alike, as the choices of one question,
are read in one row: the common beginning once, then the branches, masked from each other.

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
    ids: list[int]  # of both, without what does not fit
    length: int  # tokens of the continuation
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
# Scores

@torch.no_grad()
def score(model, pairs, device, dtype, batch_tokens=0, what='scored', cuts=None):
    """
    [(log-likelihood of the continuation in nats, whether greedy decoding would generate it)] of pairs (ids of
    a context, ids of a continuation), in their order.
    The longest rows go first, rows of similar length together. Only the positions that predict a continuation
    pass through the head, which saves most of the time with a large vocabulary.
    A context that is too long is truncated at its beginning. cuts: the Cuts that counts this, for a caller
    that reports it; without one, a line reports it here.
    Raises UserError for a continuation that is longer than the context length of the model, and for a
    log-likelihood that is not finite.
    """
    from features.text.cuts import Cuts
    T = model.cfg.block_size
    batch_tokens = batch_tokens or BATCH_TOKENS.get(device.type, 8192)
    own = Cuts(CONTEXTS) if cuts is None else cuts
    branches = []
    for n, (context, continuation) in enumerate(pairs):
        if len(continuation) > T:
            raise UserError(f'a continuation of {len(continuation)} tokens is longer than the {T} that the '
                            'network reads')
        own.add(len(context), T + 1 - len(continuation))
        branches.append(Branch(n, (context + continuation)[-T - 1:], len(continuation)))
    rows = rows_of(branches, model.cfg)
    rows.sort(key=lambda row: (-row.size, row.branches[0].ids))
    out = [None] * len(branches)
    with tqdm(total=len(branches), desc=what, disable=None, leave=False) as bar:
        while rows:
            count = max(1, batch_tokens // max(1, rows[0].size))
            batch = rows[:count]
            rows = rows[count:]
            for number, result in score_batch(model, batch, device, dtype):
                if not math.isfinite(result[0]):
                    raise UserError(f'{what}: the log-likelihood of item {number} is {result[0]}: '
                                    f'{NOT_FINITE}')
                out[number] = result
                bar.update()
    if own.cut and cuts is None:
        print(f'{what}: the network reads {T} tokens: {own.line()}', flush=True)
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
    branches = [branch for row in rows for branch in row.branches]
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
