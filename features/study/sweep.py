"""
Many training runs from one small file: arms (what is compared), the settings swept inside each arm, and
seeds.

    sweep = read_sweep('config/sweeps/demo.py')
    runs = expand(sweep)                      # a Run each: its settings, its folder, its FLOPs
    run_missing(sweep)                        # jobs.py: runs those that are not done

    python compare.py --sweep=config/sweeps/demo.py       # all of it, then the tables

Each run is train.py in a process and a folder of its own, so a sweep that was stopped continues where it was.
"""
import dataclasses
import hashlib
import itertools
import json
import os
import re
import typing
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

import torch

from batches import Mixture
from configurator import FilePath, UserError, check, configure, find_field, options, read_config
from features import default_of, with_features
from features.networks import read_model
from features.others import adopt
from features.study.runs import NEUTRAL, blank_model, read_settings, real_folders, sizes, state
from model import make_model
from optim import make_optimizer, step_flops
from train import Settings


@dataclass
class Sweep:
    base: FilePath | list[FilePath] | dict = field(default_factory=dict)  # config file(s), or settings
    arms: dict = field(default_factory=dict)  # {name: {setting: value}}; a list of values is swept. An arm
    # may have its own 'seeds' and 'budget', and may be a list of such dicts: a cross of two short lines costs
    # less than the whole grid
    seeds: list[int] = field(default_factory=lambda: [1])
    budget: Literal['tokens', 'flops'] = 'tokens'  # flops: all arms spend the FLOPs of the first run
    out: FilePath = ''  # folder of the runs; '' = out/sweeps/ and the name of the sweep's file

    def check(self):
        """Raise ValueError for an invalid sweep."""
        if not self.arms:
            raise ValueError('arms: has none: write arms = {NAME: {SETTING: VALUE}}')
        for name, arm in self.arms.items():
            if not isinstance(name, str) or not re.fullmatch(r'[\w.+-]+', name):
                raise ValueError(f'arms: {name!r} becomes the name of a folder: takes letters, '
                                 'digits and . _ + -')
            if not grids(arm) or not all(isinstance(grid, dict) for grid in grids(arm)):
                raise ValueError(f'arms: {name}: got {arm!r}, takes a dict of settings, or a list of them')
            for grid in grids(arm):
                self.check_grid(name, grid)
        if not self.out:
            raise ValueError("out='': name the folder of the runs")

    def check_grid(self, name, grid):
        """Raise ValueError for invalid seeds or an invalid budget in a grid of the arm `name`."""
        seeds = grid.get('seeds', self.seeds)
        if not isinstance(seeds, list) or not seeds or len(set(seeds)) < len(seeds):
            raise ValueError(f'arms: {name}: seeds={seeds}: takes a list of different numbers')
        if grid.get('budget', self.budget) not in ('tokens', 'flops'):
            raise ValueError(f'arms: {name}: budget={grid["budget"]}: takes tokens or flops')


@dataclass
class Run:
    """One training run of a sweep."""
    arm: str
    swept: dict  # {setting: value} of what is swept inside the arm
    settings: Settings  # as train.py will have them
    args: list[str]  # the command line for train.py
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
    """The Sweep that a Python file of assignments describes. Raises UserError for an invalid file."""
    sweep = Sweep(**read_config(Sweep, path))
    if not sweep.out:
        name = os.path.splitext(os.path.basename(path))[0]
        sweep.out = os.path.join('out', 'sweeps', name)
    try:
        check(sweep)
    except UserError as error:
        raise UserError(f'{path}: {error}') from None
    return sweep


# -----------------------------------------------------------------------------
# From arms to runs

def expand(sweep):
    """
    The Runs of a sweep, seed by seed, so that arms can be compared before the last seed is done. Raises
    UserError for settings that cannot work.
    """
    check(sweep)
    if isinstance(sweep.base, dict):
        for key in sweep.base:
            find_field(Settings, key, f'base: {key}')
    rows = []  # a row: the runs of one point of a grid, one per seed
    for name, arm in sweep.arms.items():
        for grid in grids(arm):
            expand_grid(sweep, name, grid, rows)
    runs = []
    for n in range(max(len(row) for row in rows)):
        for row in rows:
            if n < len(row):
                runs.append(row[n])
    check_grids(runs)
    check_folders(runs)
    return runs


def grids(arm):
    """The grids of an arm, a list: the arm itself, or its list of dicts."""
    return arm if isinstance(arm, list) else [arm]


def expand_grid(sweep, name, grid, rows):
    """
    Add [the Run of each seed] for each point of a grid of the arm `name` to `rows`, which has those of
    earlier grids.
    """
    seeds = grid.get('seeds', sweep.seeds)
    by_flops = grid.get('budget', sweep.budget) == 'flops'
    fixed, swept = split(name, {key: value for key, value in grid.items() if key not in ('seeds', 'budget')})
    if by_flops and ('max_iters' in swept or rows and 'max_iters' in fixed):
        raise UserError(f"arms: {name}: budget='flops' sets max_iters: leave max_iters out, or give the arm "
                        "budget='tokens'")
    for values in itertools.product(*swept.values()):
        point = dict(zip(swept, values))
        flops = first_flops(rows) if by_flops else None
        rows.append([make_run(sweep, name, fixed, point, seed, flops) for seed in seeds])


def first_flops(rows):
    """FLOPs of the first run that has any: the budget of the later ones. None before there is one."""
    for row in rows:
        if row[0].flops:  # a Markov table that is counted has none
            return row[0].flops
    return None


def split(name, arm):
    """
    ({setting: value} of the settings that are the same in the whole arm, {setting: list of values} of the
    swept ones). Raises UserError for a setting that a sweep cannot have.
    """
    fixed = {}
    swept = {}
    for key, value in arm.items():
        kinds = options(find_field(Settings, key, f'arms: {name}: {key}').type)
        if key == 'seed':
            raise UserError(f'arms: {name}: seed: the sweep sets it: leave it out, or give seeds')
        if key == 'out_dir':
            raise UserError(f'arms: {name}: out_dir: the sweep sets it: leave it out')
        # a setting that takes a list is swept by a list of lists
        takes_list = any(typing.get_origin(kind) is list for kind in kinds)
        if not isinstance(value, list) or takes_list and not (value and isinstance(value[0], list)):
            fixed[key] = value
            continue
        if not value or len({slug(v) for v in value}) < len(value):
            raise UserError(f'arms: {name}: {key}={value}: takes different values')
        swept[key] = value
    return fixed, swept


def make_run(sweep, name, fixed, swept, seed, flops=None):
    """
    The Run of one point and seed. flops: its budget, which determines max_iters; None = as the settings say.
    Raises UserError, with the name of the run, for settings that cannot work.
    """
    parts = [name] + [f'{key}={slug(value)}' for key, value in swept.items()] + [f'seed={seed}']
    folder = ','.join(parts)
    files, given = base_of(sweep)
    given = given | fixed | swept | {'seed': seed, 'out_dir': os.path.join(sweep.out, folder)}
    try:
        s = settle(files, given)
        per_step, extra = cost(s)
        if flops:
            given['max_iters'] = max(1, round((flops - extra) / per_step))
            if s.lr_decay_iters:
                given['lr_decay_iters'] = max(1, round(s.lr_decay_iters * given['max_iters'] / s.max_iters))
        if 'sample_tokens' not in s.given:
            given['sample_tokens'] = 0  # nobody reads the samples of a sweep
        if 'keep_checkpoints' not in s.given:
            given['keep_checkpoints'] = 1  # a hundred runs fill a disk
        s = settle(files, given)
    except UserError as error:
        raise UserError(f'arms: {folder}: {error}') from None
    return Run(
        arm=name,
        swept=swept,
        settings=s,
        args=arguments(files, given),
        parameters=sizes(s)[0],
        flops=extra + per_step * s.max_iters)


def base_of(sweep):
    """([config file], {setting: value}) that all arms of a sweep share."""
    if isinstance(sweep.base, dict):
        return [], sweep.base
    if isinstance(sweep.base, str):
        return [sweep.base], {}
    return sweep.base, {}


def arguments(files, given):
    """The command-line arguments of train.py for config files and {setting: value}."""
    return files + [f'--{key}={value}' for key, value in given.items()]


def settle(files, given):
    """
    The final settings of train.py, with the vocabulary size of the data and the model of the weights that the
    run starts from. Raises UserError for settings that cannot work or that a sweep cannot have.
    """
    s = configure(Settings, arguments(files, given))
    if s.is_planned:
        raise UserError('depth, params, tokens, minutes: a sweep has to know sizes and steps beforehand: '
                        'set max_iters and the sizes')
    if s.init_from in ('resume', 'scratch'):
        raise UserError(f'init_from={s.init_from}: leave it out: '
                        'a sweep starts and resumes its runs by itself')
    if s.init_from != 'auto':
        adopt(s, network(s.init_from), s.init_from)
    if not s.vocab_size:
        s.vocab_size = vocabulary(json.dumps(s.dataset))
    check(s)
    return s


@lru_cache
def network(where):
    """The ModelConfig of trained weights: a run, a checkpoint or hf:FOLDER. They are read once."""
    return read_model(where, encoder=True)[0]


@lru_cache
def vocabulary(dataset):
    """The vocabulary size of a data set, given as JSON: a name, a folder or a mixture."""
    return Mixture(json.loads(dataset), 'train', 1, 0).vocab_size


def cost(s):
    """
    (FLOPs of a step at the end of a run, additional FLOPs of its earlier steps). A step includes the
    optimizer and a teacher. Earlier steps cost less if the model grows. The model is not built.
    """
    tokens = s.batch_size * s.gradient_accumulation_steps * s.block_size
    teacher = None
    if s.teacher:  # distill
        with torch.device('meta'):  # distill
            teacher = make_model(network(s.teacher), init=False).requires_grad_(False)  # distill

    def per_step(**changes):
        model = blank_model(s, **changes)
        return step_flops(model, make_optimizer(model, s), teacher, tokens)

    at_end = per_step()
    extra = 0
    if s.grow_every:  # growth
        for n_layer in range(s.n_layer, s.grow_to, s.grow_by):  # growth
            extra += s.grow_every * (per_step(n_layer=n_layer) - at_end)  # growth
    return at_end, extra


def slug(value):
    """
    A value as part of a folder's name: unchanged if it is short and plain, else shortened, with its hash.
    """
    text = str(value)
    plain = re.sub(r'[^\w.+-]+', '', text)[:24]
    if plain == text:
        return plain
    return f'{plain}-{hashlib.sha256(text.encode()).hexdigest()[:6]}'


def check_grids(runs):
    """Raise UserError if the grids of an arm do not sweep the same settings, or have a run in common."""
    swept_by = {}
    folders = set()
    for run in runs:
        first = swept_by.setdefault(run.arm, run.swept.keys())
        if first != run.swept.keys():
            raise UserError(f'arms: {run.arm}: its grids sweep {", ".join(first) or "nothing"} and '
                            f'{", ".join(run.swept) or "nothing"}: give each a list for the same settings')
        if run.out_dir in folders:
            raise UserError(f'arms: {run.arm}: {run.name} is in two of its grids: leave it out of one')
        folders.add(run.out_dir)


def check_folders(runs):
    """Raise UserError if a folder holds a run with settings other than the sweep's."""
    for run in runs:
        stored = read_settings(run.out_dir)
        if stored is None:
            continue
        for f in dataclasses.fields(with_features(Settings, *stored.features, *run.settings.features)):
            was = json.dumps(getattr(stored, f.name, default_of(f)))
            now = json.dumps(getattr(run.settings, f.name, default_of(f)))
            if was == now or f.name in NEUTRAL:
                continue
            if f.name == 'dataset' and real_folders(stored.dataset) == real_folders(run.settings.dataset):
                continue
            if f.name == 'dtype' and '"auto"' in (was, now):  # a run stores the dtype that auto chose
                continue
            raise UserError(f'{run.out_dir}: holds a run with {f.name}={was}, the sweep wants {now}: '
                            'give another out, or move that one away')


# -----------------------------------------------------------------------------
# What is left to do

def is_ended(run):
    """Whether a Run is finished or has diverged, so that it is not run again."""
    return state(run.out_dir, run.settings) in ('done', 'diverged')


def list_runs(runs):
    """A line for each Run of a sweep, and one for the number of missing ones, as text."""
    width = max(len(run.name) for run in runs)
    lines = [f'{"run":{width}}  parameters   steps      FLOPs  state']
    for r in runs:
        lines.append(f'{r.name:{width}}  {r.parameters:10,}  {r.settings.max_iters:6,}  {r.flops:9.2e}  '
                     + state(r.out_dir, r.settings))
    left = [r for r in runs if not is_ended(r)]
    lines.append(f'{len(runs)} runs, {len(left)} to do: {sum(r.flops for r in left):.2e} FLOPs')
    return '\n'.join(lines)
