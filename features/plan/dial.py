"""
One dial. Of the depth, the parameters, the tokens or the minutes wanted, train.py derives everything else: the network, the batch,
the rates and the steps, with the recipe of config/fast.py. It prints what it derived; what is given stays as it is given, but for the
steps of a config file where tokens or minutes are asked for.

    python train.py --minutes=5            # the best model that this machine can train in five minutes
    python train.py --depth=6              # 20 tokens a parameter
    python train.py --params=10e6 --tokens=50e6 --n_kv_head=2
    python train.py --plan --hours=3       # what the published laws would choose (chinchilla.py), and that network; nothing is trained
    python train.py config/gpt2.py --plan  # parameters, FLOPs and memory of a network; no data are needed
"""
import math
import os
from dataclasses import dataclass, replace

import torch

from batches import GPT2_TOKENS, find_folder, read_meta
from configurator import ROOT, UserError, check, part_of, read_config
from device import peak_flops, process_age
from features.lora import layers as lora
from features.plan.chinchilla import optima, table
from loss import EVAL_ROWS
from model import ModelConfig, make_model

TOKENS_PER_PARAM = 20  # Chinchilla (Hoffmann et al. 2022, arXiv 2203.15556); embeddings and head not counted, they are most of a small network
EPOCHS = 4  # more are worth little (Muennighoff et al. 2023, arXiv 2305.16264): from there on a larger network is
REACHED = 0.5  # share of the ceiling of matmuls that training reaches, to choose a size by; the steps are timed
DEEPEST = 48


@dataclass
class PlanConfig:
    depth: int = 0  # layers; one of these four settings, or several, and the rest is derived and printed. 0 = not set, here and below
    params: float = 0.0  # about so many parameters
    tokens: float = 0.0  # about so many tokens to train on, by default 20 a parameter
    minutes: float = 0.0  # of the whole run, from the start of the process: the steps are timed before the first one counts,
    # and max_iters is fitted again at every evaluation

    plan: bool = False  # print parameters, FLOPs and memory of the network, then stop; with tokens, flops or
    # hours: the networks that several laws want for them, and the settings of the one with 20 tokens a parameter
    flops: float = 0.0  # with plan: of the whole run
    hours: float = 0.0  # with plan: of this machine

    def check(self):
        """Raise ValueError for values that cannot work."""
        if self.plan and [self.tokens > 0, self.flops > 0, self.hours > 0].count(True) > 1:
            raise ValueError(f'tokens={self.tokens:g}, flops={self.flops:g}, hours={self.hours:g}: plan takes one of them')
        if self.plan and (self.depth or self.params or self.minutes):
            raise ValueError(f'depth={self.depth}, params={self.params:g}, minutes={self.minutes:g}: plan takes '
                             'tokens, flops or hours in their place, or the sizes of a network: leave them out')
        if (self.flops or self.hours) and not self.plan:
            raise ValueError(f'flops={self.flops:g}, hours={self.hours:g}: belong to --plan; to train for a time, give minutes')
        if self.flops > 1e30 or self.hours > 1e7:
            raise ValueError(f'flops={self.flops:g}, hours={self.hours:g}: takes at most 1e30, 1e7')
        for name in ('depth', 'params', 'tokens', 'minutes', 'flops', 'hours'):
            if getattr(self, name) < 0:
                raise ValueError(f'{name}={getattr(self, name)}: must not be negative')
        if self.depth and self.params:
            raise ValueError(f'depth={self.depth}, params={self.params:g}: give one of them, the other follows')
        if self.tokens and self.minutes:
            raise ValueError(f'tokens={self.tokens:g}, minutes={self.minutes:g}: give one of them, the other follows')
        if self.depth > DEEPEST:
            raise ValueError(f'depth={self.depth}: takes at most {DEEPEST}')
        if self.tokens > 1e15:
            raise ValueError(f'tokens={self.tokens:g}: takes at most 1e15')

    @property
    def is_planned(self):
        return bool(self.depth or self.params or self.tokens or self.minutes)


# -----------------------------------------------------------------------------
# What follows from what

def shape(depth, device):
    """The network of a depth: 64 wide for each layer, as nanochat has it, and heads of 64 where there are four of them."""
    width = max(128, 64 * depth)
    return {'n_layer': depth, 'n_embd': width, 'n_head': max(4, width // 64), 'block_size': 1024 if device.type == 'cuda' else 256}


def batch_tokens(tokens):
    """
    Tokens a step for a run of so many, a power of two. Few tokens want small batches: 768 were best for 200 thousand (RESULTS.md), about
    2^18 are for 1.5 billion (modded-nanogpt, track 1); a power law between the two.
    """
    return 2 ** round(math.log2(768 * (tokens / 2e5) ** 0.65))


def rates(width):
    """AdamW's rates for a width: the head's falls with its root (nanochat). Muon's and the embedding's hold for all."""
    return {'head_lr': 0.004 * (768 / width) ** 0.5}


def size(s, vocab_size):
    """(parameters, those of the blocks, floating-point operations a token) of the network that `s` describes, without making it."""
    cfg = replace(part_of(s, ModelConfig), vocab_size=s.vocab_size or vocab_size, rank_guide=0)
    with torch.device('meta'):
        model = make_model(cfg, init=False)
    return model.num_params(), sum(p.numel() for p in model.blocks.parameters()), model.flops_per_token()


# -----------------------------------------------------------------------------
# The plan

def plan(s, vocab_size, data_tokens, device, world):
    """
    Derive what the dial of `s` (train.py's Settings) leaves open, in place, for data of so many tokens. Returns {setting: value} of what
    was derived. For minutes, max_iters is a guess until fit_minutes() knows the time of a step.
    """
    if s.init_from not in ('auto', 'scratch', 'resume'):
        raise UserError(f'init_from={s.init_from}: has a network already: leave depth, params, tokens and minutes out, and set max_iters')
    if s.arch == 'markov':
        raise UserError('arch=markov: has no depth to derive: leave depth, params, tokens and minutes out, and set max_iters')
    if 'n_layer' in s.given and (s.depth or s.params):
        raise UserError(f'n_layer={s.n_layer}: depth and params choose it: leave one of them out')
    derived, kept = {}, s.given - ({'max_iters'} if s.tokens else {'max_iters', 'eval_interval', 'eval_iters'} if s.minutes else set())

    def derive(settings):
        for name, value in settings.items():
            if name not in kept:
                setattr(s, name, value)
                derived[name] = value

    derive(read_config(type(s), os.path.join(ROOT, 'config', 'fast.py')))
    budget = s.minutes * 60 * REACHED * world * (peak_flops(device, s.dtype) or 1e14)  # FLOPs
    sizes, problem = {}, None
    for depth in [s.depth] if s.depth else range(1, DEEPEST + 1):
        derive(shape(depth, device))
        try:
            check(s)
            sizes[depth] = size(s, vocab_size)
        except UserError as error:  # what is given does not go with this depth
            problem = error
    if not sizes:
        raise problem
    if s.params:
        depth = min(sizes, key=lambda d: abs(math.log(sizes[d][0] / s.params)))
    elif s.depth:
        depth = s.depth
    else:  # the deepest network that gets its tokens, or whose minutes bring it through the data often enough
        most = math.inf if s.tokens else EPOCHS * data_tokens
        depth = max([d for d, (_, blocks, flops) in sizes.items() if (s.tokens or budget / flops) >= min(TOKENS_PER_PARAM * blocks, most)], default=min(sizes))
    derive(shape(depth, device))
    _, blocks, flops = sizes[depth]
    tokens = s.tokens or budget / flops or TOKENS_PER_PARAM * blocks
    rows = max(1, batch_tokens(tokens) // s.block_size // world)  # of each process
    limit = max(1, (2 ** 22 if device.type == 'cpu' else 2 ** 26) // (s.block_size * s.n_embd))  # rows whose activations fit into memory
    micro = s.batch_size if 'batch_size' in kept else max(n for n in range(1, min(rows, limit) + 1) if rows % n == 0)
    derive({'batch_size': micro, 'gradient_accumulation_steps': max(1, round(rows / micro)) * world})
    derive(rates(s.n_embd) | {'max_iters': max(1, round(tokens / (s.batch_size * s.gradient_accumulation_steps * s.block_size)))})
    derive(intervals(s.max_iters, s.batch_size))
    check(s)
    return derived


def find_vocabulary(s):
    """
    The size of the vocabulary by the settings, or by the data set where there is one; otherwise that of GPT-2
    is assumed, and a line says so.
    """
    if s.vocab_size:
        return s.vocab_size
    name = s.dataset if isinstance(s.dataset, str) else next(iter(s.dataset), '')
    try:
        folder = find_folder(name)
    except UserError:
        print(f'vocab_size: dataset={name} is not there: GPT-2\'s {GPT2_TOKENS:,} tokens are assumed; '
              '--vocab_size=N changes that')
        return GPT2_TOKENS
    return read_meta(folder)['vocab_size']


def show_network(s, vocab_size):
    """Print the parameters, FLOPs and memory of the network of train.py's Settings, without making it."""
    s.vocab_size = vocab_size
    check(s)
    cfg = part_of(s, ModelConfig)
    with torch.device('meta'):
        model = make_model(cfg, init=False)
        total, active, flops = model.num_params(), model.num_params(active=True), model.flops_per_token()
        blocks = sum(p.numel() for name, p in model.named_parameters() if 'blocks.' in name)
        trained = total
        if s.lora_rank:
            lora.begin(model, s, is_new=False)
            trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
            flops = model.flops_per_token()
    print(f'parameters   {total:,}, {blocks:,} of them in the blocks')
    if s.n_expert:
        print(f'             {active:,} for each token, {s.n_expert} experts')
    if s.lora_rank:
        print(f'trained      {trained:,}, those of low-rank adapters')
    if s.arch == 'markov':
        print(f'network      a Markov chain of {vocab_size:,} tokens')
        print(f'memory       {4 * total / 1e6:,.1f} MB of weights')
        return
    encoder = f'{s.n_encoder_layer} encoder layers, ' * bool(s.n_encoder_layer)
    print(f'network      {encoder}{s.n_layer} layers of {s.n_embd}, {s.n_head} heads, '
          f'context {s.block_size}, {vocab_size:,} tokens')
    step = s.batch_size * s.gradient_accumulation_steps * s.block_size
    print(f'FLOPs        {flops:.3e} a token, {flops * step:.3e} a step of {step:,} tokens, '
          f'{flops * step * s.max_iters:.3e} in {s.max_iters:,} steps')
    print(f'memory       {4 * total / 1e6:,.1f} MB of weights, {4 * trained / 1e6:,.1f} MB of gradients, '
          f'up to {8 * trained / 1e6:,.1f} MB of moments, in float32; activations come on top')


def show_plan(s, vocab_size, device):
    """
    Print the network of the settings; or, given s.tokens, s.flops or s.hours, what the laws of chinchilla.py
    want for these, and the network that plan() makes of the last law.
    """
    if not (s.tokens or s.flops or s.hours):
        return show_network(s, vocab_size)
    peak = peak_flops(device, s.dtype)
    if s.hours and not peak:
        raise UserError(f'hours={s.hours:g}: the ceiling of this device is not known: give flops')
    flops = s.flops or s.hours * 3600 * REACHED * (peak or 0)
    if s.hours:
        print(f'{s.hours:g} hours at {REACHED:.0%} of {peak / 1e12:.2f} TFLOP/s are {flops:.3e} FLOPs')
    found = optima(s.tokens, flops)
    print(table(found))
    (s.params, s.tokens, _), s.flops, s.hours, s.plan = found['20 tokens a parameter'], 0.0, 0.0, False
    given = s.params
    derived = plan(s, vocab_size, s.tokens, device, 1)
    params, _, per_token = size(s, vocab_size)
    stacks = ''
    if s.n_encoder_layer:  # t5
        stacks = f', an encoder of {s.n_encoder_layer}, {s.source_context} tokens read for {s.block_size} written'  # t5
    print(f'\nthe nearest to {given / 1e6:,.1f}M: {params:,} parameters, {s.n_layer} layers of {s.n_embd}{stacks}\n'
          f'{per_token:.3e} FLOPs a token as it is multiplied; 6 N would be {6 * params:.3e}\n'
          + ' '.join(f'--{name}={value}' for name, value in derived.items()))


def intervals(count, batch_size):
    """How often a run of `count` steps evaluates, on about 20 micro-batches of rows, and reports."""
    return {'eval_interval': -(-count // 5), 'eval_iters': -(-20 * batch_size // EVAL_ROWS), 'log_interval': max(1, count // 50)}


# -----------------------------------------------------------------------------
# The minutes

def evaluation_steps(s):
    """The work of an evaluation, in steps of training: a row is a third of the work of a training row."""
    return EVAL_ROWS * s.eval_iters / (s.batch_size * s.gradient_accumulation_steps) / 3


def fit_minutes(s, derived, seconds_per_step, elapsed):
    """Set max_iters so that the run ends s.minutes after the start of the process, `elapsed` seconds ago, and the intervals that follow."""
    evaluations = 6 * evaluation_steps(s)
    count = (60 * s.minutes - elapsed) / seconds_per_step - evaluations
    if count < 10:
        raise UserError(f'minutes={s.minutes:g}: a step takes {seconds_per_step:.1f} s, and {elapsed:.0f} s went by already: '
                        'give more minutes, or a smaller --depth')
    for name, value in ({'max_iters': round(count)} | intervals(round(count), s.batch_size)).items():
        if name in derived:
            setattr(s, name, value)


class Pace:
    """
    How fast a run of s.minutes goes, and how many steps are left: the machine may slow down or be free again after the
    first fit. clock() returns the seconds since this process began, `earlier` are those of the run's processes before it.
    """
    SMALL = 0.02  # a change of max_iters by less is not worth a bend in the schedule

    def __init__(self, s, clock=None):
        self.s, self.clock, self.earlier = s, clock or process_age, 0.0
        self.ends = []  # when the last evaluation ended, and every step since then
        self.evaluation = None  # seconds that the last one took, with checkpoint and samples

    def elapsed(self):
        """Seconds of the run."""
        return self.earlier + self.clock()

    def end_step(self):
        self.ends.append(self.elapsed())

    def end_evaluation(self, began, compiled):
        """began: elapsed() then; compiled: whether it had to be compiled first."""
        if not compiled:
            self.evaluation = self.elapsed() - began
        self.ends = [self.elapsed()]

    def fit(self, step):
        """The max_iters with which the run ends after s.minutes, as seen from an evaluation at `step` that is to come."""
        steps = len(self.ends) - 1
        if steps < 1:  # the run has gone on from a checkpoint of this step, whose fit it keeps
            return self.s.max_iters
        recent = max(min(5, steps), steps // 4)
        per_step = (self.ends[-1] - self.ends[-1 - recent]) / recent
        evaluation = self.evaluation
        if evaluation is None:
            evaluation = evaluation_steps(self.s) * per_step
        left = max(0.0, 60 * self.s.minutes - self.elapsed() - evaluation)
        intervals, rest = divmod(left, self.s.eval_interval * per_step + evaluation)
        more = intervals * self.s.eval_interval + max(0.0, (rest - evaluation) / per_step)  # the end is an evaluation too
        count = max(step + round(more), self.s.rank_guide)
        return self.s.max_iters if abs(count - self.s.max_iters) < self.SMALL * self.s.max_iters else count
