r"""
Does the dial choose well? For each data set and number of minutes, the network, context, batch and learning
rates that `train.py --minutes=M` derives are compared with the sizes one step up and down, and with context,
batch and rates that are larger and smaller.

    python prepare.py stdlib --tokenizer=bpe:4096 --val_fraction=0.02 --out=data/stdlib
    python experiments/dial.py --sets="['data/tinystories', 'data/novels', 'data/stdlib']"

1) On a quiet machine, train.py counts the steps that M minutes allow, for each candidate: it is started and
   stopped `rounds` times, a minute or less each. The counts are in out_dir/steps.json.
2) Each candidate makes that many steps, so its loss does not depend on what else the machine does. Runs are
   made one at a time, at low priority, with the first of the seeds; those within `margin` of the best one,
   and the dial's, with the others too. The same command continues after a stop.

The table is in out_dir/results.md after each data set. Bits per byte are of all validation rows; rows are as
long as the context, so a longer context is also an advantage when they are read.
"""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
import features  # noqa: I001 — first: your random.py or data/ then hides no module of ours or of a library
if __name__ == '__main__':
    features.start(__file__)

import json
import re
import subprocess
from dataclasses import dataclass, field
from statistics import median

import train
from batches import Mixture
from checkpoint import replace_json, replace_text
from configurator import ROOT, FilePath, UserError, configure, pick_device, pick_dtype, run_main
from features.plan.dial import plan, rates, shape
from features.study.jobs import run_missing
from features.study.runs import read_run
from features.study.stats import mean_and_error, paired_difference, show_interval, show_mean
from features.study.sweep import Sweep, arguments

RATES = ('muon_lr', 'embed_lr', 'head_lr', 'scalar_lr')
COUNTED = {'max_iters', 'eval_interval', 'eval_iters', 'log_interval'}  # of the derived settings


@dataclass
class Settings:
    sets: list[FilePath] = field(default_factory=list)  # folders of prepared data
    minutes: list[float] = field(default_factory=lambda: [1.0, 5.0, 15.0])
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3])
    margin: float = 0.03  # bits per byte above the best one, from which other seeds are not tried
    rounds: int = 3  # how often the steps of a candidate are counted; the median is taken
    busy: bool = False  # count steps although the machine is busy
    out_dir: FilePath = 'out/dial'


# -----------------------------------------------------------------------------
# The candidates

def choice(folder, minutes):
    """{setting: value} that train.py derives from the minutes, without steps and intervals."""
    s = configure(train.Settings, [f'--dataset={folder}', f'--minutes={minutes}'])
    device = pick_device(s.device)
    s.dtype = pick_dtype(s.dtype, device)
    data = Mixture(s.dataset, 'train', s.block_size, s.seed)
    tokens = sum(source.files.tokens for source in data.sources)
    derived = plan(s, data.vocab_size, tokens, device, 1)
    return {name: value for name, value in derived.items() if name not in COUNTED} | {'dtype': s.dtype}


def candidates(chosen):
    """{name: {setting: value}}: what the dial chose, and its neighbours."""
    device = pick_device('auto')
    rows, context, depth = chosen['batch_size'], chosen['block_size'], chosen['n_layer']
    found = {'dial': {}, 'larger': {}, 'smaller': {}}
    for name, other in (('larger', depth + 1), ('smaller', depth - 1)):
        sizes = shape(max(1, other), device)
        del sizes['block_size']
        found[name] = sizes | rates(sizes['n_embd'])
    if depth == 1:  # the width follows the depth from two layers on
        found['smaller'] = {'n_embd': chosen['n_embd'] // 2} | rates(chosen['n_embd'] // 2)
    found['batch_x2'] = {'batch_size': 2 * rows}
    found['context_half'] = {'block_size': context // 2, 'batch_size': 2 * rows}
    if rows > 1:
        found['batch_half'] = {'batch_size': rows // 2}
        found['context_x2'] = {'block_size': 2 * context, 'batch_size': rows // 2}
    found['rates_x1.5'] = {name: round(1.5 * chosen[name], 6) for name in RATES}
    found['rates_by_1.5'] = {name: round(chosen[name] / 1.5, 6) for name in RATES}
    return {name: chosen | changed for name, changed in found.items()}


# -----------------------------------------------------------------------------
# The steps that the minutes allow

def count_steps(folder, minutes, candidate, out_dir):
    """
    The steps that train.py plans for this candidate, after it has timed some; it is stopped then. 0 if the
    minutes do not suffice.
    """
    given = candidate | {'dataset': folder, 'minutes': minutes, 'init_from': 'scratch', 'sample_tokens': 0,
                         'out_dir': os.path.join(out_dir, 'timed')}
    command = [sys.executable, os.path.join(ROOT, 'train.py'), *arguments([], given)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        said, count = [], None
        for line in process.stdout:
            said.append(line)
            found = re.search(r'tokens a step, ([\d,]+) steps', line)
            if found:
                count = int(found[1].replace(',', ''))
            if found or line.startswith('derived: '):
                process.terminate()
    if count is None and 'give more minutes' in said[-1]:
        return 0
    if count is None:
        raise UserError(f'dataset={folder}: train.py ended: {"".join(said[-1:]).strip()}')
    return count


def count_all(s):
    """
    {set: {minutes: {candidate: (settings, steps)}}}, from out_dir/steps.json as far as it is there. Rates do
    not change the time of a step.
    """
    path = os.path.join(s.out_dir, 'steps.json')
    os.makedirs(s.out_dir, exist_ok=True)
    known = {'choices': {}, 'steps': {}}
    if os.path.exists(path):
        with open(path, encoding='utf-8') as f:
            known = json.load(f)
    plans = {}
    for folder in s.sets:
        for minutes in s.minutes:
            key = f'{folder} {minutes:g}'
            if key not in known['choices']:
                refuse_busy(s)
                known['choices'][key] = choice(folder, minutes)
                replace_json(path, known)
            plans[folder, minutes] = candidates(known['choices'][key])
    for n in range(s.rounds):
        for (folder, minutes), arms in plans.items():
            for name, candidate in arms.items():
                counts = known['steps'].setdefault(step_key(minutes, candidate), [])
                if len(counts) <= n:
                    refuse_busy(s)
                    counts.append(count_steps(folder, minutes, candidate, s.out_dir))
                    replace_json(path, known)
                    print(f'{folder}, {minutes:g} minutes, {name}: {counts[-1]:,} steps', flush=True)
    counted = {}
    for (folder, minutes), arms in plans.items():
        for name, candidate in arms.items():
            steps = round(median(known['steps'][step_key(minutes, candidate)]))
            if steps:
                counted.setdefault((folder, minutes), {})[name] = candidate | {'max_iters': steps}
        if 'dial' not in counted.get((folder, minutes), {}):
            raise UserError(f'minutes={minutes:g}: do not suffice for what the dial chooses: give more')
    return counted


def step_key(minutes, candidate):
    """A name for all that the time of a step depends on."""
    return json.dumps({'minutes': minutes} | {name: value for name, value in sorted(candidate.items())
                                              if name not in RATES})


def refuse_busy(s):
    load = os.getloadavg()[0]
    if load > 0.5 * os.cpu_count() and not s.busy:
        raise UserError(f'busy=False: the machine has a load of {load:.1f}, so steps would be slow: '
                        'wait, or give --busy=True')


# -----------------------------------------------------------------------------
# The runs

def sweep_of(s, folder, minutes, arms, seeds):
    """The Sweep of these candidates."""
    own = {'dataset': folder, 'eval_iters': 0, 'always_save_checkpoint': False}
    where = os.path.join(s.out_dir, f'{os.path.basename(folder)}_{minutes:g}')
    return Sweep(base=own, seeds=seeds, out=where, arms={
        name: candidate | {'eval_interval': candidate['max_iters']} for name, candidate in arms.items()})


def losses_of(out_dirs):
    """{candidate: {seed: bits per byte}} of runs."""
    found = {}
    for out_dir in out_dirs:
        run = read_run(out_dir)
        if run['state'] == 'done':
            name = os.path.basename(out_dir).split(',')[0]
            found.setdefault(name, {})[run['settings'].seed] = run['val'][-1]['val_bpb']
    return found


def compare(s, folder, minutes, arms):
    """Make the runs that are missing. Returns {candidate: {seed: bits per byte}}."""
    done = run_missing(sweep_of(s, folder, minutes, arms, s.seeds[:1]), jobs=1)
    first = {name: by_seed[s.seeds[0]] for name, by_seed in losses_of(done).items()}
    close = {name: arms[name] for name, loss in first.items()
             if name == 'dial' or loss < min(first.values()) + s.margin}
    if s.seeds[1:]:
        done += run_missing(sweep_of(s, folder, minutes, close, s.seeds[1:]), jobs=1)
    return losses_of(done)


def table(folder, minutes, arms, losses):
    """The lines of a table of markdown."""
    lines = [f'## {os.path.basename(folder)}, {minutes:g} minutes', '',
             '| | layers | wide | context | rows | steps | bits per byte | minus the dial |',
             '|---|---|---|---|---|---|---|---|']
    for name in sorted(losses, key=lambda name: mean_and_error(losses[name].values())[0]):
        arm = arms[name]
        rows = arm['batch_size'] * arm['gradient_accumulation_steps']
        found = paired_difference(losses[name], losses['dial']) if name != 'dial' else None
        lines.append(f'| {name} | {arm["n_layer"]} | {arm["n_embd"]} | {arm["block_size"]} | {rows} | '
                     f'{arm["max_iters"]:,} | {show_mean(*mean_and_error(losses[name].values()))} | '
                     f'{show_interval(*found[:2]) if found else ""} |')
    return [*lines, '']


def main():
    s = configure(Settings)
    if not s.sets:
        raise UserError('sets=[]: give folders of prepared data')
    counted = count_all(s)
    runs = sum(minutes * len(arms) for (_, minutes), arms in counted.items())
    print(f'{sum(map(len, counted.values()))} candidates: {runs / 60:.1f} hours of a quiet machine for a '
          f'seed, at most {len(s.seeds) * runs / 60:.1f} for all', flush=True)
    os.nice(10)
    lines = []
    for (folder, minutes), arms in sorted(counted.items(), key=lambda item: item[0][1]):
        lines += table(folder, minutes, arms, compare(s, folder, minutes, arms))
        replace_text(os.path.join(s.out_dir, 'results.md'), '\n'.join(lines))
    print('\n'.join(lines))


if __name__ == '__main__':
    run_main(main)
