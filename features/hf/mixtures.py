"""
The families of transformers with mixtures of experts. They have Llama's layout beside their MLPs.

    mixtral    Mixtral: the weights of a token's experts sum to 1
    qwen2_moe  Qwen1.5-MoE, Qwen2-57B-A14B: a shared expert with a gate; biases for queries, keys and values
    qwen3_moe  Qwen3-30B-A3B and others: narrow experts, an RMSNorm on every head of queries and keys

Files have one tensor per expert, as released, or the fused tensors of transformers 5
(save_pretrained(…, save_original_format=False)): spread() makes the former of the latter.
"""
import dataclasses
import re

from configurator import UserError
from features import build
from features.hf.llamas import LLAMA, QWEN3, llama_config, llama_fields, llama_wants
from features.hf.positions import MOST_LAYERS, read_windows, window_fields
from model import ModelConfig


def mixture(cfg, **settings):
    """A ModelConfig with experts, from one without."""
    return build(ModelConfig, **dataclasses.asdict(cfg) | settings)


def expert_width(cfg):
    return getattr(cfg, 'expert_width', 0) or cfg.mlp_width


def mixture_wants(cfg):
    """The settings that all of these families need; experts may have any width."""
    return llama_wants(cfg) | {
        'bias': False,
        'n_expert': max(2, cfg.n_expert),
        'expert_bias': 0.0,
        'window': cfg.window,
    }


# -----------------------------------------------------------------------------
# Mixtral

ATTENTION = {theirs: ours for theirs, ours in LLAMA.items() if '.mlp.' not in theirs}
MIXTRAL = ATTENTION | {
    'layers.N.block_sparse_moe.gate': 'blocks.N.mlp.router',
    'layers.N.block_sparse_moe.experts.E.w1': 'blocks.N.mlp.experts.gate',
    'layers.N.block_sparse_moe.experts.E.w3': 'blocks.N.mlp.experts.up',
    'layers.N.block_sparse_moe.experts.E.w2': 'blocks.N.mlp.experts.down',
}


def mixtral_config(config):
    config.fields |= {'attention_bias': False, 'mlp_bias': False}  # fields that this family does not have
    config.fields |= {'rms_norm_eps': config.get('rms_norm_eps', 1e-5)}
    config.fields.setdefault('num_key_value_heads', 8)
    config.fields.setdefault('rope_theta', 1e6)
    cfg = llama_config(config)
    if config.get('sliding_window', None) is not None:
        cfg.window = config.size('sliding_window')
    return mixture(
        cfg,
        n_expert=config.size('num_local_experts', config.get('num_experts', 8)),
        n_expert_active=config.size('num_experts_per_tok', 2),
        expert_renorm=True)


def mixtral_fields(cfg):
    fields = llama_fields(cfg) | {
        'intermediate_size': expert_width(cfg),
        'num_local_experts': cfg.n_expert,
        'num_experts_per_tok': cfg.n_expert_active,
        'sliding_window': cfg.window or None,
    }
    del fields['attention_bias'], fields['mlp_bias']
    return fields


def mixtral_wants(cfg):
    is_renormed = getattr(cfg, 'is_renormed', True)
    return mixture_wants(cfg) | {
        'expert_renorm': getattr(cfg, 'expert_renorm', None) if is_renormed else True,
        'shared_width': 0,
        'dense_layers': [],
    }


# -----------------------------------------------------------------------------
# Qwen

DENSE = {theirs: ours for theirs, ours in LLAMA.items() if '.mlp.' in theirs}  # of layers without experts
EXPERTS = {
    'layers.N.mlp.gate': 'blocks.N.mlp.router',
    'layers.N.mlp.experts.E.gate_proj': 'blocks.N.mlp.experts.gate',
    'layers.N.mlp.experts.E.up_proj': 'blocks.N.mlp.experts.up',
    'layers.N.mlp.experts.E.down_proj': 'blocks.N.mlp.experts.down',
}
SHARED = {
    'layers.N.mlp.shared_expert_gate': 'blocks.N.mlp.shared_router',
    'layers.N.mlp.shared_expert.gate_proj': 'blocks.N.mlp.shared.gate',
    'layers.N.mlp.shared_expert.up_proj': 'blocks.N.mlp.shared.up',
    'layers.N.mlp.shared_expert.down_proj': 'blocks.N.mlp.shared.down',
}


def qwen_mixture(config, cfg, experts, active, width, **settings):
    """A ModelConfig with the experts of a Qwen. The numbers are transformers' defaults."""
    only_dense = config.get('mlp_only_layers', [])
    if not isinstance(only_dense, list) or any(type(n) is not int for n in only_dense):
        config.refuse('mlp_only_layers', only_dense, 'takes a list of layers')
    only_dense = set(only_dense)
    every = config.size('decoder_sparse_step', 1)
    layers = range(min(cfg.n_layer, MOST_LAYERS))
    return mixture(
        cfg,
        n_expert=config.size('num_experts', config.get('num_local_experts', experts)),
        n_expert_active=config.size('num_experts_per_tok', active),
        expert_width=config.size('moe_intermediate_size', width),
        expert_renorm=config.one_of('norm_topk_prob', False, True),
        dense_layers=[n for n in layers if n in only_dense or (n + 1) % every != 0],
        **settings)


def qwen_mixture_fields(cfg):
    fields = llama_fields(cfg) | {
        'num_experts': cfg.n_expert,
        'num_experts_per_tok': cfg.n_expert_active,
        'moe_intermediate_size': expert_width(cfg),
        'norm_topk_prob': cfg.is_renormed,
        'mlp_only_layers': cfg.dense_layers,
        'decoder_sparse_step': 1,
        'use_sliding_window': bool(cfg.window),
        'sliding_window': cfg.window or None,
    }
    del fields['mlp_bias']
    return fields


def qwen2_moe_names(cfg):
    return ATTENTION | EXPERTS | SHARED | (DENSE if getattr(cfg, 'dense_layers', []) else {})


def qwen2_moe_config(config):
    config.fields |= {'attention_bias': False, 'mlp_bias': False}
    config.fields.setdefault('num_key_value_heads', 16)
    cfg = llama_config(config)
    cfg.qkv_bias = config.one_of('qkv_bias', True, False)
    if not config.one_of('use_sliding_window', False, True):
        config.fields['sliding_window'] = None
    last = config.size('max_window_layers', 28)
    has_windows = config.get('sliding_window', None) is not None
    read_windows(config, cfg, lambda layer: has_windows and layer % 2 == 0 and layer < last)
    return qwen_mixture(
        config, cfg, 60, 4, 1408,
        shared_width=config.size('shared_expert_intermediate_size', 5632),
        shared_gate=True)


def qwen2_moe_fields(cfg):
    fields = qwen_mixture_fields(cfg) | window_fields(cfg) | {
        'shared_expert_intermediate_size': cfg.shared_width,
        'qkv_bias': cfg.qkv_bias,
    }
    del fields['attention_bias']
    return fields


def qwen2_moe_wants(cfg):
    return mixture_wants(cfg) | {
        'qkv_bias': cfg.qkv_bias is True,
        'full_layers': cfg.full_layers,
        'shared_width': max(1, getattr(cfg, 'shared_width', 0)),
        'shared_gate': True,
    }


def qwen3_moe_names(cfg):
    norms = {theirs: ours for theirs, ours in QWEN3.items() if theirs not in LLAMA}
    return ATTENTION | norms | EXPERTS | (DENSE if getattr(cfg, 'dense_layers', []) else {})


def qwen3_moe_config(config):
    config.one_of('attention_bias', False)
    config.fields |= {'mlp_bias': False}
    config.fields.setdefault('num_key_value_heads', 4)
    cfg = llama_config(config)
    cfg.qk_norm = 'head'
    if config.one_of('use_sliding_window', False, True):
        cfg.window = config.size('sliding_window', 4096)
    return qwen_mixture(config, cfg, 128, 8, 768)


def qwen3_moe_fields(cfg):
    return qwen_mixture_fields(cfg)


def qwen3_moe_wants(cfg):
    return mixture_wants(cfg) | {'qk_norm': 'head', 'shared_width': 0}


# -----------------------------------------------------------------------------
# Fused tensors

class Matrix:
    """Rows `first` to `last` of matrix number `expert` of a stack in a file, as a slice of safetensors."""

    def __init__(self, stack, expert, first, last):
        self.stack, self.expert, self.first, self.last = stack, expert, first, last

    def get_shape(self):
        return [self.last - self.first, self.stack.get_shape()[2]]

    def get_dtype(self):
        return self.stack.get_dtype()

    def __getitem__(self, index):
        return self.stack[self.expert, self.first:self.last][index]


def spread(slices, cfg, folder):
    """
    {name: slice} of a file with fused tensors → the same with one tensor per expert, of which nothing is read
    yet. Raises UserError for stacks of other shapes than config.json's.
    """
    E, C, width = cfg.n_expert, cfg.n_embd, expert_width(cfg)
    shapes = {'gate_up_proj': [E, 2 * width, C], 'down_proj': [E, C, width]}
    parts = {'gate_up_proj': [('gate_proj', 0, width), ('up_proj', width, 2 * width)],
             'down_proj': [('down_proj', 0, C)]}
    out = {}
    for name, stack in slices.items():
        found = re.fullmatch(r'(layers\.\d+\.mlp\.experts)\.(gate_up_proj|down_proj)', name)
        if found is None:
            out[name] = stack
            continue
        before, kind = found.groups()
        if stack.get_shape() != shapes[kind]:
            raise UserError(f'{folder}: {name}: {stack.get_shape()}, but config.json asks for {shapes[kind]}')
        for e in range(E):
            for part, first, last in parts[kind]:
                out[f'{before}.{e}.{part}.weight'] = Matrix(stack, e, first, last)
    return out


OF_MIXTRAL = {  # part of a fused tensor's name: that of the released files
    '.mlp.': '.block_sparse_moe.',
    '.gate_proj.': '.w1.',
    '.up_proj.': '.w3.',
    '.down_proj.': '.w2.',
}


def spread_mixtral(slices, cfg, folder):
    """The same for Mixtral, whose released files have other names than the fused tensors."""
    out = {}
    for name, tensor in spread(slices, cfg, folder).items():
        for part, released in OF_MIXTRAL.items():
            name = name.replace(part, released)
        out[name] = tensor
    return out
