"""
Text from a checkpoint.

    python sample.py --out_dir=out/lowrank --start="Once upon a time" --num_samples=3
    python sample.py --out_dir=out/lowrank --start=FILE:prompt.txt --temperature=0      # greedy
    python sample.py --out_dir=out/lowrank --interactive
    python sample.py --init_from=hf:FOLDER --start="translate English to German: The house is wonderful." --num_beams=4     # T5: an encoder reads it

generate() and its KV cache live here; other scripts import them. The fastest path:

    model, tokenizer = load('out/lowrank')
    pack(model, 'bfloat16')  # packed.py
    for drawn in generate(model, [prompt], 5000, compile=True): ...
"""
import functools
import math
import os
import sys
from dataclasses import dataclass, field
from typing import Literal

os.environ['GOMP_SPINCOUNT'] = os.environ.get('GOMP_SPINCOUNT', '1000')  # before torch is loaded: its threads wait for one another
# a moment, not for milliseconds, or two runs on one machine slow each other down a hundredfold (120 against 8,800 tokens/s, RESULTS.md)

import torch
import torch.nn as nn

import checkpoint
import hub
from configurator import FilePath, UserError, configure, run_main, typed_text
from device import (
    NOT_FINITE,
    DeviceConfig,
    is_out_of_memory,
    pick_compile,
    pick_device,
    pick_dtype,
    pick_exact_dtype,
)
from features.lora import adapters, peft_files
from features.lora import layers as lora
from features.lora.packed import pack
from features.t5.objectives import around, stored_begin
from origin import add_adapters, load_model
from tokenizer import load_tokenizer

GREEDY_BELOW = 1e-9  # temperature: logits divided by it would be infinite
COMPILE_FROM = 4000  # tokens of a sample from which compiling pays (10.6M parameters on 2 CPU cores: 7 to 10 s, then 1.9 ms less a token)


@dataclass
class Settings(DeviceConfig):
    out_dir: FilePath = 'out'  # a training run, or one of its checkpoints
    init_from: FilePath = 'resume'  # resume = from out_dir; hf:FOLDER = a Hugging Face folder; gpt2, gpt2-medium, gpt2-large, gpt2-xl
    which: Literal['best', 'last'] = 'best'  # checkpoint of out_dir: the one with the lowest validation loss, or the newest
    adapter: list[FilePath] = field(default_factory=list)  # low-rank adapters beside it, runs of train.py --lora_rank or folders of PEFT's; several, as
    # name=DIR each, write num_samples each, together in one batch
    start: str = '\n'  # the prompt; where the tokenizer has no new line, the default is the end of text.
    # FILE:prompt.txt reads it from a file, as it is there. In a typed text \n is a new line, \t a tab, \r a
    # carriage return, \\ a backslash, \u00e4 the character of that number: write C:\\new for C:\new. In both the
    # end of text, as the tokenizer writes it (<|endoftext|>, </s>), is that token
    num_samples: int = 3  # drawn together, as one batch
    max_new_tokens: int = 300  # of each sample
    temperature: float = 0.8  # 0 = greedy, below 1 = safer, above 1 = wilder
    top_k: int = 200  # only the k likeliest tokens; 0 = all
    top_p: float = 1.0  # only the likeliest tokens that together have this probability (Holtzman et al. 2020, arXiv 1904.09751)
    min_p: float = 0.0  # only tokens at least this fraction as likely as the likeliest (Nguyen et al. 2024, arXiv 2407.01082)
    num_beams: int = 0  # above 0: one text, the likeliest that a beam search with so many hypotheses finds
    length_penalty: float = 1.0  # of the beam search: above 0 favours longer texts, below shorter ones
    repetition_penalty: float = 1.0  # above 1: tokens already there become less likely (Keskar et al. 2019, arXiv 1909.05858)
    stop: list[str] = field(default_factory=list)  # end a sample before this text; may be given several
    # times; typed as start: \n is a new line
    seed: int = 1337
    interactive: bool = False  # read prompts from the terminal, one after another
    use_cache: bool = True  # False: compute all keys and values anew for every token, to compare
    int8: bool = False  # matrices in int8 with a scale per row: 1.3 times bfloat16's speed where decoding is compiled, slower where it is not

    def check(self):
        """Raise ValueError for values that cannot work."""
        for name in ('num_samples', 'max_new_tokens'):
            if getattr(self, name) < 1:
                raise ValueError(f'{name}={getattr(self, name)}: must be at least 1')
        if self.num_beams and len(self.adapter) > 1:
            raise ValueError(f'num_beams={self.num_beams}: searches with one adapter: give one')
        if self.num_beams and (self.stop or self.repetition_penalty != 1):
            raise ValueError(f'num_beams={self.num_beams}: a beam search knows neither stop nor repetition_penalty: leave them out')
        for name, low, high in (('length_penalty', -10, 10), ('temperature', 0, math.inf), ('top_k', 0, math.inf), ('top_p', 1e-9, 1), ('min_p', 0, 1),
                                ('repetition_penalty', 1e-9, math.inf), ('seed', 0, 2 ** 63 - 1)):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f'{name}={getattr(self, name)}: takes a number between {low:.0f} and {high}')
        if self.num_beams < 0:
            raise ValueError(f'num_beams={self.num_beams}: must not be negative')
        if '' in self.stop:
            raise ValueError('stop: an empty text would end every sample at once')
        for text in self.stop:
            typed_text(text, 'stop')
        if not self.start.startswith('FILE:'):
            typed_text(self.start, 'start')


# -----------------------------------------------------------------------------
# Generation

class KVCache:
    """
    Keys and values of up to `size` tokens, rotated and not repeated: for every layer two (B, kv_heads, size, D) buffers.

    The buffers stay where they are and the position is a tensor, so every step of one token can have the same shapes and
    addresses: it compiles once, and a CUDA graph can replay it (the idea: gpt-fast).
    """

    def __init__(self, model, size, compile=False):
        self.buffers, self.size, self.length, self.compile = [None] * model.cfg.n_layer, size, 0, compile
        self.source = [None] * model.cfg.n_layer  # keys and values of an encoder's memory, (B, kv_heads, S, D) each
        self.slots = torch.arange(size, device=next(model.parameters()).device)

    def extend(self, T):
        """Make room for T more tokens. Returns whether a compiled step is to take them: then attention runs over the whole buffer, masked."""
        static = self.compile and T == 1 and self.length > 0
        self.positions = self.slots[self.length:self.length + T]
        self.length += T
        self.used = self.size if static else self.length
        self.mask = None  # (T, used); not needed for the first tokens, which are causal, nor for one that sees all in use
        if static or 1 < T < self.used:
            self.mask = self.slots[:self.used] <= self.positions[:, None]
        return static

    def update(self, layer, k, v):
        """Put k, v (B, kv_heads, T, D) of one layer at the places of the last extend(); what there is to attend to comes back."""
        if self.buffers[layer] is None:  # zeros: what the mask hides must still be finite
            self.buffers[layer] = [k.new_zeros(k.size(0), k.size(1), self.size, k.size(3)) for _ in range(2)]
            if self.compile:  # a CUDA graph may write only where it knows that the address stays
                for buffer in self.buffers[layer]:
                    torch._dynamo.mark_static_address(buffer, guard=False)
        for buffer, new in zip(self.buffers[layer], (k, v)):
            buffer[:, :, self.positions] = new
        return [buffer[:, :, :self.used] for buffer in self.buffers[layer]]

    def once(self, layer, look_up):
        """The keys and values that a layer looks up in its source: made by the first step, there for all others."""
        if self.source[layer] is None:
            self.source[layer] = list(look_up())
        return self.source[layer]

    def select(self, rows):
        """Go on with these rows (B,) of the batch, of which one may come several times."""
        for tensors in (*filter(None, self.buffers), *filter(None, self.source)):
            tensors[:] = [t[rows] for t in tensors]


class NotFinite(UserError):
    """The network's logits are NaN or infinite: no token can be drawn."""

    def __init__(self):
        super().__init__(f'the logits are NaN or infinite: {NOT_FINITE}')


@torch.no_grad()
def generate(model, prompts, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0,
             generator=None, eot=None, vocab_size=None, use_cache=True, compile=False, sources=None):
    """
    Yield one (B,) int64 tensor of next tokens at a time, max_new_tokens of them; -1 where a row ended with `eot` before.

    prompts: a list of B lists of token ids, of any lengths (a longer prompt overrides what is drawn for it at first: no
    padding, no mask; rows whose prompt still runs yield -1 until it ends, and then max_new_tokens like the others).
    Only the first vocab_size tokens are drawn: a network may have more than its tokenizer (nanoGPT's 50304).
    When the context is full it slides on: the newer half of it is encoded afresh at positions 0…, so every token is
    computed as in training, with learned positions too, and cached = uncached token for token.
    compile: decode by one compiled graph a token (prompts are read eagerly, in one pass); of use with the cache only.
    sources: what the encoder reads, where there is one, a list of token ids for each prompt.
    Raises NotFinite where the logits are no numbers.
    """
    T, V, device = model.cfg.block_size, vocab_size or model.cfg.vocab_size, next(model.parameters()).device
    memory = None if sources is None else model.encode(pad(sources, device))
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    shortest, longest = int(lengths.min()), int(lengths.max())
    tokens = torch.zeros(len(prompts), longest + max_new_tokens, dtype=torch.long, device=device)
    for row, prompt in enumerate(prompts):
        tokens[row, :len(prompt)] = torch.tensor(prompt, device=device)
    ended = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    start = 0  # where the window begins
    # a compiled step is made for one size of the cache: always the same, so that it is never compiled again
    cache = KVCache(model, T if compile else min(T, longest + max_new_tokens), compile) if use_cache else None
    for end in range(shortest, longest + max_new_tokens):
        if end - start > T:  # full: keep half, so that a long text costs one prefill every T/2 tokens
            start = end - max(1, T // 2)
            if use_cache:
                cache.length = 0
        logits = next_logits(model, tokens[:, start:end], cache, memory)[:, :V]  # (B, V)
        drawn = draw(logits, tokens[:, :end], temperature, top_k, top_p, min_p, repetition_penalty, generator)
        prompting, done = end < lengths, end >= lengths + max_new_tokens
        tokens[:, end] = torch.where(prompting, tokens[:, end], drawn)
        if eot is not None:
            ended |= ~prompting & (drawn == eot)
        is_damaged, is_over = torch.stack([(drawn < 0).any(), ended.all()]).tolist()  # a single wait
        if is_damaged:
            raise NotFinite
        yield torch.where(prompting | done | ended, -1, drawn)
        if is_over:
            return


def pad(rows, device):
    """Lists of token ids → (B, S) int64, -1 at the ends of the shorter ones."""
    return nn.utils.rnn.pad_sequence([torch.tensor(row, device=device) for row in rows], batch_first=True, padding_value=-1)


def next_logits(model, window, cache, memory=None):
    """Logits (B, vocab_size) of what follows `window` (B, T); computed are those of its tokens that the cache has not."""
    new = window if cache is None else window[:, cache.length:]
    if cache is None or not cache.extend(new.size(1)):
        return step(model, new, cache, memory)
    # contiguous: its strides are then always the same, or it would be compiled again
    return compiled_step(new.device.type)(model, new.clone(memory_format=torch.contiguous_format), cache, memory)


def step(model, idx, cache, memory=None):
    if memory is not None:  # t5
        return model.logits(model.hidden(idx, cache, memory)[:, -1])  # t5
    return model.logits(model.hidden(idx, cache)[:, -1])


@functools.cache
def compiled_step(device_type):
    """step() for one token as one graph; on CUDA recorded and replayed, because at batch 1 launching its kernels takes longer than they run."""
    return torch.compile(step, dynamic=False, mode='reduce-overhead' if device_type == 'cuda' else None)


def draw(logits, past, temperature, top_k, top_p, min_p, repetition_penalty, generator):
    """
    Next tokens (B,) from logits (B, V): penalty, then temperature, then the cuts, then a draw; greedy at
    temperature 0. A row of logits with NaN or inf in it gives -1; -inf is a token that is never drawn.
    """
    if repetition_penalty != 1:
        seen = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, past, True)
        logits = torch.where(seen, torch.where(logits > 0, logits / repetition_penalty, logits * repetition_penalty), logits)
    if temperature < GREEDY_BELOW:
        highest, tokens = logits.max(-1)  # the highest is NaN where any is
        return torch.where(highest.isfinite(), tokens, -1)
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
    highest, tokens = (logits.softmax(-1) / noise).max(-1)
    return torch.where(highest.isnan(), -1, tokens)


@torch.no_grad()
def beam_search(model, prompt, max_new_tokens, num_beams=4, length_penalty=1.0, eot=None, vocab_size=None, source=None):
    """
    The likeliest continuation that num_beams hypotheses at a time find, list of token ids, up to and with `eot`: its log-probability over
    its length to the power of length_penalty (Wu et al. 2016, arXiv 1609.08144, without their 5 and 6) is the highest. It ends when the best
    open hypothesis, at the length it has, is no better than the worst of num_beams finished ones, as transformers' (early_stopping=False) does.
    prompt, source: lists of token ids, the second for the encoder. Raises ValueError for more tokens than
    block_size, and NotFinite where the logits are no numbers.
    """
    V, device = vocab_size or model.cfg.vocab_size, next(model.parameters()).device
    size = len(prompt) + max_new_tokens
    if size - 1 > model.cfg.block_size:
        raise ValueError(f'{len(prompt)} tokens and max_new_tokens={max_new_tokens} are more than block_size={model.cfg.block_size}')
    memory = None if source is None else model.encode(pad([source] * num_beams, device))
    cache, finished = KVCache(model, size), []  # finished: (score, tokens)
    tokens = torch.tensor([prompt] * num_beams, device=device)
    scores = torch.tensor([0.0] + [-1e9] * (num_beams - 1), device=device)  # the hypotheses are equal at first: only one of them counts
    for length in range(1, max_new_tokens + 1):
        total = next_logits(model, tokens, cache, memory)[:, :V].log_softmax(-1) + scores[:, None]  # (beams, V)
        best, where = total.flatten().topk(min(2 * num_beams, total.numel()))  # at most one in a beam ends: enough go on
        if best[0].isnan():  # topk puts NaN first
            raise NotFinite
        rows, drawn = where // V, where % V
        ends = drawn == (-1 if eot is None else eot)
        for n in ends[:num_beams].nonzero().flatten().tolist():
            finished.append((best[n].item() / length ** length_penalty, tokens[rows[n], len(prompt):].tolist() + [eot]))
        finished = sorted(finished, reverse=True)[:num_beams]
        rows, drawn, scores = rows[~ends][:num_beams], drawn[~ends][:num_beams], best[~ends][:num_beams]
        tokens = torch.cat([tokens[rows], drawn[:, None]], dim=1)
        cache.select(rows)
        if len(finished) == num_beams and scores[0].item() / length ** length_penalty <= finished[-1][0]:
            return finished[0][1]
    finished += [(score / max_new_tokens ** length_penalty, row[len(prompt):].tolist()) for score, row in zip(scores.tolist(), tokens)]
    return max(finished)[1]


def stream(model, tokenizer, prompts, stop=(), **options):
    """Yield (row, text) pieces as they are decided: whole characters only, cut before the first `stop` string."""
    rows = [Row(tokenizer, text_before(prompt, tokenizer), stop) for prompt in prompts]
    for drawn in generate(model, prompts, eot=tokenizer.eot, vocab_size=tokenizer.vocab_size, **options):
        for n, (row, token) in enumerate(zip(rows, drawn.tolist())):
            if row.alive and token >= 0:
                yield n, row.add(token)
            elif row.alive and row.begun:  # it ended with the end-of-text token, or had all its tokens
                yield n, row.end()
        if not any(row.alive for row in rows):
            return
    for n, row in enumerate(rows):
        if row.alive:
            yield n, row.end()


def text_before(prompt, tokenizer):
    """The tokens of a prompt whose text goes on: none at the start of a document: it has no leading space."""
    is_start = prompt[-1:] == [tokenizer.eot] or prompt == list(tokenizer.begin)
    return [] if is_start else prompt


class Row:
    """
    The text of one row of a batch as it grows, up to the first of the strings `stop`. A token costs the same
    however long the text is: only the last tokens are decoded.
    """
    CONTEXT = 8  # tokens decoded before the new ones, because tokenizers drop a leading space

    def __init__(self, tokenizer, prompt, stop):
        self.decode = tokenizer.decode
        self.stop = [s for s in stop if s]
        self.alive = True
        self.begun = False
        self.held = ''  # characters that may be the beginning of a stop string: not shown yet
        self.window = []  # the last tokens, and
        self.settled = ''  # their text, without what has not been returned
        self.slide(prompt, unfinished=0)

    def add(self, token):
        """Take a token; returns the text that is certain now."""
        self.begun = True
        self.window.append(token)
        text = self.decode(self.window)
        unfinished = count_unfinished(text)
        is_full = len(self.window) >= 2 * self.CONTEXT
        if unfinished and not text.startswith(self.settled) and not is_full:
            return ''  # tokenizers takes characters back while the bytes after them are incomplete
        certain = max(len(text) - unfinished, len(self.settled))
        new = text[len(self.settled):certain]
        self.settled = text[:certain]
        if is_full or not unfinished and len(self.window) > self.CONTEXT:
            self.slide(self.window, unfinished)
        return self.show(new)

    def end(self):
        """Returns what was held back: no token comes any more."""
        new = self.decode(self.window)[len(self.settled):]
        text = self.show(new, is_last=True)
        self.alive = False
        return text

    def slide(self, tokens, unfinished):
        """Keep the last CONTEXT tokens, or up to three fewer: not to begin inside a character."""
        for count in range(self.CONTEXT, self.CONTEXT - 4, -1):
            self.window = list(tokens[-count:])
            text = self.decode(self.window)
            if not text.startswith(UNFINISHED):
                break
        self.settled = text[:len(text) - unfinished]

    def show(self, text, is_last=False):
        """Returns what can be shown of the text so far: all that no stop string can begin in."""
        self.held += text
        places = [self.held.find(s) for s in self.stop if s in self.held]
        first = min(places, default=len(self.held))
        certain = len(self.held) if is_last else first_beginning(self.held, self.stop)
        if places and first <= certain:
            self.alive = False
            certain = first
        shown = self.held[:certain]
        self.held = self.held[certain:] if self.alive else ''
        return shown


UNFINISHED = '\ufffd'  # decoders write it for bytes that are no character, or not yet


def count_unfinished(text):
    """How many characters at the end of a text may become another one: one to three bytes of a character."""
    return len(text[-3:]) - len(text[-3:].rstrip(UNFINISHED))


def first_beginning(text, stop):
    """The first place from which the rest of `text` is the beginning of a stop string, but not all of it."""
    longest = max((len(s) for s in stop), default=0)
    for place in range(max(0, len(text) - longest + 1), len(text)):
        if any(len(s) > len(text) - place and s.startswith(text[place:]) for s in stop):
            return place
    return len(text)


# -----------------------------------------------------------------------------
# Loading

def load(where, which='best', encoder=False):
    """(model in eval mode, tokenizer) of a checkpoint directory, of a run's `which` checkpoint, or of what hub.py knows; encoder as read_model()."""
    model, folder = load_model(where, which, encoder)
    cfg = model.cfg
    description = hub.tokenizer(where)[1] if hub.knows(where) else checkpoint.load_state(folder)['tokenizer']
    tokenizer = load_tokenizer(description, folder)
    if not hub.knows(where):
        tokenizer.around = stored_around(folder, tokenizer)
        tokenizer.begin = stored_begin(checkpoint.load_state(folder))
    if tokenizer.vocab_size > cfg.vocab_size:
        raise UserError(f'{folder}: its tokenizer has {tokenizer.vocab_size} tokens, the network {cfg.vocab_size}: they do not belong together')
    if hub.knows(where):
        tokenizer.begin = (hub.decoder_start(where),) if cfg.n_encoder_layer else tokenizer.bos()
    return model, tokenizer


def stored_around(folder, tokenizer):
    """What the network, or the adapter, of a checkpoint is used to have around a prompt: objectives.around()."""
    state = checkpoint.load_state(folder)
    meta = {'vocab_size': tokenizer.vocab_size, 'eot': tokenizer.eot, 'tokenizer': state['tokenizer']}
    return around(state['settings'].get('objective', 'causal'), state['settings'].get('denoisers'), meta)


def add_voices(model, tokenizer, given, where):
    """
    Let adapters speak beside the network of `where`, origin.add_adapters(). Returns [(name, around, begin)]:
    what each is used to have around a prompt, and its start token.
    """
    voices = []
    for name, folder in add_adapters(model, given, where).items():
        around, begin = tokenizer.around, tokenizer.begin
        if not peft_files.is_one(folder):
            folder = checkpoint.find(folder, 'best')
            around = stored_around(folder, tokenizer)
            begin = stored_begin(checkpoint.load_state(folder)) or begin
        voices.append((name, around, begin))
    return voices


def read_text(path):
    """The text of a file in UTF-8 with its line ends, without a byte-order mark. Raises UserError if there is none."""
    try:
        with open(path, encoding='utf-8-sig', newline='') as f:
            return f.read()
    except OSError as error:
        raise UserError(f'{path}: {error.strerror}') from None
    except UnicodeDecodeError as error:
        raise UserError(f'{path}: not a text in UTF-8 (byte {error.start}): convert it') from None


def read_prompt(start):
    """The text of a prompt; FILE:path reads it. Raises UserError for what is not UTF-8."""
    if start == 'FILE:':
        raise UserError('start=FILE:: names no file: write --start=FILE:prompt.txt')
    if start.startswith('FILE:'):
        return read_text(os.path.expanduser(start[5:]))
    return typed_text(start, 'start')


def read_prompts(stream):
    """
    Yield the prompts of a text stream, one a line. Only a newline ends a line, other separators do not.
    Bytes that are not UTF-8 come as halves of characters, which read_prompt() refuses.
    """
    stream.reconfigure(newline='\n', errors='surrogateescape')
    for line in stream:
        yield line.removesuffix('\n').removesuffix('\r').removeprefix('\ufeff')


def default_prompt(text, tokenizer):
    """The default `text` of a prompt, or '', the end of text, where the tokenizer cannot write it."""
    try:
        ids = tokenizer.encode(text)
    except UserError:  # a character that is not in the vocabulary
        return ''
    return '' if tokenizer.unk in ids else text


def encode_typed(text, tokenizer):
    """The ids of a prompt. Where a user writes the end of text as the tokenizer does, that token is meant."""
    parts = [text] if tokenizer.eot is None else text.split(tokenizer.eot_text)
    ids = tokenizer.encode(parts[0])
    for part in parts[1:]:
        ids = [*ids, tokenizer.eot, *tokenizer.encode(part)]
    return ids


def encode_prompt(text, tokenizer, cfg, room=None, cuts=None, is_typed=True):
    """
    (ids that the decoder goes on from, ids for the encoder or None) of a prompt. It begins with a start token,
    if the network was trained with one; else an empty one is the end of the document before. The text that an
    encoder reads is marked as in training, by the end of text after it at least. Raises UserError for one that
    does not fit.

    room: most tokens that are read: a longer text loses its end, and is counted in `cuts`, a Cuts.
    is_typed: read by encode_typed(); False: it is data, in which all text is ordinary.
    """
    (before, after), end = tokenizer.around, tokenizer.eot or 0
    if cfg.n_encoder_layer:
        after = after or (end,)
    else:
        before = *tokenizer.begin, *before
    ids = encode_typed(text, tokenizer) if is_typed else tokenizer.encode(text)
    if ids[:1] == [end] and list(before) == [end]:  # a start token that is the end of text is not doubled
        before = ()
    if ids[-1:] == [end] and list(after) == [end]:
        after = ()
    if room is not None:
        if cuts is not None:
            cuts.add(len(before) + len(ids) + len(after), room)
        ids = ids[:max(0, room - len(before) - len(after))]
    ids = [*before, *ids, *after] or [end]
    prompt, source = (list(tokenizer.begin) or [end], ids) if cfg.n_encoder_layer else (ids, None)
    for name, tokens, most in (('the prompt', prompt, cfg.block_size), ('what the encoder reads', source or (), getattr(cfg, 'source_context', 0))):
        if len(tokens) > most:
            raise UserError(f'start: {name} has {len(tokens)} tokens, the context of this model {most}: shorten it')
    return prompt, source


# -----------------------------------------------------------------------------
# On the terminal

def print_samples(model, tokenizer, text, s, generator, compile, voices):
    """
    Draw s.num_samples continuations of `text`, of several adapters (add_voices()) so many each, as one batch: the first appears as it is written, the
    others after it.
    """
    texts, prompts, sources = [], [], []
    shown = text.removeprefix(tokenizer.eot_text)  # a document that begins is not announced
    for name, tokenizer.around, tokenizer.begin in voices:
        prompt, source = encode_prompt(text, tokenizer, model.cfg)
        prompts, sources = prompts + [prompt] * s.num_samples, sources + [source] * s.num_samples
        announced = f'{name}: ' if len(voices) > 1 else ''
        is_shown = not source and not tokenizer.around[1]
        texts += [announced + shown if is_shown else announced] * s.num_samples
    print(texts[0], end='', flush=True)
    if s.num_beams:
        if len(prompt) + s.max_new_tokens > model.cfg.block_size + 1:
            raise UserError(f'max_new_tokens={s.max_new_tokens}: a beam search has no room beyond the context of {model.cfg.block_size}: lower it')
        ids = beam_search(model, prompt, s.max_new_tokens, s.num_beams, s.length_penalty, tokenizer.eot, tokenizer.vocab_size, source)
        row = Row(tokenizer, text_before(prompt, tokenizer), ())
        pieces = [row.add(token) for token in ids if token != tokenizer.eot]
        print(''.join(pieces) + row.end() + '\n---------------', flush=True)
        return
    options = {name: getattr(s, name) for name in ('max_new_tokens', 'temperature', 'top_k', 'top_p', 'min_p', 'repetition_penalty', 'use_cache')}
    stop = [typed_text(text, 'stop') for text in s.stop]
    options |= {'generator': generator, 'compile': compile, 'sources': sources if source else None}
    for row, piece in stream(model, tokenizer, prompts, stop, **options):
        texts[row] += piece
        if row == 0:
            print(piece, end='', flush=True)
    for text in texts[1:]:
        print('\n---------------\n' + text, end='', flush=True)
    print('\n---------------', flush=True)


def converse(answer):
    """Call answer() with each line of the terminal. A prompt that cannot be used does not end it."""
    if sys.stdin is None:  # Python has none where it was closed from the start
        raise UserError('interactive=True: its input is closed: give --start=TEXT in its place')
    for text in read_prompts(sys.stdin):
        try:
            answer(typed_text(text, 'start'))
        except NotFinite:  # no other prompt would do
            raise
        except UserError as error:
            print(error, flush=True)


def main():
    s = configure(Settings)
    device = pick_device(s.device)
    where = s.out_dir if s.init_from == 'resume' else s.init_from
    model, tokenizer = load(where, s.which, encoder=True)
    voices = add_voices(model, tokenizer, s.adapter, where) or [('', tokenizer.around, tokenizer.begin)]
    if len(s.adapter) == 1 and not adapters.obstacle(model):
        adapters.merge(model)
    is_greedy = s.num_beams > 0 or s.temperature < GREEDY_BELOW  # then rounding decides which text it is
    dtype = (pick_exact_dtype if is_greedy else pick_dtype)(s.dtype, device)
    pack(model.to(device), dtype, 'int8' if s.int8 else '')
    if len(voices) > 1:
        adapters.select(model, [name for name, *_ in voices for _ in range(s.num_samples)])
    is_long = s.max_new_tokens >= COMPILE_FROM and not lora.adapted(model)
    compile = s.use_cache and (is_long if s.compile == 'auto' else s.compile) and pick_compile(True, device)
    generator = torch.Generator().manual_seed(s.seed)

    def answer(text):
        print_samples(model, tokenizer, text, s, generator, compile, voices)
    try:
        if s.interactive:
            print(f'device: {device}, {dtype}')
            print('a prompt a line, \\n in it is a new line; Ctrl-D ends', flush=True)
            converse(answer)
        else:
            text = read_prompt(s.start)
            answer(text if 'start' in s.given else default_prompt(text, tokenizer))
            print(f'device: {device}, {dtype}', flush=True)
    except NotFinite as error:
        raise UserError(f'{where}: {error}') from None
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f'out of memory: lower num_samples={s.num_samples} or '
                        f'max_new_tokens={s.max_new_tokens}') from None


if __name__ == '__main__':
    run_main(main, output_is_all=True)
