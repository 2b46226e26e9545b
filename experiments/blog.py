"""
Why low rank failed in the blog "Are Small Language Models Low-rank?" (XiaonanFu-ucsd/COGS185-final-project): its faults, each a patch
of a few lines on train.py, one by one, all together, and all but one.

    python prepare.py tinystories.jsonl --out=data/stories --tokenizer=bpe:4096 --val_fraction=0.05
    python experiments/blog.py --quick                         # all runs, small, then table and picture; or without --quick, an hour on one core
    python experiments/blog.py --only='dense*'                 # a part of the runs: this and --only='lowrank*' side by side use two cores
    python experiments/blog.py config/lowrank.py --condition=right+bf16+init       # train.py with these faults

Finished runs in out_dir are not made again.
"""
import math
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from statistics import mean

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import batches
import model
import run
import train
from checkpoint import replace_text
from compare import read_run
from configurator import FilePath, UserError, configure, run_main
from features.study.pictures import figure, save


@dataclass
class Settings(train.Settings):
    out_dir: FilePath = 'out/blog'
    condition: str = ''  # one run, not the table: right, blog (= all faults), right+FAULT…, blog-FAULT…; of last overlap bf16 init head unguarded
    only: str = '*'  # make the runs whose name fits this pattern, no table
    quick: bool = False  # a smaller network and fewer steps


# -----------------------------------------------------------------------------
# The faults. File and line: where the blog's code has it

def last_token(s):
    """Of every row only the last token is a target: logits[:, -1, :] (trainer.py:74)."""
    rows = batches.Mixture.rows

    def last_column(self, samples):
        x, y = rows(self, samples)
        y[:, :-1] = -1
        return x, y
    batches.Mixture.rows = last_column


def overlapping(s):
    """Micro-batch i is x[i:i + size], not x[i * size:(i + 1) * size] (trainer.py:71): of 120 rows 22 are seen, the inner ones 8 times."""
    micro_batches = run.micro_batches

    def overlap(s, step, rank, world):
        parts = micro_batches(s, step, rank, world)
        return [range(parts[0].start + i, parts[0].start + i + len(part)) for i, part in enumerate(parts)]
    run.micro_batches = overlap


def pure_bf16(s):
    """
    Weights, gradients and Adam's moments in bfloat16, with its 8 bits: GPT(config).type(bfloat16) (trainer.py:139). 0.999 v rounds to v, so
    that the second moment never falls; a weight takes no step that is smaller than 1/512 of it.
    """
    build_model = run.build_model

    def build(*args):
        network = build_model(*args)
        for p in network.parameters():
            p.data = p.data.bfloat16()
        return network
    run.build_model, s.dtype = build, 'bfloat16'


def small_init(s):
    """
    All matrices N(0, 0.01²) (model.py:117), factors too: their products have deviation 0.01² · sqrt(R), 0.0016 at the blog's rank 256. What
    that does depends on the width: an attention matrix multiplies by 0.28 in the blog's dense arm and by 0.054 in the other, here by 0.14
    and 0.016 (--quick 0.098 and 0.0078).
    """
    @torch.no_grad()
    def init_weights(self):
        for p in self.parameters():
            if p.ndim == 2:
                p.normal_(std=0.01)
    model.Transformer.init_weights = init_weights


def factored_head(s):
    """In the low-rank arm the head is a second, low-rank matrix, 1152 → 256 → V (model_lr.py:117), in the dense arm the embedding."""
    if s.rank_mlp:
        s.tie, s.rank_head = False, s.n_embd // 4


def unguarded(s):
    """No warm-up (trainer.py:146); single gradients clipped at ±1.5, not their norm (:79); a target's loss beyond 20 has no gradient (:75)."""
    s.warmup_iters, s.grad_clip = 0, 0.0
    norm_of, whole = torch.nn.utils.clip_grad_norm_, model.loss_and_gradient

    def clip(parameters, max_norm):
        parameters = list(parameters)
        norm = norm_of(parameters, max_norm)
        torch.nn.utils.clip_grad_value_(parameters, 1.5)
        return norm

    def clamped(logits, targets, n_vocab, softcap, smoothing, with_grad, *more):
        if with_grad:
            nll = torch.nn.functional.cross_entropy(logits[:, :n_vocab].float(), targets, ignore_index=-1, reduction='none')
            targets = targets.masked_fill(nll > 20, -1)
        return whole(logits, targets, n_vocab, softcap, smoothing, with_grad, *more)
    torch.nn.utils.clip_grad_norm_, model.loss_and_gradient = clip, clamped


FAULTS = {'last': last_token, 'overlap': overlapping, 'bf16': pure_bf16, 'init': small_init, 'head': factored_head, 'unguarded': unguarded}


def faults_of(condition):
    """The names of the faults of 'right', 'right+last+init', 'blog' or 'blog-last'. Raises UserError."""
    kind, *names = re.split('[+-]', condition)
    if kind not in ('right', 'blog') or set(names) - set(FAULTS):
        raise UserError(f'condition={condition}: takes right, right+FAULT…, blog or blog-FAULT… with FAULT one of {", ".join(FAULTS)}')
    return [name for name in FAULTS if (name in names) == (kind == 'right')]


def run_one(s):
    """train.py with the faults of s.condition."""
    for name in faults_of(s.condition):
        FAULTS[name](s)
    train.configure = lambda cls: s
    train.main()


# -----------------------------------------------------------------------------
# The runs: two arms with equal parameters in the blocks (2,654,208; --quick 442,368). MLP, positions and norms are the blog's, the norm
# inside the MLP in its low-rank arm only; so is Adam, without weight decay. A toy's scale: 2,048 tokens a step, 4 micro-batches of 8 rows

RIGHT = {'dataset': 'data/stories', 'block_size': 64, 'batch_size': 8, 'gradient_accumulation_steps': 4, 'max_iters': 300, 'n_layer': 6, 'mlp': 'silu',
         'qk_norm': False, 'weight_decay': 0.0, 'beta2': 0.999, 'dtype': 'bfloat16', 'compile': False, 'eval_interval': 10 ** 6, 'eval_iters': 27,
         'sample_tokens': 0, 'target_val_loss': 1e-9}  # the last: never reached, but a race is not evaluated before its first step
ARMS = {'dense': {'n_embd': 192, 'n_head': 6},
        'lowrank': {'n_embd': 256, 'n_head': 8, 'rank_qk': 96, 'rank_vo': 96, 'rank_mlp': 96, 'mlp_norm': True}}
QUICK = {'n_layer': 4, 'max_iters': 100}  # and half of the widths, heads and ranks
RATES = (1e-3, 2e-3, 4e-3, 8e-3)  # swept under the right recipe; the best of an arm is then that of all its runs
SEEDS = {'right': (1, 2, 3), 'blog': (1, 2, 3)}  # of the others: 1
CONDITIONS = ['right', *(f'right+{name}' for name in FAULTS), 'blog', *(f'blog-{name}' for name in FAULTS)]


def recipe(s, arm):
    """The settings of an arm's runs, the faults left out."""
    if not s.quick:
        return RIGHT | ARMS[arm]
    return RIGHT | {name: value // 2 if type(value) is int else value for name, value in ARMS[arm].items()} | QUICK


def val_loss(s, arm, condition, rate, seed):
    """Validation loss of all tokens at the end of a run, which is made if it is not there; inf if it diverges."""
    out = f'{s.out_dir}/{arm}_{condition}_{rate:g}_{seed}'
    path = f'{out}/final_val_loss'
    if not os.path.exists(path):
        own = recipe(s, arm) | {'condition': condition, 'learning_rate': rate, 'seed': seed}
        asked = [arg for arg in sys.argv[1:] if not arg.startswith('--only')]
        command = [sys.executable, __file__, *(f'--{key}={value}' for key, value in own.items()), *asked, f'--out_dir={out}']
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        diverged = 'not finite' in done.stderr
        if done.returncode and not diverged:
            raise UserError(f'{out}: {done.stderr}')
        loss = math.inf if diverged else read_run(out)['val'][-1]['val_loss']
        replace_text(path, f'{loss}\n')
        print(f'{out}: {loss:.4f}', flush=True)
    return float(Path(path).read_text())


def losses(s, arm, condition):
    """The losses of an arm under a condition, one a seed; none for what was no fault of that arm."""
    if arm == 'dense' and condition.endswith('head'):
        return []
    best = min(RATES, key=lambda rate: val_loss(s, arm, 'right', rate, 1))
    return [val_loss(s, arm, condition, best, seed) for seed in SEEDS.get(condition, (1,))]


# -----------------------------------------------------------------------------
# Table and picture

def spread(seeds):
    return torch.tensor(seeds).std().item()


def gap(dense, lowrank):
    """Nats by which the low-rank arm is above the dense one, over the seeds that both have: the first ones."""
    return mean(b - a for a, b in zip(dense, lowrank))


def change(s, arm, condition):
    """Nats by which a condition is above the one it departs from, right or blog, on the same seed."""
    ours = losses(s, arm, condition)
    return ours[0] - losses(s, arm, re.split('[+-]', condition)[0])[0] if ours else 0.0


def table(s):
    """Rates, losses and what each fault costs, as markdown."""
    lines = ['| rate, no fault, seed 1 | ' + ' | '.join(f'{rate:g}' for rate in RATES) + ' |', '|---' * (len(RATES) + 1) + '|']
    lines += [f'| {arm} | ' + ' | '.join(f'{val_loss(s, arm, "right", rate, 1):.3f}' for rate in RATES) + ' |' for arm in ARMS]
    lines += ['', '| condition (three seeds, ± their deviation, or seed 1) | dense | low-rank | gap | change, dense | change, low-rank |']
    lines += ['|---' * 6 + '|']
    for condition in CONDITIONS:
        dense, lowrank = (losses(s, arm, condition) for arm in ARMS)
        cells = [' ± '.join(f'{f(seeds):.3f}' for f in (mean, spread)[:len(seeds)]) or '–' for seeds in (dense, lowrank)]
        cells.append(f'{gap(dense or losses(s, "dense", re.split("[+-]", condition)[0]), lowrank):+.3f}')
        cells += [f'{change(s, arm, condition):+.3f}' if seeds and condition not in SEEDS else '' for arm, seeds in zip(ARMS, (dense, lowrank))]
        lines.append(f'| {condition} | ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines)


def draw(s, path):
    """What each fault costs when it is alone, and what its repair gains when the others remain."""
    page = figure(10, 4)
    panels = ('right+', 1, 'cost of a fault alone'), ('blog-', -1, 'gain when it alone is mended')
    for axis, (base, sign, title) in zip(page.subplots(1, 2, sharey=True), panels):
        for n, arm in enumerate(ARMS):
            bars = axis.bar([i + 0.4 * n for i in range(len(FAULTS))], [sign * change(s, arm, base + name) for name in FAULTS], 0.4, label=arm)
            axis.bar_label(bars, fmt='%.2f', fontsize=8)
        axis.set_xticks([i + 0.2 for i in range(len(FAULTS))], FAULTS)
        axis.axhline(0, color='black', linewidth=0.8)
        axis.set_title(title)
    page.axes[0].set_ylabel('nats per token')
    page.axes[0].legend()
    save(page, path)


def main():
    s = configure(Settings)
    if s.condition:
        return run_one(s)
    s.out_dir += '_quick' * s.quick
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
