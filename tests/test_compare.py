"""Runs in one table and one picture."""
from conftest import one_line, run, train

from compare import read_run, table


def test_runs_are_compared_in_a_table_and_a_picture(dataset, tmp_path):
    train(tmp_path / 'dense', dataset=dataset)
    train(tmp_path / 'low', '--rank_mlp=8', dataset=dataset)
    done = run('compare.py', tmp_path / 'dense', tmp_path / 'low', f'--picture={tmp_path / "p.png"}')
    assert done.returncode == 0 and (tmp_path / 'p.png').read_bytes().startswith(b'\x89PNG'), done.stderr
    runs = [read_run(str(tmp_path / name)) for name in ('dense', 'low')]
    assert runs[0]['parameters'] - runs[1]['parameters'] == 2 * 2 * (32 * 128 - 8 * (32 + 128))
    assert table(runs) in done.stdout and f'{runs[0]["val"][-1]["val_loss"]:.4f}' in done.stdout


def test_what_is_no_run_is_refused(tmp_path):
    assert 'nowhere: not a training run' in one_line(run('compare.py', 'nowhere'))
    assert 'give the out_dir' in one_line(run('compare.py'))
