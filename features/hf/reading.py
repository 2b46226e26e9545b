"""
Load models and tokenizers from Hugging Face folders: config.json, model.safetensors, tokenizer.json.

    cfg, weights = load('hf:FOLDER')      # safetensors, in one file or in shards
    cfg, weights = load('gpt2-medium')    # downloaded once into data/downloads/hf

A folder is untrusted. Every size in config.json is compared with the headers of the weights before anything
is allocated. Every tensor must be known and is used. Pickles and code are never opened.
"""
import os
import re

import torch
from safetensors import SafetensorError, safe_open

from checkpoint import is_file_name, open_regular
from configurator import UserError, check
from features.foreign_json import read_foreign
from features.hf import llama2c
from features.hf.config_json import Config
from features.hf.families import FAMILIES
from features.hf.names import name_rows, put
from tokenizer import new_tokenizer

# -----------------------------------------------------------------------------
# Where the folder is

PINNED = {  # features.networks.GPT2_NAMES: revisions of openai-community/NAME, which the hub can never change
    'gpt2': '607a30d783dfa663caf39e06633721c8d4cfcd7e',
    'gpt2-medium': '6dcaa7a952f72f9298047fd5137cd6e4f05f41da',
    'gpt2-large': '32b71b12589c2f8d625668d2335a01cac3249519',
    'gpt2-xl': '15ea56dee5df4983c59b2538573817e1667135e2',
}


def find(where):
    """
    The folder of `where`: hf:FOLDER, or a name in PINNED, which is downloaded if necessary. Raises UserError
    if there is none.
    """
    if where in PINNED:
        return fetch(where)
    if not where.startswith('hf:'):
        raise UserError(f'{where}: takes hf:FOLDER or one of {", ".join(PINNED)}')
    folder = os.path.expanduser(where.removeprefix('hf:')).rstrip('/')
    if not os.path.isdir(folder):
        raise UserError(f'{where}: no such directory; '
                        'give a local folder with config.json and model.safetensors')
    return folder


def fetch(name):
    """Download a model of PINNED from the hub, or from the mirror in HF_ENDPOINT. Returns its folder."""
    from features.text.download import download
    folder = os.path.join('data', 'downloads', 'hf', name)
    endpoint = os.environ.get('HF_ENDPOINT', 'https://huggingface.co').rstrip('/')
    url = f'{endpoint}/openai-community/{name}/resolve/{PINNED[name]}'
    for file in ('config.json', 'tokenizer.json', 'model.safetensors'):
        download(f'{url}/{file}', os.path.join(folder, file))  # does nothing if it is there
    return folder


# -----------------------------------------------------------------------------
# A network

def load(where):
    """
    (ModelConfig, {name: float32 tensor}) of a folder, with our names and shapes and zeros in the vocabulary
    padding. where: hf:FOLDER or a name in PINNED. Raises a one-line UserError if our model cannot represent
    it exactly.
    """
    folder = find(where)
    config = Config(folder)
    family = family_of(config)
    cfg = read_config(config, family)

    # 1) all checks that the headers of the files allow: nothing is allocated yet
    slices = read_headers(folder, family.prefix)
    if family.spread is not None:
        slices = family.spread(slices, cfg, folder)
    embedding = embedding_of(family, cfg)
    copies = copies_of_embedding(family, cfg, slices)
    if copies:
        # one matrix: the writer may have kept any of its names
        slices.setdefault(embedding, slices[copies[0]])
    if config.get('scale_decoder_outputs', None) is False and embedding in slices:
        # T5 1.1 by transformers 5: the head is not scaled
        slices.setdefault(f'{family.head}.weight', slices[embedding])
    rows = checked_rows(folder, family, cfg, slices)

    # 2) is every tensor of the files used?
    check_copies(config, slices, embedding, copies)
    unused = slices.keys() - {row.theirs for row in rows} - set(copies)
    unused = [name for name in unused if not re.fullmatch(family.buffers, name)]
    if unused:
        raise UserError(f'{folder}: {min(unused)}: '
                        'the network that config.json describes has no such tensor here')

    # 3) the numbers
    weights = {}
    for row in rows:
        put(weights, row, slices[row.theirs][...], cfg.n_expert)
    if 'head.weight' in weights and slices.get(f'{family.head}.weight') is slices[embedding]:
        # two matrices here: they must not share the memory of the mapped file
        weights['head.weight'] = weights['head.weight'].clone()
    return cfg, weights


def family_of(config):
    """The Family of a Config. Raises UserError for an unknown family or quantized weights."""
    kind = config.get('model_type', None)
    if type(kind) is not str or kind not in FAMILIES:
        config.refuse('model_type', kind, f'takes {" or ".join(FAMILIES)}')
    is_ours = kind == 'minnow'  # its code is ours, and is here
    if config.get('auto_map', None) and not is_ours:  # as Phi-3's files; transformers passes it over too
        print(f'{config.path}: auto_map: names code of its own, which is never run: read as {kind}')
    if config.get('quantization_config', None) and not is_ours:
        config.refuse('quantization_config', config.fields['quantization_config'],
                      'quantized weights are not read')
    return FAMILIES[kind]


def read_config(config, family):
    """The ModelConfig of a Config. Raises UserError for inconsistent sizes."""
    cfg = family.read(config)
    check(cfg, config.path)
    return cfg


def embedding_of(family, cfg):
    """The name of the embedding in the files of a family."""
    names = list(family.names_of(cfg))
    if not names:  # ours
        return 'wte.weight'
    return f'{names[0]}.weight'


def copies_of_embedding(family, cfg, slices):
    """The other names under which the files store the embedding."""
    copies = []
    for name in slices:
        if re.fullmatch(family.copies, name) or cfg.tie and name == f'{family.head}.weight':
            copies.append(name)
    return copies


def check_copies(config, slices, embedding, copies):
    """Raise UserError unless all copies of the embedding are equal."""
    for name in copies:
        is_same = slices[name].get_shape() == slices[embedding].get_shape()
        if not is_same or not torch.equal(slices[name][:], slices[embedding][:]):
            config.refuse('tie_word_embeddings', True,
                          f'but {name} and {embedding} are not equal in the file')


def checked_rows(folder, family, cfg, slices):
    """
    The names.Row of every tensor of the model. Raises UserError if the file headers do not have it, so that
    no number in config.json can make us allocate more than the files contain.
    """
    layers = cfg.n_layer + cfg.n_encoder_layer
    if layers > len(slices):
        raise UserError(f'{folder}: {len(slices)} tensors, but config.json asks for {layers} layers')
    if cfg.n_expert > len(slices) and family.spread is not None:
        raise UserError(f'{folder}: {len(slices)} tensors, but config.json asks for {cfg.n_expert} experts')
    try:
        rows = name_rows(family, cfg)
    except RuntimeError as error:  # torch cannot describe a tensor of 2**63 bytes
        raise UserError(f'{folder}: config.json asks for tensors that are too large: {error}') from None
    for row in rows:
        found = slices[row.theirs].get_shape() if row.theirs in slices else 'not in the file'
        if found != row.shape:
            raise UserError(f'{folder}: {row.theirs}: {found}, but config.json asks for {row.shape}')
        dtype = slices[row.theirs].get_dtype()
        if dtype not in ('F32', 'F16', 'BF16'):
            raise UserError(f'{folder}: {row.theirs}: {dtype}, takes float32, float16 or bfloat16')
    return rows


# -----------------------------------------------------------------------------
# model.safetensors

def read_headers(folder, prefix):
    """
    {name of a tensor without `prefix`: slice} of all files. A slice has the shape and dtype from the file's
    header; slice[...] reads the tensor. Raises UserError for missing or broken files.
    """
    model = llama2c.model_file(folder)
    if model:
        return llama2c.read_slices(model)
    slices = {}
    for file in weight_files(folder):
        path = os.path.join(folder, file)
        open_regular(path).close()
        try:
            shard = safe_open(path, 'pt')
        except (OSError, SafetensorError) as error:
            raise UserError(f'{path}: not readable as safetensors: {error}') from None
        for name in shard.keys():
            short = name.removeprefix(prefix)
            if short in slices:
                raise UserError(f'{path}: {short}: this tensor is there twice')
            slices[short] = shard.get_slice(name)
    return slices


def weight_files(folder):
    """The names of the safetensors files of a folder. Raises UserError if there are none."""
    if os.path.lexists(os.path.join(folder, 'model.safetensors')):
        return ['model.safetensors']
    index = os.path.join(folder, 'model.safetensors.index.json')
    if not os.path.lexists(index):
        refuse_pickles(folder)
    weight_map = read_foreign(index, most=2 ** 26).get('weight_map')
    files = []
    if isinstance(weight_map, dict):
        files = list(weight_map.values())
    if files and all(map(is_file_name, files)):
        return sorted(set(files))
    raise UserError(f'{index}: weight_map: takes names of tensors and of files in this folder')


def refuse_pickles(folder):
    """Raise UserError for a folder without safetensors; it says how to convert pickled weights."""
    problem = f'{folder}: no model.safetensors in it'
    pickles = [name for name in sorted(os.listdir(folder)) if name.endswith(('.bin', '.pt', '.pth'))]
    if pickles:
        problem += (
            f'; {pickles[0]} is a pickle, which can run code, and is not read. If you trust it, convert it '
            'once: python -c "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; '
            f"[c.from_pretrained('{folder}').save_pretrained('{folder}-safetensors') for c in (M, T)]\"")
    raise UserError(problem)


# -----------------------------------------------------------------------------
# Tokens

def tokenizer(where):
    """
    (description, folder) of the tokenizer in the folder, for load_tokenizer(). Raises UserError if there is
    none.
    """
    folder, name = os.path.split(tokenizer_file(where))
    description = new_tokenizer(os.path.join(folder, name)).describe()
    sha256, = description['files'].values()
    # under the name that it has here: sentencepiece's files have two
    description['files'] = {name: sha256}
    return description, folder


def tokenizer_file(where):
    """The path of the tokenizer in the folder. Raises UserError if there is none."""
    folder = find(where)
    of_llama2c = [name for name in sorted(os.listdir(folder)) if re.fullmatch(r'tok\d+\.(bin|model)', name)]
    for name in ('tokenizer.json', 'tokenizer.model', 'spiece.model', 'tokenizer.bin', *of_llama2c):
        path = os.path.join(folder, name)
        if os.path.exists(path):
            return path
    raise UserError(f'{folder}: no tokenizer.json, tokenizer.model or spiece.model in it: let transformers '
                    'write one into a copy of it: python -c "from transformers import AutoTokenizer as T; '
                    f"T.from_pretrained('{folder}').save_pretrained('{folder}-copy')\"")


def decoder_start(where):
    """The start token of the decoder of an encoder-decoder. Raises UserError if it is invalid."""
    config = Config(find(where))
    token = config.get('decoder_start_token_id', 0)
    if type(token) is not int or not 0 <= token < config.size('vocab_size'):
        config.refuse('decoder_start_token_id', token, 'takes a token of the vocabulary')
    return token
