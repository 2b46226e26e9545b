"""
The families of networks that other libraries know: what their config.json says and what their tensors are called, both ways.

hub.py reads and writes folders by these tables; a further family is one more entry of FAMILIES.
"""
import dataclasses
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch

from configurator import UserError, build, default_of, from_dict
from model import ModelConfig, make_model

# -----------------------------------------------------------------------------
# config.json

class Config:
    """The fields of a config.json; whatever is wrong with one becomes a UserError that names the file and the field."""

    def __init__(self, folder):
        self.path = os.path.join(folder, 'config.json')
        self.fields = read_json(self.path)

    def refuse(self, name, value, why):
        shown = repr(value) if len(repr(value)) < 100 else repr(value)[:100] + '…'
        raise UserError(f'{self.path}: {name}={shown}: {why}')

    def get(self, name, default):
        """A field; null counts as absent."""
        value = self.fields.get(name)
        return default if value is None else value

    def size(self, name, default=None):
        value = self.get(name, default)
        if type(value) is not int or not 1 <= value < 2 ** 31:
            self.refuse(name, value, 'takes a whole number from 1, below 2**31')
        return value

    def number(self, name, default):
        value = self.get(name, default)
        if type(value) not in (int, float) or not 0 < value < 1e30:
            self.refuse(name, value, 'takes a number above 0, below 1e30')
        return float(value)

    def one_of(self, name, *known):
        """A field that has one of the values `known`, the ones that our networks can follow; the first stands for an absent one."""
        value = self.get(name, known[0])
        if value not in known:
            self.refuse(name, value, 'takes ' + ' or '.join(repr(k) for k in known))
        return value


def read_json(path):
    try:
        with open(path, encoding='utf-8-sig') as f:  # some editors begin a file with a byte-order mark
            value = json.load(f)
    except OSError as error:
        raise UserError(f'{path}: {error.strerror}') from None
    except (ValueError, RecursionError) as error:
        raise UserError(f'{path}: not readable as JSON: {error}') from None
    if not isinstance(value, dict):
        raise UserError(f'{path}: holds a {type(value).__name__}, takes an object with fields')
    return value


def gpt2_config(config):
    config.one_of('activation_function', 'gelu_new', 'gelu_pytorch_tanh')  # two names of tanh-GELU
    config.one_of('scale_attn_weights', True)
    config.one_of('add_cross_attention', False)
    width = config.size('n_embd')
    return ModelConfig(
        vocab_size=config.size('vocab_size'), block_size=config.size('n_positions'), n_layer=config.size('n_layer'), n_head=config.size('n_head'),
        n_kv_head=config.size('n_head'), n_embd=width, d_ff=config.size('n_inner', 4 * width), position='learned',
        norm='layernorm', norm_eps=config.number('layer_norm_epsilon', 1e-5), mlp='gelu', qk_norm=False, zero_init=False, init_std=0.02,
        depth_scale='attn' if config.one_of('scale_attn_by_inverse_layer_idx', False, True) else 'none',
        tie=config.one_of('tie_word_embeddings', True, False), bias=True)


def bigcode_config(config):
    config.one_of('multi_query', True)  # without it, its fused matrix goes head by head
    config.fields.setdefault('activation_function', 'gelu_pytorch_tanh')
    cfg = gpt2_config(config)
    cfg.n_kv_head = 1
    return cfg


def check_rotary(config, name, context, head_dim):
    """The one size that no tensor of the file vouches for: our table of angles has it."""
    if 4 * context * head_dim > 2 ** 28:
        config.refuse(name, context, 'its rotary table would take more than 256 MiB: lower it to the context that you use')


def llama_config(config):
    config.one_of('hidden_act', 'silu', 'swish')  # two names of one function
    bias = config.one_of('attention_bias', False, True)
    config.one_of('mlp_bias', bias)  # ours are in all linear layers or in none
    for name in ('rope_parameters', 'rope_scaling'):  # as transformers 5 writes it, and as it was before
        rope = config.get(name, {})
        if not isinstance(rope, dict) or rope.get('rope_type', rope.get('type', 'default')) != 'default' or any(isinstance(v, dict) for v in rope.values()):
            config.refuse(name, rope, "takes rope_type='default' for all layers: our rotary angles are not scaled")
        config.fields |= {key: rope[key] for key in ('rope_theta', 'partial_rotary_factor') if key in rope}
    config.one_of('partial_rotary_factor', 1.0)
    width, heads, context = config.size('hidden_size'), config.size('num_attention_heads'), config.size('max_position_embeddings')
    head_dim = config.size('head_dim', max(1, width // heads))
    check_rotary(config, 'max_position_embeddings', context, head_dim)
    return ModelConfig(
        vocab_size=config.size('vocab_size'), block_size=context, n_layer=config.size('num_hidden_layers'), n_head=heads,
        n_kv_head=config.size('num_key_value_heads', heads), n_embd=width, head_dim=head_dim, d_ff=config.size('intermediate_size'),
        position='rope', rope_theta=config.number('rope_theta', 10000.0), norm='rmsnorm', norm_eps=config.number('rms_norm_eps', 1e-6),
        mlp='swiglu', qk_norm=False, zero_init=False, init_std=0.02, tie=config.one_of('tie_word_embeddings', False, True), bias=bias)


def mistral_config(config):
    for name, default in (('sliding_window', 4096), ('num_key_value_heads', 8)):
        config.fields.setdefault(name, default)  # absent means this to transformers; null means none
    cfg = llama_config(config)
    cfg.block_size = min(cfg.block_size, config.size('sliding_window', cfg.block_size))  # in a context this short, the window hides nothing
    return cfg


def minnow_config(config):
    """Our own settings, as hub.py export --as=custom writes them."""
    fields = config.get('minnow', None)
    if not isinstance(fields, dict):
        config.refuse('minnow', fields, 'takes the settings of a network')
    cfg = from_dict(ModelConfig, fields, f'{config.path}: minnow')
    if any(type(value) is int and value >= 2 ** 31 for value in fields.values()):
        config.refuse('minnow', fields, 'takes sizes below 2**31')
    for name in ('block_size', 'source_size'):
        check_rotary(config, name, getattr(cfg, name, 0), cfg.d_head)
    return cfg


T5_MLP = {'relu': 'relu', 'gated-gelu': 'geglu', 'gated-silu': 'swiglu'}  # feed_forward_proj: ours


def t5_config(config):
    from features.t5.network import RelativeBias  # t5
    for name, ours in (('relative_attention_num_buckets', RelativeBias.BUCKETS), ('relative_attention_max_distance', RelativeBias.FURTHEST)):
        config.one_of(name, ours)
    config.one_of('is_encoder_decoder', True)
    layers, context = config.size('num_layers'), config.size('n_positions', 512)
    if context > 2 ** 20:
        config.refuse('n_positions', context, 'takes up to 1048576: lower it to the context that you use')
    # T5's head is its embedding; that of T5 1.1 and Flan-T5 is a matrix of its own, and its logits are not scaled. transformers 5 says so by another name
    tie = config.one_of('scale_decoder_outputs', config.one_of('tie_word_embeddings', True, False), True, False)
    return build(
        ModelConfig, vocab_size=config.size('vocab_size'), block_size=context, n_layer=config.size('num_decoder_layers', layers), n_encoder_layer=layers,
        n_head=config.size('num_heads'), n_embd=config.size('d_model'), head_dim=config.size('d_kv'), d_ff=config.size('d_ff'), position='relative',
        norm='rmsnorm', norm_eps=config.number('layer_norm_epsilon', 1e-6), mlp=T5_MLP[config.one_of('feed_forward_proj', *T5_MLP)], qk_norm=False,
        zero_init=False, t5_scale=True, tie=tie)


def gpt2_fields(cfg):
    return {'n_positions': cfg.block_size, 'n_layer': cfg.n_layer, 'n_head': cfg.n_head, 'n_embd': cfg.n_embd, 'n_inner': cfg.mlp_width,
            'activation_function': 'gelu_new', 'layer_norm_epsilon': cfg.norm_eps, 'resid_pdrop': cfg.dropout, 'embd_pdrop': cfg.dropout,
            'attn_pdrop': cfg.dropout}


def bigcode_fields(cfg):
    return gpt2_fields(cfg) | {'activation_function': 'gelu_pytorch_tanh', 'multi_query': True}


def llama_fields(cfg):
    return {'max_position_embeddings': cfg.block_size, 'num_hidden_layers': cfg.n_layer, 'num_attention_heads': cfg.n_head,
            'num_key_value_heads': cfg.kv_heads, 'head_dim': cfg.d_head, 'hidden_size': cfg.n_embd, 'intermediate_size': cfg.mlp_width,
            'hidden_act': 'silu', 'rms_norm_eps': cfg.norm_eps, 'rope_theta': cfg.rope_theta, 'attention_bias': cfg.bias, 'mlp_bias': cfg.bias,
            'attention_dropout': cfg.dropout}


def t5_fields(cfg):
    from features.t5.network import RelativeBias  # t5
    return {'n_positions': cfg.block_size, 'num_layers': cfg.n_encoder_layer, 'num_decoder_layers': cfg.n_layer, 'num_heads': cfg.n_head,
            'd_model': cfg.n_embd, 'd_kv': cfg.d_head, 'd_ff': cfg.mlp_width, 'feed_forward_proj': {ours: theirs for theirs, ours in T5_MLP.items()}[cfg.mlp],
            'relative_attention_num_buckets': RelativeBias.BUCKETS, 'relative_attention_max_distance': RelativeBias.FURTHEST,
            'layer_norm_epsilon': cfg.norm_eps, 'dropout_rate': cfg.dropout, 'is_encoder_decoder': True}


# -----------------------------------------------------------------------------
# Names: their module, and ours. N is the number of a layer; several of ours are one of theirs, one below the other

GPT2 = {
    'wte': 'wte', 'wpe': 'wpe', 'ln_f': 'norm_f',
    'h.N.ln_1': 'blocks.N.norm_1', 'h.N.attn.c_attn': 'blocks.N.attn.q blocks.N.attn.k blocks.N.attn.v', 'h.N.attn.c_proj': 'blocks.N.attn.o',
    'h.N.ln_2': 'blocks.N.norm_2', 'h.N.mlp.c_fc': 'blocks.N.mlp.up', 'h.N.mlp.c_proj': 'blocks.N.mlp.down',
}
LLAMA = {
    'embed_tokens': 'wte', 'norm': 'norm_f',
    'layers.N.input_layernorm': 'blocks.N.norm_1', 'layers.N.self_attn.q_proj': 'blocks.N.attn.q', 'layers.N.self_attn.k_proj': 'blocks.N.attn.k',
    'layers.N.self_attn.v_proj': 'blocks.N.attn.v', 'layers.N.self_attn.o_proj': 'blocks.N.attn.o',
    'layers.N.post_attention_layernorm': 'blocks.N.norm_2', 'layers.N.mlp.gate_proj': 'blocks.N.mlp.gate',
    'layers.N.mlp.up_proj': 'blocks.N.mlp.up', 'layers.N.mlp.down_proj': 'blocks.N.mlp.down',
}
HEAD = 'lm_head'  # ours is head; it has no prefix


def t5_names(cfg):
    names = {'shared': 'wte', 'encoder.final_layer_norm': 'norm_encoder', 'decoder.final_layer_norm': 'norm_f'}
    for stack, ours, rel in (('encoder', 'encoder', 'rel_encoder'), ('decoder', 'blocks', 'rel')):
        names[f'{stack}.block.0.layer.0.SelfAttention.relative_attention_bias'] = rel
        parts = [('SelfAttention', 'attn', 'norm_1')] + [('EncDecAttention', 'cross', 'norm_x')] * (stack == 'decoder') + [('DenseReluDense', 'mlp', 'norm_2')]
        for n, (part, attention, norm) in enumerate(parts):
            layer = f'{stack}.block.N.layer.{n}'
            names[f'{layer}.layer_norm'] = f'{ours}.N.{norm}'
            if attention != 'mlp':
                names |= {f'{layer}.{part}.{name}': f'{ours}.N.{attention}.{name}' for name in 'qkvo'}
            elif cfg.mlp == 'relu':
                names |= {f'{layer}.{part}.wi': f'{ours}.N.mlp.up', f'{layer}.{part}.wo': f'{ours}.N.mlp.down'}
            else:
                names |= {f'{layer}.{part}.{theirs}': f'{ours}.N.mlp.{name}' for theirs, name in (('wi_0', 'gate'), ('wi_1', 'up'), ('wo', 'down'))}
    return names


@dataclass
class Family:
    """What is to be known of one model_type."""
    architecture: str  # the class of transformers
    read: Callable  # Config → ModelConfig
    write: Callable | None  # ModelConfig → fields of config.json; None: not written, another family is the same
    names: Callable  # ModelConfig → {their module: our modules}, without the prefix, the embedding first; {}: they are ours
    prefix: str  # that all names but the head's may have
    biases: bool = False  # whether all layers have them, always
    flipped: str = '$^'  # pattern of their matrices that are kept as (in, out): GPT-2's Conv1D
    buffers: str = '$^'  # pattern of what old files carry along
    copies: str = '$^'  # pattern of names that the embedding has beside its own
    wants: Callable = lambda cfg: {}  # ModelConfig → {setting: the only value that has a place here}, over those of PLAIN


# Settings that may have any value in every family. config.json or the shapes of the tensors hold them, or the logits do not
# depend on them: the init, settings of training, settings of experts without experts, rope_theta without rotary positions
FREE = {'vocab_size', 'block_size', 'source_size', 'n_layer', 'n_head', 'n_embd', 'd_ff', 'norm_eps', 'tie', 'bias', 'rope_theta',
        'zero_init', 'init_std', 'rank_init', 'dropout',
        'n_expert_active', 'expert_shared', 'expert_aux', 'expert_z', 'expert_bias'}

# The only value that each of these settings may have. A setting that is in neither list, as a new one, must be at its default
PLAIN = {'n_encoder_layer': 0, 'n_expert': 0, 't5_scale': False, 'qk_norm': False, 'softcap': 0.0, 'value_residual': False, 'mlp_norm': False,
         'embed_norm': False, 'depth_scale': 'none',
         'rank_qk': 0, 'rank_vo': 0, 'rank_mlp': 0, 'ranks': {}, 'rank_act': 'none', 'rank_act_qk': None}


def gpt2_wants(cfg):
    return {'position': 'learned', 'norm': 'layernorm', 'mlp': 'gelu', 'n_kv_head': cfg.n_head, 'head_dim': cfg.n_embd // cfg.n_head}


def llama_wants(cfg):
    return {'position': 'rope', 'norm': 'rmsnorm', 'mlp': 'swiglu', 'n_kv_head': cfg.kv_heads, 'head_dim': cfg.d_head}


def t5_wants(cfg):
    return {'position': 'relative', 'norm': 'rmsnorm', 'mlp': cfg.mlp if cfg.mlp in T5_MLP.values() else 'relu', 'n_kv_head': cfg.n_head,
            'head_dim': cfg.d_head, 'bias': False, 'n_encoder_layer': max(1, cfg.n_encoder_layer), 't5_scale': True}


MASKS, ROTARY = r'h\.\d+\.attn\.(bias|masked_bias)', r'(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq'
FAMILIES = {
    'gpt2': Family('GPT2LMHeadModel', gpt2_config, gpt2_fields, lambda cfg: GPT2, 'transformer.', biases=True, flipped=r'h\.\d+\.(attn|mlp)\..*', buffers=MASKS,
                   wants=gpt2_wants),
    'gpt_bigcode': Family('GPTBigCodeForCausalLM', bigcode_config, bigcode_fields, lambda cfg: GPT2, 'transformer.', biases=True, buffers=MASKS,
                          wants=lambda cfg: gpt2_wants(cfg) | {'n_kv_head': 1}),
    'llama': Family('LlamaForCausalLM', llama_config, llama_fields, lambda cfg: LLAMA, 'model.', buffers=ROTARY, wants=llama_wants),
    'minnow': Family('MinnowForCausalLM', minnow_config, None, lambda cfg: {}, 'model.'),
    't5': Family('T5ForConditionalGeneration', t5_config, t5_fields, t5_names, '', copies=r'(encoder|decoder)\.embed_tokens\.weight',
                 buffers=r'decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight', wants=t5_wants),  # never used
    'mistral': Family('MistralForCausalLM', mistral_config, None, lambda cfg: LLAMA, 'model.', buffers=ROTARY),
}


def obstacles(family, cfg):
    """The settings of a network that have no place in a family, as ['name=value', …]."""
    special = PLAIN | family.wants(cfg)
    wanted = {f.name: default_of(f) for f in dataclasses.fields(cfg) if f.name not in FREE and f.name not in special} | special
    found = PLAIN | dataclasses.asdict(cfg) | {'n_kv_head': cfg.kv_heads, 'head_dim': cfg.d_head}
    return [f'{name}={found[name]}' for name in wanted if found[name] != wanted[name]]


def nearest(cfg):
    """(the family that is written and fits a network best, the obstacles that are left)."""
    in_the_way = {kind: obstacles(family, cfg) for kind, family in FAMILIES.items() if family.write}
    kind = min(in_the_way, key=lambda kind: ((kind == 't5') != (cfg.n_encoder_layer > 0), len(in_the_way[kind])))
    return kind, in_the_way[kind]


def name_rows(family, cfg):
    """
    Yields (their name, {our name: rows of ours}, shape of theirs, whether theirs is flipped) for every tensor of a network with these
    settings. Ours are one below the other in theirs, whose vocabulary is not padded.
    """
    names = family.names(cfg)
    if not names:  # ours
        with torch.device('meta'):
            tensors = make_model(cfg).state_dict().items()
        yield from ((name, {name: len(t) if t.ndim else 1}, list(t.shape), False) for name, t in tensors)
        return
    with torch.device('meta'):
        shapes = {name: list(t.shape) for name, t in make_model(dataclasses.replace(
            cfg, n_layer=1, n_encoder_layer=min(1, cfg.n_encoder_layer))).state_dict().items()}
    for theirs, ours in (names | ({} if cfg.tie else {HEAD: 'head'})).items():
        for kind in ('weight', 'bias'):
            parts = {f'{part}.{kind}': shapes.get(f'{part}.{kind}'.replace('.N.', '.0.')) for part in ours.split()}
            missing = [part for part, shape in parts.items() if shape is None]
            if missing and kind == 'bias':
                continue
            if missing:
                raise UserError(f'{missing[0]}: this network has no such tensor, and {family.architecture} wants one')
            parts, (_, *rest) = {part: shape[0] for part, shape in parts.items()}, next(iter(parts.values()))
            shape = [cfg.vocab_size if ours in ('wte', 'head') else sum(parts.values()), *rest]
            count = cfg.n_encoder_layer if ours.startswith('encoder.') else cfg.n_layer
            for n in range(count if '.N.' in theirs else 1):
                name = f'{theirs}.{kind}'.replace('.N.', f'.{n}.')
                flipped = len(shape) == 2 and re.fullmatch(family.flipped, name) is not None
                yield name, {part.replace('.N.', f'.{n}.'): rows for part, rows in parts.items()}, shape[::-1] if flipped else shape, flipped
