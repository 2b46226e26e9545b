"""
Checkpoints written by a thread while the run goes on (--async_save). What is written must be a copy:
snapshot().
"""
from concurrent.futures import ThreadPoolExecutor

import torch
from torch.utils._pytree import tree_map_only

THREAD = None  # of this process
PENDING = []  # futures of what is being written, in order


def submit(write, *args):
    """Call write(*args) in a thread, after what was submitted before."""
    global THREAD
    THREAD = THREAD or ThreadPoolExecutor(1)
    PENDING.append(THREAD.submit(write, *args))


def wait():
    """Return when everything is written. Raises the first error of the thread."""
    while PENDING:
        PENDING.pop(0).result()


def close():
    """End the thread once it has written everything; its errors are dropped."""
    global THREAD
    if THREAD:
        THREAD.shutdown()
    THREAD = None
    PENDING.clear()


def snapshot(tree):
    """
    A copy of a nest of dicts and lists, its tensors in the memory of the CPU: the next step does not change
    it.
    """
    return tree_map_only(torch.Tensor, lambda t: t.detach().to('cpu', copy=True), tree)
