"""
Many training runs from one small file: arms (what is compared), the settings swept inside each, and seeds.

    python compare.py --sweep=config/sweeps/demo.py       # runs what is missing, then reports
    run_missing(Sweep(base='config/demo_dense.py', arms={'dense': {'learning_rate': [1e-3, 2e-3]}}, out='out/mine'))

Each run is train.py in a process and a folder of its own, so a sweep that was stopped goes on where it was. compare.py imports
this file, not the other way round: running needs no tables, and other scripts want runs without a report.
"""
import dataclasses
import hashlib
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import typing
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

import torch

import checkpoint
import hub
from batches import Mixture, real_folders
from configurator import (
    ROOT,
    FilePath,
    UserError,
    build,
    check,
    configure,
    core_fields,
    default_of,
    expand_paths,
    feature_names,
    find_field,
    from_dict,
    options,
    read_config,
    with_features,
)
from features.lora import layers as lora
from features.scale.guard import stop_signals
from files import replace_text, writing
from model import ModelConfig, make_model
from optim import make_optimizer
from origin import adopt, model_config
from prepare import cores
from run import step_flops
from runlog import read_records
from train import Settings

# what may differ between two runs of the same arm: it changes nothing of what is learned
BESIDE = {'out_dir', 'device', 'compile', 'backend', 'recompute', 'verify_data', 'log_interval', 'always_save_checkpoint', 'checkpoint_interval',
          'keep_checkpoints', 'sample_prompt', 'sample_tokens', 'wandb_log', 'wandb_project', 'wandb_run_name'}


@dataclass
class Sweep:
    base: FilePath | list[FilePath] | dict = field(default_factory=dict)  # what all arms share: a config file, several of them, or settings
    arms: dict = field(default_factory=dict)  # {name: {setting: value}}; a list of values is swept. An arm may have 'seeds' and 'budget' of its own,
    #                                           and be a list of such dicts: a cross of two short lines costs less than the whole grid
    seeds: list[int] = field(default_factory=lambda: [1])
    budget: Literal['tokens', 'flops'] = 'tokens'  # flops: max_iters of every arm is set so that it spends the FLOPs of the first one
    out: FilePath = ''  # folder of the runs; '' = out/sweeps/ and the name of the sweep's file

    def check(self):
        """Raise ValueError for what cannot be a sweep."""
        if not self.arms:
            raise ValueError('arms: has none: write arms = {NAME: {SETTING: VALUE}}')
        for name, arm in self.arms.items():
            if not isinstance(name, str) or not re.fullmatch(r'[\w.+-]+', name):
                raise ValueError(f'arms: {name!r} names a folder too: takes letters, digits and . _ + -')
            if not grids(arm) or not all(isinstance(grid, dict) for grid in grids(arm)):
                raise ValueError(f'arms: {name}: got {arm!r}, takes a dict of settings, or a list of them')
            for grid in grids(arm):
                seeds = grid.get('seeds', self.seeds)
                if not isinstance(seeds, list) or not seeds or len(set(seeds)) < len(seeds):
                    raise ValueError(f'arms: {name}: seeds={seeds}: takes a list of different numbers')
                if grid.get('budget', self.budget) not in ('tokens', 'flops'):
                    raise ValueError(f'arms: {name}: budget={grid["budget"]}: takes tokens or flops')
        if not self.out:
            raise ValueError("out='': name the folder of the runs")


@dataclass
class Run:
    """One training run of a sweep."""
    arm: str
    swept: dict  # {setting: value} of what is swept inside the arm
    settings: Settings  # as train.py will have them
    args: list[str]  # that say so to train.py
    parameters: int
    flops: float  # of the whole run

    @property
    def seed(self):
        return self.settings.seed

    @property
    def out_dir(self):
        return self.settings.out_dir

    @property
    def name(self):
        return os.path.basename(self.out_dir)


def read_sweep(path):
    """The Sweep that a Python file of assignments describes. Raises UserError."""
    sweep = Sweep(**read_config(Sweep, path))
    sweep.out = sweep.out or os.path.join('out', 'sweeps', os.path.splitext(os.path.basename(path))[0])
    try:
        check(sweep)
    except UserError as error:
        raise UserError(f'{path}: {error}') from None
    return sweep


# -----------------------------------------------------------------------------
# From arms to runs

def expand(sweep):
    """The runs of a sweep, seed by seed, so that arms can be compared before the last seed is done. Raises UserError for what cannot work."""
    check(sweep)
    for key in sweep.base if isinstance(sweep.base, dict) else ():
        find_field(Settings, key, f'base: {key}')
    rows, total = [], None  # a row: the runs of one setting, a seed each
    for name, grid in [(name, grid) for name, arm in sweep.arms.items() for grid in grids(arm)]:
        fixed, swept = split(name, {key: value for key, value in grid.items() if key not in ('seeds', 'budget')})
        equal = grid.get('budget', sweep.budget) == 'flops'
        if equal and ('max_iters' in swept or rows and 'max_iters' in fixed):
            raise UserError(f"arms: {name}: max_iters is what budget='flops' sets: leave it out, or give the arm budget='tokens'")
        for values in itertools.product(*swept.values()):
            row = [make_run(sweep, name, fixed, dict(zip(swept, values)), seed, total if equal else None) for seed in grid.get('seeds', sweep.seeds)]
            total = total or row[0].flops
            rows.append(row)
    runs = [run for seed in itertools.zip_longest(*rows) for run in seed if run]
    check_grids(runs)
    check_folders(runs)
    return runs


def grids(arm):
    """The grids of an arm: it is one, or a list of them."""
    return arm if isinstance(arm, list) else [arm]


def split(name, arm):
    """({setting: value} of what is the same in the whole arm, {setting: list of values} of what is swept)."""
    fixed, swept = {}, {}
    for key, value in arm.items():
        kinds = options(find_field(Settings, key, f'arms: {name}: {key}').type)
        if key in ('seed', 'out_dir'):
            raise UserError(f'arms: {name}: {key}: the sweep sets it: leave it out' + ', or give seeds' * (key == 'seed'))
        is_list = any(typing.get_origin(kind) is list for kind in kinds)  # the value of such a setting is a list by nature
        if isinstance(value, list) and (not is_list or value and isinstance(value[0], list)):
            if not value or len({slug(v) for v in value}) < len(value):
                raise UserError(f'arms: {name}: {key}={value}: takes different values')
            swept[key] = value
        else:
            fixed[key] = value
    return fixed, swept


def make_run(sweep, name, fixed, swept, seed, flops=None):
    """The Run of one setting and seed; for a budget of `flops`, with the steps that spend it."""
    folder = ','.join([name] + [f'{key}={slug(value)}' for key, value in swept.items()] + [f'seed={seed}'])
    shared = sweep.base if isinstance(sweep.base, dict) else {}
    files = [] if isinstance(sweep.base, dict) else [sweep.base] if isinstance(sweep.base, str) else sweep.base
    given = shared | fixed | swept | {'seed': seed, 'out_dir': os.path.join(sweep.out, folder)}
    try:
        s = settle(files, given)
        per_step, beyond = cost(s)
        if flops:
            given['max_iters'] = max(1, round((flops - beyond) / per_step))
            if s.lr_decay_iters:
                given['lr_decay_iters'] = max(1, round(s.lr_decay_iters * given['max_iters'] / s.max_iters))
        for key, value in (('sample_tokens', 0), ('keep_checkpoints', 1)):  # nobody looks at the samples, and a hundred runs fill a disk
            if key not in s.given:
                given[key] = value
        s = settle(files, given)
    except UserError as error:
        raise UserError(f'arms: {folder}: {error}') from None
    return Run(name, swept, s, arguments(files, given), sizes(s)[0], beyond + per_step * s.max_iters)


def arguments(files, given):
    return files + [f'--{key}={value}' for key, value in given.items()]


def settle(files, given):
    """Settings as train.py will have them, the size of the vocabulary and the network of the weights it starts from included."""
    s = configure(Settings, arguments(files, given))
    if s.is_planned:
        raise UserError('depth, params, tokens, minutes: a sweep compares what is known beforehand: set max_iters and the sizes')
    if s.init_from in ('resume', 'scratch'):
        raise UserError(f'init_from={s.init_from}: leave it out: a sweep starts its runs and goes on with them by itself')
    if s.init_from != 'auto':
        adopt(s, network(s.init_from), s.init_from)
    s.vocab_size = s.vocab_size or vocabulary(json.dumps(s.dataset))
    check(s)
    return s


@lru_cache
def network(init_from):
    """The ModelConfig of weights that were trained elsewhere."""
    if hub.knows(init_from):
        return hub.load(init_from)[0]
    return from_dict(ModelConfig, checkpoint.load_state(checkpoint.find(init_from, 'best'))['model'], init_from)


@lru_cache
def vocabulary(dataset):
    return Mixture(json.loads(dataset), 'train', 1, 0).vocab_size


def blank(s, **changes):
    """The network of a run, without its numbers."""
    with torch.device('meta'):
        model = make_model(dataclasses.replace(model_config(s), **{'rank_guide': 0, 'n_layer': s.grow_to or s.n_layer} | changes), init=False)
        if s.lora_rank:
            lora.begin(model, s, is_new=False)
        return model


def sizes(s):
    """(parameters, those of the blocks, those that are trained) of the network that a run ends with."""
    model = blank(s)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad) if s.lora_rank else model.num_params()
    return model.num_params(), sum(p.numel() for name, p in model.named_parameters() if name.startswith('blocks.')), trained


def cost(s):
    """
    (floating-point operations of a step, the optimizer's and a teacher's included, at the end of a run; what the steps before take beyond
    that, guides of low-rank layers more, networks that still grow less) without making its network.
    """
    tokens = s.batch_size * s.gradient_accumulation_steps * s.block_size
    with torch.device('meta'):
        teacher = make_model(network(s.teacher), init=False).requires_grad_(False) if s.teacher else None

    def per_step(**changes):
        model = blank(s, **changes)
        return step_flops(model, make_optimizer(model, s), teacher, tokens)
    end = per_step()
    beyond = s.rank_guide * (per_step(rank_guide=s.rank_guide) - end) if s.rank_guide else 0
    for n_layer in range(s.n_layer, s.grow_to, s.grow_by) if s.grow_every else ():
        beyond += s.grow_every * (per_step(n_layer=n_layer) - end)
    return end, beyond


def slug(value):
    """A value as a part of a folder's name: as it is where that is short and plain, else with its hash."""
    text = str(value)
    plain = re.sub(r'[^\w.+-]+', '', text)[:24]
    return plain if plain == text else f'{plain}-{hashlib.sha256(text.encode()).hexdigest()[:6]}'


def check_grids(runs):
    """Raise UserError where the grids of an arm do not sweep the same settings, or meet in a run."""
    keys, folders = {}, set()
    for run in runs:
        if keys.setdefault(run.arm, run.swept.keys()) != run.swept.keys():
            raise UserError(f'arms: {run.arm}: its grids sweep {", ".join(keys[run.arm]) or "nothing"} and {", ".join(run.swept) or "nothing"}: '
                            'give each a list for the same settings')
        if run.out_dir in folders:
            raise UserError(f'arms: {run.arm}: {run.name} is in two of its grids: leave it out of one')
        folders.add(run.out_dir)


def check_folders(runs):
    """Raise UserError where a folder holds another run than the sweep's."""
    for run in runs:
        stored = read_settings(run.out_dir)
        for f in dict.fromkeys((*dataclasses.fields(stored), *dataclasses.fields(run.settings))) if stored else ():
            was, now = (json.dumps(getattr(s, f.name, default_of(f))) for s in (stored, run.settings))
            if f.name == 'dataset' and real_folders(stored.dataset) == real_folders(run.settings.dataset):
                continue
            if f.name not in BESIDE and was != now and not (f.name == 'dtype' and '"auto"' in (was, now)):  # a run writes down what auto was
                raise UserError(f'{run.out_dir}: holds a run with {f.name}={was}, the sweep wants {now}: give another out, or move that one away')


# -----------------------------------------------------------------------------
# What is in a run's folder

def read_settings(out_dir):
    """The Settings of the run in `out_dir`, None where there is none. What an older run did not know yet is at its default."""
    try:
        with open(os.path.join(out_dir, 'settings.json'), encoding='utf-8') as f:
            stored = json.load(f)
    except (OSError, ValueError):
        return None
    known = [f for f in dataclasses.fields(with_features(Settings, *feature_names())) if f.name in stored]
    used = [f for f in known if f.name in core_fields(Settings) or stored[f.name] != default_of(f)]
    return build(Settings, **{f.name: expand_paths(stored[f.name], f) for f in used})


def read_log(out_dir):
    """The records of log.jsonl; none where there is none."""
    return read_records(os.path.join(out_dir, 'log.jsonl'))


def state(out_dir, s):
    """'done', 'diverged', 'step N' of an unfinished run, or 'to do'."""
    if os.path.exists(os.path.join(out_dir, 'diverged.txt')):
        return 'diverged'
    records = read_log(out_dir)
    val = [r for r in records if 'val_loss' in r]
    if val and (val[-1]['step'] >= s.max_iters or s.target_val_loss and val[-1]['val_loss'] <= s.target_val_loss):
        return 'done' if math.isfinite(val[-1]['val_loss']) else 'diverged'
    return f'step {records[-1]["step"]}' if records else 'to do'


def list_runs(runs):
    """What a sweep would run."""
    width = max(len(run.name) for run in runs)
    lines = [f'{"run":{width}}  parameters   steps      FLOPs  state']
    lines += [f'{r.name:{width}}  {r.parameters:10,}  {r.settings.max_iters:6,}  {r.flops:9.2e}  {state(r.out_dir, r.settings)}' for r in runs]
    left = [r for r in runs if state(r.out_dir, r.settings) not in ('done', 'diverged')]
    return '\n'.join(lines + [f'{len(runs)} runs, {len(left)} to do: {sum(r.flops for r in left):.2e} FLOPs'])


# -----------------------------------------------------------------------------
# Running

def run_missing(sweep, jobs=0):
    """
    Run what the sweep has not run yet, one process a GPU, or `jobs` of them; on a CPU one, or `jobs` that share its cores. Returns the
    out_dirs of all its runs. A run that diverged is one result more; raises UserError at the end if another one failed.
    """
    runs = expand(sweep)
    failed = []
    with locked(sweep.out) as lock:
        left = [run for run in runs if state(run.out_dir, run.settings) not in ('done', 'diverged')]
        print(f'{sweep.out}: {len(runs)} runs, {len(left)} to do', flush=True)
        with writing(sweep.out, 'make room, then run the same command to go on'):
            work(left, places(jobs), lock, failed)
    if failed:
        run, reason = failed[0]
        raise UserError(f'{len(failed)} of {len(runs)} runs failed; {run.name}: {reason}; more in {run.out_dir}/output.txt. The same command tries again')
    return [run.out_dir for run in runs]


@contextmanager
def locked(folder):
    """Hold `folder` for this sweep alone. Its runs inherit the lock: it is held until the last of them has ended, however this process ends."""
    import fcntl  # here: on Windows, which has none, configurator.py has to speak first
    try:
        os.makedirs(folder, exist_ok=True)
        lock = open(os.path.join(folder, '.lock'), 'a')
    except OSError as error:
        raise UserError(f'out={folder}: {error.strerror}: give another') from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f'out={folder}: another sweep is running there: wait for it, or give another out') from None
        yield lock


def places(jobs):
    """The environment of each process that may run at a time."""
    gpus = os.environ.get('CUDA_VISIBLE_DEVICES', ','.join(map(str, range(torch.cuda.device_count())))).split(',') if torch.cuda.device_count() else []
    if gpus:
        return [{'CUDA_VISIBLE_DEVICES': gpus[n % len(gpus)]} for n in range(jobs or len(gpus))]
    return [{'OMP_NUM_THREADS': str(max(1, cores() // jobs))} for _ in range(jobs)] if jobs > 1 else [{}]


def work(queue, free, lock, failed):
    """Run `queue` in the `free` places; what fails is added to `failed`. Signals to stop let the runs save, then end them all."""
    began, spent, queue, busy, count = time.monotonic(), 0.0, list(queue), {}, len(queue)

    def stop(number, frame):
        raise KeyboardInterrupt
    before = {number: signal.signal(number, stop) for number in stop_signals()}
    try:
        while queue or busy:
            while queue and free:
                run, place = queue.pop(0), free.pop()
                busy[start(run, place, lock)] = run, place, time.monotonic()
            for process in [p for p in busy if p.poll() is not None]:
                run, place, since = busy.pop(process)
                free.append(place)
                result = outcome(run, process.returncode)
                spent += run.flops
                left = sum(r.flops for r in queue) + sum(r.flops for r, _, _ in busy.values())
                minutes = (time.monotonic() - began) * left / spent / 60 if spent else math.inf  # a table that is looked up costs no FLOPs
                print(f'{count - len(queue) - len(busy)}/{count} {run.name}: {result} in {time.monotonic() - since:.0f} s'
                      + (f'; {len(queue) + len(busy)} left' if queue or busy else '') + (f', {minutes:.0f} min' if left and spent else ''), flush=True)
                if result.startswith('failed'):
                    failed.append((run, result))
            time.sleep(0.05)
    except BaseException:  # Ctrl-C, or a disk without room
        for process in busy:
            process.terminate()
        for process in busy:
            process.wait()
        print(f'stopped with {len(queue) + len(busy)} of {count} runs left: the same command goes on', flush=True)
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def start(run, place, lock):
    """The process of a run. In a session of its own, so that a Ctrl-C reaches it once, from work()."""
    os.makedirs(run.out_dir, exist_ok=True)
    command = [sys.executable, os.path.join(ROOT, 'train.py'), *run.args]
    with open(os.path.join(run.out_dir, 'output.txt'), 'a', encoding='utf-8') as output:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=os.environ | place,
                                start_new_session=True, pass_fds=[lock.fileno()])


def outcome(run, code):
    """What became of a run, in a few words; a divergence is written down, to be neither run again nor forgotten."""
    if state(run.out_dir, run.settings) == 'done':
        return f'val_loss {[r for r in read_log(run.out_dir) if "val_loss" in r][-1]["val_loss"]:.4f}'
    with open(os.path.join(run.out_dir, 'output.txt'), encoding='utf-8', errors='replace') as f:
        last = f.read().strip().split('\n')[-1]  # a sample may hold other line separators
    if code == 2 and 'not finite' in last or state(run.out_dir, run.settings) == 'diverged':
        replace_text(os.path.join(run.out_dir, 'diverged.txt'), last + '\n')
        return 'diverged'
    return f'failed with {code} ({last})'
