"""
What the tests share: a data set they make themselves, and a way to run the scripts as a user does. No
network, no files from elsewhere.
"""
import hashlib
import importlib
import io
import json
import os
import signal
import subprocess
import sys
import traceback
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))


def write_dataset(folder, vocab_size=64, documents=200, seed=0, splits=('train', 'val'), shards=2):
    """
    A prepared data set that can be learned: each document counts up modulo a prime with a stride of its own,
    then ends with token vocab_size - 1. Returns {split: list of documents}.
    """
    folder, rng, eot = Path(folder), np.random.default_rng(seed), vocab_size - 1
    folder.mkdir(parents=True)
    tokenizer = {'kind': 'byte', 'vocab_size': vocab_size, 'eot': eot}
    meta = {'format': 1, 'tokenizer': tokenizer, 'vocab_size': vocab_size, 'eot': eot, 'dtype': 'uint16',
            'splits': {}}
    texts = {}
    for split in splits:
        count = documents if split == 'train' else documents // 4
        texts[split] = [(rng.integers(61) + rng.integers(1, 4) * np.arange(rng.integers(5, 60))) % 61
                        for _ in range(count)]
        texts[split] = [np.append(d, eot).astype('<u2') for d in texts[split]]
        entry = {'tokens': sum(map(len, texts[split])), 'documents': len(texts[split]),
                 'bytes': sum(map(len, texts[split])), 'shards': []}
        for n in range(shards):
            docs = texts[split][n * count // shards:(n + 1) * count // shards]
            name, starts = f'{split}_{n:05d}', np.cumsum([0] + [len(d) for d in docs])[:-1].astype('<u8')
            (folder / f'{name}.bin').write_bytes(np.concatenate(docs).tobytes())
            (folder / f'{name}.idx').write_bytes(starts.tobytes())
            entry['shards'].append({'file': f'{name}.bin', 'tokens': sum(map(len, docs)),
                                    'documents': len(docs), 'bytes_on_disk': 2 * sum(map(len, docs)),
                                    'sha256': sha256(folder / f'{name}.bin'),
                                    'idx_sha256': sha256(folder / f'{name}.idx')})
        meta['splits'][split] = entry
    (folder / 'meta.json').write_text(json.dumps(meta))
    return texts


def give_tokenizer(folder, tokenizer):
    """
    Let a data set of write_dataset() be one of this tokenizer, whose first tokens its tokens are. Returns the
    folder.
    """
    path = Path(folder, 'meta.json')
    meta = json.loads(path.read_text()) | {'tokenizer': tokenizer.save(folder),
                                           'vocab_size': tokenizer.vocab_size, 'eot': tokenizer.eot}
    path.write_text(json.dumps(meta))
    return str(folder)


def sha256(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


# before they are imported: no test waits for a network
os.environ |= {'HF_HUB_OFFLINE': '1', 'HF_DATASETS_OFFLINE': '1'}
# of lm-eval, whose bootstrap forks beside torch's threads, and hung once
os.environ['DISABLE_MULTIPROC'] = '1'
torch.set_num_threads(1)  # beside other processes, two threads make small tensors ten times slower


@pytest.fixture(scope='session')
def dataset(tmp_path_factory):
    """Folder of a small data set."""
    folder = tmp_path_factory.mktemp('data') / 'counting'
    write_dataset(folder)
    return str(folder)


SCRIPTS = ('train.py', 'sample.py', 'eval.py', 'surgery.py', 'compare.py', 'hub.py', 'analyze.py')


def run(*args, nproc=1, cwd=ROOT, env=None, typed=None, timeout=300):
    """
    `python ARGS` or, for nproc > 1, `torchrun ARGS`, one thread a process, `typed` on its input. Returns the
    finished process. A script of ours that wants nothing of its process runs in this one: starting another
    takes three seconds.
    """
    args = [str(arg) for arg in args]
    if (args[0] in SCRIPTS and (nproc, cwd, env, typed) == (1, ROOT, None, None)
            and not any(arg.startswith(('--compile', '--minutes', '--help', '-h')) for arg in args)):
        return run_here(args)
    start = [sys.executable] if nproc == 1 else [sys.executable, '-m', 'torch.distributed.run',
                                                 '--standalone', f'--nproc_per_node={nproc}']
    environment = os.environ | {'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)} | (env or {})
    return subprocess.run([*start, *args], cwd=cwd, env=environment, input=typed, capture_output=True,
                          text=True, timeout=timeout)


def run_here(args):
    """A script of ours in this process, what it prints and its exit code as those of a finished one."""
    from configurator import STOP_SIGNALS, run_main
    module, printed = (importlib.import_module(args[0].removesuffix('.py')),
                       [io.TextIOWrapper(io.BytesIO(), 'utf-8', write_through=True) for _ in range(2)])
    handlers, code = {number: signal.getsignal(number) for number in STOP_SIGNALS}, 0
    with (redirect_stdout(printed[0]), redirect_stderr(printed[1]), chdir(ROOT),
          pytest.MonkeyPatch.context() as patch):
        patch.setattr(sys, 'argv', args)
        try:
            run_main(module.main, output_is_all=args[0] in ('sample.py', 'analyze.py'))
        except SystemExit as stop:
            code = stop.code or 0
        except Exception:
            traceback.print_exc()
            code = 1
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return subprocess.CompletedProcess(args, code, *(stream.buffer.getvalue().decode() for stream in printed))


TINY = ['--n_layer=2', '--n_head=2', '--n_embd=32', '--block_size=32', '--batch_size=4', '--device=cpu',
        '--dtype=float32', '--max_iters=10', '--learning_rate=1e-2', '--log_interval=1', '--eval_interval=5',
        '--eval_iters=0', '--sample_tokens=0']


def train(out_dir, *args, dataset, nproc=1, check=True, **options):
    """Run train.py on a tiny model. Returns the finished process."""
    done = run('train.py', f'--out_dir={out_dir}', f'--dataset={dataset}', *TINY, *args, nproc=nproc,
               **options)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def runs_here(patch):
    """
    What does in this process what jobs.run_missing(sweep, jobs) does in others: starting each takes seconds.
    """
    import train as training
    from features.study.runs import state
    from features.study.sweep import expand

    def run_missing(sweep, jobs):
        for run in expand(sweep):
            if state(run.out_dir, run.settings) != 'done':
                patch.setattr(sys, 'argv', ['train.py', *run.args])
                with pytest.raises(SystemExit):
                    training.main()
    return run_missing


def pack_moments(moments):
    """An optimizer's state, for checkpoint.save(), out of what features/moments.read_moments() returns."""
    return {'state': dict(enumerate(moments.values())), 'param_groups': [{'param_names': list(moments)}]}


def read_log(out_dir):
    """The records of log.jsonl, without what differs from run to run: seconds, speeds, memory."""
    noise = {'seconds', 'tokens_per_second', 'mfu', 'peak_memory_bytes'}
    return [{k: v for k, v in json.loads(line).items() if k not in noise}
            for line in open(os.path.join(out_dir, 'log.jsonl'))]


class SmallDisk:
    """A disk in memory of a few MB, of which leave() fills all but a part."""

    def __init__(self, folder):
        self.folder, self.ballast = folder, folder / 'ballast'

    def leave(self, room):
        """Let exactly so many bytes be free, None: as many as there are."""
        self.ballast.unlink(missing_ok=True)
        if room is None:
            return
        disk = os.statvfs(self.folder)
        size = disk.f_bavail * disk.f_frsize - room
        with open(self.ballast, 'wb') as f:
            os.posix_fallocate(f.fileno(), 0, size)


@pytest.fixture
def small_disk(tmp_path):
    """A SmallDisk of 12 MB; the test is skipped where this user may mount none."""
    folder = tmp_path / 'disk'
    folder.mkdir()
    mount = ['mount', '-t', 'tmpfs', '-o', 'size=12m', 'tmpfs', str(folder)]
    try:
        allowed = subprocess.run(mount, capture_output=True).returncode == 0
    except OSError:
        allowed = False
    if not allowed:
        pytest.skip('needs the right to mount a small disk')
    try:
        yield SmallDisk(folder)
    finally:
        subprocess.run(['umount', '--lazy', str(folder)], check=True)


def one_line(done):
    """The one line of a refusal: exit code 2, nothing else on stderr."""
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert done.returncode == 2 and len(lines) == 1, (done.returncode, done.stdout, done.stderr)
    return lines[0]
