"""
Ranks of weights: matrices whose figures are known, the product of factors without forming it, and what a user
sees of a run.
"""
import csv
import dataclasses
import functools
import math
import re

import pytest
import torch
from conftest import one_line, run, train
from test_hub import saved

import checkpoint
from analyze import WeightsSettings
from configurator import UserError
from features import build
from features.growth.factorize import rank_for
from features.study import spectra
from features.study.spectra import (
    figures,
    gaussian,
    matrices,
    measure,
    product,
    singular_values,
    table,
)
from model import LowRank, ModelConfig, make_model


def values(matrix):
    return singular_values([matrix])


def dense(*factors):
    product = factors[0].double()
    for f in factors[1:]:
        product = product @ f.double()
    return torch.linalg.svdvals(product)


def close(a, b):
    n = min(len(a), len(b))
    torch.testing.assert_close(a[:n], b[:n], rtol=1e-6, atol=1e-6 * b[0].item())


def random_model(**settings):
    """A network in which every weight is random, those that start at zero too."""
    torch.manual_seed(0)
    model = make_model(
        build(ModelConfig, **dict(vocab_size=100, block_size=16, n_layer=2, n_head=4, n_embd=32) | settings))
    for p in model.parameters():
        p.data = torch.randn(p.shape) / 4
    return model


def write_checkpoint(folder, model):
    checkpoint.save(folder, 0, model.state_dict(), {}, {'step': 0, 'model': dataclasses.asdict(model.cfg),
                                                        'settings': {}, 'tokenizer': {'kind': 'byte'}})


# --- figures ---

def test_the_identity_has_every_rank_in_full():
    f = figures(values(torch.eye(50)))
    assert (math.isclose(f['stable_rank'], 50) and math.isclose(f['effective_rank'], 50)
            and (f['rank_90'], f['rank_99']) == (45, 50))
    assert math.isclose(f['frobenius'], 50 ** 0.5) and math.isclose(f['spectral'], 1)


def test_an_outer_product_has_rank_one():
    f = figures(values(torch.outer(torch.arange(1.0, 30), torch.arange(1.0, 20))))
    assert (math.isclose(f['stable_rank'], 1) and math.isclose(f['effective_rank'], 1, rel_tol=1e-4)
            and f['rank_90'] == f['rank_99'] == 1)


def test_a_known_spectrum_in_any_basis():
    torch.manual_seed(0)
    s = torch.tensor([4.0, 2, 2, 1, 1])
    u, v = (torch.linalg.qr(torch.randn(n, 5)).Q for n in (30, 20))
    f = figures(values(u * s @ v.T))
    p = s / 10
    assert (math.isclose(f['stable_rank'], 26 / 16, rel_tol=1e-5)
            and math.isclose(f['effective_rank'], math.exp(-(p * p.log()).sum()), rel_tol=1e-4))
    assert f['rank_90'] == 3 and f['rank_99'] == 5  # of 26: 16, 20, 24, 25, 26


def test_zeros_have_rank_zero():
    assert [figures(values(torch.zeros(8, 4)))[name]
            for name in ('stable_rank', 'effective_rank', 'rank_90', 'rank_99')] == [0, 0, 0, 0]


def test_the_rank_for_an_energy_is_the_smallest():
    s = torch.rand(40, generator=torch.Generator().manual_seed(0)).double().sort(descending=True).values
    kept = s.square().cumsum(0) / s.square().sum()
    for energy in (0.1, 0.5, 0.9, 0.99, 1.0):
        r = rank_for(s, energy)
        assert kept[r - 1] >= energy and (r == 1 or kept[r - 2] < energy)


def test_the_null_follows_marchenko_and_pastur():
    """
    The largest singular value of an n x m Gaussian matrix goes to √n + √m, its norm to √nm; and it is the
    same at every call.
    """
    s = gaussian(((600, 200),))
    assert (math.isclose(s[0], 600 ** 0.5 + 200 ** 0.5, rel_tol=0.02)
            and math.isclose(s.norm(), 120000 ** 0.5, rel_tol=0.01))
    gaussian.cache_clear()
    assert torch.equal(s, gaussian(((600, 200),)))


# --- products ---

@pytest.mark.parametrize('shapes', [[(40, 8), (8, 30)], [(8, 40), (40, 9)],
                                    [(30, 12), (12, 5), (5, 12), (12, 30)], [(50, 6)]], ids=str)
def test_the_product_of_factors_has_the_singular_values_of_the_matrix(shapes):
    torch.manual_seed(0)
    factors = [torch.randn(shape) for shape in shapes]
    close(singular_values(factors), dense(*factors))


def test_the_product_of_a_layer_is_what_it_computes():
    model = random_model(rank_qk=6, rank_mlp=5)
    for layer in (model.blocks[0].attn.q, model.blocks[0].mlp.down):
        torch.testing.assert_close(functools.reduce(torch.matmul, product(layer)),
                                   layer(torch.eye(layer.down.in_features)).T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('settings', [{}, dict(n_kv_head=2), dict(rank_qk=6, rank_vo=5)], ids=str)
def test_the_product_of_a_heads_queries_and_keys(settings):
    model = random_model(**settings)
    attn, found = model.blocks[1].attn, matrices(model)
    q, k, v, o = (layer.up.weight @ layer.down.weight if isinstance(layer, LowRank) else layer.weight
                  for layer in (attn.q, attn.k, attn.v, attn.o))
    for h in range(4):
        shared = 8 * (h * model.cfg.kv_heads // 4)  # the first row of its key and value head
        close(singular_values(found[f'blocks.1.attn.qk.{h}']),
              dense(q[8 * h:8 * h + 8].T, k[shared:shared + 8]))
        close(singular_values(found[f'blocks.1.attn.ov.{h}']),
              dense(o[:, 8 * h:8 * h + 8], v[shared:shared + 8]))


@pytest.mark.parametrize('settings', [
    {}, dict(rank_qk=8, rank_vo=8, rank_mlp=8), dict(rank_mlp=8, rank_act='silu'), dict(position='learned'),
    dict(mlp='swiglu', tie=False), dict(tie=False, rank_embed=8, rank_head=6)], ids=str)
def test_every_matrix_of_a_network_is_there_once(settings):
    """
    All weights of two dimensions, as often as parameters() has them; the vocabulary's padding is not counted.
    """
    model = random_model(**settings)
    found = sum(f.numel() for name, factors in matrices(model).items()
                if '.qk.' not in name and '.ov.' not in name for f in factors)
    assert found == model.num_params() - sum(p.numel() for p in model.parameters() if p.ndim < 2)


def test_with_an_activation_between_them_the_factors_are_measured_each():
    found = matrices(random_model(rank_qk=8, rank_act='silu'))
    assert [len(found[f'blocks.0.attn.{name}']) for name in ('q.up', 'q.down', 'v', 'o')] == [1, 1, 1, 1]
    assert ('blocks.0.attn.q' not in found and 'blocks.0.attn.qk.0' not in found
            and 'blocks.0.attn.ov.0' in found)


@pytest.mark.parametrize('rank', [0, 6])
def test_of_a_markov_chain_the_table_is_measured(rank, tmp_path, capsys, monkeypatch):
    """Logits of every token after every token, (V, V): with rank_embed the product of its two factors."""
    torch.manual_seed(0)
    model = make_model(build(ModelConfig, arch='markov', vocab_size=40, block_size=16, rank_embed=rank))
    record, = measure(model)
    close(record['s'], torch.linalg.svdvals(model(torch.arange(40)[None])[0].double().detach()))
    assert record['full_rank'] == (rank or 40)
    write_checkpoint(tmp_path / 'run', model)
    spectra.run(WeightsSettings(str(tmp_path / 'run'), picture=str(tmp_path / 'p.png')))
    assert (re.search(r'table x1 +40x40', capsys.readouterr().out)
            and (tmp_path / 'p.png').stat().st_size > 5000)
    monkeypatch.setattr(spectra, 'LARGEST_TABLE', 39)
    if not rank:
        with pytest.raises(UserError, match='too large to decompose'):
            spectra.run(WeightsSettings(str(tmp_path / 'run'), picture=''))


# --- differences ---

def changed(model, rank, seed=1):
    """A copy with a change of this rank in every dense matrix of the blocks."""
    torch.manual_seed(seed)
    copy = make_model(model.cfg)
    copy.load_state_dict(model.state_dict())
    for p in copy.blocks.parameters():
        if p.ndim == 2:
            p.data += torch.randn(p.size(0), rank) @ torch.randn(rank, p.size(1)) / 100
    return copy


def test_the_rank_of_what_training_changed():
    model = random_model()
    records = {r['name']: r for r in measure(changed(model, 3), model)}
    s = records['blocks.1.mlp.up']['s']
    assert ((s > 1e-5 * s[0]).sum() == 3 and records['blocks.1.mlp.up']['rank_99'] <= 3
            and records['wte']['stable_rank'] == 0)


def test_the_difference_of_two_products_is_not_the_product_of_the_differences():
    a, b = random_model(rank_qk=6), random_model(rank_qk=6)
    for p in b.blocks[0].attn.q.parameters():
        p.data += torch.randn(p.shape) / 10
    q, other = a.blocks[0].attn.q, b.blocks[0].attn.q
    s = {r['name']: r['s'] for r in measure(b, a)}
    assert s['blocks.1.attn.q'][0] == s['blocks.1.attn.ov.0'][0] == 0 < s['blocks.0.attn.qk.0'][0]
    close(s['blocks.0.attn.q'],
          torch.linalg.svdvals((other.up.weight @ other.down.weight - q.up.weight @ q.down.weight).double()))


def test_a_factored_network_against_the_dense_one():
    low, full = random_model(rank_mlp=8), random_model()
    layer = low.blocks[0].mlp.up
    s = {r['name']: r['s'] for r in measure(low, full)}['blocks.0.mlp.up']
    close(s,
          torch.linalg.svdvals((layer.up.weight @ layer.down.weight - full.blocks[0].mlp.up.weight).double()))


def test_the_table_has_a_line_for_every_kind_of_matrix():
    lines = table(measure(random_model(n_layer=5))).splitlines()
    assert (len(lines) == 1 + 9 and lines[1].startswith('attn.q x5')
            and len({len(line) for line in lines}) == 1)
    assert any(line.startswith('attn.qk x20') for line in lines)


# --- as a user runs it ---

def test_a_run_its_changes_and_a_folder_of_transformers(dataset, tmp_path, capsys):
    train(tmp_path / 'run', '--keep_checkpoints=9', dataset=dataset)
    files = [f'--csv={tmp_path}/all.csv', f'--picture={tmp_path}/pictures/all.png']
    done = run('analyze.py', 'weights', f'--out_dir={tmp_path}/run', *files)
    assert (done.returncode == 0 and 'mlp.down x2' in done.stdout
            and (tmp_path / 'pictures/all.png').stat().st_size > 20000), done.stderr
    assert len(list(csv.DictReader((tmp_path / 'all.csv').open()))) == 2 * (6 + 4) + 1

    run_, files = f'{tmp_path}/run', dict(csv=f'{tmp_path}/all.csv', picture=f'{tmp_path}/along.png')
    spectra.run(WeightsSettings(run_, along=True, against=f'{run_}/step_00000005', **files))
    rows = list(csv.DictReader((tmp_path / 'all.csv').open()))
    assert {r['step'] for r in rows} == {'5', '10'} and (tmp_path / 'along.png').stat().st_size > 20000
    # at step 5 nothing differs from step 5
    assert all((float(r['spectral']) == 0) == (r['step'] == '5') for r in rows)

    spectra.run(WeightsSettings(f'hf:{saved(tmp_path / "gpt2")}', picture=''))
    assert 'wpe x1' in capsys.readouterr().out


def test_what_cannot_be_measured_is_refused(tmp_path):
    for name, width in (('a', 32), ('b', 48)):
        write_checkpoint(tmp_path / name, random_model(n_embd=width))
    for settings, words in [(dict(out_dir='nowhere'), 'nowhere: no such directory'),
                            (dict(against=f'{tmp_path}/b'), 'give a checkpoint of the same network'),
                            (dict(out_dir=f'{tmp_path}/a/step_00000000', along=True),
                             'no checkpoints in it'),
                            (dict(picture='/proc/x/y.png'), 'picture=/proc/x/y.png'),
                            (dict(csv='/proc/x/y.csv'), 'csv=/proc/x/y.csv')]:
        with pytest.raises(UserError, match=words):
            spectra.run(WeightsSettings(**dict(out_dir=f'{tmp_path}/a', picture=f'{tmp_path}/p.png')
                                        | settings))
    assert not (tmp_path / 'p.png').exists()
    assert 'weight: takes weights' in one_line(run('analyze.py', 'weight', f'--out_dir={tmp_path}/a'))
