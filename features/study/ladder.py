"""
The ladder: what each step from guessing to a transformer is worth, all models on the same tokens.

    python eval.py ladder --dataset=tinystories

Models in closed form (features/markov/ngrams.py) are counted here; bigrams by gradient and transformers are
the arms of a sweep (config/sweeps/ladder.py), and are trained if they are missing.
"""
import math
import os
from dataclasses import dataclass, fields, replace

import numpy as np

import checkpoint
from batches import TokenFiles, find_folder, losses
from configurator import DeviceConfig, UserError
from features.study.jobs import run_missing
from features.study.pictures import figure, save
from features.study.split_loss import row_losses
from features.study.stats import loss_and_error, show_error
from features.study.sweep import expand, read_sweep

RANKS = (4, 16, 64, 256)  # of the bigrams from the SVD of the counts
COLOURS = {'counts': 'C0', 'SVD of the counts': 'C2', 'gradient': 'C1', 'limit': 'C3'}


@dataclass
class Rung:
    """A model of the ladder and its validation loss in nats per token."""
    name: str
    kind: str  # a key of COLOURS
    loss: float
    error: float | None = 0.0  # standard error

    def bits(self, files):
        """Bits per byte of text; None if the TokenFiles `files` do not store the number of bytes."""
        return losses(self.loss, 1, files.bytes / files.tokens).get('val_bpb')


# -----------------------------------------------------------------------------
# Models in closed form

def count_rungs(train, val, vocab_size):
    """
    ([rungs below a bigram], [bigrams], [rungs above]) in closed form, from token streams (N,) int64. Their
    smoothing is tuned on the last tenth of `train`.
    """
    from features.markov import ngrams
    uniform = np.full(len(val) - 1, math.log(vocab_size))
    unigram, _ = ngrams.tuned(ngrams.unigram, train, val, vocab_size)
    bigram, _ = ngrams.tuned(ngrams.bigram, train, val, vocab_size)
    interpolated, k = ngrams.tuned(ngrams.interpolated_bigram, train, val, vocab_size)
    below = [counted('uniform', uniform), counted('unigram', unigram)]
    # low ranks of a table that fits in memory
    ranks = [rank for rank in RANKS if 16 * rank <= vocab_size <= 8192]
    if ranks:
        nats = ngrams.low_rank_bigrams(train, val, vocab_size, k, ranks)
        for rank in ranks:
            below.append(counted(f'bigram, rank {rank}, SVD', nats[rank], 'SVD of the counts'))
    bigrams = [counted('bigram, add k', bigram), counted('bigram, interpolated', interpolated)]
    above = []
    for order in (3, 5):
        nats = ngrams.kneser_ney(train, val, vocab_size, order)
        above.append(counted(f'Kneser–Ney, {order} tokens', nats))
    return below, bigrams, above


def counted(name, nats, kind='counts'):
    """The Rung of a model with these losses in nats, (N,), for the validation tokens."""
    mean, error = loss_and_error(nats, np.ones(len(nats)))
    return Rung(name, kind, mean, error)


# -----------------------------------------------------------------------------
# Models that are trained

def plan_training(s, files):
    """
    The Sweep of the trained rungs for this data set; files: its TokenFiles to train on. Arms whose rank is
    not below the vocabulary size are left out; arms without max_iters make one pass over the data. Raises
    UserError for a sweep that the ladder cannot take.
    """
    sweep = read_sweep(s.sweep)
    if not isinstance(sweep.base, dict) or not {'block_size', 'batch_size'} <= sweep.base.keys():
        raise UserError(f'{s.sweep}: base: '
                        'the ladder takes a dict of settings with block_size and batch_size')
    arms = {}
    for name, arm in sweep.arms.items():
        check_arm(name, arm, sweep.base, s.sweep)
        given = {'gradient_accumulation_steps': 1} | sweep.base | arm
        if given.get('rank_embed', 0) >= files.vocab_size:
            continue
        tokens = given['block_size'] * given['batch_size'] * given['gradient_accumulation_steps']  # per step
        one_pass = -(-(files.tokens - 1) // tokens)
        steps = given.get('max_iters', one_pass)
        arms[name] = {'max_iters': steps, 'eval_interval': steps} | arm
    machine = {f.name: getattr(s, f.name) for f in fields(DeviceConfig)}
    return replace(sweep, base=machine | sweep.base | {'dataset': s.dataset}, arms=arms, out=s.out)


def check_arm(name, arm, base, path):
    """Raise UserError for an arm of the sweep in `path` that sweeps what plan_training() has to know."""
    if isinstance(arm, list):
        raise UserError(f'{path}: arms: {name}: the ladder takes one dict of settings: write an arm for each')
    given = base | arm
    for key in ('rank_embed', 'block_size', 'batch_size', 'gradient_accumulation_steps', 'max_iters'):
        if isinstance(given.get(key), list):
            raise UserError(f'{path}: arms: {name}: {key}={given[key]}: the ladder takes one value: '
                            'write an arm for each')


def trained_rungs(sweep, s, wanted):
    """
    ([bigrams], [other rungs]): trained if they are missing, and evaluated at the end of training. Raises
    UserError for one that does not predict all of the `wanted` validation targets.
    """
    run_missing(sweep)
    bigrams = []
    others = []
    for run in expand(sweep):
        [split] = row_losses(checkpoint.find(run.out_dir, 'last'), s.dataset, s)
        if split.targets.sum() != wanted:
            raise UserError(f'{s.sweep}: packing={run.settings.packing} leaves out some targets of the '
                            'validation split: use packing=stream')
        mean, error = loss_and_error(split.nats, split.targets)
        name = run.name.removesuffix(',seed=1').replace('_', ' ')
        if run.settings.arch == 'markov':
            bigrams.append(Rung(f'{name}, gradient', 'gradient', mean, error))
        else:
            others.append(Rung(name, 'gradient', mean, error))
    return bigrams, others


# -----------------------------------------------------------------------------
# What is shown

def ladder_table(rungs, files, entropy):
    """The rungs as text, a line each; with the entropy of the source, also how far each is above it."""
    width = max(len(rung.name) for rung in rungs)
    head = f'{"":{width}}  nats/token    s.e.  bits/byte'
    if entropy:
        head += '  above the entropy'
    lines = [head]
    for rung in rungs:
        bits = rung.bits(files)
        line = f'{rung.name:{width}}  {rung.loss:10.4f}  {show_error(rung.error):>6}  '
        line += f'{bits:9.4f}' if bits else '        -'
        if entropy:
            line += f'  {rung.loss / entropy - 1:17.2%}'
        lines.append(line)
    return '\n'.join(lines)


def draw_ladder(rungs, files, title, path):
    """A bar plot of the rungs, in order, written to `path`."""
    values = [rung.bits(files) or rung.loss for rung in rungs]
    page = figure(9, 1.2 + 0.3 * len(rungs))
    axis = page.subplots()
    for kind, colour in COLOURS.items():
        places = [n for n, rung in enumerate(rungs) if rung.kind == kind]
        if places:
            axis.barh(places, [values[n] for n in places], color=colour, height=0.7, label=kind)
    for n, value in enumerate(values):
        axis.text(value, n, f' {value:.3f}', va='center')
    if rungs[-1].kind == 'limit':
        axis.axvline(values[-1], color=COLOURS['limit'], linestyle=':')
    axis.set_yticks(range(len(rungs)), [rung.name for rung in rungs])
    axis.invert_yaxis()
    axis.set_xlim(0, 1.1 * max(values))
    axis.set_xlabel('bits per byte' if rungs[0].bits(files) else 'nats per token')
    axis.set_title(title)
    axis.spines[['top', 'right']].set_visible(False)
    axis.legend(loc='lower right')
    save(page, path)


def run(s):
    """python eval.py ladder"""
    folder = find_folder(s.dataset)
    train_files = TokenFiles(folder, 'train')
    val_files = TokenFiles(folder, 'val')
    name = os.path.basename(os.path.normpath(s.dataset))
    s.out = s.out or os.path.join('out', 'ladder', name)

    trained_bigrams, others = [], []
    if s.sweep:  # first: an error in its file shows at once
        sweep = plan_training(s, train_files)
        trained_bigrams, others = trained_rungs(sweep, s, val_files.tokens - 1)
    train = train_files.read(0, train_files.tokens)
    val = val_files.read(0, val_files.tokens)
    below, bigrams, above = count_rungs(train, val, val_files.vocab_size)
    rungs = below + trained_bigrams + bigrams + above + others
    entropy = val_files.meta.get('entropy')
    if entropy:
        rungs.append(Rung('entropy of the source', 'limit', entropy))

    print(f'{name}: {len(train):,} tokens to learn from, {len(val) - 1:,} to predict, '
          f'a vocabulary of {val_files.vocab_size:,}\n')
    print(ladder_table(rungs, val_files, entropy))
    if s.picture:
        path = os.path.join(s.out, 'ladder.png') if s.picture == 'auto' else s.picture
        draw_ladder(rungs, val_files, f'{name}: {len(val) - 1:,} validation tokens', path)
        print(f'\ndrawn: {path}')
