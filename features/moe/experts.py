"""
How the tokens of a mixture of experts were shared out while it was trained: python analyze.py experts.

A router that has fallen for a few experts leaves the others without training; one that treats all alike has not learned what is whose. The
log of train.py says which share of the tokens every expert was given, layer by layer, padding left out.
"""
from dataclasses import dataclass

import torch

from configurator import FilePath, UserError
from features.study.pictures import figure, save, write_csv
from features.study.sweep import read_log


@dataclass
class ExpertsSettings:
    out_dir: FilePath = 'out'  # a training run
    csv: FilePath = ''  # file for the shares of every expert at every step of the log
    picture: FilePath = 'out/experts.png'  # where to draw; '' = nowhere


def in_use(shares):
    """How many experts shares (…, E) of the tokens amount to: exp of their entropy, E where all have as many, 1 where one has all."""
    return torch.special.entr(shares).sum(-1).exp()


def read_shares(out_dir):
    """(steps [n], shares (n, layers, E) of the tokens since the record before each) out of a run's log. Raises UserError where there are none."""
    records = [r for r in read_log(out_dir) if 'expert_load' in r]
    if not records:
        raise UserError(f'out_dir={out_dir}: no expert_load in its log.jsonl: give a run that was trained with n_expert')
    records = [r for r in records if len(r['expert_load']) == len(records[-1]['expert_load'])]  # since the network last grew
    return [r['step'] for r in records], torch.tensor([r['expert_load'] for r in records], dtype=torch.float64)


def table(shares):
    """A line for every layer: the shares (layers, E) of its experts, the largest first."""
    lines = [f'{"layer":>5}  {"in use":>6}  shares of the tokens, largest first']
    for n, (layer, number) in enumerate(zip(shares, in_use(shares))):
        lines.append(f'{n:5}  {number:6.2f}  ' + ' '.join(f'{share:5.1%}' for share in layer.sort(descending=True).values))
    return '\n'.join(lines)


def draw(steps, shares, title):
    """Every layer's shares at the end, and how many experts were in use at every step."""
    page = figure(11, 4.5)  # first, as it says what to install
    from matplotlib.ticker import MaxNLocator
    left, right = page.subplots(1, 2)
    image = left.imshow(shares[-1], aspect='auto', cmap='viridis', vmin=0)
    left.set(xlabel='expert', ylabel='layer', title=f'shares of the tokens up to step {steps[-1]:,}')
    left.yaxis.set_major_locator(MaxNLocator(integer=True))
    page.colorbar(image, ax=left)
    for n, numbers in enumerate(in_use(shares).T):
        right.plot(steps, numbers, color=f'C{n % 10}', linestyle='-' if n < 10 else '--', label=f'layer {n}')
    right.set(xlabel='step', ylabel='experts in use', ylim=(0, shares.size(2) + 0.3))
    right.grid(alpha=0.3)
    right.legend(fontsize=8, ncols=2)
    page.suptitle(title, fontsize=11)
    return page


def run(s):
    """python analyze.py experts"""
    steps, shares = read_shares(s.out_dir)
    began = f'steps {steps[-2] + 1:,} to' if len(steps) > 1 else 'the steps up to'
    print(f'{s.out_dir}: {shares.size(2)} experts, tokens of {began} {steps[-1]:,}; an encoder\'s layers come first\n\n{table(shares[-1])}')
    if s.csv:
        write_csv([{'step': step, 'layer': n, 'expert': e, 'share': share} for step, layers in zip(steps, shares.tolist())
                   for n, layer in enumerate(layers) for e, share in enumerate(layer)], s.csv)
        print(f'written: {s.csv}')
    if s.picture:
        save(draw(steps, shares, s.out_dir), s.picture)
        print(f'written: {s.picture}')
