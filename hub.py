"""
Models of others: local Hugging Face folders of the GPT-2 and Llama families, read without their code.

    cfg, weights = load('hf:FOLDER')      # config.json and model.safetensors, whole or in shards
    cfg, weights = load('gpt2-medium')    # fetched once into data/downloads/hf

A folder is somebody else's file: every size that config.json names is compared with the headers of the weights before
anything is allocated, every tensor must be known and is used, pickles and code are never touched.
"""
import json
import os
import re

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open

from configurator import UserError
from download import download
from model import ModelConfig
from tokenizer import new_tokenizer

# -----------------------------------------------------------------------------
# Where the folder is

PINNED = {  # names of nanoGPT's init_from: revisions of openai-community/NAME that the hub can never change
    'gpt2': '607a30d783dfa663caf39e06633721c8d4cfcd7e',
    'gpt2-medium': '6dcaa7a952f72f9298047fd5137cd6e4f05f41da',
    'gpt2-large': '32b71b12589c2f8d625668d2335a01cac3249519',
    'gpt2-xl': '15ea56dee5df4983c59b2538573817e1667135e2',
}


def knows(where):
    """Whether `where` names weights that load() reads, rather than a run of ours."""
    return where in PINNED or where.startswith('hf:')


def find(where):
    """
    The folder of `where`: hf:FOLDER, or a name of PINNED, which is fetched if it is not there yet (from HF_ENDPOINT, where that
    environment variable names a mirror of the hub). Raises UserError if there is none.
    """
    if where in PINNED:
        folder = os.path.join('data', 'downloads', 'hf', where)
        url = f'{os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")}/openai-community/{where}/resolve/{PINNED[where]}'
        for name in ('config.json', 'tokenizer.json', 'model.safetensors'):
            download(f'{url}/{name}', os.path.join(folder, name))  # unless it is there
        return folder
    if not where.startswith('hf:'):
        raise UserError(f'{where}: takes hf:FOLDER or one of {", ".join(PINNED)}')
    folder = os.path.expanduser(where[3:]).rstrip('/')
    if not os.path.isdir(folder):
        raise UserError(f'{where}: no such directory; give a local folder with config.json and model.safetensors')
    return folder


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
        with open(path, encoding='utf-8') as f:
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
    if 4 * context * head_dim > 2 ** 28:  # the one size that no tensor of the file vouches for: our table of angles has it
        config.refuse('max_position_embeddings', context, 'its rotary table would take more than 256 MiB: lower it to the context that you use')
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


# -----------------------------------------------------------------------------
# Names: ours, theirs, the shape of theirs, and how theirs becomes ours
#
# N is the number of a layer. V vocabulary, T context, C width, F width of the MLP, Q and K all heads of queries and of keys.

def same(t):
    return t


def flip(t):
    """GPT-2's Conv1D keeps its matrices as (in, out)."""
    return t.t().contiguous()


def third(i):
    """Queries, keys or values out of GPT-2's fused c_attn: its matrix (in, 3 out), or its bias (3 out)."""
    return lambda t: t.chunk(3, dim=-1)[i].t().clone(memory_format=torch.contiguous_format)


GPT2 = [
    ('wte.weight', 'wte.weight', 'V C', same),
    ('wpe.weight', 'wpe.weight', 'T C', same),
    ('blocks.N.norm_1.weight', 'h.N.ln_1.weight', 'C', same),
    ('blocks.N.attn.q.weight', 'h.N.attn.c_attn.weight', 'C 3C', third(0)),
    ('blocks.N.attn.k.weight', 'h.N.attn.c_attn.weight', 'C 3C', third(1)),
    ('blocks.N.attn.v.weight', 'h.N.attn.c_attn.weight', 'C 3C', third(2)),
    ('blocks.N.attn.o.weight', 'h.N.attn.c_proj.weight', 'C C', flip),
    ('blocks.N.norm_2.weight', 'h.N.ln_2.weight', 'C', same),
    ('blocks.N.mlp.up.weight', 'h.N.mlp.c_fc.weight', 'C F', flip),
    ('blocks.N.mlp.down.weight', 'h.N.mlp.c_proj.weight', 'F C', flip),
    ('norm_f.weight', 'ln_f.weight', 'C', same),
]
GPT2_BIAS = [(ours[:-6] + 'bias', theirs[:-6] + 'bias', shape.split()[-1], change) for ours, theirs, shape, change in GPT2[2:]]

LLAMA = [
    ('wte.weight', 'embed_tokens.weight', 'V C', same),
    ('blocks.N.norm_1.weight', 'layers.N.input_layernorm.weight', 'C', same),
    ('blocks.N.attn.q.weight', 'layers.N.self_attn.q_proj.weight', 'Q C', same),
    ('blocks.N.attn.k.weight', 'layers.N.self_attn.k_proj.weight', 'K C', same),
    ('blocks.N.attn.v.weight', 'layers.N.self_attn.v_proj.weight', 'K C', same),
    ('blocks.N.attn.o.weight', 'layers.N.self_attn.o_proj.weight', 'C Q', same),
    ('blocks.N.norm_2.weight', 'layers.N.post_attention_layernorm.weight', 'C', same),
    ('blocks.N.mlp.gate.weight', 'layers.N.mlp.gate_proj.weight', 'F C', same),
    ('blocks.N.mlp.up.weight', 'layers.N.mlp.up_proj.weight', 'F C', same),
    ('blocks.N.mlp.down.weight', 'layers.N.mlp.down_proj.weight', 'C F', same),
    ('norm_f.weight', 'norm.weight', 'C', same),
]
LLAMA_BIAS = [(ours[:-6] + 'bias', theirs[:-6] + 'bias', shape.split()[0], change) for ours, theirs, shape, change in LLAMA if 'proj' in theirs]
HEAD = ('head.weight', 'lm_head.weight', 'V C', same)

# model_type: its config, its names, those of its biases, the prefix that all but lm_head may have, buffers that old files carry along
ROTARY = r'(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq'
FAMILIES = {
    'gpt2': (gpt2_config, GPT2, GPT2_BIAS, 'transformer.', r'h\.\d+\.attn\.(bias|masked_bias)'),
    'llama': (llama_config, LLAMA, LLAMA_BIAS, 'model.', ROTARY),
    'mistral': (mistral_config, LLAMA, LLAMA_BIAS, 'model.', ROTARY),
}


# -----------------------------------------------------------------------------
# model.safetensors

def read_headers(folder, prefix):
    """{their name without `prefix`: slice}. A slice has shape and dtype from the file's header; its [:] reads the tensor."""
    files, index = ['model.safetensors'], os.path.join(folder, 'model.safetensors.index.json')
    if not os.path.exists(os.path.join(folder, files[0])):
        if not os.path.exists(index):
            refuse_pickles(folder)
        weight_map = read_json(index).get('weight_map')
        files = sorted(set(map(str, weight_map.values()))) if isinstance(weight_map, dict) else []
        if not files or any(os.path.basename(name) != name for name in files):  # a / could lead out of the folder
            raise UserError(f'{index}: weight_map: takes names of tensors and of files in this folder')
    slices = {}
    for path in (os.path.join(folder, name) for name in files):
        try:
            shard = safe_open(path, 'pt')
        except (OSError, SafetensorError) as error:
            raise UserError(f'{path}: not readable as safetensors: {error}') from None
        for name in shard.keys():
            if name.removeprefix(prefix) in slices:
                raise UserError(f'{path}: {name}: this tensor is there twice')
            slices[name.removeprefix(prefix)] = shard.get_slice(name)
    return slices


def refuse_pickles(folder):
    pickles = [name for name in sorted(os.listdir(folder)) if name.endswith(('.bin', '.pt', '.pth'))]
    raise UserError(f'{folder}: no model.safetensors in it' + (
        f'; {pickles[0]} is a pickle, which can run code, and is not read. If you trust it, convert it once: python -c "from transformers import '
        f"AutoModelForCausalLM as M, AutoTokenizer as T; [c.from_pretrained('{folder}').save_pretrained('{folder}-safetensors') for c in (M, T)]\""
        if pickles else ''))


def load(where):
    """
    (ModelConfig, {name: float32 tensor}) of a Hugging Face folder: our names and shapes, the vocabulary's padding zero.
    `where`: hf:FOLDER or a name of PINNED. Raises UserError, in one line, for whatever is not exactly a network that we have.
    """
    folder = find(where)
    config = Config(folder)
    kind = config.get('model_type', None)
    if kind not in list(FAMILIES):
        config.refuse('model_type', kind, f'takes {" or ".join(FAMILIES)}')
    for name, why in (('auto_map', 'asks for code of its own, which is never run'), ('quantization_config', 'quantized weights are not read')):
        if config.get(name, None):
            config.refuse(name, config.fields[name], why)
    make_config, table, biases, prefix, buffers = FAMILIES[kind]
    cfg = make_config(config)
    try:
        cfg.check()
    except ValueError as error:
        raise UserError(f'{config.path}: {error}') from None

    slices = read_headers(folder, prefix)
    embedding, head = table[0][1], HEAD[1]
    if cfg.tie and head in slices:
        slices.setdefault(embedding, slices[head])  # one matrix, of whose two names the writer may have kept either
    rows = table + (biases if cfg.bias else []) + ([HEAD] if not cfg.tie or head in slices else [])
    sizes = {'V': cfg.vocab_size, 'T': cfg.block_size, 'C': cfg.n_embd, '3C': 3 * cfg.n_embd, 'F': cfg.mlp_width,
             'Q': cfg.n_head * cfg.d_head, 'K': cfg.kv_heads * cfg.d_head}
    unused, plan = {name for name in slices if not re.fullmatch(buffers, name)}, []
    for ours, theirs, shape, change in rows:
        for n in range(cfg.n_layer if '.N.' in ours else 1):
            name, wanted = theirs.replace('.N.', f'.{n}.'), [sizes[size] for size in shape.split()]
            found = slices[name].get_shape() if name in slices else 'not in the file'
            if found != wanted:  # from the headers alone: no number in config.json can make us allocate what the file does not hold
                raise UserError(f'{folder}: {name}: {found}, but config.json asks for {wanted}')
            if slices[name].get_dtype() not in ('F32', 'F16', 'BF16'):
                raise UserError(f'{folder}: {name}: {slices[name].get_dtype()}, takes float32, float16 or bfloat16')
            unused.discard(name)
            plan.append((ours.replace('.N.', f'.{n}.'), name, shape, change))
    if unused:
        raise UserError(f'{folder}: {min(unused)}: the network that config.json describes has no such tensor here')

    weights = {}
    for ours, name, shape, change in plan:
        weights[ours] = change(slices[name][:].float())
        if shape == 'V C':
            weights[ours] = F.pad(weights[ours], (0, 0, 0, cfg.padded_vocab - cfg.vocab_size))
    if cfg.tie and not torch.equal(weights.pop('head.weight', weights['wte.weight']), weights['wte.weight']):
        config.refuse('tie_word_embeddings', True, f'but {head} and {embedding} are not equal in the file')
    return cfg, weights


# -----------------------------------------------------------------------------
# Tokenizer

def tokenizer(where):
    """(folder, description) of the tokenizer beside the weights, as load_tokenizer(description, folder) takes them. Raises UserError if there is none."""
    folder = find(where)
    for name in ('tokenizer.json', 'tokenizer.model'):
        path = os.path.join(folder, name)
        if os.path.exists(path):
            return folder, new_tokenizer(path).describe()
    raise UserError(f'{folder}: neither tokenizer.json nor tokenizer.model in it: let transformers write one into a copy of it: python -c "from transformers '
                    f"import AutoTokenizer as T; T.from_pretrained('{folder}').save_pretrained('{folder}-copy')\"")
