"""
Peak memory of one training step, in its own process: python tests/step_memory.py chunked|plain CONFIG ROWS VOCAB_SIZE [compiled]

`plain` is torch's cross_entropy on the logits of the whole batch; everything else is the same.
"""
import sys

import torch
import torch.nn.functional as F

sys.path.insert(0, sys.path[0] + '/..')
from configurator import read_config
from device import autocast, peak_memory
from model import Transformer
from optim import make_optimizer
from origin import model_config
from train import Settings


def main(kind, config, rows, vocab_size, compiled=''):
    torch.manual_seed(0)
    s = Settings(**read_config(Settings, config) | {'vocab_size': int(vocab_size)})
    model = Transformer(model_config(s))
    if compiled:
        model.compile()
    optimizer, device = make_optimizer(model, s), torch.device('cpu')
    idx = torch.randint(s.vocab_size, (int(rows), s.block_size + 1))
    x, y = idx[:, :-1], idx[:, 1:]
    before = peak_memory(device)
    for _ in range(2):  # the second step has the optimizer's moments too
        with autocast(device, s.dtype if s.dtype != 'auto' else 'bfloat16'):
            if kind == 'chunked':
                loss = model(x, y)
            else:
                loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    print(f'{kind}: loss {loss.item():.4f}, peak {peak_memory(device) / 2 ** 20:.0f} MiB, of which {before / 2 ** 20:.0f} before the first step')


if __name__ == '__main__':
    main(*sys.argv[1:])
