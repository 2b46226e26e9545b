"""
Families with mixtures of experts: the same logits as transformers in both directions, from both layouts of
their files, greedy text with our cache, adapters of PEFT, and what a user does with such a network.
"""
import json

import peft
import pytest
import torch
import transformers
from conftest import give_tokenizer, run, write_dataset
from safetensors import safe_open
from test_export import exported
from test_families import (
    SMALL,
    YARN,
    assert_same,
    assert_same_scores,
    assert_same_text,
    ids,
    keep_layers,
    ours,
    with_random_adapters,
)
from test_hub import edit
from test_lora import adapted

from configurator import UserError
from features.growth.networks import take_layers
from features.hf import reading
from features.lora import adapters, peft_files
from features.lora.load import add_adapters
from features.moe.network import Mixture
from features.networks import fill
from features.study.attention import measure
from tokenizer import load_tokenizer

QWEN = dict(num_experts=6, num_experts_per_tok=3, moe_intermediate_size=24)
SHARED = QWEN | dict(shared_expert_intermediate_size=40)
CASES = {  # name: (family, further fields of config.json, settings of ours that it needs)
    'mixtral': ('Mixtral', dict(num_local_experts=5), dict(n_expert=5, n_expert_active=2, d_ff=80,
                                                           expert_renorm=True, rope_theta=1e6)),
    'mixtral switch': ('Mixtral', dict(num_local_experts=4, num_experts_per_tok=1, sliding_window=8,
                                       head_dim=16, tie_word_embeddings=True, rms_norm_eps=1e-3),
                       dict(n_expert_active=1, expert_renorm=True, window=8, tie=True)),
    'qwen2_moe': ('Qwen2Moe', SHARED, dict(qkv_bias=True, expert_renorm=False, expert_width=24, d_ff=80,
                                           shared_width=40, shared_gate=True, dense_layers=[])),
    'qwen2_moe sparse': ('Qwen2Moe', SHARED | dict(decoder_sparse_step=2, mlp_only_layers=[3], qkv_bias=False,
                                                   norm_topk_prob=True, num_key_value_heads=4,
                                                   use_sliding_window=True, sliding_window=8),
                         dict(qkv_bias=False, expert_renorm=True, dense_layers=[0, 2, 3], window=8)),
    'qwen3_moe': ('Qwen3Moe', QWEN | dict(head_dim=16, norm_topk_prob=True),
                  dict(qk_norm='head', expert_renorm=True, expert_width=24, head_dim=16)),
    'qwen3_moe dense': ('Qwen3Moe', QWEN | dict(mlp_only_layers=[0], num_experts_per_tok=1,
                                                tie_word_embeddings=True, use_sliding_window=True,
                                                sliding_window=16,
                                                rope_parameters=YARN | {'rope_theta': 1e6}),
                        dict(dense_layers=[0], expert_renorm=False, n_expert_active=1, window=16)),
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


def names_in(folder):
    with safe_open(f'{folder}/model.safetensors', 'pt') as file:
        return set(file.keys())


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    """{case: folder that transformers wrote}, with a tensor for each expert, as released."""
    out = {case: str(tmp_path_factory.mktemp('base') / case) for case in CASES}
    for case, folder in out.items():
        theirs(case).save_pretrained(folder)
        assert any('.experts.0.' in name for name in names_in(folder))
    return out


@torch.no_grad()
@pytest.mark.parametrize('case', CASES)
def test_logits_and_greedy_text_are_those_of_transformers(case, folders, record_property):
    model, other = ours(folders[case]), theirs(case)
    assert {name: getattr(model.cfg, name) for name in CASES[case][2]} == CASES[case][2]
    assert_same_text(model, other, record_property)


@pytest.mark.parametrize('case', CASES)
def test_fused_tensors_are_the_same_network(case, folders, tmp_path):
    theirs(case).save_pretrained(tmp_path, save_original_format=False)
    assert any(name.endswith('.experts.gate_up_proj') for name in names_in(tmp_path))
    (cfg, weights), (fused_cfg, fused) = (reading.load(f'hf:{path}') for path in (folders[case], tmp_path))
    assert cfg == fused_cfg and weights.keys() == fused.keys()
    assert all(torch.equal(weights[name], fused[name]) for name in weights)


@pytest.mark.parametrize('original', [True, False], ids=['released', 'fused'])
def test_experts_are_read_one_by_one_into_one_stack(original, tmp_path, monkeypatch):
    theirs('qwen2_moe').to(torch.bfloat16).save_pretrained(tmp_path, save_original_format=original)
    sizes, put = [], reading.put

    def watched(weights, row, t, *more):
        if row.expert >= 0:
            sizes.append(t.numel())
        put(weights, row, t, *more)
    monkeypatch.setattr(reading, 'put', watched)
    cfg, weights = reading.load(f'hf:{tmp_path}')
    assert sizes == [cfg.expert_width * cfg.n_embd] * (cfg.n_layer * cfg.n_expert * 3)
    stacks = [t for name, t in weights.items() if '.experts.' in name]
    assert len(stacks) == 3 * cfg.n_layer
    assert all(t.dtype == torch.float32 and t.untyped_storage().nbytes() == t.nbytes for t in stacks)


@pytest.mark.parametrize('case', CASES)
def test_the_export_loads_in_transformers_with_nothing_missing(case, folders, tmp_path):
    model = ours(folders[case])
    folder = exported(tmp_path, model)
    other, report = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    assert other.config.model_type == theirs(case).config.model_type
    assert names_in(folder) == names_in(folders[case])
    assert_same(model, other)
    assert ours(folder).cfg == model.cfg


@torch.no_grad()
@pytest.mark.parametrize('case', CASES)
def test_adapters_go_to_peft_and_come_back(case, folders, tmp_path):
    base, there = ours(folders[case]), theirs(case)
    targets = ['q_proj', 'k_proj', 'v_proj', 'o_proj']
    mine = 'attn.q,attn.v'
    if 'qwen2' in case:  # of the shared expert
        targets += ['gate_proj', 'up_proj', 'down_proj']
        mine += ',shared'
    there = with_random_adapters(there, tmp_path / 'theirs', target_modules=targets, bias='lora_only')
    model = ours(folders[case])
    add_adapters(model, [f'x={tmp_path}/theirs'], folders[case])
    assert_same(model, there)
    assert not torch.allclose(model(ids()), base(ids()), atol=0.1)

    model = ours(folders[case])
    torch.manual_seed(2)
    adapted(model, lora_alpha=6.0, lora_targets=mine, whole='norm')
    kind = json.load(open(f'{folders[case]}/config.json'))['model_type']
    peft_files.write(str(tmp_path / 'ours'), model.cfg, adapters.take(model), kind)
    assert_same(model, peft.PeftModel.from_pretrained(theirs(case), tmp_path / 'ours').eval())
    assert not torch.allclose(model(ids()), base(ids()), atol=0.1)


@torch.no_grad()
def test_adapters_of_experts_are_refused_in_one_line(folders, tmp_path):
    model = ours(folders['mixtral'])
    adapted(model, lora_targets='mlp')
    with pytest.raises(UserError, match='experts.up: has an adapter, and no place in .* mixtral'):
        peft_files.write(str(tmp_path / 'ours'), model.cfg, adapters.take(model), 'mixtral')
    lora = peft.LoraConfig(target_parameters=['experts.down_proj'], target_modules=['q_proj'],
                           task_type='CAUSAL_LM')
    peft.get_peft_model(theirs('qwen3_moe'), lora).save_pretrained(tmp_path / 'theirs')
    with pytest.raises(UserError, match='target_parameters=.*experts.down_proj'):
        add_adapters(ours(folders['qwen3_moe']), [f'x={tmp_path}/theirs'], 'base')


@torch.no_grad()
@pytest.mark.parametrize('case', CASES)
def test_layers_are_inherited_and_attention_is_measured(case, folders):
    model, x = ours(folders[case]), ids(32)
    part = fill(*take_layers(model.cfg, model.state_dict(), [1, 3]), 'test').eval()
    assert [isinstance(block.mlp, Mixture) for block in part.blocks] == [True, 'sparse' not in case]
    other = theirs(case)
    keep_layers(other, [1, 3])
    wanted = other(x, use_cache=False).logits
    assert (part(x) - wanted).abs().max() < 1e-5 * wanted.abs().max()
    assert len(measure(model, [x])) == model.cfg.n_layer * model.cfg.n_head


@pytest.mark.parametrize('case', CASES)
def test_choices_of_a_task_are_scored_as_transformers_scores_them(case, folders):
    assert_same_scores(ours(folders[case]), theirs(case))


@pytest.mark.parametrize('case', ['mixtral switch', 'qwen2_moe sparse', 'qwen3_moe'])
def test_the_commands_take_such_a_folder(case, folders, tmp_path):
    folder = 'hf:' + exported(tmp_path, ours(folders[case]))  # with a tokenizer
    questions = tmp_path / 'questions.jsonl'
    questions.write_text(''.join(json.dumps({'query': f'{n} and', 'choices': ['one', 'two'], 'gold': 0})
                                 + '\n' for n in range(4)))
    write_dataset(tmp_path / 'data')
    data = give_tokenizer(tmp_path / 'data', load_tokenizer(*reading.tokenizer(folder)))
    for command in (
            ['eval.py', 'tasks', f'--out_dir={folder}', questions],
            ['analyze.py', 'attention', f'--out_dir={folder}', f'--dataset={data}', '--length=32',
             '--sequences=4', '--picture='],
            ['surgery.py', 'inherit', f'--from={folder}', '--layers=1,3', f'--out_dir={tmp_path}/part'],
            ['sample.py', f'--out_dir={tmp_path}/part', '--max_new_tokens=5', '--num_samples=1']):
        done = run(*command)
        assert done.returncode == 0, (command, done.stdout + done.stderr)


REFUSED = [
    ('qwen2_moe', dict(num_experts=10 ** 9), 'asks for 1000000000 experts'),
    ('mixtral', dict(num_hidden_layers=2 * 10 ** 9), 'asks for 2000000000 layers'),
    ('qwen2_moe', dict(num_experts=1), 'n_expert=1: takes 0'),
    ('qwen2_moe', dict(num_experts=7), 'layers.0.mlp.gate.weight: [6, 48], but config.json asks for [7'),
    ('qwen2_moe', dict(num_experts_per_tok=7), 'n_expert_active=7: takes 1 to n_expert=6'),
    ('qwen2_moe', dict(moe_intermediate_size=23), 'config.json asks for [23, 48]'),
    ('qwen2_moe', dict(shared_expert_intermediate_size=0), 'shared_expert_intermediate_size=0: takes'),
    ('qwen2_moe', dict(mlp_only_layers=3), 'mlp_only_layers=3: takes a list'),
    ('qwen2_moe', dict(mlp_only_layers=[0, '1']), "mlp_only_layers=[0, '1']: takes a list"),
    ('qwen2_moe', dict(mlp_only_layers=[3]), 'layers.3.mlp.gate_proj.weight: not in the file'),
    ('qwen2_moe', dict(decoder_sparse_step=5), 'dense_layers=[0, 1, 2, 3]: takes some'),
    ('qwen2_moe', dict(norm_topk_prob=1.5), 'norm_topk_prob=1.5: takes False or True'),
    ('qwen3_moe', dict(attention_bias=True), 'attention_bias=True: takes False'),
    ('mixtral', dict(hidden_act='relu'), "hidden_act='relu': takes"),
    ('mixtral', dict(model_type='qwen3_moe'), 'not in the file'),
]


@pytest.mark.parametrize('case, fields, words', REFUSED, ids=str)
@pytest.mark.parametrize('original', [True, False], ids=['released', 'fused'])
def test_what_our_networks_cannot_follow_is_one_line(case, fields, words, original, tmp_path):
    theirs(case).save_pretrained(tmp_path, save_original_format=original)
    edit(tmp_path, **fields)
    with pytest.raises(UserError) as refused:
        reading.load(f'hf:{tmp_path}')
    if original:
        assert words in str(refused.value)
    assert '\n' not in str(refused.value)
