"""
The loss on the validation rows: the same rows in the same order whatever the training does, every token weighing the same.
"""
import math

import torch

from batches import validation_batch, validation_rows
from device import autocast, zero

EVAL_ROWS = 12  # rows of each of eval_iters, nanoGPT's default batch: the loss does not depend on batch_size


@torch.no_grad()
def evaluate(model, sources, s, ranks, stop=False):
    """
    {'val_loss', 'val_bpb' and the same per source as 'val_loss/NAME', …}: nats per token and bits per byte of text over the
    same rows every time, each token weighing the same, computed by all ranks together. A source that does not know its bytes has no
    val_bpb, and a mixture with such a source has no total. stop: true as soon as it is to be left; None then, on all ranks.
    """
    model.eval()
    out, all_nats, all_targets, all_bytes = {}, 0.0, 0.0, 0.0
    all_known = all(source.bytes_per_token() for source in sources)
    for source in sources:
        numbers, nats, targets = validation_rows(source, EVAL_ROWS * s.eval_iters), zero(ranks.device), 0
        mine, most = numbers[ranks.rank::ranks.world], -(-len(numbers) // ranks.world)  # all ranks make as many passes, some perhaps an empty one
        height = min(4 * s.batch_size, most)  # without gradients, four times the rows fit
        for loss, count in batch_losses(model, source, mine, height, ranks.device, s.dtype, -(-most // height)):
            nats, targets = nats + loss, targets + count
            ranks.alive()
            if ranks.any(stop):
                break
        nats, targets, stopped = ranks.sum(nats.item(), targets, bool(stop))
        if stopped:
            model.train()
            return None
        text_bytes = targets * source.bytes_per_token()
        all_nats, all_targets, all_bytes = all_nats + nats, all_targets + targets, all_bytes + text_bytes
        if len(sources) > 1:
            out |= losses(nats, targets, text_bytes, '/' + source.name)
    model.train()
    return losses(all_nats, all_targets, all_bytes if all_known else 0) | out


def batch_losses(model, source, numbers, height, device, dtype, passes=None):
    """Yield (summed loss in nats, which stays on the device; how many targets) of `height` rows of a data.Source at a time, so many times if asked."""
    for i in range(0, len(numbers) if passes is None else passes * height, height):
        x, y, *read = (torch.from_numpy(a).to(device) for a in validation_batch(source, numbers[i:i + height], height))
        with autocast(device, dtype):
            loss = model(x, y, reduction='sum', **reading(model, read))
        yield loss, int((y >= 0).sum())


def reading(model, more):
    """What else a model's forward pass is to be told of rows: what its encoder reads, or which of several pairs a token is of; {} where `more` is empty."""
    return dict(zip(('pieces' if getattr(model, 'encoder', None) is None else 'source',), more))


def losses(nats, targets, text_bytes, suffix=''):
    """{'val_loss', 'val_bpb'} with a suffix: summed nats over targets, and in bits over bytes of text; 0 bytes: they are not known."""
    out = {'val_loss' + suffix: nats / max(targets, 1)}
    if text_bytes:
        out['val_bpb' + suffix] = nats / math.log(2) / text_bytes
    return out
