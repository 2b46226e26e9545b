"""
Encoder-decoders and their objectives (T5, UL2, ROT5): denoising, prefixes, pairs of source and target.

    python train.py config/rot5_cpu.py
"""
from configurator import UserError


def adopt_source_size(s, cfg, where):
    """
    The encoder's context of a run that begins with weights of a network with the ModelConfig cfg: they were trained for
    one length, but distances are no parameters, so the user may choose another.
    """
    if 'source_size' in s.given and cfg.position == 'learned' and s.source_size > cfg.source_context:
        raise UserError(f'source_size={s.source_size}: the weights in {where} know {cfg.source_context} positions: lower '
                        'it')
    if 'source_size' not in s.given or not s.source_size:
        s.source_size = cfg.source_context
