"""
The model families of transformers: their tables of names, and functions that read and write the fields of
their config.json. gpts.py, llamas.py, mixtures.py and t5s.py hold them; the table FAMILIES names them all.
reading.py and export.py use it. To add a family, add an entry.
"""
import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass

from features import default_of
from features.hf import gpts, llamas, mixtures, t5s
from features.hf.positions import check_rotary
from features.stored import from_dict
from model import ModelConfig

# -----------------------------------------------------------------------------
# Our own class, as hub.py export --as=custom writes it

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
# The networks that fit a family. A setting in none of these lists, such as a new one, must have its default

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
    'rope_dim': 0,
    'no_rope': [],
    'window': 0,
    'full_layers': [],
    'window_theta': 0.0,
    'post_norm': False,
    'parallel': False,
    'qkv_bias': False,
    'qk_norm': False,
    'attn_scale': 0.0,
    'attn_softcap': 0.0,
    'embed_scale': 1.0,
    'residual_scale': 1.0,
    'logit_scale': 1.0,
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


# -----------------------------------------------------------------------------
# The families

@dataclass
class Family:
    """Everything about one model_type."""
    architecture: str  # the class of transformers
    prefix: str  # before all names but the head's; a file may leave it out
    read: Callable  # Config → ModelConfig. It raises UserError for a field that our networks cannot follow
    names: dict | Callable  # {their module: our modules}, without the prefix, or a function ModelConfig →
    # this; N is the number of a layer; the embedding comes first; {}: theirs are ours. Where there are
    # several of ours, theirs is one matrix with ours one below the other
    write: Callable | None = None  # ModelConfig → fields of config.json; None: this family is not written
    wants: Callable | None = None  # ModelConfig → {setting: the value that it has to have}, over those of
    # PLAIN
    head: str = 'lm_head'  # the name of the head; it has no prefix
    biases: bool = False  # whether all its layers have biases, always
    flipped: str = '$^'  # pattern of the matrices that are stored as (in, out): GPT-2's Conv1D
    alternate: str = '$^'  # pattern of the matrices in which ours alternate head by head
    shifted: str = '$^'  # pattern of the weights that are stored minus 1: Gemma's norms
    lead: int = 0  # rows of the table of positions before position 0
    buffers: str = '$^'  # pattern of the tensors of old files that are passed over
    spread: Callable | None = None  # ({name: slice} of a file, ModelConfig, folder) → the same with one
    # tensor per expert
    copies: str = '$^'  # pattern of further names of the embedding

    def names_of(self, cfg):
        """{their module: our modules} of a network with this ModelConfig, without the head."""
        return dict(self.names(cfg) if callable(self.names) else self.names)

    def heads_of(self, tensor, cfg):
        """names.Row.heads of their tensor of this name."""
        return cfg.n_head if re.fullmatch(self.alternate, tensor) else 0

    def shift_of(self, tensor):
        """names.Row.shift of their tensor of this name."""
        return 1 if re.fullmatch(self.shifted, tensor) else 0


MASKS = r'h\.\d+\.attn\.(bias|masked_bias)'
NEO_MASKS = r'h\.\d+\.attn\.attention\.(bias|masked_bias)'
NEOX_MASKS = r'layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)'
ROTARY = r'(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq'
UNUSED_BIAS = r'decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight'
COPIES = r'(encoder|decoder)\.embed_tokens\.weight'
NORMS = r'.*norm\.weight'

FAMILIES = {  # of two that fit a network equally, export.py takes the first
    'llama': Family(
        'LlamaForCausalLM', 'model.', llamas.llama_config, llamas.LLAMA, llamas.llama_fields,
        llamas.llama_wants, buffers=ROTARY),
    'mistral': Family(
        'MistralForCausalLM', 'model.', llamas.mistral_config, llamas.LLAMA, llamas.mistral_fields,
        llamas.mistral_wants, buffers=ROTARY),
    'qwen2': Family(
        'Qwen2ForCausalLM', 'model.', llamas.qwen2_config, llamas.LLAMA, llamas.qwen2_fields,
        llamas.qwen2_wants, buffers=ROTARY),
    'qwen3': Family(
        'Qwen3ForCausalLM', 'model.', llamas.qwen3_config, llamas.QWEN3, llamas.qwen3_fields,
        llamas.qwen3_wants),
    'smollm3': Family(
        'SmolLM3ForCausalLM', 'model.', llamas.smollm3_config, llamas.LLAMA, llamas.smollm3_fields,
        llamas.smollm3_wants),
    'olmo2': Family(
        'Olmo2ForCausalLM', 'model.', llamas.olmo2_config, llamas.OLMO2, llamas.olmo2_fields,
        llamas.olmo2_wants),
    'gemma': Family(
        'GemmaForCausalLM', 'model.', llamas.gemma_config, llamas.LLAMA, llamas.gemma_fields,
        llamas.gemma_wants, shifted=NORMS, buffers=ROTARY),
    'gemma2': Family(
        'Gemma2ForCausalLM', 'model.', llamas.gemma2_config, llamas.GEMMA2, llamas.gemma2_fields,
        llamas.gemma2_wants, shifted=NORMS),
    'gemma3_text': Family(
        'Gemma3ForCausalLM', 'model.', llamas.gemma3_config, llamas.GEMMA3, llamas.gemma3_fields,
        llamas.gemma3_wants, shifted=NORMS),
    'phi3': Family(
        'Phi3ForCausalLM', 'model.', llamas.phi3_config, llamas.PHI3, llamas.phi3_fields,
        llamas.phi3_wants),
    'granite': Family(
        'GraniteForCausalLM', 'model.', llamas.granite_config, llamas.LLAMA, llamas.granite_fields,
        llamas.granite_wants),
    'gpt2': Family(
        'GPT2LMHeadModel', 'transformer.', gpts.gpt2_config, gpts.GPT2, gpts.gpt2_fields,
        gpts.gpt2_wants, biases=True, flipped=r'h\.\d+\.(attn|mlp)\..*', buffers=MASKS),
    'gpt_bigcode': Family(
        'GPTBigCodeForCausalLM', 'transformer.', gpts.bigcode_config, gpts.GPT2, gpts.bigcode_fields,
        gpts.bigcode_wants, biases=True, buffers=MASKS),
    'gpt_neo': Family(
        'GPTNeoForCausalLM', 'transformer.', gpts.neo_config, gpts.GPT_NEO, gpts.neo_fields, gpts.neo_wants,
        buffers=NEO_MASKS),
    'gpt_neox': Family(
        'GPTNeoXForCausalLM', 'gpt_neox.', gpts.neox_config, gpts.GPT_NEOX, gpts.neox_fields,
        gpts.neox_wants, head='embed_out', biases=True, alternate=r'.*query_key_value\..*',
        buffers=NEOX_MASKS),
    'opt': Family(
        'OPTForCausalLM', 'model.decoder.', gpts.opt_config, gpts.OPT, gpts.opt_fields, gpts.opt_wants,
        biases=True, lead=2),
    'mixtral': Family(
        'MixtralForCausalLM', 'model.', mixtures.mixtral_config, mixtures.MIXTRAL, mixtures.mixtral_fields,
        mixtures.mixtral_wants, buffers=ROTARY, spread=mixtures.spread_mixtral),
    'qwen2_moe': Family(
        'Qwen2MoeForCausalLM', 'model.', mixtures.qwen2_moe_config, mixtures.qwen2_moe_names,
        mixtures.qwen2_moe_fields, mixtures.qwen2_moe_wants, spread=mixtures.spread),
    'qwen3_moe': Family(
        'Qwen3MoeForCausalLM', 'model.', mixtures.qwen3_moe_config, mixtures.qwen3_moe_names,
        mixtures.qwen3_moe_fields, mixtures.qwen3_moe_wants, spread=mixtures.spread),
    't5': Family(
        'T5ForConditionalGeneration', '', t5s.t5_config, t5s.t5_names, t5s.t5_fields, t5s.t5_wants,
        copies=COPIES, buffers=UNUSED_BIAS),
    'mt5': Family(
        'MT5ForConditionalGeneration', '', t5s.mt5_config, t5s.t5_names, copies=COPIES, buffers=UNUSED_BIAS),
    'umt5': Family(
        'UMT5ForConditionalGeneration', '', t5s.umt5_config, t5s.umt5_names, t5s.t5_fields, t5s.umt5_wants,
        copies=COPIES),
    'minnow': Family('MinnowForCausalLM', 'model.', minnow_config, {}),
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
        has_encoder = name in t5s.KINDS
        if family.write is None or has_encoder != (cfg.n_encoder_layer > 0):
            continue
        has_experts = family.spread is not None
        # such a network is compared with such families only: what it lacks for them says more
        if not has_encoder and has_experts != (cfg.n_expert > 0):
            continue
        in_the_way = obstacles(family, cfg)
        if fewest is None or len(in_the_way) < len(fewest):
            kind, fewest = name, in_the_way
    return kind, fewest
