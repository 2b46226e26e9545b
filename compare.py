"""
Several runs in one table and one picture.

    python compare.py out/demo_dense out/demo_lowrank --picture=out/demo.png
"""
import json
import os
from dataclasses import dataclass, field, fields

import torch

from configurator import UserError, configure, run_main
from model import ModelConfig, Transformer


@dataclass
class Settings:
    runs: list[str] = field(default_factory=list)  # out_dirs of training runs
    picture: str = 'out/compare.png'  # where to draw; '' = nowhere

    positional = 'runs'


def read_run(out_dir):
    """{'name', 'parameters', 'train': records with train_loss, 'val': records with val_loss} of a run. Raises UserError."""
    try:
        with open(os.path.join(out_dir, 'settings.json'), encoding='utf-8') as f:
            settings = json.load(f)
        with open(os.path.join(out_dir, 'log.jsonl'), encoding='utf-8') as f:
            log = [json.loads(line) for line in f if line.endswith('\n')]
    except (OSError, ValueError) as error:
        raise UserError(f'{out_dir}: not a training run ({error}): give the out_dir of one') from None
    val = [r for r in log if 'val_loss' in r]
    if not val:
        raise UserError(f'{out_dir}: log.jsonl has no evaluation yet')
    with torch.device('meta'):
        model = Transformer(ModelConfig(**{f.name: settings[f.name] for f in fields(ModelConfig) if f.name in settings}))
    return {'name': os.path.basename(out_dir.rstrip('/')), 'parameters': model.num_params(), 'train': [r for r in log if 'train_loss' in r], 'val': val}


def table(runs):
    """The last evaluation of every run, a line each."""
    width = max(len(run['name']) for run in runs)
    lines = [f'{"run":{width}}  parameters      tokens      FLOPs  seconds  val loss  bits/byte']
    for run in runs:
        r = run['val'][-1]
        bpb = f'{r["val_bpb"]:9.4f}' if 'val_bpb' in r else '        -'
        lines.append(f'{run["name"]:{width}}  {run["parameters"]:10,}  {r["tokens"]:10,}  {r["flops"]:9.2e}  {r["seconds"]:7.0f}  {r["val_loss"]:8.4f}  {bpb}')
    return '\n'.join(lines)


def draw(runs, path):
    """Validation loss (points) and training loss (thin) against tokens and against seconds."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("picture: matplotlib is not installed: pip install matplotlib, or --picture=''") from None
    figure = Figure(figsize=(10, 4), layout='constrained')
    for axis, against in zip(figure.subplots(1, 2, sharey=True), ('tokens', 'seconds')):
        for n, run in enumerate(runs):
            axis.plot([r[against] for r in run['train']], [r['train_loss'] for r in run['train']], color=f'C{n}', alpha=0.35, linewidth=1)
            axis.plot([r[against] for r in run['val']], [r['val_loss'] for r in run['val']], 'o-', color=f'C{n}', markersize=4,
                      label=f'{run["name"]}: {run["parameters"] / 1e6:.1f}M, {run["val"][-1]["val_loss"]:.3f}')
        axis.set_xlabel(against)
        axis.grid(alpha=0.3)
    figure.axes[0].set_ylabel('loss (nats per token); thin: training')
    figure.axes[0].legend()
    try:
        os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise UserError(f'picture={path}: {error}') from None


def main():
    s = configure(Settings)
    if not s.runs:
        raise UserError('runs: give the out_dir of one run or more: python compare.py out/demo_dense out/demo_lowrank')
    runs = [read_run(out_dir) for out_dir in s.runs]
    print(table(runs))
    if s.picture:
        draw(runs, s.picture)
        print(f'drawn: {s.picture}')


if __name__ == '__main__':
    run_main(main)
