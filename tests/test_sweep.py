"""A sweep runs each missing run once, with the budget of its arm, even if it is stopped in between."""
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, one_line, run, write_dataset

from configurator import UserError
from features.study import sweep
from features.study.jobs import locked, outcome, places, run_missing, start
from features.study.runs import read_log, sizes, state
from features.study.sweep import Sweep, expand, read_sweep

BASE = {'n_layer': 2, 'n_head': 2, 'n_embd': 32, 'block_size': 32, 'batch_size': 4,
        'device': 'cpu', 'dtype': 'float32', 'max_iters': 10, 'learning_rate': 1e-2,
        'log_interval': 1, 'eval_interval': 5, 'eval_iters': 4}


@pytest.fixture
def make(dataset, tmp_path):
    """make(arms, …) → a Sweep of tiny runs."""
    return lambda arms, base=None, **options: Sweep(BASE | {'dataset': dataset} | (base or {}), arms,
                                                    **{'out': str(tmp_path / 'out')} | options)


def write(made, path):
    """`made` as a sweep's file."""
    path.write_text(''.join(f'{key} = {value!r}\n' for key, value in vars(made).items()))
    return path


def of(runs, *keys):
    return [tuple(getattr(r.settings, key) for key in keys) for r in runs]


# --- from arms to runs ---

def test_lists_are_swept_inside_their_arm_and_seeds_come_last(make):
    runs = expand(make({'a': {'learning_rate': [0.1, 0.2], 'rank_qk': [4, 8]}, 'b': {'seeds': [7]}},
                       seeds=[1, 2]))
    assert [r.name for r in runs[:5]] == [f'a,learning_rate={lr},rank_qk={rank},seed=1' for lr in (0.1, 0.2)
                                          for rank in (4, 8)] + ['b,seed=7']
    assert len(runs) == 9 and of(runs[5:], 'seed') == [(2,)] * 4
    assert (of(runs, 'learning_rate', 'rank_qk', 'out_dir')[1]
            == (0.1, 8, os.path.join(runs[0].out_dir.rpartition('/')[0], runs[1].name)))


def test_an_arm_of_several_grids_runs_each_of_their_points(make):
    cross = [{'learning_rate': [0.1, 0.2, 0.3], 'rank_qk': [8]}, {'learning_rate': [0.2], 'rank_qk': [4, 16]}]
    assert of(expand(make({'a': cross})), 'learning_rate', 'rank_qk') == [(0.1, 8), (0.2, 8), (0.3, 8),
                                                                          (0.2, 4), (0.2, 16)]
    # the first run sets the budget of the second grid too
    equal = expand(make({'a': [{'n_layer': [2]}, {'n_layer': [4]}]}, {'max_iters': 1000}, budget='flops'))
    assert equal[0].settings.max_iters == 1000 and equal[1].settings.max_iters < 600


def test_any_value_makes_a_short_safe_name_of_its_own(make, tmp_path):
    for name in ('x', 'y'):
        write_dataset(tmp_path / name)
    mixtures = [{str(tmp_path / 'x'): 1, str(tmp_path / 'y'): n} for n in (1, 2)]
    runs = expand(make({'a': {'dataset': mixtures, 'sample_prompt': ['a/b', 'a_b', '..', 'a' * 300]},
                        'fixed': {'dataset': mixtures[0]}}))
    names = [r.name for r in runs]
    assert len(set(names)) == 9
    assert all(re.fullmatch(r'[\w.+=,-]{1,150}', name) for name in names)
    assert names[-1] == 'fixed,seed=1'
    assert of(runs, 'dataset')[0] == (mixtures[0],) and of(runs, 'sample_prompt')[0] == ('a/b',)


@pytest.mark.parametrize('name, count',
                         [('demo', 8), ('lowrank', 19), ('lowrank_novels', 20), ('lowrank_final', 15),
                          ('lowrank_novels_final', 15), ('lowrank_long', 9)])
def test_the_files_in_the_repo_are_sweeps_and_finalists_are_among_the_swept(name, count, monkeypatch,
                                                                            tmp_path):
    monkeypatch.setattr(sweep, 'vocabulary', lambda dataset: 4096)

    def runs(name):
        read = read_sweep(str(ROOT / f'config/sweeps/{name}.py'))
        assert read.out == f'out/sweeps/{name.removesuffix("_final")}'
        return {run.name: run.settings for run in expand(dataclasses.replace(read, out=str(tmp_path)))}
    found, swept = runs(name), runs(name.removesuffix('_final'))
    assert len(found) == count and all(swept[run] == s for run, s in found.items() if s.seed == 1)


# --- budgets ---

def test_equal_flops_are_equal_within_half_a_step(make):
    arms = {'dense': {}, 'low': {'rank_mlp': 4}, 'deep': {'n_layer': 5, 'optimizer': 'muon'},
            'long': {'budget': 'tokens', 'rank_mlp': 4}}
    dense, low, deep, long = expand(make(arms, {'max_iters': 1000}, budget='flops'))
    assert dense.settings.max_iters == 1000 == long.settings.max_iters
    assert low.settings.max_iters > 1100
    assert deep.settings.max_iters < 600
    for r in (low, deep):
        assert abs(r.flops - dense.flops) <= r.flops / r.settings.max_iters / 2


def test_a_decay_that_is_set_in_steps_ends_with_them(make):
    dense, low = expand(make({'dense': {}, 'low': {'rank_mlp': 4}},
                             {'max_iters': 1000, 'lr_decay_iters': 1000}, budget='flops'))
    assert low.settings.lr_decay_iters == low.settings.max_iters != 1000


def test_what_the_budget_sets_may_not_be_set(make):
    with pytest.raises(UserError, match="low: budget='flops' sets max_iters"):
        expand(make({'dense': {}, 'low': {'max_iters': 7}}, budget='flops'))


# --- running ---

def test_the_runs_are_done_as_planned_and_their_flops_are_those_counted(make):
    made = make({'dense': {}, 'muon': {'optimizer': 'muon', 'rank_mlp': 4}}, budget='flops')
    runs, out_dirs = expand(made), run_missing(made)
    assert out_dirs == [r.out_dir for r in runs] and all(state(r.out_dir, r.settings) == 'done' for r in runs)
    for r in runs:
        assert read_log(r.out_dir)[-1]['flops'] == pytest.approx(r.flops)
        assert read_log(r.out_dir)[-1]['step'] == r.settings.max_iters


@pytest.mark.full
def test_flops_of_a_teacher_and_of_a_network_that_grows_are_counted(make):
    whole, = expand(make({'whole': {}}))
    run_missing(make({'whole': {}}))
    made = make({'dense': {}, 'taught': {'teacher': whole.out_dir},
                 'grown': {'n_layer': 1, 'grow_every': 3, 'grow_to': 3, 'grow_by': 1}}, budget='flops')
    runs = expand(made)
    run_missing(made)
    for r in runs:
        assert read_log(r.out_dir)[-1]['flops'] == pytest.approx(r.flops)
    # a teacher adds a third to each step
    assert runs[1].settings.max_iters == 8 and abs(runs[2].flops - runs[0].flops) < runs[0].flops / 10
    assert sizes(runs[2].settings)[1] == 1.5 * sizes(runs[0].settings)[1]  # its size at the end


@pytest.mark.full
def test_a_killed_sweep_goes_on_with_what_is_missing(make, tmp_path, capsys):
    made = make({'a': {}, 'long': {'max_iters': 100000, 'eval_interval': 20}})
    file = write(made, tmp_path / 's.py')
    command = [sys.executable, 'compare.py', f'--sweep={file}', '--picture=']
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True,
                               env=os.environ | {'OMP_NUM_THREADS': '1'})
    for line in process.stdout:
        if line.startswith('1/2'):
            break
    short, long = expand(made)
    while state(long.out_dir, long.settings) == 'to do' and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert 'stopped with 1 of 2 runs left' in process.stdout.read() and process.wait(60) == 143
    assert state(long.out_dir, long.settings).startswith('step ')
    before = os.stat(f'{short.out_dir}/log.jsonl').st_mtime_ns
    reached = read_log(long.out_dir)[-1]['step']
    settings = json.load(open(f'{long.out_dir}/settings.json'))
    made.arms['long']['max_iters'] = settings['max_iters'] = reached + 3  # 100,000 would take long
    settings['dataset'] += '/'  # another spelling of the same data set
    Path(long.out_dir, 'settings.json').write_text(json.dumps(settings))
    run_missing(made)
    assert '2 runs, 1 to do' in capsys.readouterr().out
    assert os.stat(f'{short.out_dir}/log.jsonl').st_mtime_ns == before
    assert 'resuming' in Path(long.out_dir, 'output.txt').read_text()
    assert read_log(long.out_dir)[-1]['step'] == reached + 3


@pytest.mark.full
def test_a_diverged_run_is_a_result_and_is_not_tried_again(make, tmp_path):
    made = make({'a': {'learning_rate': [1e-2, 1e30]}}, {'warmup_iters': 0, 'grad_clip': 0.0})
    file = write(made, tmp_path / 's.py')
    done = run('compare.py', f'--sweep={file}')
    assert done.returncode == 0 and re.search(r'2/2 a,learning_rate=1e\+30,seed=1: diverged',
                                              done.stdout), done.stdout + done.stderr
    assert re.search(r'\* learning_rate=0.01 +\d\.\d+ n=1\n +learning_rate=1e\+30 +diverged: seed 1',
                     done.stdout)
    assert Path(made.out, 'compare.png').exists()
    assert '2 runs, 0 to do' in run('compare.py', f'--sweep={file}').stdout


@pytest.mark.full
def test_a_run_that_fails_does_not_stop_the_others_and_is_tried_again(make, tmp_path):
    write_dataset(tmp_path / 'no_val', splits=('train',))
    made = make({'bad': {'dataset': str(tmp_path / 'no_val')}, 'good': {}})
    with pytest.raises(UserError, match='1 of 2 runs failed; bad,seed=1: failed with 2 .*no_val'):
        run_missing(made)
    bad, good = expand(made)
    assert state(good.out_dir, good.settings) == 'done' and state(bad.out_dir, bad.settings) == 'to do'
    made.arms.pop('good')
    assert '1 of 1 runs failed' in one_line(run('compare.py', f'--sweep={write(made, tmp_path / "s.py")}',
                                                '--picture='))


def test_the_last_line_of_a_failed_run_is_what_the_last_newline_begins(make):
    run, = expand(make({'a': {}}))
    os.makedirs(run.out_dir)
    Path(run.out_dir, 'output.txt').write_text('step 1\ntrain.py: dataset=a\u2028b: no such data set\n',
                                               encoding='utf-8')
    assert outcome(run, 2) == 'failed with 2 (train.py: dataset=a\u2028b: no such data set)'
    Path(run.out_dir, 'log.jsonl').write_bytes(b'{"step": 1,\r"val_loss": 2}\n')
    assert read_log(run.out_dir) == [{'step': 1, 'val_loss': 2}]


def test_a_dry_run_lists_and_leaves_nothing(make, tmp_path):
    made = make({'a': {'seeds': [1, 2]}})
    done = run('compare.py', f'--sweep={write(made, tmp_path / "s.py")}', '--dry_run')
    assert done.returncode == 0 and not os.path.exists(made.out)
    assert re.search(rf'a,seed=2 +{expand(made)[0].parameters:,} +10 .* to do\n2 runs, 2 to do', done.stdout)


def test_two_sweeps_never_share_a_folder_nor_does_one_with_what_another_left_running(make, tmp_path):
    made = make({'a': {}}, {'max_iters': 300})
    with locked(made.out) as lock:
        assert ('another sweep is running'
                in one_line(run('compare.py', f'--sweep={write(made, tmp_path / "s.py")}')))
        process = start(expand(made)[0], {}, lock)
    # although the process that started it has ended
    with pytest.raises(UserError, match='another sweep is running'):
        run_missing(made)
    process.kill()
    process.wait()
    with locked(made.out):
        pass


def test_each_process_has_a_gpu_or_its_share_of_the_cores(monkeypatch):
    monkeypatch.setattr('features.text.workers.cores', lambda: 8)
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
    monkeypatch.setattr('torch.cuda.device_count', lambda: 0)
    assert places(0) == places(1) == [{}] and places(3) == [{'OMP_NUM_THREADS': '2'}] * 3
    monkeypatch.setattr('torch.cuda.device_count', lambda: 2)
    assert places(0) == [{'CUDA_VISIBLE_DEVICES': '0'}, {'CUDA_VISIBLE_DEVICES': '1'}]
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '5,7')
    assert [place['CUDA_VISIBLE_DEVICES'] for place in places(3)] == ['5', '7', '5']


# --- mistakes ---

@pytest.mark.parametrize('text, names', [
    ("", 'arms: has none'),
    ("arms = {'a': {'n_embed': 3}}", 'arms: a: n_embed: no such setting; did you mean n_embd'),
    ("arms = {'a': {}}\nsead = [1]", 'sead: no such setting; did you mean seeds'),
    ("arms = {'a': 3}", 'arms: a: got 3, takes a dict'), ("arms = {'a': []}", 'arms: a: got []'),
    ("arms = {'a': [{'n_embd': [8]}, {'n_embd': [8, 16]}]}", 'a,n_embd=8,seed=1 is in two of its grids'),
    ("arms = {'a': [{'n_embd': [8]}, {'n_embd': 16}]}", 'its grids sweep n_embd and nothing'),
    ("arms = {'a,b': {}}", "'a,b'"), ("arms = {'a': {'seed': 3}}", 'seed: the sweep sets it'),
    ("arms = {'a': {}}\nseeds = []", 'seeds=[]'), ("arms = {'a': {'seeds': [1, 1]}}", 'seeds=[1, 1]'),
    ("arms = {'a': {}}\nbudget = 'flop'", 'budget'), ("arms = {'a': {'budget': 3}}", 'budget=3'),
    ("arms = {'a': {'n_embd': []}}", 'n_embd=[]'),
    ("arms = {'a': {'n_embd': [8, 8]}}", 'takes different values'),
    ("arms = {'a': {'n_head': [2, 3]}}", 'arms: a,n_head=3,seed=1: n_embd=32 is not divisible'),
    ("arms = {'a': {'n_embd': 'x'}}", "got 'x', takes int"),
    ("arms = {'a': {'minutes': 1}}", 'set max_iters'),
    ("arms = {'a': {'init_from': 'scratch'}}", 'init_from=scratch'),
    ("arms = {'a': {}}\nbase = {'foo': 1}", 'base: foo'),
    ("arms = {'a': {}}\nbase = 'config/nothing.py'", 'no such config file'),
    ("arms = {'a': {'dataset': 'nowhere'}}", 'nowhere'), ("arms = {", 'SyntaxError')])
def test_a_bad_sweep_file_is_one_line_before_anything_runs(dataset, tmp_path, text, names):
    (tmp_path / 's.py').write_text(f'base = {BASE | {"dataset": dataset}}\n'
                                   f'out = {str(tmp_path / "out")!r}\n{text}\n')
    with pytest.raises(UserError) as error:
        expand(read_sweep(str(tmp_path / 's.py')))
    assert names in str(error.value) and not os.path.exists(tmp_path / 'out')


def test_a_folder_that_holds_another_run_is_refused(make, tmp_path):
    made = make({'a': {}})
    run_missing(made)
    with pytest.raises(UserError, match='holds a run with n_embd=32, the sweep wants 48'):
        run_missing(make({'a': {}}, {'n_embd': 48}))
    with pytest.raises(UserError, match='holds a run with dtype="float32", the sweep wants "bfloat16"'):
        run_missing(make({'a': {}}, {'dtype': 'bfloat16'}))
    run_missing(make({'a': {}}, {'dtype': 'auto'}))  # auto chose float32
    # these do not change what the run learns
    run_missing(make({'a': {}}, {'log_interval': 3, 'sample_tokens': 9}))
    assert 'no such config file' in one_line(run('compare.py', '--sweep=nothing.py'))
    assert 'belong to --sweep' in one_line(run('compare.py', 'a', '--jobs=2'))
