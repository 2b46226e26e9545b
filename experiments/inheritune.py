"""
Is it worth anything to inherit layers? "Inheritune" (Sanyal et al. 2024, arXiv 2404.08634) with the controls that it lacked: half the
layers of a trained network, its first or its middle ones, go on as a network of their own; beside them the same half from random weights, also
for twice the steps, taught by the whole network, and grown from a quarter. Each arm has the best of three rates.

    python prepare.py FOLDER_OF_NOVELS --out=data/novels --tokenizer=bpe:4096
    python experiments/inheritune.py --jobs=2 --rates=[0.04]   # two hours on two cores with AVX2 alone; then table, picture, attention
    python experiments/inheritune.py --jobs=2                  # with two more rates of each arm

All settings are those of train.py, config/inheritune_cpu.py the defaults. Runs that are in out_dir are not made again.
"""
import os
import statistics
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import train
from checkpoint import replace_text
from compare import mean_and_error, paired, plus_minus, tuned
from configurator import configure, run_main
from features.growth.commands import run_inherit
from features.study.attention import AttentionSettings, look
from features.study.pictures import draw_arm, figure, label_ends, save
from surgery import InheritSettings

ROOT = Path(__file__).parent.parent


@dataclass
class Settings(train.Settings):
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3])  # of the whole network and of what is made of it
    rates: list[float] = field(default_factory=lambda: [0.02, 0.04, 0.08])  # Muon's, tried on the first seed
    jobs: int = 1  # runs at a time


# -----------------------------------------------------------------------------
# Arms

WHOLE = {'whole': {}}  # the network to inherit from
SCALED = {'whole_attn': {'depth_scale': 'attn'}, 'whole_norm': {'depth_scale': 'norm'}}  # Inheritune's, and another remedy for idle deep layers


def half_arms(s, whole):
    """Half the layers; `whole`: the run to inherit from."""
    half = {'n_layer': s.n_layer // 2}
    return {
        'random': half,
        'random_twice': half | {'max_iters': 2 * s.max_iters},
        'first': half | {'init_from': f'{whole}_first'},
        'middle': half | {'init_from': f'{whole}_middle'},
        'taught': half | {'teacher': whole},
        'stacked': {'n_layer': s.n_layer // 4, 'grow_every': s.max_iters // 2, 'grow_to': s.n_layer // 2, 'grow_by': s.n_layer // 4},
    }


def inherit(s, whole):
    """The start of the halves, beside the run that they are from."""
    for part in ('first', 'middle'):
        if not os.path.isdir(f'{whole}_{part}'):
            run_inherit(InheritSettings(from_=whole, out_dir=f'{whole}_{part}', layers=f'{part}:{s.n_layer // 2}'))


# -----------------------------------------------------------------------------
# What came of it

def reach(run, loss, against):
    """Tokens or FLOPs after which a run's validation loss was down to `loss`, on the line between two evaluations; None if it never was."""
    val = run['val']
    for before, after in zip(val, val[1:]):
        if after['val_loss'] <= loss < before['val_loss']:
            share = (before['val_loss'] - loss) / (before['val_loss'] - after['val_loss'])
            return before[against] + share * (after[against] - before[against])
    return None


def reached(arm, whole, against):
    """The mean over the seeds of what an arm took to the loss with which the whole network of its seed ended; None if one did not get there."""
    values = [reach(run, whole.runs[seed]['val'][-1]['val_loss'], against) for seed, run in arm.runs.items()]
    return None if None in values else statistics.mean(values)


def attention(s, arms, names=('whole', 'whole_attn', 'whole_norm', 'random', 'first')):
    """{arm: [figures of each layer, means over the seeds]} of analyze.py attention."""
    out = {}
    for name in names:
        seeds = [look(AttentionSettings(run['out_dir'], length=min(100, s.block_size)))[1] for run in arms[name].runs.values()]
        out[name] = [{key: statistics.mean(layer[key] for layer in same) for key in same[0]} for same in zip(*seeds)]
    return out


def report(s, arms, layers):
    """Losses, what they took, ranks of the attention, as markdown."""
    whole, half = arms['whole'], arms['random']
    lines = ['| arm | rate | first loss | loss | minus whole [95%] | minus random [95%] | tokens to the loss of whole | FLOPs to it | FLOPs in all |',
             '|---' * 9 + '|']
    for name, arm in arms.items():
        def against(reference):
            if arm is reference:
                return ''
            difference, width, _ = paired(arm, reference)
            return f'{difference:+.4f}' + (f' [{difference - width:+.4f}, {difference + width:+.4f}]' if width else '')
        tokens, flops = (reached(arm, whole, what) for what in ('tokens', 'flops'))
        start = statistics.mean(arm.runs[seed]['val'][0]['val_loss'] for seed in arm.seeds())
        lines.append(f'| {name} | {arm.swept["muon_lr"]:g} | {start:.3f} | {plus_minus(*mean_and_error(arm.last("val_loss").values()))} | {against(whole)} '
                     f'| {against(half)} | {f"{tokens:,.0f}" if tokens else "–"} | {f"{flops:.2e}" if flops else "–"} '
                     f'| {statistics.mean(arm.last("flops").values()):.2e} |')
    lines += ['', '| MaxRank, mass | ' + ' | '.join(map(str, range(s.n_layer))) + ' |', '|---' * (s.n_layer + 1) + '|']
    lines += [f'| {name} | ' + ' | '.join(f'{layer["max_rank"]:.1f}, {layer["mass"]:.1f}' for layer in found) + ' |' for name, found in layers.items()]
    return '\n'.join(lines)


def draw(arms, layers, path):
    """The losses against tokens and FLOPs, and the rank of the attention against the layer."""
    page = figure(15, 4.5)
    axes = page.subplots(1, 3, width_ratios=(4, 5, 4))
    shown = [arm for name, arm in arms.items() if not name.startswith('whole_')]
    for axis, against in zip(axes, ('tokens', 'flops')):
        for n, arm in enumerate(shown):
            draw_arm(axis, *arm.curves(against), '0.2' if n == 0 else f'C{n - 1}')
        axis.set(xscale='log', xlabel=against.replace('flops', 'FLOPs'), ylim=(min(arm.loss for arm in shown) - 0.05, min(arm.loss for arm in shown) + 1))
    axes[0].set_ylabel('validation loss (nats per token)')
    label_ends(axes[1], [(arm.loss, arm.name, '0.2' if n == 0 else f'C{n - 1}') for n, arm in enumerate(shown)])
    for name, found in layers.items():
        axes[2].plot([layer['layer'] for layer in found], [layer['max_rank'] for layer in found], 'o-', label=name)
    axes[2].axhline(1, color='0.4', linestyle='--', linewidth=1, label='a lazy layer')
    axes[2].set(xlabel='layer', ylabel='MaxRank', ylim=0)
    axes[2].legend(fontsize=8)
    for axis in axes:
        axis.grid(alpha=0.25, which='both', linewidth=0.5)
    save(page, path)


def main():
    s = configure(Settings, [str(ROOT / 'config' / 'inheritune_cpu.py'), '--out_dir=out/inheritune', *sys.argv[1:]])
    own = {f.name for f in fields(Settings)} - {f.name for f in fields(train.Settings)} | {'out_dir', 'seed', 'muon_lr'}
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
