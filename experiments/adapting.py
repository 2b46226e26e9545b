"""
What do adapters give up, and what do they keep? A network of English novels is adapted to small children's
stories and to Python code: by training all of its weights; by adapters of several ranks; of one rank on
attention alone, and on embeddings and head too; by rsLoRA and by DoRA. Each arm has its own learning rates,
tried on the first seed, with more where the best is at the edge. Each seed has its own base. The study
reports the loss on the new text and on novels (what was forgotten: Biderman et al. 2024, arXiv 2405.09673),
the trained parameters, the seconds, and how low the rank of the change is that full training makes.

    python experiments/adapting.py --novels=FOLDER --stories=tinystories.jsonl --jobs=2

All settings but learning_rate and seed are those of train.py, with config/lora_code.py as defaults;
base_config has those of the bases. Runs that are in out_dir are not made again.
"""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
import features  # noqa: I001 — first: your random.py or data/ then hides no module of ours or of a library
if __name__ == '__main__':
    features.start(__file__)

import json
import statistics
from dataclasses import dataclass, field, fields
from pathlib import Path

import checkpoint
import prepare
import train
from checkpoint import replace_text
from configurator import FilePath, UserError, configure, run_main
from features.lora.settings import LoraConfig
from features.study.pictures import figure, save
from features.study.runs import find_runs, read_run
from features.study.spectra import measure, merged_model
from features.study.split_loss import row_losses
from features.study.stats import mean_and_error, paired_difference, show_interval, show_mean
from features.study.tuning import tuned

ROOT = Path(__file__).parent.parent
ADAPTER_SETTINGS = ['lora_rank', *[f.name for f in fields(LoraConfig)]]
SHARES = (1, 4, 16, 64)  # ranks: the table says which share of full training's change they can hold


@dataclass
class Settings(train.Settings):
    novels: FilePath = ''  # a folder of texts for the bases
    stories: FilePath = ''  # JSONL of TinyStories; the code is Python's standard library
    ranks_tried: list[int] = field(default_factory=lambda: [1, 4, 16, 64])  # on attention and MLP
    base_config: FilePath = 'config/novels_cpu.py'  # of the bases
    rates: list[float] = field(default_factory=lambda: [3e-4, 1e-3, 3e-3])  # of all weights; adapters: ten
    # times these
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3])
    jobs: int = 1  # runs at a time


def make_data(s):
    """{'novels', 'stories', 'code': folder} of prepared data sets, all with the tokenizer of the novels."""
    folders = {name: f'{s.out_dir}/data/{name}' for name in ('novels', 'stories', 'code')}
    prepare.prepare(prepare.Settings([s.novels], out=folders['novels'], tokenizer='bpe:4096'))
    tokenizer = f'{folders["novels"]}/tokenizer.model'
    for name, source, share in (('stories', s.stories, 0.05), ('code', 'stdlib', 0.02)):
        settings = prepare.Settings([source], out=folders[name], tokenizer=tokenizer, val_fraction=share)
        prepare.prepare(settings)
    return folders


def adapters(s):
    """{arm: its settings} of the arms with adapters."""
    given = {name: getattr(s, name) for name in ADAPTER_SETTINGS if name in s.given}
    arms = {f'r{rank}': given | {'lora_rank': rank} for rank in s.ranks_tried}
    arms['attention'] = given | {'lora_targets': 'attn'}
    arms['everywhere'] = given | {'lora_targets': 'attn,mlp,embed,head'}
    arms['rs'] = given | {'lora_rank': max(s.ranks_tried), 'lora_rs': True}
    arms['dora'] = given | {'lora_dora': True}
    return arms


# -----------------------------------------------------------------------------
# Tables

def old_loss(out_dir, novels, s):
    """Nats per token on the novels, of the last checkpoint of a run; kept in its folder."""
    kept = Path(out_dir, 'novels.json')
    if not kept.exists():
        [split] = row_losses(checkpoint.find(out_dir, 'last'), novels, s)
        replace_text(kept, json.dumps(split.nats.sum() / split.targets.sum()))
    return json.loads(kept.read_text())


def markdown(cells):
    """A line of a markdown table."""
    return f'| {" | ".join(cells)} |'


def table(name, arms, bases, novels, s):
    """Lines of a markdown table: the arms of the corpus `name`. novels: their data set."""
    full = arms['full']
    before = {seed: old_loss(run['out_dir'], novels, s) for seed, run in bases.runs.items()}
    pace = {arm: statistics.median(a.last('seconds').values()) / s.max_iters for arm, a in arms.items()}
    first_losses = [run['val'][0]['val_loss'] for run in full.runs.values()]
    lines = [markdown([name, 'the base', '', '', show_mean(*mean_and_error(first_losses)), '',
                       show_mean(*mean_and_error(before.values())), '', ''])]
    for arm, a in arms.items():
        run = next(iter(a.runs.values()))
        against_full = ''
        if a is not full:
            mean, width, _ = a.minus(full)
            against_full = show_interval(mean, width, 3)
        after = {seed: old_loss(a.runs[seed]['out_dir'], novels, s) for seed in sorted(a.seeds())}
        lost, lost_width, _ = paired_difference(after, before)
        lines.append(markdown([
            name,
            arm,
            f'{run["trained"]:,}',
            f'{a.swept["learning_rate"]:g}',
            show_mean(*mean_and_error(a.last('val_loss').values())),
            against_full,
            show_mean(*mean_and_error(after.values())),
            show_interval(lost, lost_width, 3),
            f'{pace[arm] / pace["full"]:.2f}',
        ]))
    return lines


def changes(name, full, bases):
    """
    Lines of a markdown table: which share of the energy of full training's change is in the largest singular
    values of each kind of matrix; medians over blocks and seeds, in brackets those of random matrices.
    """
    found = {}
    for seed, run in full.runs.items():
        after, _ = merged_model(run['out_dir'])
        before, _ = merged_model(bases.runs[seed]['out_dir'])
        for record in measure(after, before):
            if '.qk' not in record['name'] and '.ov' not in record['name']:
                found.setdefault(record['kind'], []).append(record)
    lines = []
    for kind, records in found.items():
        first = records[0]
        cells = [name, kind, f'{first["rows"]} x {first["cols"]}']
        for rank in SHARES:
            cells.append(f'{share(records, "s", rank):.2f} ({share(records, "null", rank):.2f})')
        cells.append(f'{statistics.median(r["rank_90"] for r in records):g} ({first["null_rank_90"]})')
        lines.append(markdown(cells))
    return lines


def share(records, key, rank):
    """
    Median share of the energy of singular values that the first `rank` of them have; key: 's' or 'null'.
    """
    shares = []
    for record in records:
        energy = record[key].square()
        shares.append((energy[:rank].sum() / energy.sum()).item())
    return statistics.median(shares)


# -----------------------------------------------------------------------------
# Picture

def draw(studies, novels, s, path):
    """
    Two panels per corpus: the loss against the trained parameters; and the loss on novels against the loss on
    the corpus, a line per arm over the learning rates of the first seed. studies: {corpus: (arms, folder of
    their runs)}.
    """
    page = figure(6 * len(studies), 9)
    axes = page.subplots(2, len(studies), squeeze=False)
    for n, (name, (arms, folder)) in enumerate(studies.items()):
        top = axes[0][n]
        bottom = axes[1][n]
        points = first_points(folder, novels, s)
        for m, (arm, a) in enumerate(arms.items()):
            mean, error = mean_and_error(a.last('val_loss').values())
            trained = next(iter(a.runs.values()))['trained']
            top.errorbar(trained, mean, error, marker='o', capsize=3, color=f'C{m}', label=arm)
            _, new, old = zip(*sorted(points[arm]))
            bottom.plot(new, old, 'o-', color=f'C{m}', markersize=4, label=arm)
        low = min(a.loss for a in arms.values())
        old = []  # at the best rate of each arm: runs that nearly diverged lie far above
        for tried in points.values():
            _, _, at_best = min(tried, key=lambda point: point[1:])
            old.append(at_best)
        top.set(title=name, xscale='log', xlabel='trained parameters', ylabel='loss on it (nats per token)')
        bottom.set(xlabel='loss on it: learned', ylabel='loss on novels: forgotten',
                   xlim=(low - 0.05, low + 1.0), ylim=(min(old) - 0.5, max(old) + 0.2))
        for axis in (top, bottom):
            axis.grid(alpha=0.25)
            axis.legend(fontsize=8, ncols=2)
    save(page, path)


def first_points(folder, novels, s):
    """{arm: [(learning rate, loss, loss on novels)]} of the finished runs with the first seed."""
    points = {}
    for out_dir in find_runs([f'{folder}/*,seed={s.seeds[0]}']):
        run = read_run(out_dir)
        if run['state'] == 'done':
            arm = Path(out_dir).name.split(',')[0]
            point = run['settings'].learning_rate, run['val'][-1]['val_loss'], old_loss(out_dir, novels, s)
            points.setdefault(arm, []).append(point)
    return points


# -----------------------------------------------------------------------------
# The study

def tune_arms(s, base, folder, bases):
    """
    {arm: Arm} of a corpus, each at its best rate: full training and adapters. base: the settings of all of
    them.
    """
    def full(seed):
        return {'full': {'init_from': bases.runs[seed]['out_dir']}}

    def adapted(seed):
        start = {'init_from': bases.runs[seed]['out_dir']}
        return {arm: settings | start for arm, settings in adapters(s).items()}

    rates = [{'learning_rate': rate} for rate in s.rates]
    ten_times = [{'learning_rate': 10 * rate} for rate in s.rates]  # adapters take larger steps
    arms = tuned(base, full, rates, s.seeds, folder, s.jobs)
    return arms | tuned(base, adapted, ten_times, s.seeds, folder, s.jobs)


def main():
    s = configure(Settings, [str(ROOT / 'config' / 'lora_code.py'), '--out_dir=out/adapting', *sys.argv[1:]])
    if not (s.novels and s.stories):
        raise UserError('novels, stories: give a folder of texts and a file of stories: '
                        '--novels=FOLDER --stories=tinystories.jsonl')
    own = {f.name for f in fields(Settings)} - {f.name for f in fields(train.Settings)}  # of this study
    own |= {'out_dir', 'seed', 'dataset', 'init_from', 'learning_rate', *ADAPTER_SETTINGS}
    base = {name: getattr(s, name) for name in s.given if name not in own}
    sets = make_data(s)
    start = {'base': {'dataset': sets['novels']}}
    bases = tuned(s.base_config, lambda seed: start, [{}], s.seeds, f'{s.out_dir}/bases', s.jobs)['base']
    heads = ['corpus', 'arm', 'trained', 'rate', 'loss', 'minus full [95%]', 'loss on novels',
             'minus base [95%]', 'seconds / full']
    lines = [markdown(heads), '|---' * len(heads) + '|']
    heads = ['corpus', 'matrix', 'shape', *[str(rank) for rank in SHARES], 'rank of 90%']
    change_lines = [markdown(heads), '|---' * len(heads) + '|']
    studies = {}
    for name in ('stories', 'code'):
        folder = f'{s.out_dir}/{name}'
        arms = tune_arms(s, base | {'dataset': sets[name]}, folder, bases)
        lines += table(name, arms, bases, sets['novels'], s)
        change_lines += changes(name, arms['full'], bases)
        studies[name] = arms, folder
    text = '\n'.join([*lines, '', *change_lines])
    replace_text(f'{s.out_dir}/table.md', text + '\n')
    draw(studies, sets['novels'], s, f'{s.out_dir}/adapting.png')
    print(f'{text}\n\nwritten: {s.out_dir}/table.md, {s.out_dir}/adapting.png')


if __name__ == '__main__':
    run_main(main)
