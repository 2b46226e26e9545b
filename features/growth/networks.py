"""
The arithmetic of surgery: the settings and tensors of a network out of those of another.

    cfg, weights = take_layers(cfg, weights, [0, 1, 2, 3])                      # the first four blocks
    cfg, weights = take_layers(cfg, weights, [0, 0, 1, 1], silent={1, 3})       # twice as many, the same function
    cfg, weights = widen(cfg, weights, n_embd=512, n_head=8)                    # the same function

Weights are {name: tensor}, names those of model.py. A map {new name: old name} says which tensor each one was, so that an optimizer's
moments can follow.
"""
import dataclasses
import math
import re
from dataclasses import dataclass
from typing import Literal

import torch

from configurator import FilePath, UserError, build, check, default_of
from features.growth.lowrank import is_linear, matrix
from model import LowRank, ModelConfig, make_model, only_in_training


@dataclass
class GrowConfig:
    grow_every: int = 0  # steps after which the network gets more blocks and goes on, again and again; 0 = never
    grow_to: int = 0  # until it has so many; n_layer is what it begins with
    grow_by: int = 2  # so many at a time, as Inheritune does (Sanyal et al. 2024, arXiv 2404.08634)
    grow_how: Literal['stack', 'interleave', 'zero'] = 'stack'  # where they are from, as in surgery.py grow
    grow_from: FilePath = ''  # or: from this network, a run, a checkpoint or hf:FOLDER, of which the blocks that follow are inherited

    def check(self):
        """Raise ValueError for values that cannot work."""
        for name, least in (('grow_every', 0), ('grow_to', 0), ('grow_by', 1)):
            if getattr(self, name) < least:
                raise ValueError(f'{name}={getattr(self, name)}: takes {least} or more')
        if bool(self.grow_every) != bool(self.grow_to):
            raise ValueError(f'grow_every={self.grow_every}, grow_to={self.grow_to}: give both or none')
        if self.grow_from and not self.grow_every:
            raise ValueError(f'grow_from={self.grow_from}: is where blocks come from with grow_every and grow_to: give these too')


# -----------------------------------------------------------------------------
# What is known of a network

# Settings that the functions below take into account. Any other setting, as a new one, must be at its default. Add a new
# setting here once all of these functions keep their promises with it.
KNOWN = {'vocab_size', 'block_size', 'n_layer', 'n_encoder_layer', 'source_size', 'n_head', 'n_kv_head', 'n_embd', 'head_dim', 'd_ff',
         'position', 'cross_rope', 'rope_theta', 'norm', 'norm_eps', 'mlp', 'mlp_norm', 'qk_norm',
         'n_expert', 'n_expert_active', 'expert_shared', 'expert_aux', 'expert_z', 'expert_bias',
         'softcap', 'zero_init', 'embed_norm', 'depth_scale', 'value_residual', 'tie', 't5_scale', 'bias', 'dropout', 'init_std',
         'rank_qk', 'rank_vo', 'rank_mlp', 'rank_embed', 'rank_head', 'ranks', 'first_block_dense', 'rank_act', 'rank_act_qk', 'rank_init',
         'rank_identity', 'rank_blocks', 'rank_guide'}


def refuse_unknown(cfg, what, but=()):
    """Raise UserError for a setting of a ModelConfig that is not at its default, and is not KNOWN or is in `but`. what: for the message."""
    for f in dataclasses.fields(cfg):
        value = getattr(cfg, f.name)
        if (f.name not in KNOWN or f.name in but) and value != default_of(f):
            raise UserError(f'{f.name}={value}: a network with it cannot be {what}')


# -----------------------------------------------------------------------------
# Depth

def parse_layers(text, n_layer):
    """
    Numbers of blocks out of '0-11', '0,2,4', 'first:6', 'last:6', 'middle:6', or several of these with commas between them. One may come
    more than once. Raises UserError for what is no such thing and for a block that a network of n_layer does not have.
    """
    layers = []
    for part in text.replace(' ', '').split(','):
        where, _, count = part.partition(':')
        begin, dash, end = part.partition('-')
        if where in ('first', 'last', 'middle') and count.isdecimal():
            start = {'first': 0, 'last': n_layer - int(count), 'middle': (n_layer - int(count)) // 2}[where]
            stop = start + int(count)
        elif begin.isdecimal() and (end.isdecimal() if dash else not end):
            start, stop = int(begin), int(end if dash else begin) + 1
        else:
            raise UserError(f'layers={text}: {part!r}: takes blocks as 0-11, 0,2,4, first:6, last:6 or middle:6')
        if start >= stop:
            raise UserError(f'layers={text}: {part!r}: has no block in it: the first number is the lower one')
        if start < 0 or stop > n_layer:
            raise UserError(f'layers={text}: the network has the blocks 0 to {n_layer - 1}')
        layers += range(start, stop)
    return layers


def grown_layers(cfg, target, how):
    """
    (blocks to take, those of them that are to be silent) to grow the network of a ModelConfig to `target` blocks. stack: all of them again and again
    (Gong et al. 2019; G_stack, Du et al. 2024, arXiv 2405.15319); interleave: each some times in a row; zero: the same, and all but the
    first of a row silent (LLaMA Pro, Wu et al. 2024, arXiv 2401.02415), or on top where a block's number matters to it (depth_scale).
    """
    n_layer = cfg.n_layer
    if how not in ('stack', 'interleave', 'zero'):
        raise UserError(f'how={how}: has no code in growth.py: use stack, interleave or zero')
    if how == 'stack' or how == 'zero' and cfg.depth_scale != 'none':
        return [n % n_layer for n in range(target)], set(range(n_layer, target)) if how == 'zero' else set()
    layers = [n * n_layer // target for n in range(target)]
    return layers, {n for n in range(1, target) if layers[n] == layers[n - 1]} if how == 'zero' else set()


def layer_names(names, layers):
    """{name in a network whose block n is block layers[n]: name in the old one}, for the tensors that both have."""
    out = {name: name for name in names if not name.startswith('blocks.')}
    for n, layer in enumerate(layers):
        prefix = f'blocks.{layer}.'
        out |= {f'blocks.{n}.{name.removeprefix(prefix)}': name for name in names if name.startswith(prefix)}
    out.pop('blocks.0.attn.v_mix', None)  # the first block has no values before its own to mix in
    return out


def take_layers(cfg, weights, layers, silent=()):
    """
    (ModelConfig, weights) of a network whose block n is block layers[n] of this one; what is not in blocks stays as it is. The blocks n
    in `silent` add nothing at first: the matrices that write their output are zero. Raises UserError for a network with an encoder or with
    settings that are not known here.
    """
    refuse_unknown(cfg, 'grown or cut in its layers', but=('n_encoder_layer',))
    new = dataclasses.replace(cfg, n_layer=len(layers), first_block_dense=False, ranks={k: r for k, r in cfg.ranks.items() if not k.startswith('blocks.')})
    new.ranks |= {f'blocks.{n}.{name}': cfg.rank(layer, name) for n, layer in enumerate(layers) for name in cfg.sizes()
                  if cfg.rank(layer, name) != new.rank(n, name)}
    out = {name: weights[old].clone() for name, old in layer_names(weights, layers).items()}
    for n in silent:
        for name in out:  # of two factors the outer one is enough
            if re.match(rf'blocks\.{n}\.(attn\.o|mlp\.((experts|shared)\.)?down)\.(?!down\.)', name):
                out[name].zero_()
    for n, layer in enumerate(layers):
        if cfg.value_residual and layer == 0 and n > 0:
            out[f'blocks.{n}.attn.v_mix'] = torch.zeros(())  # it had only its own values
    return new, out


def grow(cfg, weights, n_layer, how, other=None):
    """
    (ModelConfig, weights, {name: old name} of the tensors that there were) of a network with n_layer blocks: `how` as grown_layers() has it, or
    with other = (ModelConfig, weights) the blocks that follow in that network.
    """
    refuse_unknown(cfg, 'grown')
    if other is not None:
        new, out = take_layers(*other, range(n_layer))
        kept = {name: getattr(cfg, name) for name in ('block_size', *only_in_training(type(cfg)))}
        return dataclasses.replace(new, **kept), out | weights, {name: name for name in weights}
    layers, silent = grown_layers(cfg, n_layer, how)
    new = tuple(f'blocks.{n}.' for n in silent)
    names = {name: old for name, old in layer_names(weights, layers).items() if not name.startswith(new)}
    return *take_layers(cfg, weights, layers, silent), names


# -----------------------------------------------------------------------------
# Width

NORM = r'(.*\.)?norm_\w\.(weight|bias)'  # of the stream


def stream_dim(name, cfg):
    """The dimension in which the tensor `name` writes to the stream between the blocks; None if it does not write there."""
    if name in ('wte.weight', 'wpe.weight'):
        return None if name == 'wte.weight' and cfg.rank_embed else 1
    return 0 if re.fullmatch(r'wte_up\.weight|blocks\.\d+\.(attn\.o|mlp\.down)\.(up\.)?(weight|bias)', name) else None


@torch.no_grad()
def widen(cfg, weights, n_embd=0, n_head=0, d_ff=0):
    """
    (ModelConfig, weights) of larger sizes (0: as it is) and the same function: every old tensor is a corner of its new one. What is new in the
    stream, in heads and in the MLP is not written yet, so it is zero, but is read by random weights, so that it learns from the first step
    (after Net2Net, Chen et al. 2016, arXiv 1511.05641, without its copies, which stay alike). The energy that a norm divides by is spread
    over more entries, for which its weight and norm_eps make up; LayerNorm's mean is zero once the stream's is (center). Random numbers
    are torch's. Raises UserError for what cannot be widened exactly.
    """
    refuse_unknown(cfg, 'widened and keep its function',
                   but=('n_encoder_layer', 'n_expert', 'mlp_norm', 'rank_identity', 'rank_blocks', 'rank_guide'))
    if getattr(cfg, 't5_scale', False) and cfg.tie:
        raise UserError('t5_scale=True, tie=True: the scale of the logits goes with n_embd: a network with both cannot be widened and keep its function')
    n_embd, n_head, d_ff = n_embd or cfg.n_embd, n_head or cfg.n_head, d_ff or cfg.mlp_width
    for name, value, old in (('n_embd', n_embd, cfg.n_embd), ('n_head', n_head, cfg.n_head), ('d_ff', d_ff, cfg.mlp_width)):
        if value < old:
            raise UserError(f'{name}={value}: the network has {old}, and widen makes it larger')
    if n_head % (cfg.n_head // cfg.kv_heads):
        raise UserError(f'n_head={n_head}: a head of keys and values serves {cfg.n_head // cfg.kv_heads} heads of queries: take a multiple of that')
    if cfg.norm == 'layernorm' and n_embd > cfg.n_embd:
        cfg, weights = center(cfg, weights)
    new = dataclasses.replace(cfg, n_embd=n_embd, n_head=n_head, n_kv_head=n_head * cfg.kv_heads // cfg.n_head, head_dim=cfg.d_head, d_ff=d_ff,
                              norm_eps=cfg.norm_eps * cfg.n_embd / n_embd)
    check(new)
    out = make_model(new).state_dict()
    for name, old in weights.items():
        if re.fullmatch(NORM, name):
            old = old * math.sqrt(cfg.n_embd / n_embd) if name.endswith('weight') else old
            out[name].fill_(old.mean() if name.endswith('weight') else 0)
        elif stream_dim(name, cfg) is not None or name.endswith(('attn.o.down.weight', 'mlp.down.down.weight')):
            out[name].zero_()
        out[name][tuple(slice(size) for size in old.shape)] = old
    return new, out


def center(cfg, weights):
    """(ModelConfig, weights) of the same function whose stream has mean zero, as LayerNorm makes it anyhow. An embedding that was the head too is two then."""
    if cfg.embed_norm:
        raise UserError('embed_norm=True, norm=layernorm: a network with both cannot be widened and keep its function')
    if cfg.tie and cfg.rank_embed:
        raise UserError('tie=True, rank_embed, norm=layernorm: a network with these cannot be widened and keep its function')
    out = weights | ({'head.weight': weights['wte.weight']} if cfg.tie else {})
    dims = {name: stream_dim(name, cfg) for name in weights}
    out |= {name: t - t.mean(dims[name], keepdim=True) for name, t in weights.items() if dims[name] is not None}
    return dataclasses.replace(cfg, tie=False), out


# -----------------------------------------------------------------------------
# Experts

@torch.no_grad()
def upcycle(cfg, weights, n_expert, n_expert_active=1, expert_shared=False, expert_bias=0.0):
    """
    (ModelConfig, weights) of a mixture of experts with the function of a dense network (Komatsuzaki et al. 2022, arXiv 2212.05055): every expert
    is a copy of its MLP, so that it does not matter which is picked. They grow apart by the tokens that they get, for which no noise is
    needed. A single one is multiplied by its probability, 1/n_expert at first, for which its output matrix makes up (He et al. 2024,
    arXiv 2410.07524); two and more have shares that add up to 1. With a shared expert that one is the MLP, and the output matrices of the
    others are zero. Routers are as good as zero, just not equal. Random numbers are torch's. Raises UserError for what is a mixture already.
    """
    if cfg.n_expert:
        raise UserError(f'n_expert={cfg.n_expert}: the network is a mixture of experts already: give a dense one')
    refuse_unknown(cfg, 'made a mixture of experts and keep its function')
    new = build(ModelConfig, **dataclasses.asdict(cfg) | {'n_expert': n_expert, 'n_expert_active': n_expert_active, 'expert_shared': expert_shared,
                                                          'expert_bias': expert_bias})
    check(new)
    out = {}
    for name, t in weights.items():
        block, mlp, rest = name.partition('.mlp.')
        if not mlp:
            out[name] = t
            continue
        if expert_shared:
            out[f'{block}.mlp.shared.{rest}'] = t
        if rest.startswith('down.'):
            t = t * (0 if expert_shared else n_expert if n_expert_active == 1 else 1)
        is_norm = rest.startswith('norm.')  # one for all experts
        out[f'{block}.mlp.experts.{rest}'] = t.clone() if is_norm else t.repeat(n_expert, *[1] * t.ndim)
        if rest == 'up.weight':  # once a block
            out[f'{block}.mlp.router'] = 1e-6 * torch.randn(n_expert, cfg.n_embd)
            out |= {f'{block}.mlp.expert_bias': torch.zeros(n_expert)} if expert_bias else {}
    return new, out


# -----------------------------------------------------------------------------
# The same function in plainer settings

@torch.no_grad()
def fold(model):
    """
    (ModelConfig, weights) of the same function with fewer settings: factors without an activation multiplied out, depth_scale a part of
    the weights, a norm of the embedding a part of it. What cannot be folded stays as it is. Raises UserError for a network with settings
    that are not known here.
    """
    refuse_unknown(model.cfg, 'written as a class of transformers: --as=custom takes any decoder')
    cfg, weights, plain = model.cfg, model.state_dict(), {}
    low_rank = {name: layer for name, layer in model.named_modules() if isinstance(layer, LowRank)}
    if all(is_linear(layer) for layer in low_rank.values()):
        for name, layer in low_rank.items():
            weights = {key: t for key, t in weights.items() if not key.startswith(f'{name}.')} | {f'{name}.weight': matrix(layer)}
            if layer.up.bias is not None:
                weights[f'{name}.bias'] = layer.up.bias
        plain |= {name: type(getattr(cfg, name))() for name in ('rank_qk', 'rank_vo', 'rank_mlp', 'ranks', 'first_block_dense', 'rank_identity', 'rank_blocks')}
        plain |= {'rank_act': 'none', 'rank_act_qk': None}
    if cfg.rank_embed:
        weights['wte.weight'] = model.wte.weight @ weights.pop('wte_up.weight').T
    if model.head_down is not None:
        weights['head.weight'] = model.head.weight @ weights.pop('head_down.weight')
    plain |= {'rank_embed': 0, 'rank_head': 0}
    if cfg.embed_norm and cfg.position != 'learned':
        if cfg.tie:
            weights['head.weight'] = weights['wte.weight'] * (cfg.n_embd ** -0.5 if getattr(cfg, 't5_scale', False) else 1)
        weights['wte.weight'] = model.norm_e(weights['wte.weight'])
        weights['wte.weight'][cfg.vocab_size:] = 0
        weights = {name: t for name, t in weights.items() if not name.startswith('norm_e.')}
        plain |= {'embed_norm': False, 'tie': False}
    by = {'attn': (r'(?:attn|cross)\.q\.(?:up\.)?(?:weight|bias)', 1.0), 'norm': (r'norm_[12x]\.(?:weight|bias)', 0.5)}.get(cfg.depth_scale)
    if by and not (cfg.depth_scale == 'attn' and cfg.qk_norm):
        for name in weights:
            found = re.fullmatch(r'(?:blocks|encoder)\.(\d+)\.' + by[0], name)
            if found:
                weights[name] = weights[name] / (int(found[1]) + 1) ** by[1]
        plain['depth_scale'] = 'none'
    return dataclasses.replace(cfg, **plain), weights


# -----------------------------------------------------------------------------
# The mean of several

def average(cfgs, weights, names):
    """
    (ModelConfig, weights) with the means of several networks' tensors (model soups, Wortsman et al. 2022, arXiv 2203.05482; the last
    checkpoints of a run: LAWA, Kaddour 2022, arXiv 2209.14981). `names`: where they are from. Raises UserError unless all are one architecture.
    """
    for cfg, name in zip(cfgs, names):
        names = [f.name for f in dataclasses.fields(cfg) if f.name not in only_in_training(type(cfg))]
        other = next((name for name in names if getattr(cfg, name) != getattr(cfgs[0], name)), None)
        if other:
            raise UserError(f'from={name}: has {other}={getattr(cfg, other)}, but {names[0]} has {getattr(cfgs[0], other)}: only equal networks have a mean')
    refuse_unknown(cfgs[0], 'averaged')
    return cfgs[0], {name: torch.stack([w[name].float() for w in weights]).mean(0).to(t.dtype) for name, t in weights[0].items()}
