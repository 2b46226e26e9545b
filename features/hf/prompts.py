"""
The special tokens of a Hugging Face folder: which one begins a text, which ones end it, and the template of a
conversation. No name is guessed if a file has it.

    tokenizer_config.json     bos_token, eos_token, add_bos_token, added_tokens_decoder, chat_template
    added_tokens.json         {name: id} of the tokens beside a sentencepiece file
    generation_config.json    eos_token_id: a number or a list; generate() of transformers stops at these
    config.json               the same without a generation_config.json; decoder_start_token_id
"""
import os

from checkpoint import open_regular
from configurator import UserError
from features.foreign_json import read_foreign
from features.hf import llama2c, reading
from features.hf.config_json import config_fields
from features.hf.t5s import KINDS
from tokenizer import PromptFormat, Tokenizer, load_tokenizer


def prompt_format(where, cfg, tokenizer):
    """The PromptFormat of hf:FOLDER. Raises UserError for a token that is not in the vocabulary."""
    folder = reading.find(where)
    ends = end_ids(folder, cfg.vocab_size) or ((tokenizer.eot,) if tokenizer.eot is not None else ())
    if cfg.n_encoder_layer:  # the encoder reads up to the end of text
        start, end = (reading.decoder_start(where),), (tokenizer.eot or 0,)
        return PromptFormat(start, suffix=end, ends=ends)
    bos = tokenizer.bos()
    if tokenizer.kind in ('sentencepiece', 'llama2.c'):  # its file does not say whether the token is written
        bos = bos_beside(folder, tokenizer)
    return PromptFormat(bos, ends=ends, chat_template=chat_template(folder), names=token_names(folder))


def bos_beside(folder, tokenizer):
    """(id,) of the token that begins a text in a folder with a sentencepiece file; () if there is none."""
    fields = optional_json(folder, 'tokenizer_config.json')
    name = text_of(fields.get('bos_token'))
    is_without = 'bos_token' in fields and name is None
    if is_without or not fields.get('add_bos_token', True):
        return ()
    named = tokenizer.special_tokens().get(name)
    return tokenizer.bos() if named is None else (named,)


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
        if file == 'config.json' and llama2c.model_file(folder):
            fields = config_fields(folder)
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
    name = named_end(folder, vocab)
    if name is not None:
        return name
    vocab = in_network(folder, vocab)
    names = {token: name for name, token in vocab.items()}
    ids = [token for token in end_ids(folder) if token in names]
    return names[ids[0]] if ids else None


def named_end(folder, vocab):
    """The eos_token of tokenizer_config.json, if it is in the vocabulary of the network; else None."""
    vocab = in_network(folder, vocab)
    for file in ('tokenizer_config.json', 'special_tokens_map.json'):
        name = text_of(optional_json(folder, file).get('eos_token'))
        if name in vocab:
            return name
    return None


def size_in_network(tokenizer, path):
    """
    The size of the vocabulary of a tokenizer, a file at `path`, without special tokens at its end that the
    network in the same folder has no rows for, as [PAD]: text has none of them.
    """
    size = optional_json(os.path.dirname(path), 'config.json').get('vocab_size')
    if type(size) is int and tokenizer.ordinary_size() <= size < tokenizer.vocab_size:
        return size
    return tokenizer.vocab_size


def in_network(folder, vocab):
    """
    {name: id} of the tokens that the network in a folder has. Tokens that were added to its tokenizer alone
    have no row in the embedding.
    """
    size = optional_json(folder, 'config.json').get('vocab_size')
    if type(size) is not int:
        return vocab
    return {name: token for name, token in vocab.items() if token < size}


def text_of(token):
    """The text of a special token as a JSON file has it; None for none."""
    if isinstance(token, dict):  # an added token with its properties
        token = token.get('content')
    return token if isinstance(token, str) else None


def chat_template(folder):
    """The Jinja template of a conversation; '' where the folder has none."""
    path = os.path.join(folder, 'chat_template.jinja')
    if os.path.lexists(path):
        with open_regular(path) as f:
            data = f.read(2 ** 20 + 1)
        try:
            if len(data) <= 2 ** 20:
                return data.decode()
            raise ValueError('it has more than 1,048,576 bytes')
        except ValueError as error:
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
    for name in NAMED:
        text = text_of(fields.get(name))
        if text is not None:
            found.append((name, text))
    return tuple(found)


# -----------------------------------------------------------------------------
# Beside a sentencepiece file

NAMED = ('bos_token', 'eos_token', 'unk_token', 'sep_token', 'pad_token', 'cls_token', 'mask_token')


def tokens_beside(path, data):
    """
    What the files beside a sentencepiece file, with these bytes, say about its tokens: fields of a
    description, as tokenizers.Added has them; {} for nothing. Raises UserError for an invalid number of a
    token.
    """
    folder = os.path.dirname(path)
    files = ('tokenizer_config.json', 'special_tokens_map.json', 'added_tokens.json', 'config.json')
    if not any(os.path.isfile(os.path.join(folder, file)) for file in files):
        return {}
    import sentencepiece
    try:
        sp = sentencepiece.SentencePieceProcessor(model_proto=data or b'?')
    except RuntimeError:
        return {}  # the tokenizer refuses the file
    own = {sp.id_to_piece(i): i for i in range(sp.vocab_size())}
    found, special = added_tokens(folder, sp.vocab_size())
    added = {name: i for name, i in found.items() if own.get(name) != i or needs_name(sp, i, name, special)}
    name = named_end(folder, own | added)
    end = sp.eos_id() if name is None else (own | added)[name]
    if end < 0:
        end = next(iter(end_ids(folder, len(own))), -1)
    out = {'eot': end} if end >= 0 else {}
    if added:
        out |= {'added': added, 'special': sorted(special & added.keys())}
    return out


def needs_name(sp, i, name, special):
    """Whether only its name makes a piece of a sentencepiece file a special token."""
    return name in special and not sp.is_control(i) and not sp.is_unknown(i)


def added_tokens(folder, size):
    """
    ({name: id} of the tokens that the files in a folder name, {names of special ones}); size: tokens of the
    sentencepiece file.
    """
    fields = optional_json(folder, 'tokenizer_config.json')
    more = optional_json(folder, 'special_tokens_map.json') | fields
    found = dict(optional_json(folder, 'added_tokens.json'))
    special = {text for _, text in token_names(folder)}
    for key in ('additional_special_tokens', 'extra_special_tokens'):
        listed = more.get(key)
        special |= {text_of(token) for token in listed} if isinstance(listed, list) else set()
    decoder = fields.get('added_tokens_decoder')
    for number, token in (decoder.items() if isinstance(decoder, dict) else ()):
        name = text_of(token)
        if name and str(number).isdecimal():
            found[name] = int(number[:19])  # Python reads no more than 4,300 digits
            if isinstance(token, dict) and token.get('special'):
                special.add(name)
    sentinels = count_sentinels(folder, fields)
    for n in range(sentinels):
        name = f'<extra_id_{n}>'
        found.setdefault(name, size + sentinels - 1 - n)
        special.add(name)
    for name, i in found.items():
        if not name or type(i) is not int or not 0 <= i < 2 ** 31:
            raise UserError(f'{folder}: added token {name!r} has the number {i!r}: takes a whole number')
    return found, special


def count_sentinels(folder, fields):
    """How many sentinels T5's code adds; fields: those of tokenizer_config.json."""
    is_t5 = optional_json(folder, 'config.json').get('model_type') in KINDS
    if not is_t5 and not str(fields.get('tokenizer_class')).startswith(('T5', 'MT5')):
        return 0
    count = fields.get('extra_ids', 100)
    return count if type(count) is int and 0 <= count < 10 ** 5 else 0


def optional_json(folder, file):
    """The object in a JSON file of a folder; {} where there is no such file."""
    path = os.path.join(folder, file)
    return read_foreign(path) if os.path.isfile(path) else {}
