"""
Sizes of networks, before anything of that size is made: a file may claim any.
"""
import os
import re
from contextlib import contextmanager

import torch

from configurator import UserError

MOST_LAYERS = 10_000
ROTARY = 2 ** 28  # bytes of a table of angles that any file may ask for: a million tokens with heads of 64


def check_sizes(cfg, weights, where):
    """
    Return the weights {name: tensor}, which are from `where`. Raises UserError unless a network with this
    ModelConfig has their shapes. It is described on the meta device, where sizes take no memory.
    """
    layers = cfg.n_layer + cfg.n_encoder_layer
    if cfg.arch == 'decoder' and layers > min(MOST_LAYERS, len(weights)):
        raise UserError(f'{where}: n_layer={cfg.n_layer}: its weights have {len(weights)} tensors: '
                        'restore its state.json')
    for name in ('no_rope', 'full_layers', 'dense_layers'):
        if len(getattr(cfg, name, ())) > layers:
            raise UserError(f'{where}: {name}: has more entries than there are layers: '
                            'restore its state.json')
    held = sum(t.nbytes for t in weights.values())
    for name in ('block_size', 'source_size'):  # no tensor of the file vouches for a table of angles
        if cfg.position == 'rope' and 4 * getattr(cfg, name, 0) * cfg.d_head > max(ROTARY, held):
            raise UserError(f'{where}: {name}={getattr(cfg, name)}: its rotary table would be larger than '
                            'its weights: lower it to the context that you use')
    own = described(cfg, where)
    for name in sorted(weights.keys() & own.keys()):
        found, wanted = list(weights[name].shape), own[name]
        is_longer = name == 'wpe.weight' and found[1:] == wanted[1:] and found[0] >= wanted[0]
        if found != wanted and not is_longer:
            raise UserError(f'{where}: {name}: found {found}, the network has {wanted}: '
                            'these are the weights of another network')
    if len(own) > len(weights):
        missing = min(own.keys() - weights.keys())
        raise UserError(f'{where}: {missing}: found no such tensor, the network has {own[missing]}: '
                        'these are the weights of another network')
    return weights


def described(cfg, where):
    """{name: shape} of the tensors of a network, of which none is made. Raises UserError beyond 2**63."""
    from model import Unfilled, make_model
    with within_limits(cfg, where), torch.device('meta'), Unfilled():
        return {name: list(t.shape) for name, t in make_model(cfg, init=False).state_dict().items()}


@contextmanager
def within_limits(cfg, where):
    """Raise UserError if a network with this ModelConfig, which is described inside, would be too large."""
    layers = cfg.n_layer + cfg.n_encoder_layer
    if layers > MOST_LAYERS:
        raise UserError(f'{where}: n_layer={layers}: takes at most {MOST_LAYERS:,} layers')
    try:
        yield
    except (RuntimeError, OverflowError, TypeError) as error:
        if not re.search('overflow|too large|storage size|must be tuple of ints', str(error), re.IGNORECASE):
            raise
        raise UserError(f'{where}: a tensor of this network would be too large') from None


def check_memory(cfg):
    """Raise UserError for a new network whose weights do not fit into the memory that is free."""
    matrices = 0  # numbers of a block
    for name, (n_in, n_out) in cfg.sizes().items():
        rank = cfg.rank(0, name)
        count = rank * (n_in + n_out) if rank else n_in * n_out
        matrices += count * (max(1, cfg.n_expert) if name.startswith('mlp.') else 1)
    tables = cfg.vocab_size * (cfg.rank_embed or cfg.n_embd) * (1 if cfg.tie else 2)
    layers = cfg.n_layer + cfg.n_encoder_layer
    needed = 4 * (layers * matrices + tables) + 30_000 * layers  # bytes: the weights, and Python's objects
    needed += 4 * cfg.block_size * (cfg.d_head if cfg.position == 'rope' else cfg.n_embd)
    free = free_memory()
    if free is not None and needed > free:
        raise UserError(f'out of memory: n_layer={cfg.n_layer}, n_embd={cfg.n_embd}, '
                        f'vocab_size={cfg.vocab_size}, block_size={cfg.block_size}, '
                        f'n_expert={cfg.n_expert}: this network takes '
                        f'{needed / 1e9:,.1f} GB, and {free / 1e9:,.1f} are free: make it smaller')


def free_memory():
    """Bytes of RAM that this machine can still give; None = not known."""
    try:
        with open('/proc/meminfo', encoding='utf-8') as f:
            return 1024 * int(re.search(r'MemAvailable:\s*(\d+)', f.read())[1])
    except (OSError, TypeError):
        with_pages = 'SC_PHYS_PAGES' in os.sysconf_names
        return os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') if with_pages else None


def is_out_of_memory(error):
    """Whether an error of torch or Python means that memory is used up."""
    text = str(error)
    return isinstance(error, MemoryError) or 'out of memory' in text or "can't allocate memory" in text
