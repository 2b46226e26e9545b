"""
--minutes: end a run after a given time. A few steps are timed before training, and max_iters is fitted again
on the way, ever more often towards the end. The learning rate has no jump there: see bent().
"""
import math
import os
from collections import deque
from dataclasses import asdict, replace
from functools import partial
from statistics import median, median_low

from batches import EVAL_ROWS, evaluate
from checkpoint import check_claim, replace_json, writing
from configurator import UserError, process_age
from features.plan.dial import intervals

ENDING = 1.5  # seconds that the process takes to end
EVALUATING = 0.02  # share of the time that each evaluation takes at most, if 4 eval_iters are enough for it


def evaluation_steps(s):
    """The cost of an evaluation in training steps: a validation row costs a third of a training row."""
    return EVAL_ROWS * s.eval_iters / (s.batch_size * s.gradient_accumulation_steps) / 3


def fit_minutes(s, derived, seconds_per_step, elapsed, most=math.inf):
    """
    Set max_iters, to `most` at most, so that the run ends s.minutes after the start of the process, `elapsed`
    seconds ago, and set the intervals. If an evaluation would take too long, it takes fewer rows.
    """
    steps = (60 * s.minutes - ENDING - elapsed) / seconds_per_step  # with six evaluations
    share = EVALUATING * steps / evaluation_steps(s)
    if 'eval_iters' in derived and share < 1:
        s.eval_iters = max(min(4, s.eval_iters), int(share * s.eval_iters))
    count = steps - 6 * evaluation_steps(s)
    if count < 10:
        raise UserError(f'minutes={s.minutes:g}: a step takes {seconds_per_step:.1f} s, '
                        f'and {elapsed:.0f} s went by already: give more minutes, or a smaller --depth')
    count = min(round(count), most)
    for name, value in ({'max_iters': count} | intervals(count, s.batch_size)).items():
        if name in derived and name != 'eval_iters':
            setattr(s, name, value)


# -----------------------------------------------------------------------------
# The schedule of a run whose max_iters changes

def progress(step, s):
    """
    The share of the schedule before update number `step`, 0…1, without a warm-up of given length. After a
    change of max_iters, what was left of it then is spread over the steps that are left.
    """
    first = s.warmup_iters or 0
    at, done = s.bend or (0, 0.0)
    at = max(at, first)
    return done + (1 - done) * min(1.0, max(0, step - at) / max(1, s.max_iters - at))


def bent(step, s):
    """
    The step of a run of s.max_iters steps whose learning rate update number `step` has: the rate goes on from
    its value at the last change of max_iters, and reaches its end value with the last step.
    """
    first = s.warmup_iters or 0
    if step < first or s.lr_decay_iters is not None:
        return step
    return first + progress(step, s) * (s.max_iters - first)


# -----------------------------------------------------------------------------
# The time that is left

class Pace:
    """
    The speed of a run with s.minutes, and the steps that are left: the machine's speed may change on the way.
    Rank 0 decides, at steps that all ranks know. clock() returns the seconds since this process started;
    `fits`: those of the run's earlier processes; most: the limit on max_iters.
    """
    OFTEN = 32  # max_iters is fitted again after this fraction of the steps that are left
    SMALL = 0.02  # a change by less than this share of the steps that are left is not worth a bend
    PAUSE = 4  # a step that takes this many times the median is no sign of what follows
    LANDING = 5  # steps for the end of the schedule, however late it is
    LATE = 0.03  # but by this share of the minutes at most

    def __init__(self, s, fits=(), most=math.inf, clock=None):
        self.s = s
        self.most = most
        self.fits = list(fits or ())  # [step, the max_iters set there, progress() there]
        self.clock = clock or process_age
        self.times = deque(maxlen=1000)  # seconds of the last steps, with what was done between them
        self.costs = deque(maxlen=3)  # of the last evaluations, with checkpoint and sample: seconds, steps
        self.since = None  # when the last step or evaluation ended
        self.is_compiling = False  # whether the next evaluation is compiled first
        self.due = 0  # the step of the next fit
        self.written = s.max_iters  # in settings.json
        self.limit = 60 * s.minutes - ENDING  # seconds after which only a landing is begun
        if self.fits and len(self.fits[-1]) == 3:  # not the first one, nor those of an older run
            s.bend = self.fits[-1][0], self.fits[-1][2]

    def begin(self, times):
        """Begin a new run, whose first steps take these seconds."""
        self.times.extend(times)
        self.since = self.clock()
        self.written = self.s.max_iters
        self.fits.append([0, self.s.max_iters])

    def elapsed(self, run):
        """Seconds since the start of the run, in all of its processes."""
        return (run.log.seconds if run.log else 0.0) + self.clock()

    def end_step(self, step, run, ranks):
        """Note the time of a step, and fit max_iters again if that is due; all ranks call it together."""
        now = self.elapsed(run)
        if self.since is None:  # the first step of a process that goes on, which compiles
            self.limit = max(self.limit, now)
        else:
            self.times.append(now - self.since)
        self.since = now
        self.is_compiling = 'evaluation' in run.to_compile
        if self.times and self.due <= step < self.s.max_iters:
            count, self.s.eval_interval = ranks.from_first(partial(self.fit, step, now))
            if count != self.s.max_iters:
                self.s.bend = step, progress(step, self.s)
                self.s.max_iters = count
                self.fits.append([step, count, self.s.bend[1]])
            self.due = step + max(1, (count - step) // self.OFTEN)
        if step % self.s.eval_interval == 0 or step >= self.s.max_iters:
            self.tell(step, now, ranks)

    def tell(self, step, now, ranks):
        """Before an evaluation: print max_iters and store it in settings.json, if it has changed."""
        if self.s.max_iters == self.written:
            return
        ranks.from_first(self.write_settings)
        ranks.say(f'step {step}: minutes={self.s.minutes:g}: {now:.0f} seconds are gone, '
                  f'max_iters={self.s.max_iters} in place of {self.written}')
        self.written = self.s.max_iters

    def write_settings(self):
        check_claim(self.s.out_dir)
        with writing(f'out_dir={self.s.out_dir}', 'make room, or give another'):
            replace_json(os.path.join(self.s.out_dir, 'settings.json'), asdict(self.s))

    def end_evaluation(self, step, run):
        now = self.elapsed(run)
        if self.times and not self.is_compiling:
            self.costs.append((now - self.since, (now - self.since) / self.seconds_per_step(step)))
        self.since = now

    def seconds_per_step(self, step):
        """The mean of the last steps, of a quarter as many as are left; a pause counts as a slow step."""
        recent = list(self.times)[-max(5, (self.s.max_iters - step) // 4):]
        slow = self.PAUSE * median(recent)
        return sum(min(seconds, slow) for seconds in recent) / len(recent)

    def fit(self, step, now):
        """
        (max_iters, eval_interval) with which the run ends after s.minutes; `now`: seconds that are gone at
        `step`. The last evaluation on the way is left out if the end follows within half an interval.
        """
        s, interval = self.s, self.s.eval_interval
        per_step = self.seconds_per_step(step)
        # One slow evaluation is no sign of what follows, nor are a few slow steps of how slow the next one is
        evaluation = (median_low((seconds + steps * per_step) / 2 for seconds, steps in self.costs)
                      if self.costs else evaluation_steps(s) * per_step)
        done = step % interval  # steps since the last evaluation
        if not done:  # one follows at once
            now += evaluation
        left = 60 * s.minutes - ENDING - now
        more = (left - evaluation) / per_step  # the end is an evaluation too
        is_last = more < 1.5 * interval - done
        if not is_last:
            intervals, rest = divmod(left + done * per_step, interval * per_step + evaluation)
            more = intervals * interval + max(0.0, (rest - evaluation) / per_step) - done
        in_time = (self.limit + self.LATE * 60 * s.minutes - now - evaluation) / per_step
        landing = min(self.LANDING, s.max_iters - step, int(in_time))
        count = min(step + max(0, round(more), landing), self.most)
        if abs(count - s.max_iters) < self.SMALL * (s.max_iters - step):
            count = s.max_iters
        return count, max(1, count) if is_last and done else interval


# -----------------------------------------------------------------------------
# Before the first step

MOST_TIMING = 0.02  # share of the minutes, without the first step, which compiles


def spend_minutes(run, s, ranks, stop, train_step):
    """
    Compile, time five steps after three warm-up steps, undo these steps, and set max_iters so that the whole
    process takes s.minutes. If steps are slow, fewer are timed. Returns False if a signal interrupted it.
    """
    weights = {name: t.clone() for name, t in run.model.state_dict().items()}
    times = []
    for step in range(8):
        began = run.pace.clock()
        with ranks.patient('step' in run.to_compile):
            done = train_step(run, s, step, ranks, bool(stop))
        run.to_compile.discard('step')
        done.norm.item()  # waits for the device
        times.append(run.pace.clock() - began)
        if done.stop:
            return False
        if ranks.from_first(lambda: sum(times[1:]) > MOST_TIMING * 60 * s.minutes):
            break
    times = times[3:] or times[-1:]
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
        fit_minutes(s, run.planned, median(times), run.pace.clock(), run.pace.most)
        return s.max_iters, s.eval_interval, s.eval_iters, s.log_interval
    s.max_iters, s.eval_interval, s.eval_iters, s.log_interval = ranks.from_first(fit)
    run.pace.begin(times)
    return True
