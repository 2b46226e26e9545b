"""
What attention does, after "Inheritune" (Sanyal et al. 2024, arXiv 2404.08634): how many directions and how many tokens the attention
matrices A of each head and layer consist of. A is (T, T), after the softmax, its rows sum to 1.

    rank   the least k for which the k largest squared singular values of A are 90% of all           MaxRank of a layer: its largest head
    mass   the least m for which the m columns of A with the largest squared norms are 90% of |A|²   AvgMass of a layer: the mean of its heads

both the mean over sequences. A layer whose MaxRank is 1 is called lazy: all its heads do one thing for all positions. What that is, the
numbers of three matrices that do nothing tell: attending to everything alike (uniform), to the first token alone (sink), to oneself (identity).
"""
import contextlib
from dataclasses import dataclass
from statistics import mean

import torch
from tqdm import tqdm

import model as networks
from batches import validation_batch, validation_rows
from checkpoint import load_model
from configurator import FilePath, UserError
from features.study.pictures import figure, save, write_csv
from features.study.validation import validation_sources


@dataclass
class AttentionSettings:
    out_dir: FilePath = 'out'  # a run (its best checkpoint), a checkpoint, hf:FOLDER, gpt2
    dataset: FilePath = ''  # name under data/, or a folder, prepared with the same tokenizer; '' = what the run was trained on
    sequences: int = 100  # so many of the validation split, the same ones each time,
    length: int = 100  # of so many tokens
    tau: float = 0.9  # the share that counts as all
    lazy: float = 1.0  # a layer of at most this MaxRank is lazy
    batch_averaged: bool = False  # of the mean of the matrices over the sequences, as the authors' notebook has it, which lowers ranks
    csv: FilePath = ''  # file for the figures of every head
    picture: FilePath = 'out/attention.png'  # where to draw; '' = nowhere

    def check(self):
        """Raise ValueError for values that cannot work."""
        if self.sequences < 1 or self.length < 2:
            raise ValueError(f'sequences={self.sequences}, length={self.length}: takes at least 1 sequence of 2 tokens')
        if not 0 < self.tau <= 1:
            raise ValueError(f'tau={self.tau}: takes 0 < tau <= 1')


# -----------------------------------------------------------------------------
# Ranks and masses

def least(energies, tau):
    """(…, T) of energies from 0 → (…): how many of them, the largest first, make up the share tau of their sum."""
    kept = energies.sort(-1, descending=True).values.cumsum(-1)
    return 1 + (kept < tau * kept[..., -1:] * (1 - 1e-12)).sum(-1)


def rank(A, tau=0.9):
    """The rank of attention matrices A (…, T, T)."""
    return least(torch.linalg.svdvals(A.double()).square(), tau)


def mass(A, tau=0.9):
    """The number of columns that carry them."""
    return least(A.double().square().sum(-2), tau)


def nulls(T, tau=0.9):
    """{what it does: (rank, mass)} of attention that looks at nothing in particular."""
    uniform = torch.ones(T, T).tril()
    matrices = {'uniform': uniform / uniform.sum(1, keepdim=True), 'sink': torch.eye(T)[:1].expand(T, T), 'identity': torch.eye(T)}
    return {name: (rank(A, tau).item(), mass(A, tau).item()) for name, A in matrices.items()}


@contextlib.contextmanager
def watching(see):
    """Meanwhile, see(A) is called with the attention A (B, H, T, T) of every layer in its turn."""
    fused = networks.attend

    def attend(q, k, v, mask, is_causal, dropout):
        groups = q.size(1) // k.size(1)
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        A = networks.attention_matrix(q, k, mask, is_causal)
        see(A)
        return A @ v
    networks.attend = attend
    try:
        yield
    finally:
        networks.attend = fused


@torch.no_grad()
def measure(model, batches, tau=0.9):
    """
    [{layer, head, rank, mass, averaged_rank, averaged_mass}] of every head: the means over the sequences of `batches`, which yields x (B, T), and
    the same figures of the mean matrix. Memory does not grow with the number of batches.
    """
    layers, count = [[0, 0, 0] for _ in model.blocks], 0  # sums over the sequences: ranks (H), masses (H), A (H, T, T)
    for x in batches:
        seen = []
        with watching(seen.append):
            model.hidden(x)
        for sums, A in zip(layers, seen):
            for n, new in enumerate((rank(A, tau), mass(A, tau), A.double())):
                sums[n] = sums[n] + new.sum(0)
        count += len(x)
    records = []
    for layer, (ranks, masses, A) in enumerate(layers):
        averaged = rank(A / count, tau), mass(A / count, tau)
        records += [{'layer': layer, 'head': head, 'rank': ranks[head].item() / count, 'mass': masses[head].item() / count,
                     'averaged_rank': averaged[0][head].item(), 'averaged_mass': averaged[1][head].item()} for head in range(len(A))]
    return records


def gradient_norms(model, batches):
    """[(norm of the gradient by the queries' weights, by the keys') of each layer], of the mean loss of `batches`, which yields x, y (B, T)."""
    model.zero_grad()
    count = 0
    for x, y in batches:
        model(x, y, reduction='sum').backward()
        count += int((y >= 0).sum())  # batches may be of unlike sizes

    def norm(layer):
        return torch.cat([p.grad.flatten() for p in layer.parameters() if p.ndim > 1]).norm().item() / count
    return [(norm(block.attn.q), norm(block.attn.k)) for block in model.blocks]


# -----------------------------------------------------------------------------
# What is shown

COLUMNS = {'MaxRank': 'max_rank', 'mean rank': 'mean_rank', 'AvgMass': 'mass', '|grad W_q|': 'grad_q', '|grad W_k|': 'grad_k'}


def by_layer(records, gradients, averaged):
    """[{layer, max_rank, mean_rank, mass, grad_q, grad_k}], a dict for each layer."""
    prefix, out = 'averaged_' if averaged else '', []
    for layer, (grad_q, grad_k) in enumerate(gradients):
        ranks, masses = ([r[prefix + what] for r in records if r['layer'] == layer] for what in ('rank', 'mass'))
        out.append({'layer': layer, 'max_rank': max(ranks), 'mean_rank': mean(ranks), 'mass': mean(masses), 'grad_q': grad_q, 'grad_k': grad_k})
    return out


def table(layers, null, lazy):
    """A line for each layer, then means (that of MaxRank is AvgRank), then the numbers of attention that looks at nothing in particular."""
    half = (len(layers) + 1) // 2
    rows = [(str(layer['layer']), layer) for layer in layers]
    rows += [(name, {key: mean(layer[key] for layer in some) for key in COLUMNS.values()}) for name, some in
             (('mean', layers), ('lower half', layers[:half]), ('upper half', layers[half:])) if some]
    rows += [(name, {'max_rank': r, 'mean_rank': r, 'mass': m}) for name, (r, m) in null.items()]
    lines = [f'{"layer":10}' + ''.join(f'{name:>12}' for name in COLUMNS)]
    for name, row in rows:
        cells = [f'{row[key]:12.2e}' if 'grad' in key else f'{row[key]:12.2f}' for key in COLUMNS.values() if key in row]
        lines.append(f'{name:10}' + ''.join(cells) + '  lazy' * (name.isdecimal() and row['max_rank'] <= lazy))
    found = [str(layer['layer']) for layer in layers if layer['max_rank'] <= lazy]
    return '\n'.join(lines) + f'\n\nlazy layers, of MaxRank up to {lazy:g}: {", ".join(found) or "none"}'


def draw(records, layers, null, averaged, title):
    """Three panels against the layer: ranks and masses of the heads as points, the layer's as a line, the nulls beside them; gradient norms."""
    page, prefix, numbers = figure(12, 4), 'averaged_' if averaged else '', [layer['layer'] for layer in layers]
    axes = page.subplots(1, 3)
    for axis, what, line, label in zip(axes, ('rank', 'mass'), ('max_rank', 'mass'), ('rank: singular values of A', 'mass: columns of A')):
        axis.plot([r['layer'] for r in records], [r[prefix + what] for r in records], '.', color='C0', alpha=0.4, label='a head')
        axis.plot(numbers, [layer[line] for layer in layers], 'o-', color='C0', label='MaxRank' if what == 'rank' else 'AvgMass')
        for n, (name, values) in enumerate(null.items()):
            axis.axhline(values[what == 'mass'], color='0.4', linestyle=(':', '--', '-.')[n], linewidth=1, label=name)
        axis.set(xlabel='layer', ylabel=label, yscale='log')
        axis.legend(fontsize=8)
    for key, label in (('grad_q', 'queries'), ('grad_k', 'keys')):
        axes[2].plot(numbers, [layer[key] for layer in layers], 'o-', label=label)
    axes[2].set(xlabel='layer', ylabel='norm of the gradient', yscale='log')
    axes[2].legend(fontsize=8)
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.set_xticks(numbers if len(numbers) < 13 else numbers[::4])
    page.suptitle(title, fontsize=11)
    return page


# -----------------------------------------------------------------------------
# The command

BATCH = 4  # sequences at a time


def windows(sources, s):
    """[(Source, its row numbers)] of s.sequences full windows, shared by the sources. Raises UserError where there are not so many."""
    out, left = [], s.sequences
    for n, source in enumerate(sources):
        wanted = -(-left // (len(sources) - n))
        numbers = [number for number in validation_rows(source, wanted + 1) if number < source.rows - 1][:wanted]  # the last row may be short
        if len(numbers) < wanted:
            raise UserError(f'sequences={s.sequences}: {source.name} has {len(numbers)} windows of {s.length} tokens to validate on: lower it or length')
        out.append((source, numbers))
        left -= wanted
    return out


def look(s):
    """(the figures of every head, of every layer, a title) of the network in s.out_dir."""
    model, folder = load_model(s.out_dir)
    if model.cfg.arch == 'markov':
        raise UserError(f'out_dir={s.out_dir}: a Markov chain has no attention')
    if s.length > model.cfg.block_size:
        raise UserError(f'length={s.length}: the network in {s.out_dir} reads {model.cfg.block_size} tokens: lower it')
    chosen = windows(validation_sources(s.out_dir, model.cfg, s.dataset, s.length), s)
    batches = [(source, numbers[i:i + BATCH]) for source, numbers in chosen for i in range(0, len(numbers), BATCH)]

    def read(what):
        for source, numbers in tqdm(batches, desc=what, disable=None, leave=False):
            yield tuple(torch.from_numpy(a) for a in validation_batch(source, numbers, 0))
    records = measure(model, (x for x, _ in read('attention')), s.tau)
    gradients = gradient_norms(model, read('gradients'))
    title = f'{folder}: {s.sequences} sequences of {s.length} tokens, {s.tau:.0%}' + ', of their mean' * s.batch_averaged
    return records, by_layer(records, gradients, s.batch_averaged), title


def run(s):
    """python analyze.py attention"""
    records, layers, title = look(s)
    null = nulls(s.length, s.tau)
    print(f'{title}\n\n{table(layers, null, s.lazy)}')
    if s.csv:
        write_csv([r | {key: layers[r['layer']][key] for key in ('grad_q', 'grad_k')} for r in records], s.csv)
        print(f'written: {s.csv}')
    if s.picture:
        save(draw(records, layers, null, s.batch_averaged, title), s.picture)
        print(f'written: {s.picture}')
