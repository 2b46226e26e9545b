"""
What does it cost to lose nothing? The seconds that a checkpoint adds to a run, written at once or in the
background, and those of the checks of every step.

    python experiments/fault_costs.py config/tinystories_cpu.py --dataset=tinystories
    torchrun --nproc_per_node=2 experiments/fault_costs.py …          # with the check of drift between ranks

It also prints the memory in which each process begins, or resumes if out_dir holds a run. Rounds of `--steps`
steps take turns: plain, with a checkpoint at their beginning, with one in the background, plain, …; medians
are printed. All other settings are those of train.py.
"""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
import features  # noqa: I001 — first: your random.py or data/ then hides no module of ours or of a library
if __name__ == '__main__':
    features.start(__file__)

import dataclasses
import math
import statistics
import time
from dataclasses import dataclass

import torch

import checkpoint
import train
from configurator import configure, pick_device, run_main
from features.scale import background
from features.scale.guard import check_alike
from features.scale.ranks import Ranks
from run import peak_memory, set_up
from train import save


@dataclass
class Settings(train.Settings):
    steps: int = 10  # of a round: a checkpoint in the background should be written by then
    rounds: int = 5  # of each kind
    interval: int = 100  # steps between checkpoints, and between checks of drift, for which the shares are
    # printed


KINDS = ('plain', 'at once', 'in the background')  # of rounds


def main():
    s = configure(Settings)
    ranks = Ranks(pick_device(s.device))
    run = set_up(s, ranks.device, ranks)
    memory = ranks.gather(peak_memory(ranks.device))
    shown = ', '.join(f'{one / 1e6:,.0f}' for one in memory)
    ranks.say(f'{run.parameters[0]:,} parameters; memory until the first step, rank by rank: {shown} MB')
    ranks.from_first(lambda: checkpoint.prepare_out_dir(s.out_dir, run.step, dataclasses.asdict(s)))
    rounds, step = time_rounds(run, s, ranks)
    checks = []
    for _ in range(10):
        began = time.perf_counter()
        check_alike(run.model, ranks, step)
        checks.append(time.perf_counter() - began)
    drift = statistics.median(checks)
    finite = time_finite_check()

    plain = rounds['plain']
    step_seconds = statistics.median(one.seconds for one in plain) / s.steps
    between = s.interval * step_seconds  # seconds between two checkpoints
    ranks.say(f'{step_seconds:.3f} s a step; of {s.interval} steps, medians of {s.rounds} rounds:')
    for kind in KINDS[1:]:
        extra = [one.seconds - other.seconds for one, other in zip(rounds[kind], plain)]
        call = statistics.median(one.call for one in rounds[kind])
        median = statistics.median(extra)
        ranks.say(f'a checkpoint {kind}: {median:+.3f} s ({min(extra):+.3f} to {max(extra):+.3f}), '
                  f'{median / between:+.2%}; the run stands still for {call:.3f} s of it')
    longest = max(one.waited for found in rounds.values() for one in found)
    ranks.say(f'the longest wait for the background after {s.steps} steps: {longest:.3f} s')
    ranks.say(f'the check that loss and gradient are finite: {1e6 * finite:.0f} microseconds, '
              f'{finite / step_seconds:.4%} of a step')
    ranks.say(f'a check of drift: {drift:.3f} s, {drift / between:.2%}')
    ranks.end()


@dataclass
class Round:
    """Seconds of one round."""
    call: float  # until save() returned
    seconds: float  # of the whole round
    waited: float  # for the background, after it


def time_rounds(run, s, ranks):
    """({kind: [a Round]}, the step that was reached): s.rounds rounds of each kind, in turn."""
    rounds = {kind: [] for kind in KINDS}
    step = run.step
    for n in range(1 + s.rounds):
        for kind in KINDS:
            s.async_save = kind == 'in the background'
            began = time.perf_counter()
            if kind != 'plain':
                save(s, step, run, ranks)
            call = time.perf_counter() - began
            for _ in range(s.steps):
                train.train_step(run, s, step, ranks).nats.item()
                step += 1
            seconds = time.perf_counter() - began
            began = time.perf_counter()
            background.wait()
            waited = time.perf_counter() - began
            if n:  # the first round warms up
                rounds[kind].append(Round(call, seconds, waited))
    return rounds, step


def time_finite_check():
    """Seconds of the check that loss and gradient are finite."""
    loss = torch.ones(())
    norm = torch.ones(())
    began = time.perf_counter()
    for _ in range(1000):
        math.isfinite(norm)
        2.0 + 0 * loss.detach()
    return (time.perf_counter() - began) / 1000


if __name__ == '__main__':
    run_main(main)
