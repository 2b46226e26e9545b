"""
What it costs to lose nothing: the seconds that a checkpoint adds to a run, written at once or in the background, and those of the checks of every step.

    python experiments/fault_costs.py config/tinystories_cpu.py --dataset=tinystories           # or: torchrun --nproc_per_node=2 …, for the check of drift

And the memory in which each process begins, or goes on if out_dir holds a run. Rounds of `--steps` steps in turn: plain, with a checkpoint at their
beginning, with one in the background, plain, …; medians. All other settings are those of train.py.
"""
import dataclasses
import math
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

import checkpoint
import train
from configurator import configure, run_main
from device import peak_memory, pick_device
from features.scale.guard import check_alike
from features.scale.ranks import Ranks
from run import set_up
from train import save


@dataclass
class Settings(train.Settings):
    steps: int = 10  # of a round: a checkpoint in the background is to be written by then
    rounds: int = 5  # of each kind
    interval: int = 100  # the steps between checkpoints, and between checks of drift, that the shares are for


def main():
    s = configure(Settings)
    ranks = Ranks(s.backend, pick_device(s.device))
    run = set_up(s, ranks.device, ranks, ())
    memory = ranks.gather(peak_memory(ranks.device))
    ranks.say(f'{run.parameters[0]:,} parameters; memory until the first step, rank by rank: {", ".join(f"{one / 1e6:,.0f}" for one in memory)} MB')
    ranks.from_first(lambda: checkpoint.prepare_out_dir(s.out_dir, run.step, dataclasses.asdict(s)))
    calls, times, step = {}, {}, run.step
    writers = {kind: checkpoint.Writer(kind == 'in the background') for kind in ('plain', 'at once', 'in the background')}
    for n in range(1 + s.rounds):
        for kind, run.writer in writers.items():
            began = time.perf_counter()
            s.async_save = kind == 'in the background'
            if kind != 'plain':
                save(s, step, run, ranks)
                if n:
                    calls.setdefault(kind, []).append(time.perf_counter() - began)
            for _ in range(s.steps):
                train.train_step(run, s, step, ranks)[2].item()
                step += 1
            seconds = time.perf_counter() - began
            began = time.perf_counter()
            run.writer.wait()
            if n:  # the first round sets things up
                times.setdefault(kind, []).append(seconds)
                times.setdefault('left to wait for', []).append(time.perf_counter() - began)
    checks = []
    for _ in range(10):
        began = time.perf_counter()
        check_alike(run.model, ranks, step)
        checks.append(time.perf_counter() - began)
    step_seconds = statistics.median(times['plain']) / s.steps
    ranks.say(f'{step_seconds:.3f} s a step; of {s.interval} steps, medians of {s.rounds} rounds:')
    for kind in ('at once', 'in the background'):
        extra, call = [theirs - plain for theirs, plain in zip(times[kind], times['plain'])], statistics.median(calls[kind])
        ranks.say(f'a checkpoint {kind}: {statistics.median(extra):+.3f} s ({min(extra):+.3f} to {max(extra):+.3f}), '
                  f'{statistics.median(extra) / (s.interval * step_seconds):+.2%}; the run stands still for {call:.3f} s of it')
    ranks.say(f'the longest wait for the background after {s.steps} steps: {max(times["left to wait for"]):.3f} s')
    loss, norm = torch.ones(()), torch.ones(())
    began = time.perf_counter()
    for _ in range(1000):
        math.isfinite(norm)
        2.0 + 0 * loss.detach()
    finite = (time.perf_counter() - began) / 1000
    ranks.say(f'the check that loss and gradient are finite: {1e6 * finite:.0f} microseconds, {finite / step_seconds:.4%} of a step')
    ranks.say(f'a check of drift: {statistics.median(checks):.3f} s, {statistics.median(checks) / (s.interval * step_seconds):.2%}')
    ranks.end()


if __name__ == '__main__':
    run_main(main)
