"""
How well a network knows the beginning of a document: the loss of the first token after the start token, of a run with a
document a row and of one on the stream, on all validation documents.

    python prepare.py tinystories.jsonl --out=data/stories --tokenizer=bpe:4096 --val_fraction=0.05
    python experiments/start_token.py --dataset=stories        # trains what is not there yet, 300 steps each
"""
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import checkpoint
from batches import TokenFiles, find_folder
from checkpoint import load_model
from configurator import UserError, configure, run_main

ROOT = Path(__file__).parent.parent


@dataclass
class Settings:
    dataset: str = 'stories'  # name under data/, or a folder
    out: str = 'out/start_token'  # folder of the two runs
    max_iters: int = 300


@torch.no_grad()
def first_losses(model, files):
    """Nats of the first token of every validation document after the end of text alone, (documents,)."""
    log_probs = model(torch.tensor([[files.meta['eot']]]))[0, -1].float().log_softmax(-1)  # (V,)
    first = [files.read(files.document(n)[0], 1)[0] for n in range(files.documents)]
    return -log_probs[torch.tensor(first)]


def main():
    s = configure(Settings)
    files = TokenFiles(find_folder(s.dataset), 'val')
    if files.meta.get('bos') is not None:
        raise UserError(f'dataset={s.dataset}: its documents begin with a token that no stream has: use another tokenizer')
    for packing in ('stream', 'document'):
        out_dir = os.path.join(s.out, packing)
        if not checkpoint.checkpoints(out_dir):
            args = ['train.py', 'config/tinystories_cpu.py', f'--dataset={s.dataset}', f'--out_dir={out_dir}']
            args += [f'--packing={packing}', f'--max_iters={s.max_iters}', '--compile=False']
            args += [f'--eval_interval={s.max_iters}']
            subprocess.run([sys.executable, *args], cwd=ROOT, check=True)
        losses = first_losses(load_model(out_dir)[0], files)
        error = losses.std() / len(losses) ** 0.5
        print(f'{packing:8}  first token of {len(losses)} documents: {losses.mean():.4f} ± {error:.4f} nats')


if __name__ == '__main__':
    run_main(main)
