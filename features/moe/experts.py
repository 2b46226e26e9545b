"""
Show how many tokens each expert received during training.

    python analyze.py experts --out_dir=out/moe

If a router picks only a few experts, the others are not trained. If it picks all experts equally for all
kinds of tokens, the experts have not specialized. train.py logs each expert's share of the tokens in each
layer, without padding.
"""
import os
from dataclasses import dataclass

import torch

from checkpoint import read_records
from configurator import FilePath, UserError


@dataclass
class ExpertsSettings:
    out_dir: FilePath = ''  # a training run; '' = the last one under out/
    csv: FilePath = ''  # file for the shares of every expert at every step of the log
    picture: FilePath = 'out/experts.png'  # file for the plot; '' = no plot


def in_use(shares):
    """
    shares (…, E) of the tokens → (…): the effective number of experts, exp(entropy): E for equal shares, 1 if
    one expert has all tokens.
    """
    return torch.special.entr(shares).sum(-1).exp()


def read_shares(out_dir):
    """
    (steps [n], shares (n, layers, E) of the tokens since the last record) from a run's log. Raises UserError
    if it has none.
    """
    path = os.path.join(out_dir, 'log.jsonl')
    records = [record for record in read_records(path) if type(record.get('expert_load')) is list]
    if not records:
        raise UserError(f'out_dir={out_dir}: no expert_load in its log.jsonl: '
                        'give a run that was trained with n_expert')
    layers = len(records[-1]['expert_load'])
    records = [record for record in records if len(record['expert_load']) == layers]  # since it last grew
    steps = [record['step'] for record in records]
    shares = [record['expert_load'] for record in records]
    try:
        return steps, torch.tensor(shares, dtype=torch.float64).reshape(len(steps), layers, -1)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f'{path}: expert_load is not a table: {error}') from None


def table(shares):
    """A line for every layer: the shares (layers, E) of its experts, the largest first."""
    lines = [f'{"layer":>5}  {"in use":>6}  shares of the tokens, largest first']
    for n, layer in enumerate(shares):
        largest_first = layer.sort(descending=True).values
        line = f'{n:5}  {in_use(layer):6.2f}  '
        lines.append(line + ' '.join(f'{share:5.1%}' for share in largest_first))
    return '\n'.join(lines)


def draw(steps, shares, title):
    """Plot each layer's final shares (n, layers, E), and the number of experts in use at every step."""
    from features.study.pictures import figure
    page = figure(11, 4.5)  # before the import: it says what to install
    from matplotlib.ticker import MaxNLocator
    left, right = page.subplots(1, 2)
    image = left.imshow(shares[-1], aspect='auto', cmap='viridis', vmin=0)
    left.set(xlabel='expert', ylabel='layer', title=f'shares of the tokens up to step {steps[-1]:,}')
    left.yaxis.set_major_locator(MaxNLocator(integer=True))
    page.colorbar(image, ax=left)
    for n, numbers in enumerate(in_use(shares).T):
        style = '-' if n < 10 else '--'
        right.plot(steps, numbers, color=f'C{n % 10}', linestyle=style, label=f'layer {n}')
    right.set(xlabel='step', ylabel='experts in use', ylim=(0, shares.size(2) + 0.3))
    right.grid(alpha=0.3)
    right.legend(fontsize=8, ncols=2)
    page.suptitle(title, fontsize=11)
    return page


def run(s):
    """python analyze.py experts"""
    from features.study.pictures import save, write_csv
    steps, shares = read_shares(s.out_dir)
    began = f'steps {steps[-2] + 1:,} to' if len(steps) > 1 else 'the steps up to'
    print(f'{s.out_dir}: {shares.size(2)} experts, tokens of {began} {steps[-1]:,}; '
          'an encoder\'s layers come first\n\n'
          f'{table(shares[-1])}')
    if s.csv:
        write_csv(rows_of(steps, shares), s.csv)
        print(f'written: {s.csv}')
    if s.picture:
        save(draw(steps, shares, s.out_dir), s.picture)
        print(f'written: {s.picture}')


def rows_of(steps, shares):
    """The rows of the csv: step, layer, expert, share."""
    rows = []
    for step, layers in zip(steps, shares.tolist()):
        for n, layer in enumerate(layers):
            for e, share in enumerate(layer):
                rows.append({'step': step, 'layer': n, 'expert': e, 'share': share})
    return rows
