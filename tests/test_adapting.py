"""
experiments/adapting.py: every arm has the settings of its name and starts from the base of its seed; the
tables have the figures of the runs.
"""
import json
import statistics
import sys

import pytest
import torch
from conftest import read_log, runs_here, write_dataset

from checkpoint import read_weights
from experiments import adapting
from features.networks import read_model
from features.study import tuning
from features.study.runs import changed_settings, read_settings

SIZES = dict(block_size=32, batch_size=4, max_iters=4, eval_interval=4, eval_iters=2, dtype='float32',
             lora_rank=2)
ARMS = ('full', 'r1', 'r4', 'attention', 'everywhere', 'rs', 'dora')


pytestmark = pytest.mark.full  # whole experiments, on small networks


@pytest.fixture(scope='module')
def study(tmp_path_factory):
    """The folder of the whole experiment with tiny networks and two seeds, its runs in this process."""
    folder = tmp_path_factory.mktemp('adapting')
    sets = {name: str(folder / name) for name in ('novels', 'stories', 'code')}
    for seed, path in enumerate(sets.values()):
        write_dataset(path, documents=300, seed=seed)
    sizes = SIZES | dict(n_layer=2, n_head=2, n_embd=16, lora_rank=0)
    (folder / 'base.py').write_text('from config.fast import *\n'
                                    + ''.join(f'{key} = {value!r}\n' for key, value in sizes.items()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, 'run_missing', runs_here(patch))
        patch.setattr(tuning, 'FURTHER', 0)  # networks of this size have no best rate
        patch.setattr(adapting, 'make_data', lambda s: sets)
        patch.setattr(sys, 'argv',
                      ['adapting.py', '--novels=x', '--stories=x', f'--out_dir={folder}/out',
                       f'--base_config={folder}/base.py', '--seeds=[1, 2]', '--rates=[0.001, 0.01]',
                       '--ranks_tried=[1, 4]', *(f'--{key}={value}' for key, value in SIZES.items())])
        adapting.main()
    return folder / 'out'


def tables(study):
    """The cells of both tables, a list per line."""
    return [[[cell.strip() for cell in line.strip('|').split('|')] for line in table.splitlines()[2:]]
            for table in (study / 'table.md').read_text().split('\n\n')]


def runs(study, corpus, arm, seed):
    return sorted((study / corpus).glob(f'{arm},*,seed={seed}'))


def test_every_arm_is_what_its_name_says_and_starts_from_the_base_of_its_seed(study):
    wanted = {'full': {}, 'r1': {'lora_rank': 1}, 'r4': {'lora_rank': 4},
              'attention': {'lora_rank': 2, 'lora_targets': 'attn'},
              'everywhere': {'lora_rank': 2, 'lora_targets': 'attn,mlp,embed,head'},
              'rs': {'lora_rank': 4, 'lora_rs': True}, 'dora': {'lora_rank': 2, 'lora_dora': True}}
    for corpus in ('stories', 'code'):
        for arm in ARMS:
            assert len(runs(study, corpus, arm, 1)) == 2 and len(runs(study, corpus, arm, 2)) == 1
            for seed in (1, 2):
                s = read_settings(runs(study, corpus, arm, seed)[0])
                assert s.init_from == f'{study}/bases/base,seed={seed}' and s.dataset.endswith(corpus)
                found = {name: value for name, value in changed_settings(s).items()
                         if name.startswith('lora_')}
                assert found == wanted[arm]


def test_the_table_says_what_the_runs_said(study):
    lines, _ = tables(study)
    for corpus in ('stories', 'code'):
        full = next(line for line in lines if line[:2] == [corpus, 'full'])
        for _, arm, count, rate, loss, *_ in (line for line in lines
                                              if line[0] == corpus and line[1] != 'the base'):
            chosen = [next(f for f in runs(study, corpus, arm, seed) if f'learning_rate={rate},' in f.name)
                      for seed in (1, 2)]
            assert float(rate) == min((read_log(f)[-1]['val_loss'], read_settings(f).learning_rate)
                                      for f in runs(study, corpus, arm, 1))[1]
            assert loss.startswith(f'{statistics.mean(read_log(f)[-1]["val_loss"] for f in chosen):.4f} ±')
            weights = read_weights(next(chosen[0].glob('step_*')))
            assert int(count.replace(',', '')) == sum(t.numel() for t in weights.values())
        assert full[5] == '' and full[8] == '1.00'


def test_what_was_forgotten_is_the_loss_on_novels_less_that_of_the_base(study):
    lines, _ = tables(study)
    base = json.loads((study / 'bases/base,seed=1/novels.json').read_text())
    # the log has the loss of two batches
    assert base == pytest.approx(read_log(study / 'bases/base,seed=1')[-1]['val_loss'], abs=0.2)
    for corpus, arm, _, rate, _, _, after, lost, _ in (line for line in lines if line[1] != 'the base'):
        of_seeds = [
            [json.loads(next(folder.glob(f'{pattern}seed={seed}')).joinpath('novels.json').read_text())
             for seed in (1, 2)] for folder, pattern in ((study / corpus, f'{arm},learning_rate={rate},'),
                                                         (study / 'bases', 'base,'))]
        assert after.startswith(f'{statistics.mean(of_seeds[0]):.4f}')
        assert lost.startswith(f'{statistics.mean(a - b for a, b in zip(*of_seeds)):+.3f}')


def test_the_shares_are_those_of_what_full_training_changed(study):
    lines, shares = tables(study)
    rate = next(line for line in lines if line[:2] == ['code', 'full'])[3]
    found = []
    for seed in (1, 2):
        after, before = (read_model(str(f), 'last')[1] for f in (
            study / f'code/full,learning_rate={rate},seed={seed}', study / f'bases/base,seed={seed}'))
        for n in (0, 1):
            s = torch.linalg.svdvals((after[f'blocks.{n}.mlp.up.weight']
                                      - before[f'blocks.{n}.mlp.up.weight']).double()).square()
            found.append((s[:4].sum() / s.sum()).item())
    line = next(line for line in shares if line[:2] == ['code', 'mlp.up'])
    assert line[4].startswith(f'{statistics.median(found):.2f} (')
    assert (study / 'adapting.png').stat().st_size > 10000
