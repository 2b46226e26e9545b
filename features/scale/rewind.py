"""
--rewind_spikes: after a loss spike, go back to the last checkpoint and skip the data of the steps up to the
spike.
"""
import gc
import statistics

import checkpoint
from configurator import UserError

REWINDS = 5  # a run is given up after this many spikes, one soon after another


class Spike(Exception):
    """
    The loss of update number `step` was far above the previous losses. .steps: the steps whose data are
    skipped; the cause may be some steps back.
    """
    WIDTH = 10

    def __init__(self, step):
        super().__init__()
        self.steps = range(max(0, step - self.WIDTH + 1), step + 1)


class Losses:
    """The losses of the last SPAN steps. New losses are compared with them once there are ENOUGH."""
    SPAN, ENOUGH = 128, 32

    def __init__(self, most, recent=()):
        self.most, self.recent = most, list(recent)

    def add(self, loss):
        """
        Whether a loss is more than `most` standard deviations above the mean of the previous losses; if not,
        it is added to them.
        """
        if (len(self.recent) >= self.ENOUGH
                and loss > statistics.fmean(self.recent) + self.most * statistics.stdev(self.recent)):
            return True
        self.recent = [*self.recent, loss][-self.SPAN:]
        return False


def notice_spike(run, s, loss, step, ranks):
    """Raise Spike if the loss of update number `step` is far above the previous losses."""
    if not run.losses.add(loss):
        return
    if s.async_save:
        from features.scale import background
        ranks.from_first(background.wait)
    spike = Spike(step)
    rows = s.rows_per_step
    newest = next(iter(checkpoint.checkpoints(s.out_dir)), 'step_0')
    first = max(spike.steps[0], int(newest.rpartition('_')[2]))  # what was before it stays
    ranks.say(f'step {step + 1}: loss {loss:.4f} is more than {s.rewind_spikes:g} standard deviations above '
              f'those before: back to the last checkpoint, and on without steps {first + 1} to {step + 1} '
              f'(samples {first * rows} to {(step + 1) * rows - 1})')
    raise spike


def rewinding(train, s, read_settings, device, ranks, stop):
    """
    Call train(s, device, ranks, stop, left_out), and call it again after every spike with the settings that
    read_settings() returns. Raises UserError after too many spikes within a short time.
    """
    left_out = set()
    count = 0
    while True:
        try:
            return train(s, device, ranks, stop, left_out)
        except Spike as spike:
            is_near = spike.steps[0] - max(left_out, default=0) < Losses.SPAN
            count = count + 1 if is_near else 1
            left_out.update(spike.steps)
        if count > REWINDS:
            raise UserError(f'rewind_spikes={s.rewind_spikes:g}: {REWINDS} rewinds did not help: '
                            'lower the learning rate')
        gc.collect()  # the network that was
        s = read_settings()
        if s.init_from == 'scratch' and ranks.from_first(lambda s=s: bool(checkpoint.checkpoints(s.out_dir))):
            s.init_from = 'auto'  # it has begun
