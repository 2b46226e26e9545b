"""
Faults that tests put into a run: FAULT says what happens at which points.

    FAULT='save:renamed=kill loss@7/1=nan'     POINT[@STEP][/RANK]=ACTION, separated by spaces
    FAULT=… python tests/inject.py --out_dir=… # train.py with them

kill and term send this process a signal, exit leaves it at once, hang sleeps for ever, slow for half a
second, full is a full disk, eio a failed one, memory is used up. The others change a value: nan, inf and
large a loss, inf a gradient, shift a weight. inject() wraps functions of train.py, batches.py and
checkpoint.py, which know nothing of it. After a restart by torchrun no fault happens again.
"""
import errno
import json
import os
import re
import shutil
import signal
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

PATTERN = re.compile(r'([\w:]+)(?:@(\d+))?(?:/(\d+))?=(\w+)')


def hang(value):
    time.sleep(10 ** 6)


def full(value):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_once(value, times=[], most=1):  # noqa: B006 - lasts as long as the process
    if len(times) < most:
        times.append(1)
        full(value)


def fail(value):
    raise OSError(errno.EIO, os.strerror(errno.EIO), 'some/file')


def exhaust(value):
    raise RuntimeError("DefaultCPUAllocator: can't allocate memory")


def shift(model):
    next(p for p in model.parameters() if p.requires_grad).data.view(-1)[0] += 1e-3
    return model


def infinite(value):
    """A loss that is infinite; of a model, its next gradient."""
    if not hasattr(value, 'parameters'):
        return value + float('inf')

    def once(gradient):
        handle.remove()
        return gradient + float('inf')
    handle = next(p for p in value.parameters() if p.requires_grad).register_hook(once)


ACTIONS = {
    'kill': lambda value: os.kill(os.getpid(), signal.SIGKILL),
    'term': lambda value: os.kill(os.getpid(), signal.SIGTERM),
    'exit': lambda value: os._exit(13),
    'hang': hang,
    'slow': lambda value: time.sleep(0.5),
    'full': full,
    'full_once': full_once,
    'full_twice': partial(full_once, most=2),
    'eio': fail,
    'memory': exhaust,
    'nan': lambda value: value + float('nan'),
    'large': lambda value: value * 100,
    'inf': infinite,
    'shift': shift,
}


def inject(text, put=setattr):
    """Put the faults of a FAULT into this process. put: a monkeypatch's setattr takes them out in the end."""
    faults = [PATTERN.fullmatch(word).groups(default='') for word in text.split()]
    if not faults or os.environ.get('TORCHELASTIC_RESTART_COUNT', '0') != '0':
        return
    import batches
    import checkpoint
    import train
    now = SimpleNamespace(saving=None, out_dir=None, is_pruning=False, evaluating=None)

    def at(point, step=None, value=None):
        """`value`, as the fault for this point leaves it."""
        for where, when, rank, action in faults:
            if where == point and when in ('', str(step)) and rank in ('', os.environ.get('RANK', '0')):
                changed = ACTIONS[action](value)
                value = value if changed is None else changed
        return value

    def save(original, out_dir, step, *args, **more):
        now.out_dir, now.saving = out_dir, step
        final = original(out_dir, step, *args, **more)
        at('save:end', step)
        return final

    def write(original, *args):
        original(*args)
        at('save:flushed', now.saving)

    def write_tensors(original, *args):
        at('save:begin', now.saving)
        original(*args)
        at('save:weights', now.saving)

    def write_torch(original, *args):
        original(*args)
        at('save:optimizer', now.saving)

    def replace_json(original, path, value):
        if os.path.basename(path) == 'manifest.json':
            at('save:manifest', now.saving)
        original(path, value)
        if os.path.basename(path) == 'state.json':
            at('save:state', now.saving)

    def sync(original, path):
        if path == now.out_dir:
            at('save:renamed', now.saving)
        original(path)

    def prune(original, *args):
        now.is_pruning = True
        original(*args)
        now.is_pruning = False

    def rmtree(path, **more):
        if now.is_pruning:
            at('save:prune')
        shutil.rmtree(path, **more)

    def append(original, path, text):
        at('log', json.loads(text)['step'])
        original(path, text)

    def compiling(original, run, what, ranks):
        step = sys._getframe(1).f_locals['step']
        now.evaluating = step
        at(what, step, run.model)  # what: step or evaluation
        return original(run, what, ranks)

    def read(self, step):
        at('batch', step)
        return read_batch(self, step)

    def validation_batch(original, *args):
        at('val', now.evaluating)
        return original(*args)

    def train_step(original, run, s, step, *args):
        handle = None
        if any(point == 'loss' for point, *_ in faults):
            handle = run.runner.register_forward_hook(lambda module, inputs, loss: at('loss', step, loss))
        done = original(run, s, step, *args)
        if handle:
            handle.remove()
        return done

    def show_sample(original, *args):
        at('sample', sys._getframe(1).f_locals['step'])
        original(*args)

    for wrapper in (save, write, write_tensors, write_torch, replace_json, sync, prune, append):
        name = wrapper.__name__
        put(checkpoint, name, partial(wrapper, getattr(checkpoint, name)))
    read_batch = batches.Batches.read
    put(batches.Batches, 'read', read)
    put(batches, 'validation_batch', partial(validation_batch, batches.validation_batch))
    put(checkpoint, 'shutil', SimpleNamespace(copy=shutil.copy, rmtree=rmtree))
    for wrapper in (compiling, train_step, show_sample):
        name = wrapper.__name__
        put(train, name, partial(wrapper, getattr(train, name)))


def main():
    """train.py with the faults of FAULT."""
    inject(os.environ.get('FAULT', ''))
    import train
    from configurator import run_main
    run_main(train.main)


if __name__ == '__main__':
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main()
