"""
Mixtures of experts: the outputs are those of a loop over tokens and of transformers' Mixtral, the router
learns from the language alone, its losses have their closed forms, no token is dropped, padding counts for
nothing, and an upcycled network starts with the function of the dense one.
"""
import json
import math

import pytest
import torch
from conftest import one_line, read_log, run, train
from test_model import batch, tiny
from test_surgery import ids, operate, random_model
from test_t5 import OURS
from torch.utils.flop_counter import FlopCounterMode
from transformers import MixtralConfig, Qwen2MoeConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock
from transformers.models.switch_transformers.modeling_switch_transformers import (
    load_balancing_loss_func,
    router_z_loss_func,
)

import checkpoint
from configurator import UserError, read_config
from features import build, part_of
from features.lora.packed import pack
from features.moe.experts import in_use
from features.moe.network import Mixture
from features.moe.upcycle import upcycle
from features.networks import fill
from model import MLP, ModelConfig, make_model, only_in_training
from optim import OptimConfig, make_optimizer
from train import Settings

KINDS = [dict(), dict(n_expert_active=2, mlp='swiglu'),
         dict(expert_bias=0.01, n_expert_active=3), dict(bias=True, mlp='gelu'),
         dict(expert_width=24, mlp_norm=True),
         dict(expert_renorm=False, n_expert_active=3, shared_width=48, shared_gate=True, mlp='geglu'),
         dict(shared_width=40, expert_width=16, n_expert_active=2, bias=True),
         dict(n_embd=36, mlp_norm=True)]


def mixture(scale=1.0, **settings):
    """A random Mixture of 8 experts, the router `scale` times the size of one that tells them apart well."""
    torch.manual_seed(0)
    layer = Mixture(build(ModelConfig, **dict(n_embd=32, n_head=4, n_expert=8) | settings), 0, MLP)
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.3)
    layer.router.data *= scale
    if layer.expert_bias is not None:
        layer.expert_bias.normal_(std=0.05)
    return layer


def token_by_token(layer, x):
    """What a Mixture makes of x (B, T, C), by a loop over tokens and experts."""
    cfg, out = layer.cfg, torch.zeros_like(x)
    for b, t in torch.cartesian_prod(*map(torch.arange, x.shape[:2])).tolist():
        h = x[b, t]
        p = (layer.router @ h).softmax(0)
        chosen = (p if layer.expert_bias is None
                  else p + layer.expert_bias).argsort(descending=True)[:cfg.n_expert_active]
        for e in chosen:
            def linear(name, h):
                part = getattr(layer.experts, name)
                return part.weight[e] @ h + (0 if part.bias is None else part.bias[e])
            inner = linear('up', h)
            inner = (layer.experts.act(linear('gate', h)) * inner if layer.experts.gate is not None
                     else layer.experts.act(inner))
            renorm = cfg.n_expert_active > 1 if cfg.expert_renorm is None else cfg.expert_renorm
            share = p[e] / p[chosen].sum() if renorm else p[e]
            out[b, t] += share * linear('down', layer.experts.norm(inner))
        if cfg.shared_width:
            gate = (layer.shared_router[0] @ h).sigmoid() if cfg.shared_gate else 1
            out[b, t] += gate * layer.shared(h)
    return out


# --- settings ---

def test_the_settings_of_experts_are_there_where_experts_are():
    s = build(Settings, n_expert=4, expert_aux=0.5, vocab_size=64)
    assert part_of(s, ModelConfig) == build(ModelConfig, n_expert=4, expert_aux=0.5, vocab_size=64)
    dense = build(ModelConfig, n_layer=2)
    assert not hasattr(dense, 'expert_aux') and dense == ModelConfig(n_layer=2)
    assert {*only_in_training(part_of(s, ModelConfig))} == {'dropout', 'expert_aux', 'expert_z'}


# --- the layer ---

@pytest.mark.parametrize('settings', KINDS, ids=str)
def test_a_mixture_is_a_loop_over_tokens(settings):
    layer = mixture(**settings)
    x = torch.randn(3, 11, layer.cfg.n_embd, requires_grad=True)
    out, wanted = layer(x)[0], token_by_token(layer, x)
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)
    inputs = [x, *layer.parameters()]
    for got, want in zip(torch.autograd.grad(out.square().sum(), inputs),
                         torch.autograd.grad(wanted.square().sum(), inputs)):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * want.abs().max().item())


@pytest.mark.parametrize('settings', KINDS[:-1], ids=str)  # the last one's rows are no multiple of 16 bytes
def test_grouped_products_in_bfloat16_are_those_one_by_one(settings, monkeypatch):
    layer, x = mixture(**settings), torch.randn(4, 50, 32)

    def both():
        with torch.autocast('cpu', torch.bfloat16):
            out = layer(x)[0]
        return out, *torch.autograd.grad(out.float().square().mean(), layer.parameters())
    calls, grouped = [], torch.nn.functional.grouped_mm
    monkeypatch.setattr(torch.nn.functional, 'grouped_mm',
                        lambda *args, **kwargs: calls.append(0) or grouped(*args, **kwargs))
    ours = both()
    assert calls
    monkeypatch.setattr(torch.nn.functional, 'grouped_mm', lambda x, w, offs: torch.cat(
        [rows @ m for rows, m in zip(x.split(offs.diff(prepend=offs.new_zeros(1)).tolist()), w)]))
    for got, want in zip(ours, both()):
        torch.testing.assert_close(got.float(), want.float(), rtol=0.02, atol=0.01 * want.abs().max().item())


def test_two_active_experts_are_mixtrals():
    layer = mixture(n_expert_active=2, mlp='swiglu', d_ff=48)
    theirs = MixtralSparseMoeBlock(MixtralConfig(hidden_size=32, intermediate_size=48, num_local_experts=8,
                                                 num_experts_per_tok=2)).eval()
    theirs.gate.weight.data = layer.router.data
    theirs.experts.gate_up_proj.data = torch.cat([layer.experts.gate.weight, layer.experts.up.weight], 1).data
    theirs.experts.down_proj.data = layer.experts.down.weight.data
    x = torch.randn(2, 30, 32)
    torch.testing.assert_close(layer(x)[0], theirs(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('renorm, active', [(False, 3), (True, 3), (False, 1), (True, 1)])
def test_experts_beside_a_shared_one_are_qwens(renorm, active):
    layer = mixture(n_expert_active=active, mlp='swiglu', d_ff=96, expert_width=16, shared_width=40,
                    shared_gate=True, expert_renorm=renorm)
    theirs = Qwen2MoeSparseMoeBlock(Qwen2MoeConfig(
        hidden_size=32, moe_intermediate_size=16, shared_expert_intermediate_size=40, num_experts=8,
        num_experts_per_tok=active, norm_topk_prob=renorm)).eval()
    theirs.gate.weight.data = layer.router.data
    theirs.experts.gate_up_proj.data = torch.cat([layer.experts.gate.weight, layer.experts.up.weight], 1).data
    theirs.experts.down_proj.data = layer.experts.down.weight.data
    theirs.shared_expert_gate.weight.data = layer.shared_router.data
    for name in ('gate', 'up', 'down'):
        getattr(theirs.shared_expert, f'{name}_proj').weight.data = getattr(layer.shared, name).weight.data
    x = torch.randn(2, 30, 32)
    torch.testing.assert_close(layer(x)[0], theirs(x), rtol=1e-5, atol=1e-5)


def test_dense_layers_have_one_mlp_and_no_router():
    model, (x, y) = tiny(n_layer=3, n_expert=4, dense_layers=[1], d_ff=96, expert_width=24), batch()
    widths = [block.mlp.experts.up.weight.size(1) if isinstance(block.mlp, Mixture)
              else block.mlp.up.out_features for block in model.blocks]
    assert widths == [24, 96, 24]
    model(x, y).backward()
    assert model.take_loads().sum(1).tolist() == [86, 86]  # of the blocks 0 and 2
    dense = tiny(n_layer=3, n_expert=4, dense_layers=[0, 1], expert_width=24)
    same = fill(dense.cfg, dense.state_dict(), 'test')
    assert torch.equal(same(x), dense.eval()(x))
    coder = tiny(**OURS, n_expert=4, dense_layers=[0])
    blocks = [*coder.encoder, *coder.blocks]
    assert [isinstance(block.mlp, Mixture) for block in blocks] == [False, True, True, False, True]


def test_no_token_is_dropped_when_all_want_the_same_expert():
    layer, x = mixture(), torch.rand(2, 30, 32) + 0.1
    layer.router.data = torch.zeros(8, 32)
    layer.router.data[3] = 1.0
    out, routing = layer(x)
    assert routing.load.tolist() == [0, 0, 0, 60, 0, 0, 0, 0] and out.abs().sum(-1).min() > 0
    torch.testing.assert_close(out, token_by_token(layer, x), rtol=1e-5, atol=1e-5)


def test_the_router_works_in_float32_under_autocast():
    layer, x = mixture(), torch.randn(64, 50, 32)
    with torch.autocast('cpu', torch.bfloat16):
        loads = layer(x)[1].load
        rounded = (x.flatten(0, 1) @ layer.router.T).argmax(1).bincount(minlength=8)
    exact = (x.flatten(0, 1) @ layer.router.T).argmax(1).bincount(minlength=8)
    assert torch.equal(loads, exact) and not torch.equal(loads, rounded)


# --- what the router learns ---

@pytest.mark.parametrize('active', [1, 2])
def test_the_language_alone_teaches_the_router(active):
    model, (x, y) = tiny(n_expert=8, n_expert_active=active, expert_aux=0.0, expert_z=0.0), batch()
    model(x, y).backward()
    for layer in model.mixtures():
        per_weight = layer.router.grad.norm() / layer.router.numel() ** 0.5
        others = layer.experts.up.weight.grad.norm() / layer.experts.up.weight.numel() ** 0.5
        assert per_weight > 0.1 * others > 0  # with a share of 1, as ROT5 had it, it would be zero


def losses(layer, x, real=None, aux=1.0, z=0.0):
    layer.cfg.expert_aux, layer.cfg.expert_z = aux, z
    return layer(x, real)[1].loss.item()


def test_losses_at_balance_and_at_uniform_logits():
    layer = mixture()
    layer.router.data = torch.eye(8, 32) * 20
    x = torch.eye(8, 32)[None]  # token n wants expert n, and nothing else
    assert losses(layer, x, aux=0.01) == pytest.approx(0.01, rel=1e-5)
    assert losses(layer, x[:, :1], aux=0.01) == pytest.approx(0.08, rel=1e-5)  # all to one of 8
    layer.router.data.zero_()
    assert (losses(layer, x, aux=0.01) == pytest.approx(0.01, rel=1e-5)
            and losses(layer, x, aux=0, z=1.0) == pytest.approx(math.log(8) ** 2, rel=1e-5))
    three = mixture(n_expert_active=3)
    three.router.data.zero_()
    assert losses(three, x) == pytest.approx(1, rel=1e-5)


def test_losses_are_those_of_switch_transformers():
    layer, x = mixture(), torch.randn(1, 200, 32)
    logits = x @ layer.router.T
    p = logits.softmax(-1)
    assert losses(layer, x) == pytest.approx(load_balancing_loss_func(p, p.argmax(-1)).item(), rel=1e-4)
    assert losses(layer, x, aux=0, z=1.0) == pytest.approx(router_z_loss_func(logits).item(), rel=1e-4)


def test_padding_counts_for_nothing():
    layer, x = mixture(), torch.randn(2, 20, 32)
    real = torch.arange(20) < torch.tensor([[20], [5]])
    alone = layer(x[real][None])[1]
    with_padding = layer(x, real)[1]
    assert (torch.equal(alone.load, with_padding.load)
            and with_padding.loss.item() == pytest.approx(alone.loss.item(), rel=1e-5))
    assert layer(x, torch.zeros(2, 20, dtype=torch.bool))[1].loss.item() == 0
    model, (x, y) = tiny(n_expert=4), batch(masked=0)
    y[:, 24:] = -1  # after the last target
    y[:, :6] = -1  # a prompt, which is read
    model(x, y)
    assert model.take_loads().sum(1).tolist() == [3 * 24] * 2
    coder = tiny(**OURS, n_expert=4)
    source = torch.where(torch.arange(32) < torch.tensor([[32], [9], [1]]), x, -1)
    coder(x, y, source=source)
    assert coder.take_loads().sum(1).tolist() == [42] * 3 + [3 * 24] * 2  # the encoder's layers first


def test_the_loss_stays_nats_and_the_routers_learn_the_rest():
    x, y = batch()
    plain, asked = (tiny(n_expert=4, expert_aux=0.0, expert_z=0.0),
                    tiny(n_expert=4, expert_aux=0.5, expert_z=0.1))
    for reduction, scale in (('mean', 1), ('sum', (y >= 0).sum().item())):
        losses, routings = [model(x, y, reduction=reduction) for model in (plain, asked)], []
        assert torch.equal(*losses)
        gradients = [torch.autograd.grad(loss, model.mixtures()[0].router)[0]
                     for loss, model in zip(losses, (plain, asked))]
        asked.real, asked.routings = (y >= 0).flip(1).cumsum(1).flip(1) > 0, routings
        asked.hidden(x)
        extra = torch.autograd.grad(sum(r.loss for r in routings), asked.mixtures()[0].router)[0]
        torch.testing.assert_close(gradients[1] - gradients[0], scale * extra, rtol=1e-3,
                                   atol=1e-3 * scale * extra.abs().max().item())
    asked.take_loads()
    asked.eval()(x, y)
    assert not asked.take_loads().any()  # an evaluation counts nothing


def test_recomputing_the_blocks_changes_nothing():
    x, y = batch()
    models = [tiny(n_expert=4, n_expert_active=2) for _ in range(2)]
    models[1].recompute = True
    for model in models:
        model(x, y).backward()
    for a, b in zip(*(model.parameters() for model in models)):
        torch.testing.assert_close(a.grad, b.grad)
    assert torch.equal(*(model.take_loads() for model in models))


def test_a_bias_balances_what_a_loss_does_not():
    torch.manual_seed(0)
    model, x = tiny(n_expert=4, expert_bias=0.005, expert_aux=0.0, expert_z=0.0), torch.randint(100, (8, 32))
    for layer in model.mixtures():
        layer.router.data[0] += 0.3 * torch.randn(32)  # some experts are asked for more than others
    spread = []
    for _ in range(200):
        model(x, x)
        loads = model.take_loads()
        spread.append((loads.max() / loads.float().mean()).item())
        model.balance(loads)
    assert spread[0] > 1.6 and spread[-1] < 1.25, (spread[0], spread[-1])


# --- beside the rest ---

@pytest.mark.parametrize('settings, layers, matrices', [(dict(), 2, 2 * 128), (dict(mlp='swiglu'), 2, 3 * 96),
                                                        (dict(n_encoder_layer=3), 5, 2 * 128)], ids=str)
def test_flops_and_active_parameters_count_the_experts_that_work(settings, layers, matrices):
    dense, one, two = (tiny(**settings, **kind)
                       for kind in (dict(), dict(n_expert=8), dict(n_expert=8, n_expert_active=2)))
    # of all layers; an encoder reads as many tokens here as a decoder
    mlp, router = layers * matrices * 32, layers * 8 * 32
    biased = tiny(n_expert=8, bias=True)  # added, not multiplied
    assert (biased.flops_per_token() == tiny(n_expert=8).flops_per_token()
            and biased.num_params(active=True) < biased.num_params())
    assert one.num_params() - dense.num_params() == 7 * mlp + router == two.num_params() - dense.num_params()
    assert (one.num_params(active=True) - dense.num_params() == router
            and two.num_params(active=True) - dense.num_params() == mlp + router)
    assert (one.flops_per_token() - dense.flops_per_token() == 6 * router
            and two.flops_per_token() - one.flops_per_token() == 6 * mlp)


def test_a_shared_expert_counts_whole_and_experts_by_their_own_width():
    own = dict(n_layer=3, mlp='swiglu', n_expert=8, expert_width=16, dense_layers=[0])
    few, more = tiny(**own), tiny(**own, n_expert_active=3)
    shared = tiny(**own, shared_width=40, shared_gate=True)
    assert few.num_params() == (tiny(n_layer=3, mlp='swiglu').num_params() - 2 * 3 * 96 * 32
                                + 2 * 8 * (3 * 16 + 1) * 32)
    experts = 2 * 3 * 16 * 32
    assert few.num_params() - few.num_params(active=True) == 7 * experts
    assert more.num_params(active=True) - few.num_params(active=True) == 2 * experts
    beside = 2 * (3 * 40 + 1) * 32
    for active in (False, True):
        assert shared.num_params(active) - few.num_params(active) == beside
    assert shared.flops_per_token() - few.flops_per_token() == 6 * beside
    assert more.flops_per_token() - few.flops_per_token() == 6 * 2 * experts


def test_flops_are_those_that_torch_counts():
    model = tiny(n_layer=3, n_expert=8, n_expert_active=3, expert_width=16, dense_layers=[1], shared_width=40,
                 shared_gate=True, position='none').eval().requires_grad_(False)
    x, _ = batch()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    attention = 4 * 3 * 32 * 32  # torch does not count its kernel on a CPU
    assert counter.get_total_flops() / x.numel() == model.flops_per_token() - attention


def test_rot5s_mixture_has_its_parameters():
    s = build(Settings, **read_config(Settings, 'config/rot5_moe.py') | {'vocab_size': 32502})
    with torch.device('meta'):
        model = make_model(part_of(s, ModelConfig))
    assert model.num_params() == 987_749_376 and 194_000_000 < model.num_params(active=True) < 196_000_000


def test_muon_takes_the_experts_and_not_the_router():
    model = tiny(n_expert=4, bias=True, shared_width=48, shared_gate=True)
    optimizer = make_optimizer(model, OptimConfig(optimizer='muon', weight_decay=0.1))
    groups = {name: group for group in optimizer.param_groups for name in group['param_names']}
    assert groups['blocks.0.mlp.experts.up.weight']['muon'] and not groups['blocks.0.mlp.router']['muon']
    assert groups['blocks.0.mlp.shared.up.weight']['muon']
    assert not groups['blocks.0.mlp.shared_router']['muon']
    assert (not groups['blocks.0.mlp.experts.up.bias']['muon']
            and not groups['blocks.0.mlp.experts.up.bias']['weight_decay'])
    adamw = {name: group for group in make_optimizer(model, OptimConfig(weight_decay=0.1, scalar_lr=0.5))
             .param_groups for name in group['param_names']}
    assert (not adamw['blocks.0.mlp.experts.up.bias']['weight_decay']
            and adamw['blocks.0.mlp.experts.up.bias']['peak'] == 0.5)
    assert (adamw['blocks.0.mlp.experts.up.weight']['weight_decay']
            and adamw['blocks.0.mlp.router']['peak'] != 0.5)


@pytest.mark.parametrize('options, error', [(dict(dtype='float32'), 1e-5), (dict(dtype='bfloat16'), 0.03),
                                            (dict(dtype='float32', kind='int8'), 0.05)], ids=str)
def test_packed_for_decoding_it_is_as_good_as_the_same(options, error):
    model, (x, _) = tiny(n_expert=4).eval(), batch()
    before = model(x)
    off = (pack(model, **options)(x) - before).abs().amax(-1) / before.abs().max()  # (B, T)
    # a token between two experts may change its mind, and what follows with it
    assert off.quantile(0.8) < error
    assert model.blocks[0].mlp.experts.up.weight.dtype == getattr(torch, options['dtype'])


@pytest.mark.parametrize('settings', [dict(), dict(mlp='swiglu', bias=True, norm='layernorm'),
                                      dict(value_residual=True, mlp_norm=True)], ids=str)
@pytest.mark.parametrize('options', [dict(), dict(n_expert_active=2),
                                     dict(n_expert=3, expert_bias=0.1)], ids=str)
def test_an_upcycled_network_has_the_same_function(settings, options):
    old = random_model(**settings)
    cfg, weights = upcycle(old.cfg, old.state_dict(), **dict(n_expert=8) | options)
    new = fill(cfg, weights, 'test')
    torch.testing.assert_close(new(ids()), old(ids()), rtol=0, atol=1e-4 * old(ids()).abs().max().item())
    new.train()(ids(), ids()).backward()
    assert (new.take_loads() > 0).sum() > 1.5 * cfg.n_layer  # it is not one expert that gets everything
    with pytest.raises(UserError, match='is a mixture of experts already'):
        upcycle(cfg, weights, 4)


@pytest.mark.parametrize('settings, words', [
    (dict(n_expert=1), 'n_expert=1: takes 0'), (dict(n_expert=-1), 'n_expert=-1'),
    (dict(n_expert=4, n_expert_active=5), 'n_expert_active=5: takes 1 to n_expert=4'),
    (dict(n_expert=4, n_expert_active=0), 'n_expert_active=0'),
    (dict(n_expert=4, rank_mlp=8), 'experts are dense'),
    (dict(n_expert=4, ranks={'blocks.1.mlp.up': 8}), 'experts are dense'),
    (dict(n_expert=4, expert_width=-1), 'expert_width=-1'), (dict(n_expert=4, shared_width=-1), 'shared_wid'),
    (dict(n_expert=4, shared_gate=True), 'shared_gate=True: scales .* set shared_width too'),
    (dict(n_expert=4, dense_layers=[2]), r'dense_layers=\[2\]: takes some of the blocks 0 to 1'),
    (dict(n_expert=4, dense_layers=[0, 1]), 'not all of them'),
    (dict(n_expert=4, expert_aux=-1.0), 'expert_aux=-1.0'), (dict(arch='markov', n_expert=4), 'n_expert=4')])
def test_impossible_mixtures_are_refused_by_name(settings, words):
    with pytest.raises(ValueError, match=words):
        tiny(**settings)


# --- on the command line ---

MIXTURE = ['--n_expert=4', '--n_expert_active=2', '--expert_bias=0.01', '--dropout=0.1']
SHARED = ['--n_expert=4', '--expert_width=16', '--expert_renorm=True', '--n_expert_active=2',
          '--shared_width=24', '--shared_gate=True', '--dense_layers=[0]']


def test_a_run_logs_its_loads_resumes_exactly_and_draws_them(dataset, tmp_path):
    whole = train(tmp_path / 'whole', *MIXTURE, dataset=dataset)
    assert '4 experts' in whole.stdout and '| experts ' in whole.stdout
    loads = [r['expert_load'] for r in read_log(tmp_path / 'whole') if 'expert_load' in r]
    assert (len(loads) == 10
            and all(sum(layer) == pytest.approx(1, abs=1e-3) for step in loads for layer in step))
    for iters in (5, 10):
        train(tmp_path / 'parts', *MIXTURE, f'--max_iters={iters}', '--lr_decay_iters=10', '--warmup_iters=0',
              dataset=dataset)
    train(tmp_path / 'once', *MIXTURE, '--max_iters=10', '--lr_decay_iters=10', '--warmup_iters=0',
          dataset=dataset)
    parts, once = (checkpoint.read_weights(checkpoint.find(str(tmp_path / out), 'last'))
                   for out in ('parts', 'once'))
    assert (all(torch.equal(parts[name], once[name]) for name in once)
            and parts['blocks.0.mlp.expert_bias'].any())
    assert read_log(tmp_path / 'parts')[-1] == read_log(tmp_path / 'once')[-1]
    drawn = run('analyze.py', 'experts', f'--out_dir={tmp_path}/whole', f'--csv={tmp_path}/loads.csv',
                f'--picture={tmp_path}/loads.png')
    assert drawn.returncode == 0 and '4 experts' in drawn.stdout, drawn.stderr
    assert (len((tmp_path / 'loads.csv').read_text().splitlines()) == 1 + 10 * 2 * 4
            and (tmp_path / 'loads.png').stat().st_size > 5000)


def test_two_ranks_are_one_rank_with_two_micro_batches(dataset, tmp_path):
    """Losses, gradients, loads and biases: what the routers learn beside the language too."""
    args = [*SHARED, '--expert_bias=0.01', '--expert_aux=5', '--expert_z=1', '--max_iters=5',
            '--batch_size=2', '--gradient_accumulation_steps=2']
    for nproc in (1, 2):
        train(tmp_path / str(nproc), *args, dataset=dataset, nproc=nproc)
    one, two = ([r for r in read_log(tmp_path / nproc) if 'train_loss' in r] for nproc in '12')
    assert one == two and len(one) == 5 and all(r['expert_load'] for r in one)
    one, two = (checkpoint.read_weights(checkpoint.find(str(tmp_path / nproc))) for nproc in '12')
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_shared_expert_and_dense_layers_are_trained_by_muon_and_inherited(dataset, tmp_path):
    train(tmp_path / 'run', *SHARED, '--n_layer=3', '--optimizer=muon', dataset=dataset)
    loads = [r['expert_load'] for r in read_log(tmp_path / 'run') if 'expert_load' in r]
    assert {len(step) for step in loads} == {2}  # the first block has one MLP
    operate('inherit', tmp_path / 'run', tmp_path / 'part', '--layers=2,0')
    state = checkpoint.load_state(checkpoint.find(str(tmp_path / 'part')))
    assert state['model']['dense_layers'] == [1] and state['model']['shared_width'] == 24
    refused = {
        ('surgery.py', 'inherit', f'--from={tmp_path}/run', '--layers=0'): 'blocks [0] alone have no experts',
        ('surgery.py', 'widen', f'--from={tmp_path}/run', '--n_embd=64'): 'n_expert=4: a network with it',
    }
    for command, words in refused.items():
        assert words in one_line(run(*command, f'--out_dir={tmp_path}/no')) and not (tmp_path / 'no').exists()
    grown = train(tmp_path / 'no', *SHARED, '--grow_every=1', '--grow_to=4', dataset=dataset, check=False)
    assert 'dense_layers=[0]: a network with it cannot be grown while it trains' in one_line(grown)
    operate('factorize', tmp_path / 'run', tmp_path / 'cut', '--energy=0.5')
    ranks = checkpoint.load_state(checkpoint.find(str(tmp_path / 'cut')))['model']['ranks']
    assert ranks and all('.attn.' in name for name in ranks)


def test_upcycling_a_run_and_going_on(dataset, tmp_path):
    train(tmp_path / 'dense', dataset=dataset)
    out, loss = operate('upcycle', tmp_path / 'dense', tmp_path / 'moe', '--n_expert=4')
    before = [r['val_loss'] for r in read_log(tmp_path / 'dense') if 'val_loss' in r]
    assert loss == pytest.approx(min(before), abs=1e-3), out
    done = train(tmp_path / 'tuned', f'--init_from={tmp_path}/moe', '--expert_aux=0.02', dataset=dataset)
    assert '4 experts' in done.stdout
    assert json.loads((tmp_path / 'tuned' / 'settings.json').read_text())['expert_aux'] == 0.02
    again = run('surgery.py', 'upcycle', f'--from={tmp_path}/moe', f'--out_dir={tmp_path}/again')
    assert 'is a mixture of experts already' in one_line(again)
    assert 'no expert_load' in one_line(run('analyze.py', 'experts', f'--out_dir={tmp_path}/dense'))


def test_growing_in_the_middle_of_a_log_interval(dataset, tmp_path):
    train(tmp_path / 'run', '--n_expert=4', '--grow_every=3', '--grow_to=4', '--grow_by=1',
          '--log_interval=4', '--max_iters=12', dataset=dataset)
    loads = [r['expert_load'] for r in read_log(tmp_path / 'run') if 'expert_load' in r]
    assert ([len(step) for step in loads] == [2, 3, 4, 4]
            and all(sum(layer) == pytest.approx(1, abs=1e-3) for step in loads for layer in step))
    drawn = run('analyze.py', 'experts', f'--out_dir={tmp_path}/run', '--picture=')
    assert (drawn.returncode == 0 and 'tokens of steps 9 to 12' in drawn.stdout
            and len(drawn.stdout.splitlines()) == 3 + 4), drawn.stdout + drawn.stderr


def test_a_mixtures_settings_may_be_said_again_and_its_attention_factored(dataset, tmp_path):
    own = ['--n_expert=4', '--n_expert_active=2', '--expert_bias=0.01']
    train(tmp_path / 'moe', *own, dataset=dataset)
    train(tmp_path / 'on', f'--init_from={tmp_path}/moe', *own[1:2], '--expert_bias=0.001', '--max_iters=1',
          dataset=dataset)
    refused = train(tmp_path / 'no', '--expert_aux=0.5', dataset=dataset, check=False)
    assert ('expert_aux=0.5: belongs to a mixture of experts' in one_line(refused)
            and not (tmp_path / 'no').exists())
    operate('factorize', tmp_path / 'moe', tmp_path / 'cut', '--energy=0.5')
    assert 'n_expert=4: a network with it cannot be widened' in one_line(
        run('surgery.py', 'widen', f'--from={tmp_path}/moe', f'--out_dir={tmp_path}/w', '--n_embd=64'))
    assert 'expert_bias=0.01' in one_line(run('hub.py', 'export', f'--out_dir={tmp_path}/moe',
                                        f'--to={tmp_path}/hf'))
    assert 'n_expert=0' in one_line(run('surgery.py', 'upcycle', f'--from={tmp_path}/moe',
                                        f'--out_dir={tmp_path}/u', '--n_expert=0'))
    assert not any((tmp_path / name).exists() for name in ('w', 'hf', 'u'))


def test_experts_in_use():
    assert (in_use(torch.full((8,), 1 / 8)).item() == pytest.approx(8)
            and in_use(torch.tensor([1.0, 0, 0])).item() == 1)
