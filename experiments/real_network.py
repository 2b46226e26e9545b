"""
Are the findings on small networks true of a real one? The originals on SmolLM2-135M-Instruct, or on another
Hugging Face folder of a decoder:

1) attention: the ranks of its attention matrices by layer, and the loss without each layer. Are its deep
   layers lazy ("Inheritune", Sanyal et al. 2024, arXiv 2404.08634)?
2) layers: its first 15 and its first 20 blocks, and all blocks in factors with as many parameters as 15
   blocks, before and after some steps of training on stories. Beside each, the same shape with random blocks;
   embedding, which is also the head, is the trained one in both.
3) lora: adapters of several ranks on instructions, with equal steps.

    python experiments/real_network.py --model=FOLDER --stories=tinystories.jsonl \
        --instructions=instructions.jsonl --jobs=2

instructions.jsonl holds {"instruction", "input", "output"} or {"messages"} a line. All arms of seed 1 run
first, with two learning rates; then those of the next seed. Runs that are in out_dir are not made again, so
that the same command continues. It writes tables and pictures of what is finished. --report writes them and
runs nothing.
"""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
import features  # noqa: I001 — first: your random.py or data/ then hides no module of ours or of a library
if __name__ == '__main__':
    features.start(__file__)

import csv
import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import torch
from tqdm import tqdm

import prepare
from batches import evaluate
from checkpoint import replace_json, replace_text
from configurator import FilePath, UserError, configure, run_main
from features.growth.commands import run_factorize, run_inherit
from features.growth.networks import take_layers
from features.networks import fill, load_model
from features.study import attention
from features.study.pictures import figure, save
from features.study.runs import Arm, read_log, read_run, read_settings
from features.study.stats import mean_and_error, paired_difference, show_interval, show_mean
from features.study.sweep import network
from features.study.tuning import tuned
from features.study.validation import validation_sources
from run import OneProcess
from surgery import FactorizeSettings, InheritSettings


@dataclass
class Settings:
    model: FilePath = ''  # the Hugging Face folder of the network
    stories: FilePath = ''  # .jsonl of texts to train the shrunk networks on
    instructions: FilePath = ''  # .jsonl of instructions and answers for the adapters
    out_dir: FilePath = 'out/real_network'
    depths: list[int] = field(default_factory=lambda: [15, 20])  # blocks that are kept
    rank_attn: int = 112  # of the factors of attention matrices; 112 and 208 give SmolLM2-135M the parameters
    # of 15 of its blocks; 0 = no factors
    rank_mlp: int = 208  # of the factors of MLP matrices
    ranks: list[int] = field(default_factory=lambda: [1, 4, 16, 64])  # of the adapters
    steps: int = 200  # of training after the surgery
    rate: float = 5e-4  # its learning rate. Another one is tried with the first seed, and the better one is
    # that of the other seeds: lower_rate for trained blocks, higher_rate for random ones
    lower_rate: float = 1e-4
    higher_rate: float = 2e-3
    row: int = 128  # tokens of such a step
    lora_steps: int = 60  # of the adapters
    lora_rate: float = 1e-3  # their learning rate, the same for all ranks
    lora_row: int = 256  # tokens of such a step
    sequences: int = 40  # of at most 100 tokens, for the attention
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3])  # of the data order and the random weights
    jobs: int = 1  # runs at a time
    report: bool = False  # write tables and pictures of the finished runs only

    def check(self):
        """Raise ValueError for values that cannot work."""
        for name in ('model', 'stories', 'instructions'):
            if not getattr(self, name):
                raise ValueError(f'{name}: is not given: --model=FOLDER --stories=FILE --instructions=FILE')


COMMON = {
    'batch_size': 1,
    'device': 'cpu',
    'dtype': 'bfloat16',
    'compile': False,
    'weight_decay': 0.0,
    'log_interval': 10,
}


# -----------------------------------------------------------------------------
# Data

def make_data(s):
    """(folder of the stories, folder of the instructions), prepared with the tokenizer of the network."""
    tokenizer = f'hf:{s.model}'
    folders = f'{s.out_dir}/data/stories', f'{s.out_dir}/data/instructions'
    chats = f'{s.out_dir}/data/chats.jsonl'
    if not os.path.exists(chats):
        os.makedirs(f'{s.out_dir}/data', exist_ok=True)
        replace_text(chats, ''.join(json.dumps(chat) + '\n' for chat in conversations(s.instructions)))
    prepare.prepare(prepare.Settings([s.stories], out=folders[0], tokenizer=tokenizer))
    prepare.prepare(prepare.Settings([chats], out=folders[1], tokenizer=tokenizer, messages=True,
                                     val_fraction=0.1))
    return folders


def conversations(path):
    """[{'messages': …}] of a .jsonl of conversations, or of instructions. Raises UserError for others."""
    out = []
    with open(path, encoding='utf-8') as lines:
        for number, line in enumerate(lines, 1):
            record = json.loads(line)
            if 'messages' in record:
                out.append(record)
                continue
            if 'instruction' not in record or 'output' not in record:
                raise UserError(f'{path}, line {number}: has neither messages nor instruction and output')
            asked = '\n'.join(part for part in (record['instruction'], record.get('input')) if part)
            out.append({'messages': [{'role': 'user', 'content': asked},
                                     {'role': 'assistant', 'content': record['output']}]})
    return out


# -----------------------------------------------------------------------------
# Arms

FRESH = 'attn,mlp,norm,norm_f'  # all but the embedding


def shapes(s, stories):
    """{name: function that makes its network in a folder} of the shrunk networks."""
    def first(count):
        return lambda out_dir: run_inherit(InheritSettings(
            from_=f'hf:{s.model}', out_dir=out_dir, layers=f'first:{count}', dataset='none'))

    def factors(out_dir):
        run_factorize(FactorizeSettings(
            from_=f'hf:{s.model}', out_dir=out_dir, dataset=stories, rank_qk=s.rank_attn,
            rank_vo=s.rank_attn, rank_mlp=s.rank_mlp))
    found = {f'first{count}': first(count) for count in s.depths}
    if s.rank_attn:
        found['factors'] = factors
    return found


def layer_arms(s, stories, seed):
    """{arm: its settings}: the shrunk networks, and the same shapes with random blocks."""
    arms = {}
    for name, make in shapes(s, stories).items():
        trained = f'{s.out_dir}/networks/{name}'
        drawn = f'{s.out_dir}/networks/{name}_random,seed={seed}'
        if not os.path.isdir(trained):
            make(trained)
        if not os.path.isdir(drawn):
            every = f'first:{network(trained).n_layer}'
            run_inherit(InheritSettings(from_=trained, out_dir=drawn, layers=every, fresh=FRESH, seed=seed,
                                        dataset='none'))
        arms[name] = {'init_from': trained}
        arms[f'{name}_random'] = {'init_from': drawn}
    return arms


def other_rate(s, name):
    """The second learning rate of an arm."""
    return s.higher_rate if name.endswith('_random') else s.lower_rate


def with_other_rates(s, arms):
    """{arm+rate: its settings} of layer_arms() with the second learning rate of each."""
    out = {}
    for name, settings in arms.items():
        rate = other_rate(s, name)
        out[f'{name}+{rate:g}'] = settings | {'learning_rate': rate}
    return out


def better(s, arms, name):
    """The name of an arm, with the rate that is better for the first seed. arms: the finished ones."""
    other = f'{name}+{other_rate(s, name):g}'
    if name not in arms or other not in arms:
        return name
    first = s.seeds[0]
    losses = {either: ends(arms[either], -1)[first] for either in (name, other)}
    return min(losses, key=losses.get)


EVAL_ITERS = 3  # of 12 rows of stories


def train_layers(s, stories, seed, rates):
    """Train the shrunk networks of a seed. rates: 'first', 'other' or the 'better' one for the first seed."""
    arms = layer_arms(s, stories, seed)
    if rates == 'other':
        arms = with_other_rates(s, arms)
    if rates == 'better':
        both = arms | with_other_rates(s, arms)
        done = finished(s, 'layers')
        names = [better(s, done, name) for name in arms]
        arms = {name: both[name] for name in names}
    base = COMMON | {
        'dataset': stories,
        'block_size': s.row,
        'max_iters': s.steps,
        'warmup_iters': s.steps // 20,
        'eval_interval': s.steps,
        'eval_iters': EVAL_ITERS,
    }
    arms = {name: {'learning_rate': s.rate} | settings for name, settings in arms.items()}
    tuned(base, lambda seed: arms, [{}], [seed], f'{s.out_dir}/layers', s.jobs)


def train_adapters(s, chats, seed):
    """Train the adapters of a seed."""
    base = COMMON | {
        'dataset': chats,
        'init_from': f'hf:{s.model}',
        'block_size': s.lora_row,
        'max_iters': s.lora_steps,
        'warmup_iters': s.lora_steps // 20,
        'learning_rate': s.lora_rate,
        'eval_interval': s.lora_steps,
        'eval_iters': 0,
    }
    adapters = {f'r{rank}': {'lora_rank': rank} for rank in s.ranks}
    tuned(base, lambda seed: adapters, [{}], [seed], f'{s.out_dir}/lora', s.jobs)


# -----------------------------------------------------------------------------
# Of the whole network

def measure_whole(s, stories):
    """
    Write attention.csv and attention.png, and whole.json: its losses on the stories as in a run, and those
    without each layer.
    """
    where = f'hf:{s.model}'
    if not os.path.exists(f'{s.out_dir}/attention.csv'):
        attention.run(attention.AttentionSettings(
            where, stories, s.sequences, min(100, network(where).block_size),
            csv=f'{s.out_dir}/attention.csv', picture=f'{s.out_dir}/attention.png'))
    kept = Path(s.out_dir, 'whole.json')
    if not kept.exists():
        model, _ = load_model(where)
        how = SimpleNamespace(eval_iters=EVAL_ITERS, batch_size=3, dtype=COMMON['dtype'])
        sources = validation_sources(where, model.cfg, stories, s.row)
        losses = evaluate(model, sources, how, OneProcess(torch.device('cpu')))
        losses['without'] = []
        weights = model.state_dict()
        every = range(model.cfg.n_layer)
        for layer in tqdm(every, desc='without a layer', disable=None, leave=False):
            cfg, taken = take_layers(model.cfg, weights, [other for other in every if other != layer])
            less = evaluate(fill(cfg, taken, where), sources, how, OneProcess(torch.device('cpu')))
            losses['without'].append(less['val_loss'])
        replace_json(kept, losses)


# -----------------------------------------------------------------------------
# Tables

def finished(s, part):
    """{arm: Arm} of the runs in a folder of out_dir, finished or not."""
    arms = {}
    for folder in sorted(Path(s.out_dir, part).glob('*,seed=*')):
        if read_settings(str(folder)) is None:
            continue
        name, seed = folder.name.split(',seed=')
        arms.setdefault(name, Arm(name)).runs[int(seed)] = read_run(str(folder))
    return {name: arm for name, arm in arms.items() if arm.seeds()}


def layer_names(s):
    """The names of the arms of shrunk networks."""
    names = [f'first{count}' for count in s.depths]
    if s.rank_attn:
        names.append('factors')
    both = []
    for name in names:
        both += [name, f'{name}_random']
    return both


def missing(s):
    """The names of the runs that are not finished; later seeds have the rate that is better so far."""
    arms = finished(s, 'layers')
    adapters = finished(s, 'lora')
    wanted = []  # (folder, arms of the folder, name, seed)
    for seed in s.seeds:
        for name in layer_names(s):
            names = [better(s, arms, name)]
            if seed == s.seeds[0]:
                names = [name, f'{name}+{other_rate(s, name):g}']
            wanted += [('layers', arms, either, seed) for either in names]
        wanted += [('lora', adapters, f'r{rank}', seed) for rank in s.ranks]
    out = []
    for part, found, name, seed in wanted:
        if name not in found or seed not in found[name].seeds():
            out.append(f'{part}/{name},seed={seed}')
    return out


def markdown(cells):
    """A line of a markdown table."""
    return f'| {" | ".join(cells)} |'


def heading(cells):
    """The first two lines of a markdown table."""
    return [markdown(cells), '|---' * len(cells) + '|']


def attention_table(s, whole):
    """Lines of a markdown table: the attention of each layer. whole: what is in whole.json, or {}."""
    layers = {}
    with open(f'{s.out_dir}/attention.csv', newline='') as rows:
        for row in csv.DictReader(rows):
            layers.setdefault(int(row['layer']), []).append(row)
    lines = heading(['layer', 'MaxRank', 'mean rank', 'AvgMass', 'share on the first token: mean',
                     'least head', 'largest head', 'loss without the layer, minus whole'])
    for layer, heads in layers.items():
        ranks, masses, firsts = ([float(head[key]) for head in heads] for key in ('rank', 'mass', 'first'))
        lines.append(markdown([
            str(layer),
            f'{max(ranks):.1f}',
            f'{statistics.mean(ranks):.1f}',
            f'{statistics.mean(masses):.1f}',
            f'{statistics.mean(firsts):.2f}',
            f'{min(firsts):.2f}',
            f'{max(firsts):.2f}',
            f'{whole["without"][layer] - whole["val_loss"]:+.3f}' if whole else '',
        ]))
    return lines


def ends(arm, step, key='val_loss'):
    """{seed: figure} of the finished runs of an Arm, at their first evaluation (step 0) or the last (-1)."""
    return {seed: arm.runs[seed]['val'][step][key] for seed in sorted(arm.seeds())}


def at_best(s, arms):
    """{arm: Arm with the better rate} of the finished ones."""
    return {name: arms[better(s, arms, name)] for name in layer_names(s) if name in arms}


def layers_table(s, arms, whole):
    """Lines of a markdown table: losses before and after training. whole: losses of the whole network."""
    lines = heading(['arm', 'parameters', 'before', 'rate', 'after', 'after, bits per byte',
                     'after, minus random [95%]', 'other rate: loss, first seed', 'seeds'])
    lines.append(markdown(['whole', '', f'{whole["val_loss"]:.3f}', *[''] * 6]))
    best = at_best(s, arms)
    for name, arm in best.items():
        run = next(iter(arm.runs.values()))
        compared = ''
        if f'{name}_random' in best:
            compared = difference(ends(arm, -1), ends(best[f'{name}_random'], -1))
        other = ''
        for either in (name, f'{name}+{other_rate(s, name):g}'):
            if either in arms and arms[either] is not arm:
                of_other = arms[either].runs[s.seeds[0]]
                other = f'{of_other["settings"].learning_rate:g}: {of_other["val"][-1]["val_loss"]:.3f}'
        lines.append(markdown([
            name,
            f'{run["parameters"]:,}',
            f'{statistics.mean(ends(arm, 0).values()):.3f}',
            f'{run["settings"].learning_rate:g}',
            show_mean(*mean_and_error(ends(arm, -1).values()), digits=3),
            f'{statistics.mean(ends(arm, -1, "val_bpb").values()):.3f}',
            compared,
            other,
            str(len(arm.seeds())),
        ]))
    return lines


def difference(a, b):
    """The paired difference of two {seed: loss} as text; '' if they have no seed in common."""
    found = paired_difference(a, b)
    if found is None:
        return ''
    mean, width, _ = found
    return show_interval(mean, width, 3)


def by_rank(arms):
    """The Arms of the adapters by their rank."""
    return dict(sorted((int(name[1:]), arm) for name, arm in arms.items()))


def lora_table(arms):
    """Lines of a markdown table: losses of the assistant's tokens by rank."""
    lines = heading(['rank', 'trained', 'loss', 'minus none [95%]', 'minus rank before [95%]', 'seeds'])
    last = None
    for rank, arm in by_rank(arms).items():
        before, after = ends(arm, 0), ends(arm, -1)
        if last is None:
            lines.append(markdown(['none', '0', f'{statistics.mean(before.values()):.4f}', '', '', '']))
        lines.append(markdown([
            str(rank),
            f'{next(iter(arm.runs.values()))["trained"]:,}',
            show_mean(*mean_and_error(after.values())),
            difference(after, before),
            difference(after, ends(last, -1)) if last else '',
            str(len(arm.seeds())),
        ]))
        last = arm
    return lines


# -----------------------------------------------------------------------------
# Pictures

def training_curve(arm):
    """(steps, mean training losses) over the finished runs of an Arm."""
    by_step = {}
    for seed in arm.seeds():
        for record in read_log(arm.runs[seed]['out_dir']):
            if 'train_loss' in record:
                by_step.setdefault(record['step'], []).append(record['train_loss'])
    steps = sorted(by_step)
    return steps, [statistics.mean(by_step[step]) for step in steps]


def plain_ticks(axis):
    """Numbers such as 3 and 20 on a logarithmic axis."""
    from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter
    axis.set_major_locator(FixedLocator([3, 4, 5, 6, 8, 10, 15, 20, 30, 50]))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(ScalarFormatter())


def draw_layers(arms, whole, path):
    """Losses before and after training, a line per arm, and the training losses."""
    page = figure(12, 4)
    ladder, curves = page.subplots(1, 2)
    for n, (name, arm) in enumerate(arms.items()):
        colour = f'C{n // 2}'  # one for each shape
        style = '--' if name.endswith('_random') else '-'
        before = statistics.mean(ends(arm, 0).values())
        after = list(ends(arm, -1).values())
        ladder.plot([before, statistics.mean(after)], [n, n], style, color=colour)
        ladder.plot(before, n, 'o', color=colour, markerfacecolor='white')
        ladder.plot(after, [n] * len(after), 'o', color=colour, alpha=0.6)
        curves.plot(*training_curve(arm), style, color=colour, label=name)
    ladder.axvline(whole['val_loss'], color='0.4', linestyle=':', label='whole network, not trained on')
    ladder.set_yticks(range(len(arms)), list(arms))
    ladder.invert_yaxis()
    ladder.set(xscale='log', xlabel='validation loss (nats per token): before (white) and after (each seed)')
    plain_ticks(ladder.xaxis)
    curves.set(xlabel='step', yscale='log', ylabel='training loss')
    plain_ticks(curves.yaxis)
    for axis in (ladder, curves):
        axis.grid(alpha=0.25, which='both', linewidth=0.5)
        axis.legend(fontsize=8)
    save(page, path)


def draw_lora(arms, path):
    """The loss against the rank, a point per seed, and the training losses."""
    page = figure(12, 4)
    ranks, curves = page.subplots(1, 2)
    found = by_rank(arms)
    means = []
    for n, (rank, arm) in enumerate(found.items()):
        after = list(ends(arm, -1).values())
        means.append(statistics.mean(after))
        ranks.plot([rank] * len(after), after, 'o', color=f'C{n}', alpha=0.7)
        curves.plot(*training_curve(arm), color=f'C{n}', label=f'rank {rank}')
    ranks.plot(list(found), means, '-', color='0.4')
    before = statistics.mean(ends(next(iter(found.values())), 0).values())
    ranks.axhline(before, color='0.4', linestyle=':', label='no adapter')
    ranks.set_xscale('log', base=2)
    ranks.set_xticks(list(found), [str(rank) for rank in found])
    ranks.set_xticks(list(found), [str(rank) for rank in found])
    ranks.set(xlabel='rank', ylabel="validation loss of the assistant's tokens")
    curves.set(xlabel='step', ylabel='training loss')
    for axis in (ranks, curves):
        axis.grid(alpha=0.25)
        axis.legend(fontsize=8)
    save(page, path)


def write_report(s):
    """Write table.md and the pictures of what is finished, and print the table."""
    lines = []
    whole = {}
    kept = Path(s.out_dir, 'whole.json')
    if kept.exists():
        whole = json.loads(kept.read_text())
    if os.path.exists(f'{s.out_dir}/attention.csv'):
        lines += [*attention_table(s, whole), '']
    layers, adapters = finished(s, 'layers'), finished(s, 'lora')
    if layers and whole:
        lines += [*layers_table(s, layers, whole), '']
        draw_layers(at_best(s, layers), whole, f'{s.out_dir}/layers.png')
    if adapters:
        lines += [*lora_table(adapters), '']
        draw_lora(adapters, f'{s.out_dir}/lora.png')
    left = missing(s)
    lines.append(f'missing, {len(left)} runs: {", ".join(left) or "none"}')
    text = '\n'.join(lines)
    replace_text(f'{s.out_dir}/table.md', text + '\n')
    print(f'{text}\n\nwritten: {s.out_dir}/table.md and the pictures beside it')


# -----------------------------------------------------------------------------

def main():
    s = configure(Settings, sys.argv[1:])
    if s.report:
        write_report(s)
        return
    stories, chats = make_data(s)
    for n, seed in enumerate(s.seeds):
        train_layers(s, stories, seed, 'better' if n else 'first')
        train_adapters(s, chats, seed)
        if n == 0:
            measure_whole(s, stories)
            train_layers(s, stories, seed, 'other')
    write_report(s)


if __name__ == '__main__':
    run_main(main)
