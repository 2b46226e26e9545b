"""
Language models in closed form: counts of the training tokens, a few lines of numpy each.

    # (len(val) - 1,): loss of each token after the first
    nats = kneser_ney(train, val, vocab_size, order=5)
    # smoothing chosen on a slice of `train`
    nats, k = tuned(interpolated_bigram, train, val, vocab_size)

`train` and `tokens` are streams, (N,) int64, in which the end-of-text token is one like the others. Every
model gives every token of the vocabulary a probability after any context, seen or not, and they sum to one.
There is no loop over tokens: n-grams are counted by sorting.
"""
import numpy as np

SMOOTHING = 2.0 ** np.arange(-14, 15)  # the values from which k is chosen
HELD_OUT = 10  # k is chosen on the last tenth of the training tokens, never on those to be predicted

# -----------------------------------------------------------------------------
# Counts of one token and of two. Each function returns the nats, (len(tokens) - 1,), as a function of its
# smoothing k

def unigram(train, tokens, vocab_size):
    """p(a) = (c[a] + k) / (N + k V)"""
    count = np.bincount(train, minlength=vocab_size)[tokens[1:]]
    return lambda k: -np.log((count + k) / (len(train) + k * vocab_size))


def bigram(train, tokens, vocab_size):
    """p(a|b) = (c[b,a] + k) / (c[b] + k V)"""
    pair, first = pair_counts(train, tokens, vocab_size)
    return lambda k: -np.log((pair + k) / (first + k * vocab_size))


def interpolated_bigram(train, tokens, vocab_size):
    """
    p(a|b) = (c[b,a] + k p(a)) / (c[b] + k): as if b had been seen k more times, each followed by a token of
    the unigram model (MacKay & Peto 1995).
    """
    pair, first = pair_counts(train, tokens, vocab_size)
    nats, _ = tuned(unigram, train, tokens, vocab_size)
    p = np.exp(-nats)
    return lambda k: -np.log((pair + k * p) / (first + k))


def pair_counts(train, tokens, vocab_size):
    """
    (c[b,a], c[b]) for every pair b, a of neighbours in `tokens`, both (len(tokens) - 1,): how often the pair,
    and b with any successor, occurs in `train`.
    """
    keys, counts = np.unique(train[:-1] * vocab_size + train[1:], return_counts=True)
    place, seen = look_up(keys, tokens[:-1] * vocab_size + tokens[1:])
    pair = np.where(seen, counts[place], 0)
    first = np.bincount(train[:-1], minlength=vocab_size)[tokens[:-1]]
    return pair, first


def look_up(keys, wanted):
    """(places of `wanted` in the sorted `keys`, whether they are there), both of the shape of `wanted`."""
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return place, keys[place] == wanted


def tuned(model, train, tokens, vocab_size):
    """
    (nats of `tokens`, k) of one of the models above: k predicts the last tenth of `train` best from the rest;
    then all of `train` is counted.
    """
    cut = len(train) - max(1, len(train) // HELD_OUT)
    nats = model(train[:cut], train[cut - 1:], vocab_size)
    k = float(min(SMOOTHING, key=lambda k: nats(k).mean()))
    return model(train, tokens, vocab_size)(k), k


# -----------------------------------------------------------------------------
# A bigram of low rank

def low_rank_bigrams(train, tokens, vocab_size, k, ranks):
    """
    {rank: nats} of bigrams of low rank, from the SVD of the counts.

    The interpolated bigram is softmax over a of log p(a) + M[b,a], with M[b,a] = log(1 + c[b,a] / (k p(a))).
    Of M only the best approximation of a rank is kept; an error weighs c[b] p(a), as it does in the loss to
    first order. This holds several V x V tables: for V up to 8,192.
    """
    first = np.bincount(train[:-1], minlength=vocab_size)
    p = np.bincount(train, minlength=vocab_size) + 1.0
    p /= p.sum()
    count = np.bincount(train[:-1] * vocab_size + train[1:], minlength=vocab_size ** 2)
    count = count.reshape(vocab_size, vocab_size)  # (V, V)
    rows = np.sqrt(first + 1).astype(np.float32)[:, None]  # (V, 1)
    columns = np.sqrt(p).astype(np.float32)  # (V,)
    M = np.log1p(count / (k * p)).astype(np.float32) * rows * columns

    # randomised SVD (Halko et al. 2011, arXiv 0909.4061): M times a few random vectors spans its first
    # directions
    width = min(vocab_size, max(ranks) + 32)
    Q = np.random.default_rng(0).standard_normal((vocab_size, width), np.float32)
    for _ in range(2):
        Q = np.linalg.qr(M @ Q)[0]
        Q = np.linalg.qr(M.T @ Q)[0]
    Q = np.linalg.qr(M @ Q)[0]  # (V, width)
    U, S, W = np.linalg.svd(Q.T @ M, full_matrices=False)
    left = Q @ U * S / rows  # (V, width)
    right = W / columns  # (width, V)
    out = {}
    for rank in ranks:
        logits = left[:, :rank] @ right[:rank] + np.log(p).astype(np.float32)  # (V, V)
        top = logits.max(1)
        total = np.log(np.exp(logits - top[:, None]).sum(1)) + top  # (V,)
        nats = total[tokens[:-1]] - logits[tokens[:-1], tokens[1:]]
        out[rank] = nats.astype(np.float64)
    return out


# -----------------------------------------------------------------------------
# Kneser–Ney

def kneser_ney(train, tokens, vocab_size, order):
    """
    Nats, (len(tokens) - 1,), of interpolated Kneser–Ney with n-grams of `order` tokens and three discounts
    (Chen & Goodman 1998, TR-10-98, "modified"). Every count gives up a discount, which the next shorter
    context distributes. A shorter context does not count how often a token follows it, but after how many
    different tokens they do.
    """
    # shortest: uniform; a single context, the empty one, whose number is 0
    p = 1 / vocab_size
    number = np.zeros(len(tokens), np.int64)  # of the context before each token, -1 where it was never seen
    contexts = 1
    for keys, counts in count_ngrams(train, vocab_size, order):
        discount = discounts(counts)[np.minimum(counts, 3)]
        context = keys // vocab_size
        total = np.bincount(context, counts, minlength=contexts)
        # mass that a context gives to the shorter one
        given = np.bincount(context, discount, minlength=contexts)
        place, seen = look_up(keys, number * vocab_size + tokens)
        known = (number >= 0) & (total[number] > 0)
        longer = seen * (counts - discount)[place] + given[number] * p
        p = np.where(known, longer / np.where(known, total[number], 1), p)
        # the n-gram that ends at a token is the next one's context
        number = np.append(-1, np.where(seen, place, -1)[:-1])
        contexts = len(keys)
    return -np.log(p[1:])


def count_ngrams(train, vocab_size, order):
    """
    [(keys, counts)] of the distinct n-grams of every order up to `order`. A key is (number of its context) *
    V + (its last token), and the number of an n-gram is its place among the sorted keys: so it fits 64 bits
    whatever the order. The highest order counts occurrences, the others the different tokens before.
    """
    number = train
    keys = np.arange(vocab_size)
    counts = np.bincount(train, minlength=vocab_size)
    out = []
    for n in range(2, min(order, len(train)) + 1):
        longer, place, longer_number, longer_counts = np.unique(
            number[:-1] * vocab_size + train[n - 1:], return_index=True, return_inverse=True,
            return_counts=True)
        # number[place + 1]: `longer` without its first token
        before = np.bincount(number[place + 1], minlength=len(keys))
        out.append((keys, before))
        number = longer_number
        keys = longer
        counts = longer_counts
    out.append((keys, counts))
    return out


def discounts(counts):
    """
    The discounts, (4,), of n-grams that were counted 0, 1, 2, 3 or more times, from how many were counted 1,
    2, 3 and 4 times: equation (26) of Chen & Goodman.
    """
    n1, n2, n3, n4 = (np.count_nonzero(counts == n) for n in (1, 2, 3, 4))
    if min(n1, n2, n3, n4) == 0:
        return np.array([0, 0.5, 1, 1.5])  # too few n-grams for an estimate
    y = n1 / (n1 + 2 * n2)
    return np.clip([0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3], 0, [0, 1, 2, 3])
