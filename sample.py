"""
Text from a checkpoint.

    python sample.py --out_dir=out/lowrank --start="Once upon a time" --num_samples=3
    python sample.py --out_dir=out/lowrank --start=FILE:prompt.txt --temperature=0      # greedy
    python sample.py --out_dir=out/lowrank --interactive

generate() and its KV cache live here; other scripts import them.
"""
import math
import os
import sys
from dataclasses import dataclass, field
from typing import Literal

import torch

import checkpoint
import hub
from configurator import UserError, configure, from_dict, run_main
from device import DeviceConfig, autocast, is_out_of_memory, pick_device, pick_dtype
from model import ModelConfig, Transformer
from tokenizer import load_tokenizer


@dataclass
class Settings(DeviceConfig):
    out_dir: str = 'out'  # a training run, or one of its checkpoints
    init_from: str = 'resume'  # resume = from out_dir; hf:FOLDER = a Hugging Face folder; gpt2, gpt2-medium, gpt2-large, gpt2-xl
    which: Literal['best', 'last'] = 'best'  # checkpoint of out_dir: the one with the lowest validation loss, or the newest
    start: str = '\n'  # the prompt; FILE:prompt.txt reads it from a file
    num_samples: int = 3  # drawn together, as one batch
    max_new_tokens: int = 300  # of each sample
    temperature: float = 0.8  # 0 = greedy, below 1 = safer, above 1 = wilder
    top_k: int = 200  # only the k likeliest tokens; 0 = all
    top_p: float = 1.0  # only the likeliest tokens that together have this probability (Holtzman et al. 2020, arXiv 1904.09751)
    min_p: float = 0.0  # only tokens at least this fraction as likely as the likeliest (Nguyen et al. 2024, arXiv 2407.01082)
    repetition_penalty: float = 1.0  # above 1: tokens already there become less likely (Keskar et al. 2019, arXiv 1909.05858)
    stop: list[str] = field(default_factory=list)  # end a sample before this text; may be given several times
    seed: int = 1337
    interactive: bool = False  # read prompts from the terminal, one after another
    use_cache: bool = True  # False: compute all keys and values anew for every token, to compare

    def check(self):
        """Raise ValueError for values that cannot work."""
        for name in ('num_samples', 'max_new_tokens'):
            if getattr(self, name) < 1:
                raise ValueError(f'{name}={getattr(self, name)}: must be at least 1')
        for name, low, high in (('temperature', 0, math.inf), ('top_k', 0, math.inf), ('top_p', 1e-9, 1), ('min_p', 0, 1),
                                ('repetition_penalty', 1e-9, math.inf), ('seed', 0, 2 ** 63 - 1)):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f'{name}={getattr(self, name)}: takes a number between {low:.0f} and {high}')
        if '' in self.stop:
            raise ValueError('stop: an empty text would end every sample at once')


# -----------------------------------------------------------------------------
# Generation

class KVCache:
    """Keys and values of up to `size` tokens, rotated and not repeated, for every layer: two (B, kv_heads, size, D) buffers each."""

    def __init__(self, n_layer, size):
        self.buffers, self.size, self.length = [None] * n_layer, size, 0

    def update(self, layer, k, v):
        """Append k, v (B, kv_heads, T, D) of one layer; the whole past comes back. The last layer moves `length` on."""
        if self.buffers[layer] is None:
            self.buffers[layer] = k.new_empty(2, k.size(0), k.size(1), self.size, k.size(3))
        end = self.length + k.size(2)
        self.buffers[layer][0, :, :, self.length:end] = k
        self.buffers[layer][1, :, :, self.length:end] = v
        if layer == len(self.buffers) - 1:
            self.length = end
        return self.buffers[layer][:, :, :, :end].unbind(0)


@torch.no_grad()
def generate(model, prompts, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0,
             generator=None, eot=None, vocab_size=None, use_cache=True):
    """
    Yield one (B,) int64 tensor of next tokens at a time, max_new_tokens of them; -1 where a row ended with `eot` before.

    prompts: a list of B lists of token ids, of any lengths (a longer prompt overrides what is drawn for it at first: no
    padding, no mask; rows whose prompt still runs yield -1 until it ends, and then max_new_tokens like the others).
    Only the first vocab_size tokens are drawn: a network may have more than its tokenizer (nanoGPT's 50304).
    When the context is full it slides on: the newer half of it is encoded afresh at positions 0…, so every token is
    computed as in training, with learned positions too, and cached = uncached token for token.
    """
    T, V, device = model.cfg.block_size, vocab_size or model.cfg.vocab_size, next(model.parameters()).device
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    shortest, longest = int(lengths.min()), int(lengths.max())
    tokens = torch.zeros(len(prompts), longest + max_new_tokens, dtype=torch.long, device=device)
    for row, prompt in enumerate(prompts):
        tokens[row, :len(prompt)] = torch.tensor(prompt, device=device)
    ended = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    size, start = min(T, longest + max_new_tokens), 0  # `start`: where the window begins
    cache = KVCache(model.cfg.n_layer, size) if use_cache else None
    for end in range(shortest, longest + max_new_tokens):
        if end - start > T:  # full: keep half, so that a long text costs one prefill every T/2 tokens
            start = end - max(1, T // 2)
            cache = KVCache(model.cfg.n_layer, size) if use_cache else None
        known = start + cache.length if use_cache else start
        logits = model.logits(model.hidden(tokens[:, known:end], cache)[:, -1])[:, :V]  # (B, V)
        drawn = draw(logits, tokens[:, :end], temperature, top_k, top_p, min_p, repetition_penalty, generator)
        prompting, done = end < lengths, end >= lengths + max_new_tokens
        tokens[:, end] = torch.where(prompting, tokens[:, end], drawn)
        if eot is not None:
            ended |= ~prompting & (drawn == eot)
        yield torch.where(prompting | done | ended, -1, drawn)
        if ended.all():
            return


def draw(logits, past, temperature, top_k, top_p, min_p, repetition_penalty, generator):
    """Next tokens (B,) from logits (B, V): penalty, then temperature, then the cuts, then a draw; greedy at temperature 0."""
    if repetition_penalty != 1:
        seen = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, past, True)
        logits = torch.where(seen, torch.where(logits > 0, logits / repetition_penalty, logits * repetition_penalty), logits)
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k and top_k < logits.size(-1):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    if min_p:
        logits = logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(min_p), -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)  # probability of the likelier ones
        cut = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, order, before >= top_p)
        logits = logits.masked_fill(cut, -torch.inf)
    # the token with the largest p / Exp(1) is a draw from p; random numbers from the CPU: the same text on every device
    noise = torch.empty(logits.shape).exponential_(generator=generator).to(logits.device)
    return (logits.softmax(-1) / noise).argmax(-1)


def stream(model, tokenizer, prompts, stop=(), **options):
    """
    Yield (row, text) pieces as they are decided: whole characters only, cut before the first `stop` string.
    """
    ids, shown, alive = [[] for _ in prompts], [''] * len(prompts), [True] * len(prompts)
    hold = max([len(s) for s in stop], default=1) - 1  # a stop string may begin in the last characters: hold them back

    def piece(row, final=False):
        # decoded with the prompt's end, because tokenizers drop a leading space
        context = prompts[row][-8:]
        text = tokenizer.decode(context + ids[row])[len(tokenizer.decode(context)):]
        cuts = [text.find(s) for s in stop if s in text]
        if cuts:
            text, alive[row], final = text[:min(cuts)], False, True
        if not final:
            text = text.rstrip('\ufffd')  # half a character so far
            text = text[:max(len(shown[row]), len(text) - hold)]
        new = text[len(shown[row]):]
        shown[row] += new
        return new

    for drawn in generate(model, prompts, eot=tokenizer.eot, vocab_size=tokenizer.vocab_size, **options):
        for row, token in enumerate(drawn.tolist()):
            if alive[row] and token >= 0:
                ids[row].append(token)
                yield row, piece(row)
            elif alive[row] and ids[row]:  # it ended with the end-of-text token, or had all its tokens
                alive[row] = False
                yield row, piece(row, final=True)
        if not any(alive):
            return
    for row in range(len(prompts)):
        if alive[row]:
            yield row, piece(row, final=True)


# -----------------------------------------------------------------------------
# Loading

def load(where, which='best'):
    """(model in eval mode, tokenizer) of a checkpoint directory, of a run's `which` checkpoint, or of what hub.py knows."""
    if hub.knows(where):
        cfg, weights = hub.load(where)
        folder, description = hub.tokenizer(where)
    else:
        folder = checkpoint.find(where, which)
        state, weights = checkpoint.load_state(folder), checkpoint.read_weights(folder)
        cfg, description = from_dict(ModelConfig, state['model'], os.path.join(folder, 'state.json')), state['tokenizer']
    tokenizer = load_tokenizer(description, folder)
    if tokenizer.vocab_size > cfg.vocab_size:
        raise UserError(f'{folder}: its tokenizer has {tokenizer.vocab_size} tokens, the network {cfg.vocab_size}: they do not belong together')
    model = Transformer(cfg, init=False)
    checkpoint.load_weights(model, weights, folder)
    return model.eval(), tokenizer


def read_prompt(start):
    """The text of a prompt; FILE:path reads it."""
    if not start.startswith('FILE:'):
        return start
    try:
        with open(start[5:], encoding='utf-8') as f:
            return f.read()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f'start={start}: {error}') from None


def encode_prompt(text, tokenizer, cfg):
    """Token ids of a prompt; an empty one is the end of the document before. Raises UserError for one that does not fit."""
    ids = tokenizer.encode(text) or [tokenizer.eot or 0]
    if len(ids) > cfg.block_size:
        raise UserError(f'start: the prompt has {len(ids)} tokens, the context of this model {cfg.block_size}: shorten it')
    return ids


# -----------------------------------------------------------------------------
# On the terminal

def print_samples(model, tokenizer, prompt, s, generator, dtype):
    """Draw s.num_samples continuations of `prompt` as one batch: the first appears as it is written, the others after it."""
    ids = encode_prompt(prompt, tokenizer, model.cfg)
    texts = [prompt] * s.num_samples
    print(prompt, end='', flush=True)
    with autocast(next(model.parameters()).device, dtype):
        for row, piece in stream(model, tokenizer, [ids] * s.num_samples, s.stop, max_new_tokens=s.max_new_tokens, temperature=s.temperature, top_k=s.top_k,
                                 top_p=s.top_p, min_p=s.min_p, repetition_penalty=s.repetition_penalty, generator=generator, use_cache=s.use_cache):
            texts[row] += piece
            if row == 0:
                print(piece, end='', flush=True)
    for text in texts[1:]:
        print('\n---------------\n' + text, end='', flush=True)
    print('\n---------------', flush=True)


def main():
    s = configure(Settings)
    device = pick_device(s.device)
    model, tokenizer = load(s.out_dir if s.init_from == 'resume' else s.init_from, s.which)
    model.to(device)
    dtype = pick_dtype(s.dtype, device) if device.type != 'cpu' else s.dtype.replace('auto', 'float32')
    generator = torch.Generator().manual_seed(s.seed)
    if not s.interactive:
        try:
            print_samples(model, tokenizer, read_prompt(s.start), s, generator, dtype)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise UserError(f'out of memory: lower num_samples={s.num_samples} or max_new_tokens={s.max_new_tokens}') from None
        return
    print('a prompt a line; Ctrl-D ends', flush=True)
    for line in sys.stdin:
        try:
            print_samples(model, tokenizer, line.rstrip('\n'), s, generator, dtype)
        except UserError as error:  # a prompt that does not fit: say so, ask for the next one
            print(error, flush=True)


if __name__ == '__main__':
    run_main(main)
