"""
Functions and commands measured in turn: time, memory, and a table of what came out. bench.py says what is measured.

    samples = alternate({'ours': ours, 'peer': peer}, rounds=3)     # A B A B A B; each returns {metric: value}
    show(section('speed', samples))                                 # medians, extremes, ratios
"""
import os
import re
import statistics
import subprocess
import sys
import threading
import time

import torch

from configurator import ROOT, UserError

# -----------------------------------------------------------------------------
# Time and memory

def alternate(arms, rounds):
    """Call each of the functions `arms` in turn, `rounds` times: {name: {metric: [a value a round]}}. Each returns {metric: value}."""
    samples = {name: {} for name in arms}
    for _ in range(rounds):
        for name, arm in arms.items():
            for metric, value in arm().items():
                samples[name].setdefault(metric, []).append(value)
    return samples


def summarize(samples):
    """The medians, {name: {metric: …}}, and for every arm but the first, the first's medians over its."""
    medians = {name: {metric: statistics.median(values) for metric, values in metrics.items()} for name, metrics in samples.items()}
    first = next(iter(medians.values()), {})
    ratios = {name: {metric: first[metric] / value for metric, value in metrics.items() if metric in first and value}
              for name, metrics in list(medians.items())[1:]}
    return {'medians': medians, 'ratios': ratios}


def seconds(function, device, least=3, budget=1.0):
    """Median time of a call, after one that sets things up; as many as fit into `budget` seconds."""
    times, end = [], 0
    while len(times) <= least or time.perf_counter() < end:
        start = time.perf_counter()
        function()
        if device.type != 'cpu':
            getattr(torch, device.type).synchronize()
        times.append(time.perf_counter() - start)
        end = end or time.perf_counter() + budget
    return statistics.median(times[1:])


def run(command, device=None, tree=False, **options):
    """
    Run a command to its end: (lines it printed as [(seconds since its start, text)], seconds, the most MiB it held: on `device`, if that
    is a GPU, else in RAM, of tree=True with all its children). Raises UserError if it fails.
    """
    environment = os.environ | {'PYTHONPATH': os.pathsep.join([ROOT] + os.environ.get('PYTHONPATH', '').split(os.pathsep)), 'PYTHONDONTWRITEBYTECODE': '1'}
    before, began = gpu_memory(device), time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors='replace', env=environment, **options)
    peak, done = 0, threading.Event()

    def watch():  # and not what wait4() says: that counts what this process held when it started the other
        nonlocal peak
        while not done.wait(0.02):
            peak = max(peak, gpu_memory(device) - before if before else ram(process.pid, tree))

    watcher = threading.Thread(target=watch)
    watcher.start()
    lines = [(time.perf_counter() - began, line.rstrip('\n')) for line in process.stdout]
    failed, took = process.wait(), time.perf_counter() - began
    done.set()
    watcher.join()
    if failed:
        raise UserError(f'{" ".join(command)[:200]}: failed with {failed}: {lines[-1][1] if lines else ""}')
    return lines, took, peak / 2 ** 20


def ram(pid, tree):
    """The most bytes a process has held in RAM, with tree=True those of its children added; 0 where there is no /proc."""
    try:
        with open(f'/proc/{pid}/status') as f:
            held = 1024 * int(re.search(r'VmHWM:\s+(\d+)', f.read())[1])
        with open(f'/proc/{pid}/task/{pid}/children') as f:
            return held + sum(ram(child, tree) for child in f.read().split() if tree)
    except (OSError, TypeError):  # it has just ended
        return 0


def gpu_memory(device):
    """Bytes in use on a GPU, by any process."""
    if device is None or device.type != 'cuda':
        return 0
    free, total = torch.cuda.mem_get_info(device)
    return total - free


# -----------------------------------------------------------------------------
# Tables

def section(title, samples, notes=()):
    """A part of the report: `samples` as alternate() returns them, with medians and ratios."""
    return {'title': title, 'samples': samples, **summarize(samples), 'notes': list(notes)}


def show(part):
    """Print a part as a table: a line for every metric and arm."""
    print(f'\n{part["title"]}')
    width, first = max(map(len, part['samples']), default=0), next(iter(part['samples']), '')
    for metric in dict.fromkeys(metric for metrics in part['samples'].values() for metric in metrics):
        print(f'  {metric}')
        for name, metrics in part['samples'].items():
            values = metrics.get(metric, [])
            if values:
                extremes = f'({number(min(values))} to {number(max(values))})' if len(values) > 1 else ''
                ratio = part['ratios'].get(name, {}).get(metric)
                print(f'    {name:{width}}  {number(part["medians"][name][metric]):>8}  {extremes:22}' + (f'{first} = {ratio:.2f} x' if ratio else ''))
    for note in part['notes']:
        print(f'  {note}')
    sys.stdout.flush()


def number(value):
    return f'{value:,.0f}' if abs(value) >= 1000 else f'{value:.3g}'
