"""
bench.py gpu: one GPU in eight minutes. First whether it computes what a CPU computes, then how fast it is.

The report is a markdown table, a row as soon as it is known: if the run is cut off, what is there counts.
Every section has processes of its own and a time limit, so that none stops the others. The checks run side by
side. Beside them each measurement runs once and its figures are thrown away: that fills the cache of
torch.compile. Then the measurements run one by one.
"""
import copy
import io
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from configurator import ROOT, UserError, configure, peak_flops, pick_compile, pick_device, pick_dtype
from features.study.bench_sample import sample_figures, write_ours
from features.study.bench_scale import training_step
from features.study.bench_train import NETWORKS, flops_per_token, network, train_arms
from features.study.gpu_checks import check_gradients, check_losses, check_resume, check_sampling
from features.study.measure import number, seconds
from model import make_model
from run import peak_memory

MINUTES = 8  # for everything
HAS_WRONG_ROWS = 3  # exit code of a process


class Skip(Exception):
    """A row that cannot be measured here, and why."""


# -----------------------------------------------------------------------------
# Figures: each function yields (name of a row, a function that returns its text)

def bench_training(s, device):
    """train.py and nanoGPT's with GPT-2's networks, and how fast they could be."""
    for name in ['tiny'] if s.quick else ['GPT-2 124M', 'GPT-2 350M']:
        yield f'{name}, ceiling', partial(ceiling, s, device, NETWORKS[name])
        with tempfile.TemporaryDirectory() as folder:
            _, arms = train_arms(name, s, device, s.machine, folder)
            yield from measured(f'{name}, ', arms)
        if not s.peer:
            yield f'{name}, nanoGPT', missing('--peer=PATH/TO/nanoGPT')


def ceiling(s, device, sizes):
    """tokens/s if all matrices were multiplied as fast as a large one, and attention were SDPA alone."""
    dtype = pick_dtype('auto', device)
    shape = sizes['batch_size'], sizes['n_head'], sizes['block_size'], sizes['n_embd'] // sizes['n_head']
    q, k, v = (torch.randn(shape, device=device, dtype=getattr(torch, dtype), requires_grad=True)
               for _ in range(3))

    def attention():
        torch.autograd.grad(F.scaled_dot_product_attention(q, k, v, is_causal=True), (q, k, v), v.detach())
    of_attention = 12 * sizes['block_size'] * sizes['n_embd']  # FLOPs per token and layer, as in MFU
    took = seconds(attention, device, budget=0.1 if s.quick else 1) / (shape[0] * shape[2])  # per token
    rest = flops_per_token(sizes) - sizes['n_layer'] * of_attention
    rate = 1 / (rest / s.machine['flops'][dtype] + sizes['n_layer'] * took)
    text = (f'tokens/s {number(rate)}: matmuls {s.machine["flops"][dtype] / 1e12:.3g} TFLOP/s, '
            f'SDPA {of_attention / took / 1e12:.3g}')
    sheet = peak_flops(device, dtype) if device.type == 'cuda' else None
    return text + (f"; the maker's figure {sheet / 1e12:.3g}" if sheet else '')


def bench_decoding(s, device):
    """sample.py's speed with GPT-2 124M and random weights."""
    from features.lora.packed import pack
    sizes = NETWORKS['tiny' if s.quick else 'GPT-2 124M']
    model = make_model(network(sizes)).to(device).eval()
    dtype, count = pick_dtype('auto', device), sizes['block_size'] // 4

    def figures(kind, rows):
        packed = pack(copy.deepcopy(model), dtype, kind)
        write = partial(write_ours, packed, count, rows)
        write()  # compiles
        if device.type == 'cuda':
            torch.cuda.reset_peak_memory_stats()
        found = sample_figures(packed, write, count, device, s.machine, rows)
        return found | {'peak memory, MiB': peak_memory(device) / 2 ** 20}
    for kind, rows in (('', 1), ('', 8), ('', 64), ('int8', 1)):
        yield f'{rows} x {count} tokens, {kind or dtype}', partial(shown, partial(figures, kind, rows), {})


def bench_adapters(s, device):
    """LoRA on GPT-2 124M against PEFT."""
    from experiments import lora_speed
    options = ['--rows=16', '--length=512', '--steps=20', f'--device={device}']
    if s.quick:
        options = ['--rows=1', '--length=16', '--steps=1', '--layers=1', f'--device={device}']
    arms = {'ours': partial(lora_speed.run_arm, 'lora', options),
            'PEFT': partial(lora_speed.run_arm, 'peft', options)}
    if not (find_spec('peft') and find_spec('transformers')):
        arms['PEFT'] = missing('pip install peft transformers')
    yield from measured('', arms)


def bench_t5(s, device):
    """ROT5-mini against transformers' T5 of its size."""
    from experiments import t5_speed
    options = ['--rows=64', '--steps=10']
    if s.quick:
        options = ['--rows=1', '--source=16', '--target=8', '--steps=1', '--layers=1']
    settings = configure(t5_speed.Settings, options)
    arms = t5_speed.arms_of(settings, device, t5_speed.sides_of(settings, device))
    if not find_spec('transformers'):
        arms['transformers'] = missing('pip install transformers')
    yield from measured('', arms)


def bench_kernels(s, device):
    """The kernels that take the most time of a training step of GPT-2 124M."""
    sizes = NETWORKS['tiny' if s.quick else 'GPT-2 124M']
    compiles = pick_compile('auto', device)
    step, _ = training_step(sizes, sizes['batch_size'] * sizes['block_size'], device, compiles)
    for _ in range(3):
        step()
    activity, kind = ProfilerActivity.CPU, torch.autograd.DeviceType.CPU
    if device.type == 'cuda':
        activity, kind = ProfilerActivity.CUDA, torch.autograd.DeviceType.CUDA
    with profile(activities=[activity]) as found:
        for _ in range(3):
            step()
        if device.type == 'cuda':
            torch.cuda.synchronize()
    times = {}
    for event in found.key_averages():
        if event.device_type == kind:
            took = event.self_cpu_time_total if device.type == 'cpu' else event.self_device_time_total
            times[event.key] = times.get(event.key, 0) + took
    whole = sum(times.values())
    for name in sorted(times, key=times.get, reverse=True)[:10]:
        yield name[:60], partial(str.format, '{:.1%} of the time, {:.2f} ms a step', times[name] / whole,
                                 times[name] / 3000)


def measured(title, arms):
    """Yield the rows of arms: their figures, and how many times the first one's are theirs."""
    first = {}
    for name, arm in arms.items():
        yield title + name, partial(shown, arm, first)


def shown(arm, first):
    """The figures of an arm as text. first: those of the first arm, filled if they are not known yet."""
    parts = []
    figures = arm()
    for metric, value in figures.items():
        ratio = f' (ours = {first[metric] / value:.2f} x)' if metric in first and value else ''
        parts.append(f'{metric} {number(value)}{ratio}')
    first.update({} if first else figures)
    return ', '.join(parts)


def missing(what):
    """A function for a row that says what it would need."""
    def skip():
        raise Skip(f'not measured: needs {what}')
    return skip


# -----------------------------------------------------------------------------
# Sections, each in processes of its own

@dataclass
class Section:
    rows: Callable  # yields its rows
    limit: int  # seconds
    processes: int = 1  # that share its rows


CHECKS = {
    'gradients': Section(check_gradients, 150, 5),
    'losses': Section(check_losses, 150, 4),
    'sampling': Section(check_sampling, 150, 3),
    'resume': Section(check_resume, 150),
}
FIGURES = {  # the most useful first
    'training': Section(bench_training, 180),
    'decoding': Section(bench_decoding, 90),
    'adapters': Section(bench_adapters, 90),
    'T5': Section(bench_t5, 90),
    'kernels': Section(bench_kernels, 60),
}
SECTIONS = CHECKS | FIGURES


def bench_gpu(s, device, machine):
    """
    Print the table of bench.py gpu. Returns no parts for a report. Raises UserError at the end if a row is
    wrong or missing.
    """
    if s.record and device.type != 'cpu':
        raise UserError(f'record: {device}: GPUs are compared with a CPU: add --device=cpu')
    began = time.perf_counter()
    end = math.inf if s.record else began + 60 * MINUTES
    given = {'quick': s.quick, 'peer': s.peer, 'record': s.record, 'device': str(device), 'machine': machine}
    wanted = ['losses'] if s.record else s.only or SECTIONS
    checks = [name for name in CHECKS if name in wanted]
    figures = [name for name in FIGURES if name in wanted]
    print('\n| section | row | result | |\n|---|---|---|---|', flush=True)
    bad = run_sections(checks, given, end, warming=figures if checks and device.type == 'cuda' else ())
    for name in figures:
        bad += run_sections([name], given, end)
    print_row('all', 'seconds', f'{time.perf_counter() - began:.0f}')
    if bad:
        raise UserError(f'gpu: rows are wrong or missing: {", ".join(bad)}')
    return []


def run_sections(names, given, end, warming=()):
    """
    Run sections side by side, up to their limits and the moment `end`. warming: sections that run beside
    them, whose rows are thrown away. Returns the names of sections in which something went wrong.
    """
    is_rehearsal = given['quick'] or given['record']  # of unknown length
    if not is_rehearsal:
        end = min(end, time.perf_counter() + max((SECTIONS[name].limit for name in names), default=0))
    counts = {name: 1 if is_rehearsal else SECTIONS[name].processes for name in names}
    parts = [(name, part, count, None) for name, count in counts.items() for part in range(count)]
    parts += [(name, 0, 1, subprocess.DEVNULL) for name in warming]
    from features.text.workers import cores
    threads = str(max(2, cores() // max(1, len(parts))))
    variables = {'OMP_NUM_THREADS': threads, 'TORCHINDUCTOR_COMPILE_THREADS': threads}
    if given['quick'] and given['device'] == 'cpu':
        variables['TORCH_COMPILE_DISABLE'] = '1'  # it would take an hour
    processes, bad = [], []
    try:
        for name, part, of, output in parts:
            code = (f'import sys; sys.path.insert(0, {ROOT!r}); from features.study import bench_gpu; '
                    f'bench_gpu.work({name!r}, {part}, {of}, {given!r})')
            processes.append(subprocess.Popen([sys.executable, '-c', code], stdout=output, process_group=0,
                                              env=variables | os.environ))
        for process, (name, _, _, output) in zip(processes, parts):
            problem = problem_of(process, end)
            if problem is not None and output is None:
                bad.append(name)
                if problem:
                    print_row(name, '', problem, 'ERROR')
    finally:
        for process in processes:  # and what they have started
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return list(dict.fromkeys(bad))


def problem_of(process, end):
    """Wait for a process until `end`. Returns why it failed; '' if its rows say so; None if it did not."""
    try:
        code = process.wait(max(0, end - time.perf_counter()))
    except subprocess.TimeoutExpired:
        return 'cut off: no time left'
    if code:
        return '' if code == HAS_WRONG_ROWS else f'its process ended with {code}'


def work(name, part, of, given):
    """Print the rows number part, part + of, part + 2 of, … of a section, in a process for it."""
    began, table, parent, is_right = time.perf_counter(), sys.stdout, os.getppid(), True
    s = SimpleNamespace(**given)
    with redirect_stdout(io.StringIO()):  # what scripts say on the way
        rows = SECTIONS[name].rows(s, pick_device(s.device))
        for n, (row, measure) in enumerate(guarded(rows)):
            if os.getppid() != parent:  # it was killed
                sys.exit(1)
            if n % of == part:
                result, mark = outcome(measure)
                is_right &= mark in ('', 'ok', 'skipped')
                print_row(name, row, result, mark, file=table)
    took = f'{time.perf_counter() - began:.0f}' + (f' (process {part + 1} of {of})' if of > 1 else '')
    print_row(name, 'seconds', took, file=table)
    sys.exit(0 if is_right else HAS_WRONG_ROWS)


def guarded(rows):
    """The rows of a section; if it fails between them, a row that does so too."""
    def fail():
        raise error
    try:
        yield from rows
    except Exception as caught:
        error = caught
        yield 'the rest', fail


def outcome(measure):
    """(text, mark) of a row."""
    try:
        result = measure()
    except Skip as reason:
        return str(reason), 'skipped'
    except Exception as error:
        traceback.print_exception(error)
        return f'{type(error).__name__}: {error}', 'ERROR'
    if isinstance(result, str):
        return result, ''
    text, is_right = result
    return text, 'ok' if is_right else 'WRONG'


def print_row(*cells, file=None):
    cells = [' '.join(cell.split()).replace('|', '/')[:200] for cell in cells]
    print(f'| {" | ".join(cells + [""] * (4 - len(cells)))} |', file=file, flush=True)
