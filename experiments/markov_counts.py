"""
What does counting say of a data set's documents, each after its start token? It is the oracle of a full
Markov table. The rows of the counted table are (counts + k·p)/(n + k), for k pseudo-counts of a uniform p or
of the unigrams'.

    python experiments/markov_counts.py --dataset=pubmed --out_dir=out/markov_pubmed
"""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
import features  # noqa: I001 — first: your random.py or data/ then hides no module of ours or of a library
if __name__ == '__main__':
    features.start(__file__)

from dataclasses import dataclass

import numpy as np
import torch

from batches import TokenFiles, find_folder, start_token
from configurator import FilePath, configure, run_main
from features.markov.ngrams import look_up
from features.networks import load_model

PAIRS = 2 ** 15  # per batch


@dataclass
class Settings:
    dataset: FilePath = 'pubmed'  # name under data/, or a folder
    out_dir: FilePath = ''  # run of a trained table to compare with, on the same targets


def pairs(files):
    """(previous tokens, following tokens) of all documents, each after the start token, both int64 (N,)."""
    begin = start_token(files.meta)
    previous = []
    following = []
    for number in range(files.documents):
        start, end = files.document(number)
        document = np.append(begin, files.read(start, end - start))
        previous.append(document[:-1])
        following.append(document[1:])
    return np.concatenate(previous), np.concatenate(following)


def losses(train, val, vocab_size, k, kind):
    """
    [nats per token of `train`, of `val`], both as pairs() returns them, by the counts of `train` with k
    pseudo-counts of a 'uniform' or 'unigram' distribution.
    """
    previous, following = train
    keys, counts = np.unique(previous * vocab_size + following, return_counts=True)
    seen = np.bincount(previous, minlength=vocab_size)
    if kind == 'unigram':
        p = (np.bincount(following, minlength=vocab_size) + 1) / (len(following) + vocab_size)
    else:
        p = np.full(vocab_size, 1 / vocab_size)
    out = []
    for before, after in (train, val):
        place, known = look_up(keys, before * vocab_size + after)
        count = np.where(known, counts[place], 0)
        out.append(-np.log((count + k * p[after]) / (seen[before] + k)).mean())
    return out


@torch.no_grad()
def loss_of_table(model, split):
    """Nats per token of a split's pairs by a model.Markov with a full table."""
    previous, following = (torch.from_numpy(tokens) for tokens in split)
    nats = 0.0
    for n in range(0, len(previous), PAIRS):
        x = previous[None, n:n + PAIRS]  # (1, T)
        y = following[None, n:n + PAIRS]
        nats += model(x, y, reduction='sum').item()
    return nats / len(previous)


def main():
    s = configure(Settings)
    folder = find_folder(s.dataset)
    files = TokenFiles(folder, 'train')
    train = pairs(files)
    val = pairs(TokenFiles(folder, 'val'))
    print(f'{len(train[0]):,} targets to train on, {len(val[0]):,} to validate with')
    for kind in ('uniform', 'unigram'):
        for k in (1, 100):
            train_loss, val_loss = losses(train, val, files.vocab_size, k, kind)
            print(f'{k:3} pseudo-counts, p {kind}: train {train_loss:.4f}, validation {val_loss:.4f}')
    with np.errstate(divide='ignore'):
        train_loss, _ = losses(train, val, files.vocab_size, 0, 'uniform')
    print(f'the frequencies themselves: train {train_loss:.4f}')
    if s.out_dir:
        model, _ = load_model(s.out_dir, 'last')
        print(f'{s.out_dir}: train {loss_of_table(model, train):.4f}, '
              f'validation {loss_of_table(model, val):.4f}')


if __name__ == '__main__':
    run_main(main)
