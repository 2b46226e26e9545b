"""
A run under many faults, as soak.py does it, a data set of a hundred billion windows, and whether mutants.py
knows the code as it is.
"""
import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from mutants import MUTANTS
from soak import soak


@pytest.mark.slow
def test_a_run_under_twelve_faults_ends_as_if_there_had_been_none(tmp_path):
    assert sum(soak(tmp_path, 12, max_iters=12 * 60, seed=1).values()) == 12


DAYS = ('kill one', 'TERM', 'HUP', 'all suspended for 3', 'disk full in a save', 'data: EIO', 'rename:',
        'reader of the pipe killed', 'clock jumps', 'data cut', 'out_dir renamed', 'second run from scratch')


@pytest.mark.slow
def test_a_run_on_twelve_bad_days_ends_as_if_they_had_been_none(tmp_path):
    """chaos.py with twelve of its forty kinds."""
    command = [sys.executable, Path(__file__).with_name('chaos.py'), '--minutes=0', '--disturbances=12',
               f'--kinds={",".join(DAYS)}', f'--folder={tmp_path}']
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and '| all | 12 |' in done.stdout, done.stdout + done.stderr


HUGE = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
from batches import Mixture

def peak():
    with open('/proc/self/status') as f:
        return next(int(line.split()[1]) / 1e3 for line in f if line.startswith('VmHWM'))
before, began = peak(), time.perf_counter()
mixture = Mixture(sys.argv[2], 'train', 16, seed=1)
started, times = time.perf_counter() - began, []
for i in range(100):
    began = time.perf_counter()
    mixture.rows(range(32 * i, 32 * i + 32))
    times.append(time.perf_counter() - began)
print(mixture.sources[0].rows, started, sorted(times)[50], peak() - before)
"""


def test_a_hundred_billion_windows_start_at_once_and_take_no_memory(tmp_path):
    """
    3.2 TB of zeros in eight sparse files. Seconds until it stands; of a batch of 32; MB that the process
    takes for it.
    """
    shards, tokens = 8, 10 ** 11 * 16 // 8
    for n in range(shards):
        with open(tmp_path / f'train_{n:05d}.bin', 'wb') as f:
            f.truncate(2 * tokens)
    split = {'shards': [{'file': f'train_{n:05d}.bin', 'bytes_on_disk': 2 * tokens} for n in range(shards)]}
    meta = {'format': 1, 'tokenizer': {'kind': 'byte', 'vocab_size': 257, 'eot': 256}, 'vocab_size': 257,
            'dtype': 'uint16', 'splits': {'train': split}}
    (tmp_path / 'meta.json').write_text(json.dumps(meta))
    done = subprocess.run([sys.executable, '-c', HUGE, ROOT, tmp_path], capture_output=True, text=True,
                          check=True)
    rows, started, batch, peak = map(float, done.stdout.split())
    print(f'{started:.2f} s to start, {1e3 * batch:.1f} ms a batch, {peak:.0f} MB')
    assert rows == 10 ** 11 and started < 1 and batch < 0.02 and peak < 20


def test_what_mutants_takes_out_is_there():
    for file, old, _, test, _ in MUTANTS:
        assert Path(ROOT, file).read_text().count(old) == 1, (file, old)
        assert Path(ROOT, 'tests', test).is_file()
