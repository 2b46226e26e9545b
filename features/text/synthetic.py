"""
Text of known entropy, to see how close a model comes to the limit: a Markov chain over the letters a to z.

    python prepare.py synthetic:markov --tokenizer=char     # each letter depends on the one before it
    python prepare.py synthetic:markov2 --tokenizer=char    # on the two before it; up to markov3

After every letter the document ends with probability 1/200, and the next document does not depend on it. If
each letter is a token, the tokens, with the end-of-text token, are one Markov chain: no model of any size can
have a lower loss than its entropy rate.
"""
import os

import numpy as np

from checkpoint import replacing

SYMBOLS = 26
MEAN_LENGTH = 200  # letters of a document
DOCUMENTS = 50_000  # 10 MB of text
# Transitions are drawn from a Dirichlet distribution with this concentration: a few letters are likely after
# each context, 2.0 nats instead of the 3.3 of uniform letters
CONCENTRATION = 0.2
NAMES = {'synthetic:markov': 1, 'synthetic:markov2': 2, 'synthetic:markov3': 3}  # the order of the chain


def transitions(order, symbols=SYMBOLS):
    """
    The chain: p(letter | context), (contexts, symbols). A context is a number in base symbols + 1 whose
    digits are the last `order` tokens: 0 before the document begins, 1 for the first letter.
    """
    rng = np.random.default_rng([1337, order])
    return rng.dirichlet(np.full(symbols, CONCENTRATION), (symbols + 1) ** order)


def follow(context, letter, chain):
    """The context after `letter`; arrays of int64."""
    return (context * (chain.shape[1] + 1) + letter + 1) % len(chain)


def entropy_rate(chain, stop):
    """
    Nats per token of an endless stream of documents. stop: the probability that a document ends, before each
    of its letters except the first. It is the mean entropy of the next token over the stationary distribution
    of contexts.
    """
    contexts, letters = np.indices(chain.shape)
    after = follow(contexts, letters, chain)
    goes_on = np.where(np.arange(len(chain)) == 0, 1, 1 - stop)[:, None]
    share, before = np.eye(1, len(chain))[0], 0  # it begins at context 0
    while np.abs(share - before).max() > 1e-14:
        before = share
        share = np.bincount(after.ravel(), (share[:, None] * goes_on * chain).ravel(), len(chain))
        share[0] += 1 - share.sum()  # the documents that ended
        share = (share + before) / 2  # damped: a chain that alternates would not converge
    entropy = -(chain * np.log(np.where(chain > 0, chain, 1))).sum(1)
    ending = -stop * np.log(stop) - (1 - stop) * np.log(1 - stop)
    return float(share[0] * entropy[0] + share[1:] @ (ending + (1 - stop) * entropy[1:]))


def generate(chain, count, rng):
    """`count` documents, as strings, generated in parallel letter by letter."""
    lengths = rng.geometric(1 / MEAN_LENGTH, count)
    order = np.argsort(-lengths, kind='stable')  # the longest first: those that still grow are the first n
    cumulative, context = chain.cumsum(1)[:, :-1], np.zeros(count, np.int64)
    letters = np.zeros((count, lengths.max()), np.uint8)
    for t in range(lengths.max()):
        n = np.count_nonzero(lengths > t)
        drawn = (cumulative[context[:n]] < rng.random((n, 1))).sum(1)
        letters[:n, t] = ord('a') + drawn
        context[:n] = follow(context[:n], drawn, chain)
    place = np.argsort(order)  # back to the order in which they were drawn, so that lengths come in no order
    return [letters[place[i], :lengths[i]].tobytes().decode() for i in range(count)]


def write_text(name):
    """The path of the text of a named source. It is written if it is not there, always the same."""
    path = os.path.join('data', 'downloads', 'synthetic', name.removeprefix('synthetic:') + '.txt')
    if not os.path.exists(path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        chain, rng = transitions(NAMES[name]), np.random.default_rng(1337)
        with replacing(path, suffix=f'.{os.getpid()}') as f:  # other processes may be making it too
            for _ in range(DOCUMENTS // 5000):
                f.writelines(text + '\n<|endoftext|>\n' for text in generate(chain, 5000, rng))
    return path


def entropy_of(sources, tokenizer):
    """{'entropy': nats per token} if each token is a letter of one synthetic source, else {}."""
    if len(sources) != 1 or sources[0] not in NAMES or tokenizer not in ('char', 'byte'):
        return {}
    return {'entropy': entropy_rate(transitions(NAMES[sources[0]]), 1 / MEAN_LENGTH)}
