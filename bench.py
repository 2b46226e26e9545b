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
    race       bits per byte on held-out text after some minutes of training, beside nanoGPT and nanochat;
               takes an hour or more, so it is not a part of all
    gpu        a GPU in eight minutes, as a markdown table: does it compute what a CPU does, and how fast? Not
               a part of all

Each program runs with its own defaults, as its users run it. The programs take turns (A B A B), so that a
disturbance affects all of them. The tables show medians, extremes, and ratios to minnow.
"""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))
import features  # noqa: I001 — first: your random.py or data/ then hides no module of ours or of a library
if __name__ == '__main__':
    features.start(__file__)

from dataclasses import asdict, dataclass, field

from checkpoint import replace_json, writing
from configurator import FilePath, configure, pick_device, run_main
from features.study.bench_gpu import SECTIONS, bench_gpu
from features.study.bench_prepare import bench_prepare
from features.study.bench_race import bench_race
from features.study.bench_sample import bench_sample
from features.study.bench_scale import bench_scale
from features.study.bench_train import bench_loss, bench_train
from features.study.measure import measure_machine, show

# each yields sections of the report
BENCHES = {'train': bench_train, 'loss': bench_loss, 'sample': bench_sample, 'prepare': bench_prepare,
           'scale': bench_scale, 'race': bench_race, 'gpu': bench_gpu}
ALONE = {'race', 'gpu'}  # only by their names, not as a part of all


@dataclass
class Settings:
    positional = 'what'
    what: list[str] = field(default_factory=list)  # train, loss, sample, prepare, scale, race, gpu, or all
    peer: FilePath = ''  # a clone of nanoGPT to compare with; '' = none
    json: FilePath = ''  # file for all results: the machine, every sample, medians, ratios
    rounds: int = 3  # number of measurements of each program
    device: str = 'auto'  # cpu, cuda, cuda:1, mps; auto = the fastest available
    text: list[FilePath] = field(default_factory=lambda: ['stdlib'])  # text for the prepare benchmark and the
    # race: sources as in prepare.py
    nanochat: FilePath = ''  # race: a clone of nanochat to compare with; '' = none
    minutes: float = 5.0  # race: time of a whole training process
    tokens: float = 0.0  # race: then train each on this many tokens too; 0 = no
    quick: bool = False  # tiny sizes: checks in a minute that everything runs; the figures mean nothing
    only: list[str] = field(default_factory=list)  # of gpu, only these sections: gradients, losses, sampling,
    # resume, training, decoding, adapters, T5, kernels; can be repeated
    record: bool = False  # of gpu: record the losses of this machine, a CPU, to compare GPUs with

    def check(self):
        """Raise ValueError for values that cannot work."""
        unknown = [name for name in self.what if name not in BENCHES and name != 'all']
        if unknown or not self.what:
            raise ValueError(f'what={"".join(unknown[:1])}: takes {", ".join(BENCHES)} or all, '
                             'as in python bench.py all')
        unknown = [name for name in self.only if name not in SECTIONS]
        if unknown:
            raise ValueError(f'only={unknown[0]}: takes {", ".join(SECTIONS)}')
        for name in ('only', 'record'):
            if getattr(self, name) and 'gpu' not in self.what:
                raise ValueError(f'{name}: is about gpu: python bench.py gpu')
        if self.json and 'gpu' in self.what:
            raise ValueError(f'json={self.json}: gpu prints a table: python bench.py gpu > gpu.md')
        if self.rounds < 1:
            raise ValueError(f'rounds={self.rounds}: must be at least 1')
        if self.minutes <= 0 or self.tokens < 0:
            raise ValueError(f'minutes={self.minutes:g}, tokens={self.tokens:g}: take minutes above 0, '
                             'and tokens of at least 0')
        if not os.path.isdir(os.path.dirname(self.json) or '.'):
            raise ValueError(f'json={self.json}: its folder does not exist: make it, or choose another')
        if self.peer and not os.path.isfile(os.path.join(self.peer, 'config', 'train_shakespeare_char.py')):
            raise ValueError(f'peer={self.peer}: not a clone of nanoGPT: '
                             'git clone https://github.com/karpathy/nanoGPT, and give its folder')
        if self.nanochat and not os.path.isfile(os.path.join(self.nanochat, 'scripts', 'base_train.py')):
            raise ValueError(f'nanochat={self.nanochat}: not a clone of nanochat: '
                             'git clone https://github.com/karpathy/nanochat, and give its folder')


def parts_of(what):
    """The benches that these names stand for, each once."""
    return [name for name in BENCHES if name in what or 'all' in what and name not in ALONE]


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
    for name in parts_of(s.what):
        for part in BENCHES[name](s, device, machine):
            show(part)
            report['parts'].append(part)
            if s.json:
                with writing(f'json={s.json}', 'give another path, or make room'):
                    os.makedirs(os.path.dirname(s.json) or '.', exist_ok=True)
                    replace_json(s.json, report, is_given=True)


if __name__ == '__main__':
    run_main(main)
