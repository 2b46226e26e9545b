"""
Encoder-decoders and their objectives (T5, UL2, ROT5): denoising, prefixes, pairs of source and target.

    python train.py config/rot5_cpu.py
"""
from dataclasses import dataclass

from batches import DataConfig
from configurator import UserError
from features.t5.objectives import parse_denoisers


@dataclass
class ObjectiveConfig(DataConfig):
    denoisers: str | list = 'ul2r'  # of objective=ul2: t5, ul2r, ul2, or [[span, rate, weight, mode], …] as
    # in features/t5/objectives.py

    def check(self):
        """Raise ValueError for values that cannot work."""
        parse_denoisers(self.denoisers)
        if self.objective != 'causal' and self.arch == 'markov':
            raise ValueError(f"objective={self.objective}: arch='markov' knows no source: leave it out")
        if self.objective == 'causal' and self.n_encoder_layer and not self.plan:
            raise ValueError(f"n_encoder_layer={self.n_encoder_layer}: objective='causal' gives an encoder "
                             "nothing to read: set it to ul2, prefix or seq2seq")


def adopt_source_size(s, cfg, where):
    """
    The encoder's context of a run that begins with weights of a network with the ModelConfig cfg: they were
    trained for one length, but distances are no parameters, so the user may choose another.
    """
    if 'source_size' in s.given and cfg.position == 'learned' and s.source_size > cfg.source_context:
        raise UserError(f'source_size={s.source_size}: '
                        f'the weights in {where} know {cfg.source_context} positions: lower it')
    if 'source_size' not in s.given or not s.source_size:
        s.source_size = cfg.source_context
