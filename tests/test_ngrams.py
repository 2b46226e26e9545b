"""Models in closed form follow their formulas, and each is a distribution after any context."""
from collections import Counter, defaultdict
from math import log

import numpy as np
import pytest

from features.markov.ngrams import (
    bigram,
    count_ngrams,
    discounts,
    interpolated_bigram,
    kneser_ney,
    low_rank_bigrams,
    pair_counts,
    tuned,
    unigram,
)


def stream(length, vocab_size, seed=0):
    """Tokens that are not uniform, each depending a little on the one before."""
    rng, out = np.random.default_rng(seed), [0]
    for _ in range(length - 1):
        out.append(int((out[-1] + rng.geometric(0.4)) % vocab_size))
    return np.array(out)


MODELS = {
    'unigram': lambda train, tokens, V: unigram(train, tokens, V)(0.5),
    'bigram': lambda train, tokens, V: bigram(train, tokens, V)(0.5),
    'interpolated': lambda train, tokens, V: interpolated_bigram(train, tokens, V)(3.0),
    'low rank': lambda train, tokens, V: low_rank_bigrams(train, tokens, V, 3.0, [2])[2],
    'kn2': lambda train, tokens, V: kneser_ney(train, tokens, V, 2),
    'kn3': lambda train, tokens, V: kneser_ney(train, tokens, V, 3),
    'kn5': lambda train, tokens, V: kneser_ney(train, tokens, V, 5)}


@pytest.mark.parametrize('model', MODELS)
@pytest.mark.parametrize('length', [3, 60, 1000])
def test_probabilities_sum_to_one_after_any_context(model, length):
    """Every context of two tokens and some of four; one token of the vocabulary never occurs in training."""
    V, rng = 6, np.random.default_rng(1)
    train = stream(length, V - 1)
    contexts = [[a, b] for a in range(V) for b in range(V)] + rng.integers(0, V, (20, 4)).tolist()
    for context in contexts:
        p = [np.exp(-MODELS[model](train, np.array([*context, a]), V)[-1]) for a in range(V)]
        assert min(p) > 0 and sum(p) == pytest.approx(1, abs=1e-5 if model == 'low rank' else 1e-12), context


def test_values_by_hand():
    train, tokens, V = np.array([0, 1, 0, 1, 1, 2]), np.array([0, 1, 2, 0]), 4  # pairs: 01 twice, 10, 11, 12
    assert unigram(train, tokens, V)(1) == pytest.approx(-np.log([4 / 10, 2 / 10, 3 / 10]))
    assert bigram(train, tokens, V)(0.5) == pytest.approx(-np.log([2.5 / 4, 1.5 / 5, 0.5 / 2]))
    assert [list(counts) for counts in pair_counts(train, tokens, V)] == [[2, 1, 0], [2, 3, 0]]
    p = np.exp(-tuned(unigram, train, tokens, V)[0])
    assert (interpolated_bigram(train, tokens, V)(2)
            == pytest.approx(-np.log([(2 + 2 * p[0]) / 4, (1 + 2 * p[1]) / 5, p[2]])))


def test_smoothing_is_chosen_on_the_training_tokens():
    """k is chosen on the last tenth of them; the tokens to be predicted have no influence."""
    train, val = stream(2000, 20), stream(300, 20, seed=1)
    nats, k = tuned(bigram, train, val, 20)
    assert tuned(bigram, train, val[::-1], 20)[1] == k and list(nats) == list(bigram(train, val, 20)(k))
    cost = bigram(train[:1800], train[1799:], 20)
    assert cost(k).mean() <= min(cost(k / 2).mean(), cost(2 * k).mean())


def test_at_full_rank_the_low_rank_bigram_is_the_interpolated_one():
    V, train = 12, np.append(stream(3000, 12), np.arange(12))
    tokens = stream(500, V, seed=1)
    pair, first = pair_counts(train, tokens, V)
    p = (np.bincount(train, minlength=V) + 1) / (len(train) + V)
    by_rank = low_rank_bigrams(train, tokens, V, 3.0, [1, 4, 12])
    assert by_rank[12] == pytest.approx(-np.log((pair + 3 * p[tokens[1:]]) / (first + 3)), abs=1e-4)
    assert by_rank[1].mean() > by_rank[4].mean() > by_rank[12].mean()


# --- Kneser–Ney ---

def naive_kneser_ney(train, V, order):
    """p(token, context) by dictionaries and recursion, as the formulas are written."""
    train = [int(token) for token in train]
    seen = [None] + [{tuple(train[i:i + n]) for i in range(len(train) - n + 1)} for n in range(1, order + 1)]
    counts = [None] * (order + 1)
    counts[order] = Counter(tuple(train[i:i + order]) for i in range(len(train) - order + 1))
    for n in range(1, order):
        counts[n] = Counter(gram[1:] for gram in seen[n + 1])
    contexts = [None] + [defaultdict(dict) for _ in range(order)]
    discount = [None]
    for n in range(1, order + 1):
        for gram, count in counts[n].items():
            contexts[n][gram[:-1]][gram[-1]] = count
        n1, n2, n3, n4 = (list(counts[n].values()).count(m) for m in (1, 2, 3, 4))
        y = n1 / (n1 + 2 * n2) if n1 else 0
        discount.append([0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3]
                        if min(n1, n2, n3, n4) else [0, 0.5, 1, 1.5])

    def p(token, context):
        n, after = len(context) + 1, contexts[len(context) + 1].get(context, {})
        shorter = p(token, context[1:]) if context else 1 / V
        if not after:
            return shorter
        give = sum(discount[n][min(count, 3)] for count in after.values())
        count = after.get(token, 0)
        return (count - discount[n][min(count, 3)] + give * shorter) / sum(after.values())
    return p


@pytest.mark.parametrize('order', [2, 3, 5])
@pytest.mark.parametrize('length', [40, 3000])
def test_kneser_ney_is_what_dictionaries_compute(order, length):
    V, train, tokens = 30, stream(length, 29), np.append(stream(200, 29, seed=1), [29, 29, 3, 4])
    p = naive_kneser_ney(train, V, order)
    expected = [-log(p(int(tokens[i]), tuple(int(token) for token in tokens[max(0, i - order + 1):i])))
                for i in range(1, len(tokens))]
    assert kneser_ney(train, tokens, V, order) == pytest.approx(np.array(expected), rel=1e-9)
    if length == 3000 and order == 3:  # the discounts are estimates, not the fallback
        assert list(discounts(count_ngrams(train, V, order)[-1][1])) != [0, 0.5, 1, 1.5]


def test_discounts_by_hand():
    counts = [1] * 8 + [2] * 4 + [3] * 2 + [4] * 1 + [9]
    assert (discounts(np.array(counts))
            == pytest.approx([0, 1 - 2 * 0.5 * 4 / 8, 2 - 3 * 0.5 * 2 / 4, 3 - 4 * 0.5 * 1 / 2]))
    assert list(discounts(np.array([1, 1, 2]))) == [0, 0.5, 1, 1.5]


def test_longer_contexts_help_and_large_vocabularies_fit_the_keys():
    V = 2 ** 16
    period = np.random.default_rng(0).integers(0, V, 400)
    train = np.concatenate([np.tile(period, 20), np.random.default_rng(1).integers(0, V, 4000), [V - 1] * 8])
    losses = [kneser_ney(train, np.append(period, V - 1), V, order).mean() for order in (2, 3, 5)]
    assert max(losses) < 0.3 and all(keys.min() >= 0 for keys, _ in count_ngrams(train, V, 5))
