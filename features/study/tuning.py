"""
Each arm at its best setting: which point of a sweep is best, whether it lies at the edge, and what to try
next.

    arms = sweep_points(expand(sweep))            # {arm: [an Arm per point]}
    print(sweep_report('dense', arms['dense']))   # every point, the best marked, a warning at the edge
    # runs the points, and more until the best is inside
    found = tuned(base, arms_of, grid, seeds, out, jobs)
"""
import math
import statistics
from collections import Counter

from features.study.jobs import run_missing
from features.study.runs import Arm, read_run, read_settings
from features.study.stats import mean_and_error, show_mean
from features.study.sweep import Sweep, expand
from features.study.tables import listed

# -----------------------------------------------------------------------------
# The best point

def sweep_points(runs):
    """{arm: [an Arm per point]} of the Runs of a sweep, with those that have been started."""
    arms = {}
    for run in runs:
        points = arms.setdefault(run.arm, [])
        point = find_point(points, run.swept)
        if point is None:
            point = Arm(run.arm, swept=run.swept)
            points.append(point)
        if read_settings(run.out_dir):
            point.runs[run.seed] = read_run(run.out_dir)
    return arms


def find_point(points, swept):
    """The Arm of `points` with these swept settings, None if there is none."""
    for point in points:
        if point.swept == swept:
            return point
    return None


def best(points):
    """
    The best of an arm's points by the mean over the seeds that all of them have, because five seeds must not
    be compared with a single lucky one. A diverged run counts as infinite.
    """
    seeds = shared_seeds(points)
    chosen = points[0]
    lowest = math.inf
    for point in points:
        loss = mean_loss(point, seeds)
        if loss < lowest:
            chosen = point
            lowest = loss
    return chosen


def measured_seeds(point):
    """The seeds for which a point is finished or has diverged."""
    return point.seeds() | point.seeds('diverged')


def shared_seeds(points):
    """
    The seeds that all of an arm's points have, a set; points without any run are ignored. If no seed is in
    all points, because runs failed: the seed that most points have.
    """
    found = [measured_seeds(point) for point in points if measured_seeds(point)]
    if not found:
        return set()
    shared = set.intersection(*found)
    if shared:
        return shared
    counts = Counter(seed for seeds in found for seed in seeds)
    return {counts.most_common(1)[0][0]}


def mean_loss(point, seeds):
    """Mean final loss of a point over these seeds; infinite if one is missing or has diverged."""
    losses = point.last('val_loss')
    if not seeds or not seeds <= losses.keys():
        return math.inf
    return statistics.mean(losses[seed] for seed in seeds)


# -----------------------------------------------------------------------------
# Beyond the edge of a grid

def beyond(points, chosen):
    """
    {setting: the next value to try} for the settings in which the chosen point has the smallest or largest
    number tried.
    """
    out = {}
    for key, value in chosen.swept.items():
        following = next_value([point.swept[key] for point in points], value)
        if following is not None:
            out[key] = following
    return out


def next_value(tried, chosen):
    """
    The next value to try beyond `chosen`; None if it is not a number, or not the smallest or largest one
    tried.
    """
    if number(chosen) is None:
        return None
    part, value = number(chosen)
    values = set()
    for other in tried:
        found = number(other)
        if found and found[0] == part:
            values.add(found[1])
    values = sorted(values)
    if len(values) < 2 or value not in (values[0], values[-1]):
        return None
    near = values[1] if value == values[0] else values[-2]
    following = continue_grid(value, near)
    if following <= 0 or following == value:  # no rate or rank is below zero
        return None
    return {part: following} if part else following


def continue_grid(value, near):
    """
    The number that continues `near`, `value`: by their ratio, at most 4, or by their difference if one is not
    positive.
    """
    if min(value, near) > 0:
        following = value * min(4, max(1 / 4, value / near))
    else:
        following = 2 * value - near
    if type(value) is int:
        return round(following)
    return float(f'{following:.2g}')


def number(value):
    """
    (part, number) of a swept value: ('', 2) for 2, ('attn.[qk]', 2) for {'attn.[qk]': 2}; None for anything
    else.
    """
    part = ''
    if isinstance(value, dict) and len(value) == 1:
        part, value = next(iter(value.items()))
    if type(value) not in (int, float):
        return None
    return part, value


# -----------------------------------------------------------------------------
# What is shown

def sweep_report(name, points):
    """
    The points of an arm as text, one line each, the best one marked, and a warning if it is at the edge.
    """
    chosen = best(points)
    settings = [' '.join(f'{key}={value}' for key, value in point.swept.items()) for point in points]
    width = max(len(setting) for setting in settings)
    lines = [f'{name}:']
    for point, setting in zip(points, settings):
        mark = '*' if point is chosen else ' '
        lines.append(f'  {mark} {setting:{width}}  {result_of(point)}')
    found = beyond(points, chosen) if chosen.seeds() else {}
    if found:
        lines.append('  best at the edge: add ' + ', '.join(f'{key}={value}' for key, value in found.items()))
    return '\n'.join(lines)


def result_of(point):
    """'4.1333 ± 0.0882 n=3, diverged: seed 4' of a point, 'not run' if it has no result."""
    parts = []
    losses = point.last('val_loss').values()
    if losses:
        parts.append(f'{show_mean(*mean_and_error(losses))} n={len(losses)}')
    if point.seeds('diverged'):
        parts.append(f'diverged: seed {listed(point.seeds("diverged"))}')
    return ', '.join(parts) or 'not run'


def swept_curve(points):
    """
    (setting, [(its value, mean loss, standard error)]) over the first swept setting with two or more numbers,
    with the other settings at their best. The means are over the seeds that all points have. (None, []) if
    there is no such setting.
    """
    key = first_number(points)
    if key is None:
        return None, []
    seeds = shared_seeds(points)
    lowest = {}  # {value: (mean, error)}
    for point in points:
        value = point.swept[key]
        losses = point.last('val_loss')
        if type(value) not in (int, float) or not seeds or not seeds <= losses.keys():
            continue  # None among rates, say, has no place on an axis
        found = mean_and_error(losses[seed] for seed in sorted(seeds))
        if value not in lowest or found[0] <= lowest[value][0]:
            lowest[value] = found
    return key, [(value, *lowest[value]) for value in sorted(lowest)]


def first_number(points):
    """The first swept setting that has two or more numbers among `points`; None if there is none."""
    for key in points[0].swept:
        values = {point.swept[key] for point in points if type(point.swept[key]) in (int, float)}
        if len(values) > 1:
            return key
    return None


# -----------------------------------------------------------------------------
# Arms that are tuned by themselves

FURTHER = 4  # values that tuned() tries at most beyond a grid


def tuned(base, arms_of, grid, seeds, out, jobs):
    """
    {name: Arm} with each arm at the best point of `grid` (a list of {setting: value}), for all `seeds`.

    1) The first seed runs every point. While the best point of an arm is at the edge of what was tried, it
       runs one more beyond it, FURTHER at most. With a single point there is nothing to choose, and all seeds
       run at once.
    2) The other seeds run the best point.

    arms_of(seed): {name: settings} of the arms; they may differ with the seed, as those do that start from
    another run with that seed. Runs that are already in the folder `out` are not made again. jobs as in
    run_missing().
    """
    is_choice = len(grid) > 1
    first = seeds[:1] if is_choice else seeds
    tried = {name: list(grid) for name in arms_of(seeds[0])}
    for _ in range(1 + FURTHER):
        points = run_points(base, arms_of, tried, first, out, jobs)
        found = {name: best(points[name]) for name in tried}
        is_inside = True
        for name, arm in found.items():
            more = beyond(points[name], arm) if arm.seeds() else {}
            if more:
                tried[name].append(arm.swept | more)
                is_inside = False
        if is_inside:
            break
    if is_choice:
        for name in tried:
            print(sweep_report(name, points[name]))
    if len(seeds) > len(first):
        chosen = {name: [arm.swept] for name, arm in found.items()}
        for name, points in run_points(base, arms_of, chosen, seeds[1:], out, jobs).items():
            found[name].runs |= points[0].runs
    return found


def run_points(base, arms_of, points, seeds, out, jobs):
    """Run {arm: [its points]} with each of `seeds`, and return them as {arm: [one Arm per point]}."""
    arms = {name: [] for name in points}
    for seed in seeds:
        for name, settings in arms_of(seed).items():
            for point in points[name]:
                swept = {key: [value] for key, value in point.items()}
                arms[name].append(settings | swept | {'seeds': [seed]})
    sweep = Sweep(base, arms, out=out)
    run_missing(sweep, jobs)
    return sweep_points(expand(sweep))
