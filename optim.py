"""
Parameter groups, the optimizer and the learning rate's schedule.
"""
import math
import re
from dataclasses import dataclass, field, fields
from typing import Literal

import torch

from configurator import UserError
from features.scale.shard import is_divided, part, whole


@dataclass
class OptimConfig:
    learning_rate: float = 6e-4  # the highest one
    max_iters: int = 10000  # steps; a step is one update of the weights
    schedule: Literal['cosine', 'linear', 'wsd'] = 'cosine'  # how the rate falls to min_lr; wsd: constant, then linear over the last cooldown
    decay_lr: bool = True  # False: constant from step 0, as in nanoGPT, unless warmup_iters is given
    warmup_iters: int | None = None  # linear warm-up; None = 5% of max_iters, at most 2000, or none with decay_lr=False
    lr_decay_iters: int | None = None  # step at which min_lr is reached; None = max_iters
    min_lr: float | None = None  # at most learning_rate; None = learning_rate / 10
    cooldown: float = 0.4  # wsd: share of lr_decay_iters in which the rate falls (Hägele et al. 2024, arXiv 2405.18392)
    weight_decay: float = 0.1  # on matrices; never on norms and biases, and under Muon not on embeddings and head
    factor_decay: Literal['factor', 'product', 'none'] = 'factor'  # of the blocks' low-rank matrices: on each factor, which shrinks the rank (Kobayashi et al.
    # 2024, arXiv 2410.23819), on their product (Khodak et al. 2021, arXiv 2105.01029), or none
    optimizer: Literal['adamw', 'muon', 'spectron', 'counts'] = 'adamw'  # muon: all matrices but embeddings
    # and head by Muon, these and the rest by AdamW; spectron: the same, and the step of low-rank factors is bounded by
    # their norms (arXiv 2602.12429); counts: a full Markov table (arch=markov) learns by counting, in a third of
    # AdamW's memory and without a rate
    pseudo_counts: float = 100.0  # counts: weight of each row's random start, in observations
    muon_lr: float = 0.02  # highest rate of the matrices under Muon
    embed_lr: float | None = None  # highest rate of the embeddings; None = learning_rate, here and below
    head_lr: float | None = None  # of the head, and of an embedding tied to it
    scalar_lr: float | None = None  # of norms, biases and the mix of values
    lr_scale: dict = field(default_factory=dict)  # multiples of these rates for tensors whose name matches: {'attn.[qk]': 2}; muP for low-rank
    # factors under AdamW: {'attn.*down': 0.5, 'attn.*up': n_embd / (2 rank)} (Qiu et al. 2024, arXiv 2406.06248)
    momentum: float = 0.95  # Muon's, Nesterov
    momentum_warmup: int = 300  # steps in which it rises from 0.85 (or stays, if it is lower); 0 = at once (modded-nanogpt, record 9)
    beta1: float = 0.9  # AdamW's
    beta2: float = 0.95
    eps: float = 1e-8
    grad_clip: float = 1.0  # largest norm of the whole gradient; 0 = no clipping

    def check(self):
        """Raise ValueError for values that cannot work."""
        for name in ('learning_rate', 'max_iters', 'weight_decay', 'grad_clip', 'warmup_iters', 'lr_decay_iters', 'min_lr', 'muon_lr', 'embed_lr', 'head_lr',
                     'scalar_lr', 'momentum_warmup', 'eps'):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f'{name}={getattr(self, name)}: must not be negative')
        for name in ('beta1', 'beta2', 'momentum'):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f'{name}={getattr(self, name)}: takes 0 <= {name} < 1')
        for pattern, scale in self.lr_scale.items():
            if not isinstance(pattern, str) or isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 0 <= scale < math.inf:
                raise ValueError(f'lr_scale={self.lr_scale}: takes patterns of names, and for each a number of at least 0')
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f'lr_scale: {pattern!r} is no pattern: {error}') from None
        if not 0 < self.cooldown <= 1:
            raise ValueError(f'cooldown={self.cooldown}: takes 0 < cooldown <= 1')
        if not 0 < self.pseudo_counts < math.inf:
            raise ValueError(f'pseudo_counts={self.pseudo_counts}: takes a number above 0')
        if self.decay_lr:
            self.check_decay()

    def check_decay(self):
        """Raise ValueError for a rate that would rise in its decay, drop at once or stay at 0."""
        if self.min_lr is not None and self.min_lr > self.learning_rate:
            raise ValueError(f'min_lr={self.min_lr}: is above learning_rate={self.learning_rate}: lower it or leave it out')
        if self.warmup < self.max_iters and self.decay_end <= self.warmup:
            raise ValueError(f'lr_decay_iters={self.lr_decay_iters}: ends the decay before the warm-up of {self.warmup} steps has ended: '
                             'raise it, or lower warmup_iters')
        if self.min_lr == 0 < self.learning_rate and self.decay_end < self.max_iters:
            raise ValueError(f'lr_decay_iters={self.lr_decay_iters}: is below max_iters={self.max_iters}: the rate would be min_lr=0 from there on '
                             'and nothing learned: raise it, or leave it out')

    @property
    def warmup(self):
        """Steps of the linear warm-up."""
        if self.warmup_iters is not None:
            return self.warmup_iters
        return min(2000, self.max_iters // 20) if self.decay_lr else 0

    @property
    def decay_end(self):
        """The step at which min_lr is reached."""
        return self.max_iters if self.lr_decay_iters is None else self.lr_decay_iters

    @property
    def uses_muon(self):
        """Whether Muon updates the matrices of the blocks. Raises UserError for an optimizer that has no code here."""
        if self.optimizer in ('adamw', 'counts'):
            return False
        if self.optimizer in ('muon', 'spectron'):
            return True
        raise UserError(f'optimizer={self.optimizer}: has no code in optim.py: use adamw, muon or spectron')

    @property
    def optimizer_takes(self):
        """The names of the settings here that have an effect on this optimizer."""
        if self.optimizer == 'counts':
            return {'optimizer', 'max_iters', 'pseudo_counts'}
        return {f.name for f in fields(OptimConfig)} - {'pseudo_counts'}  # Muon's too: adamw may be an ablation

    @property
    def main_rate(self):
        """The name of the setting that holds the highest rate of the blocks' matrices."""
        return 'muon_lr' if self.uses_muon else 'learning_rate'


# -----------------------------------------------------------------------------
# AdamW, and Muon for the matrices

class Muon(torch.optim.AdamW):
    """
    AdamW whose groups with muon=True are updated by Muon instead (Jordan et al. 2024, kellerjordan.github.io/posts/muon): momentum,
    then the nearest orthogonal matrix, so that every direction of a matrix learns at the same rate. 1.5 times fewer tokens than
    AdamW on GPT-2 124M for 2% more time (modded-nanogpt, record 4). Matrices of one shape are orthogonalised together: torch.optim.Muon
    takes one after the other. A tensor with more than two dimensions is a stack of matrices.

    pairs: the factors (down, up) of the low-rank matrices; product_decay: weight decay on their products up·down;
    bounded: Spectron's step for them.
    """

    def __init__(self, groups, dtype=torch.float32, pairs=(), product_decay=0.0, bounded=False, **settings):
        super().__init__(groups, **settings)
        self.dtype = dtype  # to orthogonalise in
        self.pairs, self.product_decay, self.bounded = pairs, product_decay, bounded
        self._step_supports_amp_scaling = False  # a GradScaler is to pass over the steps that overflow itself: only AdamW's kernel could

    @torch.no_grad()
    def step(self, closure=None):
        bounds = self.bounds() if self.bounded else {}
        if self.product_decay:
            self.decay_products()
        for group in self.param_groups:
            if group['muon']:
                self.orthogonal_step([p for p in group['params'] if p.grad is not None], group, bounds)
        return super().step(closure)  # AdamW passes over what has no gradient left

    def orthogonal_step(self, params, group, bounds=()):
        shapes = {}
        for p in params:  # a tall matrix goes with the wide ones: its transpose has the same orthogonal factor, transposed
            shapes.setdefault((min(p.shape[-2:]), max(p.shape[-2:])), []).append(p)
        for (short, long), same in shapes.items():
            grads, moments = [p.grad for p in same], [self.momentum_of(p) for p in same]
            torch._foreach_lerp_(moments, grads, 1 - group['momentum'])
            torch._foreach_lerp_(grads, moments, group['momentum'])  # Nesterov: look ahead along the momentum
            wide = torch.cat([(g if g.size(-2) <= g.size(-1) else g.mT).reshape(-1, short, long) for g in map(whole, grads)])
            for p, update in zip(same, orthogonalize(wide, self.dtype).split([p.numel() // (short * long) for p in same])):
                rows, cols = p.shape[-2:]
                update = part((update if rows <= cols else update.mT).reshape(p.shape).to(p.dtype), p)
                scale = bounds[p] if p in bounds else max(1, rows / cols) ** 0.5  # a tall matrix spreads its output over more entries
                if group['weight_decay']:  # cautious (Chen et al. 2025, arXiv 2510.12402): decay only where the update shrinks the weight too
                    p.sub_((update * p > 0) * p, alpha=group['lr'] * group['weight_decay'])
                p.sub_(update.mul_(scale), alpha=group['lr'])
                p.grad = None

    def momentum_of(self, p):
        state = self.state[p]
        if 'momentum' not in state:
            state.update(momentum=torch.zeros_like(p), step=torch.zeros(()))  # a step because AdamW asks for one when it loads its state
        return state['momentum']

    def bounds(self):
        """
        {factor: what to scale its orthogonal step by} = 1 / (|down| + |up| + 1), so that the product's spectral norm changes by no more
        than the rate: |dup·down + up·ddown + dup·ddown| <= rate (Spectron, arXiv 2602.12429), as far as orthogonalize() is exact, to 1.2.
        """
        bounds = {}
        for down, up in self.pairs:
            bounds[down] = bounds[up] = 1 / (self.spectral_norm(down) + self.spectral_norm(up) + 1)
        return bounds

    def spectral_norm(self, p):
        """An estimate from below: power iteration, a step of it each time, which goes on where the last one ended."""
        state = self.state[p]
        if 'direction' not in state:
            self.momentum_of(p)
            state['direction'] = torch.ones_like(p[0])
        new = torch.nn.functional.normalize(p.T @ (p @ state['direction']), dim=0)
        state['direction'] = torch.where(new.any(), new, state['direction'])  # a matrix that starts at zero has none yet
        return (p @ state['direction']).norm()

    def decay_products(self):
        """Weight decay on up·down: the gradient of |up·down|²/2 for either factor."""
        rates = {p: group['lr'] for group in self.param_groups for p in group['params']}
        for down, up in self.pairs:
            to_down, to_up = up.T @ up @ down, up @ (down @ down.T)
            down.sub_(to_down, alpha=rates[down] * self.product_decay)
            up.sub_(to_up, alpha=rates[up] * self.product_decay)


class Counts(torch.optim.Optimizer):
    """
    A full Markov table learns by counting: its rows are softmaxes p (V, V), whose p.grad are minus the counts of
    model.BigramLoss (a sum over targets, no mean).

    This is the natural gradient (Amari 1998). In the frequencies q of a row it leads straight to those of a batch
    of n observations, q ← (1 - η) q + η counts/n, here with η = n/(pseudo_counts + all n so far), as SGD's rates
    fall (Bottou 2010). So q is always (pseudo_counts·q₀ + all counts)/(pseudo_counts + all n): add-k smoothing, at
    the price of one number of state a row. Where nothing was counted all logits of a row fall alike, which a
    softmax does not see: only the counted ones are written.
    """
    pairs, product_decay, dtype = (), 0.0, torch.float32  # as Muon has them

    def __init__(self, params, pseudo_counts):
        super().__init__([{'params': params, 'muon': False}], {})
        self.pseudo_counts = pseudo_counts

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group['params']:
                if p.grad is not None:
                    self.count(p)

    def count(self, p):
        if not self.state[p]:
            self.state[p]['seen'] = p.new_zeros(len(p))
        grad, seen = p.grad.coalesce(), self.state[p]['seen']
        (previous, following), counts = grad.indices(), -grad.values()
        rows, which = previous.unique_consecutive(return_inverse=True)
        log_sums = torch.cat([p[some].logsumexp(1) for some in rows.split(64)])  # a few rows at a time
        added = log_sums[which] + (counts / (self.pseudo_counts + seen[previous])).log()
        p[previous, following] = torch.logaddexp(p[previous, following], added)
        seen.index_add_(0, previous, counts)
        p.grad = None


def orthogonalize(g, dtype, steps=5):
    """
    The orthogonal factors of matrices g (N, rows, cols), rows <= cols, roughly: singular values end within 0.7…1.2. Five steps of a
    Newton-Schulz iteration whose quintic is tuned for slope at zero; it is stable in bfloat16 (Jordan et al. 2024).
    """
    x = g.to(dtype)
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        a = x @ x.mT
        x = 3.4445 * x + (2.0315 * a @ a - 4.7750 * a) @ x
    return x


def make_optimizer(model, cfg, dtype=torch.float32):
    """
    AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) with weight decay on what has two dimensions and is no bias, as in nanoGPT; for optimizer='muon'
    the blocks' matrices by Muon, which multiplies in `dtype`, and no decay on the rest. Groups of tensors with the same settings.
    For 'counts' a full Markov table is told to hand over its counts.
    Raises UserError for an optimizer that has no code here, for a pattern of lr_scale that no name matches, and for spectron without
    low-rank matrices.
    """
    if cfg.optimizer == 'counts':
        return count_table(model, cfg)
    muon, groups, names = cfg.uses_muon, {}, [name for name, _ in model.named_parameters()]
    for pattern in cfg.lr_scale:
        if not any(re.search(pattern, name) or re.search(pattern, name.replace('.down.', '.guide.')) for name in names):  # guides may be gone already
            raise UserError(f'lr_scale: {pattern!r} matches no tensor; the names are like {", ".join(names[:2] + names[-2:])}')
    head = 'head.weight' if 'head.weight' in names else 'wte.weight'  # tied
    if cfg.factor_decay not in ('factor', 'product', 'none'):
        raise UserError(f'factor_decay={cfg.factor_decay}: has no code in optim.py: use factor, product or none')
    pairs = getattr(model, 'factors', list)()
    if cfg.optimizer == 'spectron' and not pairs:
        raise UserError('optimizer=spectron: no matrix of the blocks is low-rank: use muon, or set rank_qk, rank_vo or rank_mlp')
    factors = {p for pair in pairs for p in pair} if cfg.factor_decay != 'factor' else set()
    for name, p in model.named_parameters():
        bias = name.startswith(('rel.', 'rel_encoder.')) or name.endswith('.bias')  # some have two dimensions: T5's positions, those of experts
        matrix = p.ndim >= 2 and not bias and not name.startswith(('wte.', 'wpe.', 'head.')) and not name.endswith('.router')
        rate = cfg.muon_lr if muon and matrix else cfg.head_lr if name == head else cfg.embed_lr if name.startswith(('wte.', 'wpe.')) \
            else cfg.scalar_lr if p.ndim < 2 or bias else None
        rate = cfg.learning_rate if rate is None else rate
        rate *= math.prod(scale for pattern, scale in cfg.lr_scale.items() if re.search(pattern, name))
        decay = cfg.weight_decay if (matrix if muon else p.ndim >= 2 and not name.endswith('.bias')) and p not in factors else 0.0
        if p.requires_grad:
            groups.setdefault((muon and matrix, rate, decay, is_divided(p)), []).append((name, p))  # a fused kernel takes one kind
    groups = [{'params': params, 'muon': by_muon, 'peak': rate, 'lr': rate, 'weight_decay': decay, 'momentum': cfg.momentum}
              for (by_muon, rate, decay, _), params in groups.items()]
    # fused: one kernel for all tensors, on CPUs too
    return Muon(groups, dtype, pairs, cfg.weight_decay if cfg.factor_decay == 'product' else 0.0, cfg.optimizer == 'spectron',
                betas=(cfg.beta1, cfg.beta2), eps=cfg.eps, fused=True)


def count_table(model, cfg):
    """The optimizer of a full Markov table that counts. Raises UserError for another network."""
    if model.cfg.arch != 'markov' or model.cfg.rank_embed:
        raise UserError('optimizer=counts: counts what follows what in a full Markov table: set arch=markov and '
                        'rank_embed=0, or use adamw')
    model.wte.sparse = True  # its loss hands over counts in place of a gradient
    return Counts(list(model.named_parameters()), cfg.pseudo_counts)


def clip_gradient(model, most):
    """Scale the gradient to a norm of at most `most`; returns the norm it had. A Markov table's counts (sparse) are no part of it: their step is bounded."""
    dense = [p for p in model.parameters() if p.grad is not None and not p.grad.is_sparse]
    divided = [p for p in dense if is_divided(p.grad)]
    if not divided:
        return torch.nn.utils.clip_grad_norm_(dense, most)
    others = [p for p in dense if not is_divided(p.grad)]
    norm = torch.stack([whole(torch.nn.utils.get_total_norm([p.grad for p in some])) for some in (divided, others) if some]).norm()
    torch.distributed.broadcast(norm, 0)  # groups of ranks that hold the same may have added in another order
    for some in (divided, others):
        torch.nn.utils.clip_grads_with_norm_(some, most, norm)
    return norm


def optimizer_flops(optimizer):
    """
    Floating-point operations of the matmuls in one step of the optimizer: x·xᵀ, a·a and the product with x, five times a matrix; and of the
    decay on products.
    """
    matrices = [(p.numel() // (p.size(-2) * p.size(-1)), *sorted(p.shape[-2:])) for group in optimizer.param_groups if group['muon'] for p in group['params']]
    decay = sum(4 * len(down) * len(down) * (down.size(1) + len(up)) for down, up in optimizer.pairs) if optimizer.product_decay else 0
    return decay + sum(count * 5 * (4 * rows * rows * cols + 2 * rows ** 3) for count, rows, cols in matrices)


def set_rates(optimizer, step, cfg):
    """The rates of update number `step`, every group in proportion to the schedule of learning_rate; Muon's momentum warms up."""
    if cfg.optimizer == 'counts':
        return  # it has no rate
    warm, start = min(1.0, step / cfg.momentum_warmup) if cfg.momentum_warmup else 1.0, min(0.85, cfg.momentum)
    for group in optimizer.param_groups:
        group['lr'] = learning_rate(step, cfg, group['peak'])
        group['momentum'] = start + warm * (cfg.momentum - start)


def learning_rate(step, cfg, peak=None):
    """
    The rate of update number `step` (from 0): linear warm-up, then cfg.schedule down to min_lr at lr_decay_iters. `peak`: the highest
    rate of another group of tensors, in place of cfg.learning_rate; its whole schedule is in proportion.
    """
    warmup, end = cfg.warmup, cfg.decay_end
    high = cfg.learning_rate if peak is None else peak
    low = high / 10 if cfg.min_lr is None or not cfg.learning_rate else cfg.min_lr * (high / cfg.learning_rate)
    if step < warmup:
        return high * (step + 1) / (warmup + 1)
    if not cfg.decay_lr:
        return high
    if step >= end:
        return low
    done = (step - warmup) / (end - warmup)  # 0…1
    if cfg.schedule == 'cosine':
        share = 0.5 * (1 + math.cos(math.pi * done))
    elif cfg.schedule == 'linear':
        share = 1 - done
    elif cfg.schedule == 'wsd':
        share = min(1.0, (end - step) / min(cfg.cooldown * end, end - warmup))  # a warm-up that lasts longer delays the cooldown
    else:
        raise UserError(f'schedule={cfg.schedule}: has no code in optim.py: use cosine, linear or wsd')
    return low + share * (high - low)
