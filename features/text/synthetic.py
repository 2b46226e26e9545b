"""
Text of known entropy: a Markov chain over the letters a to z, to see how close a model comes to the limit.

    python prepare.py synthetic:markov --tokenizer=char     # each letter depends on the one before it
    python prepare.py synthetic:markov2 --tokenizer=char    # on the two before it; up to markov3

After every letter the document ends with probability 1/200, whatever was written, and the next one begins afresh: with a token a letter, the
tokens are one Markov chain, end-of-text included, and no model of whatever size can be better than its entropy rate.
"""
import os

import numpy as np

from checkpoint import replacing

SYMBOLS = 26
MEAN_LENGTH = 200  # letters of a document
DOCUMENTS = 50_000  # 10 MB of text
CONCENTRATION = 0.2  # of the Dirichlet that transitions are drawn from: a few likely letters after each context, 2.0 nats where uniform has 3.3
NAMES = {'synthetic:markov': 1, 'synthetic:markov2': 2, 'synthetic:markov3': 3}  # the order of the chain


def transitions(order, symbols=SYMBOLS):
    """
    The chain: p(letter | context), (contexts, symbols). A context is the last `order` tokens as the digits of a number of base symbols + 1, 0 where
    the document had not begun, letters from 1 on.
    """
    return np.random.default_rng([1337, order]).dirichlet(np.full(symbols, CONCENTRATION), (symbols + 1) ** order)


def follow(context, letter, chain):
    """The context after `letter`, for arrays."""
    return (context * (chain.shape[1] + 1) + letter + 1) % len(chain)


def entropy_rate(chain, stop):
    """
    Nats per token of the endless stream of documents, each letter but for the first of a document preceded by a chance `stop` of its end. The
    mean entropy of what follows a context, over the stationary distribution: a vector that a step of the chain leaves as it is.
    """
    contexts, letters = np.indices(chain.shape)
    after, goes_on = follow(contexts, letters, chain), np.where(np.arange(len(chain)) == 0, 1, 1 - stop)[:, None]
    share, before = np.eye(1, len(chain))[0], 0  # begins at context 0, and visits only what can happen
    while np.abs(share - before).max() > 1e-14:
        before = share
        share = np.bincount(after.ravel(), (share[:, None] * goes_on * chain).ravel(), len(chain))
        share[0] += 1 - share.sum()  # the documents that ended
        share = (share + before) / 2  # the same fixed point; damped, or a chain that alternates would never come to rest
    entropy = -(chain * np.log(np.where(chain > 0, chain, 1))).sum(1)
    ending = -stop * np.log(stop) - (1 - stop) * np.log(1 - stop)
    return float(share[0] * entropy[0] + share[1:] @ (ending + (1 - stop) * entropy[1:]))


def generate(chain, count, rng):
    """`count` documents, as strings: all of them grow at once, a letter at a time."""
    lengths = rng.geometric(1 / MEAN_LENGTH, count)
    order = np.argsort(-lengths, kind='stable')  # the longest first: those that still grow are the first n
    cumulative, context = chain.cumsum(1)[:, :-1], np.zeros(count, np.int64)
    letters = np.zeros((count, lengths.max()), np.uint8)
    for t in range(lengths.max()):
        n = np.count_nonzero(lengths > t)
        drawn = (cumulative[context[:n]] < rng.random((n, 1))).sum(1)
        letters[:n, t] = ord('a') + drawn
        context[:n] = follow(context[:n], drawn, chain)
    place = np.argsort(order)  # in the order they were drawn, or the last ones would all be short
    return [letters[place[i], :lengths[i]].tobytes().decode() for i in range(count)]


def write_text(name):
    """The path of a named source's text, written if it is not there: always the same."""
    path = os.path.join('data', 'downloads', 'synthetic', name.removeprefix('synthetic:') + '.txt')
    if not os.path.exists(path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        chain, rng = transitions(NAMES[name]), np.random.default_rng(1337)
        with replacing(path, suffix=f'.{os.getpid()}') as f:  # other processes may be making it too
            for _ in range(DOCUMENTS // 5000):
                f.writelines(text + '\n<|endoftext|>\n' for text in generate(chain, 5000, rng))
    return path


def entropy_of(sources, tokenizer):
    """{'entropy': nats per token} where a token is a letter of one synthetic source, else {}."""
    if len(sources) != 1 or sources[0] not in NAMES or tokenizer not in ('char', 'byte'):
        return {}
    return {'entropy': entropy_rate(transitions(NAMES[sources[0]]), 1 / MEAN_LENGTH)}
