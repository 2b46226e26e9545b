"""
Why low rank failed in the blog "Are Small Language Models Low-rank?" (XiaonanFu-ucsd/COGS185-final-project):
its faults, each as a patch of a few lines on train.py, one by one, all together, and all but one.

    python prepare.py tinystories.jsonl --out=data/stories --tokenizer=bpe:4096 --val_fraction=0.05
    # all runs, small, then table and picture
    python experiments/blog.py --quick
    # the same in full: an hour on one core
    python experiments/blog.py
    # some of the runs; beside --only='lowrank*' it uses two cores
    python experiments/blog.py --only='dense*'
    # train.py with these faults
    python experiments/blog.py config/lowrank.py --condition=right+bf16+init

Finished runs in out_dir are not made again.
"""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
import features  # noqa: I001 — first: your random.py or data/ then hides no module of ours or of a library
if __name__ == '__main__':
    features.start(__file__)

import math
import re
import subprocess
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from statistics import mean

import torch

import batches
import model
import run
import train
from checkpoint import replace_text
from configurator import FilePath, UserError, configure, run_main
from features.study.pictures import figure, save
from features.study.runs import read_run


@dataclass
class Settings(train.Settings):
    out_dir: FilePath = 'out/blog'
    condition: str = ''  # one run instead of the table: right, blog (all faults), right+FAULT… or
    # blog-FAULT…, with FAULT one of last overlap bf16 init head unguarded
    only: str = '*'  # make the runs whose name matches this pattern, no table
    quick: bool = False  # a smaller network and fewer steps


# -----------------------------------------------------------------------------
# The faults, with the file and line of the blog's code

def last_token(s):
    """Only the last token of each row is a target: logits[:, -1, :] (trainer.py:74)."""
    rows = batches.Mixture.rows

    def last_column(self, samples):
        x, y = rows(self, samples)
        y[:, :-1] = -1
        return x, y
    batches.Mixture.rows = last_column


def overlapping(s):
    """
    Micro-batch i is x[i:i + size], not x[i * size:(i + 1) * size] (trainer.py:71): of 120 rows 22 are seen,
    the inner ones 8 times.
    """
    micro_batches = batches.micro_batches

    def overlap(s, step, rank, world):
        parts = micro_batches(s, step, rank, world)
        first = parts[0].start
        return [range(first + i, first + i + len(part)) for i, part in enumerate(parts)]
    batches.micro_batches = overlap


def pure_bf16(s):
    """
    Weights, gradients and Adam's moments in bfloat16, with its 8 bits: GPT(config).type(bfloat16)
    (trainer.py:139). 0.999 v rounds to v, so that the second moment never falls. A step smaller than 1/512 of
    a weight has no effect.
    """
    build_model = run.build_model

    def build(*args):
        network = build_model(*args)
        for p in network.parameters():
            p.data = p.data.bfloat16()
        return network
    run.build_model = build
    s.dtype = 'bfloat16'


def small_init(s):
    """
    All matrices are N(0, 0.01²) (model.py:117), factors too: their products have deviation 0.01² · sqrt(R),
    0.0016 at the blog's rank 256. The effect depends on the width: an attention matrix multiplies by 0.28 in
    the blog's dense arm and by 0.054 in the low-rank one, here by 0.14 and 0.016 (--quick: 0.098 and 0.0078).
    """
    @torch.no_grad()
    def init_weights(self):
        for p in self.parameters():
            if p.ndim == 2:
                p.normal_(std=0.01)
    model.Transformer.init_weights = init_weights


def factored_head(s):
    """
    The low-rank arm has a second, low-rank matrix as head, 1152 → 256 → V (model_lr.py:117), the dense arm
    its embedding.
    """
    if s.rank_mlp:
        s.tie = False
        s.rank_head = s.n_embd // 4


def unguarded(s):
    """
    No warm-up (trainer.py:146); single gradients are clipped at ±1.5, not their norm (:79); targets with a
    loss above 20 have no gradient (:75).
    """
    s.warmup_iters = 0
    s.grad_clip = 0.0
    norm_of = torch.nn.utils.clip_grad_norm_
    whole = model.loss_and_gradient

    def clip(parameters, max_norm):
        parameters = list(parameters)
        norm = norm_of(parameters, max_norm)
        torch.nn.utils.clip_grad_value_(parameters, 1.5)
        return norm

    def clamped(logits, targets, n_vocab, softcap, smoothing, with_grad, *more):
        if with_grad:
            kept = logits[:, :n_vocab].float()
            nll = torch.nn.functional.cross_entropy(kept, targets, ignore_index=-1, reduction='none')
            targets = targets.masked_fill(nll > 20, -1)
        return whole(logits, targets, n_vocab, softcap, smoothing, with_grad, *more)
    torch.nn.utils.clip_grad_norm_ = clip
    model.loss_and_gradient = clamped


FAULTS = {'last': last_token, 'overlap': overlapping, 'bf16': pure_bf16, 'init': small_init,
          'head': factored_head, 'unguarded': unguarded}


def faults_of(condition):
    """
    The names of the faults of 'right', 'right+last+init', 'blog' or 'blog-last', a list. Raises UserError.
    """
    kind, *names = re.split('[+-]', condition)
    if kind not in ('right', 'blog') or set(names) - set(FAULTS):
        raise UserError(f'condition={condition}: takes right, right+FAULT…, '
                        'blog or blog-FAULT… with FAULT one of ' + ', '.join(FAULTS))
    if kind == 'right':
        return [name for name in FAULTS if name in names]
    return [name for name in FAULTS if name not in names]


def run_one(s):
    """train.py with the faults of s.condition."""
    for name in faults_of(s.condition):
        FAULTS[name](s)
    train.configure = lambda cls: s
    train.main()


# -----------------------------------------------------------------------------
# The runs. Both arms have equal parameters in the blocks (2,654,208; --quick 442,368). MLP, positions and
# norms are the blog's, with the norm inside the MLP in its low-rank arm only, and so is Adam without weight
# decay. The scale is a toy's: 2,048 tokens a step, 4 micro-batches of 8 rows

RIGHT = {
    'dataset': 'data/stories',
    'block_size': 64,
    'batch_size': 8,
    'gradient_accumulation_steps': 4,
    'max_iters': 300,
    'n_layer': 6,
    'mlp': 'silu',
    'qk_norm': False,
    'weight_decay': 0.0,
    'beta2': 0.999,
    'dtype': 'bfloat16',
    'compile': False,
    'eval_interval': 10 ** 6,
    'eval_iters': 27,
    'sample_tokens': 0,
    'target_val_loss': 1e-9,  # never reached, but a race is not evaluated before its first step
}
ARMS = {
    'dense': {'n_embd': 192, 'n_head': 6},
    'lowrank': {'n_embd': 256, 'n_head': 8, 'rank_qk': 96, 'rank_vo': 96, 'rank_mlp': 96, 'mlp_norm': True},
}
QUICK = {'n_layer': 4, 'max_iters': 100}  # and half of the widths, heads and ranks
RATES = (1e-3, 2e-3, 4e-3, 8e-3)  # tried without faults; the best of an arm is then that of all its runs
SEEDS = {'right': (1, 2, 3), 'blog': (1, 2, 3)}  # of the other conditions: 1
CONDITIONS = ['right', *(f'right+{name}' for name in FAULTS), 'blog', *(f'blog-{name}' for name in FAULTS)]


def recipe(s, arm):
    """The settings of an arm's runs, without the faults."""
    own = ARMS[arm]
    if not s.quick:
        return RIGHT | own
    half = {name: value // 2 if type(value) is int else value for name, value in own.items()}
    return RIGHT | half | QUICK


def val_loss(s, arm, condition, rate, seed):
    """
    Final loss on all validation tokens of a run, which is made if it is missing; infinite if it diverges.
    """
    out = f'{s.out_dir}/{arm}_{condition}_{rate:g}_{seed}'
    path = f'{out}/final_val_loss'
    if not os.path.exists(path):
        own = recipe(s, arm) | {'condition': condition, 'learning_rate': rate, 'seed': seed}
        settings = [f'--{key}={value}' for key, value in own.items()]
        asked = [arg for arg in sys.argv[1:] if not arg.startswith('--only')]
        command = [sys.executable, __file__, *settings, *asked, f'--out_dir={out}']
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        diverged = 'not finite' in done.stderr
        if done.returncode and not diverged:
            raise UserError(f'{out}: {done.stderr}')
        loss = math.inf if diverged else read_run(out)['val'][-1]['val_loss']
        replace_text(path, f'{loss}\n')
        print(f'{out}: {loss:.4f}', flush=True)
    return float(Path(path).read_text())


def losses(s, arm, condition):
    """The losses of an arm under a condition, one per seed; none for a fault that the arm did not have."""
    if arm == 'dense' and condition.endswith('head'):
        return []
    best = min(RATES, key=lambda rate: val_loss(s, arm, 'right', rate, 1))
    return [val_loss(s, arm, condition, best, seed) for seed in SEEDS.get(condition, (1,))]


# -----------------------------------------------------------------------------
# Table and picture

def base_of(condition):
    """The condition that another one departs from: right or blog."""
    return re.split('[+-]', condition)[0]


def gap(dense, lowrank):
    """
    Nats by which the low-rank arm is above the dense one, over the seeds that both have: the first ones.
    """
    return mean(b - a for a, b in zip(dense, lowrank))


def change(s, arm, condition):
    """Nats by which a condition is above the one that it departs from, on the same seed."""
    ours = losses(s, arm, condition)
    if not ours:
        return 0.0
    return ours[0] - losses(s, arm, base_of(condition))[0]


def show_losses(seeds):
    """The losses of some seeds as text: their mean, with more than one ± their deviation."""
    if not seeds:
        return '–'
    if len(seeds) == 1:
        return f'{seeds[0]:.3f}'
    return f'{mean(seeds):.3f} ± {torch.tensor(seeds).std().item():.3f}'


def markdown(cells):
    """A line of a markdown table."""
    return f'| {" | ".join(cells)} |'


def table(s):
    """Learning rates, losses and the cost of each fault, as two markdown tables."""
    lines = [markdown(['rate, no fault, seed 1', *[f'{rate:g}' for rate in RATES]]),
             '|---' * (len(RATES) + 1) + '|']
    for arm in ARMS:
        lines.append(markdown([arm, *[f'{val_loss(s, arm, "right", rate, 1):.3f}' for rate in RATES]]))
    lines.append('')
    lines.append(markdown(['condition (three seeds, ± their deviation, or seed 1)', 'dense', 'low-rank',
                           'gap', 'change, dense', 'change, low-rank']))
    lines.append('|---' * 6 + '|')
    for condition in CONDITIONS:
        dense = losses(s, 'dense', condition)
        lowrank = losses(s, 'lowrank', condition)
        beside = dense or losses(s, 'dense', base_of(condition))
        cells = [condition, show_losses(dense), show_losses(lowrank), f'{gap(beside, lowrank):+.3f}']
        for arm, seeds in (('dense', dense), ('lowrank', lowrank)):
            has_change = seeds and condition not in SEEDS
            cells.append(f'{change(s, arm, condition):+.3f}' if has_change else '')
        lines.append(markdown(cells))
    return '\n'.join(lines)


def draw(s, path):
    """The cost of each fault alone, and the gain of mending it alone while the others remain."""
    page = figure(10, 4)
    left, right = page.subplots(1, 2, sharey=True)
    draw_bars(left, 'cost of a fault alone',
              {arm: [change(s, arm, f'right+{name}') for name in FAULTS] for arm in ARMS})
    draw_bars(right, 'gain when it alone is mended',
              {arm: [-change(s, arm, f'blog-{name}') for name in FAULTS] for arm in ARMS})
    left.set_ylabel('nats per token')
    left.legend()
    save(page, path)


def draw_bars(axis, title, heights):
    """Two bars for each fault; heights: {arm: [nats of each fault]}."""
    for n, (arm, values) in enumerate(heights.items()):
        bars = axis.bar([i + 0.4 * n for i in range(len(FAULTS))], values, 0.4, label=arm)
        axis.bar_label(bars, fmt='%.2f', fontsize=8)
    axis.set_xticks([i + 0.2 for i in range(len(FAULTS))], FAULTS)
    axis.axhline(0, color='black', linewidth=0.8)
    axis.set_title(title)


def main():
    s = configure(Settings)
    if s.condition:
        return run_one(s)
    if s.quick:
        s.out_dir += '_quick'
    for arm in ARMS:
        for condition in CONDITIONS:
            if fnmatch(f'{arm}_{condition}', s.only):
                losses(s, arm, condition)
    if s.only == '*':
        text = table(s)
        replace_text(f'{s.out_dir}/table.md', text + '\n')
        draw(s, f'{s.out_dir}/costs.png')
        print(f'{text}\n\nwritten: {s.out_dir}/table.md, {s.out_dir}/costs.png')


if __name__ == '__main__':
    run_main(main)
