"""
The same data in the same order, and losses as near as rounding allows, however many processes share a step.
"""
import os
import socket
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
from conftest import ROOT, read_log
from processes import SMALL, fingerprint, run_to_end

from batches import micro_batches


def samples(ranks, accumulation, step, rows=12):
    """The global sample numbers of a step, rank after rank."""
    s = SimpleNamespace(batch_size=rows // accumulation, gradient_accumulation_steps=accumulation)
    return [number for rank in range(ranks) for part in micro_batches(s, step, rank, ranks)
            for number in part]


@pytest.mark.parametrize('ranks', [1, 2, 4])
@pytest.mark.parametrize('accumulation', [1, 2, 3, 4])
def test_a_step_has_the_same_samples_in_the_same_order_for_any_split(ranks, accumulation):
    for step in (0, 1, 7, 10 ** 9):
        assert samples(ranks, accumulation, step) == list(range(12 * step, 12 * step + 12))


def test_no_sample_is_left_out_or_taken_twice_where_the_number_of_ranks_changes():
    worlds = [1] * 5 + [4] * 3 + [2] * 9
    seen = Counter(number for step, ranks in enumerate(worlds) for number in samples(ranks, 4, step))
    assert seen == Counter(range(12 * len(worlds)))


def near(one, other):
    """Whether two logs have the same steps and, to 1e-5, the same losses."""
    if [r['step'] for r in one] != [r['step'] for r in other]:
        return False
    return all(abs(a[name] - b[name]) < 1e-5 for a, b in zip(one, other)
               for name in ('train_loss', 'val_loss') if name in a)


# ranks have unequal numbers of targets
UNEVEN = ['--packing=document', '--grad_clip=0.5', '--max_iters=20', '--eval_interval=20', '--warmup_iters=2']


def test_one_rank_with_two_micro_batches_is_two_ranks_with_one_bitwise(dataset, tmp_path):
    for ranks in (1, 2):
        assert run_to_end(*SMALL, *UNEVEN, f'--dataset={dataset}', '--batch_size=2',
                          '--gradient_accumulation_steps=2', f'--out_dir={tmp_path / str(ranks)}',
                          ranks=ranks)[0] == [0] * ranks
    assert (fingerprint(tmp_path / '1') == fingerprint(tmp_path / '2')
            and near(read_log(tmp_path / '1'), read_log(tmp_path / '2')))


def test_four_micro_batches_on_one_two_and_four_ranks_have_the_same_losses_to_rounding(dataset, tmp_path):
    for ranks in (1, 2, 4):
        assert run_to_end(*SMALL, *UNEVEN, f'--dataset={dataset}', '--batch_size=1',
                          '--gradient_accumulation_steps=4', f'--out_dir={tmp_path / str(ranks)}',
                          ranks=ranks)[0] == [0] * ranks
    one, two, four = (read_log(tmp_path / str(ranks)) for ranks in (1, 2, 4))
    assert near(one, two) and near(one, four)


def test_a_run_goes_on_with_another_number_of_ranks(dataset, tmp_path):
    args = [*SMALL, f'--dataset={dataset}', '--warmup_iters=0', '--lr_decay_iters=10', '--batch_size=1',
            '--gradient_accumulation_steps=4', '--eval_interval=100']
    for ranks, until in ((2, 3), (1, 6), (4, 10)):
        assert run_to_end(*args, f'--out_dir={tmp_path / "changing"}', f'--max_iters={until}',
                          ranks=ranks)[0] == [0] * ranks
    assert run_to_end(*args, f'--out_dir={tmp_path / "whole"}')[0] == [0]
    changing, whole = ([r for r in read_log(tmp_path / name) if 'train_loss' in r]
                       for name in ('changing', 'whole'))
    assert near(changing, whole) and [r['tokens'] for r in changing] == [r['tokens'] for r in whole]


@pytest.mark.slow
def test_two_torchruns_meet_on_one_machine_as_two_would(dataset, tmp_path):
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        endpoint = f'127.0.0.1:{s.getsockname()[1]}'
    args = [*SMALL, f'--dataset={dataset}', f'--out_dir={tmp_path / "two"}',
            '--gradient_accumulation_steps=4', '--batch_size=1']
    command = [sys.executable, '-m', 'torch.distributed.run', '--nnodes=2',
               '--nproc_per_node=2', '--rdzv_backend=c10d', f'--rdzv_endpoint={endpoint}',
               '--local_addr=127.0.0.1', '--rdzv_id=1', 'train.py', *args]
    hosts = [subprocess.Popen(command, cwd=ROOT, env=os.environ | {'OMP_NUM_THREADS': '1'},
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for _ in range(2)]
    said = [host.communicate(timeout=200)[0] for host in hosts]
    assert ([host.returncode for host in hosts] == [0, 0]
            and sum('processes: 4' in text for text in said) == 1), said
    assert run_to_end(*args, f'--out_dir={tmp_path / "one"}', ranks=4)[0] == [0] * 4
    assert fingerprint(tmp_path / 'two') == fingerprint(tmp_path / 'one')
