"""
Surgery as a user runs it, and factorizing: at full rank the same function, below it the best one of its rank,
by energy no rank too many. The arithmetic of growth is in test_growth.py.
"""
import dataclasses
import json
import re

import pytest
import torch
from conftest import one_line, read_log, run, train, write_dataset
from test_hub import saved
from torch.utils.flop_counter import FlopCounterMode

import checkpoint
from batches import Mixture
from configurator import UserError
from features import build
from features.commands import configure_command
from features.growth import runs
from features.growth.commands import run_factorize
from features.growth.factorize import decompose, factorize, factors, input_moments
from features.hf import reading
from features.networks import fill, load_model
from features.study.runs import group, read_run
from features.study.tables import table
from model import LowRank, ModelConfig, Transformer, make_model
from surgery import FactorizeSettings


def random_model(**settings):
    torch.manual_seed(0)
    model = make_model(build(ModelConfig, **dict(vocab_size=64, block_size=32, n_layer=2, n_head=2, n_embd=32)
                             | settings)).eval()
    for name, p in model.named_parameters():
        # biases and norms too
        p.data = (1 if 'norm' in name and 'weight' in name else 0) + torch.randn(p.shape) / 5
    return model


def all_ranks(model, rank):
    return {f'blocks.{name}': rank for name, layer in model.blocks.named_modules()
            if isinstance(layer, torch.nn.Linear)}


def ids():
    return torch.randint(64, (2, 32), generator=torch.Generator().manual_seed(1))


# --- the arithmetic ---

@pytest.mark.parametrize('settings', [dict(bias=True, norm='layernorm', mlp='gelu', position='learned'),
                                      dict(mlp='swiglu', n_kv_head=1, tie=False)], ids=str)
@pytest.mark.parametrize('by_inputs', [False, True])
def test_at_full_rank_the_logits_are_the_same(settings, by_inputs, dataset):
    model = random_model(**settings)
    ranks = {name: min(layer.weight.shape) for name, layer in model.named_modules()
             if name.startswith('blocks') and isinstance(layer, torch.nn.Linear)}
    weights, _ = factorize(model, ranks, moments=input_moments(model, Mixture(dataset, 'train', 32, 0))
                           if by_inputs else None)
    low = fill(dataclasses.replace(model.cfg, ranks=ranks), weights, 'test').eval()
    assert sum(isinstance(layer, LowRank) for layer in low.modules()) == len(ranks)
    torch.testing.assert_close(low(ids()), model(ids()), rtol=1e-5, atol=1e-5)


def test_the_cut_is_the_best_of_its_rank_and_balanced():
    torch.manual_seed(0)
    W = torch.randn(30, 20).double()
    down, up = factors(*decompose(W), 6)
    assert torch.isclose((W - up @ down).norm(), torch.linalg.svdvals(W)[6:].norm())  # Eckart and Young
    torch.testing.assert_close(up.T @ up, down @ down.T)


def test_weighing_by_the_inputs_gives_the_least_error_of_the_outputs():
    torch.manual_seed(0)
    W, x = torch.randn(24, 16).double(), torch.randn(500, 16).double() * torch.logspace(0, -2, 16)
    moment = x.T @ x / len(x)
    errors = [((x @ (W - up @ down).T).square().sum() / len(x)).item()
              for down, up in (factors(*decompose(W, m), 4) for m in (None, moment))]
    S = decompose(W, moment)[1]
    assert abs(errors[1] / S[4:].square().sum().item() - 1) < 1e-4 and errors[1] < 0.5 * errors[0]


def test_an_input_that_never_occurs_is_no_trouble():
    W, moment = (torch.randn(8, 6, generator=torch.Generator().manual_seed(0)),
                 torch.diag(torch.tensor([1.0, 1, 1, 0, 0, 0])).double())
    down, up = factors(*decompose(W, moment), 3)
    torch.testing.assert_close((up @ down)[:, :3], W.double()[:, :3], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize('packing', ['stream', 'document'])
def test_the_moments_are_those_of_the_inputs_without_the_padding(dataset, packing):
    model, seen, data = random_model(), [], Mixture(dataset, 'train', 32, 0, packing)
    layer = model.blocks[1].mlp.down
    layer.register_forward_pre_hook(lambda layer, args: seen.append(args[0].flatten(0, 1).detach()))
    moments, x = input_moments(model, data), torch.cat(seen)
    x = x[torch.from_numpy(data.rows(range(len(x) // 32))[1] >= 0).flatten()]
    assert moments.keys() == all_ranks(model, 0).keys() and (packing == 'stream' or len(x) < 0.9 * 2 ** 16)
    torch.testing.assert_close(moments['blocks.1.mlp.down'], (x.T @ x / len(x)).double(), rtol=1e-4,
                               atol=1e-6)


def test_layers_with_the_same_input_share_its_moments(dataset, monkeypatch):
    """Queries, keys and values have one, gate and up another; each is multiplied once."""
    model, data = random_model(mlp='swiglu', d_ff=48), Mixture(dataset, 'train', 32, 0)
    seen = {}
    for name, layer in model.blocks[1].named_modules():
        if isinstance(layer, torch.nn.Linear):
            layer.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0].detach()}))
    monkeypatch.setattr('features.growth.factorize.sample_tokens', lambda model: 8 * 32)
    x = torch.from_numpy(data.rows(range(8))[0])
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        model.eval().hidden(x)
    with FlopCounterMode(display=False) as counter:
        moments = input_moments(model, data)
    for name, x in seen.items():
        x = x.flatten(0, 1).double()
        torch.testing.assert_close(moments[f'blocks.1.{name}'], x.T @ x / len(x))
    assert len(seen) == 7
    squares = 2 * (3 * 32 ** 2 + 48 ** 2)  # two blocks; the inputs of attention, its output, MLP; of down
    assert counter.get_total_flops() - forward.get_total_flops() == 2 * 8 * 32 * squares


@pytest.mark.parametrize('energy', [0.5, 0.8])
def test_by_energy_each_matrix_gets_the_least_multiple_of_8(energy):
    model = random_model(n_embd=64, n_head=4)
    weights, records = factorize(model, {}, energy)
    for r in records:
        s = torch.linalg.svdvals(model.get_submodule(r['name']).weight.double())
        kept, sizes = s.square().cumsum(0) / s.square().sum(), model.get_submodule(r['name']).weight.shape
        if r['rank']:
            assert (r['rank'] % 8 == 0 and kept[r['rank'] - 1] >= energy
                    and kept[r['rank'] - 9 if r['rank'] > 8 else 0] < energy)
            up, down = (weights[f'{r["name"]}.{half}.weight'].double() for half in ('up', 'down'))
            close = 1 - ((up @ down - model.get_submodule(r['name']).weight).norm() / s.norm()) ** 2
            assert abs(close - kept[r['rank'] - 1]) < 1e-6 and abs(r['kept'] - close) < 1e-6
        else:
            needed = -(-(int((kept < energy).sum()) + 1) // 8) * 8
            assert needed * sum(sizes) >= sizes[0] * sizes[1]
    assert any(r['rank'] for r in records) and (energy < 0.8 or any(not r['rank'] for r in records))


# --- as a user runs it ---

@pytest.fixture(scope='module')
def dense(dataset, tmp_path_factory):
    """out_dir of a trained dense network, 64 wide."""
    out_dir = tmp_path_factory.mktemp('dense') / 'run'
    train(out_dir, '--n_embd=64', '--n_head=4', '--d_ff=256', '--max_iters=40', '--eval_interval=40',
          dataset=dataset)
    return str(out_dir)


def test_from_a_run_to_a_run(dense, dataset, tmp_path):
    low, tuned = f'{tmp_path}/low', f'{tmp_path}/tuned'
    done = run('surgery.py', 'factorize', f'--from={dense}', f'--out_dir={low}', '--rank_qk=8',
               '--rank_mlp=16')
    assert done.returncode == 0, done.stderr
    state = checkpoint.load_state(checkpoint.find(low))
    assert ((state['step'], state['model']['rank_qk'], state['model']['rank_vo'], state['model']['rank_mlp'])
            == (0, 8, 0, 16))
    saved_ = 2 * (2 * (64 * 64 - 8 * 128) + 2 * (64 * 256 - 16 * 320))
    before, after = (Transformer(ModelConfig(**checkpoint.load_state(checkpoint.find(where))['model']))
                     for where in (dense, low))
    assert (before.num_params() - after.num_params() == saved_
            and before.flops_per_token() - after.flops_per_token() == 6 * saved_)
    assert f'{before.num_params():,} → ' in done.stdout and f'{after.num_params():,}' in done.stdout

    loss = read_log(low)[0]['val_loss']
    assert loss > read_log(dense)[-1]['val_loss'] and f'→ {loss:14.4f}' in done.stdout  # what it cost
    steps = ['--batch_size=4', '--block_size=32', '--max_iters=20', '--eval_interval=20', '--eval_iters=0',
             '--learning_rate=3e-3']
    done = run('train.py', f'--out_dir={tuned}', f'--init_from={low}', f'--dataset={dataset}', *steps,
               '--dtype=float32', '--sample_tokens=0')
    assert done.returncode == 0, done.stderr
    log = [r for r in read_log(tuned) if 'val_loss' in r]
    # starts where surgery left it, and mends
    assert abs(log[0]['val_loss'] - loss) < 1e-4 and log[-1]['val_loss'] < loss
    done = run('compare.py', dense, low, tuned, f'--picture={tmp_path}/p.png')
    assert done.returncode == 0 and f'{after.num_params():,}' in done.stdout, done.stderr
    # a run of no steps
    assert (re.search(rf'^low .* {loss:.4f} ', done.stdout, re.MULTILINE)
            and not re.search('not finished|careful', done.stdout))
    assert run('compare.py', low, f'--picture={tmp_path}/p.png').returncode == 0
    assert load_model(low)[0].num_params() == after.num_params()
    assert (f'--init_from={low} and another --out_dir'
            in one_line(train(low, '--n_embd=64', dataset=dataset, check=False)))


def test_gpt2_keeps_its_biases_and_its_tokenizer(tmp_path):
    folder = saved(tmp_path / 'gpt2')
    with pytest.raises(UserError, match='no tokenizer.json, tokenizer.model or spiece.model'):
        run_factorize(FactorizeSettings(f'hf:{folder}', f'{tmp_path}/low', rank_mlp=40))
    from tokenizers import Tokenizer, models
    Tokenizer(models.WordLevel({'</s>': 0} | {f't{n}': n for n in range(1, 100)},
                               unk_token='</s>')).save(f'{folder}/tokenizer.json')
    run_factorize(FactorizeSettings(f'hf:{folder}', f'{tmp_path}/low', rank_qk=48, rank_vo=48, rank_mlp=48))
    written = checkpoint.find(f'{tmp_path}/low')
    assert (tmp_path / 'low/step_00000000/tokenizer.json').exists()
    low = fill(ModelConfig(**checkpoint.load_state(written)['model']), checkpoint.read_weights(written),
               written).eval()
    assert low.blocks[0].attn.q.up.bias.abs().sum() > 0 and low.blocks[0].attn.q.down.bias is None
    torch.testing.assert_close(low(ids()), fill(*reading.load(f'hf:{folder}'), folder).eval()(ids()),
                               rtol=1e-4, atol=1e-4)


def test_what_cannot_be_factorized_is_refused_and_nothing_is_written(dense, tmp_path):
    low, new, chain = (f'{tmp_path}/low', f'{tmp_path}/new',
                       make_model(build(ModelConfig, arch='markov', vocab_size=64)))
    run_factorize(FactorizeSettings(dense, low, energy=0.6, dataset='none'))
    assert ('low: seed 1337 has no loss: surgery.py measures one'
            in table(group([read_run(dense), read_run(low)])))
    checkpoint.save(f'{tmp_path}/chain', 0, chain.state_dict(), {},
                    {'step': 0, 'model': dataclasses.asdict(chain.cfg), 'settings': {}, 'surgery': 'test',
                     'tokenizer': {'kind': 'byte'}})
    for args, words in [(dict(from_='nowhere', energy=0.9), 'nowhere: no such directory'),
                        (dict(from_=f'{tmp_path}/chain', energy=0.9), 'a Markov chain'),
                        (dict(from_=low, energy=0.9), 'is low-rank already'),
                        (dict(rank_qk=65), 'rank_qk=65 is larger than the matrix'),
                        (dict(out_dir=dense, energy=0.9), 'holds something already'),
                        (dict(energy=0.9999, dataset='none'), 'lower it'),
                        (dict(rank_qk=8, dataset='nowhere'), 'no such data set')]:
        with pytest.raises(UserError, match=words):
            run_factorize(FactorizeSettings(**dict(from_=dense, out_dir=new) | args))
    for args, words in [([f'--out_dir={new}', '--energy=0.9'], 'from: is not given'),
                        ([f'--from={dense}', '--energy=0.9'], 'out_dir: is not given'),
                        ([f'--from={dense}', f'--out_dir={new}'], 'give either energy or ranks'),
                        ([f'--from={dense}', f'--out_dir={new}', '--energy=0.9', '--rank_qk=8'],
                         'give either energy or ranks')]:
        with pytest.raises(UserError, match=words):
            configure_command({'factorize': (run_factorize, FactorizeSettings)}, ['factorize', *args])
    assert ('energy=1: takes 0 < energy < 1'
            in one_line(run('surgery.py', 'factorize', f'--from={dense}', f'--out_dir={new}', '--energy=1')))
    assert (not (tmp_path / 'new').exists()
            and json.loads((tmp_path / 'low/settings.json').read_text())['ranks'])


# --- inherit, grow, widen, average ---

GO_ON = ['--batch_size=4', '--block_size=32', '--eval_interval=20', '--eval_iters=0', '--dtype=float32',
         '--sample_tokens=0', '--log_interval=1']


def operate(command, source, out_dir, *args):
    """Output of surgery.py, and the loss that it wrote down."""
    done = run('surgery.py', command, f'--from={source}', f'--out_dir={out_dir}', *args)
    assert done.returncode == 0, done.stderr
    return done.stdout, read_log(out_dir)[0]['val_loss']


def weights_of(out_dir):
    return checkpoint.read_weights(checkpoint.find(str(out_dir)))


def test_inherited_layers_go_on_as_a_smaller_network(dense, dataset, tmp_path):
    out, loss = operate('inherit', dense, tmp_path / 'small', '--layers=last:1')
    old, new = weights_of(dense), weights_of(tmp_path / 'small')
    assert ('blocks 1 of 2' in out
            and all(torch.equal(t, old[name.replace('blocks.0', 'blocks.1')]) for name, t in new.items()))
    done = run('train.py', f'--out_dir={tmp_path}/on', f'--init_from={tmp_path}/small',
               f'--dataset={dataset}', *GO_ON, '--max_iters=20')
    assert done.returncode == 0 and '1 layers' in done.stdout, done.stderr
    log = [r for r in read_log(tmp_path / 'on') if 'val_loss' in r]
    assert abs(log[0]['val_loss'] - loss) < 1e-4 and log[-1]['val_loss'] < loss


def test_what_the_original_forgot_can_be_forgotten(dense, dataset, tmp_path):
    """
    Inheritune's code left positions and the final norm behind; --fresh draws them, or other parts, anew, the
    same for the same seed.
    """
    train(tmp_path / 'gpt', '--position=learned', '--max_iters=20', '--eval_interval=20', dataset=dataset)
    losses = [operate('inherit', tmp_path / 'gpt', tmp_path / name, '--layers=0', *args)[1]
              for name, args in [('a', ['--fresh=wpe,norm_f']), ('b', ['--fresh=attn,norm', '--seed=1']),
                                 ('all', [])]]
    assert losses[2] < losses[0]
    old, a, b = weights_of(tmp_path / 'gpt'), weights_of(tmp_path / 'a'), weights_of(tmp_path / 'b')
    changed = [{name for name in new if not torch.equal(new[name], old[name])} for new in (a, b)]
    assert changed[0] == {'wpe.weight', 'norm_f.weight'}
    assert changed[1] == {f'blocks.0.{part}.weight'
                          for part in ('norm_1', 'norm_2', 'attn.q', 'attn.k', 'attn.v', 'attn.o')}
    assert (a['norm_f.weight'] == 1).all()
    done = run('surgery.py', 'inherit', f'--from={dense}', f'--out_dir={tmp_path}/c', '--layers=0',
               '--fresh=wpe')
    assert ("'wpe' is no part of this network: takes attn, down, k, mlp, norm, norm_f, o, q, up, v, wte"
            in one_line(done))


def test_growth_with_silent_blocks_keeps_the_loss_and_stacking_does_not(dense, tmp_path):
    _, before = operate('inherit', dense, tmp_path / 'same', '--layers=0-1')
    out, loss = operate('grow', dense, tmp_path / 'zero', '--n_layer=5', '--how=zero')
    assert 'blocks 0, 0 silent, 0 silent, 1, 1 silent' in out and abs(loss - before) < 1e-6
    _, stacked = operate('grow', dense, tmp_path / 'stack', '--n_layer=4')
    assert stacked - before > 1e-3
    _, wide = operate('widen', dense, tmp_path / 'wide', '--n_embd=96', '--n_head=6', '--d_ff=384')
    assert abs(wide - before) < 1e-5


def test_the_average_of_checkpoints_is_the_mean_of_their_weights(dataset, tmp_path):
    whole = tmp_path / 'whole'
    train(whole, '--n_layer=2', '--max_iters=20', '--eval_interval=10', '--keep_checkpoints=9',
          dataset=dataset)
    done = run('surgery.py', 'average', f'--from={whole}/step_*', f'--out_dir={tmp_path}/mean')
    assert done.returncode == 0 and 'the mean of' in done.stdout, done.stderr
    parts = [weights_of(whole / f'step_{n:08d}') for n in (10, 20)]
    assert all(torch.allclose(t, (parts[0][name] + parts[1][name]) / 2)
               for name, t in weights_of(tmp_path / 'mean').items())


def test_a_long_context_and_a_large_network_are_measured_on_less(dense, tmp_path, monkeypatch, capsys):
    """Losses of rows shorter than the context are printed, but are no record for compare.py."""
    def factorized(name):
        run_factorize(FactorizeSettings(dense, f'{tmp_path}/{name}', rank_mlp=16))
        return checkpoint.load_state(checkpoint.find(f'{tmp_path}/{name}'))
    state = factorized('all')
    assert state['settings']['eval_iters'] == 0  # the whole split
    monkeypatch.setattr(runs, 'LEAST', 800)
    monkeypatch.setattr(runs, 'EFFORT', 1e3)
    state = factorized('fewer')
    assert state['settings']['eval_iters'] == 800 // 32 // 12
    assert 'losses: of rows' not in capsys.readouterr().out and read_log(tmp_path / 'fewer')
    monkeypatch.setattr(runs, 'ROW', 16)
    state = factorized('shorter')
    assert state['model']['block_size'] == state['settings']['block_size'] == 32
    said = capsys.readouterr().out
    assert 'losses: of rows of 16 tokens, the context has 32' in said and 'val_loss' in said
    assert not (tmp_path / 'shorter/log.jsonl').exists()


def test_surgery_that_cannot_be_done_writes_nothing(dense, tmp_path):
    write_dataset(tmp_path / 'other', vocab_size=70)
    for command, args, words in [('inherit', ['--layers=0-2'], 'the network has the blocks 0 to 1'),
                                 ('inherit', [], 'layers: is not given'),
                                 ('inherit', ['--layers=0', f'--dataset={tmp_path}/other'],
                                  'other: was prepared with another tokenizer'),
                                 ('grow', ['--n_layer=2'], 'has 2 blocks already'),
                                 ('grow', [], 'n_layer=0: takes'), ('widen', [], 'give at least one'),
                                 ('widen', ['--n_embd=32'], 'n_embd=32: the network has 64'),
                                 ('average', [], '1 found: give two or more'),
                                 ('average', [f'--from={tmp_path}/nowhere'], 'nowhere: no such directory')]:
        assert words in one_line(run('surgery.py', command, f'--from={dense}', f'--out_dir={tmp_path}/new',
                                     *args))
    assert not (tmp_path / 'new').exists()
