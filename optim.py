"""
Parameter groups, AdamW, Muon for the matrices, and the learning-rate schedule.
"""
import math
import re
from dataclasses import dataclass, field, fields
from typing import Literal

import torch
import torch.nn as nn

from configurator import UserError
from model import table_names, zero


@dataclass
class OptimConfig:
    learning_rate: float = 6e-4  # peak learning rate
    max_iters: int = 10000  # number of training steps; a step is one update of the weights
    schedule: Literal['cosine', 'linear', 'wsd'] = 'cosine'  # shape of the decay; wsd: constant, then linear
    decay_lr: bool = True  # False: constant rate, as in nanoGPT; no warmup unless warmup_iters is set
    warmup_iters: int | None = None  # warmup steps; None = 5% of max_iters, at most 2000; 0 if decay_lr=False
    lr_decay_iters: int | None = None  # step at which the rate reaches min_lr; None = max_iters
    min_lr: float | None = None  # final learning rate, at most learning_rate; None = learning_rate / 10
    cooldown: float = 0.4  # wsd: fraction of lr_decay_iters in which the rate decays (arXiv 2405.18392)
    weight_decay: float = 0.1  # for matrices, not norms and biases; with Muon not embeddings and head
    optimizer: Literal['adamw', 'muon', 'counts'] = 'adamw'  # muon: Muon for the matrices of the blocks,
    # AdamW for the rest; counts: counting, for a full Markov table (features/markov)
    muon_lr: float = 0.02  # peak learning rate of the matrices trained by Muon
    embed_lr: float | None = None  # peak learning rate of the embeddings; None = learning_rate
    head_lr: float | None = None  # peak learning rate of the head, also if tied; None = learning_rate
    scalar_lr: float | None = None  # peak learning rate of norms, biases, value mixing; None = learning_rate
    lr_scale: dict = field(default_factory=dict)  # learning-rate multipliers by name pattern: {'attn.[qk]':
    # 2}. muP for factors: {'attn.*down': 0.5, 'attn.*up': n_embd / (2 rank)} (arXiv 2406.06248)
    beta1: float = 0.9  # of AdamW
    beta2: float = 0.95  # of AdamW
    grad_clip: float = 1.0  # maximum norm of the gradient; 0 = no clipping

    bend = None  # plan: where max_iters was changed, and the share of the schedule before

    def check(self):
        """Raise ValueError for values that cannot work."""
        for name in ('beta1', 'beta2'):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f'{name}={getattr(self, name)}: takes 0 <= {name} < 1')
        if not 0 < self.cooldown <= 1:
            raise ValueError(f'cooldown={self.cooldown}: takes 0 < cooldown <= 1')
        for name in (f.name for f in fields(OptimConfig)):
            value = getattr(self, name)
            if isinstance(value, (int, float)) and value < 0:
                raise ValueError(f'{name}={value}: must not be negative')
        for pattern, scale in self.lr_scale.items():
            is_number = isinstance(scale, (int, float)) and not isinstance(scale, bool)
            if not isinstance(pattern, str) or not is_number or not 0 <= scale < math.inf:
                raise ValueError(f'lr_scale={self.lr_scale}: takes patterns of names, and for each a number '
                                 'of at least 0')
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f'lr_scale: {pattern!r} is not a valid pattern: {error}') from None
        if not self.decay_lr:
            return
        # The rate must not rise during the decay, drop at once or stay at 0
        if self.min_lr is not None and self.min_lr > self.learning_rate:
            raise ValueError(f'min_lr={self.min_lr}: is above learning_rate={self.learning_rate}: '
                             'lower it or leave it out')
        if self.warmup < self.max_iters and self.decay_end <= self.warmup:
            raise ValueError(f'lr_decay_iters={self.lr_decay_iters}: ends the decay before the warm-up of '
                             f'{self.warmup} steps has ended: raise it, or lower warmup_iters')
        if self.min_lr == 0 < self.learning_rate and self.decay_end < self.max_iters:
            raise ValueError(f'lr_decay_iters={self.lr_decay_iters}: is below max_iters={self.max_iters}: '
                             'the rate would be min_lr=0 from there on and nothing learned: raise it, '
                             'or leave it out')

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
        """Whether Muon updates the matrices of the blocks. Raises UserError for an optimizer without code."""
        if self.optimizer == 'counts':  # markov
            return False  # markov
        if self.optimizer not in ('adamw', 'muon'):
            raise UserError(f'optimizer={self.optimizer}: has no code in optim.py: use adamw or muon')
        return self.optimizer == 'muon'

    @property
    def main_rate(self):
        """The name of the setting with the peak learning rate of the blocks' matrices."""
        return 'muon_lr' if self.uses_muon else 'learning_rate'


# -----------------------------------------------------------------------------
# Parameter groups

def make_optimizer(model, cfg, dtype=torch.float32):
    """
    AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101), with weight decay for tensors of two dimensions except
    biases, as in nanoGPT. With Muon: Muon for the matrices of the blocks, with matmuls in `dtype`, and AdamW
    without weight decay for the rest. Tensors with the same settings form a group. Raises UserError.
    """
    if cfg.optimizer == 'counts':  # markov
        from features.markov.counts import count_table  # markov
        return count_table(model, cfg)  # markov
    names = [name for name, _ in model.named_parameters()]
    for pattern in cfg.lr_scale:
        if not any(re.search(pattern, name) for name in names):
            raise UserError(f'lr_scale: {pattern!r} matches no tensor; '
                            f'the names are like {", ".join(names[:2] + names[-2:])}')
    rates = {'table': cfg.embed_lr, 'head': cfg.head_lr, 'scalar': cfg.scalar_lr}
    if cfg.uses_muon:
        rates['matrix'] = cfg.muon_lr
    groups = {}
    for (name, p), kind in zip(model.named_parameters(), kinds(model)):
        if not p.requires_grad:
            continue
        by_muon = cfg.uses_muon and kind == 'matrix'
        decays = by_muon if cfg.uses_muon else p.ndim >= 2 and not name.endswith('.bias')
        rate = cfg.learning_rate if rates.get(kind) is None else rates[kind]
        rate *= math.prod(scale for pattern, scale in cfg.lr_scale.items() if re.search(pattern, name))
        group = {'muon': by_muon, 'peak': rate, 'lr': rate, 'momentum': MOMENTUM,
                 'weight_decay': cfg.weight_decay if decays else 0.0}
        is_divided = hasattr(p, 'full_tensor')  # among ranks: a fused kernel takes one kind of tensors
        same = groups.setdefault((is_divided, *group.values()), group | {'params': []})
        same['params'].append((name, p))
    # fused: one kernel for all, on CPUs too
    return Muon(groups.values(), dtype, betas=(cfg.beta1, cfg.beta2), eps=1e-8, fused=True)


def kinds(model):
    """The kind of each parameter of a model: 'matrix', 'table', 'head', 'scalar' or 'other'."""
    tables, heads, found = table_names(model), head_names(model), []
    for name, p in model.named_parameters():
        # T5's positions and the biases of experts have two dimensions too
        is_bias = name.endswith(('.bias', 'rel.weight', 'rel_encoder.weight'))
        if name in heads:
            found.append('head')
        elif name.startswith(tables) and not is_bias:
            found.append('table')
        elif p.ndim < 2 or is_bias:
            found.append('scalar')
        elif name.endswith('router') or name.startswith('head.'):  # head.: an adapter
            found.append('other')
        else:
            found.append('matrix')
    return found


def head_names(model):
    """Names of the weights that make logits: in linear layers outside the blocks, one row for each token."""
    names = [] if getattr(model, 'head', None) is not None else ['wte.weight']  # tied
    for name, module in model.named_modules():
        is_outside = not name.startswith(('blocks.', 'encoder.', 'wte_up', 'head_down'))
        if is_outside and isinstance(module, nn.Linear) and module.out_features == model.wte.num_embeddings:
            names.append(f'{name}.weight')
    return names


def clip_gradient(model, most):
    """Scale the gradient to a norm of at most `most`, without sparse counts. Returns the norm before."""
    dense = [p for p in model.parameters() if p.grad is not None and not p.grad.is_sparse]
    if any(hasattr(p.grad, 'full_tensor') for p in dense):  # scale
        from features.scale.shard import clip_divided  # scale
        return clip_divided(dense, most)  # scale
    return nn.utils.clip_grad_norm_(dense, most)


# -----------------------------------------------------------------------------
# Muon

# Nesterov momentum, which rises from the first one in so many steps: worth 0.11 nats in runs of 200 steps
# (docs/results/low-rank-structure.md), 0.02 to 0.03 in longer ones (recipe.md)
MOMENTUM, FIRST_MOMENTUM, MOMENTUM_WARMUP = 0.95, 0.85, 300


class Muon(torch.optim.AdamW):
    """
    Muon for groups with muon=True (Jordan et al. 2024, kellerjordan.github.io/posts/muon), AdamW for the
    others. Muon's update is the orthogonal matrix nearest to the momentum, so that all directions of a matrix
    learn at the same rate. GPT-2 124M needs 1.5 times fewer tokens than with AdamW, for 2% more time
    (modded-nanogpt, record 4). Matrices of the same shape are orthogonalized together; torch.optim.Muon does
    them one by one. A tensor with more than two dimensions is a stack of matrices.
    """

    def __init__(self, groups, dtype=torch.float32, **settings):
        super().__init__(groups, **settings)
        self.dtype = dtype  # to orthogonalise in
        self._step_supports_amp_scaling = False  # else the kernel, not GradScaler, passes over overflows

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            if group['muon']:
                self.orthogonal_step([p for p in group['params'] if p.grad is not None], group)
        return super().step(closure)  # AdamW passes over what has no gradient left

    def orthogonal_step(self, params, group):
        shapes = {}
        for p in params:  # a tall one goes with the wide ones, transposed: so is then its orthogonal factor
            if not self.state[p]:  # AdamW asks for a step when it loads
                self.state[p] |= {'momentum': torch.zeros_like(p), 'step': torch.zeros(())}
            shapes.setdefault((min(p.shape[-2:]), max(p.shape[-2:])), []).append(p)
        for (short, long), same in shapes.items():
            grads, moments = [p.grad for p in same], [self.state[p]['momentum'] for p in same]
            torch._foreach_lerp_(moments, grads, 1 - group['momentum'])
            torch._foreach_lerp_(grads, moments, group['momentum'])  # Nesterov: look ahead along the momentum
            if hasattr(same[0], 'full_tensor'):  # scale: divided among ranks
                from features.scale.shard import whole  # scale
                grads = [whole(g) for g in grads]  # scale
            wide = [(g if g.size(-2) <= g.size(-1) else g.mT).reshape(-1, short, long) for g in grads]
            updates = orthogonalize(torch.cat(wide), self.dtype).to(same[0].dtype).split([*map(len, wide)])
            updates = [(update if p.size(-2) <= p.size(-1) else update.mT).reshape(p.shape).contiguous()
                       for p, update in zip(same, updates)]
            for p in same:
                p.grad = None
            torch._foreach_mul_(updates, [max(1, p.size(-2) / p.size(-1)) ** 0.5 for p in same])  # tall: more
            if hasattr(same[0], 'full_tensor'):  # scale
                from features.scale.shard import own_parts  # scale
                updates, same = own_parts(updates, same)  # scale
            if group['weight_decay']:  # where the update shrinks the weight too (arXiv 2510.12402)
                decay = torch._foreach_mul(updates, same)
                torch._foreach_sign_(decay)
                torch._foreach_clamp_min_(decay, 0)
                torch._foreach_mul_(decay, same)
                torch._foreach_sub_(same, decay, alpha=group['lr'] * group['weight_decay'])
            torch._foreach_sub_(same, updates, alpha=group['lr'])


def orthogonalize(g, dtype, steps=5):
    """
    The orthogonal factors of matrices g (N, rows, cols), rows <= cols, with singular values in 0.7…1.2, by
    Newton-Schulz iteration with a quintic tuned for slope at zero, stable in bfloat16 (Jordan et al.).
    """
    x = g.to(dtype)
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        a = x @ x.mT
        x = 3.4445 * x + (2.0315 * a @ a - 4.7750 * a) @ x
    return x


# -----------------------------------------------------------------------------
# Floating-point operations

def optimizer_flops(optimizer):
    """FLOPs of one step's matmuls: for each matrix under Muon five times x·xᵀ, a·a and the product with x."""
    flops = 0
    for group in optimizer.param_groups:
        for p in group['params'] if group['muon'] else ():
            rows, cols = sorted(p.shape[-2:])
            flops += p.numel() // (rows * cols) * 5 * (4 * rows * rows * cols + 2 * rows ** 3)
    return flops


def step_flops(model, optimizer, teacher, tokens):
    """Floating-point operations of one step with this many tokens, including the optimizer and a teacher."""
    per_token = model.flops_per_token()
    if teacher:  # distill
        per_token += teacher.flops_per_token()  # distill
    return per_token * tokens + optimizer_flops(optimizer)


# -----------------------------------------------------------------------------
# The schedule

def set_rates(optimizer, step, cfg):
    """Set the rates of update number `step`, every group's in proportion, and Muon's momentum."""
    if cfg.optimizer == 'counts':  # markov: it has no rate
        return  # markov
    warm = min(1.0, step / MOMENTUM_WARMUP)
    for group in optimizer.param_groups:
        group['lr'] = learning_rate(step, cfg, group['peak'])
        group['momentum'] = FIRST_MOMENTUM + warm * (MOMENTUM - FIRST_MOMENTUM)


def learning_rate(step, cfg, peak=None):
    """
    The learning rate of update number `step`, counted from 0: linear warm-up, then cfg.schedule down to
    min_lr. peak: the peak rate of another group of tensors; its schedule has the same shape.
    """
    if cfg.bend:  # plan
        from features.plan.minutes import bent  # plan
        step = bent(step, cfg)  # plan
    warmup, end = cfg.warmup, cfg.decay_end
    high = cfg.learning_rate if peak is None else peak
    if cfg.min_lr is None or not cfg.learning_rate:
        low = high / 10
    else:
        low = cfg.min_lr * (high / cfg.learning_rate)
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
    elif cfg.schedule == 'wsd':  # a warm-up that lasts longer delays the cooldown
        share = min(1.0, (end - step) / min(cfg.cooldown * end, end - warmup))
    else:
        raise UserError(f'schedule={cfg.schedule}: has no code in optim.py: use cosine, linear or wsd')
    return low + share * (high - low)


def short_warmup(cfg):
    """[a warning line, if the warm-up is longer than the run]."""
    if not cfg.warmup > cfg.max_iters > 0:
        return []
    rate = getattr(cfg, cfg.main_rate)
    highest = learning_rate(cfg.max_iters - 1, cfg, rate)
    return [f'warmup_iters={cfg.warmup}: is longer than max_iters={cfg.max_iters}: the rate rises to '
            f'{highest:.2e} and never reaches {cfg.main_rate}={rate:g}; --warmup_iters=0 begins there']


def not_finite(s, step):
    """The UserError for a run whose loss or gradient is NaN or infinite. s: train.py's Settings."""
    rate = f'{s.main_rate}={getattr(s, s.main_rate)}'
    return UserError(f'the loss or its gradient is not finite at step {step}: lower {rate} or raise '
                     f'warmup_iters; the newest checkpoint in {s.out_dir} is from before')


# -----------------------------------------------------------------------------
# The steps so far: sums for the log, and a check that something is learned

class Interval:
    """
    Sums over the steps since the last log line; checkpoints store them for the first log line after a resume.
    Its time is that of this process, without slow steps: the first one and those that compile.
    """

    def __init__(self, device, stored=None, ranks=None):
        self.device = device
        self.is_timed = False  # whether this process has made a step already
        self.reset()
        if stored:
            nats = stored['nats']  # per rank
            if len(nats) != ranks.world:  # of another number of ranks: the first one takes all
                nats = [sum(nats)] + [0.0] * (ranks.world - 1)
            self.nats += nats[ranks.rank]
            self.targets = stored['targets']
            if stored['loads']:  # moe
                self.loads = torch.tensor(stored['loads'], device=device)  # moe

    def reset(self):
        self.nats = zero(self.device)  # of this rank
        self.targets = 0.0  # of all ranks
        self.loads = None  # tokens of each expert, (layers, E), of all ranks
        self.steps = 0
        self.seconds = 0.0
        self.slow = 0.0

    def add(self, done):
        self.nats += done.nats
        self.targets += done.targets

    def time(self, seconds, is_slow):
        """Add the time of a step."""
        if is_slow or not self.is_timed:
            self.slow = seconds
        else:
            self.steps += 1
            self.seconds += seconds
        self.is_timed = True

    def steps_per_second(self):
        return self.steps / self.seconds if self.steps else 1 / self.slow

    def stored(self, ranks):
        """The sums as JSON; all ranks must call it together."""
        loads = None if self.loads is None else self.loads.tolist()
        return {'nats': ranks.gather(self.nats.item()), 'targets': self.targets, 'loads': loads}


class FirstSteps:
    """
    Checks the first ten steps of a process together: if the gradient of every tensor is exactly zero, or if
    the loss does not change at all, something is broken. Steps without targets, such as skipped ones, do not
    count. The numbers stay on the device until then, so that no step waits for them.
    """

    def __init__(self):
        self.steps = []  # (number, Step, highest rate of a tensor)

    def add(self, number, done, rate, s, ranks):
        """Add a Step. Raises UserError, on all ranks, if it is the tenth and nothing is learned."""
        if not done.targets or len(self.steps) == 10:
            return
        self.steps.append((number, done, rate))
        if len(self.steps) < 10:
            return
        numbers, steps, rates = zip(*self.steps)
        nats = ranks.sum(*(step.nats.item() for step in steps))
        losses = [total / step.targets for total, step in zip(nats, steps)]
        if min(losses) < 1e-4 or not any(rates):  # learned already, up to rounding; or not to be changed
            return
        where = f'in steps {numbers[0]} to {numbers[-1]}: nothing is learned'
        if not any(ranks.sum(*(step.norm.item() for step in steps))):
            cure = 'set compile=False' if s.compile else 'check your changes to the network or its loss'
            raise UserError(f'the gradient of every tensor was exactly zero {where}: {cure}, '
                            f'or try another version of torch than {torch.__version__}')
        if len(set(losses)) == 1 and sum(rates) > 1e-5:  # less need not show in a loss in float32
            rates = f'learning_rate={s.learning_rate:g}, lr_scale={s.lr_scale}, compile={s.compile}'
            raise UserError(f'the loss was exactly {losses[0]:.4f} {where}: check the data set, {rates}')
