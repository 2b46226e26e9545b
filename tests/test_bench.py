"""bench.py: the sides take turns, the figures are right, and every part runs."""
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from conftest import one_line, run, train

from bench import Settings
from configurator import UserError
from features.study import measure
from features.study.bench_prepare import write_text
from features.study.bench_scale import sparse_dataset
from features.study.measure import memory_bandwidth


def test_the_sides_take_turns():
    calls = []

    def side(name):
        calls.append(name)
        return {'MB/s': len(calls)}
    samples = measure.alternate({'a': lambda: side('a'), 'b': lambda: side('b')}, 3)
    assert calls == ['a', 'b'] * 3 and samples == {'a': {'MB/s': [1, 3, 5]}, 'b': {'MB/s': [2, 4, 6]}}


def test_medians_and_how_many_times_the_others_ours_is(capsys):
    part = measure.section('speed',
                           {'ours': {'tokens/s': [30, 10, 1000]}, 'peer': {'tokens/s': [15, 14, 99]}})
    assert part['medians'] == {'ours': {'tokens/s': 30}, 'peer': {'tokens/s': 15}}
    assert part['ratios'] == {'peer': {'tokens/s': 2}}
    measure.show(part)
    ours, peer = capsys.readouterr().out.splitlines()[3:]
    assert ours.split() == ['ours', '30', '(10', 'to', '1,000)']
    assert peer.split()[-4:] == ['ours', '=', '2.00', 'x']


def test_the_memory_of_a_command_is_its_own_and_on_request_its_children_s():
    ballast = bytearray(b'x') * 2 ** 28  # memory of this process, which wait4() would count
    hold = 'import time; held = bytearray(b"x") * 2 ** 27; time.sleep(0.3)'
    _, took, alone = measure.run([sys.executable, '-c', hold])
    assert took > 0.3 and 128 < alone < 180
    nest = f'import subprocess, sys; subprocess.run([sys.executable, "-c", {hold!r}])'
    _, _, parent = measure.run([sys.executable, '-c', nest])
    _, _, both = measure.run([sys.executable, '-c', nest], tree=True)
    assert parent < 60 and both > 128 and len(ballast) == 2 ** 28


def test_a_command_begins_without_what_our_scripts_set_for_themselves(monkeypatch):
    monkeypatch.setenv('GOMP_SPINCOUNT', '1000')  # as train.py does
    monkeypatch.setenv('THP_MEM_ALLOC_ENABLE', '0')  # as a user may
    code = 'import os; print(os.environ.get("GOMP_SPINCOUNT"), os.environ.get("THP_MEM_ALLOC_ENABLE"))'
    assert measure.run([sys.executable, '-c', code])[0][0][1] == 'None 0'


def test_lines_come_with_the_time_they_were_printed_at():
    lines, _, _ = measure.run([sys.executable, '-uc', 'import time; print(1); time.sleep(0.3); print(2)'])
    assert [text for _, text in lines] == ['1', '2'] and lines[1][0] - lines[0][0] > 0.25


def test_a_command_that_fails_is_one_line():
    with pytest.raises(UserError, match='failed with 3: oh'):
        measure.run([sys.executable, '-c', 'print("oh", flush=True); raise SystemExit(3)'])


def test_the_bandwidth_is_really_timed():
    assert 1e8 < memory_bandwidth(torch.device('cpu'), size=2 ** 22, seconds=0.01) < 1e13


def test_the_sparse_data_set_takes_no_room_and_trains(tmp_path):
    sparse_dataset(tmp_path / 'big', 10 ** 10)
    file = os.stat(tmp_path / 'big' / 'train_00000.bin')
    assert file.st_size == 10 ** 10 and file.st_blocks * 512 < 10 ** 6
    assert 'step 3/3' in train(tmp_path / 'out', '--max_iters=3', dataset=tmp_path / 'big').stdout


def test_the_text_is_as_long_as_asked_for_and_the_same_every_time(tmp_path):
    (tmp_path / 'a.txt').write_text('one two three\n' * 1000)
    s = Settings(what=['prepare'], text=[str(tmp_path / 'a.txt')])
    found = []
    for folder in (tmp_path / 'x', tmp_path / 'y'):
        folder.mkdir()
        size, documents = write_text(s, folder, 0.1)
        found.append((folder / 'text.jsonl').read_bytes())
        assert size >= 10 ** 5 and len(found[-1].splitlines()) == documents
        assert (''.join(json.loads(line)['text'] for line in found[-1].splitlines())
                == (folder / 'text.txt').read_text())
    assert found[0] == found[1]


@pytest.mark.full
@pytest.mark.parametrize('part', ['train', 'loss', 'sample'])
def test_every_part_runs_and_writes_json(tmp_path, part):
    done = run('bench.py', part, '--quick', '--rounds=1', '--device=cpu', f'--json={tmp_path}/a.json')
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(Path(tmp_path, 'a.json').read_text())
    assert report['machine']['flops']['float32'] > 1e8 and report['machine']['torch'] == torch.__version__
    assert report['parts'] and all(part['title'] in done.stdout for part in report['parts'])
    for part in report['parts']:
        assert all(len(values) == 1 and values[0] > 0 for metrics in part['samples'].values()
                   for values in metrics.values())


@pytest.mark.parametrize(
    'args, names', [([], 'what'), (['trian'], 'what=trian'), (['train', '--peer=nowhere'], 'peer=nowhere'),
                    (['loss', '--rounds=0'], 'rounds=0'), (['loss', '--device=tpu'], 'device=tpu'),
                    (['loss', '--json=no/such/a.json'], 'json=no/such/a.json'),
                    (['gpu', '--only=loss'], 'only=loss: takes gradients'),
                    (['gpu', '--json=a.json'], 'json=a.json: gpu prints a table'),
                    (['train', '--only=T5'], 'only: is about gpu')])
def test_bad_input_is_one_line(args, names):
    assert names in one_line(run('bench.py', *args))
