"""
What do adapters give up, and what do they keep? A network of English novels is adapted to small children's stories and to Python code: by training all
of its weights; by adapters of several ranks; of one rank beside attention alone, and beside embeddings and head too; by rsLoRA and by DoRA. Each arm has
rates of its own, tried on the first seed, with more where the best is at the edge; each seed has a base of its own. Asked are the loss on the new text,
that on novels (what was forgotten: Biderman et al. 2024, arXiv 2405.09673), the trained parameters, the seconds, and how low the rank of what full
training changes really is.

    python experiments/adapting.py --novels=FOLDER --stories=tinystories.jsonl --jobs=2

All settings but learning_rate and seed are those of train.py, config/lora_code.py the defaults; base_config has those of the bases. Runs that are in
out_dir are not made again.
"""
import json
import statistics
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import checkpoint
import prepare
import train
from checkpoint import replace_text
from compare import find_runs, mean_and_error, paired, paired_values, plus_minus, read_run, tuned
from configurator import FilePath, UserError, configure, run_main
from eval import row_losses
from features.lora.settings import LoraConfig
from features.study.pictures import figure, save
from features.study.spectra import measure, merged_model

ROOT = Path(__file__).parent.parent
SHARES = (1, 4, 16, 64)  # ranks of which it is said how much of what full training changes they could hold


@dataclass
class Settings(train.Settings):
    novels: FilePath = ''  # a folder of texts for the bases
    stories: FilePath = ''  # JSONL of TinyStories; the code is Python's standard library
    ranks_tried: list[int] = field(default_factory=lambda: [1, 4, 16, 64])  # beside attention and MLP
    base_config: FilePath = 'config/novels_cpu.py'  # of the bases
    rates: list[float] = field(default_factory=lambda: [3e-4, 1e-3, 3e-3])  # of all weights; adapters begin with ten times these
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3])
    jobs: int = 1  # runs at a time


def make_data(s):
    """{'novels', 'stories', 'code': folder}, all with the tokenizer of the novels."""
    folders = {name: f'{s.out_dir}/data/{name}' for name in ('novels', 'stories', 'code')}
    prepare.prepare(prepare.Settings([s.novels], out=folders['novels'], tokenizer='bpe:4096'))
    for name, source, share in (('stories', s.stories, 0.05), ('code', 'stdlib', 0.02)):
        prepare.prepare(prepare.Settings([source], out=folders[name], tokenizer=f'{folders["novels"]}/tokenizer.model', val_fraction=share))
    return folders


def adapters(s):
    """{arm: its settings} of those with adapters."""
    one = {f.name: getattr(s, f.name) for f in fields(LoraConfig) if f.name in s.given}
    return {f'r{rank}': one | {'lora_rank': rank} for rank in s.ranks_tried} | {
        'attention': one | {'lora_targets': 'attn'},
        'everywhere': one | {'lora_targets': 'attn,mlp,embed,head'},
        'rs': one | {'lora_rank': max(s.ranks_tried), 'lora_rs': True},
        'dora': one | {'lora_dora': True},
    }


# -----------------------------------------------------------------------------
# What came of it

def old_loss(out_dir, novels, s):
    """Nats per token on novels of the last checkpoint of a run; kept beside it."""
    kept = Path(out_dir, 'novels.json')
    if not kept.exists():
        (_, nats, targets), = row_losses(checkpoint.find(out_dir, 'last'), novels, s).values()
        replace_text(kept, json.dumps(nats.sum() / targets.sum()))
    return json.loads(kept.read_text())


def table(name, arms, bases, novels, s):
    """Lines of a markdown table: a corpus' arms."""
    full = arms['full']
    before = {seed: old_loss(run['out_dir'], novels, s) for seed, run in bases.runs.items()}
    pace = {arm: statistics.median(a.last('seconds').values()) / s.max_iters for arm, a in arms.items()}
    lines = [f'| {name} | the base | | | {plus_minus(*mean_and_error(r["val"][0]["val_loss"] for r in full.runs.values()))} | '
             f'| {plus_minus(*mean_and_error(before.values()))} | | |']
    for arm, a in arms.items():
        mean, width, _ = paired(a, full)
        after = {seed: old_loss(a.runs[seed]['out_dir'], novels, s) for seed in sorted(a.seeds())}
        lost, lost_width, _ = paired_values(after, before)
        lines.append(f'| {name} | {arm} | {next(iter(a.runs.values()))["trained"]:,} | {a.swept["learning_rate"]:g} '
                     f'| {plus_minus(*mean_and_error(a.last("val_loss").values()))} | {"" if a is full else interval(mean, width)} '
                     f'| {plus_minus(*mean_and_error(after.values()))} | {interval(lost, lost_width)} | {pace[arm] / pace["full"]:.2f} |')
    return lines


def interval(mean, width):
    return f'{mean:+.3f}' + (f' [{mean - width:+.3f}, {mean + width:+.3f}]' if width else '')


def changes(name, full, bases):
    """Lines of a markdown table: how much of the energy of what full training changed the largest singular values have; medians over blocks and seeds."""
    found = {}
    for seed, run in full.runs.items():
        for record in measure(merged_model(run['out_dir'])[0], merged_model(bases.runs[seed]['out_dir'])[0]):
            if '.qk' not in record['name'] and '.ov' not in record['name']:
                found.setdefault(record['kind'], []).append(record)
    lines = []
    for kind, records in found.items():
        def share(key, rank):
            return statistics.median((r[key][:rank].square().sum() / r[key].square().sum()).item() for r in records)
        cells = [f'{share("s", rank):.2f} ({share("null", rank):.2f})' for rank in SHARES]
        lines.append(f'| {name} | {kind} | {records[0]["rows"]} x {records[0]["cols"]} | {" | ".join(cells)} '
                     f'| {statistics.median(r["rank_90"] for r in records):g} ({records[0]["null_rank_90"]}) |')
    return lines


def draw(studies, novels, s, path):
    """For each corpus: the loss against the trained parameters, and what was learned against what was forgotten, a line of the first seed's rates an arm."""
    page = figure(6 * len(studies), 9)
    axes = page.subplots(2, len(studies), squeeze=False)
    for (name, (arms, folder)), top, bottom in zip(studies.items(), *axes):
        points = {}
        for run in map(read_run, find_runs([f'{folder}/*,seed={s.seeds[0]}'])):
            if run['state'] == 'done':
                rate = run['settings'].learning_rate
                points.setdefault(Path(run['out_dir']).name.split(',')[0], []).append(
                    (rate, run['val'][-1]['val_loss'], old_loss(run['out_dir'], novels, s)))
        for n, (arm, a) in enumerate(arms.items()):
            mean, error = mean_and_error(a.last('val_loss').values())
            top.errorbar(next(iter(a.runs.values()))['trained'], mean, error, marker='o', capsize=3, color=f'C{n}', label=arm)
            _, new, old = zip(*sorted(points[arm]))
            bottom.plot(new, old, 'o-', color=f'C{n}', markersize=4, label=arm)
        low = min(a.loss for a in arms.values())
        old = [sorted((new, old) for _, new, old in tried)[0][1] for tried in points.values()]  # at the best rates; those that diverged lie above
        top.set(title=name, xscale='log', xlabel='trained parameters', ylabel='loss on it (nats per token)')
        bottom.set(xlabel='loss on it: learned', ylabel='loss on novels: forgotten', xlim=(low - 0.05, low + 1.0),
                   ylim=(min(old) - 0.5, max(old) + 0.2))
        for axis in (top, bottom):
            axis.grid(alpha=0.25)
            axis.legend(fontsize=8, ncols=2)
    save(page, path)


# -----------------------------------------------------------------------------

def main():
    s = configure(Settings, [str(ROOT / 'config' / 'lora_code.py'), '--out_dir=out/adapting', *sys.argv[1:]])
    if not (s.novels and s.stories):
        raise UserError('novels, stories: give a folder of texts and a file of stories: --novels=FOLDER --stories=tinystories.jsonl')
    shared = {f.name for f in fields(train.Settings)} - {f.name for f in fields(LoraConfig)} - {'out_dir', 'seed', 'dataset', 'init_from', 'learning_rate'}
    base = {name: getattr(s, name) for name in s.given if name in shared}
    sets = make_data(s)
    bases = tuned(s.base_config, lambda seed: {'base': {'dataset': sets['novels']}}, [{}], s.seeds, f'{s.out_dir}/bases', s.jobs)['base']
    heads = [['corpus', 'arm', 'trained', 'rate', 'loss', 'minus full [95%]', 'loss on novels', 'minus base [95%]', 'seconds / full'],
             ['corpus', 'matrix', 'shape', *(f'{rank}' for rank in SHARES), 'rank of 90%']]
    lines = [[f'| {" | ".join(head)} |', '|---' * len(head) + '|'] for head in heads]
    studies = {}
    for name in ('stories', 'code'):
        folder, arms = f'{s.out_dir}/{name}', {}
        for some, times in (({'full': {}}, 1), (adapters(s), 10)):
            arms |= tuned(base | {'dataset': sets[name]}, lambda seed: {arm: a | {'init_from': bases.runs[seed]['out_dir']} for arm, a in some.items()},
                          [{'learning_rate': times * rate} for rate in s.rates], s.seeds, folder, s.jobs)
        lines[0] += table(name, arms, bases, sets['novels'], s)
        lines[1] += changes(name, arms['full'], bases)
        studies[name] = arms, folder
    text = '\n'.join([*lines[0], '', *lines[1]])
    replace_text(f'{s.out_dir}/table.md', text + '\n')
    draw(studies, sets['novels'], s, f'{s.out_dir}/adapting.png')
    print(f'{text}\n\nwritten: {s.out_dir}/table.md, {s.out_dir}/adapting.png')


if __name__ == '__main__':
    run_main(main)
