"""
A training run of two ranks on its bad days: killed, suspended, signalled, without room, on a disk and a clock
that fail, with its files cut, moved and replaced under it, beside a second run in its folder. After each
disturbance it went on, or it stopped in one line and lost no sound checkpoint; the same command goes on. Its
end is, bit for bit, that of the run that nobody disturbed.

    python tests/faults/chaos.py --minutes=60 --disturbances=300 --seed=1 --out=chaos.md
    python tests/faults/chaos.py --kinds='kill all,lock'     # these alone; --help lists all

Started again with the same arguments, it goes on where it was killed. It needs a C compiler (shim.c) and, for
a disk of its own, the right to mount one; without that right, it limits the size of files.
"""
import argparse
import collections
import errno
import json
import os
import pty
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))

from conftest import SmallDisk, sha256, write_dataset
from processes import SMALL, Processes, fingerprint
from shim import Shim

import checkpoint

HANG = 8  # hang_timeout in seconds
PATIENCE = 300  # seconds until it neither goes on nor stops: other programs may need the machine too
KEEP = 3  # keep_checkpoints
LOG_INTERVAL = 5
LONG = ['--checkpoint_interval=25', '--eval_interval=100', f'--keep_checkpoints={KEEP}',
        f'--log_interval={LOG_INTERVAL}', '--lr_decay_iters=5000', '--warmup_iters=5',
        f'--hang_timeout={HANG}']
NOISE = {'seconds', 'tokens_per_second', 'mfu', 'peak_memory_bytes'}
DISK_MB = 16
STOPS = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU}
TORCHS_OWN = re.compile(r'\[(rank\d+\]:\[)?[WE]\d+ |\[[WE]\d+ |  (what\(\)|warnings\.warn)|$')


class Found(Exception):
    """A promise that the run did not keep."""


def wait_until_stopped(pid, seconds=5):
    """Until no thread of a suspended process runs: a signal does not end a call of the kernel at once."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with suppress(OSError):  # a thread that has just ended
            threads = [path.read_text() for path in Path(f'/proc/{pid}/task').glob('*/stat')]
            if all(thread.rpartition(')')[2].split()[0] in 'TtZX' for thread in threads):
                return
        time.sleep(0.01)


# -----------------------------------------------------------------------------
# The run, and what is there of it

class Chaos:
    """
    The run in `folder`. outcome of a disturbance: 'on', 'stopped', or 'missed' where it came to nothing, as a
    fault on a file that was not written in time.
    """

    def __init__(self, folder, seed):
        self.folder, self.seed = Path(folder), seed
        self.disk, self.data, self.backup = self.folder / 'disk', self.folder / 'data', self.folder / 'backup'
        self.said, self.errors = self.folder / 'said', self.folder / 'errors'
        self.out_dir, self.moved = self.disk / 'run', self.disk / 'moved'
        self.run, self.max_iters = None, 10 ** 6
        self.lost = set()  # records that were cut off the log, as key()
        self.partial = set()  # and those whose loss is of fewer steps: rank 0 saved alone before them
        self.spoilt = set()  # names of checkpoints that a disturbance has damaged
        self.shift = 0
        for path in (self.disk, self.folder):
            path.mkdir(parents=True, exist_ok=True)
        self.shim = Shim(self.folder)
        if not self.data.exists():
            write_dataset(self.data)
            shutil.copytree(self.data, self.folder / 'pristine')
        self.small = self.mount()

    def mount(self):
        """A SmallDisk for the run, or None."""
        if not os.path.ismount(self.disk):
            with suppress(OSError):
                subprocess.run(['mount', '-t', 'tmpfs', '-o', f'size={DISK_MB}m', 'tmpfs', str(self.disk)],
                               capture_output=True)
        return SmallDisk(self.disk) if os.path.ismount(self.disk) else None

    def args(self, out_dir=None):
        return [*SMALL, *LONG, f'--dataset={self.data}', f'--max_iters={self.max_iters}',
                f'--out_dir={out_dir or self.out_dir}']

    def start(self, output=None):
        """Start it, with its output in a file of ours or elsewhere."""
        for path in (self.said, self.errors):
            path.unlink(missing_ok=True)
        self.run = Processes(*self.args(), ranks=2, output=str(output or self.said),
                             errors=None if output else str(self.errors))
        self.output, self.is_early = output, True

    def pids(self):
        return [process.pid for process in self.run.processes if process.is_alive()] if self.run else []

    def records(self):
        """The records of its log, without what differs from run to run."""
        return [{name: value for name, value in record.items() if name not in NOISE}
                for record in checkpoint.read_records(self.out_dir / 'log.jsonl')]

    def seconds(self):
        """The seconds in its log."""
        return [record['seconds'] for record in checkpoint.read_records(self.out_dir / 'log.jsonl')
                if 'seconds' in record]

    def last_step(self):
        """The step of the last record of its log; -1 without one."""
        with suppress(OSError), open(self.out_dir / 'log.jsonl', 'rb') as f:
            f.seek(max(0, f.seek(0, 2) - 4096))
            for line in reversed(f.read().splitlines()):
                with suppress(ValueError, KeyError, TypeError):
                    return json.loads(line)['step']
        return -1

    def sound(self):
        """{step: folder} of its sound checkpoints, and of those that it has set aside."""
        found = {}
        with suppress(FileNotFoundError):
            for name in sorted(os.listdir(self.out_dir), reverse=True):  # those set aside first
                folder = self.out_dir / name
                if re.fullmatch(r'step_\d{8}(\.damaged)?', name) and checkpoint.damage(str(folder)) is None:
                    found[int(name[5:13])] = folder
        return found

    @contextmanager
    def held(self):
        """Suspend it for a moment."""
        for pid in self.pids():
            os.kill(pid, signal.SIGSTOP)
            wait_until_stopped(pid)
        try:
            yield
        finally:
            for pid in self.pids():
                os.kill(pid, signal.SIGCONT)

    def look(self):
        """Remember what is there, and copy it."""
        with self.held():
            self.before, self.best_before = self.sound(), self.best()
            shutil.rmtree(self.backup, ignore_errors=True)
            if self.out_dir.exists():
                shutil.copytree(self.out_dir, self.backup)

    def best(self):
        """(name, loss) as out_dir/best has it; (None, None) without one."""
        with suppress(OSError, ValueError, KeyError, TypeError):
            entry = json.loads((self.out_dir / 'best').read_text())
            return entry['checkpoint'], entry['val_loss']
        return None, None

    # --- waiting ---

    def progress(self, seconds, times=3):
        """Whether its log grows so many times before it ends or the time is over."""
        end, ups, last = time.monotonic() + seconds, 0, None
        while time.monotonic() < end and len(self.pids()) == 2:
            step = self.last_step()
            if last is not None and step > last:
                ups += 1
            if ups == times:
                return True
            last = step
            time.sleep(0.02)
        return False

    def pass_steps(self, count):
        """Whether it makes so many steps before it ends."""
        end, wanted = time.monotonic() + PATIENCE, self.last_step() + count
        while time.monotonic() < end and len(self.pids()) == 2 and self.last_step() < wanted:
            time.sleep(0.02)
        return self.last_step() >= wanted

    def pass_saves(self, times, is_over=lambda: False, seconds=60):
        """Wait until it has saved so many times, or has ended, or is_over()."""
        end, newest = time.monotonic() + seconds, None
        while time.monotonic() < end and len(self.pids()) == 2 and not is_over():
            found = checkpoint.checkpoints(str(self.out_dir))[:1]
            times -= newest is not None and found != newest
            if times <= 0:
                return
            newest = found
            time.sleep(0.02)

    def begin(self, chance, early=0.3, saving=0.3):
        """
        Let it run, and wait for a moment: a second after its start, in a step, or in a save. is_early: it may
        be at its start.
        """
        if not self.run:
            self.start()
            if chance.random() < early and saving < 1:
                time.sleep(chance.random() * 3)
                self.look()
                return
        self.is_early = False
        if not self.progress(PATIENCE):
            raise Found(f'not resumed: {self.end(0 if self.pids() else 5)}')
        if chance.random() < saving:
            end = time.monotonic() + 3
            while time.monotonic() < end and not list(self.out_dir.glob('step_*.tmp')):
                time.sleep(0.002)
        else:
            time.sleep(chance.random())
        self.look()

    def end(self, seconds=PATIENCE):
        """(exit codes, what it said, its errors) once it has ended. The code of a rank that hangs is None."""
        end = time.monotonic() + seconds
        while self.pids() and time.monotonic() < end:
            time.sleep(0.02)
            if self.is_early and len(self.pids()) == 1:  # it waits for the other: torchrun ends it
                end = min(end, time.monotonic() + 15)
        codes = [process.exitcode for process in self.run.processes]
        if self.is_early and len(self.pids()) == 1:
            codes.remove(None)
        self.run.kill()
        for process in self.run.processes:
            process.join()
        said, errors = (path.read_text(errors='replace') if path.exists() else ''
                        for path in (self.said, self.errors))
        self.run = None
        return codes, said, errors

    def settle(self, *numbers, hang=False, must_stop=False):
        """
        Wait until it goes on or has stopped, and judge that. numbers: signals that it was sent; hang: it may
        say that a rank hangs; must_stop: it may not go on. Returns the outcome.
        """
        if not must_stop and self.progress(PATIENCE):
            if hang:  # a rank that has found a hang lets the others speak before it ends
                time.sleep(HANG)
            if len(self.pids()) == 2:
                self.judge_files()
                return 'on'
        if not must_stop and len(self.pids()) == 2:
            raise Found(f'neither goes on nor stops: {self.end(0)}')
        ended = self.end()
        self.judge(ended, numbers, hang)
        self.judge_files()
        stopped = re.search(r'stopped by \w+ after step (\d+)', ended[1])
        if stopped and int(stopped[1]) not in self.sound():
            raise Found(f'{stopped[0]} without a save: there are {sorted(self.sound())}')
        return 'stopped'

    def judge(self, ended, numbers=(), hang=False):
        """Raise Found unless it ended with a code that says how, and each rank in one line at most."""
        codes, said, errors = ended
        allowed = {2, *(-number for number in numbers)}
        if STOPS & set(numbers):  # a rank that got no signal itself takes it for SIGTERM
            allowed |= {128 + signal.SIGTERM, *(128 + number for number in numbers)}
        if hang:
            allowed.add(1)
        if None in codes or not set(codes) <= allowed:
            raise Found(f'exit codes {codes}: {said[-1500:]} {errors[-3000:]}')
        alone = re.search(r'saved after step (\d+), because of an error', said)
        # a rank was killed or has found a hang, or the log could not be written the second time either
        if alone and (len(set(codes)) > 1 or 'write log.jsonl' in self.detail):
            self.partial.add((-(-int(alone[1]) // LOG_INTERVAL) * LOG_INTERVAL, False))
        if 'Traceback' in errors or 'Traceback' in said:
            raise Found(f'a traceback: {errors[-3000:]}')
        if self.output or (hang and 'no progress for hang_timeout' in errors):
            return
        lines = [line for line in errors.splitlines() if not TORCHS_OWN.match(line)]
        is_ours = all(re.match(r'train\.py: ', line) for line in lines)
        if not is_ours or len(lines) > len(codes) or (2 in codes and not lines):
            raise Found(f'not one line each: exit codes {codes}: {errors[-3000:]}')

    def judge_files(self):
        """Raise Found if a sound checkpoint was lost."""
        with self.held():
            after = self.sound()
            newest = max(self.before, default=-1)
            if max(after, default=-1) < newest:
                raise Found(f'the checkpoint of step {newest} was lost: {sorted(after)} are left, '
                            f'of {sorted(self.before)}; there are {sorted(os.listdir(self.disk))}')
            (name, loss), (new_name, new_loss) = self.best_before, self.best()
            is_lost = name and int(name[5:]) in self.before and int(name[5:]) not in after
            if is_lost and name not in self.spoilt and (new_loss or loss) >= loss:
                raise Found(f'the best checkpoint, {name} ({loss}), was lost: best is {new_name}')
            if new_name and new_name not in self.spoilt and int(new_name[5:]) not in after:
                raise Found(f'best names {new_name}, which is gone: {sorted(after)}')

    def saved(self):
        """Raise Found if it stopped without a checkpoint of its last step."""
        newest, last = max(self.sound(), default=-1), self.last_step()
        if not self.is_early and newest < last:
            raise Found(f'stopped without a save: at step {last}, its newest checkpoint is of step {newest}')

    # --- mending ---

    def mend(self):
        """Undo what a disturbance has left, so that the same command can go on."""
        self.shim.pass_all()
        if self.small:
            self.small.leave(None)
        for path in (self.folder / 'pristine').iterdir():
            if not (self.data / path.name).exists() or sha256(self.data / path.name) != sha256(path):
                self.data.mkdir(exist_ok=True)
                shutil.copy(path, self.data / (path.name + '.new'))
                os.replace(self.data / (path.name + '.new'), self.data / path.name)

    def recover(self):
        """After something was found: a run as it was before."""
        self.kill()
        self.mend()
        for path in (self.out_dir, self.moved):
            shutil.rmtree(path, ignore_errors=True)
        if self.backup.exists():
            shutil.copytree(self.backup, self.out_dir)

    def kill(self):
        if self.run:
            self.end(0)


# -----------------------------------------------------------------------------
# Disturbances. Each waits for its moment, and returns the outcome

def send(c, chance, number, whom='any'):
    """A signal to all ranks or to one. Those that ask it to stop have it save first."""
    c.begin(chance)
    rank = {'all': None, 'one': chance.randrange(2), 'any': chance.choice((None, 0, 1))}[whom]
    c.run.kill(number, rank)
    outcome = c.settle(number, must_stop=True)
    if number in STOPS:
        c.saved()
    return outcome


def suspend(c, chance, whom, seconds):
    """SIGSTOP and, after so many seconds, SIGCONT."""
    c.begin(chance, early=0)
    rank = chance.randrange(2) if whom == 'one' else None
    c.run.kill(signal.SIGSTOP, rank)
    time.sleep(seconds)
    c.run.kill(signal.SIGCONT, rank)
    return c.settle(hang=whom == 'one' and seconds > HANG)


def fill(c, chance, is_saving):
    """A disk that is full after a random number of bytes; without one of our own, files that may not grow."""
    c.begin(chance, saving=float(is_saving))
    room = int(1.5e6 * chance.random() ** 3)
    if c.small:
        with c.held():  # or it takes the room before we do
            c.small.leave(min(room, shutil.disk_usage(c.disk).free - 4096))
    else:
        for pid in c.pids():
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
    c.pass_saves(2)
    outcome = c.settle()
    c.mend()
    for pid in c.pids():
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return outcome


CHECKPOINT = ('model.safetensors', 'optimizer.pt', 'state.json', 'manifest.json')
# .tmp/.tmp: model.safetensors, until it is complete
WRITTEN = ('.tmp/.tmp', *CHECKPOINT[1:], 'step_', 'log.jsonl', 'best', 'settings.json')
ERRORS = (errno.EIO, errno.ESTALE, errno.ENOSPC)


def fail(c, chance, call, paths, errors, is_start=None):
    """Calls of the C library that fail, after some that pass: in a run that goes on, or that starts."""
    path, error, skip = chance.choice(paths), chance.choice(errors), chance.randrange(3)
    times = chance.choice((1, 1, 3, 10 ** 6))
    is_start = chance.random() < 0.4 if is_start is None else is_start
    if is_start:
        stop(c)
        c.look()
        c.shim.fail(call, error, path, skip, times)
        c.start()
    else:
        c.begin(chance, early=0)
        c.shim.fail(call, error, path, skip, times)
    c.pass_saves(1 if is_start else skip + 1, c.shim.hits)
    c.detail = f'{"start: " * is_start}{call} {path}: {errno.errorcode.get(error, "short")} x {times}'
    last, outcome = c.last_step(), c.settle()
    if path == 'log.jsonl' and not is_start and times > 3:  # a record cannot be written, but all else
        c.lost |= {(last + LOG_INTERVAL * n, False) for n in range(3)}
        c.lost.add((last // 100 * 100 + 100, True))
    return outcome if c.shim.pass_all() else 'missed'


def fail_data(c, chance):
    """The data cannot be read, or in parts. What was trained is saved first."""
    call, is_start = chance.choice(('read', 'read', 'open')), chance.random() < 0.4
    errors = (errno.EIO, errno.ESTALE, 0) if call == 'read' else (errno.EIO, errno.ESTALE, errno.EACCES)
    paths = ('.bin', '.idx', 'meta.json') if is_start else ('.bin',)
    outcome = fail(c, chance, call, paths, errors, is_start)
    if outcome == 'stopped':
        c.saved()
    return outcome


def stop(c):
    """End it in between, as a user does. This is no disturbance."""
    if c.run:
        c.run.kill(signal.SIGTERM)
        c.judge(c.end(), [signal.SIGTERM])


def vanish(c, chance, how):
    """Nobody can take any longer what it prints."""
    stop(c)
    if how in ('pipe', 'full pipe'):
        pipe = c.folder / 'pipe'
        pipe.unlink(missing_ok=True)
        os.mkfifo(pipe)
        c.start(pipe)
        reader = subprocess.Popen(['sh', '-c', f'exec cat {pipe} > {c.said}'])
    elif how == 'terminal':
        ours, theirs = pty.openpty()
        c.start(os.ttyname(theirs))
        with open(c.said, 'wb') as f:
            reader = subprocess.Popen(['cat'], stdin=ours, stdout=f, stderr=subprocess.DEVNULL)
        os.close(ours)
    else:
        reader = None
        c.start('/dev/full' if how == 'full' else 'closed')
    try:
        c.begin(chance)
        if how == 'full pipe':  # its reader sleeps, and there is no room in it
            reader.send_signal(signal.SIGSTOP)
            with suppress(BlockingIOError), open(pipe, 'wb', buffering=0, opener=without_waiting) as f:
                while f.write(bytes(4096)):
                    pass
            return c.settle()
    finally:
        if how == 'terminal':
            os.close(theirs)
        if reader:
            reader.kill()
            reader.wait()
    return c.settle(*[signal.SIGHUP] * (how == 'terminal'))


def without_waiting(path, flags):
    return os.open(path, os.O_WRONLY | os.O_NONBLOCK)


def set_clock(c, chance):
    """The wall clock jumps by hours. The seconds in the log are those that went by."""
    c.begin(chance, early=0)
    with c.held():
        before = len(c.seconds())  # the log may have been cut earlier
        c.shift += int(chance.choice((-1, 1)) * chance.uniform(600, 12 * 3600))
        c.shim.shift(c.shift)
    outcome = c.settle()
    with c.held():
        seconds = c.seconds()[max(0, before - 1):]
    if any(later < earlier - 1 or later > earlier + 120 for earlier, later in zip(seconds, seconds[1:])):
        raise Found(f'the seconds in the log jump: {seconds}')
    return outcome


def minutes(c, chance):
    """A run of its own with --minutes, whose wall clock jumps: it ends in time."""
    c.begin(chance, early=0)
    out = c.folder / 'minutes'
    shutil.rmtree(out, ignore_errors=True)
    args = [arg for arg in c.args(out) if not arg.startswith(('--max_iters', '--lr_decay'))]
    began = time.monotonic()
    with c.held():
        processes = Processes(*args, '--minutes=0.3', '--compile=False', ranks=1)
        processes.wait_for('step 10/')
        hours = chance.choice((-5, 5))
        c.shim.shift(c.shift + 3600 * hours)
        codes, said = processes.wait(PATIENCE)
        c.shim.shift(c.shift)
    if codes == [2] and 'give more minutes' in said:  # a slow machine
        return 'missed'
    if codes != [0] or time.monotonic() - began > 18 + 60:
        raise Found(f'--minutes=0.3 and a clock that jumps by {hours} hours: exit codes {codes} after '
                    f'{time.monotonic() - began:.0f} s: {said[-1500:]}')
    return c.settle()


def spoil_data(c, chance, how):
    """A file of the data is cut, replaced or gone, while it runs or before it starts."""
    path = c.data / chance.choice(('train_00000.bin', 'train_00001.bin', 'val_00000.bin', 'train_00000.idx',
                                   'meta.json'))
    is_stopped = chance.random() < 0.3
    if is_stopped:
        stop(c)
        c.look()
    else:
        c.begin(chance, early=0)
    if how == 'cut':
        os.truncate(path, chance.randrange(path.stat().st_size))
    elif how == 'gone':
        path.unlink()
    elif how == 'folder gone':
        c.data.rename(c.folder / 'elsewhere')
    else:
        content = bytearray(path.read_bytes())
        random.Random(chance.random()).shuffle(content)
        other = c.data / 'other'
        other.write_bytes(content)
        os.replace(other, path)
    if is_stopped:
        c.start()
    outcome = c.settle()
    if how == 'folder gone':
        (c.folder / 'elsewhere').rename(c.data)
    c.mend()
    if outcome == 'on' and not c.pass_steps(150):  # a file that is open stays cut: it is read once an epoch
        outcome = c.settle(must_stop=True)
    if outcome == 'stopped':
        c.saved()
    if is_stopped and outcome == 'on' and how != 'folder gone' and path.suffix == '.bin':
        raise Found(f'trained on {path.name}, which is {how}')
    return outcome


def rename(c, chance):
    """Its folder gets another name. Then it gets its own again, or the run goes on under the new one."""
    c.begin(chance, early=0)
    c.out_dir.rename(c.moved)
    name, c.out_dir = c.out_dir, c.moved
    try:
        if c.progress(15, times=12):
            outcome = c.settle()
        else:
            outcome = c.settle(must_stop=True)
    finally:
        if name.exists():
            raise Found(f'the folder was made anew: {sorted(os.listdir(name))}')
        if c.run or chance.random() < 0.5:
            c.moved.rename(name)
            c.out_dir = name
        else:
            c.out_dir, c.moved = c.moved, name
    return outcome


def second(c, chance, more, is_running=True):
    """A second run in its folder is refused; the first goes on."""
    if is_running:
        c.begin(chance, early=0)
    else:
        stop(c)
        c.look()
    log = c.records() if not is_running else None
    ranks = chance.choice((1, 2))
    codes, said = Processes(*c.args(), *more, ranks=ranks).wait(60)
    words = 'another process' if is_running else 'belongs to a run with'
    if codes != [2] * ranks or words not in said:
        raise Found(f'a second run ({" ".join(more)}) ended with {codes}: {said[-1500:]}')
    if is_running:
        return c.settle()
    if log != c.records():
        raise Found('a run that was refused has changed the log')
    c.judge_files()
    return 'stopped'


def remove_lock(c, chance):
    """Somebody removes the lock file and starts the run a second time: they do not both write."""
    c.begin(chance, early=0)
    (c.out_dir / 'lock').unlink(missing_ok=True)
    other = Processes(*c.args(), ranks=2, output=str(c.folder / 'second'))
    end = time.monotonic() + 20
    while time.monotonic() < end and c.pids() and any(process.is_alive() for process in other.processes):
        time.sleep(0.05)
    is_both = c.pids() and all(process.is_alive() for process in other.processes)
    resumed = 'resuming' in other.said()
    if is_both and resumed:
        said = other.wait(0)[1]
        raise Found(f'two runs in one folder: {said[-300:]}')
    if c.pids():  # the second one was refused
        codes, said = other.wait(30)
        if codes != [2, 2] or 'Traceback' in said:
            raise Found(f'a second run ended with {codes}: {said[-1500:]}')
        return c.settle()
    c.judge(c.end())
    codes, said = other.wait(0)  # it goes on from where the first one was
    (c.out_dir / 'lock').unlink(missing_ok=True)
    if 'Traceback' in said:
        raise Found(f'the second run: {said[-1500:]}')
    c.judge_files()
    return 'stopped'


def cut(c, chance, name):
    """best, log.jsonl or settings.json is cut or emptied, while it runs or before it starts."""
    is_stopped = chance.random() < 0.5
    if is_stopped:
        if not c.run:
            c.begin(chance, early=0)
        stop(c)
        c.look()
    else:
        c.begin(chance, early=0)
    path = c.out_dir / name
    with c.held():
        if not path.exists():
            return 'missed'
        before = {key(record) for record in c.records()}
        size = path.stat().st_size
        os.truncate(path, chance.choice((0, size // 2, max(0, size - 1), chance.randrange(size + 1))))
        c.lost |= before - {key(record) for record in c.records()}
    if is_stopped:
        c.start()
    return c.settle()


def spoil(c, chance):
    """The newest checkpoint is damaged, while it runs or before it starts, if there is another one."""
    is_stopped = chance.random() < 0.6
    c.begin(chance, early=0)
    if is_stopped:
        stop(c)
        c.look()
    with c.held():
        steps = sorted(step for step, folder in c.before.items() if folder.name[-8:].isdigit())
        if len(steps) < 2:
            return 'missed'
        newest = c.before.pop(steps[-1])
        path = newest / chance.choice(sorted(os.listdir(newest)))
        how = chance.choice(('flip', 'cut', 'gone', 'folder gone'))
        if not path.exists():  # pruned
            return 'missed'
        if how == 'flip':
            content = bytearray(path.read_bytes())
            content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
            path.write_bytes(content)
        elif how == 'cut':
            os.truncate(path, chance.randrange(path.stat().st_size))
        elif how == 'gone':
            path.unlink()
        else:
            shutil.rmtree(newest)
        c.spoilt.add(newest.name[:13])
    if is_stopped:
        c.start()
    return c.settle()


def key(record):
    return record['step'], 'val_loss' in record


KINDS = {
    'kill all': (send, signal.SIGKILL, 'all'),
    'kill one': (send, signal.SIGKILL, 'one'),
    'TERM': (send, signal.SIGTERM),
    'INT': (send, signal.SIGINT),
    'HUP': (send, signal.SIGHUP),
    'USR1': (send, signal.SIGUSR1),
    'USR2': (send, signal.SIGUSR2),
    'XCPU': (send, signal.SIGXCPU),
    'one suspended for 3 s': (suspend, 'one', 3),
    'all suspended for 3 s': (suspend, 'all', 3),
    f'one suspended for {HANG + 5} s': (suspend, 'one', HANG + 5),
    f'all suspended for {HANG + 5} s': (suspend, 'all', HANG + 5),
    'full disk': (fill, False),
    'disk full in a save': (fill, True),
    'data: EIO, ESTALE, short reads': (fail_data,),
    'open: EIO, ESTALE, ENOSPC': (fail, 'open', (*WRITTEN, 'lock'), ERRORS),
    'read: EIO, ESTALE, short': (fail, 'read', (*CHECKPOINT, 'log.jsonl', 'best'),
                                 (errno.EIO, errno.ESTALE, 0), True),
    'write: EIO, ESTALE, ENOSPC, short': (fail, 'write', WRITTEN, (*ERRORS, 0)),
    'fsync: EIO, ESTALE, ENOSPC': (fail, 'fsync', WRITTEN, ERRORS),
    'rename: EIO, ESTALE, ENOSPC': (fail, 'rename', (*WRITTEN, 'model.safetensors'), ERRORS),
    'reader of the pipe killed': (vanish, 'pipe'),
    'reader of the pipe suspended': (vanish, 'full pipe'),
    'terminal closed': (vanish, 'terminal'),
    'output to /dev/full': (vanish, 'full'),
    'output closed': (vanish, 'closed'),
    'clock jumps': (set_clock,),
    'clock and --minutes': (minutes,),
    'data cut': (spoil_data, 'cut'),
    'data replaced': (spoil_data, 'replaced'),
    'data file gone': (spoil_data, 'gone'),
    'data folder gone': (spoil_data, 'folder gone'),
    'out_dir renamed': (rename,),
    'second run': (second, []),
    'second run with another seed': (second, ['--seed=7']),
    'second run from scratch': (second, ['--init_from=scratch', '--n_layer=3']),
    'another run after it': (second, ['--n_layer=3'], False),
    'best cut': (cut, 'best'),
    'log cut': (cut, 'log.jsonl'),
    'settings cut': (cut, 'settings.json'),
    'newest checkpoint damaged': (spoil,),
    'lock removed': (remove_lock,),
}


# -----------------------------------------------------------------------------
# The whole of it

class Report:
    """The counts and what was found so far, on disk: the program may be killed too."""

    def __init__(self, path, out, words):
        self.path, self.out, self.words = path, out, words
        self.state = {'done': 0, 'counts': {}, 'found': [], 'seconds': 0.0, 'steps': [], 'lost': [],
                      'partial': [], 'spoilt': [], 'out_dir': None, 'end': ''}
        if path.exists():
            self.state |= json.loads(path.read_text())
        self.began, self.shown = time.monotonic() - self.state['seconds'], 0.0

    def seconds(self):
        return time.monotonic() - self.began

    def keep(self, c):
        """Save the state; every ten minutes also the page."""
        self.state |= {'seconds': self.seconds(), 'lost': sorted(c.lost), 'partial': sorted(c.partial),
                       'spoilt': sorted(c.spoilt), 'out_dir': str(c.out_dir)}
        checkpoint.replace_json(str(self.path), self.state)
        if time.monotonic() - self.shown > 600:
            self.show()

    def show(self):
        self.shown = time.monotonic()
        if self.out:
            Path(self.out).write_text(self.page())

    def page(self):
        counts, found = self.state['counts'], self.state['found']
        lines = [f'{self.words}: {self.state["done"]} disturbances in {self.state["seconds"] / 60:.1f} '
                 f'minutes, {len(found)} findings', '',
                 '| disturbance | times | went on | stopped | missed | findings |',
                 '|---|---|---|---|---|---|']
        total = collections.Counter()
        for kind in KINDS:
            if kind in counts:
                lines.append(f'| {kind} | ' + ' | '.join(row(counts[kind])) + ' |')
                total.update(counts[kind])
        lines += ['| all | ' + ' | '.join(row(total)) + ' |', '', self.state['end'], '']
        lines += [f'- {n + 1} {kind}: {" ".join(text.split())[:1500]}' for n, kind, text in found]
        return '\n'.join(lines) + '\n'


def row(count):
    names = ('on', 'stopped', 'missed', 'found')
    return [str(sum(count.get(name, 0) for name in names)), *(str(count.get(name, 0)) for name in names)]


def deck(kinds, count, seed):
    """So many kinds, each as often as the others, give or take one, in random order."""
    chance, cards = random.Random(seed), []
    while len(cards) < count:
        cards += chance.sample(kinds, len(kinds))
    return cards[:count]


def disturb(c, report, n, kind):
    """One disturbance: a line, and its count."""
    c.detail, outcome, text = '', 'found', ''
    act, *more = KINDS[kind]
    began = time.monotonic()
    try:
        outcome = act(c, random.Random(f'{c.seed} {n}'), *more)
        c.mend()
        if c.run and not c.output and not c.progress(PATIENCE, times=1):
            raise Found(f'stopped later: {c.end(0 if c.pids() else 5)}')
    except Found as found:
        outcome, text = 'found', f'{c.detail} {found}'
        report.state['found'].append([n, kind, text])
        c.recover()
    counts = report.state['counts'].setdefault(kind, {})
    counts[outcome] = counts.get(outcome, 0) + 1
    report.state['done'] = n + 1
    report.state['steps'].append(c.last_step())
    print(f'{n + 1} {kind}{": " * bool(c.detail)}{c.detail}: {outcome}, step {c.last_step()}, '
          f'{time.monotonic() - began:.1f} s {text}', flush=True)
    report.keep(c)


def compare(c):
    """
    Let the run end, and compare it with one that nobody disturbed. Returns a sentence and whether all is
    well.
    """
    stop(c)
    c.mend()
    c.shim.shift(0)
    c.max_iters = max(c.sound(), default=0) + 30
    problems = []
    codes, said = Processes(*c.args(), ranks=2).wait(300)
    if codes != [0, 0]:
        return f'the run does not end: {codes} {said[-1500:]}', False
    whole = c.folder / 'whole'
    shutil.rmtree(whole, ignore_errors=True)
    codes, said = Processes(*c.args(whole), ranks=2).wait(4 * 3600)
    if codes != [0, 0]:
        return f'the undisturbed run does not end: {codes} {said[-1500:]}', False
    if fingerprint(c.out_dir) != fingerprint(whole):
        problems.append('weights or moments are not those of the undisturbed run')
    ours, c.out_dir, mine = c.records(), whole, c.out_dir
    theirs = {key(record): record for record in c.records()}
    c.out_dir = mine
    keys = [key(record) for record in ours]
    wrong = []
    for record in ours:
        other = dict(theirs.get(key(record), {}))
        if key(record) in c.partial and 'train_loss' in record:
            other['train_loss'] = record['train_loss']
        if other != record:
            wrong.append(record)
    missing = set(theirs) - set(keys) - c.lost
    if wrong:
        problems.append(f'{len(wrong)} records of the log differ, the first: {wrong[0]}')
    if missing:
        problems.append(f'{len(missing)} records of the log are missing, the first: {min(missing)}')
    if len(set(keys)) < len(keys):
        problems.append('records are in the log twice')
    best = [json.loads((folder / 'best').read_text()) for folder in (c.out_dir, whole)]
    if best[0] != best[1]:
        problems.append(f'best is {best[0]}, not {best[1]}')
    if problems:
        return '; '.join(problems), False
    return (f'after {c.max_iters} steps weights, moments, best and the {len(keys)} records of the log are '
            f'those of the run that nobody disturbed; disturbances cut {len(c.lost)} off the log, and '
            f'{len(c.partial)} may have the loss of fewer steps, as a rank had died'), True


def kill_left_over(folder):
    """End the processes of a program that was killed: those that have its shim."""
    mark = f'SHIM={folder}/shim.control'.encode()
    for pid in filter(str.isdigit, os.listdir('/proc')):
        with suppress(OSError):
            if mark in Path(f'/proc/{pid}/environ').read_bytes().split(b'\0'):
                os.kill(int(pid), signal.SIGKILL)


def main():
    parser = argparse.ArgumentParser(description='A run under disturbances.',
                                     epilog='kinds: ' + '; '.join(KINDS))
    parser.add_argument('--minutes', type=float, default=60)
    parser.add_argument('--disturbances', type=int, default=300)
    parser.add_argument('--seed', type=int, default=1)
    parser.add_argument('--kinds', default='', help='only those with one of these words: kill,data')
    parser.add_argument('--out', help='file for the report')
    parser.add_argument('--folder', help='where it works; the default is one of its seed in the folder for '
                        'temporary files')
    given = parser.parse_args()
    os.nice(max(0, 10 - os.nice(0)))
    folder = Path(given.folder or Path(tempfile.gettempdir(), f'minnow-chaos-{given.seed}')).absolute()
    kinds = [kind for kind in KINDS
             if any(word.strip() in kind for word in given.kinds.split(','))]
    folder.mkdir(parents=True, exist_ok=True)
    kill_left_over(folder)
    report = Report(folder / 'report.json', given.out,
                    f'seed {given.seed}, {given.disturbances} disturbances, {given.minutes:g} minutes')
    if report.state['end']:
        sys.exit(report.page())  # it is over
    c = Chaos(folder, given.seed)
    if report.state['out_dir']:
        c.lost, c.partial = ({tuple(one) for one in report.state[name]} for name in ('lost', 'partial'))
        c.spoilt = set(report.state['spoilt'])
        if not c.out_dir.exists() and c.moved.exists():
            c.out_dir, c.moved = c.moved, c.out_dir
        if (folder / 'elsewhere').exists():
            (folder / 'elsewhere').rename(c.data)
        c.mend()
    try:
        for n, kind in enumerate(deck(kinds, given.disturbances, given.seed)):
            if n < report.state['done']:
                continue
            time.sleep(max(0.0, n * 60 * given.minutes / given.disturbances - report.seconds()))
            disturb(c, report, n, kind)
        report.state['end'], is_well = compare(c)
        report.keep(c)
    finally:
        c.kill()
    report.show()
    if c.small:
        subprocess.run(['umount', '--lazy', str(c.disk)], check=True)
    print(report.page())
    sys.exit(not is_well or bool(report.state['found']))


if __name__ == '__main__':
    main()
