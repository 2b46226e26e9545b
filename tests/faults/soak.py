"""
One training run of two ranks, disturbed again and again: SIGKILL and SIGTERM to all or to one, a full disk at
a random point of a save or of the log, a bit flipped in a random file of the newest checkpoint. Whoever
starts it again gets, bit for bit, the run that nobody disturbed, and no checkpoint is lost but those that
were damaged.

    python tests/faults/soak.py 200            # faults; 11 minutes on 2 CPU cores
"""
import collections
import random
import re
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))

from conftest import read_log, write_dataset
from processes import SMALL, Processes, fingerprint

import checkpoint

KINDS = ('kill all', 'kill one', 'term all', 'term one', 'full', 'flip')


def sound(out_dir):
    """The steps of the checkpoints that are sound, newest first."""
    return [int(folder[-8:]) for folder in checkpoint.checkpoints(str(out_dir))
            if checkpoint.damage(folder) is None]


def flip(folder, chance):
    """Flip a bit in one of its files."""
    path = chance.choice(sorted(Path(folder).iterdir()))
    data = bytearray(path.read_bytes())
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    path.write_bytes(data)
    return path.name


def disturb(args, out_dir, kind, chance):
    """Let the run go on until the fault has ended it. Returns what it said."""
    point = chance.choice(('save:begin', 'save:weights', 'save:optimizer', 'save:state', 'save:manifest',
                           'save:flushed', 'log'))
    processes = Processes(*args, f'--out_dir={out_dir}', ranks=2,
                          fault=f'{point}/0=full' if kind == 'full' else '')
    if kind != 'full':
        processes.wait_for('step ', timeout=120)
        time.sleep(chance.random() * 0.8)
        processes.kill(signal.SIGTERM if 'term' in kind else signal.SIGKILL,
                       chance.randrange(2) if 'one' in kind else None)
    codes, said = processes.wait(timeout=120)
    assert None not in codes and 'Traceback' not in said and (kind != 'full' or 'No space left' in said), said
    return said


def soak(folder, faults, max_iters, seed=0):
    """
    Disturb a run in `folder` so many times. Returns {kind: count}; raises AssertionError where something was
    lost.
    """
    write_dataset(folder / 'data')
    chance, counts, out_dir = random.Random(seed), collections.Counter(), folder / 'soaked'
    alone = set()  # steps after which rank 0 saved without the others, whose part of the loss is gone
    args = [*SMALL, f'--dataset={folder / "data"}', f'--max_iters={max_iters}', '--checkpoint_interval=10',
            '--eval_interval=50', '--keep_checkpoints=3', '--warmup_iters=5']
    for n in range(faults):
        before = sound(out_dir) if out_dir.exists() else []
        assert not before or before[0] < max_iters, f'the run was over after {n} faults: give more max_iters'
        kind = chance.choice(KINDS if len(before) > 1 else KINDS[:-1])
        counts[kind] += 1
        if kind == 'flip':
            newest = checkpoint.find(str(out_dir))
            name = flip(newest, chance)
            assert checkpoint.damage(newest) is not None and sound(out_dir) == before[1:], name
        else:
            said = disturb(args, out_dir, kind, chance)
            alone |= {int(step) for step in re.findall(r'saved after step (\d+), because of an error', said)}
            after = sound(out_dir)
            # the newest one is there or a newer one is
            assert not before or after and after[0] >= before[0], (kind, before, after)
        print(f'{n + 1}/{faults} {kind}: sound {sound(out_dir)}', flush=True)
    for end in (out_dir, folder / 'whole'):  # the rest of it, and the run that nobody disturbs
        assert Processes(*args, f'--out_dir={end}', ranks=2).wait(timeout=faults * 60)[0] == [0, 0]
    logs = [[record for record in read_log(end) if 'val_loss' in record or record['step'] not in alone]
            for end in (out_dir, folder / 'whole')]
    assert fingerprint(out_dir) == fingerprint(folder / 'whole') and logs[0] == logs[1]
    return dict(counts)


if __name__ == '__main__':
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        faults = int(sys.argv[1])
        print(f'{soak(Path(folder), faults, max_iters=60 * faults)} in {time.monotonic() - began:.0f} s: '
              'the end is that of the run which nobody disturbed')
