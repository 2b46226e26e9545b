"""
Training runs in their folders: settings, log, state, size. Runs that differ only in their seed form an arm.

    run = read_run('out/demo_dense')                       # {'settings', 'state', 'parameters', 'val', …}
    arms = group([read_run(out_dir) for out_dir in find_runs(['out/sweeps/demo/*'])])
    arms[0].last('val_loss')                               # {seed: final loss} of the finished runs
"""
import dataclasses
import glob
import math
import os
import re
import statistics
from collections import Counter
from dataclasses import dataclass, field

import torch

from batches import find_folder
from checkpoint import read_json, read_records
from configurator import UserError, check, convert, find_field
from features import build, default_of, part_of
from features.sizes import within_limits
from features.study.stats import mean_and_error, paired_difference
from model import ModelConfig, make_model
from train import Settings

# settings that do not change what a run learns: runs of one arm may differ in them
NEUTRAL = {
    'out_dir', 'device', 'compile', 'recompute', 'log_interval',
    'always_save_checkpoint', 'checkpoint_interval', 'keep_checkpoints', 'sample_prompt', 'sample_tokens',
    'wandb_log', 'wandb_project', 'wandb_run_name',
}

# -----------------------------------------------------------------------------
# The folder of a run

def read_settings(out_dir):
    """
    The Settings of the run in `out_dir`, None if it has none. Settings that an older run did not store get
    their defaults; removed settings are ignored. Raises UserError for a file that is damaged.
    """
    path = os.path.join(out_dir, 'settings.json')
    if not os.path.lexists(path):
        return None
    stored = read_json(path)
    values = {}
    for key, value in stored.items():
        try:
            f = find_field(Settings, key, out_dir)
            value = convert(value, f, out_dir)
        except UserError:
            continue
        if value != default_of(f):  # the defaults of features that the run does not use are left out
            values[f.name] = value
    return build(Settings, **values)


def real_folders(dataset):
    """A setting `dataset` as {real folder: weight}, the same for all spellings."""
    weights = dataset if isinstance(dataset, dict) else {dataset: 1}
    found = {}
    for name, weight in weights.items():
        try:
            found[os.path.realpath(find_folder(name))] = weight
        except UserError:
            found[name] = weight
    return found


def changed_settings(s):
    """{setting: value} of Settings that differ from their defaults and affect what a run learns."""
    changed = {}
    for f in dataclasses.fields(s):
        value = getattr(s, f.name)
        if f.name not in NEUTRAL and value != default_of(f):
            changed[f.name] = value
    return changed


def read_log(out_dir):
    """The records of log.jsonl in `out_dir`, a list of dicts; empty if there is no such file."""
    return read_records(os.path.join(out_dir, 'log.jsonl'))


def state(out_dir, s):
    """
    'done', 'diverged', 'step N' (unfinished) or 'to do': state of the run in `out_dir` with Settings `s`.
    """
    if os.path.exists(os.path.join(out_dir, 'diverged.txt')):
        return 'diverged'
    records = read_log(out_dir)
    if not records:
        return 'to do'
    evaluations = [r for r in records if 'val_loss' in r]
    if evaluations:
        last = evaluations[-1]
        is_done = last['step'] >= s.max_iters
        if s.target_val_loss and last['val_loss'] <= s.target_val_loss:
            is_done = True
        if is_done:
            return 'done' if math.isfinite(last['val_loss']) else 'diverged'
    return f'step {records[-1]["step"]}'


# -----------------------------------------------------------------------------
# The size of a network

def blank_model(s, **changes):
    """
    The model of a run on the meta device: shapes without weights. changes: fields of ModelConfig that replace
    those at the end of the run.
    """
    cfg = part_of(s, ModelConfig)
    if s.grow_every:  # growth
        cfg.n_layer = s.grow_to  # growth
    cfg = dataclasses.replace(cfg, **changes)
    with torch.device('meta'):
        model = make_model(cfg, init=False)
        if s.lora_rank:  # lora
            from features.lora import layers as lora  # lora
            lora.begin(model, s)  # lora
    return model


def sizes(s):
    """
    (parameters, parameters in the blocks, trained parameters) of the model at the end of a run with Settings
    `s`.
    """
    model = blank_model(s)
    parameters = model.num_params()
    in_blocks = 0
    for name, p in model.named_parameters():
        if name.startswith('blocks.'):
            in_blocks += p.numel()
    trained = parameters
    if s.lora_rank:  # lora
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)  # lora
    return parameters, in_blocks, trained


# -----------------------------------------------------------------------------
# Runs and arms

@dataclass
class Arm:
    """Runs with the same settings, one per seed, finished or not."""
    name: str
    runs: dict = field(default_factory=dict)  # {seed: run as read_run() returns it}
    swept: dict = field(default_factory=dict)  # {setting: value} of what a sweep varies

    def seeds(self, state='done'):
        """The seeds of the runs with this state, a set."""
        return {seed for seed, run in self.runs.items() if run['state'] == state}

    def last(self, key):
        """{seed: value of `key` at the end of the run} of the finished runs that have it."""
        found = {}
        for seed in sorted(self.seeds()):
            record = self.runs[seed]['val'][-1]
            if key in record:
                found[seed] = record[key]
        return found

    @property
    def loss(self):
        """Mean final loss of the finished runs; infinite if there is none."""
        if not self.seeds():
            return math.inf
        return statistics.mean(self.last('val_loss').values())

    def minus(self, reference):
        """
        (mean, half width of the 95% interval, pairs) of this arm's final losses minus another's; None if they
        have no seed in common.
        """
        return paired_difference(self.last('val_loss'), reference.last('val_loss'))

    def curves(self, against):
        """
        (mean curve, [curve of each run]) from the first evaluation after step 0 on, without diverged runs. A
        curve is [(x, loss, standard error)], x being 'tokens', 'flops' or 'seconds' as `against` says; the
        error of a single run is None. The mean curve has the steps that all runs have.
        """
        runs = []  # {step: record} of each run
        for run in self.runs.values():
            records = {r['step']: r for r in run['val'] if r['step'] and math.isfinite(r['val_loss'])}
            if records and run['state'] != 'diverged':
                runs.append(records)
        mean = []
        for step in shared_steps(runs):
            records = [run[step] for run in runs]
            if all(against in r for r in records):
                x = statistics.mean(r[against] for r in records)
                mean.append((x, *mean_and_error(r['val_loss'] for r in records)))
        single = []
        for run in runs:
            curve = [(r[against], r['val_loss'], None) for r in run.values() if against in r]
            if curve:
                single.append(curve)
        return mean, single


def shared_steps(runs):
    """The steps that are in all of several {step: record}, in order."""
    if not runs:
        return []
    return sorted(set(runs[0]).intersection(*runs))


def read_run(out_dir):
    """
    {'out_dir', 'settings', 'state', 'parameters', 'blocks', 'trained', 'val': the records with a val_loss} of
    a training run. Raises UserError if `out_dir` holds none.
    """
    settings = read_settings(out_dir)
    if settings is None:
        raise UserError(f'{out_dir}: not a training run (no settings.json): give the out_dir of one')
    path = os.path.join(out_dir, 'settings.json')
    log = read_log(out_dir)
    check(settings, path)
    if not settings.vocab_size:
        raise UserError(f'{path}: vocab_size is missing: restore it')
    with within_limits(settings, path):
        parameters, blocks, trained = sizes(settings)
    return {
        'out_dir': out_dir,
        'settings': settings,
        'state': state(out_dir, settings),
        'parameters': parameters,
        'blocks': blocks,
        'trained': trained,
        'val': [r for r in log if 'val_loss' in r],
    }


def find_runs(patterns):
    """
    The out_dirs that match names and glob patterns, each once. A pattern skips folders that are not runs, and
    runs that were moved aside (NAME.old1). Raises UserError for a pattern that matches no run.
    """
    found = []
    for pattern in patterns:
        if os.path.isdir(pattern) or not glob.has_magic(pattern):
            found.append(pattern)
            continue
        matches = [path for path in sorted(glob.glob(pattern)) if is_run(path)]
        if not matches:
            raise UserError(f'{pattern}: matches no training run')
        found += matches
    unique = dict.fromkeys(path.rstrip('/') or path for path in found)
    return list(unique)


def is_run(path):
    """Whether a folder holds a run that was not moved aside."""
    if re.search(r'\.old\d+$', path):
        return False
    return os.path.exists(os.path.join(path, 'settings.json'))


def group(runs):
    """
    Group runs into Arms: runs that differ only in their seed are one arm, named after the folder of its first
    run. Raises UserError if two runs have the same settings and seed.
    """
    arms = {}
    for run in runs:
        s = run['settings']
        key = repr(sorted((name, value) for name, value in changed_settings(s).items() if name != 'seed'))
        if key not in arms:
            arms[key] = Arm(arm_name(run['out_dir']))
        arm = arms[key]
        if s.seed in arm.runs:
            raise UserError(f'{run["out_dir"]}: the same run as {arm.runs[s.seed]["out_dir"]}, '
                            f'seed {s.seed}: leave one of them out')
        arm.runs[s.seed] = run
    names = Counter()
    for arm in arms.values():
        names[arm.name] += 1
        if names[arm.name] > 1:
            arm.name += f'#{names[arm.name]}'
    return list(arms.values())


def arm_name(out_dir):
    """
    The folder's name without the seed: out/dense,seed=1 → dense. If the name is only the seed, the name of
    the parent folder: dense/seed=3 → dense.
    """
    for part in reversed(os.path.normpath(out_dir).split(os.sep)):
        name = re.sub(r'(^|[,_.-])(seed|s)[=_-]?\d+$', '', part)
        if name:
            return name
    return out_dir
