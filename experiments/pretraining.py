"""
What is it worth to an encoder-decoder, before it learns from a few pairs, to have been pretrained by UL2's denoisers? Two tasks: abstracts of papers to
the sentence that sums them up (SciTLDR, Cachola et al. 2020, arXiv 2004.15011), and functions of Python's standard library to the first line
of their docstring. On each, random weights and pretrained ones learn from the same pairs, with the best of the same rates; what they write for texts that
they have not seen is held against what people wrote, and beside them stands what takes no training: the first sentence, the function's name.

    python experiments/pretraining.py --pairs=scitldr_train.jsonl --dev=scitldr_dev.jsonl --text=pubmed_abstracts.jsonl --jobs=2

Pretraining sees the sources of the training pairs and --text, never a target, nor anything of the dev set; the functions are parted by their files.
All settings are those of train.py, config/rot5_cpu.py the defaults, max_iters that of pretraining. Runs that are in out_dir are not made again.
"""
import json
import os
import re
import statistics
import sys
from dataclasses import dataclass, field, fields
from hashlib import sha256
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import prepare
import train
from checkpoint import replace_text, replacing
from compare import mean_and_error, paired_values, plus_minus, tuned
from configurator import FilePath, UserError, configure, run_main
from device import pick_device, pick_dtype
from features.study import summaries
from features.study.pictures import write_csv
from features.text.pairs import PAIR
from features.text.reader import Reader
from features.text.sources import find_files
from sample import load

ROOT = Path(__file__).parent.parent
RATES = ('muon_lr', 'embed_lr', 'head_lr', 'scalar_lr')


@dataclass
class Settings(train.Settings):
    pairs: FilePath = ''  # JSONL with "source" and "target": abstracts to learn from,
    dev: FilePath = ''  # and others to be judged by
    text: list[FilePath] = field(default_factory=list)  # more to pretrain on, JSONL with "text"
    tokenizer: FilePath = 'bpe:4096'  # made for all of it, as in prepare.py
    tuning_iters: int = 400  # steps on pairs
    scales: list[float] = field(default_factory=lambda: [1.0, 0.3, 0.1])  # of all rates, those of pretraining being 1, tried on pairs with the first seed
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3])
    limit: int = 0  # texts of a dev set; 0 = all
    jobs: int = 1  # runs at a time


@dataclass
class Task:
    """A kind of pairs. dev: what it is judged by; simple: a function of a source → what one would write without having learned anything."""
    name: str
    dev: list[summaries.Pair]
    block_size: int  # tokens of a target
    simple_name: str
    simple: object


# -----------------------------------------------------------------------------
# Data

def functions_by_file():
    """{file of the standard library: [{'source', 'target'}] of its functions}."""
    found, reader = {}, Reader(find_files(['stdlib_docstrings']), prepare.Settings())
    for where, text in (document for task in reader.tasks(None) for document in task.documents):
        name = os.path.relpath(where.rsplit(':', 1)[0], os.path.dirname(os.__file__))
        found.setdefault(name, []).append(dict(zip(('source', 'target'), text.split(PAIR))))
    return found


def functions():
    """(pairs to learn from, pairs to be judged by), a tenth of the files. A function that is in files of both is to learn from; two alike are one."""
    sides = {}, {}
    for name, rows in functions_by_file().items():
        sides[sha256(name.encode()).digest()[0] < 26].update((row['source'], row) for row in rows)
    learned, judged = sides
    return [*learned.values()], [row for source, row in judged.items() if source not in learned]


def write_lines(rows, path):
    """Rows as JSONL, whole or not at all."""
    with replacing(path) as f:
        f.writelines(json.dumps(row) + '\n' for row in rows)


def make_data(s):
    """{data set: folder}: 'text' to pretrain on, and the pairs of both tasks, all with one tokenizer; and the Tasks."""
    folder = f'{s.out_dir}/data'
    os.makedirs(folder, exist_ok=True)
    abstracts = [{'source': pair.source, 'target': pair.references[0]} for pair in summaries.read_pairs(s.pairs, 'source', 'target')]
    learned, judged = functions()
    if not os.path.exists(f'{folder}/text.jsonl'):
        extra = [pair.source for path in s.text for pair in summaries.read_pairs(path, 'text', 'text')]
        write_lines([{'text': text} for text in [row['source'] for row in abstracts + learned] + extra], f'{folder}/text.jsonl')
    sets = {'text': f'{folder}/text'}
    prepare.prepare(prepare.Settings([f'{folder}/text.jsonl'], out=sets['text'], tokenizer=s.tokenizer, reserve=100, val_fraction=0.05))
    for name, rows in (('abstracts', abstracts), ('functions', learned)):
        sets[name], path = f'{folder}/{name}', f'{folder}/{name}.jsonl'
        if not os.path.exists(path):
            write_lines(rows, path)
        prepare.prepare(prepare.Settings([path], out=sets[name], tokenizer=f'{sets["text"]}/tokenizer.model', reserve=100, source='source', target='target',
                                         val_fraction=0.1))
    dev = summaries.read_pairs(s.dev, 'source', 'target')
    code = [summaries.Pair(row['source'], [row['target']]) for row in judged]
    return sets, [Task('abstracts', dev[:s.limit or None], 64, 'its first sentence', lambda text: re.split(r'(?<=[.!?])\s', text.strip())[0]),
                  Task('functions', code[:s.limit or None], 32, "the function's name", lambda text: ' '.join(re.search(r'def (\w+)', text)[1].split('_')))]


# -----------------------------------------------------------------------------
# Texts

def write_texts(run, task, s):
    """What the best checkpoint of a run writes for the dev set, [text]; kept beside it."""
    kept = Path(run['out_dir'], 'dev.json')
    if kept.exists() and len(texts := json.loads(kept.read_text(encoding='utf-8'))) == len(task.dev):
        return texts
    device = pick_device(s.device)
    model, tokenizer = load(run['out_dir'], encoder=True)
    texts = summaries.write(model.to(device), tokenizer, [pair.source for pair in task.dev], task.block_size - 1, 0, 32, device, pick_dtype(s.dtype, device),
                            task.name)
    replace_text(kept, json.dumps(texts))
    return texts


def rouge(texts, task, score):
    """100 times the mean rougeL."""
    return 100 * statistics.mean(score(text, pair.references)['rougeL'] for text, pair in zip(texts, task.dev))


def in_points(mean, error):
    return f'{mean:.2f}' + (f' ± {error:.2f}' if error is not None else '')


def judge(s, task, arms):
    """(lines of a markdown table, samples, rows for a CSV) of a task's arms."""
    score = summaries.scorer()
    texts = {name: {seed: write_texts(run, task, s) for seed, run in sorted(arm.runs.items())} for name, arm in arms.items()}
    found = {name: {seed: rouge(each, task, score) for seed, each in seeds.items()} for name, seeds in texts.items()}
    simple = [task.simple(pair.source) for pair in task.dev]
    lines = [f'| {task.name} | {task.simple_name} | | | {rouge(simple, task, score):.2f} | |']
    for name, arm in arms.items():
        difference = ''
        if name != 'none':
            mean, width, _ = paired_values(found[name], found['none'])
            difference = f'{mean:+.2f}' + (f' [{mean - width:+.2f}, {mean + width:+.2f}]' if width else '')
        scale = arm.swept['muon_lr'] / s.muon_lr
        lines.append(f'| {task.name} | {name} | {scale:g} | {plus_minus(*mean_and_error(arm.last("val_loss").values()))} '
                     f'| {in_points(*mean_and_error(found[name].values()))} | {difference} |')
    first = s.seeds[0]
    shown = [f'{" ".join(pair.source.split())[:400]}\n    people   {pair.references[0]}\n'
             + '\n'.join(f'    {name:8} {each[first][n]}' for name, each in texts.items()) for n, pair in enumerate(task.dev[:5])]
    rows = [{'task': task.name, 'item': n, 'arm': name, 'seed': seed, 'written': each[n], 'reference': pair.references[0], 'source': pair.source}
            for n, pair in enumerate(task.dev) for name, seeds in texts.items() for seed, each in seeds.items()]
    return lines, shown, rows


# -----------------------------------------------------------------------------

def main():
    s = configure(Settings, [str(ROOT / 'config' / 'rot5_cpu.py'), '--out_dir=out/pretraining', *sys.argv[1:]])
    if not (s.pairs and s.dev):
        raise UserError('pairs, dev: give two files of abstracts with the sentences that sum them up: --pairs=train.jsonl --dev=dev.jsonl')
    own = {f.name for f in fields(Settings)} - {f.name for f in fields(train.Settings)} | {'out_dir', 'seed', 'dataset'}
    base = {name: getattr(s, name) for name in s.given if name not in own}
    sets, tasks = make_data(s)
    pretrained = tuned(base, lambda seed: {'pretrained': {'dataset': sets['text']}}, [{}], s.seeds, s.out_dir, s.jobs)['pretrained']
    lines, shown, rows = ['| task | what it starts from | rates | loss | rougeL | minus none [95%] |', '|---' * 6 + '|'], [], []
    for task in tasks:
        on_pairs = base | {'dataset': sets[task.name], 'objective': 'seq2seq', 'block_size': task.block_size, 'max_iters': s.tuning_iters,
                           'eval_interval': s.tuning_iters // 4, 'eval_iters': 0}
        arms = tuned(on_pairs, lambda seed: {'none': {}, 'ul2': {'init_from': pretrained.runs[seed]['out_dir']}},
                     [{rate: scale * getattr(s, rate) for rate in RATES} for scale in s.scales], s.seeds, f'{s.out_dir}/{task.name}', s.jobs)
        more = judge(s, task, arms)
        lines, shown, rows = lines + more[0], shown + more[1], rows + more[2]
    text = '\n'.join(lines)
    replace_text(f'{s.out_dir}/table.md', text + '\n')
    write_csv(rows, f'{s.out_dir}/texts.csv')
    print('\n\n'.join([*shown, text, f'written: {s.out_dir}/table.md, {s.out_dir}/texts.csv']))


if __name__ == '__main__':
    run_main(main)
