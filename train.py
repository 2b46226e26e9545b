"""
Train a model.

    python train.py config/tinystories_cpu.py --learning_rate=2e-3          # one process
    torchrun --nproc_per_node=2 train.py config/lowrank.py                  # data-parallel, on CPUs or GPUs

Run the same command again and it goes on where it was: checkpoints, log.jsonl and settings.json are in out_dir.
Ctrl-C, SIGTERM and a closed terminal (SIGHUP) save at the end of the step, then stop.
"""
import dataclasses
import gc
import math
import os
import signal
import time
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Literal

os.environ['GOMP_SPINCOUNT'] = os.environ.get('GOMP_SPINCOUNT', '1000')  # before torch is loaded: its threads wait for one another
# a moment, not for milliseconds, or two runs on one machine slow each other down a hundredfold (120 against 8,800 tokens/s, RESULTS.md)

import torch

import checkpoint
from batches import DataConfig, splitmix
from configurator import FilePath, UserError, configure, leave, run_main, typed_text
from device import DeviceConfig, autocast, is_out_of_memory, peak_flops, peak_memory, pick_device, pick_dtype, zero
from features.growth.networks import GrowConfig
from features.lora import layers as lora
from features.plan.dial import PlanConfig, find_vocabulary, fit_minutes, show_plan
from features.scale import faults
from features.scale.guard import GuardConfig, Losses, Spike, StopSignal, check_alike, not_finite
from features.scale.ranks import Ranks, is_lost
from features.scale.shard import share_gradients
from loss import evaluate, reading
from model import ModelConfig
from optim import OptimConfig, clip_gradient, set_rates
from origin import adopt, read_model
from run import check_dataset, compiling, end_guides, expert_loads, grow_run, save, set_up
from runlog import Log, describe, log_in, report, show_losses, show_samples


@dataclass
class Settings(ModelConfig, DataConfig, OptimConfig, DeviceConfig, PlanConfig, GrowConfig, lora.LoraConfig, GuardConfig):
    features = ()
    out_dir: FilePath = 'out'  # where checkpoints, log and settings go
    init_from: FilePath = 'auto'  # auto = resume if out_dir holds a run, else scratch; resume; scratch (a run in out_dir is moved aside);
    # a run or checkpoint DIR, hf:FOLDER (of Hugging Face's kind), gpt2, gpt2-medium, gpt2-large, gpt2-xl: the weights there, a fresh schedule
    init_keep: Literal['weights', 'optimizer', 'schedule'] = 'weights'  # what to keep of init_from=DIR: weights alone; the optimizer's moments too,
    # with a fresh schedule; or all, so that rate and data go on at its step
    seed: int = 1337  # of weights, order of the data and dropout
    batch_size: int = 12  # rows of a micro-batch: what has to fit into memory
    gradient_accumulation_steps: int = 1  # micro-batches of a step, over all ranks together: a step is always batch_size times this many rows
    recompute: bool = False  # activation checkpointing: the blocks run again in the backward pass, a third slower, for a fraction of the memory
    label_smoothing: float = 0.0  # in the training loss only
    teacher: FilePath = ''  # distillation: learn from the distribution of this network too, a run (its best checkpoint), a checkpoint or hf:FOLDER
    distill_mix: float = 0.5  # its share of the training loss; the rest is cross-entropy
    distill_temperature: float = 1.0  # higher: more of what the teacher thinks of unlikely tokens (Hinton et al. 2015, arXiv 1503.02531)
    eval_interval: int = 250  # steps between evaluations, each with a checkpoint and samples
    eval_iters: int = 200  # batches of 12 rows of the validation split, whatever batch_size is, the same ones each time; 0 = the whole split
    eval_only: bool = False  # evaluate, then stop: the weights of init_from, or the run in out_dir if it began with them
    target_val_loss: float = 0.0  # stop when an evaluation reaches this loss; 0 = never
    log_interval: int = 10  # steps between progress lines
    always_save_checkpoint: bool = True  # False: only when the validation loss is the lowest so far (and at the end)
    checkpoint_interval: int = 0  # steps between further checkpoints; 0 = only after evaluations
    keep_checkpoints: int = 2  # the newest ones kept, and the best one
    async_save: bool = False  # write checkpoints in a thread while the run goes on: takes memory for a copy of weights and moments
    sample_prompt: str = '\n'  # what the samples during training begin with, typed as start of sample.py:
    # \n is a new line
    sample_tokens: int = 100  # their length; 0 = no samples
    wandb_log: bool = False  # log to Weights & Biases too (WANDB_MODE=offline works)
    wandb_project: str = 'minnow'
    wandb_run_name: str = ''  # '' = the name of out_dir
    backend: Literal['auto', 'nccl', 'gloo'] = 'auto'  # of torch.distributed; auto = nccl on CUDA
    shard: bool | int = False  # divide weights, gradients and moments among all processes (FSDP2), or among groups of so many, which hold the same (HSDP);
    # False: every process has all (DDP)

    def check(self):
        """Raise ValueError for values that cannot work."""
        for name in ('batch_size', 'gradient_accumulation_steps', 'eval_interval', 'log_interval', 'keep_checkpoints'):
            if getattr(self, name) < 1:
                raise ValueError(f'{name}={getattr(self, name)}: must be at least 1')
        typed_text(self.sample_prompt, 'sample_prompt')
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
        idle = sorted(getattr(self, 'given', set()) & {'distill_mix', 'distill_temperature'})
        if idle and not self.teacher:
            raise ValueError(f'{idle[0]}={getattr(self, idle[0])}: belongs to distillation: set teacher too')
        if self.init_keep != 'weights' and self.init_from in ('auto', 'scratch'):
            raise ValueError(f'init_keep={self.init_keep}: belongs to weights that were trained before: give --init_from=DIR')
        beside = {'grow_every': 0, 'init_keep': 'weights', 'rank_guide': 0, 'arch': 'decoder', 'factor_decay': 'factor'}
        for name, plain in beside.items() if self.lora_rank else ():
            if getattr(self, name) != plain:
                raise ValueError(f'lora_rank={self.lora_rank}: adapters go with {name}={plain} alone, not {getattr(self, name)}: leave it out')
        beside = {'grow_every': 0, 'rank_guide': 0, 'arch': 'decoder', 'factor_decay': 'factor'}
        for name, plain in beside.items() if self.shard else ():
            if getattr(self, name) != plain:
                raise ValueError(f'shard={self.shard}: goes with {name}={plain} alone, not {getattr(self, name)}: leave it out')
        if self.shard and (self.dtype == 'float16' or self.lora_rank and self.lora_store not in ('auto', 'float32')):
            raise ValueError(f'shard={self.shard}: goes with neither dtype=float16 nor lora_store: leave it out')
        if self.shard and self.optimizer not in ('adamw', 'muon'):
            raise ValueError(f'shard={self.shard}: goes with optimizer=adamw or muon, not {self.optimizer}: leave it out')
        if self.lora_rank and self.optimizer == 'spectron':
            raise ValueError(f'lora_rank={self.lora_rank}: optimizer=spectron bounds the factors of the network, which stay as they are: use adamw or muon')
        if self.n_encoder_layer and self.objective == 'causal' and not self.plan:
            raise ValueError(f"n_encoder_layer={self.n_encoder_layer}: objective='causal' gives an encoder nothing to read: set it to ul2, prefix or seq2seq")
        if self.n_encoder_layer and (self.teacher or self.grow_every or self.is_planned and 'plan' not in self.given):
            raise ValueError(f'n_encoder_layer={self.n_encoder_layer}: teacher, grow_every and the dial (depth, params, tokens, minutes) are for decoders: '
                             'leave them out')
        if self.grow_every and (self.rank_guide or self.arch == 'markov'):
            raise ValueError(f'grow_every={self.grow_every}: goes with neither rank_guide nor arch=markov: leave it out')
        is_new = self.init_from in ('auto', 'scratch')  # else the network is that of init_from
        if self.optimizer == 'counts' and is_new and (self.arch != 'markov' or self.rank_embed):
            raise ValueError('optimizer=counts: counts what follows what in a full Markov table: set arch=markov '
                             'and rank_embed=0, or use adamw')
        given = getattr(self, 'given', set())
        idle = sorted(given & {'muon_lr', 'momentum', 'momentum_warmup'})
        is_chosen = 'optimizer' in given or self.is_planned  # a recipe with adamw in place of Muon is an ablation
        if idle and not self.uses_muon and not is_chosen:
            raise ValueError(f'{idle[0]}={getattr(self, idle[0])}: belongs to Muon: set optimizer=muon too')


# -----------------------------------------------------------------------------
# One step

def train_step(run, s, step, ranks, stop=False):
    """
    One update. Returns (summed loss of this rank's rows in nats, targets in the global batch, norm of
    the gradient, whether any rank was asked to stop, whether it was skipped: where the loss or the gradient of any rank is not finite, no rank
    changes a weight or a moment, and the first two are 0).
    """
    optimizer, scaler = run.optimizer, run.scaler
    set_rates(optimizer, step, s)
    micro, targets = run.batches(step)
    targets, stop = ranks.sum(targets, stop)
    nats = zero(ranks.device)
    for n, (first, *arrays) in enumerate(micro):
        torch.manual_seed(splitmix(s.seed, first) % 2 ** 63)  # dropout is a function of the sample number: nothing to save
        if ranks.world > 1 and not ranks.lockstep:
            run.runner.require_backward_grad_sync = n == len(micro) - 1  # set before the forward pass: exchange gradients once a step
        x, y, *more = (a.to(ranks.device, non_blocking=True) for a in arrays)
        with autocast(ranks.device, s.dtype):
            more = reading(run.model, more)
            teacher = {}
            if run.teacher:  # distill
                from features.distill.teacher import ask  # distill
                teacher = {'teacher': ask(run.teacher, x, s, **more)}  # distill
            loss = faults.at('loss', step, run.runner(x, y, reduction='sum', label_smoothing=s.label_smoothing, **teacher, **more))
        ranks.beat('to compute gradients')
        # the mean over the targets of the global batch; DDP divides by the number of ranks. 0 times a loss that is not finite is NaN, and so are
        # then the gradients, of all ranks. Counts are a sum
        shared = 1 if s.optimizer == 'counts' else max(targets, 1)
        scaler.scale(loss * (ranks.world / shared + 0 * loss.detach())).backward()
        nats += loss.detach()
    share_gradients(run.undivided, ranks)
    scaler.unscale_(optimizer)
    norm = clip_gradient(run.model, s.grad_clip or math.inf)
    finite = math.isfinite(norm)  # waits for the device
    if finite or scaler.is_enabled():  # a scaler finds out itself, and halves its factor
        scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    skipped = not finite and (not scaler.is_enabled() or scaler.get_scale() < 1)  # else it was the factor that was too large
    return (nats, targets, norm, stop > 0, False) if finite else (zero(ranks.device), 0.0, norm, stop > 0, skipped)


# -----------------------------------------------------------------------------
# The dial

def spend_minutes(run, s, ranks, stop):
    """
    Compile what is to be compiled, time five steps after three, leave no trace of them, and set max_iters so that the whole
    process takes s.minutes. Returns whether to stop.
    """
    weights, times = {name: t.clone() for name, t in run.model.state_dict().items()}, []
    for step in range(8):
        began = run.pace.elapsed()
        with compiling(run, 'step', ranks):
            _, _, norm, stopping, _ = train_step(run, s, step, ranks, bool(stop))
        norm.item()  # waits for the device
        times.append(run.pace.elapsed() - began)
        if stopping:
            return True
    if 'evaluation' in run.to_compile:
        with compiling(run, 'evaluation', ranks):
            result = evaluate(run.model, run.val, dataclasses.replace(s, eval_iters=4), ranks, stop)  # a single pass
        if result is None:
            return True
    run.model.load_state_dict(weights)
    run.optimizer.state.clear()
    if s.n_expert:
        run.model.take_loads()

    def fit():
        fit_minutes(s, run.planned, sorted(times[3:])[2], run.pace.elapsed())
        return s.max_iters, s.eval_interval, s.log_interval
    s.max_iters, s.eval_interval, s.log_interval = ranks.from_first(fit)
    run.fits.append([0, s.max_iters])
    return False


def fit_again(s, step, run, ranks):
    """
    Set max_iters anew at an evaluation, before its checkpoint is written: whoever goes on from there makes the same steps,
    as their rates follow from max_iters.
    """
    before = s.max_iters
    s.max_iters = ranks.from_first(partial(run.pace.fit, step))
    if s.max_iters != before:
        run.fits.append([step, s.max_iters])
        ranks.from_first(partial(checkpoint.write_settings, s.out_dir, dataclasses.asdict(s)))
        ranks.say(f'step {step}: minutes={s.minutes:g}: {run.pace.elapsed():.0f} seconds are gone, max_iters={s.max_iters} in place of {before}')


# -----------------------------------------------------------------------------
# The training loop

REWINDS = 5  # after so many spikes, one soon after another, a run is given up


def train(s, device, ranks, stop, left_out=()):
    """
    The run that the settings describe, from where it stands to its end or to a signal. Returns the signal's number, 0 at the end. Raises Spike where it is
    to begin again at its last checkpoint, with more steps `left_out`.
    """
    if not s.eval_only:
        ranks.from_first(partial(checkpoint.claim, s.out_dir))  # before it is read
    run = set_up(s, device, ranks, left_out)
    stop.listen()
    step = run.step
    if s.minutes and not step and not s.eval_only and spend_minutes(run, s, ranks, stop):
        ranks.say('stopped before the first step; nothing was written')
        return stop.number or signal.SIGTERM
    describe(s, run, ranks)
    if s.eval_only:
        with compiling(run, 'evaluation', ranks):
            result = evaluate(run.model, run.val, s, ranks, stop)
        if result:
            show_losses(step, result, ranks)
        return 0 if result else stop.number or signal.SIGTERM

    ranks.from_first(partial(claim_out_dir, s, step))
    log = Log(s, step, ranks)
    run.pace.earlier = log.seconds
    evaluated, run.best_loss = ranks.from_first(lambda: (log.evaluated, checkpoint.best(s.out_dir)[1]))
    peak = peak_flops(device, s.dtype) if ranks.first else None
    stopping, run.saved = False, step or None
    interval = run.interval

    while True:
        if run.model.cfg.rank_guide:
            run.model.set_guides(step) if step < s.rank_guide else end_guides(run, s, ranks)
        if step >= s.max_iters and run.in_a_row > 1:
            raise not_finite(s, step)
        due = step % s.eval_interval == 0 if step else not s.target_val_loss  # a race does not stop for the loss it starts with
        if (due or step >= s.max_iters) and step > evaluated and not stopping:
            stopping = not evaluation(s, step, run, log, ranks, stop)
        if step and s.checkpoint_interval and step % s.checkpoint_interval == 0:
            save_once(s, step, run, ranks, most=0)
        reached = s.target_val_loss and run.best_loss is not None and run.best_loss <= s.target_val_loss
        if step >= s.max_iters or reached or stopping:
            save_once(s, step, run, ranks, most=run.in_a_row)
            break
        if s.grow_every and step and step % s.grow_every == 0 and run.model.cfg.n_layer < s.grow_to:
            grow_run(run, s, ranks)
            interval.loads = 0  # of other layers
        if step in run.left_out:
            step += 1
            continue
        faults.at('step', step, run.model)
        began, is_slow = time.perf_counter(), 'step' in run.to_compile
        with compiling(run, 'step', ranks):
            new_nats, new_targets, norm, stopping, skipped = train_step(run, s, step, ranks, bool(stop))
        count_skipped(run, s, skipped, step, ranks)
        if s.minutes:
            run.pace.end_step()
        interval.nats, interval.targets, step = interval.nats + new_nats, interval.targets + new_targets, step + 1
        if s.n_expert:
            interval.loads = interval.loads + expert_loads(run, ranks)
        run.flops += run.flops_per_step
        if s.rewind_spikes and new_targets:
            notice_spike(run, s, ranks.sum(new_nats.item())[0] / max(new_targets, 1), step - 1, ranks)
        if s.desync_interval and ranks.world > 1 and step % s.desync_interval == 0:
            check_alike(run.model, ranks, step)
        is_due = step % s.log_interval == 0 or step == 1
        if is_due:
            total, = ranks.sum(interval.nats.item())  # waits for the device
        interval.time(time.perf_counter() - began, is_slow)
        if is_due:
            loss = total / interval.targets if interval.targets else None
            report(s, run, step, loss, norm.item(), interval.loads if s.n_expert else None, peak, log, ranks)
            interval.reset()
        if s.optimizer != 'counts':  # counting has neither a rate nor a gradient
            highest = max(group['lr'] for group in run.optimizer.param_groups)
            run.first_steps.add(step - 1, new_nats, new_targets, norm, highest, s, ranks)
    ranks.from_first(run.writer.wait)
    number = stop.number or signal.SIGTERM
    if stopping:
        again = 'the same command' + ' without --init_from=scratch' * (s.init_from == 'scratch' and 'init_from' in s.given)
        ranks.say(f'stopped by {signal.Signals(number).name} after step {step}; {again} goes on from there')
        return number
    reached = ', target_val_loss reached' if reached else ''
    ranks.say(f'done: {step} steps{reached}; python sample.py --out_dir={s.out_dir}')
    return 0


def save_once(s, step, run, ranks, most=1):
    """Save, unless that is done; most: skipped steps in a row up to now. Weights that gave no finite loss or gradient, again and again, are broken."""
    if run.saved != step and run.in_a_row <= most:
        save(s, step, run, ranks)
        run.saved = step


def evaluation(s, step, run, log, ranks, stop):
    """What is due every eval_interval steps: the validation loss, samples, a checkpoint. Returns False where a signal ended it before that was known."""
    began, compiled = run.pace.elapsed(), 'evaluation' in run.to_compile
    if s.minutes and step < s.max_iters:
        fit_again(s, step, run, ranks)
    if step and s.always_save_checkpoint:
        save_once(s, step, run, ranks, most=0)  # first, so that nothing that goes wrong in an evaluation can lose it
    faults.at('evaluation', step)
    with compiling(run, 'evaluation', ranks):
        result = evaluate(run.model, run.val, s, ranks, stop)
    if result is None:
        return False
    show_losses(step, result, ranks)
    if step and not math.isfinite(result['val_loss']):
        raise not_finite(s, step)
    if step and s.always_save_checkpoint:
        save_once(s, step, run, ranks)
    if step and run.in_a_row <= 1 and (run.best_loss is None or result['val_loss'] < run.best_loss):
        run.best_loss = result['val_loss']
        save_once(s, step, run, ranks)
        ranks.from_first(partial(run.writer, checkpoint.mark_best, s.out_dir, step, run.best_loss, s.keep_checkpoints))
    log.write(step, tokens=run.tokens(step), flops=run.flops, **result, peak_memory_bytes=peak_memory(ranks.device))
    faults.at('sample', step)
    show_samples(run.model, s, run.data, ranks, stop)
    run.pace.end_evaluation(began, compiled)
    return True


def claim_out_dir(s, step):
    checkpoint.claim(s.out_dir)  # there may be one by now
    checkpoint.prepare_out_dir(s.out_dir, step, dataclasses.asdict(s))
    checkpoint.claim(s.out_dir)  # another folder, if that one was moved aside


def count_skipped(run, s, skipped, step, ranks):
    """Count a step that was skipped, or the end of a row of them. Raises UserError for too long a row."""
    run.in_a_row = run.in_a_row + 1 if skipped else 0
    run.skipped += skipped
    if skipped:
        ranks.say(f'step {step + 1}: the loss or its gradient is not finite; no weight was changed')
    if run.in_a_row > s.max_skipped:
        raise not_finite(s, step + 1)


def notice_spike(run, s, loss, step, ranks):
    """Raise Spike if the loss of update number `step` is far above those before it."""
    if not run.losses.add(loss):
        return
    ranks.from_first(run.writer.wait)
    spike, rows = Spike(step), s.batch_size * s.gradient_accumulation_steps
    last = next(iter(checkpoint.checkpoints(s.out_dir)), 'step_0').rpartition('_')[2]
    first = max(spike.steps[0], int(last))  # what was before it stays
    ranks.say(f'step {step + 1}: loss {loss:.4f} is more than {s.rewind_spikes:g} standard deviations above those before: back to the last checkpoint, and '
              f'on without steps {first + 1} to {step + 1} (samples {first * rows} to {(step + 1) * rows - 1})')
    raise spike


def rewinding(s, device, ranks):
    """train(), begun again after every spike. Raises UserError when there are too many, one soon after another."""
    stop, left_out, count = StopSignal(), set(), 0
    while True:
        try:
            return train(s, device, ranks, stop, left_out)
        except Spike as spike:
            count = count + 1 if spike.steps[0] - max(left_out, default=0) < Losses.SPAN else 1
            left_out.update(spike.steps)
        if count > REWINDS:
            raise UserError(f'rewind_spikes={s.rewind_spikes:g}: {REWINDS} rewinds did not help: lower the learning rate')
        gc.collect()  # the network that was
        s = configure(Settings)
        check_dataset(s)
        if s.init_from == 'scratch' and ranks.from_first(lambda: bool(checkpoint.checkpoints(s.out_dir))):
            s.init_from = 'auto'  # it has begun


def main():
    s = configure(Settings)
    device = pick_device(s.device)
    if s.wandb_log and find_spec('wandb') is None:
        raise UserError('wandb_log=True: wandb is not installed: pip install wandb')
    if s.plan:
        if s.init_from not in ('auto', 'scratch', 'resume'):
            cfg, _, _ = read_model(s.init_from, encoder=True)
            adopt(s, cfg, s.init_from)
        s.dtype = pick_dtype(s.dtype, device)
        return show_plan(s, find_vocabulary(s), device)
    check_dataset(s)
    ranks = Ranks(s.backend, device, s.hang_timeout)
    try:
        if s.wandb_log and not s.eval_only:
            ranks.from_first(log_in)
        signal_number = rewinding(s, device, ranks)
    except (RuntimeError, MemoryError) as error:
        if ranks.world > 1 and is_lost(error):
            raise UserError('another rank has ended: what it said is above; the same command goes on from the newest checkpoint') from None
        if not is_out_of_memory(error):
            raise
        raise UserError(f'out of memory: lower batch_size={s.batch_size} (and raise gradient_accumulation_steps={s.gradient_accumulation_steps} '
                        f'as much to keep the step), block_size={s.block_size}, n_embd={s.n_embd} or n_layer={s.n_layer}') from None
    finally:
        checkpoint.release(s.out_dir)
    ranks.end()
    leave(128 + signal_number if signal_number else 0)


if __name__ == '__main__':
    run_main(main)
