"""
--minutes: end a run after a given time. Five steps are timed before training, and max_iters is adjusted at
every evaluation.
"""
import math
import os
from dataclasses import asdict, replace
from functools import partial

from batches import EVAL_ROWS, evaluate
from checkpoint import check_claim, replace_json, writing
from configurator import UserError, process_age
from features.plan.dial import intervals


def evaluation_steps(s):
    """The cost of an evaluation in training steps: a validation row costs a third of a training row."""
    return EVAL_ROWS * s.eval_iters / (s.batch_size * s.gradient_accumulation_steps) / 3


def fit_minutes(s, derived, seconds_per_step, elapsed, most=math.inf):
    """
    Set max_iters, to `most` at most, so that the run ends s.minutes after the start of the process, `elapsed`
    seconds ago, and set the intervals.
    """
    evaluations = 6 * evaluation_steps(s)
    count = (60 * s.minutes - elapsed) / seconds_per_step - evaluations
    if count < 10:
        raise UserError(f'minutes={s.minutes:g}: a step takes {seconds_per_step:.1f} s, '
                        f'and {elapsed:.0f} s went by already: give more minutes, or a smaller --depth')
    count = min(round(count), most)
    for name, value in ({'max_iters': count} | intervals(count, s.batch_size)).items():
        if name in derived:
            setattr(s, name, value)


class Pace:
    """
    The speed of a run with s.minutes, and the steps that are left: the machine's speed may change after the
    first fit. clock() returns the seconds since this process started; `earlier` are the seconds of the run's
    earlier processes; most: the limit on max_iters.
    """
    SMALL = 0.02  # a change of max_iters by less is not worth a bend in the schedule

    def __init__(self, s, fits=(), most=math.inf, clock=None):
        self.s = s
        self.most = most
        self.fits = list(fits or ())  # [step, the max_iters set there]
        self.clock = clock or process_age
        self.earlier = 0.0
        self.ends = []  # when the last evaluation ended, and every step since then
        self.began = 0.0  # when the evaluation began that is under way
        self.is_compiling = False  # whether it is compiled first
        self.evaluation = None  # seconds that the last one took, with checkpoint and sample

    def elapsed(self):
        """Seconds since the start of the run."""
        return self.earlier + self.clock()

    def end_step(self):
        self.ends.append(self.elapsed())

    def begin_evaluation(self, step, run, ranks):
        """
        Fit max_iters again before the checkpoint of this step is written, so that a resumed run has it too.
        """
        self.began = self.elapsed()
        self.is_compiling = 'evaluation' in run.to_compile
        before = self.s.max_iters
        if step >= before:
            return
        self.s.max_iters = ranks.from_first(partial(self.fit, step))
        if self.s.max_iters != before:
            self.fits.append([step, self.s.max_iters])
            ranks.from_first(self.write_settings)
            ranks.say(f'step {step}: minutes={self.s.minutes:g}: {self.elapsed():.0f} seconds are gone, '
                      f'max_iters={self.s.max_iters} in place of {before}')

    def write_settings(self):
        check_claim(self.s.out_dir)
        with writing(f'out_dir={self.s.out_dir}', 'make room, or give another'):
            replace_json(os.path.join(self.s.out_dir, 'settings.json'), asdict(self.s))

    def end_evaluation(self):
        if not self.is_compiling:
            self.evaluation = self.elapsed() - self.began
        self.ends = [self.elapsed()]

    def fit(self, step):
        """The max_iters with which the run ends after s.minutes, computed before an evaluation at `step`."""
        steps = len(self.ends) - 1
        if steps < 1:  # the run has gone on from a checkpoint of this step, whose fit it keeps
            return self.s.max_iters
        recent = max(min(5, steps), steps // 4)
        per_step = (self.ends[-1] - self.ends[-1 - recent]) / recent
        evaluation = self.evaluation
        if evaluation is None:
            evaluation = evaluation_steps(self.s) * per_step
        left = max(0.0, 60 * self.s.minutes - self.elapsed() - evaluation)
        intervals, rest = divmod(left, self.s.eval_interval * per_step + evaluation)
        # the end is an evaluation too
        more = intervals * self.s.eval_interval + max(0.0, (rest - evaluation) / per_step)
        count = min(step + round(more), self.most)
        return self.s.max_iters if abs(count - self.s.max_iters) < self.SMALL * self.s.max_iters else count


def spend_minutes(run, s, ranks, stop, train_step):
    """
    Compile, time five steps after three warm-up steps, undo these steps, and set max_iters so that the whole
    process takes s.minutes. Returns False if a signal interrupted it.
    """
    weights = {name: t.clone() for name, t in run.model.state_dict().items()}
    times = []
    for step in range(8):
        began = run.pace.elapsed()
        with ranks.patient('step' in run.to_compile):
            done = train_step(run, s, step, ranks, bool(stop))
        run.to_compile.discard('step')
        done.norm.item()  # waits for the device
        times.append(run.pace.elapsed() - began)
        if done.stop:
            return False
    if 'evaluation' in run.to_compile:
        with ranks.patient(True):
            result = evaluate(run.model, run.val, replace(s, eval_iters=4), ranks, stop)  # a single pass
        run.to_compile.discard('evaluation')
        if result is None:
            return False
    run.model.load_state_dict(weights)
    run.optimizer.state.clear()
    if s.n_expert:  # moe
        run.model.take_loads()  # moe

    def fit():
        fit_minutes(s, run.planned, sorted(times[3:])[2], run.pace.elapsed(), run.pace.most)
        return s.max_iters, s.eval_interval, s.log_interval
    s.max_iters, s.eval_interval, s.log_interval = ranks.from_first(fit)
    run.pace.fits.append([0, s.max_iters])
    return True
