"""
The tensors of a network: the names of transformers' families and ours, and how theirs are made of ours.

    for row in name_rows(FAMILIES['gpt2'], cfg):
        row.theirs, row.ours      # 'h.0.attn.c_attn.weight', {'blocks.0.attn.q.weight': 768, …}
"""
import dataclasses
import itertools
import re
from typing import NamedTuple

import torch
import torch.nn.functional as F

from configurator import UserError
from model import Unfilled, make_model

# -----------------------------------------------------------------------------
# Tensors

class Row(NamedTuple):
    """One tensor of the other library."""
    theirs: str  # its name, without the prefix
    ours: dict  # {our tensor: its rows}: one below the other they are theirs
    shape: list  # of theirs; the vocabulary has no padding
    is_flipped: bool = False  # whether theirs is stored transposed
    heads: int = 0  # above 0: ours alternate, with the rows of one of so many heads each
    shift: int = 0  # theirs is ours minus this
    lead: int = 0  # rows of theirs before those of ours
    expert: int = -1  # from 0: ours is a stack of matrices, one for each expert, and theirs is that one's

    def to_ours(self, t):
        """
        {our name: float32 tensor} of their tensor, with zeros as padding of the vocabulary. That of a
        float32 tensor is a view: if the file is mapped, nothing is read before it is used.
        """
        t = t.float() + self.shift if self.shift else t.float()
        if self.is_flipped:
            t = t.t().contiguous()
        if self.lead:
            t = t[self.lead:]
        length = sum(self.ours.values())
        if t.ndim and length > len(t):
            t = F.pad(t, (0, 0, 0, length - len(t)))
        if len(self.ours) == 1:
            return dict.fromkeys(self.ours, t)
        return dict(zip(self.ours, split(t, self.ours.values(), self.heads)))

    def to_theirs(self, parts):
        """Their tensor of ours, [tensor, …]."""
        length = self.shape[-1] if self.is_flipped else self.shape[0]
        t = join(parts, self.heads)[:length - self.lead]  # without the padding of the vocabulary
        if self.shift:
            t = t - self.shift
        if self.lead:
            t = torch.cat([t.new_zeros(self.lead, *t.shape[1:]), t])
        return t.t() if self.is_flipped else t


def put(weights, row, t, experts):
    """
    Add their tensor t of a Row to {our name: float32 tensor}. A stack of so many experts is made for its
    first matrix, and filled by the others.
    """
    if row.expert < 0:
        weights |= row.to_ours(t)
        return
    name, = row.ours
    if name not in weights:
        weights[name] = torch.empty(experts, *row.shape)
    weights[name][row.expert] = t


def split(t, lengths, heads=0):
    """
    The parts of a tensor, of these numbers of rows. heads: their rows alternate, those of one head of each
    part after those of another.
    """
    lengths = list(lengths)
    if not heads or len(lengths) == 1:
        return t.split(lengths)
    return [part.flatten(0, 1) for part in t.unflatten(0, (heads, len(lengths), -1)).unbind(1)]


def join(parts, heads=0):
    """The inverse of split()."""
    if not heads or len(parts) == 1:
        return torch.cat(parts)
    return torch.stack([part.unflatten(0, (heads, -1)) for part in parts], dim=1).flatten(0, 2)


def name_rows(family, cfg):
    """
    The Row of every tensor of a model. Raises UserError if the model lacks a tensor that the family needs.
    """
    names = family.names_of(cfg)
    if not names:
        return own_rows(cfg)
    if not cfg.tie:
        names[family.head] = 'head'
    shapes = shapes_of(with_few_blocks(cfg))
    rows = []
    for theirs, ours in names.items():
        rows += rows_of(family, cfg, theirs, ours, 'weight', shapes)
        rows += rows_of(family, cfg, theirs, ours, 'bias', shapes)
    return rows


def with_few_blocks(cfg):
    """
    The ModelConfig with one block of every kind, for rows_of(): block 0, and block 1 without experts if the
    model has both kinds.
    """
    small = dataclasses.replace(cfg, n_layer=1, n_encoder_layer=min(1, cfg.n_encoder_layer), no_rope=[],
                                full_layers=[])
    if cfg.n_expert and cfg.dense_layers:
        small.n_layer, small.dense_layers = 2, [1]
    return small


def own_rows(cfg):
    """The same for our own names, with padding."""
    rows = []
    for name, shape in shapes_of(cfg).items():
        length = shape[0] if shape else 1
        rows.append(Row(name, {name: length}, shape))
    return rows


def shapes_of(cfg):
    """{name: shape} of a model's tensors, without allocating them."""
    with torch.device('meta'), Unfilled():
        return {name: list(t.shape) for name, t in make_model(cfg).state_dict().items()}


def rows_of(family, cfg, theirs, ours, kind, shapes):
    """
    The Rows of one module's weight or bias (`kind`) in every layer; [] for a bias that the model does not
    have. shapes: those of the tensors of a model with_few_blocks().
    """
    if kind == 'weight' and ours.endswith('router'):  # a parameter of its own
        parts = [ours]
    else:
        parts = [f'{part}.{kind}' for part in ours.split()]
    blocks = [n for n in (0, 1) if all(part.replace('.N.', f'.{n}.') in shapes for part in parts)]
    if not blocks and kind == 'bias':
        return []
    if not blocks:
        missing = next(part for part in parts if part.replace('.N.', '.0.') not in shapes)
        raise UserError(f'{missing}: this network has no such tensor, and {family.architecture} wants one')
    part_shapes = [shapes[part.replace('.N.', f'.{blocks[0]}.')] for part in parts]
    experts = [-1]
    if '.E.' in theirs:
        experts = range(cfg.n_expert)
        part_shapes = [shape[1:] for shape in part_shapes]
    lengths = [shape[0] for shape in part_shapes]
    lead = family.lead if ours == 'wpe' else 0
    length = cfg.vocab_size if ours in ('wte', 'head') else lead + sum(lengths)
    shape = [length, *part_shapes[0][1:]]

    count = 1
    if '.N.' in theirs:
        count = cfg.n_encoder_layer if ours.startswith('encoder.') else cfg.n_layer
    layers = range(count)
    if cfg.n_expert:
        layers = [n for n in layers if int(n in cfg.dense_layers) in blocks]
    rows = []
    for n, e in itertools.product(layers, experts):
        name = f'{theirs}.{kind}'.replace('.N.', f'.{n}.').replace('.E.', f'.{e}.')
        named = {part.replace('.N.', f'.{n}.'): part_length for part, part_length in zip(parts, lengths)}
        is_flipped = len(shape) == 2 and re.fullmatch(family.flipped, name) is not None
        rows.append(Row(name, named, shape[::-1] if is_flipped else shape, is_flipped,
                        family.heads_of(name, cfg), family.shift_of(name), lead, e))
    return rows
