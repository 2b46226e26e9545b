"""
The model families of transformers: read and write the fields of their config.json. The names of their tensors
are in names.py.

    gpt2         GPT-2
    gpt_bigcode  StarCoder: GPT-2 with one head of keys and values
    llama        Llama 1 to 3.2, TinyLlama, SmolLM, OpenLLaMA
    qwen2        Qwen2, Qwen2.5: Llama with biases in the query, key and value matrices
    qwen3        Qwen3: Llama with an RMSNorm on every head of queries and keys
    smollm3      SmolLM3: Llama with layers without rotary positions
    olmo2        OLMo 2: Llama with norms after attention and MLP, and on all queries and keys
    mistral      load only; exported as Llama, which is the same model
    t5           T5, Flan-T5
    minnow       our own class, as hub.py export --as=custom writes it

reading.py and export.py use the table FAMILIES. To add a family, add an entry there.
"""
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

from configurator import from_dict
from features import build, default_of
from features.hf.names import gpt2_names, llama_names, minnow_names, olmo2_names, qwen3_names, t5_names
from features.hf.rotary import ROPE_SCALING
from model import ModelConfig

# -----------------------------------------------------------------------------
# config.json → ModelConfig. Every function takes a Config. It raises UserError for a field that our networks
# cannot follow

def gpt2_config(config):
    config.one_of('activation_function', 'gelu_new', 'gelu_pytorch_tanh')  # two names of tanh-GELU
    config.one_of('scale_attn_weights', True)
    config.one_of('add_cross_attention', False)
    width = config.size('n_embd')
    return ModelConfig(
        vocab_size=config.size('vocab_size'),
        block_size=config.size('n_positions'),
        n_layer=config.size('n_layer'),
        n_head=config.size('n_head'),
        n_kv_head=config.size('n_head'),
        n_embd=width,
        d_ff=config.size('n_inner', 4 * width),
        position='learned',
        norm='layernorm',
        norm_eps=config.number('layer_norm_epsilon', 1e-5),
        mlp='gelu',
        qk_norm=False,
        zero_init=False,
        init_std=0.02,
        depth_scale='attn' if config.one_of('scale_attn_by_inverse_layer_idx', False, True) else 'none',
        tie=config.one_of('tie_word_embeddings', True, False),
        bias=True)


def bigcode_config(config):
    config.one_of('multi_query', True)  # without it, queries, keys and values are interleaved head by head
    config.fields.setdefault('activation_function', 'gelu_pytorch_tanh')
    cfg = gpt2_config(config)
    cfg.n_kv_head = 1
    return cfg


def check_rotary(config, name, context, head_dim):
    """Refuse a context that no tensor of the file vouches for: our table of angles is that long."""
    if 4 * context * head_dim > 2 ** 28:
        config.refuse(name, context, 'its rotary table would take more than 256 MiB: '
                                     'lower it to the context that you use')


def read_rope(config):
    """Move the rotary settings to the top level of config.json's fields. Returns our rope_scaling."""
    for name in ('rope_parameters', 'rope_scaling'):  # as transformers 5 writes it, and as it was before
        rope = config.get(name, {})
        is_known = isinstance(rope, dict)
        if is_known:
            kind = str(rope.get('rope_type', rope.get('type', 'default')))
            is_nested = any(isinstance(value, dict) for value in rope.values())  # each kind of layer its own
            is_known = kind in ('default', *ROPE_SCALING) and not is_nested
        if not is_known:
            config.refuse(name, rope, f'takes rope_type=default, {", ".join(ROPE_SCALING)}, for all layers')
        for key in ('rope_theta', 'partial_rotary_factor'):
            if key in rope:
                config.fields[key] = rope[key]
        if kind != 'default':
            config.fields['scaling'] = scaling_of(config, name, rope, kind)
    return config.get('scaling', {})


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


def llama_config(config):
    config.one_of('hidden_act', 'silu', 'swish')  # two names of one function
    bias = config.one_of('attention_bias', False, True)
    config.one_of('mlp_bias', bias)  # ours are in all linear layers or in none
    scaling = read_rope(config)
    config.one_of('partial_rotary_factor', 1.0)
    width = config.size('hidden_size')
    heads = config.size('num_attention_heads')
    context = config.size('max_position_embeddings')
    head_dim = config.size('head_dim', max(1, width // heads))
    check_rotary(config, 'max_position_embeddings', context, head_dim)
    return ModelConfig(
        vocab_size=config.size('vocab_size'),
        block_size=context,
        n_layer=config.size('num_hidden_layers'),
        n_head=heads,
        n_kv_head=config.size('num_key_value_heads', heads),
        n_embd=width,
        head_dim=head_dim,
        d_ff=config.size('intermediate_size'),
        position='rope',
        rope_theta=config.number('rope_theta', 10000.0),
        rope_scaling=scaling,
        norm='rmsnorm',
        norm_eps=config.number('rms_norm_eps', 1e-6),
        mlp='swiglu',
        qk_norm=False,
        zero_init=False,
        init_std=0.02,
        tie=config.one_of('tie_word_embeddings', False, True),
        bias=bias)


def refuse_windows(config):
    """Raise UserError for layers that see a part of the context only."""
    config.one_of('use_sliding_window', False)
    kinds = config.get('layer_types', [])
    if not isinstance(kinds, list) or any(kind != 'full_attention' for kind in kinds):
        config.refuse('layer_types', kinds, "takes 'full_attention' for all layers")


def qwen2_config(config):
    refuse_windows(config)
    config.fields.setdefault('num_key_value_heads', 32)
    for name in ('attention_bias', 'mlp_bias'):  # fields that this family does not have
        config.fields.pop(name, None)
    cfg = llama_config(config)
    cfg.qkv_bias = True
    return cfg


def qwen3_config(config):
    refuse_windows(config)
    config.one_of('attention_bias', False)
    config.fields |= {'head_dim': config.get('head_dim', 128), 'mlp_bias': False}
    config.fields.setdefault('num_key_value_heads', 32)
    cfg = llama_config(config)
    cfg.qk_norm = 'head'
    return cfg


def smollm3_config(config):
    refuse_windows(config)
    config.fields.setdefault('num_key_value_heads', 4)
    config.fields.setdefault('tie_word_embeddings', True)
    config.fields.setdefault('rope_theta', 2e6)
    cfg = llama_config(config)
    every = config.size('no_rope_layer_interval', 4)
    layers = min(cfg.n_layer, 10 ** 4)
    with_rope = config.get('no_rope_layers', [(n + 1) % every != 0 for n in range(layers)])
    is_valid = isinstance(with_rope, list) and len(with_rope) >= cfg.n_layer
    if not is_valid or any(n not in (0, 1) for n in with_rope):
        config.refuse('no_rope_layers', with_rope, 'takes a 1, or 0 for no positions, for every layer')
    cfg.no_rope = [n for n in range(cfg.n_layer) if not with_rope[n]]
    return cfg


def olmo2_config(config):
    config.one_of('attention_bias', False)
    config.fields |= {'rms_norm_eps': config.get('rms_norm_eps', 1e-5), 'mlp_bias': False}
    cfg = llama_config(config)
    cfg.post_norm, cfg.qk_norm = True, 'width'
    return cfg


def mistral_config(config):
    config.fields.setdefault('sliding_window', 4096)  # absent: transformers' default; null: no window
    config.fields.setdefault('num_key_value_heads', 8)
    cfg = llama_config(config)
    window = config.size('sliding_window', cfg.block_size)
    cfg.block_size = min(cfg.block_size, window)  # in a context this short, the window hides nothing
    return cfg


T5_MLP = {  # feed_forward_proj: our mlp
    'relu': 'relu',
    'gated-gelu': 'geglu',
    'gated-silu': 'swiglu',
}


def t5_config(config):
    from features.t5.positions import RelativeBias  # t5
    config.one_of('relative_attention_num_buckets', RelativeBias.BUCKETS)
    config.one_of('relative_attention_max_distance', RelativeBias.FURTHEST)
    config.one_of('is_encoder_decoder', True)
    layers = config.size('num_layers')
    context = config.size('n_positions', 512)
    if context > 2 ** 20:
        config.refuse('n_positions', context, 'takes up to 1048576: lower it to the context that you use')
    # T5's head is its embedding. T5 1.1 and Flan-T5 have a head of their own and do not scale its logits;
    # transformers 5 calls that scale_decoder_outputs
    tie = config.one_of('tie_word_embeddings', True, False)
    tie = config.one_of('scale_decoder_outputs', tie, True, False)
    return build(
        ModelConfig,
        vocab_size=config.size('vocab_size'),
        block_size=context,
        n_layer=config.size('num_decoder_layers', layers),
        n_encoder_layer=layers,
        n_head=config.size('num_heads'),
        n_embd=config.size('d_model'),
        head_dim=config.size('d_kv'),
        d_ff=config.size('d_ff'),
        position='relative',
        norm='rmsnorm',
        norm_eps=config.number('layer_norm_epsilon', 1e-6),
        mlp=T5_MLP[config.one_of('feed_forward_proj', *T5_MLP)],
        qk_norm=False,
        zero_init=False,
        t5_scale=True,
        tie=tie)


def minnow_config(config):
    fields = config.get('minnow', None)
    if not isinstance(fields, dict):
        config.refuse('minnow', fields, 'takes the settings of a network')
    from features.earlier import without_removed
    fields = without_removed(fields, f'{config.path}: minnow')
    cfg = from_dict(ModelConfig, fields, f'{config.path}: minnow')
    for value in fields.values():
        if type(value) is int and value >= 2 ** 31:
            config.refuse('minnow', fields, 'takes sizes below 2**31')
    for name in ('block_size', 'source_size'):
        check_rotary(config, name, getattr(cfg, name, 0), cfg.d_head)
    return cfg


# -----------------------------------------------------------------------------
# ModelConfig → fields of config.json

def gpt2_fields(cfg):
    return {
        'n_positions': cfg.block_size,
        'n_ctx': cfg.block_size,  # its name in GPT-2's own files, and in llama.cpp's converter
        'n_layer': cfg.n_layer,
        'n_head': cfg.n_head,
        'n_embd': cfg.n_embd,
        'n_inner': cfg.mlp_width,
        'activation_function': 'gelu_new',
        'layer_norm_epsilon': cfg.norm_eps,
        'resid_pdrop': cfg.dropout,
        'embd_pdrop': cfg.dropout,
        'attn_pdrop': cfg.dropout,
    }


def bigcode_fields(cfg):
    return gpt2_fields(cfg) | {'activation_function': 'gelu_pytorch_tanh', 'multi_query': True}


def llama_fields(cfg):
    scaling = {'rope_scaling': dict(cfg.rope_scaling)} if cfg.rope_scaling else {}
    return scaling | {
        'max_position_embeddings': cfg.block_size,
        'num_hidden_layers': cfg.n_layer,
        'num_attention_heads': cfg.n_head,
        'num_key_value_heads': cfg.kv_heads,
        'head_dim': cfg.d_head,
        'hidden_size': cfg.n_embd,
        'intermediate_size': cfg.mlp_width,
        'hidden_act': 'silu',
        'rms_norm_eps': cfg.norm_eps,
        'rope_theta': cfg.rope_theta,
        'attention_bias': cfg.bias,
        'mlp_bias': cfg.bias,
        'attention_dropout': cfg.dropout,
    }


def qwen2_fields(cfg):
    fields = llama_fields(cfg)
    del fields['attention_bias'], fields['mlp_bias']
    return fields


def qwen3_fields(cfg):
    fields = llama_fields(cfg)
    del fields['mlp_bias']
    return fields


def smollm3_fields(cfg):
    with_rope = [int(n not in cfg.no_rope) for n in range(cfg.n_layer)]
    return llama_fields(cfg) | {'no_rope_layers': with_rope, 'pad_token_id': None}


def olmo2_fields(cfg):
    return qwen3_fields(cfg) | {'pad_token_id': None}


def t5_fields(cfg):
    from features.t5.positions import RelativeBias  # t5
    projection = {ours: theirs for theirs, ours in T5_MLP.items()}
    return {
        'n_positions': cfg.block_size,
        'num_layers': cfg.n_encoder_layer,
        'num_decoder_layers': cfg.n_layer,
        'num_heads': cfg.n_head,
        'd_model': cfg.n_embd,
        'd_kv': cfg.d_head,
        'd_ff': cfg.mlp_width,
        'feed_forward_proj': projection[cfg.mlp],
        'relative_attention_num_buckets': RelativeBias.BUCKETS,
        'relative_attention_max_distance': RelativeBias.FURTHEST,
        'layer_norm_epsilon': cfg.norm_eps,
        'dropout_rate': cfg.dropout,
        'is_encoder_decoder': True,
    }


# -----------------------------------------------------------------------------
# Which networks fit a family. A setting in none of these lists, such as a new one, has to be at its default

# Settings that may have any value in every family: config.json or the shapes of the tensors hold them, or the
# logits do not depend on them (the init, training, settings of experts without experts, rope_theta without
# rotary positions)
FREE = {'vocab_size', 'block_size', 'source_size', 'n_layer', 'n_head', 'n_embd', 'd_ff', 'norm_eps', 'tie',
        'bias', 'rope_theta', 'zero_init', 'init_std', 'dropout',
        'n_expert_active', 'expert_aux', 'expert_z', 'expert_bias', 'expert_width', 'expert_renorm',
        'shared_width', 'shared_gate', 'dense_layers'}

# Settings that have to have this value, unless the family wants another
PLAIN = {
    'n_encoder_layer': 0,
    'n_expert': 0,
    't5_scale': False,
    'rope_scaling': {},
    'no_rope': [],
    'post_norm': False,
    'qkv_bias': False,
    'qk_norm': False,
    'softcap': 0.0,
    'value_residual': False,
    'mlp_norm': False,
    'embed_norm': False,
    'depth_scale': 'none',
    'rank_qk': 0,
    'rank_vo': 0,
    'rank_mlp': 0,
    'ranks': {},
    'rank_act': 'none',
}


def gpt2_wants(cfg):
    return {
        'position': 'learned',
        'norm': 'layernorm',
        'mlp': 'gelu',
        'n_kv_head': cfg.n_head,
        'head_dim': cfg.n_embd // cfg.n_head,
    }


def bigcode_wants(cfg):
    return gpt2_wants(cfg) | {'n_kv_head': 1}


def llama_wants(cfg):
    return {
        'position': 'rope',
        'rope_scaling': cfg.rope_scaling,
        'norm': 'rmsnorm',
        'mlp': 'swiglu',
        'n_kv_head': cfg.kv_heads,
        'head_dim': cfg.d_head,
    }


def qwen2_wants(cfg):
    return llama_wants(cfg) | {'bias': False, 'qkv_bias': True}


def qwen3_wants(cfg):
    return llama_wants(cfg) | {'bias': False, 'qk_norm': 'head'}


def smollm3_wants(cfg):
    return llama_wants(cfg) | {'no_rope': cfg.no_rope}


def olmo2_wants(cfg):
    return llama_wants(cfg) | {'bias': False, 'post_norm': True, 'qk_norm': 'width'}


def t5_wants(cfg):
    return {
        'position': 'relative',
        'norm': 'rmsnorm',
        'mlp': cfg.mlp if cfg.mlp in T5_MLP.values() else 'relu',
        'n_kv_head': cfg.n_head,
        'head_dim': cfg.d_head,
        'bias': False,
        'n_encoder_layer': max(1, cfg.n_encoder_layer),
        't5_scale': True,
    }


# -----------------------------------------------------------------------------
# The families

@dataclass
class Family:
    """Everything about one model_type."""
    architecture: str  # the class of transformers
    prefix: str  # before all names but the head's; a file may leave it out
    read: Callable  # Config → ModelConfig
    names: Callable  # ModelConfig → {their module: our modules}, without the prefix; {}: theirs are ours
    write: Callable | None = None  # ModelConfig → fields of config.json; None: this family is not written
    wants: Callable | None = None  # ModelConfig → {setting: the value that it has to have}, over those of
    # PLAIN
    biases: bool = False  # whether all its layers have biases, always
    flipped: str = '$^'  # pattern of the matrices that are stored as (in, out): GPT-2's Conv1D
    buffers: str = '$^'  # pattern of the tensors of old files that are passed over
    copies: str = '$^'  # pattern of further names of the embedding


MASKS = r'h\.\d+\.attn\.(bias|masked_bias)'
ROTARY = r'(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq'
UNUSED_BIAS = r'decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight'

FAMILIES = {
    'gpt2': Family(
        'GPT2LMHeadModel', 'transformer.', gpt2_config, gpt2_names, gpt2_fields, gpt2_wants,
        biases=True, flipped=r'h\.\d+\.(attn|mlp)\..*', buffers=MASKS),
    'gpt_bigcode': Family(
        'GPTBigCodeForCausalLM', 'transformer.', bigcode_config, gpt2_names, bigcode_fields,
        bigcode_wants, biases=True, buffers=MASKS),
    'llama': Family(
        'LlamaForCausalLM', 'model.', llama_config, llama_names, llama_fields, llama_wants, buffers=ROTARY),
    'qwen2': Family(
        'Qwen2ForCausalLM', 'model.', qwen2_config, llama_names, qwen2_fields, qwen2_wants,
        buffers=ROTARY),
    'qwen3': Family('Qwen3ForCausalLM', 'model.', qwen3_config, qwen3_names, qwen3_fields, qwen3_wants),
    'smollm3': Family(
        'SmolLM3ForCausalLM', 'model.', smollm3_config, llama_names, smollm3_fields, smollm3_wants),
    'olmo2': Family('Olmo2ForCausalLM', 'model.', olmo2_config, olmo2_names, olmo2_fields, olmo2_wants),
    'minnow': Family('MinnowForCausalLM', 'model.', minnow_config, minnow_names),
    't5': Family(
        'T5ForConditionalGeneration', '', t5_config, t5_names, t5_fields, t5_wants,
        copies=r'(encoder|decoder)\.embed_tokens\.weight', buffers=UNUSED_BIAS),
    'mistral': Family('MistralForCausalLM', 'model.', mistral_config, llama_names, buffers=ROTARY),
}


def obstacles(family, cfg):
    """The settings of a model that a family does not support, as ['name=value', …]."""
    special = PLAIN | family.wants(cfg)
    wanted = {}
    for field in dataclasses.fields(cfg):
        if field.name not in FREE and field.name not in special:
            wanted[field.name] = default_of(field)
    wanted |= special
    found = PLAIN | dataclasses.asdict(cfg) | {'n_kv_head': cfg.kv_heads, 'head_dim': cfg.d_head}
    out = []
    for name, value in wanted.items():
        if found.get(name, value) != value:  # a setting of a feature that is not used is not there
            out.append(f'{name}={found[name]}')
    return out


def nearest(cfg):
    """(the family with the fewest obstacles for a model, among those we can export; its obstacles)."""
    kind, fewest = None, None
    for name, family in FAMILIES.items():
        has_encoder = name == 't5'
        if family.write is None or has_encoder != (cfg.n_encoder_layer > 0):
            continue
        in_the_way = obstacles(family, cfg)
        if fewest is None or len(in_the_way) < len(fewest):
            kind, fewest = name, in_the_way
    return kind, fewest
