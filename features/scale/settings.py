"""
Many processes and long runs: data-parallel or sharded training, background checkpoints, and guards against
loss spikes, hanging ranks and ranks whose weights differ.

    torchrun --nproc_per_node=2 train.py config/lowrank.py
"""
from dataclasses import dataclass

from features.refusals import refuse_beside


@dataclass
class ScaleConfig:
    hang_timeout: float = 600.0  # if a rank makes no progress for this many seconds, all ranks stop and name
    # it; ten times as long while rank 0 works for all, for example when it saves, and while the model is
    # compiled; 0 = never: torch.distributed stops the run after half an hour

    may_change = ('hang_timeout',)  # a resumed run may change it

    def check(self):
        """Raise ValueError for values that cannot work."""
        for name in ('rewind_spikes', 'hang_timeout'):
            if getattr(self, name) < 0:
                raise ValueError(f'{name}={getattr(self, name)}: must not be negative')
        if not self.shard:
            return
        refuse_beside(self, 'shard', grow_every=0, arch='decoder')
        if self.dtype == 'float16':
            raise ValueError(f'shard={self.shard}: does not go with dtype=float16: leave it out')
        if self.optimizer not in ('adamw', 'muon'):
            raise ValueError(f'shard={self.shard}: goes with optimizer=adamw or muon, not {self.optimizer}: '
                             'leave it out')
