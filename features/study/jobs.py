"""
The runs of a sweep, each in a process of its own: one per GPU, or several that share the cores of a CPU.

    out_dirs = run_missing(Sweep(base='config/demo_dense.py', arms={'dense': {'learning_rate': [1e-3, 2e-3]}},
    out='out/mine'))

Runs that are done are not run again. The signals that stop a sweep let its runs save first.
"""
import os
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from checkpoint import is_at, replace_text, writing
from configurator import ROOT, UserError, interrupt, listen
from features.study.runs import read_log, state
from features.study.sweep import Run, expand, is_ended
from run import StopSignal


def run_missing(sweep, jobs=0):
    """
    Run the missing runs of a Sweep, and return the out_dirs of all its runs. jobs: number of processes; 0 =
    one per GPU, or one on a CPU. A run that diverges is a result. If a run fails, the others continue, and a
    UserError is raised at the end.
    """
    runs = expand(sweep)
    with locked(sweep.out) as lock:
        left = [run for run in runs if not is_ended(run)]
        print(f'{sweep.out}: {len(runs)} runs, {len(left)} to do', flush=True)
        with writing(sweep.out, 'make room, then run the same command to continue'):
            failed = work(left, places(jobs), lock)
    if failed:
        run, reason = failed[0]
        raise UserError(f'{len(failed)} of {len(runs)} runs failed; {run.name}: {reason}; more in '
                        f'{run.out_dir}/output.txt. The same command tries again')
    return [run.out_dir for run in runs]


@contextmanager
def locked(folder):
    """
    Lock `folder` for this sweep. The runs inherit the lock, so it is held until the last of them has ended,
    however this process ends. Raises UserError if another sweep holds it.
    """
    import fcntl  # here: Windows has none, and configurator.py has to say so first
    try:
        os.makedirs(folder, exist_ok=True)
        lock = open(os.path.join(folder, '.lock'), 'a')
    except OSError as error:
        raise UserError(f'out={folder}: {error.strerror}: give another') from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f'out={folder}: another sweep is running there: wait for it, '
                            'or give another out') from None
        yield lock


def check_place(folder, lock):
    """Raise UserError if the folder of a sweep is no longer the one that was locked."""
    if not is_at(lock.fileno(), os.path.join(folder, '.lock')):
        raise UserError(f'out={folder}: was renamed or removed while the sweep was running: start it again '
                        'where its runs are now, or anew')


def places(jobs):
    """The environment variables of each process that may run at the same time, a list of dicts."""
    from features.text.workers import cores
    count = torch.cuda.device_count()
    if count:
        visible = os.environ.get('CUDA_VISIBLE_DEVICES')
        gpus = [str(n) for n in range(count)] if visible is None else visible.split(',')
        return [{'CUDA_VISIBLE_DEVICES': gpus[n % len(gpus)]} for n in range(jobs or len(gpus))]
    if jobs > 1:
        threads = max(1, cores() // jobs)
        return [{'OMP_NUM_THREADS': str(threads)} for _ in range(jobs)]
    return [{}]


# -----------------------------------------------------------------------------
# The processes

@dataclass
class Job:
    """A Run whose process has been started."""
    run: Run
    place: dict  # its environment variables
    process: subprocess.Popen
    began: float  # time.monotonic()


def work(runs, free, lock):
    """
    Run all `runs`, as many at a time as there are `free` places. Returns [(run, reason)] of those that
    failed. A stop signal or a full disk lets the active ones save and end, and is then raised.
    """
    progress = Progress(runs)
    queue = list(runs)
    busy = []
    failed = []
    stop = StopSignal()
    stop.listen()  # an exception could come between the start of a process and its place in the list
    try:
        while queue or busy:
            if stop:
                stop.end()
            while queue and free:
                busy.append(start_job(queue.pop(0), free.pop(), lock))
            for job in [job for job in busy if job.process.poll() is not None]:
                busy.remove(job)
                free.append(job.place)
                check_place(os.path.dirname(job.run.out_dir), lock)
                result = outcome(job.run, job.process.returncode)
                if result.startswith('failed'):
                    failed.append((job.run, result))
                progress.say(job, result, queue + [other.run for other in busy])
            time.sleep(0.05)
    except BaseException:  # Ctrl-C, or a full disk
        for job in busy:
            job.process.terminate()
        for job in busy:
            job.process.wait()
        print(f'stopped with {len(queue) + len(busy)} of {len(runs)} runs left: the same command continues',
              flush=True)
        raise
    finally:
        listen(interrupt)
    return failed


class Progress:
    """Prints a line for each run that ends, with an estimate of the remaining minutes."""

    def __init__(self, runs):
        self.count = len(runs)
        self.began = time.monotonic()
        self.flops = 0.0  # of the runs that have ended

    def say(self, job, result, left):
        """Print the result of a job; left: the Runs that have not ended."""
        now = time.monotonic()
        self.flops += job.run.flops
        line = f'{self.count - len(left)}/{self.count} {job.run.name}: {result} in {now - job.began:.0f} s'
        if left:
            line += f'; {len(left)} left'
        flops_left = sum(run.flops for run in left)
        if flops_left and self.flops:  # a Markov table that is counted costs no FLOPs
            line += f', {(now - self.began) * flops_left / self.flops / 60:.0f} min'
        print(line, flush=True)


def start_job(run, place, lock):
    """The Job of a Run, with its process started in this place."""
    return Job(run, place, start(run, place, lock), time.monotonic())


def start(run, place, lock):
    """The process of a Run. It has its own session, so that it gets a Ctrl-C only once, from work()."""
    check_place(os.path.dirname(run.out_dir), lock)
    os.makedirs(run.out_dir, exist_ok=True)
    command = [sys.executable, os.path.join(ROOT, 'train.py'), *run.args]
    with open(os.path.join(run.out_dir, 'output.txt'), 'a', encoding='utf-8') as output:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=os.environ | place,
            start_new_session=True,
            pass_fds=[lock.fileno()])


def outcome(run, code):
    """
    The result of a Run whose process ended with this exit code: 'val_loss X', 'diverged' or 'failed with CODE
    (REASON)'. A divergence is recorded in diverged.txt, so that the run is not repeated.
    """
    if state(run.out_dir, run.settings) == 'done':
        losses = [r['val_loss'] for r in read_log(run.out_dir) if 'val_loss' in r]
        return f'val_loss {losses[-1]:.4f}'
    with open(os.path.join(run.out_dir, 'output.txt'), encoding='utf-8', errors='replace') as f:
        last = f.read().strip().split('\n')[-1]  # only '\n': a printed sample may hold other line separators
    if code == 2 and 'not finite' in last or state(run.out_dir, run.settings) == 'diverged':
        replace_text(os.path.join(run.out_dir, 'diverged.txt'), last + '\n')
        return 'diverged'
    return f'failed with {code} ({last})'
