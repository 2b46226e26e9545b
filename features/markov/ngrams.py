"""
Language models in closed form: counts of the training tokens, a few lines of numpy each.

    nats = kneser_ney(train, val, vocab_size, order=5)             # (len(val) - 1,): what each token after the first costs, in nats
    nats, k = tuned(interpolated_bigram, train, val, vocab_size)   # smoothing chosen on a slice of `train`

`train` and `tokens` are streams, (N,) int64, in which the end-of-text token is one like the others. Every model gives every token of the
vocabulary a probability after any context, seen or not, and they sum to one. There is no loop over tokens: n-grams are counted by sorting.
"""
import numpy as np

SMOOTHING = 2.0 ** np.arange(-14, 15)  # what k is chosen from
HELD_OUT = 10  # k is chosen on the last tenth of the training tokens, never on those to be predicted


# -----------------------------------------------------------------------------
# Counts of one token and of two. Each function returns the nats as a function of its smoothing k

def unigram(train, tokens, vocab_size):
    """p(a) = (c[a] + k) / (N + k V)"""
    count = np.bincount(train, minlength=vocab_size)[tokens[1:]]
    return lambda k: -np.log((count + k) / (len(train) + k * vocab_size))


def bigram(train, tokens, vocab_size):
    """p(a|b) = (c[b,a] + k) / (c[b] + k V)"""
    pair, first = pair_counts(train, tokens, vocab_size)
    return lambda k: -np.log((pair + k) / (first + k * vocab_size))


def interpolated_bigram(train, tokens, vocab_size):
    """p(a|b) = (c[b,a] + k p(a)) / (c[b] + k): k more occurrences of b are imagined, followed by what the unigram expects (MacKay & Peto 1995)"""
    pair, first = pair_counts(train, tokens, vocab_size)
    p = np.exp(-tuned(unigram, train, tokens, vocab_size)[0])
    return lambda k: -np.log((pair + k * p) / (first + k))


def pair_counts(train, tokens, vocab_size):
    """(c[b,a], c[b]) for every pair b, a of neighbours in `tokens`: how often they, and b with any successor, are in `train`."""
    keys, counts = np.unique(train[:-1] * vocab_size + train[1:], return_counts=True)
    place, seen = look_up(keys, tokens[:-1] * vocab_size + tokens[1:])
    return np.where(seen, counts[place], 0), np.bincount(train[:-1], minlength=vocab_size)[tokens[:-1]]


def look_up(keys, wanted):
    """Where each of `wanted` is in the sorted `keys`, and whether it is there at all."""
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return place, keys[place] == wanted


def tuned(model, train, tokens, vocab_size):
    """(nats of `tokens`, k): k is what predicts the last tenth of `train` best from the rest; then all of `train` is counted."""
    cut = len(train) - max(1, len(train) // HELD_OUT)
    nats = model(train[:cut], train[cut - 1:], vocab_size)
    k = float(min(SMOOTHING, key=lambda k: nats(k).mean()))
    return model(train, tokens, vocab_size)(k), k


# -----------------------------------------------------------------------------
# A bigram of low rank

def low_rank_bigrams(train, tokens, vocab_size, k, ranks):
    """
    {rank: nats}. The interpolated bigram is softmax over a of log p(a) + M[b,a] with M[b,a] = log(1 + c[b,a] / (k p(a))); of M only the best
    approximation of a rank is kept, an error weighing c[b] p(a) as it does in the loss, to first order. Holds V x V numbers: for V up to 8,192.
    """
    first, p = np.bincount(train[:-1], minlength=vocab_size), np.bincount(train, minlength=vocab_size) + 1.0
    p /= p.sum()
    count = np.bincount(train[:-1] * vocab_size + train[1:], minlength=vocab_size ** 2).reshape(vocab_size, vocab_size)  # (V, V)
    rows, columns = np.sqrt(first + 1).astype(np.float32)[:, None], np.sqrt(p).astype(np.float32)
    M = np.log1p(count / (k * p)).astype(np.float32) * rows * columns
    # the randomised SVD of Halko et al. 2011 (arXiv 0909.4061): M times a few random vectors spans its first directions
    Q = np.random.default_rng(0).standard_normal((vocab_size, min(vocab_size, max(ranks) + 32)), np.float32)
    for _ in range(2):
        Q = np.linalg.qr(M.T @ np.linalg.qr(M @ Q)[0])[0]
    Q = np.linalg.qr(M @ Q)[0]  # (V, max rank + 32)
    U, S, W = np.linalg.svd(Q.T @ M, full_matrices=False)
    left, right, out = Q @ U * S / rows, W / columns, {}
    for rank in ranks:
        logits = left[:, :rank] @ right[:rank] + np.log(p).astype(np.float32)
        top = logits.max(1)
        total = np.log(np.exp(logits - top[:, None]).sum(1)) + top  # (V,)
        out[rank] = (total[tokens[:-1]] - logits[tokens[:-1], tokens[1:]]).astype(np.float64)
    return out


# -----------------------------------------------------------------------------
# Kneser–Ney

def kneser_ney(train, tokens, vocab_size, order):
    """
    Interpolated Kneser–Ney of n tokens with three discounts (Chen & Goodman 1998, TR-10-98, "modified"): every count gives up a discount, which
    the next shorter context distributes; a shorter context counts not how often a token follows it but after how many different tokens they do.
    """
    p, number = 1 / vocab_size, np.zeros(len(tokens), np.int64)  # shortest: uniform, and one context, the empty one, whose number is 0
    contexts = 1
    for keys, counts in count_ngrams(train, vocab_size, order):
        discount = discounts(counts)[np.minimum(counts, 3)]
        context = keys // vocab_size
        total = np.bincount(context, counts, minlength=contexts)
        given = np.bincount(context, discount, minlength=contexts)  # what the context gives to the shorter one
        # `number`: of the context before each token, -1 where it was never seen
        place, seen = look_up(keys, number * vocab_size + tokens)
        known = (number >= 0) & (total[number] > 0)
        p = np.where(known, (seen * (counts - discount)[place] + given[number] * p) / np.where(known, total[number], 1), p)
        number = np.append(-1, np.where(seen, place, -1)[:-1])  # the n-gram that ends at a token is the context of the next one
        contexts = len(keys)
    return -np.log(p[1:])


def count_ngrams(train, vocab_size, order):
    """
    [(keys, counts)] of the distinct n-grams of every order up to `order`. A key is (number of its context) * V + (its last token), and the number
    of an n-gram its place among the sorted keys: it fits 64 bits whatever the order. The highest order counts occurrences, the others the
    different tokens before.
    """
    number, keys, counts, out = train, np.arange(vocab_size), np.bincount(train, minlength=vocab_size), []
    for n in range(2, min(order, len(train)) + 1):
        longer, place, longer_number, longer_counts = np.unique(number[:-1] * vocab_size + train[n - 1:], return_index=True, return_inverse=True,
                                                                return_counts=True)
        out.append((keys, np.bincount(number[place + 1], minlength=len(keys))))  # number[place + 1]: the longer one without its first token
        number, keys, counts = longer_number, longer, longer_counts
    return [*out, (keys, counts)]


def discounts(counts):
    """What an n-gram counted 0, 1, 2, 3 or more times gives up, from how many were counted 1, 2, 3 and 4 times: equation (26) of Chen & Goodman."""
    n1, n2, n3, n4 = (np.count_nonzero(counts == n) for n in (1, 2, 3, 4))
    if min(n1, n2, n3, n4) == 0:
        return np.array([0, 0.5, 1, 1.5])  # too few n-grams to tell
    y = n1 / (n1 + 2 * n2)
    return np.clip([0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3], 0, [0, 1, 2, 3])
