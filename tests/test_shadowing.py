"""
No file of a user's runs, or hides a module of ours or of a library, because of its name: every name is
planted in a copy of the repository, in the working folder and, for our own names, on PYTHONPATH.
"""
import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

import features

SCRIPTS = ('analyze', 'bench', 'compare', 'eval', 'hub', 'prepare', 'sample', 'surgery', 'train')
OURS = sorted(features.MODULES | features.FOLDERS | {'features'})
USERS = ('data', 'out', 'tests', 'docs', 'assets', 'launch', 'evaluate', 'datasets', 'utils', 'results')
EXPERIMENTS = sorted(path for path in ROOT.glob('experiments/*.py')
                     if path.stem not in ('same_runs', 'core_mutants'))  # which import nothing of ours
# what inject.py acts on, which no script of a user's reads
FAULTS = {'FAULT': 'save:begin=kill step@1=kill loss@1=nan', 'FAULTS': '1', 'MINNOW_FAULT': '1'}
ENVIRONMENT = {  # all that the code reads or sets
    'CUDA_VISIBLE_DEVICES', 'CXX', 'DATA_GYM_CACHE_DIR', 'DISABLE_MULTIPROC', 'GOMP_SPINCOUNT',
    'HF_ENDPOINT', 'HF_HOME', 'HF_HUB_OFFLINE', 'LD_LIBRARY_PATH', 'LOCAL_RANK', 'LOCAL_WORLD_SIZE',
    'MINNOW_MIRROR', 'NANOCHAT_BASE_DIR', 'NANOCHAT_DTYPE', 'PYTHONDONTWRITEBYTECODE', 'PYTHONPATH',
    'PYTHONSAFEPATH', 'RANK',
    'THP_MEM_ALLOC_ENABLE', 'TIKTOKEN_CACHE_DIR', 'TOKENIZERS_PARALLELISM', 'TORCHELASTIC_ERROR_FILE',
    'TORCHELASTIC_RESTART_COUNT', 'TORCHELASTIC_RUN_ID', 'WANDB_ERROR_REPORTING', 'WANDB_MODE',
    'WORLD_SIZE'}


def other_names():
    """
    The names at the top of the standard library and of all libraries that are installed here, without what
    Python loads before it runs a script. In a process of its own: to look for distutils imports setuptools.
    """
    code = """
import sys
loaded = {*sys.modules}
import importlib.util, os, sysconfig
installed = [name.partition('.')[0] for name in os.listdir(sysconfig.get_path('purelib'))]
names = {name for name in (*sys.stdlib_module_names, *installed) if name.isidentifier()}
print(*(name for name in sorted(names - loaded) if importlib.util.find_spec(name) is not None))
"""
    found = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout
    return [name for name in found.split() if name not in OURS]


def plant(folder, names, ran):
    """A module or, by turns, a package of each name, which writes itself into the file `ran` if it runs."""
    for n, name in enumerate(names):
        path = folder / name / '__init__.py'
        if n % 2 and not path.parent.exists() or (folder / f'{name}.py').exists() and n % 2:
            path = folder / f'{name}.py'
        if path.exists():
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'open({str(ran)!r}, "a").write(__file__ + "\\n")\n')


class Planted:
    """A copy of the repository, `tree`, and a working folder, `here`, both with a file of every name."""

    def __init__(self, folder):
        self.tree, self.here, self.path = folder / 'tree', folder / 'here', folder / 'path'
        self.ran = folder / 'ran'
        for path in [*ROOT.glob('*.py'), *ROOT.glob('features/**/*.py'), *ROOT.glob('config/*.py'),
                     *ROOT.glob('experiments/*.py')]:
            copy = self.tree / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
        for name in OURS:
            if name != 'features':
                plant(self.tree, [name], self.ran)  # NAME/__init__.py beside NAME.py
        (self.tree / 'features.py').write_text((self.tree / 'eval/__init__.py').read_text())
        names = [*USERS, *other_names()]
        plant(self.tree, names, self.ran)
        plant(self.here, [*OURS, *names], self.ran)
        plant(self.path, OURS, self.ran)
        plant(self.path, OURS[1:], self.ran)

    def run(self, *args, **environment):
        """`python ARGS` in the working folder. Its output; fails if it fails, or if something planted ran."""
        # as after export PYTHONPATH=$PYTHONPATH:FOLDER: an empty part is the working folder
        start = os.environ | FAULTS | {'PYTHONPATH': f':{self.path}', 'OMP_NUM_THREADS': '1'}
        done = subprocess.run([sys.executable, *map(str, args)], cwd=self.here, env=start | environment,
                              capture_output=True, text=True, timeout=300)
        ran = self.ran.read_text() if self.ran.exists() else ''
        assert done.returncode == 0 and not ran, done.stdout + done.stderr + ran
        return done.stdout


@pytest.fixture(scope='module')
def planted(tmp_path_factory):
    return Planted(tmp_path_factory.mktemp('planted'))


def test_the_list_of_our_modules_is_complete():
    assert features.MODULES == {path.stem for path in ROOT.glob('*.py')}
    assert {path.parent.name for path in ROOT.glob('*/*.py')} - {'tests', 'features'} <= features.FOLDERS


def test_nothing_planted_runs(planted):
    """One process imports all scripts: each begins with the lines that the next test wants."""
    names = [*SCRIPTS, *(f'experiments.{path.stem}' for path in EXPERIMENTS if path.stem != 'chat_exact')]
    start = f'import sys; sys.path.insert(0, {str(planted.tree)!r}); import features'
    planted.run('-P', '-c', f'{start}; {"; ".join(f"import {name}" for name in names)}')


@pytest.mark.parametrize('path', [*(ROOT / f'{name}.py' for name in SCRIPTS), *EXPERIMENTS],
                         ids=lambda path: path.stem)
def test_a_script_imports_features_before_all_else(path):
    """os and sys are loaded when Python starts."""
    folder = 'os.path.dirname(os.path.realpath(__file__))'
    if path.parent.name == 'experiments':
        folder = f'os.path.dirname({folder})'
    lines = [ast.unparse(node) for node in ast.parse(path.read_text()).body[1:5]]
    assert lines == ['import os', 'import sys', f'sys.path.insert(0, {folder})', 'import features']


def test_no_variable_of_the_tests_is_read():
    """Every literal in a subscript, an argument or a dict beside os.environ or getenv is on the list."""
    for path in [*ROOT.glob('*.py'), *ROOT.glob('features/**/*.py')]:
        for line in path.read_text().splitlines():
            if 'environ' in line or 'getenv' in line:
                names = set(re.findall(r"['\"]([A-Z][A-Z_]{2,})['\"]", line))
                assert names <= ENVIRONMENT, (path, line)
        assert not re.search(r'\bFAULTS?\b|\binject\b', path.read_text()), path


@pytest.mark.parametrize('name', SCRIPTS)
def test_help_runs_nothing_planted(planted, name):
    assert planted.run(planted.tree / f'{name}.py', '--help')


def test_whole_runs(planted):
    """prepare.py's processes, a config file that imports another, and a user who sets PYTHONSAFEPATH."""
    text, tiny = planted.here / 'text.txt', planted.here / 'tiny.py'
    text.write_text('one two three four five six seven eight nine ten\n' * 400)
    tiny.write_text('from config.gpt2 import *\nimport mine\nn_layer = mine.layers\n')
    (planted.tree / 'mine.py').write_text('layers = 1\n')
    shared = planted.here / 'made'
    planted.run(planted.tree / 'prepare.py', text, '--tokenizer=byte', '--val_fraction=0.2', '--num_proc=2',
                f'--out={shared}')
    sizes = ['--n_head=2', '--n_embd=16', '--block_size=16', '--batch_size=2', '--device=cpu',
             '--dtype=float32', '--eval_iters=1', '--sample_tokens=4', '--max_iters=2', f'--dataset={shared}',
             '--gradient_accumulation_steps=1', f'--out_dir={shared}/run']
    printed = planted.run(planted.tree / 'train.py', tiny, *sizes, PYTHONSAFEPATH='1')
    assert 'done: 2 steps' in printed
    assert planted.run(planted.tree / 'sample.py', f'--out_dir={shared}/run', '--num_samples=1',
                       '--max_new_tokens=4', '--device=cpu')


@pytest.mark.full  # compiling takes 20 s
def test_the_processes_of_a_compiler_and_of_torchrun(planted):
    text, shared = planted.here / 'text.txt', planted.here / 'more'
    text.write_text('one two three four five six seven eight nine ten\n' * 400)
    planted.run(planted.tree / 'prepare.py', text, '--tokenizer=byte', '--val_fraction=0.2',
                f'--out={shared}')
    sizes = ['--n_layer=1', '--n_head=2', '--n_embd=16', '--block_size=16', '--batch_size=2', '--device=cpu',
             '--dtype=float32', '--eval_iters=1', '--sample_tokens=4', '--max_iters=2', f'--dataset={shared}']
    cache = {'TORCHINDUCTOR_CACHE_DIR': str(planted.here / 'cache')}
    planted.run(planted.tree / 'train.py', *sizes, '--compile=True', f'--out_dir={shared}/run', **cache)
    torchrun = Path(sys.executable).parent / 'torchrun'
    planted.run(torchrun, '--standalone', '--nproc_per_node=2', planted.tree / 'train.py', *sizes,
                '--gradient_accumulation_steps=2', f'--out_dir={shared}/two', PYTHONPATH=str(planted.path))
