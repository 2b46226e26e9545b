"""
Do two checkouts of minnow do the same, bit for bit? This script trains, resumes, samples, exports and
evaluates 29 kinds of small run (same_runs.txt) with the scripts of one checkout. It hashes everything that
they leave: tensors, token files, settings, logs, texts and tables.

    python experiments/same_runs.py OLD_TREE --out=hashes.json        # run every kind
    python experiments/same_runs.py NEW_TREE --against=hashes.json    # the same; print what differs, by kind
        --kinds=lora,moe                  # only these kinds and those that they need
        --without=rank_guide,wandb_log    # settings that were deleted on purpose: they are not compared
        --work=DIR                        # run in this new folder and keep it, to look at what differs

It takes 70 seconds on two free cores. Both trees must run on one machine, with the same Python and torch.
The wording of messages is not compared, only the numbers in them. Exit code 1: something differs or failed.
"""
import argparse
import csv
import gzip
import hashlib
import json
import multiprocessing
import os
import pickle
import random
import re
import runpy
import shlex
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from importlib import import_module
from pathlib import Path
from string import Template

import numpy as np
import torch
from safetensors.torch import load_file

# Fields of JSON and CSV files whose values change from run to run: only their presence is compared
VOLATILE = {
    'seconds', 'tokens_per_second', 'mfu',  # time and speed
    'peak_memory_bytes', 'memory_mib',  # memory
    'torch', 'transformers_version', 'peft_version',  # versions
    'job',  # the machine, and which of torchrun's jobs on it
}
# Files of which only the presence is compared: code that an export brings along, pictures, hashes of other
# files, what the runs of a sweep printed
UNREAD = {'.py', '.png', 'manifest.json', 'output.txt'}
# Lines of a script's output that tell a time, a speed or memory: their numbers are not compared
TIMED = re.compile(r'\b(s|seconds|minutes|MB|MiB)\b|/s\b')
NUMBER = re.compile(r'-?\d+\.\d+(?:e[-+]?\d+)?')
SHOWN = 20  # differences of a kind that are listed

# -----------------------------------------------------------------------------
# The runs

def read_runs(wanted):
    """{kind: (kinds that it needs, its lines)} of same_runs.txt. wanted: kinds; [] = all."""
    name, words, kinds = '', {}, {}
    text = Path(__file__).with_suffix('.txt').read_text()
    for line in re.sub(r' *\\\n *', ' ', text).splitlines():
        if line.startswith('    '):
            kinds[name][1].append(Template(line.strip()).substitute(words))
        elif ' = ' in line and not line.startswith('#'):
            word, _, value = line.partition(' = ')
            words[word] = Template(value).substitute(words)
        elif ':' in line and not line.startswith('#'):
            name, _, needs = line.partition(':')
            kinds[name] = (needs.split(), [])
    taken = set(wanted or kinds)
    for name in reversed(kinds):
        if name in taken:
            taken.update(kinds[name][0])
    return {name: kinds[name] for name in kinds if name in taken}


# -----------------------------------------------------------------------------
# Texts of invented words and other small files, the same on every machine

LOGITS = """
import sys, torch, transformers
for folder in sys.argv[1:]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code='custom' in folder)
    for value in model(torch.arange(30)[None] + 30).logits.flatten()[::97].tolist():
        print(f'{value:.9f}')
"""
SWEEP = """
base = {'dataset': 'prepare/tales', 'n_layer': 2, 'n_head': 2, 'n_embd': 32, 'block_size': 32,
        'batch_size': 4, 'max_iters': 6, 'eval_interval': 3, 'eval_iters': 2, 'sample_tokens': 0,
        'device': 'cpu', 'dtype': 'float32', 'compile': False}
arms = {'dense': {'learning_rate': [1e-3, 1e-2]}, 'low_rank': {'rank_qk': 4, 'learning_rate': 1e-2}}
budget = 'flops'
out = 'sweep/runs'
"""


def write_texts(work):
    rng = random.Random(1)
    words = [''.join(rng.choices('bdfgklmnprst', k=3)) + rng.choice('aeiou') for _ in range(100)]
    weights = [1 / (n + 1) for n in range(100)]

    def text(most):
        sentences = [rng.choices(words, weights, k=rng.randint(4, 9)) for _ in range(rng.randint(1, most))]
        return ' '.join(' '.join(sentence).capitalize() + '.' for sentence in sentences)

    def jsonl(rows):
        return ''.join(json.dumps(row) + '\n' for row in rows)

    songs = jsonl({'title': word, 'text': text(4)} for word in words)
    items = [{'query': text(2), 'choices': rng.sample(words, 3), 'gold': rng.randrange(3)} for _ in range(12)]
    (work / 'tales.jsonl').write_text(jsonl({'text': text(5)} for _ in range(300)))
    (work / 'songs.jsonl.gz').write_bytes(gzip.compress(songs.encode(), mtime=0))
    pairs = [{'source': text(2), 'target': rng.choice(words)} for _ in range(150)]
    (work / 'pairs.jsonl').write_text(jsonl(pairs))
    (work / 'task.jsonl').write_text(jsonl(items))
    (work / 'text.txt').write_text(text(30))
    (work / 'logits.py').write_text(LOGITS)
    (work / 'two.py').write_text(SWEEP)
    (work / 'poems').mkdir()
    for n in range(30):
        (work / 'poems' / f'{n:02d}.txt').write_text(text(9))
    (work / 'nanogpt').mkdir()  # a data folder as nanoGPT's prepare.py writes it
    for name, size in (('train', 3000), ('val', 600)):
        tokens = np.arange(size) ** 2 % 26
        (work / 'nanogpt' / f'{name}.bin').write_bytes(tokens.astype('<u2').tobytes())
    letters = dict(enumerate('abcdefghijklmnopqrstuvwxyz'))
    meta = {'vocab_size': 26, 'itos': letters, 'stoi': {c: n for n, c in letters.items()}}
    (work / 'nanogpt' / 'meta.pkl').write_bytes(pickle.dumps(meta))
    set_times(work)


def set_times(folder):
    """Give all files the same time: a data set remembers the times of its sources and its tokenizer."""
    for path in folder.rglob('*.*'):
        os.utime(path, (1e9, 1e9))


# -----------------------------------------------------------------------------
# Run. Two processes take a kind of run each. They fork for every command: torch is loaded already, so that it
# takes a third of the time of `python train.py`

FORK = multiprocessing.get_context('fork')
SPAWN = multiprocessing.get_context('spawn')


def run_script(words, folder, work, printed):
    """Do what `python WORDS` does with a script in `folder`. printed: files for stdout and stderr."""
    for number, path in enumerate(printed, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.chdir(work)
    sys.argv = words
    sys.path[0] = folder
    if words[0] == '-m':
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name='__main__', alter_sys=True)
    else:
        runpy.run_path(words[0], run_name='__main__')


class Kind:
    """One kind of run. found: {name: hash or short value}; failed: the commands that failed."""

    def __init__(self, name, tree, work):
        self.name, self.tree, self.work = name, tree, work
        self.found = {}
        self.failed = []
        self.count = 0  # of commands
        self.printed = [work / 'printed' / f'{name}.{stream}' for stream in ('out', 'err')]

    def run(self, line):
        """Run a line of same_runs.txt."""
        word, _, rest = line.partition(' ')
        if word == 'twice':
            self.run(rest + ' --max_iters=6')
            self.run(rest)
        elif word == 'killed':
            self.kill(rest)
            self.finish(rest, reads=False)  # it prints only the steps after the kill
        else:
            self.finish(line)

    def start(self, line):
        """The process of a command."""
        words = shlex.split(line.replace('TREE', str(self.tree)))
        word = words.pop(0) if words[0] in ('python', 'ranks', 'fails') else ''
        if words[0] == 'evaluate.py' and (self.tree / 'eval.py').exists():
            words[0] = 'eval.py'  # its newer name
        folder = self.work if word == 'python' else self.tree
        words[0] = str(folder / words[0])
        if word == 'ranks':
            words = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', *words]
        return FORK.Process(target=run_script, args=(words, str(folder), self.work, self.printed))

    def finish(self, line, reads=True):
        """Run a command to its end. reads: whether what it prints is compared."""
        process = self.start(line)
        process.start()
        process.join()
        output, errors = (path.read_text(errors='replace') for path in self.printed)
        self.count += 1
        script = re.search(r'(\w+)\.py', line)[1]
        if script == 'prepare':
            set_times(self.work / self.name)
        name = f'command {self.count}, {script}'
        self.found[f'{name}: exit code'] = process.exitcode
        if line.startswith('fails'):
            self.found[f'{name}: lines on stderr'] = len(errors.splitlines())
        elif process.exitcode:
            self.failed.append(f'{self.name}: {line}\n{(output + errors)[-2000:]}')
        if reads:
            for n, text in enumerate(read_output(script, output)):
                self.found[f'{name}: line {n}'] = short(text)

    def kill(self, line):
        """Kill a run at some moment after its first checkpoint. After a resume its end is always the same."""
        out = self.work / re.search(r'--out_dir=(\S+)', line)[1]
        process = self.start(line)
        process.start()
        while process.is_alive() and not list(out.glob('step_*[0-9]')):
            time.sleep(0.005)
        process.kill()
        process.join()


def read_output(script, output):
    """The lines of a script's output that are compared: texts of samples, or the numbers in other lines."""
    lines = output.splitlines()
    if script == 'sample':
        return [line for line in lines if not line.startswith('device:')]
    if script == 'train':
        return [line for line in lines if line.startswith('    | ')]
    numbers = [' '.join(NUMBER.findall(line)) for line in lines if not TIMED.search(line)]
    return [line for line in numbers if line]


def run_kind(name, lines, tree, work):
    """(the hashes of a kind, its commands that failed)"""
    import_module('torch._dynamo')  # the first step of an optimizer loads it, which takes a second
    kind = Kind(name, tree, work)
    for line in lines:
        kind.run(line)
    return kind.found | hash_folder(work, name), kind.failed


def run_kinds(tree, work, kinds, jobs=2):
    """
    Run all kinds, `jobs` at a time, each when those that it needs are done.
    Returns {kind: (hashes, failed commands)}.
    """
    write_texts(work)
    (work / 'printed').mkdir()
    os.environ |= {'OMP_NUM_THREADS': '1', 'HF_HUB_OFFLINE': '1', 'HF_HOME': str(work / 'hf_home')}
    began = time.time()
    waiting, running, done = list(kinds), {}, {}
    with ProcessPoolExecutor(jobs, mp_context=SPAWN) as pool:
        while waiting or running:
            ready = [name for name in waiting if done.keys() >= set(kinds[name][0])]
            for name in ready[:jobs - len(running)]:
                running[pool.submit(run_kind, name, kinds[name][1], tree, work)] = name
                waiting.remove(name)
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                name = running.pop(future)
                done[name] = future.result()
                print(f'{time.time() - began:4.0f} s  {name}: {len(done[name][0]):,} hashes', flush=True)
    return {name: done[name] for name in kinds}


# -----------------------------------------------------------------------------
# Hash

def digest(data):
    return hashlib.sha256(data).hexdigest()[:16]


def short(value):
    """A value as text. A hash replaces the end of a long one."""
    text = str(value)
    return text if len(text) <= 60 else f'{text[:30]}… {digest(text.encode())}'


def flatten(value, name=''):
    """[(dotted name, tensor or short text)] of a nest of dicts and lists. A volatile field has no value."""
    last = name.rpartition('.')[2]
    if last in VOLATILE:
        return [(name, 'volatile')]
    if isinstance(value, torch.Tensor):
        data = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return [(name, f'{value.dtype} {list(value.shape)} {digest(data)}')]
    if isinstance(value, dict) and value:
        parts = value.items()
    elif isinstance(value, list) and value:
        parts = enumerate(value)
    else:
        return [(name, short(value))]
    found = []
    for key, part in parts:
        found += flatten(part, f'{name}.{key}' if name else str(key))
    return found


def hash_file(path):
    """[(name inside the file, hash or short value)]"""
    if path.suffix in UNREAD or path.name in UNREAD:
        return [('', 'is there')]
    if path.suffix == '.safetensors':
        return flatten(load_file(path))
    if path.suffix == '.pt':
        return flatten(torch.load(path, weights_only=True))
    if path.name == 'best' or path.suffix == '.json' and path.name != 'tokenizer.json':
        return flatten(json.loads(path.read_text()))
    if path.suffix == '.jsonl':
        return flatten([json.loads(line) for line in path.read_text().splitlines()])
    if path.suffix == '.csv':
        with open(path, newline='') as f:
            return flatten(list(csv.DictReader(f)))
    return [('', digest(path.read_bytes()))]


def hash_folder(work, kind):
    found = {}
    for path in sorted((work / kind).rglob('*')):
        if path.is_file():
            for name, value in hash_file(path):
                found[f'{path.relative_to(work / kind)}:{name}'] = value
    return found


# -----------------------------------------------------------------------------
# Report

def field_of(name):
    """Where equal changes share a line of the report: a field of any JSON file, or this name alone."""
    file, _, inside = name.partition(':')
    return inside.rpartition('.')[2] if file.endswith('.json') else name


def report(kind, old, new):
    """Print what differs in a kind. Returns (number of hashes, number of equal ones)."""
    names = [*old, *(name for name in new if name not in old)]
    unlike = [name for name in names if old.get(name) != new.get(name)]
    print(f'{kind:14} {len(names):6,} hashes, ' + (f'{len(unlike):,} NOT equal' if unlike else 'equal'))
    places, first = Counter(), {}
    for name in unlike:
        change = (field_of(name), old.get(name, 'missing'), new.get(name, 'missing'))
        places[change] += 1
        first.setdefault(change, name)
    for change in list(first)[:SHOWN]:
        more = f'  (and {places[change] - 1} more places)' if places[change] > 1 else ''
        print(f'    {first[change]}   {change[1]} -> {change[2]}{more}')
    if len(first) > SHOWN:
        print(f'    … and {len(first) - SHOWN:,} more')
    return len(names), len(names) - len(unlike)


def drop(found, without):
    """The hashes but those of some fields."""
    return {name: value for name, value in found.items() if re.split('[.:]', name)[-1] not in without}


def compare(old, new, without):
    """Print what differs between the hashes of two trees. Returns whether all are equal."""
    total = same = 0
    for kind in new:
        names, equal = report(kind, drop(old.get(kind, {}), without), drop(new[kind], without))
        total += names
        same += equal
    print(f'{len(new)} kinds, {total:,} hashes, {same:,} equal, {total - same:,} not')
    return same == total


def split(names):
    return [name for name in names.split(',') if name]


def main():
    as_it_is = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_it_is)
    parser.add_argument('tree', type=Path)
    for name in ('--out', '--against', '--kinds', '--without', '--work'):
        parser.add_argument(name, default='')
    s = parser.parse_args()
    if not (s.out or s.against):
        parser.error('give --out, --against or both')
    versions = {'python': sys.version.split()[0], 'torch': torch.__version__, 'numpy': np.__version__}
    stored = json.loads(Path(s.against).read_text()) if s.against else None
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(s.work or os.path.join(temporary, 'work')).resolve()
        work.mkdir()
        done = run_kinds(s.tree.resolve(), work, read_runs(split(s.kinds)))
    found = {name: hashes for name, (hashes, _) in done.items()}
    failed = [text for _, texts in done.values() for text in texts]
    if s.out:
        Path(s.out).write_text(json.dumps({'versions': versions, 'kinds': found}, indent=0))
        print(f'{s.out}: {len(found)} kinds, {sum(map(len, found.values())):,} hashes')
    equal = True
    if stored:
        if stored['versions'] != versions:
            print(f'the versions differ: {stored["versions"]} -> {versions}')
        equal = compare(stored['kinds'], found, split(s.without))
    for text in failed:
        print(f'FAILED {text}')
    sys.exit(0 if equal and not failed else 1)


if __name__ == '__main__':
    main()
