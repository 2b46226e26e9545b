"""
How long do the scripts take to start? Seconds of `import torch`, of our imports, of --help, and of sample.py
to its first token.

    python experiments/starting.py --init_from=hf:FOLDER --rounds=5

The processes take turns. Each is run once before, so that files are in memory and bytecode is written.
"""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
import features  # noqa: I001 — first: your random.py or data/ then hides no module of ours or of a library
if __name__ == '__main__':
    features.start(__file__)

import resource
from dataclasses import dataclass
from functools import partial

from configurator import ROOT, FilePath, configure, run_main
from features.study.measure import alternate, run, section, show


@dataclass
class Settings:
    init_from: FilePath = ''  # hf:FOLDER of a network for sample.py; '' = without it
    rounds: int = 5  # number of measurements of each program


def first_line(*args):
    """{metric: seconds} of a process: to the end of its first line, or without one to its own end."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    lines, took, _ = run([sys.executable, *args], cwd=ROOT, env={'PYTHONDONTWRITEBYTECODE': ''})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {'seconds': lines[0][0] if lines else took, 'seconds to the end': took,
            'processor seconds to the end': processor}


def main():
    s = configure(Settings)
    arms = {'import torch': partial(first_line, '-c', 'import torch')}
    for script in ('train', 'sample'):
        arms[f'import {script}'] = partial(first_line, '-c', f'import {script}')
    for script in ('train', 'sample', 'prepare'):
        arms[f'{script}.py --help'] = partial(first_line, f'{script}.py', '--help')
    sample = ['sample.py', f'--init_from={s.init_from}', '--start=Hello', '--max_new_tokens=1',
              '--num_samples=1', '--device=cpu', '--temperature=0']
    if s.init_from:  # its first line ends after the first token
        for precision in ('--dtype=float32', '--dtype=bfloat16', '--int8'):
            arms[f'sample.py {precision}'] = partial(first_line, *sample, precision)
    alternate(arms, 1)
    show(section('Starting', alternate(arms, s.rounds)))


if __name__ == '__main__':
    run_main(main)
