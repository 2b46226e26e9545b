"""How a script starts: --help needs no torch, and each script imports what it needs."""
import dataclasses
import importlib
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, one_line, run, train, write_dataset

import features
import prepare
from experiments import starting
from features import comment_of, default_of, feature_names, feature_parts, fields_of, with_features
from features.declared import read
from features.help import commands_in, find_settings

SCRIPTS = ('analyze', 'bench', 'compare', 'eval', 'hub', 'prepare', 'sample', 'surgery', 'train')
COMMANDS = {'analyze': ['weights', 'attention', 'experts'], 'hub': ['export'],
            'eval': ['loss', 'text', 'tasks', 'harness', 'summaries', 'ladder'],
            'surgery': ['inherit', 'grow', 'widen', 'average', 'factorize', 'upcycle', 'merge', 'combine']}
CASES = [[script] for script in SCRIPTS if script not in COMMANDS]
CASES += [[script, command] for script in COMMANDS for command in COMMANDS[script]]

# Every help of every script, in one process that can import neither torch nor numpy
ALL = """
import json, sys
sys.modules |= dict.fromkeys(['torch', 'numpy'])
sys.path.insert(0, '.')
from features.help import script_help
found = []
for script, *command in json.loads(sys.argv[1]):
    text = script_help(f'{script}.py', [*command, '--help=all'])
    lines = text.partition('--help=NAME lists')[2].splitlines()[1:]
    features = [line.split()[0] for line in lines if line[2] != ' ']
    found.append([text, *(script_help(f'{script}.py', [*command, f'--help={name}']) for name in features)])
print(json.dumps(found))
"""


def start(*args, cwd=ROOT, **environment):
    """`python ARGS` where torch and numpy cannot be imported."""
    return subprocess.run([sys.executable, *map(str, args)], cwd=cwd, capture_output=True, text=True,
                          env=os.environ | environment)


@pytest.fixture(scope='module')
def without_torch(tmp_path_factory):
    """Environment of a process that ends when it imports torch or numpy."""
    folder = tmp_path_factory.mktemp('blocked')
    for name in ('torch', 'numpy'):
        (folder / f'{name}.py').write_text(f'raise SystemExit("{name} was imported")\n')
    return {'PYTHONPATH': str(folder)}


@pytest.mark.parametrize('script', SCRIPTS)
def test_help_needs_no_torch(script, without_torch):
    command = COMMANDS.get(script, [])[:1]
    done = start(f'{script}.py', *command, '--seed=nonsense', '--help', **without_torch)
    assert (done.returncode, done.stderr) == (0, '') and '\n  --' in done.stdout
    if command:
        done = start(f'{script}.py', '-h', **without_torch)
        assert done.returncode == 0 and f'takes {" or ".join(COMMANDS[script])}, then' in done.stdout


@pytest.mark.parametrize('args, line', [
    (['train.py', '--help=nonsense'], 'train.py: --help=nonsense: takes all, distill, growth, '),
    (['sample.py', '--help=nonsense'], 'sample.py: --help=nonsense: takes all, '),
    (['hub.py', 'exprt', '--help'], 'hub.py: exprt: takes export, then its settings'),
    (['eval.py', '--help=all'], 'eval.py: --help=all: takes loss or text or ')])
def test_a_help_that_is_not_there_is_one_line(args, line, without_torch):
    assert one_line(start(*args, **without_torch)).startswith(line)


@pytest.fixture(scope='module')
def helps():
    """{(script, command): its --help=all and the --help=NAME of all features, as one text}"""
    done = start('-c', ALL, json.dumps(CASES))
    assert done.returncode == 0, done.stderr
    return {tuple(case): texts for case, texts in zip(CASES, json.loads(done.stdout), strict=True)}


def settings_of(script, command=None):
    """The dataclass that a script configures."""
    if script == 'prepare':
        return with_features(prepare.Settings, 'text')
    module = importlib.import_module(script)
    return module.COMMANDS[command][1] if command else module.Settings


@pytest.mark.parametrize('case', CASES, ids=' '.join)
def test_help_lists_all_settings_of_the_dataclasses(case, helps):
    cls = settings_of(*case)
    core, *features = helps[tuple(case)]
    parts = [part for name in feature_names() for part in feature_parts(getattr(cls, 'core', cls), name)]
    assert {*names_in(core)} == {name.rstrip('_') for name in fields_of(cls)}
    assert {*names_in('\n'.join([core, *features]))} >= {name for part in parts for name in fields_of(part)}


@pytest.mark.parametrize('case', CASES, ids=' '.join)
def test_an_outline_has_the_fields_of_its_dataclass(case):
    """Their order, types, defaults and comments, and those of the features that can be added."""
    script, real = read(case[0]), settings_of(*case)
    node, has_commands = find_settings(ROOT / f'{case[0]}.py')
    outline = script.evaluate(commands_in(script, node)[case[1]] if has_commands else node)
    assert [describe(part) for part in outline.__mro__] == [describe(part) for part in real.__mro__]
    for name in feature_names():
        outlines, parts = (feature_parts(getattr(cls, 'core', cls), name) for cls in (outline, real))
        assert list(map(describe, outlines)) == list(map(describe, parts))


def describe(cls):
    return cls.__name__, [(field.name, field.type, default_of(field), comment_of(cls, field.name))
                          for field in (dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ())]


def names_in(text):
    return re.findall(r'^  --(\w+)=', text, re.MULTILINE)


@pytest.fixture
def tree(tmp_path):
    """A copy of the scripts and features."""
    ignore = shutil.ignore_patterns('.*', 'data', 'out*', 'tests', 'docs', 'assets', '__pycache__')
    return shutil.copytree(ROOT, tmp_path / 'tree', ignore=ignore)


def edit(path, old, new):
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))


def test_a_setting_that_is_added_is_in_the_help(tree, without_torch):
    """Its default may be an expression, with names of the module or of a library."""
    edit(tree / 'model.py', '    n_layer: int =', """\
    width: float = 2 * WIDTH  # [lora] a new one, of
    # two lines
    limit: float = math.inf  # unlimited
    kinds: list[str] = field(default_factory=lambda: [*KINDS])  # kinds
    n_layer: int =""")
    edit(tree / 'model.py', '@dataclass\nclass ModelConfig', """\
WIDTH = 64
KINDS = ('a', 'b')


@dataclass
class ModelConfig""")
    edit(tree / 'features/lora/settings.py', '    lora_dora: bool', """\
    lora_new: Literal['x', 'y'] = FIRST  # another
    lora_dora: bool""")
    edit(tree / 'features/lora/settings.py', '@dataclass\n', "FIRST = 'x'\n\n\n@dataclass\n")
    shown = start('train.py', '--help=all', cwd=tree, **without_torch)
    assert shown.returncode == 0, shown.stderr
    lines = [' '.join(line.split()) for line in shown.stdout.splitlines()]
    new = ['--width=128 a new one, of two lines', '--limit=inf unlimited', "--kinds=['a', 'b'] kinds"]
    start_of_new = lines.index(new[0])
    assert lines[start_of_new:start_of_new + 3] == new
    shown = start('train.py', '--help=lora', cwd=tree, **without_torch)
    assert "--lora_new='x' x | y: another" in [' '.join(line.split()) for line in shown.stdout.splitlines()]


def test_a_name_that_a_source_does_not_tell_comes_from_its_module(tree):
    edit(tree / 'model.py', '    n_layer: int =', '    width: int = WIDTH  # a new one\n    n_layer: int =')
    edit(tree / 'model.py', '@dataclass\nclass ModelConfig', """\
WIDTH = 64
if torch.__version__:
    WIDTH += 1


@dataclass
class ModelConfig""")
    shown = start('train.py', '--help=all', cwd=tree)
    assert shown.returncode == 0 and re.search('--width=65 +a new one', shown.stdout), shown.stderr


@pytest.mark.parametrize('old, new', [  # each makes the setting mine=8, with a comment
    ('', '    mine: int = 8  # a new one\n#   was: int = 7\n'),  # a line that an editor has commented out
    ('', '    """\nclass Settings,\nat the margin\n    """\n    mine: int = 8  # a new one\n'),
    ('', "    mine: Literal[\n        7,\n        8,\n    ] = 8  # a new one\n"),
    ('', '    mine: int = (4 +\n                 4)  # a new one\n'),
    ('SIZE = 4\nSIZE = SIZE * 2\n', '    mine: int = SIZE  # a new one\n'),
    ('', '    kind: ClassVar[int] = 3\n    mine: int = 8  # a new one\n'),
    ('from fractions import *\n', '    mine: int = int(Fraction(16, 2))  # a new one\n'),
    ('', '    mine: int = 8 if os.path.isfile(__file__) else 7  # a new one\n'),
    ('def speak(client):\n    client.configure(client)\n', '    mine: int = 8  # a new one\n'),
    ('def pick():\n    return Settings\n', '    mine: int = 8  # a new one\n')],
    ids='margin docstring literal long twice ClassVar star file configure chosen'.split())
def test_help_and_marks_of_a_script_that_a_user_has_edited(old, new, tree, tmp_path):
    """The [lora] behind the new setting still adds LoRA's settings."""
    edit(tree / 'train.py', '@dataclass\nclass Settings', f'from typing import ClassVar, Literal\n{old}\n\n'
         '@dataclass\nclass Settings')
    edit(tree / 'train.py', '    seed: int =', f'{new}    seed: int =')
    if 'pick' in old:
        edit(tree / 'train.py', 's = configure(Settings)', 's = configure(pick())')
    shown = start('train.py', '--help=all', cwd=tree)
    assert (shown.returncode, shown.stderr) == (0, ''), shown.stderr
    assert shown.stdout.startswith('Train a model.') and '\nSettings (train.py)\n' in shown.stdout
    assert re.search(r'--mine=8 +(7 \| 8: )?a new one\n', shown.stdout)
    assert re.search('--lora_rank=0 +rank of adapters', shown.stdout)
    refused = start('train.py', '--lora_rank=2', '--lora_targets=', f'--out_dir={tmp_path}/out', cwd=tree)
    assert 'no such setting' not in one_line(refused)


def test_a_script_outside_of_the_repository_answers_help(tmp_path):
    """Also one that does not call features.start()."""
    head = f'import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport features\n'
    body = ('from dataclasses import dataclass\nfrom configurator import configure, run_main\n@dataclass\n'
            'class Settings:\n    mine: int = 8  # a new one\nrun_main(lambda: configure(Settings))\n')
    for call in ('features.start(__file__)\n', ''):
        (tmp_path / 'my.script.py').write_text(f'"""Mine."""\n{head}{call}{body}')
        shown = start('my.script.py', '--help', cwd=tmp_path)
        assert (shown.returncode, shown.stderr) == (0, ''), shown.stderr
        assert shown.stdout.startswith('Mine.\n') and '--mine=8                            ' in shown.stdout


@pytest.mark.parametrize('path', sorted(ROOT.glob('experiments/*.py')), ids=lambda path: path.stem)
def test_experiments_call_start(path):
    text = path.read_text()
    assert ('configure(' in text) == ('features.start(__file__)' in text)


# -----------------------------------------------------------------------------
# What a script imports

COMPILER = {'torch._dynamo', 'torch._inductor', 'sympy', 'triton'}
NEEDED = {'numpy', 'tqdm', 'safetensors', 'sentencepiece', '_sentencepiece', 'tokenizers'}

# What runs of scripts import, and whether garbage is collected then: each in a process of its own, forked
# after torch is imported
RUNS = """
import gc, json, os, runpy, sys
import torch
loaded, count = {*sys.modules}, len(gc.get_objects())
torch.set_num_threads(1)
for args in json.loads(sys.argv[1]):
    child = os.fork()
    if child == 0:
        out = os.dup(1)
        os.dup2(2, 1)
        try:
            sys.argv = args
            if args[0].endswith('.py'):
                runpy.run_path(args[0], run_name='__main__')
            else:
                __import__(args[0])
        finally:
            sys.stdout.flush()
            found = sorted({*sys.modules} - loaded), gc.isenabled(), gc.get_freeze_count() >= count
            os.write(out, (json.dumps(found) + '\\n').encode())
            os._exit(0)
    os.waitpid(child, 0)
"""


@pytest.fixture(scope='module')
def imported(tmp_path_factory):
    """{run: (the modules that it imports beyond those of torch, whether garbage is collected, frozen)}"""
    folder = tmp_path_factory.mktemp('models')
    write_dataset(folder / 'data', vocab_size=257, documents=20)
    train(folder / 'run', '--max_iters=1', dataset=folder / 'data')
    exported = run('hub.py', 'export', f'--out_dir={folder}/run', f'--to={folder}/hf', '--as=custom')
    assert exported.returncode == 0, exported.stderr
    sample = ['sample.py', '--max_new_tokens=2', '--start=a', '--device=cpu']
    runs = {script: [script] for script in SCRIPTS} | {
        'run, float32': [*sample, f'--out_dir={folder}/run', '--dtype=float32'],
        'run, bfloat16': [*sample, f'--out_dir={folder}/run', '--dtype=bfloat16'],
        'hf, float32': [*sample, f'--init_from=hf:{folder}/hf', '--dtype=float32'],
        'hf, int8': [*sample, f'--init_from=hf:{folder}/hf', '--int8'],
    }
    done = start('-c', RUNS, json.dumps(list(runs.values())))
    assert done.stderr.count('---------------') == 4 * 3, done.stderr
    return dict(zip(runs, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.parametrize('name', ['run, float32', 'run, bfloat16', 'hf, float32', 'hf, int8'])
def test_sampling_imports_no_compiler_and_few_libraries(name, imported):
    modules, is_collecting, is_frozen = imported[name]
    assert not COMPILER & {*modules}
    assert {name for name in modules if name.startswith('torch.')} <= {'torch.utils._device'}
    others = {name.partition('.')[0] for name in modules} - {*sys.stdlib_module_names} - features.MODULES
    assert others <= NEEDED | {'features', 'torch'}
    assert is_collecting and is_frozen  # what the imports made is not looked at again


@pytest.mark.parametrize('script, most', [('sample', 12), ('train', 25), ('prepare', 40), ('eval', 12)])
def test_importing_a_script_imports_little(script, most, imported):
    modules, is_collecting, is_frozen = imported[script]
    assert len(modules) <= most
    assert is_collecting and not is_frozen  # a notebook that imports it goes on as before


@pytest.mark.parametrize('script', SCRIPTS)
def test_no_script_imports_what_only_some_commands_need(script, imported):
    others = {name.partition('.')[0] for name in imported[script][0]} - {*sys.stdlib_module_names}
    assert others <= NEEDED | {'features', 'torch', 'tiktoken'} | features.MODULES
    assert not COMPILER & {*imported[script][0]}


def test_the_experiment_tells_the_first_line_from_the_end():
    figures = starting.first_line('-c', 'print(1, flush=True); import time; time.sleep(0.5)')
    assert figures['seconds'] + 0.3 < figures['seconds to the end']
    assert 0 < figures['processor seconds to the end'] < 0.4
