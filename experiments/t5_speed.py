"""
Training steps of ROT5-mini here and of transformers' T5 of its size, in turn, on the same batch: AdamW, forward and backward, tokens of source and target a
second. Three networks: ours as transformers' is (T5's positions, all heads with keys), ours as ROT5 has it (rotary, 4 heads with keys), theirs.

    python experiments/t5_speed.py                    # --rows=4 --rounds=3
"""
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))


import train
from configurator import UserError, configure, part_of, run_main
from device import DeviceConfig, autocast, pick_compile, pick_device, pick_dtype
from features.study.measure import alternate, section, show
from model import ModelConfig, make_model
from optim import make_optimizer

VOCAB = 32502


@dataclass
class Settings(DeviceConfig):
    rows: int = 4  # of a batch
    source: int = 384  # tokens of each source
    target: int = 128  # of each target
    rounds: int = 3  # of each network, in turn
    steps: int = 3  # of each round


def theirs(cfg):
    """transformers' T5 of the size of our ModelConfig."""
    try:
        from transformers import T5Config, T5ForConditionalGeneration
    except ImportError:
        raise UserError('transformers: is what is compared with: pip install transformers') from None
    return T5ForConditionalGeneration(T5Config(
        vocab_size=cfg.vocab_size, d_model=cfg.n_embd, d_kv=cfg.d_head, d_ff=cfg.mlp_width, num_layers=cfg.n_encoder_layer, num_decoder_layers=cfg.n_layer,
        num_heads=cfg.n_head, feed_forward_proj='gelu', dropout_rate=0.0, decoder_start_token_id=0))


def main():
    s = configure(Settings)
    device = pick_device(s.device)
    dtype = pick_dtype(s.dtype, device)
    torch.manual_seed(1)
    source, y = torch.randint(1, VOCAB, (s.rows, s.source), device=device), torch.randint(1, VOCAB, (s.rows, s.target), device=device)
    x = torch.cat([torch.zeros_like(y[:, :1]), y[:, :-1]], dim=1)
    config = str(Path(__file__).parent.parent / 'config' / 'rot5_mini.py')

    def ours(**changes):
        sizes = configure(train.Settings, [config, f'--vocab_size={VOCAB}', '--dropout=0', '--objective=ul2', *(f'--{k}={v}' for k, v in changes.items())])
        model = make_model(part_of(sizes, ModelConfig)).to(device)
        if pick_compile(s.compile, device):
            model.compile(dynamic=False)
        return model, make_optimizer(model, sizes), lambda: model(x, y, source=source)

    def peer():
        model = theirs(ours()[0].cfg).to(device)
        return model, torch.optim.AdamW(model.parameters(), fused=True), lambda: model(input_ids=source, labels=y).loss

    def arm(model, optimizer, loss):
        def steps():
            with autocast(device, dtype):
                value = loss()
            value.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return value.item()  # waits for the device

        def timed():
            began = time.perf_counter()
            for _ in range(s.steps):
                steps()
            return {'tokens/s': s.steps * s.rows * (s.source + s.target) / (time.perf_counter() - began)}
        steps()
        return timed

    arms = {'ours, rotary, 4 heads with keys': ours(), 'the same, 8 experts': ours(n_expert=8),
            "ours, T5's positions": ours(position='relative', cross_rope='none', n_kv_head=0),
            'transformers': peer()}
    for name, (model, *_) in arms.items():
        print(f'{name}: {sum(p.numel() for p in model.parameters()):,} parameters')
    title = f'{s.rows} rows of {s.source} and {s.target} tokens, {dtype}, {torch.get_num_threads()} thread(s)'
    show(section(title, alternate({name: arm(*parts) for name, parts in arms.items()}, s.rounds)))


if __name__ == '__main__':
    run_main(main)
