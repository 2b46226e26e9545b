"""
Rotary positions and windows in config.json, which many families write alike.
"""
import math

from features.hf.rotary import ROPE_SCALING

MOST_LAYERS = 10 ** 4  # a list for each layer is not made longer, whatever config.json says

# -----------------------------------------------------------------------------
# Rotary positions

def check_rotary(config, name, context, head_dim):
    """Refuse a context that no tensor of the file vouches for: our table of angles is that long."""
    if 4 * context * head_dim > 2 ** 28:
        config.refuse(name, context, 'its rotary table would take more than 256 MiB: '
                                     'lower it to the context that you use')


def read_rope(config):
    """Move the rotary settings to the top level of config.json's fields. Returns our rope_scaling."""
    scaling = {}
    for name in ('rope_parameters', 'rope_scaling'):  # as transformers 5 writes it, and as it was before
        rope = config.get(name, {})
        is_known = isinstance(rope, dict)
        if is_known:
            kind = str(rope.get('rope_type', rope.get('type', 'default')))
            is_nested = any(isinstance(value, dict) for value in rope.values())  # each kind of layer its own
            is_known = kind in ('default', 'dynamic', *ROPE_SCALING) and not is_nested
        if not is_known:
            kinds = ', '.join(['default', 'dynamic', *ROPE_SCALING])
            config.refuse(name, rope, f'takes rope_type={kinds}, for all layers')
        for key in ('rope_theta', 'partial_rotary_factor'):
            if key in rope:
                config.fields[key] = rope[key]
        if kind in ROPE_SCALING:  # dynamic: the default up to max_position_embeddings, where our context ends
            scaling = scaling_of(config, name, rope, kind)
    return scaling


def scaling_of(config, name, rope, kind):
    """ModelConfig.rope_scaling of a scaled rope of config.json, with transformers' defaults for yarn."""
    factor = rope.get('factor')
    if type(factor) not in (int, float) or not 0 < factor < 1e30:
        config.refuse(name, rope, 'factor: takes a number above 0, below 1e30')
    context = config.size('max_position_embeddings')
    defaults = {'original_max_position_embeddings': context, 'beta_fast': 32.0, 'beta_slow': 1.0,
                'attention_factor': max(1.0, 0.1 * math.log(factor) + 1)}
    scaling = {key: value for key, value in defaults.items() if key in ROPE_SCALING[kind]}
    for key, value in rope.items():
        if key not in ('type', 'rope_theta', 'partial_rotary_factor') and value is not None:
            scaling[key] = value  # an unknown one too: ModelConfig.check() refuses it
    if 'original_max_position_embeddings' in scaling:  # beside it, it counts more
        scaling['original_max_position_embeddings'] = config.size(
            'original_max_position_embeddings', scaling['original_max_position_embeddings'])
    return scaling | {'rope_type': kind}


def rotated(config, head_dim):
    """Our rope_dim of config.json's partial_rotary_factor; call read_rope() before it."""
    share = config.number('partial_rotary_factor', 1.0)
    size = int(head_dim * share)
    if not 2 <= size <= head_dim:
        config.refuse('partial_rotary_factor', share, f'takes a share of the {head_dim} numbers of a head')
    return 0 if size == head_dim else size


# -----------------------------------------------------------------------------
# Windows

def read_windows(config, cfg, is_local=lambda layer: False, default=None):
    """
    Set `window` and `full_layers` of a ModelConfig from sliding_window and layer_types. is_local(layer):
    whether a layer has a window, for a file without layer_types. default: of sliding_window.
    """
    kinds = []
    for layer in range(min(cfg.n_layer, MOST_LAYERS)):
        kinds.append('sliding_attention' if is_local(layer) else 'full_attention')
    kinds = config.get('layer_types', kinds)
    is_list = isinstance(kinds, list) and len(kinds) == cfg.n_layer
    if not is_list or any(kind not in ('full_attention', 'sliding_attention') for kind in kinds):
        config.refuse('layer_types', kinds, "takes 'full_attention' or 'sliding_attention' for every layer")
    if 'sliding_attention' in kinds:
        cfg.window = config.size('sliding_window', default)
        cfg.full_layers = [layer for layer, kind in enumerate(kinds) if kind == 'full_attention']


def window_fields(cfg):
    """The fields of config.json that read_windows() reads."""
    local = cfg.window_layers
    kinds = ['sliding_attention' if layer in local else 'full_attention' for layer in range(cfg.n_layer)]
    return {'sliding_window': cfg.window or None, 'layer_types': kinds}
