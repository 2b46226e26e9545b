"""
Functions and commands measured in turn: their time, their memory, and a table of the results. bench.py says
what is measured.

    samples = alternate({'ours': ours, 'peer': peer}, rounds=3)   # A B A B A B; each returns {metric: value}
    show(section('speed', samples))                               # medians, extremes, ratios
"""
import os
import platform
import re
import statistics
import subprocess
import sys
import threading
import time

import torch

from configurator import UserError, fastest, matmul_flops

# -----------------------------------------------------------------------------
# The machine

def measure_machine(device):
    """The machine's hardware names and limits: FLOP/s of a large matmul by dtype, bytes/s of a large copy."""
    from features.text.workers import cores
    if device.type == 'cpu':
        dtypes = ['float32', 'bfloat16']
        sizes = (512, 1024, 2048)
    else:
        dtypes = ['float32', 'bfloat16', 'float16']
        sizes = (4096, 8192)
    return {
        'device': torch.cuda.get_device_name(device) if device.type == 'cuda' else str(device),
        'cpu': cpu_name(),
        'cores': cores(),
        'torch': torch.__version__,
        'python': platform.python_version(),
        'flops': {name: ceiling(device, getattr(torch, name), sizes) for name in dtypes},
        'bandwidth': memory_bandwidth(device),
    }


def cpu_name():
    """The CPU's model name on Linux; elsewhere its architecture."""
    if os.path.exists('/proc/cpuinfo'):
        with open('/proc/cpuinfo') as f:
            for line in f:
                if line.startswith('model name'):
                    return line.partition(': ')[2].strip()
    return platform.processor()


def ceiling(device, dtype, sizes):
    """
    FLOP/s of the fastest square matmul of these sizes, in order. It stops after one that takes a tenth of a
    second, because CPUs that only emulate a dtype would take minutes.
    """
    best = 0.0
    for n in sizes:
        best = max(best, matmul_flops(device, dtype, n, seconds=0.3))
        if 2 * n ** 3 / best > 0.1:
            break
    return best


def memory_bandwidth(device, size=2 ** 28, seconds=0.3):
    """Bytes/s of a copy of `size` bytes, read and written: more than any cache holds."""
    a = torch.zeros(size, dtype=torch.uint8, device=device)
    b = torch.ones(size, dtype=torch.uint8, device=device)
    return 2 * size / fastest(lambda: a.copy_(b)[0].item(), seconds)


# -----------------------------------------------------------------------------
# Time and memory

# Our scripts set these for themselves when they are imported, as here. Other programs begin without them
SET_BY_SCRIPTS = {'GOMP_SPINCOUNT': '1000', 'THP_MEM_ALLOC_ENABLE': '1'}


def alternate(arms, rounds):
    """
    Call each of the functions `arms` ({name: function}) in turn, `rounds` times. Each returns {metric:
    value}. Returns {name: {metric: [one value per round]}}.
    """
    samples = {name: {} for name in arms}
    for _ in range(rounds):
        for name, arm in arms.items():
            for metric, value in arm().items():
                samples[name].setdefault(metric, []).append(value)
    return samples


def seconds(function, device, least=3, budget=1.0):
    """
    Median time of a call, after one warm-up call: at least `least` calls, and more until `budget` seconds are
    used.
    """
    times = []
    end = 0
    while len(times) <= least or time.perf_counter() < end:
        start = time.perf_counter()
        function()
        if device.type != 'cpu':
            getattr(torch, device.type).synchronize()
        times.append(time.perf_counter() - start)
        end = end or time.perf_counter() + budget
    return statistics.median(times[1:])


def run(command, device=None, tree=False, env=None, **options):
    """
    Run a command. Returns ([(seconds since its start, line)] of its output, its seconds, its peak memory in
    MiB): memory of `device` if that is a GPU, else RAM; with tree=True, including its child processes.
    env: {name: value} added to the environment; options: of subprocess.Popen. Raises UserError if the command
    fails.
    """
    inherited = {name: value for name, value in os.environ.items() if SET_BY_SCRIPTS.get(name) != value}
    # the scripts of others have modules in their own folder, where run_main() lets nobody look
    environment = inherited | {'PYTHONSAFEPATH': '', 'PYTHONDONTWRITEBYTECODE': '1'} | (env or {})
    before = gpu_memory(device)
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               errors='replace', env=environment, **options)
    peak = 0
    done = threading.Event()

    def watch():  # wait4() would not do: it counts what this process held when it started the other
        nonlocal peak
        while not done.wait(0.02):
            held = gpu_memory(device) - before if before else ram(process.pid, tree)
            peak = max(peak, held)

    watcher = threading.Thread(target=watch)
    watcher.start()
    lines = [(time.perf_counter() - began, line.rstrip('\n')) for line in process.stdout]
    failed = process.wait()
    took = time.perf_counter() - began
    done.set()
    watcher.join()
    if failed:
        last = lines[-1][1] if lines else ''
        raise UserError(f'{" ".join(command)[:200]}: failed with {failed}: {last}')
    return lines, took, peak / 2 ** 20


def ram(pid, tree):
    """The peak RAM of a process in bytes, with tree=True including its child processes; 0 without /proc."""
    try:
        with open(f'/proc/{pid}/status') as f:
            held = 1024 * int(re.search(r'VmHWM:\s+(\d+)', f.read())[1])
        if tree:
            with open(f'/proc/{pid}/task/{pid}/children') as f:
                held += sum(ram(child, tree) for child in f.read().split())
        return held
    except (OSError, TypeError):  # it has just ended
        return 0


def gpu_memory(device):
    """Bytes in use on a GPU, by any process; 0 for another device."""
    if device is None or device.type != 'cuda':
        return 0
    free, total = torch.cuda.mem_get_info(device)
    return total - free


# -----------------------------------------------------------------------------
# Tables

def section(title, samples, notes=()):
    """
    A part of the report: `samples` from alternate(), with medians and ratios, and lines below the table.
    """
    return {'title': title, 'samples': samples, **summarize(samples), 'notes': list(notes)}


def summarize(samples):
    """
    {'medians': {name: {metric: median}}, 'ratios': {name: {metric: the first arm's median over this one's}}}
    """
    medians = {}
    for name, metrics in samples.items():
        medians[name] = {metric: statistics.median(values) for metric, values in metrics.items()}
    ratios = {}
    for name in list(medians)[1:]:
        first = next(iter(medians.values()))
        ratios[name] = {}
        for metric, value in medians[name].items():
            if metric in first and value:
                ratios[name][metric] = first[metric] / value
    return {'medians': medians, 'ratios': ratios}


def show(part):
    """Print a part as a table: a line for every metric and arm."""
    print(f'\n{part["title"]}')
    samples = part['samples']
    metrics = []
    for values in samples.values():
        metrics += [metric for metric in values if metric not in metrics]
    for metric in metrics:
        print(f'  {metric}')
        for name, values in samples.items():
            if values.get(metric):
                print(arm_line(part, name, metric))
    for note in part['notes']:
        print(f'  {note}')
    sys.stdout.flush()


def arm_line(part, name, metric):
    """The line of an arm: median, extremes, and the ratio of the first arm's figure to it."""
    samples = part['samples']
    width = max(len(other) for other in samples)
    values = samples[name][metric]
    median = part['medians'][name][metric]
    extremes = ''
    if len(values) > 1:
        extremes = f'({number(min(values))} to {number(max(values))})'
    ratio = part['ratios'].get(name, {}).get(metric)
    shown = ''
    if ratio:
        shown = f'{next(iter(samples))} = {ratio:.2f} x'
    return f'    {name:{width}}  {number(median):>8}  {extremes:22}{shown}'


def number(value):
    """A figure as text: '1,234', or three significant digits."""
    if abs(value) >= 1000:
        return f'{value:,.0f}'
    return f'{value:.3g}'
