"""
Several runs in one table and one picture, their seeds grouped.

    python compare.py out/demo_dense out/demo_lowrank --picture=out/demo.png
    python compare.py 'out/sweeps/demo/*' --reference=dense,learning_rate=0.002
    python compare.py --sweep=config/sweeps/demo.py          # runs what is missing first

Runs that differ only in their seed are one arm: mean ± standard error, and the difference to the reference, paired by seed, with its 95%
interval. A loss counts at the end of a run only: the rate has cooled down there, and a run in the middle of its schedule would look
worse than it is. So arms of unlike cost are compared by giving them equal budgets (budget='flops' in a sweep), not by reading curves off.
"""
import glob
import math
import os
import re
import statistics
from collections import Counter
from dataclasses import dataclass, field, fields

from batches import real_folders
from configurator import FilePath, UserError, configure, run_main
from features.study.pictures import draw, write_csv
from features.study.sweep import BESIDE, Sweep, expand, list_runs, read_log, read_settings, read_sweep, run_missing, sizes, state
from features.study.sweep import Settings as Training


@dataclass
class Settings:
    runs: list[FilePath] = field(default_factory=list)  # out_dirs of training runs, or patterns: 'out/sweeps/demo/*'
    sweep: FilePath = ''  # file of a sweep: run what is missing, then report (README, config/sweeps/demo.py)
    dry_run: bool = False  # list the runs of the sweep, run nothing
    jobs: int = 0  # runs at a time; 0 = one a GPU, or one on a CPU
    reference: str = ''  # the arm that the others are compared with; '' = the first one
    picture: FilePath = 'auto'  # where to draw; '' = nowhere, auto = out/compare.png, or compare.png in the folder of the sweep
    csv: FilePath = ''  # write the table there, for notebooks

    positional = 'runs'

    def check(self):
        """Raise ValueError for values that cannot work."""
        if bool(self.runs) == bool(self.sweep):
            raise ValueError('runs: give the out_dir of one run or more, or --sweep=FILE: python compare.py out/demo_dense out/demo_lowrank')
        if self.jobs < 0:
            raise ValueError(f'jobs={self.jobs}: must not be negative')
        if (self.dry_run or self.jobs) and not self.sweep:
            raise ValueError('dry_run, jobs: belong to --sweep=FILE')


# -----------------------------------------------------------------------------
# Runs, and arms of runs that differ in their seed

@dataclass
class Arm:
    """Runs of the same settings, one a seed: those that are finished, and the seeds of those that are not."""
    name: str
    runs: dict = field(default_factory=dict)  # {seed: run as read_run() gives it}, whatever its state
    swept: dict = field(default_factory=dict)  # of a sweep: {setting: value}

    def seeds(self, state='done'):
        return {seed for seed, run in self.runs.items() if run['state'] == state}

    def last(self, key):
        """{seed: value of `key` at the end of the run} of the finished ones."""
        return {seed: self.runs[seed]['val'][-1][key] for seed in sorted(self.seeds()) if key in self.runs[seed]['val'][-1]}

    def curves(self, against):
        """(mean, single ones): curves of (x, loss, standard error of the mean) from the first evaluation after step 0 on."""
        runs = [{r['step']: r for r in run['val'] if r['step'] and math.isfinite(r['val_loss'])} for run in self.runs.values() if run['state'] != 'diverged']
        runs = [run for run in runs if run]
        steps = sorted(set.intersection(*map(set, runs))) if runs else []
        steps = [step for step in steps if all(against in run[step] for run in runs)]
        mean = [(statistics.mean(run[step][against] for run in runs), *mean_and_error(run[step]['val_loss'] for run in runs)) for step in steps]
        single = [[(r[against], r['val_loss'], None) for r in run.values() if against in r] for run in runs]
        return mean, [curve for curve in single if curve]

    @property
    def loss(self):
        return statistics.mean(self.last('val_loss').values()) if self.seeds() else math.inf


def read_run(out_dir):
    """{'out_dir', 'settings', 'state', 'parameters', 'blocks', 'trained', 'val': records with val_loss} of a run. Raises UserError."""
    try:
        settings, log = read_settings(out_dir), read_log(out_dir)
        if settings is None:
            raise ValueError('no settings.json')
        parameters, blocks, trained = sizes(settings)
    except (OSError, ValueError) as error:
        raise UserError(f'{out_dir}: not a training run ({error}): give the out_dir of one') from None
    return {'out_dir': out_dir, 'settings': settings, 'state': state(out_dir, settings), 'parameters': parameters, 'blocks': blocks, 'trained': trained,
            'val': [r for r in log if 'val_loss' in r]}


def find_runs(patterns):
    """The out_dirs that names and patterns mean, each once. What a pattern meets and is no run is passed over, and so are runs moved aside."""
    found = []
    for pattern in patterns:
        if os.path.isdir(pattern) or not glob.has_magic(pattern):
            found.append(pattern)
            continue
        matches = [path for path in sorted(glob.glob(pattern)) if os.path.exists(os.path.join(path, 'settings.json')) and not re.search(r'\.old\d+$', path)]
        if not matches:
            raise UserError(f'{pattern}: matches no training run')
        found += matches
    return list(dict.fromkeys(path.rstrip('/') or path for path in found))


def group(runs):
    """Arms of runs that differ in nothing but the seed, in the order of their first runs, named after their folders."""
    arms, names = {}, Counter()
    for run in runs:
        s = run['settings']
        key = repr([getattr(s, f.name) for f in fields(Training) if f.name not in BESIDE | {'seed'}])
        arm = arms.setdefault(key, Arm(arm_name(run['out_dir'])))
        if s.seed in arm.runs:
            raise UserError(f'{run["out_dir"]}: the same run as {arm.runs[s.seed]["out_dir"]}, seed {s.seed}: leave one of them out')
        arm.runs[s.seed] = run
    for arm in arms.values():
        names[arm.name] += 1
        if names[arm.name] > 1:
            arm.name += f'#{names[arm.name]}'
    return list(arms.values())


def arm_name(out_dir):
    """out/dense,seed=1 → dense; a folder that is named by its seed alone takes the name of the one above."""
    parts = [re.sub(r'(^|[,_.-])(seed|s)[=_-]?\d+$', '', part) for part in os.path.normpath(out_dir).split(os.sep)]
    return next((part for part in reversed(parts) if part), out_dir)


# -----------------------------------------------------------------------------
# Statistics

def t_quantile(freedom, coverage=0.95):
    """The t for which a Student's t of so many degrees of freedom lies within ±t with probability `coverage`."""
    def inside(t):  # Abramowitz & Stegun 26.7.3 and 26.7.4: finite sums in the angle
        angle = math.atan(t / math.sqrt(freedom))
        odd = freedom % 2
        term = math.cos(angle) if odd else 1.0
        total = term if freedom > 1 else 0.0
        for n in range(2 if odd else 1, freedom - 1, 2):
            term *= n / (n + 1) * math.cos(angle) ** 2
            total += term
        total *= math.sin(angle)
        return 2 / math.pi * (angle + total) if odd else total
    low, high = 0.0, 1e6
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if inside(middle) < coverage else (low, middle)
    return high


def mean_and_error(values):
    """(mean, standard error or None for fewer than two) of some numbers."""
    values = list(values)
    return statistics.mean(values), statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def paired(arm, reference):
    """paired_values() of the losses of two arms; None if they have no seed in common."""
    a, b = arm.last('val_loss'), reference.last('val_loss')
    return paired_values(a, b) if a.keys() & b.keys() else None


def paired_values(a, b):
    """(mean difference a - b, half width of its 95% interval or None, pairs) of two {seed: value}, over the seeds that both have."""
    differences = [a[seed] - b[seed] for seed in a if seed in b]
    mean, error = mean_and_error(differences)
    return mean, error and error * t_quantile(len(differences) - 1), len(differences)


# -----------------------------------------------------------------------------
# The table

def row(arm, reference):
    """The figures of an arm as {name: number or None}: what the table and the csv file show."""
    run = next(iter(arm.runs.values()))
    out = {'arm': arm.name, 'parameters': run['parameters'], 'block_parameters': run['blocks'], 'trained_parameters': run['trained'], 'seeds': len(arm.seeds())}
    for key in ('tokens', 'flops', 'seconds'):
        values = of_all(arm, key)
        out[key] = statistics.mean(values) if values else None
    out['flops_per_token'] = out['flops'] / out['tokens'] if out['tokens'] and out['flops'] is not None else None
    out['memory_mib'] = max(of_all(arm, 'peak_memory_bytes'), default=0) / 2 ** 20 or None
    for key in ('val_loss', 'val_bpb'):
        values = of_all(arm, key)
        out[key], out[key + '_se'] = mean_and_error(values) if values else (None, None)
    out['difference'], out['half_width'], out['pairs'] = (arm is not reference and paired(arm, reference)) or (None, None, None)
    return out


def of_all(arm, key):
    """The values of `key` at the end of all finished runs of an arm; none unless all have it: columns of a row are means over the same seeds."""
    found = arm.last(key)
    return [*found.values()] if found.keys() == arm.seeds() else []


def table(arms):
    """A line for each arm, the first one as the reference, and below what has to be known to read them."""
    reference = arms[0]
    heads = ['arm', 'parameters', 'in blocks', 'tokens', 'FLOPs/token', 'FLOPs', 'seconds', 'MiB', 'seeds', 'val loss', 'bits/byte',
             f'minus {reference.name} [95%]']
    rows = [cells(row(arm, reference)) for arm in arms]
    widths = [max(map(len, column)) for column in zip(heads, *rows)]
    lines = ['  '.join(text.rjust(w) if n and n < 11 else text.ljust(w) for n, (text, w) in enumerate(zip(line, widths))).rstrip() for line in [heads] + rows]
    return '\n'.join(lines + notes(arms, reference))


def cells(r):
    def show(value, form):
        return '-' if value is None else format(value, form)

    if r['difference'] is None:
        difference = ''
    elif r['half_width'] is None:
        difference = f'{r["difference"]:+.4f} n=1'
    else:
        difference = f'{r["difference"]:+.4f} [{r["difference"] - r["half_width"]:+.4f}, {r["difference"] + r["half_width"]:+.4f}] n={r["pairs"]}'
    return [r['arm'], show(r['parameters'], ','), show(r['block_parameters'], ','), show(r['tokens'], ',.0f'), show(r['flops_per_token'], '.3g'),
            show(r['flops'], '.3e'), show(r['seconds'], '.0f'), show(r['memory_mib'], '.0f'), str(r['seeds']),
            plus_minus(r['val_loss'], r['val_loss_se']), plus_minus(r['val_bpb'], r['val_bpb_se']), difference]


def plus_minus(mean, error):
    return '-' if mean is None else f'{mean:.4f}' if error is None else f'{mean:.4f} ± {error:.4f}'


def notes(arms, reference):
    """What the figures leave out or cannot say, a line each."""
    lines = []
    for arm in arms:
        run = next(iter(arm.runs.values()))
        if run['trained'] < run['parameters']:
            lines.append(f'{arm.name}: {run["trained"]:,} of its parameters are trained')
        if arm.seeds('diverged'):
            lines.append(f'{arm.name}: diverged: seed {listed(arm.seeds("diverged"))}')
        for seed in sorted(set(arm.runs) - arm.seeds() - arm.seeds('diverged')):
            state, steps = arm.runs[seed]['state'], arm.runs[seed]['settings'].max_iters
            lines.append(f'{arm.name}: seed {seed} is not finished ({state} of {steps}) and left out' if steps else
                         f'{arm.name}: seed {seed} has no loss: surgery.py measures one where it has a --dataset')
        alone = arm.seeds() ^ reference.seeds()
        if alone and arm.seeds() and reference.seeds():
            lines.append(f'{arm.name}: seed {listed(alone)} has no partner and is left out of the difference')
    runs = [run for arm in arms for run in arm.runs.values()]
    if len({validation(run['settings']) for run in runs}) > 1:
        lines.append('careful: not all of these were validated on the same tokens (dataset, packing, block_size, eval_iters, objective): '
                     'their losses are not comparable')
    dtypes = {arm.name: sorted({run['settings'].dtype for run in arm.runs.values()}) for arm in arms}
    if len(set(sum(dtypes.values(), []))) > 1:
        lines.append('careful: not all of these were trained in the same dtype: ' + ', '.join(f'{name} {"/".join(found)}' for name, found in dtypes.items()))
    return lines


def listed(seeds):
    return ', '.join(map(str, sorted(seeds)))


def validation(s):
    """What decides on which tokens, and with how much context, a run is validated."""
    data = str(real_folders(s.dataset))
    denoisers = str(s.denoisers) if s.objective == 'ul2' else ''
    return data, s.packing, s.block_size, s.eval_iters, s.objective, getattr(s, 'source_context', 0), denoisers


# -----------------------------------------------------------------------------
# A sweep: each arm at its best setting

def best(points):
    """
    The best of an arm's settings, by the mean over the seeds that all of them have been run with: five seeds are not to be compared
    with a single lucky one. A diverged run is as bad as can be.
    """
    measured = [p.seeds() | p.seeds('diverged') for p in points]
    shared = shared_seeds(points)

    def loss(point, seeds):
        if not shared or not shared <= seeds or shared & point.seeds('diverged'):
            return math.inf
        return statistics.mean(point.last('val_loss')[seed] for seed in shared)
    return min(zip(points, measured), key=lambda pair: loss(*pair))[0]


def shared_seeds(points):
    """The seeds that all of an arm's settings have been run with, those not run at all left out; if runs failed, the one that most have."""
    measured = [p.seeds() | p.seeds('diverged') for p in points]
    shared = set.intersection(*[seeds for seeds in measured if seeds] or [set()])
    return shared or {seed for seed, _ in Counter(seed for seeds in measured for seed in seeds).most_common(1)}


def number(value):
    """(what is varied, its number) of a swept value: ('', 2) of 2, ('attn.[qk]', 2) of {'attn.[qk]': 2}; None of anything else."""
    inside = next(iter(value.items())) if isinstance(value, dict) and len(value) == 1 else ('', value)
    return inside if type(inside[1]) in (int, float) else None


def beyond(points, chosen):
    """{setting: the value to try next} where the best value of a number is the first or last one tried."""
    out = {}
    for key in chosen.swept:
        part, value = number(chosen.swept[key]) or (None, None)
        values = sorted({found[1] for p in points if (found := number(p.swept[key])) and found[0] == part})
        if len(values) > 1 and value in (values[0], values[-1]):
            near = values[1] if value == values[0] else values[-2]
            following = value * min(4, max(1 / 4, value / near)) if min(value, near) > 0 else 2 * value - near
            following = round(following) if type(value) is int else float(f'{following:.2g}')
            if following > 0 and following != value:  # nothing is to be added below zero
                out[key] = {part: following} if part else following
    return out


def sweep_report(name, points):
    """The settings of one arm, a line each, the best marked, and a warning where it is at the edge."""
    chosen, lines = best(points), [f'{name}:']
    settings = [' '.join(f'{key}={value}' for key, value in p.swept.items()) for p in points]
    for p, setting in zip(points, settings):
        values, diverged = p.last('val_loss').values(), p.seeds('diverged')
        result = [plus_minus(*mean_and_error(values)) + f' n={len(values)}'] if values else []
        result += [f'diverged: seed {listed(diverged)}'] if diverged else []
        lines.append(f'  {"*" if p is chosen else " "} {setting:{max(map(len, settings))}}  {", ".join(result) or "not run"}')
    found = beyond(points, chosen) if chosen.seeds() else {}
    return '\n'.join(lines + ['  best at the edge: add ' + ', '.join(f'{key}={value}' for key, value in found.items())] * bool(found))


def swept_curve(points):
    """
    (setting, [(its value, mean loss, standard error)]): over the first swept setting that takes numbers, the others at their best; means over the
    seeds that all have.
    """
    def values(key):
        return {p.swept[key] for p in points if type(p.swept[key]) in (int, float)}
    key, lowest, shared = next((key for key in points[0].swept if len(values(key)) > 1), None), {}, shared_seeds(points)
    for p in points:
        losses = [loss for seed, loss in p.last('val_loss').items() if seed in shared]
        if key and len(losses) == len(shared) > 0 and type(p.swept[key]) in (int, float):  # others, such as None among rates, have no place on an axis
            lowest[p.swept[key]] = min(mean_and_error(losses), lowest.get(p.swept[key], (math.inf, None)), key=lambda pair: pair[0])
    return key, [(x, *lowest[x]) for x in sorted(lowest)]


def sweep_points(runs):
    """{arm: its settings, an Arm each, with the runs there are}."""
    arms = {}
    for run in runs:
        points = arms.setdefault(run.arm, [])
        point = next((p for p in points if p.swept == run.swept), None)
        if point is None:
            points.append(point := Arm(run.arm, swept=run.swept))
        if read_settings(run.out_dir):
            point.runs[run.seed] = read_run(run.out_dir)
    return arms


FURTHER = 4  # values that tuned() tries beyond a grid at most


def tuned(base, arms_of, grid, seeds, out, jobs):
    """
    {name: Arm} of arms_of(seed), {name: settings}, run where they are not in the folder `out` yet: on the first seed with each settings of `grid`, and
    with more where the best are at its edge; on the others with the best; on all at once where there is nothing to choose. For arms that differ with the
    seed, as those that start from another run of it do.
    """
    first = seeds[:1] if len(grid) > 1 else seeds
    tried = {name: list(grid) for name in arms_of(seeds[0])}

    def run(seeds):
        arms = {name: [] for name in tried}
        for seed in seeds:
            for name, arm in arms_of(seed).items():
                arms[name] += [arm | {key: [value] for key, value in point.items()} | {'seeds': [seed]} for point in tried[name]]
        sweep = Sweep(base, arms, out=out)
        run_missing(sweep, jobs)
        return sweep_points(expand(sweep))

    for _ in range(1 + FURTHER):
        points = run(first)
        found = {name: best(points[name]) for name in tried}
        more = {name: beyond(points[name], arm) for name, arm in found.items() if arm.seeds()}
        if not any(more.values()):
            break
        for name in filter(more.get, more):
            tried[name].append(found[name].swept | more[name])
    for name in tried if len(grid) > 1 else ():
        print(sweep_report(name, points[name]))
    tried = {name: [arm.swept] for name, arm in found.items()}
    for name, points in run(seeds[1:]).items() if len(seeds) > len(first) else ():
        found[name].runs |= points[0].runs
    return found


# -----------------------------------------------------------------------------

def report(s, arms, folder, swept=None):
    """Print the table of arms, and write the csv file and the picture that the settings ask for."""
    known = {arm.name: arm for arm in arms}
    if s.reference and s.reference not in known:
        raise UserError(f'reference={s.reference}: takes one of {", ".join(known)}')
    reference = known[s.reference] if s.reference else arms[0]
    arms = [reference] + sorted((arm for arm in arms if arm is not reference), key=lambda arm: arm.loss)
    print(table(arms))
    if s.csv:
        write_csv([row(arm, reference) for arm in arms], s.csv)
    if s.picture:
        path = os.path.join(folder, 'compare.png') if s.picture == 'auto' else s.picture
        draw(arms, path, swept)
        print(f'drawn: {path}')


def report_sweep(s, runs, folder):
    """The settings of every arm, then the report of the arms at their best."""
    arms = sweep_points(runs)
    for name, points in arms.items():
        if len(points) > 1:
            print(sweep_report(name, points) + '\n')
    found = [best(points) for points in arms.values() if any(p.runs for p in points)]
    if found:
        report(s, found, folder, {name: curve for name, points in arms.items() if len((curve := swept_curve(points))[1]) > 1})


def main():
    s = configure(Settings)
    if not s.sweep:
        return report(s, group([read_run(out_dir) for out_dir in find_runs(s.runs)]), 'out')
    sweep, problem = read_sweep(s.sweep), None
    runs = expand(sweep)
    if s.dry_run:
        return print(list_runs(runs))
    try:
        run_missing(sweep, s.jobs)
    except UserError as error:  # some failed: report the others first
        problem = error
    report_sweep(s, runs, sweep.out)
    if problem:
        raise problem


if __name__ == '__main__':
    run_main(main)
