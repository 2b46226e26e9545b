"""
A low-rank layer as the one matrix that it is, unless there is an activation between its factors.
"""
import torch


def is_linear(layer):
    """Whether a LowRank layer is one matrix; with an activation between its factors it is two."""
    probe = torch.tensor([-1.0, 2.0])
    return torch.equal(layer.act(probe), probe)


def matrix(layer):
    """The matrix (n_out, n_in) of a linear one."""
    weight = layer.up.weight @ layer.down.weight
    if layer.identity is not None:
        weight = weight + layer.identity * torch.eye(len(weight))
    if layer.blocks is not None:
        weight = weight + torch.block_diag(*layer.blocks)
    return weight if layer.guide is None else torch.lerp(weight, layer.guide.weight, layer.share)
