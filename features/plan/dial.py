"""
The dial: from a depth, a number of parameters, tokens or minutes, train.py derives the model size, batch
size, learning rates and steps, with the recipe of config/fast.py, and prints them. Settings that the user
sets are kept, except the number of steps from a config file if tokens or minutes are given.

    python train.py --minutes=5             # the best model that this machine can train in five minutes
    python train.py --depth=6               # 20 tokens per parameter
    python train.py --params=10e6 --tokens=50e6 --n_kv_head=2
    # print what published scaling laws choose (chinchilla.py), without training
    python train.py --plan --minutes=180
    python train.py config/gpt2.py --plan   # parameters, FLOPs and memory of a model; needs no data
"""
import math
import os

import torch

from batches import EVAL_ROWS, Mixture
from configurator import ROOT, UserError, check, peak_flops, read_config
from features import part_of
from features.plan.settings import DEEPEST
from model import ModelConfig, make_model

# Chinchilla (Hoffmann et al. 2022, arXiv 2203.15556); embeddings and head not counted, they are most of a
# small network
TOKENS_PER_PARAM = 20
# more are worth little (Muennighoff et al. 2023, arXiv 2305.16264): from there on a larger network is
EPOCHS = 4
# share of the ceiling of matmuls that training reaches, to choose a size by; the steps are timed
REACHED = 0.5


# -----------------------------------------------------------------------------
# What follows from what

def shape(depth, device):
    """
    The shape of a model with this depth: width 64 per layer, as in nanochat, and heads of width 64 if there
    are at least four.
    """
    width = max(128, 64 * depth)
    return {'n_layer': depth, 'n_embd': width, 'n_head': max(4, width // 64),
            'block_size': 1024 if device.type == 'cuda' else 256}


def batch_tokens(tokens):
    """
    Tokens per step for a run of this many tokens, a power of two. Short runs need small batches: 768 was best
    for 200 thousand tokens (docs/results), about 2^18 for 1.5 billion (modded-nanogpt, track 1). A power law
    connects these two.
    """
    return 2 ** round(math.log2(768 * (tokens / 2e5) ** 0.65))


def rates(width):
    """
    AdamW's learning rates for a width: the head's falls with its square root (nanochat). Muon's and the
    embedding's do not depend on it.
    """
    return {'head_lr': 0.004 * (768 / width) ** 0.5}


def size(s, vocab_size):
    """
    (parameters, parameters in the blocks, FLOPs per token) of the model that `s` describes, without making
    it.
    """
    cfg = part_of(s, ModelConfig)
    cfg.vocab_size = s.vocab_size or vocab_size
    with torch.device('meta'):
        model = make_model(cfg, init=False)
    return model.num_params(), sum(p.numel() for p in model.blocks.parameters()), model.flops_per_token()


# -----------------------------------------------------------------------------
# The plan

def plan(s, vocab_size, data_tokens, device, world):
    """
    Derive the settings that `s` (train.py's Settings) leaves open, in place, for a data set with this many
    tokens. Returns {setting: derived value}. With minutes, max_iters is a guess until fit_minutes() knows the
    time of a step.
    """
    if s.init_from not in ('auto', 'scratch', 'resume'):
        raise UserError(f'init_from={s.init_from}: has a network already: leave depth, params, '
                        'tokens and minutes out, and set max_iters')
    if s.arch == 'markov':
        raise UserError('arch=markov: has no depth to derive: leave depth, params, tokens and minutes out, '
                        'and set max_iters')
    if 'n_layer' in s.given and (s.depth or s.params):
        raise UserError(f'n_layer={s.n_layer}: depth and params choose it: leave one of them out')
    derived, kept = {}, s.given - ({'max_iters'} if s.tokens
                                   else {'max_iters', 'eval_interval'} if s.minutes else set())

    def derive(settings):
        for name, value in settings.items():
            if name not in kept:
                setattr(s, name, value)
                derived[name] = value

    derive(read_config(type(s), os.path.join(ROOT, 'config', 'fast.py')))
    budget = s.minutes * 60 * REACHED * world * (peak_flops(device, s.dtype) or 1e14)  # FLOPs
    sizes, problem = {}, None
    for depth in [s.depth] if s.depth else range(1, DEEPEST + 1):
        derive(shape(depth, device))
        try:
            check(s)
            sizes[depth] = size(s, vocab_size)
        except UserError as error:  # what is given does not go with this depth
            problem = error
    if not sizes:
        raise problem
    if s.params:
        depth = min(sizes, key=lambda d: abs(math.log(sizes[d][0] / s.params)))
    elif s.depth:
        depth = s.depth
    else:  # the deepest network that gets its tokens, or whose minutes bring it through the data often enough
        most = math.inf if s.tokens else EPOCHS * data_tokens
        depth = max([d for d, (_, blocks, flops) in sizes.items() if (s.tokens or budget / flops)
                     >= min(TOKENS_PER_PARAM * blocks, most)], default=min(sizes))
    derive(shape(depth, device))
    _, blocks, flops = sizes[depth]
    tokens = s.tokens or budget / flops or TOKENS_PER_PARAM * blocks
    rows = max(1, batch_tokens(tokens) // s.block_size // world)  # of each process
    # rows whose activations fit into memory
    limit = max(1, (2 ** 22 if device.type == 'cpu' else 2 ** 26) // (s.block_size * s.n_embd))
    micro = (s.batch_size if 'batch_size' in kept
             else max(n for n in range(1, min(rows, limit) + 1) if rows % n == 0))
    derive({'batch_size': micro, 'gradient_accumulation_steps': max(1, round(rows / micro)) * world})
    derive(rates(s.n_embd) | {
        'max_iters': max(1, round(tokens / (s.batch_size * s.gradient_accumulation_steps * s.block_size)))})
    derive(intervals(s.max_iters, s.batch_size))
    check(s)
    return derived


def intervals(count, batch_size):
    """How often a run of `count` steps evaluates, on about 20 micro-batches of rows, and reports."""
    return {'eval_interval': -(-count // 5), 'eval_iters': -(-20 * batch_size // EVAL_ROWS),
            'log_interval': max(1, count // 50)}


def most_steps(s):
    """
    The limit on max_iters beside minutes, before max_iters is derived: --max_iters of the command line; that
    of a config file is not a limit.
    """
    is_limit = 'max_iters' in s.given and 'max_iters' not in s.from_files
    return s.max_iters if is_limit else math.inf


def derive(s, state, device, ranks):
    """
    Set the derived settings, the same on all ranks; a resumed run keeps those from its start. Returns
    {setting: derived value}.
    """
    dial = {name: getattr(s, name) for name in ('depth', 'params', 'tokens', 'minutes')}
    if state and any(state['settings'].get(name, 0) != value for name, value in dial.items()):
        given = ', '.join(f'{name}={value:g}' for name, value in dial.items() if value)
        raise UserError(f'{given}: out_dir={s.out_dir} belongs to a run with another dial: give another '
                        '--out_dir, or --init_from=scratch to begin anew (the old run is moved aside)')
    data = Mixture(s.dataset, 'train', s.block_size, s.seed)
    tokens = sum(source.files.tokens for source in data.sources)
    planned = ranks.from_first(lambda: plan(s, data.vocab_size, tokens, device, ranks.world))
    for name in planned:
        setattr(s, name, state['settings'][name] if state else planned[name])
    return planned
