"""
Fault injection for tests. The code marks points, such as faults.at('save:renamed'); FAULT says what happens
at some of them:

    FAULT='save:renamed=kill loss@7/1=nan' python train.py …     POINT[@STEP][/RANK]=ACTION, space-separated

kill and term send this process a signal, exit ends it at once, hang sleeps for ever, slow sleeps for half a
second, full simulates a full disk. The other actions change the value that is passed: nan, inf and large
change a loss, inf the gradient and shift a weight of a model. Without FAULT, at() does nothing. After a
restart by torchrun, no fault happens again.
"""
import errno
import os
import re
import signal
import time

PATTERN = re.compile(r'([\w:]+)(?:@(\d+))?(?:/(\d+))?=(\w+)')
FAULTS = []


def at(point, step=None, value=None):
    """`value`, changed by the fault that FAULT defines for this point."""
    return value


def happen(point, step=None, value=None):
    for where, when, rank, action in FAULTS:
        if where == point and when in ('', str(step)) and rank in ('', os.environ.get('RANK', '0')):
            changed = ACTIONS[action](value)
            value = value if changed is None else changed
    return value


def hang(value):
    time.sleep(10 ** 6)


def full(value):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def first_weight(model):
    return next(p for p in model.parameters() if p.requires_grad)


def infinite_gradient(value):
    """Make the gradient of the next backward pass infinite."""
    if not hasattr(value, 'parameters'):
        return value + float('inf')

    def once(gradient):
        handle.remove()
        return gradient + float('inf')
    handle = first_weight(value).register_hook(once)
    return value


def shift(model):
    first_weight(model).data.view(-1)[0] += 1e-3
    return model


ACTIONS = {
    'kill': lambda value: os.kill(os.getpid(), signal.SIGKILL),
    'term': lambda value: os.kill(os.getpid(), signal.SIGTERM),
    'exit': lambda value: os._exit(13),
    'hang': hang,
    'slow': lambda value: time.sleep(0.5),
    'full': full,
    'nan': lambda value: value + float('nan'),
    'large': lambda value: value * 100,
    'inf': infinite_gradient,
    'shift': shift,
}


def arm():
    """Read FAULT."""
    global at
    for word in os.environ.get('FAULT', '').split():
        found = PATTERN.fullmatch(word)
        if not found or found[4] not in ACTIONS:
            raise SystemExit(f'FAULT={word}: takes POINT[@STEP][/RANK]=ACTION, one of {", ".join(ACTIONS)}')
        FAULTS.append(found.groups(default=''))
    if FAULTS and os.environ.get('TORCHELASTIC_RESTART_COUNT', '0') == '0':
        at = happen


arm()
