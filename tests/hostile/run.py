"""
Run minnow's commands on the hostile files of cases.py, each in a folder of its own, and say which did harm.

    python tests/hostile/run.py                              # all; exit code 1 if one did
    python tests/hostile/run.py state.json 'peft: '          # those with one of these in their names
    python tests/hostile/run.py --root=OTHER_TREE --report=report.json
    python tests/hostile/run.py --quick=60                   # 60 fast ones, of all formats

A process that has imported torch and minnow forks one for each case: about 0.1 s each. A case is held if

- its command ends with the exit code that is expected: 2 where the file must be refused, 0 where it is
  harmless;
- a refusal is one line on stderr that names the file, and no output is left;
- it shows no traceback, and no terminal escapes;
- it ends within 10 s, of wall-clock time if it sleeps, else of CPU time;
- its memory grows by at most twice as much as with the honest file, plus 300 MB;
- it starts no program, connects to nothing, and nothing that a file carries runs (canaries);
- it changes no file but in the folder of its own output, and copies or shows no secret that a link leads to.
"""

import hashlib
import importlib
import itertools
import json
import os
import random
import resource
import shutil
import signal
import socket
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

os.environ |= {
    'OMP_NUM_THREADS': '1',
    'MKL_NUM_THREADS': '1',
    'TOKENIZERS_PARALLELISM': 'false',
    'HF_HUB_OFFLINE': '1',
    'HF_DATASETS_OFFLINE': '1',
    'PYTHONDONTWRITEBYTECODE': '1',
}

HERE = Path(__file__).parent
SECONDS = 10  # until a case counts as hung
MEMORY = 300 * 2**20  # bytes that a case may take beyond twice what the honest one does
SECRET = 'secret-of-the-user-4f1c'  # stands in a file outside of all that a command is given
OUTPUT = ('out',)  # folders in which every command may write

SCRIPTS = ('train', 'sample', 'prepare', 'eval', 'compare', 'surgery', 'hub', 'analyze')
LIBRARIES = (
    'torch',
    'torch._dynamo',
    'safetensors.torch',
    'tokenizers',
    'sentencepiece',
    'sentencepiece.sentencepiece_model_pb2',
    'pyarrow.parquet',
    'zstandard',
    'jinja2.sandbox',
    'matplotlib.pyplot',
    'tqdm',
)


def load(root):
    """Import what the commands of the tree `root` need, so that no case has to."""
    sys.path.insert(0, str(root))
    for name in LIBRARIES + SCRIPTS:
        try:
            importlib.import_module(name)
        except ImportError as error:
            if name in SCRIPTS:
                raise
            print(f'without {name}: {error}')
    import torch

    torch.set_num_threads(1)


# -----------------------------------------------------------------------------
# A command in a process of its own


class Command:
    """
    `args` run in the folder `box`. After poll() has said True: code (None: it was killed), why (it was
    killed: 'hang', 'memory' or ''), seconds, peak (bytes of memory), out, err and the lines of `seen`.
    """

    def __init__(self, args, box, most, typed='', environment=None):
        self.box, self.most, self.environment = Path(box), most, environment or {}
        self.code, self.why, self.peak, self.moved = None, '', 0, (0, time.monotonic())
        self.began = time.monotonic()
        for name in ('home', 'tmp'):
            os.makedirs(self.box / name, exist_ok=True)
        self.files = {
            name: self.box.parent / f'{self.box.name}.{name}' for name in ('out', 'err', 'seen', 'in')
        }
        self.files['in'].write_text(typed)
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                self.child(args)
            finally:
                os._exit(99)

    def child(self, args):
        os.setsid()
        os.chdir(self.box)
        os.environ |= {'HOME': str(self.box / 'home'), 'TMPDIR': str(self.box / 'tmp')} | self.environment
        tempfile.tempdir = str(self.box / 'tmp')
        for fd, name, how in (
            (0, 'in', os.O_RDONLY),
            (1, 'out', os.O_WRONLY | os.O_CREAT | os.O_APPEND),
            (2, 'err', os.O_WRONLY | os.O_CREAT | os.O_APPEND),
        ):
            os.dup2(os.open(self.files[name], how, 0o600), fd)
        sys.stdin, sys.stdout = os.fdopen(0), os.fdopen(1, 'w')
        sys.stderr = os.fdopen(2, 'w', errors='backslashreplace')  # as Python opens it
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**30, 2**30))
        watch(os.open(self.files['seen'], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), self.box)
        sys.argv = list(args)
        code = 1
        try:
            from configurator import run_main

            run_main(sys.modules[args[0].removesuffix('.py')].main)
            code = 0
        except SystemExit as stop:
            code = 0 if stop.code is None else stop.code if isinstance(stop.code, int) else 1
        except BaseException:
            import traceback

            traceback.print_exc()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)

    def poll(self):
        """Whether it has ended; kills it where it takes too long or too much."""
        pid, status, usage = os.wait4(self.pid, os.WNOHANG)
        if not pid:
            self.look()
            return False
        self.seconds = time.monotonic() - self.began
        self.peak = max(self.peak, 1024 * usage.ru_maxrss)
        self.code = None if self.why else os.waitstatus_to_exitcode(status)
        self.kill()  # processes that it may have left
        self.out, self.err, self.seen = (read(self.files[name]) for name in ('out', 'err', 'seen'))
        for path in self.files.values():
            path.unlink(missing_ok=True)
        return True

    def look(self):
        try:
            with open(f'/proc/{self.pid}/status') as f:
                held = next((1024 * int(line.split()[1]) for line in f if line.startswith('VmHWM')), 0)
            with open(f'/proc/{self.pid}/stat') as f:
                fields = f.read().rpartition(')')[2].split()
        except OSError:
            return
        worked = (int(fields[11]) + int(fields[12])) / os.sysconf('SC_CLK_TCK')
        now = time.monotonic()
        if worked > self.moved[0] + 0.05:
            self.moved = worked, now
        self.peak = max(self.peak, held)
        if held > self.most:
            self.why = 'memory'
        elif worked > SECONDS or now - self.moved[1] > SECONDS or now - self.began > 12 * SECONDS:
            self.why = 'hang'
        if self.why:
            self.kill()

    def kill(self):
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)


def read(path):
    return path.read_bytes().decode(errors='replace') if path.exists() else ''


def watch(log, box):
    """
    From here on, write a line to `log` for each program that is started, each connection, and each file
    outside of `box` that is opened to be written.
    """
    changes = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    inside = (str(box) + os.sep, '/dev/', '/proc/')

    def hook(event, args):
        if event in ('os.system', 'os.exec', 'os.posix_spawn', 'subprocess.Popen', 'pty.spawn'):
            ours = sys.modules.get('features.chat.jinja')  # renders chat templates, with limits
            is_call = event == 'subprocess.Popen' and ours
            if is_call and list(args[1]) == [sys.executable, '-I', ours.__file__]:
                return
            line = f'started {args[0]}'
        elif event == 'socket.connect' and args[0].family != socket.AF_UNIX:
            line = f'connected to {args[1]}'
        elif event == 'open' and isinstance(args[0], str) and (args[2] or 0) & changes:
            path = os.path.abspath(args[0])
            if path.startswith(inside):
                return
            line = f'wrote {path}'
        else:
            return
        os.write(log, (line + '\n').encode(errors='replace'))

    sys.addaudithook(hook)


# -----------------------------------------------------------------------------
# A case


def make_box(box, honest):
    """A folder with copies of all honest folders, a secret, and places for output."""
    shutil.copytree(honest, box, symlinks=True)
    for name in ('home/.ssh', 'tmp', 'out', 'outside'):
        os.makedirs(box / name)
    (box / 'home/.ssh/id_ed25519').write_text(SECRET)
    (box / 'outside/secret.txt').write_text(SECRET)
    (box / 'outside/secret.json').write_text(json.dumps({'secret': SECRET}))


def listing(box, without):
    """{path: what is there} of all in a folder, without some folders."""
    found = {}
    for folder, folders, names in os.walk(box):
        inside = os.path.relpath(folder, box)
        if inside in without:
            folders.clear()
            continue
        for name in folders + names:
            path = os.path.join(folder, name)
            place = os.path.relpath(path, box)
            if os.path.islink(path):
                found[place] = os.readlink(path)
            elif os.path.isfile(path) and os.path.getsize(path) < 2**24:
                found[place] = hashlib.sha256(Path(path).read_bytes()).hexdigest()
            elif os.path.isfile(path):
                found[place] = os.path.getsize(path)
            else:
                found[place] = 'folder' if os.path.isdir(path) else 'other'
    return {place: what for place, what in found.items() if place not in without}


class Running:
    """A case whose command runs."""

    def __init__(self, case, args, box, honest, growth):
        self.case, self.args, self.box, self.growth = case, args, box, growth
        make_box(box, honest)
        if case:
            case.write(box)
        self.own = (*OUTPUT, *(case.own if case else ()))
        self.before = listing(box, (*self.own, 'tmp'))
        self.held = own_memory()
        most = self.held + 2 * growth + MEMORY
        self.command = Command(
            args, box, most, case.typed if case else '', case.environment if case else None
        )

    def poll(self):
        return self.command.poll()

    def result(self):
        """What the command did, as a dict; 'problems': what it should not have done."""
        command, case = self.command, self.case
        growth = max(0, command.peak - self.held)
        found = {
            'name': case.name,
            'format': case.format,
            'args': list(self.args),
            'expected': case.expected,
            'code': command.code,
            'seconds': round(command.seconds, 2),
            'MB': growth // 2**20,
            'said': command.err.strip()[-2000:],
        }
        found['problems'] = list(self.problems(growth))
        return found

    def problems(self, growth):
        command, case = self.command, self.case
        lines = [line for line in command.err.splitlines() if line.strip()]
        if command.why == 'hang':
            yield f'hang: longer than {SECONDS} s'
        if command.why == 'memory' or growth > 2 * self.growth + MEMORY:
            yield f'memory: {growth // 2**20} MB, with the honest file {self.growth // 2**20} MB'
        if (self.box / 'executed').exists() or 'started' in command.seen:
            yield f'executed: {command.seen.strip()[:200]}'
        elif command.seen.strip():
            yield f'outside: {command.seen.strip()[:200]}'
        after = listing(self.box, (*self.own, 'tmp'))
        changed = sorted(
            place
            for place in after.keys() | self.before.keys()
            if after.get(place) != self.before.get(place) and place != 'executed'
        )
        if changed:
            yield f'outside: changed {", ".join(changed[:4])}'
        if (
            not case.secret_is_shown
            and any(
                SECRET.encode() in path.read_bytes()
                for path in (self.box / 'out').rglob('*')
                if path.is_file() and not path.is_symlink()
            )
            or (not case.secret_is_shown and SECRET in command.out + command.err)
        ):
            yield 'secret: copied or shown'
        if 'Traceback (most recent call last)' in command.err or 'panicked at' in command.err:
            yield f'traceback: {lines[-1][:200]}'
        elif command.code is not None and command.code < 0:
            yield f'signal: {signal.Signals(-command.code).name}'
        elif command.code is not None and (command.code not in (0, 2)):
            yield f'code: {command.code}: {lines[-1][:200] if lines else ""}'
        elif (
            command.code == 2
            and case.expected != 'accepted'
            or command.code == 0
            and case.expected == 'refused'
        ):
            yield from self.of_refusal(lines)
        elif command.code is not None and command.code != 0:
            yield f'code: refused, though it is harmless: {lines[-1][:300] if lines else ""}'
        # what sample.py writes into a file is the text, as it is
        shown = command.err + (command.out if self.args[0] != 'sample.py' else '')
        if any(ord(c) < 32 and c not in '\t\r\n' or ord(c) in range(0x7F, 0xA0) for c in shown):
            yield 'escapes: a control character is shown'

    def of_refusal(self, lines):
        if self.command.code != 2:
            yield 'code: accepted, though it must be refused'
        elif len(lines) != 1:
            yield f'lines: {len(lines)} in place of one'
        elif self.case.names and not any(name in lines[0] for name in self.case.names):
            yield f'name: the line does not name {self.case.names[0]}'
        elif len(lines[0]) > 1200:
            yield f'lines: one of {len(lines[0])} characters'
        left = [str(path.relative_to(self.box)) for path in (self.box / 'out').rglob('*')]
        left += [str(path.relative_to(self.box)) for path in (self.box / 'tmp').rglob('*')]
        if left and not self.case.may_leave:
            yield f'left: {", ".join(left[:4])}'

    def remove(self):
        shutil.rmtree(self.box, ignore_errors=True)


def own_memory():
    with open('/proc/self/status') as f:
        return next(1024 * int(line.split()[1]) for line in f if line.startswith('VmRSS'))


# -----------------------------------------------------------------------------


def wait(command):
    while not command.poll():
        time.sleep(0.01)


def make_honest(folder):
    """The honest folders, by minnow's scripts. Raises RuntimeError if one fails."""
    import honest

    def call(*args):
        command = Command(args, folder, 2**40)
        wait(command)
        if command.code != 0:
            raise RuntimeError(f'{" ".join(args)}: {command.code}\n{command.out}{command.err}')

    honest.make(folder, call)
    for name in ('home', 'tmp'):
        shutil.rmtree(folder / name, ignore_errors=True)


def run(cases, work, jobs=2, say=print, then=''):
    """
    Run Cases in the folder `work`. Returns their results, dicts as Running.result() gives them. then: code
    that takes a protection out, once the honest files have been measured.
    """
    work, results, growths, active = Path(work), [], {}, []
    honest = work / 'honest'
    if not honest.exists():
        os.makedirs(honest)
        make_honest(honest)
    for case in cases:  # what each command takes with the honest files, which it must accept
        for args in case.like or case.commands:
            if args not in growths:
                running = Running(None, args, work / 'box', honest, 2**33)
                wait(running)
                growths[args] = max(0, running.command.peak - running.held)
                if running.command.code != 0:
                    raise RuntimeError(f'{" ".join(args)}: refused with honest files: {running.command.err}')
                running.remove()
    exec(then, {})
    todo = [
        (case, args, (case.like or case.commands)[n])
        for case in cases
        for n, args in enumerate(case.commands)
    ]
    todo.reverse()
    number = 0
    try:
        while todo or active:
            while todo and len(active) < jobs:
                case, args, like = todo.pop()
                number += 1
                active.append(Running(case, args, work / f'box{number}', honest, growths[like]))
            ended = [running for running in active if running.poll()]
            for running in ended:
                active.remove(running)
                results.append(running.result())
                running.remove()
                for problem in results[-1]['problems']:
                    say(f'{results[-1]["name"]} ({" ".join(results[-1]["args"][:2])}): {problem}', flush=True)
            if not ended:
                time.sleep(0.005)
    finally:
        for running in active:
            running.command.kill()
    return results


def summary(results):
    """A table in Markdown: per format the cases, those that held, and the kinds of problems."""
    lines = ['| format | cases | held | did not |', '|---|---|---|---|']
    formats = {}
    for result in results:
        formats.setdefault(result['format'], []).append(result)
    for name in [*sorted(formats), 'all']:
        rows = results if name == 'all' else formats[name]
        kinds = {}
        for row in rows:
            for kind in {problem.partition(':')[0] for problem in row['problems']}:
                kinds[kind] = kinds.get(kind, 0) + 1
        held = sum(not row['problems'] for row in rows)
        told = ', '.join(f'{count} {kind}' for kind, count in sorted(kinds.items()))
        lines.append(f'| {name} | {len(rows)} | {held} | {told} |')
    return '\n'.join(lines)


def chosen(cases, wanted, quick):
    """The Cases with one of the texts `wanted` in =NAME=, or `quick` of the fast ones, or all."""
    if wanted:
        return [case for case in cases if any(text in f'={case.name}=' for text in wanted)]
    if not quick:
        return cases
    fast = [case for case in cases if is_fast(case)]
    formats = {}
    for case in random.Random(0).sample(fast, len(fast)):
        formats.setdefault(case.format, []).append(case)
    turns = itertools.zip_longest(*formats.values())  # one of each format, then a second one, …
    return [case for turn in turns for case in turn if case][:quick]


def is_fast(case):
    slow = (' GB', 'MB', '/dev/zero', '10**9', 'slow', 'loop', '100,000', '10**7', 'pipe')
    scripts = {args[0] for args in case.commands}
    return len(case.commands) == 1 and scripts <= {'sample.py', 'prepare.py', 'surgery.py'} and not any(
        text in case.name for text in slow
    )


def main():
    options = dict(arg[2:].partition('=')[::2] for arg in sys.argv[1:] if arg.startswith('--'))
    wanted = [arg for arg in sys.argv[1:] if not arg.startswith('--')]
    root = Path(options.get('root', HERE.parents[1])).resolve()
    sys.path.insert(0, str(HERE))
    load(root)
    from cases import CASES

    cases = chosen(CASES, wanted, int(options.get('quick', 0)))
    where = '/dev/shm' if os.path.isdir('/dev/shm') else None
    work = options.get('work') or tempfile.mkdtemp(prefix='hostile-', dir=where)
    os.environ['MPLCONFIGDIR'] = os.path.join(work, 'matplotlib')
    os.makedirs(os.environ['MPLCONFIGDIR'], exist_ok=True)
    began = time.monotonic()
    try:
        results = run(cases, work, int(options.get('jobs', 2)), then=options.get('break', ''))
    finally:
        if 'work' not in options:
            shutil.rmtree(work, ignore_errors=True)
    if options.get('report'):
        Path(options['report']).write_text(json.dumps(results, indent=1))
    print(summary(results))
    bad = sum(bool(result['problems']) for result in results)
    print(f'{len(cases)} files, {len(results)} commands, {bad} did harm; {time.monotonic() - began:.0f} s')
    sys.exit(1 if bad else 0)


if __name__ == '__main__':
    main()
