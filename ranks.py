"""
The processes of a run: torchrun starts several, which share its batches; python one.
"""
import os

import torch
import torch.distributed as dist

from configurator import UserError


class Ranks:
    """This process among those that torchrun started, or alone."""

    def __init__(self, backend, device):
        self.rank, self.world = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
        self.device = device
        if self.world > 1:  # gloo beside nccl: counts and flags are exchanged without waiting for the GPU
            dist.init_process_group({'auto': 'cpu:gloo,cuda:nccl' if device.type == 'cuda' else 'gloo', 'nccl': 'cpu:gloo,cuda:nccl'}.get(backend, backend))

    @property
    def first(self):
        return self.rank == 0

    def sum(self, *values):
        """The sums over all ranks of some numbers, as a list of floats."""
        total = torch.tensor(values, dtype=torch.float64)
        if self.world > 1:
            dist.all_reduce(total)
        return total.tolist()

    def add_up(self, tensor):
        """The same of a tensor on the device, without waiting for it."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def from_first(self, compute):
        """What compute() returns on rank 0, on all ranks; its UserError too."""
        box = [None]
        if self.first:
            try:
                box = [compute()]
            except UserError as error:
                box = [error]
        if self.world > 1:
            dist.broadcast_object_list(box)
        if isinstance(box[0], UserError):
            raise box[0]
        return box[0]

    def say(self, text):
        if self.first:
            print(text, flush=True)
