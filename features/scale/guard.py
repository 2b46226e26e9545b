"""
Guards of a run with several ranks: detect ranks whose weights differ or that were started differently.
"""
import torch

from configurator import UserError
from features.scale.shard import is_divided

# -----------------------------------------------------------------------------
# Ranks that drift apart

INTERVAL = 100  # steps between comparisons of all ranks' weights: 0.01% of a run


def check_alike(model, ranks, step):
    """
    Raise UserError if the weights of a rank differ from those of rank 0, bit for bit; names the rank and the
    first such tensor.
    """
    if step % INTERVAL:
        return
    sums = ranks.gather(checksums(model))
    for rank, theirs in enumerate(sums):
        for name, one in sums[0].items():
            if theirs[name] != one:
                raise UserError(f'the weights of rank {rank} are not those of rank 0 after step {step} '
                                f'({name}): the ranks have drifted apart (a faulty device, or other code or '
                                'data there?); run the same command to resume from the newest checkpoint')


def checksums(model):
    """{name: checksum} of every parameter that all ranks hold completely."""
    sums = {name: bits(p.detach()).sum() for name, p in model.named_parameters() if not is_divided(p)}
    return dict(zip(sums, torch.stack([*sums.values()]).tolist())) if sums else {}


def bits(t):
    """
    A tensor's bits as int64, eight bytes at a time, for a checksum; summing with overflow is as fast as
    reading.
    """
    flat = t.contiguous().view(-1).view(torch.uint8)
    whole = len(flat) // 8 * 8
    return (torch.cat([flat[:whole].view(torch.int64), flat[whole:].long()]) if whole < len(flat)
            else flat.view(torch.int64))


def check_same_start(ranks, settings, fingerprint):
    """Raise UserError if a rank has other settings or other data than rank 0."""
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
