"""
bench.py scale: how cost grows with the size of the data set, the context, the width, the vocabulary and the
ranks.
"""
import itertools
import json
import math
import os
import statistics
import tempfile
from functools import partial

import torch

from batches import Mixture
from configurator import pick_dtype
from features import part_of
from features.study.bench_train import NETWORKS, WARM_UP, train_options, train_ours
from features.study.measure import alternate, seconds, section
from model import ModelConfig, autocast, make_model
from optim import make_optimizer
from train import Settings


def bench_scale(s, device, machine):
    """
    Yield the sections of bench.py scale: data sets of 1 MB to 100 GB, then models that grow in one dimension.
    """
    yield scale_data(s, device)
    tokens = 2048 if device.type == 'cpu' else 32768  # per step
    most = 512 if device.type == 'cpu' else 2048
    if s.quick:
        tokens = 128
        most = 64
    yield scale_network(s, device, tokens, most, ('block_size',),
                        [most // 8, most // 4, most // 2, most, 2 * most])
    yield scale_network(s, device, tokens, most, ('n_embd',), [most // 4, most // 2, most])
    yield scale_network(s, device, tokens, most, ('vocab_size',), [most, 8 * most, 64 * most, 128 * most])
    yield scale_network(s, device, tokens, most, ('rank_qk', 'rank_vo', 'rank_mlp'),
                        [most // 32, most // 16, most // 8, most // 4, 0])


# -----------------------------------------------------------------------------
# Data

def scale_data(s, device):
    """The section on the size of the data. The files are sparse and need no disk space."""
    sizes = {'1 MB': 10 ** 6, '100 MB': 10 ** 8, '10 GB': 10 ** 10, '100 GB': 10 ** 11}
    with tempfile.TemporaryDirectory() as folder:
        arms = {}
        for name, size in sizes.items():
            path = os.path.join(folder, name)
            sparse_dataset(path, size)
            arms[name] = partial(data_figures, path, device, s.quick)
        samples = alternate(arms, s.rounds)
    return section('scale: size of the data (sparse files: nothing is read from a disk)', samples)


def sparse_dataset(folder, size):
    """Write a prepared data set of `size` bytes of token 0 as sparse files, which need no disk space."""
    os.makedirs(folder)
    splits = {}
    for split, count in (('train', size // 2), ('val', 10 ** 5)):
        name = f'{split}_00000.bin'
        with open(os.path.join(folder, name), 'wb') as f:
            f.truncate(2 * count)
        shard = {'file': name, 'tokens': count, 'bytes_on_disk': 2 * count}
        splits[split] = {'tokens': count, 'documents': 0, 'bytes': count, 'shards': [shard]}
    meta = {
        'format': 1,
        'tokenizer': {'kind': 'byte', 'vocab_size': 257, 'eot': 256},
        'vocab_size': 257,
        'eot': 256,
        'dtype': 'uint16',
        'splits': splits,
    }
    with open(os.path.join(folder, 'meta.json'), 'w') as f:
        json.dump(meta, f)


def data_figures(folder, device, quick):
    """{metric: value} of reading rows of a data set, and of a short training run on it."""
    data = Mixture(folder, 'train', 256, seed=1)
    starts = itertools.count(step=32 * 20)  # every call reads other rows

    def read():
        first = next(starts)
        for n in range(first, first + 32 * 20, 32):
            data.rows(range(n, n + 32))

    took = seconds(read, torch.device('cpu'), budget=0.1 if quick else 1)
    sizes = NETWORKS['tiny'] | {'block_size': 256}
    trained = train_ours(train_options(sizes, 20 if quick else 300, folder, device), folder, device)
    first_step = next(at for at, line in trained.lines if line.startswith('step 1/'))
    return {
        'rows/s of the data': 32 * 20 / took,
        'tokens/s of training': statistics.median(trained.rates[WARM_UP:]),
        'peak memory, MiB': trained.peak,
        'seconds to the first step': first_step,
    }


# -----------------------------------------------------------------------------
# Networks

def scale_network(s, device, tokens, most, names, values):
    """
    The section on a model in which the settings `names` take each of `values`, with `tokens` tokens per step.
    """
    base = {'n_layer': 2, 'n_head': 4, 'n_embd': most // 2, 'block_size': most // 2, 'vocab_size': 4 * most}
    arms = {}
    for value in values:
        step, count = training_step(base | dict.fromkeys(names, value), tokens, device)
        arms[str(value or 'dense')] = partial(step_time, step, count, device, s.quick)
    part = section(f'scale: {" = ".join(names)}, {tokens:,} tokens a step', alternate(arms, s.rounds))
    medians = [metrics['µs a token'] for metrics in part['medians'].values()]
    exponents = []
    for (x, a), (y, b) in itertools.pairwise(zip(values, medians)):
        if y:  # 0 is dense, and no rank
            exponents.append(math.log(b / a) / math.log(y / x))
    shown = ', '.join(f'{exponent:.2f}' for exponent in exponents)
    part['notes'] = [f'exponent from each to the next: {shown}']
    return part


def step_time(step, count, device, quick):
    """{'µs a token'} of a training step of `count` tokens."""
    took = seconds(step, device, budget=0.1 if quick else 1)
    return {'µs a token': 1e6 * took / count}


def training_step(sizes, tokens, device, compile=False):
    """
    (a function that does one training step of a model of these sizes, its tokens: at most `tokens`, at least
    one row).
    """
    s = Settings(**sizes)
    model = make_model(part_of(s, ModelConfig)).to(device)
    if compile:
        model.compile(dynamic=False)
    dtype = pick_dtype('auto', device)
    optimizer = make_optimizer(model, s)
    rows = max(1, tokens // s.block_size)
    idx = torch.randint(s.vocab_size, (rows, s.block_size), device=device)  # (B, T)

    def step():
        with autocast(device, dtype):
            loss = model(idx, idx)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return step, rows * s.block_size
