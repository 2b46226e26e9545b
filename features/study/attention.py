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

An encoder-decoder has three tables: the encoder's self-attention, the decoder's self-attention, and
cross-attention, whose A is (T, S), from T tokens of the target to S of the source. Each source–target pair is
read by itself, so A has no padding. The patterns are means over the same lengths. Encoder and cross-attention
are not causal: there, uniform attention has rank 1 too, and a lazy layer may look at all tokens equally; its
mass tells. In the place of identity, cross-attention has the token at the same share of the source
(diagonal).
"""
import contextlib
from collections import Counter
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
    length: int = 100  # length of each sequence in tokens; the most of a source, and of a target
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


def nulls(T, tau=0.9, S=0, kind='decoder'):
    """
    {name: (rank, mass, share on the first token)} of the three simple attention patterns, (T, S), S = T by
    default. kind: as in KINDS.
    """
    S = S or T
    uniform = torch.ones(T, S)
    if kind == 'decoder':
        uniform = uniform.tril()
    matrices = {
        'uniform': uniform / uniform.sum(1, keepdim=True),
        'sink': torch.eye(S)[:1].expand(T, S),
        'diagonal' if kind == 'cross' else 'identity': torch.eye(S)[torch.arange(T) * S // T],
    }
    return {name: (rank(A, tau).item(), mass(A, tau).item(), first_share(A).item())
            for name, A in matrices.items()}


def mean_nulls(shapes, tau, kind):
    """The means of nulls() over matrices of these shapes [(T, S), …]."""
    sums = Counter()
    for (T, S), count in Counter(shapes).items():
        for name, values in nulls(T, tau, S, kind).items():
            for n, value in enumerate(values):
                sums[name, n] += count * value / len(shapes)
    return {name: tuple(sums[name, n] for n in range(3)) for name in dict.fromkeys(name for name, _ in sums)}


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


KINDS = {
    'encoder': "encoder's self-attention",
    'decoder': "decoder's self-attention",
    'cross': 'cross-attention',
}


def attentions(model):
    """[(kind, layer, its module)] of all attention of a network, in the order in which it runs."""
    found = [('encoder', n, block.attn) for n, block in enumerate(getattr(model, 'encoder', ()))]
    for n, block in enumerate(model.blocks):
        found.append(('decoder', n, block.attn))
        if hasattr(block, 'cross'):
            found.append(('cross', n, block.cross))
    return found


class Sums:
    """Sums over the sequences for one layer: ranks, masses, first shares (H,); matrices A (H, T, T)."""

    def __init__(self):
        self.ranks = 0
        self.masses = 0
        self.firsts = 0
        self.A = 0

    def add(self, A, tau, of_one_size):
        """A (B, H, T, S). of_one_size: whether all A are, so that they have a mean."""
        self.ranks = self.ranks + rank(A, tau).sum(0)
        self.masses = self.masses + mass(A, tau).sum(0)
        self.firsts = self.firsts + first_share(A).sum(0)
        if of_one_size:
            self.A = self.A + A.double().sum(0)


@torch.no_grad()
def measure(model, batches, tau=0.9):
    """
    [{attention, layer, head, rank, mass, first, averaged_rank, averaged_mass}] of every head: means over the
    sequences of `batches`, which yields x (B, T), and the figures of the mean matrix. For an encoder-decoder
    it yields (x, source), both without padding, and there is no mean matrix. Memory does not grow with the
    number of batches.
    """
    found = attentions(model)
    layers = [Sums() for _ in found]
    has_encoder = model.cfg.n_encoder_layer > 0
    count = 0  # sequences
    for batch in batches:
        seen = []
        with watching(seen.append):
            if has_encoder:
                x, source = batch
                model.hidden(x, encoded=model.encode(source))
            else:
                x = batch
                model.hidden(x)
        for sums, A in zip(layers, seen, strict=True):
            sums.add(A, tau, not has_encoder)
        count += len(x)
    records = []
    for (kind, layer, _), sums in zip(found, layers):
        means = {}
        if not has_encoder:
            means = {'averaged_rank': rank(sums.A / count, tau), 'averaged_mass': mass(sums.A / count, tau)}
        for head in range(len(sums.ranks)):
            records.append({
                'attention': kind,
                'layer': layer,
                'head': head,
                'rank': sums.ranks[head].item() / count,
                'mass': sums.masses[head].item() / count,
                'first': sums.firsts[head].item() / count,
            } | {name: values[head].item() for name, values in means.items()})
    return records


def gradient_norms(model, batches):
    """
    [(norm of the gradient of the queries' weights, of the keys')] of attentions(), of the mean loss over
    `batches`, which yields x, y (B, T), and for an encoder-decoder also source (B, S).
    """
    model.zero_grad()
    count = 0
    for x, y, *source in batches:
        inputs = {'source': source[0]} if source else {}
        model(x, y, reduction='sum', **inputs).backward()
        count += int((y >= 0).sum())  # batches may differ in size

    def norm(layer):
        gradients = [p.grad.flatten() for p in layer.parameters() if p.ndim > 1]
        return torch.cat(gradients).norm().item() / count
    return [(norm(module.q), norm(module.k)) for _, _, module in attentions(model)]


def by_layer(records, gradients, averaged):
    """
    [{attention, layer, max_rank, mean_rank, mass, first, grad_q, grad_k}] of each layer. averaged: rank and
    mass of the mean matrices.
    """
    prefix = 'averaged_' if averaged else ''
    heads_of = {}
    for record in records:
        heads_of.setdefault((record['attention'], record['layer']), []).append(record)
    layers = []
    for ((kind, layer), heads), (grad_q, grad_k) in zip(heads_of.items(), gradients, strict=True):
        ranks = [head[f'{prefix}rank'] for head in heads]
        masses = [head[f'{prefix}mass'] for head in heads]
        layers.append({
            'attention': kind,
            'layer': layer,
            'max_rank': max(ranks),
            'mean_rank': mean(ranks),
            'mass': mean(masses),
            'first': mean(head['first'] for head in heads),
            'grad_q': grad_q,
            'grad_k': grad_k,
        })
    return layers


def of_kind(rows, kind):
    """Those of the records or layers that are of this kind of attention."""
    return [row for row in rows if row['attention'] == kind]


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
    Four panels by layer for each kind of attention: ranks, masses and shares on the first token, with heads
    as points, the layer as a line and the simple patterns for comparison; norms of the gradient. null: {kind:
    its nulls}.
    """
    page = figure(16, 4 * len(null))
    panels = page.subplots(len(null), 4, squeeze=False)
    for row, kind in zip(panels, null):
        draw_row(row, of_kind(records, kind), of_kind(layers, kind), null[kind], averaged)
        if len(null) > 1:
            row[0].set_title(KINDS[kind], loc='left', fontsize=10)
    page.suptitle(title, fontsize=11)
    return page


def draw_row(panels, records, layers, null, averaged):
    """Fill four panels with what draw() says, for one kind of attention."""
    prefix = 'averaged_' if averaged else ''
    numbers = [layer['layer'] for layer in layers]
    of_rank, of_mass, of_first, of_gradient = panels
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
    is_zero = not any(layer['grad_q'] or layer['grad_k'] for layer in layers)  # as before the first step
    of_gradient.set(xlabel='layer', ylabel='norm of the gradient', yscale='linear' if is_zero else 'log')
    for axis in panels:
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
        axis.set_xticks(numbers if len(numbers) < 13 else numbers[::4])


# -----------------------------------------------------------------------------
# The command

BATCH = 4  # sequences at a time


def windows(sources, s, has_encoder=False):
    """
    [(Source, its row numbers)]: s.sequences full rows, shared by the sources; for an encoder-decoder pairs of
    any length. Raises UserError if there are fewer.
    """
    out = []
    left = s.sequences
    what = 'pairs' if has_encoder else f'windows of {s.length} tokens'
    for n, source in enumerate(sources):
        wanted = -(-left // (len(sources) - n))
        numbers = validation_rows(source, wanted + 1)
        # the last window may be short
        count = source.rows if has_encoder else source.rows - 1
        numbers = [number for number in numbers if number < count][:wanted]
        if len(numbers) < wanted:
            raise UserError(f'sequences={s.sequences}: {source.name} has {len(numbers)} {what} to validate '
                            'on: lower it' + ' or length' * (not has_encoder))
        out.append((source, numbers))
        left -= wanted
    return out


def read_batch(source, numbers):
    """
    x, y (B, T) of these rows of a Source; for an encoder-decoder x, y (1, T), source (1, S), without padding.
    """
    x, y, *more = (torch.from_numpy(array) for array in validation_batch(source, numbers, 0))
    if not more:
        return x, y
    T, S = int((y >= 0).sum()), int((more[0] >= 0).sum())
    return x[:, :T], y[:, :T], more[0][:, :S]


def look(s):
    """
    (the figures of every head, of every layer, {kind of attention: its nulls}, a title) of the model in
    s.out_dir; s: AttentionSettings.
    """
    model, folder = load_model(s.out_dir, encoder=True)
    cfg = model.cfg
    if cfg.arch == 'markov':
        raise UserError(f'out_dir={s.out_dir}: a Markov chain has no attention')
    has_encoder = cfg.n_encoder_layer > 0
    if has_encoder and s.batch_averaged:
        raise UserError('batch_averaged: is the mean of matrices of one size; the pairs of an '
                        'encoder-decoder differ in length: leave it out')
    most = min(cfg.source_limit, cfg.target_limit) if has_encoder else cfg.block_size
    if s.length > most:
        raise UserError(f'length={s.length}: the network in {s.out_dir} reads {most} tokens: lower it')
    batches = []
    size = 1 if has_encoder else BATCH
    for source, numbers in windows(validation_sources(s.out_dir, cfg, s.dataset, s.length), s, has_encoder):
        if 'chat' in source.files.meta:
            raise UserError(f'dataset={source.name}: holds conversations, several in a row, and each row is '
                            'to be one text: give another')
        for i in range(0, len(numbers), size):
            batches.append((source, numbers[i:i + size]))

    def read(what):
        for source, numbers in tqdm(batches, desc=what, disable=None, leave=False):
            yield read_batch(source, numbers)
    if has_encoder:
        records = measure(model, ((x, source) for x, _, source in read('attention')), s.tau)
        shapes = [(x.size(1), source.size(1)) for x, _, source in read('lengths')]
        null = {'encoder': mean_nulls([(S, S) for _, S in shapes], s.tau, 'encoder'),
                'decoder': mean_nulls([(T, T) for T, _ in shapes], s.tau, 'decoder'),
                'cross': mean_nulls(shapes, s.tau, 'cross')}
        title = f'{folder}: {s.sequences} pairs of up to {s.length} + {s.length} tokens, {s.tau:.0%}'
    else:
        records = measure(model, (x for x, _ in read('attention')), s.tau)
        null = {'decoder': nulls(s.length, s.tau)}
        title = f'{folder}: {s.sequences} sequences of {s.length} tokens, {s.tau:.0%}'
    gradients = gradient_norms(model, read('gradients'))
    if s.batch_averaged:
        title += ', of their mean'
    return records, by_layer(records, gradients, s.batch_averaged), null, title


def run(s):
    """python analyze.py attention"""
    records, layers, null, title = look(s)
    print(title)
    for kind in null:
        heading = f'{KINDS[kind]}\n' if len(null) > 1 else ''
        print(f'\n{heading}{table(of_kind(layers, kind), null[kind], s.lazy)}')
    if s.csv:
        gradients = {(layer['attention'], layer['layer']): layer for layer in layers}
        rows = []
        for record in records:
            layer = gradients[record['attention'], record['layer']]
            rows.append(record | {'grad_q': layer['grad_q'], 'grad_k': layer['grad_k']})
        write_csv(rows, s.csv)
        print(f'written: {s.csv}')
    if s.picture:
        save(draw(records, layers, null, s.batch_averaged, title), s.picture)
        print(f'written: {s.picture}')
