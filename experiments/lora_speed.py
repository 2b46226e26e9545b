"""
What do adapters save and cost, on GPT-2's network of 124M parameters?

Training: seconds and memory of a step with all weights trained; with adapters of rank 16 on every matrix of
the blocks; with these matrices stored in int8 and in nf4; and the same with PEFT and transformers. They take
turns, each in its own process.
Writing: tokens a second of a batch of 16 rows, by the base alone and with another adapter for every row.

    python experiments/lora_speed.py                    # --rows=4 --length=256 --rounds=3
"""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
import features  # noqa: I001 — first: your random.py or data/ then hides no module of ours or of a library
if __name__ == '__main__':
    features.start(__file__)

import json
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch

import train
from configurator import DeviceConfig, UserError, configure, pick_compile, pick_device, pick_dtype, run_main
from features import part_of
from features.lora import adapters
from features.lora import layers as lora
from features.lora.packed import pack_frozen
from features.study.measure import alternate, run, section, show
from model import ModelConfig, autocast, make_model
from optim import make_optimizer
from run import peak_memory
from sample import generate

ROOT = Path(__file__).parent.parent
VOCAB = 50257
TARGETS = 'c_attn,c_proj,c_fc'


@dataclass
class Settings(DeviceConfig):
    rows: int = 4  # of a batch
    length: int = 256  # tokens of each row
    steps: int = 4  # of each round, after two that are not timed
    rounds: int = 3
    rank: int = 16
    adapters: int = 16  # in one batch
    written: int = 32  # tokens of each of its rows
    layers: int = 12
    arm: Literal['', 'full', 'lora', 'int8', 'nf4', 'peft'] = ''  # one of them alone, in this process; int8,
    # nf4: adapters on matrices that are stored so


def ours(s, **changes):
    """(our network of GPT-2's size, its settings)."""
    given = {'vocab_size': VOCAB, 'n_layer': s.layers, 'dropout': 0.0, 'learning_rate': 1e-3} | changes
    config = str(ROOT / 'config' / 'gpt2.py')
    settings = configure(train.Settings, [config, *[f'--{key}={value}' for key, value in given.items()]])
    return make_model(part_of(settings, ModelConfig)), settings


def theirs(s):
    """transformers' network with PEFT's adapters."""
    try:
        from peft import LoraConfig, get_peft_model
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError:
        raise UserError('peft, transformers: are compared with: pip install peft transformers') from None
    base = GPT2LMHeadModel(GPT2Config(n_layer=s.layers, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0))
    config = LoraConfig(r=s.rank, lora_alpha=16, target_modules=TARGETS.split(','), fan_in_fan_out=True,
                        task_type='CAUSAL_LM')
    return get_peft_model(base, config)


def step_of(s, device):
    """(network of s.arm, its optimizer, a function of tokens (B, T) that returns their loss)."""
    if s.arm == 'peft':
        model = theirs(s).to(device)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-3, fused=True)
        return model, optimizer, lambda x: model(input_ids=x, labels=x).loss
    if s.arm == 'full':
        model, settings = ours(s)
    else:
        model, settings = ours(s, init_from='out', lora_rank=s.rank, lora_targets=TARGETS)
        lora.begin(model, settings)
        pack_frozen(model, pick_dtype(s.dtype, device) if s.arm == 'lora' else s.arm)
    model.to(device)
    if pick_compile(s.compile, device):
        model.compile(dynamic=False)
    return model, make_optimizer(model, settings), lambda x: model(x[:, :-1], x[:, 1:])


def train_arm(s):
    """Time steps of one arm in this process, and print the figures as JSON."""
    device = pick_device(s.device)
    dtype = pick_dtype(s.dtype, device)
    torch.manual_seed(1)
    model, optimizer, loss = step_of(s, device)
    x = torch.randint(VOCAB, (s.rows, s.length), device=device)
    for n in range(2 + s.steps):
        if n == 2:
            began = time.perf_counter()
        with autocast(device, dtype):
            value = loss(x)
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        value.item()  # waits for the device
    print(json.dumps({
        'seconds a step': (time.perf_counter() - began) / s.steps,
        'peak memory, MiB': peak_memory(device) / 2 ** 20,
        'trained': sum(p.numel() for p in model.parameters() if p.requires_grad),
    }))


def write_arms(s):
    """{name: a function that times the writing of a batch}."""
    device = pick_device(s.device)
    dtype = pick_dtype(s.dtype, device)
    model, settings = ours(s, init_from='out', lora_rank=s.rank, lora_targets=TARGETS)
    lora.share_table(model)
    names = [f'a{n}' for n in range(s.adapters)]
    for name in names:
        lora.attach(model, lora.Saved(lora.places(model, settings)), name)
    model.to(device).eval()
    arms = {
        'an adapter a row': partial(time_writing, model, names, s, device, dtype),
        'the base alone': partial(time_writing, model, [], s, device, dtype),
    }
    for arm in arms.values():
        arm()  # warms up
    return arms


def time_writing(model, names, s, device, dtype):
    """{'tokens/s'} of writing a batch, each row with the adapter of its name; without names by the base."""
    adapters.select(model, names)
    model.lora.shares = {}
    prompts = torch.randint(VOCAB, (s.adapters, 16)).tolist()
    began = time.perf_counter()
    with autocast(device, dtype):
        for _ in generate(model, prompts, s.written, top_k=50):
            pass
    return {'tokens/s': s.adapters * s.written / (time.perf_counter() - began)}


def run_arm(name, options):
    """The figures of train_arm() in a process of its own."""
    lines, _, _ = run([sys.executable, __file__, *options, f'--arm={name}'])
    return json.loads(lines[-1][1])


def main():
    s = configure(Settings)
    if s.arm:
        return train_arm(s)
    options = [f'--{name}={getattr(s, name)}' for name in s.given]
    arms = {name: partial(run_arm, name, options) for name in ('lora', 'peft', 'full', 'int8', 'nf4')}
    title = (f'a step of training: GPT-2, {s.layers} layers, {s.rows} rows of {s.length} tokens, '
             f'rank {s.rank}, {torch.get_num_threads()} thread(s)')
    show(section(title, alternate(arms, s.rounds)))
    show(section(f'{s.adapters} rows of {s.written} tokens written', alternate(write_arms(s), s.rounds)))


if __name__ == '__main__':
    run_main(main)
