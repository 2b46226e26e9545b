r"""
Does it help an encoder-decoder that learns from a few pairs to have been pretrained by UL2's denoisers? Two
tasks: abstracts of papers to the sentence that sums them up (SciTLDR, Cachola et al. 2020, arXiv 2004.15011),
and functions of Python's standard library to the first line of their docstring. On each task, random and
pretrained weights learn from the same pairs, with the best of the same learning rates. The texts that they
write for unseen sources are compared with those that people wrote; beside them stand texts that take no
training: the first sentence, the function's name.

    python experiments/pretraining.py --pairs=scitldr_train.jsonl --dev=scitldr_dev.jsonl \
        --text=pubmed_abstracts.jsonl --jobs=2

Pretraining sees the sources of the training pairs and --text, but no target and nothing of the dev set. The
functions are divided by their files. All settings are those of train.py, with config/rot5_cpu.py as defaults;
max_iters is that of pretraining. Runs that are in out_dir are not made again.
"""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
import features  # noqa: I001 — first: your random.py or data/ then hides no module of ours or of a library
if __name__ == '__main__':
    features.start(__file__)

import json
import re
import statistics
from dataclasses import dataclass, field, fields
from hashlib import sha256
from pathlib import Path

import prepare
import train
from checkpoint import replace_text, replacing
from configurator import FilePath, UserError, configure, pick_device, pick_dtype, run_main
from features.study import summaries
from features.study.pictures import write_csv
from features.study.stats import mean_and_error, paired_difference, show_interval, show_mean
from features.study.tuning import tuned
from features.text.pairs import PAIR
from features.text.reader import Reader
from features.text.settings import TextConfig
from features.text.sources import find_files
from sample import load

ROOT = Path(__file__).parent.parent
RATES = ('muon_lr', 'embed_lr', 'head_lr', 'scalar_lr')


@dataclass
class Settings(train.Settings):
    pairs: FilePath = ''  # JSONL with "source" and "target": abstracts to learn from
    dev: FilePath = ''  # the same: abstracts to be judged by
    text: list[FilePath] = field(default_factory=list)  # more to pretrain on, JSONL with "text"
    tokenizer: FilePath = 'bpe:4096'  # made for all of it, as in prepare.py
    tuning_iters: int = 400  # steps on pairs
    scales: list[float] = field(default_factory=lambda: [1.0, 0.3, 0.1])  # of pretraining's learning rates,
    # for pairs
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3])  # the first one tries all scales
    limit: int = 0  # texts of a dev set; 0 = all
    jobs: int = 1  # runs at a time


@dataclass
class Task:
    """A kind of pairs, and the Pairs by which it is judged."""
    name: str
    dev: list[summaries.Pair]
    block_size: int  # tokens of a target
    simple_name: str  # of the text that takes no training
    simple: object  # a function of a source that returns that text


# -----------------------------------------------------------------------------
# Data

def functions_by_file():
    """{file of the standard library: [{'source', 'target'}] of its functions}."""
    reader = Reader(find_files(['stdlib_docstrings']), TextConfig())
    found = {}
    for task in reader.tasks(None):
        for where, text in task.documents:
            path = where.rsplit(':', 1)[0]
            name = os.path.relpath(path, os.path.dirname(os.__file__))
            source, target = text.split(PAIR)
            found.setdefault(name, []).append({'source': source, 'target': target})
    return found


def functions():
    """
    (pairs to learn from, pairs to be judged by: those of a tenth of the files). Of equal functions one is
    kept; one that is in files of both sides is to learn from.
    """
    learned = {}  # {source: pair}
    judged = {}
    for name, rows in functions_by_file().items():
        is_judged = sha256(name.encode()).digest()[0] < 26
        side = judged if is_judged else learned
        for row in rows:
            side[row['source']] = row
    return list(learned.values()), [row for source, row in judged.items() if source not in learned]


def write_lines(rows, path):
    """Write rows as JSONL, all of them or no file."""
    with replacing(path) as f:
        f.writelines(json.dumps(row) + '\n' for row in rows)


def make_data(s):
    """
    ({data set: folder}, [the Tasks]): 'text' to pretrain on, and the pairs of both tasks, all with one
    tokenizer.
    """
    folder = f'{s.out_dir}/data'
    os.makedirs(folder, exist_ok=True)
    abstracts = []
    for pair in summaries.read_pairs(s.pairs, 'source', 'target'):
        abstracts.append({'source': pair.source, 'target': pair.references[0]})
    learned, judged = functions()
    sets = {'text': f'{folder}/text'}
    if not os.path.exists(f'{folder}/text.jsonl'):
        texts = [row['source'] for row in abstracts + learned]
        for path in s.text:
            texts += [pair.source for pair in summaries.read_pairs(path, 'text', 'text')]
        write_lines([{'text': text} for text in texts], f'{folder}/text.jsonl')
    settings = TextConfig([f'{folder}/text.jsonl'], out=sets['text'], tokenizer=s.tokenizer,
                          reserve=100, val_fraction=0.05)
    prepare.prepare(settings)
    for name, rows in (('abstracts', abstracts), ('functions', learned)):
        sets[name] = f'{folder}/{name}'
        path = f'{folder}/{name}.jsonl'
        if not os.path.exists(path):
            write_lines(rows, path)
        settings = TextConfig([path], out=sets[name], tokenizer=f'{sets["text"]}/tokenizer.model',
                              reserve=100, source='source', target='target', val_fraction=0.1)
        prepare.prepare(settings)
    dev = summaries.read_pairs(s.dev, 'source', 'target')
    code = [summaries.Pair(row['source'], [row['target']]) for row in judged]
    return sets, [
        Task('abstracts', dev[:s.limit or None], 64, 'its first sentence', first_sentence),
        Task('functions', code[:s.limit or None], 32, "the function's name", function_name),
    ]


def first_sentence(text):
    return re.split(r'(?<=[.!?])\s', text.strip())[0]


def function_name(code):
    """The words of the name of a function."""
    name = re.search(r'def (\w+)', code)[1]
    return ' '.join(name.split('_'))


# -----------------------------------------------------------------------------
# Texts

def write_texts(run, task, s):
    """[text] that the best checkpoint of a run writes for the dev set; kept in its folder."""
    kept = Path(run['out_dir'], 'dev.json')
    if kept.exists():
        texts = json.loads(kept.read_text(encoding='utf-8'))
        if len(texts) == len(task.dev):
            return texts
    device = pick_device(s.device)
    dtype = pick_dtype(s.dtype, device)
    model, tokenizer = load(run['out_dir'], encoder=True)
    sources = [pair.source for pair in task.dev]
    texts = summaries.write(model.to(device), tokenizer, sources, task.block_size - 1, 0, 32, device, dtype,
                            task.name)
    replace_text(kept, json.dumps(texts))
    return texts


def rouge(texts, task, score):
    """
    100 times the mean rougeL of a text for each pair of the dev set; score: as summaries.scorer() returns it.
    """
    return 100 * statistics.mean(score(text, pair.references)['rougeL']
                                 for text, pair in zip(texts, task.dev))


def markdown(cells):
    """A line of a markdown table."""
    return f'| {" | ".join(cells)} |'


def judge(s, task, arms):
    """(lines of a markdown table, samples as text, rows for a csv file) of a task's arms."""
    score = summaries.scorer()
    texts = {}  # {arm: {seed: [text]}}
    found = {}  # {arm: {seed: rougeL}}
    for name, arm in arms.items():
        texts[name] = {seed: write_texts(run, task, s) for seed, run in sorted(arm.runs.items())}
        found[name] = {seed: rouge(each, task, score) for seed, each in texts[name].items()}
    simple = [task.simple(pair.source) for pair in task.dev]
    lines = [markdown([task.name, task.simple_name, '', '', f'{rouge(simple, task, score):.2f}', ''])]
    for name, arm in arms.items():
        difference = ''
        if name != 'none':
            mean, width, _ = paired_difference(found[name], found['none'])
            difference = show_interval(mean, width, 2)
        lines.append(markdown([
            task.name,
            name,
            f'{arm.swept["muon_lr"] / s.muon_lr:g}',
            show_mean(*mean_and_error(arm.last('val_loss').values())),
            show_mean(*mean_and_error(found[name].values()), 2),
            difference,
        ]))
    return lines, samples(task, texts, s.seeds[0]), csv_rows(task, texts)


def samples(task, texts, seed):
    """The first five sources with the texts of people and of each arm, with this seed, a text each."""
    shown = []
    for n, pair in enumerate(task.dev[:5]):
        lines = [' '.join(pair.source.split())[:400], f'    people   {pair.references[0]}']
        for name, seeds in texts.items():
            lines.append(f'    {name:8} {seeds[seed][n]}')
        shown.append('\n'.join(lines))
    return shown


def csv_rows(task, texts):
    """A dict for each text that was written."""
    rows = []
    for n, pair in enumerate(task.dev):
        for name, seeds in texts.items():
            for seed, each in seeds.items():
                rows.append({'task': task.name, 'item': n, 'arm': name, 'seed': seed, 'written': each[n],
                             'reference': pair.references[0], 'source': pair.source})
    return rows


# -----------------------------------------------------------------------------

def main():
    s = configure(Settings,
                  [str(ROOT / 'config' / 'rot5_cpu.py'), '--out_dir=out/pretraining', *sys.argv[1:]])
    if not (s.pairs and s.dev):
        raise UserError('pairs, dev: give two files of abstracts with the sentences that sum them up: '
                        '--pairs=train.jsonl --dev=dev.jsonl')
    own = ({f.name for f in fields(Settings)} - {f.name for f in fields(train.Settings)}
           | {'out_dir', 'seed', 'dataset'})
    base = {name: getattr(s, name) for name in s.given if name not in own}
    sets, tasks = make_data(s)
    start = {'pretrained': {'dataset': sets['text']}}
    pretrained = tuned(base, lambda seed: start, [{}], s.seeds, s.out_dir, s.jobs)['pretrained']
    grid = [{rate: scale * getattr(s, rate) for rate in RATES} for scale in s.scales]

    def arms_of(seed):
        return {'none': {}, 'ul2': {'init_from': pretrained.runs[seed]['out_dir']}}

    heads = ['task', 'what it starts from', 'rates', 'loss', 'rougeL', 'minus none [95%]']
    lines = [markdown(heads), '|---' * len(heads) + '|']
    shown = []
    rows = []
    for task in tasks:
        on_pairs = base | {
            'dataset': sets[task.name],
            'objective': 'seq2seq',
            'block_size': task.block_size,
            'max_iters': s.tuning_iters,
            'eval_interval': s.tuning_iters // 4,
            'eval_iters': 0,
        }
        arms = tuned(on_pairs, arms_of, grid, s.seeds, f'{s.out_dir}/{task.name}', s.jobs)
        more_lines, more_shown, more_rows = judge(s, task, arms)
        lines += more_lines
        shown += more_shown
        rows += more_rows
    text = '\n'.join(lines)
    replace_text(f'{s.out_dir}/table.md', text + '\n')
    write_csv(rows, f'{s.out_dir}/texts.csv')
    print('\n\n'.join([*shown, text, f'written: {s.out_dir}/table.md, {s.out_dir}/texts.csv']))


if __name__ == '__main__':
    run_main(main)
