"""
Write checkpoints in a background thread (--async_save). Everything written must be a copy: snapshot().
"""
from concurrent.futures import ThreadPoolExecutor

import torch
from torch.utils._pytree import tree_map_only

THREAD = None  # of this process
PENDING = []  # futures of what is being written, in order


def submit(write, *tensors):
    """
    Call write(*tensors) in a thread, after earlier calls, on a copy of the tensors. There is one copy at a
    time: with tensors, it waits for the thread, and raises the first error of it.
    """
    global THREAD
    if tensors:
        wait()
        tensors = snapshot(tensors)
    THREAD = THREAD or ThreadPoolExecutor(1)
    PENDING.append(THREAD.submit(write, *tensors))


def wait():
    """Wait until everything is written. Raises the first error of the thread."""
    while PENDING:
        PENDING.pop(0).result()


def close():
    """End the thread after it has written everything; ignores its errors."""
    global THREAD
    if THREAD:
        THREAD.shutdown()
    THREAD = None
    PENDING.clear()


def snapshot(tree):
    """
    A copy of nested dicts and lists with the tensors in CPU memory, which the next step does not change.
    """
    return tree_map_only(torch.Tensor, lambda t: t.detach().to('cpu', copy=True), tree)
