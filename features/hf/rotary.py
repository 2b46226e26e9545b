"""
Rotary positions that are slowed down for a longer context, as in config.json: ModelConfig.rope_scaling.
"""
import math

import torch

ROPE_SCALING = {  # {rope_type: its numbers}
    'linear': ('factor',),
    'llama3': ('factor', 'original_max_position_embeddings', 'low_freq_factor', 'high_freq_factor'),
    'yarn': ('factor', 'original_max_position_embeddings', 'beta_fast', 'beta_slow', 'attention_factor')}


def check_scaling(cfg):
    """Raise ValueError for a rope_scaling that is not one of ROPE_SCALING."""
    scaling = cfg.rope_scaling
    wanted = {'rope_type', *ROPE_SCALING.get(str(scaling.get('rope_type')), ())}
    values = [value for key, value in scaling.items() if key != 'rope_type']
    is_number = all(type(value) in (int, float) and 1e-9 < value < 1e30 for value in values)
    if scaling.keys() != wanted or not values or not is_number or cfg.rope_theta <= 1:
        raise ValueError(f'rope_scaling={scaling}: takes positive numbers for the keys of its rope_type: '
                         f'{ROPE_SCALING}, and rope_theta above 1')
    if scaling.get('low_freq_factor', 0) >= scaling.get('high_freq_factor', 1):
        raise ValueError(f'rope_scaling={scaling}: low_freq_factor has to be the lower one')


def scaled(frequencies, theta, scaling):
    """
    (rotary frequencies, factor of the turned vectors): of `frequencies` (D/2,), those of pairs that turn
    rarely in the original context are divided by `factor`.
    """
    kind, pairs = scaling['rope_type'], len(frequencies)
    context = scaling.get('original_max_position_embeddings')
    kept = torch.zeros(pairs)  # linear: none
    if kind == 'llama3':
        low, high = scaling['low_freq_factor'], scaling['high_freq_factor']
        turns = context / (2 * math.pi / frequencies)
        kept = ((turns - low) / (high - low)).clamp(0, 1)
    if kind == 'yarn':  # Peng et al. 2023, arXiv 2309.00071
        first, last = (pairs * math.log(context / (scaling[turns] * 2 * math.pi)) / math.log(theta)
                       for turns in ('beta_fast', 'beta_slow'))  # the pairs that turn so often
        first, last = max(math.floor(first), 0), min(math.ceil(last), 2 * pairs - 1)
        kept = 1 - ((torch.arange(pairs) - first) / (last - first or 0.001)).clamp(0, 1)
    frequencies = kept * frequencies + (1 - kept) * frequencies / scaling['factor']
    return frequencies, scaling.get('attention_factor', 1)
