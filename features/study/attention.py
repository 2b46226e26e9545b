"""
Analyze attention as in "Inheritune" (Sanyal et al. 2024, arXiv 2404.08634): the rank of the attention matrix
A of each head, and how many tokens it attends to. A is (T, T), after the softmax; its rows sum to 1.

    python analyze.py attention --out_dir=out/run

    rank   the least k for which the k largest squared singular values of A are 90% of all
    mass   the least m for which the m columns of A with the largest squared norms are 90% of |A|²
    first  the mean of the first column: the share of the attention on the first token. Trained networks
           often have such an attention sink (Xiao et al. 2023, arXiv 2309.17453)

All are means over sequences. MaxRank of a layer is the largest rank of its heads, AvgMass the mean mass of
its heads. A layer with MaxRank 1 is called lazy: all its heads attend in the same way at all positions. For
comparison, the table also lists three simple patterns: attend to all tokens equally (uniform), only to the
first token (sink), only to itself (identity).
"""
import contextlib
from dataclasses import dataclass
from statistics import mean

import torch
from tqdm import tqdm

import model as networks
from batches import validation_batch, validation_rows
from configurator import FilePath, UserError
from features.networks import load_model
from features.study.pictures import figure, save, write_csv
from features.study.validation import validation_sources


@dataclass
class AttentionSettings:
    out_dir: FilePath = ''  # a run (its best checkpoint), a checkpoint, hf:FOLDER, gpt2; '' = the last run
    # under out/
    dataset: FilePath = ''  # name under data/, or a folder, prepared with the same tokenizer; '' = the data
    # of the run
    sequences: int = 100  # number of validation sequences, the same ones each time
    length: int = 100  # length of each sequence in tokens
    tau: float = 0.9  # share of the energy for rank and mass
    lazy: float = 1.0  # a layer is lazy if its MaxRank is at most this
    batch_averaged: bool = False  # analyze the mean of the matrices over the sequences, as in the notebook of
    # Inheritune's authors; this lowers the ranks
    csv: FilePath = ''  # file for the figures of every head
    picture: FilePath = 'out/attention.png'  # file for the plot; '' = no plot

    def check(self):
        """Raise ValueError for values that cannot work."""
        if self.sequences < 1 or self.length < 2:
            raise ValueError(f'sequences={self.sequences}, length={self.length}: '
                             'takes at least 1 sequence of 2 tokens')
        if not 0 < self.tau <= 1:
            raise ValueError(f'tau={self.tau}: takes 0 < tau <= 1')


# -----------------------------------------------------------------------------
# Ranks and masses

def least(energies, tau):
    """
    energies (…, T) ≥ 0 → (…): the smallest number of them, the largest first, whose sum is the share tau of
    the total.
    """
    kept = energies.sort(-1, descending=True).values.cumsum(-1)
    return 1 + (kept < tau * kept[..., -1:] * (1 - 1e-12)).sum(-1)


def rank(A, tau=0.9):
    """The rank (…) of attention matrices A (…, T, T)."""
    return least(torch.linalg.svdvals(A.double()).square(), tau)


def mass(A, tau=0.9):
    """The number (…) of columns with most of the norm of attention matrices A (…, T, T)."""
    return least(A.double().square().sum(-2), tau)


def first_share(A):
    """The share of the attention on the first token (…), of attention matrices A (…, T, T)."""
    return A[..., 0].double().mean(-1)


def nulls(T, tau=0.9):
    """{name: (rank, mass, share on the first token)} of the three simple attention patterns."""
    uniform = torch.ones(T, T).tril()
    matrices = {
        'uniform': uniform / uniform.sum(1, keepdim=True),
        'sink': torch.eye(T)[:1].expand(T, T),
        'identity': torch.eye(T),
    }
    return {name: (rank(A, tau).item(), mass(A, tau).item(), first_share(A).item())
            for name, A in matrices.items()}


# -----------------------------------------------------------------------------
# Measurements

@contextlib.contextmanager
def watching(see):
    """Context in which see(A) is called with the attention A (B, H, T, T) of every layer in turn."""
    fused = networks.attend

    def attend(q, k, v, mask, is_causal, dropout, softcap=0.0):
        groups = q.size(1) // k.size(1)
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        A = networks.attention_matrix(q, k, mask, is_causal, softcap)
        see(A)
        return A @ v
    networks.attend = attend
    try:
        yield
    finally:
        networks.attend = fused


class Sums:
    """Sums over the sequences for one layer: ranks, masses, first shares (H,); matrices A (H, T, T)."""

    def __init__(self):
        self.ranks = 0
        self.masses = 0
        self.firsts = 0
        self.A = 0

    def add(self, A, tau):
        """A (B, H, T, T)"""
        self.ranks = self.ranks + rank(A, tau).sum(0)
        self.masses = self.masses + mass(A, tau).sum(0)
        self.firsts = self.firsts + first_share(A).sum(0)
        self.A = self.A + A.double().sum(0)


@torch.no_grad()
def measure(model, batches, tau=0.9):
    """
    [{layer, head, rank, mass, first, averaged_rank, averaged_mass}] of every head: means over the sequences
    of `batches`, which yields x (B, T), and the figures of the mean matrix. Memory does not grow with the
    number of batches.
    """
    layers = [Sums() for _ in model.blocks]
    count = 0  # sequences
    for x in batches:
        seen = []
        with watching(seen.append):
            model.hidden(x)
        for sums, A in zip(layers, seen):
            sums.add(A, tau)
        count += len(x)
    records = []
    for layer, sums in enumerate(layers):
        averaged_ranks, averaged_masses = rank(sums.A / count, tau), mass(sums.A / count, tau)
        for head in range(len(sums.A)):
            records.append({
                'layer': layer,
                'head': head,
                'rank': sums.ranks[head].item() / count,
                'mass': sums.masses[head].item() / count,
                'first': sums.firsts[head].item() / count,
                'averaged_rank': averaged_ranks[head].item(),
                'averaged_mass': averaged_masses[head].item(),
            })
    return records


def gradient_norms(model, batches):
    """
    [(norm of the gradient of the queries' weights, of the keys') for each layer], of the mean loss over
    `batches`, which yields x, y (B, T).
    """
    model.zero_grad()
    count = 0
    for x, y in batches:
        model(x, y, reduction='sum').backward()
        count += int((y >= 0).sum())  # batches may differ in size

    def norm(layer):
        gradients = [p.grad.flatten() for p in layer.parameters() if p.ndim > 1]
        return torch.cat(gradients).norm().item() / count
    return [(norm(block.attn.q), norm(block.attn.k)) for block in model.blocks]


def by_layer(records, gradients, averaged):
    """
    [{layer, max_rank, mean_rank, mass, first, grad_q, grad_k}] of each layer. averaged: rank and mass of the
    mean matrices.
    """
    prefix = 'averaged_' if averaged else ''
    layers = []
    for layer, (grad_q, grad_k) in enumerate(gradients):
        heads = [record for record in records if record['layer'] == layer]
        ranks = [head[f'{prefix}rank'] for head in heads]
        masses = [head[f'{prefix}mass'] for head in heads]
        layers.append({
            'layer': layer,
            'max_rank': max(ranks),
            'mean_rank': mean(ranks),
            'mass': mean(masses),
            'first': mean(head['first'] for head in heads),
            'grad_q': grad_q,
            'grad_k': grad_k,
        })
    return layers


# -----------------------------------------------------------------------------
# Table and picture

COLUMNS = {
    'MaxRank': 'max_rank',
    'mean rank': 'mean_rank',
    'AvgMass': 'mass',
    'to first': 'first',
    '|grad W_q|': 'grad_q',
    '|grad W_k|': 'grad_k',
}


def table(layers, null, lazy):
    """
    A line for each layer, then means (the mean of MaxRank is AvgRank), then the three simple attention
    patterns.
    """
    lines = [f'{"layer":10}' + ''.join(f'{name:>12}' for name in COLUMNS)]
    lazy_layers = []
    for layer in layers:
        line = cells(str(layer['layer']), layer)
        if layer['max_rank'] <= lazy:
            lazy_layers.append(str(layer['layer']))
            line += '  lazy'
        lines.append(line)
    half = (len(layers) + 1) // 2
    for name, some in (('mean', layers), ('lower half', layers[:half]), ('upper half', layers[half:])):
        if some:
            means = {key: mean(layer[key] for layer in some) for key in COLUMNS.values()}
            lines.append(cells(name, means))
    for name, (null_rank, null_mass, null_first) in null.items():
        lines.append(cells(name, {'max_rank': null_rank, 'mean_rank': null_rank, 'mass': null_mass,
                                  'first': null_first}))
    lines += ['', f'lazy layers, of MaxRank up to {lazy:g}: {", ".join(lazy_layers) or "none"}']
    return '\n'.join(lines)


def cells(name, row):
    """One line of the table; a row may end before the gradients."""
    line = f'{name:10}'
    for key in COLUMNS.values():
        if key in row and 'grad' in key:
            line += f'{row[key]:12.2e}'
        elif key in row:
            line += f'{row[key]:12.2f}'
    return line


def draw(records, layers, null, averaged, title):
    """
    Four panels by layer: ranks, masses and shares on the first token, with heads as points, the layer as a
    line and the simple patterns for comparison; norms of the gradient.
    """
    page = figure(16, 4)
    prefix = 'averaged_' if averaged else ''
    numbers = [layer['layer'] for layer in layers]
    of_rank, of_mass, of_first, of_gradient = page.subplots(1, 4)
    for n, (axis, key, line, line_label, label) in enumerate((
            (of_rank, prefix + 'rank', 'max_rank', 'MaxRank', 'rank: singular values of A'),
            (of_mass, prefix + 'mass', 'mass', 'AvgMass', 'mass: columns of A'),
            (of_first, 'first', 'first', 'mean', 'share of the attention on the first token'))):
        nothing = {name: values[n] for name, values in null.items()}
        heads = [record[key] for record in records]
        axis.plot([record['layer'] for record in records], heads, '.', color='C0', alpha=0.4, label='a head')
        axis.plot(numbers, [layer[line] for layer in layers], 'o-', color='C0', label=line_label)
        for (name, value), style in zip(nothing.items(), (':', '--', '-.')):
            axis.axhline(value, color='0.4', linestyle=style, linewidth=1, label=name)
        axis.set(xlabel='layer', ylabel=label, yscale='log')
    of_first.set(yscale='linear', ylim=(0, 1.02))
    for key, label in (('grad_q', 'queries'), ('grad_k', 'keys')):
        of_gradient.plot(numbers, [layer[key] for layer in layers], 'o-', label=label)
    of_gradient.set(xlabel='layer', ylabel='norm of the gradient', yscale='log')
    for axis in (of_rank, of_mass, of_first, of_gradient):
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
        axis.set_xticks(numbers if len(numbers) < 13 else numbers[::4])
    page.suptitle(title, fontsize=11)
    return page


# -----------------------------------------------------------------------------
# The command

BATCH = 4  # sequences at a time


def windows(sources, s):
    """
    [(Source, its row numbers)]: s.sequences full rows, shared by the sources. Raises UserError if there are
    fewer.
    """
    out = []
    left = s.sequences
    for n, source in enumerate(sources):
        wanted = -(-left // (len(sources) - n))
        numbers = validation_rows(source, wanted + 1)
        # the last row may be short
        numbers = [number for number in numbers if number < source.rows - 1][:wanted]
        if len(numbers) < wanted:
            raise UserError(f'sequences={s.sequences}: {source.name} has {len(numbers)} windows of '
                            f'{s.length} tokens to validate on: lower it or length')
        out.append((source, numbers))
        left -= wanted
    return out


def look(s):
    """
    (the figures of every head, of every layer, a title) of the model in s.out_dir; s: AttentionSettings.
    """
    model, folder = load_model(s.out_dir)
    if model.cfg.arch == 'markov':
        raise UserError(f'out_dir={s.out_dir}: a Markov chain has no attention')
    if s.length > model.cfg.block_size:
        raise UserError(f'length={s.length}: '
                        f'the network in {s.out_dir} reads {model.cfg.block_size} tokens: lower it')
    batches = []
    for source, numbers in windows(validation_sources(s.out_dir, model.cfg, s.dataset, s.length), s):
        for i in range(0, len(numbers), BATCH):
            batches.append((source, numbers[i:i + BATCH]))

    def read(what):
        for source, numbers in tqdm(batches, desc=what, disable=None, leave=False):
            x, y = validation_batch(source, numbers, 0)
            yield torch.from_numpy(x), torch.from_numpy(y)
    records = measure(model, (x for x, _ in read('attention')), s.tau)
    gradients = gradient_norms(model, read('gradients'))
    title = f'{folder}: {s.sequences} sequences of {s.length} tokens, {s.tau:.0%}'
    if s.batch_averaged:
        title += ', of their mean'
    return records, by_layer(records, gradients, s.batch_averaged), title


def run(s):
    """python analyze.py attention"""
    records, layers, title = look(s)
    null = nulls(s.length, s.tau)
    print(f'{title}\n\n{table(layers, null, s.lazy)}')
    if s.csv:
        rows = []
        for record in records:
            layer = layers[record['layer']]
            rows.append(record | {'grad_q': layer['grad_q'], 'grad_k': layer['grad_k']})
        write_csv(rows, s.csv)
        print(f'written: {s.csv}')
    if s.picture:
        save(draw(records, layers, null, s.batch_averaged, title), s.picture)
        print(f'written: {s.picture}')
