"""
--plan: print the parameters, FLOPs and memory of a model, or the model sizes that scaling laws recommend,
without training.
"""
import torch

from batches import find_folder, read_meta
from configurator import UserError, check, peak_flops, pick_dtype
from features import part_of
from features.networks import read_model
from features.others import adopt
from features.plan.chinchilla import optima, table
from features.plan.dial import REACHED, plan, size
from model import ModelConfig, make_model


def find_vocabulary(s):
    """
    The vocabulary size from the settings, or from the data set if it exists; otherwise GPT-2's is assumed,
    and a line says so.
    """
    from features.text.nanogpt import GPT2_TOKENS
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
    """Print the parameters, FLOPs and memory of the model of train.py's Settings, without making it."""
    s.vocab_size = vocab_size
    check(s)
    with torch.device('meta'):
        model = make_model(part_of(s, ModelConfig), init=False)
        total, active, flops = model.num_params(), model.num_params(active=True), model.flops_per_token()
        blocks = sum(p.numel() for name, p in model.named_parameters() if 'blocks.' in name)
        trained = total
        if s.lora_rank:
            from features.lora.layers import begin
            begin(model, s)
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


def show_plan(s, device):
    """
    Print the model of the settings; or, given s.tokens or s.minutes, the model sizes by the laws of
    chinchilla.py, and the settings that plan() derives for the last law.
    """
    if s.init_from not in ('auto', 'scratch', 'resume'):
        cfg, _, _ = read_model(s.init_from, encoder=True)
        adopt(s, cfg, s.init_from)
    s.dtype = pick_dtype(s.dtype, device)
    vocab_size = find_vocabulary(s)
    if not (s.tokens or s.minutes):
        return show_network(s, vocab_size)
    flops = 0.0
    if s.minutes:
        peak = peak_flops(device, s.dtype)
        if not peak:
            raise UserError(f'minutes={s.minutes:g}: the peak speed of this device is not known: give tokens')
        flops = s.minutes * 60 * REACHED * peak
        print(f'{s.minutes:g} minutes at {REACHED:.0%} of {peak / 1e12:.2f} TFLOP/s are {flops:.3e} FLOPs')
    found = optima(s.tokens, flops)
    print(table(found))
    given, s.tokens, _ = found['20 tokens a parameter']
    s.params, s.minutes, s.plan = given, 0.0, False
    derived = plan(s, vocab_size, s.tokens, device, 1)
    params, _, per_token = size(s, vocab_size)
    stacks = ''
    if s.n_encoder_layer:  # t5
        stacks = (f', an encoder of {s.n_encoder_layer}, '  # t5
                  f'{s.source_context} tokens read for {s.block_size} written')  # t5
    print(f'\nthe nearest to {given / 1e6:,.1f}M: {params:,} parameters, '
          f'{s.n_layer} layers of {s.n_embd}{stacks}\n'
          f'{per_token:.3e} FLOPs a token as it is multiplied; 6 N would be {6 * params:.3e}\n'
          + ' '.join(f'--{name}={value}' for name, value in derived.items()))
