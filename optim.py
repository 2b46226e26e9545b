"""
Parameter groups, the optimizer and the learning rate's schedule.
"""
import math
from dataclasses import dataclass
from typing import Literal

import torch


@dataclass
class OptimConfig:
    learning_rate: float = 6e-4  # the highest one
    max_iters: int = 10000  # steps; a step is one update of the weights
    schedule: Literal['cosine', 'linear', 'wsd'] = 'cosine'  # how the rate falls to min_lr; wsd: constant, then linear over the last cooldown
    decay_lr: bool = True  # False: constant after the warm-up
    warmup_iters: int | None = None  # linear warm-up; None = 5% of max_iters, at most 2000
    lr_decay_iters: int | None = None  # step at which min_lr is reached; None = max_iters
    min_lr: float | None = None  # None = learning_rate / 10
    cooldown: float = 0.4  # wsd: share of lr_decay_iters in which the rate falls (Hägele et al. 2024, arXiv 2405.18392)
    weight_decay: float = 0.1  # on matrices; never on norms and biases
    beta1: float = 0.9
    beta2: float = 0.95
    grad_clip: float = 1.0  # largest norm of the whole gradient; 0 = no clipping

    def check(self):
        """Raise ValueError for values that cannot work."""
        for name in ('learning_rate', 'max_iters', 'weight_decay', 'grad_clip', 'warmup_iters', 'lr_decay_iters', 'min_lr'):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f'{name}={getattr(self, name)}: must not be negative')
        for name in ('beta1', 'beta2'):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f'{name}={getattr(self, name)}: takes 0 <= {name} < 1')
        if not 0 < self.cooldown <= 1:
            raise ValueError(f'cooldown={self.cooldown}: takes 0 < cooldown <= 1')


def make_optimizer(model, cfg):
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) with weight decay on what has two dimensions, as in nanoGPT."""
    params = [p for p in model.parameters() if p.requires_grad]
    groups = [{'params': [p for p in params if p.ndim >= 2], 'weight_decay': cfg.weight_decay},
              {'params': [p for p in params if p.ndim < 2], 'weight_decay': 0.0}]
    # fused: one kernel for all tensors, on CPUs too
    return torch.optim.AdamW([g for g in groups if g['params']], lr=cfg.learning_rate, betas=(cfg.beta1, cfg.beta2), fused=True)


def learning_rate(step, cfg):
    """The rate of update number `step` (from 0): linear warm-up, then cfg.schedule down to min_lr at lr_decay_iters."""
    warmup = min(2000, cfg.max_iters // 20) if cfg.warmup_iters is None else cfg.warmup_iters
    end = cfg.max_iters if cfg.lr_decay_iters is None else cfg.lr_decay_iters
    low = cfg.learning_rate / 10 if cfg.min_lr is None else cfg.min_lr
    if step < warmup:
        return cfg.learning_rate * (step + 1) / (warmup + 1)
    if not cfg.decay_lr:
        return cfg.learning_rate
    if step >= end:
        return low
    done = (step - warmup) / (end - warmup)  # 0…1
    if cfg.schedule == 'cosine':
        share = 0.5 * (1 + math.cos(math.pi * done))
    elif cfg.schedule == 'linear':
        share = 1 - done
    else:
        share = min(1.0, (end - step) / (cfg.cooldown * end))
    return low + share * (cfg.learning_rate - low)
