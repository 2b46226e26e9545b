"""
experiments/real_network.py: the arms inherit what they say, random blocks keep the embedding, and the tables
have the figures of the runs that are finished.
"""
import json
import shutil
import sys

import pytest
import torch
from conftest import one_line, read_log, run, runs_here
from test_chat import folder_of

import checkpoint
from experiments import real_network
from features.hf import reading
from features.study import tuning

pytestmark = pytest.mark.full  # a whole experiment, on a small network


@pytest.fixture(scope='module')
def study(tmp_path_factory):
    """(arguments, out_dir, the weights of the network) of the whole experiment with two seeds."""
    folder = tmp_path_factory.mktemp('real')
    where, _ = folder_of(folder / 'network')
    stories, instructions = folder / 'stories.jsonl', folder / 'instructions.jsonl'
    stories.write_text(''.join(json.dumps({'text': f'{n} came home. ' * 20}) + '\n' for n in range(400)))
    instructions.write_text(''.join(
        json.dumps({'instruction': 'Add one.', 'input': str(n), 'output': str(n + 1)}) + '\n'
        for n in range(60)))
    args = [f'--model={folder}/network', f'--stories={stories}', f'--instructions={instructions}',
            f'--out_dir={folder}/out', '--seeds=[1, 2]', '--depths=[1]', '--rank_attn=4', '--rank_mlp=8',
            '--ranks=[1, 2]', '--steps=4', '--lora_steps=4', '--row=32', '--lora_row=64', '--sequences=4']
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, 'run_missing', runs_here(patch))
        patch.setattr(sys, 'argv', ['real_network.py', *args])
        real_network.main()
    return args, folder / 'out', reading.load(where)[1]


def weights_of(folder):
    return checkpoint.read_weights(checkpoint.find(str(folder)))


def test_shrunk_networks_inherit_blocks_and_random_ones_the_embedding_alone(study):
    _, out, weights = study
    first = weights_of(out / 'networks/first1')
    assert all(torch.equal(t, weights[name]) for name, t in first.items()) and len(first) < len(weights)
    drawn = [weights_of(out / f'networks/first1_random,seed={seed}') for seed in (1, 2)]
    for name in first:
        if 'norm' in name:
            assert (drawn[0][name] == 1).all()
            continue
        is_kept = not name.startswith('blocks.')  # embedding and head
        assert torch.equal(drawn[0][name], first[name]) == is_kept
        assert torch.equal(drawn[0][name], drawn[1][name]) == is_kept
    assert any('down.weight' in name and 'attn' in name for name in weights_of(out / 'networks/factors'))


def test_the_tables_have_the_figures_of_the_runs(study):
    _, out, _ = study
    text = (out / 'table.md').read_text()
    def losses(name, seed):
        return [r['val_loss'] for r in read_log(out / f'layers/{name},seed={seed}') if 'val_loss' in r]
    last = {name: losses(name, 1)[-1] for name in ('first1', 'first1+0.0001')}
    best, worse = sorted(last, key=last.get)
    assert not (out / f'layers/{worse},seed=2').exists()
    log = [losses(best, seed) for seed in (1, 2)]
    assert log[0][0] == log[1][0] and log[0][-1] != log[1][-1]
    line = next(line for line in text.splitlines() if line.startswith('| first1 |'))
    rate, other = ('0.0005', '0.0001') if best == 'first1' else ('0.0001', '0.0005')
    assert f'| {log[0][0]:.3f} | {rate} | {(log[0][-1] + log[1][-1]) / 2:.3f} ±' in line
    assert line.endswith(f'| {other}: {last[worse]:.3f} | 2 |')
    for name in ('whole', 'first1_random', 'factors', 'factors_random', 'none', '1', '2', '0'):
        assert f'\n| {name} |' in '\n' + text
    assert 'missing, 0 runs: none' in text
    assert all((out / f'{name}.png').stat().st_size > 10000 for name in ('attention', 'layers', 'lora'))


def test_the_report_names_the_runs_that_are_missing(study, tmp_path):
    args, out, _ = study
    shutil.copytree(out, tmp_path / 'out')
    shutil.rmtree(tmp_path / 'out/lora/r2,seed=2')
    done = run('experiments/real_network.py', *args, f'--out_dir={tmp_path}/out', '--report')
    assert 'missing, 1 runs: lora/r2,seed=2' in done.stdout
    (tmp_path / 'bad.jsonl').write_text('{"question": "?"}\n')
    assert 'bad.jsonl, line 1: has neither messages nor instruction' in one_line(
        run('experiments/real_network.py', *args, f'--out_dir={tmp_path}/new',
            f'--instructions={tmp_path}/bad.jsonl'))
    assert 'model: is not given' in one_line(run('experiments/real_network.py'))
