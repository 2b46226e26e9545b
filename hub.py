"""
Hugging Face folders, in and out: GPT-2, GPTBigCode (StarCoder), Llama (TinyLlama, SmolLM, OpenLLaMA), Mistral, T5 and Flan-T5.

    cfg, weights = load('hf:FOLDER')      # config.json and model.safetensors, whole or in shards
    cfg, weights = load('gpt2-medium')    # fetched once into data/downloads/hf

    python hub.py export --out_dir=out/run --to=FOLDER                  # for transformers, vLLM, lm-eval, llama.cpp's converter
    python hub.py export --out_dir=out/run --to=FOLDER --as=custom      # any decoder, with its code beside it
    python hub.py export --out_dir=out/lora --to=FOLDER                 # an adapter, for PEFT

A folder is somebody else's file: every size that config.json names is compared with the headers of the weights before
anything is allocated, every tensor must be known and is used, pickles and code are never touched.
"""
import dataclasses
import os
import re
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open

import checkpoint
from configurator import FilePath, UserError, check, configure_command, from_dict, run_main
from features.growth.networks import fold
from features.hf.code import write_code
from features.hf.families import FAMILIES, HEAD, Config, name_rows, nearest, read_json
from features.hf.tokenizer_json import spelling, to_json
from features.lora import adapters, peft_files
from features.t5.objectives import stored_begin
from features.text.download import download
from files import new_folder, write_json, write_tensors
from model import ModelConfig, make_model
from tokenizer import load_tokenizer, new_tokenizer

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
        if config.get(name, None) and kind != 'minnow':  # whose code is ours, here
            config.refuse(name, config.fields[name], why)
    family = FAMILIES[kind]
    cfg = family.read(config)
    check(cfg, config.path)

    slices = read_headers(folder, family.prefix)
    embedding, head = next(iter(family.names(cfg)), 'wte') + '.weight', HEAD + '.weight'
    copies = [name for name in slices if re.fullmatch(family.copies, name) or cfg.tie and name == head]
    if copies:
        slices.setdefault(embedding, slices[copies[0]])  # one matrix, of whose names the writer may have kept any
    if config.get('scale_decoder_outputs', None) is False and embedding in slices:
        slices.setdefault(head, slices[embedding])  # a head without T5's scale; transformers 5 makes it of the embedding, and keeps it once
    if cfg.n_layer + cfg.n_encoder_layer > len(slices):
        raise UserError(f'{folder}: {len(slices)} tensors, but config.json asks for {cfg.n_layer + cfg.n_encoder_layer} layers')
    unused, plan = {name for name in slices if not re.fullmatch(family.buffers, name)}, []
    for theirs, ours, wanted, flipped in name_rows(family, cfg):
        found = slices[theirs].get_shape() if theirs in slices else 'not in the file'
        if found != wanted:  # from the headers alone: no number in config.json can make us allocate what the file does not hold
            raise UserError(f'{folder}: {theirs}: {found}, but config.json asks for {wanted}')
        if slices[theirs].get_dtype() not in ('F32', 'F16', 'BF16'):
            raise UserError(f'{folder}: {theirs}: {slices[theirs].get_dtype()}, takes float32, float16 or bfloat16')
        unused.discard(theirs)
        plan.append((theirs, ours, flipped))
    for name in copies:
        if slices[name].get_shape() != slices[embedding].get_shape() or not torch.equal(slices[name][:], slices[embedding][:]):
            config.refuse('tie_word_embeddings', True, f'but {name} and {embedding} are not equal in the file')
        unused.discard(name)
    if unused:
        raise UserError(f'{folder}: {min(unused)}: the network that config.json describes has no such tensor here')

    weights = {}
    for theirs, ours, flipped in plan:
        t = slices[theirs][...].float()
        t = t.t().contiguous() if flipped else t
        if t.ndim and sum(ours.values()) > len(t):
            t = F.pad(t, (0, 0, 0, sum(ours.values()) - len(t)))  # the vocabulary's padding
        weights |= zip(ours, [t] if len(ours) == 1 else (part.clone() for part in t.split(list(ours.values()))))
    return cfg, weights


# -----------------------------------------------------------------------------
# Tokenizer

def tokenizer(where):
    """(folder, description) of the tokenizer beside the weights, as load_tokenizer(description, folder) takes them. Raises UserError if there is none."""
    folder = find(where)
    for name in ('tokenizer.json', 'tokenizer.model', 'spiece.model'):
        path = os.path.join(folder, name)
        if os.path.exists(path):
            description = new_tokenizer(path).describe()
            sha256, = description['files'].values()
            return folder, description | {'files': {name: sha256}}  # sentencepiece's files have two names
    raise UserError(f'{folder}: no tokenizer.json, tokenizer.model or spiece.model in it: let transformers write one into a copy of it: python -c '
                    f"\"from transformers import AutoTokenizer as T; T.from_pretrained('{folder}').save_pretrained('{folder}-copy')\"")


def decoder_start(where):
    """The token that a decoder with an encoder begins with."""
    config = Config(find(where))
    token = config.get('decoder_start_token_id', 0)
    if type(token) is not int or not 0 <= token < config.size('vocab_size'):
        config.refuse('decoder_start_token_id', token, 'takes a token of the vocabulary')
    return token


# -----------------------------------------------------------------------------
# Export

@dataclass
class ExportSettings:
    out_dir: FilePath = 'out'  # a run (its best checkpoint) or a checkpoint
    to: FilePath = ''  # the folder to write: a new one
    as_: Literal['stock', 'custom'] = 'stock'  # stock: as a class that transformers has; custom: any decoder, as our own class, which comes along
    dtype: Literal['float32', 'bfloat16', 'float16'] = 'float32'  # of the weights

    def check(self):
        """Raise ValueError for values that cannot work."""
        if not self.to:
            raise ValueError('to: is not given: python hub.py export --out_dir=out/run --to=FOLDER')


CUSTOM = ': --as=custom takes any decoder'


def stock(cfg, weights, where):
    """(fields of config.json, {name: tensor}) of the family that a network fits, after folding. Raises UserError with what stands in the way."""
    kind, in_the_way = nearest(cfg)
    if in_the_way:
        raise UserError(f'{where}: {", ".join(in_the_way)}: no class of transformers has this (the nearest is {kind})'
                        + CUSTOM * (not cfg.n_encoder_layer))
    family, tensors, used = FAMILIES[kind], {}, set()
    cfg = dataclasses.replace(cfg, bias=cfg.bias or family.biases)
    for theirs, ours, _, flipped in name_rows(family, cfg):
        t = torch.cat([torch.zeros(rows) if name.endswith('bias') and name not in weights else weights[name] for name, rows in ours.items()])
        if ours.keys() & {'wte.weight', 'head.weight'}:
            t = t[:cfg.vocab_size]  # without its padding
        tensors[theirs if theirs.startswith(HEAD) else family.prefix + theirs] = t.t() if flipped else t
        used |= ours.keys()
    left = sorted(weights.keys() - used)
    if left:
        raise UserError(f'{where}: {left[0]}: the family {kind} has no such tensor' + CUSTOM * (not cfg.n_encoder_layer))
    return {'architectures': [family.architecture], 'model_type': kind, 'tie_word_embeddings': cfg.tie, **family.write(cfg)}, tensors


def custom(cfg, weights):
    """The same as our own class."""
    fields = {'architectures': [FAMILIES['minnow'].architecture], 'model_type': 'minnow', 'minnow': dataclasses.asdict(cfg), 'tie_word_embeddings': False,
              'auto_map': {'AutoConfig': 'modeling_minnow.MinnowConfig', 'AutoModelForCausalLM': 'modeling_minnow.MinnowForCausalLM'}}
    return fields, {f'model.{name}': t for name, t in weights.items()}


def export(s):
    """Write the folder s.to, whole or not at all. Raises UserError for a network or a tokenizer that has no place there."""
    if os.path.exists(s.to):
        raise UserError(f'to={s.to}: is there already: give a new folder')
    folder = checkpoint.find(s.out_dir, 'best')
    state = checkpoint.load_state(folder)
    cfg = from_dict(ModelConfig, state['model'], os.path.join(folder, 'state.json'))
    if 'base' in state:
        if s.as_ == 'custom' or s.dtype != 'float32':
            raise UserError(f'as={s.as_}, dtype={s.dtype}: {folder} holds an adapter, which goes to PEFT in float32: leave them out, or surgery.py merge first')
        base = state['base']['from']
        saved = adapters.described(state['lora'], checkpoint.read_weights(folder))
        peft_files.write(s.to, cfg, saved, peft_files.family_of(cfg, base), base.removeprefix('hf:'))
        return 'peft'
    if cfg.n_encoder_layer and s.as_ == 'custom':
        raise UserError(f'as=custom: {folder} is an encoder-decoder, our class for transformers a decoder: it goes as T5 or not at all')
    if cfg.arch == 'markov' or cfg.rank_guide:
        raise UserError(f'{folder}: a Markov chain, or a guided start that has not ended, is not exported')
    model = make_model(cfg, init=False)
    checkpoint.load_weights(model, checkpoint.read_weights(folder), folder)
    tokenizer = load_tokenizer(state['tokenizer'], folder)
    fields, tensors = custom(cfg, model.state_dict()) if s.as_ == 'custom' else stock(*fold(model), folder)
    begin = stored_begin(state)
    bos = begin[0] if begin else tokenizer.eot
    ends = {'bos_token_id': bos, 'eos_token_id': tokenizer.eot}
    ends |= {'decoder_start_token_id': tokenizer.eot, 'pad_token_id': tokenizer.eot} if cfg.n_encoder_layer else {}
    files = {'config.json': fields | {'vocab_size': cfg.vocab_size, 'dtype': s.dtype} | ends, 'generation_config.json': ends}
    text = ''
    if tokenizer.kind == 'unknown':
        print('no tokenizer is written: that of the data is not known')
    else:
        text = to_json(tokenizer, begin)
        names = {'bos_token': spelling(text, bos), 'eos_token': spelling(text, tokenizer.eot)}
        files['tokenizer_config.json'] = {'tokenizer_class': 'PreTrainedTokenizerFast', **names,
                                          'model_max_length': cfg.block_size, 'clean_up_tokenization_spaces': False}
    with new_folder(s.to) as folder:
        tensors = {name: t.to(getattr(torch, s.dtype)).contiguous() for name, t in tensors.items()}
        write_tensors(os.path.join(folder, 'model.safetensors'), tensors, {'format': 'pt'})
        for name, value in files.items():
            write_json(os.path.join(folder, name), value)
        tokenizer.save(folder)  # the sentencepiece model too, which llama.cpp's converter prefers
        if text:
            with open(os.path.join(folder, 'tokenizer.json'), 'w', encoding='utf-8') as f:
                f.write(text)
        if s.as_ == 'custom':
            write_code(folder, cfg)
    return fields['model_type']


def run_export(s):
    kind = export(s)
    if kind == 'peft':
        return print(f"written: {s.to}; peft.PeftModel.from_pretrained(base, {s.to!r}), or --adapter={s.to} here")
    trust, auto = ', trust_remote_code=True' if kind == 'minnow' else '', 'AutoModelForSeq2SeqLM' if kind == 't5' else 'AutoModelForCausalLM'
    print(f'written: {s.to}, of the family {kind}; transformers.{auto}.from_pretrained({s.to!r}{trust}), or --init_from=hf:{s.to} here')


def main():
    command, s = configure_command({'export': (run_export, ExportSettings)})
    command(s)


if __name__ == '__main__':
    run_main(main)
