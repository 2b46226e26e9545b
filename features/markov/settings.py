"""
Markov chains: the next token follows from the one before alone (--arch=markov), learned by gradients or by counting.

    python train.py config/markov_pubmed.py
"""
import os
from dataclasses import dataclass

from configurator import UserError, refuse_beside, refuse_idle
from model import ModelConfig
from optim import OptimConfig


@dataclass
class MarkovRun:

    def check(self):
        """Raise ValueError for settings that a run of a Markov chain cannot have."""
        if self.arch != 'markov':
            return
        refuse_beside(self, 'arch', objective='causal', teacher='', grow_every=0, lora_rank=0)
        if self.label_smoothing and not self.rank_embed:
            raise ValueError(f'label_smoothing={self.label_smoothing}: a full Markov table has none: set it to 0 '
                             '(optimizer=counts smooths by pseudo_counts)')
        if self.uses_muon:
            raise ValueError(f'optimizer={self.optimizer}: a Markov chain has no matrices for Muon: use adamw, or counts '
                             'for a full table')
        table = 'a low-rank Markov chain' if self.rank_embed else 'a full Markov table'
        refuse_idle(self, ModelConfig, self.arch_takes, f'arch=markov ({table})')
        refuse_idle(self, OptimConfig, self.optimizer_takes, f'optimizer={self.optimizer}')


def check_machine(s, data, ranks):
    """Raise UserError where a full table does not fit into memory, or NCCL cannot add up its counts."""
    if s.optimizer == 'counts' and ranks.world > 1 and ranks.device.type == 'cuda':
        raise UserError('optimizer=counts: NCCL cannot add up the sparse counts of a full table: use one process, or '
                        '--device=cpu')
    is_table = s.arch == 'markov' and not s.rank_embed
    if is_table and s.optimizer != 'counts' and not s.eval_only:
        check_table_fits(s.vocab_size or data.vocab_size, s.optimizer, ranks)


def check_table_fits(vocab_size, optimizer, ranks):
    """Say how much memory a full Markov table takes with dense gradients. Raises UserError if that is not free."""
    from device import free_memory
    table = 4 * vocab_size ** 2  # bytes
    copies = 4 + (ranks.world > 1)  # weights, gradient, two moments; DDP adds gradients up in another one
    processes = 1
    if ranks.device.type != 'cuda':  # the processes of a machine share its RAM
        processes = int(os.environ.get('LOCAL_WORLD_SIZE', 1))
    needed = table * copies * processes
    ranks.say(f'optimizer={optimizer}: the table of {vocab_size:,} x {vocab_size:,} takes {needed / 1e9:,.1f} GB with '
              f'its gradient and two moments; optimizer=counts takes {table / 1e9:,.1f} GB a process')
    free = free_memory(ranks.device)
    if free is not None and needed > free:
        raise UserError(f'optimizer={optimizer}: a full Markov table of {vocab_size:,} tokens takes {needed / 1e9:,.1f} '
                        f'GB, and {free / 1e9:,.1f} are free: set --optimizer=counts, or --rank_embed for a low-rank '
                        'chain')


def refuse_old_table(settings, where, to_do):
    """Raise UserError for a run with these settings that counted a full table when that was still called adamw."""
    is_table = settings.get('arch') == 'markov' and not settings.get('rank_embed')
    if is_table and 'pseudo_counts' not in settings:
        raise UserError(f'{where} a Markov table that was counted before there was optimizer=counts, its counts in '
                        f'another unit: {to_do}')
