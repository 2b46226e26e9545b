"""
The singular values and ranks of every weight matrix of a network, beside those of random matrices.

    python analyze.py weights --out_dir=out/run

    records = measure(model)             # of its matrices
    records = measure(model, base)       # of what training has changed
    print(table(records))

A matrix is given as the factors whose product it is, outermost first: [W] (n_out, n_in), or [up, down].
"""
import functools
import re
from statistics import median

import torch
import torch.nn as nn

import checkpoint
from configurator import UserError
from features.networks import fill, read_model
from features.study.pictures import figure, save, write_csv
from model import LowRank

# -----------------------------------------------------------------------------
# The matrices of a network

def product(layer):
    """The factors of a linear layer's weight; a single one if it is dense."""
    if not isinstance(layer, LowRank):
        return [layer.weight]
    return [layer.up.weight, layer.down.weight]


def is_linear(layer):
    """Whether a layer is one matrix; a low-rank layer with an activation between its factors is two."""
    return not isinstance(layer, LowRank) or isinstance(layer.act, nn.Identity)


@torch.no_grad()
def matrices(model):
    """
    {name: factors} of every weight matrix: blocks.N.attn.q …, of every head blocks.N.attn.qk.H and ov.H, of
    every expert blocks.N.mlp.experts.up.E …, then wte, wpe and head; the padding of the vocabulary is left
    out. A low-rank layer with an activation has no product: NAME.up and NAME.down are its factors. A Markov
    chain has one: table.
    """
    cfg = model.cfg
    if cfg.arch == 'markov':  # markov
        return {'table': markov_table(model)}  # markov
    out = {}
    for n, block in enumerate(model.blocks):
        for name, factors in block_matrices(block).items():
            out[f'blocks.{n}.{name}'] = factors
    out['wte'] = [model.wte.weight[:cfg.vocab_size]]
    if model.wte_up is not None:
        out['wte'].append(model.wte_up.weight.T)
    if model.wpe is not None:
        out['wpe'] = [model.wpe.weight]
    if model.head is not None:
        out['head'] = [model.head.weight[:cfg.vocab_size]]
        if model.head_down is not None:
            out['head'].append(model.head_down.weight)
    return out


def markov_table(model):
    """The factors of a Markov chain's table: (V, V), or (V, R) and (R, V)."""
    if model.head is None:
        return [model.wte.weight]
    return [model.wte.weight, model.head.weight.T]


def block_matrices(block):
    """{name: factors} of the matrices of one block."""
    layers = {}
    for name, layer in block.named_modules():
        if isinstance(layer, (nn.Linear, LowRank)):
            layers[name] = layer
    out = {}
    for name, layer in layers.items():
        is_factor = name.rpartition('.')[0] in layers
        if not is_linear(layer):
            out[f'{name}.up'] = [layer.up.weight]
            out[f'{name}.down'] = [layer.down.weight]
        elif not is_factor:
            out[name] = product(layer)
    for name, factors in heads(block.attn).items():
        out[f'attn.{name}'] = factors
    from features.moe.network import Experts  # moe
    for name, layer in block.named_modules():  # moe
        if isinstance(layer, Experts):  # moe
            for e, weight in enumerate(layer.weight):  # moe
                out[f'{name}.{e}'] = [weight]  # moe
    return out


def heads(attn):
    """
    {'qk.H': factors of W_qᵀ·W_k, 'ov.H': of W_o·W_v} of the heads H, both (C, C) and of rank head_dim: what a
    head compares, without rotary positions and QK-norm, and what it moves (Elhage et al. 2021,
    transformer-circuits.pub).
    """
    cfg = attn.cfg
    D = cfg.d_head
    group = cfg.n_head // cfg.kv_heads  # heads of queries for one of keys and values
    out = {}
    for h in range(cfg.n_head):
        own = slice(h * D, (h + 1) * D)  # the head's rows of W_q and columns of W_o
        shared = slice(h // group * D, (h // group + 1) * D)  # its rows of W_k and W_v
        if is_linear(attn.q) and is_linear(attn.k):
            q, *q_rest = product(attn.q)
            k, *k_rest = product(attn.k)
            transposed = [f.T for f in reversed([q[own], *q_rest])]
            out[f'qk.{h}'] = [*transposed, k[shared], *k_rest]
        if is_linear(attn.o) and is_linear(attn.v):
            *o_rest, o = product(attn.o)
            v, *v_rest = product(attn.v)
            out[f'ov.{h}'] = [*o_rest, o[:, own], v[shared], *v_rest]
    return out


def multiply(factors):
    """The product of factors."""
    return functools.reduce(torch.matmul, factors)


def halves(factors):
    """
    (a, b) whose product a·b is the product of two or more factors, in float64, split at the narrowest place,
    so that no wider matrix is formed.
    """
    factors = [f.double() for f in factors]
    widths = [f.size(1) for f in factors[:-1]]
    cut = 1 + widths.index(min(widths))
    return multiply(factors[:cut]), multiply(factors[cut:])


def difference(factors, others):
    """
    The factors of the product of `factors` less that of `others`: side by side, at twice the rank, or the
    matrix itself where one of the two is dense.
    """
    if len(factors) > 1 and len(others) > 1:
        a, b = halves(factors)
        c, d = halves(others)
        return [torch.cat([a, -c], 1), torch.cat([b, d])]
    return [multiply([f.double() for f in factors]) - multiply([f.double() for f in others])]


# -----------------------------------------------------------------------------
# Spectra and ranks

def singular_values(factors):
    """
    The singular values of the product of `factors`, largest first, in float64. The product is not formed:
    with a = Q·R and bᵀ = P·S its values are those of the small R·Sᵀ.
    """
    if len(factors) == 1:
        w = factors[0].double()
        is_tall = w.size(0) >= w.size(1)
        return torch.linalg.svdvals(w if is_tall else w.T)  # tall: twice as fast in LAPACK
    a, b = halves(factors)
    R, S = torch.linalg.qr(a).R, torch.linalg.qr(b.T).R
    s = torch.linalg.svdvals(R @ S.T)
    # rounding errors are zero: a difference of equal matrices is
    return s * (s > 1e-13 * R.norm() * S.norm())


@functools.cache
def gaussian(shapes):
    """
    The singular values of a product of random normal matrices of these shapes: those of no structure at all.
    """
    generator = torch.Generator().manual_seed(0)
    return singular_values([torch.randn(shape, generator=generator) for shape in shapes])


RANKS = ('stable_rank', 'effective_rank', 'rank_90', 'rank_99')


def figures(s):
    """
    Norms and ranks from the singular values s, largest first: stable rank |W|_F²/|W|₂², effective rank
    exp(entropy of s/sum(s)) (Roy & Vetterli 2007), and the ranks that keep 90% and 99% of the energy. A zero
    matrix has rank 0.
    """
    from features.growth.factorize import rank_for
    out = {'frobenius': s.norm().item(), 'spectral': s[0].item()}
    if s[0] == 0:
        return (out | dict.fromkeys(('stable_rank', 'effective_rank'), 0.0)
                | dict.fromkeys(('rank_90', 'rank_99'), 0))
    out['stable_rank'] = (s / s[0]).square().sum().item()
    out['effective_rank'] = torch.special.entr(s / s.sum()).sum().exp().item()
    out['rank_90'] = rank_for(s, 0.9)
    out['rank_99'] = rank_for(s, 0.99)
    return out


@torch.no_grad()
def measure(model, base=None, step=0):
    """
    [record] of every matrix of `model`, or of its difference from that of `base`: name, kind, layer, shape,
    figures(), the same ranks of a random matrix as null_…, and both spectra: s, null.
    """
    before = matrices(base) if base else {}
    records = []
    for name, factors in matrices(model).items():
        if base:
            factors = difference(factors, before[name])
        s = singular_values(factors)
        null = gaussian(tuple(tuple(f.shape) for f in factors))
        nulls = figures(null)
        layer = re.match(r'blocks\.(\d+)\.', name)
        record = {
            'step': step,
            'name': name,
            # without the numbers of layer, head and expert
            'kind': re.sub(r'^blocks\.\d+\.|\.\d+$', '', name),
            'layer': int(layer.group(1)) if layer else '',
            'rows': factors[0].size(0),
            'cols': factors[-1].size(1),
            'full_rank': len(s),
            **figures(s),
        }
        for rank in RANKS:
            record[f'null_{rank}'] = nulls[rank]
        records.append(record | {'s': s, 'null': null})
    return records


def by_kind(records):
    """{kind: its records}."""
    kinds = {}
    for record in records:
        kinds.setdefault(record['kind'], []).append(record)
    return kinds


# -----------------------------------------------------------------------------
# The table

def spread(values):
    """'median (lowest-highest)', or one number if all are printed the same."""
    low, mid, high = (short(v) for v in (min(values), median(values), max(values)))
    if low == high:
        return mid
    return f'{mid} ({low}-{high})'


def short(v):
    """3.14 → 3.1, 3 → 3, 31.4 → 31"""
    if v < 10 and v % 1:
        return f'{v:.1f}'
    return f'{v:.0f}'


def table(records):
    """
    A line for every kind of matrix: the median and the range over its layers or heads, and those of random
    matrices.
    """
    lines = [['matrix', 'shape', 'rank', 'pays', 'stable rank', 'null', 'effective rank', 'null',
              '90% energy', 'null', '99% energy', 'null', 'spectral norm']]
    for kind, found in by_kind(records).items():
        first = found[0]
        rows, cols, full_rank = first['rows'], first['cols'], first['full_rank']
        pays = rows * cols // (rows + cols)  # below this rank two factors are smaller than the matrix
        line = [f'{kind} x{len(found)}', f'{rows}x{cols}', str(full_rank),
                str(pays) if pays < full_rank else '']
        for rank in RANKS:
            line.append(spread([record[rank] for record in found]))
            line.append(short(first[f'null_{rank}']))
        line.append(f'{median(record["spectral"] for record in found):.3g}')
        lines.append(line)
    return aligned(lines)


def aligned(lines):
    """Rows of cells as text: the first two columns flush left, the others flush right."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    out = []
    for line in lines:
        cells = []
        for n, (cell, width) in enumerate(zip(line, widths)):
            cells.append(cell.ljust(width) if n < 2 else cell.rjust(width))
        out.append('  '.join(cells))
    return '\n'.join(out)


# -----------------------------------------------------------------------------
# Pictures

def draw_spectra(records, title):
    """
    A panel for every kind of matrix: singular values divided by the largest of a random matrix of the same
    norm, one line per layer (and head).
    """
    kinds = by_kind(records)
    columns = min(4, len(kinds))
    rows = -(-len(kinds) // columns)
    page = figure(3.2 * columns + 1, 2.6 * rows + 0.6)  # before the imports: it says what to install
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.ticker import MaxNLocator
    layers = [record['layer'] for record in records if record['layer'] != '']
    colors = ScalarMappable(Normalize(0, max(layers, default=1)), 'viridis')
    axes = page.subplots(rows, columns, squeeze=False, sharey=True).flatten()
    for axis, (kind, found) in zip(axes, kinds.items()):
        draw_kind(axis, kind, found, colors)
    axes[0].set_ylim(bottom=0.03)
    for axis in axes[len(kinds):]:
        axis.set_visible(False)
    axes[0].legend(fontsize=8, loc='lower left')
    page.suptitle(title, fontsize=11)
    page.supxlabel('number of the singular value', fontsize=10)
    page.supylabel('singular value / edge of the Gaussian', fontsize=10)
    if layers:
        page.colorbar(colors, ax=list(axes), label='layer', shrink=0.6, ticks=MaxNLocator(integer=True))
    return page


def draw_kind(axis, kind, records, colors):
    """Plot the spectra of one kind of matrix, and that of a random one."""
    for record in records:
        s, null = record['s'], record['null']
        scale = s.norm().item() / null.norm().item() * null.numpy()[0]
        if scale > 0:
            color = 'C3' if record['layer'] == '' else colors.to_rgba(record['layer'])
            axis.plot(range(1, len(s) + 1), s.numpy() / scale, color=color, linewidth=1, alpha=0.8)
    null = records[-1]['null'].numpy()
    axis.plot(range(1, len(null) + 1), null / null[0], 'k--', linewidth=1.2, label='random Gaussian')
    axis.set_title(f'{kind}, {records[0]["rows"]}x{records[0]["cols"]}', fontsize=10)
    # logarithmic: the few values that stand out take as much room as the bulk
    axis.set(xscale='log', yscale='log', xlim=(0.9, None))
    axis.grid(alpha=0.3)


def draw_along(records, title):
    """
    Plot stable and effective rank by step, divided by those of random matrices: the median of every kind of
    matrix.
    """
    page = figure(11, 4.5)
    for axis, rank in zip(page.subplots(1, 2), ('stable_rank', 'effective_rank')):
        for n, (kind, found) in enumerate(by_kind(records).items()):
            steps = sorted({record['step'] for record in found})
            shares = []
            for step in steps:
                shares.append(median(r[rank] / r[f'null_{rank}'] for r in found if r['step'] == step))
            style = 'o-' if n < 10 else 's--'
            axis.plot(steps, shares, style, color=f'C{n % 10}', markersize=4, label=kind)
        axis.axhline(1, color='k', linestyle='--', linewidth=1.2)
        axis.set(xlabel='step', ylabel=f'{rank.replace("_", " ")} / that of a random Gaussian')
        axis.grid(alpha=0.3)
    page.legend(*axis.get_legend_handles_labels(), loc='outside right center', fontsize=9)
    page.suptitle(title, fontsize=11)
    return page


# -----------------------------------------------------------------------------
# The command

LARGEST_TABLE = 8192  # tokens of a Markov chain's full table: 0.5 GB in float64, and minutes


def merged_model(where):
    """(the model of `where`, its folder); an adapter is merged into its weights."""
    cfg, tensors, folder = read_model(where)
    return fill(cfg, tensors, folder), folder


def run(s):
    """python analyze.py weights; s: analyze.WeightsSettings"""
    base = merged_model(s.against)[0] if s.against else None
    less = f', less {s.against}' if base else ''
    records = []
    for where in places(s):
        model, folder = merged_model(where)
        check_table(model.cfg, where)
        if base:
            check_same_matrices(model, base, s)
        step = checkpoint.load_state(folder)['step'] if s.along else 0
        last = measure(model, base, step)
        records += last
    title = folder + less
    print(f'{title}: {model.num_params():,} parameters\n\n{table(last)}\n')
    explain(last)
    if s.csv:
        rows = [{key: value for key, value in record.items() if key not in ('s', 'null')}
                for record in records]
        write_csv(rows, s.csv)
        print(f'written: {s.csv}')
    if s.picture:
        page = draw_along(records, s.out_dir + less) if s.along else draw_spectra(last, title)
        save(page, s.picture)
        print(f'written: {s.picture}')


def places(s):
    """
    The models to measure: s.out_dir, or with --along its checkpoints, oldest first. Raises UserError if there
    are none.
    """
    if not s.along:
        return [s.out_dir]
    folders = checkpoint.checkpoints(s.out_dir)[::-1]
    if not folders:
        raise UserError(f'out_dir={s.out_dir}: no checkpoints in it: '
                        'give the out_dir of a training run, or leave --along out')
    return folders


def check_table(cfg, where):
    """Raise UserError for a Markov chain whose table is too large."""
    if cfg.arch == 'markov' and not cfg.rank_embed and cfg.vocab_size > LARGEST_TABLE:
        raise UserError(f'out_dir={where}: a table of {cfg.vocab_size:,} tokens squared is too large to '
                        f'decompose, {LARGEST_TABLE:,} is the most')


def check_same_matrices(model, base, s):
    """Raise UserError unless two models have the same matrices."""
    mine, theirs = shapes(model), shapes(base)
    for name in sorted(mine | theirs):
        found, wanted = mine.get(name, 'no such matrix'), theirs.get(name, 'no such matrix')
        if found != wanted:
            raise UserError(f'against={s.against}: {name}: {wanted}, but {found} in out_dir={s.out_dir}: '
                            'give a checkpoint of the same network')


def shapes(model):
    """{name of a matrix: '64x32'}."""
    return {name: f'{factors[0].size(0)}x{factors[-1].size(1)}' for name, factors in matrices(model).items()}


def explain(records):
    """Print the meaning of the columns and names of the table."""
    print('median (range) over layers and heads; null: of random Gaussian matrices; pays: '
          'the rank below which two factors are smaller than the matrix\n'
          'qk: W_qᵀW_k of each head, ov: W_oW_v')
    for record in records:
        is_factor = record['name'].endswith(('.up', '.down')) and record['name'].count('.') == 4
        if is_factor:
            print('layers with an activation between their factors have no product; '
                  'up and down are those factors')
            return
