"""The learning rate's schedules against their formulas; which parameters decay."""
import glob
import math
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from configurator import UserError, read_config
from features import build
from features.growth.during import short_growth
from model import ModelConfig, Transformer
from optim import (
    OptimConfig,
    learning_rate,
    make_optimizer,
    optimizer_flops,
    orthogonalize,
    set_rates,
    short_warmup,
)
from run import report
from train import Settings, not_finite


def test_cosine_is_nanogpts():
    cfg = OptimConfig(learning_rate=6e-4, min_lr=6e-5, warmup_iters=2000, lr_decay_iters=600000,
                      max_iters=600000)
    assert learning_rate(0, cfg) == 6e-4 / 2001 and learning_rate(1999, cfg) == 6e-4 * 2000 / 2001
    assert (learning_rate(2000, cfg) == 6e-4 and math.isclose(learning_rate(301000, cfg), (6e-4 + 6e-5) / 2)
            and learning_rate(600000, cfg) == 6e-5)


def test_linear_and_wsd():
    linear = OptimConfig(learning_rate=1.0, min_lr=0.0, warmup_iters=0, max_iters=100, schedule='linear')
    assert [learning_rate(i, linear) for i in (0, 25, 100)] == [1.0, 0.75, 0.0]
    wsd = OptimConfig(learning_rate=1.0, min_lr=0.0, warmup_iters=10, max_iters=100, schedule='wsd',
                      cooldown=0.5)
    assert [learning_rate(i, wsd) for i in (10, 49, 50, 75, 100)] == [1.0, 1.0, 1.0, 0.5, 0.0]


def test_defaults_follow_the_length_of_the_run():
    cfg = OptimConfig(learning_rate=1e-3, max_iters=1000)
    assert (learning_rate(49, cfg) < learning_rate(50, cfg) == 1e-3
            and math.isclose(learning_rate(1000, cfg), 1e-4))


def test_without_decay_the_rate_is_constant_from_step_0_unless_a_warm_up_is_given():
    # nanoGPT's config/finetune_shakespeare.py
    constant = OptimConfig(learning_rate=3e-5, decay_lr=False, max_iters=1000)
    assert {learning_rate(step, constant) for step in (0, 1, 49, 50, 10 ** 6)} == {3e-5}
    assert learning_rate(0, constant, peak=0.02) == 0.02
    warm = OptimConfig(learning_rate=1.0, decay_lr=False, max_iters=1000, warmup_iters=9)
    assert [learning_rate(step, warm) for step in (0, 4, 9, 10 ** 6)] == [0.1, 0.5, 1.0, 1.0]


@pytest.mark.parametrize('warmup_iters', [50, 700])
@pytest.mark.parametrize('schedule', ['cosine', 'linear', 'wsd'])
def test_the_rate_never_jumps(schedule, warmup_iters):
    cfg = OptimConfig(learning_rate=1.0, max_iters=1000, warmup_iters=warmup_iters, schedule=schedule)
    rates = [learning_rate(i, cfg) for i in range(1100)]
    assert max(abs(a - b) for a, b in zip(rates, rates[1:])) < 0.021 and min(rates) > 0


def test_matrices_decay_norms_and_biases_do_not():
    model = Transformer(ModelConfig(vocab_size=64, block_size=8, n_layer=1, n_head=2, n_embd=16, bias=True,
                                    norm='layernorm'))
    decay, rest = make_optimizer(model, OptimConfig(weight_decay=0.3)).param_groups
    assert decay['weight_decay'] == 0.3 and rest['weight_decay'] == 0.0
    assert all(p.ndim == 2 for p in decay['params']) and all(p.ndim == 1 for p in rest['params'])
    assert len(decay['params']) + len(rest['params']) == len(list(model.parameters()))


def test_one_step_is_adamw_as_written():
    torch.manual_seed(0)
    model = Transformer(ModelConfig(vocab_size=64, block_size=8, n_layer=1, n_head=2, n_embd=16))
    weight = model.blocks[0].attn.q.weight
    before, gradient = weight.detach().clone(), torch.randn(16, 16)
    weight.grad = gradient.clone()
    make_optimizer(model, OptimConfig(learning_rate=0.1, weight_decay=0.5)).step()
    m, v = gradient, gradient ** 2  # after the correction of the bias
    assert torch.allclose(weight, before * (1 - 0.1 * 0.5) - 0.1 * m / (v.sqrt() + 1e-8), atol=1e-6)


def test_orthogonalize_brings_the_singular_values_near_one_and_keeps_the_directions():
    torch.manual_seed(0)
    g = torch.randn(3, 16, 40)
    U, S, Vh = torch.linalg.svd(g, full_matrices=False)
    ours = orthogonalize(g, torch.float32)
    assert ((torch.linalg.svdvals(ours) - 0.95).abs() < 0.3).all()
    assert (U.mT @ ours @ Vh.mT).diagonal(dim1=1, dim2=2).min() > 0.6  # the same singular vectors
    assert (orthogonalize(g, torch.bfloat16).float() - ours).norm() < 0.05 * ours.norm()


def muon_and_model(**settings):
    torch.manual_seed(0)
    model = Transformer(ModelConfig(vocab_size=64, block_size=8, n_layer=2, n_head=2, n_embd=16, tie=False,
                                    value_residual=True, mlp='swiglu'))
    cfg = OptimConfig(**{'optimizer': 'muon', 'weight_decay': 0.0} | settings)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    return model, make_optimizer(model, cfg), cfg


@pytest.mark.parametrize('name', ['attn.q', 'mlp.down'])
def test_the_steps_are_torchs_muon(name):
    """Two of them, for Nesterov's look ahead shows in the second; torch multiplies in bfloat16."""
    model, optimizer, cfg = muon_and_model()
    weight = model.blocks[1].get_submodule(name).weight
    theirs = torch.nn.Parameter(weight.detach().clone())
    torchs = torch.optim.Muon([theirs], lr=cfg.muon_lr, weight_decay=0.0, momentum=0.95, nesterov=True)
    for _ in range(2):
        weight.grad = torch.randn_like(weight)
        theirs.grad = weight.grad.clone()
        before = weight.detach().clone()
        optimizer.step()
        torchs.step()
        assert (weight - theirs).norm() < 0.05 * (before - weight).norm() and weight.grad is None


def test_muon_has_the_matrices_of_the_blocks_and_adamw_the_rest_each_at_its_rate():
    model, optimizer, _ = muon_and_model(muon_lr=0.02, embed_lr=0.3, head_lr=0.01, scalar_lr=0.015,
                                         weight_decay=0.1)
    where = {id(p): group for group in optimizer.param_groups for p in group['params']}
    for name, p in model.named_parameters():
        group = where[id(p)]
        wanted = ((True, 0.02, 0.1) if p.ndim == 2 and name.startswith('blocks')
                  else (False, 0.3 if 'wte' in name else 0.01 if 'head' in name else 0.015, 0.0))
        assert (group['muon'], group['peak'], group['weight_decay']) == wanted, name


def test_a_tied_embedding_learns_at_the_heads_rate():
    model = Transformer(ModelConfig(vocab_size=64, block_size=8, n_layer=1, n_head=2, n_embd=16, tie=True))
    optimizer = make_optimizer(model, OptimConfig(optimizer='muon', embed_lr=0.3, head_lr=0.01))
    assert ([g['peak'] for g in optimizer.param_groups if any(p is model.wte.weight for p in g['params'])]
            == [0.01])


@pytest.mark.parametrize('tie', [True, False])
def test_a_second_head_is_a_head_and_the_factors_of_the_first_are_matrices(tie):
    class TwoHeads(Transformer):
        def __init__(self, cfg):
            super().__init__(cfg)
            self.next_head = torch.nn.Linear(cfg.n_embd, cfg.padded_vocab, bias=False)
    # of as many outputs as tokens
    model = TwoHeads(ModelConfig(vocab_size=64, block_size=64, n_layer=1, n_head=2, n_embd=64, tie=tie,
                                 d_ff=64, rank_embed=16, rank_head=16, position='learned'))
    optimizer = make_optimizer(model, OptimConfig(optimizer='muon', muon_lr=0.02, embed_lr=0.3, head_lr=0.01,
                                                  scalar_lr=0.015))
    peak = {name: group['peak'] for group in optimizer.param_groups for name in group['param_names']}
    assert peak.pop('next_head.weight') == 0.01 and peak.pop('wte.weight' if tie else 'head.weight') == 0.01
    assert peak.pop('wpe.weight') == 0.3 and peak.pop('wte.weight', 0.3) == 0.3
    assert {rate for name, rate in peak.items() if 'norm' not in name} == {0.02}


def test_a_step_that_overflows_float16_changes_nothing():
    model, optimizer, _ = muon_and_model()
    scaler = torch.amp.GradScaler('cpu')
    scaler.scale(torch.ones(()))
    for p in model.parameters():
        p.grad.fill_(torch.inf)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_a_tall_matrix_steps_as_its_transpose_but_further():
    model, optimizer, _ = muon_and_model()
    up, down = (torch.nn.Parameter(torch.zeros(shape)) for shape in ((48, 16), (16, 48)))
    up.grad = torch.randn(48, 16)
    down.grad = up.grad.T.clone()
    with torch.no_grad():
        optimizer.orthogonal_step([up, down], optimizer.param_groups[0] | {'lr': 1.0})
    assert torch.allclose(up, down.T * 3 ** 0.5, atol=1e-5)


def test_a_stack_of_matrices_is_updated_matrix_by_matrix():
    model, optimizer, _ = muon_and_model()
    stack, single = (torch.nn.Parameter(torch.zeros(3, 16, 48)),
                     [torch.nn.Parameter(torch.zeros(16, 48)) for _ in range(3)])
    stack.grad = torch.randn(3, 16, 48)
    for p, g in zip(single, stack.grad.clone()):
        p.grad = g
    with torch.no_grad():
        optimizer.orthogonal_step([stack, *single], optimizer.param_groups[0] | {'lr': 1.0})
    assert torch.allclose(stack, torch.stack(list(single)), atol=1e-5)


def test_a_step_of_more_matrices_calls_no_more_operations():
    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            name = str(function).split('.')[1]
            if 'foreach' in name or name.strip('_') in ('mul', 'sub', 'add', 'gt'):
                self.names.append(name)
            return function(*args, **(kwargs or {}))
    counts = []
    for layers in (1, 4):
        model = Transformer(ModelConfig(vocab_size=64, block_size=8, n_layer=layers, n_head=2, n_embd=16))
        optimizer = make_optimizer(model, OptimConfig(optimizer='muon'))
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        calls = Calls()
        calls.names = []
        with calls:
            optimizer.step()
        counts.append(len(calls.names))
    assert counts[0] == counts[1] < 150


# --- low-rank factors ---

def low_rank_model(**settings):
    torch.manual_seed(0)
    model = Transformer(ModelConfig(vocab_size=64, block_size=8, n_layer=2, n_head=2, n_embd=16, rank_qk=4,
                                    rank_mlp=8, zero_init=False))
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    return model, make_optimizer(model, OptimConfig(optimizer='muon', muon_lr=0.1, **settings))


def test_rates_are_scaled_by_name_and_a_pattern_that_matches_nothing_is_refused():
    model, optimizer = low_rank_model(lr_scale={r'attn\.[qk]': 2, r'attn\..\.up': 0.25, 'norm': 0})
    rate = {name: group['peak'] for group in optimizer.param_groups for p in group['params']
            for name, q in model.named_parameters() if q is p}
    assert (rate['blocks.0.attn.q.down.weight'] == 0.2 and rate['blocks.1.attn.k.up.weight'] == 0.05
            and rate['blocks.0.attn.v.weight'] == 0.1)
    assert rate['norm_f.weight'] == 0
    with pytest.raises(UserError, match="lr_scale: 'attn.x' matches no tensor"):
        low_rank_model(lr_scale={'attn.x': 2})


def test_cautious_decay_shrinks_only_what_the_update_shrinks_too():
    steps = []
    for weight_decay in (0.0, 5.0):
        model, optimizer, _ = muon_and_model(weight_decay=weight_decay, muon_lr=0.02)
        weight = model.blocks[0].attn.q.weight
        before = weight.detach().clone()
        optimizer.step()
        steps.append(before - weight.detach())
    plain, decayed = steps
    shrinks = plain * before > 0
    assert (torch.allclose(decayed, torch.where(shrinks, plain + 0.02 * 5.0 * before, plain), atol=1e-6)
            and 0.2 < shrinks.float().mean() < 0.8)


def test_the_momentum_warms_up_and_every_rate_follows_the_schedule():
    model, optimizer, cfg = muon_and_model(schedule='linear', max_iters=600,
                                           warmup_iters=0, min_lr=0.0, muon_lr=0.02, head_lr=0.01)
    seen = []
    for step in (0, 150, 300, 450):
        set_rates(optimizer, step, cfg)
        seen.append([(g['lr'] / g['peak'], g['momentum']) for g in optimizer.param_groups])
        assert len(set(seen[-1])) == 1
    for (share, momentum), wanted in zip((s[0] for s in seen),
                                         ((1.0, 0.85), (0.75, 0.9), (0.5, 0.95), (0.25, 0.95))):
        assert math.isclose(share, wanted[0]) and math.isclose(momentum, wanted[1])


def test_the_flops_of_a_step_are_torchs_count():
    model, optimizer, _ = muon_and_model()
    with FlopCounterMode(display=False) as counter:
        optimizer.step()
    assert counter.get_total_flops() == optimizer_flops(optimizer)


@pytest.mark.parametrize('settings, words', [
    (dict(learning_rate=-1.0), 'learning_rate'), (dict(beta2=1.0), 'beta2'), (dict(cooldown=0.0), 'cooldown'),
    (dict(lr_scale={'q': -1}), 'lr_scale'),
    (dict(lr_scale={'attn.[q': 2}), 'is not a valid pattern'), (dict(lr_scale={'q': True}), 'lr_scale')])
def test_values_that_cannot_work_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        OptimConfig(**settings).check()


@pytest.mark.parametrize('settings, words', [
    (dict(min_lr=6e-5, learning_rate=3e-5),
     '^min_lr=6e-05: is above learning_rate=3e-05: lower it or leave it out$'),
    (dict(min_lr=6e-5, learning_rate=0.0), '^min_lr=6e-05: is above learning_rate=0.0: '),
    (dict(max_iters=5000, warmup_iters=2000, lr_decay_iters=500),
     '^lr_decay_iters=500: ends the decay before the warm-up of 2000 steps has ended: '),
    (dict(max_iters=5000, lr_decay_iters=200),
     '^lr_decay_iters=200: ends the decay before the warm-up of 250 steps has ended: '),
    (dict(max_iters=5000, lr_decay_iters=0), '^lr_decay_iters=0: ends the decay'),
    (dict(max_iters=5000, lr_decay_iters=1000, min_lr=0.0),
     '^lr_decay_iters=1000: is below max_iters=5000: the rate would be min_lr=0 from there on')])
def test_a_rate_that_would_rise_drop_or_stay_at_zero_is_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        OptimConfig(**settings).check()
    OptimConfig(**settings, decay_lr=False).check()  # these settings play no part then


@pytest.mark.parametrize('settings', [
    dict(min_lr=6e-4), dict(max_iters=30, warmup_iters=2000),
    dict(max_iters=30, warmup_iters=2000, lr_decay_iters=30), dict(max_iters=30, lr_decay_iters=600000),
    dict(max_iters=2000, lr_decay_iters=1000), dict(max_iters=0), dict(learning_rate=0.0, min_lr=0.0)],
                         ids=str)
def test_a_trial_of_a_long_run_is_not_refused(settings):
    OptimConfig(**settings).check()


def test_every_config_goes_with_its_own_rates_and_with_a_trial_of_a_few_steps():
    for path in glob.glob('config/*.py'):
        given = read_config(Settings, path)
        OptimConfig.check(build(Settings, **given))
        OptimConfig.check(build(Settings, **given | {'max_iters': 30}))


def test_a_run_that_is_too_short_says_so():
    assert (short_warmup(Settings(max_iters=2000, warmup_iters=2000)) == short_warmup(Settings(max_iters=30))
            == [])
    assert short_warmup(Settings(max_iters=30, warmup_iters=2000, learning_rate=6e-4)) == [
        'warmup_iters=2000: is longer than max_iters=30: '
        'the rate rises to 9.00e-06 and never reaches learning_rate=0.0006; --warmup_iters=0 begins there']
    growing = dict(n_layer=2, grow_every=4, grow_to=8, grow_by=2)
    assert short_growth(build(Settings, max_iters=13, **growing), 2, 0) == []
    assert short_growth(build(Settings, max_iters=13, **growing), 4, 8) == []
    for layers, step in (2, 0), (2, 4), (4, 5), (4, 8):
        assert short_growth(build(Settings, max_iters=12, **growing), layers, step) == [
            'max_iters=12: ends before the network has grown to grow_to=8: it ends with 6 layers']


def test_an_optimizer_without_code_is_refused_wherever_the_optimizer_decides():
    model = Transformer(ModelConfig(vocab_size=64, block_size=8, n_layer=1, n_head=2, n_embd=16))
    s = Settings(optimizer='lion', max_iters=10)
    run = SimpleNamespace(tokens_per_step=1, flops_per_step=1.0, teacher=None,
                          data=SimpleNamespace(bits_per_byte=lambda nats: None),
                          interval=SimpleNamespace(steps_per_second=lambda: 1.0))
    for decide in (lambda: make_optimizer(model, s), lambda: report(s, run, 1, 2.0, 1.0, None),
                   lambda: not_finite(s, 1)):
        with pytest.raises(UserError,
                           match='^optimizer=lion: has no code in optim.py: use adamw or muon$'):
            decide()


@pytest.mark.parametrize('optimizer, main_rate',
                         [('adamw', 'learning_rate'), ('muon', 'muon_lr')])
def test_the_rate_of_the_blocks_matrices_is_the_one_that_is_shown_and_to_be_lowered(optimizer, main_rate):
    s = OptimConfig(optimizer=optimizer)
    assert s.main_rate == main_rate and s.uses_muon == (optimizer != 'adamw')


def test_a_schedule_without_code_does_not_work_as_another_one():
    model, s = (Transformer(ModelConfig(vocab_size=64, block_size=8, n_layer=1, n_head=2, n_embd=16)),
                OptimConfig(schedule='new'))
    with pytest.raises(UserError, match='^schedule=new: has no code in optim.py: '):
        set_rates(make_optimizer(model, s), 5000, s)
