"""
Distillation: train on the output distribution of a teacher model (Hinton et al. 2015, arXiv 1503.02531).

    python train.py --teacher=out/large --out_dir=out/small --n_layer=4
"""
from dataclasses import dataclass

from features.refusals import refuse_beside


@dataclass
class DistillConfig:
    distill_mix: float = 0.5  # weight of the teacher's term in the training loss; the rest is cross-entropy

    may_change = ('distill_mix',)  # a resumed run may change it

    def check(self):
        """Raise ValueError for values that cannot work."""
        if not 0 < self.distill_mix <= 1:
            raise ValueError(f'distill_mix={self.distill_mix}: takes 0 < distill_mix <= 1')
        if 'distill_mix' in getattr(self, 'given', ()) and not self.teacher:
            raise ValueError(f'distill_mix={self.distill_mix}: belongs to distillation: set teacher too')
        if self.teacher:
            refuse_beside(self, 'teacher', arch='decoder', n_encoder_layer=0)
