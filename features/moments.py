"""
The moments of an optimizer: out of a checkpoint, and into the optimizer of a run that goes on, grows or is
sharded.
"""
import os

import torch

from configurator import UserError


def read_moments(folder):
    """{name: {what: tensor}} of a checkpoint's optimizer; {} for a tensor that it has not moved yet."""
    stored = torch.load(os.path.join(folder, 'optimizer.pt'), map_location='cpu', weights_only=True)
    names = [name for group in stored.get('param_groups', ()) for name in group.get('param_names', ())]
    return {name: stored['state'].get(n, {}) for n, name in enumerate(names)}


def moments_of(optimizer):
    """{name of a tensor: {what: tensor}} of an optimizer."""
    return {name: dict(optimizer.state.get(p, {})) for group in optimizer.param_groups
            for name, p in zip(group['param_names'], group['params'])}


def give_moments(optimizer, moments, place=lambda t, p: t.clone()):  # copied blocks move apart
    """
    Load the moments of those tensors that the optimizer has; learning rates, betas and weight decay do not
    change. Returns the number of tensors. place(tensor, parameter): the part of a moment to keep.
    """
    params = [p for group in optimizer.param_groups for p in group['params']]
    names = [name for group in optimizer.param_groups for name in group['param_names']]
    fit = {}
    for n, (name, p) in enumerate(zip(names, params)):
        own, shapes = moments.get(name, {}), (p.shape, (), p.shape[:1])  # [:1]: a number a row, of Counts
        if own and all(t.shape in shapes for t in own.values()):
            fit[n] = {what: place(t, p) for what, t in own.items()}
    optimizer.load_state_dict(optimizer.state_dict() | {'state': fit})
    return len(fit)


def load_optimizer(folder, optimizer):
    """Load the moments of a checkpoint of the same model. Raises UserError for moments of other tensors."""
    moments = read_moments(folder)
    if (moments.keys() != moments_of(optimizer).keys()
            or give_moments(optimizer, moments) < sum(map(bool, moments.values()))):
        raise UserError(f'{folder}: its optimizer has the moments of other tensors: '
                        f'give another --out_dir with --init_from={folder}')
