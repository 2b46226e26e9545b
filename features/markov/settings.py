"""
Markov chains: the next token depends only on the previous one. The model is a full or a low-rank table of
logits, trained by gradient descent or by counting.

    python train.py config/markov_pubmed.py
"""
import math
import os
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from configurator import UserError
from model import ModelConfig
from optim import OptimConfig


@dataclass
class MarkovTraining:
    def check(self):
        """Raise ValueError for settings of train.py that cannot be used with a Markov chain."""
        if self.arch != 'markov':
            return
        if self.objective != 'causal':
            raise ValueError(f"objective={self.objective}: arch='markov' has no source: leave it out")
        if self.teacher:
            raise ValueError(f"teacher={self.teacher}: arch='markov' learns from counts alone: leave it out")
        if self.label_smoothing and not self.rank_embed:
            raise ValueError(f'label_smoothing={self.label_smoothing}: a full Markov table has none: '
                             'set it to 0 (optimizer=counts smooths by pseudo_counts)')
        if self.uses_muon:
            raise ValueError(f'optimizer={self.optimizer}: a Markov chain has no matrices for Muon: '
                             'use adamw, or counts for a full table')


@dataclass
class MarkovConfig(ModelConfig):
    def check(self):
        """Raise ValueError for settings that a Markov chain does not have."""
        if self.arch != 'markov':
            return
        takes = {'arch', 'vocab_size', 'block_size', 'rank_embed'}
        if self.rank_embed:
            takes |= {'dropout', 'softcap'}
        kind = 'a low-rank Markov chain' if self.rank_embed else 'a full Markov table'
        refuse_idle(self, ModelConfig, takes, f'arch={self.arch} ({kind})')
        if self.rank_embed > (self.vocab_size or self.rank_embed):
            raise ValueError(f'rank_embed={self.rank_embed} is larger than the table ({self.vocab_size} x '
                             f'{self.vocab_size}): lower it, or 0 for a full table')
        if self.rank_head:
            raise ValueError(f"rank_head={self.rank_head}: arch='markov' has one rank, rank_embed: "
                             "leave rank_head out")
        if self.n_expert:
            raise ValueError(f"n_expert={self.n_expert}: arch='markov' has no MLPs: leave it out")
        if self.softcap and not self.rank_embed:
            raise ValueError(f"softcap={self.softcap}: arch='markov' takes it with rank_embed only: "
                             "a full table may learn any logits")


@dataclass
class MarkovOptim(OptimConfig):
    pseudo_counts: float = 100.0  # optimizer=counts: weight of each row's random init, as a number of
    # observations

    def check(self):
        """Raise ValueError for invalid values, and for settings that the optimizer ignores."""
        if not 0 < self.pseudo_counts < math.inf:
            raise ValueError(f'pseudo_counts={self.pseudo_counts}: takes a number above 0')
        takes = {field.name for field in fields(OptimConfig)}
        if self.optimizer == 'counts':
            takes = {'optimizer', 'max_iters', 'pseudo_counts'}
        refuse_idle(self, MarkovOptim, takes, f'optimizer={self.optimizer}')


def refuse_idle(settings, part, takes, why):
    """
    Raise ValueError for a setting of the dataclass `part` that the user set although it has no effect: one
    that is not in `takes`. why: what ignores it.
    """
    idle = sorted(getattr(settings, 'given', set()) & {field.name for field in fields(part)} - takes)
    if idle:
        raise ValueError(f'{idle[0]}={getattr(settings, idle[0])}: {why} ignores it: leave it out')


def check_machine(s, data, ranks):
    """Raise UserError if a full table does not fit into memory, or if NCCL cannot sum its counts."""
    if 'chat' in data.sources[0].files.meta:
        raise UserError('arch=markov: has no context, so it cannot be trained on conversations: '
                        'use arch=decoder')
    if s.optimizer == 'counts' and ranks.world > 1 and ranks.device.type == 'cuda':
        raise UserError('optimizer=counts: NCCL cannot add up the sparse counts of a full table: '
                        'use one process, or --device=cpu')
    is_table = s.arch == 'markov' and not s.rank_embed
    if is_table and s.optimizer != 'counts' and not s.eval_only:
        check_table_fits(s.vocab_size or data.vocab_size, s.optimizer, ranks)


def check_table_fits(vocab_size, optimizer, ranks):
    """
    Print how much memory a full Markov table takes with dense gradients. Raises UserError if it is not free.
    """
    table = 4 * vocab_size ** 2  # bytes
    copies = 4 + (ranks.world > 1)  # weights, gradient, two moments; DDP adds gradients up in another one
    processes = 1
    if ranks.device.type != 'cuda':  # the processes of a machine share its RAM
        processes = int(os.environ.get('LOCAL_WORLD_SIZE', 1))
    needed = table * copies * processes
    ranks.say(f'optimizer={optimizer}: the table of {vocab_size:,} x {vocab_size:,} '
              f'takes {needed / 1e9:,.1f} GB with its gradient and two moments; '
              f'optimizer=counts takes {table / 1e9:,.1f} GB a process')
    free = free_memory(ranks.device)
    if free is not None and needed > free:
        raise UserError(f'optimizer={optimizer}: a full Markov table of {vocab_size:,} tokens takes '
                        f'{needed / 1e9:,.1f} GB, and {free / 1e9:,.1f} are free: set --optimizer=counts, '
                        'or --rank_embed for a low-rank chain')


def free_memory(device):
    """Bytes that this process can still take, of the GPU or of RAM (in its container); None = not known."""
    from run import read_field
    if device.type == 'cuda':
        return torch.cuda.mem_get_info(device)[0]
    free = []
    available = read_field('/proc/meminfo', 'MemAvailable:')
    if available is not None:
        free.append(1024 * available)
    with suppress(OSError, ValueError):  # without a limit it is 'max', which is no number
        limit = int(Path('/sys/fs/cgroup/memory.max').read_text())
        used = int(Path('/sys/fs/cgroup/memory.current').read_text())
        page_cache = read_field('/sys/fs/cgroup/memory.stat', 'inactive_file') or 0  # it is given back
        free.append(limit - used + page_cache)
    return min(free, default=None)


def refuse_old_table(settings, where, to_do):
    """
    Raise UserError for a run that trained a full table by counting in a version where that was called adamw.
    """
    is_table = settings.get('arch') == 'markov' and not settings.get('rank_embed')
    if is_table and 'pseudo_counts' not in settings:
        raise UserError(f'{where} a Markov table that was counted before there was optimizer=counts, '
                        f'its counts in another unit: {to_do}')
