"""
A training run: what it works with, where it starts, what it prints. train.py makes the steps.

`s` is train.py's Settings, `ranks` the processes of the run: OneProcess, or features/scale's Ranks.
"""
import os
import signal
import sys
import time
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial

import torch
from tqdm import tqdm

import checkpoint
from batches import Batches, Mixture, Source, open_data
from configurator import Stopped, UserError, check, listen, peak_flops, pick_compile, pick_dtype
from features import part_of
from model import ModelConfig, compile_all, make_model
from optim import Interval, learning_rate, make_optimizer, short_warmup, step_flops
from tokenizer import PromptFormat


@dataclass
class Run:
    """The objects that a training run works with."""
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    data: Mixture
    val: list[Source]
    batches: Batches
    interval: Interval
    step: int  # steps made so far
    left_out: set  # steps without data
    tokens_per_step: int
    flops: float = 0.0  # spent so far
    skipped: int = 0  # steps whose loss or gradient was NaN or infinite
    in_a_row: int = 0  # of these, up to now
    is_whole: bool = True  # whether everything is as it was after `step` steps, so that it can be saved
    trouble: Exception = None  # an error of this rank: all stop at the beginning of the next step
    saved: int | None = None  # step of the newest checkpoint
    best_loss: float | None = None  # of all evaluations
    to_compile: set = field(default_factory=set)  # 'step', 'evaluation': compiled when it first runs
    job: list = ()  # the torchrun processes that started it
    log: checkpoint.Log = None
    bar: tqdm = None  # the progress bar
    peak_flops: float | None = None  # FLOP/s that the device could reach
    runner: torch.nn.Module = None  # the model, or DDP around it
    # Of features, None or empty in a plain run
    undivided: list = ()  # parameters of a sharded network that every rank holds (scale)
    losses: object = None  # losses of the last steps, to notice a spike (scale)
    form: PromptFormat = None  # the special tokens around a prompt of the model that it began with
    planned: dict = ()  # settings that were derived (plan)
    pace: object = None  # how fast the run goes, with minutes (plan)
    teacher: torch.nn.Module = None  # the network to learn from (distill)
    reference: tuple = None  # (ModelConfig, weights) to inherit further blocks from (growth)
    base: dict = None  # where the frozen network is, and its fingerprint (lora)

    def tokens(self, step):
        """The number of tokens in the first `step` steps, without skipped data."""
        return (step - sum(n < step for n in self.left_out)) * self.tokens_per_step

    def record(self, step, **values):
        """Write a record to the log."""
        try:
            self.log.write(step, **values)
        except UserError as error:
            error.records = [*getattr(self.trouble, 'records', ()), partial(self.log.write, step, **values)]
            self.trouble = error

    def wrap(self, s, ranks):
        """Let the network be compiled, if it is to be, and trained by all ranks."""
        if s.compile:
            compile_all(self.model, by_block=bool(s.shard))
            self.to_compile = {'step', 'evaluation'}
        self.runner = ranks.wrap(self.model)

    def count(self):
        """Count the parameters of the network, and the FLOPs of a step."""
        self.parameters = self.model.num_params()
        self.active_parameters = self.model.num_params(active=True)  # of experts: those one token meets
        self.flops_per_step = step_flops(self.model, self.optimizer, self.teacher, self.tokens_per_step)


# -----------------------------------------------------------------------------
# Set up

def set_up(s, device, ranks, left_out=()):
    """Make the Run for these settings, at its current step. left_out: steps without data, after a rewind."""
    # 1) Where it starts
    start = find_start(s, ranks)
    state = start.state or {}
    if state and s.dtype == 'auto':
        s.dtype = state['settings']['dtype']
    else:
        s.dtype = ranks.from_first(lambda: pick_dtype(s.dtype, device))
    planned = {}
    if s.is_planned:  # plan
        from features.plan.dial import derive, most_steps  # plan
        most = most_steps(s)  # plan
        planned = derive(s, start.state, device, ranks)  # plan
    if s.rows_per_step % ranks.world:
        raise UserError(f'batch_size * gradient_accumulation_steps = {s.rows_per_step} rows cannot be shared '
                        f'by {ranks.world} processes: make it a multiple of {ranks.world}')

    # 2) Data, network and optimizer
    data, val = open_data(s, start, ranks)
    if 'chat' in data.sources[0].files.meta:  # chat
        from features.chat.template import form_of  # chat
        start.form = form_of(data.sources[0].files.meta, start.form)  # chat
    if s.optimizer == 'counts' or s.arch == 'markov':  # markov
        from features.markov.settings import check_machine  # markov
        check_machine(s, data, ranks)  # markov
    if not s.shard:
        model = build_model(s, data, start).to(device)
    if s.shard:  # scale
        from features.scale.shard import build_divided  # scale
        model = build_divided(build_model, s, data, start, ranks)  # scale
    model.recompute = s.recompute
    newton_schulz_dtype = torch.bfloat16 if s.dtype == 'bfloat16' else torch.float32
    run = Run(
        model=model,
        optimizer=make_optimizer(model, s, newton_schulz_dtype),
        scaler=torch.amp.GradScaler(device.type, enabled=s.dtype == 'float16'),
        data=data,
        val=val,
        batches=Batches(data, s, ranks),
        interval=Interval(device, state.get('interval'), ranks),
        step=state.get('step', 0),
        # Earlier steps were trained and are in the weights: a spike's steps may begin before the checkpoint
        left_out={*state.get('left_out', ()), *(n for n in left_out if n >= state.get('step', 0))},
        tokens_per_step=s.rows_per_step * s.block_size,
        skipped=state.get('skipped', 0),
        job=ranks.job(),
        planned=planned,
        base=start.base,
        form=start.form and start.form.trained(data.sources[0].files.meta.get('eot')),
    )
    if s.teacher:  # distill
        from features.distill.teacher import find_teacher  # distill
        run.teacher = find_teacher(s, data, ranks).to(device)  # distill
    if s.grow_every:  # growth
        from features.growth.during import begin_growth  # growth
        run.reference = begin_growth(s, model.cfg)  # growth

    # 3) The state of a run that goes on
    if state and not s.eval_only:
        from features.resuming import describe_changes
        describe_changes(s, state['settings'], ranks)
        from features.moments import load_optimizer
        load = partial(load_optimizer, start.folder, run.optimizer)
        if s.shard:  # all moments are rank 0's for now
            ranks.from_first(load)
        else:
            load()
        if run.scaler.is_enabled() and state['scaler']:
            run.scaler.load_state_dict(state['scaler'])
        # In the log, its sources keep the names they had when the run began, wherever they are now
        for source, name in zip([*data.sources, *val], [*state['data'], *state['data']]):
            source.name = name
    run.count()
    run.flops = state.get('flops', run.step * run.flops_per_step)
    if s.minutes:  # plan
        from features.plan.minutes import Pace  # plan
        run.pace = Pace(s, state.get('fits'), most)  # plan
    if s.rewind_spikes:  # scale
        from features.scale.rewind import Losses  # scale
        run.losses = Losses(s.rewind_spikes, state.get('losses', ()))  # scale

    # 4) How it is computed
    if s.lora_rank:  # lora
        from features.lora.packed import pack_frozen_of  # lora
        pack_frozen_of(model, s)  # lora
    s.compile = pick_compile(s.compile, device, run.flops_per_step * s.max_iters / ranks.world)
    if s.shard:  # scale
        from features.scale.shard import divide  # scale
        divide(run, build_model, s, start, ranks)  # scale
    run.wrap(s, ranks)
    if ranks.first and not s.eval_only:
        run.peak_flops = peak_flops(device, s.dtype)
    return run


def build_model(s, data, start, is_blank=False):
    """
    The model on the CPU. is_blank: only its shapes, on the meta device. Raises UserError if its vocabulary or
    its run does not match the data.
    """
    s.vocab_size = s.vocab_size or data.vocab_size
    if s.vocab_size < data.vocab_size:
        to_do = 'leave vocab_size out'
        if start.weights is not None and not start.state:
            to_do = 'prepare it with that tokenizer'
            from features.text.folders import how_to_prepare_for  # text
            files = data.sources[0].files  # text
            to_do = f'prepare it {how_to_prepare_for(s.init_from, start.folder, files)}'  # text
        raise UserError(f'vocab_size={s.vocab_size}: '
                        f'the data set {s.dataset} has {data.vocab_size} tokens: {to_do}')
    check(s)  # once more, now that the vocabulary is known
    if start.state and not s.eval_only:
        from features.resuming import check_same_run
        check_same_run(s, data, start.state)
    torch.manual_seed(s.seed)
    cfg = part_of(s, ModelConfig)
    if start.state:  # it may have grown on the way
        for name in ('n_layer', 'ranks', 'no_rope', 'full_layers', 'dense_layers'):
            if name in start.state['model']:
                setattr(cfg, name, start.state['model'][name])
    if not start.state and cfg.n_layer * cfg.n_embd ** 2 + cfg.vocab_size * cfg.n_embd > 2 ** 28:
        from features.sizes import check_memory
        check_memory(cfg)
    with torch.device('meta' if is_blank else 'cpu'):
        model = make_model(cfg, init=not (start.state or start.weights))
    if start.weights is not None and not is_blank:
        checkpoint.load_weights(model, start.weights, s.init_from)
    if s.lora_rank:  # lora
        from features.lora.load import begin  # lora
        begin(model, s, start, is_blank)  # lora
        return model  # lora
    if start.state and not is_blank:
        checkpoint.load_weights(model, checkpoint.read_weights(start.folder), start.folder)
    return model


# -----------------------------------------------------------------------------
# Where a run starts

@dataclass
class Start:
    """What a run starts from: random weights, its own newest checkpoint, or weights from elsewhere."""
    folder: str = ''  # of the checkpoint, or of the weights and their tokenizer
    state: dict = None  # state.json of the checkpoint that the run goes on from
    weights: dict = None  # {name: tensor} of another network, or of the base of an adapter
    base: dict = None  # state.json's entry for the base of an adapter
    form: PromptFormat = None  # the special tokens around a prompt of the model that it began with


def find_start(s, ranks):
    """The Start of a run with these settings; sets the model settings of `s`. Raises UserError."""
    found = ranks.from_first(lambda: checkpoint.checkpoints(s.out_dir))
    if found and s.init_from == 'scratch' and 'RANK' in os.environ:  # scale: torchrun has started it
        if ranks.was_restarted(s.out_dir):  # scale
            s.init_from = 'auto'  # scale
    if found and s.eval_only and not s.is_new:
        from features.others import began_with_others
        if ranks.from_first(lambda: began_with_others(s)):
            found = []
    if s.init_from == 'resume' or (found and s.init_from != 'scratch'):
        from features.resuming import resume
        return resume(s, ranks)
    if not s.is_new:
        from features.others import begin_with_others
        return begin_with_others(s, ranks)
    if s.lora_rank:  # lora
        problem = 'adapters are trained beside weights that are there: give --init_from=DIR'  # lora
        raise UserError(f'lora_rank={s.lora_rank}: {problem}')  # lora
    return Start()


# -----------------------------------------------------------------------------
# What a run prints

def open_bar(s, step, ranks):
    """The progress bar from this step on, on the terminal of rank 0: a bar has no place in a log."""
    return tqdm(total=s.max_iters, initial=step, file=sys.stderr, leave=False, dynamic_ncols=True, miniters=1,
                bar_format='{n_fmt}/{total_fmt} steps |{bar}| {remaining} left{postfix}',
                disable=None if ranks.first else True)


RANKS = ('rank_qk', 'rank_vo', 'rank_mlp', 'rank_embed', 'rank_head', 'ranks')


def describe(s, run, ranks):
    """Print a short description of the model and the run."""
    cfg = run.model.cfg
    parts = [f'{cfg.n_layer} layers, {s.n_embd} wide, {s.n_head} heads']
    if s.n_encoder_layer:  # t5
        parts[0] = f'{s.n_encoder_layer} encoder layers, {parts[0]}'  # t5
    if s.arch == 'markov':  # markov
        parts = ['a Markov chain']  # markov
    if s.n_expert:  # moe
        parts.append(f'{s.n_expert} experts, {run.active_parameters:,} parameters a token')  # moe
    low_rank = [f'{name} {getattr(s, name)}' for name in RANKS if getattr(s, name)]
    if low_rank:
        parts.append(', '.join(low_rank))
    ranks.say(f'model: {run.parameters:,} parameters ({"; ".join(parts)}), {s.vocab_size:,} tokens, '
              f'context {s.block_size}')
    if s.lora_rank:  # lora
        from features.lora.layers import memory  # lora
        ranks.say(memory(run.model, run.parameters))  # lora
    epochs = run.data.epochs(s.rows_per_step * s.max_iters)
    ranks.say(f'data: {s.rows_per_step} rows = {s.rows_per_step * s.block_size:,} tokens a step, '
              f'{s.max_iters:,} steps; epochs: ' + ', '.join(f'{name} {n:.2f}' for name, n in epochs.items()))
    for source in (*run.data.sources, *run.val):
        if ranks.first and source.too_long():
            ranks.say(f'data: {source.too_long()}')
    if 'dataset' not in s.given and s.dataset == type(s)().dataset:  # else it is that of an evaluated run
        ranks.say(f'data: dataset={s.dataset} is the default; --dataset=NAME takes another')
    if not all('sha256' in source.files.shards[0] for source in run.data.sources):  # text: nanoGPT's folders
        from features.text.nanogpt import describe_sources  # text
        describe_sources(run.data.sources, ranks)  # text
    compiled = 'compiled' if s.compile else 'not compiled'
    ranks.say(f'device: {ranks.device}, {s.dtype}, {compiled}; processes: {ranks.world}, threads of each: '
              f'{torch.get_num_threads()}')
    for line in short_warmup(s):
        ranks.say(line)
    if s.grow_every:  # growth
        from features.growth.during import short_growth  # growth
        for line in short_growth(s, cfg.n_layer, run.step):  # growth
            ranks.say(line)  # growth
    if run.planned:  # plan
        ranks.say('derived: ' + ' '.join(f'--{name}={getattr(s, name)}' for name in run.planned))  # plan
    if run.step:
        ranks.say(f'resuming {s.out_dir} at step {run.step}')
    elif 'out_dir' not in s.given and not s.eval_only:
        ranks.say(f'out_dir={s.out_dir} is the default; --out_dir=DIR takes another')
        if checkpoint.checkpoints('out'):
            ranks.say('out itself holds a run, as it was the default once; --out_dir=out resumes that one')


def report(s, run, step, loss, norm, ranks):
    """Print the progress line and log it. loss: mean since the last one, None if all steps were skipped."""
    speed = run.interval.steps_per_second()
    tokens_per_second = run.tokens_per_step * speed
    parts = [f'step {step}/{s.max_iters}', 'loss none' if loss is None else f'loss {loss:.4f}']
    # with a teacher or smoothing the loss is of more than the text
    if not run.teacher and not s.label_smoothing and loss is not None and run.data.bits_per_byte(loss):
        parts.append(f'{run.data.bits_per_byte(loss):.3f} bits/byte')
    lr = None
    if s.optimizer != 'counts':  # counting has no rate
        lr = learning_rate(step - 1, s, getattr(s, s.main_rate))
        parts.append(f'lr {lr:.2e}')
    parts.append(f'{tokens_per_second:,.0f} tokens/s')
    mfu = run.flops_per_step * speed / run.peak_flops / ranks.world if run.peak_flops else None
    if mfu:
        parts.append(f'MFU {mfu:.0%}')
    expert_load = None
    if s.n_expert:  # moe
        from features.moe.balance import shares_of  # moe
        expert_load, shown = shares_of(run.interval.loads)  # moe
        parts.append(shown)  # moe
    if run.interval.steps:  # a step that compiles cannot tell
        left = (s.max_iters - step) / speed
        parts.append(f'{int(left // 60)}m{int(left % 60):02d}s left')
    run.bar.set_postfix_str(parts[1], refresh=False)
    ranks.say(' | '.join(parts))
    run.record(step, tokens=run.tokens(step), flops=run.flops, train_loss=loss, lr=lr,
               tokens_per_second=round(tokens_per_second, 1), grad_norm=norm,
               mfu=round(mfu, 4) if mfu else None, skipped=run.skipped or None, expert_load=expert_load)


# -----------------------------------------------------------------------------
# The process

class StopSignal:
    """
    Remembers a signal that asks to stop, so that the loop ends after its step. A second Ctrl-C ends the
    process at once; so does a SIGTERM five seconds after the first. Until then, signals may arrive several
    times: torchrun forwards those that its processes have received too, a shell and the system send several
    SIGHUPs, and a scheduler that has sent a SIGUSR1 sends a SIGTERM later.
    """
    number = 0
    since = 0.0  # time.monotonic() of the first signal

    def listen(self):
        listen(self.remember)

    def end(self):
        """Stop where there is nothing to save."""
        raise Stopped(self.number or signal.SIGTERM)

    def remember(self, number, frame):
        is_term = number == signal.SIGTERM
        if not self.number or (is_term and self.number not in (signal.SIGTERM, signal.SIGINT)):
            self.number, self.since = number, time.monotonic()
        elif number == signal.SIGINT or (is_term and time.monotonic() - self.since > 5):
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def __bool__(self):
        return self.number > 0


class OneProcess:
    """
    A run in a single process. Ranks in features/scale has the same methods for several processes started by
    torchrun; methods that take a number, a flag or a value combine those of all ranks.
    """
    rank, world = 0, 1
    first = True  # whether this is rank 0
    lockstep = False  # whether all ranks must make the same passes through the network, as sharded ones do

    def __init__(self, device):
        self.device = device

    def say(self, text):
        """Print on rank 0, above the progress bar if there is one."""
        with tqdm.external_write_mode():
            print(text, flush=True)

    def sum(self, *values):
        """The sums of some numbers over all ranks, as a list of floats."""
        return torch.tensor(values, dtype=torch.float64).tolist()

    def any(self, flag):
        """Whether `flag` is true on this rank or, if all ranks run in lockstep, on any rank."""
        return bool(flag)

    def gather(self, value):
        """The values from all ranks, as a list."""
        return [value]

    def from_first(self, compute):
        """The result of compute() on rank 0; its UserError too."""
        return compute()

    def beat(self, doing):
        """Report that this rank is making progress, and with what."""

    def alive(self, doing=None):
        """Report that this rank is still working."""

    def patient(self, is_compiling):
        """Context of a step or an evaluation; while it compiles, the other ranks wait longer."""
        return nullcontext()

    def wrap(self, model):
        """The model for training: wrapped in DDP on several ranks."""
        return model

    def job(self):
        """Names of the torchrun processes that started the ranks."""
        return []

    def end(self):
        """Disconnect from the other ranks."""


def peak_memory(device):
    """The most bytes this process has held: on the GPU, else in RAM."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device)
    peak = read_field('/proc/self/status', 'VmHWM:')
    if peak is not None:  # Linux, where getrusage() would count memory of the process that started this one
        return 1024 * peak
    import resource  # not on Windows
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == 'darwin' else 1024 * peak


def read_field(path, name):
    """The number after `name` at the beginning of a line of a file; None without such a line or file."""
    with suppress(OSError), open(path) as f:
        for line in f:
            if line.startswith(name):
                return int(line.removeprefix(name).split()[0])
    return None
