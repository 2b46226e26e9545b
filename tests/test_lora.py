"""
Adapters: they change nothing at first, what they say is what PEFT's say, merged they are the same function,
and a run that trains them holds them alone.
"""

import os
import re
import shutil

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, one_line, pack_moments, read_log, run, train, write_dataset
from safetensors.torch import load_file

import checkpoint
from configurator import UserError, configure
from features import build, part_of
from features.lora import adapters
from features.lora import layers as lora
from features.lora.packed import pack
from features.lora.settings import LoraConfig
from features.moments import read_moments
from features.networks import fill, load_model, read_model
from model import ModelConfig, make_model
from optim import make_optimizer
from sample import generate
from train import Settings

VOCAB = 96


def network(**changes):
    """A small random decoder, its output matrices too."""
    torch.manual_seed(0)
    sizes = {'vocab_size': VOCAB, 'block_size': 32, 'n_layer': 2, 'n_head': 4, 'n_embd': 32,
             'zero_init': False}
    model = make_model(build(ModelConfig, **sizes | changes)).eval()
    for p in model.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.1)
    return model


def adapted(model, is_moved=True, places=None, tokens=(), whole='', **settings):
    """
    `model` with adapters, away from where they begin. As adapters of PEFT have them: places(), to change the
    Places; tokens, rows of the embedding that are trained; whole, a pattern of other tensors that are.
    """
    s = build(Settings, **{'lora_rank': 4} | settings)
    s.check()
    if places or tokens or whole:
        begin_like_peft(model, s, places or list, list(tokens), whole)
    else:
        lora.begin(model, s)
    for p in model.parameters() if is_moved else ():
        if p.requires_grad:
            p.data += 0.1 * torch.randn_like(p)
    return model


def begin_like_peft(model, s, places=list, tokens=(), whole=''):
    """lora.begin() with what adapters of PEFT have and our settings do not: see adapted()."""
    lora.share_table(model)
    found = places(lora.places(model, s))
    lora.attach(model, lora.Saved(found, s.lora_dropout, s.lora_dora, tokens=list(tokens)))
    names = {name for name, _ in model.named_parameters() if whole and re.search(whole, name)}
    lora.freeze(model, names | {'wte.tokens.values'})


def uneven(places):
    """Other ranks and scales, and none in the second block."""
    return [lora.Place(names, 2 if 'mlp' in names[0] else rank, 0.75 if 'attn' in names[0] else scale)
            for names, rank, scale in places if not names[0].startswith('blocks.1.')]


def ids(rows=3, length=16, seed=1):
    return torch.randint(VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def reading(model):
    return {'source': ids(3, 12, 2)} if model.cfg.n_encoder_layer else {}


@torch.no_grad()
def logits(model):
    return model(ids(), **reading(model))


KINDS = {
    'plain': ({}, {}),
    'everything': ({'tie': False, 'position': 'learned', 'bias': True},
                   {'lora_targets': 'attn,mlp,embed,head', 'whole': r'norm|\.bias$'}),
    'dora': ({'tie': False, 'bias': True, 'n_kv_head': 2},
             {'lora_targets': 'attn,mlp,embed,head', 'lora_dora': True}),
    'fused': ({'tie': False}, {'lora_targets': 'c_attn,up,head', 'lora_rs': True}),
    'low rank': ({'rank_qk': 8, 'rank_mlp': 16, 'rank_act': 'silu'}, {}),
    'shared expert': ({'n_expert': 4, 'mlp': 'swiglu', 'shared_width': 24, 'shared_gate': True,
                       'n_expert_active': 4, 'dense_layers': [0]}, {'lora_targets': 'attn,mlp'}),
    'experts': ({'n_expert': 4, 'n_expert_active': 2, 'mlp': 'swiglu'}, {'tokens': [3, 5]}),
    'tied rows': ({}, {'tokens': [3, 5], 'places': uneven}),
    'encoder-decoder': ({'n_encoder_layer': 2, 'position': 'relative', 't5_scale': True, 'mlp': 'relu'},
                        {'lora_targets': 'q,v,wi'}),
}


# --- what they say ---

@pytest.mark.parametrize('kind', KINDS)
def test_they_say_nothing_before_the_first_step(kind):
    model_settings, settings = KINDS[kind]
    before = logits(network(**model_settings))
    after = logits(adapted(network(**model_settings), is_moved=False, **settings))
    assert torch.equal(after, before)


@pytest.mark.parametrize('kind', KINDS)
def test_merged_they_are_the_same_function_and_unmerged_the_base_is_bitwise_what_it_was(kind):
    model_settings, settings = KINDS[kind]
    model = adapted(network(**model_settings), **settings)
    spoken, weights = logits(model), {name: t.clone() for name, t in model.state_dict().items()}
    assert (spoken - logits(network(**model_settings))).abs().max() > 0.05
    before = adapters.merge(model)
    assert (logits(model) - spoken).abs().max() < 2e-5 * spoken.abs().max()
    alone = make_model(model.cfg)  # and without any adapter
    alone.load_state_dict(adapters.base_state(model))
    assert (logits(alone.eval()) - spoken).abs().max() < 2e-5 * spoken.abs().max()
    adapters.unmerge(model, before)
    assert (all(torch.equal(t, weights[name]) for name, t in model.state_dict().items())
            and torch.equal(logits(model), spoken))


@pytest.mark.parametrize('kind', KINDS)
def test_the_loss_in_chunks_is_that_of_the_logits_and_trains_the_same_tensors(kind):
    model_settings, settings = KINDS[kind]
    model, targets = adapted(network(**model_settings), **settings), ids(seed=3)
    model(ids(), targets, **reading(model)).backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert grads.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    for p in model.parameters():
        p.grad = None
    F.cross_entropy(model(ids(), **reading(model)).flatten(0, 1), targets.flatten()).backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert torch.allclose(grads[name], p.grad, rtol=1e-3,
                                  atol=1e-6 * max(1, p.grad.abs().max().item())), name


def test_what_is_added_is_the_product_times_alpha_over_rank():
    for settings, scale in (({'lora_alpha': 6}, 6 / 4), ({'lora_alpha': 6, 'lora_rs': True}, 3)):
        model = adapted(network(), **settings)
        layer = model.blocks[0].attn.q
        adapter, x = layer.lora['default'], torch.randn(5, 32)
        assert torch.allclose(layer(x), F.linear(x, layer.weight) + scale * x @ adapter.A.T @ adapter.B.T,
                              atol=1e-6)


PACKED = KINDS | {'rows of a target': ({}, {'lora_targets': 'attn,embed', 'tokens': [3, 5]})}
del PACKED['encoder-decoder']


@pytest.mark.parametrize('kind', PACKED)
def test_packed_for_sampling_they_say_the_same(kind):
    model_settings, settings = PACKED[kind]
    model = adapted(network(**model_settings), **settings)
    spoken = logits(model)
    assert torch.allclose(logits(pack(model, 'float32')), spoken, atol=1e-5)


@pytest.mark.parametrize('kind', KINDS)
def test_in_bfloat16_merged_is_unmerged_but_for_its_rounding(kind):
    model_settings, settings = KINDS[kind]
    model = adapted(network(**model_settings), **settings)
    exact = logits(model)
    with torch.autocast('cpu', torch.bfloat16):
        spoken, before = logits(model), adapters.merge(model)
        merged = logits(model)
    assert (before and (spoken - exact).abs().max() < 0.1 * exact.abs().max()
            and (merged - exact).abs().max() < 0.1 * exact.abs().max())


def test_rows_of_zeros_are_no_trouble():
    for settings in ({'lora_dora': True}, {}):
        model = network()
        for block in model.blocks:
            torch.nn.init.zeros_(block.mlp.down.weight)
        adapted(model, is_moved=False, **settings)
        for _ in range(2):
            loss = model(ids(), ids(seed=3))
            loss.backward()
            for p in model.parameters():
                if p.requires_grad:
                    p.data -= 0.1 * p.grad
                    p.grad = None
        adapter = model.blocks[0].mlp.down.lora['default']
        assert loss.isfinite() and adapter.B.abs().max() > 0


def test_dropout_is_of_what_adapters_read_and_in_training_alone():
    settings = {'lora_targets': 'attn,head', 'lora_dropout': 0.5}
    model = adapted(network(tie=False), **settings)
    assert torch.equal(logits(model), logits(model)) and torch.equal(model(ids(), ids()), model(ids(), ids()))
    model.train()
    assert not torch.equal(logits(model), logits(model))
    assert torch.equal(logits(adapted(network(tie=False), **settings)),
                       logits(adapted(network(tie=False), lora_targets='attn,head')))


def test_cached_generation_is_uncached_with_adapters():
    model = adapted(network(position='learned', tie=False), lora_targets='attn,mlp,embed,head')
    texts = [torch.stack(list(generate(model, ids(2, 5).tolist(), 20, temperature=0, use_cache=cached)))
             for cached in (True, False)]
    assert torch.equal(*texts)


@pytest.mark.parametrize('kind', ['', 'int8', 'int4'])
@pytest.mark.parametrize('settings', [{}, {'lora_dora': True}, {'lora_targets': 'attn,head'}])
def test_adapters_of_each_row_and_of_all_are_used_beside_matrices_in_bfloat16(kind, settings):
    model = network(tie=False)
    adapters.add(model, adapters.take(adapted(network(tie=False), **settings)), 'a', 'a')
    model.lora.shares = {'a': 1.0}
    with torch.no_grad():
        plain = logits(model)
        packed = pack(model, 'bfloat16', kind, eager=True)
        assert (logits(packed) - plain).norm() < (0.3 if kind == 'int4' else 0.05) * plain.norm()
    if 'lora_dora' not in settings:
        adapters.select(packed, ['a', 'a'])
        assert len(list(generate(packed, [[1, 2, 3]] * 2, 3, temperature=0))) == 3


@pytest.mark.parametrize('target', ['q', 'k', 'v'])
def test_beside_one_of_three_matrices_with_biases_dora_keeps_the_dtype_that_a_cache_wants(target):
    model = adapted(network(bias=True), lora_targets=target, lora_dora=True).eval()
    with torch.autocast('cpu', torch.bfloat16):
        assert len(list(generate(model, [[1, 2, 3]], 5, temperature=0))) == 5


# --- which weights ---

def test_what_targets_mean():
    def layers(**settings):
        return [name for name, _ in lora.adapted(
            adapted(network(**{'tie': False, 'position': 'learned', 'mlp': 'swiglu'}), **settings))]
    for targets in ('q,down', 'q_proj,down_proj'):
        assert layers(lora_targets=targets) == ['blocks.0.attn.q', 'blocks.0.mlp.down', 'blocks.1.attn.q',
                                                'blocks.1.mlp.down']
    assert layers(lora_targets='embed,head') == ['wte', 'wpe', 'head']
    assert layers(lora_targets='c_proj')[:2] == ['blocks.0.attn.o', 'blocks.0.mlp.down']
    assert len(layers(lora_targets='attn,mlp')) == 14


def test_c_attn_is_one_adapter_for_q_k_and_v():
    model = adapted(network(), lora_targets='c_attn')
    q, k, v = (getattr(model.blocks[0].attn, name).lora['default'] for name in 'qkv')
    assert q.A is k.A and k.A is v.A and q.B is not k.B
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * 4 * (32 + 96)


def test_the_second_factor_can_learn_faster():
    s = build(Settings, lora_rank=4, lr_scale={r'\.B$': 8.0}, learning_rate=1e-3)
    optimizer = make_optimizer(adapted(network(), lora_targets='attn,embed'), s)
    rates = {name: group['lr'] for group in optimizer.param_groups for name in group['param_names']}
    assert len(rates) == 18 and all(rate == pytest.approx(8e-3 if name.endswith('.B') else 1e-3)
                                    for name, rate in rates.items())


def test_starcoder_as_the_blog_adapts_it():
    s = configure(Settings, [f'{ROOT}/config/lora_starcoder.py'])
    model = adapters.blank(part_of(s, ModelConfig))
    base = model.num_params()
    with torch.device('meta'):
        lora.begin(model, s)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert (base, trained, model.num_params()) == (1_137_207_296, 12_091_392, 1_149_298_688)


@pytest.mark.parametrize('settings, words', [
    ({'lora_targets': 'attn,c_fcc'}, "lora_targets: 'c_fcc' matches nothing: "
     "takes attn, mlp, embed, head, shared, or matrices of this network by name: wte, attn.q"),
    ({'lora_targets': 'head'}, "'head' matches nothing"),
    ({'lora_rank': 33}, 'lora_rank=33: is more than blocks.0.attn.q has, 32 x 32'),
])
def test_what_a_network_has_not_is_named(settings, words):
    with pytest.raises(UserError, match=words.replace('[', r'\[')):
        adapted(network(), **settings)


@pytest.mark.parametrize('settings, words', [
    ({'lora_rank': -1}, 'lora_rank=-1'), ({'lora_dropout': 1.0}, 'lora_dropout=1.0'),
    ({'lora_alpha': 0.0}, 'lora_alpha=0'),
])
def test_settings_that_cannot_work_are_named(settings, words):
    with pytest.raises(ValueError, match=words):
        LoraConfig.check(build(Settings, **{'lora_rank': 4} | settings))


def test_an_adapter_of_an_earlier_version_with_pissa_is_read():
    """It was trained beside weights without B0·A0."""
    saved = adapters.take(adapted(network(), lora_targets='c_attn'))
    torch.manual_seed(1)
    tensors, wanted = dict(saved.tensors), logits(network())
    by_hand = network()
    for names, _, scale in saved.places:
        A = saved.tensors[f'{names[0]}.lora.A']
        A0 = torch.randn_like(A)
        for name in names:  # A is kept once for q, k and v, A0 three times
            B = saved.tensors[f'{name}.lora.B']
            B0 = torch.randn_like(B)
            tensors |= {f'{name}.lora.A0': A0, f'{name}.lora.B0': B0}
            by_hand.get_submodule(name).weight.data += scale * (B @ A - B0 @ A0)
    model = network()
    old = adapters.described(saved.description() | {'is_pissa': True}, tensors)
    adapters.add(model, old, 'old', 'old')
    assert torch.allclose(logits(model), logits(by_hand), atol=1e-4)
    assert not torch.allclose(logits(model), wanted, atol=0.1)


def test_merging_what_cannot_be_merged_is_refused():
    model = adapted(network(), lora_targets='embed')
    spoken = logits(model)
    with pytest.raises(UserError, match='the embedding is the head too, which has no adapter: '
                       'surgery.py merge --untie=True'):
        adapters.merge(model)
    adapters.untie(model)
    assert torch.equal(logits(model), spoken)
    adapters.merge(model)
    assert torch.allclose(logits(model), spoken, atol=1e-5)
    model = adapted(network(n_encoder_layer=1, position='relative'), lora_targets='embed')
    with pytest.raises(UserError, match='encoder and decoder have adapters of their own'):
        adapters.merge(model)


# --- several ---

def three(model, **settings):
    """Saved adapters of three kinds, for the same network."""
    kinds = {'a': {}, 'b': {'lora_targets': 'c_attn', 'lora_rank': 2},
             'c': {'lora_targets': 'embed,head,down', 'lora_rank': 3, 'lora_alpha': 5.0}}
    return {name: adapters.take(adapted(network(**model), **(kind | settings)))
            for name, kind in kinds.items()}


LEARNED = {'position': 'learned', 'tie': False}


def test_every_row_of_a_batch_has_its_own():
    saved, model = three(LEARNED), network(**LEARNED)
    for name, each in saved.items():
        adapters.add(model, each, name, name)
    names = ['b', '', 'c', 'a', 'b']
    adapters.select(model, names)
    x = ids(len(names))
    with torch.no_grad():
        together = model(x)
        for n, name in enumerate(names):
            alone = network(**LEARNED)
            if name:
                adapters.add(alone, saved[name], name, name)
            assert torch.allclose(together[n], alone(x[n:n + 1])[0], atol=1e-5)
    texts = torch.stack(list(generate(model, x[:, :5].tolist(), 12, temperature=0)))  # with a cache
    uncached = torch.stack(list(generate(model, x[:, :5].tolist(), 12, temperature=0, use_cache=False)))
    assert torch.equal(texts, uncached)
    adapters.select(model, [])
    assert not torch.allclose(model(x)[1], together[1], atol=1e-3)  # all of them speak again


def test_adapters_are_switched_silenced_weighed_and_added_up():
    saved, model = three(LEARNED), network(**LEARNED)
    base = logits(model)
    for name, each in saved.items():
        adapters.add(model, each, name, name)
    model.lora.shares = {}
    assert torch.equal(logits(model), base)
    model.lora.shares = {'a': 0.5, 'c': -2.0}
    weighed = logits(model)
    one = network(**LEARNED)
    adapters.add(one, adapters.combine([saved['a'], saved['c']], [0.5, -2.0]), 'both', 'both')
    assert torch.allclose(logits(one), weighed, atol=2e-5) and not torch.allclose(weighed, base, atol=0.1)
    two = network(**LEARNED)
    # of which one shares an A where the other does not
    both = adapters.combine([saved['a'], saved['b']], [1.0, 1.0])
    adapters.add(two, both, 'both', 'both')
    model.lora.shares = {'a': 1.0, 'b': 1.0}
    assert torch.allclose(logits(two), logits(model), atol=2e-5)
    before = adapters.merge(model)
    assert torch.allclose(logits(model), logits(two), atol=2e-5)
    adapters.unmerge(model, before)
    model.lora.shares = {'a': 0.5, 'c': -2.0}
    adapters.merge(model)
    assert torch.allclose(logits(model), weighed, atol=2e-5)
    with pytest.raises(UserError, match='DoRA'):
        adapters.combine([adapters.take(adapted(network(), lora_dora=True)), saved['a']], [1, 1])


def test_one_with_weights_trained_whole_is_used_alone():
    plain, whole = (adapters.take(adapted(network(), **settings))
                    for settings in ({}, {'whole': 'norm'}))
    for first, second in ((plain, whole), (whole, plain)):
        model = network()
        adapters.add(model, first, 'first', 'first')
        with pytest.raises(UserError, match='second: weights were trained fully'):
            adapters.add(model, second, 'second', 'second')


def test_a_base_is_known_by_every_tensor():
    weights = network(value_residual=True).state_dict()  # some have no dimensions
    known = adapters.fingerprint(weights)
    adapters.check_base(weights, known, 'base', 'adapter')
    for name in weights:
        with pytest.raises(UserError, match=f'{name} differs'):
            adapters.check_base(weights | {name: weights[name] + 1}, known, 'base', 'adapter')
    with pytest.raises(UserError, match='differs'):
        adapters.check_base({name: t for name, t in weights.items() if name != 'norm_f.weight'}, known,
                            'base', 'adapter')


# --- runs ---

LORA = ['--lora_rank=4', '--lora_targets=attn,mlp,embed', '--learning_rate=3e-3', '--lora_dropout=0.1']


@pytest.fixture(scope='module')
def dataset(tmp_path_factory):
    """A data set of bytes, so that sample.py can write."""
    folder = tmp_path_factory.mktemp('data') / 'counting'
    write_dataset(folder, vocab_size=257)
    return str(folder)


@pytest.fixture(scope='module')
def base(tmp_path_factory, dataset):
    """out_dir of a short run, to hang adapters on."""
    out = tmp_path_factory.mktemp('lora') / 'base'
    train(out, '--value_residual=True', dataset=dataset)
    return str(out)


def lora_delta(model):
    return model.blocks[0].attn.q.lora['default'].delta()


def weights(out_dir):
    return load_file(os.path.join(checkpoint.find(str(out_dir)), 'model.safetensors'))


@pytest.mark.parametrize('more', [[], ['--lora_dora=True'],
                                  ['--lora_targets=c_attn', "--lr_scale={'B$': 8}"]])
def test_a_run_that_was_stopped_ends_bitwise_as_one_that_was_not(tmp_path, base, dataset, more):
    once = train(tmp_path / 'once', f'--init_from={base}', *LORA, *more, dataset=dataset)
    train(tmp_path / 'twice', f'--init_from={base}', *LORA, *more, '--max_iters=4', '--lr_decay_iters=10',
          dataset=dataset)
    train(tmp_path / 'twice', f'--init_from={base}', *LORA, *more, dataset=dataset)
    a, b = weights(tmp_path / 'once'), weights(tmp_path / 'twice')
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert read_log(tmp_path / 'once')[-1]['val_loss'] < read_log(tmp_path / 'once')[0]['val_loss'] - 0.01
    assert 'parameters are trained' in once.stdout


def test_checkpoints_and_the_optimizer_hold_the_adapter_alone(tmp_path, base, dataset):
    train(tmp_path / 'run', f'--init_from={base}', *LORA, dataset=dataset)
    folder = checkpoint.find(str(tmp_path / 'run'))
    held, moments = weights(tmp_path / 'run'), read_moments(folder)
    assert (all('.lora.' in name for name in held)
            and {name.replace('.lora.default.', '.lora.') for name in moments} == held.keys())
    assert (os.path.getsize(f'{folder}/model.safetensors')
            < os.path.getsize(f'{checkpoint.find(base)}/model.safetensors'))


def test_two_ranks_train_what_one_does(tmp_path, base, dataset):
    for nproc in (1, 2):
        train(tmp_path / str(nproc), f'--init_from={base}', '--lora_rank=4', '--lora_targets=c_attn,mlp',
              '--learning_rate=3e-2', dataset=dataset, nproc=nproc)
    one, two = weights(tmp_path / '1'), weights(tmp_path / '2')
    assert all(torch.allclose(one[name], two[name], rtol=1e-3, atol=1e-5) for name in one)


def test_an_adapter_is_read_as_what_it_makes_of_its_base(tmp_path, base, dataset):
    train(tmp_path / 'run', f'--init_from={base}', '--lora_rank=4', '--learning_rate=3e-2', dataset=dataset)
    said = read_log(tmp_path / 'run')[-1]['val_loss']
    done = run('eval.py', 'loss', f'--out_dir={tmp_path}/run', '--dtype=float32')
    assert float(re.search(r'([\d.]+) nats a token', done.stdout)[1]) == pytest.approx(said, abs=2e-4)
    (tmp_path / 'text.txt').write_text('abcdefghij' * 20)
    said = [run('eval.py', 'text', *args, f'{tmp_path}/text.txt', '--dtype=float32').stdout.split(': ', 1)[-1]
            for args in ([f'--out_dir={tmp_path}/run'], [f'--out_dir={base}', f'--adapter={tmp_path}/run'],
                         [f'--out_dir={base}'])]
    assert said[0] == said[1] != said[2] and 'nats' in said[0]
    assert 'is a complete model' in one_line(run('eval.py', 'text', f'--out_dir={base}',
                                                   f'--adapter={base}', f'{tmp_path}/text.txt'))
    done = run('surgery.py', 'merge', f'--from={tmp_path}/run', f'--out_dir={tmp_path}/merged')
    assert done.returncode == 0, done.stderr
    (_, merged, _), (_, before, _) = read_model(str(tmp_path / 'merged')), read_model(base)
    assert (merged.keys() == before.keys()
            and not torch.equal(merged['blocks.0.attn.q.weight'], before['blocks.0.attn.q.weight']))
    texts = {run('sample.py', *args, '--dtype=float32', '--temperature=0',
                 '--num_samples=1', '--max_new_tokens=20', '--start=ab').stdout
             for args in ([f'--out_dir={tmp_path}/run'], [f'--out_dir={tmp_path}/merged'],
                          [f'--out_dir={base}', f'--adapter={tmp_path}/run'])}
    assert len(texts) == 1
    done = run('sample.py', f'--out_dir={base}', f'--adapter={tmp_path}/run',
               f'--adapter=again={tmp_path}/run', '--dtype=float32', '--temperature=0',
               '--num_samples=1', '--max_new_tokens=20', '--start=ab')
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.split('\n---------------\n')[:2]
    assert (first.removeprefix('run: ') == second.removeprefix('again: ')
            == texts.pop().split('\n---------------\n')[0])


def test_a_base_with_more_positions_and_a_router_that_stays(tmp_path, dataset):
    train(tmp_path / 'base', '--position=learned', '--n_expert=3', '--expert_bias=0.1', '--max_iters=7',
          dataset=dataset)
    train(tmp_path / 'run', f'--init_from={tmp_path}/base', '--lora_rank=2', '--block_size=16',
          dataset=dataset)
    model, _ = load_model(str(tmp_path / 'run'))
    (cfg, before, _), after = read_model(str(tmp_path / 'base')), model.state_dict()
    assert (cfg.block_size, model.cfg.block_size, len(after['wpe.weight'])) == (32, 16, 16)
    assert (before['blocks.0.mlp.expert_bias'].any()
            and torch.equal(after['blocks.0.mlp.expert_bias'], before['blocks.0.mlp.expert_bias']))
    said = read_log(tmp_path / 'run')[-1]['val_loss']
    done = run('eval.py', 'loss', f'--out_dir={tmp_path}/run', '--dtype=float32')
    assert float(re.search(r'([\d.]+) nats a token', done.stdout)[1]) == pytest.approx(said, abs=2e-4)


def test_an_adapter_whose_base_has_changed_is_refused_by_name(tmp_path, base, dataset):
    shutil.copytree(base, tmp_path / 'base')
    train(tmp_path / 'run', f'--init_from={tmp_path}/base', *LORA, dataset=dataset)
    shutil.rmtree(tmp_path / 'base')
    train(tmp_path / 'base', '--seed=2', dataset=dataset)
    for args in (['eval.py', 'loss', f'--out_dir={tmp_path}/run'],
                 ['sample.py', f'--out_dir={tmp_path}/base', f'--adapter={tmp_path}/run']):
        assert ('is an adapter for another base' in (line := one_line(run(*args)))
                and 'blocks.0.attn.k.weight differs' in line)
    shutil.rmtree(tmp_path / 'base')
    assert (f'is an adapter beside {tmp_path}/base/step_00000010, which does not exist'
            in one_line(run('sample.py', f'--out_dir={tmp_path}/run')))


def test_a_run_goes_on_as_it_began(tmp_path, base, dataset):
    train(tmp_path / 'run', f'--init_from={base}', *LORA, '--max_iters=4', dataset=dataset)
    for change in ('--lora_alpha=3', '--lora_targets=attn', '--lora_rank=2'):
        assert change[2:].split('=')[0] in one_line(train(tmp_path / 'run', f'--init_from={base}', *LORA,
                                                          change, dataset=dataset, check=False))
    # without a word of adapters
    assert train(tmp_path / 'run', '--init_from=resume', dataset=dataset).returncode == 0
    assert read_log(tmp_path / 'run')[-1]['step'] == 10
    assert 'step 10: val_loss' in train(tmp_path / 'run', '--eval_only', dataset=dataset).stdout


def test_a_run_of_an_earlier_version_goes_on_with_what_its_settings_asked_for(tmp_path, base, dataset):
    """lora_layers, lora_tokens and lora_whole: state.json and the tensors say the same."""
    out = tmp_path / 'run'
    train(out, f'--init_from={base}', '--lora_rank=4', '--lora_targets=attn', '--max_iters=4',
          dataset=dataset)
    folder = checkpoint.find(str(out))
    state, some = checkpoint.load_state(folder), next(iter(read_moments(folder).values()))
    model = fill(*read_model(base))

    def second_block(places):
        return [place for place in places if 'blocks.1.' in place.names[0]]
    begin_like_peft(model, build(Settings, lora_rank=4, lora_targets='attn'), second_block, [3], 'norm_f')
    saved = adapters.take(model)
    state['lora'] = saved.description()
    state['settings'] |= {'lora_layers': '1:', 'lora_tokens': [3], 'lora_whole': 'norm_f'}
    moments = {name: {what: torch.zeros_like(p) if t.ndim else t for what, t in some.items()}
               for name, p in model.named_parameters() if p.requires_grad}
    shutil.rmtree(folder)
    checkpoint.write(folder, 4, saved.tensors, pack_moments(moments), state, ())
    train(out, '--init_from=resume', dataset=dataset)
    after = weights(out)
    assert after.keys() == saved.tensors.keys() >= {'norm_f.weight', 'wte.tokens.values'}
    assert all(not torch.equal(after[name], t) for name, t in saved.tensors.items())
    assert run('sample.py', f'--out_dir={out}', '--num_samples=1', '--max_new_tokens=4').returncode == 0
    assert run('surgery.py', 'merge', f'--from={out}', f'--out_dir={tmp_path}/merged').returncode == 0


@pytest.mark.parametrize('args, words', [
    (['--lora_rank=4'],
     'lora_rank=4: adapters are trained beside weights that are there: give --init_from=DIR'),
    (['--init_from=BASE', '--lora_targets=attn'],
     'lora_targets=attn: belongs to adapters: set lora_rank too'),
    (['--init_from=BASE', '--lora_rank=4', '--lora_targets=atn'], "lora_targets: 'atn' matches nothing"),
    (['--init_from=BASE', '--lora_rank=64'], 'lora_rank=64: is more than'),
    (['--init_from=BASE', '--lora_rank=4', '--grow_every=2', '--grow_to=4'],
     'lora_rank=4: goes with grow_every=0 alone, not 2'),
])
def test_bad_runs_are_one_line_and_leave_nothing(tmp_path, base, dataset, args, words):
    done = train(tmp_path / 'run', *(arg.replace('BASE', base) for arg in args), dataset=dataset, check=False)
    assert words in one_line(done)
    assert not (tmp_path / 'run').exists()


def test_what_cannot_be_merged_or_combined_is_one_line_and_leaves_nothing(tmp_path, base, dataset):
    train(tmp_path / 'run', f'--init_from={base}', *LORA, dataset=dataset)
    for args, words in (
            (['merge', f'--from={tmp_path}/run'], '--untie=True makes them two'),
            (['merge', f'--from={base}'], 'is a complete model'),
            (['merge', f'--from={base}', f'--adapter={base}'], 'is a complete model, not an adapter'),
            (['merge', f'--from={base}', f'--adapter=keys={tmp_path}/run'], "'keys' is not a valid name"),
            (['combine', f'--from={base}', f'--adapter={tmp_path}/run'], '1 given: takes two or more'),
            (['merge', f'--from={base}', f'--adapter={tmp_path}/run', '--shares=[1, 2]'],
             'takes one for each adapter, 1')):
        assert words in one_line(run('surgery.py', *args, f'--out_dir={tmp_path}/out'))
        assert not (tmp_path / 'out').exists()
    done = run('surgery.py', 'merge', f'--from={tmp_path}/run', f'--out_dir={tmp_path}/out', '--untie=True')
    assert done.returncode == 0 and read_model(str(tmp_path / 'out'))[0].tie is False
    assert 'lora_' not in (tmp_path / 'out' / 'settings.json').read_text()  # it is a whole network now
    run('surgery.py', 'merge', f'--from={base}', f'--adapter={tmp_path}/run', '--shares=[0.5]',
        f'--out_dir={tmp_path}/half', '--untie=True')
    weights_of = [read_model(str(where))[1]['blocks.0.attn.q.weight']
                  for where in (base, tmp_path / 'half', tmp_path / 'out')]
    assert (torch.allclose(weights_of[1] - weights_of[0], (weights_of[2] - weights_of[0]) / 2, atol=1e-6)
            and not torch.equal(*weights_of[:2]))
    done = run('surgery.py', 'combine', f'--from={base}', f'--adapter={tmp_path}/run',
               f'--adapter=b={tmp_path}/run', '--shares=[2, 0.5]', f'--out_dir={tmp_path}/both')
    assert done.returncode == 0, done.stderr
    loss = run('eval.py', 'loss', f'--out_dir={tmp_path}/both')  # it knows its data
    assert loss.returncode == 0, loss.stderr
    merged = lora_delta(load_model(str(tmp_path / 'both'))[0])
    assert torch.allclose(merged, 2.5 * lora_delta(load_model(str(tmp_path / 'run'))[0]), atol=1e-6)
    model, _ = load_model(str(tmp_path / 'both'))
    assert model.blocks[0].attn.q.lora['default'].A.size(0) == 8
