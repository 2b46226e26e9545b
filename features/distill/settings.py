"""
Distillation: train on the output distribution of a teacher model (Hinton et al. 2015, arXiv 1503.02531).

    python train.py --teacher=out/large --out_dir=out/small --n_layer=4
"""
from dataclasses import dataclass

from features import refuse_beside


@dataclass
class DistillConfig:
    distill_mix: float = 0.5  # weight of the teacher's term in the training loss; the rest is cross-entropy
    distill_temperature: float = 1.0  # temperature of both distributions; higher puts more weight on unlikely
    # tokens

    may_change = ('distill_mix', 'distill_temperature')  # a resumed run may change these

    def check(self):
        """Raise ValueError for values that cannot work."""
        if not 0 < self.distill_mix <= 1 or not 0 < self.distill_temperature <= 1000:
            raise ValueError(f'distill_mix={self.distill_mix}, '
                             f'distill_temperature={self.distill_temperature}: takes 0 < distill_mix <= 1, '
                             '0 < distill_temperature <= 1000')
        idle = sorted(getattr(self, 'given', set()) & {'distill_mix', 'distill_temperature'})
        if idle and not self.teacher:
            raise ValueError(f'{idle[0]}={getattr(self, idle[0])}: belongs to distillation: set teacher too')
        if self.teacher:
            refuse_beside(self, 'teacher', arch='decoder', n_encoder_layer=0)
