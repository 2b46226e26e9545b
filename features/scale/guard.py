"""
What watches over a run: gradients that are zero everywhere, ranks that drift apart or were started
differently.
"""
import torch

from configurator import UserError
from features.scale.shard import is_divided

# -----------------------------------------------------------------------------
# A run that learns nothing

class FirstSteps:
    """
    The first COUNT steps of a process, judged once when all are made: a gradient of exactly zero in every
    tensor, or a loss that does not change at all, means that something is broken. Steps without targets, as
    those that were skipped, do not count. The numbers stay on the device until then, so that no step waits
    for them.
    """
    COUNT = 10
    SMALLEST_LOSS = 1e-4  # below it the network knows its data, and float32 rounds what is left to zero
    LEAST_RATE = 1e-5  # a sum of rates below it need not show in a loss in float32, as in a very long warm-up

    def __init__(self):
        self.steps, self.nats, self.targets, self.norms, self.rates = [], [], [], [], []

    def add(self, step, nats, targets, norm, rate, s, ranks):
        """
        Take in update number `step`: the summed loss of this rank (a tensor), the targets of all ranks, the
        norm of the gradient (a tensor) and the highest rate of any tensor. All ranks decide alike. Raises
        UserError.
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
        # learned already, or asked to stay as it is
        if min(losses) < self.SMALLEST_LOSS or not any(self.rates):
            return
        where = f'in steps {self.steps[0]} to {self.steps[-1]}: nothing is learned'
        if not any(norms):
            cure = 'set compile=False' if s.compile else 'check your changes to the network or its loss'
            raise UserError(f'the gradient of every tensor was exactly zero {where}: {cure}, '
                            f'or try another version of torch than {torch.__version__}')
        if len(set(losses)) == 1 and sum(self.rates) > self.LEAST_RATE:
            rates = f'learning_rate={s.learning_rate:g}, lr_scale={s.lr_scale}, compile={s.compile}'
            raise UserError(f'the loss was exactly {losses[0]:.4f} {where}: check the data set, {rates}')


def watch_first_steps(run, s, step, done, ranks):
    """
    Count update number `step`, the Step `done`, among the first ones of this process. Raises UserError as
    judge() does.
    """
    if run.first_steps is None:
        run.first_steps = FirstSteps()
    highest = max(group['lr'] for group in run.optimizer.param_groups)
    run.first_steps.add(step, done.nats, done.targets, done.norm, highest, s, ranks)


# -----------------------------------------------------------------------------
# Ranks that drift apart

def check_alike(model, ranks, step):
    """
    Raise UserError if the weights of some rank are not those of rank 0, bit for bit: names both, the rank and
    the first such tensor.
    """
    sums = ranks.gather(checksums(model))
    for rank, theirs in enumerate(sums):
        for name, one in sums[0].items():
            if theirs[name] != one:
                raise UserError(f'the weights of rank {rank} are not those of rank 0 after step {step} '
                                f'({name}): the ranks have drifted apart (a faulty device, or other code or '
                                'data there?); run the same command to go on from the newest checkpoint')


def checksums(model):
    """{name: a number for its bits} of every parameter that all ranks hold whole."""
    sums = {name: bits(p.detach()).sum() for name, p in model.named_parameters() if not is_divided(p)}
    return dict(zip(sums, torch.stack([*sums.values()]).tolist())) if sums else {}


def bits(t):
    """
    A tensor's bits as int64, eight bytes at a time, for a checksum: sums that wrap around cost no more than
    reading.
    """
    flat = t.contiguous().view(-1).view(torch.uint8)
    whole = len(flat) // 8 * 8
    return (torch.cat([flat[:whole].view(torch.int64), flat[whole:].long()]) if whole < len(flat)
            else flat.view(torch.int64))


def check_same_start(ranks, settings, fingerprint):
    """Raise UserError if some rank was given other settings than rank 0, or other data."""
    starts = ranks.gather((settings, fingerprint))
    for rank, (theirs, data) in enumerate(starts):
        # nanoGPT's has the time in it
        other = [name for name, value in starts[0][0].items()
                 if theirs.get(name) != value and not name.startswith('wandb_')]
        if other:
            raise UserError(f'{other[0]}={theirs.get(other[0])} on rank {rank}, '
                            f'{starts[0][0][other[0]]} on rank 0: start all with the same settings')
        if data != starts[0][1]:
            raise UserError(f'dataset: the files of rank {rank} are not those of rank 0: '
                            'give all machines the same data set')
