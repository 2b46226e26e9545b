"""
Families that are Llama with something more: the same logits as transformers in both directions, greedy text
with our cache, adapters of PEFT, and what a user does with such a network. Tiny and random.
"""
import json

import peft
import pytest
import torch
import transformers
from test_export import exported
from test_hub import ENDS, edit
from test_lora import adapted

from configurator import UserError
from features.growth.networks import take_layers
from features.hf import reading
from features.hf.config_json import Config
from features.lora import adapters, peft_files
from features.lora.load import add_adapters
from features.networks import fill
from features.study.attention import measure
from features.study.likelihoods import score
from model import make_model
from sample import generate

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

SMALL = dict(vocab_size=257, max_position_embeddings=64, hidden_size=48, intermediate_size=80,
             num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, **ENDS)
LLAMA3 = {'rope_type': 'llama3', 'factor': 8.0, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0,
          'original_max_position_embeddings': 16}
LINEAR = {'rope_type': 'linear', 'factor': 4.0}
YARN = {'rope_type': 'yarn', 'factor': 4.0, 'original_max_position_embeddings': 16}
FULL_YARN = YARN | {'beta_fast': 6.0, 'beta_slow': 0.5, 'attention_factor': 0.9}
CASES = {  # name: (family, further fields of config.json, settings of ours that it needs)
    'qwen2': ('Qwen2', dict(rope_parameters={'rope_type': 'default', 'rope_theta': 1e6}),
              dict(qkv_bias=True)),
    'qwen2 tied': ('Qwen2', dict(tie_word_embeddings=True, head_dim=16), dict(qkv_bias=True)),
    'qwen3': ('Qwen3', dict(head_dim=16, rope_parameters={'rope_type': 'default', 'rope_theta': 1e6}),
              dict(qk_norm='head', head_dim=16)),
    'qwen3 tied': ('Qwen3', dict(tie_word_embeddings=True, head_dim=12, num_key_value_heads=1,
                                 rms_norm_eps=1e-3), dict(qk_norm='head')),
    'smollm3': ('SmolLM3', {}, dict(no_rope=[3], rope_theta=2e6, tie=True)),
    'smollm3 list': ('SmolLM3', dict(no_rope_layers=[0, 1, 0, 1], tie_word_embeddings=False, head_dim=16,
                                     rope_parameters=LLAMA3 | {'rope_theta': 5e5}), dict(no_rope=[0, 2])),
    'smollm3 window': ('SmolLM3', dict(use_sliding_window=True, sliding_window=8),
                       dict(no_rope=[3], window=8, full_layers=[0, 1, 2])),
    'qwen2 window': ('Qwen2', dict(use_sliding_window=True, sliding_window=16, max_window_layers=2),
                     dict(window=16, full_layers=[0, 1])),
    'qwen3 window': ('Qwen3', dict(use_sliding_window=True, sliding_window=5, head_dim=16, layer_types=[
                     'full_attention', 'sliding_attention'] * 2), dict(window=5, full_layers=[0, 2])),
    'mistral': ('Mistral', dict(sliding_window=8, head_dim=8), dict(window=8, full_layers=[])),
    'gemma': ('Gemma', dict(head_dim=16), dict(embed_scale=48 ** 0.5, mlp='geglu', tie=True)),
    'gemma2': ('Gemma2', dict(head_dim=16, sliding_window=8, query_pre_attn_scalar=12,
                              attn_logit_softcapping=2.0, final_logit_softcapping=5.0),
               dict(post_norm='both', window=8, full_layers=[1, 3], attn_softcap=2.0, softcap=5.0,
                    attn_scale=12 ** -0.5)),
    'gemma2 plain': ('Gemma2', dict(head_dim=16, query_pre_attn_scalar=16, attn_logit_softcapping=None,
                                    final_logit_softcapping=None, layer_types=['full_attention'] * 4),
                     dict(window=0, attn_softcap=0.0, softcap=0.0, attn_scale=0.0)),
    'gemma3': ('Gemma3Text', dict(head_dim=16, sliding_window=8, query_pre_attn_scalar=16, layer_types=[
               'sliding_attention', 'sliding_attention', 'full_attention', 'sliding_attention']),
               dict(qk_norm='head', window=8, full_layers=[2], window_theta=1e4, rope_theta=1e6)),
    'gemma3 scaled': ('Gemma3Text', dict(head_dim=16, sliding_window=4, query_pre_attn_scalar=10,
                                         num_hidden_layers=7, rope_parameters={
                                             'full_attention': LINEAR | {'rope_theta': 1e4},
                                             'sliding_attention': {'rope_type': 'default',
                                                                   'rope_theta': 1e4}}),
                      dict(window=4, full_layers=[5], window_theta=1e4, rope_scaling=LINEAR)),
    'phi3': ('Phi3', dict(rms_norm_eps=1e-3, rope_parameters={
             'rope_type': 'default', 'rope_theta': 1e4, 'partial_rotary_factor': 0.5}), dict(rope_dim=6)),
    'phi3 window': ('Phi3', dict(sliding_window=8, rope_parameters={
                    'rope_type': 'default', 'rope_theta': 1e4, 'partial_rotary_factor': 0.5}),
                    dict(rope_dim=6, window=8)),
    'granite': ('Granite', dict(embedding_multiplier=12.0, residual_multiplier=0.22,
                                attention_multiplier=0.1, logits_scaling=2.0, tie_word_embeddings=True),
                dict(embed_scale=12.0, residual_scale=0.22, attn_scale=0.1, logit_scale=0.5)),
    'gpt_neox': ('GPTNeoX', dict(num_key_value_heads=None, hidden_size=64),
                 dict(parallel=True, rope_dim=4, mlp='gelu_exact')),
    'gpt_neox one after another': ('GPTNeoX', dict(num_key_value_heads=None, use_parallel_residual=False,
                                                   hidden_act='gelu_new', rope_parameters=YARN | {
                                                       'rope_theta': 1e4, 'partial_rotary_factor': 1.0}),
                                   dict(parallel=False, rope_dim=0, mlp='gelu')),
    'gpt_neo': ('GPTNeo', dict(attention_types=[[['global', 'local'], 2]], window_size=8, num_layers=4,
                               num_heads=4), dict(window=8, full_layers=[0, 2], attn_scale=1.0,
                                                  qkv_bias='never')),
    'gpt_neo global': ('GPTNeo', dict(attention_types=[[['global'], 4]], num_layers=4, num_heads=4,
                                      activation_function='relu'), dict(window=0, mlp='relu')),
    'opt': ('OPT', dict(ffn_dim=80), dict(position='learned', mlp='relu')),
    'opt untied': ('OPT', dict(ffn_dim=80, tie_word_embeddings=False), dict(tie=False, mlp='relu')),
    'gpt2 gelu': ('GPT2', dict(n_embd=48, n_head=4, n_layer=4, n_positions=64, activation_function='gelu'),
                  dict(mlp='gelu_exact')),
    'olmo2': ('Olmo2', dict(rms_norm_eps=1e-3), dict(post_norm=True, qk_norm='width')),
    'olmo2 tied': ('Olmo2', dict(tie_word_embeddings=True, head_dim=16, num_key_value_heads=None),
                   dict(post_norm=True, n_kv_head=4)),
    # beyond the original context of 16 tokens
    'llama 3.1': ('Llama', dict(rope_parameters=LLAMA3 | {'rope_theta': 5e5}), dict(rope_scaling=LLAMA3)),
    'linear': ('Llama', dict(rope_parameters={'rope_type': 'linear', 'factor': 4, 'rope_theta': 1e4}),
               dict(rope_scaling={'rope_type': 'linear', 'factor': 4})),
    'yarn': ('Llama', dict(rope_parameters=FULL_YARN | {'rope_theta': 1e3}), dict(rope_scaling=FULL_YARN)),
    'qwen2 yarn': ('Qwen2', dict(rope_parameters=YARN | {'rope_theta': 1e6}), dict(qkv_bias=True)),
}


def theirs(case):
    """A random transformers model. Norms and biases are random too: a mistake in any tensor must show."""
    torch.manual_seed(0)
    family, fields, _ = CASES[case]
    config = getattr(transformers, f'{family}Config')(**SMALL | fields)
    config._attn_implementation = 'eager'  # the others leave out attention's softcap
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for name, p in model.named_parameters():
        is_norm = p.dim() == 1 and name.endswith('weight')
        mean = 0 if family.startswith('Gemma') else 1  # its norms multiply by 1 + w
        p.data = mean + 0.3 * torch.randn(p.shape) if is_norm else 0.15 * torch.randn(p.shape)
    return model


def ours(folder):
    cfg, weights = reading.load(f'hf:{folder}')
    return fill(cfg, weights, folder).eval()


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    """{case: folder that transformers wrote}."""
    torch.set_num_threads(1)
    out = {case: str(tmp_path_factory.mktemp('base') / case) for case in CASES}
    for case, folder in out.items():
        theirs(case).save_pretrained(folder)
    return out


def ids(length=64):
    return torch.randint(257, (2, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def assert_same(model, other, x=None):
    """The same logits, to 1e-5 of the largest. Returns the difference, as a share of it."""
    a, b = model(ids() if x is None else x), other(ids() if x is None else x).logits
    difference = ((a - b).abs().max() / b.abs().max()).item()
    assert b.std() > 0.3 and difference < 1e-5
    return difference


@torch.no_grad()
def assert_same_text(model, other, record_property):
    """The same logits, and 50 greedy tokens with our cache."""
    record_property('family', other.config.model_type)  # for experiments/families.py
    record_property('difference', assert_same(model, other))
    text = ids(6)
    greedy = other.generate(text, max_new_tokens=50, min_new_tokens=50, do_sample=False, eos_token_id=None)
    found = torch.stack(list(generate(model, text.tolist(), 50, temperature=0)), dim=1)  # with our cache
    assert torch.equal(found, greedy[:, 6:])


@torch.no_grad()
@pytest.mark.parametrize('case', CASES)
def test_logits_and_greedy_text_are_those_of_transformers(case, folders, record_property):
    model, other = ours(folders[case]), theirs(case)
    assert {name: getattr(model.cfg, name) for name in CASES[case][2]} == CASES[case][2]
    assert_same_text(model, other, record_property)


@pytest.mark.parametrize('case', CASES)
def test_the_export_loads_in_transformers_with_nothing_missing(case, folders, tmp_path):
    model = ours(folders[case])
    folder = exported(tmp_path, model)
    other, report = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True,
                                                                      attn_implementation='eager')
    assert not any(report.values()), report
    assert other.config.model_type == theirs(case).config.model_type
    assert_same(model, other)
    assert ours(folder).cfg == model.cfg


TARGETS = ['q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj', 'qkv_proj',
           'gate_up_proj', 'query_key_value', 'dense', 'dense_h_to_4h', 'dense_4h_to_h', 'out_proj', 'c_fc',
           'c_proj', 'fc1', 'fc2', 'c_attn']


def with_random_adapters(there, folder, task_type='CAUSAL_LM', **settings):
    """A network of transformers with PEFT's adapters, random ones, which are also saved to a folder."""
    there = peft.get_peft_model(there, peft.LoraConfig(r=4, lora_alpha=6, task_type=task_type, **settings))
    for p in there.parameters():
        if p.requires_grad:
            p.add_(0.1 * torch.randn_like(p))
    there.save_pretrained(folder)
    return there.eval()


@torch.no_grad()
@pytest.mark.parametrize('case', CASES)
def test_adapters_go_to_peft_and_come_back(case, folders, tmp_path):
    base, there = ours(folders[case]), theirs(case)
    targets = [name for name in TARGETS if any(f'.{name}.' in module for module in there.state_dict())]
    there = with_random_adapters(there, tmp_path / 'theirs', target_modules=targets, bias='lora_only')
    model = ours(folders[case])
    add_adapters(model, [f'x={tmp_path}/theirs'], folders[case])
    assert_same(model, there)
    assert not torch.allclose(model(ids()), base(ids()), atol=0.1)

    model = ours(folders[case])
    torch.manual_seed(2)
    adapted(model, lora_alpha=6.0, lora_targets='attn.q,attn.v,mlp', whole=r'norm|attn\.[qkv]\.bias')
    kind = json.load(open(f'{folders[case]}/config.json'))['model_type']
    peft_files.write(str(tmp_path / 'ours'), model.cfg, adapters.take(model), kind)
    assert_same(model, peft.PeftModel.from_pretrained(theirs(case), tmp_path / 'ours').eval())
    assert not torch.allclose(model(ids()), base(ids()), atol=0.1)


def keep_layers(model, kept):
    """Delete the other layers of a model of transformers."""
    body = getattr(model.base_model, 'decoder', model.base_model)
    stack = 'layers' if hasattr(body, 'layers') else 'h'
    setattr(body, stack, torch.nn.ModuleList(getattr(body, stack)[n] for n in kept))
    for config in (model.config, body.config):
        if hasattr(config, 'layer_types') and len(config.layer_types) > len(kept):
            config.layer_types = [config.layer_types[n] for n in kept]
        config.num_hidden_layers = len(kept)


@pytest.mark.parametrize('case', CASES)
def test_layers_are_inherited_and_attention_is_measured(case, folders):
    model, x = ours(folders[case]), ids(32)
    part = fill(*take_layers(model.cfg, model.state_dict(), [1, 3]), 'test').eval()
    other = theirs(case)
    keep_layers(other, [1, 3])
    with torch.no_grad():
        wanted = other(x, use_cache=False).logits
        assert (part(x) - wanted).abs().max() < 1e-5 * wanted.abs().max()
    assert len(measure(model, [x])) == model.cfg.n_layer * model.cfg.n_head


@torch.no_grad()
def assert_same_scores(model, other):
    """The log-likelihoods of four choices: their common beginning is read once, here also beyond a window."""
    context = ids()[0, :20].tolist()
    choices = [ids()[1, n:n + 5].tolist() for n in range(4)]
    found = score(model, [(context, choice) for choice in choices], torch.device('cpu'), 'float32')
    for choice, (nats, _) in zip(choices, found):
        logits = other(torch.tensor([context + choice])).logits[0, 19:-1].log_softmax(-1)
        assert abs(nats - logits.gather(1, torch.tensor(choice)[:, None]).sum()) < 1e-4


@pytest.mark.parametrize('case', CASES)
def test_choices_of_a_task_are_scored_as_transformers_scores_them(case, folders):
    assert_same_scores(ours(folders[case]), theirs(case))


def test_scaled_positions_are_exact_far_out_and_in_the_old_spelling(tmp_path):
    CASES['long'] = ('Llama', dict(rope_parameters=LLAMA3 | {'rope_theta': 5e5}, max_position_embeddings=2048,
                                   original_max_position_embeddings=256), {})
    other = theirs('long')
    del CASES['long']
    other.save_pretrained(tmp_path)
    assert_same(ours(tmp_path), other, ids(2048))  # the field outside counts more
    old = {'type': 'llama3', **LLAMA3, 'original_max_position_embeddings': 256}
    del old['rope_type']
    edit(tmp_path, rope_parameters=None, original_max_position_embeddings=None, rope_scaling=old,
         rope_theta=5e5)
    assert_same(ours(tmp_path), other, ids(2048))


REFUSED = [
    ('llama 3.1', dict(rope_parameters=LLAMA3 | {'low_freq_factor': 4.0}), 'has to be the lower one'),
    ('llama 3.1', dict(rope_parameters={'rope_type': 'longrope', 'factor': 2.0}), "'rope_type': 'longrope'"),
    ('llama 3.1', dict(rope_parameters=LLAMA3 | {'factor': 0}), 'factor: takes a number above 0'),
    ('llama 3.1', dict(rope_parameters=LLAMA3 | {'low_freq_factor': 'x'}), 'takes positive numbers'),
    ('llama 3.1', dict(rope_parameters=YARN | {'truncate': False}), "'truncate': False"),
    ('llama 3.1', dict(rope_parameters={'rope_type': 'llama3', 'factor': 8.0}), 'low_freq_factor'),
    ('smollm3', dict(no_rope_layers=[1, 0, 1]), 'no_rope_layers=[1, 0, 1]: takes'),
    ('smollm3', dict(no_rope_layers=[1, 0, 1, 'x']), 'no_rope_layers='),
    ('smollm3', dict(mlp_bias=True), 'mlp_bias=True: takes False'),
    ('olmo2', dict(attention_bias=True), 'attention_bias=True: takes False'),
    ('qwen3', dict(attention_bias=True), 'attention_bias=True: takes False'),
    ('qwen3', dict(use_sliding_window=True, sliding_window=0, layer_types=None, max_window_layers=0),
     'sliding_window=0: takes'),
    ('qwen2', dict(layer_types=['full_attention'] * 3 + ['sliding_attention']), 'sliding_window=None'),
    ('qwen2', dict(layer_types=['full_attention'] * 3), 'layer_types='),
    ('gemma3', dict(use_bidirectional_attention=True), 'use_bidirectional_attention=True: takes False'),
    ('gemma3', dict(rope_parameters={'full_attention': {'rope_type': 'default', 'rope_theta': 1e6},
                                     'sliding_attention': LLAMA3}), 'sliding_attention: takes'),
    ('phi3', dict(rope_parameters=YARN), 'takes rope_type=default or dynamic'),
    ('phi3', dict(rope_parameters={'rope_type': 'longrope', 'short_factor': [1.0]}), "'longrope'"),
    ('gpt_neo', dict(attention_types=[[['global', 'far'], 2]]), 'attention_types='),
    ('gpt_neo', dict(attention_types=[[['global'], 10 ** 12]]), 'attention_types='),
    ('gpt_neo', dict(attention_types=[[['global'] * 10 ** 5, 10 ** 9]], num_layers=10 ** 9),
     'attention_types='),
    ('llama 3.1', dict(rope_parameters=YARN | {'beta_fast': 1e-320}), 'takes positive numbers'),
    ('llama 3.1', dict(rope_parameters=YARN | {'beta_slow': 10 ** 400}), 'takes positive numbers'),
    ('gpt_neox', dict(rope_parameters={'rope_type': 'default', 'rope_theta': 1e4,
                                       'partial_rotary_factor': 2.0}), 'partial_rotary_factor=2.0'),
    ('opt', dict(do_layer_norm_before=False), 'do_layer_norm_before=False: takes True'),
    ('opt', dict(word_embed_proj_dim=24), 'word_embed_proj_dim=24: takes 48'),
]


@pytest.mark.parametrize('case, fields, words', REFUSED, ids=str)
def test_what_our_networks_cannot_follow_is_one_line(case, fields, words, tmp_path):
    theirs(case).save_pretrained(tmp_path)
    edit(tmp_path, **fields)
    with pytest.raises(UserError) as refused:
        reading.load(f'hf:{tmp_path}')
    assert words in str(refused.value) and '\n' not in str(refused.value)


def test_fields_that_transformers_passes_over_change_nothing(tmp_path):
    theirs('qwen2').save_pretrained(tmp_path)
    edit(tmp_path, scaling=LINEAR)
    cfg, _ = reading.load(f'hf:{tmp_path}')
    assert cfg.rope_scaling == {}


def test_a_number_in_place_of_a_boolean_is_that_boolean(tmp_path):
    theirs('qwen2').save_pretrained(tmp_path)
    edit(tmp_path, tie_word_embeddings=0)
    cfg, _ = reading.load(f'hf:{tmp_path}')
    assert cfg.tie is False


PUBLISHED = {  # fields of the published config.json, and the number of parameters that its authors give
    'Pythia 70M': (70_426_624, dict(
        model_type='gpt_neox', hidden_act='gelu', hidden_size=512, intermediate_size=2048, rotary_pct=0.25,
        max_position_embeddings=2048, num_attention_heads=8, num_hidden_layers=6, rotary_emb_base=10000,
        vocab_size=50304, use_parallel_residual=True, tie_word_embeddings=False)),
    'OPT 125M': (125_239_296 - 2 * 768, dict(  # without its two rows of positions that no token has
        model_type='opt', activation_function='relu', do_layer_norm_before=True, ffn_dim=3072,
        hidden_size=768, max_position_embeddings=2048, num_attention_heads=12, num_hidden_layers=12,
        vocab_size=50272, word_embed_proj_dim=768, _remove_final_layer_norm=False)),
    'TinyStories 33M': (68_514_048, dict(
        model_type='gpt_neo', activation_function='gelu_new', attention_types=[[['global', 'local'], 2]],
        hidden_size=768, intermediate_size=None, max_position_embeddings=2048, num_heads=16, num_layers=4,
        window_size=256, vocab_size=50257)),
    'Gemma 2B': (2_506_172_416, dict(
        model_type='gemma', attention_bias=False, head_dim=256, hidden_act='gelu', hidden_activation=None,
        hidden_size=2048, intermediate_size=16384, max_position_embeddings=8192, num_attention_heads=8,
        num_hidden_layers=18, num_key_value_heads=1, rope_theta=10000.0, vocab_size=256000)),
    'Gemma 2 2B': (2_614_341_888, dict(
        model_type='gemma2', attn_logit_softcapping=50.0, final_logit_softcapping=30.0, head_dim=256,
        hidden_act='gelu_pytorch_tanh', hidden_size=2304, intermediate_size=9216,
        max_position_embeddings=8192, num_attention_heads=8, num_hidden_layers=26, num_key_value_heads=4,
        query_pre_attn_scalar=256, sliding_window=4096, vocab_size=256000)),
    'Gemma 3 270M': (268_098_176, dict(
        model_type='gemma3_text', attn_logit_softcapping=None, final_logit_softcapping=None, head_dim=256,
        hidden_activation='gelu_pytorch_tanh', hidden_size=640, intermediate_size=2048,
        layer_types=(['sliding_attention'] * 5 + ['full_attention']) * 3, max_position_embeddings=32768,
        num_attention_heads=4, num_hidden_layers=18, num_key_value_heads=1, query_pre_attn_scalar=256,
        rope_local_base_freq=10000.0, rope_scaling=None, rope_theta=1000000.0, sliding_window=512,
        vocab_size=262144)),
    'Gemma 3 1B': (999_885_952, dict(
        model_type='gemma3_text', head_dim=256, hidden_activation='gelu_pytorch_tanh', hidden_size=1152,
        intermediate_size=6912, max_position_embeddings=32768, num_attention_heads=4, num_hidden_layers=26,
        num_key_value_heads=1, query_pre_attn_scalar=256, rope_local_base_freq=10000, rope_theta=1000000,
        sliding_window=512, sliding_window_pattern=6, vocab_size=262144)),
    'Phi-3 mini 4k': (3_821_079_552, dict(
        model_type='phi3', hidden_act='silu', hidden_size=3072, intermediate_size=8192,
        max_position_embeddings=4096, num_attention_heads=32, num_hidden_layers=32, num_key_value_heads=32,
        original_max_position_embeddings=4096, rope_scaling=None, rope_theta=10000.0, sliding_window=2047,
        vocab_size=32064)),
    'Granite 3.1 2B': (2_533_531_648, dict(
        model_type='granite', attention_multiplier=0.015625, embedding_multiplier=12.0, hidden_act='silu',
        hidden_size=2048, intermediate_size=8192, logits_scaling=8.0, max_position_embeddings=131072,
        num_attention_heads=32, num_hidden_layers=40, num_key_value_heads=8, residual_multiplier=0.22,
        rope_theta=5000000.0, tie_word_embeddings=True, vocab_size=49155)),
    'Mistral 7B': (7_241_732_096, dict(
        model_type='mistral', hidden_act='silu', hidden_size=4096, intermediate_size=14336,
        max_position_embeddings=32768, num_attention_heads=32, num_hidden_layers=32, num_key_value_heads=8,
        rope_theta=10000.0, sliding_window=4096, vocab_size=32000)),
    'Qwen3 0.6B': (596_049_920, dict(
        model_type='qwen3', attention_bias=False, head_dim=128, hidden_act='silu', hidden_size=1024,
        intermediate_size=3072, max_position_embeddings=40960, max_window_layers=28, num_attention_heads=16,
        num_hidden_layers=28, num_key_value_heads=8, rope_theta=1000000, sliding_window=None,
        tie_word_embeddings=True, use_sliding_window=False, vocab_size=151936)),
    'SmolLM3 3B': (3_075_098_624, dict(
        model_type='smollm3', attention_bias=False, hidden_act='silu', hidden_size=2048,
        intermediate_size=11008, layer_types=['full_attention'] * 36, max_position_embeddings=65536,
        mlp_bias=False, no_rope_layers=[1, 1, 1, 0] * 9, num_attention_heads=16, num_hidden_layers=36,
        num_key_value_heads=4, rope_theta=5000000.0, sliding_window=None, vocab_size=128256)),
    'OLMo 2 1B': (1_484_916_736, dict(
        model_type='olmo2', attention_bias=False, hidden_act='silu', hidden_size=2048,
        intermediate_size=8192, max_position_embeddings=4096, num_attention_heads=16, num_hidden_layers=16,
        num_key_value_heads=16, rope_theta=500000, tie_word_embeddings=False, vocab_size=100352)),
}


@pytest.mark.parametrize('name', PUBLISHED)
def test_a_published_config_describes_a_network_of_the_published_size(name, tmp_path):
    count, fields = PUBLISHED[name]
    (tmp_path / 'config.json').write_text(json.dumps(fields))
    config = Config(tmp_path)
    with torch.device('meta'):
        assert make_model(reading.read_config(config, reading.family_of(config))).num_params() == count
