"""
What adapters save and cost on GPT-2's network of 124M parameters. Training: seconds and memory of a step with all weights trained, with adapters of rank 16
on every matrix of the blocks, these matrices stored in int8 and nf4 too, and the same with PEFT and transformers, in turn, each in a process of its own.
Writing: tokens a second of a batch of 16 rows of the base alone, and with an adapter of its own for every row.

    python experiments/lora_speed.py                    # --rows=4 --length=256 --rounds=3
"""
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))


import train
from configurator import UserError, configure, part_of, run_main
from device import DeviceConfig, autocast, peak_memory, pick_compile, pick_device, pick_dtype
from features.lora import adapters
from features.lora import layers as lora
from features.lora.packed import pack_frozen
from features.study.measure import alternate, run, section, show
from model import ModelConfig, make_model
from optim import make_optimizer
from sample import generate

VOCAB, TARGETS = 50257, 'c_attn,c_proj,c_fc'


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
    arm: Literal['', 'full', 'lora', 'int8', 'nf4', 'peft'] = ''  # one of them alone, in this process; int8, nf4: adapters, the rest stored so


def ours(s, **changes):
    """Our network of GPT-2's size and its settings."""
    given = {'vocab_size': VOCAB, 'n_layer': s.layers, 'dropout': 0.0, 'learning_rate': 1e-3} | changes
    settings = configure(train.Settings, [str(Path(__file__).parent.parent / 'config' / 'gpt2.py'), *(f'--{k}={v}' for k, v in given.items())])
    return make_model(part_of(settings, ModelConfig)), settings


def theirs(s):
    """transformers' network with PEFT's adapters."""
    try:
        from peft import LoraConfig, get_peft_model
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError:
        raise UserError('peft, transformers: are what is compared with: pip install peft transformers') from None
    base = GPT2LMHeadModel(GPT2Config(n_layer=s.layers, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0))
    return get_peft_model(base, LoraConfig(r=s.rank, lora_alpha=16, target_modules=TARGETS.split(','), fan_in_fan_out=True, task_type='CAUSAL_LM'))


def step_of(s, device):
    """(the network of s.arm, its optimizer, a function of tokens (B, T) → their loss)."""
    if s.arm == 'peft':
        model = theirs(s).to(device)
        return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, fused=True), lambda x: model(input_ids=x, labels=x).loss
    adapters = {} if s.arm == 'full' else {'init_from': 'out', 'lora_rank': s.rank, 'lora_targets': TARGETS}
    model, settings = ours(s, **adapters)
    if adapters:
        lora.begin(model, settings)
        pack_frozen(model, pick_dtype(s.dtype, device) if s.arm == 'lora' else s.arm)
    model.to(device)
    if pick_compile(s.compile, device):
        model.compile(dynamic=False)
    return model, make_optimizer(model, settings), lambda x: model(x[:, :-1], x[:, 1:])


def train_arm(s):
    """Time steps of one arm in this process; prints what it took as JSON."""
    device = pick_device(s.device)
    dtype = pick_dtype(s.dtype, device)
    torch.manual_seed(1)
    model, optimizer, loss = step_of(s, device)
    x = torch.randint(VOCAB, (s.rows, s.length), device=device)
    began = 0.0
    for n in range(2 + s.steps):
        began = time.perf_counter() if n == 2 else began
        with autocast(device, dtype):
            value = loss(x)
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        value.item()  # waits for the device
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(json.dumps({'seconds a step': (time.perf_counter() - began) / s.steps, 'peak memory, MiB': peak_memory(device) / 2 ** 20, 'trained': trained}))


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

    def timed(chosen):
        def arm():
            adapters.select(model, chosen)
            model.lora.shares = {}
            prompts = torch.randint(VOCAB, (s.adapters, 16)).tolist()
            began = time.perf_counter()
            with autocast(device, dtype):
                for _ in generate(model, prompts, s.written, top_k=50):
                    pass
            return {'tokens/s': s.adapters * s.written / (time.perf_counter() - began)}
        arm()
        return arm
    return {'an adapter a row': timed(names), 'the base alone': timed([])}


def main():
    s = configure(Settings)
    if s.arm:
        return train_arm(s)
    own = [f'--{name}={getattr(s, name)}' for name in s.given]

    def arm(name):
        lines, *_ = run([sys.executable, __file__, *own, f'--arm={name}'])
        return json.loads(lines[-1][1])
    title = f'GPT-2, {s.layers} layers, {s.rows} rows of {s.length} tokens, rank {s.rank}, {torch.get_num_threads()} thread(s)'
    show(section(f'a step of training: {title}', alternate({name: lambda name=name: arm(name) for name in ('lora', 'peft', 'full', 'int8', 'nf4')}, s.rounds)))
    show(section(f'{s.adapters} rows of {s.written} tokens written', alternate(write_arms(s), s.rounds)))


if __name__ == '__main__':
    run_main(main)
