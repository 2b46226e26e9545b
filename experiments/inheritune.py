"""
Is it worth anything to inherit layers? "Inheritune" (Sanyal et al. 2024, arXiv 2404.08634) with the controls
that it lacked. Half the layers of a trained network, its first or its middle ones, are trained on as a
network of their own. Beside them the same half from random weights, also for twice the steps, taught by the
whole network, and grown from a quarter. Each arm has the best of three learning rates.

    python prepare.py FOLDER_OF_NOVELS --out=data/novels --tokenizer=bpe:4096
    python experiments/inheritune.py --jobs=2 --rates=[0.04]   # two hours on two cores with AVX2 alone
    python experiments/inheritune.py --jobs=2                  # with two more rates of each arm

It writes a table, a picture and the ranks of the attention. All settings are those of train.py, with
config/inheritune_cpu.py as defaults. Runs that are in out_dir are not made again.
"""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
import features  # noqa: I001 — first: your random.py or data/ then hides no module of ours or of a library
if __name__ == '__main__':
    features.start(__file__)

import statistics
from dataclasses import dataclass, field, fields
from pathlib import Path

import train
from checkpoint import replace_text
from configurator import configure, run_main
from features.growth.commands import run_inherit
from features.study.attention import AttentionSettings, look
from features.study.pictures import colour_of, draw_arm, figure, label_ends, save
from features.study.stats import mean_and_error, show_interval, show_mean
from features.study.tuning import tuned
from surgery import InheritSettings

ROOT = Path(__file__).parent.parent


@dataclass
class Settings(train.Settings):
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3])  # of the whole network and of its halves
    rates: list[float] = field(default_factory=lambda: [0.02, 0.04, 0.08])  # Muon's, tried on the first seed
    jobs: int = 1  # runs at a time


# -----------------------------------------------------------------------------
# Arms

WHOLE = {'whole': {}}  # the network to inherit from
# remedies for idle deep layers
SCALED = {'whole_attn': {'depth_scale': 'attn'}, 'whole_norm': {'depth_scale': 'norm'}}


def half_arms(s, whole):
    """{arm: its settings} of the halves; whole: out_dir of the run to inherit from."""
    half = {'n_layer': s.n_layer // 2}
    return {
        'random': half,
        'random_twice': half | {'max_iters': 2 * s.max_iters},
        'first': half | {'init_from': f'{whole}_first'},
        'middle': half | {'init_from': f'{whole}_middle'},
        'taught': half | {'teacher': whole},
        'stacked': {'n_layer': s.n_layer // 4, 'grow_every': s.max_iters // 2, 'grow_to': s.n_layer // 2,
                    'grow_by': s.n_layer // 4},
    }


def inherit(s, whole):
    """Write the weights that the halves of a run start from, beside its out_dir."""
    for part in ('first', 'middle'):
        out_dir = f'{whole}_{part}'
        if not os.path.isdir(out_dir):
            run_inherit(InheritSettings(from_=whole, out_dir=out_dir, layers=f'{part}:{s.n_layer // 2}'))


# -----------------------------------------------------------------------------
# Figures

def reach(run, loss, against):
    """
    'tokens' or 'flops' (as `against` says) after which a run's validation loss was down to `loss`, on the
    line between two evaluations; None if it never was.
    """
    val = run['val']
    for before, after in zip(val, val[1:]):
        if after['val_loss'] <= loss < before['val_loss']:
            share = (before['val_loss'] - loss) / (before['val_loss'] - after['val_loss'])
            return before[against] + share * (after[against] - before[against])
    return None


def reached(arm, whole, against):
    """
    Mean over the seeds of reach() for the loss with which the whole network of the seed ended; None if one
    run did not get there.
    """
    values = []
    for seed, run in arm.runs.items():
        goal = whole.runs[seed]['val'][-1]['val_loss']
        values.append(reach(run, goal, against))
    if None in values:
        return None
    return statistics.mean(values)


def attention(s, arms, names=('whole', 'whole_attn', 'whole_norm', 'random', 'first')):
    """{arm: [figures of each layer, means over the seeds]} as analyze.py attention has them."""
    out = {}
    for name in names:
        seeds = []  # [[figures of each layer] of each seed]
        for run in arms[name].runs.values():
            _, layers, _, _ = look(AttentionSettings(run['out_dir'], length=min(100, s.block_size)))
            seeds.append(layers)
        out[name] = []
        for same in zip(*seeds):
            figures = [key for key in same[0] if key != 'attention']  # which is 'decoder'
            out[name].append({key: statistics.mean(layer[key] for layer in same) for key in figures})
    return out


# -----------------------------------------------------------------------------
# Table and picture

HEADS = ['arm', 'rate', 'first loss', 'loss', 'minus whole [95%]', 'minus random [95%]',
         'tokens to the loss of whole', 'FLOPs to it', 'FLOPs in all']


def report(s, arms, layers):
    """Losses, their cost, and the ranks of the attention, as two markdown tables."""
    lines = [markdown(HEADS), '|---' * len(HEADS) + '|']
    for name, arm in arms.items():
        lines.append(markdown(cells(name, arm, arms)))
    lines += ['', markdown(['MaxRank, mass', *[str(n) for n in range(s.n_layer)]])]
    lines.append('|---' * (s.n_layer + 1) + '|')
    for name, found in layers.items():
        lines.append(markdown([name, *[f'{layer["max_rank"]:.1f}, {layer["mass"]:.1f}' for layer in found]]))
    return '\n'.join(lines)


def markdown(cells):
    """A line of a markdown table."""
    return f'| {" | ".join(cells)} |'


def cells(name, arm, arms):
    """The cells of an arm in the table of losses."""
    whole = arms['whole']
    first_loss = statistics.mean(arm.runs[seed]['val'][0]['val_loss'] for seed in arm.seeds())
    tokens = reached(arm, whole, 'tokens')
    flops = reached(arm, whole, 'flops')
    return [
        name,
        f'{arm.swept["muon_lr"]:g}',
        f'{first_loss:.3f}',
        show_mean(*mean_and_error(arm.last('val_loss').values())),
        difference(arm, whole),
        difference(arm, arms['random']),
        f'{tokens:,.0f}' if tokens else '–',
        f'{flops:.2e}' if flops else '–',
        f'{statistics.mean(arm.last("flops").values()):.2e}',
    ]


def difference(arm, reference):
    """The loss of an arm minus that of another, as text; '' for the same arm."""
    if arm is reference:
        return ''
    mean, width, _ = arm.minus(reference)
    return show_interval(mean, width)


def draw(arms, layers, path):
    """The losses against tokens and FLOPs, and the rank of the attention against the layer."""
    page = figure(15, 4.5)
    axes = page.subplots(1, 3, width_ratios=(4, 5, 4))
    shown = [arm for name, arm in arms.items() if not name.startswith('whole_')]
    lowest = min(arm.loss for arm in shown)
    for axis, against, label in ((axes[0], 'tokens', 'tokens'), (axes[1], 'flops', 'FLOPs')):
        for n, arm in enumerate(shown):
            mean, single = arm.curves(against)
            draw_arm(axis, mean, single, colour_of(n))
        axis.set(xscale='log', xlabel=label, ylim=(lowest - 0.05, lowest + 1))
    axes[0].set_ylabel('validation loss (nats per token)')
    label_ends(axes[1], [(arm.loss, arm.name, colour_of(n)) for n, arm in enumerate(shown)])
    for name, found in layers.items():
        numbers = [layer['layer'] for layer in found]
        axes[2].plot(numbers, [layer['max_rank'] for layer in found], 'o-', label=name)
    axes[2].axhline(1, color='0.4', linestyle='--', linewidth=1, label='a lazy layer')
    axes[2].set(xlabel='layer', ylabel='MaxRank', ylim=0)
    axes[2].legend(fontsize=8)
    for axis in axes:
        axis.grid(alpha=0.25, which='both', linewidth=0.5)
    save(page, path)


# -----------------------------------------------------------------------------

def main():
    s = configure(Settings,
                  [str(ROOT / 'config' / 'inheritune_cpu.py'), '--out_dir=out/inheritune', *sys.argv[1:]])
    own = ({f.name for f in fields(Settings)} - {f.name for f in fields(train.Settings)}
           | {'out_dir', 'seed', 'muon_lr'})
    base = {name: getattr(s, name) for name in s.given if name not in own}

    def run(arms_of, rates):
        return tuned(base, arms_of, [{'muon_lr': rate} for rate in rates], s.seeds, s.out_dir, s.jobs)

    arms = run(lambda seed: WHOLE, s.rates)
    folders = {seed: whole['out_dir'] for seed, whole in arms['whole'].runs.items()}
    for folder in folders.values():
        inherit(s, folder)
    arms |= run(lambda seed: half_arms(s, folders[seed]), s.rates)
    arms |= run(lambda seed: SCALED, [arms['whole'].swept['muon_lr']])
    layers = attention(s, arms)
    text = report(s, arms, layers)
    replace_text(f'{s.out_dir}/table.md', text + '\n')
    draw(arms, layers, f'{s.out_dir}/inheritune.png')
    print(f'{text}\n\nwritten: {s.out_dir}/table.md, {s.out_dir}/inheritune.png')


if __name__ == '__main__':
    run_main(main)
