"""
What a Hugging Face folder says about its tokens: which one begins a text, which ones end it, and how a
conversation is written. Never guessed from names where a file says it.

    tokenizer_config.json     bos_token, eos_token, add_bos_token, chat_template
    generation_config.json    eos_token_id: a number or a list; generate() of transformers stops at these
    config.json               the same without a generation_config.json; decoder_start_token_id
"""
import os

from configurator import UserError
from features.hf import reading
from features.hf.config_json import read_json
from tokenizer import PromptFormat, Tokenizer, load_tokenizer


def prompt_format(where, cfg, tokenizer):
    """The PromptFormat of hf:FOLDER. Raises UserError for a token that is not in the vocabulary."""
    folder = reading.find(where)
    ends = end_ids(folder, cfg.vocab_size) or ((tokenizer.eot,) if tokenizer.eot is not None else ())
    if cfg.n_encoder_layer:  # the encoder reads up to the end of text
        start, end = (reading.decoder_start(where),), (tokenizer.eot or 0,)
        return PromptFormat(start, suffix=end, ends=ends)
    bos = tokenizer.bos()
    if tokenizer.kind == 'sentencepiece':  # its file does not say whether the token is written
        fields = optional_json(folder, 'tokenizer_config.json')
        bos = bos if fields.get('add_bos_token', True) else ()
    return PromptFormat(bos, ends=ends, chat_template=chat_template(folder), names=token_names(folder))


def inherited(where, cfg):
    """prompt_format() of hf:FOLDER, also of one without a tokenizer."""
    try:
        tokenizer = load_tokenizer(*reading.tokenizer(where))
    except UserError:
        tokenizer = Tokenizer('unknown', cfg.vocab_size, None)
    return prompt_format(where, cfg, tokenizer)


def end_ids(folder, vocab_size=2 ** 31):
    """
    The tokens at which generate() of transformers stops, a tuple; () where no file names one. Raises
    UserError for one beyond vocab_size.
    """
    for file in ('generation_config.json', 'config.json'):
        fields = optional_json(folder, file)
        found = fields.get('eos_token_id')
        if found is None:
            continue
        ids = tuple(found) if isinstance(found, list) else (found,)
        for token in ids:
            if type(token) is not int or not 0 <= token < vocab_size:
                raise UserError(f'{os.path.join(folder, file)}: eos_token_id={found}: '
                                f'takes tokens of the vocabulary of {vocab_size}')
        return ids
    return ()


def end_of_text(folder, vocab):
    """
    The name of the token that ends a document in a folder, {name: id} its vocabulary: tokenizer_config.json's
    eos_token, else the first one at which generate() stops; None where no file says it.
    """
    for file in ('tokenizer_config.json', 'special_tokens_map.json'):
        name = optional_json(folder, file).get('eos_token')
        if isinstance(name, dict):  # an added token with its properties
            name = name.get('content')
        if isinstance(name, str) and name in vocab:
            return name
    names = {token: name for name, token in vocab.items()}
    ids = [token for token in end_ids(folder) if token in names]
    return names[ids[0]] if ids else None


def chat_template(folder):
    """The Jinja template of a conversation; '' where the folder has none."""
    path = os.path.join(folder, 'chat_template.jinja')
    if os.path.isfile(path):
        try:
            with open(path, encoding='utf-8') as f:
                return f.read()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f'{path}: not readable as text in UTF-8: {error}') from None
    found = optional_json(folder, 'tokenizer_config.json').get('chat_template')
    if isinstance(found, list):  # several, by their names
        found = next((entry.get('template') for entry in found
                      if isinstance(entry, dict) and entry.get('name') == 'default'), '')
    return found if isinstance(found, str) else ''


def token_names(folder):
    """((name, text), …) of the special tokens that a folder names: bos_token, eos_token, …"""
    fields = optional_json(folder, 'special_tokens_map.json') | optional_json(folder, 'tokenizer_config.json')
    found = []
    for name in ('bos_token', 'eos_token', 'unk_token', 'sep_token', 'pad_token', 'cls_token', 'mask_token'):
        text = fields.get(name)
        if isinstance(text, dict):  # an added token with its properties
            text = text.get('content')
        if isinstance(text, str):
            found.append((name, text))
    return tuple(found)


def optional_json(folder, file):
    """The object in a JSON file of a folder; {} where there is no such file."""
    path = os.path.join(folder, file)
    return read_json(path) if os.path.isfile(path) else {}
