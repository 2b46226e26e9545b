"""
The loss of a checkpoint on a whole validation split, with its standard error.

    python eval.py loss --out_dir=out/run

    for split in row_losses(folder, '', s):        # one per data set
        mean, error = loss_and_error(split.nats, split.targets)
"""
from dataclasses import dataclass

import numpy as np
import torch

import checkpoint
from batches import Source, batch_loss, losses, validation_batch
from configurator import UserError, pick_compile, pick_device, pick_exact_dtype
from features.networks import load_model
from features.study.stats import PARTS, loss_and_error, show_error
from features.study.validation import validation_sources
from model import compile_all
from sample import NOT_FINITE


@dataclass
class SplitLoss:
    """The losses of a model on every row of a validation split."""
    source: Source
    nats: np.ndarray  # (rows,) summed over the targets of a row
    targets: np.ndarray  # (rows,) number of targets


def row_losses(folder, dataset, s):
    """
    [SplitLoss] of the checkpoint in `folder`, for each data set that it was trained on, or for `dataset`. s:
    a DeviceConfig. Raises UserError for a data set of another tokenizer, and for a loss that is not finite.
    """
    device = pick_device(s.device)
    model, _ = load_model(folder, encoder=True)
    dtype = pick_exact_dtype(s.dtype, device)
    model.to(device)
    if pick_compile(s.compile, device):
        compile_all(model)
    return [losses_on(model, source, folder, device, dtype)
            for source in validation_sources(folder, model.cfg, dataset)]


@torch.no_grad()
def losses_on(model, source, folder, device, dtype):
    """The SplitLoss of a model on all rows of a Source. Raises UserError for a loss that is not finite."""
    nats = []
    targets = []
    for row in range(source.rows):
        loss, count = batch_loss(model, validation_batch(source, [row], 1), device, dtype)
        nats.append(loss.item())
        targets.append(count)
    nats = np.array(nats)
    if not np.isfinite(nats).all():
        row = int(np.isfinite(nats).argmin())
        raise UserError(f'{folder}: its loss on row {row} of {source.name} is {nats[row]}: {NOT_FINITE}')
    return SplitLoss(source, nats, np.array(targets))


def run(s):
    """python eval.py loss"""
    folder = checkpoint.find(s.out_dir, s.which)
    for split in row_losses(folder, s.dataset, s):
        source = split.source
        mean, error = loss_and_error(split.nats, split.targets)
        bits = losses(mean, 1, source.bytes_per_token()).get('val_bpb')
        dtype = pick_exact_dtype(s.dtype, pick_device(s.device))
        parts = min(PARTS, len(split.nats))
        line = f'    {mean:.4f} nats a token ± {show_error(error)} (standard error: {parts} parts)'
        if bits:
            line += f', {bits:.4f} bits per byte'
        print(f'{folder}: {source.name}, '
              f'all {int(split.targets.sum()):,} targets of its validation split, in {dtype}')
        print(line)
        if source.too_long():
            print(f'    {source.too_long()}')
