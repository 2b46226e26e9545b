"""
How fast is training of ROT5-mini here, against transformers' T5 of its size? AdamW, forward and backward on
the same batch, in turn: tokens of source and target a second. Four networks: ours as ROT5 has it (rotary
positions, 4 heads with keys), ours as transformers' T5 (T5's positions, all heads with keys), theirs, and
ours with experts.

    python experiments/t5_speed.py                    # --rows=4 --rounds=3
"""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
import features  # noqa: I001 — first: your random.py or data/ then hides no module of ours or of a library
if __name__ == '__main__':
    features.start(__file__)

import time
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch

import train
from configurator import DeviceConfig, UserError, configure, pick_compile, pick_device, pick_dtype, run_main
from features import part_of
from features.study.measure import alternate, section, show
from model import ModelConfig, autocast, make_model
from optim import make_optimizer

CONFIG = str(Path(__file__).parent.parent / 'config' / 'rot5_mini.py')
VOCAB = 32502


@dataclass
class Settings(DeviceConfig):
    rows: int = 4  # of a batch
    source: int = 384  # tokens of each source
    target: int = 128  # tokens of each target
    rounds: int = 3  # of each network, in turn
    steps: int = 3  # of each round
    layers: int = 10  # of the encoder, and as many of the decoder


def our_settings(s, **changes):
    """The settings of train.py for ROT5-mini."""
    given = {'vocab_size': VOCAB, 'dropout': 0, 'objective': 'ul2', 'n_layer': s.layers,
             'n_encoder_layer': s.layers} | changes
    return configure(train.Settings, [CONFIG, *[f'--{key}={value}' for key, value in given.items()]])


class Ours:
    """Our network, its optimizer and its loss of a batch."""

    def __init__(self, s, device, **changes):
        settings = our_settings(s, **changes)
        self.model = make_model(part_of(settings, ModelConfig)).to(device)
        if pick_compile(s.compile, device):
            self.model.compile(dynamic=False)
        self.optimizer = make_optimizer(self.model, settings)

    def loss(self, source, x, y):
        return self.model(x, y, source=source)


class Theirs:
    """transformers' T5 of the size of ROT5-mini."""

    def __init__(self, s, device):
        try:
            from transformers import T5Config, T5ForConditionalGeneration
        except ImportError:
            raise UserError('transformers: is compared with: pip install transformers') from None
        cfg = part_of(our_settings(s), ModelConfig)
        self.model = T5ForConditionalGeneration(T5Config(
            vocab_size=cfg.vocab_size,
            d_model=cfg.n_embd,
            d_kv=cfg.d_head,
            d_ff=cfg.mlp_width,
            num_layers=cfg.n_encoder_layer,
            num_decoder_layers=cfg.n_layer,
            num_heads=cfg.n_head,
            feed_forward_proj='gelu',
            dropout_rate=0.0,
            decoder_start_token_id=0)).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True)

    def loss(self, source, x, y):
        return self.model(input_ids=source, labels=y).loss


def step(side, batch, device, dtype):
    """A training step of Ours or Theirs on a batch (source, x, y)."""
    with autocast(device, dtype):
        loss = side.loss(*batch)
    loss.backward()
    side.optimizer.step()
    side.optimizer.zero_grad(set_to_none=True)
    loss.item()  # waits for the device


def speed(make, batch, s, device, dtype):
    """{'tokens/s'} of s.steps training steps of the side that make() returns, after one that may compile."""
    side = make()
    step(side, batch, device, dtype)
    began = time.perf_counter()
    for _ in range(s.steps):
        step(side, batch, device, dtype)
    return {'tokens/s': s.steps * s.rows * (s.source + s.target) / (time.perf_counter() - began)}


def sides_of(s, device):
    """{name: a function that returns Ours or Theirs, made at its first call}."""
    sides = {
        'ours, rotary, 4 heads with keys': partial(Ours, s, device),
        "ours, T5's positions": partial(Ours, s, device, position='relative', cross_rope='none', n_kv_head=0),
        'transformers': partial(Theirs, s, device),
        'ours, rotary, 8 experts': partial(Ours, s, device, n_expert=8),
    }
    return {name: cache(make) for name, make in sides.items()}


def arms_of(s, device, sides):
    """{name: a function that times the training of a side}, all on the same batch."""
    torch.manual_seed(1)
    source = torch.randint(1, VOCAB, (s.rows, s.source), device=device)  # (B, S)
    y = torch.randint(1, VOCAB, (s.rows, s.target), device=device)  # (B, T)
    x = torch.cat([torch.zeros_like(y[:, :1]), y[:, :-1]], dim=1)
    dtype = pick_dtype(s.dtype, device)
    return {name: partial(speed, make, (source, x, y), s, device, dtype) for name, make in sides.items()}


def main():
    s = configure(Settings)
    device = pick_device(s.device)
    sides = sides_of(s, device)
    for name, make in sides.items():
        print(f'{name}: {sum(p.numel() for p in make().model.parameters()):,} parameters')
    title = (f'{s.rows} rows of {s.source} and {s.target} tokens, {pick_dtype(s.dtype, device)}, '
             f'{torch.get_num_threads()} thread(s)')
    show(section(title, alternate(arms_of(s, device, sides), s.rounds)))


if __name__ == '__main__':
    run_main(main)
