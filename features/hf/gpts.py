"""
The families of transformers with GPT-2's layout: LayerNorms and biases.

    gpt2         GPT-2
    gpt_bigcode  StarCoder: GPT-2 with one head of keys and values
    gpt_neo      GPT-Neo, TinyStories: windows in every other layer
    gpt_neox     GPT-NeoX, Pythia: rotary positions in a part of each head, attention and MLP in parallel
    opt          OPT

For each: X_config reads config.json, X_fields writes it, X names its modules, and X_wants gives the settings
that it needs (families.Family).
"""
from features.hf.positions import MOST_LAYERS, check_rotary, read_rope, rotated
from model import ModelConfig

# Their names of activations: ours. Of two names for one, the last is written
ACTIVATIONS = {'gelu_pytorch_tanh': 'gelu', 'gelu_fast': 'gelu', 'gelu_new': 'gelu', 'gelu': 'gelu_exact',
               'relu': 'relu', 'swish': 'silu', 'silu': 'silu'}


def activation(config, name, default):
    """Our `mlp` of a field with the name of an activation."""
    config.fields.setdefault(name, default)
    return ACTIVATIONS[config.one_of(name, *ACTIVATIONS)]


def their_activation(cfg):
    return {ours: theirs for theirs, ours in ACTIVATIONS.items()}[cfg.mlp]


def layernorm_wants(cfg):
    """The settings that all families of this file need."""
    return {
        'position': 'learned',
        'norm': 'layernorm',
        'mlp': cfg.mlp if cfg.mlp in ACTIVATIONS.values() else 'gelu',
        'n_kv_head': cfg.n_head,
        'head_dim': cfg.n_embd // cfg.n_head,
    }


# -----------------------------------------------------------------------------
# GPT-2

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


def gpt2_config(config):
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
        mlp=activation(config, 'activation_function', 'gelu_new'),
        qk_norm=False,
        zero_init=False,
        init_std=0.02,
        depth_scale='attn' if config.one_of('scale_attn_by_inverse_layer_idx', False, True) else 'none',
        tie=config.one_of('tie_word_embeddings', True, False),
        bias=True)


def gpt2_wants(cfg):
    return layernorm_wants(cfg) | {'mlp': cfg.mlp if cfg.mlp in ('gelu_exact', 'silu') else 'gelu'}


def gpt2_fields(cfg):
    return {
        'n_positions': cfg.block_size,
        'n_ctx': cfg.block_size,  # its name in GPT-2's own files, and in llama.cpp's converter
        'n_layer': cfg.n_layer,
        'n_head': cfg.n_head,
        'n_embd': cfg.n_embd,
        'n_inner': cfg.mlp_width,
        'activation_function': their_activation(cfg),
        'layer_norm_epsilon': cfg.norm_eps,
        'resid_pdrop': cfg.dropout,
        'embd_pdrop': cfg.dropout,
        'attn_pdrop': cfg.dropout,
    }


# -----------------------------------------------------------------------------
# GPTBigCode

def bigcode_config(config):
    config.one_of('multi_query', True)  # without it, queries, keys and values are interleaved head by head
    config.fields.setdefault('activation_function', 'gelu_pytorch_tanh')
    cfg = gpt2_config(config)
    cfg.n_kv_head = 1
    return cfg


def bigcode_fields(cfg):
    name = their_activation(cfg)
    if name == 'gelu_new':
        name = 'gelu_pytorch_tanh'
    return gpt2_fields(cfg) | {'activation_function': name, 'multi_query': True}


def bigcode_wants(cfg):
    return gpt2_wants(cfg) | {'n_kv_head': 1}


# -----------------------------------------------------------------------------
# GPT-Neo

GPT_NEO = {
    'wte': 'wte',
    'wpe': 'wpe',
    'ln_f': 'norm_f',
    'h.N.ln_1': 'blocks.N.norm_1',
    'h.N.attn.attention.q_proj': 'blocks.N.attn.q',
    'h.N.attn.attention.k_proj': 'blocks.N.attn.k',
    'h.N.attn.attention.v_proj': 'blocks.N.attn.v',
    'h.N.attn.attention.out_proj': 'blocks.N.attn.o',
    'h.N.ln_2': 'blocks.N.norm_2',
    'h.N.mlp.c_fc': 'blocks.N.mlp.up',
    'h.N.mlp.c_proj': 'blocks.N.mlp.down',
}


def neo_config(config):
    width = config.size('hidden_size')
    heads = config.size('num_heads')
    layers = config.size('num_layers')
    kinds = neo_layers(config, layers)
    full = [n for n, kind in enumerate(kinds) if kind == 'global']
    has_window = len(full) < layers
    return ModelConfig(
        vocab_size=config.size('vocab_size'),
        block_size=config.size('max_position_embeddings'),
        n_layer=layers,
        n_head=heads,
        n_kv_head=heads,
        n_embd=width,
        d_ff=config.size('intermediate_size', 4 * width),
        position='learned',
        window=config.size('window_size', 256) if has_window else 0,
        full_layers=full if has_window else [],
        attn_scale=1.0,
        norm='layernorm',
        norm_eps=config.number('layer_norm_epsilon', 1e-5),
        mlp=activation(config, 'activation_function', 'gelu_new'),
        qk_norm=False,
        zero_init=False,
        init_std=0.02,
        tie=config.one_of('tie_word_embeddings', True, False),
        bias=True,
        qkv_bias='never')


def neo_layers(config, n_layer):
    """['global' or 'local' for every layer] of attention_types, [[[kinds], repetitions], …]."""
    types = config.get('attention_types', [[['global', 'local'], 12]])
    kinds = []
    try:
        for some, count in types:
            if len(some) * count <= min(n_layer, MOST_LAYERS):
                kinds += some * count
    except (TypeError, ValueError):
        kinds = []
    if len(kinds) != n_layer or any(kind not in ('global', 'local') for kind in kinds):
        config.refuse('attention_types', types, f"takes 'global' or 'local' for {n_layer} layers")
    return kinds


def neo_fields(cfg):
    local = cfg.window_layers
    kinds = ['local' if n in local else 'global' for n in range(cfg.n_layer)]
    return {
        'max_position_embeddings': cfg.block_size,
        'num_layers': cfg.n_layer,
        'num_heads': cfg.n_head,
        'hidden_size': cfg.n_embd,
        'intermediate_size': cfg.mlp_width,
        'attention_types': [[kinds, 1]],
        'window_size': cfg.window or 256,
        'activation_function': their_activation(cfg),
        'layer_norm_epsilon': cfg.norm_eps,
        'resid_dropout': cfg.dropout,
        'embed_dropout': cfg.dropout,
        'attention_dropout': cfg.dropout,
    }


def neo_wants(cfg):
    return layernorm_wants(cfg) | {
        'window': cfg.window,
        'full_layers': cfg.full_layers,
        'attn_scale': 1.0,
        'bias': True,
        'qkv_bias': 'never',
    }


# -----------------------------------------------------------------------------
# GPT-NeoX

GPT_NEOX = {
    'embed_in': 'wte',
    'final_layer_norm': 'norm_f',
    'layers.N.input_layernorm': 'blocks.N.norm_1',
    'layers.N.attention.query_key_value': 'blocks.N.attn.q blocks.N.attn.k blocks.N.attn.v',
    'layers.N.attention.dense': 'blocks.N.attn.o',
    'layers.N.post_attention_layernorm': 'blocks.N.norm_2',
    'layers.N.mlp.dense_h_to_4h': 'blocks.N.mlp.up',
    'layers.N.mlp.dense_4h_to_h': 'blocks.N.mlp.down',
}


def neox_config(config):
    config.one_of('attention_bias', True)
    config.fields.setdefault('rope_theta', config.get('rotary_emb_base', 10000.0))
    config.fields.setdefault('partial_rotary_factor', config.get('rotary_pct', 0.25))
    scaling = read_rope(config)
    width = config.size('hidden_size')
    heads = config.size('num_attention_heads')
    context = config.size('max_position_embeddings')
    head_dim = max(1, width // heads)
    check_rotary(config, 'max_position_embeddings', context, head_dim)
    return ModelConfig(
        vocab_size=config.size('vocab_size'),
        block_size=context,
        n_layer=config.size('num_hidden_layers'),
        n_head=heads,
        n_kv_head=heads,
        n_embd=width,
        d_ff=config.size('intermediate_size'),
        position='rope',
        rope_theta=config.number('rope_theta', 10000.0),
        rope_scaling=scaling,
        rope_dim=rotated(config, head_dim),
        norm='layernorm',
        norm_eps=config.number('layer_norm_eps', 1e-5),
        parallel=config.one_of('use_parallel_residual', True, False),
        mlp=activation(config, 'hidden_act', 'gelu'),
        qk_norm=False,
        zero_init=False,
        init_std=0.02,
        tie=config.one_of('tie_word_embeddings', False, True),
        bias=True)


def neox_fields(cfg):
    share = (cfg.rope_dim or cfg.d_head) / cfg.d_head
    scaling = cfg.rope_scaling or {'rope_type': 'default'}
    return {
        'max_position_embeddings': cfg.block_size,
        'num_hidden_layers': cfg.n_layer,
        'num_attention_heads': cfg.n_head,
        'hidden_size': cfg.n_embd,
        'intermediate_size': cfg.mlp_width,
        'hidden_act': their_activation(cfg),
        'layer_norm_eps': cfg.norm_eps,
        'rope_parameters': scaling | {'rope_theta': cfg.rope_theta, 'partial_rotary_factor': share},
        'rotary_pct': share,
        'rotary_emb_base': cfg.rope_theta,
        'use_parallel_residual': cfg.parallel,
        'attention_bias': True,
        'hidden_dropout': cfg.dropout,
        'attention_dropout': cfg.dropout,
    }


def neox_wants(cfg):
    return layernorm_wants(cfg) | {
        'position': 'rope',
        'rope_scaling': cfg.rope_scaling,
        'rope_dim': cfg.rope_dim,
        'parallel': cfg.parallel,
    }


# -----------------------------------------------------------------------------
# OPT

OPT = {
    'embed_tokens': 'wte',
    'embed_positions': 'wpe',
    'final_layer_norm': 'norm_f',
    'layers.N.self_attn_layer_norm': 'blocks.N.norm_1',
    'layers.N.self_attn.q_proj': 'blocks.N.attn.q',
    'layers.N.self_attn.k_proj': 'blocks.N.attn.k',
    'layers.N.self_attn.v_proj': 'blocks.N.attn.v',
    'layers.N.self_attn.out_proj': 'blocks.N.attn.o',
    'layers.N.final_layer_norm': 'blocks.N.norm_2',
    'layers.N.fc1': 'blocks.N.mlp.up',
    'layers.N.fc2': 'blocks.N.mlp.down',
}


def opt_config(config):
    config.one_of('do_layer_norm_before', True)  # OPT-350m has it after
    config.one_of('enable_bias', True)
    config.one_of('layer_norm_elementwise_affine', True)
    config.one_of('_remove_final_layer_norm', False)
    width = config.size('hidden_size')
    config.one_of('word_embed_proj_dim', width)
    heads = config.size('num_attention_heads')
    return ModelConfig(
        vocab_size=config.size('vocab_size'),
        block_size=config.size('max_position_embeddings'),
        n_layer=config.size('num_hidden_layers'),
        n_head=heads,
        n_kv_head=heads,
        n_embd=width,
        d_ff=config.size('ffn_dim'),
        position='learned',
        norm='layernorm',
        mlp=activation(config, 'activation_function', 'relu'),
        qk_norm=False,
        zero_init=False,
        init_std=0.02,
        tie=config.one_of('tie_word_embeddings', True, False),
        bias=True)


def opt_fields(cfg):
    return {
        'max_position_embeddings': cfg.block_size,
        'num_hidden_layers': cfg.n_layer,
        'num_attention_heads': cfg.n_head,
        'hidden_size': cfg.n_embd,
        'word_embed_proj_dim': cfg.n_embd,
        'ffn_dim': cfg.mlp_width,
        'activation_function': their_activation(cfg),
        'dropout': cfg.dropout,
        'attention_dropout': cfg.dropout,
    }


def opt_wants(cfg):
    return layernorm_wants(cfg) | {'norm_eps': 1e-5}
