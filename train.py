"""
Train a model.

    python train.py config/tinystories_cpu.py --learning_rate=2e-3          # one process
    torchrun --nproc_per_node=2 train.py config/lowrank.py                  # data-parallel, on CPUs or GPUs

Run the same command again and it goes on where it was: checkpoints, log.jsonl and settings.json are in out_dir.
Ctrl-C and SIGTERM save at the end of the step, then stop.
"""
import dataclasses
import gc
import math
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Literal

os.environ['GOMP_SPINCOUNT'] = os.environ.get('GOMP_SPINCOUNT', '1000')  # before torch is loaded: its threads wait for one another
# a moment, not for milliseconds, or two runs on one machine slow each other down a hundredfold (120 against 8,800 tokens/s, RESULTS.md)

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import adapters
import checkpoint
import lora
from configurator import UserError, configure, run_main
from data import DataConfig, Mixture, Source, splitmix
from device import DeviceConfig, autocast, is_out_of_memory, peak_flops, peak_memory, pick_compile, pick_device, pick_dtype, process_age, zero
from growth import GrowConfig, grow
from loss import evaluate, reading
from model import ModelConfig, Teacher, make_model
from objectives import make_objective
from optim import OptimConfig, clip_gradient, make_optimizer, optimizer_flops, set_rates
from origin import build_model, find_origin, find_reference, find_teacher
from packed import pack_frozen
from plan import PlanConfig, fit_minutes, plan, show_plan
from ranks import Ranks
from runlog import Log, check_finite, describe, report, show_losses, show_samples


@dataclass
class Settings(ModelConfig, DataConfig, OptimConfig, DeviceConfig, PlanConfig, GrowConfig, lora.LoraConfig):
    out_dir: str = 'out'  # where checkpoints, log and settings go
    init_from: str = 'auto'  # auto = resume if out_dir holds a run, else scratch; resume; scratch (a run in out_dir is moved aside);
    # a run or checkpoint DIR, hf:FOLDER (of Hugging Face's kind), gpt2, gpt2-medium, gpt2-large, gpt2-xl: the weights there, a fresh schedule
    init_keep: Literal['weights', 'optimizer', 'schedule'] = 'weights'  # what to keep of init_from=DIR: weights alone; the optimizer's moments too,
    # with a fresh schedule; or all, so that rate and data go on at its step
    seed: int = 1337  # of weights, order of the data and dropout
    batch_size: int = 12  # rows of a micro-batch: what has to fit into memory
    gradient_accumulation_steps: int = 1  # micro-batches of a step, over all ranks together: a step is always batch_size times this many rows
    recompute: bool = False  # activation checkpointing: the blocks run again in the backward pass, a third slower, for a fraction of the memory
    label_smoothing: float = 0.0  # in the training loss only
    teacher: str = ''  # distillation: learn from the distribution of this network too, a run (its best checkpoint), a checkpoint or hf:FOLDER
    distill_mix: float = 0.5  # its share of the training loss; the rest is cross-entropy
    distill_temperature: float = 1.0  # higher: more of what the teacher thinks of unlikely tokens (Hinton et al. 2015, arXiv 1503.02531)
    eval_interval: int = 250  # steps between evaluations, each with a checkpoint and samples
    eval_iters: int = 200  # batches of the validation split, the same ones each time; 0 = the whole split
    eval_only: bool = False  # evaluate, then stop
    target_val_loss: float = 0.0  # stop when an evaluation reaches this loss; 0 = never
    log_interval: int = 10  # steps between progress lines
    always_save_checkpoint: bool = True  # False: only when the validation loss is the lowest so far (and at the end)
    checkpoint_interval: int = 0  # steps between further checkpoints; 0 = only after evaluations
    keep_checkpoints: int = 2  # the newest ones kept, and the best one
    sample_prompt: str = '\n'  # what the samples during training begin with
    sample_tokens: int = 100  # their length; 0 = no samples
    wandb_log: bool = False  # log to Weights & Biases too (WANDB_MODE=offline works)
    wandb_project: str = 'minnow'
    wandb_run_name: str = ''  # '' = the name of out_dir
    backend: Literal['auto', 'nccl', 'gloo'] = 'auto'  # of torch.distributed; auto = nccl on CUDA

    def check(self):
        """Raise ValueError for values that cannot work."""
        for name in ('batch_size', 'gradient_accumulation_steps', 'eval_interval', 'log_interval', 'keep_checkpoints'):
            if getattr(self, name) < 1:
                raise ValueError(f'{name}={getattr(self, name)}: must be at least 1')
        for name in ('eval_iters', 'checkpoint_interval', 'sample_tokens', 'target_val_loss'):
            if getattr(self, name) < 0:
                raise ValueError(f'{name}={getattr(self, name)}: must not be negative')
        if not 0 <= self.seed < 2 ** 63:
            raise ValueError(f'seed={self.seed}: takes 0 <= seed < 2**63')
        if self.rank_guide > self.max_iters:
            raise ValueError(f'rank_guide={self.rank_guide}: is more than max_iters={self.max_iters}: the guides would never go: lower it')
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f'label_smoothing={self.label_smoothing}: takes 0 <= label_smoothing < 1')
        if not 0 < self.distill_mix <= 1 or not 0 < self.distill_temperature <= 1000:
            raise ValueError(f'distill_mix={self.distill_mix}, distill_temperature={self.distill_temperature}: takes 0 < distill_mix <= 1, '
                             '0 < distill_temperature <= 1000')
        if self.init_keep != 'weights' and self.init_from in ('auto', 'scratch'):
            raise ValueError(f'init_keep={self.init_keep}: belongs to weights that were trained before: give --init_from=DIR')
        if self.source_size and not self.n_encoder_layer and self.init_from in ('auto', 'scratch'):
            raise ValueError(f'source_size={self.source_size}: is the context of an encoder: set n_encoder_layer too')
        beside = {'grow_every': 0, 'init_keep': 'weights', 'rank_guide': 0, 'arch': 'decoder', 'factor_decay': 'factor'}
        for name, plain in beside.items() if self.lora_rank else ():
            if getattr(self, name) != plain:
                raise ValueError(f'lora_rank={self.lora_rank}: adapters go with {name}={plain} alone, not {getattr(self, name)}: leave it out')
        if self.lora_rank and self.optimizer == 'spectron':
            raise ValueError(f'lora_rank={self.lora_rank}: optimizer=spectron bounds the factors of the network, which stay as they are: use adamw or muon')
        idle = sorted(getattr(self, 'given', set()) & {'n_expert_active', 'expert_shared', 'expert_aux', 'expert_z', 'expert_bias'})
        if idle and not self.n_expert and self.init_from in ('auto', 'scratch'):
            raise ValueError(f'{idle[0]}={getattr(self, idle[0])}: belongs to a mixture of experts: set n_expert too')
        if self.n_encoder_layer and self.objective == 'causal':
            raise ValueError(f"n_encoder_layer={self.n_encoder_layer}: objective='causal' gives an encoder nothing to read: set it to ul2, prefix or seq2seq")
        if self.n_encoder_layer and (self.teacher or self.grow_every or self.is_planned and 'plan' not in self.given):
            raise ValueError(f'n_encoder_layer={self.n_encoder_layer}: teacher, grow_every and the dial (depth, params, tokens, minutes) are for decoders: '
                             'leave them out')
        if self.arch == 'markov' and self.objective != 'causal':
            raise ValueError(f"objective={self.objective}: arch='markov' knows no source: leave it out")
        if self.grow_every and (self.rank_guide or self.arch == 'markov'):
            raise ValueError(f'grow_every={self.grow_every}: goes with neither rank_guide nor arch=markov: leave it out')
        if self.teacher and self.arch == 'markov':
            raise ValueError(f"teacher={self.teacher}: arch='markov' learns from counts alone: leave it out")
        if self.label_smoothing and self.arch == 'markov' and not self.rank_embed:
            raise ValueError(f'label_smoothing={self.label_smoothing}: a full Markov table is smoothed by a lower learning_rate instead: set it to 0')


# -----------------------------------------------------------------------------
# One step

def micro_batches(s, step, rank, world):
    """The global sample numbers of this rank's micro-batches in a step: contiguous, so any split of the same rows is the same batch."""
    rows = s.batch_size * s.gradient_accumulation_steps // world
    size = next(n for n in range(min(s.batch_size, rows), 0, -1) if rows % n == 0)
    first = (step * world + rank) * rows
    return [range(i, i + size) for i in range(first, first + rows, size)]


class Batches:
    """The micro-batches of a step, [(first sample number, x, y[, source]), …], the next step's read by a thread while this one is computed."""

    def __init__(self, data, s, ranks):
        self.data, self.s, self.ranks = data, s, ranks
        self.thread, self.ahead = ThreadPoolExecutor(1), {}

    def read(self, step):
        out = []
        for samples in micro_batches(self.s, step, self.ranks.rank, self.ranks.world):
            arrays = [torch.from_numpy(a) for a in self.data.rows(samples)]
            if self.ranks.device.type == 'cuda':
                arrays = [a.pin_memory() for a in arrays]  # then the copy to the GPU waits for nothing
            out.append((samples[0], *arrays))
        return out, sum(int((y >= 0).sum()) for _, _, y, *_ in out)

    def __call__(self, step):
        """(the micro-batches of this rank, how many targets are in them)."""
        now = self.ahead.pop(step, None) or self.thread.submit(self.read, step)
        self.ahead = {step + 1: self.thread.submit(self.read, step + 1)}
        return now.result()


def train_step(model, optimizer, scaler, batches, s, step, ranks, stop=False, teacher=None):
    """
    One update; teacher: a network to learn from too. Returns (summed loss of this rank's rows in nats, targets in the global batch, norm of
    the gradient, whether any rank was asked to stop). Nothing in it waits for a GPU.
    """
    set_rates(optimizer, step, s)
    micro, targets = batches(step)
    targets, stop = ranks.sum(targets, stop)
    nats = zero(ranks.device)
    for n, (first, *arrays) in enumerate(micro):
        torch.manual_seed(splitmix(s.seed, first) % 2 ** 63)  # dropout is a function of the sample number: nothing to save
        if ranks.world > 1:
            model.require_backward_grad_sync = n == len(micro) - 1  # set before the forward pass: exchange gradients once a step
        x, y, *more = (a.to(ranks.device, non_blocking=True) for a in arrays)
        with autocast(ranks.device, s.dtype):
            more = reading(getattr(model, 'module', model), more)
            lesson = {'teacher': ask(teacher, x, s, **more)} if teacher else {}
            loss = model(x, y, reduction='sum', label_smoothing=s.label_smoothing, **lesson, **more)
        # the mean over the targets of the global batch; DDP divides by the number of ranks
        scaler.scale(loss * (ranks.world / max(targets, 1))).backward()
        nats += loss.detach()
    scaler.unscale_(optimizer)
    norm = clip_gradient(model, s.grad_clip or math.inf)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return nats, targets, norm, stop > 0


@torch.no_grad()
def ask(teacher, x, s, **more):
    """What the network `teacher` has to say about x (B, T); more: as loss.reading() has it."""
    h, weight = teacher.head_input(teacher.hidden(x, **more))
    return Teacher(h.flatten(0, 1), weight, teacher.cfg.softcap, s.distill_temperature, s.distill_mix)


# -----------------------------------------------------------------------------
# Stopping and saving

class StopSignal:
    """Remembers the first SIGTERM or Ctrl-C, for the loop to end after its step; a second one ends the process at once."""

    def __init__(self):
        self.number = 0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.remember)

    def remember(self, number, frame):
        self.number = number
        signal.signal(number, signal.SIG_DFL)


def save(s, step, run, ranks):
    """Rank 0 writes a checkpoint; the others wait for it."""
    def write():
        source = run.data.sources[0].files
        state = {'step': step, 'flops': run.flops, 'model': dataclasses.asdict(run.model.cfg), 'settings': dataclasses.asdict(s),
                 'tokenizer': source.meta['tokenizer'], 'data': run.data.fingerprint(), 'scaler': run.scaler.state_dict(), 'torch': torch.__version__}
        if s.lora_rank:
            state |= {'base': run.base, 'lora': run.model.lora.known['default'].description()}
        tokenizer_files = [os.path.join(source.folder, name) for name in source.meta['tokenizer'].get('files', ())]
        weights = adapters.state(run.model) if s.lora_rank else run.model.state_dict()
        checkpoint.save(s.out_dir, step, weights, run.optimizer.state_dict(), state, tokenizer_files, s.keep_checkpoints)
    ranks.from_first(write)


# -----------------------------------------------------------------------------
# The dial

def derive(s, state, device, ranks):
    """Set what plan.py derives from the dial, on all ranks alike; a run that goes on keeps what was derived when it began."""
    dial = {name: getattr(s, name) for name in ('depth', 'params', 'tokens', 'minutes')}
    if state and any(state['settings'].get(name, 0) != value for name, value in dial.items()):
        raise UserError(f'{", ".join(f"{name}={value:g}" for name, value in dial.items() if value)}: out_dir={s.out_dir} belongs to a run with another dial: '
                        'give another --out_dir, or --init_from=scratch to begin anew (the old run is moved aside)')
    data = Mixture(s.dataset, 'train', s.block_size, s.seed)
    tokens = sum(source.files.tokens for source in data.sources)
    planned = ranks.from_first(lambda: plan(s, data.vocab_size, tokens, device, ranks.world))
    for name in planned:
        setattr(s, name, state['settings'][name] if state else planned[name])
    return planned


def spend_minutes(run, s, ranks):
    """Time five steps after three, leave no trace of them, and set max_iters so that the whole process takes s.minutes."""
    weights, times = {name: t.clone() for name, t in run.model.state_dict().items()}, []
    for step in range(8):
        began = time.perf_counter()
        train_step(run.runner, run.optimizer, run.scaler, run.batches, s, step, ranks, teacher=run.teacher)[2].item()  # waits for the device
        times.append(time.perf_counter() - began)
    run.model.load_state_dict(weights)
    run.optimizer.state.clear()
    if s.n_expert:
        run.model.take_loads()

    def fit():
        fit_minutes(s, run.planned, sorted(times[3:])[2], process_age())
        return s.max_iters, s.eval_interval, s.log_interval
    s.max_iters, s.eval_interval, s.log_interval = ranks.from_first(fit)


# -----------------------------------------------------------------------------
# The training loop

@dataclass
class Run:
    """What a training run works with."""
    model: torch.nn.Module
    runner: torch.nn.Module  # the model, or DDP around it
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    data: Mixture
    val: list[Source]
    batches: Batches
    step: int  # where it goes on: 0 at its beginning
    planned: dict  # what plan.py derived
    tokens_per_step: int
    flops_per_step: float
    flops: float  # so far
    borrowed: bool  # whether it begins with the weights of another
    parameters: tuple  # how many there are, and how many a token meets
    teacher: torch.nn.Module | None
    reference: tuple | None  # (ModelConfig, weights) to inherit further blocks from
    base: dict | None  # what an adapter is trained beside: where it is, and its fingerprint


def set_up(s, device, ranks):
    """The Run that the settings describe, as it stands."""
    origin = find_origin(s, ranks)
    state = origin.get('state')
    s.dtype = state['settings']['dtype'] if state and s.dtype == 'auto' else ranks.from_first(lambda: pick_dtype(s.dtype, device))
    planned = derive(s, state, device, ranks) if s.is_planned else {}
    if ranks.world > 1 and device.type == 'cuda' and s.arch == 'markov' and not s.rank_embed:
        raise UserError('arch=markov: NCCL cannot add up the sparse counts of a full table: use one process, or --device=cpu')
    rows = s.batch_size * s.gradient_accumulation_steps
    if rows % ranks.world:
        raise UserError(f'batch_size * gradient_accumulation_steps = {rows} rows cannot be shared by {ranks.world} processes: '
                        f'make it a multiple of {ranks.world}')
    objective = partial(make_objective, s)
    data = Mixture(s.dataset, 'train', s.block_size, s.seed, s.packing, s.mix_by, s.verify_data, objective)
    val = [Source(source.name, 'val', s.block_size, s.packing, s.verify_data, objective) for source in data.sources]
    model = build_model(s, data, origin).to(device)
    if s.grow_every and s.grow_to <= s.n_layer:
        raise UserError(f'grow_to={s.grow_to}: the network begins with {s.n_layer} layers: give more')
    model.recompute = s.recompute
    optimizer = make_optimizer(model, lora.faster(s), torch.bfloat16 if s.dtype == 'bfloat16' else torch.float32)
    scaler = torch.amp.GradScaler(device.type, enabled=s.dtype == 'float16')
    if state:
        checkpoint.load_optimizer(origin['folder'], optimizer)
        if scaler.is_enabled() and state['scaler']:
            scaler.load_state_dict(state['scaler'])
    elif 'moments' in origin:
        count = checkpoint.give_moments(optimizer, checkpoint.read_moments(origin['moments']))
        ranks.say(f'{count} of {len(list(model.parameters()))} tensors go on with the moments of {s.init_from}')
    tokens_per_step = s.batch_size * s.gradient_accumulation_steps * s.block_size
    teacher = find_teacher(s, data, ranks).to(device) if s.teacher else None
    flops_per_step, parameters = step_flops(model, optimizer, teacher, tokens_per_step), (model.num_params(), model.num_params(active=True))
    if s.lora_rank and lora.how_stored(s) != 'float32':
        pack_frozen(model, lora.how_stored(s))
    s.compile = pick_compile(s.compile, device, flops_per_step * s.max_iters / ranks.world)
    if s.compile:
        model.compile(dynamic=False)
    begun = state or origin
    step = begun.get('step', 0)
    flops = begun.get('flops', step * flops_per_step)
    return Run(model, wrap(model, ranks), optimizer, scaler, data, val, Batches(data, s, ranks), step, planned, tokens_per_step, flops_per_step, flops,
               'weights' in origin and not state, parameters, teacher, find_reference(s, model.cfg) if s.grow_from else None,
               origin.get('base'))


def expert_loads(run, ranks):
    """How many tokens of all ranks every expert was given in the last step, (layers, E) int64; with expert_bias they are drawn towards equal loads."""
    loads = ranks.add_up(run.model.take_loads())
    if run.base is None:  # beside adapters the rest stays as it is
        run.model.balance(loads)
    return loads


def step_flops(model, optimizer, teacher, tokens):
    return (model.flops_per_token() + (teacher.flops_per_token() if teacher else 0)) * tokens + optimizer_flops(optimizer)


def grow_run(run, s, ranks):
    """More blocks, and the run goes on with them: the same tokens, the same schedule, the moments of what there was."""
    n_layer = min(run.model.cfg.n_layer + s.grow_by, s.grow_to)
    cfg, weights, names = grow(run.model.cfg, run.model.state_dict(), n_layer, s.grow_how, run.reference)
    moments, device = checkpoint.moments_of(run.optimizer), run.model.wte.weight.device
    run.model = make_model(cfg, init=False)
    run.model.load_state_dict(weights)
    run.model.to(device).recompute = s.recompute
    run.optimizer = make_optimizer(run.model, s, run.optimizer.dtype)
    checkpoint.give_moments(run.optimizer, {name: moments.get(old, {}) for name, old in names.items()})
    if s.compile:
        run.model.compile(dynamic=False)
    run.runner = wrap(run.model, ranks)
    run.flops_per_step = step_flops(run.model, run.optimizer, run.teacher, run.tokens_per_step)
    ranks.say(f'grown to {n_layer} layers, {run.model.num_params():,} parameters')


def end_guides(run, ranks):
    """Their share has fallen to nothing: low-rank layers go on alone."""
    run.model.drop_guides()
    left = set(run.model.parameters())
    for group in run.optimizer.param_groups:
        kept = [(p, name) for p, name in zip(group['params'], group['param_names']) if p in left]
        for p in set(group['params']) - left:
            run.optimizer.state.pop(p, None)
        group['params'], group['param_names'] = map(list, zip(*kept)) if kept else ([], [])
    run.optimizer.param_groups = [group for group in run.optimizer.param_groups if group['params']]
    run.runner = wrap(run.model, ranks)
    run.flops_per_step = step_flops(run.model, run.optimizer, run.teacher, run.tokens_per_step)


def wrap(model, ranks):
    return DistributedDataParallel(model, broadcast_buffers=False) if ranks.world > 1 else model


def train(s, device, ranks):
    """The run that the settings describe, from where it stands to its end or to a signal. Returns the signal's number, 0 at the end."""
    run = set_up(s, device, ranks)
    step = run.step
    if s.minutes and not step and not s.eval_only:
        spend_minutes(run, s, ranks)
    describe(s, run, ranks)
    if s.eval_only:
        show_losses(step, evaluate(run.model, run.val, s, ranks), ranks)
        return 0

    ranks.from_first(lambda: checkpoint.prepare_out_dir(s.out_dir, step, dataclasses.asdict(s)))
    log = Log(s, step, ranks)
    evaluated, best_loss = ranks.from_first(lambda: (log.evaluated, checkpoint.best(s.out_dir)[1]))
    peak = peak_flops(device, s.dtype) if ranks.first else None
    stop, stopping, saved = StopSignal(), False, step or None
    nats, targets, norm, loads, seconds, steps = zero(device), 0.0, torch.zeros(()), 0, 0.0, 0  # since the last progress line

    def save_once():
        nonlocal saved
        if saved != step:
            if not run.scaler.is_enabled():  # a scaler skips the steps that overflow
                check_finite(norm.item(), s, step)
            save(s, step, run, ranks)
            saved = step

    while True:
        if run.model.cfg.rank_guide:
            run.model.set_guides(step) if step < s.rank_guide else end_guides(run, ranks)
        due = step % s.eval_interval == 0 if step else not s.target_val_loss  # a race does not stop for the loss it starts with
        if (due or step >= s.max_iters) and step > evaluated and not stopping:
            if step and s.always_save_checkpoint:
                save_once()  # first, so that nothing that goes wrong in an evaluation can lose it
            result = evaluate(run.model, run.val, s, ranks)
            show_losses(step, result, ranks)
            if step and (best_loss is None or result['val_loss'] < best_loss):
                best_loss = result['val_loss']
                save_once()
                ranks.from_first(lambda: checkpoint.mark_best(s.out_dir, step, best_loss, s.keep_checkpoints))
            log.write(step, tokens=step * run.tokens_per_step, flops=run.flops, **result, peak_memory_bytes=peak_memory(device))
            show_samples(run.model, s, run.data, ranks)
        if step and s.checkpoint_interval and step % s.checkpoint_interval == 0:
            save_once()
        reached = s.target_val_loss and best_loss is not None and best_loss <= s.target_val_loss
        if step >= s.max_iters or reached or stopping:
            save_once()
            break

        if s.grow_every and step and step % s.grow_every == 0 and run.model.cfg.n_layer < s.grow_to:
            grow_run(run, s, ranks)
            loads = 0  # of other layers
        began = time.perf_counter()
        new_nats, new_targets, norm, stopping = train_step(run.runner, run.optimizer, run.scaler, run.batches, s, step, ranks, stop.number > 0,
                                                         run.teacher)
        nats, targets, steps, step = nats + new_nats, targets + new_targets, steps + 1, step + 1
        loads = loads + expert_loads(run, ranks) if s.n_expert else None
        run.flops += run.flops_per_step
        if step % s.log_interval == 0 or step == 1:
            total, = ranks.sum(nats.item())  # waits for the device
            seconds += time.perf_counter() - began
            report(s, run, step, total / max(targets, 1), norm.item(), loads, steps / seconds, peak, log, ranks)
            nats, targets, loads, seconds, steps = zero(device), 0.0, 0, 0.0, 0
        else:
            seconds += time.perf_counter() - began
    ranks.say(f'stopped by {signal.Signals(stop.number or signal.SIGTERM).name} after step {step}; the same command goes on from there'
              if stopping else f'done: {step} steps{", target_val_loss reached" if reached else ""}; python sample.py --out_dir={s.out_dir}')
    return (stop.number or signal.SIGTERM) if stopping else 0


def main():
    s = configure(Settings)
    device = pick_device(s.device)
    if s.wandb_log and find_spec('wandb') is None:
        raise UserError('wandb_log=True: wandb is not installed: pip install wandb')
    if s.plan:
        s.dtype = pick_dtype(s.dtype, device)
        return show_plan(s, s.vocab_size or Mixture(s.dataset, 'train', s.block_size, s.seed).vocab_size, device)
    ranks = Ranks(s.backend, device)
    try:
        signal_number = train(s, device, ranks)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f'out of memory: lower batch_size={s.batch_size} (and raise gradient_accumulation_steps={s.gradient_accumulation_steps} '
                        f'as much to keep the step), block_size={s.block_size}, n_embd={s.n_embd} or n_layer={s.n_layer}') from None
    finally:
        if ranks.world > 1:
            gc.collect()  # gloo aborts at exit if DDP is still alive when its group goes
            dist.destroy_process_group()
    leave(128 + signal_number if signal_number else 0, ranks)


def leave(code, ranks):
    """Exit. Beside others without the interpreter's tidying up: gloo's threads may abort in it, after all is done (now and then, under load)."""
    if ranks.world > 1:
        if 'wandb' in sys.modules:
            sys.modules['wandb'].finish()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == '__main__':
    run_main(main)
