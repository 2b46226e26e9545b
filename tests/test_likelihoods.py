"""
Log-likelihoods are those of lm-evaluation-harness on transformers' model, with and without a start token;
texts that begin alike are read once, and nothing else sees it.
"""
import json

import pytest
import tokenizers
import torch
import transformers
from test_hub import theirs

from features.study import harness
from features.study.likelihoods import Branch, rows_of, score
from features.study.tasks import encode_pair, score_text
from model import ModelConfig, Transformer
from sample import load

CPU = torch.device('cpu')
TEXTS = ['the cat sat on the mat', 'a dog, two dogs: three dogs?', 'so it goes — and it goes on'] * 20

# --- the oracle: lm-eval ---

# lm-eval fails where a context is a space alone; of requests that are the same text divided elsewhere, as
# ('', 'the cat sat') and ('the cat', ' sat'), it scores the wrong token (0.4.13)
REQUESTS = [('', 'a cat sat'), ('', 'a cats sat'), ('the cat', ' sat on it'), ('the cat', ' sat on a mat'),
            ('the cat', ' s'), ('the cat', ' t'), ('the cat ', 'sat'), ('the dog\n', 'sat'),
            ('so it goes on and on. ' * 12, ' the end'), ('so it goes on and on. ' * 12, ' the cat')]


def write_sentencepiece(folder):
    """A tokenizer that writes <s> before every text, as Llama's."""
    import sentencepiece
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_prefix=f'{folder}/tokenizer', vocab_size=100, model_type='bpe',
        byte_fallback=False, hard_vocab_limit=False, minloglevel=2)
    config = {'tokenizer_class': 'LlamaTokenizer', 'bos_token': '<s>', 'eos_token': '</s>',
              'unk_token': '<unk>', 'add_bos_token': True, 'legacy': False}
    (folder / 'tokenizer_config.json').write_text(json.dumps(config))
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folder)


def write_bytes(folder, start='', **names):
    """A byte-level BPE as GPT-2's; `start`: a token that a template writes before texts, as Llama 3's."""
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(TEXTS, vocab_size=280, special_tokens=['<|end|>', '<|begin|>'])
    if start:
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            f'{start} $A', special_tokens=[(start, tokenizer.token_to_id(start))])
    tokenizer.save(f'{folder}/tokenizer.json')
    config = {'tokenizer_class': 'PreTrainedTokenizerFast'} | names
    (folder / 'tokenizer_config.json').write_text(json.dumps(config))


FOLDERS = {
    'a sentencepiece file, <s> before texts': ('llama', write_sentencepiece, {}),
    'as GPT-2': ('gpt2', write_bytes, {'bos_token': '<|end|>', 'eos_token': '<|end|>'}),
    'as SmolLM2: a start token by name alone': (
        'llama', write_bytes, {'bos_token': '<|begin|>', 'eos_token': '<|end|>'}),
    'as Llama 3: a template': (
        'llama', write_bytes, {'start': '<|begin|>', 'bos_token': '<|begin|>', 'eos_token': '<|end|>'}),
    'no start token': ('llama', write_bytes, {'eos_token': '<|end|>'}),
}


@pytest.fixture(params=FOLDERS, scope='module')
def both(request, tmp_path_factory):
    """(lm-eval's model, our model, our tokenizer) of a folder."""
    pytest.importorskip('lm_eval')
    from lm_eval.models.huggingface import HFLM
    kind, write, options = FOLDERS[request.param]
    folder = tmp_path_factory.mktemp('folder')
    write(folder, **options)
    size = {'n_positions': 64} if kind == 'gpt2' else {'max_position_embeddings': 64}
    theirs(kind, vocab_size=300, **size).save_pretrained(folder)
    lm = HFLM(pretrained=str(folder), batch_size=2, device='cpu', dtype='float32')
    return lm, *load(f'hf:{folder}')


def instances(kind, arguments):
    from lm_eval.api.instance import Instance
    return [Instance(kind, {}, given, n) for n, given in enumerate(arguments)]


def harness_model(model, tokenizer, monkeypatch):
    """Our model as eval.py harness hands it to lm-eval."""
    import lm_eval
    monkeypatch.setattr(lm_eval, 'simple_evaluate', lambda model, **_: model)
    monkeypatch.setattr('lm_eval.tasks.TaskManager', lambda include_path: None)  # reads all tasks: 10 seconds
    return harness.evaluate(model, tokenizer, [], 0, 0, CPU, 'float32')


def test_log_likelihoods_are_those_of_lm_eval(both, monkeypatch):
    lm, model, tokenizer = both
    wanted = lm.loglikelihood(instances('loglikelihood', REQUESTS), disable_tqdm=True)
    found = score(model, [encode_pair(tokenizer, *pair) for pair in REQUESTS], CPU, 'float32')
    ours = harness_model(model, tokenizer, monkeypatch)
    by_harness = ours.loglikelihood(instances('loglikelihood', REQUESTS), disable_tqdm=True)
    for a, b, c in zip(wanted, found, by_harness, strict=True):
        assert b[0] == pytest.approx(a[0], abs=1e-4) and c[0] == pytest.approx(a[0], abs=1e-4)
        assert a[1] == b[1] == c[1]


def test_rolling_log_likelihoods_are_those_of_lm_eval(both, monkeypatch):
    """Also of texts longer than the context, and where the tokenizer's start token is predicted itself."""
    lm, model, tokenizer = both
    texts = [('the cat sat',), ('so it goes, and it goes on. ' * 20,)]
    wanted = lm.loglikelihood_rolling(instances('loglikelihood_rolling', texts), disable_tqdm=True)
    found = [-score_text(model, tokenizer, text, 0, CPU, 'float32', rolling=True)[0] for text, in texts]
    assert found == pytest.approx(wanted, rel=1e-5)
    ours = harness_model(model, tokenizer, monkeypatch)
    by_harness = ours.loglikelihood_rolling(instances('loglikelihood_rolling', texts))
    assert by_harness == pytest.approx(wanted, rel=1e-5)
    plain = -score_text(model, tokenizer, texts[0][0], 64, CPU, 'float32')[0]
    has_start = bool(tokenizer.prompt_format.bos)
    assert (abs(plain - wanted[0]) > 0.1) == has_start


# --- rows with branches ---

PAIRS = [([1, 2, 3, 4], [5, 6]), ([1, 2, 3, 4], [7]), ([1, 2, 3, 4], [5, 8, 9]),  # choices after a context
         ([0], [11, 12, 13, 14, 15]), ([0], [11, 12, 13, 16, 15]),  # two sentences
         ([2, 3, 4], [1]), ([2, 3, 4], [2]),  # nothing but the context is read
         ([5, 6, 7, 8, 9, 1], [2]), ([5, 6, 7, 8, 9], [1]),  # one begins the other
         ([3], [9]), ([4, 4], [9, 9, 9])]


def branches_of(pairs):
    return [Branch(n, context + rest, len(rest)) for n, (context, rest) in enumerate(pairs)]


def small_model(**settings):
    torch.manual_seed(0)
    cfg = ModelConfig(vocab_size=20, block_size=16, n_layer=2, n_head=2, n_embd=16, zero_init=False,
                      **settings)
    return Transformer(cfg).eval()


@pytest.mark.parametrize('settings', [
    {}, {'position': 'learned', 'norm': 'layernorm', 'bias': True}, {'position': 'none'}, {'n_kv_head': 1},
    {'position': 'relative'}, {'window': 3}, {'window': 4, 'full_layers': [1], 'window_theta': 50.0},
    {'attn_softcap': 5.0, 'parallel': True}, {'value_residual': True, 'qk_norm': 'head'}], ids=str)
def test_pairs_that_begin_alike_have_the_scores_of_pairs_alone(settings):
    model = small_model(**settings)
    together = score(model, PAIRS, CPU, 'float32')
    for pair, (nats, greedy) in zip(PAIRS, together, strict=True):
        alone = score(model, [pair], CPU, 'float32')[0]
        assert nats == pytest.approx(alone[0], abs=1e-5) and greedy == alone[1]


def test_a_common_beginning_is_read_once():
    cfg = small_model().cfg
    rows = rows_of(branches_of(PAIRS), cfg)
    numbers = [[branch.number for branch in row.branches] for row in rows]
    assert numbers == [[0, 1, 2], [3, 4], [5, 6], [7, 8], [9], [10]]
    assert [row.size for row in rows] == [4 + 1 + 0 + 2, 4 + 1 + 1, 3, 6, 1, 4]
    for row in rows:
        ids, positions, owners = row.layout()
        assert len(ids) == len(positions) == len(owners) == row.size <= cfg.block_size
        for branch in row.branches:
            end = len(branch.ids) - 1
            assert [positions[place] for place in branch.places] == list(range(end - branch.length, end))
            assert [ids[place] for place in branch.places] == branch.ids[end - branch.length:end]
    many = [([1, 2, 3, 4, 5, 6, 7, 8], [n, n, n]) for n in range(10)]  # 10 tokens, and 2 for each other one
    found = [(len(row.branches), row.size) for row in rows_of(branches_of(many), cfg)]
    assert found == [(4, 16), (4, 16), (2, 12)]
    few = [([1, n, n, n], [n, n]) for n in range(2, 5)]  # one of five tokens in common: a row each
    assert len(rows_of(branches_of(few), cfg)) == 3
    assert len(rows_of(branches_of(PAIRS), small_model(position='relative').cfg)) == len(PAIRS)
