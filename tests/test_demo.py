"""
make demo: what its Makefile runs, what its three runs share, the text it falls back on, and the progress bar.

The Makefile is run with a stub for python, which writes down how it was called.
"""
import io
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TINY

import train
from configurator import configure, read_config
from features.plan.dial import plan
from features.text import docs
from features.text.sources import find_files
from run import open_bar

RUNS = ('dense', 'lowrank', 'nanogpt')


# -----------------------------------------------------------------------------
# The Makefile

PYTHON = """#!/bin/sh
echo "python $*" >> calls
case "$*" in
    -c*) exit $OFFLINE;;
    prepare.py*) mkdir -p data/demo && echo "$2" > data/demo/meta.json;;
esac
"""


@pytest.fixture
def make(tmp_path):
    """make(target, offline=…, gpu=…, system=…): what it prints, and the calls of python."""
    for name in ('Makefile', 'requirements.txt'):
        shutil.copy(ROOT / name, tmp_path)

    def stub(path, text):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    stub(tmp_path / '.venv' / 'bin' / 'python', PYTHON)

    def run(target, offline=False, gpu=False, system='Linux'):
        (tmp_path / 'calls').unlink(missing_ok=True)
        stub(tmp_path / 'bin' / 'nvidia-smi', f'#!/bin/sh\nexit {int(not gpu)}\n')
        stub(tmp_path / 'bin' / 'uname', f'#!/bin/sh\necho {system}\n')
        env = os.environ | {'PATH': f'{tmp_path}/bin:{os.environ["PATH"]}', 'OFFLINE': str(int(offline))}
        for name in ('MAKEFLAGS', 'MAKELEVEL', 'MFLAGS'):  # of the make that runs this test
            env.pop(name, None)
        done = subprocess.run(['make', '--no-print-directory', target], cwd=tmp_path, env=env,
                              capture_output=True, text=True, check=True)
        return done.stdout, (tmp_path / 'calls').read_text().splitlines()
    return run


def test_the_demo_trains_three_runs_for_the_same_minutes_samples_and_compares(make):
    printed, calls = make('demo')
    trained = [f'python train.py --minutes=2 config/demo_{name}.py' for name in RUNS]
    scripts = [call for call in calls if re.match(r'python \w+\.py', call)]
    assert scripts[0].startswith('python prepare.py') and scripts[1:4] == trained
    assert ([re.search('--out_dir=(.*?) ', call)[1] for call in scripts[4:6]]
            == ['out/demo_dense', 'out/demo_lowrank'])
    compared = 'python compare.py out/demo_nanogpt out/demo_dense out/demo_lowrank --picture=out/demo.png'
    assert scripts[6:] == [compared]
    assert len(printed.rpartition('Try next:\n')[2].splitlines()) == 3


@pytest.mark.parametrize('offline, corpus, said, prompt', [
    (False, 'shakespeare', 'text: Shakespeare', '--start=KING RICHARD:'),
    (True, 'stdlib_docs', "text: the documentation of Python's standard library", '--start=Return the'),
])
def test_the_demo_says_which_text_it_took(make, offline, corpus, said, prompt):
    printed, calls = make('demo', offline=offline)
    assert f'python prepare.py {corpus} --tokenizer=bpe:2048 --out=data/demo' in calls
    assert printed.count('\ntext: ') == 1 and f'\n{said}' in printed
    assert all(prompt in call for call in calls if call.startswith('python sample.py'))


def test_the_cpu_wheel_is_taken_on_linux_without_a_gpu_alone(make):
    version = re.search(r'^torch==([\d.]+)', (ROOT / 'requirements.txt').read_text(), re.M)[1]
    first, second = make('.venv/demo')[1]
    assert ('--index-url https://download.pytorch.org/whl/cpu' in first
            and first.endswith(f' torch=={version}'))
    assert second.endswith('-r requirements.txt')


@pytest.mark.parametrize('machine', [{'gpu': True}, {'system': 'Darwin'}], ids=['gpu', 'macos'])
def test_a_gpu_and_macos_take_the_default_wheel(make, machine):
    assert [call.rpartition(' ')[2] for call in make('.venv/demo', **machine)[1]] == ['requirements.txt']


# -----------------------------------------------------------------------------
# The three runs

def settings(name, monkeypatch):
    """The Settings of a run as --minutes=2 makes them."""
    monkeypatch.chdir(ROOT)
    s = configure(train.Settings, [f'config/demo_{name}.py', '--minutes=2'])
    s.dtype = 'float32'
    plan(s, 2048, 600_000, torch.device('cpu'), 1)
    return s


def test_the_runs_share_data_sizes_and_batches(monkeypatch):
    runs = [settings(name, monkeypatch) for name in RUNS]
    for name in ('dataset', 'n_layer', 'n_head', 'n_embd', 'block_size', 'rows_per_step', 'eval_iters',
                 'seed', 'compile', 'dropout', 'minutes'):
        assert len({getattr(s, name) for s in runs}) == 1, name
    assert len({s.out_dir for s in runs}) == 3
    dense, lowrank, _ = runs
    assert (dense.rank_qk, lowrank.rank_qk, lowrank.rank_vo, lowrank.rank_mlp) == (0, 24, 0, 0)
    assert dense.optimizer == lowrank.optimizer == 'muon'


def test_nothing_of_the_recipe_leaks_into_nanogpts(monkeypatch):
    """--minutes takes the recipe where a config says nothing."""
    s = settings('nanogpt', monkeypatch)
    gpt2 = read_config(train.Settings, 'config/gpt2.py')
    for name in ('position', 'norm', 'mlp', 'tie', 'bias', 'qk_norm', 'zero_init', 'init_std'):
        assert getattr(s, name) == gpt2[name], name
    plain = train.Settings()
    idle = {'muon_lr', 'cooldown'}  # of Muon, and of another schedule
    changed = {'beta2', 'min_lr', 'position', 'mlp', 'qk_norm', 'zero_init'}  # checked above, or nanoGPT's
    for name in read_config(train.Settings, 'config/fast.py').keys() - idle - changed:
        assert getattr(s, name) == getattr(plain, name), name
    assert (s.beta2, s.learning_rate, s.min_lr) == (0.99, 1e-3, 1e-4)


# -----------------------------------------------------------------------------
# The documentation of the standard library

def test_code_is_left_out_of_the_documentation():
    text = ('What it is::\n\n    with x:\n        y\n\n    z\n\nIt goes on.\n\n>>> a(1)\n  b\nc\n'
            '\nAnd on.\n\n'
            'if_stmt ::= "if" x\n            | "else"\n\n+---+\n| a |\n+---+\nThe end.\n')
    assert docs.without_code(text) == 'What it is:\n\nIt goes on.\n\nAnd on.\n\nThe end.'


def test_a_module_is_a_document_of_its_docstrings(tmp_path):
    path = tmp_path / 'a.py'
    path.write_text('"""Module."""\nclass A:\n    """Class."""\n    def f(self):\n        """\n        '
                    'Method.\n        """\n'
                    '        return 1\n')
    assert docs.documents_of(str(path)) == [(str(path), 'Module.\n\nClass.\n\nMethod.')]
    path.write_text('x = 1\n')
    assert docs.documents_of(str(path)) == []
    path.write_text('no python at all')
    assert docs.documents_of(str(path)) == []


def test_the_corpus_is_english():
    files = find_files(['stdlib_docs'])
    topics = next(path for path, _ in files if path.endswith('topics.py'))
    where, text = docs.documents_of(topics)[0]
    assert where.startswith(topics + ':') and 'assert' in text
    module = next(path for path, _ in files if path.endswith(os.sep + 'textwrap.py'))
    (_, text), = docs.documents_of(module)
    assert text.startswith('Text wrapping and filling.') and 'def ' not in text


# -----------------------------------------------------------------------------
# The progress bar

class Terminal(io.StringIO):
    def isatty(self):
        return True


def trained(dataset, out_dir, monkeypatch, stderr):
    monkeypatch.setattr(sys, 'stderr', stderr)
    monkeypatch.setattr(sys, 'argv', ['train.py', f'--dataset={dataset}', f'--out_dir={out_dir}', *TINY])
    with pytest.raises(SystemExit) as stop:
        train.main()
    assert not stop.value.code
    return stderr.getvalue()


def test_a_terminal_gets_a_progress_bar_and_a_log_none(dataset, tmp_path, monkeypatch, capsys):
    bar = trained(dataset, tmp_path / 'a', monkeypatch, Terminal())
    lines = capsys.readouterr().out
    assert re.search(r'10/10 steps \|.*\| 00:00 left, loss \d', bar)
    assert bar.endswith('\r')  # it is gone
    assert trained(dataset, tmp_path / 'b', monkeypatch, io.StringIO()) == ''

    def without_speed(text):
        return re.sub(r'[\d,]+ tokens/s|MFU \d+%|\d+m\d+s left', '',
                      text.replace(str(tmp_path / 'a'), str(tmp_path / 'b')))
    assert without_speed(lines) == without_speed(capsys.readouterr().out)


def test_other_ranks_have_no_bar(monkeypatch):
    class Other:
        first = False
    monkeypatch.setattr(sys, 'stderr', Terminal())
    with open_bar(train.Settings(), 0, Other()) as bar:
        bar.update(1)
    assert not sys.stderr.getvalue()
