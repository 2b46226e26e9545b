"""
Are the scores of eval.py those of lm-evaluation-harness with transformers' model, item by item, and which of
the two is faster? Both score the same files in chunks, in float32 on the CPU; then every log-likelihood, acc
and acc_norm is compared. Results are kept in `out`, so a run that was stopped goes on with the same command.

    pip install lm-eval transformers
    python experiments/lm_eval_exact.py --init_from=hf:FOLDER lambada_openai.jsonl \\
        arc_easy.jsonl='\\nAnswer: ' piqa.jsonl='Answer: ' --texts=novel.txt
"""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
import features  # noqa: I001 — first: your random.py or data/ then hides no module of ours or of a library
if __name__ == '__main__':
    features.start(__file__)

import contextlib
import io
import json
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

import sample
from configurator import FilePath, UserError, configure, run_main
from features.study import tasks
from features.study.items import file_and_delimiter, read_items

CPU = torch.device('cpu')


@dataclass
class Settings:
    positional = 'files'
    files: list[FilePath] = field(default_factory=list)  # JSONL tasks: FILE or FILE=DELIMITER
    texts: list[FilePath] = field(default_factory=list)  # text files for rolling log-likelihoods
    characters: int = 0  # read only this many of each text; 0 = all
    init_from: FilePath = 'hf:'  # hf:FOLDER
    out: FilePath = 'out/lm_eval'  # folder for what both found
    limit: int = 0  # use only this many items of each file, the first ones; 0 = all
    chunk: int = 500  # items that are scored at once
    batch_size: int = 8  # of lm-eval
    max_length: int = 0  # context length; 0 = the model's

    def check(self):
        """Raise ValueError for values that cannot work."""
        if not self.files and not self.texts:
            raise ValueError('files: none is given: '
                             'python experiments/lm_eval_exact.py --init_from=hf:FOLDER FILE.jsonl')


# -----------------------------------------------------------------------------
# The two programs

def timed(function):
    """(the function, a dict that holds the seconds of its last call and those of the processor)"""
    found = {}

    def wrapped(*args, **options):
        began = time.perf_counter()
        began_cpu = time.process_time()
        result = function(*args, **options)
        found['seconds'] = time.perf_counter() - began
        found['cpu_seconds'] = time.process_time() - began_cpu
        return result
    return wrapped, found


class Minnow:
    def __init__(self, s):
        self.model, self.tokenizer = sample.load(s.init_from)
        if s.max_length:
            self.model.cfg.block_size = s.max_length

    def score(self, path, delimiter):
        """{'nats': [[…] per item], 'acc': […], 'acc_norm': […], 'seconds', 'cpu_seconds'} of a task."""
        items = read_items(path, own_delimiter=delimiter)
        score_items, seconds = timed(tasks.score_items)
        scores = score_items(self.model, self.tokenizer, items, CPU, 'float32')
        _, records = tasks.figures(items, scores)
        out = {'nats': [[nats for nats, _ in item] for item in scores]} | seconds
        for name in ('acc', 'acc_norm'):
            out[name] = [record.get(name) for record in records]
        return out

    def roll(self, text):
        return -tasks.score_text(self.model, self.tokenizer, text, 0, CPU, 'float32', rolling=True)[0]


class LmEval:
    def __init__(self, s):
        os.environ.setdefault('HF_HUB_OFFLINE', '1')
        os.environ.setdefault('HF_DATASETS_CACHE', os.path.abspath(f'{s.out}/cache'))
        from lm_eval.models.huggingface import HFLM
        self.model = HFLM(pretrained=s.init_from.removeprefix('hf:'), dtype='float32', device='cpu',
                          batch_size=s.batch_size, max_length=s.max_length or None)
        self.model.loglikelihood, self.seconds = timed(self.model.loglikelihood)

    def score(self, path, delimiter):
        """As Minnow.score()"""
        import lm_eval
        from lm_eval.tasks import TaskManager
        config = task_of(path, delimiter)
        Path(f'{path}.yaml').write_text(json.dumps(config))  # JSON is YAML
        manager = TaskManager(include_path=os.path.dirname(path), include_defaults=False)
        with contextlib.redirect_stdout(io.StringIO()):
            results = lm_eval.simple_evaluate(model=self.model, tasks=[config['task']], num_fewshot=0,
                                              task_manager=manager, log_samples=True, bootstrap_iters=0)
        os.unlink(f'{path}.yaml')
        samples = sorted(results['samples'][config['task']], key=lambda sample: sample['doc_id'])
        out = {'nats': []} | self.seconds
        for item in samples:
            choices = [part[0] if isinstance(part[0], (list, tuple)) else part for part in item['resps']]
            out['nats'].append([float(nats) for nats, _ in choices])
        for name in ('acc', 'acc_norm'):
            out[name] = [item.get(name) for item in samples]
        return out

    def roll(self, text):
        from lm_eval.api.instance import Instance
        request = Instance('loglikelihood_rolling', {}, (text,), 0)
        return self.model.loglikelihood_rolling([request], disable_tqdm=True)[0]


def task_of(path, delimiter):
    """The configuration of a task of lm-eval for a JSONL file, like its own tasks of these data."""
    fields = json.loads(open(path, encoding='utf-8').readline())
    config = {
        'task': 'chunk',
        'dataset_path': 'json',
        'dataset_kwargs': {'data_files': path},
        'test_split': 'train',
        'metadata': {'version': 1},
    }
    choice = {'output_type': 'multiple_choice', 'metric_list': [{'metric': 'acc'}, {'metric': 'acc_norm'}]}
    if 'query' in fields:
        delimiter = ' ' if delimiter is None else delimiter
        before = delimiter.rstrip(' ')
        config |= choice
        config |= {
            'doc_to_text': '{{query}}' + before,
            'doc_to_target': '{{gold}}',
            'doc_to_choice': '{{choices}}',
            'target_delimiter': delimiter[len(before):],
        }
    elif 'sentence_good' in fields:
        config |= choice
        config |= {
            'doc_to_text': '',
            'doc_to_target': 0,
            'doc_to_choice': '{{[sentence_good, sentence_bad]}}',
            'target_delimiter': delimiter or '',
        }
    elif 'continuation' in fields:
        config |= {
            'output_type': 'loglikelihood',
            'doc_to_text': '{{context}}',
            'doc_to_target': (' ' if delimiter is None else delimiter) + '{{continuation}}',
            'metric_list': [{'metric': 'perplexity'}, {'metric': 'acc'}],
        }
    else:
        raise UserError(f'{path}: neither choices, nor pairs of sentences, nor continuations')
    return config


PROGRAMS = {'lm-eval': LmEval, 'minnow': Minnow}

# -----------------------------------------------------------------------------
# The results of both

def parts_of(s):
    """[(name of the file, path of a chunk, its own delimiter or None)] of all files; writes the chunks."""
    out = []
    for given in s.files:
        path, delimiter = file_and_delimiter(given)
        with open(path, encoding='utf-8') as f:
            lines = [line for line in f if line.strip()][:s.limit or None]
        name = Path(path).stem
        for start in range(0, len(lines), s.chunk):
            part = lines[start:start + s.chunk]
            chunk = os.path.abspath(f'{s.out}/{name}_{start:06}_{len(part)}.jsonl')
            Path(chunk).write_text(''.join(part), encoding='utf-8')
            out.append((name, chunk, delimiter))
    return out


def result(s, program, path, delimiter, loaded):
    """The result of a program on a chunk, or that of an earlier run. loaded: {program: its model}"""
    kept = Path(f'{path}.{program}')
    if not kept.exists():
        if program not in loaded:
            loaded[program] = PROGRAMS[program](s)
        found = loaded[program].score(path, delimiter)
        part = kept.with_suffix('.part')
        part.write_text(json.dumps(found))
        part.rename(kept)
        print(f'{program}: {os.path.basename(path)}: {found["seconds"]:.1f} s', flush=True)
    return json.loads(kept.read_text())


def compare(name, pairs):
    """Print a row of the table: pairs (what minnow found, what lm-eval found) of all chunks of a file."""
    items = choices = other_acc = other_norm = 0
    apart = 0.0
    for mine, other in pairs:
        items += len(mine['nats'])
        for a, b in zip(mine['nats'], other['nats'], strict=True):
            choices += len(a)
            apart = max([apart, *(abs(x - y) for x, y in zip(a, b, strict=True))])
        other_acc += sum(a != b for a, b in zip(mine['acc'], other['acc'], strict=True))
        other_norm += sum(a != b for a, b in zip(mine['acc_norm'], other['acc_norm'], strict=True))
    row = f'{name[:36]:36} {items:6,} {choices:7,}  {apart:9.0e} {other_acc:4} {other_norm:8}'
    for key in ('seconds', 'cpu_seconds'):
        ours = sum(mine[key] for mine, _ in pairs)
        theirs = sum(other[key] for _, other in pairs)
        row += f' {theirs:9,.1f} {ours:8,.1f} {ours / theirs:6.2f}'
    print(row)


def main():
    s = configure(Settings)
    os.makedirs(s.out, exist_ok=True)
    loaded = {}
    found = {}
    for name, path, delimiter in parts_of(s):
        theirs = result(s, 'lm-eval', path, delimiter, loaded)
        ours = result(s, 'minnow', path, delimiter, loaded)
        found.setdefault(name, []).append((ours, theirs))
    if found:
        print(f'\n{"":45} log-likelihoods   items with another      seconds           seconds of processors')
        print(f'{"":37} items choices  differ by  acc acc_norm   lm-eval   minnow  ratio   lm-eval   minnow  '
              'ratio')
    for name, pairs in found.items():
        compare(name, pairs)
    if len(found) > 1:
        compare('all', [pair for pairs in found.values() for pair in pairs])
    for path in s.texts:
        text = Path(path).read_text(encoding='utf-8')[:s.characters or None]
        rolled = {}
        for program in PROGRAMS:
            if program not in loaded:
                loaded[program] = PROGRAMS[program](s)
            rolled[program] = loaded[program].roll(text)
        ratio = abs(rolled['minnow'] / rolled['lm-eval'] - 1)
        print(f'{os.path.basename(path)}: {len(text):,} characters: lm-eval {rolled["lm-eval"]:.4f} nats, '
              f'minnow {rolled["minnow"]:.4f}, relative difference {ratio:.0e}')


if __name__ == '__main__':
    run_main(main)
