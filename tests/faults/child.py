"""
What a process of processes.py does. It imports nothing of ours before its environment is set.
"""
import importlib
import os
import signal
import sys
from functools import partial


def child(root, args, environment, output, folder, constants, left_out, errors=None):
    """
    train.py with these arguments in a working folder, what it says in a file, or 'closed'; errors: a file of
    its own for stderr. constants: {'module.NAME': value} to set; left_out: steps without data, counted from
    0.
    """
    os.setsid()
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
    os.environ.update(environment)
    os.chdir(folder)
    if output == 'closed':  # <&- >&- 2>&-, where Python has None
        sys.stdin = sys.stdout = sys.stderr = sys.__stdin__ = sys.__stdout__ = sys.__stderr__ = None
        os.closerange(0, 3)
    else:
        fd = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(fd, 1)
        os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_APPEND) if errors else fd, 2)
        sys.stdout, sys.stderr = os.fdopen(1, 'w', buffering=1), os.fdopen(2, 'w', buffering=1)
    sys.path.insert(0, str(root))
    sys.argv = ['train.py', *args]
    import torch
    torch.set_num_threads(1)
    from inject import inject

    import train
    from configurator import run_main
    for name, value in constants.items():
        module, _, constant = name.rpartition('.')
        setattr(importlib.import_module(module), constant, value)
    if left_out:
        train.train = partial(train.train, left_out=left_out)
    inject(os.environ['FAULT'])
    run_main(train.main)
