"""
A training run: what it works with, how it is set up and saved, and how its network changes on the way. train.py makes the steps.

`s` is train.py's Settings, `ranks` the Ranks.
"""
import dataclasses
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch.nn.parallel import DistributedDataParallel

import checkpoint
from batches import Mixture, Source, find_folder
from configurator import UserError
from device import free_memory, pick_compile, pick_dtype
from features.growth.networks import grow, refuse_unknown
from features.lora import adapters
from features.lora import layers as lora
from features.lora.packed import pack_frozen
from features.plan.dial import Pace, plan
from features.scale.guard import FirstSteps, Losses, check_same_start
from features.scale.shard import gather, give_numbers, give_out, group_size, shard_model
from features.t5.objectives import make_objective, stored_begin
from model import Block, make_model
from optim import make_optimizer, optimizer_flops
from origin import build_model, check_tokenizer, find_origin, find_reference, find_teacher
from runlog import Interval

# -----------------------------------------------------------------------------
# The data of a step

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


# -----------------------------------------------------------------------------
# What a run works with

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
    left_out: set  # steps without data
    losses: Losses  # of the last steps
    writer: checkpoint.Writer
    job: list  # the torchrun processes that started it
    pace: Pace
    interval: Interval
    first_steps: FirstSteps = field(default_factory=FirstSteps)  # of this process
    fits: list = field(default_factory=list)  # with minutes: [step, the max_iters set there]
    to_compile: set = field(default_factory=set)  # of 'step' and 'evaluation': what is compiled when it first runs
    skipped: int = 0  # steps whose loss or gradient was not finite
    in_a_row: int = 0  # of these, up to now
    saved: int | None = None  # the newest checkpoint
    best_loss: float | None = None  # of all evaluations
    undivided: list = ()  # of a sharded network: the parameters that every rank holds

    def tokens(self, step):
        """How many tokens have led to the weights after `step` steps: those of all steps but the ones that were left out."""
        return (step - sum(n < step for n in self.left_out)) * self.tokens_per_step


def check_dataset(s):
    """
    Settle the data of a run for which nobody names them. A config file of a whole run was not written for our default:
    nanoGPT's for GPT-2 mean its own, openwebtext, which is taken where it is there. Raises UserError where it is not,
    and where the default is not there.
    """
    if 'dataset' in s.given:
        return
    file = s.from_files.get('batch_size') or s.from_files.get('init_from')
    if file and os.path.isdir('data/openwebtext'):
        s.dataset = 'openwebtext'
        return
    if checkpoint.checkpoints(s.out_dir):
        return
    if file:
        raise UserError(f'dataset: {file} names none: give --dataset=NAME ({s.dataset} is the default here, '
                        'openwebtext in nanoGPT)')
    try:
        find_folder(s.dataset)
    except UserError as error:
        raise UserError(f'{error} ({s.dataset} is the default: --dataset=NAME takes another)') from None


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


def open_data(s, origin, ranks):
    """
    (the Mixture to train on, [the Source to validate on, for each of its sources]). Raises UserError where the data of
    another rank differ, or the tokenizer is not that of the network in `origin`, as find_origin() has it.
    """
    state, objective = origin.get('state'), partial(make_objective, s)
    begin = stored_begin(state) if state and s.eval_only else None  # judged on rows as it knows them
    data = Mixture(s.dataset, 'train', s.block_size, s.seed, s.packing, s.mix_by, s.verify_data, objective,
                   begin)
    check_same_start(ranks, dataclasses.asdict(s), data.fingerprint())
    val = []
    for source in data.sources:
        val.append(Source(source.name, 'val', s.block_size, s.packing, s.verify_data, objective, begin))
    if 'tokenizer' in origin:
        setting, files = f'init_from={s.init_from}', data.sources[0].files
        ranks.from_first(partial(check_tokenizer, setting, s.init_from, origin['tokenizer'], files))
    elif state and s.eval_only:  # other data than its own, perhaps
        setting, files = f'dataset={data.sources[0].name}', data.sources[0].files
        ranks.from_first(partial(check_tokenizer, setting, s.out_dir, origin['folder'], files))
    return data, val


def check_growth(s, cfg):
    """Raise UserError where the network of this ModelConfig cannot grow as the settings ask: now, not in the middle of the run."""
    if not s.grow_every:
        return
    refuse_unknown(cfg, 'grown')
    if s.grow_to <= s.n_layer:
        raise UserError(f'grow_to={s.grow_to}: the network begins with {s.n_layer} layers: give more')
    if s.grow_every > s.max_iters and not s.minutes:
        raise UserError(f'grow_every={s.grow_every}: is more than max_iters={s.max_iters}: the network would never grow: lower it')


def set_up(s, device, ranks, left_out):
    """The Run that the settings describe, as it stands; left_out: steps whose data are left out, beside those of the settings."""
    origin = find_origin(s, ranks)
    state = origin.get('state')
    s.dtype = state['settings']['dtype'] if state and s.dtype == 'auto' else ranks.from_first(lambda: pick_dtype(s.dtype, device))
    planned = derive(s, state, device, ranks) if s.is_planned else {}
    if ranks.world > 1 and device.type == 'cuda' and s.optimizer == 'counts':
        raise UserError('optimizer=counts: NCCL cannot add up the sparse counts of a full table: use one process, '
                        'or --device=cpu')
    rows = s.batch_size * s.gradient_accumulation_steps
    if rows % ranks.world:
        raise UserError(f'batch_size * gradient_accumulation_steps = {rows} rows cannot be shared by {ranks.world} processes: '
                        f'make it a multiple of {ranks.world}')
    data, val = open_data(s, origin, ranks)
    if s.arch == 'markov' and not s.rank_embed and s.optimizer != 'counts' and not s.eval_only:
        check_table_fits(s.vocab_size or data.vocab_size, s.optimizer, ranks)
    model = build(s, data, origin, ranks)
    if state and not s.eval_only:  # in the log, its sources keep the names that they had when the run began, wherever they are now
        names = list(state['data'])
        for source, name in zip([*data.sources, *val], names + names):
            source.name = name
    check_growth(s, model.cfg)
    model.recompute = s.recompute
    optimizer = make_optimizer(model, lora.faster(s), torch.bfloat16 if s.dtype == 'bfloat16' else torch.float32)
    scaler = torch.amp.GradScaler(device.type, enabled=s.dtype == 'float16')
    if state and not s.eval_only:
        load = partial(checkpoint.load_optimizer, origin['folder'], optimizer)
        _ = ranks.from_first(load) if s.shard else load()
        if scaler.is_enabled() and state['scaler']:
            scaler.load_state_dict(state['scaler'])
    elif 'moments' in origin:
        count = 0 if s.shard and not ranks.first else checkpoint.give_moments(optimizer, checkpoint.read_moments(origin['moments']))
        ranks.say(f'{count} of {len(list(model.parameters()))} tensors go on with the moments of {s.init_from}')
    tokens_per_step = s.batch_size * s.gradient_accumulation_steps * s.block_size
    teacher = find_teacher(s, data, ranks).to(device) if s.teacher else None
    flops_per_step, parameters = step_flops(model, optimizer, teacher, tokens_per_step), (model.num_params(), model.num_params(active=True))
    if s.lora_rank and lora.how_stored(s) != 'float32' and not s.shard:
        pack_frozen(model, lora.how_stored(s))
    s.compile = pick_compile(s.compile, device, flops_per_step * s.max_iters / ranks.world)
    undivided = []
    if s.shard:
        model, optimizer, undivided = divide(model, optimizer, s, data, origin, ranks)
    if s.compile:
        compile_all(model.blocks if s.shard else [model])
    begun = state or origin
    step = begun.get('step', 0)
    run = Run(
        model=model,
        runner=model if s.shard else wrap(model, ranks),
        optimizer=optimizer,
        scaler=scaler,
        data=data,
        val=val,
        batches=Batches(data, s, ranks),
        step=step,
        planned=planned,
        tokens_per_step=tokens_per_step,
        flops_per_step=flops_per_step,
        flops=begun.get('flops', step * flops_per_step),
        borrowed='weights' in origin and not state,
        parameters=parameters,
        teacher=teacher,
        reference=find_reference(s, model.cfg) if s.grow_from else None,
        base=origin.get('base'),
        left_out=steps_without_data(step, begun.get('left_out', ()), {*left_out, *s.skip_steps}),
        losses=Losses(s.rewind_spikes, begun.get('losses', ())),
        writer=checkpoint.Writer(s.async_save),
        job=ranks.job(),
        pace=Pace(s),
        interval=Interval(device, begun.get('interval'), ranks),
        fits=begun.get('fits', []),
        skipped=begun.get('skipped', 0),
        undivided=undivided)
    if s.compile:
        run.to_compile = {'step', 'evaluation'}
    return run


def steps_without_data(step, stored, asked):
    """
    The steps whose data are left out of a run that goes on at `step`: those that its checkpoint has stored, and of the ones `asked` for now those
    to come. Earlier ones were trained, and are in the weights: a spike's steps may begin before the checkpoint that the run goes back to.
    """
    return {*stored, *(n for n in asked if n >= step)}


def check_table_fits(vocab_size, optimizer, ranks):
    """Say how much memory a full Markov table takes with dense gradients. Raises UserError if that is not free."""
    table = 4 * vocab_size ** 2  # bytes
    copies = 4 + (ranks.world > 1)  # weights, gradient, two moments; DDP adds gradients up in another one
    is_shared = ranks.device.type != 'cuda'  # the processes of a machine share its RAM
    needed = table * copies * (int(os.environ.get('LOCAL_WORLD_SIZE', 1)) if is_shared else 1)
    ranks.say(f'optimizer={optimizer}: the table of {vocab_size:,} x {vocab_size:,} takes {needed / 1e9:,.1f} GB with '
              f'its gradient and two moments; optimizer=counts takes {table / 1e9:,.1f} GB a process')
    free = free_memory(ranks.device)
    if free is not None and needed > free:
        raise UserError(f'optimizer={optimizer}: a full Markov table of {vocab_size:,} tokens takes '
                        f'{needed / 1e9:,.1f} GB, and {free / 1e9:,.1f} are free: set --optimizer=counts, or '
                        '--rank_embed for a low-rank chain')


def compile_all(modules):
    """
    Let these modules of one network be compiled when they are first called, and forget what was compiled before, which
    belongs to a network that has changed or gone: torch counts the variants of every function, and past its limit a
    function runs uncompiled. Blocks share their code, each with constants of its own.
    """
    torch._dynamo.reset()
    blocks = sum(isinstance(part, Block) for module in modules for part in module.modules())
    torch._dynamo.config.recompile_limit = 8 * max(1, blocks)
    for module in modules:
        module.compile(dynamic=False)


def compile_again(run):
    """compile_all() for a run whose network has changed."""
    compile_all([run.model])
    run.to_compile = {'step', 'evaluation'}


@contextmanager
def compiling(run, what, ranks):
    """Around a 'step' or an 'evaluation': the first one takes as long as compiling does, for which all ranks wait."""
    with ranks.patient(what in run.to_compile):
        yield
    run.to_compile.discard(what)


def build(s, data, origin, ranks):
    """The network; of a sharded run it is on rank 0's CPU, and the others have its shapes alone."""
    if not s.shard:
        return build_model(s, data, origin).to(ranks.device)
    built = []
    ranks.from_first(lambda: built.append(build_model(s, data, origin)))
    return built[0] if ranks.first else build_model(s, data, origin, is_blank=True)


def divide(model, optimizer, s, data, origin, ranks):
    """What rank 0 has built, divided among all (shard.py): network, optimizer, and the parameters that every rank holds whole."""
    tensors, moments = dict([*model.named_parameters(), *model.named_buffers()]), checkpoint.moments_of(optimizer)
    blank = build_model(s, data, origin, is_blank=True) if ranks.first else model
    blank.recompute = s.recompute
    shapes = ranks.from_first(lambda: {name: {what: torch.empty_like(t, device='meta') for what, t in own.items()} for name, own in moments.items()})
    undivided = shard_model(blank, group_size(s.shard, ranks.world), s.dtype, ranks)
    give_numbers(blank, tensors, ranks)
    optimizer = make_optimizer(blank, lora.faster(s), optimizer.dtype)
    checkpoint.give_moments(optimizer, moments if ranks.first else shapes, partial(give_out, ranks=ranks))
    return blank, optimizer, undivided


def save(s, step, run, ranks):
    """Rank 0 writes a checkpoint, or has it written; the others wait for that."""
    tensors = adapters.state(run.model) if s.lora_rank else run.model.state_dict(), run.optimizer.state_dict()
    tensors = gather(tensors, ranks) if s.shard else tensors
    interval = run.interval.stored(ranks)

    def write():
        source = run.data.sources[0].files
        state = {'step': step, 'flops': run.flops, 'model': dataclasses.asdict(run.model.cfg), 'settings': dataclasses.asdict(s),
                 'tokenizer': source.meta['tokenizer'], 'begin': list(run.data.begin),
                 'data': run.data.fingerprint(), 'scaler': run.scaler.state_dict(), 'torch': torch.__version__}
        if s.lora_rank:
            state |= {'base': run.base, 'lora': run.model.lora.known['default'].description()}
        if s.minutes:
            state['fits'] = list(run.fits)
        if s.rewind_spikes or run.left_out:
            state |= {'left_out': sorted(run.left_out), 'losses': run.losses.recent}
        state |= {'interval': interval, 'skipped': run.skipped, 'job': run.job}
        tokenizer_files = [os.path.join(source.folder, name) for name in source.meta['tokenizer'].get('files', ())]
        run.writer.wait()  # one at a time; what went wrong with the last one is said now
        run.writer(checkpoint.save, s.out_dir, step, *(checkpoint.snapshot(tensors) if s.async_save else tensors), state, tokenizer_files, s.keep_checkpoints)
    ranks.from_first(write)


# -----------------------------------------------------------------------------
# What changes on the way

def expert_loads(run, ranks):
    """How many tokens of all ranks every expert was given in the last step, (layers, E) int64; with expert_bias they are drawn towards equal loads."""
    loads = ranks.add_up(run.model.take_loads())
    if run.base is None and not run.in_a_row:  # beside adapters the rest stays as it is, and so does all in a step that is skipped
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
        compile_again(run)
    run.runner = wrap(run.model, ranks)
    run.flops_per_step = step_flops(run.model, run.optimizer, run.teacher, run.tokens_per_step)
    run.losses.recent.clear()  # what follows is not to be compared with what was
    ranks.say(f'grown to {n_layer} layers, {run.model.num_params():,} parameters')


def end_guides(run, s, ranks):
    """Their share has fallen to nothing: low-rank layers go on alone."""
    run.model.drop_guides()
    if s.compile:
        compile_again(run)
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
    if ranks.world == 1:
        return model
    with warnings.catch_warnings():  # torch 2.13 calls it forward_sync_buffers, which 2.11 does not know
        warnings.simplefilter('ignore', FutureWarning)
        return DistributedDataParallel(model, broadcast_buffers=False)
