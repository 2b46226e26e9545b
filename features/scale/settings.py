"""
Many processes and long runs: data-parallel or sharded training, checkpoints in the background, guards against
loss spikes, hanging ranks and ranks that drift apart.

    torchrun --nproc_per_node=2 train.py config/lowrank.py
"""
from dataclasses import dataclass, field
from typing import Literal

from configurator import refuse_beside


@dataclass
class ScaleConfig:
    backend: Literal['auto', 'nccl', 'gloo'] = 'auto'  # of torch.distributed; auto = nccl on CUDA
    skip_steps: list[int] = field(default_factory=list)  # steps, from 0, whose data are left out: the
    # schedule goes on, no weight changes
    desync_interval: int = 100  # steps between comparisons of all ranks' weights, bit for bit; 0 = never
    hang_timeout: float = 600.0  # seconds without progress of a rank after which all end and say which one is
    # behind; ten times that while rank 0 works for all, as when saving, and while the network is compiled;
    # 0 = never, until torch.distributed gives up after half an hour

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
