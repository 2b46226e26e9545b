"""
The families of transformers with Llama's layout: RMSNorms, rotary positions, a gated MLP, mostly no biases.

    llama        Llama 1 to 3.2, TinyLlama, SmolLM, OpenLLaMA
    mistral      Mistral: a window in all layers
    qwen2        Qwen2, Qwen2.5: biases in the query, key and value matrices
    qwen3        Qwen3: an RMSNorm on every head of queries and keys
    smollm3      SmolLM3: layers without rotary positions
    olmo2        OLMo 2: norms after attention and MLP, and on all queries and keys
    gemma        Gemma: a scaled embedding, GEGLU, norms with weights of 1 + w
    gemma2       Gemma 2: also windows, norms before and after, softcaps
    gemma3_text  Gemma 3 of text: also RMSNorms on queries and keys, frequencies of its own for windows
    phi3         Phi-3: fused matrices, rotary positions in a part of each head
    granite      Granite: scales of embedding, attention, residual stream and logits

For each: X_config reads config.json, X_fields writes it, X names its modules, and X_wants gives the settings
that it needs (families.Family).
"""
from features.hf.positions import MOST_LAYERS, check_rotary, read_rope, read_windows, rotated, window_fields
from model import ModelConfig

GATES = {'silu': 'swiglu', 'swish': 'swiglu', 'gelu_pytorch_tanh': 'geglu'}  # their hidden_act: our mlp


# -----------------------------------------------------------------------------
# Llama

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


def llama_config(config):
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
        mlp=GATES[config.one_of('hidden_act', *GATES)],
        qk_norm=False,
        zero_init=False,
        init_std=0.02,
        tie=config.one_of('tie_word_embeddings', False, True),
        bias=bias)


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
        'hidden_act': 'silu' if cfg.mlp == 'swiglu' else 'gelu_pytorch_tanh',
        'rms_norm_eps': cfg.norm_eps,
        'rope_theta': cfg.rope_theta,
        'attention_bias': cfg.bias,
        'mlp_bias': cfg.bias,
        'attention_dropout': cfg.dropout,
    }


def llama_wants(cfg):
    return {
        'position': 'rope',
        'rope_scaling': cfg.rope_scaling,
        'norm': 'rmsnorm',
        'mlp': cfg.mlp if cfg.mlp in GATES.values() else 'swiglu',
        'n_kv_head': cfg.kv_heads,
        'head_dim': cfg.d_head,
    }


# -----------------------------------------------------------------------------
# Mistral

def mistral_config(config):
    config.fields.setdefault('sliding_window', 4096)  # absent: transformers' default; null: no window
    # fields that this family does not have
    config.fields |= {'attention_bias': False, 'mlp_bias': False, 'layer_types': None}
    config.fields.setdefault('num_key_value_heads', 8)
    cfg = llama_config(config)
    if config.fields['sliding_window'] is not None:
        cfg.window = config.size('sliding_window')
    return cfg


def mistral_fields(cfg):
    fields = llama_fields(cfg) | {'sliding_window': cfg.window}
    del fields['attention_bias'], fields['mlp_bias']
    return fields


def mistral_wants(cfg):
    return llama_wants(cfg) | {'bias': False, 'window': max(1, cfg.window)}


# -----------------------------------------------------------------------------
# Qwen2

def qwen_windows(config, cfg):
    """Windows by `use_sliding_window`: from max_window_layers on, for a file without layer_types."""
    if not config.one_of('use_sliding_window', False, True):
        config.fields['sliding_window'] = None
        return read_windows(config, cfg)
    first = config.get('max_window_layers', 28)
    if type(first) is not int:
        config.refuse('max_window_layers', first, 'takes a whole number')
    read_windows(config, cfg, lambda layer: layer >= first, 4096)


def qwen_window_fields(cfg):
    return window_fields(cfg) | {'use_sliding_window': bool(cfg.window)}


def qwen_window_wants(cfg):
    return {'window': cfg.window, 'full_layers': cfg.full_layers}


def qwen2_config(config):
    config.fields.setdefault('num_key_value_heads', 32)
    for name in ('attention_bias', 'mlp_bias'):  # fields that this family does not have
        config.fields.pop(name, None)
    cfg = llama_config(config)
    cfg.qkv_bias = True
    qwen_windows(config, cfg)
    return cfg


def qwen2_fields(cfg):
    fields = llama_fields(cfg) | qwen_window_fields(cfg)
    del fields['attention_bias'], fields['mlp_bias']
    return fields


def qwen2_wants(cfg):
    return llama_wants(cfg) | qwen_window_wants(cfg) | {'bias': False, 'qkv_bias': True}


# -----------------------------------------------------------------------------
# Qwen3

QWEN3 = LLAMA | {
    'layers.N.self_attn.q_norm': 'blocks.N.attn.q_norm',
    'layers.N.self_attn.k_norm': 'blocks.N.attn.k_norm',
}


def qwen3_config(config):
    config.one_of('attention_bias', False)
    config.fields |= {'head_dim': config.get('head_dim', 128), 'mlp_bias': False}
    config.fields.setdefault('num_key_value_heads', 32)
    cfg = llama_config(config)
    cfg.qk_norm = 'head'
    qwen_windows(config, cfg)
    return cfg


def qwen3_fields(cfg):
    fields = llama_fields(cfg) | qwen_window_fields(cfg)
    del fields['mlp_bias']
    return fields


def qwen3_wants(cfg):
    return llama_wants(cfg) | qwen_window_wants(cfg) | {'bias': False, 'qk_norm': 'head'}


# -----------------------------------------------------------------------------
# SmolLM3

def smollm3_config(config):
    config.fields.setdefault('num_key_value_heads', 4)
    config.fields.setdefault('tie_word_embeddings', True)
    config.fields.setdefault('rope_theta', 2e6)
    cfg = llama_config(config)
    every = config.size('no_rope_layer_interval', 4)
    layers = min(cfg.n_layer, MOST_LAYERS)
    with_rope = config.get('no_rope_layers', [(n + 1) % every != 0 for n in range(layers)])
    is_valid = isinstance(with_rope, list) and len(with_rope) >= cfg.n_layer
    if not is_valid or any(n not in (0, 1) for n in with_rope):
        config.refuse('no_rope_layers', with_rope, 'takes a 1, or 0 for no positions, for every layer')
    cfg.no_rope = [n for n in range(cfg.n_layer) if not with_rope[n]]
    has_windows = config.one_of('use_sliding_window', False, True)
    has_windows = has_windows and config.get('sliding_window', None) is not None
    read_windows(config, cfg, lambda layer: has_windows and layer in cfg.no_rope)
    return cfg


def smollm3_fields(cfg):
    with_rope = [int(n not in cfg.no_rope) for n in range(cfg.n_layer)]
    return llama_fields(cfg) | qwen_window_fields(cfg) | {'no_rope_layers': with_rope, 'pad_token_id': None}


def smollm3_wants(cfg):
    return llama_wants(cfg) | qwen_window_wants(cfg) | {'no_rope': cfg.no_rope}


# -----------------------------------------------------------------------------
# OLMo 2

OLMO2 = {theirs: ours for theirs, ours in QWEN3.items() if theirs != 'layers.N.input_layernorm'} | {
    'layers.N.post_attention_layernorm': 'blocks.N.norm_a',
    'layers.N.post_feedforward_layernorm': 'blocks.N.norm_m',
}


def olmo2_config(config):
    config.one_of('attention_bias', False)
    config.fields |= {'rms_norm_eps': config.get('rms_norm_eps', 1e-5), 'mlp_bias': False}
    cfg = llama_config(config)
    cfg.post_norm, cfg.qk_norm = True, 'width'
    return cfg


def olmo2_fields(cfg):
    fields = llama_fields(cfg) | {'pad_token_id': None}
    del fields['mlp_bias']
    return fields


def olmo2_wants(cfg):
    return llama_wants(cfg) | {'bias': False, 'post_norm': True, 'qk_norm': 'width'}


# -----------------------------------------------------------------------------
# Gemma. Its norms multiply by 1 + w: Family.shifted

def gemma_config(config):
    config.one_of('use_bidirectional_attention', False)
    config.one_of('attention_bias', False)
    config.one_of('hidden_activation', None, 'gelu_pytorch_tanh')
    config.one_of('hidden_act', 'gelu_pytorch_tanh', 'gelu')  # the old name of the same in this family
    config.fields |= {'hidden_act': 'gelu_pytorch_tanh', 'mlp_bias': False}
    config.fields |= {'head_dim': config.get('head_dim', 256)}
    config.fields.setdefault('tie_word_embeddings', True)
    config.fields.setdefault('num_key_value_heads', 16)
    cfg = llama_config(config)
    cfg.embed_scale = cfg.n_embd ** 0.5
    return cfg


def gemma_fields(cfg):
    fields = llama_fields(cfg) | {'pad_token_id': None}
    del fields['mlp_bias']
    return fields


def gemma_wants(cfg):
    return llama_wants(cfg) | {'bias': False, 'mlp': 'geglu', 'embed_scale': cfg.n_embd ** 0.5}


# -----------------------------------------------------------------------------
# Gemma 2

GEMMA2 = LLAMA | {
    'layers.N.post_attention_layernorm': 'blocks.N.norm_a',
    'layers.N.pre_feedforward_layernorm': 'blocks.N.norm_2',
    'layers.N.post_feedforward_layernorm': 'blocks.N.norm_m',
}


def gemma2_config(config):
    config.fields.setdefault('num_key_value_heads', 4)
    config.fields.setdefault('final_logit_softcapping', 30.0)
    config.fields.setdefault('attn_logit_softcapping', 50.0)
    cfg = gemma_config(config)
    set_sandwich(config, cfg)
    read_windows(config, cfg, lambda layer: layer % 2 == 0, 4096)
    return cfg


def set_sandwich(config, cfg):
    """Set what Gemma 2 and 3 share in a ModelConfig."""
    scale = config.number('query_pre_attn_scalar', 256)
    cfg.attn_scale = 0.0 if scale == cfg.d_head else scale ** -0.5
    cfg.post_norm = 'both'
    for ours, theirs in (('softcap', 'final_logit_softcapping'), ('attn_softcap', 'attn_logit_softcapping')):
        if config.get(theirs, None) is not None:
            setattr(cfg, ours, config.number(theirs, 0))


def query_scalar(cfg):
    """The whole number from 1 whose 1/sqrt is nearest to attn_scale, which is not 0."""
    return max(1, round(1 / max(cfg.attn_scale ** 2, 2.0 ** -31)))


def gemma2_fields(cfg):
    fields = gemma_fields(cfg) | window_fields(cfg)
    return fields | {
        'hidden_activation': fields.pop('hidden_act'),
        'sliding_window': cfg.window or 4096,  # transformers 5 wants one, used or not
        'query_pre_attn_scalar': query_scalar(cfg) if cfg.attn_scale else cfg.d_head,
        'final_logit_softcapping': cfg.softcap or None,
        'attn_logit_softcapping': cfg.attn_softcap or None,
    }


def gemma2_wants(cfg):
    return gemma_wants(cfg) | {
        'post_norm': 'both',
        'attn_scale': query_scalar(cfg) ** -0.5 if cfg.attn_scale else 0.0,
        'softcap': cfg.softcap,
        'attn_softcap': cfg.attn_softcap,
        'window': cfg.window,
        'full_layers': cfg.full_layers,
    }


# -----------------------------------------------------------------------------
# Gemma 3

GEMMA3 = QWEN3 | GEMMA2


def gemma3_config(config):
    config.one_of('attn_logit_softcapping', None)  # transformers passes it over
    config.fields.setdefault('num_key_value_heads', 4)
    theta = gemma3_rope(config)
    cfg = gemma_config(config)
    cfg.qk_norm = 'head'
    set_sandwich(config, cfg)
    every = config.size('sliding_window_pattern', 6)
    read_windows(config, cfg, lambda layer: (layer + 1) % every != 0, 4096)
    if cfg.window and (theta != cfg.rope_theta or cfg.rope_scaling):
        cfg.window_theta = theta
    return cfg


def gemma3_rope(config):
    """Move the rotary settings of layers without a window to the top; return the base of the others."""
    config.fields.setdefault('rope_theta', 1e6)
    rope = config.get('rope_parameters', {})
    if isinstance(rope, dict) and rope.keys() & {'full_attention', 'sliding_attention'}:
        config.fields['rope_parameters'] = rope.get('full_attention')
        local = rope.get('sliding_attention') or {}
        if not isinstance(local, dict) or local.get('rope_type', 'default') != 'default':
            config.refuse('rope_parameters', rope, 'sliding_attention: takes rope_type=default')
        config.fields['rope_local_base_freq'] = local.get('rope_theta')
    return config.number('rope_local_base_freq', 1e4)


def gemma3_fields(cfg):
    fields = gemma2_fields(cfg)
    full = (fields.pop('rope_scaling', None) or {'rope_type': 'default'}) | {'rope_theta': cfg.rope_theta}
    local = {'rope_type': 'default', 'rope_theta': cfg.window_theta or cfg.rope_theta}
    del fields['rope_theta']
    return fields | {'rope_parameters': {'full_attention': full, 'sliding_attention': local}}


def gemma3_wants(cfg):
    has_own = cfg.window_theta or not cfg.window or not cfg.rope_scaling
    return gemma2_wants(cfg) | {
        'qk_norm': 'head',
        'attn_softcap': 0.0,
        'window_theta': cfg.window_theta,
        'rope_scaling': cfg.rope_scaling if has_own else {},
    }


# -----------------------------------------------------------------------------
# Phi-3

PHI3 = {theirs: ours for theirs, ours in LLAMA.items() if not theirs.endswith(('q_proj', 'k_proj', 'v_proj',
                                                                              'gate_proj', 'up_proj'))} | {
    'layers.N.self_attn.qkv_proj': 'blocks.N.attn.q blocks.N.attn.k blocks.N.attn.v',
    'layers.N.mlp.gate_up_proj': 'blocks.N.mlp.gate blocks.N.mlp.up',
}


def phi3_config(config):
    config.fields |= {'attention_bias': False, 'mlp_bias': False}  # fields that this family does not have
    config.fields |= {'rms_norm_eps': config.get('rms_norm_eps', 1e-5)}
    scaling = read_rope(config)
    if scaling:
        config.refuse('rope_parameters', scaling, 'takes rope_type=default or dynamic')
    share = config.fields.pop('partial_rotary_factor', None)
    for name in ('rope_parameters', 'rope_scaling'):
        config.fields[name] = None  # read above
    cfg = llama_config(config)
    config.fields['partial_rotary_factor'] = share
    cfg.rope_dim = rotated(config, cfg.d_head)
    if config.get('sliding_window', None) is not None:
        cfg.window = config.size('sliding_window')
    return cfg


def phi3_fields(cfg):
    rope = {'rope_type': 'default', 'rope_theta': cfg.rope_theta}
    fields = llama_fields(cfg) | {
        'rope_parameters': rope | {'partial_rotary_factor': (cfg.rope_dim or cfg.d_head) / cfg.d_head},
        'sliding_window': cfg.window or None,
        'resid_pdrop': cfg.dropout,
        'embd_pdrop': cfg.dropout,
        'pad_token_id': None,
    }
    del fields['attention_bias'], fields['mlp_bias'], fields['rope_theta']
    return fields


def phi3_wants(cfg):
    return llama_wants(cfg) | {
        'bias': False,
        'rope_scaling': {},
        'rope_dim': cfg.rope_dim,
        'window': cfg.window,
        'head_dim': cfg.n_embd // cfg.n_head,
    }


# -----------------------------------------------------------------------------
# Granite

def granite_config(config):
    cfg = llama_config(config)
    cfg.embed_scale = config.number('embedding_multiplier', 1.0)
    cfg.residual_scale = config.number('residual_multiplier', 1.0)
    cfg.attn_scale = config.number('attention_multiplier', 1.0)
    cfg.logit_scale = 1 / config.number('logits_scaling', 1.0)
    return cfg


def granite_fields(cfg):
    return llama_fields(cfg) | {
        'embedding_multiplier': cfg.embed_scale,
        'residual_multiplier': cfg.residual_scale,
        'attention_multiplier': cfg.attn_scale or cfg.d_head ** -0.5,
        'logits_scaling': 1 / cfg.logit_scale,
    }


def granite_wants(cfg):
    return llama_wants(cfg) | {
        'embed_scale': cfg.embed_scale,
        'residual_scale': cfg.residual_scale,
        'attn_scale': cfg.attn_scale,
        'logit_scale': cfg.logit_scale,
    }
