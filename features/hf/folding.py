"""
Fold settings that no class of transformers has into the weights, without changing the function: multiply out
low-rank factors, and fold depth_scale and the embedding norm into the weights.

    cfg, weights = fold(model)
"""
import dataclasses
import re

import torch

from configurator import UserError
from features import default_of
from features.hf.families import FREE, PLAIN
from model import LowRank

# Settings that fold() takes into account. Any other one, such as a new one, has to be at its default
KNOWN = FREE | PLAIN.keys() | {
    'n_kv_head', 'head_dim', 'position', 'cross_rope', 'norm', 'mlp', 'rank_embed', 'rank_head',
    'rel_per_layer'}


@torch.no_grad()
def fold(model):
    """
    (ModelConfig, {name: tensor}) of the same function with fewer settings. A setting that cannot be folded is
    kept. Raises UserError for a model with settings that are not KNOWN.
    """
    for field in dataclasses.fields(model.cfg):
        value = getattr(model.cfg, field.name)
        if field.name not in KNOWN and value != default_of(field):
            raise UserError(f'{field.name}={value}: a network with it cannot be written as a class of '
                            'transformers: --as=custom takes any decoder')
    weights = model.state_dict()
    changed = fold_layers(model, weights)
    changed |= fold_embeddings(model, weights)
    changed |= fold_embed_norm(model, weights)
    changed |= fold_depth_scale(model, weights)
    return dataclasses.replace(model.cfg, **changed), weights


# Each of these changes `weights` in place and returns {setting: its new value}

def fold_layers(model, weights):
    """Multiply out the factors of the blocks, unless there is an activation between them."""
    low_rank = {name: layer for name, layer in model.named_modules() if isinstance(layer, LowRank)}
    if low_rank and model.cfg.rank_act != 'none':
        return {}
    for name, layer in low_rank.items():
        for tensor in [tensor for tensor in weights if tensor.startswith(f'{name}.')]:
            del weights[tensor]
        weights[f'{name}.weight'] = layer.up.weight @ layer.down.weight
        if layer.up.bias is not None:
            weights[f'{name}.bias'] = layer.up.bias
    return {
        'rank_qk': 0,
        'rank_vo': 0,
        'rank_mlp': 0,
        'ranks': {},
        'rank_act': 'none',
    }


def fold_embeddings(model, weights):
    """Multiply out the factors of the embedding and of the head."""
    if model.wte_up is not None:
        weights['wte.weight'] = model.wte.weight @ weights.pop('wte_up.weight').T
    if model.head_down is not None:
        weights['head.weight'] = model.head.weight @ weights.pop('head_down.weight')
    return {'rank_embed': 0, 'rank_head': 0}


def fold_embed_norm(model, weights):
    """Normalize the embedding once; a head that was tied to it gets its own matrix."""
    cfg = model.cfg
    if not cfg.embed_norm or cfg.position == 'learned':  # learned positions are added before the norm
        return {}
    if cfg.tie:
        scale = cfg.n_embd ** -0.5 if getattr(cfg, 't5_scale', False) else 1
        weights['head.weight'] = weights['wte.weight'] * scale
    weights['wte.weight'] = model.norm_e(weights['wte.weight'] * cfg.embed_scale)
    weights['wte.weight'][cfg.vocab_size:] = 0
    for name in [name for name in weights if name.startswith('norm_e.')]:
        del weights[name]
    return {'embed_norm': False, 'embed_scale': 1.0, 'tie': False}


def fold_depth_scale(model, weights):
    """Divide the weights of block n, from 1: those of its queries by n, or those of its norms by sqrt(n)."""
    cfg = model.cfg
    if cfg.depth_scale == 'attn' and not cfg.qk_norm:  # after a norm of the queries their scale is lost
        pattern, power = r'(?:attn|cross)\.q\.(?:up\.)?(?:weight|bias)', 1.0
    elif cfg.depth_scale == 'norm':
        pattern, power = r'norm_[12x]\.(?:weight|bias)', 0.5
    else:
        return {}
    for name in weights:
        found = re.fullmatch(r'(?:blocks|encoder)\.(\d+)\.' + pattern, name)
        if found:
            n = int(found[1]) + 1
            weights[name] = weights[name] / n ** power
    return {'depth_scale': 'none'}
