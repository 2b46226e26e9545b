"""
The names of tensors: those of transformers' families, and ours.

    for row in name_rows(FAMILIES['gpt2'], cfg):
        row.theirs, row.ours      # 'h.0.attn.c_attn.weight', {'blocks.0.attn.q.weight': 768, …}
"""
import dataclasses
import re
from typing import NamedTuple

import torch

from configurator import UserError
from model import Unfilled, make_model

# -----------------------------------------------------------------------------
# Names of modules: theirs → ours. N is the number of a layer. Where there are several of ours, theirs is one
# matrix with ours one below the other. The embedding comes first

HEAD = 'lm_head'  # ours is head; no family has a prefix before it

GPT2 = {
    'wte': 'wte',
    'wpe': 'wpe',
    'ln_f': 'norm_f',
    'h.N.ln_1': 'blocks.N.norm_1',
    'h.N.attn.c_attn': 'blocks.N.attn.q blocks.N.attn.k blocks.N.attn.v',
    'h.N.attn.c_proj': 'blocks.N.attn.o',
    'h.N.ln_2': 'blocks.N.norm_2',
    'h.N.mlp.c_fc': 'blocks.N.mlp.up',
    'h.N.mlp.c_proj': 'blocks.N.mlp.down',
}
LLAMA = {
    'embed_tokens': 'wte',
    'norm': 'norm_f',
    'layers.N.input_layernorm': 'blocks.N.norm_1',
    'layers.N.self_attn.q_proj': 'blocks.N.attn.q',
    'layers.N.self_attn.k_proj': 'blocks.N.attn.k',
    'layers.N.self_attn.v_proj': 'blocks.N.attn.v',
    'layers.N.self_attn.o_proj': 'blocks.N.attn.o',
    'layers.N.post_attention_layernorm': 'blocks.N.norm_2',
    'layers.N.mlp.gate_proj': 'blocks.N.mlp.gate',
    'layers.N.mlp.up_proj': 'blocks.N.mlp.up',
    'layers.N.mlp.down_proj': 'blocks.N.mlp.down',
}
QWEN3 = LLAMA | {
    'layers.N.self_attn.q_norm': 'blocks.N.attn.q_norm',
    'layers.N.self_attn.k_norm': 'blocks.N.attn.k_norm',
}
OLMO2 = {theirs: ours for theirs, ours in QWEN3.items() if theirs != 'layers.N.input_layernorm'} | {
    'layers.N.post_attention_layernorm': 'blocks.N.norm_1',
    'layers.N.post_feedforward_layernorm': 'blocks.N.norm_2',
}


def gpt2_names(cfg):
    return GPT2


def llama_names(cfg):
    return LLAMA


def qwen3_names(cfg):
    return QWEN3


def olmo2_names(cfg):
    return OLMO2


def minnow_names(cfg):
    return {}  # their names are ours


def t5_names(cfg):
    names = {
        'shared': 'wte',
        'encoder.final_layer_norm': 'norm_encoder',
        'decoder.final_layer_norm': 'norm_f',
    }
    names |= t5_stack_names(cfg, 'encoder', 'encoder', 'rel_encoder', has_cross=False)
    names |= t5_stack_names(cfg, 'decoder', 'blocks', 'rel', has_cross=True)
    return names


def t5_stack_names(cfg, stack, ours, rel, has_cross):
    """The names of T5's encoder or decoder. In T5, a layer is a norm and the attention or MLP after it."""
    names = {f'{stack}.block.0.layer.0.SelfAttention.relative_attention_bias': rel}
    layer = f'{stack}.block.N.layer.0'
    names[f'{layer}.layer_norm'] = f'{ours}.N.norm_1'
    for name in 'qkvo':
        names[f'{layer}.SelfAttention.{name}'] = f'{ours}.N.attn.{name}'
    if has_cross:
        layer = f'{stack}.block.N.layer.1'
        names[f'{layer}.layer_norm'] = f'{ours}.N.norm_x'
        for name in 'qkvo':
            names[f'{layer}.EncDecAttention.{name}'] = f'{ours}.N.cross.{name}'
    layer = f'{stack}.block.N.layer.{2 if has_cross else 1}'
    names[f'{layer}.layer_norm'] = f'{ours}.N.norm_2'
    if cfg.mlp == 'relu':
        names[f'{layer}.DenseReluDense.wi'] = f'{ours}.N.mlp.up'
    else:
        names[f'{layer}.DenseReluDense.wi_0'] = f'{ours}.N.mlp.gate'
        names[f'{layer}.DenseReluDense.wi_1'] = f'{ours}.N.mlp.up'
    names[f'{layer}.DenseReluDense.wo'] = f'{ours}.N.mlp.down'
    return names


# -----------------------------------------------------------------------------
# Tensors

class Row(NamedTuple):
    """One tensor of the other library."""
    theirs: str  # its name, without the prefix
    ours: dict  # {our tensor: its rows}: one below the other they are theirs
    shape: list  # of theirs; the vocabulary has no padding
    is_flipped: bool  # whether theirs is stored transposed


def name_rows(family, cfg):
    """
    The Row of every tensor of a model. Raises UserError if the model lacks a tensor that the family needs.
    """
    names = dict(family.names(cfg))
    if not names:
        return own_rows(cfg)
    if not cfg.tie:
        names[HEAD] = 'head'
    encoder = min(1, cfg.n_encoder_layer)
    shapes = shapes_of(dataclasses.replace(cfg, n_layer=1, n_encoder_layer=encoder, no_rope=[]))
    rows = []
    for theirs, ours in names.items():
        rows += rows_of(family, cfg, theirs, ours, 'weight', shapes)
        rows += rows_of(family, cfg, theirs, ours, 'bias', shapes)
    return rows


def own_rows(cfg):
    """The same for our own names, with padding."""
    rows = []
    for name, shape in shapes_of(cfg).items():
        length = shape[0] if shape else 1
        rows.append(Row(name, {name: length}, shape, False))
    return rows


def shapes_of(cfg):
    """{name: shape} of a model's tensors, without allocating them."""
    with torch.device('meta'), Unfilled():
        return {name: list(t.shape) for name, t in make_model(cfg).state_dict().items()}


def rows_of(family, cfg, theirs, ours, kind, shapes):
    """
    The Rows of one module's weight or bias (`kind`) in every layer; [] for a bias that the model does not
    have. shapes: those of the tensors of a model with one layer.
    """
    parts = [f'{part}.{kind}' for part in ours.split()]
    part_shapes = [shapes.get(part.replace('.N.', '.0.')) for part in parts]
    for part, shape in zip(parts, part_shapes):
        if shape is None and kind == 'bias':
            return []
        if shape is None:
            raise UserError(f'{part}: this network has no such tensor, and {family.architecture} wants one')
    lengths = [shape[0] for shape in part_shapes]
    length = cfg.vocab_size if ours in ('wte', 'head') else sum(lengths)
    shape = [length, *part_shapes[0][1:]]

    count = 1
    if '.N.' in theirs:
        count = cfg.n_encoder_layer if ours.startswith('encoder.') else cfg.n_layer
    rows = []
    for n in range(count):
        name = f'{theirs}.{kind}'.replace('.N.', f'.{n}.')
        named = {part.replace('.N.', f'.{n}.'): part_length for part, part_length in zip(parts, lengths)}
        is_flipped = len(shape) == 2 and re.fullmatch(family.flipped, name) is not None
        rows.append(Row(name, named, shape[::-1] if is_flipped else shape, is_flipped))
    return rows
