"""
Runs of train.py as processes of their own, to be killed, and what they leave as a hash. They are forked from
a server that has imported torch already: a start takes half a second.
"""
import hashlib
import multiprocessing
import os
import signal
import socket
import tempfile
import time
from pathlib import Path

from child import child
from conftest import ROOT, TINY

import checkpoint
from features.moments import read_moments

CONTEXT = multiprocessing.get_context('forkserver')
CONTEXT.set_forkserver_preload(['torch', 'torch._dynamo', 'torch.distributed.fsdp',
                                'torch.distributed.tensor', 'safetensors.torch', 'torch.nn.parallel'])
SMALL = [*TINY, '--dropout=0.1', '--hang_timeout=60']


class Processes:
    """
    A run of `ranks` processes, as torchrun would start them, but not watched over: each ends for itself.
    `each` has more arguments, `folders` the working folder of each rank; `output`: a file, pipe or terminal
    to print to; constants, left_out and errors: see child().
    """

    def __init__(self, *args, ranks=1, fault='', each=None, folders=None, output=None, constants=None,
                 left_out=(), errors=None, **environment):
        self.output = output or tempfile.mktemp(prefix='minnow-')
        with socket.socket() as s:
            s.bind(('127.0.0.1', 0))
            port = str(s.getsockname()[1])
        self.processes = []
        for rank in range(ranks):
            environment |= {'FAULT': fault, 'RANK': str(rank), 'LOCAL_RANK': str(rank),
                            'WORLD_SIZE': str(ranks), 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': port}
            own = [str(arg) for arg in (*args, *(each[rank] if each else ()))]
            given = (ROOT, own, dict(environment), self.output, folders[rank] if folders else ROOT,
                     constants or {}, left_out, errors)
            self.processes.append(CONTEXT.Process(target=child, args=given, daemon=True))
        for process in self.processes:
            process.start()

    def kill(self, number=signal.SIGKILL, rank=None):
        for process in self.processes if rank is None else [self.processes[rank]]:
            if process.is_alive():
                os.kill(process.pid, number)

    def said(self):
        return Path(self.output).read_text() if os.path.exists(self.output) else ''

    def wait_for(self, text, timeout=60):
        """Until it has said `text`, or has ended."""
        end = time.monotonic() + timeout
        while (text not in self.said() and time.monotonic() < end
               and any(process.is_alive() for process in self.processes)):
            time.sleep(0.005)
        return text in self.said()

    def wait(self, timeout=90):
        """
        The exit codes of all, and what they said. Those that are left after `timeout` seconds are killed, and
        their code is None.
        """
        end = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0, end - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        self.kill()
        said = self.said()
        if os.path.exists(self.output):
            os.remove(self.output)
        return codes, said


def run_to_end(*args, **options):
    """The exit codes and what was said of a run that nobody disturbs."""
    return Processes(*args, **options).wait()


def fingerprint(out_dir):
    """
    A hash of the newest sound checkpoint: step, weights, moments. The data that follow are a function of the
    step (test_batches.py).
    """
    folder = checkpoint.find(str(out_dir))
    out = hashlib.sha256(str(checkpoint.load_state(folder)['step']).encode())
    moments = read_moments(folder)
    tensors = checkpoint.read_weights(folder) | {f'{name} {what}': t for name in moments
                                                 for what, t in moments[name].items()}
    for name in sorted(tensors):
        out.update(name.encode() + tensors[name].numpy().tobytes())
    return out.hexdigest()


def step_of(out_dir):
    return int(checkpoint.find(str(out_dir))[-8:])
