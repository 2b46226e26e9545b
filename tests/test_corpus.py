"""
Files that nobody honest wrote, or that a bad day left: hostile/cases.py writes them, hostile/run.py runs
minnow's commands on them. Here are some of them, all of them (slow), and that the runner sees harm.
"""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HOSTILE = Path(__file__).parent / 'hostile'


@pytest.fixture(scope='module')
def work(tmp_path_factory):
    """Where the honest folders are made once."""
    return tmp_path_factory.mktemp('hostile')


def run_on(*args, work, report):
    """run.py's results, and what it printed."""
    command = [sys.executable, HOSTILE / 'run.py', f'--work={work}', f'--report={report}', *args]
    done = subprocess.run(command, capture_output=True, text=True, cwd=HOSTILE.parents[1],
                          env=os.environ | {'OMP_NUM_THREADS': '1'})
    assert report.exists(), done.stdout + done.stderr
    return json.loads(report.read_text()), done.stdout


def test_some_hostile_files_do_no_harm(work, tmp_path):
    results, printed = run_on('--quick=60', work=work, report=tmp_path / 'report.json')
    assert len(results) >= 60 and not any(result['problems'] for result in results), printed


@pytest.mark.slow
def test_no_hostile_file_does_harm(work, tmp_path):
    results, printed = run_on(work=work, report=tmp_path / 'report.json')
    assert len(results) > 1000 and not any(result['problems'] for result in results), printed


META = 'data/meta.json: format = 2'  # a file that must be refused
REFUSE = 'import configurator; refuse = configurator.refuse; configurator.refuse = '
READ = 'import batches; batches.read_meta = '
UNCHECKED = 'import batches; batches.check_meta = lambda meta, path: None'
# kind of harm: (code that takes a protection out, the file that then does it)
BROKEN = {
    'executed': ('import pickletools; from features.text import nanogpt; '
                 'nanogpt.PLAIN.update(code.name for code in pickletools.opcodes)',
                 'nano/meta.pkl: runs a program, by protocol 0'),
    'traceback': (UNCHECKED, 'data/meta.json: splits = None'),
    'code': (UNCHECKED, 'data/meta.json: eot = -1'),
    'outside': (REFUSE + "lambda reason: (open('data/x', 'w'), refuse(reason))", META),
    'hang': (READ + "lambda folder: __import__('time').sleep(99)", META),
    'memory': (READ + "lambda folder: len(b'x' * 10 ** 9) and 1 / 0", META),
    'secret': (READ + "lambda folder: print(open('home/.ssh/id_ed25519').read())", META),
    'escapes': (REFUSE + "lambda reason: __import__('os').write(2, b'\x1b[2J')", META),
    'left': (REFUSE + "lambda reason: (open('out/x', 'w'), refuse(reason))", META),
    'lines': (REFUSE + "lambda reason: (print('x', file=__import__('sys').stderr), refuse(reason))", META),
    'name': (REFUSE + "lambda reason: refuse('no')", META),
}


@pytest.mark.slow
@pytest.mark.parametrize('kind', BROKEN)
def test_runner_sees_harm(kind, work, tmp_path):
    code, name = BROKEN[kind]
    results, printed = run_on(f'--break={code}', f'={name}=', work=work, report=tmp_path / 'report.json')
    assert len(results) == 1, printed
    assert any(problem.startswith(kind) for problem in results[0]['problems']), printed
