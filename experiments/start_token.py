"""
How well does a network know the beginning of a document? The loss of the first token after the start token,
of a run with a document per row and of one on the stream, on all validation documents.

    python prepare.py tinystories.jsonl --out=data/stories --tokenizer=bpe:4096 --val_fraction=0.05
    python experiments/start_token.py --dataset=stories   # trains the runs that are missing, 300 steps each
"""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
import features  # noqa: I001 — first: your random.py or data/ then hides no module of ours or of a library
if __name__ == '__main__':
    features.start(__file__)

import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

import checkpoint
from batches import TokenFiles, find_folder
from configurator import FilePath, UserError, configure, run_main
from features.networks import load_model

ROOT = Path(__file__).parent.parent


@dataclass
class Settings:
    dataset: FilePath = 'stories'  # name under data/, or a folder
    out: FilePath = 'out/start_token'  # folder of the two runs
    max_iters: int = 300


@torch.no_grad()
def first_losses(model, files):
    """
    Nats of the first token of every validation document after the end-of-text token alone, (documents,).
    """
    eot = torch.tensor([[files.meta['eot']]])  # (1, 1)
    log_probs = model(eot)[0, -1].float().log_softmax(-1)  # (V,)
    first = []
    for number in range(files.documents):
        start, _ = files.document(number)
        first.append(files.read(start, 1)[0])
    return -log_probs[torch.tensor(first)]


def train(s, packing, out_dir):
    """Train the run with this packing."""
    settings = [f'--dataset={s.dataset}', f'--out_dir={out_dir}', f'--packing={packing}',
                f'--max_iters={s.max_iters}', f'--eval_interval={s.max_iters}', '--compile=False']
    subprocess.run([sys.executable, 'train.py', 'config/tinystories_cpu.py', *settings], cwd=ROOT, check=True)


def main():
    s = configure(Settings)
    files = TokenFiles(find_folder(s.dataset), 'val')
    if files.meta.get('bos') is not None:
        raise UserError(f'dataset={s.dataset}: its documents begin with a token that no stream has: '
                        'use another tokenizer')
    for packing in ('stream', 'document'):
        out_dir = os.path.join(s.out, packing)
        if not checkpoint.checkpoints(out_dir):
            train(s, packing, out_dir)
        model, _ = load_model(out_dir)
        losses = first_losses(model, files)
        error = losses.std() / len(losses) ** 0.5
        print(f'{packing:8}  first token of {len(losses)} documents: {losses.mean():.4f} ± {error:.4f} nats')


if __name__ == '__main__':
    run_main(main)
