"""
The dial: what is given stays, what follows is derived and printed, a run that goes on keeps it, and the
minutes are kept.
"""
import json
import math
import re
import signal
import time
from pathlib import Path

import pytest
import torch
from conftest import one_line, read_log, run, run_here, sha256
from inject import inject

import checkpoint
import train as training
from batches import EVAL_ROWS
from checkpoint import Log
from configurator import UserError, configure
from features import build
from features.plan.dial import batch_tokens, derive, most_steps, plan, shape, size
from features.plan.minutes import Pace, fit_minutes
from run import OneProcess
from train import Settings

CPU = torch.device('cpu')


def planned(vocab_size=512, world=1, data_tokens=1e12, **given):
    s = build(Settings, **given)
    s.given, s.dtype = set(given), 'float32'
    return s, plan(s, vocab_size, data_tokens, CPU, world)


def test_the_depth_gives_a_network_and_twenty_tokens_a_parameter_of_its_blocks():
    s, derived = planned(depth=3)
    assert (s.n_layer, s.n_embd, s.n_head) == (3, 192, 4) and s.optimizer == 'muon' and s.embed_norm
    tokens = s.batch_size * s.gradient_accumulation_steps * s.block_size * s.max_iters
    assert math.isclose(tokens, 20 * size(s, 512)[1], rel_tol=0.05)
    assert {'n_embd', 'max_iters', 'batch_size', 'head_lr', 'optimizer'} <= derived.keys()


def test_what_is_given_stays():
    s, derived = planned(depth=3, n_embd=256, mlp='gelu', muon_lr=0.5, batch_size=2, max_iters=7)
    assert (s.n_embd, s.mlp, s.muon_lr, s.batch_size, s.max_iters) == (256, 'gelu', 0.5, 2, 7)
    assert not {'n_embd', 'mlp', 'muon_lr', 'batch_size', 'max_iters'} & derived.keys()


@pytest.mark.full
def test_parameters_and_tokens_are_met_as_nearly_as_depths_allow():
    for params in (1e6, 10e6, 100e6):
        s, _ = planned(params=params, tokens=1e7)
        assert 0.6 < size(s, 512)[0] / params < 1.6
        assert math.isclose(s.batch_size * s.gradient_accumulation_steps * s.block_size * s.max_iters, 1e7,
                            rel_tol=0.05)
    small, large = (planned(tokens=tokens)[0].n_layer for tokens in (1e7, 1e10))
    assert small < large


@pytest.mark.full
def test_more_minutes_make_a_larger_network(monkeypatch):
    monkeypatch.setattr('features.plan.dial.peak_flops', lambda device, dtype: 1e11)
    depths = [planned(minutes=m)[0].n_layer for m in (1, 60, 6000)]
    assert depths == sorted(depths) and depths[0] < depths[2]


@pytest.mark.full
def test_little_data_makes_a_larger_network_rather_than_more_than_four_epochs(monkeypatch):
    monkeypatch.setattr('features.plan.dial.peak_flops', lambda device, dtype: 1e12)
    much, little = (planned(minutes=5, data_tokens=tokens)[0] for tokens in (1e12, 1e6))
    assert little.n_layer > much.n_layer
    # tokens that are given are given
    assert planned(tokens=1e7, data_tokens=1e4)[0].n_layer == planned(tokens=1e7)[0].n_layer


@pytest.mark.parametrize('tokens, least, most', [(2e5, 512, 1024), (1.5e9, 2 ** 17, 2 ** 19)])
def test_the_batch_follows_the_tokens(tokens, least, most):
    assert least <= batch_tokens(tokens) <= most


@pytest.mark.parametrize('world', [1, 2, 3])
def test_any_number_of_processes_can_share_a_step(world):
    s, _ = planned(depth=4, world=world)
    rows = s.batch_size * s.gradient_accumulation_steps
    assert rows % world == 0 and rows // world % s.batch_size == 0


def test_a_smaller_micro_batch_is_the_same_step():
    sizes = []
    for batch_size in (1, 4, 16):
        s, _ = planned(depth=1, tokens=5e6, batch_size=batch_size)
        assert s.batch_size == batch_size
        sizes.append(s.batch_size * s.gradient_accumulation_steps)
    assert len(set(sizes)) == 1 and sizes[0] > 16


def test_depths_that_do_not_go_with_what_is_given_are_passed_over():
    s, _ = planned(params=10e6, tokens=50e6, n_kv_head=2)
    assert s.n_head % 2 == 0 and 5e6 < size(s, 512)[0] < 20e6
    with pytest.raises(UserError, match='n_layer=4'):
        planned(depth=6, n_layer=4)


def test_evaluations_are_spread_over_the_steps_that_are_given():
    assert planned(depth=3, max_iters=10)[0].eval_interval == 2


@pytest.mark.parametrize('batch_size', [1, 12, 100])
def test_an_evaluation_is_of_twenty_micro_batches_and_its_time_is_planned_for(batch_size):
    s, derived = planned(depth=1, minutes=10, batch_size=batch_size, gradient_accumulation_steps=1)
    assert 20 * batch_size <= EVAL_ROWS * s.eval_iters < 20 * batch_size + EVAL_ROWS
    rows = EVAL_ROWS * s.eval_iters
    fit_minutes(s, derived, 1.0, 0.0)
    assert s.max_iters == round(600 - 6 * rows / batch_size / 3)


def test_tokens_and_minutes_take_the_place_of_a_config_files_steps():
    assert planned(depth=1, tokens=1e6, max_iters=7)[0].max_iters > 100


def test_every_depth_has_whole_heads():
    for depth in range(1, 49):
        sizes = shape(depth, CPU)
        assert sizes['n_embd'] % (2 * sizes['n_head']) == 0


def test_weights_from_elsewhere_have_a_network_already():
    with pytest.raises(UserError, match='init_from=hf:somewhere'):
        planned(depth=2, init_from='hf:somewhere')


def test_steps_on_the_command_line_are_a_limit_beside_minutes(dataset, tmp_path):
    """Those of a config file are not."""
    config = tmp_path / 'config.py'
    config.write_text('max_iters = 5\n')
    for args, most in (([str(config)], math.inf), (['--max_iters=50'], 50),
                       ([str(config), '--max_iters=5000'], math.inf)):
        s = configure(Settings, [*args, f'--dataset={dataset}', '--minutes=10', '--depth=1'])
        s.dtype = 'float32'
        assert most_steps(s) == most
        derived = derive(s, None, CPU, OneProcess(CPU))
        fit_minutes(s, derived, 1.0, 0.0, most)
        assert s.max_iters == 50 if most == 50 else 500 < s.max_iters < 600
        pace = Pace(s, most=most, clock=iter(range(100)).__next__)
        pace.ends = [0, 1, 2]
        assert pace.fit(2) <= most


# --- minutes: the clock is not real ---

MACHINES = {'steady': lambda now: 0.5, 'half as fast midway': lambda now: 0.5 if now < 150 else 1.0,
            'twice as fast midway': lambda now: 0.5 if now < 150 else 0.25, 'busy at first': lambda now: 2.0
            if now < 40 else 0.3, 'noisy': lambda now: 0.3 + 0.4 * (now % 1.7) / 1.7,
            'a pause': lambda now: 40 if 100 < now < 120 else 0.5}


@pytest.mark.parametrize('machine', MACHINES)
@pytest.mark.parametrize('seconds_per_evaluation', [0.1, 3.3, 8.0])
def test_the_minutes_are_kept_on_a_machine_whose_pace_changes(machine, seconds_per_evaluation):
    now, step, fits, seconds_per_step = 10.0, 0, [], MACHINES[machine]
    s = Settings(minutes=5, gradient_accumulation_steps=1, eval_iters=20)
    pace = Pace(s, clock=lambda: now)
    fit_minutes(s, {'max_iters', 'eval_interval', 'log_interval'}, seconds_per_step(now), now)
    while True:  # as train() does
        if step % s.eval_interval == 0 or step >= s.max_iters:
            pace.began = now
            if step < s.max_iters:
                fits.append(pace.fit(step))
                s.max_iters = fits[-1]
            now += seconds_per_evaluation
            pace.end_evaluation()
        if step >= s.max_iters:
            break
        now, step = now + seconds_per_step(now), step + 1
        pace.end_step()
    assert now == pytest.approx(300, rel=0.05), fits
    # as fit_minutes() expects
    assert (machine, seconds_per_evaluation) != ('steady', 3.3) or len(set(fits)) == 1


def test_a_compilation_is_not_the_pace_of_what_follows():
    now = 0.0
    s = Settings(minutes=1, max_iters=100, eval_interval=20, gradient_accumulation_steps=1)
    pace = Pace(s, clock=lambda: now)
    assert pace.fit(0) == 100  # nothing is known yet
    for seconds in (20.0, 0.1):  # to compile, to evaluate
        pace.began, pace.is_compiling, now = now, seconds > 1, now + seconds
        pace.end_evaluation()
    for _ in range(20):
        now += 0.5
        pace.end_step()
    assert pace.evaluation == pytest.approx(0.1) and pace.fit(20) == pytest.approx(20 + 2 * (60 - now), abs=1)
    pace.earlier = 45.0  # another process has taken these
    assert pace.fit(20) == 20


class Machine:
    """Runs train.py with a clock that only its steps move."""
    def __init__(self, patch, seconds_per_step):
        self.now = 0.0
        for module in ('features.plan.minutes', 'checkpoint'):
            patch.setattr(f'{module}.process_age', lambda: self.now)
        train_step = training.train_step

        def timed(*args):
            self.now += seconds_per_step(self.now)
            return train_step(*args)
        patch.setattr(training, 'train_step', timed)

    def run(self, dataset, out_dir, *args):
        self.now = 2.0  # to begin
        Log.EARLIER.clear()  # as in a new process
        small = ['--depth=1', '--minutes=0.5', '--batch_size=4', '--gradient_accumulation_steps=1',
                 '--log_interval=1']
        return run_here(['train.py', f'--dataset={dataset}', f'--out_dir={out_dir}', *small, *DIAL, *args])


def end_of(out_dir):
    """(state, weights) of the newest checkpoint."""
    folder = checkpoint.find(str(out_dir))
    return checkpoint.load_state(folder), checkpoint.read_weights(folder)


def test_a_run_of_minutes_that_slows_down_is_the_same_when_it_goes_on(dataset, tmp_path, monkeypatch):
    machine = Machine(monkeypatch, lambda now: 0.3 if now < 15 else 0.6)
    done = machine.run(dataset, tmp_path / 'whole')
    assert done.returncode == 0 and machine.now == pytest.approx(30, rel=0.05), done.stderr
    state, weights = end_of(tmp_path / 'whole')
    fits, settings = state['fits'], json.loads((tmp_path / 'whole' / 'settings.json').read_text())
    assert (len(fits) > 1
            and fits[-1][1] == state['step'] == state['settings']['max_iters'] == settings['max_iters'])
    assert f'max_iters={fits[-1][1]} in place of {fits[-2][1]}' in done.stdout
    losses = {r['step']: r['train_loss'] for r in read_log(tmp_path / 'whole') if 'train_loss' in r}

    interval = settings['eval_interval']
    with monkeypatch.context() as patch:  # after the last evaluation that could fit again
        inject(f'step@{(state["step"] - 1) // interval * interval + 1}=term', patch.setattr)
        assert machine.run(dataset, tmp_path / 'parts').returncode == 128 + signal.SIGTERM
    assert machine.run(dataset, tmp_path / 'parts').returncode == 0
    again, same_weights = end_of(tmp_path / 'parts')
    assert again['fits'] == fits and again['step'] == state['step']
    assert all(torch.equal(weights[name], same_weights[name]) for name in weights)
    assert losses == {r['step']: r['train_loss'] for r in read_log(tmp_path / 'parts') if 'train_loss' in r}


def test_an_older_run_of_minutes_goes_on(dataset, tmp_path, monkeypatch):
    """Its checkpoint knows nothing of fits."""
    machine = Machine(monkeypatch, lambda now: 0.3)
    with monkeypatch.context() as patch:
        inject('step@5=term', patch.setattr)
        assert machine.run(dataset, tmp_path).returncode == 128 + signal.SIGTERM
    folder = Path(checkpoint.find(str(tmp_path)))
    state = checkpoint.load_state(str(folder))
    del state['fits']
    (folder / 'state.json').write_text(json.dumps(state))
    manifest = json.loads((folder / 'manifest.json').read_text())
    manifest['files']['state.json'] = {'size': (folder / 'state.json').stat().st_size,
                                       'sha256': sha256(folder / 'state.json')}
    (folder / 'manifest.json').write_text(json.dumps(manifest))
    done = machine.run(dataset, tmp_path)
    assert done.returncode == 0 and 'at step 6' in done.stdout, done.stderr
    assert end_of(tmp_path)[0]['step'] == end_of(tmp_path)[0]['fits'][-1][1]


# --- as a user runs it ---

DIAL = ['--device=cpu', '--dtype=float32', '--sample_tokens=0', '--block_size=32', '--compile=False']


def test_a_run_prints_what_it_derived_and_goes_on_with_it(dataset, tmp_path):
    args = ['train.py', f'--dataset={dataset}', f'--out_dir={tmp_path}', '--depth=1', '--tokens=20000', *DIAL]
    first = run(*args, '--eval_interval=10')
    assert first.returncode == 0, first.stderr
    derived = dict(re.findall(r'--(\w+)=(\S+)', re.search('derived: (.*)', first.stdout).group(1)))
    settings = json.loads((tmp_path / 'settings.json').read_text())
    assert derived['n_embd'] == '128' and all(str(settings[name]) == value for name, value in derived.items())
    again = run(*args, '--eval_interval=10', '--muon_lr=0.01')
    assert f'done: {settings["max_iters"]} steps' in again.stdout and 'derived' in again.stdout


@pytest.mark.full
def test_minutes_are_those_of_the_whole_process(dataset, tmp_path):
    began = time.monotonic()
    done = run('train.py', f'--dataset={dataset}', f'--out_dir={tmp_path}', '--minutes=0.2', '--depth=1',
               *DIAL)
    assert done.returncode == 0 and 'done' in done.stdout, done.stderr
    assert 4 < time.monotonic() - began < 25  # of 12 s, on a shared machine
    records = [json.loads(line) for line in (tmp_path / 'log.jsonl').open()]
    assert len({r['tokens'] / r['step'] for r in records if r['step']}) == 1 and records[-1]['seconds'] < 25


def test_the_timed_steps_leave_no_trace_in_the_weights(dataset, tmp_path, monkeypatch):
    done = Machine(monkeypatch, lambda now: 0.3).run(dataset, tmp_path / 'a')
    assert done.returncode == 0, done.stderr
    derived = dict(re.findall(r'--(\w+)=(\S+)', re.search('derived: (.*)', done.stdout).group(1)))
    again = [f'--{name}={value}' for name, value in (
        derived | {'batch_size': 4, 'gradient_accumulation_steps': 1, 'log_interval': 1}).items()]
    plain = run_here(['train.py', f'--dataset={dataset}', f'--out_dir={tmp_path}/b', *again, *DIAL])
    assert plain.returncode == 0, plain.stderr
    until = int(derived['eval_interval'])  # where max_iters is fitted again
    losses = [{r['step']: r['train_loss'] for r in read_log(tmp_path / name)
               if 'train_loss' in r and r['step'] <= until} for name in 'ab']
    assert losses[0] == losses[1] and len(losses[0]) == until


def test_another_dial_or_a_step_that_cannot_be_shared_is_refused(dataset, tmp_path):
    args = ['train.py', f'--dataset={dataset}', f'--out_dir={tmp_path}/run', '--depth=1', *DIAL]
    assert run(*args, '--tokens=2000').returncode == 0
    assert 'belongs to a run with another dial' in one_line(run(*args, '--tokens=4000'))
    shared = run(*args, '--tokens=2000', f'--out_dir={tmp_path}/other', '--batch_size=3',
                 '--gradient_accumulation_steps=1', nproc=2)
    assert 'cannot be shared by 2 processes' in shared.stderr and not (tmp_path / 'other').exists()


@pytest.mark.parametrize('args, words', [
    (['--depth=2', '--params=1e6'], 'depth=2, params=1e+06'),
    (['--tokens=1e6', '--minutes=1'], 'tokens=1e+06, minutes=1'), (['--depth=100'], 'depth=100'),
    (['--tokens=1e25'], 'tokens=1e+25'), (['--depth=1', '--dataset={}'], 'dataset={}'),
    (['--minutes=-1'], 'minutes=-1'), (['--minutes=0.01', '--depth=1'], 'minutes=0.01')])
def test_a_dial_that_cannot_work_is_one_line_and_nothing_is_written(args, words, dataset, tmp_path):
    done = run('train.py', f'--dataset={dataset}', f'--out_dir={tmp_path}/run', *args, *DIAL)
    assert words in one_line(done) and not Path(tmp_path / 'run').exists()
