"""
What watches over a run: signals, numbers that are not finite, losses that jump, ranks that drift apart.
"""
import os
import signal
import statistics
import time
from dataclasses import dataclass, field

import torch

from configurator import UserError
from features.scale.shard import is_divided


@dataclass
class GuardConfig:
    max_skipped: int = 10  # steps in a row whose loss or gradient is not finite on some rank: none of them changes a weight; one more ends the run
    rewind_spikes: float = 0.0  # a loss that many standard deviations above the mean of the 128 before it (6 is a good number): back to the last
    # checkpoint, and on without the data of the 10 steps up to it (PaLM, arXiv 2204.02311, section 5.1); 0 = never
    skip_steps: list[int] = field(default_factory=list)  # steps, from 0, whose data are left out: the schedule goes on, no weight changes
    desync_interval: int = 100  # steps between comparisons of all ranks' weights, which are the same bit for bit; 0 = never
    hang_timeout: float = 600.0  # seconds for which a rank may show no progress before all end, saying which one is behind;
    # ten times that for what rank 0 does for all, as saving, and while the network is compiled; 0 = never, until
    # torch.distributed gives up after half an hour

    def check(self):
        """Raise ValueError for values that cannot work."""
        for name in ('max_skipped', 'rewind_spikes', 'desync_interval', 'hang_timeout'):
            if getattr(self, name) < 0:
                raise ValueError(f'{name}={getattr(self, name)}: must not be negative')
        if min(self.skip_steps, default=0) < 0:
            raise ValueError(f'skip_steps={self.skip_steps}: takes steps from 0 on')


def stop_signals():
    """The signals that ask a run to save and stop."""
    signals = [signal.SIGTERM, signal.SIGINT]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        signals.append(signal.SIGHUP)
    return signals


class StopSignal:
    """
    Remembers the first SIGTERM, Ctrl-C or SIGHUP (the terminal was closed), for the loop to end after its step. A second Ctrl-C
    or SIGTERM ends the process at once. But a SIGTERM within five seconds of another signal is the same: where a whole job is
    told to stop, torchrun passes on the signals that its processes have received themselves. So is any SIGHUP: a shell and the
    system send several. A process that was started with SIGHUP ignored, as by nohup, still ignores it.
    """

    def __init__(self):
        self.number, self.since = 0, 0.0

    def listen(self):
        for number in stop_signals():
            signal.signal(number, self.remember)

    def remember(self, number, frame):
        if not self.number or (number == signal.SIGTERM and self.number == signal.SIGHUP):
            self.number, self.since = number, time.monotonic()
        elif number == signal.SIGINT or (number == signal.SIGTERM and time.monotonic() - self.since > 5):
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def __bool__(self):
        return self.number > 0


# -----------------------------------------------------------------------------
# Losses

def not_finite(s, step):
    rate = f'{s.main_rate}={getattr(s, s.main_rate)}'
    return UserError(f'the loss or its gradient is not finite at step {step}: lower {rate} or raise warmup_iters; '
                     f'the newest checkpoint in {s.out_dir} is from before')


class Spike(Exception):
    """The loss of update number `step` was far above those before it. .steps: whose data are to be left out, as what did the harm may be some steps back."""
    WIDTH = 10

    def __init__(self, step):
        super().__init__()
        self.steps = range(max(0, step - self.WIDTH + 1), step + 1)


class Losses:
    """The losses of the last SPAN steps, with which the next one is compared once there are ENOUGH."""
    SPAN, ENOUGH = 128, 32

    def __init__(self, most, recent=()):
        self.most, self.recent = most, list(recent)

    def add(self, loss):
        """Whether a loss is more than `most` standard deviations above the mean of those before it; if not, it is one of them from now on."""
        if len(self.recent) >= self.ENOUGH and loss > statistics.fmean(self.recent) + self.most * statistics.stdev(self.recent):
            return True
        self.recent = [*self.recent, loss][-self.SPAN:]
        return False


# -----------------------------------------------------------------------------
# A run that learns nothing

class FirstSteps:
    """
    The first COUNT steps of a process, judged once when all are made: a gradient of exactly zero in every tensor, or a
    loss that does not change at all, means that something is broken. Steps without targets, as those that were skipped,
    do not count. The numbers stay on the device until then, so that no step waits for them.
    """
    COUNT = 10
    SMALLEST_LOSS = 1e-4  # below it the network knows its data, and float32 rounds what is left to zero
    LEAST_RATE = 1e-5  # a sum of rates below it need not show in a loss in float32, as in a very long warm-up

    def __init__(self):
        self.steps, self.nats, self.targets, self.norms, self.rates = [], [], [], [], []

    def add(self, step, nats, targets, norm, rate, s, ranks):
        """
        Take in update number `step`: the summed loss of this rank (a tensor), the targets of all ranks, the norm of the
        gradient (a tensor) and the highest rate of any tensor. All ranks decide alike. Raises UserError.
        """
        if not targets or len(self.steps) == self.COUNT:
            return
        self.steps.append(step + 1)
        self.nats.append(nats)
        self.targets.append(targets)
        self.norms.append(norm)
        self.rates.append(rate)
        if len(self.steps) == self.COUNT:
            self.judge(s, ranks)

    def judge(self, s, ranks):
        numbers = ranks.sum(*(n.item() for n in self.nats), *(n.item() for n in self.norms))
        losses = [n / count for n, count in zip(numbers[:self.COUNT], self.targets)]
        norms = numbers[self.COUNT:]
        if min(losses) < self.SMALLEST_LOSS or not any(self.rates):  # learned already, or asked to stay as it is
            return
        where = f'in steps {self.steps[0]} to {self.steps[-1]}: nothing is learned'
        if not any(norms):
            cure = 'set compile=False' if s.compile else 'check your changes to the network or its loss'
            raise UserError(f'the gradient of every tensor was exactly zero {where}: {cure}, or try another version of torch '
                            f'than {torch.__version__}')
        if len(set(losses)) == 1 and sum(self.rates) > self.LEAST_RATE:
            rates = f'learning_rate={s.learning_rate:g}, lr_scale={s.lr_scale}, compile={s.compile}'
            raise UserError(f'the loss was exactly {losses[0]:.4f} {where}: check the data set, {rates}')


# -----------------------------------------------------------------------------
# Ranks that drift apart

def check_alike(model, ranks, step):
    """Raise UserError if the weights of some rank are not those of rank 0, bit for bit: names both, the rank and the first such tensor."""
    sums = ranks.gather(checksums(model))
    for rank, theirs in enumerate(sums):
        for name, one in sums[0].items():
            if theirs[name] != one:
                raise UserError(f'the weights of rank {rank} are not those of rank 0 after step {step} ({name}): the ranks have drifted apart (a faulty '
                                'device, or other code or data there?); run the same command to go on from the newest checkpoint')


def checksums(model):
    """{name: a number for its bits} of every parameter that all ranks hold whole."""
    sums = {name: bits(p.detach()).sum() for name, p in model.named_parameters() if not is_divided(p)}
    return dict(zip(sums, torch.stack([*sums.values()]).tolist())) if sums else {}


def bits(t):
    """A tensor's bits as int64, eight bytes at a time, for a checksum: sums that wrap around cost no more than reading."""
    flat = t.contiguous().view(-1).view(torch.uint8)
    whole = len(flat) // 8 * 8
    return torch.cat([flat[:whole].view(torch.int64), flat[whole:].long()]) if whole < len(flat) else flat.view(torch.int64)


def check_same_start(ranks, settings, fingerprint):
    """Raise UserError if some rank was given other settings than rank 0, or other data."""
    starts = ranks.gather((settings, fingerprint))
    for rank, (theirs, data) in enumerate(starts):
        other = [name for name, value in starts[0][0].items() if theirs.get(name) != value and not name.startswith('wandb_')]  # nanoGPT's has the time in it
        if other:
            raise UserError(f'{other[0]}={theirs.get(other[0])} on rank {rank}, {starts[0][0][other[0]]} on rank 0: start all with the same settings')
        if data != starts[0][1]:
            raise UserError(f'dataset: the files of rank {rank} are not those of rank 0: give all machines the same data set')
