"""
Files made to hang, to fill the memory or to raise what no reader expects: regular expressions, tokenizers,
chat templates, adapters, networks. Each is one line that names the file.
"""
import json
import os
import random
import re
import resource
import time

import pytest

from configurator import UserError
from features import build
from features.chat.template import render
from features.hf.tokenizer_json import JsonTokenizer
from features.lora.patterns import Patterns
from features.networks import fill
from features.sizes import check_memory, check_sizes
from model import ModelConfig, make_model


def refused(function, *args, names='', **options):
    """The error of a call that must be refused, in one short line, within ten seconds."""
    begun = time.monotonic()
    with pytest.raises(UserError) as error:
        function(*args, **options)
    line = str(error.value)
    assert '\n' not in line and len(line) < 800 and names in line, line[:1000]
    assert time.monotonic() - begun < 10
    return line


# -----------------------------------------------------------------------------
# Patterns of PEFT

MODULES = ['model.layers.11.self_attn.q_proj', 'layers.0.mlp.up_proj', 'lm_head', 'h.3.attn.c_attn', '',
           'ab.ab', 'encoder.block.0.layer.0.SelfAttention.q', 'aaab']
USUAL = [r'.*\.(q|v)_proj', r'(.*\.)?layers\.(\d|1[0-5])\..*\.(q_proj|v_proj)', r'^(?!.*mlp).*_proj$',
         r'(?:.*?(?:lang|layers).*?(?:attn|mlp).*?(?:q_proj|up_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.x)',
         r'[^.]*', r'(a|aa)*b', r'a{2,3}b', r'\bab\b.*', r'.*\Bb', r'(?=.*d)l.*', r'[^a-g]+.*', r'\A.*\Z',
         'q.proj', r'x??.?y?', r'lm_head']


def same_as_re(pattern, name):
    ours = Patterns('adapter_config.json')[pattern]
    assert ours.matches(name) == (re.fullmatch(pattern, name) is not None), (pattern, name)
    assert ours.matches_end(name) == (re.match(rf'(.*\.)?({pattern})$', name) is not None), (pattern, name)


@pytest.mark.parametrize('pattern', USUAL)
def test_usual_patterns_match_as_in_re(pattern):
    for name in MODULES:
        same_as_re(pattern, name)


def any_pattern(draw, depth=0):
    kind = draw.randrange(9 if depth < 3 else 4)
    inner = [any_pattern(draw, depth + 1) for _ in range(2)] if kind > 3 else ['', '']
    return [draw.choice('ab'), draw.choice('abc'),
            draw.choice([r'\.', r'\w', '[ab]', '[^a]', r'\b', '^', '$', '.']),
            'a', inner[0] + inner[1], f'({inner[0]}|{inner[1]})',
            f'(?:{inner[0]})' + draw.choice(['*', '+', '?', '*?', '+?', '{1,2}', '{2}', '{0,3}?']),
            f'(?={inner[0]})', f'(?!{inner[0]}){inner[1]}'][kind]


def test_any_pattern_matches_as_in_re():
    draw = random.Random(1)
    for _ in range(1500):
        same_as_re(any_pattern(draw), ''.join(draw.choice('ab.') for _ in range(draw.randrange(7))))


SLOW = ['(a+)+$', '(a|aa)+b', '(.*)*b', '(?:a?){40}a{40}b', '(?=(\\w+)*!)x', '.*(.*a){25}!', '((\\w*)*)*!',
        '(?:(?:a{1000}){1000}){1000}', '.{1000000000}', '(?:(?=.*)' * 30 + '.' + ')*' * 30]
NOT_SUPPORTED = ['(', 'a**', '(\\w+)*\\1b', '(?>(\\w+)*)!', '(?i)(\\w+)+', '(?<=a)b', 'a{1,99999999999}',
                 '(' * 3000 + 'a' + ')' * 3000, 'a' * 6000 + '*']


@pytest.mark.parametrize('pattern', SLOW + NOT_SUPPORTED, ids=lambda pattern: pattern[:20])
def test_no_pattern_hangs(pattern):
    begun = time.monotonic()
    patterns = Patterns('adapter_config.json')
    name = 'model.layers.0.self_attn.q_proj' + 'a' * 40
    try:
        for n in range(20):
            assert not patterns[pattern].matches(f'{name}{n}')
        assert pattern in SLOW
    except UserError as error:
        assert str(error).startswith('adapter_config.json: ') and len(str(error)) < 400
        assert pattern not in SLOW[:-1]
    assert time.monotonic() - begun < 10


# -----------------------------------------------------------------------------
# tokenizer.json

def tokenizer_json(**parts):
    vocab = {chr(97 + n): n for n in range(26)} | {'</s>': 26, '<unk>': 27}
    end = {'id': 26, 'content': '</s>', 'single_word': False, 'lstrip': False, 'rstrip': False,
           'normalized': False, 'special': True}
    model = {'type': 'BPE', 'unk_token': '<unk>', 'vocab': vocab, 'merges': []} | parts.pop('model', {})
    fields = {'version': '1.0', 'truncation': None, 'padding': None, 'added_tokens': [end],
              'normalizer': None, 'pre_tokenizer': None, 'post_processor': None, 'decoder': None,
              'model': model}
    return json.dumps(fields | parts).encode()


def doubled(kind, count=30):
    step = {'type': 'Replace', 'pattern': {'String': 'a'}, 'content': 'aa'}
    return {'type': 'Sequence', kind: [step] * count}


def split_by(pattern):
    return {'type': 'Split', 'pattern': {'Regex': pattern}, 'behavior': 'Isolated', 'invert': False}


def template(single, special_tokens):
    return {'type': 'TemplateProcessing', 'single': single, 'pair': [], 'special_tokens': special_tokens}


BEGIN = {'SpecialToken': {'id': 'X', 'type_id': 0}}
TEXT = {'Sequence': {'id': 'A', 'type_id': 0}}
BAD_TOKENIZERS = {
    'doubles 30 times': dict(normalizer=doubled('normalizers')),
    'doubles while decoding': dict(decoder=doubled('decoders')),
    'a token of number 2**32 - 1': dict(model={'vocab': {'a': 2 ** 32 - 1}}),
    'no tokens': dict(model={'vocab': {}}, added_tokens=[]),
    'unknown token that is not there': dict(model={'unk_token': 'nope'}),
    'unknown token of a million letters': dict(model={'unk_token': 'x' * 10 ** 6}),
    'prefix longer than the pieces': dict(model={'continuing_subword_prefix': '日本日本',
                                                 'merges': [['a', 'b']]}),
    'catastrophic split': dict(pre_tokenizer=split_by('(a+)+$')),
    'broken split': dict(pre_tokenizer=split_by('(')),
    'chunks of nothing': dict(pre_tokenizer={'type': 'FixedLength', 'length': 0}),
    'damaged characters': dict(normalizer={'type': 'Precompiled', 'precompiled_charsmap': 'AAAA'}),
    'trie of nothing': dict(normalizer={'type': 'Precompiled', 'precompiled_charsmap': 'EAAAAP//////////////'
                                        '/////2FiYwA='}),
    'unknown special token': dict(post_processor=template([BEGIN, TEXT], {})),
    '25 million special tokens': dict(post_processor=template([BEGIN] * 5000 + [TEXT], {
        'X': {'id': 'X', 'ids': [5] * 5000, 'tokens': ['a'] * 5000}})),
    'strips beyond the end': dict(decoder={'type': 'Strip', 'content': 'a', 'start': 10 ** 9,
                                           'stop': 10 ** 9}),
    'a list': [],
}


@pytest.mark.parametrize('parts', BAD_TOKENIZERS.values(), ids=BAD_TOKENIZERS.keys())
def test_bad_tokenizer_json_is_one_line(parts, capfd):
    """The tokenizers library panics, which is no Exception, and prints that to stderr."""
    def use():
        tokenizer = JsonTokenizer('tokenizers', data, 'folder/tokenizer.json')
        for text in ('a', 'hello b', 'a' * 40 + '!', 'ab' * 1000, '日本'):
            tokenizer.decode(tokenizer.encode(text)[:20])
            tokenizer.encode_special(text)
        tokenizer.bos()
        tokenizer.pieces()
    data = b'[]' if parts == [] else tokenizer_json(**parts)
    refused(use, names='folder/tokenizer.json')
    assert capfd.readouterr().err == ''


def test_our_own_bug_shows_its_traceback():
    tokenizer = JsonTokenizer('tokenizers', tokenizer_json(), 'folder/tokenizer.json')
    with pytest.raises(TypeError):
        tokenizer.decode(None)


# -----------------------------------------------------------------------------
# Chat templates

TEMPLATES = {
    'a long loop': '{% for i in range(10**9) %}x{% endfor %}',
    'loops in loops': '{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}',
    'a long text': "{{ 'a' * 10**10 }}",
    'a text that doubles': "{% set n=namespace(x='a') %}{% for i in range(60) %}{% set n.x=n.x~n.x %}"
                           '{% endfor %}',
    'a wide number': "{{ '%1000000000d' % 1 }}",
    'a wide filter': "{{ 'x'|indent(10**9) }}",
    'a long list': '{{ (range(99999)|list)*10**6 }}',
    'recursion': '{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}',
    'depth': '{{ ' + '(' * 5000 + '1' + ')' * 5000 + ' }}',
    'blocks in blocks': '{% if 1 %}' * 3000 + '{% endif %}' * 3000,
    'loops 30 deep': '{% for i in [1] %}' * 30 + 'x' + '{% endfor %}' * 30,
    'classes': "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    'a module': "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    'a file': "{% include '/etc/passwd' %}",
    'an import': "{% import 'os' as o %}",
    'a change': '{{ messages.append(1) }}',
    'a megabyte': 'a' * (2 ** 20 + 1),
    'half a character': "{{ '\\ud800' }}",
    'no time': "{{ strftime_now('%Y' * 10**7) }}",
    'zero': '{{ 1 / 0 }}',
}


@pytest.mark.parametrize('template', TEMPLATES.values(), ids=TEMPLATES.keys())
def test_no_template_takes_the_machine(template):
    messages = [{'role': 'user', 'content': 'hi'}]
    refused(render, template, messages, names='the chat template refuses it')
    begun = time.monotonic()  # what took too long once is not tried again
    refused(render, template, messages, names='the chat template refuses it')
    assert time.monotonic() - begun < 2
    assert render("{{ messages[0]['content'] }}{{ x }}", messages, x='!') == 'hi!'  # another one goes on


# -----------------------------------------------------------------------------
# Sizes of networks

TINY = dict(vocab_size=64, n_layer=2, n_head=2, n_embd=16, block_size=8)
CLAIMS = [dict(n_layer=10 ** 7), dict(n_layer=10 ** 4), dict(vocab_size=2 ** 40), dict(n_embd=10 ** 9),
          dict(n_embd=2 ** 40, n_head=2), dict(n_head=10 ** 6, head_dim=2), dict(d_ff=10 ** 12),
          dict(block_size=10 ** 12), dict(n_expert=10 ** 9), dict(n_expert=2), dict(rank_mlp=1),
          dict(position='learned'), dict(full_layers=[0] * 10 ** 6, window=4), dict(no_rope=[1] * 10 ** 6),
          dict(ranks={'attn.q': 3}), dict(n_encoder_layer=10 ** 6, position='relative')]


@pytest.mark.parametrize('claim', CLAIMS, ids=lambda claim: f'{claim}'[:40])
def test_a_network_larger_than_its_file_is_refused(claim):
    weights = make_model(ModelConfig(**TINY)).state_dict()
    check_sizes(ModelConfig(**TINY), weights, 'state.json')
    fill(ModelConfig(**TINY), weights, 'state.json')
    refused(check_sizes, build(ModelConfig, **TINY | claim), weights, 'state.json', names='state.json')
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert used < 2 ** 20 + 500 * 1024  # kB


def test_a_context_that_weights_do_not_vouch_for_may_be_a_million_tokens():
    cfg = ModelConfig(**TINY)
    weights = make_model(cfg).state_dict()
    cfg.block_size = 2 ** 20
    check_sizes(cfg, weights, 'state.json')


@pytest.mark.parametrize('size', [dict(n_layer=10 ** 7), dict(vocab_size=2 ** 40), dict(n_embd=10 ** 7),
                                  dict(block_size=10 ** 12), dict(n_expert=10 ** 6, n_embd=10 ** 4)], ids=str)
def test_a_new_network_beyond_the_memory_is_refused(size):
    assert 'out of memory' in refused(check_memory, build(ModelConfig, **TINY | size), names=next(iter(size)))
    check_memory(ModelConfig(**TINY))


# -----------------------------------------------------------------------------
# Files of tokenizers

def test_the_file_of_a_tokenizer_is_a_regular_one_of_bounded_size(tmp_path):
    from tokenizer import load_tokenizer, new_tokenizer
    huge = tmp_path / 'huge.model'
    with open(huge, 'wb') as f:
        f.truncate(2 ** 32)
    refused(new_tokenizer, str(huge), names='huge.model')
    os.mkfifo(tmp_path / 'tokenizer.model')
    description = {'kind': 'sentencepiece', 'files': {'tokenizer.model': '0' * 64}}
    refused(load_tokenizer, description, str(tmp_path), names='tokenizer.model')
    for description in ([], {}, {'kind': 'byte', 'files': {'../x': ''}},
                        {'kind': 'char', 'chars': 5},
                        {'kind': 'tokenizers', 'files': ['x'], 'eot': 'a'},
                        {'kind': 'byte', 'reserved': 'x'}):
        refused(load_tokenizer, description, str(tmp_path), names=str(tmp_path))


def test_pieces_that_are_no_text_are_refused(tmp_path):
    from features.bpe import train_bpe
    from tokenizer import SentencePieceTokenizer
    model = train_bpe(['a bird sang to a girl'] * 30, 280).files['tokenizer.model']
    damaged = model.replace(b'<0x41>', b'\xff\xfe\xff\xfe\xff\xfe')
    refused(SentencePieceTokenizer, damaged, 'x/tokenizer.model', names='x/tokenizer.model')
