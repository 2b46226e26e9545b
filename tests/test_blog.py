"""
The faults of experiments/blog.py are those of the blog. Without a fault its run is that of train.py, bit for
bit.
"""
import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from conftest import TINY, one_line, read_log, run, train

import batches
import checkpoint
import model
import run as runs
import train as training
from batches import Batches, Mixture, Source, validation_batch
from experiments import blog
from features import build
from optim import learning_rate, make_optimizer
from run import OneProcess


@pytest.fixture
def faulty(monkeypatch, dataset):
    """A function that patches faults in until the end of the test, and returns the settings."""
    for owner, name in ((Mixture, 'rows'), (batches, 'micro_batches'),
                        (runs, 'build_model'), (model.Transformer, 'init_weights'),
                        (torch.nn.utils, 'clip_grad_norm_'), (model, 'loss_and_gradient')):
        monkeypatch.setattr(owner, name, getattr(owner, name))

    def bring_in(*names, **settings):
        s = build(training.Settings, dataset=dataset, n_layer=2, n_head=2, n_embd=32, block_size=32,
                  **settings)
        for name in names:
            blog.FAULTS[name](s)
        return s
    return bring_in


def test_without_a_fault_the_run_is_that_of_train_py(dataset, tmp_path):
    train(tmp_path / 'train', dataset=dataset)
    done = run('experiments/blog.py', f'--out_dir={tmp_path / "blog"}', f'--dataset={dataset}', *TINY,
               '--condition=right')
    assert done.returncode == 0, done.stderr
    assert read_log(tmp_path / 'train') == read_log(tmp_path / 'blog')
    ours, theirs = (checkpoint.read_weights(checkpoint.find(str(tmp_path / name)))
                    for name in ('blog', 'train'))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.full
def test_with_all_faults_a_run_that_stops_goes_on_as_if_it_had_not(dataset, tmp_path):
    for name, steps in (('whole', (4,)), ('parts', (2, 4))):
        for max_iters in steps:
            done = run('experiments/blog.py', f'--out_dir={tmp_path / name}', f'--dataset={dataset}', *TINY,
                       '--condition=blog', '--gradient_accumulation_steps=2', '--rank_qk=8', '--rank_vo=8',
                       '--rank_mlp=8', '--lr_decay_iters=4', f'--max_iters={max_iters}')
            assert done.returncode == 0, done.stderr
    whole, parts = (checkpoint.read_weights(checkpoint.find(str(tmp_path / name)))
                    for name in ('whole', 'parts'))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert whole['blocks.0.mlp.up.up.weight'].dtype == torch.bfloat16
    assert whole['head.weight'].shape == (64, 8)


def test_the_names_of_conditions():
    assert blog.faults_of('right') == [] and blog.faults_of('blog') == list(blog.FAULTS)
    assert blog.faults_of('right+init+last') == ['last', 'init']
    assert 'bf16' not in blog.faults_of('blog-bf16')
    assert len(blog.faults_of('blog-bf16')) == 5
    assert 'condition=blog-lost' in one_line(run('experiments/blog.py', '--condition=blog-lost'))


# --- each fault does what it says ---

def test_last_only_the_last_column_of_the_targets_remains_and_only_in_training(faulty, dataset):
    s = faulty('last', batch_size=4)
    data = Mixture(dataset, 'train', 32, 1)
    micro, targets = Batches(data, s, OneProcess(torch.device('cpu')))(0)
    _, x, y = micro[0]
    assert targets == 4 and (y[:, :-1] == -1).all() and (y[:, -1] >= 0).all() and (x[:, 1:] >= 0).all()
    source = Source(dataset, 'val', 32, 'stream')
    assert (validation_batch(source, range(4), 4)[1] >= 0).all()


def test_overlap_uses_22_of_120_rows_the_inner_ones_eight_times(faulty):
    right = Counter(row for part in batches.micro_batches(
        faulty(batch_size=8, gradient_accumulation_steps=15), 3, 0, 1) for row in part)
    s = faulty('overlap', batch_size=8, gradient_accumulation_steps=15)
    rows = Counter(row for part in batches.micro_batches(s, 3, 0, 1) for row in part)
    assert set(right) == set(range(360, 480)) and set(right.values()) == {1}
    assert set(rows) == set(range(360, 382))
    assert all(rows[row] == 8 for row in range(367, 375))
    assert rows[360] == rows[381] == 1


def test_bf16_the_second_moment_never_falls_and_small_steps_vanish(faulty, dataset):
    moments, moved = {}, {}
    for name in ('float32', 'bf16'):
        s = faulty(*[name] if name == 'bf16' else [], beta2=0.999, weight_decay=0.0, learning_rate=1e-3)
        network = runs.build_model(s, Mixture(dataset, 'train', 32, 1), runs.Start())
        optimizer, scale = make_optimizer(network, s), network.norm_f.weight  # all ones
        for step in range(1000):
            scale.grad = torch.full_like(scale, float(step == 0))
            optimizer.step()
            if step == 0:
                first, moved[name] = optimizer.state[scale]['exp_avg_sq'].clone(), 1 - scale[0].item()
        moments[name] = (optimizer.state[scale]['exp_avg_sq'] / first)[0].item()
    assert moments == {'float32': pytest.approx(math.exp(-1), rel=0.01), 'bf16': 1}
    assert moved == {'float32': pytest.approx(1e-3, rel=0.01), 'bf16': 0}


def test_init_products_have_a_sixth_of_the_deviation_of_the_dense_arm(faulty):
    s = faulty('init')
    cfg = model.ModelConfig(vocab_size=64, n_layer=1, n_head=4, n_embd=256, tie=False)
    dense, lowrank = (model.Transformer(cfg),
                      model.Transformer(replace(cfg, rank_qk=256, rank_vo=256, rank_mlp=256)))
    assert all(p.std().item() == pytest.approx(0.01, rel=0.05) for net in (dense, lowrank)
               for p in net.parameters() if p.ndim == 2)
    o = lowrank.blocks[0].attn.o
    # the fault overrules it
    assert (o.up.weight @ o.down.weight).std().item() == pytest.approx(0.0016, rel=0.05) and s.zero_init


def test_head_is_factored_in_the_low_rank_arm_only(faulty):
    assert faulty('head').tie
    s = faulty('head', rank_mlp=8)
    assert not s.tie and s.rank_head == 8


def test_unguarded_starts_at_the_full_rate_clips_single_values_and_forgets_what_is_beyond_20_nats(faulty):
    s = faulty('unguarded', learning_rate=0.5)
    assert learning_rate(0, s) == 0.5
    p = torch.nn.Parameter(torch.zeros(3))
    p.grad = torch.tensor([100.0, -1.0, -2.0])
    norm = torch.nn.utils.clip_grad_norm_([p], math.inf)
    assert p.grad.tolist() == [1.5, -1, -1.5] and norm.item() == pytest.approx(math.sqrt(100 ** 2 + 1 + 4))
    logits, targets = torch.tensor([[0.0, 50], [0, 5]]), torch.tensor([0, 0])
    # evaluation sees all
    assert (model.loss_and_gradient(logits.clone(), targets, 2, 0, 0, False).item()
            == pytest.approx(55, abs=0.1))
    model.loss_and_gradient(logits, targets, 2, 0, 0, True)  # now the gradients
    assert logits[0].tolist() == [0, 0] and logits[1, 1] > 0.9


# --- the runs and the table ---

@pytest.mark.parametrize('quick, parameters', [(False, 2_654_208), (True, 442_368)])
def test_both_arms_have_equal_parameters_in_their_blocks(quick, parameters):
    for arm in blog.ARMS:
        recipe = blog.recipe(blog.Settings(quick=quick), arm)
        with torch.device('meta'):
            network = model.Transformer(model.ModelConfig(
                vocab_size=64, **{k: v for k, v in recipe.items() if hasattr(model.ModelConfig, k)}))
        assert sum(p.numel() for p in network.blocks.parameters() if p.ndim == 2) == parameters


def test_the_table_has_every_condition_and_its_cost_on_the_same_seed(monkeypatch):
    def loss(s, arm, condition, rate, seed):
        faults = blog.faults_of(condition)
        return (3 + abs(rate - 4e-3) * 10 + 0.01 * (seed - 2) + 0.1 * len(faults)
                + 0.5 * ('init' in faults and arm == 'lowrank'))
    monkeypatch.setattr(blog, 'val_loss', loss)
    lines = blog.table(None).splitlines()
    rows = {line.split(' | ')[0].strip('| '): [cell.strip('| ') for cell in line.split(' | ')[1:]]
            for line in lines}
    assert set(blog.CONDITIONS) <= set(rows)
    assert rows['right'][:3] == ['3.000 ± 0.010', '3.000 ± 0.010', '+0.000']
    assert rows['right+init'] == ['3.090', '3.590', '+0.500', '+0.100', '+0.600']
    assert rows['blog-head'][0] == '–'
    assert rows['blog-head'][3:] == ['', '-0.100']
    assert rows['blog-last'][3:] == ['-0.100', '-0.100']
