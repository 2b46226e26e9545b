"""
nanoGPT, as its users run it: its train.py, its network and its prepare.py, from a clone in the folder `peer`.
"""
import importlib.util
import io
import os
import re
import shutil
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass

import torch

from features.study.measure import run


@dataclass
class Trained:
    """The figures of a training run, minnow's or nanoGPT's."""
    rates: list[float]  # tokens/s of every step
    peak: float  # memory, MiB
    dtype: str
    lines: list  # [(seconds since its start, line)] that it printed


def train(peer, config, tokens, options, folder, device):
    """
    The Trained of nanoGPT's train.py with one of its config files and command-line options; tokens: per step.
    """
    command = [sys.executable, 'train.py', f'config/{config}.py', '--compile=True', '--wandb_log=False',
               f'--out_dir={folder}/peer']
    lines, _, peak = run(command + options, device, cwd=peer)
    rates = []
    for _, line in lines:
        found = re.match(r'iter \d+: .*time ([\d.]+)ms', line)
        if found:
            rates.append(tokens / (float(found[1]) / 1000))
    dtype = 'float32'  # its float16 has no effect on a CPU
    if device.type == 'cuda':
        dtype = 'bfloat16' if torch.cuda.is_bf16_supported() else 'float16'
    return Trained(rates, peak, dtype, lines)


def network(peer, sizes):
    """nanoGPT's model of these sizes, with random weights."""
    spec = importlib.util.spec_from_file_location('nanogpt_model', os.path.join(peer, 'model.py'))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    names = ('n_layer', 'n_head', 'n_embd', 'block_size', 'vocab_size')
    cfg = module.GPTConfig(**{name: sizes[name] for name in names}, dropout=0.0, bias=False)
    with redirect_stdout(io.StringIO()):  # it prints how many parameters it has
        return module.GPT(cfg)


def training(peer, sizes, device):
    """
    (optimizer, a function of tokens x, y (B, T) that returns the loss) of nanoGPT's model, compiled, with its
    defaults.
    """
    model = network(peer, sizes).to(device)
    optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), device.type)
    compiled = torch.compile(model)
    return optimizer, lambda x, y: compiled(x, y)[1]


# runs its script on local documents, which load_dataset then returns
LOCAL = """import datasets, runpy
load = datasets.load_dataset
datasets.load_dataset = lambda name, num_proc: load('json', data_files={!r})
runpy.run_path({!r}, run_name='__main__')"""


def prepare(peer, name, folder, num_proc, documents):
    """
    (seconds, peak MiB) of nanoGPT's data/NAME/prepare.py, in a copy of that folder: 'shakespeare' on text.txt
    in `folder`, 'openwebtext' on the documents in text.jsonl.
    """
    place = os.path.join(folder, name)
    os.makedirs(place)
    script = os.path.join(place, 'prepare.py')
    # it cuts each split into 1,024 pieces, and none may be empty
    share = min(0.5, max(0.0005, 1100 / documents))
    with open(os.path.join(peer, 'data', name, 'prepare.py')) as f:
        code = f.read()
    code = code.replace('num_proc = 8', f'num_proc = {num_proc}').replace('test_size=0.0005',
                                                                          f'test_size={share}')
    with open(script, 'w') as f:
        f.write(code)
    if name == 'shakespeare':
        os.link(os.path.join(folder, 'text.txt'), os.path.join(place, 'input.txt'))
        command = [sys.executable, script]
    else:
        os.environ |= {'HF_HOME': os.path.join(place, 'cache'), 'HF_HUB_OFFLINE': '1'}
        command = [sys.executable, '-c', LOCAL.format(os.path.join(folder, 'text.jsonl'), script)]
    _, took, peak = run(command, tree=True)
    shutil.rmtree(place)
    return took, peak
