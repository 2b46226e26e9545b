"""bench.py gpu, rehearsed on a CPU: its table is whole, says what is wrong, and can be cut off anywhere."""
import json
import os
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, run

from configurator import UserError
from features import compiled
from features.study import bench_gpu, gpu_checks
from features.study.bench_gpu import CHECKS, SECTIONS, Section

MACHINE = {'flops': {'float32': 1e11, 'bfloat16': 1e11}, 'bandwidth': 1e10}
GIVEN = {'quick': True, 'peer': '', 'record': False, 'device': 'cpu', 'machine': MACHINE}
ROWS = {
    'gradients': list(gpu_checks.KINDS),
    'losses': ['gpt2', 'novels_cpu', 'lora_code'],
    'sampling': ['default', *list(gpu_checks.KINDS)[1:11]],
    'resume': ['20 steps, 10 + 10 steps'],
    'training': ['tiny, ceiling', 'tiny, ours', 'tiny, nanoGPT'],
    'decoding': ['1 x 16 tokens', '8 x 16 tokens', '64 x 16 tokens', '1 x 16 tokens, int8'],
    'adapters': ['ours', 'PEFT'],
    'T5': ['ours, rotary, 4 heads with keys', "ours, T5's positions", 'transformers',
           'ours, rotary, 8 experts'],
    'kernels': [''] * 10,
}


def rows_of(text):
    """The cells of the rows of a table."""
    lines = [line for line in text.splitlines() if line.startswith('|')]
    assert all(re.fullmatch(r'\|( [^|]*\|){4}', line) or line == '|---|---|---|---|' for line in lines), lines
    return [[cell.strip() for cell in line.split('|')[1:-1]] for line in lines]


@pytest.fixture
def quick(monkeypatch):
    """Fewer config files, and nothing is compiled."""
    configs = {config: gpu_checks.CONFIGS[config] for config in ROWS['losses']}
    monkeypatch.setattr(gpu_checks, 'CONFIGS', configs)
    monkeypatch.setenv('TORCH_COMPILE_DISABLE', '1')  # of processes that are started
    monkeypatch.setattr(gpu_checks, 'compile_all', lambda model: None)
    monkeypatch.setattr(compiled, 'graph_of', lambda step, device_type: step)


def work(capsys, name, **given):
    """(rows, exit code) of a section in this process."""
    with pytest.raises(SystemExit) as end:
        bench_gpu.work(name, 0, 1, GIVEN | given)
    return rows_of(capsys.readouterr().out), end.value.code


SLOW = ('training', 'adapters', 'T5')


@pytest.mark.parametrize('name', [pytest.param(name, marks=pytest.mark.full if name in SLOW else ())
                                  for name in SECTIONS])
def test_a_section_has_all_its_rows(name, quick, capsys):
    *rows, last = work(capsys, name)[0]
    assert last[:2] == [name, 'seconds']
    assert [row[0] for row in rows] == [name] * len(ROWS[name])
    assert all(row[1].startswith(begin) for row, begin in zip(rows, ROWS[name], strict=True)), rows
    for _, row, result, mark in rows:
        expected = 'ok' if name in CHECKS else ''
        assert mark == ('skipped' if 'not measured: needs' in result else expected), (row, result, mark)


def test_a_row_or_a_section_that_raises_is_a_line_and_the_rest_goes_on(monkeypatch, capsys):
    def rows(s, device):
        yield 'first', lambda: 1 / 0
        yield 'second', lambda: 'a|b\nc'
        yield 'third', lambda: ('far away', False)
        raise RuntimeError('gone')
    monkeypatch.setitem(SECTIONS, 'kernels', Section(rows, 9))
    *found, last = work(capsys, 'kernels')
    assert found[0][:4] == [['kernels', 'first', 'ZeroDivisionError: division by zero', 'ERROR'],
                            ['kernels', 'second', 'a/b c', ''],
                            ['kernels', 'third', 'far away', 'WRONG'],
                            ['kernels', 'the rest', 'RuntimeError: gone', 'ERROR']]
    assert last == bench_gpu.HAS_WRONG_ROWS


def test_every_row_is_one_process_s(monkeypatch, capsys):
    def rows(s, device):
        for n in range(7):
            yield str(n), lambda: ''
    monkeypatch.setitem(SECTIONS, 'kernels', Section(rows, 9))
    found = []
    for part in range(3):
        with pytest.raises(SystemExit):
            bench_gpu.work('kernels', part, 3, GIVEN)
        found += [row[1] for row in rows_of(capsys.readouterr().out)[:-1]]
    assert sorted(found) == list('0123456')


def test_a_wrong_loss_is_noticed(quick, monkeypatch, tmp_path, capsys):
    with open(gpu_checks.RECORDED) as f:
        recorded = json.load(f)
    assert all(len(recorded[config]) == 20 for config in gpu_checks.CONFIGS)
    recorded['gpt2'][7] += 0.04
    monkeypatch.setattr(gpu_checks, 'RECORDED', str(tmp_path / 'losses.json'))
    (tmp_path / 'losses.json').write_text(json.dumps({'gpt2': recorded['gpt2']}))
    (_, _, result, mark), (_, _, other, missing), *_ = work(capsys, 'losses')[0]
    assert mark == 'WRONG' and 'at most 0.0400 away' in result
    assert missing == 'WRONG' and other == '20 losses, 0 recorded'


def test_a_gradient_of_zero_is_noticed(quick, monkeypatch, capsys):
    monkeypatch.setattr(gpu_checks, 'compile_all', lambda model: model.register_full_backward_pre_hook(
        lambda model, grads: tuple(0 * grad for grad in grads)))
    rows, code = work(capsys, 'gradients')
    assert {row[3] for row in rows[:-1]} == {'WRONG'} and code == bench_gpu.HAS_WRONG_ROWS


def test_a_section_that_dies_or_takes_too_long_is_a_line_and_the_others_run(monkeypatch, capfd):
    monkeypatch.setitem(SECTIONS, 'nothing', Section(None, 99))  # its process does not know it
    s = SimpleNamespace(quick=False, peer='', record=False, only=['T5', 'nothing'])
    monkeypatch.setitem(CHECKS, 'nothing', SECTIONS['nothing'])
    monkeypatch.setattr(SECTIONS['T5'], 'limit', 0.1)
    with pytest.raises(UserError, match='nothing, T5'):
        bench_gpu.bench_gpu(s, torch.device('cpu'), MACHINE)
    assert rows_of(capfd.readouterr().out)[2:4] == [['nothing', '', 'its process ended with 1', 'ERROR'],
                                                    ['T5', '', 'cut off: no time left', 'ERROR']]


@pytest.mark.parametrize('number', [
    signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.full)])
def test_a_killed_run_leaves_a_table_and_no_process(number, tmp_path):
    environment = os.environ | {'OMP_NUM_THREADS': '1'}
    command = [sys.executable, str(ROOT / 'bench.py'), 'gpu', '--quick', '--device=cpu', '--only=gradients']
    table = tmp_path / 'gpu.md'
    with open(table, 'w') as f:
        process = subprocess.Popen(command, stdout=f, stderr=subprocess.DEVNULL, env=environment)
    while len(rows_of(table.read_text())) < 3:
        assert process.poll() is None
        time.sleep(0.05)
    children = open(f'/proc/{process.pid}/task/{process.pid}/children').read().split()
    process.send_signal(number)
    process.wait()
    rows = rows_of(table.read_text())
    assert rows[0] == ['section', 'row', 'result', ''] and rows[2][:2] == ['gradients', 'default']
    assert children and rows[2][3] == 'ok'
    end = time.time() + 120
    while any(os.path.exists(f'/proc/{child}') for child in children):
        assert time.time() < end
        time.sleep(0.05)
    assert len(rows_of(table.read_text())) < len(gpu_checks.KINDS)


@pytest.mark.full
def test_the_whole_table(tmp_path):
    """With all kinds and config files."""
    done = run('bench.py', 'gpu', '--quick', '--device=cpu', timeout=600)
    rows = rows_of(done.stdout)[2:]
    assert done.returncode == 0, done.stdout + done.stderr
    assert {row[0] for row in rows} == {*SECTIONS, 'all'}
    assert len(rows) > 70 and {row[3] for row in rows} <= {'', 'ok', 'skipped'}
