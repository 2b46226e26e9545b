"""
bench.py sample: speed of writing text, against nanoGPT, transformers and the memory bandwidth.
"""
import copy
import importlib.util
import time
from functools import partial

import torch

import sample
from configurator import pick_dtype
from features.study import bench_peers
from features.study.bench_train import NETWORKS, network
from features.study.measure import alternate, section
from model import autocast, make_model


def bench_sample(s, device, machine):
    """
    Yield the section of bench.py sample: sampling from a model with random weights, one row at a time. The
    limit is to read all weights from memory once per token.
    """
    from features.lora.packed import pack
    sizes = NETWORKS['tiny' if s.quick else '10.6M']
    count = 50 if s.quick else 500
    dtype = pick_dtype('auto', device)
    model = make_model(network(sizes)).to(device).eval()
    # the dtype of nanoGPT's sample.py: float32 on a CPU
    theirs = 'float32' if device.type == 'cpu' else dtype

    sides = {}  # {name: (network, a function that writes `count` tokens)}
    for name, kind in (('ours', ''), ('ours, int8', 'int8')):
        packed = pack(copy.deepcopy(model), dtype, kind)
        sides[name] = packed, partial(write_ours, packed, count)
    notes = []
    if s.peer:
        gpt = bench_peers.network(s.peer, sizes).to(device).eval()
        sides['nanoGPT'] = gpt, partial(write_peer, gpt, count, device, theirs)
    if importlib.util.find_spec('transformers'):
        hf = transformers_network(sizes).to(device).eval()
        sides['transformers'] = hf, partial(write_transformers, hf, count, device, theirs)
    if len(sides) > 2:
        notes = ['nanoGPT has no cache of keys and values; transformers has one, '
                 'and a context of 1,024 that never fills']
    for _, write in sides.values():
        write()  # compiles what is compiled
    arms = {}
    for name, (side, write) in sides.items():
        arms[name] = partial(sample_figures, side, write, count, device, machine)
    yield section(f'sample: {count} tokens, one row, context {sizes["block_size"]}; '
                  f'ours {dtype} and int8, compiled', alternate(arms, s.rounds), notes)


def sample_figures(model, write, count, device, machine, rows=1):
    """{metric: value} of one call of write(), which generates `count` tokens in each row with `model`."""
    start = time.perf_counter()
    write()
    if device.type == 'cuda':
        torch.cuda.synchronize()
    rate = count / (time.perf_counter() - start)
    weights = sum(t.numel() * t.element_size() for t in model.state_dict().values())  # bytes
    return {'tokens/s': rows * rate, 'share of the bandwidth': rate * weights / machine['bandwidth']}


def write_ours(model, count, rows=1):
    """Generate `count` tokens in each row like sample.py."""
    generator = torch.Generator().manual_seed(0)
    for _ in sample.generate(model, [[0]] * rows, count, temperature=0.8, top_k=200, generator=generator,
                             compile=True):
        pass


def write_peer(model, count, device, dtype):
    """Generate `count` tokens like nanoGPT's sample.py."""
    prompt = torch.zeros(1, 1, dtype=torch.long, device=device)
    with autocast(device, dtype):
        model.generate(prompt, count, temperature=0.8, top_k=200)


def transformers_network(sizes):
    """GPT-2 of transformers with these sizes and random weights."""
    import transformers
    cfg = transformers.GPT2Config(
        vocab_size=sizes['vocab_size'],
        n_positions=1024,
        n_embd=sizes['n_embd'],
        n_layer=sizes['n_layer'],
        n_head=sizes['n_head'],
        bos_token_id=None,
        eos_token_id=None)
    return transformers.GPT2LMHeadModel(cfg)


def write_transformers(model, count, device, dtype):
    """Generate `count` tokens with a model of transformers."""
    prompt = torch.zeros(1, 1, dtype=torch.long, device=device)
    with autocast(device, dtype):
        model.generate(prompt, max_new_tokens=count, do_sample=True, temperature=0.8, top_k=200,
                       pad_token_id=0)
