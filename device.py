"""
The machine: which device, which number format, how fast it is. Measured where documentation misleads.
"""
import os
import shutil
import signal
import time
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch

from configurator import UserError

IMPORTED = time.perf_counter()


@dataclass
class NumericConfig:
    device: str = 'auto'  # cpu, cuda, cuda:1, mps; auto = the fastest available
    dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto'  # dtype of the matmuls; weights stay
    # float32. auto = bfloat16 where it is faster; float32 for greedy decoding, beam search and eval.py


@dataclass
class DeviceConfig(NumericConfig):
    compile: bool | Literal['auto'] = 'auto'  # use torch.compile; auto = where it saves time: training on
    # CUDA, training on CPU for minutes, sampling 4,000 tokens


def pick_device(name):
    """torch.device for a setting. Raises UserError for one that this machine has not."""
    count = {'cpu': 1, 'cuda': torch.cuda.device_count(), 'mps': int(torch.backends.mps.is_available())}
    if name == 'auto':
        name = 'cpu'
        if count['mps']:
            name = 'mps'
        if torch.cuda.is_available():
            name = 'cuda'
    kind, _, number = name.partition(':')
    if kind not in count or (number and not number.isdigit()):
        raise UserError(f'device={name}: takes auto, cpu, cuda, cuda:N or mps')
    if not number and kind == 'cuda':
        number = os.environ.get('LOCAL_RANK', '0')  # torchrun: a GPU each
    number = number or '0'
    if int(number) >= count[kind]:
        raise UserError(f'device={name}: this machine has {count[kind]} {kind} device(s), '
                        f'number {number} was asked for; --device=cpu works everywhere')
    if kind == 'cuda':
        name = f'cuda:{number}'
        torch.cuda.set_device(name)
    torch.set_float32_matmul_precision('high')  # tf32 where there is any
    return torch.device(name)


def pick_dtype(name, device):
    """
    'float32', 'bfloat16' or 'float16'. On a CPU a timed matmul decides: bfloat16 can be 4x faster or 100x
    slower there. One line says so to a user who asks for it where it is slow.
    """
    if device.type == 'cuda' and name == 'auto':
        return 'bfloat16' if torch.cuda.is_bf16_supported(including_emulation=False) else 'float16'
    if device.type == 'cpu' and name in ('auto', 'bfloat16'):
        gain = matmul_flops(device, torch.bfloat16) / matmul_flops(device, torch.float32)
        if name == 'auto':
            return 'bfloat16' if gain > 1.5 else 'float32'
        if gain < 0.5:
            print(f'dtype=bfloat16: {1 / gain:.0f} times slower than float32 on this CPU, '
                  'which has no instructions for it: leave it out', flush=True)
    return 'float32' if name == 'auto' else name


def pick_exact_dtype(name, device):
    """
    pick_dtype() for results that rounding would change: evaluations, greedy text, beams. auto is 'float32',
    and float32 is multiplied without tf32.
    """
    dtype = 'float32' if name == 'auto' else pick_dtype(name, device)
    if dtype == 'float32':
        torch.set_float32_matmul_precision('highest')
    return dtype


def pick_compile(setting, device, flops=0.0):
    """
    Whether to compile; one line says so where it cannot work. auto: on CUDA, and on a CPU for a run of 5e13
    `flops` or more, two minutes: compiling takes 20 s there and saves a fourth of the time (10.6M parameters
    in bfloat16: 8,900 against 6,400 tokens/s).
    """
    is_wanted = setting
    if setting == 'auto':
        is_wanted = device.type == 'cuda' or (device.type == 'cpu' and flops >= 5e13)
    if not is_wanted:
        return False
    compilers = [shutil.which(name) for name in (os.environ.get('CXX', 'g++'), 'clang++', 'cl')]
    missing = ''
    if device.type == 'cpu' and not any(compilers):
        missing = 'C++ compiler'
    if device.type == 'cuda' and find_spec('triton') is None:
        missing = 'triton'
    if missing:
        print(f'compile: no {missing} on this machine, going on without', flush=True)
        return False
    torch._dynamo.config.suppress_errors = True  # code that cannot be compiled runs as it is
    return True


def matmul_flops(device, dtype, n=512, seconds=0.02):
    """FLOP/s of an n x n matmul: the fastest of those that fit into `seconds`, at least three."""
    a = torch.ones(n, n, device=device, dtype=dtype)
    b = torch.ones(n, n, device=device, dtype=dtype)
    return 2 * n ** 3 / fastest(lambda: (a @ b)[0, 0].item(), seconds)


def memory_bandwidth(device, size=2 ** 28, seconds=0.3):
    """Bytes/s of a copy of `size` bytes, read and written: more than any cache holds."""
    a = torch.zeros(size, dtype=torch.uint8, device=device)
    b = torch.ones(size, dtype=torch.uint8, device=device)
    return 2 * size / fastest(lambda: a.copy_(b)[0].item(), seconds)


def fastest(compute, seconds):
    """Seconds of the fastest compute() of those that fit into `seconds`, at least three."""
    times, end = [], time.perf_counter() + seconds
    while len(times) < 4 or time.perf_counter() < end:
        start = time.perf_counter()
        compute()
        times.append(time.perf_counter() - start)
    return min(times[1:])  # the first one sets things up


# dense bf16 (V100, T4: fp16) peaks, from the makers' data sheets
PEAK_FLOPS = {'H200': 989e12, 'H100 PCIe': 756e12, 'H100': 989e12, 'GH200': 989e12, 'B200': 2250e12,
              'A100': 312e12, 'A10G': 70e12, 'A10': 125e12, 'L40S': 362e12, 'L40': 181e12, 'L4': 121e12,
              'RTX 5090': 209e12, 'RTX 4090': 165e12, 'RTX 3090': 71e12, 'V100': 125e12, 'T4': 65e12}


def peak_flops(device, dtype):
    """FLOP/s the device could reach: by a GPU's data sheet, by a CPU's best matmul; None = not known."""
    if device.type == 'cpu':
        return matmul_flops(device, getattr(torch, dtype), 1024, seconds=0.1)
    if device.type == 'cuda' and dtype != 'float32':
        for name, peak in PEAK_FLOPS.items():
            if name in torch.cuda.get_device_name(device):
                return peak
    return None


def process_age():
    """Seconds since this process began, imports included; else since this file was imported."""
    try:
        with open('/proc/self/stat', encoding='utf-8') as f:
            fields = f.read().rpartition(')')[2].split()
        ticks = int(fields[19])  # field 22: when it began, in clock ticks since the machine did
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf('SC_CLK_TCK')
    except (OSError, AttributeError):
        return time.perf_counter() - IMPORTED


def autocast(device, dtype):
    """Context in which matmuls run in `dtype`."""
    if dtype == 'float32':
        return nullcontext()
    return torch.autocast(device.type, getattr(torch, dtype))


# Why numbers are NaN or infinite, and what to do
NOT_FINITE = 'the weights are damaged, or float16 is too narrow for them: try --dtype=float32'


def zero(device):
    """A zero to sum losses in: in float64 the order of the sum hardly matters. MPS has float32 only."""
    return torch.zeros((), device=device, dtype=torch.float32 if device.type == 'mps' else torch.float64)


def is_out_of_memory(error):
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return "can't allocate memory" in str(error) or 'out of memory' in str(error)


def free_memory(device):
    """Bytes that this process can still take, of the GPU or of RAM (in its container); None = not known."""
    if device.type == 'cuda':
        return torch.cuda.mem_get_info(device)[0]
    free = []
    available = read_field('/proc/meminfo', 'MemAvailable:')
    if available is not None:
        free.append(1024 * available)
    with suppress(OSError, ValueError):  # without a limit it is 'max', which is no number
        limit = int(Path('/sys/fs/cgroup/memory.max').read_text())
        used = int(Path('/sys/fs/cgroup/memory.current').read_text())
        page_cache = read_field('/sys/fs/cgroup/memory.stat', 'inactive_file') or 0  # it is given back
        free.append(limit - used + page_cache)
    return min(free, default=None)


def peak_memory(device):
    """The most bytes this process has held: on the GPU, else in RAM."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device)
    peak = read_field('/proc/self/status', 'VmHWM:')
    if peak is not None:  # Linux, where getrusage() would count memory of the process that started this one
        return 1024 * peak
    import resource  # not on Windows
    import sys
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == 'darwin' else 1024 * peak


def read_field(path, name):
    """The number after `name` at the beginning of a line of a file; None without such a line or file."""
    with suppress(OSError):
        with open(path) as f:
            for line in f:
                words = line.split()
                if words and words[0] == name:
                    return int(words[1])
    return None


# -----------------------------------------------------------------------------
# The process

def stop_signals():
    """The signals that ask a run to save and stop."""
    signals = [signal.SIGTERM, signal.SIGINT]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        signals.append(signal.SIGHUP)
    return signals


class StopSignal:
    """
    Remembers the first SIGTERM, Ctrl-C or SIGHUP (the terminal was closed), for the loop to end after its
    step. A second Ctrl-C or SIGTERM ends the process at once. But a SIGTERM within five seconds of another
    signal is the same: where a whole job is told to stop, torchrun passes on the signals that its processes
    have received themselves. So is any SIGHUP: a shell and the system send several. A process that was
    started with SIGHUP ignored, as by nohup, still ignores it.
    """

    def __init__(self):
        self.number, self.since = 0, 0.0

    def listen(self):
        for number in stop_signals():
            signal.signal(number, self.remember)

    def remember(self, number, frame):
        if not self.number or (number == signal.SIGTERM and self.number == signal.SIGHUP):
            self.number, self.since = number, time.monotonic()
        elif number == signal.SIGINT or (number == signal.SIGTERM and time.monotonic() - self.since > 5):
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def __bool__(self):
        return self.number > 0


def print_above(bar, text):
    """Print a line; where a progress bar is on the terminal, above it."""
    if bar is not None:
        bar.clear()
    print(text, flush=True)
    if bar is not None:
        bar.refresh()


class OneProcess:
    """
    A run in a single process. features/scale's Ranks have the same methods for the processes that torchrun
    started; those that take a number, a flag or a value work on all of them together.
    """
    rank, world = 0, 1
    first = True  # whether this is rank 0
    lockstep = False  # whether all ranks must make the same passes through the network, as sharded ones do
    bar = None  # the progress bar on the terminal of rank 0

    def __init__(self, device):
        self.device = device

    def say(self, text):
        """Print on rank 0."""
        print_above(self.bar, text)

    def sum(self, *values):
        """The sums of some numbers over all ranks, as a list of floats."""
        return torch.tensor(values, dtype=torch.float64).tolist()

    def add_up(self, tensor):
        """The sum of a tensor over all ranks, in place."""
        return tensor

    def any(self, flag):
        """Whether `flag` is true: here, or where all go in lockstep, on any rank."""
        return bool(flag)

    def gather(self, value):
        """What every rank gives, as a list."""
        return [value]

    def from_first(self, compute):
        """What compute() returns on rank 0; its UserError too."""
        return compute()

    def beat(self, doing):
        """Say that this rank goes on, and with what."""

    def alive(self, doing=None):
        """Say that this rank is still at work."""

    def patient(self, is_compiling):
        """Context of a step or an evaluation; if it compiles, the other ranks wait longer."""
        return nullcontext()

    def wrap(self, model):
        """The model as it is trained: with DDP around it on several ranks."""
        return model

    def job(self):
        """Names of the torchrun processes that started the ranks."""
        return []

    def was_restarted(self, out_dir):
        """Whether torchrun restarted these ranks after they began the run in out_dir."""
        return False

    def has_lost_one(self, error):
        """Whether an error means that another rank has gone."""
        return False

    def end(self):
        """Part from the other ranks."""


def compile_all(model, by_block=False):
    """
    Let a network, or each of its blocks, be compiled when it is first called. Forget what was compiled
    before, which belongs to a network that has changed or gone: torch counts the variants of every function,
    and beyond its limit a function runs uncompiled. Blocks share their code, each with constants of its own.
    """
    torch._dynamo.reset()
    blocks = [*getattr(model, 'blocks', ()), *(getattr(model, 'encoder', None) or ())]
    torch._dynamo.config.recompile_limit = 8 * max(1, len(blocks))
    for module in model.blocks if by_block else [model]:
        module.compile(dynamic=False)
