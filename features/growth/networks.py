"""
Make the settings and tensors of a new model from those of another.

    cfg, weights = take_layers(cfg, weights, [0, 1, 2, 3])                  # the first four blocks
    cfg, weights = take_layers(cfg, weights, [0, 0, 1, 1], silent={1, 3})   # twice as many, the same function
    cfg, weights = take_layers(cfg, weights, [0, 1], encoder=[0, 1, 2])     # of an encoder-decoder
    cfg, weights = widen(cfg, weights, n_embd=512, n_head=8)                # the same function
    cfg, weights = average(cfgs, weights, names)                            # the mean of several networks

Weights are {name: tensor} with the names of model.py. A map {new name: old name} gives the origin of each
tensor, so that its optimizer moments can be kept.
"""
import dataclasses
import math
import re

import torch

from configurator import UserError, check
from features import default_of
from model import make_model, only_in_training

# -----------------------------------------------------------------------------
# Which networks can be grown

# Settings that the functions below and those of upcycle.py and factorize.py take into account. Any other
# setting, such as a new one, has to be at its default. Add it here once all of these functions keep their
# promises with it
KNOWN = {
    'vocab_size', 'block_size', 'n_layer', 'n_encoder_layer', 'source_size', 'rel_per_layer', 'n_head',
    'n_kv_head', 'n_embd', 'head_dim', 'd_ff', 'position', 'cross_rope', 'rope_theta', 'rope_scaling',
    'rope_dim', 'no_rope', 'window', 'full_layers', 'window_theta', 'norm', 'norm_eps', 'post_norm',
    'parallel', 'mlp', 'mlp_norm', 'qk_norm', 'attn_scale', 'attn_softcap', 'embed_scale', 'residual_scale',
    'logit_scale', 'softcap', 'zero_init', 'embed_norm', 'depth_scale', 'value_residual', 'tie', 't5_scale',
    'n_expert', 'n_expert_active', 'expert_aux', 'expert_z', 'expert_bias', 'expert_width', 'expert_renorm',
    'shared_width', 'shared_gate', 'dense_layers', 'bias', 'qkv_bias', 'dropout', 'init_std', 'rank_qk',
    'rank_vo', 'rank_mlp', 'rank_embed', 'rank_head', 'ranks', 'rank_act',
}

# The choices of these settings that the functions take into account
CHOICES = {
    'position': ('rope', 'learned', 'relative', 'none'),
    'norm': ('rmsnorm', 'layernorm'),
    'depth_scale': ('none', 'attn', 'norm'),
}


def refuse_unknown(cfg, what, but=()):
    """
    Raise UserError for a setting of a ModelConfig that differs from its default and is not KNOWN, or is in
    `but`. what: the operation, for the message.
    """
    for f in dataclasses.fields(cfg):
        value = getattr(cfg, f.name)
        is_known = f.name in KNOWN or f.name in only_in_training(cfg)
        if f.name in CHOICES and value not in CHOICES[f.name]:
            is_known = False
        if (not is_known or f.name in but) and value != default_of(f):
            raise UserError(f'{f.name}={value}: a network with it cannot be {what}')


# -----------------------------------------------------------------------------
# Depth

def parse_layers(text, n_layer, name='layers', whose='the network'):
    """
    [block index, …] from '0-11', '0,2,4', 'first:6', 'last:6', 'middle:6', or several of these separated by
    commas. A block may be repeated. name, whose: the setting and the stack of blocks, for messages. Raises
    UserError for any other text, and for a block beyond n_layer.
    """
    layers = []
    for part in text.replace(' ', '').split(','):
        found = parse_range(part, n_layer)
        if found is None:
            raise UserError(f'{name}={text}: {part!r}: takes blocks as 0-11, 0,2,4, first:6, '
                            'last:6 or middle:6')
        start, stop = found
        if start >= stop:
            raise UserError(f'{name}={text}: {part!r}: has no block in it: the first number is the lower one')
        if start < 0 or stop > n_layer:
            raise UserError(f'{name}={text}: {whose} has the blocks 0 to {n_layer - 1}')
        layers += range(start, stop)
    return layers


def parse_range(part, n_layer):
    """(first block, last block + 1) of 'last:6', '0-11' or '4'; None for any other text."""
    where, _, count = part.partition(':')
    if where in ('first', 'last', 'middle') and count.isdecimal():
        start = 0
        if where == 'last':
            start = n_layer - int(count)
        if where == 'middle':
            start = (n_layer - int(count)) // 2
        return start, start + int(count)
    begin, dash, end = part.partition('-')
    if not dash:
        end = begin
    if begin.isdecimal() and end.isdecimal():
        return int(begin), int(end) + 1
    return None


def grown_layers(cfg, target, how):
    """
    (the block of the old network that each of `target` new ones is, those of the new ones that are silent at
    first).

    stack       all blocks again and again (Gong et al. 2019; G_stack, Du et al. 2024, arXiv 2405.15319)
    interleave  each block several times in a row
    zero        as interleave, but all copies are silent, so that the function stays (LLaMA Pro, Wu et al.
                2024, arXiv 2401.02415). Where a block's number matters to it (depth_scale), they are stacked
                on top instead
    """
    if how not in ('stack', 'interleave', 'zero'):
        raise UserError(f'how={how}: has no code in features/growth: use stack, interleave or zero')
    number_matters = cfg.depth_scale != 'none'
    if how == 'stack' or (how == 'zero' and number_matters):
        layers = [n % cfg.n_layer for n in range(target)]
        copies = set(range(cfg.n_layer, target))
    else:
        layers = [n * cfg.n_layer // target for n in range(target)]
        copies = {n for n in range(1, target) if layers[n] == layers[n - 1]}
    return layers, copies if how == 'zero' else set()


def layer_names(names, layers, stack='blocks'):
    """
    {new name: old name} of the tensors of a model whose block n is block layers[n] of the old model. stack:
    blocks or encoder; the tensors of other stacks keep their names.
    """
    out = {name: name for name in names if not name.startswith(f'{stack}.')}
    for n, layer in enumerate(layers):
        prefix = f'{stack}.{layer}.'
        for name in names:
            if name.startswith(prefix):
                out[f'{stack}.{n}.{name.removeprefix(prefix)}'] = name
    out.pop(f'{stack}.0.attn.v_mix', None)  # the first block has no values before its own to mix in
    return out


# what a block writes; of two factors the outer one
OUTPUT = r'(attn\.o|mlp\.(experts\.|shared\.)?down)\.(?!down\.)'


def take_layers(cfg, weights, layers, silent=(), encoder=None):
    """
    (ModelConfig, weights) of a model whose block n is block layers[n] of this one; the rest is unchanged. The
    output matrices (post_norm: the norms) of the blocks in `silent` are zero, so that these blocks add
    nothing at first. encoder: the same as `layers` for the blocks of an encoder. Raises UserError for a model
    with an encoder if `encoder` is None, with settings that are not KNOWN, or whose `ranks` or dense_layers
    cannot name the blocks of both stacks.
    """
    refuse_unknown(cfg, 'grown or cut in its layers', but=() if encoder else ('n_encoder_layer',))
    general = {name: rank for name, rank in cfg.ranks.items() if not name.startswith('blocks.')}
    no_rope = [n for n, layer in enumerate(layers) if layer in cfg.no_rope]
    full_layers = [n for n, layer in enumerate(layers) if layer in cfg.full_layers]
    new = dataclasses.replace(cfg, n_layer=len(layers), ranks=general, no_rope=no_rope,
                              full_layers=full_layers)
    if cfg.n_expert:
        stacks = layers, encoder or []
        dense = {n for stack in stacks for n, layer in enumerate(stack) if layer in cfg.dense_layers}
        new.dense_layers = sorted(dense)
        if all(layer in cfg.dense_layers for stack in stacks for layer in stack):
            raise UserError(f'dense_layers={cfg.dense_layers}: blocks {sorted(set(layers))} alone have no '
                            'experts: take one that has')
    for n, layer in enumerate(layers):
        for name in cfg.sizes():
            if cfg.rank(layer, name) != new.rank(n, name):
                new.ranks[f'blocks.{n}.{name}'] = cfg.rank(layer, name)
    if encoder:
        new.n_encoder_layer = len(encoder)
        refuse_other_blocks(cfg, new, layers, encoder)

    origins = layer_names(weights, layers)
    if encoder:
        blocks = {name: old for name, old in origins.items() if name.startswith('blocks.')}
        origins = blocks | layer_names([name for name in weights if not name.startswith('blocks.')], encoder,
                                       'encoder')
    out = {name: weights[old].clone() for name, old in origins.items()}
    written = r'norm_[am]\.' if cfg.post_norm else OUTPUT
    for n in silent:
        for name in out:
            if re.match(rf'blocks\.{n}\.{written}', name):
                out[name].zero_()
    for stack, taken in (('blocks', layers), ('encoder', encoder or [])):
        for n, layer in enumerate(taken):
            if cfg.value_residual and layer == 0 and n > 0:
                out[f'{stack}.{n}.attn.v_mix'] = torch.zeros(())  # the first block had only its own values
    return new, out


def refuse_other_blocks(cfg, new, layers, encoder):
    """
    Raise UserError if a block of the encoder or the decoder would change: `ranks` and dense_layers name the
    blocks of both by one number.
    """
    for n, layer in enumerate(encoder):
        for name in cfg.sizes():
            if cfg.rank(layer, name) != new.rank(n, name):
                raise UserError(f'ranks={cfg.ranks}: block {n} of the encoder, taken from {layer}, has rank '
                                f'{cfg.rank(layer, name)} for {name}, that of the decoder '
                                f'{new.rank(n, name)}: take the same blocks of both')
    for stack in (layers, encoder) if cfg.n_expert else ():
        for n, layer in enumerate(stack):
            if (layer in cfg.dense_layers) != (n in new.dense_layers):
                raise UserError(f'dense_layers={cfg.dense_layers}: block {n} would have experts in the '
                                'encoder or the decoder alone: take the same blocks of both')


def grow(cfg, weights, n_layer, how, other=None):
    """
    (ModelConfig, weights, {name: old name} of the existing tensors) of a model with n_layer blocks: with
    copies of its own blocks, `how` as in grown_layers(), or with the next blocks of another model, other =
    (ModelConfig, weights). Raises UserError for settings that are not KNOWN.
    """
    refuse_unknown(cfg, 'grown')
    if other is not None:
        new, out = take_layers(*other, range(n_layer))
        kept = {name: getattr(cfg, name) for name in ('block_size', *only_in_training(cfg))}
        names = {name: name for name in weights}
        return dataclasses.replace(new, **kept), out | weights, names
    layers, silent = grown_layers(cfg, n_layer, how)
    new, out = take_layers(cfg, weights, layers, silent)
    copies = tuple(f'blocks.{n}.' for n in silent)
    names = {name: old for name, old in layer_names(weights, layers).items() if not name.startswith(copies)}
    return new, out, names


# -----------------------------------------------------------------------------
# Width

NORM = r'(.*\.)?norm_\w\.(weight|bias)'  # of the stream
NOT_WIDENED = ('n_encoder_layer', 'n_expert', 'mlp_norm', 'post_norm')
STREAM_OUTPUT = r'wte_up\.weight|blocks\.\d+\.(attn\.o|mlp\.down)\.(up\.)?(weight|bias)'


def stream_dim(name, cfg):
    """The dimension in which the tensor `name` writes to the residual stream; None if it does not."""
    if name == 'wpe.weight':
        return 1
    if name == 'wte.weight':
        return None if cfg.rank_embed else 1
    if re.fullmatch(STREAM_OUTPUT, name):
        return 0
    return None


@torch.no_grad()
def widen(cfg, weights, n_embd=0, n_head=0, d_ff=0):
    """
    (ModelConfig, weights) of larger sizes (0 = unchanged) that compute the same function: each old tensor is
    a corner of the new one. The weights that write new entries of the residual stream, heads and MLP are
    zero, so that the function does not change. The weights that read them are random, so that they learn from
    the first step (after Net2Net, Chen et al. 2016, arXiv 1511.05641, but without copies, which would stay
    equal). A norm averages over more entries; its weight and norm_eps compensate for that. LayerNorm needs a
    residual stream of mean zero: center(). Uses torch's random numbers. Raises UserError for a model that
    cannot be widened exactly.
    """
    n_embd = n_embd or cfg.n_embd
    n_head = n_head or cfg.n_head
    d_ff = d_ff or cfg.mlp_width
    refuse_width(cfg, n_embd, n_head, d_ff)
    if cfg.norm == 'layernorm' and n_embd > cfg.n_embd:
        cfg, weights = center(cfg, weights)
    new = dataclasses.replace(
        cfg,
        n_embd=n_embd,
        n_head=n_head,
        n_kv_head=n_head * cfg.kv_heads // cfg.n_head,
        head_dim=cfg.d_head,
        d_ff=d_ff,
        norm_eps=cfg.norm_eps * cfg.n_embd / n_embd,
    )
    check(new)
    out = make_model(new).state_dict()
    for name, old in weights.items():
        is_norm = re.fullmatch(NORM, name) is not None
        is_output = stream_dim(name, cfg) is not None
        is_inner_factor = name.endswith(('attn.o.down.weight', 'mlp.down.down.weight'))
        if is_norm and name.endswith('weight'):
            old = old * math.sqrt(cfg.n_embd / n_embd)
            out[name].fill_(old.mean())
        elif is_norm or is_output or is_inner_factor:
            out[name].zero_()
        corner = tuple(slice(size) for size in old.shape)
        out[name][corner] = old
    return new, out


def refuse_width(cfg, n_embd, n_head, d_ff):
    """Raise UserError if a model cannot have these sizes and compute the same function."""
    refuse_unknown(cfg, 'widened and keep its function', but=NOT_WIDENED)
    if getattr(cfg, 't5_scale', False) and cfg.tie:
        raise UserError('t5_scale=True, tie=True: the scale of the logits goes with n_embd: '
                        'a model with both cannot be widened exactly')
    if isinstance(cfg.qk_norm, str):  # its norm_eps would change
        raise UserError(f'qk_norm={cfg.qk_norm}: a network with it cannot be widened and keep its function')
    sizes = [
        ('n_embd', n_embd, cfg.n_embd),
        ('n_head', n_head, cfg.n_head),
        ('d_ff', d_ff, cfg.mlp_width),
    ]
    for name, value, old in sizes:
        if value < old:
            raise UserError(f'{name}={value}: the network has {old}, and widen makes it larger')
    queries = cfg.n_head // cfg.kv_heads
    if n_head % queries:
        raise UserError(f'n_head={n_head}: a head of keys and values serves {queries} heads of queries: '
                        'take a multiple of that')


def center(cfg, weights):
    """
    (ModelConfig, weights) of the same function with a residual stream of mean zero, which LayerNorm subtracts
    anyway. A tied head gets its own matrix. Raises UserError for a model that cannot be centered.
    """
    if cfg.embed_norm:
        raise UserError('embed_norm=True, norm=layernorm: '
                        'a model with both cannot be widened exactly')
    if cfg.tie and cfg.rank_embed:
        raise UserError('tie=True, rank_embed, norm=layernorm: '
                        'a model with these cannot be widened exactly')
    out = dict(weights)
    if cfg.tie:
        out['head.weight'] = weights['wte.weight']
    for name, t in weights.items():
        dim = stream_dim(name, cfg)
        if dim is not None:
            out[name] = t - t.mean(dim, keepdim=True)
    return dataclasses.replace(cfg, tie=False), out


# -----------------------------------------------------------------------------
# The mean of several networks

def average(cfgs, weights, names):
    """
    (ModelConfig, weights) with the mean of several models' weights (model soups, Wortsman et al. 2022, arXiv
    2203.05482; the last checkpoints of a run: LAWA, Kaddour 2022, arXiv 2209.14981). names: of the models,
    for messages. Raises UserError unless all have the same settings.
    """
    for cfg, name in zip(cfgs, names):
        for f in dataclasses.fields(cfg):
            value, first = getattr(cfg, f.name), getattr(cfgs[0], f.name)
            if f.name not in only_in_training(cfg) and value != first:
                raise UserError(f'from={name}: has {f.name}={value}, but {names[0]} has {first}: '
                                'only equal networks have a mean')
    refuse_unknown(cfgs[0], 'averaged')
    means = {}
    for name, t in weights[0].items():
        same = torch.stack([each[name].float() for each in weights])
        means[name] = same.mean(0).to(t.dtype)
    return cfgs[0], means
