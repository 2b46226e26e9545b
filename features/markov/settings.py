"""
Markov chains: the next token depends on the one before alone, by a table of all pairs or its factors.
"""
import math
from dataclasses import dataclass, fields

from configurator import refuse_idle
from model import ModelConfig
from optim import OptimConfig


@dataclass
class MarkovTraining:
    def check(self):
        """Raise ValueError for settings of train.py that do not go with a Markov chain."""
        if self.arch != 'markov':
            return
        if self.objective != 'causal':
            raise ValueError(f"objective={self.objective}: arch='markov' knows no source: leave it out")
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
        """Raise ValueError for settings that a Markov chain does not take."""
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
        if self.rank_guide:
            raise ValueError(f"rank_guide={self.rank_guide}: arch='markov' has no layers to guide: "
                             "leave it out")
        if self.n_expert:
            raise ValueError(f"n_expert={self.n_expert}: arch='markov' has no MLPs: leave it out")
        if self.softcap and not self.rank_embed:
            raise ValueError(f"softcap={self.softcap}: arch='markov' takes it with rank_embed only: "
                             "a full table may learn any logits")


@dataclass
class MarkovOptim(OptimConfig):
    pseudo_counts: float = 100.0  # optimizer=counts: weight of each row's random start, in observations

    def check(self):
        """Raise ValueError for a value that cannot work, and for settings that the optimizer ignores."""
        if not 0 < self.pseudo_counts < math.inf:
            raise ValueError(f'pseudo_counts={self.pseudo_counts}: takes a number above 0')
        takes = {field.name for field in fields(OptimConfig)}
        if self.optimizer == 'counts':
            takes = {'optimizer', 'max_iters', 'pseudo_counts'}
        refuse_idle(self, MarkovOptim, takes, f'optimizer={self.optimizer}')
