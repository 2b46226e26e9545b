"""
compare.py groups seeds into arms, computes a textbook's errors and intervals, and chooses the best setting
fairly.
"""
import csv
import dataclasses
import json
import math
import os
import shutil
from pathlib import Path

import pytest
from conftest import one_line, run, train

from configurator import UserError
from features import build
from features.study import tuning
from features.study.pictures import short
from features.study.runs import Arm, arm_name, find_runs, group, read_run
from features.study.stats import mean_and_error, t_quantile
from features.study.sweep import expand
from features.study.tables import row, table
from features.study.tuning import best, beyond, sweep_report, swept_curve, tuned
from train import Settings

LOSSES = {'a': {1: 4.00, 2: 4.10, 3: 4.30}, 'b': {1: 3.97, 2: 4.06, 3: 4.29}}


def write_run(folder, seed=1, loss=4.0, step=10, **settings):
    """A run in `folder` as train.py would leave it, with an evaluation at 0 and one at `step` of 10."""
    folder.mkdir(parents=True)
    s = build(Settings, vocab_size=64, n_layer=1, n_head=2, n_embd=16, block_size=8, max_iters=10, seed=seed,
                 out_dir=str(folder), **settings)
    (folder / 'settings.json').write_text(json.dumps(dataclasses.asdict(s)))
    records = [{'step': n, 'tokens': 96 * n, 'flops': 1e6 * n, 'seconds': 1.0 + n, 'val_loss': x,
                'val_bpb': x / 2, 'peak_memory_bytes': 2 ** 20} for n, x in ((0, 4.2), (step, loss))]
    (folder / 'log.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in records))
    return str(folder)


@pytest.fixture
def arms(tmp_path):
    """Two arms, three seeds each."""
    return group(
        [read_run(write_run(tmp_path / f'{name},seed={seed}', seed, loss, rank_mlp=4 * (name == 'b')))
         for name, losses in LOSSES.items() for seed, loss in losses.items()])


def points(*losses, diverged=(), key='lr'):
    """Settings of an arm: {value: {seed: loss}}."""
    def made(value, by_seed):
        runs = {seed: {'state': 'done', 'val': [{'val_loss': loss}]} for seed, loss in by_seed.items()}
        return Arm('x', runs | {seed: {'state': 'diverged', 'val': []} for v, seed in diverged if v == value},
                   {key: value})
    return [made(value, by_seed) for value, by_seed in losses]


def test_of_adapters_it_is_said_how_many_parameters_are_trained(dataset, tmp_path):
    train(tmp_path / 'base', dataset=dataset)
    train(tmp_path / 'adapted', f'--init_from={tmp_path / "base"}', '--lora_rank=2', '--lora_targets=attn.q',
          dataset=dataset)
    adapted = read_run(str(tmp_path / 'adapted'))
    assert adapted['trained'] == 2 * 2 * (32 + 32)
    assert adapted['trained'] == adapted['parameters'] - read_run(str(tmp_path / 'base'))['parameters']
    assert ('adapted: 256 of its parameters are trained'
            in run('compare.py', tmp_path / 'base', tmp_path / 'adapted').stdout)


def test_runs_are_compared_in_a_table_and_a_picture(dataset, tmp_path):
    train(tmp_path / 'dense', dataset=dataset)
    train(tmp_path / 'low', '--rank_mlp=8', dataset=dataset)
    done = run('compare.py', tmp_path / 'dense', tmp_path / 'low', f'--picture={tmp_path / "p.png"}')
    assert done.returncode == 0 and (tmp_path / 'p.png').read_bytes().startswith(b'\x89PNG'), done.stderr
    runs = [read_run(str(tmp_path / name)) for name in ('dense', 'low')]
    assert (runs[0]['parameters'] - runs[1]['parameters'] == runs[0]['blocks'] - runs[1]['blocks']
            == 2 * 2 * (32 * 128 - 8 * (32 + 128)))
    assert table(group(runs)) in done.stdout and f'{runs[0]["val"][-1]["val_loss"]:.4f}' in done.stdout
    shutil.copytree(tmp_path / 'low', tmp_path / 'copy')
    assert 'the same run as' in one_line(run('compare.py', tmp_path / 'low', tmp_path / 'copy'))


# --- arms ---

def test_runs_that_differ_in_nothing_but_the_seed_are_one_arm(arms, tmp_path):
    assert [(arm.name, sorted(arm.runs)) for arm in arms] == [('a', [1, 2, 3]), ('b', [1, 2, 3])]
    other = [read_run(write_run(tmp_path / name, 4, **settings))
             for name, settings in (('a,seed=4', {'log_interval': 3}), ('a2,seed=4', {'beta2': 0.9}))]
    assert [sorted(arm.runs) for arm in group([*arms[0].runs.values(), *other])] == [[1, 2, 3, 4], [4]]


@pytest.mark.parametrize('folder, name', [('out/dense,seed=1', 'dense'), ('out/dense_seed2/', 'dense'),
                                          ('out/dense-s12', 'dense'), ('dense/seed=3', 'dense'),
                                          ('out/lowrank28m', 'lowrank28m'), ('out/class1', 'class1'),
                                          ('out/a,lr=0.02,seed=1', 'a,lr=0.02')])
def test_an_arm_is_named_after_its_folder_without_the_seed(folder, name):
    assert arm_name(folder) == name


def test_patterns_find_runs_and_nothing_else(tmp_path):
    for name in ('a', 'b', 'b.old1'):
        write_run(tmp_path / name)
    (tmp_path / 'compare.png').touch()
    (tmp_path / 'empty').mkdir()
    assert find_runs([f'{tmp_path}/*', f'{tmp_path}/a/']) == [f'{tmp_path}/a', f'{tmp_path}/b']
    with pytest.raises(UserError, match='matches no training run'):
        find_runs([f'{tmp_path}/c*'])


def test_a_run_older_than_a_setting_has_its_default(tmp_path):
    new, old = write_run(tmp_path / 'new', 1), tmp_path / 'old'
    settings = json.load(open(write_run(old, 2) + '/settings.json'))
    del settings['rank_act'], settings['muon_lr']
    (old / 'settings.json').write_text(json.dumps(settings | {'a_setting_of_the_past': 1}))
    assert len(group([read_run(new), read_run(str(old))])) == 1


# --- figures ---

@pytest.mark.parametrize('freedom, t95, t99', [
    (1, 12.7062, 63.6567), (2, 4.3027, 9.9248), (3, 3.1824, 5.8409), (4, 2.7764, 4.6041), (5, 2.5706, 4.0321),
    (9, 2.2622, 3.2498), (10, 2.2281, 3.1693), (30, 2.0423, 2.7500), (120, 1.9799, 2.6174)])
def test_student_s_t_is_that_of_the_tables(freedom, t95, t99):
    assert t_quantile(freedom) == pytest.approx(t95, abs=6e-5)
    assert t_quantile(freedom, 0.99) == pytest.approx(t99, abs=6e-5)


def test_the_difference_is_paired_by_seed_with_its_interval(arms):
    # differences -0.03, -0.04, -0.01: mean -0.08/3, deviation 0.0152753, t(2) = 4.30265
    figures = row(arms[1], arms[0])
    assert figures['difference'] == pytest.approx(-0.0266667, abs=1e-6)
    assert figures['half_width'] == pytest.approx(0.0379459, abs=1e-6)
    assert '-0.0267 [-0.0646, +0.0113] n=3' in table(arms)
    # the seeds differ more than the arms: without pairs the interval would be ±0.32
    assert figures['val_loss'] == pytest.approx(4.106667, abs=1e-6)
    assert figures['val_loss_se'] == pytest.approx(0.0952774, abs=1e-6)


def test_a_seed_without_a_partner_is_left_out_of_the_difference_and_that_is_said(arms):
    del arms[0].runs[3]
    figures, text = row(arms[1], arms[0]), table(arms)
    assert figures['pairs'] == 2 and figures['difference'] == pytest.approx(-0.035) and figures['seeds'] == 3
    assert 'b: seed 3 has no partner and is left out of the difference' in text


def test_one_pair_has_no_interval(arms):
    for seed in (2, 3):
        del arms[0].runs[seed], arms[1].runs[seed]
    assert row(arms[1], arms[0])['half_width'] is None
    assert '-0.0300 n=1' in table(arms)
    assert '±' not in table(arms)


def test_a_run_in_the_middle_of_its_schedule_or_diverged_counts_in_no_mean(arms, tmp_path):
    half = read_run(write_run(tmp_path / 'b,seed=4', 4, loss=9.0, step=5, rank_mlp=4))
    gone = write_run(tmp_path / 'b,seed=5', 5, loss=9.0, step=5, rank_mlp=4)
    (tmp_path / 'b,seed=5' / 'diverged.txt').touch()
    arms = group([*arms[0].runs.values(), *arms[1].runs.values(), half, read_run(gone)])
    text = table(arms)
    assert row(arms[1], arms[0])['val_loss'] == pytest.approx(4.106667, abs=1e-6)
    assert 'b: seed 4 is not finished (step 5 of 10) and left out' in text and 'b: diverged: seed 5' in text


def test_losses_on_other_tokens_are_called_incomparable(arms, tmp_path):
    assert 'careful' not in table(arms)
    assert 'careful' in table(arms + [Arm('c', {1: read_run(write_run(tmp_path / 'c', eval_iters=7))})])
    assert 'careful' in table(arms + [Arm('d', {1: read_run(write_run(tmp_path / 'd', objective='prefix'))})])
    (tmp_path / 'data').mkdir()
    same = [str(tmp_path / 'data'), f'{tmp_path}/./data/']  # two spellings of one folder
    arms = [Arm(str(n), {1: read_run(write_run(tmp_path / f'same{n}', dataset=name))})
            for n, name in enumerate(same)]
    assert 'careful' not in table(arms)


def test_arms_of_unlike_dtypes_are_not_one_and_that_is_said(arms, tmp_path):
    assert 'dtype' not in table(arms)
    found = group([*arms[0].runs.values(),
                   read_run(write_run(tmp_path / 'half,seed=1', 1, rank_mlp=0, dtype='bfloat16'))])
    assert [arm.name for arm in found] == ['a', 'half']
    assert 'not all of these were trained in the same dtype: a auto, half bfloat16' in table(found)


def test_the_table_goes_to_csv_the_reference_first_then_the_lowest_loss(arms, tmp_path):
    write_run(tmp_path / 'c,seed=1', 1, 3.0, rank_qk=4)
    done = run('compare.py', f'{tmp_path}/*', '--reference=b', '--picture=', f'--csv={tmp_path}/t.csv')
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader(open(tmp_path / 't.csv')))
    assert [r['arm'] for r in rows] == ['b', 'c', 'a']
    assert float(rows[2]['difference']) == pytest.approx(0.0266667, abs=1e-6)
    assert float(rows[0]['tokens']) == 960
    assert float(rows[0]['flops_per_token']) == pytest.approx(1e7 / 960)
    assert rows[0]['difference'] == ''
    assert 'reference=d: takes one of' in one_line(run('compare.py', f'{tmp_path}/*', '--reference=d',
                                                       '--picture='))


@pytest.mark.parametrize('x, label', [(2000, '2k'), (2.05e6, '2.05M'), (2e10, '2e10'), (5.2e13, '5.2e13'),
                                      (6e13, '6e13')])
def test_neighbours_on_an_axis_are_told_apart(x, label):
    assert short(x) == label


# --- the best of a sweep ---

def test_the_best_is_chosen_by_the_seeds_that_all_settings_share():
    a, b = points((0.01, {1: 4.0}), (0.02, {1: 4.1, 2: 3.0, 3: 3.0}))
    assert best([a, b]) is a  # by seed 1, though the other's mean is lower
    assert best([*points((0.01, {})), b]) is b  # a point that was not run is ignored


def test_a_setting_that_diverged_is_not_the_best_but_bounds_the_sweep():
    found = points((0.01, {1: 4.2, 2: 4.2}), (0.02, {1: 4.1, 2: 4.1}), (0.04, {1: 3.0}), diverged=[(0.04, 2)])
    assert best(found) is found[1] and beyond(found, found[1]) == {}


@pytest.mark.parametrize('values, lowest, advice', [
    ([0.01, 0.02, 0.04], 0.04, ['lr=0.08']), ([0.01, 0.02, 0.04], 0.01, ['lr=0.005']),
    ([0.02, 0.03], 0.03, ['lr=0.045']), ([0.01, 0.02, 0.04], 0.02, []),
    ([24, 48, 96], 96, ['lr=192']), ([0.01, 1e9], 0.01, ['lr=0.0025']),
    ([0.0, 0.1], 0.0, []), ([0.0, 0.1], 0.1, ['lr=0.2']), (['silu', 'none'], 'none', []),
    ([0.02], 0.02, []), ([None, 0.01, 0.02], 0.02, ['lr=0.04']), ([None, 0.01, 0.02], None, []),
    ([{'attn.[qk]': 2}, {'attn.[qk]': 4}], {'attn.[qk]': 4}, ["lr={'attn.[qk]': 8}"]),
    ([{'a': 2, 'b': 1}, {'a': 4, 'b': 1}], {'a': 4, 'b': 1}, []), ([{'a': 2}, {'b': 2}], {'a': 2}, [])])
def test_a_best_at_the_edge_is_named_with_what_to_add(values, lowest, advice):
    found = points(*[(value, {1: 4.0 if value == lowest else 4.5}) for value in values])
    assert [f'{key}={value}' for key, value in beyond(found, best(found)).items()] == advice
    report = sweep_report('x', found)
    assert (f'best at the edge: add {advice[0]}' in report) if advice else 'edge' not in report
    assert f'* lr={lowest}' in report


def test_an_arm_is_tried_beyond_its_grid_until_the_best_is_inside(dataset, tmp_path, monkeypatch):
    def run_missing(sweep, jobs):
        for each in (each for each in expand(sweep) if not os.path.exists(f'{each.out_dir}/log.jsonl')):
            peak = {'near': 2e-3, 'far': 3.2e-2, 'endless': 1e9}[each.arm]
            loss = 4 + abs(math.log(each.settings.learning_rate / peak)) + each.seed
            os.makedirs(each.out_dir)
            Path(each.out_dir, 'settings.json').write_text(json.dumps(dataclasses.asdict(each.settings)))
            Path(each.out_dir, 'log.jsonl').write_text(json.dumps({'step': 10, 'val_loss': loss}) + '\n')
    monkeypatch.setattr(tuning, 'run_missing', run_missing)
    base = {'dataset': str(dataset), 'n_layer': 1, 'n_head': 2, 'n_embd': 16, 'block_size': 8,
            'max_iters': 10}
    grid = [{'learning_rate': rate} for rate in (1e-3, 2e-3, 4e-3)]
    found = tuned(base, lambda seed: {'near': {}, 'far': {'grad_clip': 0.5}, 'endless': {'beta2': 0.9}}, grid,
                  [1, 2], str(tmp_path / 'out'), 1)
    assert ({name: arm.swept['learning_rate'] for name, arm in found.items()}
            == {'near': 2e-3, 'far': 3.2e-2, 'endless': 6.4e-2})
    assert all(sorted(arm.runs) == [1, 2] and arm.runs[2]['val'][-1]['val_loss'] > 6 - 1e-9
               for arm in found.values())
    tried = [name.split(',')[0] for name in os.listdir(tmp_path / 'out') if name.endswith('seed=1')]
    assert (tried.count('near'), tried.count('far'), tried.count('endless')) == (3, 7, 3 + tuning.FURTHER)


def test_what_is_no_number_has_no_place_on_the_axis():
    found = points((None, {1: 4.0}), (0.01, {1: 4.2}), (0.02, {1: 4.1}))
    assert swept_curve(found) == ('lr', [(0.01, 4.2, None), (0.02, 4.1, None)])


def test_a_curve_has_the_same_seeds_everywhere():
    """Seed 2 is hard, and was run with the best rate only."""
    found = points((0.01, {1: 4.2}), (0.02, {1: 4.1, 2: 4.9}), (0.04, {}))
    assert swept_curve(found) == ('lr', [(0.01, 4.2, None), (0.02, 4.1, None)])
    found = points((0.01, {1: 4.2, 2: 5.0}), (0.02, {1: 4.1}), diverged=[(0.02, 2)])
    assert swept_curve(found) == ('lr', [(0.01, *mean_and_error([4.2, 5.0]))])


def test_a_figure_that_not_all_seeds_have_is_left_out(arms):
    arm = arms[0]
    assert row(arm, arm)['val_bpb'] == pytest.approx(row(arm, arm)['val_loss'] / 2)
    assert row(arm, arm)['memory_mib'] == 1
    for key in ('val_bpb', 'flops', 'peak_memory_bytes'):
        del arm.runs[2]['val'][-1][key]
    found = row(arm, arm)
    assert [name for name, value in found.items() if value is None] == [
        'flops', 'flops_per_token', 'memory_mib', 'val_bpb', 'val_bpb_se', 'difference', 'half_width',
        'pairs']
    assert len(arm.curves('tokens')[0]) == 1 and arm.curves('flops')[0] == [] and table([arm])


# --- mistakes ---

def test_what_is_no_run_is_refused(tmp_path):
    assert 'nowhere: not a training run' in one_line(run('compare.py', 'nowhere'))
    assert 'give the out_dir' in one_line(run('compare.py'))
    assert math.isinf(Arm('empty').loss)
