"""Hostile files of others: Hugging Face folders, tokenizers, llama2.c, PEFT's adapters, chat templates."""

import hashlib
import json
import os
import struct
from pathlib import Path

import torch
from cases import (
    ESCAPES,
    FEW,
    NEEDLESS,
    OF_HF,
    PAGE,
    SAMPLE,
    SPECIAL,
    TINY,
    Case,
    case,
    documents,
    edit,
    fields,
    fifo,
    folder,
    hole,
    link,
    outside,
    payload,
    put,
)
from cases_checkpoints import SAFETENSORS, tensors, weights
from cases_data import PREPARE
from honest import tokenizer_bin

CASES = []
CONFIG, GENERATION = 'hf/config.json', 'hf/generation_config.json'
SHARDS = ('sample.py', '--init_from=hf:hf_shards', *FEW)
SP = ('sample.py', '--init_from=hf:hf_sp', *FEW)
TUNE = ('train.py', '--init_from=hf:hf', '--dataset=data', '--out_dir=out/new', *TINY[4:])

# -----------------------------------------------------------------------------
# config.json and what is beside it

CASES += documents(CONFIG, 'config.json', OF_HF, names=('config.json', 'hf'))
UNREAD = (
    'an empty object',
    'a field of half a surrogate pair',
    'a field of terminal escapes',
    'a field of 100,000 characters',
)
CASES += documents(GENERATION, 'generation_config.json', OF_HF, accepted=UNREAD, either=NEEDLESS)
for file in ('tokenizer_config.json', 'special_tokens_map.json'):
    CASES += documents(f'hf_sp/{file}', file, SP, accepted=UNREAD, either=NEEDLESS)
CASES += documents(
    'hf_sp/added_tokens.json',
    'added_tokens.json',
    SP,
    accepted=('an empty object', 'it in quotes of Python'),  # it is {}
    either=(*NEEDLESS, 'a field of 100,000 characters'),
    names=('added_tokens.json', 'hf_sp'),
)
CASES += documents('hf_shards/model.safetensors.index.json', 'index.json', SHARDS)
CASES += documents('hf/tokenizer.json', 'tokenizer.json', OF_HF)


def config(name, how, *commands, **more):
    CASES.append(
        case(
            name,
            'config.json',
            CONFIG,
            how,
            *(commands or (OF_HF,)),
            **{'names': ('config.json', 'hf')} | more,
        )
    )


for key, values in {
    'model_type': (None, [], 7, 'evil', '../gpt2', 'llama\0', ESCAPES, 'LLAMA'),
    'num_hidden_layers': (0, -1, 2.0, True, '2', None, 10**7, 10**400, [2]),
    'hidden_size': (0, 33, 10**9, 2**62, float('nan'), 'x'),
    'num_attention_heads': (0, 3, -2, 2**31, 'x'),
    'num_key_value_heads': (0, 3, -1, 'x', 10**9),
    'head_dim': (0, 3, 10**9, -16, 'x'),
    'intermediate_size': (0, 95, 2**40, None),
    'vocab_size': (0, 256, 2**31 - 1, 'x', 1.5, True),
    'max_position_embeddings': (0, -1, 2**62, 'x', None),
    'rms_norm_eps': (-1.0, float('nan'), 'x', 1e400),
    'rope_theta': (0, -1, float('nan'), float('inf'), 'x', []),
    'hidden_act': ('eval', None and 0, [], 7, '__import__'),
    'attention_bias': ('yes', True),
    'mlp_bias': (True,),
    'attention_dropout': (2, 'x', float('nan')),
    'rope_scaling': (
        {'type': 'evil', 'factor': 2},
        {'rope_type': 'linear', 'factor': 0},
        {'rope_type': 'linear', 'factor': float('nan')},
        {'rope_type': 'llama3'},
        {'rope_type': 'yarn', 'factor': 1e308},
        {'rope_type': 'dynamic', 'factor': 2},
        [1],
        'x',
        {'rope_type': ['linear']},
    ),
    'quantization_config': ({'quant_method': 'gptq'},),
    'tie_word_embeddings': (False, 'x', 2),
    'eos_token_id': (-1, 257, 10**400, [-1], 'x', [[1]], True),
    'bos_token_id': (-5, 'x', [1]),
}.items():
    for value in values:
        config(f'{key} = {ascii(value)[:40]}', fields(**{key: value}))
for one in CASES:
    # beside generation_config.json and tokenizer.json, the ids of config.json are not read
    if one.format == 'config.json' and 'token_id =' in one.name:
        one.expected = 'either'
    if any(text in one.name for text in ('attention_dropout', 'hidden_act = None', "'dynamic'")):
        one.expected = 'either'
for key, values in {
    'eos_token_id': (-1, 257, 10**400, [-1], 'x', [[1]], True, [1.5], {}, [None], 10**9)
}.items():
    for value in values:
        CASES.append(
            case(
                f'{key} = {ascii(value)[:40]}',
                'generation_config.json',
                GENERATION,
                fields(**{key: value}),
                OF_HF,
            )
        )


def code_beside(path):
    """Code of a folder's own, as trust_remote_code would run it."""
    fields(
        auto_map={'AutoConfig': 'evil.Config', 'AutoModelForCausalLM': 'evil.Model'}, trust_remote_code=True
    )(path)
    for name in (
        'evil',
        'configuration_minnow',
        'modeling_minnow',
        '__init__',
        'model',
        'tokenizer',
        'sitecustomize',
    ):
        (path.parent / f'{name}.py').write_text("open('executed', 'w')")


config('names code of its own', code_beside, OF_HF, TUNE, expected='accepted')
config(
    'is ours, and names code of its own', lambda path: (code_beside(path), fields(model_type='minnow')(path))
)
config('class names of escapes', fields(architectures=[ESCAPES], _name_or_path=ESCAPES), expected='accepted')

# -----------------------------------------------------------------------------
# Weights

CASES += weights(
    'hf/model.safetensors',
    'model.safetensors (hf)',
    OF_HF,
    names=('hf',),
)


def pickled(path):
    path.unlink()
    (path.parent / 'pytorch_model.bin').write_bytes(payload())
    (path.parent / 'model.pt').write_bytes(payload())


def beside_pickles(path):
    (path.parent / 'pytorch_model.bin').write_bytes(payload())
    (path.parent / 'training_args.bin').write_bytes(payload())


CASES += [
    case(
        'pickles in its place',
        'model.safetensors (hf)',
        'hf/model.safetensors',
        pickled,
        OF_HF,
        names=('pytorch_model.bin', 'model.pt', 'hf'),
    ),
    case(
        'pickles beside it',
        'model.safetensors (hf)',
        'hf/model.safetensors',
        beside_pickles,
        OF_HF,
        TUNE,
        expected='accepted',
    ),
]
INDEX = 'hf_shards/model.safetensors.index.json'


def file_of_first(name):
    def change(value):
        value['weight_map'][min(value['weight_map'])] = name

    return edit(change)


for name, how in {
    'weight_map is a list': fields(weight_map=[]),
    'weight_map is empty': fields(weight_map={}),
    'no weight_map': lambda path: path.write_text('{}'),
    'weight_map is null': fields(weight_map=None),
    'weight_map is a text': fields(weight_map='x'),
}.items():
    CASES.append(case(name, 'index.json', INDEX, how, SHARDS))
for name in (
    '../hf/model.safetensors',
    '/etc/passwd',
    '/dev/zero',
    '',
    '.',
    '..',
    'a\0b',
    'x' * 5000,
    ESCAPES,
    '\ud800',
    7,
    None,
    ['x'],
    'nothing.safetensors',
    'config.json',
    'pipe',
):

    def write(path, name=name):
        os.mkfifo(path.parent / 'pipe')
        file_of_first(name)(path)

    CASES.append(
        case(
            f'names {ascii(name)[:40]}', 'index.json', INDEX, write, SHARDS, names=('index.json', 'hf_shards')
        )
    )
for name, how in {
    'a named pipe': fifo,
    'a link to /dev/zero': link('/dev/zero'),
    'a folder': folder,
    'a login page': PAGE,
    'empty': b'',
    'the other shard': lambda path: path.write_bytes(
        (path.parent / path.name.replace('00001-', '00002-')).read_bytes()
    ),
}.items():
    CASES.append(
        case(
            name,
            'model.safetensors (hf)',
            'hf_shards/model-00001-of-00002.safetensors',
            how,
            SHARDS,
            names=('hf_shards',),
        )
    )

# -----------------------------------------------------------------------------
# tokenizer.json


# what the library makes of these is right or refused: patterns that it matches fast enough, ids out of use
FINE = (
    'BPE with the same id twice',
    'Unigram without an unknown piece',
    'Unigram with empty pieces',
    'a token of id 4,000,000,000',
    'slow pattern',
    'that repeats 10**9 times',
    'post-processor with a token of id',
    'a post-processor of 10**6 tokens',
    'writes 1 MB for a letter',
)


def tokenizer(name, change, *commands, expected='refused', **more):
    """The tokenizer of hf_bpe, read by prepare.py and by sample.py."""
    if any(text in name for text in FINE):
        expected = 'either'
    how = change if callable(change) and getattr(change, 'is_writer', False) else edit(change)
    both = (
        ('prepare.py', 'text/a.txt', '--tokenizer=hf_bpe/tokenizer.json', *PREPARE[3:]),
        ('sample.py', '--init_from=hf:hf_bpe', *FEW),
    )
    CASES.append(
        case(
            name,
            'tokenizer.json',
            'hf_bpe/tokenizer.json',
            how,
            *(commands or both),
            expected=expected,
            names=('tokenizer.json', 'hf_bpe', 'config.json'),
            **more,
        )
    )


def model(**changed):
    return lambda value: value | {'model': value['model'] | changed}


def added(**changed):
    token = {
        'id': 300,
        'content': '<evil>',
        'single_word': False,
        'lstrip': False,
        'rstrip': False,
        'normalized': False,
        'special': True,
    }
    return lambda value: value | {'added_tokens': [*value['added_tokens'], token | changed]}


for name, value in {
    'null': None,
    'a list': [],
    'empty': {},
    'of an unknown type': {'type': 'Evil'},
    'BPE without a vocabulary': {'type': 'BPE'},
    'an empty BPE': {'type': 'BPE', 'vocab': {}, 'merges': []},
    'BPE with a merge of nothing': {'type': 'BPE', 'vocab': {'a': 0, '</s>': 1}, 'merges': [['a', 'b']]},
    'BPE with a merge of one': {'type': 'BPE', 'vocab': {'a': 0, '</s>': 1}, 'merges': [['a']]},
    'BPE with a merge of 3': {'type': 'BPE', 'vocab': {'a': 0, '</s>': 1}, 'merges': ['a b c']},
    'BPE with a merge that gives nothing known': {
        'type': 'BPE',
        'vocab': {'a': 0, 'b': 1, '</s>': 2},
        'merges': [['a', 'b']],
    },
    'BPE with negative ids': {'type': 'BPE', 'vocab': {'a': -1}, 'merges': []},
    'BPE with an id of 2**40': {'type': 'BPE', 'vocab': {'a': 2**40}, 'merges': []},
    'BPE with the same id twice': {'type': 'BPE', 'vocab': {'a': 0, 'b': 0, '</s>': 0}, 'merges': []},
    'BPE with ids that are texts': {'type': 'BPE', 'vocab': {'a': '0'}, 'merges': []},
    'an empty Unigram': {'type': 'Unigram', 'unk_id': 0, 'vocab': []},
    'Unigram with an unknown piece beyond it': {
        'type': 'Unigram',
        'unk_id': 99,
        'vocab': [['a', 0.0], ['</s>', 0.0]],
    },
    'Unigram without an unknown piece': {
        'type': 'Unigram',
        'unk_id': None,
        'vocab': [['a', 0.0], ['</s>', 0.0]],
    },
    'Unigram with empty pieces': {
        'type': 'Unigram',
        'unk_id': 0,
        'vocab': [['', 0.0], ['', 0.0], ['</s>', 0.0]],
    },
    'Unigram with scores of text': {'type': 'Unigram', 'unk_id': 0, 'vocab': [['a', 'x']]},
    'Unigram with a score of 1e999': {'type': 'Unigram', 'unk_id': 0, 'vocab': [['a', 1e308 * 10]]},
    'an empty WordLevel': {'type': 'WordLevel', 'vocab': {}, 'unk_token': '<unk>'},
    'WordLevel without its unknown word': {
        'type': 'WordLevel',
        'vocab': {'x': 0, '</s>': 1},
        'unk_token': '<unk>',
    },
    'an empty WordPiece': {
        'type': 'WordPiece',
        'vocab': {},
        'unk_token': '[UNK]',
        'continuing_subword_prefix': '##',
        'max_input_chars_per_word': 100,
    },
    'WordPiece without its unknown word': {
        'type': 'WordPiece',
        'vocab': {'x': 0, '</s>': 1},
        'unk_token': '[UNK]',
        'continuing_subword_prefix': '##',
        'max_input_chars_per_word': 100,
    },
    'WordPiece of words of 2**64': {
        'type': 'WordPiece',
        'vocab': {'[UNK]': 0},
        'unk_token': '[UNK]',
        'continuing_subword_prefix': '##',
        'max_input_chars_per_word': 2**64,
    },
}.items():
    tokenizer(f'model is {name}', lambda tree, value=value: tree | {'model': value})
tokenizer('a token of id 4,000,000,000', added(id=4_000_000_000))
tokenizer(
    'a vocabulary with an id of 2**32 - 1',
    lambda value: (
        value | {'model': value['model'] | {'vocab': value['model']['vocab'] | {'evil': 2**32 - 1}}}
    ),
)
tokenizer('a token of id -1', added(id=-1))
tokenizer('an added token that is a list', added(content=[]))
tokenizer('an added token of half a surrogate pair', added(content='\ud800'))
tokenizer('added_tokens is an object', lambda value: value | {'added_tokens': {}})
tokenizer('added_tokens of texts', lambda value: value | {'added_tokens': ['x']})
tokenizer('an unknown token that is not there', model(unk_token='evil'), expected='accepted')
tokenizer('a dropout of 5', model(dropout=5.0))
tokenizer('a dropout of NaN', model(dropout=float('nan')))
for key in ('normalizer', 'pre_tokenizer', 'decoder', 'post_processor'):
    for name, value in {
        'unknown': {'type': 'Evil'},
        'a list': [],
        'a text': 'x',
        'a number': 5,
        'empty': {},
        'a sequence of itself': {'type': 'Sequence', 'normalizers': 5},
    }.items():
        tokenizer(f'{key} is {name}', lambda tree, key=key, value=value: tree | {key: value})


def nested(kind, inner, depth):
    for _ in range(depth):
        inner = {'type': 'Sequence', kind: [inner]}
    return inner


def doubling(n):
    step = {'type': 'Replace', 'pattern': {'String': 'a'}, 'content': 'aa'}
    return {'type': 'Sequence', 'normalizers': [step] * n}


EVIL_REGEX = '(a|a?)+(a|a?)+(x+x+)+y'
tokenizer(
    'a normalizer in 400 sequences',
    lambda tree: tree | {'normalizer': nested('normalizers', {'type': 'NFC'}, 400)},
    expected='refused',
)
tokenizer('a normalizer that doubles a letter 40 times', lambda tree: tree | {'normalizer': doubling(40)})
tokenizer(
    'a normalizer that writes 1 MB for a letter',
    lambda tree: (
        tree | {'normalizer': {'type': 'Replace', 'pattern': {'String': 'a'}, 'content': 'b' * 10**6}}
    ),
)
tokenizer(
    'a normalizer of a slow pattern',
    lambda tree: tree | {'normalizer': {'type': 'Replace', 'pattern': {'Regex': EVIL_REGEX}, 'content': ''}},
)
tokenizer(
    'a normalizer of an invalid pattern',
    lambda tree: tree | {'normalizer': {'type': 'Replace', 'pattern': {'Regex': '('}, 'content': ''}},
)
tokenizer(
    'a pre-tokenizer of a slow pattern',
    lambda tree: (
        tree
        | {
            'pre_tokenizer': {
                'type': 'Split',
                'pattern': {'Regex': EVIL_REGEX},
                'behavior': 'Isolated',
                'invert': False,
            }
        }
    ),
)
tokenizer(
    'a pre-tokenizer of an invalid pattern',
    lambda tree: (
        tree
        | {
            'pre_tokenizer': {
                'type': 'Split',
                'pattern': {'Regex': '[z-a]'},
                'behavior': 'Isolated',
                'invert': False,
            }
        }
    ),
)
tokenizer(
    'a pre-tokenizer of a pattern of 1 MB',
    lambda tree: (
        tree
        | {
            'pre_tokenizer': {
                'type': 'Split',
                'pattern': {'Regex': '(' * 500_000 + ')' * 500_000},
                'behavior': 'Isolated',
                'invert': False,
            }
        }
    ),
)
tokenizer(
    'a pre-tokenizer that repeats 10**9 times',
    lambda tree: (
        tree
        | {
            'pre_tokenizer': {
                'type': 'Split',
                'pattern': {'Regex': '((a{1,9999}){1,9999}){1,9999}'},
                'behavior': 'Isolated',
                'invert': False,
            }
        }
    ),
)
tokenizer(
    'a character map that is garbage',
    lambda tree: tree | {'normalizer': {'type': 'Precompiled', 'precompiled_charsmap': 'AAAA'}},
)
tokenizer(
    'a character map of lies',
    lambda tree: tree | {'normalizer': {'type': 'Precompiled', 'precompiled_charsmap': '/////wAAAAD/////'}},
)
tokenizer(
    'padding to 10**9 tokens',
    lambda tree: (
        tree
        | {
            'padding': {
                'strategy': {'Fixed': 10**9},
                'direction': 'Right',
                'pad_to_multiple_of': None,
                'pad_id': 0,
                'pad_type_id': 0,
                'pad_token': 'x',
            }
        }
    ),
    expected='accepted',
)
tokenizer(
    'truncation to nothing',
    lambda tree: (
        tree
        | {'truncation': {'direction': 'Right', 'max_length': 0, 'strategy': 'LongestFirst', 'stride': 5}}
    ),
    expected='accepted',
)
tokenizer(
    'a post-processor with an unknown token',
    lambda tree: (
        tree
        | {
            'post_processor': {
                'type': 'TemplateProcessing',
                'single': [{'SpecialToken': {'id': 'evil', 'type_id': 0}}],
                'pair': [],
                'special_tokens': {},
            }
        }
    ),
)
tokenizer(
    'a post-processor with a token of id 2**32 - 1',
    lambda tree: (
        tree
        | {
            'post_processor': {
                'type': 'TemplateProcessing',
                'single': [
                    {'SpecialToken': {'id': 'x', 'type_id': 0}},
                    {'Sequence': {'id': 'A', 'type_id': 0}},
                ],
                'pair': [],
                'special_tokens': {'x': {'id': 'x', 'ids': [2**32 - 1], 'tokens': ['x']}},
            }
        }
    ),
)
tokenizer(
    'a post-processor of 10**6 tokens',
    lambda tree: (
        tree
        | {
            'post_processor': {
                'type': 'TemplateProcessing',
                'single': [
                    {'SpecialToken': {'id': 'x', 'type_id': 0}},
                    {'Sequence': {'id': 'A', 'type_id': 0}},
                ],
                'pair': [],
                'special_tokens': {'x': {'id': 'x', 'ids': [1] * 10**6, 'tokens': ['x'] * 10**6}},
            }
        }
    ),
)

# -----------------------------------------------------------------------------
# tokenizer.model


def varint(n):
    out = b''
    while n > 127:
        out += bytes([n & 127 | 128])
        n >>= 7
    return out + bytes([n])


def pieces(change):
    """A function that changes the ModelProto in a tokenizer.model."""

    def write(path):
        from sentencepiece import sentencepiece_model_pb2

        proto = sentencepiece_model_pb2.ModelProto()
        proto.ParseFromString(path.read_bytes())
        change(proto)
        path.write_bytes(proto.SerializeToString())

    return write


def each(**changed):
    def change(proto):
        for piece in proto.pieces:
            for key, value in changed.items():
                setattr(piece, key, value)

    return change


def piece_of(n, **changed):
    def change(proto):
        for key, value in changed.items():
            setattr(proto.pieces[n], key, value)

    return change


def trainer(**changed):
    def change(proto):
        for key, value in changed.items():
            setattr(proto.trainer_spec, key, value)

    return change


def normalizer(data):
    def change(proto):
        proto.normalizer_spec.precompiled_charsmap = data

    return change


SENTENCEPIECE = {  # sentencepiece reads some of those that are well-formed
    'empty': (b'', 'refused'),
    'a login page': (PAGE, 'refused'),
    'a pickle': (payload(), 'refused'),
    'NUL bytes': (bytes(1000), 'refused'),
    'a piece of 2**62 bytes': (b'\x0a' + varint(2**62), 'refused'),
    'a piece longer than it': (b'\x0a\x7f' + b'a' * 5, 'refused'),
    'groups in groups': (b'\x0b' * 10**5, 'refused'),
    'a number that does not end': (b'\x08' + b'\xff' * 50, 'refused'),
    'half of it': (lambda path: os.truncate(path, path.stat().st_size // 2), 'refused'),
    'no pieces': (pieces(lambda proto: proto.ClearField('pieces')), 'either'),
    'one piece': (pieces(lambda proto: proto.pieces.__delitem__(slice(1, None))), 'either'),
    'all pieces are equal': (pieces(each(piece='a')), 'either'),
    'all pieces are empty': (pieces(each(piece='')), 'either'),
    'all pieces are unknown': (pieces(each(type=2)), 'either'),
    'all pieces are control': (pieces(each(type=3)), 'either'),
    'all pieces are bytes': (pieces(each(type=6)), 'either'),
    'no unknown piece': (pieces(piece_of(0, type=1)), 'either'),
    'an empty piece': (pieces(piece_of(280, piece='')), 'either'),
    'an empty user-defined piece': (pieces(piece_of(280, piece='', type=4)), 'either'),
    'a piece with NUL': (pieces(piece_of(280, piece='a\0b')), 'either'),
    'scores of NaN': (pieces(each(score=float('nan'))), 'either'),
    'scores of infinity': (pieces(each(score=float('inf'))), 'either'),
    'a piece of 1 MB': (pieces(piece_of(280, piece='x' * 10**6)), 'either'),
    'no end of text': (pieces(trainer(eos_id=-1)), 'either'),
    'an end of text beyond it': (pieces(trainer(eos_id=10**6, eos_piece='evil')), 'either'),
    'a negative unknown piece': (pieces(trainer(unk_id=-7)), 'either'),
    'a vocabulary of 2**31 - 1': (pieces(trainer(vocab_size=2**31 - 1)), 'either'),
    'of words': (pieces(trainer(model_type=3)), 'either'),
    'of characters': (pieces(trainer(model_type=4)), 'either'),
    'of a unigram': (pieces(trainer(model_type=1)), 'either'),
    'a character map of garbage': (pieces(normalizer(b'\xff' * 40)), 'either'),
    'a character map that is too short': (pieces(normalizer(b'\1')), 'either'),
    'a character map longer than it says': (
        pieces(normalizer(struct.pack('<I', 2**31) + bytes(100))),
        'refused',
    ),
    'a character map that points outside': (
        pieces(normalizer(struct.pack('<I', 1024) + b'\xff\xff\xff\x7f' * 256 + b'a\0')),
        'refused',
    ),
    'a character map without an end': (
        pieces(normalizer(struct.pack('<I', 1024) + struct.pack('<I', 0x100) * 256 + b'a' * 100)),
        'refused',
    ),
}
for name, (how, expected) in SENTENCEPIECE.items():
    CASES.append(
        case(
            name,
            'tokenizer.model',
            'data_bpe/tokenizer.model',
            how,
            ('prepare.py', 'text/a.txt', '--tokenizer=data_bpe/tokenizer.model', *PREPARE[3:]),
            expected=expected,
        )
    )
    CASES.append(
        case(
            name,
            'tokenizer.model',
            'hf_sp/tokenizer.model',
            how,
            SP,
            expected=expected,
            names=('tokenizer.model', 'hf_sp', 'config.json'),
        )
    )
for name, how in SPECIAL.items():
    CASES.append(
        case(name, 'tokenizer.model', 'hf_sp/tokenizer.model', how, SP, names=('tokenizer', 'hf_sp'))
    )
    CASES.append(
        case(
            name,
            'tokenizer.model',
            'data_bpe/tokenizer.model',
            how,
            ('prepare.py', 'text/a.txt', '--tokenizer=data_bpe/tokenizer.model', *PREPARE[3:]),
        )
    )
ADDED = {
    'an id of 10**12': {'<evil>': 10**12},
    'an id of 2**31 - 1': {'<evil>': 2**31 - 1},
    'a negative id': {'<evil>': -5},
    'an id that is a text': {'<evil>': '290'},
    'an id that is NaN': {'<evil>': float('nan')},
    'an id of 400 digits': {'<evil>': 10**400},
    'an empty name': {'': 290},
    'an id that is a list': {'<evil>': []},
    'an id that is true': {'<evil>': True},
}
for name, value in ADDED.items():
    CASES.append(
        case(
            name,
            'added_tokens.json',
            'hf_sp/added_tokens.json',
            json.dumps(value).encode(),
            SP,
            names=('hf_sp',),
        )
    )
CASES.append(
    case(
        'a name of half a surrogate pair',
        'added_tokens.json',
        'hf_sp/added_tokens.json',
        b'{"\\ud800": 290}',
        SP,
        names=('hf_sp',),
    )
)
for name, value in {
    'eos_token is a list': {'eos_token': []},
    'eos_token is unknown': {'eos_token': 'evil'},
    'added_tokens_decoder is a list': {'added_tokens_decoder': []},
    'chat_template is a number': {'chat_template': 5},
    'chat_template is a list of numbers': {'chat_template': [5]},
    'tokenizer_class is code': {
        'tokenizer_class': '__import__("os")',
        'auto_map': {'AutoTokenizer': ['evil.T', None]},
    },
    'model_max_length is 1e30': {'model_max_length': int(1e30)},
    'additional_special_tokens are numbers': {'additional_special_tokens': [1, 2]},
}.items():
    CASES.append(
        case(
            name,
            'tokenizer_config.json',
            'hf_sp/tokenizer_config.json',
            fields(**value),
            SP,
            expected='accepted',
        )
    )
for name, value in {
    'an id of 10**12': {'1000000000000': {'content': '<x>'}},
    'an id of 5,000 digits': {'9' * 5000: {'content': '<x>'}},
    'content that is a list': {'290': {'content': [], 'special': True}, '-1': {}},
}.items():
    CASES.append(
        case(
            f'added_tokens_decoder with {name}',
            'tokenizer_config.json',
            'hf_sp/tokenizer_config.json',
            fields(added_tokens_decoder=value),
            SP,
            names=('hf_sp',),
            expected='accepted' if 'list' in name else 'refused',
        )
    )
CASES.append(
    case(
        'extra_ids of 10**9',
        'tokenizer_config.json',
        'hf_sp/tokenizer_config.json',
        fields(tokenizer_class='T5Tokenizer', extra_ids=10**9),
        SP,
        names=('hf_sp',),
        expected='accepted',
    )
)

# -----------------------------------------------------------------------------
# vocab.txt, vocab.json and merges.txt; tokenizer.bin

BERT = ('prepare.py', 'text/a.txt', '--tokenizer=bert/vocab.txt', *PREPARE[3:])
for name, (how, expected) in {
    'empty': (b'', 'refused'),
    'a login page': (PAGE, 'refused'),
    'no [UNK]': (b'[SEP]\na\n', 'refused'),
    'no [SEP]': (b'[UNK]\na\n', 'refused'),
    'a pickle': (payload(), 'refused'),
    'NUL bytes': (bytes(1000), 'refused'),
    'not UTF-8': (b'[UNK]\n[SEP]\n\xff\xfe\n', 'accepted'),
    'each piece twice': (lambda path: path.write_bytes(path.read_bytes() * 2), 'accepted'),
    'line ends of Windows': (
        lambda path: path.write_bytes(path.read_bytes().replace(b'\n', b'\r\n')),
        'accepted',
    ),
    'a piece of 1 MB': (b'[UNK]\n[SEP]\n' + b'x' * 10**6, 'accepted'),
    'UTF-16': ('[UNK]\n[SEP]\n'.encode('utf-16'), 'refused'),
    'empty pieces': (b'[UNK]\n[SEP]\n' + b'\n' * 1000, 'accepted'),
    '300,000 pieces': (b'[UNK]\n[SEP]\n' + b'\n'.join(b'%d' % n for n in range(300_000)), 'accepted'),
    'pieces of escapes': (b'[UNK]\n[SEP]\n' + ESCAPES.encode(), 'accepted'),
}.items():
    CASES.append(case(name, 'vocab.txt', 'bert/vocab.txt', how, BERT, expected=expected))
for name, how in SPECIAL.items():
    CASES.append(case(name, 'vocab.txt', 'bert/vocab.txt', how, BERT))
for name in ('vocab.json', 'merges.txt'):
    CASES.append(
        Case(
            f'bert/{name}: as a tokenizer',
            name,
            lambda box: None,
            [('prepare.py', 'text/a.txt', f'--tokenizer=bert/{name}', *PREPARE[3:])],
            names=(name,),
            like=[BERT],
        )
    )

OF_LLAMA2C = ('sample.py', '--init_from=hf:llama2c', *FEW)
TOK_BIN = ('prepare.py', 'text/a.txt', '--tokenizer=llama2c/tokenizer.bin', *PREPARE[3:])
BYTES_ = [
    (0.0, b'<unk>'),
    (0.0, b'\n<s>\n'),
    (0.0, b'\n</s>\n'),
    *((0.0, b'<0x%02X>' % byte) for byte in range(256)),
]


def a_piece(score, length, data=b''):
    return tokenizer_bin(BYTES_) + struct.pack('<fi', score, length) + data


for name, (how, expected) in {
    'empty': (b'', 'refused'),
    '3 bytes': (b'abc', 'refused'),
    'a login page': (PAGE, 'refused'),
    'a pickle': (payload(), 'refused'),
    'NUL bytes': (bytes(1000), 'refused'),
    'a negative length': (a_piece(0, -8), 'refused'),
    'a length of -2**31': (a_piece(0, -(2**31)), 'refused'),
    'a length of 2**31 - 1': (a_piece(0, 2**31 - 1), 'refused'),
    'a length of 0': (a_piece(0, 0), 'refused'),
    'half of it': (lambda path: os.truncate(path, 1000), 'refused'),
    'bytes after it': (lambda path: path.write_bytes(path.read_bytes() + b'abc'), 'refused'),
    'scores of NaN': (
        tokenizer_bin([(float('nan'), piece) for _, piece in BYTES_] + [(float('nan'), b'a')] * 3),
        'refused',
    ),
    'a piece that is not UTF-8': (a_piece(-1, 2, b'\xff\xfe'), 'accepted'),
    'a piece of 1 MB': (a_piece(-1, 10**6, b'x' * 10**6), 'either'),
    'no bytes': (tokenizer_bin([(0.0, b'<unk>'), (0.0, b'<s>'), (0.0, b'</s>'), (0.0, b'a')]), 'refused'),
    'only bytes': (tokenizer_bin(BYTES_), 'accepted'),
    'pieces of NUL': (a_piece(-1, 3, b'\0\0\0'), 'either'),
}.items():
    CASES.append(case(name, 'tokenizer.bin', 'llama2c/tokenizer.bin', how, TOK_BIN, expected=expected))
for name, how in SPECIAL.items():
    CASES.append(case(name, 'tokenizer.bin', 'llama2c/tokenizer.bin', how, TOK_BIN))
    CASES.append(case(name, 'tokenizer.bin', 'llama2c/tokenizer.bin', how, OF_LLAMA2C, names=('llama2c',)))
    CASES.append(case(name, 'model.bin', 'llama2c/model.bin', how, OF_LLAMA2C, names=('llama2c',)))


def sizes(**changed):
    names = ('dim', 'hidden', 'layers', 'heads', 'kv_heads', 'vocab', 'context')

    def write(path):
        data = path.read_bytes()
        values = dict(zip(names, struct.unpack('<7i', data[:28]))) | changed
        path.write_bytes(struct.pack('<7i', *values.values()) + data[28:])

    return write


for name, how in {
    'empty': b'',
    '28 bytes': bytes(28),
    'a login page': PAGE,
    'a pickle': payload(),
    'a later format': b'24ka' + bytes(300),
    'half of it': lambda path: os.truncate(path, 5000),
    'bytes after it': lambda path: path.write_bytes(path.read_bytes() + bytes(4)),
    'a width of 0': sizes(dim=0),
    'a negative width': sizes(dim=-16),
    'a width of 2**31 - 1': sizes(dim=2**31 - 1),
    'no layers': sizes(layers=0),
    '2**31 - 1 layers': sizes(layers=2**31 - 1),
    'no heads': sizes(heads=0),
    '3 heads': sizes(heads=3),
    'no keys': sizes(kv_heads=0),
    'more keys than heads': sizes(kv_heads=4),
    'no vocabulary': sizes(vocab=0),
    'a vocabulary of -2**31': sizes(vocab=-(2**31)),
    'a head of its own that is not there': sizes(vocab=-300),
    'no context': sizes(context=0),
    'a context of 2**31 - 1': sizes(context=2**31 - 1),
    'numbers of NaN': lambda path: path.write_bytes(
        path.read_bytes()[:28] + b'\xff' * (path.stat().st_size - 28)
    ),
    'two of them': lambda path: (path.parent / 'model2.bin').write_bytes(path.read_bytes()),
}.items():
    CASES.append(case(name, 'model.bin', 'llama2c/model.bin', how, OF_LLAMA2C, names=('llama2c', 'weights')))

# -----------------------------------------------------------------------------
# Adapters

OF_PEFT = (*SAMPLE, '--adapter=peft')
ADAPTER = 'peft/adapter_config.json'
CASES += documents(
    ADAPTER,
    'adapter_config.json',
    OF_PEFT,
    names=('adapter', 'peft'),
)
SLOW = '((\\w+|\\.)*)*x'
for key, values in {
    'peft_type': ('IA3', None, [], 7, ESCAPES),
    'r': (0, -1, 10**9, '2', True, float('nan'), [], 10**400, 3, 2.0),
    'lora_alpha': ('x', float('nan'), float('inf'), True, []),
    'target_modules': (
        SLOW,
        '(',
        '(' * 10**5,
        [],
        [1],
        None,
        'evil',
        ['evil'],
        {'a': 1},
        '(?P<a>' * 200 + ')' * 200,
        '(a{1,9999}){1,9999}',
        '.*' * 30 + 'x',
    ),
    'exclude_modules': (SLOW, ['q_proj'], 5),
    'rank_pattern': (
        {SLOW: 2},
        {'(': 2},
        {'q_proj': -1},
        {'q_proj': 10**12},
        {'q_proj': 'x'},
        [],
        {'q_proj': float('nan')},
    ),
    'alpha_pattern': ({SLOW: 2}, {'q_proj': 'x'}, {'q_proj': float('nan')}, [1]),
    'modules_to_save': (['../x'], ['lm_head'], 'x', [7], [ESCAPES]),
    'layers_to_transform': ([10**9], [-1], 'x', [True], 10**400, [0]),
    'layers_pattern': (SLOW, [SLOW], 7),
    'use_dora': ('x', True, 1),
    'use_rslora': ('x', None and 0),
    'init_lora_weights': ('pissa', 'evil', 'loftq', 7),
    'trainable_token_indices': ([10**9], {'x': [1]}, [-1], 'x', {'embed_tokens': 'x'}),
    'lora_bias': (True,),
    'alora_invocation_tokens': ([1],),
    'target_parameters': (['x'],),
    'evil': ('x', 1),
    ESCAPES: (1,),
}.items():
    for value in values:
        if key == 'alpha_pattern' and value == {SLOW: 2} or key == 'use_rslora' and value is None:
            continue
        CASES.append(
            case(
                f'{ascii(key)} = {ascii(value)[:40]}',
                'adapter_config.json',
                ADAPTER,
                fields(**{key: value}),
                OF_PEFT,
                # a slow pattern is matched in bounded time
                expected='either' if SLOW in str(value).replace('\\\\', '\\') else 'refused',
                names=('adapter_config.json', 'peft'),
            )
        )
for key, values in {
    'base_model_name_or_path': (
        '/etc/passwd',
        'https://evil.example/x',
        '../../x',
        ESCAPES,
        7,
        None,
        'x' * 5000,
    ),
    'auto_mapping': ({'base_model_class': 'os.system'},),
    'revision': ('--upload-pack=touch executed',),
    'megatron_core': ('evil',),
    'loftq_config': ({'a': [1]},),
    'runtime_config': ({'a': 1},),
    'task_type': (7, 'EVIL'),
    'inference_mode': ('x',),
    'bias': ('none',),
    'lora_dropout': (0.5,),
    'alpha_pattern': ({'evil': 3},),
}.items():
    for value in values:
        CASES.append(
            case(
                f'{key} = {ascii(value)[:40]}',
                'adapter_config.json',
                ADAPTER,
                fields(**{key: value}),
                OF_PEFT,
                expected='accepted',
            )
        )
CASES += weights(
    'peft/adapter_model.safetensors', 'adapter_model.safetensors', OF_PEFT, names=('peft', 'adapter')
)
CASES.append(
    case(
        'a pickle in its place',
        'adapter_model.bin',
        'peft/adapter_model.safetensors',
        lambda path: (path.unlink(), (path.parent / 'adapter_model.bin').write_bytes(payload())),
        OF_PEFT,
        names=('adapter_model', 'peft'),
    )
)
CASES.append(
    case(
        'a pickle beside it',
        'adapter_model.bin',
        'peft/adapter_model.bin',
        payload(),
        OF_PEFT,
        expected='accepted',
    )
)
for name, change in {
    'A without B': lambda found: {n: t for n, t in found.items() if 'lora_B' not in n or 'layers.0' in n},
    'ranks that differ': lambda found: found | {min(found): torch.zeros(7, 32)},
    'other names': lambda found: {'evil.' + n: t for n, t in found.items()},
    'names without a prefix': lambda found: {
        n.removeprefix('base_model.model.'): t for n, t in found.items()
    },
    'a layer too many': lambda found: (
        found | {min(found).replace('layers.0', 'layers.99'): found[min(found)]}
    ),
    'names of paths': lambda found: found | {'../../x.lora_A.weight': torch.zeros(2, 32)},
}.items():
    CASES.append(
        case(
            name,
            'adapter_model.safetensors',
            'peft/adapter_model.safetensors',
            tensors(change),
            OF_PEFT,
            expected='either' if name == 'names without a prefix' else 'refused',
            names=('peft',),
        )
    )
for command in (
    ('surgery.py', 'merge', '--from=run', '--adapter=peft', '--out_dir=out/new'),
    ('eval.py', 'text', 'text/prompt.txt', '--out_dir=run', '--adapter=peft', '--device=cpu'),
):
    for name in ('NaN', 'a login page', 'a named pipe', 'a shape of 2**64 numbers'):
        CASES.append(
            case(
                f'{name}, for {command[0]}',
                'adapter_model.safetensors',
                'peft/adapter_model.safetensors',
                SAFETENSORS[name],
                command,
                names=('peft', 'out/new', 'adapter', 'weights', 'finite'),
            )
        )

# -----------------------------------------------------------------------------
# Chat templates

TEMPLATE = 'hf/chat_template.jinja'
WITH_TEMPLATE = ('prepare.py', 'text/chats.jsonl', '--messages', '--tokenizer=hf:hf', *PREPARE[3:])
GOOD = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}{% endfor %}"
    '{% if add_generation_prompt %}assistant: {% endif %}'
)
GLOBALS = "{{ cycler.__init__.__globals__.os.popen('touch executed').read() }}"
TEMPLATES = {
    'reaches for os by cycler': GLOBALS,
    'reaches for os by a class': "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    'reaches by attr': "{{ ''|attr('__class__') }}",
    'reaches by format': "{{ '{0.__class__}'.format(messages) }}",
    'reaches by map': "{{ messages|map(attribute='__class__')|list }}",
    'reaches by raise_exception': "{{ raise_exception.__globals__['os'].system('touch executed') }}",
    'reaches by strftime_now': '{{ strftime_now.__globals__ }}',
    'reaches by self': '{{ self._TemplateReference__context }}',
    'changes messages': '{{ messages.append(5) }}',
    'a long loop': '{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}',
    'a range of 10**9': '{% for i in range(10**9) %}x{% endfor %}',
    '10 GB of a letter': "{{ 'a' * 10**10 }}",
    '10 GB of a letter in %': "{{ '%10000000000d' % 1 }}",
    '10 GB of a letter in format': "{{ '{:>10000000000}'.format(1) }}",
    'a number of 10**9 digits': '{{ 10**10**9 }}',
    '10 GB by center': "{{ 'a'.center(10**10) }}",
    '10 GB by filter': "{{ 'a'|center(10**10) }}",
    '10 GB by indent': "{{ ('a\\n' * 10)|indent(10**9) }}",
    '10 GB by lists': '{{ ([0] * 10**9)|length }}',
    'words by the million': '{{ lipsum(n=10**6) }}',
    'calls itself': '{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}',
    'doubles 40 times': "{% set ns = namespace(x='aaaaaaaa') %}"
    '{% for i in range(40) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}',
    'includes': "{% include '/etc/passwd' %}",
    'imports': "{% import 'os' as os %}",
    'extends': "{% extends '/etc/passwd' %}",
    'a slow pattern': "{{ messages|select('match', '(a+)+$')|list }}",
    'an open tag': '{% for',
    'an unknown tag': '{% evil %}',
    'an unknown filter': '{{ 1|evil }}',
    'an unknown name': '{{ evil.x }}',
    'divides by 0': '{{ 1/0 }}',
    'an index': '{{ messages[10**9].x }}',
    'refuses with escapes': "{{ raise_exception('\x1b]52;c;ZXZpbA==\x07') }}",
    '1,000 open brackets': '{{ ' + '(' * 1000 + '1' + ')' * 1000 + ' }}',
    '100,000 open brackets': '{{ ' + '(' * 10**5 + '1' + ')' * 10**5 + ' }}',
    '3,000 loops': '{% for i in messages %}' * 3000 + '{% endfor %}' * 3000,
    'a sum of 100,000': '{{ ' + '+'.join(['1'] * 10**5) + ' }}',
    'nothing': '',
    'only blanks': '   \n',
    'a login page': PAGE.decode(),
    'text without turns': 'hello',
    'half a surrogate pair': "{{ '\\ud800' }}",
    'NUL bytes': '\0' * 100,
    'tojson with an indent of 10**9': '{{ messages|tojson(indent=10**9) }}',
    'a date of 1 MB': "{{ strftime_now('%Y' * 10**6) }}",
    'sorts by a class': "{{ messages|sort(attribute='__class__') }}",
    'attributes 1,000 deep': '{{ messages' + '.x' * 1000 + ' }}',
}
for name, text in TEMPLATES.items():
    # Jinja writes nothing for what its sandbox hides; documents without text are no data set
    texts = ('nothing', 'only blanks', 'a login page', 'text without turns', 'NUL bytes', 'a date of 1 MB')
    is_hidden = name.startswith('reaches by') or name == 'a number of 10**9 digits'
    CASES.append(
        case(
            name,
            'chat template',
            TEMPLATE,
            text.encode(),
            WITH_TEMPLATE,
            names=('template', 'val_fraction'),
            expected='either' if name in texts or is_hidden else 'refused',
            like=[WITH_TEMPLATE],
        )
    )
for name, how in SPECIAL.items():
    CASES.append(
        case(
            name,
            'chat template',
            TEMPLATE,
            how,
            WITH_TEMPLATE,
            expected='either' if name in NEEDLESS else 'refused',
            names=('template', 'hf', 'val_fraction'),
            like=[WITH_TEMPLATE],
        )
    )
for name, how in {
    'not UTF-8': b'\xff' * 100,
    'UTF-16': GOOD.encode('utf-16'),
    '20 MB': GOOD.encode() + b' ' * 20_000_000,
}.items():
    CASES.append(
        case(
            name,
            'chat template',
            TEMPLATE,
            how,
            WITH_TEMPLATE,
            names=('template',),
            expected='either' if name == '20 MB' else 'refused',
            like=[WITH_TEMPLATE],
        )
    )
for name in (
    'reaches for os by cycler',
    '10 GB of a letter',
    'a long loop',
    'an open tag',
    'refuses with escapes',
):
    # beside a conversation, a template that fails is said for each message, and the program goes on
    def write(box, text=TEMPLATES[name]):
        put(Path(box, TEMPLATE), text.encode())

    CASES.append(
        Case(
            f'{TEMPLATE}: {name}, for sample.py',
            'chat template',
            write,
            [(*OF_HF[:2], '--chat', '--max_new_tokens=2', '--device=cpu')],
            'accepted',
            typed='hello\n',
        )
    )
    CASES.append(
        case(
            f'{name}, in tokenizer_config.json',
            'chat template',
            'hf/tokenizer_config.json',
            fields(chat_template=TEMPLATES[name]),
            WITH_TEMPLATE,
            names=('template',),
        )
    )

# -----------------------------------------------------------------------------
# tiktoken's cache, whose files have fixed hashes


def cached(how):
    def write(box):
        where = Path(box, 'home/cache')
        where.mkdir(parents=True)
        for url in (
            'https://openaipublic.blob.core.windows.net/encodings/cl100k_base.tiktoken',
            'https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe',
            'https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/encoder.json',
        ):
            put(where / hashlib.sha1(url.encode()).hexdigest(), how)

    return write


for kind in ('gpt2', 'cl100k_base'):
    for name, how in {
        'a login page': PAGE,
        'empty': b'',
        'a pickle': payload(),
        'a pipe': fifo,
        'a folder': folder,
        'a link to /dev/zero': link('/dev/zero'),
        '4 GB of nothing': hole,
    }.items():
        CASES.append(
            Case(
                f'TIKTOKEN_CACHE_DIR: {name}, for {kind}',
                'tiktoken',
                cached(how),
                [('prepare.py', 'text/a.txt', f'--tokenizer={kind}', *PREPARE[3:])],
                names=(kind, 'home/cache'),
                like=[PREPARE],
                own=('home/cache',),
                environment={'TIKTOKEN_CACHE_DIR': 'home/cache'},
            )
        )
CASES.append(
    case("a link to a user's file", 'model.safetensors (hf)', 'hf/config.json', outside, OF_HF, names=('hf',))
)
