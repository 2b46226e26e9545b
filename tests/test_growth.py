"""
Surgery's arithmetic: growth that keeps the function keeps it for every kind of network, inherited blocks are
the old ones, and so are their moments.
"""
import dataclasses
import math
from collections import Counter

import pytest
import torch
from conftest import TINY, one_line, read_log, run_here, train
from test_surgery import ids, operate, random_model

import checkpoint
from configurator import UserError, read_config
from features import build, part_of
from features.growth.factorize import factorize
from features.growth.networks import (
    average,
    grow,
    grown_layers,
    layer_names,
    parse_layers,
    take_layers,
    widen,
)
from features.moe.upcycle import upcycle
from features.moments import read_moments
from features.networks import fill
from model import AttentionInputs, ModelConfig, compile_all, make_model
from train import Settings

KINDS = [dict(), dict(norm='layernorm', bias=True, mlp='gelu', position='learned', tie=False),
         dict(n_kv_head=2, mlp='swiglu', tie=False),
         dict(value_residual=True, embed_norm=True, tie=False, softcap=15.0),
         dict(rank_qk=8, rank_mlp=8, rank_vo=4, rank_act='silu'),
         dict(rank_embed=8, rank_head=8), dict(ranks={'blocks.1.attn.o': 4, 'attn.k': 3}, bias=True),
         dict(depth_scale='norm'), dict(rank_mlp=8, mlp_norm=True),
         dict(parallel=True, rope_dim=4, norm='layernorm', bias=True, qkv_bias='never', mlp='gelu_exact'),
         dict(window=3, full_layers=[1], window_theta=50.0, attn_softcap=5.0, attn_scale=0.3),
         dict(embed_scale=3.0, residual_scale=0.5, logit_scale=2.0)]
EXPERTS = dict(n_expert=4, expert_bias=0.1)
SHARED = dict(n_expert=4, n_expert_active=2, expert_width=24, expert_renorm=False, shared_width=40,
              shared_gate=True, dense_layers=[1])


def network(**settings):
    return random_model(**dict(n_layer=3, n_head=4) | settings)


def logits(cfg, weights):
    return fill(cfg, weights, 'test')(ids())


def causal(model, length):
    angles = None if model.rotary is None else model.rotary[:, :length]
    inputs = AttentionInputs(angles, None)
    if model.cfg.window:
        inputs = inputs._replace(local=model.local_inputs(inputs, torch.arange(length), length, None))
    return inputs


# --- depth ---

@pytest.mark.parametrize('settings', KINDS + [dict(depth_scale='attn'), EXPERTS, SHARED], ids=str)
def test_silent_blocks_keep_the_function(settings):
    old = network(**settings)
    cfg, weights = take_layers(old.cfg, old.state_dict(), *grown_layers(old.cfg, 7, 'zero'))
    assert cfg.n_layer == 7
    torch.testing.assert_close(logits(cfg, weights), old(ids()), rtol=0, atol=1e-6)


# whose place in the stack is part of what it computes
@pytest.mark.parametrize('settings', [k for k in KINDS if 'depth_scale' not in k], ids=str)
def test_the_blocks_taken_are_the_old_ones(settings):
    old, layers = network(**settings), [2, 0, 2]
    cfg, weights = take_layers(old.cfg, old.state_dict(), layers)
    new, x = fill(cfg, weights, 'test'), torch.randn(1, 8, 32)
    for block, layer in zip(new.blocks, layers):
        at, v0 = causal(old, 8), torch.randn(1, 8, old.cfg.kv_heads, old.cfg.d_head)
        alone = block is new.blocks[0] or layer == 0  # such a block knows no values but its own
        if old.cfg.value_residual and alone:
            continue
        torch.testing.assert_close(block(x, at, v0)[0], old.blocks[layer](x, at, v0)[0])
    for name in ('wte.weight', 'norm_f.weight'):
        assert torch.equal(new.state_dict()[name], old.state_dict()[name])


def test_with_value_residual_the_first_block_has_its_own_values_wherever_it_goes():
    old = network(value_residual=True)
    cfg, weights = take_layers(old.cfg, old.state_dict(), [1, 0])
    new, x = fill(cfg, weights, 'test'), torch.randn(1, 8, 32)
    assert new.blocks[0].attn.v_mix is None and new.blocks[1].attn.v_mix == 0
    torch.testing.assert_close(new.blocks[1](x, causal(old, 8), torch.randn(1, 8, 4, 8))[0],
                               old.blocks[0](x, causal(old, 8))[0])


def test_where_grown_layers_are_from():
    three, four = (ModelConfig(n_layer=n) for n in (3, 4))
    assert grown_layers(three, 7, 'stack') == ([0, 1, 2, 0, 1, 2, 0], set())
    assert grown_layers(three, 6, 'interleave') == ([0, 0, 1, 1, 2, 2], set())
    assert grown_layers(four, 6, 'zero') == ([0, 0, 1, 2, 2, 3], {1, 4})
    # the old ones keep their numbers
    assert grown_layers(ModelConfig(n_layer=3, depth_scale='norm'), 5, 'zero') == ([0, 1, 2, 0, 1], {3, 4})
    for target in range(4, 17):
        layers, silent = grown_layers(four, target, 'zero')
        assert (len(silent) == target - 4
                and [layer for n, layer in enumerate(layers) if n not in silent] == [0, 1, 2, 3])


@pytest.mark.parametrize('text, layers', [('0-3', [0, 1, 2, 3]), ('0,2,4', [0, 2, 4]), ('last:2', [6, 7]),
                                          ('first:3', [0, 1, 2]), ('middle:4', [2, 3, 4, 5]),
                                          ('0-1, last:1', [0, 1, 7]), ('3,3', [3, 3])])
def test_layers_are_named_in_a_few_ways(text, layers):
    assert parse_layers(text, 8) == layers


@pytest.mark.parametrize('text', ['8', '0-8', 'last:9', 'middle:10', '-1', 'a', '1-', 'first:', '3-1',
                                  '0,3-1', 'first:0', '0-99999999999', '', '0,,1', '1:2', '²'])
def test_layers_that_are_not_there_are_refused(text):
    with pytest.raises(UserError, match='^layers='):
        parse_layers(text, 8)


def test_a_choice_without_code_does_not_work_as_another_one():
    with pytest.raises(UserError, match='^how=new: has no code in features/growth: '):
        grown_layers(ModelConfig(n_layer=2), 4, 'new')


def test_moments_follow_their_tensors():
    names = layer_names(network().state_dict(), [2, 0])
    assert (names['blocks.0.attn.q.weight'] == 'blocks.2.attn.q.weight'
            and names['blocks.1.mlp.down.weight'] == 'blocks.0.mlp.down.weight')
    assert names['wte.weight'] == 'wte.weight' and not any('blocks.2' in name for name in names)
    assert 'blocks.0.attn.v_mix' not in layer_names(network(value_residual=True).state_dict(), [2, 0])


@pytest.mark.parametrize('config, layers, count', [
    ('gpt2_medium', 14, 228_750_336), ('gpt2_medium', 12, 203_580_416), ('gpt2_large', 32, 694_928_640),
    ('gpt2_large', 16, 380_314_880), ('gpt2_xl', 24, 819_483_200)])
def test_inherited_networks_have_the_published_number_of_parameters(config, layers, count):
    """originals: 12·d² + 2·d a layer, and the table of tokens, the positions and the final norm once."""
    cfg = part_of(build(Settings, **read_config(Settings, f'config/{config}.py') | {'vocab_size': 50304}),
                  ModelConfig)
    with torch.device('meta'):
        cfg, weights = take_layers(cfg, make_model(cfg).state_dict(), range(layers))
    assert sum(t.numel() for t in weights.values()) == count


# --- width ---

WIDENED = [k for k in KINDS if 'mlp_norm' not in k] + [dict(norm='layernorm', bias=True),
                                                       dict(depth_scale='attn', norm_eps=0.1)]


@pytest.mark.parametrize('sizes', [dict(n_embd=48), dict(n_head=8), dict(d_ff=160),
                                   dict(n_embd=40, n_head=6, d_ff=200)], ids=str)
@pytest.mark.parametrize('settings', WIDENED, ids=str)
def test_widening_keeps_the_function(settings, sizes):
    old = network(**settings)
    cfg, weights = widen(old.cfg, old.state_dict(), **sizes)
    assert all(getattr(cfg, name) == size for name, size in sizes.items()) and cfg.d_head == old.cfg.d_head
    torch.testing.assert_close(logits(cfg, weights), old(ids()), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize('settings', [dict(), dict(norm='layernorm', bias=True),
                                      dict(rank_qk=8, rank_mlp=8, rank_vo=4)], ids=str)
def test_everything_that_widening_adds_can_learn(settings):
    """Two steps move every entry of the matrices."""
    old = network(**settings)
    new = fill(*widen(old.cfg, old.state_dict(), n_embd=48, n_head=8, d_ff=160), 'test').train()
    before, optimizer = ({name: p.detach().clone() for name, p in new.named_parameters()},
                         torch.optim.Adam(new.parameters(), lr=1e-2))
    for _ in range(2):
        new(ids(), ids().roll(-1, 1)).backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, p in new.named_parameters():
        if p.dim() == 2 and name not in ('wte.weight', 'wpe.weight'):
            assert (p != before[name]).float().mean() > 0.95, name


@pytest.mark.parametrize('settings, sizes, words', [
    (dict(), dict(n_embd=16), 'n_embd=16: the network has 32'),
    (dict(), dict(d_ff=100), 'd_ff=100: the network has 128'),
    (dict(n_kv_head=2), dict(n_head=7), 'n_head=7: a head of keys and values serves 2'),
    (dict(rank_mlp=8, mlp_norm=True), dict(d_ff=256), 'mlp_norm=True'),
    (dict(norm='layernorm', embed_norm=True), dict(n_embd=48), 'embed_norm=True, norm=layernorm')])
def test_what_cannot_be_widened_is_refused(settings, sizes, words):
    old = network(**settings)
    with pytest.raises(UserError, match=words):
        widen(old.cfg, old.state_dict(), **sizes)


# --- settings that were added since ---

Later = dataclasses.make_dataclass('Later', [('scale', float, dataclasses.field(default=1.0))],
                                   bases=(ModelConfig,))


def later(scale, **settings):
    """A network with a setting that growth.py has never heard of."""
    model = network(**settings)
    model.cfg = Later(**dataclasses.asdict(model.cfg), scale=scale)
    return model


@pytest.mark.parametrize('change, words', [
    (lambda old, weights: grow(old.cfg, weights, 6, 'zero'), 'grown'),
    (lambda old, weights: take_layers(old.cfg, weights, [0]), 'grown or cut in its layers'),
    (lambda old, weights: widen(old.cfg, weights, n_embd=48), 'widened and keep its function'),
    (lambda old, weights: upcycle(old.cfg, weights, 4), 'made a mixture of experts and keep its function'),
    (lambda old, weights: average([old.cfg] * 2, [weights] * 2, 'ab'), 'averaged'),
    (lambda old, weights: factorize(old, {}), 'factorized')],
    ids=['grow', 'take_layers', 'widen', 'upcycle', 'average', 'factorize'])
def test_a_setting_that_is_not_known_has_to_be_at_its_default(change, words):
    old = later(1.8)
    with pytest.raises(UserError, match=f'^scale=1.8: a network with it cannot be {words}$'):
        change(old, old.state_dict())
    old = later(1.0)
    change(old, old.state_dict())


# what each setting has to be beside it, and a value away from its default
SINGLE = [(dict(), dict(block_size=24)), (dict(), dict(n_kv_head=2)), (dict(), dict(head_dim=16)),
          (dict(), dict(d_ff=48)), (dict(), dict(position='learned')),
          (dict(), dict(position='relative')), (dict(), dict(position='none')),
          (dict(), dict(rope_theta=500.0)), (dict(), dict(no_rope=[1])),
          (dict(), dict(post_norm=True)), (dict(norm='layernorm', bias=True), dict(post_norm=True)),
          (dict(), dict(rope_scaling={'rope_type': 'linear', 'factor': 2.0})),
          (dict(), dict(norm='layernorm')), (dict(), dict(norm_eps=0.1)),
          *((dict(), dict(mlp=mlp)) for mlp in ('gelu', 'silu', 'relu', 'swiglu', 'geglu')),
          (dict(), dict(mlp_norm=True)), (dict(), dict(qk_norm=False)),
          (dict(), dict(qk_norm='head')), (dict(), dict(qk_norm='width')), (dict(), dict(n_expert=4)),
          (dict(n_expert=4), dict(n_expert_active=2)),
          (dict(n_expert=4), dict(expert_bias=0.1)), (dict(n_expert=4), dict(expert_width=24)),
          (dict(n_expert=4), dict(expert_renorm=True)), (dict(n_expert=4), dict(shared_width=24)),
          (dict(n_expert=4, shared_width=24), dict(shared_gate=True)),
          (dict(n_expert=4), dict(dense_layers=[1])),
          (dict(), dict(rope_dim=4)), (dict(), dict(window=3)), (dict(window=3), dict(full_layers=[1])),
          (dict(window=3), dict(window_theta=50.0)), (dict(), dict(parallel=True)),
          (dict(), dict(post_norm='both')), (dict(), dict(attn_scale=0.3)),
          (dict(), dict(attn_softcap=3.0)), (dict(), dict(embed_scale=3.0)),
          (dict(), dict(residual_scale=0.5)), (dict(), dict(logit_scale=2.0)),
          (dict(bias=True), dict(qkv_bias='never')), (dict(), dict(softcap=5.0)),
          (dict(), dict(embed_norm=True)), (dict(), dict(depth_scale='attn')),
          (dict(), dict(depth_scale='norm')), (dict(), dict(value_residual=True)),
          (dict(), dict(tie=False)), (dict(), dict(t5_scale=True)), (dict(tie=False), dict(t5_scale=True)),
          (dict(), dict(bias=True)), (dict(), dict(qkv_bias=True)), (dict(), dict(dropout=0.1)),
          (dict(), dict(rank_qk=8)), (dict(qkv_bias=True), dict(rank_vo=8)),
          (dict(), dict(rank_vo=8)), (dict(), dict(rank_mlp=8)), (dict(tie=False), dict(rank_embed=8)),
          (dict(tie=False), dict(rank_head=8)), (dict(), dict(ranks={'attn.k': 3, 'blocks.1.mlp.down': 4})),
          (dict(rank_qk=8, rank_vo=8, rank_mlp=8), dict(rank_act='silu'))]


@pytest.mark.parametrize('beside, settings', SINGLE, ids=str)
def test_every_setting_keeps_the_function_or_is_refused_by_name(beside, settings):
    old = network(**beside | settings)
    x = ids()[:, :old.cfg.block_size]
    changes = [lambda weights: grow(old.cfg, weights, 6, 'zero')[:2],
               lambda weights: widen(old.cfg, weights, 48, 8, 160),
               lambda weights: upcycle(old.cfg, weights, 4)]
    for change in changes:
        try:
            cfg, weights = change(old.state_dict())
        except UserError as error:
            assert any(name in str(error) for name in beside | settings)
        else:
            torch.testing.assert_close(fill(cfg, weights, 'test')(x), old(x), rtol=1e-5, atol=1e-4)


# --- the mean, and the scale by depth ---

def test_the_mean_is_the_mean():
    a, b = network(), network()
    for p in b.parameters():
        p.data += 1
    cfg, weights = average([a.cfg, b.cfg], [a.state_dict(), b.state_dict()], 'ab')
    assert cfg == a.cfg and all(torch.allclose(weights[name], t + 0.5) for name, t in a.state_dict().items())
    with pytest.raises(UserError, match='from=b: has n_layer=2, but a has 3'):
        average([a.cfg, network(n_layer=2).cfg], [a.state_dict(), b.state_dict()], 'ab')


def test_scaling_by_depth_is_in_the_queries_or_in_the_norms():
    """
    depth_scale='attn' divides the logits of block n by n: so do its queries' weights; 'norm' is a weight of
    its norms.
    """
    for scale, names, by in [('attn', ['attn.q.weight'], lambda n: n),
                             ('norm', ['norm_1.weight', 'norm_2.weight'], math.sqrt)]:
        scaled, plain = (network(qk_norm=False, depth_scale=s) for s in (scale, 'none'))
        assert not torch.allclose(scaled(ids()), plain(ids()))
        for n, block in enumerate(plain.blocks, 1):
            for name in names:
                block.get_parameter(name).data /= by(n)
        torch.testing.assert_close(scaled(ids()), plain(ids()), rtol=1e-5, atol=1e-5)


# --- growth in the middle of a run ---

GROWN = ['--n_layer=1', '--grow_every=4', '--grow_to=4', '--grow_by=2', '--max_iters=12', '--eval_interval=4',
         '--keep_checkpoints=9']


def layers_of(out_dir):
    return [checkpoint.load_state(folder)['model']['n_layer']
            for folder in reversed(checkpoint.checkpoints(str(out_dir)))]


def test_a_run_grows_and_can_be_interrupted_anywhere(dataset, tmp_path):
    done = train(tmp_path / 'whole', *GROWN, dataset=dataset)
    # saved, then grown
    assert ('grown to 3 layers' in done.stdout and 'grown to 4 layers' in done.stdout
            and layers_of(tmp_path / 'whole') == [1, 3, 4])
    for steps in (4, 6, 12):
        train(tmp_path / 'parts', *GROWN, f'--max_iters={steps}', '--lr_decay_iters=12', '--warmup_iters=0',
              dataset=dataset)
    train(tmp_path / 'again', *GROWN, '--lr_decay_iters=12', '--warmup_iters=0', dataset=dataset)
    whole, parts = ({r['step']: r for r in read_log(tmp_path / name)} for name in ('again', 'parts'))
    assert all(whole[step] == parts[step] for step in (1, 5, 7, 9, 12))
    flops = [whole[step]['flops'] - whole[step - 1]['flops'] for step in (3, 7, 11)]
    # two blocks, then one
    assert flops[0] < flops[1] < flops[2] and flops[2] - flops[1] == pytest.approx((flops[1] - flops[0]) / 2)


@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
def test_copied_blocks_get_moments_of_their_own(optimizer, dataset, tmp_path):
    train(tmp_path, '--n_layer=2', '--max_iters=6', '--grow_every=4', '--grow_to=4',
          f'--optimizer={optimizer}', dataset=dataset)
    moments = read_moments(checkpoint.find(str(tmp_path)))
    assert all(found['step'].item() == 6 for found in moments.values() if 'exp_avg' in found)
    tensors = [t for found in moments.values() for t in found.values()]
    assert len({t.data_ptr() for t in tensors}) == len(tensors)


def test_further_blocks_can_be_inherited(dataset, tmp_path):
    """The recipe of Inheritune: the first blocks of a reference, and after a while the next ones."""
    train(tmp_path / 'reference', '--n_layer=4', '--max_iters=20', '--eval_interval=20', dataset=dataset)
    operate('inherit', tmp_path / 'reference', tmp_path / 'first', '--layers=0-1')
    args = [f'--init_from={tmp_path}/first', '--grow_every=1', '--grow_to=4',
            f'--grow_from={tmp_path}/reference', '--learning_rate=0', '--max_iters=2']
    done = train(tmp_path / 'run', *args, dataset=dataset)
    assert 'grown to 4 layers' in done.stdout
    new, old = (checkpoint.read_weights(checkpoint.find(str(tmp_path / name)))
                for name in ('run', 'reference'))
    assert new.keys() == old.keys() and all(torch.equal(new[name], old[name]) for name in new)
    # goes on, grown
    assert ('at step 2' in train(tmp_path / 'run', *args, '--max_iters=3', dataset=dataset).stdout
            and layers_of(tmp_path / 'run')[-1] == 4)
    train(tmp_path / 'other', '--n_layer=4', '--mlp=swiglu', dataset=dataset)
    for more, words in [
            ([f'--grow_from={tmp_path}/other'], 'its blocks do not fit'),
            (['--grow_to=5'], 'has 4 blocks, fewer than grow_to=5'), (['--grow_to=2'], 'begins with 2'),
            (['--grow_every=3'], 'is more than max_iters=2: '), (['--grow_every=0'], 'give both or none'),
            (['--grow_by=0'], 'grow_by=0: takes 1'), (['--grow_every=0', '--grow_to=0'], 'give these too')]:
        assert words in one_line(train(tmp_path / 'no', *args, *more, dataset=dataset, check=False))
    operate('factorize', tmp_path / 'reference', tmp_path / 'low', '--rank_qk=4')
    done = train(tmp_path / 'no', *args, f'--grow_from={tmp_path}/low', dataset=dataset, check=False)
    assert 'blocks.0.attn.q has rank 4, in this network 0' in one_line(done)


def test_two_ranks_grow_alike(dataset, tmp_path):
    for nproc in (1, 2):
        train(tmp_path / str(nproc), *GROWN, dataset=dataset, nproc=nproc)
    for a, b in zip(*(read_log(tmp_path / str(nproc)) for nproc in (1, 2))):
        assert a == pytest.approx(b, rel=1e-4)


def count_graphs(monkeypatch, *args):
    """
    Run train.py with --compile=True and a compiler that only counts: [(layers, training or not), …] of the
    networks whose graphs it was given, and the same of those that ran, each as often as it happened.
    """
    made, ran, compile_module = [], [], torch.nn.Module.compile

    def compile_counting(module, **options):
        def counting(graph, inputs):
            now = module.cfg.n_layer, module.training
            made.append(now)
            return lambda *values: ran.append(now) or graph.forward(*values)
        return compile_module(module, backend=counting, **options)
    monkeypatch.setattr(torch.nn.Module, 'compile', compile_counting)
    # compile_all() sets the first
    with torch._dynamo.config.patch(recompile_limit=8, accumulated_recompile_limit=4):
        done = run_here(['train.py', *TINY, '--compile=True', *args])
    assert done.returncode == 0, done.stderr
    return Counter(made), Counter(ran)


@pytest.mark.full
def test_a_growing_network_is_compiled_at_every_size(dataset, tmp_path, monkeypatch):
    args = ['--n_layer=1', '--grow_every=1', '--grow_to=3', '--grow_by=1', '--eval_interval=1',
            '--max_iters=4']
    made, ran = count_graphs(monkeypatch, f'--dataset={dataset}', f'--out_dir={tmp_path}', *args)
    sizes = {(n_layer, training) for n_layer in range(1, 4) for training in (True, False)}
    assert made.keys() == ran.keys() == sizes  # torch allows a function 4 variants here
    assert len({made[key] for key in sizes if key[1]}) == 1


@pytest.mark.slow
def test_blocks_of_a_mixture_with_constants_of_their_own_are_all_compiled(monkeypatch):
    """
    Experts in float32 are left out of the graphs, so that every block has its own: more than torch allows by
    itself.
    """
    made, compile_module = [], torch.nn.Module.compile

    def counting(graph, inputs):
        made.append(graph)
        return graph.forward
    monkeypatch.setattr(torch.nn.Module, 'compile',
                        lambda self, **options: compile_module(self, backend=counting, **options))
    model = network(n_layer=10, n_expert=2, depth_scale='norm')
    with torch._dynamo.config.patch(recompile_limit=8):  # as it was, in the end
        compile_all(model)
        model(ids(), ids())
    assert len(made) >= 10


def test_a_choice_that_growth_does_not_know_is_refused():
    """As a new kind of norm, of which nobody has shown that it can be widened."""
    cfg = ModelConfig(vocab_size=64, block_size=8, n_layer=1, n_head=2, n_embd=16)
    cfg.norm = 'dyt'
    with pytest.raises(UserError, match='^norm=dyt: a network with it cannot be widened'):
        widen(cfg, {}, 32, 4)
