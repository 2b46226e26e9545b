"""
Growth: add blocks to the model during training.

    python train.py --n_layer=4 --grow_every=500 --grow_to=12
"""
from dataclasses import dataclass

from configurator import FilePath
from features.refusals import refuse_beside


@dataclass
class GrowConfig:
    grow_to: int = 0  # final number of blocks; n_layer is the initial number
    grow_by: int = 2  # blocks added each time, as in Inheritune (Sanyal et al. 2024, arXiv 2404.08634)
    grow_from: FilePath = ''  # copy the new blocks from this model instead: a run, a checkpoint or hf:FOLDER

    # a resumed run may change these
    may_change = ('grow_to', 'grow_by', 'grow_from')

    def check(self):
        """Raise ValueError for values that cannot work."""
        for name, least in (('grow_every', 0), ('grow_to', 0), ('grow_by', 1)):
            if getattr(self, name) < least:
                raise ValueError(f'{name}={getattr(self, name)}: takes {least} or more')
        if bool(self.grow_every) != bool(self.grow_to):
            raise ValueError(f'grow_every={self.grow_every}, grow_to={self.grow_to}: give both or none')
        if self.grow_from and not self.grow_every:
            raise ValueError(f'grow_from={self.grow_from}: '
                             'is where blocks come from with grow_every and grow_to: give these too')
        if self.grow_every:
            refuse_beside(self, 'grow_every', arch='decoder', n_encoder_layer=0)
