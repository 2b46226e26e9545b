"""The networks against closed forms and plain PyTorch."""
import math
import shutil
from dataclasses import fields
from typing import Literal, get_origin

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, run
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from configurator import options, read_config
from features import build, part_of
from features.lora.packed import FrozenLinear
from features.markov.network import BigramLoss
from features.t5.settings import READ
from model import (
    ChunkedCrossEntropy,
    ModelConfig,
    Transformer,
    attend,
    attention_matrix,
    linear,
    loss_and_gradient,
    make_model,
    rotary_table,
    rotate,
)
from sample import KVCache
from train import Settings


def tiny(**settings):
    torch.manual_seed(0)
    sizes = {'vocab_size': 100, 'block_size': 32, 'n_layer': 2, 'n_head': 4, 'n_embd': 32}
    model = make_model(build(ModelConfig, **sizes | settings))
    for p in model.parameters():  # what is zero at the start would hide mistakes
        if not p.any():
            torch.nn.init.normal_(p, std=0.1)
    model.wte.weight.data[model.cfg.vocab_size:] = 0
    if model.head is not None:
        model.head.weight.data[model.cfg.vocab_size:] = 0
    return model


def batch(rows=3, length=32, vocab_size=100, masked=10):
    generator = torch.Generator().manual_seed(1)
    idx = torch.randint(vocab_size, (rows, length + 1), generator=generator)
    x, y = idx[:, :-1].clone(), idx[:, 1:].clone()
    y[0, length - masked:] = -1
    return x, y


# every decoder flag once; used below wherever a property must hold for all of them
VARIANTS = [
    dict(),
    dict(position='learned', norm='layernorm', mlp='gelu', bias=True, qk_norm=False),
    dict(position='none', mlp='silu', zero_init=False, tie=False),
    dict(n_kv_head=2, mlp='swiglu', softcap=15.0, tie=False),
    dict(n_kv_head=1, mlp='geglu', head_dim=16),
    dict(mlp_norm=True, init_std=0.02, d_ff=48),
    dict(rank_qk=8, rank_vo=16, rank_mlp=24, rank_embed=8, rank_head=16, rank_act='silu', tie=False),
    dict(rank_embed=8, rank_head=8),
    dict(window=7, full_layers=[1], window_theta=50.0, rope_dim=4, post_norm='both', attn_softcap=5.0),
    dict(window=4, position='learned', norm='layernorm', parallel=True, bias=True, qkv_bias='never',
         mlp='gelu_exact', attn_scale=1.0),
    dict(embed_scale=3.0, residual_scale=0.5, logit_scale=2.0, post_norm=True, qk_norm='head', no_rope=[1]),
    dict(rank_qk=8, rank_vo=8, rank_mlp=8, rank_act='silu'),
    dict(n_expert=4, n_expert_active=2, mlp='swiglu'),
    dict(n_expert=4, expert_width=24, expert_renorm=True, shared_width=40, shared_gate=True,
         dense_layers=[0]),
]


# --- parameter counts ---

@pytest.mark.parametrize('config, vocab_size, count', [
    ('gpt2', 50304, 124_373_760), ('gpt2_medium', 50304, 354_599_936),
    ('gpt2_large', 50304, 773_582_080), ('gpt2_xl', 50304, 1_556_840_000),
    ('llama_15m', 32000, 15_191_712), ('llama_42m', 32000, 41_689_600), ('llama_110m', 32000, 109_529_856),
    ('lowrank28m_dense', 49954, 66_683_136), ('lowrank28m', 49954, 96_604_288),
    ('inheritune_medium', 50304, 253_920_256), ('inheritune_large', 50304, 419_641_600),
    ('inheritune_xl', 50304, 819_483_200), ('inheritune_openllama', 32000, 1_815_638_400),
])
def test_presets_have_exactly_the_published_number_of_parameters(config, vocab_size, count):
    s = build(Settings, **read_config(Settings, f'config/{config}.py') | {'vocab_size': vocab_size})
    with torch.device('meta'):
        model = Transformer(part_of(s, ModelConfig))
    assert model.num_params() == count
    blocks = {'lowrank28m_dense': 28_317_696, 'lowrank28m': 25_972_992}
    if config in blocks:
        assert sum(p.numel() for p in model.blocks.parameters()) == blocks[config]


# --- attention ---

@pytest.mark.parametrize('T', [64, 300])
@pytest.mark.parametrize('kv_heads', [4, 2])
def test_plain_attention_of_short_rows_in_bfloat16_is_torchs(T, kv_heads):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, T, 16, dtype=torch.bfloat16, requires_grad=True)
               for heads in (4, kv_heads, kv_heads))
    ours = attend(q, k, v, None, True, 0.0)
    theirs = F.scaled_dot_product_attention(*(t.float() for t in (q, k, v)), is_causal=True, enable_gqa=True)
    assert torch.allclose(ours.float(), theirs, atol=0.03)
    for a, b in zip(torch.autograd.grad(ours.float().square().sum(), (q, k, v)),
                    torch.autograd.grad(theirs.square().sum(), (q, k, v))):
        assert (a - b).norm() < 0.02 * b.norm()


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_the_causal_mask_is_added_and_changes_no_bit(dtype):
    """As a mask of booleans would; a backward pass through one reads it again."""
    torch.manual_seed(0)
    q, k = (torch.randn(2, 3, 40, 8, dtype=dtype, requires_grad=True) for _ in range(2))
    mask = torch.ones(40, 40, dtype=torch.bool).tril()
    ours, theirs = attention_matrix(q, k, None, True), attention_matrix(q, k, mask, False)
    up = torch.randn_like(ours)
    both = [(A, *torch.autograd.grad(A, (q, k), up, retain_graph=True)) for A in (ours, theirs)]
    assert all(torch.equal(a, b) for a, b in zip(*both))


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_attention_with_a_learned_mask_is_torchs(dtype):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 4, n, 16, dtype=dtype, requires_grad=True) for n in (20, 300, 300))
    bias = torch.randn(1, 4, 20, 300, requires_grad=True)
    mask = bias.masked_fill(torch.arange(300) > 250, -torch.inf)
    ours, theirs = (attend(q, k, v, mask, False, 0.0),
                    F.scaled_dot_product_attention(*(t.float() for t in (q, k, v)), attn_mask=mask))
    error = 1e-5 if dtype == torch.float32 else 0.02
    assert (ours.float() - theirs).norm() < error * theirs.norm()
    for a, b in zip(*(torch.autograd.grad(y.float().square().sum(), (q, k, v, bias), retain_graph=True)
                      for y in (ours, theirs))):
        assert (a - b).norm() < error * b.norm()
    with torch.no_grad():  # then the fused kernel takes it
        torch.testing.assert_close(attend(q, k, v, mask, False, 0.0), ours, rtol=0, atol=error)


# --- the recipe's parts ---

def test_a_value_mix_of_zero_is_no_value_residual():
    plain, x = tiny(zero_init=False), batch()[0]
    mixed = tiny(zero_init=False, value_residual=True)
    mixed.load_state_dict(plain.state_dict() | {'blocks.1.attn.v_mix': mixed.blocks[1].attn.v_mix})
    assert not torch.allclose(mixed(x), plain(x), atol=1e-3)  # half of the first layer's values
    mixed.blocks[1].attn.v_mix.data.zero_()
    assert torch.allclose(mixed(x), plain(x), atol=1e-6)


def test_value_residual_of_one_takes_the_first_layers_values():
    model, seen = tiny(value_residual=True, zero_init=False, n_kv_head=2), []
    model.blocks[1].attn.v_mix.data.fill_(1.0)
    for block in model.blocks:
        block.attn.v.register_forward_hook(lambda module, args, out: seen.append(out))
    x, y = batch()
    gradient = torch.autograd.grad(model(x, y), model.blocks[1].attn.v.weight)[0]
    assert len(seen) == 2 and gradient.abs().max() == 0  # the second layer's own values count for nothing


def test_the_norm_after_the_embedding_takes_its_scale_out():
    model, x = tiny(embed_norm=True, tie=False), batch()[0]
    torch.nn.init.normal_(model.head.weight)
    before = model(x)
    model.wte.weight.data *= 7
    assert torch.allclose(model(x), before, atol=1e-4)


def test_recomputed_activations_give_the_same_gradients_and_keep_less():
    model, (x, y) = tiny(zero_init=False, value_residual=True, dropout=0.1), batch()
    gradients, kept = [], []
    for model.recompute in (False, True):
        total = 0

        def count(t):
            nonlocal total
            total += t.numel()
            return t
        torch.manual_seed(0)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
            loss = model(x, y)
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
        kept.append(total)
    assert all(torch.equal(a, b) for a, b in zip(*gradients)) and kept[1] < kept[0] / 2


# --- loss ---

@pytest.mark.parametrize('softcap', [0.0, 15.0])
@pytest.mark.parametrize('smoothing', [0.0, 0.1])
def test_chunked_loss_and_its_gradients_equal_plain_cross_entropy(monkeypatch, softcap, smoothing):
    # 7 rows at a time, worked on by 2: the last chunk and the last block are parts
    monkeypatch.setattr('model.CHUNK', 128 * 7)
    monkeypatch.setattr('model.BLOCK', 128 * 2)
    model, (x, y) = tiny(softcap=softcap), batch()
    loss = model(x, y, label_smoothing=smoothing)
    ours = torch.autograd.grad(loss, list(model.parameters()))
    plain = F.cross_entropy(model(x).flatten(0, 1), y.flatten(), ignore_index=-1, label_smoothing=smoothing)
    theirs = torch.autograd.grad(plain, list(model.parameters()))
    assert abs(loss - plain) < 1e-5
    for (name, _), a, b in zip(model.named_parameters(), ours, theirs):
        assert torch.allclose(a, b, atol=2e-6, rtol=1e-4), name


def test_the_chunked_loss_multiplies_in_the_dtype_of_autocast():
    model, (x, y) = tiny(), batch()
    with torch.autocast('cpu', torch.bfloat16):
        ours, plain = model(x, y), F.cross_entropy(model(x).flatten(0, 1), y.flatten(), ignore_index=-1)
    # bfloat16 logits on both sides; float32 ones differ
    assert abs(ours - plain) < 1e-5 < abs(ours - model(x, y))


@pytest.mark.full
def test_the_compiled_loss_on_a_gpu_is_one_graph_and_the_same(monkeypatch):
    """
    torch.compile's version of the loss on CUDA, seen on a CPU: no graph break, the same loss and gradients.
    """
    model, (x, y) = tiny(softcap=15.0), batch()
    weights = list(model.parameters())

    def loss():
        h, weight = model.head_input(model.hidden(x))
        return ChunkedCrossEntropy.apply(h.flatten(0, 1), weight, y.flatten(), 100, 15.0, 0.0, True)
    eager = torch.autograd.grad(3 * loss(), weights)
    compiled_loss = 3 * torch.compile(loss, fullgraph=True, dynamic=False)()
    # once, as in training: torch may reuse what it saved
    compiled = torch.autograd.grad(compiled_loss, weights)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(eager, compiled))


@pytest.mark.parametrize('smoothing', [0.0, 0.1])
def test_the_compiled_loss_is_the_same_bit_for_bit_and_scatters_nothing(smoothing):
    torch.manual_seed(0)
    logits, targets, seen = torch.randn(40, 64), torch.randint(-1, 60, (40,)), []

    def look(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph
    arguments = (targets, 60, 0.0, smoothing, True)
    ours, compiled = logits.clone(), logits.clone()
    loss = loss_and_gradient(ours, *arguments)
    assert torch.equal(loss, torch.compile(loss_and_gradient, backend=look)(compiled, *arguments))
    assert torch.equal(ours, compiled) and not any('scatter' in name for name in seen) and seen


@pytest.mark.parametrize('function', ['ChunkedCrossEntropy', 'BigramLoss', 'FrozenLinear'])
def test_no_function_of_ours_changes_its_output_in_place(function):
    """
    A tensor's version counts operations in place. Compiled by torch 2.11, one of them makes every gradient
    zero.
    """
    x, y = torch.randn(48, 16, requires_grad=True), torch.randint(100, (48,))
    if function == 'ChunkedCrossEntropy':
        out = ChunkedCrossEntropy.apply(x, torch.randn(128, 16, requires_grad=True), y, 100, 0.0, 0.1, True)
    elif function == 'BigramLoss':
        out = BigramLoss.apply(torch.randn(100, 100, requires_grad=True), y, y, True)
    else:
        out = FrozenLinear.apply(x, torch.randn(8), torch.randn(8, 16), None, None)
    assert out.requires_grad and out._version == 0


def test_masked_targets_do_not_count_and_all_masked_is_no_loss():
    model, (x, y) = tiny(), batch(rows=1)
    assert torch.allclose(model(x, y), model(x[:, :22], y[:, :22]), atol=1e-6)  # the last 10 are masked
    assert model(x, torch.full_like(y, -1), reduction='sum') == 0


def test_the_first_loss_is_ln_v():
    torch.manual_seed(0)
    x, y = batch(rows=8, vocab_size=5000)
    untied = Transformer(ModelConfig(vocab_size=5000, block_size=32, n_layer=2, n_head=4, n_embd=32,
                                     tie=False))
    assert abs(untied(x, y).item() - math.log(5000)) < 1e-4  # a head of zeros
    tied = Transformer(ModelConfig(vocab_size=5000, block_size=32, n_layer=1, n_head=12, n_embd=768))
    assert abs(tied(x, y).item() / math.log(5000) - 1) < 0.01
    gpt2 = Transformer(ModelConfig(vocab_size=5000, block_size=32, n_layer=2, n_head=4,
                                   n_embd=32, tie=True, init_std=0.02, qk_norm=False,
                                   position='learned', norm='layernorm', mlp='gelu', zero_init=False))
    assert abs(gpt2(x, y).item() / math.log(5000) - 1) < 0.01


@pytest.mark.parametrize('variant', VARIANTS, ids=str)
def test_the_vocabularys_padding_changes_nothing(variant):
    """100 tokens live in 128 rows: whatever the padding holds, no logit, loss or gradient knows of it."""
    model, (x, y) = tiny(**variant), batch()
    logits, loss = model(x), model(x, y)
    loss.backward()
    padded = [model.wte.weight] + ([] if model.head is None else [model.head.weight])
    assert logits.size(-1) == 100 and all(len(w) == 128 and not w.grad[100:].any() for w in padded)
    for w in padded:
        w.data[100:] = 9.0
    assert torch.equal(model(x), logits) and torch.equal(model(x, y), loss)


# --- attention, positions ---

@pytest.mark.parametrize('variant', VARIANTS, ids=str)
def test_no_token_sees_a_later_one(variant):
    model, (x, _) = tiny(**variant), batch()
    changed = x.clone()
    changed[:, 20:] = (changed[:, 20:] + 1) % 100
    a, b = model(x), model(changed)
    assert (torch.allclose(a[:, :20], b[:, :20], atol=1e-5)
            and not torch.allclose(a[:, 20:], b[:, 20:], atol=1e-2))


@pytest.mark.parametrize('variant', VARIANTS, ids=str)
def test_the_kv_cache_gives_the_same_logits_in_pieces(variant):
    model, (x, _) = tiny(**variant).eval(), batch()
    cache, whole, pieces = KVCache(model, 32), model(x), []
    for i, j in [(0, 5), (5, 6), (6, 20), (20, 32)]:
        cache.extend(j - i)
        pieces.append(model(x[:, i:j], cache=cache))
    assert torch.allclose(whole, torch.cat(pieces, dim=1), atol=1e-5)
    kept = model.cfg.window or 32  # with a window, its tokens alone; keys are not repeated
    assert cache.buffers[0][0].shape == (3, model.cfg.kv_heads, kept, model.cfg.d_head)


def test_a_window_hides_the_tokens_before_it_and_no_others():
    for full_layers, reach in (([], 9), ([1], 32)):  # two blocks with a window of 5 see 4 tokens further each
        model, (x, _) = tiny(window=5, full_layers=full_layers), batch()
        a = model(x)[:, -1]
        for place in (31, 27, 23, 22, 0):
            changed = x.clone()
            changed[:, place] = (changed[:, place] + 1) % 100
            is_seen = 31 - place < reach
            assert torch.equal(model(changed)[:, -1], a) != is_seen


def test_packed_texts_with_a_window_are_those_texts_alone():
    model, (x, _) = tiny(window=5, full_layers=[1], window_theta=50.0), batch()
    pieces = (torch.arange(32) >= 12).long().expand(3, -1)
    packed = model.hidden(x, pieces=pieces)
    alone = torch.cat([model.hidden(x[:, :12]), model.hidden(x[:, 12:])], dim=1)
    assert torch.allclose(packed, alone, atol=1e-5)


def test_grouped_queries_equal_full_attention_with_repeated_heads():
    gqa, mha = tiny(n_kv_head=2), tiny()
    weights = gqa.state_dict()
    for name in list(weights):
        if name.endswith(('attn.k.weight', 'attn.v.weight')):
            weights[name] = weights[name].view(2, 8, 32).repeat_interleave(2, dim=0).reshape(32, 32)
    mha.load_state_dict(weights)
    x, _ = batch()
    assert torch.allclose(gqa(x), mha(x), atol=1e-5)


def test_rotary_positions_depend_on_distance_only():
    torch.manual_seed(0)
    q, k, table = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16), rotary_table(64, 16, 10000.0)

    def score(i, j):
        return (rotate(q, table[:, i:i + 1]) * rotate(k, table[:, j:j + 1])).sum()
    assert (torch.allclose(score(3, 1), score(40, 38), atol=1e-5)
            and not torch.allclose(score(3, 1), score(3, 2), atol=1e-3))
    assert torch.equal(rotate(q, table[:, :1]), q)  # position 0 is not turned


# --- low rank ---

def test_full_rank_with_spectral_init_is_the_dense_network():
    """Same seed, same draws: the products are the dense matrices, and so is the loss."""
    sizes = dict(vocab_size=100, block_size=32, n_layer=2, n_head=4, n_embd=32, zero_init=False,
                 qk_norm=False)
    dense, low = (Transformer(ModelConfig(**sizes)),
                  Transformer(ModelConfig(**sizes, rank_qk=32, rank_vo=32, rank_mlp=32)))
    for model in (dense, low):
        torch.manual_seed(0)
        model.init_weights()
    for a, b in zip(dense.blocks, low.blocks):
        for x, y in ((a.attn.q, b.attn.q), (a.attn.o, b.attn.o), (a.mlp.up, b.mlp.up),
                     (a.mlp.down, b.mlp.down)):
            assert torch.allclose(x.weight, y.up.weight @ y.down.weight, atol=1e-5)
    low.wte.weight = dense.wte.weight
    x, y = batch()
    assert torch.allclose(dense(x, y), low(x, y), atol=1e-5)


@pytest.mark.parametrize('rank', [8, 64, 256])
def test_factors_are_balanced_and_their_product_has_the_dense_norm_at_any_rank(rank):
    torch.manual_seed(0)
    model = Transformer(ModelConfig(vocab_size=100, block_size=8, n_layer=1, n_head=4, n_embd=256,
                                    rank_mlp=rank))
    layer = model.blocks[0].mlp.up
    product, dense_norm = layer.up.weight @ layer.down.weight, 256 ** -0.5 * (256 * 1024) ** 0.5
    assert abs(product.norm() / dense_norm - 1) < 0.05
    spectrum = torch.linalg.svdvals(product)
    assert rank == 256 or spectrum[rank] < 1e-4
    if rank == 256:  # the whole of a dense draw
        assert abs(spectrum[0] / (256 ** -0.5 * (256 ** 0.5 + 1024 ** 0.5)) - 1) < 0.1
    assert torch.allclose(layer.up.weight.norm(), layer.down.weight.norm())


def test_low_rank_spends_what_it_should():
    def spent(**settings):
        layer = linear(ModelConfig(n_embd=48, d_ff=96, n_head=4, bias=True, **settings), 0, 'mlp.up')
        return sum(p.numel() for p in layer.parameters())
    assert spent(rank_mlp=8) == 8 * (48 + 96) + 96


def test_the_most_particular_rank_counts():
    cfg = ModelConfig(n_layer=3, n_embd=64, n_head=4, rank_qk=8,
                      ranks={'attn.k': 4, 'blocks.2.attn.k': 0, 'blocks.0.mlp.up': 2})
    assert [cfg.rank(layer, 'attn.q') for layer in range(3)] == [8, 8, 8]
    assert [cfg.rank(layer, 'attn.k') for layer in range(3)] == [4, 4, 0]
    assert [cfg.rank(layer, 'mlp.up') for layer in range(3)] == [2, 0, 0]
    blocks = Transformer(ModelConfig(**vars(cfg) | {'vocab_size': 100})).blocks
    assert blocks[1].attn.k.down.weight.shape == (4, 64) and blocks[2].attn.k.weight.shape == (64, 64)


@pytest.mark.parametrize('act, latent', [('none', lambda z: z), ('silu', lambda z: z * z.sigmoid())])
def test_what_is_between_the_factors(act, latent):
    torch.manual_seed(0)
    layer, x = (linear(ModelConfig(n_embd=48, d_ff=48, n_head=4, rank_mlp=8, rank_act=act), 0, 'mlp.up'),
                torch.randn(3, 5, 48))
    assert torch.allclose(layer(x), latent(x @ layer.down.weight.T) @ layer.up.weight.T, atol=1e-4)


# --- everything trains; counts ---

@pytest.mark.parametrize('variant', VARIANTS, ids=str)
def test_every_parameter_gets_a_gradient_and_the_loss_falls(variant):
    model, (x, y) = tiny(**variant), batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    first = model(x, y)
    first.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
    for _ in range(20):
        optimizer.step()
        optimizer.zero_grad()
        loss = model(x, y)
        loss.backward()
    assert loss < first - 0.5


@pytest.mark.parametrize('variant', VARIANTS, ids=str)
def test_flops_are_those_that_torch_counts(variant):
    model, (x, y) = tiny(**variant), batch(masked=0)
    # it does not know the CPU's flash kernel
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        F.cross_entropy(F.linear(*model.head_input(model.hidden(x))).flatten(0, 1), y.flatten()).backward()
    assert abs(counter.get_total_flops() / (x.numel() * model.flops_per_token()) - 1) < 0.02


@pytest.mark.parametrize('settings, words', [
    (dict(n_embd=30), 'n_embd=30 is not divisible by n_head=4'), (dict(n_kv_head=3), 'n_kv_head=3'),
    (dict(n_layer=0), 'n_layer=0'), (dict(rank_qk=33), 'rank_qk=33 is larger'),
    (dict(rank_qk=17, n_kv_head=2), 'rank_qk=17 is larger'), (dict(rank_mlp=-1), 'rank_mlp=-1'),
    (dict(rank_head=8), 'rank_head=8 differs'), (dict(vocab_size=0), 'vocab_size=0'),
    (dict(rope_dim=3), 'rope_dim=3: takes an even'), (dict(rope_dim=10), 'rope_dim=10: takes an even'),
    (dict(rope_dim=4, position='learned'), "rope_dim=4: needs position='rope'"),
    (dict(full_layers=[0]), 'full_layers=.*set window'), (dict(window=-1), 'window=-1'),
    (dict(window=4, full_layers=[2]), 'full_layers=.*takes blocks from 0 to 1'),
    (dict(window_theta=9.0), 'window_theta=9.0: is about blocks with a window'),
    (dict(window=4, position='relative'), "position='relative': has no window"),
    (dict(post_norm='both', depth_scale='norm'), "depth_scale='norm'"),
    (dict(head_dim=7), 'head_dim=7 is odd'), (dict(ranks={'attn.x': 3}), "'attn.x' is not a matrix"),
    (dict(ranks={'blocks.2.attn.q': 3}), "'blocks.2.attn.q' is not a matrix"),
    (dict(ranks={'attn.q': 40}), 'attn.q=40 is larger'),
    (dict(ranks={'attn.q': 2.5}), 'attn.q=2.5: takes a whole'),
    (dict(ranks={'mlp.gate': 4}), "'mlp.gate' is not a matrix"),
    (dict(ranks={'blocks.01.attn.q': 3}), 'is not a matrix'),
    (dict(ranks={1: 4}), '1 is not a matrix'), (dict(arch='markov', rank_embed=-3), 'rank_embed=-3'),
    (dict(dropout=1.0), 'dropout'),
])
def test_impossible_sizes_are_refused_by_name(settings, words):
    with pytest.raises(ValueError, match=words):
        tiny(**settings)


def test_a_hostile_number_of_layers_is_checked_at_once():
    ModelConfig(n_layer=10 ** 18, rank_qk=8, ranks={'blocks.1.attn.q': 0}).check()


@pytest.mark.parametrize('name', [f.name for f in fields(ModelConfig)
                                  if any(get_origin(kind) is Literal for kind in options(f.type))])
def test_a_choice_without_code_does_not_work_as_another_one(name):
    with pytest.raises(ValueError, match=f'^{name}=new: this choice has no code in model.py$'):
        make_model(build(ModelConfig, **{'vocab_size': 64, 'n_layer': 1, 'n_embd': 32, 'n_head': 2,
                                         'n_encoder_layer': int(name in READ), 'rank_qk': 8, name: 'new'}))


def test_a_copy_of_model_py_trains_a_decoder_where_nothing_else_is(tmp_path):
    shutil.copy(ROOT / 'model.py', tmp_path)
    code = """if True:
        import sys
        import torch
        from model import ModelConfig, make_model
        model = make_model(ModelConfig(vocab_size=64, block_size=8, n_layer=2, n_head=2, n_embd=16))
        x = torch.randint(64, (2, 8))
        model(x, x).backward()
        print(sorted({name.split('.')[0] for name in sys.modules} & {'features', 'configurator'}))"""
    done = run('-c', code, cwd=tmp_path, env={'PYTHONPATH': ''})
    assert done.stdout == '[]\n', done.stderr


def test_more_tokens_than_the_context_are_refused():
    with pytest.raises(ValueError, match='block_size=32'):
        tiny()(torch.zeros(1, 33, dtype=torch.long))
