"""
Measure speed and memory, and compare them with the limits of the machine and with nanoGPT.

    python bench.py all   # minnow, and the peak speed of the machine; on a GPU too
    python bench.py train sample --peer=PATH/TO/nanoGPT --json=bench.json

    train      train.py: tokens/s, share of the peak matmul speed (MFU), peak memory, for the 10.6M model of
               nanoGPT's train_shakespeare_char; on CUDA also for GPT-2 124M
    loss       the chunked cross-entropy against torch's: seconds by vocabulary size, and the peak memory of a
               training step
    sample     tokens/s for 500 tokens from the 10.6M model, one row, and the share of the memory bandwidth
    prepare    MB/s with GPT-2's BPE, and peak memory by size of the text
    scale      how the cost grows with data size (1 MB to 100 GB), context, width, vocabulary and ranks

Each program runs with its own defaults, as its users run it. The programs take turns (A B A B), so that a
disturbance affects all of them. The tables show medians, extremes, and ratios to minnow.
"""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))
import features  # noqa: I001 — first: your random.py or data/ then hides no module of ours or of a library
if __name__ == '__main__':
    features.answer_help(__file__)

from dataclasses import asdict, dataclass, field

from checkpoint import replace_json, writing
from configurator import FilePath, configure, pick_device, run_main
from features.study.bench_prepare import bench_prepare
from features.study.bench_sample import bench_sample
from features.study.bench_scale import bench_scale
from features.study.bench_train import bench_loss, bench_train
from features.study.measure import measure_machine, show

# each yields sections of the report
BENCHES = {'train': bench_train, 'loss': bench_loss, 'sample': bench_sample, 'prepare': bench_prepare,
           'scale': bench_scale}


@dataclass
class Settings:
    positional = 'what'
    what: list[str] = field(default_factory=list)  # train, loss, sample, prepare, scale, or all
    peer: FilePath = ''  # a clone of nanoGPT to compare with; '' = none
    json: FilePath = ''  # file for all results: the machine, every sample, medians, ratios
    rounds: int = 3  # number of measurements of each program
    device: str = 'auto'  # cpu, cuda, cuda:1, mps; auto = the fastest available
    text: list[FilePath] = field(default_factory=lambda: ['stdlib'])  # text for the prepare benchmark:
    # sources as in prepare.py
    quick: bool = False  # tiny sizes: checks in a minute that everything runs; the figures mean nothing

    def check(self):
        """Raise ValueError for values that cannot work."""
        unknown = [name for name in self.what if name not in BENCHES and name != 'all']
        if unknown or not self.what:
            raise ValueError(f'what={"".join(unknown[:1])}: takes {", ".join(BENCHES)} or all, '
                             'as in python bench.py all')
        if self.rounds < 1:
            raise ValueError(f'rounds={self.rounds}: must be at least 1')
        if not os.path.isdir(os.path.dirname(self.json) or '.'):
            raise ValueError(f'json={self.json}: its folder does not exist: make it, or choose another')
        if self.peer and not os.path.isfile(os.path.join(self.peer, 'config', 'train_shakespeare_char.py')):
            raise ValueError(f'peer={self.peer}: not a clone of nanoGPT: '
                             'git clone https://github.com/karpathy/nanoGPT, and give its folder')


def main():
    s = configure(Settings)
    device = pick_device(s.device)
    if s.peer:
        s.peer = os.path.abspath(s.peer)
    machine = measure_machine(device)
    print(f'{machine["device"]}, {machine["cpu"]}, {machine["cores"]} cores, torch {machine["torch"]}')
    ceilings = [f'{name} matmul {flops / 1e12:.3g} TFLOP/s' for name, flops in machine['flops'].items()]
    print(f'ceilings: {", ".join(ceilings)}; copying {machine["bandwidth"] / 1e9:.3g} GB/s', flush=True)
    report = {'settings': asdict(s), 'machine': machine, 'parts': []}
    names = BENCHES if 'all' in s.what else dict.fromkeys(s.what)
    for name in names:
        for part in BENCHES[name](s, device, machine):
            show(part)
            report['parts'].append(part)
            if s.json:
                with writing(f'json={s.json}', 'give another path, or make room'):
                    os.makedirs(os.path.dirname(s.json) or '.', exist_ok=True)
                    replace_json(s.json, report, is_given=True)


if __name__ == '__main__':
    run_main(main)
