"""
Adapters: they change nothing at first, what they say is what PEFT's say, merged they are the same function, and a run that trains them holds them alone.
"""

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

import lora
from configurator import UserError, configure
from lora import LoraConfig
from model import ModelConfig, make_model
from sample import generate

VOCAB = 96


def network(**changes):
    """A small random decoder, its output matrices too."""
    torch.manual_seed(0)
    model = make_model(ModelConfig(**{'vocab_size': VOCAB, 'block_size': 32, 'n_layer': 2, 'n_head': 4, 'n_embd': 32, 'zero_init': False} | changes)).eval()
    for p in model.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.1)
    return model


def adapted(model, is_moved=True, **settings):
    """`model` with adapters, away from where they begin."""
    s = LoraConfig(**{'lora_rank': 4} | settings)
    s.check()
    lora.begin(model, s)
    for p in model.parameters() if is_moved else ():
        if p.requires_grad:
            p.data += 0.1 * torch.randn_like(p)
    return model


def ids(rows=3, length=16, seed=1):
    return torch.randint(VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def reading(model):
    return {'source': ids(3, 12, 2)} if model.encoder is not None else {}


@torch.no_grad()
def logits(model):
    return model(ids(), **reading(model))


KINDS = {
    'plain': ({}, {}),
    'everything': ({'tie': False, 'position': 'learned', 'bias': True}, {'lora_targets': 'attn,mlp,embed,head', 'lora_whole': 'norm', 'lora_bias': 'all'}),
    'dora': ({'tie': False, 'bias': True, 'n_kv_head': 2}, {'lora_targets': 'attn,mlp,embed,head', 'lora_dora': True}),
    'pissa': ({'tie': False}, {'lora_targets': 'c_attn,up,head', 'lora_pissa': True, 'lora_rs': True}),
    'low rank': ({'rank_qk': 8, 'rank_mlp': 16, 'rank_act': 'silu'}, {}),
    'experts': ({'n_expert': 4, 'n_expert_active': 2, 'mlp': 'swiglu'}, {'lora_tokens': [3, 5]}),
    'tied rows': ({}, {'lora_tokens': [3, 5], 'lora_ranks': {'mlp': 2, r'blocks\.1': 0}, 'lora_alphas': {'attn': 3}}),
    'encoder-decoder': ({'n_encoder_layer': 2, 'position': 'relative', 't5_scale': True, 'mlp': 'relu'}, {'lora_targets': 'q,v,wi'}),
}


# --- what they say ---

@pytest.mark.parametrize('kind', KINDS)
def test_they_say_nothing_before_the_first_step(kind):
    model_settings, settings = KINDS[kind]
    before = logits(network(**model_settings))
    after = logits(adapted(network(**model_settings), is_moved=False, **settings))
    assert torch.equal(after, before) if kind != 'pissa' else torch.allclose(after, before, atol=1e-5)


@pytest.mark.parametrize('kind', KINDS)
def test_merged_they_are_the_same_function_and_unmerged_the_base_is_bitwise_what_it_was(kind):
    model_settings, settings = KINDS[kind]
    model = adapted(network(**model_settings), **settings)
    spoken, weights = logits(model), {name: t.clone() for name, t in model.state_dict().items()}
    assert (spoken - logits(network(**model_settings))).abs().max() > 0.05
    before = lora.merge(model)
    assert (logits(model) - spoken).abs().max() < 2e-5 * spoken.abs().max()
    alone = make_model(model.cfg)  # and without any adapter
    alone.load_state_dict(lora.base_state(model))
    assert (logits(alone.eval()) - spoken).abs().max() < 2e-5 * spoken.abs().max()
    lora.unmerge(model, before)
    assert all(torch.equal(t, weights[name]) for name, t in model.state_dict().items()) and torch.equal(logits(model), spoken)


@pytest.mark.parametrize('kind', KINDS)
def test_the_loss_in_chunks_is_that_of_the_logits_and_trains_the_same_tensors(kind):
    model_settings, settings = KINDS[kind]
    model, targets = adapted(network(**model_settings), **settings), ids(seed=3)
    model(ids(), targets, **reading(model)).backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert grads.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    for p in model.parameters():
        p.grad = None
    F.cross_entropy(model(ids(), **reading(model)).flatten(0, 1), targets.flatten()).backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert torch.allclose(grads[name], p.grad, rtol=1e-3, atol=1e-6 * max(1, p.grad.abs().max().item())), name


def test_what_is_added_is_the_product_times_alpha_over_rank():
    for settings, scale in (({'lora_alpha': 6}, 6 / 4), ({'lora_alpha': 6, 'lora_rs': True}, 3), ({'lora_alphas': {'blocks.0': 8}}, 2)):
        model = adapted(network(), **settings)
        layer = model.blocks[0].attn.q
        adapter, x = layer.lora['default'], torch.randn(5, 32)
        assert torch.allclose(layer(x), F.linear(x, layer.weight) + scale * x @ adapter.A.T @ adapter.B.T, atol=1e-6)


def test_dropout_is_of_what_adapters_read_and_in_training_alone():
    model = adapted(network(), lora_dropout=0.5)
    assert torch.equal(logits(model), logits(model))
    model.train()
    assert not torch.equal(logits(model), logits(model))
    assert torch.equal(logits(adapted(network(), lora_dropout=0.5)), logits(adapted(network())))


def test_cached_generation_is_uncached_with_adapters():
    model = adapted(network(position='learned', tie=False), lora_targets='attn,mlp,embed,head')
    texts = [torch.stack(list(generate(model, ids(2, 5).tolist(), 20, temperature=0, use_cache=cached))) for cached in (True, False)]
    assert torch.equal(*texts)


# --- which weights ---

def test_what_targets_mean():
    def layers(**settings):
        return [name for name, _ in lora.adapted(adapted(network(**{'tie': False, 'position': 'learned', 'mlp': 'swiglu'}), **settings))]
    assert layers(lora_targets='q,down', lora_layers='1:') == ['blocks.1.attn.q', 'blocks.1.mlp.down']
    assert layers(lora_targets='q_proj,down_proj', lora_layers='1') == ['blocks.1.attn.q', 'blocks.1.mlp.down']
    assert layers(lora_targets='embed,head', lora_layers='1') == ['wte', 'wpe', 'head']
    assert layers(lora_targets='c_proj', lora_layers='0') == ['blocks.0.attn.o', 'blocks.0.mlp.down']
    assert len(layers(lora_targets='attn,mlp')) == 14 and len(layers(lora_targets='attn', lora_ranks={'attn.[qv]': 0})) == 4


def test_c_attn_is_one_adapter_for_q_k_and_v():
    model = adapted(network(), lora_targets='c_attn')
    q, k, v = (getattr(model.blocks[0].attn, name).lora['default'] for name in 'qkv')
    assert q.A is k.A and k.A is v.A and q.B is not k.B
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * 4 * (32 + 96)


def test_starcoder_as_the_blog_adapts_it():
    s = configure(pytest.importorskip('train').Settings, [f'{ROOT}/config/lora_starcoder.py'])
    model = lora.blank(ModelConfig(**{name: getattr(s, name) for name in ModelConfig.__dataclass_fields__}))
    base = model.num_params()
    with torch.device('meta'):
        lora.begin(model, s, is_new=False)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert (base, trained, model.num_params()) == (1_137_207_296, 12_091_392, 1_149_298_688)


@pytest.mark.parametrize('settings, words', [
    ({'lora_targets': 'attn,c_fcc'}, "lora_targets: 'c_fcc' matches nothing: takes attn, mlp, embed, head, or matrices of this network by name: wte, attn.q"),
    ({'lora_targets': 'head'}, "'head' matches nothing"), ({'lora_targets': 'q', 'lora_layers': '2:'}, "'q' matches nothing in lora_layers=2:"),
    ({'lora_rank': 33}, 'lora_rank=33: is more than blocks.0.attn.q has, 32 x 32'), ({'lora_ranks': {'': 0}}, 'leaves no adapter'),
    ({'lora_whole': 'nrom'}, "lora_whole: 'nrom' matches no tensor"), ({'lora_tokens': [96]}, 'lora_tokens: 96: takes tokens from 0 to 95'),
])
def test_what_a_network_has_not_is_named(settings, words):
    with pytest.raises(UserError, match=words.replace('[', r'\[')):
        adapted(network(), **settings)


@pytest.mark.parametrize('settings, words', [
    ({'lora_rank': -1}, 'lora_rank=-1'), ({'lora_dropout': 1.0}, 'lora_dropout=1.0'), ({'lora_ranks': {'[': 1}}, "'\\[' is no pattern"),
    ({'lora_ranks': {'q': -1}}, 'lora_ranks='), ({'lora_layers': 'a:b'}, 'lora_layers=a:b'), ({'lora_plus': 0.0}, 'lora_plus=0'),
])
def test_settings_that_cannot_work_are_named(settings, words):
    with pytest.raises(ValueError, match=words):
        LoraConfig(**{'lora_rank': 4} | settings).check()


def test_merging_what_cannot_be_merged_is_refused():
    model = adapted(network(), lora_targets='embed')
    spoken = logits(model)
    with pytest.raises(UserError, match='the embedding is the head too, which has no adapter: --untie=True'):
        lora.merge(model)
    lora.untie(model)
    assert torch.equal(logits(model), spoken)
    lora.merge(model)
    assert torch.allclose(logits(model), spoken, atol=1e-5)
    model = adapted(network(n_encoder_layer=1, position='relative'), lora_targets='embed')
    with pytest.raises(UserError, match='encoder and decoder have adapters of their own'):
        lora.merge(model)
