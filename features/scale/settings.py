"""
Many processes and long runs: data-parallel or sharded training, background checkpoints, and guards against
loss spikes, hanging ranks and ranks whose weights differ.

    torchrun --nproc_per_node=2 train.py config/lowrank.py
"""
from dataclasses import dataclass, field
from typing import Literal

from features import refuse_beside


@dataclass
class ScaleConfig:
    backend: Literal['auto', 'nccl', 'gloo'] = 'auto'  # backend of torch.distributed; auto = nccl on CUDA,
    # else gloo
    skip_steps: list[int] = field(default_factory=list)  # steps, counted from 0, whose data are skipped: the
    # schedule advances, the weights do not change
    desync_interval: int = 100  # steps between bitwise comparisons of the weights of all ranks; 0 = never
    hang_timeout: float = 600.0  # if a rank makes no progress for this many seconds, all ranks stop and name
    # it; ten times as long while rank 0 works for all, for example when it saves, and while the model is
    # compiled; 0 = never: torch.distributed stops the run after half an hour

    # a resumed run may change these
    may_change = ('backend', 'skip_steps', 'desync_interval', 'hang_timeout')

    def check(self):
        """Raise ValueError for values that cannot work."""
        for name in ('rewind_spikes', 'desync_interval', 'hang_timeout'):
            if getattr(self, name) < 0:
                raise ValueError(f'{name}={getattr(self, name)}: must not be negative')
        if min(self.skip_steps, default=0) < 0:
            raise ValueError(f'skip_steps={self.skip_steps}: takes steps from 0 on')
        if not self.shard:
            return
        refuse_beside(self, 'shard', grow_every=0, arch='decoder')
        if self.dtype == 'float16':
            raise ValueError(f'shard={self.shard}: does not go with dtype=float16: leave it out')
        if self.optimizer not in ('adamw', 'muon'):
            raise ValueError(f'shard={self.shard}: goes with optimizer=adamw or muon, not {self.optimizer}: '
                             'leave it out')
