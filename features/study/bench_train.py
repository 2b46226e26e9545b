"""
bench.py train and loss: speed and memory of training, of the whole train.py and of the head and the loss
alone.
"""
import json
import os
import pickle
import shutil
import statistics
import sys
import tempfile
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

from configurator import ROOT, pick_compile, pick_device, pick_dtype
from features import part_of
from features.study import bench_peers
from features.study.bench_peers import Trained
from features.study.measure import alternate, run, seconds, section
from model import ModelConfig, Transformer, autocast, make_model
from optim import make_optimizer
from run import peak_memory
from train import Settings

NETWORKS = {
    '10.6M': {'n_layer': 6, 'n_head': 6, 'n_embd': 384, 'block_size': 256, 'batch_size': 64,
              'vocab_size': 65},
    'GPT-2 124M': {'n_layer': 12, 'n_head': 12, 'n_embd': 768, 'block_size': 1024, 'batch_size': 12,
                   'vocab_size': 50257},
    'GPT-2 350M': {'n_layer': 24, 'n_head': 16, 'n_embd': 1024, 'block_size': 1024, 'batch_size': 12,
                   'vocab_size': 50257},
    'tiny': {'n_layer': 2, 'n_head': 2, 'n_embd': 64, 'block_size': 64, 'batch_size': 4, 'vocab_size': 65},
}
WARM_UP = 5  # steps that are not counted: they compile and allocate


def network(sizes):
    """The ModelConfig of a model of these sizes ({setting: value}), with train.py's other defaults."""
    return part_of(Settings(**sizes), ModelConfig)


# -----------------------------------------------------------------------------
# train

def bench_train(s, device, machine):
    """
    Yield the sections of bench.py train: train.py, and nanoGPT's, on the same random tokens, which have no
    effect on speed.
    """
    names = ['10.6M']
    if device.type == 'cuda':
        names = ['10.6M', 'GPT-2 124M']
    if s.quick:
        names = ['tiny']
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            title, arms = train_arms(name, s, device, machine, folder)
            samples = alternate(arms, s.rounds)
        yield section(title, samples,
                      ['MFU: share of the measured matmul ceiling of the dtype that the side runs in'])


def train_arms(name, s, device, machine, folder):
    """(title, {side: a function that trains one of NETWORKS in `folder` and returns {metric: value}})."""
    sizes = dict(NETWORKS[name])
    flops = flops_per_token(sizes)
    if device.type != 'cuda':
        shrink_batch(sizes, flops, machine)
    random_tokens(folder, sizes['vocab_size'], 2 ** 20)
    options = train_options(sizes, WARM_UP + timed_steps(s, device), folder, device)
    sides = {'ours': partial(train_ours, options, folder, device)}
    if s.peer:
        config = 'train_gpt2' if name.startswith('GPT-2') else 'train_shakespeare_char'
        tokens = sizes['batch_size'] * sizes['block_size']
        sides['nanoGPT'] = partial(bench_peers.train, s.peer, config, tokens, options, folder, device)
    title = (f'train: {name} network, {sizes["batch_size"]} x {sizes["block_size"]} tokens a step, '
             'each with its own defaults')
    return title, {side: partial(train_figures, call, flops, machine) for side, call in sides.items()}


def flops_per_token(sizes):
    """Training FLOPs per token, forward and backward, of a model of these sizes."""
    with torch.device('meta'):
        return make_model(network(sizes)).flops_per_token()


def shrink_batch(sizes, flops, machine):
    """Halve the batch until a step takes at most 3 s at half of the peak matmul speed."""
    while sizes['batch_size'] * sizes['block_size'] * flops > 1.5 * machine['flops']['float32']:
        sizes['batch_size'] //= 2


def timed_steps(s, device):
    """Number of steps that are timed."""
    if s.quick:
        return 3
    return 50 if device.type == 'cuda' else 8


def train_figures(side, flops, machine):
    """{metric: value} of a training run: side() returns its Trained; flops per token."""
    trained = side()
    rate = statistics.median(trained.rates[WARM_UP:])
    return {
        'tokens/s': rate,
        'MFU': rate * flops / machine['flops'][trained.dtype],
        'peak memory, MiB': trained.peak,
    }


def random_tokens(folder, vocab_size, count):
    """Write a data set of `count` random tokens per split in nanoGPT's format, which both can read."""
    rng = np.random.default_rng(0)
    for split in ('train', 'val'):
        rng.integers(vocab_size, size=count, dtype=np.uint16).tofile(os.path.join(folder, f'{split}.bin'))
    if vocab_size < 50257:
        with open(os.path.join(folder, 'meta.pkl'), 'wb') as f:
            pickle.dump({'vocab_size': vocab_size}, f)


def train_options(sizes, steps, folder, device):
    """The command line that train.py and nanoGPT's train.py share."""
    settings = {key: value for key, value in sizes.items() if key != 'vocab_size'}
    settings |= {
        'dropout': 0.0,
        'dataset': folder,
        'max_iters': steps,
        'eval_interval': 10 ** 6,
        'eval_iters': 1,
        'log_interval': 1,
        'gradient_accumulation_steps': 1,
        'device': device,
    }
    return [f'--{key}={value}' for key, value in settings.items()]


def train_ours(options, folder, device):
    """The Trained of train.py with these options."""
    out = os.path.join(folder, 'ours')
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, os.path.join(ROOT, 'train.py'), f'--out_dir={out}', '--sample_tokens=0',
               '--compile=True']
    lines, _, peak = run(command + options, device)
    rates = []
    with open(os.path.join(out, 'log.jsonl')) as log:
        for line in log:
            record = json.loads(line)
            if 'train_loss' in record:
                rates.append(record['tokens_per_second'])
    with open(os.path.join(out, 'settings.json')) as settings:
        dtype = json.load(settings)['dtype']
    return Trained(rates, peak, dtype, lines)


# -----------------------------------------------------------------------------
# loss

class HeadAlone(Transformer):
    """A model without the cost of blocks, to time only the head and the loss."""

    def hidden(self, idx, *_):
        return self.h


def bench_loss(s, device, machine):
    """
    Yield the sections of bench.py loss: head and cross-entropy, forward and backward, by vocabulary; then a
    whole step's memory.
    """
    dtype = pick_dtype('auto', device)
    rows = 8
    width = 768
    length = 256 if device.type == 'cpu' else 2048
    vocab_sizes = (4096, 50304, 131072)
    sizes = {'n_layer': 4, 'n_head': 12, 'n_embd': 768, 'block_size': 1024, 'batch_size': 8,
             'vocab_size': 50304}
    if s.quick:
        width = 64
        length = 32
        vocab_sizes = (64, 1024)
        sizes = NETWORKS['tiny'] | {'vocab_size': 8192}
    for vocab_size in vocab_sizes:
        cfg = network({'n_layer': 1, 'n_head': 2, 'n_embd': width, 'vocab_size': vocab_size})
        model = HeadAlone(cfg).to(device)
        model.h = torch.randn(rows, length, width, device=device, requires_grad=True)  # (B, T, C)
        y = torch.randint(vocab_size, (rows, length), device=device)
        arms = {
            'chunked': partial(loss_time, model, model, y, device, dtype),
            'F.cross_entropy': partial(loss_time, model, partial(plain_loss, model), y, device, dtype),
        }
        yield section(f'loss: head and cross-entropy, forward and backward, {rows * length:,} tokens, '
                      f'{width} wide, V = {vocab_size:,}, {dtype}', alternate(arms, s.rounds))
    kinds = ['ours', 'ours with F.cross_entropy']
    if s.peer:
        kinds.append('nanoGPT')
    samples = alternate({kind: partial(step_memory, kind, sizes, device, s.peer) for kind in kinds}, 1)
    yield section(f'loss: memory of a training step, {sizes["n_layer"]} layers, {sizes["n_embd"]} wide, '
                  f'{sizes["batch_size"]} x {sizes["block_size"]} tokens, V = {sizes["vocab_size"]:,}, '
                  'each with its own defaults', samples)


def loss_time(model, loss, y, device, dtype):
    """{'ms'} of a forward and a backward pass of loss(y, y)."""
    def step():
        with autocast(device, dtype):
            value = loss(y, y)
        value.backward()
        model.zero_grad(set_to_none=True)
        model.h.grad = None
    return {'ms': 1000 * seconds(step, device)}


def plain_loss(model, x, y):
    """Cross-entropy on the logits of the whole batch, (B·T, V)."""
    return F.cross_entropy(model(x).flatten(0, 1), y.flatten())


def step_memory(kind, sizes, device, peer='', **more):
    """
    {'peak memory, MiB', 'loss'} of two training steps in their own process; arguments as in two_steps().
    """
    peer = os.path.abspath(peer) if peer else ''
    call = (f'import sys; sys.path.insert(0, {ROOT!r}); from features.study import bench_train; '
            f'bench_train.two_steps({kind!r}, {sizes!r}, {str(device)!r}, {peer!r}, **{more!r})')
    lines, _, _ = run([sys.executable, '-c', call])
    return json.loads(lines[-1][1])


def two_steps(kind, sizes, device, peer, **more):
    """
    Take two training steps, the second with the optimizer's moments, and print {'peak memory, MiB', 'loss'}
    as JSON.
    kind: 'ours', 'ours with F.cross_entropy' or 'nanoGPT', which is in the folder `peer`. more: settings of
    train.py.
    """
    device = pick_device(device)
    torch.manual_seed(0)
    if kind == 'nanoGPT':
        dtype = 'float32' if device.type != 'cuda' else 'bfloat16'
        optimizer, loss_of = bench_peers.training(peer, sizes, device)
    else:
        s = Settings(**sizes, **more)
        model = make_model(part_of(s, ModelConfig)).to(device)
        dtype = pick_dtype(s.dtype, device)
        optimizer = make_optimizer(model, s)
        if pick_compile(True, device):  # as in any run of some minutes
            model.compile(dynamic=False)
        loss_of = model if kind == 'ours' else partial(plain_loss, model)
    idx = torch.randint(sizes['vocab_size'], (sizes['batch_size'], sizes['block_size'] + 1), device=device)
    x = idx[:, :-1].contiguous()
    y = idx[:, 1:].contiguous()
    for _ in range(2):
        with autocast(device, dtype):
            loss = loss_of(x, y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    print(json.dumps({'peak memory, MiB': peak_memory(device) / 2 ** 20, 'loss': loss.item()}))
