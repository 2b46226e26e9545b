"""
What a run says and writes down as it goes: lines on the terminal, samples, log.jsonl, and Weights & Biases if asked.
"""
import dataclasses
import json
import logging
import math
import os
import secrets
from contextlib import nullcontext
from itertools import takewhile
from pathlib import Path

import torch

import checkpoint
from batches import remark
from configurator import UserError, typed_text
from device import autocast, process_age, zero
from features.scale import faults
from features.t5.objectives import around
from files import append, replace_text, writing
from optim import learning_rate
from sample import default_prompt, encode_prompt, stream
from tokenizer import load_tokenizer

# -----------------------------------------------------------------------------
# The log

class Log:
    """log.jsonl in out_dir, a JSON object a line, and Weights & Biases if asked. Only rank 0 writes."""
    EARLIER = {}  # path: seconds of the run before this process
    TO_DO = 'make room, then run the same command to resume'

    def __init__(self, s, step, ranks):
        self.on, self.wandb, self.seconds, self.evaluated = ranks.first, None, 0.0, -1  # `evaluated`: step of the last evaluation
        if not self.on:
            return
        self.path = os.path.join(s.out_dir, 'log.jsonl')
        records = [r for r in read_records(self.path) if r['step'] <= step] if step else []  # what came after the checkpoint happens again
        best = checkpoint.best(s.out_dir)[1]
        # so does its evaluation if it was the best one and a full disk, say, kept out_dir/best from saying so
        records = [r for r in records if not (r['step'] == step and r.get('val_loss', math.inf) < (math.inf if best is None else best))]
        with writing(self.path, self.TO_DO):
            replace_text(self.path, ''.join(json.dumps(r) + '\n' for r in records))
        before = records[-1].get('seconds', 0.0) if records else 0.0  # of the processes before this one,
        self.seconds = self.EARLIER.setdefault(self.path, before)  # which this one has seen already if it goes back to a checkpoint
        self.evaluated = max([r['step'] for r in records if 'val_loss' in r], default=-1)
        if s.wandb_log:
            self.wandb = start_wandb(s)

    def write(self, step, **record):
        """Add a record, without what is None or no number: what was not measured is absent."""
        if self.on:
            record = {name: value for name, value in record.items() if value is not None and not (isinstance(value, float) and not math.isfinite(value))}
            record = {'step': step, **record, 'seconds': round(self.seconds + process_age(), 3)}
            with writing(self.path, self.TO_DO):
                faults.at('log', step)
                append(self.path, json.dumps(record) + '\n')
            if self.wandb:
                self.send(record)

    def send(self, record):
        """Send a record to Weights & Biases. If that fails, the run goes on without it."""
        import wandb
        try:
            if record['step'] >= self.wandb.step:  # after a resume, it has the ones from before the end already
                self.wandb.log(record, step=record['step'])
        except (wandb.Error, OSError) as error:
            print(f'wandb_log: {error}: from here on, {self.path} alone', flush=True)
            self.wandb = None


def read_records(path):
    """The records of a log.jsonl, without lines that are cut off or damaged; none where there is no file."""
    records = []
    if os.path.exists(path):
        with open(path, encoding='utf-8', errors='replace', newline='\n') as f:
            for line in f:
                try:
                    record = json.loads(line)
                    records += [record] if isinstance(record, dict) and 'step' in record else []
                except ValueError:
                    pass
    return records


# -----------------------------------------------------------------------------
# Weights & Biases

def log_in():
    """Raise UserError if the login to Weights & Biases fails. Call it before anything is written."""
    if os.environ.get('WANDB_MODE') in ('offline', 'disabled', 'dryrun'):
        return
    import wandb
    try:
        wandb.login(verify=True)
    except wandb.Error as error:
        raise refused(error) from None


def start_wandb(s):
    """The run of Weights & Biases that belongs to out_dir. Its id is kept there, so that a resumed run goes on in it. Raises UserError."""
    import wandb
    logging.raiseExceptions = False  # or wandb's own debug.log prints tracebacks where the disk is full
    path = Path(s.out_dir, 'wandb_id')
    if not path.exists():
        with writing(path, Log.TO_DO):
            replace_text(path, secrets.token_hex(4) + '\n')
    name = s.wandb_run_name or os.path.basename(os.path.normpath(s.out_dir))
    try:
        return wandb.init(project=s.wandb_project, name=name, id=path.read_text().strip(), resume='allow', dir=s.out_dir,
                          config=dataclasses.asdict(s), allow_val_change=True)
    except wandb.Error as error:
        raise refused(error) from None


def refused(error):
    reason = str(error).rstrip('.')
    return UserError(f'wandb_log=True: {reason}: run wandb login, or set WANDB_MODE=offline')


# -----------------------------------------------------------------------------
# On the terminal

def describe(s, run, ranks):
    """What is about to be trained, in a few lines."""
    rows = s.batch_size * s.gradient_accumulation_steps
    encoder = f'{s.n_encoder_layer} encoder layers, ' if s.n_encoder_layer else ''
    network = 'a Markov chain' if s.arch == 'markov' else f'{encoder}{run.model.cfg.n_layer} layers, {s.n_embd} wide, {s.n_head} heads'
    experts = f'{s.n_expert} experts, {run.parameters[1]:,} parameters a token' if s.n_expert else ''
    low_rank = ', '.join(f'{name} {getattr(s, name)}' for name in ('rank_qk', 'rank_vo', 'rank_mlp', 'rank_embed', 'rank_head', 'ranks') if getattr(s, name))
    ranks.say(f'model: {run.parameters[0]:,} parameters ({"; ".join(filter(None, (network, experts, low_rank)))}), '
              f'{s.vocab_size:,} tokens, context {s.block_size}')
    if s.lora_rank:
        ranks.say(memory(run.model, run.parameters[0]))
    epochs = ', '.join(f'{name} {n:.2f}' for name, n in run.data.epochs(rows * s.max_iters).items())
    ranks.say(f'data: {rows} rows = {rows * s.block_size:,} tokens a step, {s.max_iters:,} steps; epochs: {epochs}')
    if ranks.first:
        for source in (*run.data.sources, *run.val):
            cut = source.too_long()
            if cut:
                ranks.say(f'data: {cut}')
    compiled, threads = 'compiled' if s.compile else 'not compiled', torch.get_num_threads()
    if 'dataset' not in s.given and s.dataset == type(s)().dataset:  # else that of a run which is evaluated
        ranks.say(f'data: dataset={s.dataset} is the default; --dataset=NAME takes another')
    for source in run.data.sources:
        if remark(source.name, source.files):
            ranks.say('data: ' + remark(source.name, source.files))
    ranks.say(f'device: {ranks.device}, {s.dtype}, {compiled}; processes: {ranks.world}, threads of each: {threads}')
    for line in short_run(s, run.model.cfg.n_layer, run.step):
        ranks.say(line)
    if run.planned:
        ranks.say('derived: ' + ' '.join(f'--{name}={getattr(s, name)}' for name in run.planned))
    if run.step:
        ranks.say(f'{"going on with " + s.init_from if run.borrowed else "resuming " + s.out_dir} at step {run.step}')


def short_run(s, n_layer, step):
    """[a line for each thing that max_iters is too small for]; n_layer: blocks of the network at `step`."""
    lines, rate = [], getattr(s, s.main_rate)
    if s.warmup > s.max_iters > 0:
        highest = learning_rate(s.max_iters - 1, s, rate)
        lines.append(f'warmup_iters={s.warmup}: is longer than max_iters={s.max_iters}: the rate rises to {highest:.2e} and never reaches '
                     f'{s.main_rate}={rate:g}; --warmup_iters=0 begins there')
    if s.grow_every:
        times = (s.max_iters - 1) // s.grow_every - max(0, step - 1) // s.grow_every  # at a checkpoint it has not grown yet
        reached = min(s.grow_to, n_layer + times * s.grow_by)
        if reached < s.grow_to:
            lines.append(f'max_iters={s.max_iters}: ends before the network has grown to grow_to={s.grow_to}: it ends with {reached} layers')
    return lines


def memory(model, total):
    """What training adapters of a network of `total` parameters takes beside what training all weights would: gradients in float32, two moments of AdamW."""
    held = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    base = total - sum(p.numel() for name, p in model.named_parameters() if '.lora.' in name)

    def three(*sizes):
        return ', '.join(f'{size / 1e6:,.1f} MB of {what}' for size, what in zip(sizes, ('weights', 'gradients', 'moments')))
    return (f'lora: {trained:,} of {total:,} parameters are trained ({trained / total:.4%}): {three(held, 4 * trained, 8 * trained)}; '
            f'all weights would be {three(4 * base, 4 * base, 8 * base)}')


def show_losses(step, result, ranks):
    ranks.say(f'step {step}: ' + ', '.join(f'{name} {value:.4f}' for name, value in result.items()))


def show_samples(model, s, data, ranks, stop=False):
    """Print one continuation of s.sample_prompt. It has a random stream of its own, so training does not notice. stop: true as soon as it is to be left."""
    if not (s.sample_tokens and (ranks.first or ranks.lockstep)):
        return
    files = data.sources[0].files
    if files.meta['tokenizer']['kind'] == 'unknown':  # describe() said it
        return
    model.eval()
    try:
        tokenizer = load_tokenizer(files.meta['tokenizer'], files.folder)
        tokenizer.around, tokenizer.begin = around(s.objective, s.denoisers, files.meta), data.begin
        text = typed_text(s.sample_prompt, 'sample_prompt')
        if 'sample_prompt' not in getattr(s, 'given', ()):
            text = default_prompt(text, tokenizer)
        prompt, source = encode_prompt(text, tokenizer, model.cfg)
        with autocast(ranks.device, s.dtype), without_compiling(s.compile and ranks.lockstep):
            pieces = stream(model, tokenizer, [prompt], max_new_tokens=s.sample_tokens, temperature=0.8, top_k=200,
                            generator=torch.Generator().manual_seed(s.seed), sources=[source] if source else None)
            written = ''.join(piece for _, piece in takewhile(lambda _: not ranks.any(stop), pieces))
        arrow = '' if s.objective == 'causal' else ' → '
        shown = text.removeprefix(tokenizer.eot_text)
        ranks.say('    | ' + (shown + arrow + written).strip().replace('\n', '\n    | '))
    except UserError as error:
        ranks.say(f'no sample: {error}')
    model.train()


def without_compiling(needed):
    """Or blocks that are compiled one by one would be so for every length of a sample, up to the limit from which on nothing is compiled any more."""
    return torch.compiler.set_stance('force_eager') if needed else nullcontext()


class Interval:
    """
    Sums over the steps since the last progress line. Checkpoints keep them, so that the line after a resume is about all of its
    steps. Time is that of this process, without the steps that are slow, as the first one and those that compile: they would
    tell a wrong speed.
    """

    def __init__(self, device, stored=None, ranks=None):
        self.device, self.is_timed = device, False  # is_timed: whether this process has made a step already
        self.reset()
        if stored:  # per rank; of another number of ranks, the first one takes all
            nats = stored['nats']
            if len(nats) != ranks.world:
                nats = [sum(nats)] + [0.0] * (ranks.world - 1)
            self.nats = self.nats + nats[ranks.rank]
            self.targets = stored['targets']
            if stored['loads']:
                self.loads = torch.tensor(stored['loads'], device=device)

    def reset(self):
        self.nats = zero(self.device)  # of this rank
        self.targets, self.loads = 0.0, 0  # of all ranks
        self.steps, self.seconds, self.slow = 0, 0.0, 0.0

    def time(self, seconds, is_slow):
        """Count the time of a step."""
        if is_slow or not self.is_timed:
            self.slow = seconds
        else:
            self.steps, self.seconds = self.steps + 1, self.seconds + seconds
        self.is_timed = True

    def steps_per_second(self):
        return self.steps / self.seconds if self.steps else 1 / self.slow

    def stored(self, ranks):
        """The sums as json can write them: a step for all ranks to take together."""
        loads = self.loads.tolist() if torch.is_tensor(self.loads) else None
        return {'nats': ranks.gather(self.nats.item()), 'targets': self.targets, 'loads': loads}


def report(s, run, step, loss, norm, loads, peak, log, ranks):
    """The progress line and its record in the log; loss: None if all steps were skipped; loads (layers, E): tokens of each expert, None if there are none."""
    lr = None if s.optimizer == 'counts' else learning_rate(step - 1, s, getattr(s, s.main_rate))
    shown = '' if lr is None else f'lr {lr:.2e} | '
    steps_per_second = run.interval.steps_per_second()
    rate, left = run.tokens_per_step * steps_per_second, (s.max_iters - step) / steps_per_second
    left = f' | {int(left // 60)}m{int(left % 60):02d}s left' if run.interval.steps else ''  # a step that compiles cannot tell
    mfu = run.flops_per_step * steps_per_second / peak / ranks.world if peak else None
    bpb = None if run.teacher or s.label_smoothing or loss is None else run.data.bits_per_byte(loss)  # with these the loss is of more than the text
    bits = f'{bpb:.3f} bits/byte | ' if bpb else ''
    shares = None if loads is None else loads / loads.sum(1, keepdim=True).clamp(min=1)  # of a layer's tokens
    ranks.say(f'step {step}/{s.max_iters} | loss {"none" if loss is None else f"{loss:.4f}"} | {bits}{shown}{rate:,.0f} tokens/s'
              + (f' | MFU {mfu:.0%}' if mfu else '') + ('' if loads is None else f' | experts {shares.min():.0%} to {shares.max():.0%}')
              + left)
    log.write(step, tokens=run.tokens(step), flops=run.flops, train_loss=loss, lr=lr, tokens_per_second=round(rate, 1), grad_norm=norm,
              mfu=round(mfu, 4) if mfu else None, skipped=run.skipped or None,
              expert_load=None if loads is None else [[round(share, 4) for share in layer] for layer in shares.tolist()])
