"""
bench.py race: minnow, nanoGPT and nanochat train on the same text for the same time, or the same number of
tokens. One evaluator scores their networks on held-out documents, in bits per byte.

The time is that of the whole training process, from its start to its end. train.py --minutes keeps it by
itself. The number of steps of the others follows from a short run before each race, as a careful user would
choose it; this run is not counted. Preparing the text and training the tokenizers is not counted either.

nanochat trains its own tokenizer, nanoGPT reads the token files of prepare.py. The vocabulary has the same
size. Every round has another seed, for the weights and the order of the data, in each program.
"""
import importlib.util
import itertools
import json
import math
import os
import pickle
import random
import re
import shutil
import statistics
import sys
import tempfile
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

import sample
from batches import TokenFiles, read_meta
from checkpoint import read_json, read_records
from configurator import ROOT, UserError, pick_dtype
from features.study import bench_peers
from features.study.bench_prepare import source_texts
from features.study.measure import alternate, run, section
from tokenizer import load_tokenizer

LONGEST = 900  # characters of a document
HELD_OUT = 7  # one of this many sources' documents (a novel, a story) is held out, whole,
SCORED = 10 ** 6  # and about this many bytes of the held-out text are scored
ROW = 256  # tokens of a row that is scored

VOCAB_SIZE = 4096
# nanoGPT: the network of its README for a laptop, and one as wide and with as long a context as nanochat's
NANOGPT = {
    'nanoGPT': {'n_layer': 4, 'n_head': 4, 'n_embd': 128, 'block_size': 64, 'batch_size': 12},
    'nanoGPT, 256 wide': {'n_layer': 4, 'n_head': 4, 'n_embd': 256, 'block_size': 256, 'batch_size': 16},
}
NANOCHAT = {'depth': 4, 'max-seq-len': 256, 'device-batch-size': 16}  # 7.3M parameters, 4,096 tokens a step
# --quick
QUICK_VOCAB_SIZE = 320
QUICK_OURS = {'n_layer': 1, 'n_embd': 32, 'n_head': 2, 'block_size': 32, 'batch_size': 4, 'eval_iters': 1}
QUICK_NANOGPT = {'nanoGPT': {'n_layer': 1, 'n_head': 2, 'n_embd': 32, 'block_size': 32, 'batch_size': 4}}
QUICK_NANOCHAT = {'depth': 1, 'max-seq-len': 32, 'device-batch-size': 4}
QUICK_TOKENS = 1280

WARM_UP = 5  # steps of a short run that are not timed


def bench_race(s, device, machine):
    """Yield the sections of bench.py race: at equal time; with s.tokens also at equal tokens."""
    check_nanochat(s.nanochat)
    with tempfile.TemporaryDirectory() as folder:
        folder = os.path.realpath(folder)
        write_text(s, folder)
        sides = make_sides(s, folder, device)
        budgets = [{'minutes': s.minutes}]
        if s.tokens:
            budgets.append({'tokens': s.tokens})
        if s.quick:
            budgets = [{'tokens': QUICK_TOKENS}]
        for budget in budgets:
            arms = {}
            for name, side in sides.items():
                arms[name] = partial(turn, name, side, itertools.count(1), folder, **budget)
            samples = alternate(arms, s.rounds)
            given = ', '.join(f'{value:,g} {name}' for name, value in budget.items())
            vocab_size = QUICK_VOCAB_SIZE if s.quick else VOCAB_SIZE
            yield section(f'race: {given}, documents of at most {LONGEST} characters, V = {vocab_size:,}',
                          samples, leads(samples))


def check_nanochat(folder):
    """Raise UserError if a library is missing that nanochat imports."""
    needs = {'rustbpe': 'rustbpe', 'wandb': 'wandb', 'pyarrow': 'pyarrow', 'filelock': 'filelock',
             'requests': 'requests', 'yaml': 'pyyaml', 'jinja2': 'jinja2'}
    missing = [package for module, package in needs.items() if not importlib.util.find_spec(module)]
    if folder and missing:
        raise UserError(f'nanochat={folder}: needs libraries that are not installed: '
                        f'pip install {" ".join(missing)}')


def make_sides(s, folder, device):
    """{name: Ours, NanoGPT or Nanochat}, with their data sets written to `folder`."""
    vocab_size = QUICK_VOCAB_SIZE if s.quick else VOCAB_SIZE
    sides = {'ours': Ours(QUICK_OURS if s.quick else {}, vocab_size, folder, device)}
    if s.peer:
        for name, sizes in (QUICK_NANOGPT if s.quick else NANOGPT).items():
            sides[name] = NanoGPT(s.peer, sizes, folder, device)
    if s.nanochat:
        sizes = QUICK_NANOCHAT if s.quick else NANOCHAT
        sides['nanochat'] = Nanochat(os.path.abspath(s.nanochat), sizes, vocab_size, folder, device)
    return sides


def turn(name, side, seeds, folder, **budget):
    """Train a side with the next seed, score it, print a line, and return {metric: value}."""
    seed = next(seeds)
    trained = side.train(seed, **budget)
    figures = score(side, folder)
    figures |= {'seconds': trained.seconds, 'tokens': trained.tokens, 'peak memory, MiB': trained.peak}
    print(f'  {name}, seed {seed}: {figures["bits per byte"]:.4f} bits per byte, '
          f'{trained.seconds:.0f} s, {trained.tokens:,} tokens', flush=True)
    return figures


def leads(samples):
    """Lines with the bits per byte of every side, and those of the others less ours, round by round."""
    lines = []
    for metric in (IN_ROWS, ALONE):
        ours = samples['ours'][metric]
        for name in samples:
            found = samples[name][metric]
            line = f'{metric}: {name} {statistics.median(found):.4f} ({min(found):.4f} to {max(found):.4f})'
            if name != 'ours':
                more = [other - own for own, other in zip(ours, found, strict=True)]
                line += f', {statistics.median(more):+.4f} ({min(more):+.4f} to {max(more):+.4f})'
            lines.append(line)
    return lines


# -----------------------------------------------------------------------------
# Text

def write_text(s, folder):
    """
    Write seen.jsonl, which the programs may use as they like, and held_out.jsonl to `folder`: the documents
    of the sources s.text in pieces.
    """
    texts = source_texts(s)
    held_out = texts[HELD_OUT - 1::HELD_OUT]
    if not held_out:
        raise UserError(f'text={", ".join(s.text)}: has {len(texts)} documents: the race holds out one in '
                        f'{HELD_OUT}: give more files')
    seen = [piece for n, text in enumerate(texts) if n % HELD_OUT != HELD_OUT - 1 for piece in pieces(text)]
    random.Random(0).shuffle(seen)
    write_documents(os.path.join(folder, 'seen.jsonl'), seen)
    scored = [piece for text in held_out for piece in pieces(text)]
    size = sum(len(piece.encode()) for piece in scored)
    write_documents(os.path.join(folder, 'held_out.jsonl'), scored[::max(1, round(size / SCORED))])


def pieces(text):
    """A text in pieces of at most LONGEST characters, cut behind white space; blank ones are left out."""
    found = []
    start = 0
    while start < len(text):
        end = start + LONGEST
        if end < len(text):
            end = 1 + max(text.rfind(' ', start, end), text.rfind('\n', start, end)) or end
        found.append(text[start:end])
        start = end
    return [piece for piece in found if not piece.isspace()]


def write_documents(path, texts):
    with open(path, 'w') as f:
        for text in texts:
            f.write(json.dumps({'text': text}) + '\n')


def read_documents(path):
    with open(path) as f:
        return [json.loads(line)['text'] for line in f]


# -----------------------------------------------------------------------------
# The programs, as their users run them

@dataclass
class Trained:
    """A finished run: seconds of its whole process, tokens that it trained on, peak memory in MiB."""
    seconds: float
    tokens: int
    peak: float


class Ours:
    """train.py --minutes; at equal tokens, the network that it chose for these minutes."""

    def __init__(self, sizes, vocab_size, folder, device):
        self.sizes = dict(sizes)  # of the network, at equal tokens
        self.device = device
        self.data = os.path.join(folder, 'data')
        self.place = os.path.join(folder, 'ours')
        self.cache = os.path.join(folder, 'compiled')
        run([sys.executable, os.path.join(ROOT, 'prepare.py'), os.path.join(folder, 'seen.jsonl'),
             f'--tokenizer=bpe:{vocab_size}', f'--out={self.data}'])

    def train(self, seed, minutes=0, tokens=0):
        """The Trained of a run."""
        shutil.rmtree(self.place, ignore_errors=True)
        settings = {'dataset': self.data, 'out_dir': self.place, 'seed': seed, 'device': self.device}
        settings |= {'minutes': minutes} if minutes else {'tokens': tokens, **self.sizes}
        command = [sys.executable, os.path.join(ROOT, 'train.py')]
        command += [f'--{key}={value}' for key, value in settings.items()]
        _, seconds, peak = run(command, self.device, env={'TORCHINDUCTOR_CACHE_DIR': self.cache})
        chosen = read_json(os.path.join(self.place, 'settings.json'))
        self.sizes = {key: chosen[key] for key in ('n_layer', 'n_embd', 'n_head', 'block_size')}
        *_, last = read_records(os.path.join(self.place, 'log.jsonl'))
        return Trained(seconds, last['tokens'], peak)

    @staticmethod
    def load(place, folder, peer):
        """
        (the network, a function of tokens (B, T) that returns logits (B, T, V), longest T, encode(text),
        decode(ids), the token between documents) of a run.
        """
        model, tokenizer = sample.load(place, 'last')
        return model, model, model.cfg.block_size, tokenizer.encode, tokenizer.decode, tokenizer.eot


class Peer:
    """
    Another program. Its number of steps for some minutes follows from a short run. A subclass has `folder`
    (its clone), `tokens` (of a step), `time` (a regular expression of a step's milliseconds in its output),
    and command(seed, steps) -> (code of a Python program that trains, variables).
    """
    is_compiled = False  # whether its compiled code is on disk

    def __init__(self, peer, sizes, tokens, folder, device):
        self.folder = peer
        self.sizes = sizes
        self.tokens = tokens
        self.cache = os.path.join(folder, 'compiled')
        self.device = device

    def train(self, seed, minutes=0, tokens=0):
        """The Trained of a run."""
        steps = self.steps_within(60 * minutes, seed) if minutes else max(1, round(tokens / self.tokens))
        _, seconds, peak = self.run(seed, steps)
        return Trained(seconds, steps * self.tokens, peak)

    def steps_within(self, seconds, seed):
        """The number of steps with which the whole process takes this many seconds, by a short run."""
        if not self.is_compiled:
            self.run(seed, 2)  # the first run compiles, the others read what it wrote
            self.is_compiled = True
        count = WARM_UP + max(20, 100_000 // self.tokens)
        lines, took, _ = self.run(seed, count)
        times = [float(found[1]) / 1000 for _, line in lines if (found := re.match(self.time, line))]
        step = statistics.median(times[WARM_UP:])
        before = took - step * count  # it starts, compiles, and saves
        if before + step > seconds:
            raise UserError(f'minutes={seconds / 60:g}: {self.folder} needs {before:.0f} s before it trains: '
                            'give more minutes')
        return int((seconds - before) / step)

    def run(self, seed, steps):
        """(lines, seconds, peak memory) of a run with this many steps, as of measure.run()."""
        code, variables = self.command(seed, steps)
        return run([sys.executable, '-c', code], self.device, cwd=self.folder,
                   env={'TORCHINDUCTOR_CACHE_DIR': self.cache, **variables})


# runs a script whose seed is a constant with another seed
SEEDED = """import runpy, sys, torch
plant = torch.manual_seed
torch.manual_seed = lambda _: plant({seed})
torch.cuda.manual_seed = lambda _: None
sys.argv = {argv!r}
runpy.{run}"""


class NanoGPT(Peer):
    """nanoGPT's train.py, with its config for Shakespeare and its README's options for a laptop."""
    time = r'iter \d+: .*time ([\d.]+)ms'

    def __init__(self, peer, sizes, folder, device):
        super().__init__(peer, sizes, sizes['batch_size'] * sizes['block_size'], folder, device)
        self.place = os.path.join(folder, 'nanogpt')
        self.data = os.path.join(folder, 'nanogpt_data')
        if not os.path.exists(self.data):
            os.makedirs(self.data)
            for split in ('train', 'val'):
                files = TokenFiles(os.path.join(folder, 'data'), split)
                tokens = files.read(0, files.tokens).astype(np.uint16)
                tokens.tofile(os.path.join(self.data, f'{split}.bin'))
            with open(os.path.join(self.data, 'meta.pkl'), 'wb') as f:
                pickle.dump({'vocab_size': files.vocab_size}, f)

    def command(self, seed, steps):
        settings = self.sizes | {
            'dataset': self.data,
            'out_dir': self.place,
            'device': self.device,
            'compile': self.device.type == 'cuda',
            'dropout': 0.0,
            'max_iters': steps,
            'lr_decay_iters': steps,
            'eval_interval': steps,  # its checkpoint is written after an evaluation
            'eval_iters': 1,
            'always_save_checkpoint': True,
            'log_interval': 1,
        }
        argv = ['train.py', 'config/train_shakespeare_char.py']
        argv += [f'--{key}={value}' for key, value in settings.items()]
        return SEEDED.format(seed=seed, argv=argv, run='run_path("train.py", run_name="__main__")'), {}

    @staticmethod
    def load(place, folder, peer):
        """As Ours.load()."""
        stored = torch.load(os.path.join(place, 'ckpt.pt'), map_location='cpu', weights_only=True)
        model = bench_peers.network(peer, stored['model_args'])
        model.load_state_dict({key.removeprefix('_orig_mod.'): t for key, t in stored['model'].items()})
        data = os.path.join(folder, 'data')
        tokenizer = load_tokenizer(read_meta(data)['tokenizer'], data)

        def logits(x):
            return model(x, x)[0]  # without targets, it returns those of the last position alone
        return model, logits, model.config.block_size, tokenizer.encode, tokenizer.decode, tokenizer.eot


class Nanochat(Peer):
    """nanochat's scripts.base_train with the options of its runs/runcpu.sh, and its own tokenizer."""
    time = r'step \d+/\d+ .*dt: ([\d.]+)ms'

    def __init__(self, peer, sizes, vocab_size, folder, device):
        super().__init__(peer, sizes, sizes['device-batch-size'] * sizes['max-seq-len'], folder, device)
        self.place = os.path.join(folder, 'nanochat')
        self.variables = {'NANOCHAT_BASE_DIR': self.place, 'NANOCHAT_DTYPE': pick_dtype('auto', device)}
        self.documents = {split: documents_of(os.path.join(folder, 'data'), split)
                          for split in ('train', 'val')}
        self.write(seed=0)
        run([sys.executable, '-m', 'scripts.tok_train', f'--vocab-size={vocab_size}'], cwd=peer,
            env=self.variables)

    def write(self, seed):
        """
        Write the documents in an order of this seed, as it reads them in the files' order. The last file is
        its validation split.
        """
        import pyarrow
        import pyarrow.parquet
        folder = os.path.join(self.place, 'base_data_climbmix')
        os.makedirs(folder, exist_ok=True)
        for number, documents in enumerate(self.documents.values()):
            documents = random.Random(seed).sample(documents, len(documents))
            pyarrow.parquet.write_table(pyarrow.table({'text': documents}),
                                        os.path.join(folder, f'shard_{number:05d}.parquet'),
                                        row_group_size=1024)

    def train(self, seed, minutes=0, tokens=0):
        self.write(seed)
        return super().train(seed, minutes, tokens)

    def command(self, seed, steps):
        shutil.rmtree(os.path.join(self.place, 'base_checkpoints'), ignore_errors=True)
        settings = self.sizes | {
            'head-dim': 64,
            'window-pattern': 'L',
            'total-batch-size': self.tokens,
            'num-iterations': steps,
            'device-type': self.device.type,
            'eval-every': -1,
            'core-metric-every': -1,
            'sample-every': -1,
            'model-tag': 'race',
        }
        argv = ['base_train'] + [f'--{key}={value}' for key, value in settings.items()]
        call = 'run_module("scripts.base_train", run_name="__main__", alter_sys=True)'
        return SEEDED.format(seed=seed, argv=argv, run=call), self.variables

    @staticmethod
    def load(place, folder, peer):
        """As Ours.load()."""
        os.environ['NANOCHAT_BASE_DIR'] = place
        os.environ['NANOCHAT_DTYPE'] = 'float32'
        sys.path.insert(0, peer)
        from nanochat.checkpoint_manager import load_model
        model, tokenizer, _ = load_model('base', torch.device('cpu'), 'eval', model_tag='race')
        context = model.config.sequence_len
        return model, model, context, tokenizer.encode, tokenizer.decode, tokenizer.get_bos_token_id()


def documents_of(data, split):
    """The texts of a prepared data set."""
    tokenizer = load_tokenizer(read_meta(data)['tokenizer'], data)
    files = TokenFiles(data, split)
    texts = []
    for number in range(files.documents):
        start, end = files.document(number)
        texts.append(tokenizer.decode(files.read(start, end - start - 1).tolist()))
    return texts


# -----------------------------------------------------------------------------
# The evaluator, the same for all

IN_ROWS = 'bits per byte'
ALONE = 'bits per byte, each document alone'


def score(side, folder):
    """{metric: value} of the network that a side has trained, computed in a process of its own."""
    call = (f'import sys; sys.path.insert(0, {ROOT!r}); from features.study import bench_race; '
            f'bench_race.print_score({type(side).__name__!r}, {side.place!r}, {folder!r}, '
            f'{getattr(side, "folder", "")!r})')
    lines, _, _ = run([sys.executable, '-c', call])
    return json.loads(lines[-1][1])


def print_score(kind, place, folder, peer):
    """
    Print {metric: value} of a trained network as JSON, on the held-out documents. Every token of the text is
    predicted once; the ends of documents are not. In float32, on the CPU.

    The documents are scored in two ways: one behind the other, with the token between documents before each,
    in rows of ROW tokens, so that a row begins anywhere; and each in rows of its own, from its beginning. A
    network with a shorter context gets rows of that.
    """
    model, logits, context, encode, decode, between = globals()[kind].load(place, folder, peer)
    texts = read_documents(os.path.join(folder, 'held_out.jsonl'))
    documents = []
    for text in texts:
        ids = list(encode(text))
        if decode(ids) != text:
            raise UserError(f'{place}: its tokenizer does not keep the text {text[:40]!r}: leave it out')
        documents.append([between, *ids])
    size = sum(len(text.encode()) for text in texts)
    context = min(ROW, context)
    in_rows = rows_of([token for ids in documents for token in ids], context)
    alone = [row for ids in documents for row in rows_of(ids, context)]
    result = {}
    for metric, rows in ((IN_ROWS, in_rows), (ALONE, alone)):
        result[metric] = nats_of(logits, rows, context, between) / math.log(2) / size
    result['bytes a token'] = size / (sum(map(len, documents)) - len(documents))
    result['parameters'] = sum(p.numel() for p in model.parameters())
    print('\n' + json.dumps(result), flush=True)


def rows_of(ids, context):
    """Token ids in rows of up to context + 1; the last token of a row is the first one of the next."""
    return [ids[at:at + context + 1] for at in range(0, len(ids) - 1, context)]


@torch.inference_mode()
def nats_of(logits, rows, context, between, batch=16):
    """
    Summed nats of the tokens of rows (lists of up to context + 1 tokens), each token predicted from those
    before it in its row. The first tokens of rows, and all that are `between`, are not predicted.
    """
    total = 0.0
    for at in range(0, len(rows), batch):
        some = rows[at:at + batch]
        table = torch.full((len(some), context + 1), between)
        for row, ids in zip(table, some, strict=True):
            row[:len(ids)] = torch.tensor(ids)
        x = table[:, :-1].contiguous()  # (B, T)
        y = table[:, 1:].contiguous()
        nats = F.cross_entropy(logits(x).float().flatten(0, 1), y.flatten(), reduction='none')
        total += nats[y.flatten() != between].double().sum().item()
    return total
