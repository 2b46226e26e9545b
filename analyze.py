"""
What is inside a checkpoint, in figures and pictures.

    python analyze.py weights --out_dir=out/run                              # the ranks of every matrix, and their spectra
    python analyze.py weights --out_dir=out/run --along                      # the same for every checkpoint that is kept
    python analyze.py weights --out_dir=out/tuned --against=hf:FOLDER        # of what training has changed
    python analyze.py attention --out_dir=out/run                            # what attention does: ranks, columns, lazy layers (attention.py)
    python analyze.py experts --out_dir=out/run                              # how a mixture's tokens were shared out (experts.py)
"""
import functools
import re
from dataclasses import dataclass
from statistics import median

import torch
import torch.nn as nn

import checkpoint
from configurator import FilePath, UserError, configure_command, run_main
from features.growth import lowrank
from features.moe import experts
from features.moe.network import Experts
from features.study import attention
from features.study.pictures import figure, save, write_csv
from model import LowRank
from origin import fill, read_model


@dataclass
class WeightsSettings:
    out_dir: FilePath = 'out'  # a run (its best checkpoint), a checkpoint, hf:FOLDER, gpt2
    along: bool = False  # every checkpoint in out_dir (train.py --keep_checkpoints=100 keeps them), against the step
    against: FilePath = ''  # such another one with the same network: the figures are those of the difference to it
    csv: FilePath = ''  # file for the figures of every matrix; the table has the median of each kind
    picture: FilePath = 'out/weights.png'  # where to draw; '' = nowhere


# -----------------------------------------------------------------------------
# The matrices of a model, as the factors whose product they are

def product(layer):
    """The factors of a linear layer's weight (n_out, n_in), outermost first: one if it is dense, or has full rank by what is added to the factors."""
    if not isinstance(layer, LowRank):
        return [layer.weight]
    if layer.identity is None and layer.blocks is None and layer.guide is None:
        return [layer.up.weight, layer.down.weight]
    return [lowrank.matrix(layer)]


def is_linear(layer):
    return not isinstance(layer, LowRank) or lowrank.is_linear(layer)


@torch.no_grad()
def matrices(model):
    """
    {name: factors} of every weight matrix: blocks.N.attn.q …, of every head blocks.N.attn.qk.H and ov.H, of every expert
    blocks.N.mlp.experts.up.E …, then wte, wpe and head.
    A low-rank layer with an activation has no product: its factors are there as NAME.up and NAME.down. Of a Markov chain: its table.
    """
    out, cfg = {}, model.cfg
    if cfg.arch == 'markov':
        return {'table': [model.wte.weight] + ([model.head.weight.T] if model.head is not None else [])}  # (V, V), or (V, R)·(R, V)
    for n, block in enumerate(model.blocks):
        layers = {name: layer for name, layer in block.named_modules() if isinstance(layer, (nn.Linear, LowRank))}
        for name, layer in layers.items():
            if is_linear(layer) and name.rpartition('.')[0] not in layers:
                out[f'blocks.{n}.{name}'] = product(layer)
            elif not is_linear(layer):
                out |= {f'blocks.{n}.{name}.up': [layer.up.weight], f'blocks.{n}.{name}.down': [layer.down.weight]}
        out |= {f'blocks.{n}.attn.{name}': factors for name, factors in heads(block.attn).items()}
        out |= {f'blocks.{n}.{name}.{e}': [weight] for name, layer in block.named_modules() if isinstance(layer, Experts)
                for e, weight in enumerate(layer.weight)}
    out['wte'] = [model.wte.weight[:cfg.vocab_size]] + ([model.wte_up.weight.T] if model.wte_up is not None else [])
    if model.wpe is not None:
        out['wpe'] = [model.wpe.weight]
    if model.head is not None:
        out['head'] = [model.head.weight[:cfg.vocab_size]] + ([model.head_down.weight] if model.head_down is not None else [])
    return out


def heads(attn):
    """
    {'qk.H': factors of W_qᵀ·W_k, 'ov.H': of W_o·W_v} of the heads H, both (C, C) and of rank head_dim: what a head compares, rotary
    turns and QK-norm left out, and what it moves (Elhage et al. 2021, transformer-circuits.pub).
    """
    cfg, out = attn.cfg, {}
    D, group = cfg.d_head, cfg.n_head // cfg.kv_heads
    for h in range(cfg.n_head):
        own, shared = slice(h * D, (h + 1) * D), slice(h // group * D, (h // group + 1) * D)
        if is_linear(attn.q) and is_linear(attn.k):
            (q, *q_rest), (k, *k_rest) = product(attn.q), product(attn.k)
            out[f'qk.{h}'] = [*(f.T for f in reversed([q[own], *q_rest])), k[shared], *k_rest]
        if is_linear(attn.o) and is_linear(attn.v):
            (*o_rest, o), (v, *v_rest) = product(attn.o), product(attn.v)
            out[f'ov.{h}'] = [*o_rest, o[:, own], v[shared], *v_rest]
    return out


def halves(factors):
    """(a, b) with a·b the product of two factors or more, cut where it is narrowest: nothing wider is ever formed."""
    factors = [f.double() for f in factors]
    cut = 1 + min(range(len(factors) - 1), key=lambda n: factors[n].size(1))
    return functools.reduce(torch.matmul, factors[:cut]), functools.reduce(torch.matmul, factors[cut:])


def difference(factors, others):
    """Factors of the product of `factors` less that of `others`: side by side, at twice the rank, or where one is dense the matrix itself."""
    if len(factors) > 1 and len(others) > 1:
        (a, b), (c, d) = halves(factors), halves(others)
        return [torch.cat([a, -c], 1), torch.cat([b, d])]
    return [functools.reduce(torch.matmul, [f.double() for f in factors]) - functools.reduce(torch.matmul, [f.double() for f in others])]


# -----------------------------------------------------------------------------
# Spectra and ranks

def singular_values(factors):
    """
    The singular values of the product of `factors`, largest first, in float64. The product is not formed: with a = Q·R and bᵀ = P·S
    its values are those of the small R·Sᵀ.
    """
    if len(factors) == 1:
        w = factors[0].double()
        return torch.linalg.svdvals(w if w.size(0) >= w.size(1) else w.T)  # tall: twice as fast in LAPACK
    a, b = halves(factors)
    R, S = torch.linalg.qr(a).R, torch.linalg.qr(b.T).R
    s = torch.linalg.svdvals(R @ S.T)
    return s * (s > 1e-13 * R.norm() * S.norm())  # below are rounding errors: where nothing has changed, a difference is zero


@functools.cache
def gaussian(shapes):
    """The singular values of a product of random normal matrices of these shapes: what no structure at all looks like."""
    generator = torch.Generator().manual_seed(0)
    return singular_values([torch.randn(shape, generator=generator) for shape in shapes])


def rank_for(s, energy):
    """The smallest rank that keeps this share of the sum of squares of the singular values s."""
    kept = s.square().cumsum(0)
    return min(len(s), int(torch.searchsorted(kept, energy * kept[-1])) + 1)


def figures(s):
    """
    Of singular values s, largest first: norms, stable rank |W|_F²/|W|₂², effective rank exp(entropy of s/sum(s)) (Roy & Vetterli 2007),
    and the ranks that keep 90% and 99% of the energy. A matrix of zeros has rank 0.
    """
    out = {'frobenius': s.norm().item(), 'spectral': s[0].item(), 'stable_rank': 0.0, 'effective_rank': 0.0, 'rank_90': 0, 'rank_99': 0}
    if s[0] > 0:
        out |= {'stable_rank': (s / s[0]).square().sum().item(), 'effective_rank': torch.special.entr(s / s.sum()).sum().exp().item(),
                'rank_90': rank_for(s, 0.9), 'rank_99': rank_for(s, 0.99)}
    return out


RANKS = ('stable_rank', 'effective_rank', 'rank_90', 'rank_99')


@torch.no_grad()
def measure(model, base=None, step=0):
    """A record for every matrix of `model`, or of its difference to `base`: {name, kind, layer, shape, figures, those of the null, spectrum}."""
    found, before, records = matrices(model), matrices(base) if base else {}, []
    for name, factors in found.items():
        if base:
            factors = difference(factors, before[name])
        s, null = singular_values(factors), gaussian(tuple(tuple(f.shape) for f in factors))
        layer = re.match(r'blocks\.(\d+)\.', name)
        nulls = figures(null)
        records.append({'step': step, 'name': name, 'kind': re.sub(r'^blocks\.\d+\.|\.\d+$', '', name), 'layer': int(layer.group(1)) if layer else '',
                        'rows': factors[0].size(0), 'cols': factors[-1].size(1), 'full_rank': len(s), **figures(s), **{f'null_{r}': nulls[r] for r in RANKS},
                        's': s, 'null': null})
    return records


# -----------------------------------------------------------------------------
# What is shown

def by_kind(records):
    """{kind: its records}."""
    kinds = {}
    for r in records:
        kinds.setdefault(r['kind'], []).append(r)
    return kinds


def spread(values):
    low, mid, high = (f'{v:.1f}' if v < 10 and v % 1 else f'{v:.0f}' for v in (min(values), median(values), max(values)))
    return mid if low == high else f'{mid} ({low}-{high})'


def table(records):
    """A line for every kind of matrix: the median and the range over its layers or heads, beside the Gaussian's."""
    head = ['matrix', 'shape', 'rank', 'pays'] + [cell for name in ('stable rank', 'effective rank', '90% energy', '99% energy') for cell in (name, 'null')]
    lines = [head + ['spectral norm']]
    for kind, found in by_kind(records).items():
        r = found[0]
        pays = r['rows'] * r['cols'] // (r['rows'] + r['cols'])
        line = [f'{kind} x{len(found)}', f'{r["rows"]}x{r["cols"]}', str(r['full_rank']), str(pays) if pays < r['full_rank'] else '']
        for rank in RANKS:
            line += [spread([r[rank] for r in found]), spread([r[f'null_{rank}'] for r in found[:1]])]
        lines.append(line + [f'{median(r["spectral"] for r in found):.3g}'])
    widths = [max(map(len, column)) for column in zip(*lines)]
    return '\n'.join('  '.join(f'{cell:<{w}}' if n < 2 else f'{cell:>{w}}' for n, (cell, w) in enumerate(zip(line, widths))) for line in lines)


def draw_spectra(records, title):
    """A panel for every kind of matrix: singular values over the largest of a Gaussian matrix of the same norm, a line a layer (and head)."""
    kinds = by_kind(records)
    columns = min(4, len(kinds))
    rows = -(-len(kinds) // columns)
    page = figure(3.2 * columns + 1, 2.6 * rows + 0.6)  # first, as it says what to install
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.ticker import MaxNLocator
    colors = ScalarMappable(Normalize(0, max([r['layer'] for r in records if r['layer'] != ''], default=1)), 'viridis')
    axes = page.subplots(rows, columns, squeeze=False, sharey=True).flatten()
    for axis, (kind, found) in zip(axes, kinds.items()):
        for r in found:
            s, null = r['s'].numpy(), r['null'].numpy()
            scale = r['s'].norm().item() / r['null'].norm().item() * null[0]
            if scale > 0:
                axis.plot(range(1, len(s) + 1), s / scale, color='C3' if r['layer'] == '' else colors.to_rgba(r['layer']), linewidth=1, alpha=0.8)
        axis.plot(range(1, len(null) + 1), null / null[0], 'k--', linewidth=1.2, label='random Gaussian')
        axis.set_title(f'{kind}, {found[0]["rows"]}x{found[0]["cols"]}', fontsize=10)
        axis.set(xscale='log', yscale='log', xlim=(0.9, None))  # logarithmic: the few that stand out take as much room as the bulk
        axis.grid(alpha=0.3)
    axes[0].set_ylim(bottom=0.03)
    for axis in axes[len(kinds):]:
        axis.set_visible(False)
    axes[0].legend(fontsize=8, loc='lower left')
    page.suptitle(title, fontsize=11)
    page.supxlabel('number of the singular value', fontsize=10)
    page.supylabel('singular value / edge of the Gaussian', fontsize=10)
    if any(r['layer'] != '' for r in records):
        page.colorbar(colors, ax=list(axes), label='layer', shrink=0.6, ticks=MaxNLocator(integer=True))
    return page


def draw_along(records, title):
    """Stable and effective rank against the step, as shares of the Gaussian's: the median of every kind of matrix."""
    page = figure(11, 4.5)
    for axis, rank in zip(page.subplots(1, 2), ('stable_rank', 'effective_rank')):
        for n, (kind, found) in enumerate(by_kind(records).items()):
            steps = sorted({r['step'] for r in found})
            shares = [median(r[rank] / r[f'null_{rank}'] for r in found if r['step'] == step) for step in steps]
            axis.plot(steps, shares, 'o-' if n < 10 else 's--', color=f'C{n % 10}', markersize=4, label=kind)
        axis.axhline(1, color='k', linestyle='--', linewidth=1.2)
        axis.set(xlabel='step', ylabel=f'{rank.replace("_", " ")} / that of a random Gaussian')
        axis.grid(alpha=0.3)
    page.legend(*axis.get_legend_handles_labels(), loc='outside right center', fontsize=9)
    page.suptitle(title, fontsize=11)
    return page


# -----------------------------------------------------------------------------
# Commands

def check_same_matrices(model, base, s):
    shapes = [{name: (f[0].size(0), f[-1].size(1)) for name, f in matrices(m).items()} for m in (model, base)]
    for name in sorted(shapes[0] | shapes[1]):
        found, wanted = (f'{of[name][0]}x{of[name][1]}' if name in of else 'no such matrix' for of in shapes)
        if found != wanted:
            raise UserError(f'against={s.against}: {name}: {wanted}, but {found} in out_dir={s.out_dir}: give a checkpoint of the same network')


LARGEST_TABLE = 8192  # of a Markov chain, full: 0.5 GB in float64, and minutes


def merged_model(where):
    """(the network of `where`, its folder), an adapter in its weights."""
    cfg, tensors, folder = read_model(where)
    return fill(cfg, tensors, folder), folder


def weights(s):
    base = merged_model(s.against)[0] if s.against else None
    folders = [s.out_dir]
    if s.along:
        folders = checkpoint.checkpoints(s.out_dir)[::-1]
        if not folders:
            raise UserError(f'out_dir={s.out_dir}: no checkpoints in it to go along: give the out_dir of a training run, or leave --along out')
    records = []
    for where in folders:
        model, folder = merged_model(where)
        if model.cfg.arch == 'markov' and not model.cfg.rank_embed and model.cfg.vocab_size > LARGEST_TABLE:
            raise UserError(f'out_dir={where}: a table of {model.cfg.vocab_size:,} tokens squared is too large to decompose, {LARGEST_TABLE:,} is the most')
        if base:
            check_same_matrices(model, base, s)
        records.append(measure(model, base, checkpoint.load_state(folder)['step'] if s.along else 0))
    last, less = records[-1], f', less {s.against}' if base else ''
    print(f'{folder}{less}: {model.num_params():,} parameters\n\n{table(last)}\n\n'
          'median (range) over layers and heads; null: of random Gaussian matrices; pays: the rank below which two factors are smaller than the matrix\n'
          'qk: W_qᵀW_k of each head, ov: W_oW_v')
    if any(r['name'].endswith(('.up', '.down')) and r['name'].count('.') == 4 for r in last):
        print('layers with an activation between their factors have no product; up and down are those factors')
    every = sum(records, [])
    if s.csv:
        write_csv([{key: value for key, value in r.items() if key not in ('s', 'null')} for r in every], s.csv)
        print(f'written: {s.csv}')
    if s.picture:
        save(draw_along(every, s.out_dir + less) if s.along else draw_spectra(last, folder + less), s.picture)
        print(f'written: {s.picture}')


def main():
    command, s = configure_command({'weights': (weights, WeightsSettings), 'attention': (attention.run, attention.AttentionSettings),
                                    'experts': (experts.run, experts.ExpertsSettings)})
    command(s)


if __name__ == '__main__':
    run_main(main, output_is_all=True)
