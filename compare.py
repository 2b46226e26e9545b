"""
Compare runs in one table and one plot, grouped by seed.

    python compare.py out/demo_dense out/demo_lowrank --picture=out/demo.png
    python compare.py 'out/sweeps/demo/*' --reference=dense,learning_rate=0.002
    python compare.py --sweep=config/sweeps/demo.py          # runs what is missing first

Runs that differ only in their seed form one arm. The table has the mean ± standard error of each arm, and its
difference from the reference, paired by seed, with a 95% interval. The comparison uses the loss at the end of
a run, when the learning rate has decayed: in the middle of its schedule, a run looks worse than it is. To
compare arms of different cost, give them equal budgets (budget='flops' in a sweep).
"""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))
import features  # noqa: I001 — first: your random.py or data/ then hides no module of ours or of a library
if __name__ == '__main__':
    features.start(__file__)

from dataclasses import dataclass, field

from configurator import FilePath, UserError, configure, run_main
from features.study.jobs import run_missing
from features.study.pictures import draw, write_csv
from features.study.runs import find_runs, group, read_run
from features.study.sweep import expand, list_runs, read_sweep
from features.study.tables import row, table
from features.study.tuning import best, sweep_points, sweep_report, swept_curve


@dataclass
class Settings:
    runs: list[FilePath] = field(default_factory=list)  # runs, or patterns: 'out/sweeps/demo/*'
    sweep: FilePath = ''  # sweep file: do the missing runs, then report (docs/study.md)
    dry_run: bool = False  # list the runs of the sweep, but do not run them
    jobs: int = 0  # number of runs at a time; 0 = one per GPU, or one on a CPU
    reference: str = ''  # arm to compare the others with; '' = the first one
    picture: FilePath = 'auto'  # file for the plot; auto = compare.png in out or in the sweep's folder; '' =
    # no plot
    csv: FilePath = ''  # file for the table

    positional = 'runs'

    def check(self):
        """Raise ValueError for values that cannot work."""
        if bool(self.runs) == bool(self.sweep):
            raise ValueError('runs: give the out_dir of one run or more, or --sweep=FILE: '
                             'python compare.py out/demo_dense out/demo_lowrank')
        if self.jobs < 0:
            raise ValueError(f'jobs={self.jobs}: must not be negative')
        if (self.dry_run or self.jobs) and not self.sweep:
            raise ValueError('dry_run, jobs: belong to --sweep=FILE')


def report(s, arms, folder, swept=None):
    """
    Print the table of `arms`; write the csv file, and the picture, by default into `folder`. swept: as draw()
    takes it.
    """
    known = {arm.name: arm for arm in arms}
    if s.reference and s.reference not in known:
        raise UserError(f'reference={s.reference}: takes one of {", ".join(known)}')
    reference = known[s.reference] if s.reference else arms[0]
    others = [arm for arm in arms if arm is not reference]
    arms = [reference] + sorted(others, key=lambda arm: arm.loss)
    print(table(arms))
    if s.csv:
        write_csv([row(arm, reference) for arm in arms], s.csv)
    if s.picture:
        path = s.picture
        if path == 'auto':
            path = os.path.join(folder, 'compare.png')
        draw(arms, path, swept)
        print(f'drawn: {path}')


def report_sweep(s, runs, folder):
    """Print the points of every arm of a sweep, then report the arms at their best."""
    found = []
    curves = {}
    for name, points in sweep_points(runs).items():
        if len(points) > 1:
            print(sweep_report(name, points) + '\n')
        if any(point.runs for point in points):
            found.append(best(points))
        setting, curve = swept_curve(points)
        if len(curve) > 1:
            curves[name] = setting, curve
    if found:
        report(s, found, folder, curves)


def main():
    s = configure(Settings)
    if s.runs:
        arms = group([read_run(out_dir) for out_dir in find_runs(s.runs)])
        return report(s, arms, 'out')
    sweep = read_sweep(s.sweep)
    runs = expand(sweep)
    if s.dry_run:
        return print(list_runs(runs))
    problem = None
    try:
        run_missing(sweep, s.jobs)
    except UserError as error:  # some runs failed: report the others first
        problem = error
    report_sweep(s, runs, sweep.out)
    if problem:
        raise problem


if __name__ == '__main__':
    run_main(main)
