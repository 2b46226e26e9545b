"""The learning rate's schedules against their formulas; which parameters decay."""
import math

import pytest
import torch

from model import ModelConfig, Transformer
from optim import OptimConfig, learning_rate, make_optimizer


def test_cosine_is_nanogpts():
    cfg = OptimConfig(learning_rate=6e-4, min_lr=6e-5, warmup_iters=2000, lr_decay_iters=600000, max_iters=600000)
    assert learning_rate(0, cfg) == 6e-4 / 2001 and learning_rate(1999, cfg) == 6e-4 * 2000 / 2001
    assert learning_rate(2000, cfg) == 6e-4 and math.isclose(learning_rate(301000, cfg), (6e-4 + 6e-5) / 2) and learning_rate(600000, cfg) == 6e-5


def test_linear_and_wsd():
    linear = OptimConfig(learning_rate=1.0, min_lr=0.0, warmup_iters=0, max_iters=100, schedule='linear')
    assert [learning_rate(i, linear) for i in (0, 25, 100)] == [1.0, 0.75, 0.0]
    wsd = OptimConfig(learning_rate=1.0, min_lr=0.0, warmup_iters=10, max_iters=100, schedule='wsd', cooldown=0.5)
    assert [learning_rate(i, wsd) for i in (10, 49, 50, 75, 100)] == [1.0, 1.0, 1.0, 0.5, 0.0]


def test_defaults_follow_the_length_of_the_run():
    cfg = OptimConfig(learning_rate=1e-3, max_iters=1000)
    assert learning_rate(49, cfg) < learning_rate(50, cfg) == 1e-3 and math.isclose(learning_rate(1000, cfg), 1e-4)
    assert learning_rate(10 ** 6, OptimConfig(decay_lr=False)) == 6e-4


@pytest.mark.parametrize('schedule', ['cosine', 'linear', 'wsd'])
def test_the_rate_never_jumps(schedule):
    cfg = OptimConfig(learning_rate=1.0, max_iters=1000, warmup_iters=50, schedule=schedule)
    rates = [learning_rate(i, cfg) for i in range(1100)]
    assert max(abs(a - b) for a, b in zip(rates, rates[1:])) < 0.021 and min(rates) > 0


def test_matrices_decay_norms_and_biases_do_not():
    model = Transformer(ModelConfig(vocab_size=64, block_size=8, n_layer=1, n_head=2, n_embd=16, bias=True, norm='layernorm'))
    decay, rest = make_optimizer(model, OptimConfig(weight_decay=0.3)).param_groups
    assert decay['weight_decay'] == 0.3 and rest['weight_decay'] == 0.0
    assert all(p.ndim == 2 for p in decay['params']) and all(p.ndim == 1 for p in rest['params'])
    assert len(decay['params']) + len(rest['params']) == len(list(model.parameters()))


def test_one_step_is_adamw_as_written():
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2, bias=False)
    before, gradient = model.weight.detach().clone(), torch.randn(2, 3)
    model.weight.grad = gradient.clone()
    make_optimizer(model, OptimConfig(learning_rate=0.1, weight_decay=0.5)).step()
    m, v = gradient, gradient ** 2  # after the correction of the bias
    assert torch.allclose(model.weight, before * (1 - 0.1 * 0.5) - 0.1 * m / (v.sqrt() + 1e-8), atol=1e-6)


@pytest.mark.parametrize('settings, words', [(dict(learning_rate=-1.0), 'learning_rate'), (dict(beta2=1.0), 'beta2'), (dict(cooldown=0.0), 'cooldown')])
def test_values_that_cannot_work_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        OptimConfig(**settings).check()
