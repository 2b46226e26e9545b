"""
Write the model of a run as a Hugging Face folder: config.json, model.safetensors and the tokenizer.

    python hub.py export --out_dir=out/run --to=FOLDER                  # as a class of transformers
    python hub.py export --out_dir=out/run --to=FOLDER --as=custom      # any decoder, with its code
    python hub.py export --out_dir=out/lora --to=FOLDER                 # an adapter, for PEFT
"""
import dataclasses
import json
import os

import torch

import checkpoint
from checkpoint import replace_json, write_tensors
from configurator import UserError
from features.folder import new_folder
from features.hf import reading
from features.hf.code import write_code
from features.hf.families import FAMILIES, nearest
from features.hf.folding import fold
from features.hf.names import name_rows
from features.hf.t5s import KINDS
from features.hf.tokenizer_json import adds_space, keeps_text, sentencepiece_of, spelling, to_json
from features.networks import fill, is_foreign
from features.sizes import check_sizes
from features.stored import from_dict
from model import ModelConfig
from sample import stored_format
from tokenizer import load_tokenizer


def run(s):
    """python hub.py export; s: hub.ExportSettings"""
    kind = export(s)
    if kind == 'peft':
        print(f"written: {s.to}; peft.PeftModel.from_pretrained(base, {s.to!r}), or --adapter={s.to} here")
        return
    auto = 'AutoModelForSeq2SeqLM' if kind in KINDS else 'AutoModelForCausalLM'
    trust = ', trust_remote_code=True' if kind == 'minnow' else ''
    print(f'written: {s.to}, of the family {kind}; transformers.{auto}.from_pretrained({s.to!r}{trust}), '
          f'or --init_from=hf:{s.to} here')


def export(s):
    """
    Write the folder s.to, complete or not at all. Returns the model_type, 'peft' for an adapter. Raises
    UserError for a model or a tokenizer that cannot be exported.
    """
    if os.path.exists(s.to):
        raise UserError(f'to={s.to}: already exists: give a new folder')
    folder = checkpoint.find(s.out_dir, 'best')
    state = checkpoint.load_state(folder)
    cfg = from_dict(ModelConfig, state['model'], os.path.join(folder, 'state.json'))
    if 'base' in state:  # lora
        export_adapter(s, folder, state, cfg)  # lora
        return 'peft'  # lora
    refuse_kind(s, folder, cfg)

    # 1) the network, in their names
    model = fill(cfg, check_sizes(cfg, checkpoint.read_weights(folder), folder), folder)
    if s.as_ == 'custom':
        fields, tensors = custom(cfg, model.state_dict())
    else:
        fields, tensors = stock(*fold(model), folder)
    tensors = {name: t.to(getattr(torch, s.dtype)).contiguous() for name, t in tensors.items()}

    # 2) the files beside it
    tokenizer = load_tokenizer(state['tokenizer'], folder)
    form = stored_format(state, tokenizer)
    around = added_tokens(tokenizer, form, cfg)
    ends = end_tokens(tokenizer, form, around, cfg)
    files = {
        'config.json': fields | {'vocab_size': cfg.vocab_size, 'dtype': s.dtype} | ends,
        'generation_config.json': {'pad_token_id': tokenizer.eot} | ends,
    }
    text = ''
    if tokenizer.kind == 'unknown':
        print('no tokenizer is written: that of the data is not known')
    else:
        text = to_json(tokenizer, around)
        files['tokenizer_config.json'] = tokenizer_config(text, ends, tokenizer, form, around, cfg)
        if 'added' in tokenizer.more:  # for whoever reads tokenizer.model
            files['added_tokens.json'] = tokenizer.more['added']

    # 3) to the disk
    with new_folder(s.to) as new:
        write_tensors(os.path.join(new, 'model.safetensors'), tensors, {'format': 'pt'})
        for name, value in files.items():
            replace_json(os.path.join(new, name), value)
        tokenizer.save(new)
        model = os.path.join(new, 'tokenizer.model')
        if text and fields['model_type'] not in KINDS:
            sentencepiece = for_llama_cpp(tokenizer, text, fields['model_type'])
            if sentencepiece is not None:
                with open(model, 'wb') as f:
                    f.write(sentencepiece)
            elif os.path.exists(model):
                os.remove(model)
        if text:
            with open(os.path.join(new, 'tokenizer.json'), 'w', encoding='utf-8') as f:
                f.write(text)
        if form.chat_template:
            with open(os.path.join(new, 'chat_template.jinja'), 'w', encoding='utf-8') as f:
                f.write(form.chat_template)
        if s.as_ == 'custom':
            write_code(new, cfg)
    return fields['model_type']


def refuse_kind(s, folder, cfg):
    """Raise UserError for a model that cannot be exported in any format."""
    if cfg.n_encoder_layer and s.as_ == 'custom':
        raise UserError(f'as=custom: {folder} is an encoder-decoder, which can be exported only as T5: '
                        'leave as=custom out')
    if cfg.arch == 'markov':
        raise UserError(f'{folder}: a Markov chain is not exported')


# -----------------------------------------------------------------------------
# The network

def stock(cfg, weights, where):
    """
    (fields of config.json, {name: tensor}) of the family that a network fits, both after fold(). Raises
    UserError with what stands in the way.
    """
    hint = '' if cfg.n_encoder_layer else ': --as=custom takes any decoder'
    kind, in_the_way = nearest(cfg)
    if in_the_way:
        raise UserError(f'{where}: {", ".join(in_the_way)}: '
                        f'no class of transformers has this (the nearest is {kind})' + hint)
    family = FAMILIES[kind]
    cfg = dataclasses.replace(cfg, bias=cfg.bias or family.biases)
    tensors, used = {}, set()
    for row in name_rows(family, cfg):
        is_head = row.theirs == f'{family.head}.weight'
        name = row.theirs if is_head else family.prefix + row.theirs
        tensors[name] = their_tensor(weights, row)
        used |= row.ours.keys()
    left = sorted(weights.keys() - used)
    if left:
        raise UserError(f'{where}: {left[0]}: the family {kind} has no such tensor' + hint)
    fields = {'architectures': [family.architecture], 'model_type': kind, 'tie_word_embeddings': cfg.tie}
    return fields | family.write(cfg), tensors


def their_tensor(weights, row):
    """The tensor of a names.Row, made from ours; biases that we do not have are zero."""
    if row.expert >= 0:
        name, = row.ours
        return weights[name][row.expert]
    parts = []
    for name, length in row.ours.items():
        if name.endswith('bias') and name not in weights:
            parts.append(torch.zeros(length))
        else:
            parts.append(weights[name])
    return row.to_theirs(parts)


def custom(cfg, weights):
    """(fields of config.json, {name: tensor}) of minnow's own class, which is exported with its code."""
    fields = {
        'architectures': [FAMILIES['minnow'].architecture],
        'model_type': 'minnow',
        'minnow': dataclasses.asdict(cfg),
        'tie_word_embeddings': False,
        'auto_map': {
            'AutoConfig': 'modeling_minnow.MinnowConfig',
            'AutoModelForCausalLM': 'modeling_minnow.MinnowForCausalLM',
        },
    }
    return fields, {f'model.{name}': t for name, t in weights.items()}


def export_adapter(s, folder, state, cfg):
    """
    Write the adapter of a checkpoint for PEFT. Raises UserError for settings that do not apply to an adapter.
    """
    from features.lora import adapters, peft_files
    if s.as_ == 'custom' or s.dtype != 'float32':
        raise UserError(f'as={s.as_}, dtype={s.dtype}: {folder} holds an adapter, '
                        'which is exported to PEFT in float32: leave them out, or surgery.py merge first')
    base = state['base']['from']
    saved = adapters.described(state['lora'], checkpoint.read_weights(folder))
    positions = context_of(base) if 'wpe.lora.A' in saved.tensors else 0
    peft_files.write(s.to, cfg, saved, peft_files.family_of(cfg, base), base.removeprefix('hf:'), positions)


def context_of(base):
    """The context of the model that an adapter was trained beside, which it may have used a part of."""
    if not is_foreign(base):
        return checkpoint.load_state(checkpoint.find(base, 'best'))['model']['block_size']
    config = reading.Config(reading.find(base))
    return reading.read_config(config, reading.family_of(config)).block_size


# -----------------------------------------------------------------------------
# Tokens

def added_tokens(tokenizer, form, cfg):
    """
    (ids before a text, ids after it) of a prompt, or of what an encoder reads. form: the network's
    PromptFormat.
    """
    if cfg.n_encoder_layer:  # t5
        from features.t5.sampling import source_format  # t5
        form = source_format(tokenizer.with_format(form))  # t5
    return (*form.bos, *form.prefix), form.suffix


def end_tokens(tokenizer, form, around, cfg):
    """
    {field of config.json: token} of the beginning and end of a text. form: the network's PromptFormat;
    around: added_tokens().
    """
    last = form.ends or (tokenizer.eot,)
    start = form.bos[0] if form.bos else tokenizer.eot
    ends = {
        'bos_token_id': start,
        'eos_token_id': list(last) if len(last) > 1 else last[0],
    }
    if cfg.n_encoder_layer:
        ends['decoder_start_token_id'] = start
        ends['pad_token_id'] = start
    elif around[0]:
        ends['bos_token_id'] = around[0][0]
    return ends


def tokenizer_config(text, ends, tokenizer, form, around, cfg):
    """
    The content of tokenizer_config.json. text: that of tokenizer.json; form: the network's PromptFormat;
    around: added_tokens().
    """
    end = spelling(text, tokenizer.eot)
    names = {
        'bos_token': spelling(text, ends['bos_token_id']),
        'eos_token': end,
        'pad_token': end,  # or transformers and lm-eval refuse texts of unlike lengths
        'unk_token': end if tokenizer.unk < 0 else spelling(text, tokenizer.unk),  # CTranslate2 needs one
    }
    if form.names:  # the tokens that the chat template names, no others
        names |= {'bos_token': None, **dict(form.names)}
    fields = {
        'tokenizer_class': 'PreTrainedTokenizerFast',
        **names,
        'add_prefix_space': adds_space(text),
        'model_max_length': cfg.block_size,
        'clean_up_tokenization_spaces': False,
    }
    # for programs that do not read them from tokenizer.json, as llama.cpp with a sentencepiece model
    for field, name, added in (('add_bos_token', 'bos_token', around[0]),
                               ('add_eos_token', 'eos_token', around[1])):
        if [spelling(text, token) for token in added] in ([], [names[name]]):
            fields[field] = added != ()
    return fields


def for_llama_cpp(tokenizer, text, kind):
    """
    The content of tokenizer.model, which llama.cpp's converter prefers to tokenizer.json; None where it would
    read it wrongly, and must refuse the tokenizer. text: the content of tokenizer.json; kind: the model_type.
    """
    model = json.loads(text)['model']
    if model['type'] != 'BPE' or not model.get('byte_fallback'):  # it would merge the pieces of Unigram, too
        return None
    if not keeps_text(text):  # it would not change it
        return None
    # the converter reads add_prefix_space for Llama's classes only, and takes one value for others
    blank = {'llama': None, 'mistral': None, 'minnow': None}.get(kind, not kind.startswith('gemma'))
    if blank is not None and blank != adds_space(text):
        return None
    return sentencepiece_of(tokenizer, text)
