"""
What a run says and writes down as it goes: lines on the terminal, samples, log.jsonl, and Weights & Biases if asked.
"""
import dataclasses
import json
import math
import os
from contextlib import nullcontext
from itertools import takewhile

import torch

import checkpoint
import faults
from configurator import UserError
from data import remark
from device import autocast, process_age
from files import append, replace_text, writing
from objectives import around
from optim import learning_rate
from sample import encode_prompt, stream
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
            import wandb
            name = s.wandb_run_name or os.path.basename(s.out_dir)
            try:
                self.wandb = wandb.init(project=s.wandb_project, name=name, config=dataclasses.asdict(s), dir=s.out_dir)
            except wandb.Error as error:
                raise UserError(f'wandb_log=True: {error}: run wandb login, or set WANDB_MODE=offline') from None

    def write(self, step, **record):
        """Add a record, without what is None or no number: what was not measured is absent."""
        if self.on:
            record = {name: value for name, value in record.items() if value is not None and not (isinstance(value, float) and not math.isfinite(value))}
            record = {'step': step, **record, 'seconds': round(self.seconds + process_age(), 3)}
            with writing(self.path, self.TO_DO):
                faults.at('log', step)
                append(self.path, json.dumps(record) + '\n')
            if self.wandb:
                self.wandb.log(record, step=step)


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
    compiled, threads = 'compiled' if s.compile else 'not compiled', torch.get_num_threads()
    if 'dataset' not in s.given:
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
    """A line for everything that a run is too short for; n_layer: how many blocks the network has at `step`."""
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
        tokenizer.around = around(s.objective, s.denoisers, files.meta)
        prompt, source = encode_prompt(s.sample_prompt, tokenizer, model.cfg)
        with autocast(ranks.device, s.dtype), without_compiling(s.compile and ranks.lockstep):
            pieces = stream(model, tokenizer, [prompt], max_new_tokens=s.sample_tokens, temperature=0.8, top_k=200,
                            generator=torch.Generator().manual_seed(s.seed), sources=[source] if source else None)
            text = ''.join(piece for _, piece in takewhile(lambda _: not ranks.any(stop), pieces))
        ranks.say('    | ' + (s.sample_prompt + (' → ' if s.objective != 'causal' else '') + text).strip().replace('\n', '\n    | '))
    except UserError as error:
        ranks.say(f'no sample: {error}')
    model.train()


def without_compiling(needed):
    """Or blocks that are compiled one by one would be so for every length of a sample, up to the limit from which on nothing is compiled any more."""
    return torch.compiler.set_stance('force_eager') if needed else nullcontext()


def report(s, run, step, loss, norm, loads, steps_per_second, peak, log, ranks):
    """The progress line and its record in the log; loss: None if all steps were skipped; loads (layers, E): tokens of each expert, None if there are none."""
    lr = learning_rate(step - 1, s, getattr(s, s.main_rate))
    rate, left = run.tokens_per_step * steps_per_second, (s.max_iters - step) / steps_per_second
    mfu = run.flops_per_step * steps_per_second / peak / ranks.world if peak else None
    bpb = None if run.teacher or s.label_smoothing or loss is None else run.data.bits_per_byte(loss)  # with these the loss is of more than the text
    bits = f'{bpb:.3f} bits/byte | ' if bpb else ''
    shares = None if loads is None else loads / loads.sum(1, keepdim=True).clamp(min=1)  # of a layer's tokens
    ranks.say(f'step {step}/{s.max_iters} | loss {"none" if loss is None else f"{loss:.4f}"} | {bits}lr {lr:.2e} | {rate:,.0f} tokens/s'
              + (f' | MFU {mfu:.0%}' if mfu else '') + ('' if loads is None else f' | experts {shares.min():.0%} to {shares.max():.0%}')
              + f' | {int(left // 60)}m{int(left % 60):02d}s left')
    log.write(step, tokens=run.tokens(step), flops=run.flops, train_loss=loss, lr=lr, tokens_per_second=round(rate, 1), grad_norm=norm,
              mfu=round(mfu, 4) if mfu else None, skipped=run.skipped or None,
              expert_load=None if loads is None else [[round(share, 4) for share in layer] for layer in shares.tolist()])
