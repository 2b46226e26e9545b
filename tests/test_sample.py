"""
Text out of a checkpoint: cached = uncached, batched = one by one, every knob does what it says, a character
is never cut.
"""
import collections
import fcntl
import hashlib
import io
import json
import os
import pty
import random
import re
import subprocess
import sys
import termios
from contextlib import suppress

import pytest
import torch
from conftest import ROOT, one_line, run, train
from hypothesis import example, given, settings
from hypothesis import strategies as some
from test_export import written

import checkpoint
import configurator
import model as network
import sample
from batches import TokenFiles, read_meta
from configurator import UserError
from features import build, compiled
from features.bpe import train_bpe
from features.hf.tokenizer_json import JsonTokenizer, to_json
from features.interactive import converse
from features.lora import packed
from features.lora.packed import Int4, Packed, has_onednn, pack
from features.lora.sampling import add_adapters
from features.study import tasks
from features.t5.beams import beam_search
from features.text.settings import TextConfig
from model import ModelConfig, make_model
from prepare import prepare
from sample import KVCache, NotFinite, Row, draw, encode_prompt, generate, load, step, stream
from tokenizer import EOT, CharTokenizer, PromptFormat, new_tokenizer


def model(**settings):
    torch.manual_seed(0)
    model = make_model(build(ModelConfig, **{'vocab_size': 257, 'block_size': 24, 'n_layer': 2, 'n_head': 4,
                                             'n_embd': 32} | settings))
    for p in model.parameters():
        if p.ndim == 2:
            torch.nn.init.normal_(p, std=0.3)
    return model.eval()


def tokens(model, prompts, n, **options):
    return torch.stack(list(generate(model, prompts, n, **options)), dim=1)


# --- the cache ---

@pytest.mark.parametrize('settings', [dict(), dict(position='learned', qk_norm=False),
                                      dict(n_kv_head=2, softcap=5.0), dict(n_kv_head=1, position='none'),
                                      dict(rank_qk=8, rank_head=16, tie=False),
                                      dict(window=5, full_layers=[1], window_theta=50.0),
                                      dict(window=5, position='learned'), dict(window=99)], ids=str)
def test_greedy_cached_is_uncached_token_for_token_also_far_beyond_the_context(settings):
    m, prompts = model(**settings), [[1, 2, 3], [7, 8, 9]]
    cached, uncached = (tokens(m, prompts, 100, temperature=0, use_cache=use) for use in (True, False))
    assert torch.equal(cached, uncached) and len(cached.unique()) > 5


def test_a_cache_holds_one_dtype_where_autocast_has_norms_in_float32(monkeypatch):
    """As on GPUs since torch 2.13."""
    rms_norm = torch.nn.functional.rms_norm
    monkeypatch.setattr(torch.nn.functional, 'rms_norm',
                        lambda x, shape, weight=None, eps=None: rms_norm(x.float(), shape, weight, eps))
    with torch.autocast('cpu', torch.bfloat16):
        assert tokens(model(), [[1, 2, 3]], 30, temperature=0).shape == (1, 30)


@pytest.mark.parametrize('settings', [
    dict(n_kv_head=2, softcap=5.0), dict(position='learned', qk_norm=False, bias=True, norm='layernorm'),
    dict(window=7, full_layers=[0], window_theta=50.0, attn_softcap=5.0, embed_scale=2.0, parallel=True),
    dict(position='none', rank_qk=8, rank_mlp=8, rank_embed=16, rank_head=16)], ids=str)
def test_compiled_decoding_is_uncached_token_for_token_also_far_beyond_the_context(settings):
    prompts = [[1, 2, 3], [7, 8, 9, 4, 2]]
    uncached = tokens(model(**settings), prompts, 60, temperature=0, use_cache=False)
    compiled = tokens(pack(model(**settings), 'float32'), prompts, 60, temperature=0, compile=True)
    assert torch.equal(compiled, uncached) and len(uncached.unique()) > 5


def test_one_graph_is_compiled_whatever_the_lengths():
    torch._dynamo.reset()
    counts, m = torch._dynamo.utils.counters, pack(model(n_layer=1), 'float32')
    counts.clear()
    for prompt, n in (([1, 2, 3], 5), ([4], 9), ([5] * 9, 40)):
        tokens(m, [prompt], n, temperature=0, compile=True)
    assert counts['stats']['unique_graphs'] == 1 and not counts['graph_break']


def test_guards_are_skipped_while_one_text_is_written_and_no_other_is_begun():
    """Two texts of two models in turns: neither may run the graph of the other."""
    models = [pack(model(n_layer=1, mlp=mlp), 'float32') for mlp in ('gelu', 'relu2')]
    alone = [tokens(m, [[1, 2, 3]], 12, temperature=0, compile=True) for m in models]
    assert not torch.equal(*alone)
    texts = [generate(m, [[1, 2, 3]], 12, temperature=0, compile=True) for m in models]
    turns = [torch.stack(column, dim=1) for column in zip(*zip(*texts))]
    assert all(torch.equal(*pair) for pair in zip(turns, alone))


def test_guards_are_run_at_the_first_step_alone(monkeypatch):
    skipped = []

    def graph_of(step, device_type):
        skipped.append(torch._dynamo.eval_frame._stance.skip_guard_eval_unsafe)
        return step
    monkeypatch.setattr(compiled, 'graph_of', graph_of)
    m = model(n_layer=1)
    for _ in range(2):
        tokens(m, [[1, 2, 3]], 5, temperature=0, compile=True)
    assert skipped == 2 * [False, True, True, True]


def test_a_compiled_step_reads_a_cache_of_the_length_of_the_text(monkeypatch):
    """A text of 200 tokens must not cost what one of 8,192 does."""
    sizes = []
    monkeypatch.setattr(sample, 'KVCache',
                        lambda model, size, compile: sizes.append(size) or KVCache(model, size))
    for context, prompt, n in ((24, 3, 5), (600, 3, 5), (600, 3, 253), (600, 3, 254), (600, 500, 500)):
        m = model(n_layer=1, block_size=context)
        next(generate(m, [[1] * prompt], n, temperature=0, compile=True))
    assert sizes == [24, 256, 256, 512, 600]


def test_what_the_mask_hides_changes_nothing():
    m, x = model(), torch.tensor([[1, 2, 3, 4, 5]])
    caches = [KVCache(m, 5), KVCache(m, 24, compile=True)]
    for cache in caches:
        cache.extend(4)
        step(m, x[:, :4], cache)
        cache.extend(1)
    assert [cache.used for cache in caches] == [5, 24]
    assert torch.allclose(*(step(m, x[:, 4:], cache) for cache in caches), atol=1e-5)


def test_when_the_context_is_full_the_newer_half_is_read_afresh():
    m, prompt = model(), list(range(1, 21))
    out = prompt + tokens(m, [prompt], 30, temperature=0)[0].tolist()
    start = 0
    # the same thing said plainly: the whole window through the network for every token
    for end in range(20, 50):
        if end - start > 24:
            start = end - 12
        assert m(torch.tensor([out[start:end]]))[0, -1].argmax() == out[end]


def rounded(numbers):
    """Whether float32 numbers have been in bfloat16."""
    return numbers.dtype == torch.float32 and torch.equal(numbers, numbers.bfloat16().float())


@pytest.mark.parametrize('heads, T, softcap', [((6, 2), 300, 0.0), ((2, 2), 128, 5.0), ((3, 1), 5, 0.0)])
def test_a_prompt_is_attended_in_parts(heads, T, softcap):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, n, T, 16).bfloat16().float() for n in (heads[0], heads[1], heads[1]))
    whole = network.attend(q, k, v, None, True, 0.0, softcap)
    assert torch.equal(packed.attend_prompt(q, k, v, None, True, 0.0, softcap), whole)  # with gradients
    with torch.no_grad():
        parts = packed.attend_prompt(q, k, v, None, True, 0.0, softcap)
    assert rounded(parts) and (parts - whole).norm() < 0.01 * whole.norm()


def test_a_packed_model_attends_a_prompt_in_bfloat16_and_keeps_its_cache_in_float32():
    m, prompt = model(block_size=400, n_kv_head=2), torch.tensor([[n % 250 for n in range(300)]])
    plain = m(prompt)[0, -1]
    pack(m, 'bfloat16')
    cache, seen = KVCache(m, 310), []
    for block in m.blocks:
        block.attn.o.register_forward_pre_hook(lambda layer, args: seen.append(rounded(*args)))
    with torch.no_grad():
        cache.extend(300)
        assert (step(m, prompt, cache)[0] - plain).norm() < 0.05 * plain.norm()
        cache.extend(1)
        step(m, prompt[:, :1], cache)
    assert seen == [True, True, False, False] and cache.buffers[0][0].dtype == torch.float32


# --- batches ---

def test_a_batch_of_prompts_of_different_lengths_is_one_by_one():
    m, prompts = model(block_size=64), [[1, 2, 3, 4, 5, 6, 7], [9], [5, 5, 5]]
    together = tokens(m, prompts, 12, temperature=0)
    for row, prompt in enumerate(prompts):
        alone = tokens(m, [prompt], 12, temperature=0)[0]
        assert torch.equal(together[row][together[row] >= 0], alone)


def test_a_row_ends_with_the_end_of_text_token():
    m = model()
    plain = tokens(m, [[1], [2]], 40, temperature=0)
    eot = int(plain[0, 4])
    out = tokens(m, [[1], [2]], 40, temperature=0, eot=eot)
    first = plain[0].tolist().index(eot)
    assert out[0, :first].tolist() == plain[0, :first].tolist() and (out[0, first:] == -1).all()


def test_the_seed_decides():
    m = model()

    def text(seed):
        return tokens(m, [[1, 2]], 30, generator=torch.Generator().manual_seed(seed)).tolist()
    assert text(1) == text(1) != text(2)


# --- packed weights ---

@pytest.mark.parametrize('options, error', [(dict(dtype='float32'), 1e-5), (dict(dtype='bfloat16'), 0.03),
                                            (dict(dtype='float32', kind='int8'), 0.05),
                                            (dict(kind='int4'), 0.5)], ids=str)
@pytest.mark.parametrize('settings', [dict(), dict(rank_qk=8, rank_embed=16, rank_head=16, bias=True),
                                      dict(tie=False, mlp='swiglu')], ids=str)
def test_a_packed_model_says_what_it_said_before_up_to_rounding(settings, options, error):
    x = torch.arange(20)[None]
    before, after = model(**settings)(x), pack(model(**settings), **options)(x)
    assert ((after - before).norm() / before.norm()) < error


@pytest.mark.parametrize('dtype, kind', [('float32', 'float32'), ('bfloat16', 'bfloat16'),
                                         ('bfloat16', 'int8'), ('float32', 'int8')])
@pytest.mark.parametrize('n_in', [64, 33])
@pytest.mark.parametrize('rows', [1, 3, 50])
def test_a_layer_that_is_not_compiled_multiplies_by_its_weights(dtype, kind, n_in, rows):
    torch.manual_seed(0)
    dense, bias, x = torch.randn(7, n_in), torch.randn(7), torch.randn(rows, 1, n_in)
    for layer in (Packed(dense, bias, dtype, kind), Packed(dense, bias, dtype, kind, eager=True)):
        plain = torch.nn.functional.linear(x, layer.weight, bias)
        assert ((layer.weight - dense).norm() / dense.norm()) < 0.01
        error = 1e-5 if dtype == 'float32' else 0.01
        with torch.no_grad():
            y = layer(x)
        assert y.shape == (rows, 1, 7) and y.dtype == torch.float32
        assert (y - plain).norm() / plain.norm() < error
        assert (layer(x) - plain).norm() / plain.norm() < error  # with gradients
    assert layer.is_blocked == (kind != 'int8' and has_onednn(getattr(torch, kind)))


@pytest.mark.parametrize('settings', [dict(n_kv_head=2, tie=False, mlp='swiglu', bias=True),
                                      dict(rank_qk=8, rank_mlp=8, rank_embed=16, rank_head=16)], ids=str)
def test_a_model_packed_for_eager_decoding_writes_what_it_wrote(settings):
    prompts = [[1, 2, 3], [7, 8, 9, 4, 2]]
    plain = tokens(model(**settings), prompts, 60, temperature=0, use_cache=False)
    packed = tokens(pack(model(**settings), 'float32', eager=True), prompts, 60, temperature=0)
    assert torch.equal(packed, plain) and len(plain.unique()) > 5


@pytest.mark.parametrize('rows', [1, 3, 9])
def test_a_packed_layer_gives_the_same_compiled_as_eagerly(rows):
    torch.manual_seed(0)
    layer, x = Packed(torch.randn(7, 16), torch.randn(7), 'float32', 'int8'), torch.randn(rows, 1, 16)
    assert torch.allclose(torch.compile(layer)(x), layer(x), atol=1e-5)


def test_int8_takes_a_byte_a_weight_and_is_half_a_step_off_at_most():
    m, packed = model(), pack(model(), kind='int8')
    for layer, weight in ((packed.blocks[1].mlp.up, m.blocks[1].mlp.up.weight), (packed.head, m.wte.weight)):
        assert layer.stored.dtype == torch.int8
        assert ((layer.weight - weight).abs() <= 0.501 * layer.scale).all()
    assert torch.equal(packed.wte.weight, m.wte.weight)  # the look-up stays exact


@pytest.mark.parametrize('n_out, n_in', [(7, 33), (64, 64), (40, 96)])
@pytest.mark.parametrize('rows', [1, 5, 200])
@pytest.mark.parametrize('dtype, error', [('bfloat16', 0.01), ('float32', 0.01)])
def test_int4_multiplies_by_the_matrix_that_it_says(n_out, n_in, rows, dtype, error):
    torch.manual_seed(0)
    dense, bias, x = torch.randn(n_out, n_in), torch.randn(n_out), torch.randn(rows, 1, n_in)
    layer = Int4(dense, bias, dtype)
    with torch.no_grad():
        y, plain = layer(x), torch.nn.functional.linear(x, layer.weight, bias)
        compiled = torch.compile(layer)(x)
    assert y.shape == (rows, 1, n_out) and y.dtype == torch.float32
    assert (y - plain).norm() < error * plain.norm()
    assert (compiled - plain).norm() < error * plain.norm()
    # 16 steps from the lowest to the highest of 32 normal numbers
    assert 0.06 < ((layer.weight - dense).norm() / dense.norm()) < 0.08


def test_int4_takes_five_bits_a_weight_and_keeps_what_16_steps_can_say():
    torch.manual_seed(0)
    step, lowest = torch.rand(16, 2).bfloat16().float() + 0.5, torch.randn(16, 2).bfloat16().float()
    code = torch.randint(16, (16, 2, 32))
    code[..., 0], code[..., 1] = 0, 15
    weight = (code * step[..., None] + lowest[..., None]).flatten(1)
    layer = Int4(weight, None, 'float32')
    assert 8 * sum(t.nbytes for t in layer.buffers()) == 5 * weight.numel()
    assert (layer.weight - weight).abs().max() < 0.01 * weight.abs().max()
    assert Int4(torch.zeros(16, 32), None, 'float32').weight.abs().max() < 1e-7


def test_int4_and_int8_are_not_given_together():
    with pytest.raises(ValueError, match='int4=True, int8=True: choose one'):
        sample.Settings(int4=True, int8=True).check()


@pytest.mark.parametrize('tie', [True, False])
def test_a_model_in_int4_has_an_int8_head_and_writes(tie):
    m = pack(model(tie=tie), kind='int4')
    assert isinstance(m.blocks[1].mlp.down, Int4) and m.head.stored.dtype == torch.int8
    cached, uncached = (tokens(m, [[1, 2, 3]], 20, temperature=0, use_cache=use) for use in (True, False))
    assert torch.equal(cached[:, :3], uncached[:, :3])  # up to rounding


def test_int4_is_refused_where_torch_cannot_multiply_by_it(monkeypatch):
    monkeypatch.setattr(packed, 'has_int4', lambda: False)
    with pytest.raises(UserError, match='int4=True: .* use --int8'):
        pack(model(), kind='int4')


# --- the knobs of draw(), against what they are defined as ---

LOGITS = torch.tensor([[2.0, 1.0, 0.5, 0.0, -1.0, -torch.inf]])


def frequencies(n=20000, past=((5,),), **options):
    options = ({'temperature': 1.0, 'top_k': 0, 'top_p': 1.0, 'min_p': 0.0, 'repetition_penalty': 1.0}
               | options)
    logits, past = LOGITS.expand(n, -1), torch.tensor(past).expand(n, -1)
    counts = collections.Counter(
        draw(logits, past, generator=torch.Generator().manual_seed(0), **options).tolist())
    return torch.tensor([counts[i] / n for i in range(6)])


def expected(logits):
    return torch.tensor(logits).softmax(-1)


@pytest.mark.parametrize('options, logits', [
    (dict(), [2, 1, 0.5, 0, -1, -torch.inf]),
    (dict(temperature=0.5), [4, 2, 1, 0, -2, -torch.inf]),
    (dict(top_k=2), [2, 1, -torch.inf, -torch.inf, -torch.inf, -torch.inf]),
    (dict(top_p=0.75), [2, 1, -torch.inf, -torch.inf, -torch.inf, -torch.inf]),  # 0.56 + 0.21 reach 0.75
    (dict(top_p=0.5), [2, -torch.inf, -torch.inf, -torch.inf, -torch.inf, -torch.inf]),
    # e^-1.5 = 0.22 stays, e^-2 = 0.14 goes
    (dict(min_p=0.2), [2, 1, 0.5, -torch.inf, -torch.inf, -torch.inf]),
    (dict(repetition_penalty=2.0, past=((0, 4),)), [1, 1, 0.5, 0, -2, -torch.inf]),
], ids=str)
def test_tokens_are_drawn_with_the_probabilities_asked_for(options, logits):
    assert (frequencies(**options) - expected([float(x) for x in logits])).abs().max() < 0.012


def test_temperature_zero_is_greedy():
    assert frequencies(n=10, temperature=0)[0] == 1


@pytest.mark.parametrize('options', [dict(temperature=0), dict(temperature=1e-30), dict(), dict(top_k=2),
                                     dict(top_p=0.5), dict(min_p=0.2), dict(repetition_penalty=2.0)], ids=str)
def test_logits_that_are_no_numbers_give_no_token(options):
    options = {'temperature': 1.0, 'top_k': 0, 'top_p': 1.0, 'min_p': 0.0, 'repetition_penalty': 1.0,
               'generator': None} | options
    logits = LOGITS.repeat(4, 1)
    logits[1, 4] = torch.nan
    logits[2, 0] = torch.inf
    logits[3, :] = -torch.inf
    drawn = draw(logits, torch.zeros(4, 1, dtype=torch.long), **options).tolist()
    assert 0 <= drawn[0] < 5 and drawn[1:] == [-1, -1, -1]


@pytest.mark.parametrize('bad', [torch.nan, torch.inf])
def test_a_network_that_gives_no_numbers_is_noticed(bad):
    m = model()
    m.blocks[1].mlp.down.weight.data[0, 0] = bad
    with pytest.raises(NotFinite, match='the logits are NaN or infinite: the weights are damaged'):
        tokens(m, [[1], [2, 3]], 5)
    with pytest.raises(NotFinite):
        beam_search(m, [1], 5)


# --- text ---

class Scripted(torch.nn.Module):
    """A 'model' that says a fixed byte string, whatever it is asked."""

    def __init__(self, text):
        super().__init__()
        self.cfg, self.weight = (ModelConfig(vocab_size=257, block_size=1000, n_layer=1),
                                 torch.nn.Parameter(torch.zeros(1)))
        self.ids, self.at = text.encode() + b' ' * 99, 0

    def hidden(self, idx, cache):
        return torch.zeros(idx.size(0), 1, 1)

    def logits(self, h):
        out = torch.full((len(h), 257), -torch.inf)
        out[:, self.ids[self.at]] = 0
        self.at += 1
        return out


def said(text, n=50, **options):
    return [piece for _, piece in stream(Scripted(text), new_tokenizer('byte'), [[65]], max_new_tokens=n,
                                         temperature=0, **options)]


def test_a_character_is_never_cut_while_streaming():
    pieces = said('äö→😀x', n=len('äö→😀x'.encode()))
    assert (''.join(pieces) == 'äö→😀x' and '\ufffd' not in ''.join(pieces)
            and len([p for p in pieces if p]) == 5)


def test_a_token_costs_the_same_however_long_the_text_is():
    tokenizer, lengths = new_tokenizer('byte'), []
    decode = tokenizer.decode
    tokenizer.decode = lambda ids: lengths.append(len(ids)) or decode(ids)
    found = stream(Scripted('äö→😀x' * 20), tokenizer, [[65] * 30], max_new_tokens=240, temperature=0)
    pieces = [piece for _, piece in found]
    assert ''.join(pieces) == 'äö→😀x' * 20 and max(lengths) <= 12


def test_text_ends_before_the_first_stop_string_and_none_of_it_is_shown():
    pieces = said('One. Two.\n\nThree. END four', stop=['\n\nT', 'END'])
    assert ''.join(pieces) == 'One. Two.'
    assert ''.join(said('ENDE', stop=['END'])) == '' and ''.join(said('ENxEND', stop=['END'])) == 'ENx'


class Pieces:
    """A tokenizer with these pieces of text, in their order."""

    def __init__(self, pieces):
        self.pieces = pieces

    def decode(self, ids):
        return ''.join(self.pieces[i] for i in ids)


def shown_so_far(text, stop):
    """The beginning of `text` that no stop string is in, nor may come to be in."""
    complete = [n for n in range(len(text)) if any(text.startswith(s, n) for s in stop)]
    begun = [n for n in range(len(text)) if any(s.startswith(text[n:]) and s != text[n:] for s in stop)]
    return text[:min(complete + begun, default=len(text))]


@settings(deadline=None, derandomize=True, max_examples=60)
@given(some.lists(some.text('ab.', max_size=4), max_size=20),
       some.lists(some.text('ab.', min_size=1, max_size=7), max_size=3))
@example(['ab', 'c', 'd'], ['#' * 20])  # a stop string longer than all that is said
@example(['ab', 'cd', 'ef'], ['cd', 'abcdef'])  # the longer one begins first
@example(['a\n', '\nb'], ['\n\n'])
def test_a_row_is_cut_before_its_first_stop_string_and_holds_back_no_more_than_may_begin_one(pieces, stop):
    row, said, text = Row(Pieces(pieces), [], stop), '', ''
    for token, piece in enumerate(pieces):
        said += row.add(token)
        text += piece
        assert said == shown_so_far(text, stop)
        if not row.alive:
            break
    said += row.end() if row.alive else ''
    whole = ''.join(pieces)
    assert said == whole[:min((whole.find(s) for s in stop if s in whole), default=len(whole))]


@pytest.mark.parametrize('text', ['𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝔘𝔫𝔦𝔠𝔬𝔡𝔢𝔘𝔫𝔦𝔠𝔬𝔡𝔢 end', 'a \ufffd b \ufffd\ufffd c', 'caf\ufffd'])
def test_characters_of_several_bytes_are_whole_with_every_kind_of_decoder(text):
    """sentencepiece writes a sign for each byte of half a character, tokenizers for those before it too."""
    sentencepiece = train_bpe(['some words and some more words'] * 9, 270)
    fallback = JsonTokenizer('tokenizers', to_json(sentencepiece).encode(), 'test')
    for tokenizer in (new_tokenizer('byte'), sentencepiece, fallback):
        ids = tokenizer.encode(text)
        row = Row(tokenizer, [], [])
        assert ''.join([*map(row.add, ids), row.end()]) == text


def test_bytes_that_are_no_character_do_not_silence_the_text():
    tokenizer, lengths = new_tokenizer('byte'), []
    decode = tokenizer.decode
    tokenizer.decode = lambda ids: lengths.append(len(ids)) or decode(ids)
    row = Row(tokenizer, [], [])
    pieces = [row.add(0xff) for _ in range(100)]
    assert ''.join(pieces) + row.end() == '\ufffd' * 100 and len(''.join(pieces)) > 90 and max(lengths) <= 16


# --- the script ---

@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A run on bytes, made by the scripts themselves."""
    folder = tmp_path_factory.mktemp('trained')
    (folder / 'text.txt').write_text('the quick brown fox jumps over the lazy dog. ' * 400, encoding='utf-8')
    done = run('prepare.py', folder / 'text.txt', f'--out={folder / "data"}', '--tokenizer=byte',
               '--val_fraction=0.1')
    assert done.returncode == 0, done.stderr
    train(folder / 'out', '--max_iters=60', '--n_embd=48', dataset=folder / 'data')
    return folder / 'out'


def test_a_trained_model_writes_what_it_has_read(trained):
    done = run('sample.py', f'--out_dir={trained}', '--start=the quick', '--temperature=0', '--num_samples=1',
               '--max_new_tokens=40')
    assert done.returncode == 0 and 'the quick brown fox' in done.stdout, done.stdout + done.stderr


@pytest.mark.full
def test_compiled_and_in_int8_it_writes_the_same(trained):
    done = run('sample.py', f'--out_dir={trained}', '--start=the quick', '--temperature=0', '--num_samples=1',
               '--max_new_tokens=40', '--compile', '--int8')
    assert done.returncode == 0 and 'the quick brown fox' in done.stdout, done.stdout + done.stderr


def test_prompts_come_from_files_and_from_the_terminal(trained, tmp_path):
    (tmp_path / 'prompt.txt').write_text('jumps over')
    from_file = run('sample.py', f'--out_dir={trained}', f'--start=FILE:{tmp_path / "prompt.txt"}',
                    '--temperature=0', '--num_samples=1', '--max_new_tokens=9')
    assert from_file.stdout.startswith('jumps over')
    typed = run('sample.py', f'--out_dir={trained}', '--interactive', '--num_samples=1', '--max_new_tokens=5',
                '--temperature=0', typed='the\n' + 'x' * 100 + '\nlazy\n')
    # a prompt too long does not end the session
    assert typed.returncode == 0 and 'shorten it' in typed.stdout and 'lazy' in typed.stdout


def test_escapes_in_a_text_are_shown_on_a_terminal_and_exact_in_a_pipe(trained):
    """OSC 52 writes the clipboard: in the prompt here, as a model may write it."""
    command = [sys.executable, 'sample.py', f'--out_dir={trained}', '--num_samples=2', '--max_new_tokens=5',
               r'--start=\u001b]52;c;aGk=\u0007']
    ours, theirs = pty.openpty()
    with subprocess.Popen(command, cwd=ROOT, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        said = b''
        with suppress(OSError):  # at the end
            while new := os.read(ours, 10_000):
                said += new
    os.close(ours)
    assert process.returncode == 0 and said.count(rb'\x1b]52;c;aGk=\x07') == 2, said
    assert not re.search(rb'[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]', said), said
    piped = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert piped.stdout.count('\x1b]52;c;aGk=\x07') == 2


def typed_on_a_terminal(args, *typed):
    """
    (exit code, what is shown) of sample.py on a terminal, where each of `typed` is typed once the text before
    it in (text, bytes) is shown.
    """
    ours, theirs = pty.openpty()
    process = subprocess.Popen([sys.executable, 'sample.py', '--device=cpu', *args], cwd=ROOT, stdin=theirs,
                               stdout=theirs, stderr=theirs, start_new_session=True,
                               preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0))
    os.close(theirs)
    said, place = b'', 0

    def read():
        with suppress(OSError):  # at the end
            return os.read(ours, 10_000)
    for words, data in typed:
        while words not in said[place:] and (new := read()):
            said += new
        place = len(said)
        os.write(ours, data)
    while new := read():
        said += new
    os.close(ours)
    return process.wait(60), said


@pytest.mark.parametrize('mode, more', [
    ('interactive', ['--num_samples=1', '--max_new_tokens=5']), ('chat', ['--max_new_tokens=1'])])
def test_whatever_is_typed_on_a_terminal_the_session_goes_on_until_it_is_ended(trained, mode, more):
    args = [f'--{mode}', f'--out_dir={trained}', *more]
    code, said = typed_on_a_terminal(
        args, (b'Ctrl-D ends', b'\xff\xfe\n'), (b'not UTF-8', b'a' * 6000 + b'\n'),
        (b'no longer line than 4,095 bytes', b'a' * 200 + b'\n'), (b'shorten it', b'\x1b]52;c;aGk=\x07\n'),
        (b'---' if mode == 'interactive' else b'shorten it', b'\x04'))
    assert code == 0 and b'Traceback' not in said, said
    assert not re.search(rb'[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]', said.replace(b'\x07', b'')), said
    assert mode == 'chat' or rb'\x1b]52;c;aGk=\x07' in said
    code, said = typed_on_a_terminal(args, (b'Ctrl-D ends', b'\x03'))
    assert code == 130 and said.count(b'stopped by SIGINT') == 1 and b'Traceback' not in said, said


def test_ctrl_c_while_text_is_generated_is_one_line(trained):
    args = ['--interactive', f'--out_dir={trained}', '--max_new_tokens=1000000', '--num_samples=1',
            '--compile=False']
    code, said = typed_on_a_terminal(args, (b'Ctrl-D ends', b'the quick\n'), (b'quick brown', b'\x03'))
    assert code == 130 and said.count(b'stopped by SIGINT') == 1 and b'Traceback' not in said, said


def test_only_a_newline_ends_a_prompt(tmp_path, monkeypatch):
    prompts = []
    monkeypatch.setattr(sample, 'print_samples', prompts.append)
    type_in('\ufeffa\rb\r\nc\u2028d\x85e\x0c\n\nf'.encode(), monkeypatch)
    converse()
    assert prompts == ['a\rb', 'c\u2028d\x85e\x0c', '', 'f']
    (tmp_path / 'prompt.txt').write_bytes(b'\xef\xbb\xbfa\r\nb\r')
    assert sample.read_prompt(f'FILE:{tmp_path}/prompt.txt') == 'a\r\nb\r'
    os.mkfifo(tmp_path / 'pipe')
    with open(tmp_path / 'hole', 'wb') as f:
        f.truncate(2 ** 32)
    for name, words in (('pipe', 'is a folder, a pipe'), ('hole', 'has more than 134,217,728 bytes')):
        with pytest.raises(UserError, match=words):
            sample.read_prompt(f'FILE:{tmp_path}/{name}')


def test_a_new_line_is_typed_as_a_shell_gives_it(trained, tmp_path):
    options = [f'--out_dir={trained}', '--temperature=0', '--num_samples=1', '--max_new_tokens=9']
    stopped = run('sample.py', *options, '--start=the quick', r'--stop=zz\n', r'--stop=b\u0072o').stdout
    assert stopped.split('\n---')[0] == 'the quick '
    assert run('sample.py', *options, r'--start=one\n\\n').stdout.startswith('one\n\\n')
    (tmp_path / 'prompt.txt').write_text(r'one\n')
    assert run('sample.py', *options, f'--start=FILE:{tmp_path}/prompt.txt').stdout.startswith(r'one\n')


def test_the_default_prompt_is_the_end_of_text_where_there_is_no_new_line(tmp_path):
    """Of a given prompt the character is named."""
    for tokenizer in (new_tokenizer('char', ['ACGT']), CharTokenizer('ACGT', eot=False)):
        folder = written(tmp_path / f'{tokenizer.eot}', model(vocab_size=tokenizer.vocab_size), tokenizer)
        options = [f'--out_dir={folder}', '--num_samples=1', '--max_new_tokens=5']
        done = run('sample.py', *options)
        assert done.returncode == 0 and done.stdout == run('sample.py', *options, '--start=').stdout
        assert "character '\\n' is not among the 4" in one_line(run('sample.py', *options, r'--start=\n'))


def test_the_end_of_text_in_a_prompt_is_the_token():
    """As in nanoGPT, whose sample.py names this prompt; in data it is ordinary text."""
    sentencepiece = train_bpe(['some words and some more words'] * 9, 270)
    fallback = JsonTokenizer('tokenizers', to_json(sentencepiece).encode(), 'test')
    for tokenizer in (new_tokenizer('byte'), new_tokenizer('char', ['ab']), sentencepiece, fallback):
        eot, a, b = tokenizer.eot, tokenizer.encode('a'), tokenizer.encode('b')
        cfg = ModelConfig(block_size=32, vocab_size=512)
        wanted = {'': [eot], EOT: [eot], EOT + 'a': [eot, *a], 'a' + EOT + 'b': [*a, eot, *b], 'a': a}
        for text, ids in wanted.items():
            assert encode_prompt(text, tokenizer, cfg) == ids
        for begin in (eot, 0):
            tokenizer = tokenizer.with_format(PromptFormat((begin,)))
            assert encode_prompt(EOT + 'a', tokenizer, cfg) == [begin] * (begin != eot) + [eot, *a]
        has_encoder = build(ModelConfig, block_size=32, vocab_size=512, n_encoder_layer=1)
        assert encode_prompt('a' + EOT, tokenizer, has_encoder) == [*a, eot]


def test_the_end_of_text_before_a_prompt_is_not_printed(trained):
    options = [f'--out_dir={trained}', '--temperature=0', '--num_samples=1', '--max_new_tokens=9']
    alone, empty = (run('sample.py', *options, f'--start={text}').stdout for text in (EOT, ''))
    assert alone == empty
    assert run('sample.py', *options, f'--start={EOT}the{EOT}').stdout.startswith(f'the{EOT}')


@pytest.mark.parametrize('args, words', [
    (['--start=' + 'x' * 33], 'the prompt has 33 tokens, the context of this model 32'),
    (['--start=FILE:nowhere.txt'], 'nowhere.txt'), (['--start=FILE:'], 'start=FILE:: names no file'),
    (['--start=caf\udce9'], 'start: not UTF-8'), (['--stop=caf\udce9'], 'stop: not UTF-8'),
    (['--top_p=0'], 'top_p'), (['--out_dir=nowhere'], 'nowhere: no such directory'),
    (['--temprature=1'], 'temperature'),
])
def test_bad_input_is_one_line(trained, args, words):
    assert words in one_line(run('sample.py', f'--out_dir={trained}', *args))


def test_without_any_input_there_are_no_prompts(monkeypatch):
    monkeypatch.setattr(sys, 'stdin', None)
    with pytest.raises(UserError, match='interactive=True: its input is closed'):
        converse()


def test_greedy_text_and_evaluations_are_in_float32_where_bfloat16_is_faster(trained, tmp_path, monkeypatch):
    speeds = {torch.bfloat16: 4.0, torch.float32: 1.0}
    monkeypatch.setattr(configurator, 'matmul_flops', lambda d, dtype: speeds[dtype])
    (tmp_path / 'text.txt').write_text('the quick')
    short = ['sample.py', '--num_samples=1', '--max_new_tokens=3']
    text = ['eval.py', 'text', tmp_path / 'text.txt']
    for args, dtype in ((short, 'bfloat16'),
                        ([*short, '--temperature=0'], 'float32'),
                        ([*short, '--num_beams=2'], 'float32'),
                        ([*short, '--temperature=0', '--dtype=bfloat16'], 'bfloat16'),
                        (['eval.py', 'loss'], 'float32'),
                        (text, 'float32'),
                        ([*text, '--dtype=bfloat16'], 'bfloat16')):
        done = run(*args, f'--out_dir={trained}', '--device=cpu')
        assert done.returncode == 0, done.stderr
        assert re.findall('float32|bfloat16', done.stdout) == [dtype], args


def test_damaged_weights_are_noticed_wherever_they_are_used(trained, tmp_path):
    folder = checkpoint.find(str(trained))
    weights = checkpoint.read_weights(folder)
    weights['norm_f.weight'][:] = 3e38  # a checkpoint with NaN in it is not written
    folder = checkpoint.save(str(tmp_path), 1, weights, {}, checkpoint.load_state(folder))
    (tmp_path / 'text.txt').write_text('the quick')
    for args in (['sample.py'], ['sample.py', '--num_beams=2', '--max_new_tokens=9'], ['eval.py', 'loss'],
                 ['eval.py', 'text', tmp_path / 'text.txt']):
        assert 'the weights are damaged' in one_line(run(*args, f'--out_dir={folder}', '--device=cpu')), args


def type_in(data, monkeypatch):
    """Let the terminal hold these bytes."""
    monkeypatch.setattr(sys, 'stdin', io.TextIOWrapper(io.BytesIO(data), 'utf-8'))


def test_a_bad_prompt_does_not_end_a_conversation_but_a_damaged_network_does(monkeypatch, capsys):
    def print_samples(text):
        if text == 'bad':
            raise UserError('start: shorten it')
        if text == 'damaged':
            raise NotFinite
        print(f'<{text}>')
    monkeypatch.setattr(sample, 'print_samples', print_samples)
    type_in(b'one\nbad\ncaf\xe9\ntwo\ndamaged\nthree\n', monkeypatch)
    with pytest.raises(NotFinite):
        converse()
    assert capsys.readouterr().out.splitlines() == [
        '<one>', 'start: shorten it',
        "start: not UTF-8: '\\udce9' after 3 characters is no character: takes text in UTF-8", '<two>']


def test_a_tokenizer_that_does_not_match_the_network_is_refused(trained, tmp_path):
    weights, state = (checkpoint.read_weights(folder := checkpoint.find(str(trained))),
                      checkpoint.load_state(folder))
    state['model']['vocab_size'] = 128
    # of the padded vocabulary
    weights = {name: t[:128] if len(t) == 320 else t for name, t in weights.items()}
    folder = checkpoint.save(str(tmp_path), 1, weights, {}, state)
    assert '257 tokens, the network 128' in one_line(run('sample.py', f'--out_dir={folder}'))


# --- the start of a document ---

@pytest.fixture(scope='module')
def documents(tmp_path_factory):
    """
    A run with a document a row: each begins with Z, then other capital letters than Z, and ends after a few.
    """
    folder, draw = tmp_path_factory.mktemp('documents'), random.Random(0)
    with open(folder / 'texts.jsonl', 'w') as f:
        for _ in range(300):
            f.write(json.dumps({'text': 'Z' + ''.join(draw.choices('ABC', k=draw.randint(3, 25)))}) + '\n')
    prepare(TextConfig([f'{folder}/texts.jsonl'], out=f'{folder}/data', tokenizer='byte',
                       val_fraction=0.2, num_proc=1))
    done = train(folder / 'out', '--packing=document', '--max_iters=60', '--eval_interval=30',
                 '--sample_tokens=5', '--sample_prompt=', dataset=folder / 'data')
    # of the three samples but the first, of a network that has learned nothing
    assert done.stdout.count('    | Z') == 2
    return folder / 'out'


def without_start_token(folder, to):
    """The checkpoint of a run as it was when rows of documents had no start token."""
    found = checkpoint.find(str(folder))
    state = {key: value for key, value in checkpoint.load_state(found).items() if key != 'begin'}
    meta = read_meta(state['settings']['dataset'])
    state['data'] = {name: hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()
                     for name in state['data']}
    state['settings']['out_dir'] = str(to)
    checkpoint.save(str(to), state['step'], checkpoint.read_weights(found),
                    torch.load(f'{found}/optimizer.pt', weights_only=True), state)
    (to / 'settings.json').write_text(json.dumps(state['settings']))
    return str(to)


def test_a_network_knows_how_a_document_begins(documents):
    network, tokenizer = load(str(documents))
    assert (tokenizer.prompt_format.bos == (256,)
            == tuple(checkpoint.load_state(checkpoint.find(str(documents)))['begin']))
    assert (encode_prompt('', tokenizer, network.cfg) == [256]
            and encode_prompt('ZA', tokenizer, network.cfg) == [256, 90, 65])
    first = network(torch.tensor([[256]]))[0, -1].log_softmax(-1)
    assert -first[90] < 0.1
    done = run('sample.py', f'--out_dir={documents}', '--start=', '--num_samples=20', '--max_new_tokens=5',
               '--top_k=1')
    assert done.stdout.count('Z') == 20 and done.stdout.startswith('Z'), done.stdout


def test_texts_and_tasks_begin_with_the_start_token_too(documents):
    network, tokenizer = load(str(documents))
    ids = tokenizer.encode('ZABC')
    wanted = torch.nn.functional.cross_entropy(network(torch.tensor([[256, *ids[:-1]]]))[0],
                                               torch.tensor(ids), reduction='sum').item()
    nats, count, _ = tasks.score_text(network, tokenizer, 'ZABC', 8, torch.device('cpu'), 'float32')
    assert count == 4 and nats == pytest.approx(wanted, abs=1e-4)
    assert (tasks.encode_pair(tokenizer, '', 'ZA') == ([256], [90, 65])
            and tasks.encode_pair(tokenizer, 'ZA', 'B') == ([256, 90, 65], [66]))
    long = tasks.score(network, [tasks.encode_pair(tokenizer, 'ZA' * 40, 'B')], torch.device('cpu'),
                       'float32')[0][0]
    window = torch.tensor([(tokenizer.encode('ZA' * 40))[-32:]])  # from the middle: no start token
    assert long == pytest.approx(network(window)[0, -1].log_softmax(-1)[66].item(), abs=1e-4)


def test_a_checkpoint_from_before_start_tokens_is_read_as_it_was_trained(documents, tmp_path):
    old = without_start_token(documents, tmp_path / 'old')
    network, tokenizer = load(old)
    assert tokenizer.prompt_format == PromptFormat()
    assert (encode_prompt('ZA', tokenizer, network.cfg) == [90, 65]
            and encode_prompt('', tokenizer, network.cfg) == [256])
    assert (tasks.encode_pair(tokenizer, 'ZA', 'B') == ([90, 65], [66])
            and tasks.encode_pair(tokenizer, '', 'Z') == ([256], [90]))
    files = TokenFiles(f'{documents.parent}/data', 'val')
    for folder, targets in ((documents, files.tokens), (old, files.tokens - files.documents)):
        assert f'all {targets:,} targets' in run('eval.py', 'loss', f'--out_dir={folder}').stdout
    args = ['--packing=document', '--max_iters=70', '--eval_interval=30']
    error = one_line(train(old, *args, dataset=documents.parent / 'data', check=False))
    assert ('packing=document: rows begin with token 256 here, '
            f'those of the run in {old} without a start token: give another --out_dir' in error)
    only = train(old, '--eval_only', dataset=documents.parent / 'data').stdout
    new = train(documents, '--eval_only', dataset=documents.parent / 'data').stdout
    assert float(only.split('val_loss ')[1].split(',')[0]) != float(new.split('val_loss ')[1].split(',')[0])
    # the weights begin another run
    train(tmp_path / 'next', *args, f'--init_from={old}', '--max_iters=1', dataset=documents.parent / 'data')
    assert load(str(tmp_path / 'next'))[1].prompt_format.bos == (256,)


def test_an_adapter_trained_on_documents_speaks_from_their_start(documents, trained, tmp_path):
    train(tmp_path / 'lora', f'--init_from={trained}', '--lora_rank=2', '--packing=document', '--max_iters=1',
          '--n_embd=48', dataset=documents.parent / 'data')
    network, tokenizer = load(str(trained))
    assert tokenizer.prompt_format.bos == ()
    [(_, own)] = add_adapters(network, tokenizer, [f'{tmp_path}/lora'], str(trained))
    assert own.prompt_format.bos == (256,) == load(str(tmp_path / 'lora'))[1].prompt_format.bos
    run('surgery.py', 'merge', f'--from={tmp_path}/lora', f'--out_dir={tmp_path}/merged', '--dataset=none')
    assert load(f'{tmp_path}/merged')[1].prompt_format.bos == (256,)
