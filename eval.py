"""
How good a model is.

    python eval.py loss --out_dir=out/tinystories_cpu              # nats per token and bits per byte of a checkpoint, on the whole validation split
    python eval.py text --out_dir=out/tinystories_cpu FILE.txt     # the same and the perplexity of any text
    python eval.py tasks --out_dir=hf:FOLDER lambada.jsonl piqa.jsonl                   # zero- and few-shot tasks from files (tasks.py)
    python eval.py harness --out_dir=hf:FOLDER --tasks=lambada_openai,arc_easy          # those of lm-evaluation-harness
    python eval.py summaries --out_dir=out/pairs dev.jsonl --source=source --target=target     # ROUGE of what it writes (summaries.py);
                                                                       # without a file, for its own validation pairs
    python eval.py ladder --dataset=tinystories                    # from uniform guesses over counts to a transformer, on the same tokens

`python eval.py loss --help` prints the settings of one of them.
"""
import math
import os
from dataclasses import dataclass, field, fields, replace
from typing import Literal

os.environ['GOMP_SPINCOUNT'] = os.environ.get('GOMP_SPINCOUNT', '1000')  # before torch is loaded, see train.py

import numpy as np
import torch

import checkpoint
import sample
from batches import TokenFiles, batch_loss, find_folder, losses
from checkpoint import load_model
from configurator import FilePath, UserError, configure_command, run_main, typed_text
from device import NOT_FINITE, DeviceConfig, NumericConfig, compile_all, pick_compile, pick_device, pick_exact_dtype
from features.lora.sampling import add_adapters
from features.markov import ngrams
from features.study import harness, summaries, tasks
from features.study.pictures import figure, save, write_csv
from features.study.sweep import expand, read_sweep, run_missing
from features.study.validation import validation_sources
from features.text.sources import check_template

# -----------------------------------------------------------------------------
# The loss of a checkpoint

@dataclass
class LossSettings(DeviceConfig):
    out_dir: FilePath = 'out'  # a training run, or one of its checkpoints
    which: Literal['best', 'last'] = 'best'  # checkpoint of out_dir: the one with the lowest validation loss, or the newest
    dataset: FilePath = ''  # name under data/, or a folder, prepared with the same tokenizer; '' = what the run was trained on


def row_losses(folder, dataset, s):
    """{data set: (Source, nats, targets)} of a checkpoint on every row of the validation split; nats and targets: (rows,)."""
    device = pick_device(s.device)
    (model, _), dtype = load_model(folder, encoder=True), pick_exact_dtype(s.dtype, device)
    model.to(device)
    if pick_compile(s.compile, device):
        compile_all([model])
    out = {}
    for source in validation_sources(folder, model.cfg, dataset):
        with torch.no_grad():
            pairs = []
            for row in range(source.rows):
                loss, count = batch_loss(model, source, [row], 1, device, dtype)
                pairs.append((loss.item(), count))
        nats, targets = np.array(pairs).T
        if not np.isfinite(nats).all():
            row = int(np.isfinite(nats).argmin())
            raise UserError(f'{folder}: its loss on row {row} of {source.name} is {nats[row]}: {NOT_FINITE}')
        out[source.name] = source, nats, targets
    return out


BLOCKS = 32  # contiguous parts of a split, for the error of its loss


def loss_and_error(nats, targets):
    """
    (nats per token, its standard error) from the sums of consecutive rows or tokens, by batch means: BLOCKS contiguous parts of the split
    are taken as independent. Rows are not, those of one document are alike: the error of unigrams on stdlib is 0.014 by rows of 256, 0.028
    by documents, 0.026 by parts. With fewer documents than parts it is still too small. No .idx is needed. Of a single part it is None.
    """
    starts = np.unique(np.linspace(0, len(nats), BLOCKS, endpoint=False).astype(int))
    nats, targets = np.add.reduceat(nats, starts), np.add.reduceat(targets, starts)
    mean = nats.sum() / targets.sum()
    parts = np.count_nonzero(targets)
    if parts < 2:
        return mean, None
    apart = nats - mean * targets
    return mean, math.sqrt(apart @ apart * parts / (parts - 1)) / targets.sum()


def show_loss(s):
    """python eval.py loss"""
    folder = checkpoint.find(s.out_dir, s.which)
    for name, (source, nats, targets) in row_losses(folder, s.dataset, s).items():
        mean, error = loss_and_error(nats, targets)
        bits = losses(mean, 1, source.bytes_per_token()).get('val_bpb')
        dtype = pick_exact_dtype(s.dtype, pick_device(s.device))
        print(f'{folder}: {name}, all {int(targets.sum()):,} targets of its validation split, in {dtype}\n'
              f'    {mean:.4f} nats a token ± {tasks.show_error(error)} (standard error: {min(BLOCKS, len(nats))} parts)'
              + (f', {bits:.4f} bits per byte' if bits else ''))
        cut = source.too_long()
        if cut:
            print(f'    {cut}')


# -----------------------------------------------------------------------------
# Texts and tasks

@dataclass
class ModelSettings(NumericConfig):  # no compile: rows of every length would be compiled anew
    out_dir: FilePath = 'out'  # a training run, one of its checkpoints, hf:FOLDER or gpt2
    which: Literal['best', 'last'] = 'best'  # checkpoint of a run
    adapter: FilePath = ''  # a low-rank adapter beside it: a run of train.py --lora_rank, or a folder of PEFT's

    def load(self, encoder=False):
        """(model on its device, tokenizer, device, dtype); encoder as origin.read_model() has it."""
        device = pick_device(self.device)
        model, tokenizer = sample.load(self.out_dir, self.which, encoder)
        if self.adapter:
            [(_, tokenizer)] = add_adapters(model, tokenizer, [self.adapter], self.out_dir)
        if model.cfg.arch == 'markov':
            raise UserError(f'out_dir={self.out_dir}: a Markov chain reads one token: eval.py loss is for it')
        dtype = pick_exact_dtype(self.dtype, device)
        print(f'device: {device}, {dtype}', flush=True)
        return model.to(device), tokenizer, device, dtype


@dataclass
class TextSettings(ModelSettings):
    files: list[FilePath] = field(default_factory=list)  # texts, UTF-8
    stride: int = 0  # tokens that are predicted from one window; 0 = half of what the network reads: every token has the other half before it

    positional = 'files'

    def check(self):
        """Raise ValueError for values that cannot work."""
        if not self.files:
            raise ValueError('files: none is given: python eval.py text --out_dir=DIR FILE.txt')
        if self.stride < 0:
            raise ValueError(f'stride={self.stride}: must not be negative')


@dataclass
class TaskSettings(ModelSettings):
    files: list[FilePath] = field(default_factory=list)  # tasks, JSONL in one of the shapes of tasks.py
    shots: int = 0  # solved examples before each item, from the same file
    delimiter: str = ' '  # between a query and its choices; a task of Mosaic's shape takes the words that go
    # there, '\nAnswer: '; typed as start of sample.py: \n is a new line
    limit: int = 0  # of each task the first so many items; 0 = all
    seed: int = 1337  # of the examples
    csv: FilePath = ''  # file for what became of every item

    positional = 'files'

    def check(self):
        """Raise ValueError for values that cannot work."""
        if not self.files:
            raise ValueError('files: none is given: python eval.py tasks --out_dir=DIR FILE.jsonl')
        typed_text(self.delimiter, 'delimiter')
        if self.shots < 0 or self.limit < 0:
            raise ValueError(f'shots={self.shots}, limit={self.limit}: must not be negative')


@dataclass
class HarnessSettings(ModelSettings):
    tasks: str = ''  # names of lm-eval's tasks, with commas
    shots: int | None = None  # None = as each task has it
    limit: int = 0  # of each task the first so many items; 0 = all
    include: FilePath = ''  # folder of tasks of your own, YAML

    def check(self):
        """Raise ValueError for values that cannot work."""
        if not self.tasks:
            raise ValueError('tasks: none is given: --tasks=lambada_openai,arc_easy; lm-eval ls tasks shows them')
        if (self.shots or 0) < 0 or self.limit < 0:
            raise ValueError(f'shots={self.shots}, limit={self.limit}: must not be negative')


@dataclass
class SummarySettings(ModelSettings):
    files: list[FilePath] = field(default_factory=list)  # pairs, JSONL; none = the validation pairs that the run was trained beside
    source: str = 'source'  # the field with what is read
    prompt_template: str = ''  # in place of it, as in prepare.py: \n is a new line
    target: str = 'target'  # the one with what people wrote, a text or a list of them
    max_new_tokens: int = 100  # of each text
    num_beams: int = 0  # hypotheses of a beam search; 0 = greedy, in batches
    batch_size: int = 16
    stripped: bool = False  # rougeL as ROT5 reports it too, without stop-words
    show: int = 3  # texts printed beside their reference
    limit: int = 0  # of each file the first so many pairs; 0 = all
    csv: FilePath = ''  # file for all texts and their scores

    positional = 'files'

    def check(self):
        """Raise ValueError for values that cannot work."""
        check_template(self.prompt_template)
        for name, least in (('max_new_tokens', 1), ('batch_size', 1), ('num_beams', 0), ('show', 0), ('limit', 0)):
            if getattr(self, name) < least:
                raise ValueError(f'{name}={getattr(self, name)}: takes {least} or more')


def show_summaries(s):
    """python eval.py summaries"""
    if s.csv in s.files:
        raise UserError(f'csv={s.csv}: is a file of pairs: give another')
    score = summaries.scorer(s.stripped)  # found missing before anything is written
    loaded = {path: summaries.read_pairs(path, s.source, s.target, s.prompt_template) for path in s.files}
    model, tokenizer, device, dtype = s.load(encoder=True)
    if not loaded:
        loaded = {source.files.folder: summaries.stored_pairs(source.files, tokenizer) for source in validation_sources(s.out_dir, model.cfg)}
    if s.max_new_tokens >= model.cfg.block_size:
        raise UserError(f'max_new_tokens={s.max_new_tokens}: the network writes up to {model.cfg.block_size - 1}: lower it')
    rows = []
    for path, pairs in loaded.items():
        pairs = pairs[:s.limit or None]
        texts = summaries.write(model, tokenizer, [pair.source for pair in pairs], s.max_new_tokens, s.num_beams, s.batch_size, device, dtype, path)
        scores = [score(text, pair.references) for text, pair in zip(texts, pairs)]
        for pair, text in [*zip(pairs, texts)][:s.show]:
            print(f'source     {" ".join(pair.source.split())[:300]}\nreference  {pair.references[0]}\nwritten    {text}\n')
        shown = {name: tasks.mean_and_error([100 * found[name] for found in scores]) for name in scores[0]}
        measures = [f'{name} {mean:.2f} ± {tasks.show_error(error, 2)}' for name, (mean, error) in shown.items()]
        print(f'{os.path.basename(path)}  {len(pairs):,} texts  ' + '  '.join(measures), flush=True)
        rows += [{'file': path, 'item': n, 'written': text, 'reference': pair.references[0], 'source': pair.source} | found
                 for n, (pair, text, found) in enumerate(zip(pairs, texts, scores))]
    if s.csv:
        write_csv(rows, s.csv)
        print(f'written: {s.csv}')


def show_texts(s):
    """python eval.py text"""
    texts = {path: sample.read_text(path) for path in s.files}
    for path, text in texts.items():
        if not text:
            raise UserError(f'{path}: is empty')
    model, tokenizer, device, dtype = s.load()
    T = model.cfg.block_size
    stride = s.stride or max(1, T // 2)
    if stride > T:
        raise UserError(f'stride={stride}: the network reads {T} tokens: lower it')
    for path, text in texts.items():
        nats, tokens, size = tasks.score_text(model, tokenizer, text, stride, device, dtype, path)
        print(f'{path}: {tokens:,} tokens, {size:,} bytes: {nats / tokens:.4f} nats a token, perplexity {math.exp(min(700, nats / tokens)):.2f}, '
              f'{nats / math.log(2) / size:.4f} bits per byte')


def show_tasks(s):
    """python eval.py tasks"""
    if s.csv in s.files:
        raise UserError(f'csv={s.csv}: is a task: give another file')
    delimiter = typed_text(s.delimiter, 'delimiter')
    loaded = {}
    for path in s.files:
        items = tasks.with_shots(tasks.read_items(path, delimiter), s.shots, s.seed)
        loaded[path] = items[:s.limit or None]
    model, tokenizer, device, dtype = s.load()
    rows, width = [], max(len(os.path.basename(path)) for path in s.files)
    print(f'{s.out_dir}, {s.shots} examples before each item; ± is the standard error\n')
    for path, items in loaded.items():
        measures, records = tasks.figures(items, tasks.score_items(model, tokenizer, items, device, dtype, what=path))
        shown = '  '.join(f'{name} {value:.4f} ± {tasks.show_error(error)}' for name, (value, error) in measures.items())
        print(f'{os.path.basename(path):{width}}  {len(items):6,} items  {shown}', flush=True)
        rows += [{'task': path} | dict.fromkeys(('acc', 'acc_norm', 'chosen', 'gold', 'nats'), '') | record for record in records]
    if s.csv:
        write_csv(rows, s.csv)
        print(f'written: {s.csv}')


def show_harness(s):
    """python eval.py harness"""
    model, tokenizer, device, dtype = s.load()
    results = harness.evaluate(model, tokenizer, s.tasks.split(','), s.shots, s.limit, device, dtype, s.include)
    print(harness.table(results))


# -----------------------------------------------------------------------------
# The ladder: what each step from guessing to a transformer is worth

RANKS = (4, 16, 64, 256)  # of bigrams from the SVD of the counts
COLOURS = {'counts': 'C0', 'SVD of the counts': 'C2', 'gradient': 'C1', 'limit': 'C3'}


@dataclass
class LadderSettings(DeviceConfig):
    dataset: FilePath = 'stdlib'  # name under data/, or a folder
    sweep: FilePath = 'config/sweeps/ladder.py'  # the models that are trained, those not there yet first; '' = only what is counted
    out: FilePath = ''  # folder of their runs; '' = out/ladder/NAME
    picture: FilePath = 'auto'  # where to draw; '' = nowhere, auto = ladder.png in that folder


@dataclass
class Rung:
    """A model and its loss on the validation split, in nats per token."""
    name: str
    kind: str  # one of COLOURS
    loss: float
    error: float | None = 0.0  # standard error

    def bits(self, files):
        """Bits per byte of text, None where `files` do not know their bytes."""
        return losses(self.loss, 1, files.bytes / files.tokens).get('val_bpb')


def count_rungs(train, val, vocab_size):
    """(rungs below a bigram, bigrams, rungs above): models in closed form. Their smoothing is chosen on the last tenth of `train`."""
    def rung(name, nats, kind='counts'):
        return Rung(name, kind, *loss_and_error(nats, np.ones(len(nats))))
    below = [rung('uniform', np.full(len(val) - 1, math.log(vocab_size))), rung('unigram', ngrams.tuned(ngrams.unigram, train, val, vocab_size)[0])]
    interpolated, k = ngrams.tuned(ngrams.interpolated_bigram, train, val, vocab_size)
    bigrams = [rung('bigram, add k', ngrams.tuned(ngrams.bigram, train, val, vocab_size)[0]), rung('bigram, interpolated', interpolated)]
    ranks = [rank for rank in RANKS if 16 * rank <= vocab_size <= 8192]  # a table of that size fits, and the rank is low
    if ranks:
        by_rank = ngrams.low_rank_bigrams(train, val, vocab_size, k, ranks)
        below += [rung(f'bigram, rank {rank}, SVD', by_rank[rank], 'SVD of the counts') for rank in ranks]
    return below, bigrams, [rung(f'Kneser–Ney, {n} tokens', ngrams.kneser_ney(train, val, vocab_size, n)) for n in (3, 5)]


def plan_training(s, files):
    """The Sweep of the trained rungs, for this data set: arms of a rank that its vocabulary has not are left out; without max_iters, one pass over the data."""
    sweep, arms = read_sweep(s.sweep), {}
    if not isinstance(sweep.base, dict) or not {'block_size', 'batch_size'} <= sweep.base.keys():
        raise UserError(f'{s.sweep}: base: the ladder takes a dict of settings with block_size and batch_size')
    for name, arm in sweep.arms.items():
        if isinstance(arm, list):
            raise UserError(f'{s.sweep}: arms: {name}: the ladder takes one dict of settings: write an arm for each')
        given = {'gradient_accumulation_steps': 1} | sweep.base | arm
        for key in ('rank_embed', 'block_size', 'batch_size', 'gradient_accumulation_steps', 'max_iters'):
            if isinstance(given.get(key), list):
                raise UserError(f'{s.sweep}: arms: {name}: {key}={given[key]}: the ladder takes one value: write an arm for each')
        if given.get('rank_embed', 0) < files.vocab_size:
            tokens = given['block_size'] * given['batch_size'] * given['gradient_accumulation_steps']  # of a step
            steps = given.get('max_iters', -(-(files.tokens - 1) // tokens))
            arms[name] = {'max_iters': steps, 'eval_interval': steps} | arm
    machine = {f.name: getattr(s, f.name) for f in fields(DeviceConfig)}
    return replace(sweep, base=machine | sweep.base | {'dataset': s.dataset}, arms=arms, out=s.out)


def trained_rungs(sweep, s, wanted):
    """(bigrams, the others): trained where they are not yet, then evaluated at the end of their training, on all its `wanted` targets."""
    run_missing(sweep)
    bigrams, others = [], []
    for run in expand(sweep):
        (_, nats, targets), = row_losses(checkpoint.find(run.out_dir, 'last'), s.dataset, s).values()
        if targets.sum() != wanted:
            raise UserError(f'{s.sweep}: packing={run.settings.packing} leaves out some targets of the validation split: use packing=stream')
        name = run.name.removesuffix(',seed=1')
        group, name = (bigrams, f'{name}, gradient') if run.settings.arch == 'markov' else (others, name)
        group.append(Rung(name.replace('_', ' '), 'gradient', *loss_and_error(nats, targets)))
    return bigrams, others


def ladder_table(rungs, files, entropy):
    """The rungs, a line each, and with the entropy of the source how far each is above it."""
    width = max(len(rung.name) for rung in rungs)
    lines = [f'{"":{width}}  nats/token    s.e.  bits/byte' + '  above the entropy' * bool(entropy)]
    for rung in rungs:
        bits = rung.bits(files)
        lines.append(f'{rung.name:{width}}  {rung.loss:10.4f}  {tasks.show_error(rung.error):>6}  ' + (f'{bits:9.4f}' if bits else '        -')
                     + (f'  {rung.loss / entropy - 1:17.2%}' if entropy else ''))
    return '\n'.join(lines)


def draw_ladder(rungs, files, title, path):
    """A bar for each rung, in order."""
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


def ladder(s):
    """python eval.py ladder"""
    files = {split: TokenFiles(find_folder(s.dataset), split) for split in ('train', 'val')}
    name = os.path.basename(os.path.normpath(s.dataset))
    s.out = s.out or os.path.join('out', 'ladder', name)
    sweep = plan_training(s, files['train']) if s.sweep else None  # what is wrong with it shows at once
    trained_bigrams, others = trained_rungs(sweep, s, files['val'].tokens - 1) if sweep else ([], [])
    train, val = (f.read(0, f.tokens) for f in files.values())
    below, bigrams, above = count_rungs(train, val, files['val'].vocab_size)
    entropy = files['val'].meta.get('entropy')
    limit = [Rung('entropy of the source', 'limit', entropy)] if entropy else []
    rungs = below + trained_bigrams + bigrams + above + others + limit
    print(f'{name}: {len(train):,} tokens to learn from, {len(val) - 1:,} to predict, a vocabulary of {files["val"].vocab_size:,}\n')
    print(ladder_table(rungs, files['val'], entropy))
    if s.picture:
        path = os.path.join(s.out, 'ladder.png') if s.picture == 'auto' else s.picture
        draw_ladder(rungs, files['val'], f'{name}: {len(val) - 1:,} validation tokens', path)
        print(f'\ndrawn: {path}')


# -----------------------------------------------------------------------------

def main():
    function, s = configure_command({'loss': (show_loss, LossSettings), 'text': (show_texts, TextSettings), 'tasks': (show_tasks, TaskSettings),
                                     'harness': (show_harness, HarnessSettings), 'summaries': (show_summaries, SummarySettings),
                                     'ladder': (ladder, LadderSettings)})
    function(s)


if __name__ == '__main__':
    run_main(main)
