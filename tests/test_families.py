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

from checkpoint import fill
from configurator import UserError
from features.growth.networks import take_layers
from features.hf import reading
from features.lora import adapters, peft_files
from features.lora.load import add_adapters
from features.study.attention import measure
from sample import generate

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

SMALL = dict(vocab_size=257, max_position_embeddings=64, hidden_size=48, intermediate_size=80,
             num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, **ENDS)
LLAMA3 = {'rope_type': 'llama3', 'factor': 8.0, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0,
          'original_max_position_embeddings': 16}
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
    model = getattr(transformers, f'{family}ForCausalLM')(config).eval()
    for name, p in model.named_parameters():
        is_norm = p.dim() == 1 and name.endswith('weight')
        p.data = 1 + 0.3 * torch.randn(p.shape) if is_norm else 0.15 * torch.randn(p.shape)
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
    """The same logits, to 1e-5 of the largest."""
    a, b = model(ids() if x is None else x), other(ids() if x is None else x).logits
    assert b.std() > 0.3 and (a - b).abs().max() < 1e-5 * b.abs().max()


@torch.no_grad()
@pytest.mark.parametrize('case', CASES)
def test_logits_and_greedy_text_are_those_of_transformers(case, folders):
    model, other = ours(folders[case]), theirs(case)
    assert {name: getattr(model.cfg, name) for name in CASES[case][2]} == CASES[case][2]
    assert_same(model, other)
    text = ids(6)
    greedy = other.generate(text, max_new_tokens=50, min_new_tokens=50, do_sample=False, eos_token_id=None)
    found = torch.stack(list(generate(model, text.tolist(), 50, temperature=0)), dim=1)  # with our cache
    assert torch.equal(found, greedy[:, 6:])


@pytest.mark.parametrize('case', CASES)
def test_the_export_loads_in_transformers_with_nothing_missing(case, folders, tmp_path):
    model = ours(folders[case])
    folder = exported(tmp_path, model)
    cls = getattr(transformers, f'{CASES[case][0]}ForCausalLM')
    other, report = cls.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    assert other.config.model_type == json.load(open(f'{folder}/config.json'))['model_type']
    assert_same(model, other)
    assert ours(folder).cfg == model.cfg


@torch.no_grad()
@pytest.mark.parametrize('case', CASES)
def test_adapters_go_to_peft_and_come_back(case, folders, tmp_path):
    base, there = ours(folders[case]), theirs(case)
    targets = ['q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj']
    lora = peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets, bias='lora_only', task_type='CAUSAL_LM')
    there = peft.get_peft_model(there, lora).eval()
    for p in there.parameters():
        if p.requires_grad:
            p.add_(0.1 * torch.randn_like(p))
    there.save_pretrained(tmp_path / 'theirs')
    model = ours(folders[case])
    add_adapters(model, [f'x={tmp_path}/theirs'], folders[case])
    assert_same(model, there)
    assert not torch.allclose(model(ids()), base(ids()), atol=0.1)

    model = ours(folders[case])
    torch.manual_seed(2)
    adapted(model, lora_alpha=6.0, lora_targets='q_proj,v_proj,mlp', whole=r'norm|attn\.q\.bias')
    kind = json.load(open(f'{folders[case]}/config.json'))['model_type']
    peft_files.write(str(tmp_path / 'ours'), model.cfg, adapters.take(model), kind)
    assert_same(model, peft.PeftModel.from_pretrained(theirs(case), tmp_path / 'ours').eval())
    assert not torch.allclose(model(ids()), base(ids()), atol=0.1)


@pytest.mark.parametrize('case', CASES)
def test_layers_are_inherited_and_attention_is_measured(case, folders):
    model, x = ours(folders[case]), ids(32)
    part = fill(*take_layers(model.cfg, model.state_dict(), [1, 3]), 'test').eval()
    other = theirs(case)
    other.model.layers = torch.nn.ModuleList([other.model.layers[1], other.model.layers[3]])
    other.config.num_hidden_layers = 2
    with torch.no_grad():
        wanted = other(x, use_cache=False).logits
        assert (part(x) - wanted).abs().max() < 1e-5 * wanted.abs().max()
    assert len(measure(model, [x])) == 16


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
    ('llama 3.1', dict(rope_parameters={'rope_type': 'dynamic', 'factor': 2.0}), "'rope_type': 'dynamic'"),
    ('llama 3.1', dict(rope_parameters=LLAMA3 | {'factor': 0}), 'factor: takes a number above 0'),
    ('llama 3.1', dict(rope_parameters=LLAMA3 | {'low_freq_factor': 'x'}), 'takes positive numbers'),
    ('llama 3.1', dict(rope_parameters=YARN | {'truncate': False}), "'truncate': False"),
    ('llama 3.1', dict(rope_parameters={'rope_type': 'llama3', 'factor': 8.0}), 'low_freq_factor'),
    ('smollm3', dict(no_rope_layers=[1, 0, 1]), 'no_rope_layers=[1, 0, 1]: takes'),
    ('smollm3', dict(no_rope_layers=[1, 0, 1, 'x']), 'no_rope_layers='),
    ('smollm3', dict(mlp_bias=True), 'mlp_bias=True: takes False'),
    ('olmo2', dict(attention_bias=True), 'attention_bias=True: takes False'),
    ('qwen3', dict(attention_bias=True), 'attention_bias=True: takes False'),
    ('qwen3', dict(use_sliding_window=True), 'use_sliding_window=True: takes False'),
    ('qwen2', dict(use_sliding_window=True), 'use_sliding_window=True: takes False'),
    ('qwen2', dict(layer_types=['full_attention'] * 3 + ['sliding_attention']), 'layer_types='),
]


@pytest.mark.parametrize('case, fields, words', REFUSED, ids=str)
def test_what_our_networks_cannot_follow_is_one_line(case, fields, words, tmp_path):
    theirs(case).save_pretrained(tmp_path)
    edit(tmp_path, **fields)
    with pytest.raises(UserError) as refused:
        reading.load(f'hf:{tmp_path}')
    assert words in str(refused.value) and '\n' not in str(refused.value)
