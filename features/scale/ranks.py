"""
The processes (ranks) of a run. torchrun starts several, which share the batches; python starts one.
"""
import gc
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
import warnings
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import checkpoint
from configurator import STOP_SIGNALS, UserError
from features.scale import restarts


@contextmanager
def ended_by_signals():
    """
    Context in which a signal that asks to stop ends the process at once, as no handler runs while torch waits
    for the other ranks, up to half an hour.
    """
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    handled = {number: handler for number, handler in before.items() if callable(handler)}
    for number in handled:
        signal.signal(number, signal.SIG_DFL)
    yield
    for number, handler in handled.items():
        signal.signal(number, handler)


class Ranks:
    """This process among those that torchrun started, with the methods of run.OneProcess."""

    def __init__(self, device, hang_timeout=0.0):
        self.rank, self.world = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
        self.device, self.watch = device, None
        self.lockstep = False  # whether all have to make the same passes through the network (shard.py)
        if self.world > 1:  # gloo beside nccl: counts and flags are exchanged without waiting for the GPU
            backend = 'cpu:gloo,cuda:nccl' if device.type == 'cuda' else 'gloo'
            # the watch is to speak first
            with ended_by_signals():
                dist.init_process_group(backend, timeout=timedelta(seconds=max(1800, 12 * hang_timeout)))
            self.watch = Watch(self.rank, self.world, hang_timeout) if hang_timeout else None

    @property
    def first(self):
        return self.rank == 0

    def beat(self, doing):
        """Say that this rank goes on, and with what: a step for all ranks to take in the same order."""
        if self.watch:
            self.watch.beat(doing)

    def alive(self, doing=None):
        """Report that this rank is still working, within its own steps."""
        if self.watch:
            self.watch.doing, self.watch.quiet = doing or self.watch.doing, 0.0

    @contextmanager
    def patient(self, compiles):
        """
        Around a step or an evaluation, of all ranks: if it compiles, the others wait for it ten times as
        long.
        """
        if self.watch:
            self.watch.compiles = compiles
        yield
        self.alive()
        if self.watch:
            self.watch.compiles = False

    def end(self):
        """
        Shut down together with the other ranks. A rank that has failed just exits, and the others find its
        connections closed.
        """
        if self.world > 1:
            self.unwatch()
            gc.collect()  # gloo aborts at exit if DDP is still alive when its group goes
            dist.destroy_process_group()

    def unwatch(self):
        """Ask rank 0 no more, which may be gone before this rank: torch would print a stack of its own."""
        if self.watch:
            self.watch.store = None

    def sum(self, *values):
        """Sum some numbers over all ranks; a list of floats."""
        total = torch.tensor(values, dtype=torch.float64)
        if self.world > 1:
            self.beat('to add up numbers')
            dist.all_reduce(total)
        return total.tolist()

    def any(self, flag):
        """Whether `flag` is true: here, or where all go in lockstep, on any rank."""
        return self.sum(bool(flag))[0] > 0 if self.lockstep else bool(flag)

    def gather(self, value):
        """The values from all ranks, as a list, on all ranks."""
        out = [value] * self.world
        if self.world > 1:
            self.beat('to compare with the others')
            dist.all_gather_object(out, value)
        return out

    def job(self):
        """
        Names of the torchrun processes that started the ranks, the same after a restart of the ranks by
        these; [] without torchrun.
        """
        return sorted(set(filter(None, self.gather(agent()))))

    def add_up(self, tensor):
        """Sum a tensor on the device over all ranks, in place, asynchronously."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def from_first(self, compute):
        """The result of compute() on rank 0, on all ranks; its UserError too."""
        box = [None]
        self.beat(Watch.BUSY if self.first else 'to hear from rank 0')
        if self.first:
            try:
                box = [compute()]
            except UserError as error:
                box = [error]
        if self.world > 1:
            self.alive('to tell the others')
            dist.broadcast_object_list(box)
        if isinstance(box[0], UserError):
            self.unwatch()
            raise box[0]
        return box[0]

    def say(self, text):
        if self.first:
            with tqdm.external_write_mode():  # above the progress bar
                print(text, flush=True)

    def wrap(self, model):
        """The model wrapped in DDP; a sharded model communicates its gradients itself."""
        if self.world == 1 or self.lockstep:
            return model
        with warnings.catch_warnings():  # torch 2.13 calls it forward_sync_buffers, which 2.11 does not know
            warnings.simplefilter('ignore', FutureWarning)
            # bucket views: no copies of gradients between DDP's buffers and the parameters
            return DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)

    def was_restarted(self, out_dir):
        """
        Whether this torchrun job started the run in out_dir and has restarted its processes after a failure:
        then they resume, even with --init_from=scratch.
        """
        job = self.job()
        if os.environ.get('TORCHELASTIC_RESTART_COUNT', '0') == '0':
            return False

        def look():
            try:
                state = checkpoint.load_state(checkpoint.find(out_dir))
            except UserError:  # none is sound
                return False
            return bool(set(job) & set(state.get('job', ())))
        return self.from_first(look)

    def check_restart(self, out_dir):
        """Raise UserError if torchrun has started this run again, and its folder is no longer at out_dir."""
        restarts.check(out_dir, self)

    def check_complete(self, error):
        """Raise UserError if an error is the one that gloo or NCCL raise when another process has gone."""
        signs = ('Connection closed by peer', 'Connection reset by peer', 'Broken pipe',
                 'NCCL communicator was aborted', 'remote process exited')
        if any(words in str(error) for words in signs):
            self.unwatch()
            raise UserError('another rank has ended: its error is above; '
                            'the same command resumes from the newest checkpoint') from None


def agent():
    """A globally unique name of the torchrun process that started this one; '' without torchrun."""
    if 'TORCHELASTIC_RESTART_COUNT' not in os.environ:
        return ''
    # a file of this attempt, in a folder with a random name: …/attempt_0/0/error.json
    folder = os.environ.get('TORCHELASTIC_ERROR_FILE', '').partition('/attempt_')[0]
    return f'{socket.gethostname()} {os.environ.get("TORCHELASTIC_RUN_ID", "")} {folder}'


def where_it_stands():
    """The stack traces of all other threads of this process."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return ''.join(f'{names.get(ident, ident)}:\n' + ''.join(traceback.format_stack(frame))
                   for ident, frame in sys._current_frames().items() if ident != threading.get_ident())


class Watch:
    """
    A thread that ends this process if the rank makes no progress for `seconds`. It first prints which rank is
    behind and the stack of every thread, because all ranks wait if one hangs. All ranks send the same beats
    in the same order, so the rank with the fewest beats is the one that hangs. It counts its own ticks
    instead of reading the clock, so that a suspended run does not count as hanging.
    """
    BUSY = 'to work for all'  # of rank 0, as saving: may take ten times as long,
    COMPILING = ', compiling'  # and so may this

    def __init__(self, rank, world, seconds):
        self.rank, self.world, self.seconds, self.tick = rank, world, seconds, min(1.0, seconds / 10)
        self.count, self.doing, self.quiet, self.compiles = 0, 'to begin', 0.0, False
        self.asking, self.answered = None, True
        # a connection of its own: the other may be waiting
        self.store = dist.PrefixStore('watch', dist.distributed_c10d._get_default_store()).clone()
        threading.Thread(target=self.look, daemon=True).start()

    def beat(self, doing):
        self.doing, self.quiet = doing, 0.0
        self.count += 1

    def look(self):
        said, known = None, {}
        while self.quiet < self.seconds * (10 if any(map(self.is_slow, known.values())) else 1):
            now = self.count, self.doing + self.COMPILING * self.compiles
            if said != now:
                said = now
                self.reach(lambda store: store.set(str(self.rank), json.dumps(said)))
            time.sleep(self.tick)
            self.quiet += self.tick
            if self.quiet >= self.seconds:
                found = self.reach(lambda store: {rank: json.loads(store.get(str(rank)))
                                                  for rank in range(self.world) if store.check([str(rank)])})
                known = found or known or {self.rank: said}
        least = min(count for count, _ in known.values())
        behind = ', '.join(f'rank {rank} ({doing})' for rank, (count, doing) in known.items()
                           if count == least)
        behind = behind if self.answered else 'not known, rank 0 is gone or cut off'
        # in one go: the others speak at the same time
        sys.stderr.write(f'rank {self.rank}: no progress for hang_timeout={self.seconds:g} seconds; last '
                         f'to move on: {behind}. Run the same command to go on from the newest checkpoint. '
                         f'Where this rank stands:\n{where_it_stands()}')
        sys.stderr.flush()
        time.sleep(5 * self.tick)  # torchrun ends the others when one has gone: let them speak too
        os._exit(1)

    def is_slow(self, said):
        """Whether a rank does what may take ten times as long; said: its beats, and what it does."""
        _, doing = said
        return doing == self.BUSY or doing.endswith(self.COMPILING)

    def reach(self, ask):
        """
        The answer of ask() from the store; None if it does not come in time, because rank 0 is gone or
        unreachable.
        """
        store, found = self.store, []

        def wait():
            with suppress(RuntimeError):
                found.append(ask(store))
        if store and not (self.asking and self.asking.is_alive()):
            # on a network that is gone it may wait for hours
            self.asking = threading.Thread(target=wait, daemon=True)
            self.asking.start()
            self.asking.join(max(2.0, min(30.0, self.seconds / 4)))
        self.answered = bool(found)
        return found[0] if found else None
