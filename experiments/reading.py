"""
What does it take to read a Hugging Face folder, here and with transformers? Seconds and peak memory of a
fresh process that reads it. The files are in the page cache.

    pip install transformers
    python experiments/reading.py --init_from=hf:FOLDER
"""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
import features  # noqa: I001 — first: your random.py or data/ then hides no module of ours or of a library
if __name__ == '__main__':
    features.start(__file__)

import json
import re
import shutil
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from configurator import FilePath, configure, run_main

BFLOAT16 = 'bfloat16'  # the name of the copy whose weights are stored so


@dataclass
class Settings:
    init_from: FilePath = 'hf:'  # hf:FOLDER
    rounds: int = 5
    work: FilePath = 'out/reading'  # a folder for a copy of it in bfloat16
    arm: Literal['', 'load_model', 'sample.load', 'transformers', 'transformers and tokenizer'] = ''  # one of
    # them, in this process


def read(s):
    """Read the folder as s.arm says, and print the figures of this process as JSON."""
    folder = s.init_from.removeprefix('hf:')
    began = time.perf_counter()
    if s.arm.startswith('transformers'):
        import torch
        import transformers
        from transformers import AutoModelForCausalLM, AutoTokenizer
        fields = json.loads(Path(folder, 'config.json').read_text())
        getattr(transformers, fields['architectures'][0])  # imports the code of this kind of network
        imported = time.perf_counter()
        kept = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)]
        if s.arm == 'transformers and tokenizer':
            kept.append(AutoTokenizer.from_pretrained(folder))
    else:
        import model  # noqa: F401 — what a program imports before it reads a network
        import sample
        from features.networks import load_model
        imported = time.perf_counter()
        load = sample.load if s.arm == 'sample.load' else load_model
        kept = load(s.init_from)
    done = time.perf_counter()
    figures = {'seconds to read': done - imported, 'with imports': done - began, 'peak memory, MiB': peak()}
    network = kept[0]
    sum(float(p.detach().flatten()[::1024].sum()) for p in network.parameters())  # every page is needed
    print(json.dumps(figures | {'the same, all weights used, MiB': peak()}))


def peak():
    """The peak memory of this process so far, in MiB."""
    status = Path('/proc/self/status').read_text()
    return int(re.search(r'VmHWM:\s+(\d+)', status)[1]) / 1024


def bfloat16_copy(s):
    """The path of a copy of the folder with its weights in bfloat16."""
    import torch
    from safetensors.torch import load_file, save_file
    folder, to = Path(s.init_from.removeprefix('hf:')), Path(s.work, BFLOAT16)
    if not to.exists():
        making = Path(s.work, BFLOAT16 + '.tmp')
        shutil.rmtree(making, ignore_errors=True)
        shutil.copytree(folder, making)
        for path in making.glob('*.safetensors'):
            tensors = {name: t.to(torch.bfloat16) for name, t in load_file(path).items()}
            save_file(tensors, making / 'new', {'format': 'pt'})
            (making / 'new').replace(path)
        making.rename(to)
    return str(to)


def run_arm(name, where):
    """The figures of read() in a process of its own."""
    from features.study.measure import run
    lines, _, _ = run([sys.executable, __file__, f'--init_from={where}', f'--arm={name}'])
    return json.loads(lines[-1][1])


def main():
    s = configure(Settings)
    if s.arm:
        return read(s)
    from features.study.measure import alternate, section, show
    arms = 'load_model', 'transformers', 'sample.load', 'transformers and tokenizer'
    for title, where in (('as it is', s.init_from), (BFLOAT16, f'hf:{bfloat16_copy(s)}')):
        samples = alternate({name: partial(run_arm, name, where) for name in arms}, s.rounds)
        show(section(f'{where} ({title}), read into float32', samples))


if __name__ == '__main__':
    run_main(main)
