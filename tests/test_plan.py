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
from statistics import median
from types import SimpleNamespace

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
from features.plan.minutes import ENDING, Pace, evaluation_steps, fit_minutes
from optim import learning_rate
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
    assert EVAL_ROWS * s.eval_iters == rows and s.max_iters == round(600 - ENDING - 6 * rows / batch_size / 3)


def test_evaluations_take_little_of_the_minutes():
    s, derived = planned(depth=1, minutes=2, batch_size=16, gradient_accumulation_steps=1)
    fit_minutes(s, derived, 1.0, 10.0)
    steps = 120 - ENDING - 10
    assert 0.015 * steps < evaluation_steps(s) <= 0.02 * steps
    assert s.max_iters == round(steps - 6 * evaluation_steps(s))
    fit_minutes(s, derived, 4.0, 10.0)
    assert s.eval_iters == 4


def test_eval_iters_that_are_given_stay():
    """Or runs that are compared, as those of make demo, would be validated on other tokens each."""
    s, derived = planned(depth=1, minutes=2, batch_size=16, gradient_accumulation_steps=1, eval_iters=14)
    fit_minutes(s, derived, 1.0, 10.0)
    assert s.eval_iters == 14 and 'eval_iters' not in derived


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
        pace = Pace(s, most=most)
        pace.times.extend([1.0, 1.0])
        assert pace.fit(2, 2.0)[0] <= most


# --- minutes: the clock is not real ---

RECIPE = {'schedule': 'wsd', 'cooldown': 0.6, 'warmup_iters': 0, 'min_lr': 0.0}
# How many times as long things take at a time, in seconds; the run has 300 of them
MACHINES = {
    'steady': lambda now: 1, 'half as fast midway': lambda now: 1 if now < 150 else 2,
    'three times as fast midway': lambda now: 1 if now < 150 else 1 / 3,
    'three times as fast at the end': lambda now: 1 if now < 270 else 1 / 3,
    'three times as slow at the end': lambda now: 1 if now < 285 else 3,
    'slow for the last steps': lambda now: 8 if 290 < now < 296 else 1,
    'slow for a third of the time': lambda now: 3 if 100 < now < 200 else 1,
    'slow until just before the end': lambda now: 5 if 100 < now < 285 else 1,
    'slow now and then': lambda now: 3 if now % 30 < 10 else 1,
    'slower and slower': lambda now: 1 + now / 100, 'busy at first': lambda now: 3 if now < 40 else 0.6,
    'noisy': lambda now: 0.5 + 1.5 * (now * 7.13 % 1), 'a pause': lambda now: 800 if 148 < now < 150 else 1,
    'a pause at the end': lambda now: 20 if 289 < now < 294 else 1}
# Seconds of evaluation number n
EVALUATIONS = {'cheap': lambda n: 0.1, 'usual': lambda n: 3.3, 'dear': lambda n: 6,
               'slow at first': lambda n: 3.3 if n else 25,
               'slow once': lambda n: 20 if n == 1 else 2}


class Silent(OneProcess):
    def say(self, text):
        pass


class Simulation:
    """A run of five minutes on a machine of that pace, as train() makes it; the clock is not real."""
    def __init__(self, patch, pace_at, seconds_of, per_step=0.5, fits=None, ranks=None, **given):
        patch.setattr(Pace, 'write_settings', lambda self: None)
        self.now, self.pace_at = 10.0, pace_at
        self.s = s = Settings(minutes=5, gradient_accumulation_steps=1, eval_iters=20, **given)
        self.pace = Pace(s, clock=lambda: self.now)
        if fits:  # those of another run
            made = {step: count for step, count, *_ in fits[1:]}
            patch.setattr(Pace, 'fit', lambda pace, step, now: (made.get(step, s.max_iters), s.eval_interval))
        run, step, self.rates, self.evaluations = SimpleNamespace(log=None, to_compile=set()), 0, [], []
        first = [per_step * pace_at(self.now) for _ in range(5)]
        self.work(8 * per_step)

        def fit():
            fit_minutes(s, {'max_iters', 'eval_interval', 'log_interval'}, median(first), self.now)
            return s.max_iters, s.eval_interval
        ranks = ranks or Silent(CPU)
        s.max_iters, s.eval_interval = ranks.from_first(fit)
        self.pace.begin(first)
        while True:
            if step % s.eval_interval == 0 or step >= s.max_iters:
                self.work(seconds_of(len(self.evaluations)))
                self.evaluations.append(step)
                self.pace.end_evaluation(step, run)
            if step >= s.max_iters:
                break
            self.rates.append(learning_rate(step, s, 1.0))
            self.work(per_step)
            step += 1
            self.pace.end_step(step, run, ranks)

    def work(self, seconds):
        for _ in range(10):
            self.now += seconds / 10 * self.pace_at(self.now)


@pytest.mark.parametrize('schedule', ['wsd', 'cosine'])
@pytest.mark.parametrize('machine', MACHINES)
@pytest.mark.parametrize('evaluations', EVALUATIONS)
def test_the_minutes_are_kept_on_a_machine_whose_pace_changes(machine, evaluations, schedule, monkeypatch):
    given, low = (RECIPE, 0.0) if schedule == 'wsd' else ({}, 0.1)
    run = Simulation(monkeypatch, MACHINES[machine], EVALUATIONS[evaluations], **given)
    assert run.now + ENDING == pytest.approx(300, rel=0.05), run.pace.fits
    # The rate rises and falls evenly, to its end value
    after = run.rates[len(run.rates) // 6:]
    changes = [b - a for a, b in zip(after, after[1:])]
    assert max(changes) < 1e-9 and min(changes) > -0.06 and run.rates[-1] < low + 0.06
    # No evaluation is just before the last one
    assert run.evaluations[-1] - run.evaluations[-2] > 0.4 * run.evaluations[1]
    if machine == 'steady' and evaluations == 'usual':  # as fit_minutes() expects
        assert len(run.pace.fits) == 1
    if machine == 'a pause':  # it takes steps, but does not make the others slow
        assert min(changes) > -0.01


@pytest.mark.parametrize('warmup', [None, 40])
def test_a_warm_up_is_not_bent(warmup, monkeypatch):
    run = Simulation(monkeypatch, MACHINES['busy at first'], EVALUATIONS['usual'], warmup_iters=warmup)
    peak = run.rates.index(max(run.rates))
    assert len(run.pace.fits) > 3 and run.rates[peak] > 0.99
    assert run.rates[:peak] == sorted(run.rates[:peak]) and run.rates[peak:] == sorted(run.rates[peak:])[::-1]
    assert warmup is None or peak in (39, 40) and run.rates[9] == pytest.approx(10 / 41)


def test_a_cooldown_of_given_length_is_left_alone(monkeypatch):
    given = RECIPE | {'lr_decay_iters': 2000, 'min_lr': 0.1}
    run = Simulation(monkeypatch, MACHINES['busy at first'], EVALUATIONS['usual'], **given)
    assert len(run.pace.fits) > 3
    assert run.rates == [learning_rate(n, Settings(**given), 1.0) for n in range(len(run.rates))]


def test_the_same_fits_make_the_same_run(monkeypatch):
    """Whatever the clock says: the rates are functions of the step and the fits."""
    one = Simulation(monkeypatch, MACHINES['noisy'], EVALUATIONS['usual'], **RECIPE)
    other = Simulation(monkeypatch, MACHINES['noisy'], EVALUATIONS['usual'], fits=one.pace.fits, **RECIPE)
    assert one.rates == other.rates and one.pace.fits == other.pace.fits and len(one.pace.fits) > 5
    s = Settings(minutes=5, max_iters=one.pace.fits[-1][1], **RECIPE)
    Pace(s, json.loads(json.dumps(one.pace.fits)))  # of a run that goes on after the last fit
    at = one.pace.fits[-1][0]
    assert one.rates[at:] == [learning_rate(n, s, 1.0) for n in range(at, s.max_iters)]


def test_the_time_of_earlier_processes_counts_and_that_of_compiling_does_not(monkeypatch):
    now, silent = 0.0, Silent(CPU)
    run = SimpleNamespace(log=SimpleNamespace(seconds=20.0), to_compile={'evaluation'})
    s = Settings(minutes=1, max_iters=100, eval_interval=60, gradient_accumulation_steps=1)
    pace = Pace(s, clock=lambda: now)
    now = 15.0
    pace.end_step(30, run, silent)  # the first one compiled
    assert not pace.times and s.max_iters == 100
    for step in range(31, 36):
        now += 0.5
        pace.end_step(step, run, silent)
    assert s.max_iters < 80 and pace.fits[-1][1] == s.max_iters
    now += 20.0
    pace.end_evaluation(35, run)
    assert not pace.costs
    run.to_compile.clear()
    pace.end_step(36, run, silent)
    now += 1.0
    pace.end_evaluation(36, run)
    assert len(pace.costs) == 1


def test_a_run_that_goes_on_after_its_time_lands(monkeypatch):
    """A process that was ended late has few steps left for the rest of the schedule."""
    monkeypatch.setattr(Pace, 'write_settings', lambda self: None)
    now, step = 70.0, 150
    run = SimpleNamespace(log=SimpleNamespace(seconds=55.0), to_compile=set())
    s = Settings(minutes=1, max_iters=200, eval_interval=40, gradient_accumulation_steps=1, eval_iters=1,
                 **RECIPE)
    pace = Pace(s, clock=lambda: now)
    rates = []
    while step < s.max_iters:
        rates.append(learning_rate(step, s, 1.0))
        now, step = now + 0.1, step + 1
        pace.end_step(step, run, Silent(CPU))
    assert 4 <= len(rates) <= 10 and rates[-1] < 0.15 < rates[0] and rates == sorted(rates)[::-1]


def test_all_ranks_follow_the_first_one(monkeypatch):
    """Whatever their clocks say, they ask it at the same steps, and have the same rates."""
    answers = []

    class First(Silent):
        def from_first(self, compute):
            answers.append(compute())
            return answers[-1]

    class Other(Silent):
        def from_first(self, compute):
            return answers.pop(0)

    first, other = (
        Simulation(monkeypatch, pace_at, EVALUATIONS['usual'], ranks=ranks, **RECIPE)
        for ranks, pace_at in ((First(CPU), MACHINES['noisy']), (Other(CPU), MACHINES['steady'])))
    assert first.rates == other.rates and first.evaluations == other.evaluations and not answers
    assert first.pace.fits == other.pace.fits and len(first.pace.fits) > 5


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
    assert done.returncode == 0 and machine.now + ENDING == pytest.approx(30, rel=0.05), done.stderr
    state, weights = end_of(tmp_path / 'whole')
    fits, settings = state['fits'], json.loads((tmp_path / 'whole' / 'settings.json').read_text())
    assert (len(fits) > 4
            and fits[-1][1] == state['step'] == state['settings']['max_iters'] == settings['max_iters'])
    assert re.findall(r'seconds are gone, max_iters=(\d+) in place of', done.stdout)[-1] == str(state['step'])
    losses = {r['step']: r['train_loss'] for r in read_log(tmp_path / 'whole') if 'train_loss' in r}

    # The same fits, in two processes that need other times. The first one ends between two evaluations
    machine = Machine(monkeypatch, lambda now: 0.1)
    made = {step: count for step, count, *_ in fits[1:]}
    monkeypatch.setattr(Pace, 'fit', lambda pace, step, now: (made.get(step, pace.s.max_iters),
                                                              pace.s.eval_interval))
    monkeypatch.setattr(Pace, 'OFTEN', 1000)  # asks for a fit after every step
    monkeypatch.setattr('features.plan.minutes.fit_minutes',
                        lambda s, *args: setattr(s, 'max_iters', fits[0][1]))
    at = fits[-2][0]
    with monkeypatch.context() as patch:
        inject(f'step@{at + 1}=term', patch.setattr)
        assert machine.run(dataset, tmp_path / 'parts').returncode == 128 + signal.SIGTERM
    begun, _ = end_of(tmp_path / 'parts')
    assert at < begun['step'] < state['step'] and begun['step'] % begun['settings']['eval_interval']
    assert begun['fits'] == [fit for fit in fits if fit[0] <= begun['step']]
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


# --- the sweep around its choice ---

def test_the_sweep_varies_one_thing_at_a_time_and_counts_each_step_time_once(tmp_path, monkeypatch):
    import experiments.dial as sweep
    asked = []
    chosen = {'n_layer': 3, 'n_embd': 192, 'n_head': 4, 'block_size': 256, 'batch_size': 8,
              'dtype': 'float32', 'gradient_accumulation_steps': 2, **dict.fromkeys(sweep.RATES, 0.03)}
    monkeypatch.setattr(sweep, 'choice', lambda folder, minutes: chosen)
    monkeypatch.setattr(sweep, 'count_steps', lambda folder, minutes, arm, out_dir: asked.append(arm) or (
        0 if arm['n_layer'] == 4 else 100 + len(asked)))
    s = sweep.Settings(sets=['a', 'b'], minutes=[1.0], rounds=3, busy=True, out_dir=str(tmp_path))
    counted = sweep.count_all(s)
    assert len(asked) == 3 * 7  # rates cost no time, and the sets have the same choice
    arms = counted['a', 1.0]
    assert arms == counted['b', 1.0] and len(arms) == 8 and 'larger' not in arms  # its minutes do not suffice
    for name, arm in arms.items():
        changed = {key for key in chosen if arm[key] != chosen[key]}
        assert changed == {'dial': set(), 'smaller': {'n_layer', 'n_embd', 'head_lr'}}.get(
            name, set(sweep.RATES) if 'rates' in name else
            {'batch_size', 'block_size'} if 'context' in name else {'batch_size'})
        tokens = arm['batch_size'] * arm['block_size']
        assert tokens == 8 * 256 * {'batch_x2': 2, 'batch_half': 0.5}.get(name, 1)
    assert arms['rates_x1.5']['max_iters'] == arms['dial']['max_iters'] == 108  # the median of three
    assert sweep.count_all(s) == counted and len(asked) == 3 * 7  # it continues from its file
    monkeypatch.setattr(sweep.os, 'getloadavg', lambda: (99.0, 0, 0))
    with pytest.raises(UserError, match='busy=False'):
        sweep.count_all(sweep.Settings(sets=['c'], minutes=[1.0], out_dir=str(tmp_path)))


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
    monkeypatch.setattr(Pace, 'SMALL', math.inf)  # max_iters stays
    done = Machine(monkeypatch, lambda now: 0.3).run(dataset, tmp_path / 'a')
    assert done.returncode == 0, done.stderr
    derived = dict(re.findall(r'--(\w+)=(\S+)', re.search('derived: (.*)', done.stdout).group(1)))
    again = [f'--{name}={value}' for name, value in (
        derived | {'batch_size': 4, 'gradient_accumulation_steps': 1, 'log_interval': 1}).items()]
    plain = run_here(['train.py', f'--dataset={dataset}', f'--out_dir={tmp_path}/b', *again, *DIAL])
    assert plain.returncode == 0, plain.stderr
    losses = [{r['step']: r['train_loss'] for r in read_log(tmp_path / name) if 'train_loss' in r}
              for name in 'ab']
    assert losses[0] == losses[1] and len(losses[0]) == int(derived['max_iters']) > 10


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
