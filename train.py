"""
Train a model.

    python train.py config/tinystories_cpu.py --learning_rate=2e-3          # one process
    torchrun --nproc_per_node=2 train.py config/lowrank.py                  # data-parallel, on CPUs or GPUs

To resume a run, run the same command again. out_dir holds checkpoints, log.jsonl and settings.json. On
Ctrl-C, a closed terminal or a scheduler's signal, the run finishes the step, saves a checkpoint and stops.
"""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))
import features  # noqa: I001 — first: your random.py or data/ then hides no module of ours or of a library
if __name__ == '__main__':
    features.start(__file__)

# Before torch is loaded: its threads wait a moment, not for milliseconds, which slows two runs on one machine
# a hundredfold (docs/results/speed.md)
os.environ.setdefault('GOMP_SPINCOUNT', '1000')

import math
import shlex
import signal
import time
from dataclasses import asdict, dataclass
from functools import partial

import torch

import checkpoint
from batches import DataConfig, evaluate, splitmix, sum_all
from configurator import (
    DeviceConfig,
    FilePath,
    configure,
    leave,
    pick_device,
    run_main,
    typed_text,
    whole_text,
)
from features import extend
from model import ModelConfig, autocast, zero
from optim import FirstSteps, OptimConfig, clip_gradient, not_finite, set_rates
from run import OneProcess, StopSignal, describe, open_bar, peak_memory, report, set_up
from sample import show_sample

MAX_SKIPPED = 10  # steps in a row whose loss or gradient may be NaN or infinite; one more ends the run


@dataclass
class Settings(ModelConfig, DataConfig, OptimConfig, DeviceConfig):
    out_dir: FilePath = ''  # folder of the run: checkpoints, log.jsonl, settings.json; '' = out/ and the name
    # of the config file, else of the data set
    init_from: FilePath = 'auto'  # auto: resume the run in out_dir, or start a new one; resume; scratch:
    # start a new run (an old one in out_dir is moved aside). Or start from weights: a run or checkpoint DIR,
    # hf:FOLDER (Hugging Face format), gpt2, gpt2-medium, gpt2-large, gpt2-xl
    seed: int = 1337  # seed for the weight init, data order and dropout
    batch_size: int = 12  # rows per micro-batch; lower it if memory runs out
    gradient_accumulation_steps: int = 1  # a step has batch_size times this many rows, on all ranks together
    recompute: bool = False  # activation checkpointing of the blocks: a third slower, far less memory
    label_smoothing: float = 0.0  # label smoothing of the training loss
    eval_interval: int = 250  # steps between evaluations; each also saves a checkpoint and prints samples
    eval_iters: int = 200  # batches of 12 validation rows per evaluation, always the same; 0 = all rows
    eval_only: bool = False  # evaluate once, then stop: the run in out_dir; or, if it did not start from
    # init_from, the weights of init_from
    target_val_loss: float = 0.0  # stop when an evaluation reaches this loss; 0 = never
    log_interval: int = 10  # steps between log lines
    always_save_checkpoint: bool = True  # False: save only at the lowest validation loss, and at the end
    checkpoint_interval: int = 0  # steps between additional checkpoints; 0 = only after evaluations
    keep_checkpoints: int = 2  # number of newest checkpoints to keep, in addition to the best one
    sample_prompt: str = '\n'  # prompt of the samples printed during training; \n is a new line
    sample_tokens: int = 100  # length of these samples in tokens; 0 = no samples
    wandb_log: bool = False  # also log to Weights & Biases (WANDB_MODE=offline works)
    wandb_project: str = 'minnow'  # project name in Weights & Biases
    wandb_run_name: str = ''  # run name in Weights & Biases; '' = the name of out_dir
    lora_rank: int = 0  # [lora] rank of adapters on top of the frozen weights of init_from; 0 = no adapters
    teacher: FilePath = ''  # [distill] distill from this run (its best checkpoint), checkpoint or hf:FOLDER
    grow_every: int = 0  # [growth] add blocks to the model every this many steps; 0 = never
    depth: int = 0  # [plan] number of layers; set one or several of depth, params, tokens and minutes, and
    # train.py derives and prints the rest; 0 = not set
    params: float = 0.0  # [plan] approximate number of parameters; 0 = not set
    tokens: float = 0.0  # [plan] approximate number of training tokens; 0 = not set: 20 per parameter
    minutes: float = 0.0  # [plan] total time of the run in minutes. Steps are timed before training and
    # on the way, and max_iters is adjusted; --max_iters sets an upper limit
    plan: bool = False  # [plan] print parameters, FLOPs and memory of the model, then stop. With tokens or
    # minutes: print the sizes that scaling laws recommend, and settings with 20 tokens per parameter
    shard: bool | int = False  # [scale] shard weights, gradients and moments across all processes (FSDP2), or
    # across groups of this many (HSDP). False: every process holds everything (DDP)
    async_save: bool = False  # [scale] write checkpoints in a thread, from a copy of weights and moments
    rewind_spikes: float = 0.0  # [scale] at a loss this many standard deviations above the mean of the last
    # 128, go back to a checkpoint and skip 10 steps of data (PaLM, arXiv 2204.02311); 0 = never, 6 is good

    features = ()  # settings of features are added when one of them is used: configurator.py

    def check(self):
        """Raise ValueError for values that cannot work."""
        for name in ('batch_size', 'gradient_accumulation_steps', 'eval_interval', 'log_interval',
                     'keep_checkpoints'):
            if getattr(self, name) < 1:
                raise ValueError(f'{name}={getattr(self, name)}: must be at least 1')
        for name in ('eval_iters', 'checkpoint_interval', 'sample_tokens', 'target_val_loss'):
            if getattr(self, name) < 0:
                raise ValueError(f'{name}={getattr(self, name)}: must be at least 0')
        if not 0 <= self.seed < 2 ** 63:
            raise ValueError(f'seed={self.seed}: takes 0 <= seed < 2**63')
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f'label_smoothing={self.label_smoothing}: takes 0 <= label_smoothing < 1')
        typed_text(self.sample_prompt, 'sample_prompt')
        is_table = self.arch == 'markov' and not self.rank_embed  # markov
        if self.optimizer == 'counts' and self.is_new and not is_table:  # markov
            raise ValueError('optimizer=counts: counts what follows what in a full Markov table: '  # markov
                             'set arch=markov and rank_embed=0, or use adamw')  # markov
        given = getattr(self, 'given', ())
        is_chosen = 'optimizer' in given or self.is_planned  # adamw in place of a recipe's Muon: an ablation
        if 'muon_lr' in given and not self.uses_muon and not is_chosen:
            raise ValueError(f'muon_lr={self.muon_lr}: belongs to Muon: set optimizer=muon too')

    @property
    def is_planned(self):
        """Whether features/plan derives the model size, batch size and learning rates."""
        return bool(self.depth or self.params or self.tokens or self.minutes)

    @property
    def rows_per_step(self):
        return self.batch_size * self.gradient_accumulation_steps

    @property
    def is_new(self):
        """Whether the run starts from random weights, unless out_dir holds a run."""
        return self.init_from in ('auto', 'scratch')


# -----------------------------------------------------------------------------
# One step

@dataclass
class Step:
    """One update of the weights."""
    nats: torch.Tensor  # summed loss of this rank's rows
    targets: float  # number of targets in the global batch
    norm: torch.Tensor  # norm of the gradient
    stop: bool  # whether any rank was asked to stop
    skipped: bool = False  # whether the loss or a gradient was NaN or infinite


def train_step(run, s, step, ranks, stop=False):
    """
    Update the weights once. If the loss or a gradient is NaN or infinite on any rank, all ranks skip the
    update: weights and moments do not change, and the Step has no targets.
    """
    optimizer, scaler = run.optimizer, run.scaler
    set_rates(optimizer, step, s)
    micro_batches, targets, stops = run.batches.of_all(step, run.trouble, stop)
    nats = zero(ranks.device)

    # 1) Gradients, summed over the micro-batches
    for n, (sample, *arrays) in enumerate(micro_batches):
        torch.manual_seed(splitmix(s.seed, sample) % 2 ** 63)  # dropout is a function of the sample number
        if ranks.world > 1 and not ranks.lockstep:  # scale
            # scale: exchange gradients once a step
            run.runner.require_backward_grad_sync = n == len(micro_batches) - 1  # scale
        x, y, *more = (array.to(ranks.device, non_blocking=True) for array in arrays)  # (B, T) each
        inputs = {}
        if more:  # t5
            from features.t5.objectives import more_inputs  # t5
            inputs = more_inputs(run.model, more)  # t5: the encoder's source, or which pair a token is of
        with autocast(ranks.device, s.dtype):
            if run.teacher:  # distill
                from features.distill.teacher import ask  # distill
                inputs['teacher'] = ask(run.teacher, x, s, **inputs)  # distill
            loss = run.runner(x, y, reduction='sum', label_smoothing=s.label_smoothing, **inputs)
        ranks.beat('to compute gradients')
        # The mean over the targets of the global batch; DDP divides by the number of ranks
        scale = ranks.world / max(targets, 1)
        if s.optimizer == 'counts':  # markov
            scale = ranks.world  # markov: counts are a sum
        # 0 * loss is NaN where the loss is not finite, and then so are the gradients of all ranks
        scaler.scale(loss * (scale + 0 * loss.detach())).backward()
        nats += loss.detach()
    if s.shard:  # scale
        from features.scale.shard import share_gradients  # scale
        share_gradients(run.undivided, ranks)  # scale

    # 2) The update
    scaler.unscale_(optimizer)
    norm = clip_gradient(run.model, s.grad_clip or math.inf)
    is_finite = math.isfinite(norm)  # waits for the device
    run.is_whole = False
    if is_finite or scaler.is_enabled():  # a scaler (float16) finds out itself, and halves its factor
        scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    if is_finite:
        return Step(nats, targets, norm, stops > 0)
    is_broken = not scaler.is_enabled() or scaler.get_scale() < 1  # else the scaler's factor was too large
    return Step(zero(ranks.device), 0.0, norm, stops > 0, skipped=is_broken)


# -----------------------------------------------------------------------------
# The loop

def train(s, device, ranks, stop, left_out=()):
    """Train to the end, or to a signal: returns its number, else 0. left_out: steps without data."""
    if not s.eval_only:
        ranks.from_first(partial(checkpoint.claim, s.out_dir))  # before it is read
    run = set_up(s, device, ranks, left_out)
    stop.listen()
    if s.minutes and not run.step and not s.eval_only:  # plan
        from features.plan.minutes import spend_minutes  # plan
        if not spend_minutes(run, s, ranks, stop, train_step):  # plan
            stop.end()  # plan
    describe(s, run, ranks)
    if s.eval_only:
        if validate(s, run.step, run, ranks, stop) is None:
            stop.end()
        return 0
    ranks.from_first(partial(checkpoint.prepare_out_dir, s.out_dir, run.step, asdict(s)))
    run.log = checkpoint.Log(s, run.step, ranks)
    run.saved = run.step or None
    with open_bar(s, run.step, ranks) as run.bar:
        try:
            return make_steps(s, run, ranks, stop)
        except Exception as error:
            from features.rescue import rescue
            rescue(error, s, run, ranks, save)
            raise


def make_steps(s, run, ranks, stop):
    """The loop of train(): evaluate and save if due, make a step, report it."""
    evaluated, run.best_loss = ranks.from_first(lambda: (run.log.evaluated, checkpoint.best(s.out_dir)[1]))
    first_steps = FirstSteps()
    step, stopping = run.step, False
    while True:
        # 1) Evaluate and save
        is_last = step >= s.max_iters
        if is_last and run.in_a_row > 1:
            raise not_finite(s, step)
        is_due = step % s.eval_interval == 0
        if step == 0 and s.target_val_loss:
            is_due = False  # a race does not stop for the loss it starts with
        if (is_due or is_last) and step > evaluated and not stopping:
            stopping = not evaluation(s, step, run, ranks, stop)
        if step and s.checkpoint_interval and step % s.checkpoint_interval == 0:
            save(s, step, run, ranks, most=0)
        is_reached = s.target_val_loss and run.best_loss is not None and run.best_loss <= s.target_val_loss
        if is_last or is_reached or stopping:
            save(s, step, run, ranks, most=run.in_a_row)
            break
        if s.grow_every and step and step % s.grow_every == 0 and run.model.cfg.n_layer < s.grow_to:  # growth
            from features.growth.during import grow_run  # growth
            run.is_whole = False  # growth: it would grow once more
            grow_run(run, s, ranks)  # growth
        if step in run.left_out:
            step += 1
            continue

        # 2) One step
        began = time.perf_counter()
        is_slow = 'step' in run.to_compile
        with compiling(run, 'step', ranks):
            done = train_step(run, s, step, ranks, bool(stop))
        stopping = done.stop
        step += 1
        run.flops += run.flops_per_step
        run.in_a_row = run.in_a_row + 1 if done.skipped else 0
        if done.skipped:
            run.skipped += 1
            ranks.say(f'step {step}: the loss or its gradient is not finite; no weight was changed')
        if run.in_a_row > MAX_SKIPPED:
            raise not_finite(s, step)
        if s.n_expert:  # moe
            from features.moe.balance import count_loads  # moe
            count_loads(run, ranks)  # moe
        if s.rewind_spikes and done.targets:  # scale
            from features.scale.rewind import notice_spike  # scale
            notice_spike(run, s, ranks.sum(done.nats.item())[0] / done.targets, step - 1, ranks)  # scale
        if ranks.world > 1:  # scale
            from features.scale.guard import check_alike  # scale
            check_alike(run.model, ranks, step)  # scale

        # 3) Report
        run.interval.add(done)
        run.step, run.is_whole = step, True
        is_due = step % s.log_interval == 0 or step == 1
        if is_due:
            total, = ranks.sum(run.interval.nats.item())  # waits for the device
        run.interval.time(time.perf_counter() - began, is_slow)
        if is_due:
            loss = total / run.interval.targets if run.interval.targets else None
            report(s, run, step, loss, done.norm.item(), ranks)
            run.interval.reset()
        run.bar.total = s.max_iters  # with minutes, it changes
        run.bar.update(step - run.bar.n)
        if s.optimizer != 'counts':  # counting has neither a rate nor a gradient
            first_steps.add(step, done, max(group['lr'] for group in run.optimizer.param_groups), s, ranks)
        if run.pace:  # plan
            run.pace.end_step(step, run, ranks)  # plan: max_iters may change

    if s.async_save:  # scale
        from features.scale import background  # scale
        ranks.from_first(background.wait)  # scale
    sum_all(ranks, run.trouble)
    if stopping:
        number = stop.number or signal.SIGTERM
        again = 'the same command'
        if s.init_from == 'scratch' and 'init_from' in s.given:
            again += ' without --init_from=scratch'
        ranks.say(f'stopped by {signal.Signals(number).name} after step {step}; {again} continues from there')
        return number
    reached = ', target_val_loss reached' if is_reached else ''
    ranks.say(f'done: {step} steps{reached}; python sample.py ' + shlex.quote(f'--out_dir={s.out_dir}'))
    return 0


def compiling(run, what, ranks):
    """Context of a 'step' or an 'evaluation': all ranks wait longer for the first one, which compiles."""
    is_compiled_now = what in run.to_compile
    run.to_compile.discard(what)
    return ranks.patient(is_compiled_now)


# -----------------------------------------------------------------------------
# Evaluate and save

def validate(s, step, run, ranks, stop):
    """Print and return {name: validation loss}; None if a signal ended the evaluation."""
    with compiling(run, 'evaluation', ranks):
        result = evaluate(run.model, run.val, s, ranks, stop)
    if result is not None:
        ranks.say(f'step {step}: ' + ', '.join(f'{name} {value:.4f}' for name, value in result.items()))
    return result


def evaluation(s, step, run, ranks, stop):
    """Every eval_interval steps: validation loss, checkpoint, sample. Returns False if a signal ended it."""
    if step and s.always_save_checkpoint:
        save(s, step, run, ranks, most=0)  # first: whatever goes wrong in an evaluation, it is not lost
    result = validate(s, step, run, ranks, stop)
    if result is None:
        return False
    loss = result['val_loss']
    if step and not math.isfinite(loss):
        raise not_finite(s, step)
    is_best = run.best_loss is None or loss < run.best_loss
    if step and (s.always_save_checkpoint or is_best):
        save(s, step, run, ranks)
    if step and is_best and run.in_a_row <= 1:
        run.best_loss = loss
        write_files(s, partial(checkpoint.mark_best, s.out_dir, step, loss, s.keep_checkpoints), ranks)
    run.record(step, tokens=run.tokens(step), flops=run.flops, **result,
               peak_memory_bytes=peak_memory(ranks.device))
    show_sample(run.model, s, run.data, ranks, stop, run.form)
    if run.pace:  # plan
        run.pace.end_evaluation(step, run)  # plan
    return True


def save(s, step, run, ranks, most=1):
    """
    Write a checkpoint, unless this step is already saved. most: the allowed number of skipped steps in a row
    so far. Weights that repeatedly give no finite loss or gradient are broken.
    """
    if run.saved == step or run.in_a_row > most:
        return
    run.saved = step
    weights = run.model.state_dict()
    if s.lora_rank:  # lora
        from features.lora import adapters  # lora
        weights = adapters.state(run.model)  # lora
    tensors = weights, run.optimizer.state_dict()
    if s.shard:  # scale
        from features.scale.shard import gather  # scale
        tensors = gather(tensors, ranks)  # scale
    write_files(s, partial(checkpoint.save, s.out_dir, step, state=stored_state(s, step, run, ranks),
                           other_files=run.data.tokenizer_files, keep=s.keep_checkpoints), ranks, tensors)


def write_files(s, write, ranks, tensors=()):
    """Call write(*tensors) on rank 0; with async_save in a thread, after its earlier work, on a copy."""
    if s.async_save:  # scale
        from features.scale import background  # scale
        write = partial(background.submit, write)  # scale
    ranks.from_first(partial(write, *tensors))


def stored_state(s, step, run, ranks):
    """state.json of a checkpoint: everything that resuming needs except weights and moments."""
    files = run.data.sources[0].files
    state = {
        'step': step,
        'flops': run.flops,
        'model': asdict(run.model.cfg),
        'settings': asdict(s),
        'tokenizer': files.meta['tokenizer'],
        'begin': list(run.data.bos),
        'data': run.data.fingerprint(),
        'scaler': run.scaler.state_dict(),
        'torch': torch.__version__,
    }
    if run.form is not None:
        state['prompt'] = run.form.as_json()
    if s.lora_rank:  # lora
        state['base'] = run.base  # lora
        state['lora'] = run.model.lora.known['default'].description()  # lora
    if s.minutes:  # plan
        state['fits'] = list(run.pace.fits)  # plan
    if s.rewind_spikes or run.left_out:  # scale
        state['left_out'] = sorted(run.left_out)  # scale
        state['losses'] = run.losses.recent if run.losses else []  # scale
    state['interval'] = run.interval.stored(ranks)
    state['skipped'] = run.skipped
    state['job'] = run.job
    return state


# -----------------------------------------------------------------------------
# The process

def read_settings():
    s = configure(Settings)
    if 'RANK' in os.environ:  # scale: torchrun has started this process
        extend(s, 'scale')  # scale
    s.out_dir = s.out_dir or default_out_dir(s)
    if not s.plan and 'dataset' not in s.given:
        from features.datasets import find_dataset
        find_dataset(s, is_new=not checkpoint.checkpoints(s.out_dir))
    return s


def default_out_dir(s):
    """out/NAME, the name of the last config file, or else of the data set; those of a mixture joined by +."""
    paths = [os.path.splitext(s.config_file)[0]]
    if not s.config_file:
        paths = s.dataset if isinstance(s.dataset, dict) else [s.dataset]
    names = [os.path.basename(os.path.abspath(path)) for path in paths]
    return whole_text(os.path.join('out', '+'.join(names)[:100] or 'run'), 'out_dir')


def main():
    s = read_settings()
    device = pick_device(s.device)
    if s.plan:  # plan
        from features.plan.show import show_plan  # plan
        return show_plan(s, device)  # plan
    ranks = OneProcess(device)
    if 'RANK' in os.environ:  # scale
        from features.scale.ranks import Ranks  # scale
        ranks = Ranks(device, s.hang_timeout)  # scale
        ranks.check_restart(s.out_dir)  # scale
    try:
        if s.wandb_log and not s.eval_only:  # study
            from features.study import wandb_log  # study
            ranks.from_first(wandb_log.log_in)  # study
        if s.rewind_spikes:  # scale
            from features.scale.rewind import rewinding  # scale
            number = rewinding(train, s, read_settings, device, ranks, StopSignal())  # scale
        else:
            number = train(s, device, ranks, StopSignal())
    except (RuntimeError, MemoryError) as error:
        if ranks.world > 1:  # scale
            ranks.check_complete(error)  # scale
        from features.rescue import check_memory
        check_memory(error, s)
        raise
    finally:
        if s.async_save:  # scale
            from features.scale import background  # scale
            background.close()  # scale
        checkpoint.release(s.out_dir)
    ranks.end()
    leave(128 + number if number else 0)


if __name__ == '__main__':
    run_main(main)
