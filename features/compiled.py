"""
Compiled decoding: one token is one graph.
"""
import functools
import weakref

import torch

LAST = []  # a weak reference to the cache of the step before


@functools.cache
def graph_of(step, device_type):
    """`step` of one token as one graph. CUDA replays it: launching kernels takes longer than running them."""
    if device_type == 'cuda':
        return torch.compile(step, dynamic=False, mode='reduce-overhead')
    # or a norm would be computed again for each row of the matrix after it: int8 14.5 -> 10.7 ms a token.
    # Below 6, the matrices would be converted to float32 before they are multiplied
    return torch.compile(step, dynamic=False, options={'realize_opcount_threshold': 8})


def compiled_step(step, model, idx, cache):
    """
    step(model, idx, cache) for the next token of every row, idx (B, 1), as a compiled graph.
    The guards of the graph check every layer of the model: 23 µs a layer and token on a CPU. They are skipped
    if the step before was one of the same cache, because its model and its shapes are the same then. Do not
    change the model while a text is written.
    """
    is_next = bool(LAST) and LAST[0]() is cache
    idx = idx.clone(memory_format=torch.contiguous_format)  # with other strides it would be compiled again
    with torch.compiler.set_stance(skip_guard_eval_unsafe=is_next):
        logits = graph_of(step, idx.device.type)(model, idx, cache)
    LAST[:] = [weakref.ref(cache)]
    return logits
