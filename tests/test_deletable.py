"""
Features can be deleted: the folder, the configs and the lines that are marked with its name. What is left
trains, goes on, samples and exports a plain decoder. And a plain run does not load any feature.
"""
import ast
import json
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

CORE = ['train', 'run', 'model', 'batches', 'optim', 'checkpoint', 'sample', 'prepare', 'tokenizer',
        'configurator']
FEATURES = sorted(path.name for path in (ROOT / 'features').iterdir() if (path / 'README.md').exists())

# Import torch once, then fork a process for each tree: it runs the scripts there as a user does
RUN = """
import contextlib, io, json, os, runpy, sys
import numpy, safetensors.torch, sentencepiece, tiktoken, torch, torch._dynamo, torch.nn.parallel
torch.set_num_threads(1)

def run(*args):
    sys.argv = list(args)
    printed = io.TextIOWrapper(io.BytesIO(), 'utf-8', write_through=True)
    with contextlib.redirect_stdout(printed):
        try:
            runpy.run_path(args[0], run_name='__main__')
        except SystemExit as stop:
            if stop.code:
                print(args, 'ended with', stop.code, file=sys.stderr)
                os._exit(1)
    return printed.buffer.getvalue().decode()

def plain_decoder(has_export):
    tiny = ['--out_dir=out/run', '--dataset=data/text', '--n_layer=1', '--n_head=2', '--n_kv_head=1',
            '--n_embd=16', '--block_size=16', '--batch_size=2', '--device=cpu', '--dtype=float32',
            '--eval_iters=1', '--sample_tokens=4', '--optimizer=muon', '--rank_qk=4', '--eval_interval=2']
    run('prepare.py', 'text.txt', '--tokenizer=byte', '--out=data/text', '--val_fraction=0.2')
    assert 'done: 2 steps' in run('train.py', *tiny, '--max_iters=2')
    assert 'resuming out/run at step 2' in run('train.py', *tiny, '--max_iters=4')
    text = run('sample.py', '--out_dir=out/run', '--start=one', '--max_new_tokens=8', '--num_samples=1',
               '--device=cpu')
    assert text.startswith('one'), text
    if has_export:
        run('hub.py', 'export', '--out_dir=out/run', '--to=out/hf', '--as=custom')
        assert os.path.exists('out/hf/model.safetensors')

for folder in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        try:
            os.chdir(folder)
            sys.path.insert(0, folder)
            plain_decoder(os.path.isdir('features/hf'))
            os._exit(0)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
    _, status = os.waitpid(child, 0)
    print(json.dumps([folder, status]), flush=True)
"""


def without(feature, folder):
    """
    A copy of the repository without a feature: its folder, the configs that need it, the lines marked with
    its name.
    """
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns('.*', 'data', 'out*', 'tests', 'docs',
                                                                'assets', '__pycache__'))
    (folder / 'text.txt').write_text('one two three four five six seven eight nine ten\n' * 100)
    if feature:
        shutil.rmtree(folder / 'features' / feature)
        mark = re.compile(rf'  # {feature}(:|$)')
        for path in [*folder.glob('*.py'), *folder.glob('features/**/*.py')]:
            lines = path.read_text().split('\n')
            path.write_text('\n'.join(line for line in lines if not mark.search(line)))
    return str(folder)


@pytest.fixture(scope='module')
def ended(tmp_path_factory):
    """{feature that was deleted, '' for none: whether a plain decoder still works}."""
    folder = tmp_path_factory.mktemp('deletable')
    trees = {without(feature, folder / (feature or 'whole')): feature for feature in ['', *FEATURES]}
    done = subprocess.run([sys.executable, '-c', RUN, *trees], cwd=folder, capture_output=True, text=True)
    print(done.stdout, done.stderr)
    found = dict(map(json.loads, [line for line in done.stdout.splitlines() if line.startswith('["')]))
    return {feature: found.get(tree) == 0 for tree, feature in trees.items()}


@pytest.mark.parametrize('feature', ['', *FEATURES])
def test_a_plain_decoder_works_without_the_feature(feature, ended):
    assert ended[feature]


@pytest.mark.parametrize('name', CORE)
def test_no_core_file_imports_a_feature_at_module_level(name):
    for node in ast.parse((ROOT / f'{name}.py').read_text()).body:
        modules = ([node.module] if isinstance(node, ast.ImportFrom)
                   else [alias.name for alias in getattr(node, 'names', [])])
        assert not any(str(module).startswith('features.') for module in modules), ast.unparse(node)


def imported_at_once(body):
    """The modules that statements import when they run: those inside functions are left out."""
    for node in body:
        if isinstance(node, ast.ImportFrom):
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield from imported_at_once(ast.iter_child_nodes(node))


@pytest.mark.parametrize('feature', FEATURES)
def test_a_feature_imports_another_only_inside_the_function_that_needs_it(feature):
    for path in (ROOT / 'features' / feature).rglob('*.py'):
        modules = [str(module) for module in imported_at_once(ast.parse(path.read_text()).body)]
        others = {module.split('.')[1] for module in modules if module.startswith('features.')} & {*FEATURES}
        assert others <= {feature}, path


def test_a_plain_run_loads_few_files(tmp_path):
    """Its files and lines, measured when it ends: the limits may be lowered, not raised."""
    code = """
import atexit, os, sys
root = os.getcwd()
def report():
    files = {getattr(module, '__file__', None) or '' for module in list(sys.modules.values())}
    files = sorted({file for file in files if file.startswith(root)} | {os.path.join(root, 'train.py')})
    lines = sum(len(open(file).readlines()) for file in files)
    print('LOADED', len(files), lines, *[os.path.relpath(file) for file in files])
atexit.register(report)
import runpy
runpy.run_path('train.py', run_name='__main__')
"""
    tree = without('', tmp_path / 'tree')
    subprocess.run([sys.executable, 'prepare.py', 'text.txt', '--tokenizer=byte', '--out=data/text',
                    '--val_fraction=0.2'], cwd=tree, check=True, capture_output=True)
    args = ['--dataset=data/text', '--n_layer=1', '--n_head=2', '--n_embd=16', '--block_size=16',
            '--max_iters=2', '--device=cpu', '--dtype=float32', '--eval_iters=1']
    done = subprocess.run([sys.executable, '-c', code, *args], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    files, lines, *names = done.stdout.partition('LOADED ')[2].split()
    assert int(files) <= 10 and int(lines) <= 5200, names
    assert not any(re.match('features/.*/', name) for name in names), names  # but features/__init__.py
