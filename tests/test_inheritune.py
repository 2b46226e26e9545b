"""
experiments/inheritune.py: every arm has the settings of its name, each seed starts from its own network, and
the table has the figures of the runs.
"""
import sys

import pytest
from conftest import read_log, runs_here, write_dataset

from experiments import inheritune
from features.networks import read_model
from features.study import tuning
from features.study.runs import read_settings

SIZES = dict(n_layer=4, n_head=2, n_embd=32, block_size=32, batch_size=4, max_iters=4, eval_interval=2,
             eval_iters=2, dtype='float32')


pytestmark = pytest.mark.full  # whole experiments, on small networks


@pytest.fixture(scope='module')
def study(tmp_path_factory):
    """The folder of the whole experiment with tiny networks and two seeds, its runs in this process."""
    folder, dataset = (tmp_path_factory.mktemp('inheritune') / name for name in ('out', 'data'))
    write_dataset(dataset, documents=1000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, 'run_missing', runs_here(patch))
        patch.setattr(tuning, 'FURTHER', 0)  # networks of this size have no best rate
        patch.setattr(sys, 'argv',
                      ['inheritune.py', f'--out_dir={folder}', f'--dataset={dataset}', '--seeds=[1, 2]',
                       '--rates=[0.02, 0.04]', *(f'--{key}={value}' for key, value in SIZES.items())])
        inheritune.main()
    return folder


def rows(folder):
    """{arm: the cells of its line} of the table of losses."""
    table, _ = (folder / 'table.md').read_text().split('\n\n')
    return {name.strip(): [cell.strip() for cell in cells]
            for _, name, *cells, _ in (line.split('|') for line in table.splitlines())}


def test_every_arm_has_two_seeds_and_its_best_rate(study):
    for arm in ('whole', 'random', 'random_twice', 'first', 'middle', 'taught', 'stacked'):
        first = {f.name.split('muon_lr=')[1][:4]: read_log(f)[-1]['val_loss']
                 for f in study.glob(f'{arm},muon_lr=*,seed=1')}
        rate = min(first, key=first.get)
        assert len(first) == 2
        assert [f.name for f in study.glob(f'{arm},*,seed=2')] == [f'{arm},muon_lr={rate},seed=2']
        losses = [read_log(study / f'{arm},muon_lr={rate},seed={seed}')[-1]['val_loss'] for seed in (1, 2)]
        assert rows(study)[arm][0] == rate and rows(study)[arm][2].startswith(f'{sum(losses) / 2:.4f} ±')
    assert (study / 'inheritune.png').stat().st_size > 10000


def test_each_seed_inherits_from_its_own_network_and_is_taught_by_it(study):
    for seed in (1, 2):
        whole = next(study.glob(f'whole,muon_lr={rows(study)["whole"][0]},seed={seed}'))
        for arm in ('first', 'middle'):
            assert all(read_settings(f).init_from == f'{whole}_{arm}'
                       for f in study.glob(f'{arm},*,seed={seed}'))
        assert all(read_settings(f).teacher == str(whole) for f in study.glob(f'taught,*,seed={seed}'))
        _, weights, _ = read_model(str(whole))
        for arm, layers in (('first', (0, 1)), ('middle', (1, 2))):
            _, taken, _ = read_model(f'{whole}_{arm}')
            for new, old in enumerate(layers):
                assert (taken[f'blocks.{new}.attn.q.weight'] == weights[f'blocks.{old}.attn.q.weight']).all()


def test_halves_end_with_half_the_layers(study):
    for arm, n_layer in (('whole', 4), ('random', 2), ('first', 2), ('stacked', 2), ('taught', 2)):
        cfg, *_ = read_model(str(next(study.glob(f'{arm},*,seed=2'))), 'last')
        assert cfg.n_layer == n_layer
    assert read_log(next(study.glob('random_twice,*,seed=2')))[-1]['step'] == 8


def test_where_a_loss_is_reached_is_read_off_between_two_evaluations():
    run = {'val': [{'val_loss': loss, 'tokens': tokens}
                   for loss, tokens in ((5.0, 0), (4.0, 100), (3.5, 300))]}
    assert inheritune.reach(run, 4.5, 'tokens') == 50
    assert inheritune.reach(run, 3.5, 'tokens') == 300
    assert inheritune.reach(run, 3.4, 'tokens') is None
