"""
Analyze a checkpoint: tables and plots of its weights, attention and experts.

    python analyze.py weights --out_dir=out/run                          # ranks and spectra of every matrix
    python analyze.py weights --out_dir=out/run --along                  # the same for every checkpoint
    python analyze.py weights --out_dir=out/tuned --against=hf:FOLDER    # the same for the change by training
    python analyze.py attention --out_dir=out/run                        # ranks of attention, lazy layers
    python analyze.py experts --out_dir=out/run                          # tokens per expert
"""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))
import features  # noqa: I001 — first: your random.py or data/ then hides no module of ours or of a library
if __name__ == '__main__':
    features.start(__file__)

from dataclasses import dataclass

from configurator import FilePath, run_main
from features.commands import configure_command
from features.moe import experts  # moe
from features.study import attention, spectra


@dataclass
class WeightsSettings:
    out_dir: FilePath = ''  # a run (its best checkpoint), a checkpoint, hf:FOLDER, gpt2; '' = the last run
    # under out/
    along: bool = False  # measure every checkpoint in out_dir and show the figures by step (keep the
    # checkpoints with train.py --keep_checkpoints=100)
    against: FilePath = ''  # measure the difference to this model, which must have the same settings
    csv: FilePath = ''  # file for the figures of every matrix; the printed table has the median of each kind
    picture: FilePath = 'out/weights.png'  # file for the plot; '' = no plot


COMMANDS = {
    'weights': (spectra.run, WeightsSettings),
    'attention': (attention.run, attention.AttentionSettings),
    'experts': (experts.run, experts.ExpertsSettings),  # moe
}


def main():
    command, s = configure_command(COMMANDS)
    command(s)


if __name__ == '__main__':
    run_main(main, output_is_all=True)
