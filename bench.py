"""
How fast: against the limits of this machine, and against nanoGPT.

    python bench.py all                                                    # ours, and the machine's ceilings; on a GPU too
    python bench.py train sample --peer=PATH/TO/nanoGPT --json=bench.json

    train      tokens/s, share of the matmul ceiling and peak memory of train.py: the 10.6M network of nanoGPT's
               train_shakespeare_char, on CUDA GPT-2 124M too
    loss       the chunked cross-entropy against torch's: seconds by vocabulary, and the peak memory of a whole training step
    sample     tokens/s of 500 tokens from the 10.6M network, one at a time, and the share of the memory bandwidth
    prepare    MB/s of GPT-2's BPE, and peak memory by size of the text
    scale      how cost grows: data sets of 1 MB to 100 GB, context, width, vocabulary, ranks

Every side runs as its users run it, with its own defaults, and in turn (A B A B): what disturbs the machine disturbs all of them.
Printed are medians, the extremes, and how many times the others' figure ours is.
"""
import copy
import importlib.util
import io
import itertools
import json
import math
import os
import pickle
import platform
import random
import re
import shutil
import statistics
import sys
import tempfile
import time
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field

import numpy as np
import torch
import torch.nn.functional as F

import prepare
import sample
import tokenizer
import train
from batches import Mixture
from configurator import ROOT, FilePath, UserError, build, configure, run_main
from device import autocast, matmul_flops, memory_bandwidth, peak_memory, pick_compile, pick_device, pick_dtype
from features.lora.packed import pack
from features.study.measure import alternate, run, seconds, section, show, summarize
from features.text import sources
from files import replace_json, writing
from model import Transformer, make_model
from optim import make_optimizer
from origin import model_config
from prepare import cores

MB = 10 ** 6


@dataclass
class Settings:
    positional = 'what'
    what: list[str] = field(default_factory=list)  # train, loss, sample, prepare, scale, or all
    peer: FilePath = ''  # a clone of nanoGPT to run beside ours; '' = ours alone
    json: FilePath = ''  # write everything here too: the machine, every sample, medians, ratios
    rounds: int = 3  # how often each side runs
    device: str = 'auto'  # cpu, cuda, cuda:1, mps; auto = the best there is
    text: list[FilePath] = field(default_factory=lambda: ['stdlib'])  # what prepare's documents are made of: sources as prepare.py takes them
    quick: bool = False  # tiny sizes: shows in a minute that everything runs, its figures mean nothing

    def check(self):
        """Raise ValueError for values that cannot work."""
        unknown = next((name for name in self.what if name not in (*BENCHES, 'all')), None)
        if unknown or not self.what:
            raise ValueError(f'what={unknown or ""}: takes {", ".join(BENCHES)} or all, as in python bench.py all')
        if self.rounds < 1:
            raise ValueError(f'rounds={self.rounds}: must be at least 1')
        if not os.path.isdir(os.path.dirname(self.json) or '.'):
            raise ValueError(f'json={self.json}: its folder does not exist: make it, or choose another')
        if self.peer and not os.path.isfile(os.path.join(self.peer, 'config', 'train_shakespeare_char.py')):
            raise ValueError(f'peer={self.peer}: not a clone of nanoGPT: git clone https://github.com/karpathy/nanoGPT, and give its folder')


# -----------------------------------------------------------------------------
# The machine

def measure_machine(device):
    """What the machine is, and its ceilings: FLOP/s of a large matmul by dtype, bytes/s of a large copy."""
    dtypes, sizes = (['float32', 'bfloat16', 'float16'], (4096, 8192)) if device.type != 'cpu' else (['float32', 'bfloat16'], (512, 1024, 2048))
    with open('/proc/cpuinfo') if os.path.exists('/proc/cpuinfo') else open(os.devnull) as f:
        cpu = next((line.partition(': ')[2].strip() for line in f if line.startswith('model name')), platform.processor())
    return {'device': torch.cuda.get_device_name(device) if device.type == 'cuda' else str(device), 'cpu': cpu, 'cores': cores(),
            'torch': torch.__version__, 'python': platform.python_version(),
            'flops': {name: ceiling(device, getattr(torch, name), sizes) for name in dtypes},
            'bandwidth': memory_bandwidth(device)}


def ceiling(device, dtype, sizes):
    """FLOP/s of the best of square matmuls of these sizes; no larger ones once one takes a tenth of a second: CPUs that only imitate a dtype."""
    best = 0.0
    for n in sizes:
        best = max(best, matmul_flops(device, dtype, n, seconds=0.3))
        if 2 * n ** 3 / best > 0.1:
            break
    return best


# -----------------------------------------------------------------------------
# train

NETWORKS = {'10.6M': {'n_layer': 6, 'n_head': 6, 'n_embd': 384, 'block_size': 256, 'batch_size': 64, 'vocab_size': 65},
            'GPT-2 124M': {'n_layer': 12, 'n_head': 12, 'n_embd': 768, 'block_size': 1024, 'batch_size': 12, 'vocab_size': 50257},
            'tiny': {'n_layer': 2, 'n_head': 2, 'n_embd': 64, 'block_size': 64, 'batch_size': 4, 'vocab_size': 65}}
WARM_UP = 5  # steps that are not counted: compiling, first allocations


def bench_train(s, device, machine):
    """Both train.py on the same random tokens: speed does not depend on what they say."""
    for name in ['tiny'] if s.quick else ['10.6M', 'GPT-2 124M'] if device.type == 'cuda' else ['10.6M']:
        sizes = dict(NETWORKS[name])
        flops = flops_per_token(sizes)
        while device.type != 'cuda' and sizes['batch_size'] * sizes['block_size'] * flops > 1.5 * machine['flops']['float32']:
            sizes['batch_size'] //= 2  # a step of at most 3 s where half of the ceiling is reached
        tokens, steps = sizes['batch_size'] * sizes['block_size'], WARM_UP + (3 if s.quick else 50 if device.type == 'cuda' else 8)

        def figures(side, *arguments):
            rates, peak, dtype, _ = side(*arguments, train_options(sizes, steps, folder, device), folder, device)
            rate = statistics.median(rates[WARM_UP:])
            return {'tokens/s': rate, 'MFU': rate * flops / machine['flops'][dtype], 'peak memory, MiB': peak}

        with tempfile.TemporaryDirectory() as folder:
            random_tokens(folder, sizes['vocab_size'], 2 ** 20)
            arms = {'ours': lambda: figures(train_ours)}
            if s.peer:
                arms['nanoGPT'] = lambda: figures(train_peer, s.peer, 'train_gpt2' if name == 'GPT-2 124M' else 'train_shakespeare_char', tokens)
            samples = alternate(arms, s.rounds)
        yield section(f'train: {name} network, {sizes["batch_size"]} x {sizes["block_size"]} tokens a step, each with its own defaults', samples,
                      ['MFU: share of the measured matmul ceiling of the dtype that the side runs in'])


def flops_per_token(sizes):
    with torch.device('meta'):
        return make_model(model_config(settings_of(sizes))).flops_per_token()


def settings_of(sizes):
    """Our defaults for a network of these sizes."""
    return build(train.Settings, **sizes)


def random_tokens(folder, vocab_size, count):
    """A data set in nanoGPT's form, which both read."""
    rng = np.random.default_rng(0)
    for split in ('train', 'val'):
        rng.integers(vocab_size, size=count, dtype=np.uint16).tofile(os.path.join(folder, f'{split}.bin'))
    if vocab_size < 50257:
        with open(os.path.join(folder, 'meta.pkl'), 'wb') as f:
            pickle.dump({'vocab_size': vocab_size}, f)


def train_options(sizes, steps, folder, device):
    """The command line for both train.py."""
    network = {key: value for key, value in sizes.items() if key != 'vocab_size'}
    return [f'--{key}={value}' for key, value in {**network, 'dropout': 0.0, 'dataset': folder, 'max_iters': steps, 'eval_interval': 10 ** 6, 'eval_iters': 1,
                                                  'log_interval': 1, 'gradient_accumulation_steps': 1, 'device': device}.items()]


def train_ours(options, folder, device):
    """(tokens/s of every step, peak MiB, dtype, lines printed) of our train.py."""
    out = os.path.join(folder, 'ours')
    shutil.rmtree(out, ignore_errors=True)
    lines, _, peak = run([sys.executable, os.path.join(ROOT, 'train.py'), f'--out_dir={out}', '--sample_tokens=0', '--compile=True', *options], device)
    with open(os.path.join(out, 'log.jsonl')) as log, open(os.path.join(out, 'settings.json')) as settings:
        return [r['tokens_per_second'] for r in map(json.loads, log) if 'train_loss' in r], peak, json.load(settings)['dtype'], lines


def train_peer(peer, config, tokens, options, folder, device):
    """The same of nanoGPT's."""
    lines, _, peak = run([sys.executable, 'train.py', f'config/{config}.py', '--compile=True', '--wandb_log=False', f'--out_dir={folder}/peer', *options],
                         device, cwd=peer)
    times = [float(found[1]) / 1000 for _, line in lines if (found := re.match(r'iter \d+: .*time ([\d.]+)ms', line))]
    dtype = 'float32' if device.type != 'cuda' else 'bfloat16' if torch.cuda.is_bf16_supported() else 'float16'  # float16 on a CPU has no effect
    return [tokens / t for t in times], peak, dtype, lines


# -----------------------------------------------------------------------------
# loss

class HeadAlone(Transformer):
    """A network whose blocks cost nothing: what is left are head and loss."""

    def hidden(self, idx, *_):
        return self.h


def bench_loss(s, device, machine):
    """Head and cross-entropy forward and backward by vocabulary, then a whole step's memory."""
    dtype, rows, width = pick_dtype('auto', device), 8, 64 if s.quick else 768
    length = 32 if s.quick else 256 if device.type == 'cpu' else 2048
    for vocab_size in (64, 1024) if s.quick else (4096, 50304, 131072):
        model = HeadAlone(model_config(settings_of({'n_layer': 1, 'n_head': 2, 'n_embd': width, 'vocab_size': vocab_size}))).to(device)
        model.h = torch.randn(rows, length, width, device=device, requires_grad=True)
        y = torch.randint(vocab_size, (rows, length), device=device)

        def timed(loss):
            def step():
                with autocast(device, dtype):
                    value = loss()
                value.backward()
                model.zero_grad(set_to_none=True)
                model.h.grad = None
            return {'ms': 1000 * seconds(step, device)}

        samples = alternate({'chunked': lambda: timed(lambda: model(y, y)), 'F.cross_entropy': lambda: timed(lambda: plain_loss(model, y, y))}, s.rounds)
        yield section(f'loss: head and cross-entropy, forward and backward, {rows * length:,} tokens, {width} wide, V = {vocab_size:,}, {dtype}', samples)
    sizes = NETWORKS['tiny'] | {'vocab_size': 8192} if s.quick else {'n_layer': 4, 'n_head': 12, 'n_embd': 768, 'block_size': 1024, 'batch_size': 8,
                                                                   'vocab_size': 50304}
    kinds = ['ours', 'ours with F.cross_entropy'] + ['nanoGPT'] * bool(s.peer)
    samples = alternate({kind: lambda kind=kind: step_memory(kind, sizes, device, s.peer) for kind in kinds}, 1)
    yield section(f'loss: memory of a training step, {sizes["n_layer"]} layers, {sizes["n_embd"]} wide, {sizes["batch_size"]} x {sizes["block_size"]} tokens, '
                  f'V = {sizes["vocab_size"]:,}, each with its own defaults', samples)


def plain_loss(model, x, y):
    """Cross-entropy on the logits of the whole batch."""
    return F.cross_entropy(model(x).flatten(0, 1), y.flatten())


def step_memory(kind, sizes, device, peer='', **more):
    """The peak memory of two training steps in a process of their own, and their loss."""
    call = f'import bench; bench.two_steps({kind!r}, {sizes!r}, {str(device)!r}, {os.path.abspath(peer) if peer else ""!r}, **{more!r})'
    lines, _, _ = run([sys.executable, '-c', call])
    return json.loads(lines[-1][1])


def two_steps(kind, sizes, device, peer, **more):
    """Two training steps, the second with the optimizer's moments; prints {'peak memory, MiB', 'loss'} as JSON."""
    s, device = build(train.Settings, **sizes, **more), pick_device(device)
    torch.manual_seed(0)
    if kind == 'nanoGPT':
        model = peer_model(peer, sizes).to(device)
        optimizer, step = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), device.type), torch.compile(model)
        dtype = 'float32' if device.type != 'cuda' else 'bfloat16'
    else:
        model, dtype = make_model(model_config(s)).to(device), pick_dtype(s.dtype, device)
        optimizer = make_optimizer(model, s)
        if pick_compile(True, device):  # as in any run of some minutes
            model.compile(dynamic=False)
    idx = torch.randint(sizes['vocab_size'], (sizes['batch_size'], sizes['block_size'] + 1), device=device)
    x, y = idx[:, :-1].contiguous(), idx[:, 1:].contiguous()
    for _ in range(2):
        with autocast(device, dtype):
            loss = step(x, y)[1] if kind == 'nanoGPT' else model(x, y) if kind == 'ours' else plain_loss(model, x, y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    print(json.dumps({'peak memory, MiB': peak_memory(device) / 2 ** 20, 'loss': loss.item()}))


def peer_model(peer, sizes):
    """nanoGPT's own network of these sizes, with random weights."""
    spec = importlib.util.spec_from_file_location('nanogpt_model', os.path.join(peer, 'model.py'))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with redirect_stdout(io.StringIO()):  # it says how many parameters it has
        return module.GPT(module.GPTConfig(**{key: sizes[key] for key in ('n_layer', 'n_head', 'n_embd', 'block_size', 'vocab_size')}, dropout=0.0, bias=False))


# -----------------------------------------------------------------------------
# sample

def bench_sample(s, device, machine):
    """Text from random weights, a row at a time; the limit is reading all weights from memory once a token."""
    sizes, count = NETWORKS['tiny' if s.quick else '10.6M'], 50 if s.quick else 500
    model, dtype = make_model(model_config(settings_of(sizes))).to(device).eval(), pick_dtype('auto', device)
    as_they_do = autocast(device, 'float32' if device.type == 'cpu' else dtype)  # nanoGPT's sample.py: float32 on a CPU
    prompt = torch.zeros(1, 1, dtype=torch.long, device=device)

    def ours(kind=''):
        packed = pack(copy.deepcopy(model), dtype, kind)
        return packed, lambda: list(sample.generate(packed, [[0]], count, temperature=0.8, top_k=200, generator=torch.Generator().manual_seed(0), compile=True))

    sides = {'ours': ours(), 'ours, int8': ours('int8')}
    if s.peer:
        gpt = peer_model(s.peer, sizes).to(device).eval()

        def peers():
            with as_they_do:
                return gpt.generate(prompt, count, temperature=0.8, top_k=200)
        sides['nanoGPT'] = gpt, peers
    if importlib.util.find_spec('transformers'):
        import transformers
        cfg = transformers.GPT2Config(vocab_size=sizes['vocab_size'], n_positions=1024, n_embd=sizes['n_embd'], n_layer=sizes['n_layer'],
                                      n_head=sizes['n_head'], bos_token_id=None, eos_token_id=None)
        hf = transformers.GPT2LMHeadModel(cfg).to(device).eval()

        def transformers_():
            with as_they_do:
                return hf.generate(prompt, max_new_tokens=count, do_sample=True, temperature=0.8, top_k=200, pad_token_id=0)
        sides['transformers'] = hf, transformers_

    def figures(network, generate):
        start = time.perf_counter()
        generate()
        if device.type == 'cuda':
            torch.cuda.synchronize()
        rate = count / (time.perf_counter() - start)
        weights = sum(t.numel() * t.element_size() for t in network.state_dict().values())
        return {'tokens/s': rate, 'share of the bandwidth': rate * weights / machine['bandwidth']}

    for _, generate in sides.values():  # what is compiled is compiled now
        generate()
    samples = alternate({name: lambda side=side: figures(*side) for name, side in sides.items()}, s.rounds)
    yield section(f'sample: {count} tokens, one row, context {sizes["block_size"]}; ours {dtype} and int8, compiled', samples,
                  ['nanoGPT has no cache of keys and values; transformers has one, and a context of 1,024 that never fills'] if len(sides) > 1 else [])


# -----------------------------------------------------------------------------
# prepare

def bench_prepare(s, device, machine):
    """Whole processes, from their start to the finished files."""
    try:
        tokenizer.new_tokenizer('gpt2')
    except UserError as error:
        yield section('prepare: left out', {}, [str(error)])
        return
    with tempfile.TemporaryDirectory() as folder:
        size, counted = write_text(s, folder, 2 if s.quick else 100)
        arms = {'ours': lambda: prepare_ours(folder, size, cores()), 'ours, one process': lambda: prepare_ours(folder, size, 1)}
        notes = [f'{counted:,} documents; seconds of the whole process, its start included']
        if s.peer:
            arms['nanoGPT, a text'] = lambda: prepare_peer(s.peer, 'shakespeare', folder, size, 1, counted)
            notes += ["nanoGPT, a text: its data/shakespeare/prepare.py, encode_ordinary of the whole file"]
            if importlib.util.find_spec('datasets'):
                arms['nanoGPT, documents'] = lambda: prepare_peer(s.peer, 'openwebtext', folder, size, cores(), counted)
                notes += ['nanoGPT, documents: its data/openwebtext/prepare.py on the same .jsonl, one process a core, a validation share that it can shard']
            else:
                notes += ['nanoGPT, documents: its data/openwebtext/prepare.py takes datasets, which is not installed: left out']
        yield section(f'prepare: {size / MB:.0f} MB of text, GPT-2 BPE', alternate(arms, s.rounds), notes)
    samples = {}
    for mb in (1, 2) if s.quick else (10, 100, 1000):
        with tempfile.TemporaryDirectory() as folder:
            size, _ = write_text(s, folder, mb, txt=False)
            samples |= alternate({f'{mb} MB': lambda: prepare_ours(folder, size, cores())}, 1)
    yield section('prepare: memory of all its processes, by size of the text', samples)


def write_text(s, folder, mb, txt=True):
    """`mb` MB of documents as text.jsonl (and all in one .txt): random pieces of s.text, as long as a page of the web. Returns (bytes, documents)."""
    reading = prepare.Settings(split='document', val_fraction=0.01)
    texts = [text for task in sources.Reader(sources.find_files(s.text), reading).tasks(None) for _, text in sources.documents(task, reading) if text]
    rng, size, count, longest = random.Random(0), 0, 0, 800 if s.quick else 5000
    with open(os.path.join(folder, 'text.jsonl'), 'w') as lines, open(os.path.join(folder, 'text.txt'), 'w') as whole:
        for text in itertools.cycle(texts):
            if size >= mb * MB:
                return size, count
            start = rng.randrange(max(1, len(text) - longest))
            text = text[start:start + longest]
            lines.write(json.dumps({'text': text}) + '\n')
            if txt:
                whole.write(text)
            size, count = size + len(text.encode()), count + 1


def prepare_ours(folder, size, num_proc):
    out = os.path.join(folder, 'out')
    _, took, peak = run([sys.executable, os.path.join(ROOT, 'prepare.py'), os.path.join(folder, 'text.jsonl'), '--tokenizer=gpt2', f'--out={out}',
                         f'--num_proc={num_proc}'], tree=True)
    shutil.rmtree(out)
    return {'MB/s': size / MB / took, 'MB/s a process': size / MB / took / num_proc, 'peak memory, MiB': peak}


# what runs nanoGPT's script on local documents: load_dataset gives those
LOCAL = """import datasets, runpy
load = datasets.load_dataset
datasets.load_dataset = lambda name, num_proc: load('json', data_files={!r})
runpy.run_path({!r}, run_name='__main__')"""


def prepare_peer(peer, name, folder, size, num_proc, documents):
    """nanoGPT's own prepare.py, in a copy of its folder with the text in it."""
    place = os.path.join(folder, name)
    os.makedirs(place)
    script = os.path.join(place, 'prepare.py')
    with open(os.path.join(peer, 'data', name, 'prepare.py')) as old, open(script, 'w') as new:
        share = min(0.5, max(0.0005, 1100 / documents))  # it cuts each split into 1,024 pieces, and none may be empty
        new.write(old.read().replace('num_proc = 8', f'num_proc = {num_proc}').replace('test_size=0.0005', f'test_size={share}'))
    if name == 'shakespeare':
        os.link(os.path.join(folder, 'text.txt'), os.path.join(place, 'input.txt'))
        command = [sys.executable, script]
    else:
        os.environ |= {'HF_HOME': os.path.join(place, 'cache'), 'HF_HUB_OFFLINE': '1'}
        command = [sys.executable, '-c', LOCAL.format(os.path.join(folder, 'text.jsonl'), script)]
    _, took, peak = run(command, tree=True)
    shutil.rmtree(place)
    return {'MB/s': size / MB / took, 'MB/s a process': size / MB / took / num_proc, 'peak memory, MiB': peak}


# -----------------------------------------------------------------------------
# scale

def bench_scale(s, device, machine):
    """Data sets that are all holes: as many tokens as they say, and no room on the disk. Then networks that grow on one side."""
    with tempfile.TemporaryDirectory() as folder:
        sizes = {'1 MB': 10 ** 6, '100 MB': 10 ** 8, '10 GB': 10 ** 10, '100 GB': 10 ** 11}
        for name, size in sizes.items():
            sparse_dataset(os.path.join(folder, name), size)
        samples = alternate({name: lambda name=name: scale_data(os.path.join(folder, name), device, s.quick) for name in sizes}, s.rounds)
    yield section('scale: size of the data (sparse files: nothing is read from a disk)', samples)
    tokens, most = (128, 64) if s.quick else (2048, 512) if device.type == 'cpu' else (32768, 2048)
    base = {'n_layer': 2, 'n_head': 4, 'n_embd': most // 2, 'block_size': most // 2, 'vocab_size': 4 * most}
    ranks = ('rank_qk', 'rank_vo', 'rank_mlp')
    for names, values in ((('block_size',), [most // 8, most // 4, most // 2, most, 2 * most]), (('n_embd',), [most // 4, most // 2, most]),
                          (('vocab_size',), [most, 8 * most, 64 * most, 128 * most]), (ranks, [most // 32, most // 16, most // 8, most // 4, 0])):
        arms = {}
        for value in values:
            step, count = training_step(base | dict.fromkeys(names, value), tokens, device)
            arms[f'{value or "dense"}'] = lambda step=step, count=count: {'µs a token': 1e6 * seconds(step, device, budget=0.1 if s.quick else 1) / count}
        samples = alternate(arms, s.rounds)
        medians = [metrics['µs a token'] for metrics in summarize(samples)['medians'].values()]
        slope = [math.log(b / a) / math.log(y / x) for (x, a), (y, b) in itertools.pairwise(zip(values, medians)) if y]
        yield section(f'scale: {" = ".join(names)}, {tokens:,} tokens a step', samples,
                      ['exponent from each to the next: ' + ', '.join(f'{e:.2f}' for e in slope)])


def sparse_dataset(folder, size):
    """A prepared data set of `size` bytes of token 0 that takes no room: holes in a file."""
    os.makedirs(folder)
    splits = {}
    for split, count in (('train', size // 2), ('val', 10 ** 5)):
        with open(os.path.join(folder, f'{split}_00000.bin'), 'wb') as f:
            f.truncate(2 * count)
        shard = {'file': f'{split}_00000.bin', 'tokens': count, 'bytes_on_disk': 2 * count}
        splits[split] = {'tokens': count, 'documents': 0, 'bytes': count, 'shards': [shard]}
    meta = {'format': 1, 'tokenizer': {'kind': 'byte', 'vocab_size': 257, 'eot': 256}, 'vocab_size': 257, 'eot': 256, 'dtype': 'uint16', 'splits': splits}
    with open(os.path.join(folder, 'meta.json'), 'w') as f:
        json.dump(meta, f)


def scale_data(folder, device, quick):
    """Rows of the data alone, then a short training run."""
    data, draws = Mixture(folder, 'train', 256, seed=1), itertools.count()
    took = seconds(lambda: [data.rows(range(i, i + 32)) for i in itertools.islice(draws, 0, 32 * 20, 32)], torch.device('cpu'), budget=0.1 if quick else 1)
    sizes = NETWORKS['tiny'] | {'block_size': 256}
    rates, peak, _, lines = train_ours(train_options(sizes, 20 if quick else 300, folder, device), folder, device)
    return {'rows/s of the data': 32 * 20 / took, 'tokens/s of training': statistics.median(rates[WARM_UP:]), 'peak memory, MiB': peak,
            'seconds to the first step': next(at for at, line in lines if line.startswith('step 1/'))}


def training_step(sizes, tokens, device):
    """(a function that does one training step of a network of these sizes, the tokens in it)."""
    s = settings_of(sizes)
    model, dtype = make_model(model_config(s)).to(device), pick_dtype('auto', device)
    optimizer, rows = make_optimizer(model, s), max(1, tokens // s.block_size)
    idx = torch.randint(s.vocab_size, (rows, s.block_size), device=device)

    def step():
        with autocast(device, dtype):
            loss = model(idx, idx)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return step, rows * s.block_size


# -----------------------------------------------------------------------------

BENCHES = {'train': bench_train, 'loss': bench_loss, 'sample': bench_sample, 'prepare': bench_prepare, 'scale': bench_scale}


def main():
    s = configure(Settings)
    device = pick_device(s.device)
    s.peer = s.peer and os.path.abspath(s.peer)
    report = {'settings': asdict(s), 'machine': measure_machine(device), 'parts': []}
    m = report['machine']
    print(f'{m["device"]}, {m["cpu"]}, {m["cores"]} cores, torch {m["torch"]}')
    print('ceilings: ' + ', '.join(f'{name} matmul {flops / 1e12:.3g} TFLOP/s' for name, flops in m['flops'].items())
          + f'; copying {m["bandwidth"] / 1e9:.3g} GB/s', flush=True)
    for name in BENCHES if 'all' in s.what else dict.fromkeys(s.what):
        for part in BENCHES[name](s, device, m):
            show(part)
            report['parts'].append(part)
            if s.json:
                with writing(f'json={s.json}', 'give another path, or make room'):
                    os.makedirs(os.path.dirname(s.json) or '.', exist_ok=True)
                    replace_json(s.json, report)


if __name__ == '__main__':
    run_main(main)
