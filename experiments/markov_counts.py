"""
What counting says of a data set's documents, each after its start token: the oracle of a full Markov table. The rows of
the table are (counts + k·p)/(n + k), for k pseudo-counts of a uniform p or of the unigrams'.

    python experiments/markov_counts.py --dataset=pubmed --out_dir=out/markov_pubmed
"""
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from batches import TokenFiles, find_folder, start_token
from checkpoint import load_model
from configurator import configure, run_main
from features.markov.ngrams import look_up


@dataclass
class Settings:
    dataset: str = 'pubmed'  # name under data/, or a folder
    out_dir: str = ''  # a trained table to hold against it, on the same targets


def pairs(files):
    """(previous, following) tokens of all documents, each after the start token, int64 (N,)."""
    begin = start_token(files.meta)
    documents = []
    for number in range(files.documents):
        start, end = files.document(number)
        documents.append(np.append(begin, files.read(start, end - start)))
    return np.concatenate([d[:-1] for d in documents]), np.concatenate([d[1:] for d in documents])


def losses(train, val, vocab_size, k, kind):
    """Nats per token of both splits, by the counts of the first with k pseudo-counts."""
    (previous, following), out = train, []
    keys, counts = np.unique(previous * vocab_size + following, return_counts=True)
    seen = np.bincount(previous, minlength=vocab_size)
    p = np.full(vocab_size, 1 / vocab_size)
    if kind == 'unigram':
        p = (np.bincount(following, minlength=vocab_size) + 1) / (len(following) + vocab_size)
    for before, after in (train, val):
        place, known = look_up(keys, before * vocab_size + after)
        count = np.where(known, counts[place], 0)
        out.append(-np.log((count + k * p[after]) / (seen[before] + k)).mean())
    return out


@torch.no_grad()
def of_table(model, split):
    """Nats per token of a split's pairs by a model.Markov with a full table."""
    nats, count = 0.0, 2 ** 15  # of pairs at a time
    for n in range(0, len(split[0]), count):
        previous, following = (torch.from_numpy(a[n:n + count]) for a in split)
        nats += model(previous[None], following[None], reduction='sum').item()
    return nats / len(split[0])


def main():
    s = configure(Settings)
    files = [TokenFiles(find_folder(s.dataset), split) for split in ('train', 'val')]
    train, val = map(pairs, files)
    print(f'{len(train[0]):,} targets to train on, {len(val[0]):,} to validate with')
    for kind in ('uniform', 'unigram'):
        for k in (1, 100):
            found = losses(train, val, files[0].vocab_size, k, kind)
            print(f'{k:3} pseudo-counts, p {kind}: train {found[0]:.4f}, validation {found[1]:.4f}')
    with np.errstate(divide='ignore'):
        found = losses(train, val, files[0].vocab_size, 0, 'uniform')
    print(f'the frequencies themselves: train {found[0]:.4f}')
    if s.out_dir:
        model = load_model(s.out_dir, 'last')[0]
        print(f'{s.out_dir}: train {of_table(model, train):.4f}, validation {of_table(model, val):.4f}')


if __name__ == '__main__':
    run_main(main)
