"""Text of known entropy: what is stated is what was generated."""
from math import log

import numpy as np
import pytest
from conftest import one_line, run

import prepare
from batches import TokenFiles
from features.text import synthetic
from features.text.settings import TextConfig
from features.text.synthetic import entropy_rate, follow, generate, transitions


def test_the_entropy_of_a_chain_of_two_letters_by_hand():
    a, b, stop = 0.3, 0.2, 0.1  # a: from the first letter to the second, b: back; documents begin with either
    chain = np.array([[0.5, 0.5], [1 - a, a], [b, 1 - b]])

    def h(p):
        return -p * log(p) - (1 - p) * log(1 - p)
    # a token in 1 + 1/stop is the end of a document; the first letter's share x: x = x (1 - stop)(1 - a) + y
    # (1 - stop) b + end / 2
    end = 1 / (1 + 1 / stop)
    x = ((1 - end) * (1 - stop) * b + end / 2) / (1 - (1 - stop) * (1 - a - b))
    expected = (end * h(0.5) + x * (h(stop) + (1 - stop) * h(a))
                + (1 - end - x) * (h(stop) + (1 - stop) * h(b)))
    assert entropy_rate(chain, stop) == pytest.approx(expected, abs=1e-10)


def test_the_entropy_of_longer_contexts_solves_the_whole_chain():
    """Against a dense linear system over the contexts of two tokens, most of which go on in one way only."""
    stop, symbols = 0.2, 3
    chain = np.random.default_rng(0).dirichlet(np.ones(symbols), 16)
    P, h = np.zeros((16, 16)), np.zeros(16)
    for c in range(16):
        p = np.append(chain[c] * (1 - stop * (c > 0)), stop * (c > 0))
        for letter in range(symbols):
            P[c, (c * 4 + letter + 1) % 16] += p[letter]
        P[c, 0] += p[-1]
        h[c] = -sum(q * log(q) for q in p if q > 0)
    share = np.linalg.lstsq(np.vstack([P.T - np.eye(16), np.ones(16)]), np.append(np.zeros(16), 1),
                            rcond=None)[0]
    assert entropy_rate(chain, stop) == pytest.approx(share @ h, abs=1e-10)


@pytest.mark.parametrize('order', [1, 2])
def test_what_is_generated_costs_the_true_chain_the_entropy(order):
    """Within four standard errors over documents, well below one percent."""
    chain, stop = transitions(order), 1 / synthetic.MEAN_LENGTH
    nats, tokens = [], []
    for text in generate(chain, 2000, np.random.default_rng(0)):
        context, cost = 0, -log(stop) - (len(text) - 1) * log(1 - stop)
        for letter in text.encode():
            cost -= log(chain[context, letter - ord('a')])
            context = follow(context, letter - ord('a'), chain)
        nats.append(cost)
        tokens.append(len(text) + 1)
    nats, tokens, entropy = np.array(nats), np.array(tokens), entropy_rate(chain, stop)
    error = np.sqrt(((nats - entropy * tokens) ** 2).sum()) / tokens.sum()
    assert abs(nats.sum() / tokens.sum() - entropy) < 4 * error < 0.01 * entropy
    # lengths come in no order
    assert (abs(tokens.mean() - 1 / stop - 1) < 20
            and 0 < np.corrcoef(np.arange(2000), tokens)[0, 1] ** 2 < 0.01)
    assert entropy < 0.7 * log(synthetic.SYMBOLS)


def test_preparing_it_states_the_entropy_of_its_tokens(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(synthetic, 'DOCUMENTS', 5000)
    s = TextConfig(sources=['synthetic:markov2'], tokenizer='char', num_proc=1)
    out, meta, figures = prepare.prepare(s)
    prepare.summary(out, meta, figures)
    assert out == 'data/markov2' and meta['vocab_size'] == 27 and meta['split'] == 'document'
    assert meta['entropy'] == entropy_rate(transitions(2), 1 / 200)
    assert f'the entropy of the source is {meta["entropy"]:.4f} nats a token' in capsys.readouterr().out
    files = [TokenFiles(out, split) for split in ('train', 'val')]
    tokens = np.concatenate([f.read(0, f.tokens) for f in files])
    # a token a letter, and an end
    assert (len(tokens) == sum(f.bytes for f in files) + 5000
            and np.count_nonzero(tokens == meta['eot']) == 5000)
    bpe = TextConfig(sources=['synthetic:markov2'], tokenizer='bpe:300', out='data/bpe', num_proc=1)
    assert 'entropy' not in prepare.prepare(bpe)[1]  # of such tokens it is another one


def test_the_text_is_always_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(synthetic, 'DOCUMENTS', 5000)
    texts = []
    for name in ('a', 'b'):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        texts.append(open(synthetic.write_text('synthetic:markov'), encoding='utf-8').read())
    assert texts[0] == texts[1] and texts[0].count('<|endoftext|>') == 5000


def test_a_misspelt_one_is_one_line(tmp_path):
    assert ('did you mean synthetic:markov'
            in one_line(run('prepare.py', 'synthetic:markof', f'--out={tmp_path / "out"}')))
