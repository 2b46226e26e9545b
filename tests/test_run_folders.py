"""
The folders of runs: their default, what may become one, what is moved aside, and whose they are.
"""
import json
import os

import pytest
from conftest import ROOT, TINY, one_line, run, write_dataset

import train as training
from configurator import UserError, configure
from features.run_folders import last_run


@pytest.mark.parametrize('args, expected', [
    (['lowrank.py'], 'out/lowrank'), (['lowrank.py', 'other.py'], 'out/other'),
    (['lowrank.py', '--out_dir=x'], 'x'), (['lowrank.py', '--dataset=stories'], 'out/lowrank'),
    (['named.py'], 'out/mine'), ([], 'out/stdlib'), (['--dataset=data/stories/'], 'out/stories'),
    (["--dataset={'a/web': 1, 'code': 2}"], 'out/web+code'), (['--dataset=/'], 'out/run'),
    (['--dataset=x', '--out_dir='], 'out/x'), (['sub/lowrank.v2.py'], 'out/lowrank.v2'),
])
def test_the_default_out_dir_has_the_name_of_the_config_file_or_the_data_set(
        args, expected, tmp_path, monkeypatch):
    (tmp_path / 'sub').mkdir()
    for name in ('lowrank.py', 'other.py', 'sub/lowrank.v2.py'):
        (tmp_path / name).write_text('n_layer = 2\n')
    (tmp_path / 'named.py').write_text("out_dir = 'out/mine'\n")
    monkeypatch.chdir(tmp_path)
    s = configure(training.Settings, args)
    assert (s.out_dir or training.default_out_dir(s)) == expected


def test_a_mixture_of_many_has_a_name_that_a_file_system_takes():
    s = configure(training.Settings, [f'--dataset={ {f"corpus_number_{n}": 1 for n in range(40)} }'])
    assert len(os.path.basename(training.default_out_dir(s))) <= 100


def checkpoint_of(folder, step, time):
    """A folder that looks like a checkpoint, written at this time."""
    path = folder / f'step_{step:08d}'
    path.mkdir(parents=True)
    (path / 'manifest.json').write_text(json.dumps({'step': step, 'files': {}}))
    os.utime(path, (time, time))


def test_without_an_out_dir_the_run_trained_last_is_taken(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match='there is no run in out: give --out_dir=DIR'):
        last_run()
    checkpoint_of(tmp_path / 'out' / 'old', 900, 1000)
    checkpoint_of(tmp_path / 'disk' / 'new', 5, 3000)
    checkpoint_of(tmp_path / 'out' / 'sweeps' / 'demo' / 'a,seed=1', 7, 2000)
    assert last_run() == 'out/sweeps/demo/a,seed=1'
    (tmp_path / 'out' / 'link').symlink_to(tmp_path / 'disk' / 'new')
    (tmp_path / 'out' / 'weights.png').touch()
    (tmp_path / 'out' / 'gone').symlink_to(tmp_path / 'nowhere')
    capsys.readouterr()
    assert last_run() == 'out/link'
    printed = capsys.readouterr()
    assert not printed.out and printed.err.count('\n') == 1 and 'out_dir=out/link' in printed.err
    checkpoint_of(tmp_path / 'out', 20, 4000)  # a run of an older version, whose default was out itself
    assert last_run() == 'out'


def test_train_and_sample_agree_on_the_default(tmp_path):
    """And an older run in out itself stays: it is named, not touched."""
    write_dataset(tmp_path / 'data' / 'counting', vocab_size=257)
    checkpoint_of(tmp_path / 'out', 3, 1000)
    done = run(ROOT / 'train.py', *TINY, '--max_iters=2', '--dataset=counting', cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert 'done: 2 steps; python sample.py --out_dir=out/counting' in done.stdout
    assert 'out itself holds a run' in done.stdout
    assert sorted(os.listdir(tmp_path / 'out')) == ['counting', 'step_00000003']
    done = run(ROOT / 'sample.py', '--num_samples=1', '--max_new_tokens=3', '--device=cpu', cwd=tmp_path)
    assert done.returncode == 0 and done.stderr.startswith('out_dir=out/counting: the last run')
    done = run(ROOT / 'eval.py', 'loss', '--device=cpu', cwd=tmp_path)
    assert done.returncode == 0 and done.stderr.startswith('out_dir=out/counting: the last run')
    os.rename(tmp_path / 'out', tmp_path / 'elsewhere')
    done = run(ROOT / 'sample.py', cwd=tmp_path)
    assert 'there is no run in out' in one_line(done)
