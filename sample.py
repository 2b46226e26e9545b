"""
Sample text from a checkpoint.

    python sample.py --out_dir=out/lowrank --start="Once upon a time" --num_samples=3
    python sample.py --out_dir=out/lowrank --start=FILE:prompt.txt --temperature=0      # greedy
    python sample.py --out_dir=out/lowrank --interactive

generate() and its KV cache live here; other scripts import them:

    model, tokenizer = load('out/lowrank')
    for tokens in generate(model, [encode_prompt('Once', tokenizer, model.cfg)], 100): ...  # (1,) each
"""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))
import features  # noqa: I001 — first: your random.py or data/ then hides no module of ours or of a library
if __name__ == '__main__':
    features.start(__file__)
    # Large pages of memory: a prompt of 2,000 tokens is read 1.16 times as fast (docs/results/sampling.md)
    os.environ.setdefault('THP_MEM_ALLOC_ENABLE', '1')

import math
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Literal

os.environ.setdefault('GOMP_SPINCOUNT', '1000')  # before torch is loaded, see train.py

import torch

import checkpoint
from configurator import (
    DeviceConfig,
    FilePath,
    UserError,
    configure,
    pick_compile,
    pick_device,
    pick_dtype,
    pick_exact_dtype,
    run_main,
    typed_text,
)
from model import autocast, window_mask
from tokenizer import from_json, load_tokenizer

# Why numbers are NaN or infinite, and what to do
NOT_FINITE = 'the weights are damaged, or float16 is too narrow for them: try --dtype=float32'
GREEDY_BELOW = 1e-9  # temperature: logits divided by it would be infinite
LONGEST = 2 ** 27  # bytes of a text file
COMPILE_FROM = 4000  # tokens: compiling takes 7 to 10 s on 2 CPU cores, and saves 1.9 ms a token (10.6M)


@dataclass
class Settings(DeviceConfig):
    out_dir: FilePath = ''  # a training run, or one of its checkpoints; '' = the last one under out/
    init_from: FilePath = 'resume'  # resume: load out_dir; hf:FOLDER: load a Hugging Face folder; gpt2,
    # gpt2-medium, gpt2-large, gpt2-xl: download GPT-2
    which: Literal['best', 'last'] = 'best'  # best: lowest validation loss; last: newest
    start: str = '\n'  # the prompt, or FILE:prompt.txt to read it from a file, unchanged. On the command line
    # \n is a new line, \t a tab, \r a carriage return, \\ a backslash, \u00e4 a character by its number; so
    # write C:\\new for C:\new. The tokenizer's end-of-text string (<|endoftext|>, </s>) becomes that token;
    # it is the default prompt if there is no new-line token
    num_samples: int = 3  # number of samples, generated as one batch
    max_new_tokens: int = 300  # maximum length of each sample, in tokens
    temperature: float = 0.8  # 0 = greedy; below 1 = less random; above 1 = more random
    top_k: int = 200  # sample from the k most likely tokens only; 0 = all
    top_p: float = 1.0  # sample from the most likely tokens of this total probability (arXiv 1904.09751)
    min_p: float = 0.0  # keep tokens at least this fraction as likely as the most likely one (arXiv
    # 2407.01082)
    repetition_penalty: float = 1.0  # above 1: make tokens that already occurred less likely (arXiv
    # 1909.05858)
    stop: list[str] = field(default_factory=list)  # end before this text; can be repeated; \n is a new line
    seed: int = 1337  # seed for sampling
    interactive: bool = False  # read prompts from the terminal, one by one
    chat: bool = False  # [chat] hold a conversation on the terminal
    system: str = ''  # [chat] the system message of the conversation; '' = none, or the template's own
    use_cache: bool = True  # False: recompute all keys and values for each token; slow, for comparison
    adapter: list[FilePath] = field(default_factory=list)  # [lora] LoRA adapters to apply: runs of train.py
    # --lora_rank or PEFT folders. Several as --adapter=name=DIR: num_samples of each, in one batch
    int8: bool = False  # [lora] int8 matrices: up to 1.8 times as fast as bfloat16; may change the text
    int4: bool = False  # [lora] int4 matrices, on a CPU: less memory, not as exact; may change the text
    num_beams: int = 0  # [t5] above 0: beam search with this many beams; gives one text, the most likely one
    # found
    length_penalty: float = 1.0  # [t5] for beam search: above 0 favors longer texts, below 0 shorter ones

    def check(self):
        """Raise ValueError for values that cannot work."""
        for name in ('num_samples', 'max_new_tokens'):
            if getattr(self, name) < 1:
                raise ValueError(f'{name}={getattr(self, name)}: must be at least 1')
        ranges = {'length_penalty': (-10, 10), 'temperature': (0, math.inf), 'top_k': (0, math.inf),
                  'top_p': (1e-9, 1), 'min_p': (0, 1), 'repetition_penalty': (1e-9, math.inf),
                  'seed': (0, 2 ** 63 - 1)}
        for name, (low, high) in ranges.items():
            if not low <= getattr(self, name) <= high:
                raise ValueError(f'{name}={getattr(self, name)}: takes a number between {low:.0f} and {high}')
        if '' in self.stop:
            raise ValueError('stop: an empty text would end every sample at once')
        for text in self.stop:
            typed_text(text, 'stop')
        if not self.start.startswith('FILE:'):
            typed_text(self.start, 'start')
        if self.int8 and self.int4:  # lora
            raise ValueError('int4=True, int8=True: choose one of them')  # lora
        if self.num_beams:  # t5
            from features.t5.beams import check_settings  # t5
            check_settings(self)  # t5


# -----------------------------------------------------------------------------
# Generation

class KVCache:
    """
    Keys and values of up to `size` tokens: two buffers (B, kv_heads, size, D) per layer; keys are rotated. A
    layer with a window keeps its last `window` tokens, token n in slot n % window.
    The buffers never move, and positions are a tensor. So every step of one token has the same shapes and
    addresses: it is compiled once, and a CUDA graph can replay it (idea: gpt-fast).
    """

    def __init__(self, model, size, compile=False):
        self.size, self.compile = size, compile
        self.length = 0  # tokens in the buffers
        self.window, self.local_layers = min(size, model.cfg.window), set(model.cfg.window_layers)
        self.buffers = [None] * model.cfg.n_layer
        self.source = [None] * model.cfg.n_layer  # t5: keys and values of the encoder's output
        self.slots = torch.arange(size, device=next(model.parameters()).device)

    def extend(self, T):
        """Make room for T more tokens. Returns whether a compiled step takes them, which reads all slots."""
        is_static = self.compile and T == 1 and self.length > 0
        self.positions = self.slots[self.length:self.length + T]
        self.length += T
        self.used = self.size if is_static else self.length
        self.mask = None  # the first tokens are causal without one, and a single one sees all in use
        if is_static or 1 < T < self.used:  # (T, used)
            self.mask = self.slots[:self.used] <= self.positions[:, None]
        if self.window:
            self.extend_local(T, is_static)
        return is_static

    def extend_local(self, T, is_static):
        """The same for layers with a window. A single token takes its slot before it looks at them all."""
        window, begin = self.window, self.length - T
        self.local_positions = self.positions[-window:] % window
        self.local_used = min(begin, window)
        self.local_mask = None
        if T == 1:
            self.local_used = window if is_static else min(self.length, window)
            if is_static:
                self.local_mask = self.slots[:window] <= self.positions[:, None]
        elif begin or T > window:  # several see the tokens before them as they were, then themselves
            before = begin - 1 - (begin - 1 - self.slots[:self.local_used]) % window
            self.local_mask = window_mask(self.positions, torch.cat([before, self.positions]), window)

    def update(self, layer, k, v):
        """Store k, v (B, kv_heads, T, D) of a layer after extend(T). Returns all keys and values."""
        if self.buffers[layer] is None:  # zeros: what the mask hides must be finite
            slots = self.window if layer in self.local_layers else self.size
            shape = k.size(0), k.size(1), slots, k.size(3)
            self.buffers[layer] = [k.new_zeros(shape), v.new_zeros(shape)]
            if self.compile:  # a CUDA graph may write only where it knows that the address stays
                for buffer in self.buffers[layer]:
                    torch._dynamo.mark_static_address(buffer, guard=False)
        if layer in self.local_layers:
            return [self.update_local(buffer, new) for buffer, new in zip(self.buffers[layer], (k, v))]
        for buffer, new in zip(self.buffers[layer], (k, v)):
            buffer[:, :, self.positions] = new
        return [buffer[:, :, :self.used] for buffer in self.buffers[layer]]

    def update_local(self, buffer, new):
        before = buffer[:, :, :self.local_used]
        found = before if new.size(2) == 1 else torch.cat([before, new], dim=2)
        buffer[:, :, self.local_positions] = new[:, :, -self.window:]
        return found


class NotFinite(UserError):
    """The model's logits are NaN or infinite, so no token can be sampled."""

    def __init__(self):
        super().__init__(f'the logits are NaN or infinite: {NOT_FINITE}')


@torch.no_grad()
def generate(model, prompts, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0,
             repetition_penalty=1.0, generator=None, eot=None, vocab_size=None, use_cache=True,
             compile=False):
    """
    Yield the next tokens of all rows, (B,) int64, max_new_tokens times; -1 for a row that has ended with
    `eot`, a token or several.
    prompts: B lists of token ids of any length. While a longer prompt is read, its tokens replace the sampled
    ones (no padding, no mask): the row yields -1 until its prompt ends, and then max_new_tokens tokens like
    the others. Only the first vocab_size tokens are sampled: a model may have more than its tokenizer
    (nanoGPT's 50304). When the context is full, its newer half is read again from position 0. So every token
    is computed as in training, also with learned positions, and results with and without cache are the same.
    compile: one compiled graph per token (prompts are read eagerly, in one pass); needs the cache. Raises
    NotFinite if the logits are NaN or infinite.
    """
    T, V, device = model.cfg.block_size, vocab_size or model.cfg.vocab_size, next(model.parameters()).device
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    shortest, longest = int(lengths.min()), int(lengths.max())
    tokens = torch.zeros(len(prompts), longest + max_new_tokens, dtype=torch.long, device=device)
    for row, prompt in enumerate(prompts):
        tokens[row, :len(prompt)] = torch.tensor(prompt, device=device)
    ended = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    ends = None if eot in (None, ()) else torch.tensor(eot, device=device)
    size = min(T, longest + max_new_tokens)
    if compile:  # a step is compiled for every size, and reads all of the cache
        size = min(T, max(256, 2 ** (size - 1).bit_length()))
    cache = KVCache(model, size, compile) if use_cache else None
    start = 0  # of the window that the network reads
    for end in range(shortest, longest + max_new_tokens):
        if end - start > T:  # full: keep half, so that a long text costs one prefill for every T/2 tokens
            start = end - max(1, T // 2)
            if cache is not None:
                cache.length = 0
        logits = next_logits(model, tokens[:, start:end], cache)[:, :V]  # (B, V)
        drawn = draw(logits, tokens[:, :end], temperature, top_k, top_p, min_p, repetition_penalty, generator)
        is_prompt, is_done = end < lengths, end >= lengths + max_new_tokens
        tokens[:, end] = torch.where(is_prompt, tokens[:, end], drawn)
        if ends is not None:
            ended |= ~is_prompt & torch.isin(drawn, ends)
        # waits for the device once
        is_damaged, is_over = torch.stack([(drawn < 0).any(), ended.all()]).tolist()
        if is_damaged:
            raise NotFinite
        yield torch.where(is_prompt | is_done | ended, -1, drawn)
        if is_over:
            return


def next_logits(model, window, cache):
    """Logits (B, vocab_size) after `window` (B, T). Only tokens that are not in the cache are computed."""
    if cache is None:
        return step(model, window, None)
    new = window[:, cache.length:]
    if not cache.extend(new.size(1)):
        return step(model, new, cache)
    from features.compiled import compiled_step
    return compiled_step(step, model, new, cache)


def step(model, idx, cache):
    return model.logits(model.hidden(idx, cache)[:, -1])


def draw(logits, past, temperature, top_k, top_p, min_p, repetition_penalty, generator):
    """
    Next tokens (B,) from logits (B, V) after the tokens past (B, T); greedy if temperature is 0. A row whose
    logits contain NaN or inf gives -1; a token with -inf is never sampled.
    """
    if repetition_penalty != 1:
        seen = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, past, True)
        penalized = torch.where(logits > 0, logits / repetition_penalty, logits * repetition_penalty)
        logits = torch.where(seen, penalized, logits)
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
        p = ordered.softmax(-1)
        likelier = p.cumsum(-1) - p  # probability of all likelier tokens
        cut = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, order, likelier >= top_p)
        logits = logits.masked_fill(cut, -torch.inf)
    # The token with the largest p / Exp(1) is a draw from p; the CPU's noise makes it the same everywhere
    noise = torch.empty(logits.shape).exponential_(generator=generator).to(logits.device)
    highest, tokens = (logits.softmax(-1) / noise).max(-1)
    return torch.where(highest.isnan(), -1, tokens)


# -----------------------------------------------------------------------------
# Tokens → text as it grows

def stream(model, tokenizer, prompts, stop=(), **options):
    """
    Yield (row, text) pieces as soon as they are final: whole characters, up to the first of the strings
    `stop`.
    options: those of generate().
    """
    rows = [Row(tokenizer, prompt, stop) for prompt in prompts]
    for drawn in generate(model, prompts, eot=tokenizer.ends(), vocab_size=tokenizer.vocab_size, **options):
        for n, (row, token) in enumerate(zip(rows, drawn.tolist())):
            if row.alive and token >= 0:
                yield n, row.add(token)
            elif row.alive and row.begun:  # it ended with the end of text, or has all its tokens
                yield n, row.end()
        if not any(row.alive for row in rows):
            return
    for n, row in enumerate(rows):
        if row.alive:
            yield n, row.end()


class Row:
    """
    The text of one row of a batch as it grows, up to the first of the strings `stop`. Adding a token has
    constant cost, because only the last tokens are decoded.
    """
    CONTEXT = 8  # tokens decoded before the new ones, because tokenizers drop a leading space
    UNFINISHED = '\ufffd'  # decoders write it for bytes that are no character, or not yet

    def __init__(self, tokenizer, prompt, stop):
        self.decode = tokenizer.decode
        self.stop = [text for text in stop if text]
        self.alive, self.begun = True, False
        self.new = []  # tokens whose text is not certain yet
        self.held = ''  # characters that may begin a stop string: not shown yet
        if prompt and (prompt[-1] == tokenizer.eot or prompt == list(tokenizer.prompt_format.bos)):
            prompt = []  # a document begins: it has no leading space
        self.go_on_after(prompt)

    def add(self, token):
        """Add a token. Returns the text that is now final."""
        self.begun = True
        self.new.append(token)
        count = len(self.new)
        # the beginning of a character, or bytes that are none
        if self.text_of(count).endswith(self.UNFINISHED):
            if count < self.CONTEXT:
                return ''
            count -= 3  # the last ones may still be the beginning of a character
        text = self.text_of(count)
        self.go_on_after(self.context + self.new[:count])
        self.new = self.new[count:]
        return self.show(text)

    def end(self):
        """Returns the remaining text, when no more tokens follow."""
        text = self.show(self.text_of(len(self.new)), is_last=True)
        self.alive = False
        return text

    def go_on_after(self, tokens):
        """Keep the last CONTEXT tokens, or up to three fewer, so as not to begin inside a character."""
        for count in range(self.CONTEXT, self.CONTEXT - 4, -1):
            self.context = list(tokens[-count:])
            if not self.decode(self.context).startswith(self.UNFINISHED):
                break

    def text_of(self, count):
        """The text of the first `count` new tokens."""
        return self.decode(self.context + self.new[:count])[len(self.decode(self.context)):]

    def show(self, text, is_last=False):
        """Returns the text that is final so far: everything that cannot be the beginning of a stop string."""
        text = self.held + text
        end = len(text)
        for place in range(len(text)):
            rest = text[place:]
            self.alive = not any(rest.startswith(stop) for stop in self.stop)
            may_begin = not is_last and any(stop.startswith(rest) for stop in self.stop)
            if may_begin or not self.alive:
                end = place
                break
        self.held = text[end:]
        return text[:end]


# -----------------------------------------------------------------------------
# Networks and prompts

def load(where, which='best', encoder=False):
    """
    (model in eval mode, its tokenizer) of a checkpoint, of a run's `which` checkpoint, or of hf:FOLDER.
    encoder: whether the caller supports encoder-decoders. Raises UserError.
    """
    from features.networks import is_foreign, load_model, tokenizer_of
    model, folder = load_model(where, which, encoder)
    tokenizer = load_tokenizer(*tokenizer_of(where, folder))
    if tokenizer.ordinary_size() > model.cfg.vocab_size:
        raise UserError(f'{folder}: its tokenizer has {tokenizer.vocab_size} tokens, the network '
                        f'{model.cfg.vocab_size}: they do not belong together')
    if is_foreign(where):  # hf
        from features.hf.prompts import prompt_format  # hf
        return model, tokenizer.with_format(prompt_format(where, model.cfg, tokenizer))  # hf
    return model, tokenizer.with_format(stored_format(checkpoint.load_state(folder), tokenizer))


def stored_format(state, tokenizer):
    """The PromptFormat that a model or an adapter was trained with; state: state.json of its checkpoint."""
    settings = state['settings']
    form = from_json(state.get('prompt', {}), state.get('begin', ()))
    if settings.get('objective', 'causal') != 'causal':  # t5
        from features.t5.sampling import prompt_format  # t5
        own = prompt_format(settings['objective'], settings.get('denoisers'), tokenizer, form.bos)  # t5
        return replace(own, ends=form.ends)  # t5
    return form


def read_text(path):
    """The text of a UTF-8 file without its byte-order mark; line ends are kept. Raises UserError."""
    try:
        with checkpoint.open_regular(path) as f:
            data = f.read(LONGEST + 1)
        if len(data) > LONGEST:
            raise UserError(f'{path}: has more than {LONGEST:,} bytes: give a shorter text')
        return data.decode('utf-8-sig')
    except UnicodeDecodeError as error:
        raise UserError(f'{path}: not a text in UTF-8 (byte {error.start}): convert it') from None


def read_prompt(start):
    """The text of a prompt; FILE:path reads it from a file. Raises UserError for invalid UTF-8."""
    if start == 'FILE:':
        raise UserError('start=FILE:: names no file: write --start=FILE:prompt.txt')
    if start.startswith('FILE:'):
        return read_text(os.path.expanduser(start[5:]))
    return typed_text(start, 'start')


def default_prompt(text, tokenizer):
    """The default prompt `text`; '', the end of text, if the tokenizer cannot encode it."""
    try:
        ids = tokenizer.encode(text)
    except UserError:  # a character that is not in the vocabulary
        return ''
    return '' if tokenizer.unk in ids else text


def encode_prompt(text, tokenizer, cfg):
    """
    The token ids of a prompt: the text with the special tokens around it that the model saw in training. The
    name of a special token in the text, as <|im_end|>, becomes that token. An empty prompt is the end-of-text
    token. Raises UserError for a prompt that is too long.
    """
    form, most, what = tokenizer.prompt_format, cfg.block_size, 'the prompt'
    if cfg.n_encoder_layer:  # t5
        from features.t5.sampling import source_format  # t5
        form, most, what = source_format(tokenizer), cfg.source_limit, 'what the encoder reads'  # t5
    ids = form.add_to(tokenizer.encode_special(text), tokenizer.eot or 0)
    if max(ids) >= cfg.vocab_size:
        name = tokenizer.decode([max(ids)])
        raise UserError(f'start: {name} is beyond the {cfg.vocab_size} tokens of the network: leave it out')
    if len(ids) > most:
        raise UserError(f'start: {what} has {len(ids)} tokens, the context of this model {most}: shorten it')
    return ids


def show_sample(model, s, data, ranks, stop=False, form=None):
    """
    Print one continuation of s.sample_prompt. It uses its own random numbers, so it does not affect training.
    stop: becomes true when it must end. form: as sample_of_training() takes it.
    """
    is_needed = s.sample_tokens and (ranks.first or ranks.lockstep)
    if not is_needed or data.sources[0].files.meta['tokenizer']['kind'] == 'unknown':  # describe() said it
        return
    model.eval()
    try:
        pieces = sample_of_training(model, s, data, ranks, form)
        written = ''.join(takewhile(lambda _: not ranks.any(stop), pieces))
        ranks.say('    | ' + written.strip().replace('\n', '\n    | '))
    except UserError as error:
        ranks.say(f'no sample: {error}')
    model.train()


def sample_of_training(model, s, data, ranks, form=None):
    """
    Yield the prompt from train.py's settings, then the text after it, piece by piece. It uses its own random
    numbers. form: the PromptFormat of the model that the run began with. Raises UserError if no sample can be
    made.
    """
    files = data.sources[0].files
    tokenizer = load_tokenizer(files.meta['tokenizer'], files.folder)
    state = {'begin': data.bos, 'settings': vars(s)}
    if form is not None:
        state['prompt'] = form.as_json()
    tokenizer = tokenizer.with_format(stored_format(state, tokenizer))
    text = typed_text(s.sample_prompt, 'sample_prompt')
    if 'sample_prompt' not in getattr(s, 'given', ()):
        text = default_prompt(text, tokenizer)
    prompts = [encode_prompt(text, tokenizer, model.cfg)]
    if model.cfg.n_encoder_layer:  # t5
        from features.t5.sampling import read_sources  # t5
        model, prompts = read_sources(model, tokenizer, prompts, s.sample_tokens)  # t5
    arrow = ' → ' if tokenizer.prompt_format.suffix else ''  # after a text that is read before another
    yield text.removeprefix(tokenizer.eot_text) + arrow
    # Blocks that are compiled one by one would be compiled for every length of a sample, up to the limit
    # beyond which nothing is compiled any more
    eagerly = torch.compiler.set_stance('force_eager') if s.compile and ranks.lockstep else nullcontext()
    with autocast(ranks.device, s.dtype), eagerly:
        for _, piece in stream(model, tokenizer, prompts, max_new_tokens=s.sample_tokens, temperature=0.8,
                               top_k=200, generator=torch.Generator().manual_seed(s.seed)):
            yield piece


# -----------------------------------------------------------------------------
# On the terminal

def print_samples(text, model, tokenizer, s, generator, compile, adapters=()):
    """
    Sample s.num_samples continuations of `text` as one batch. The first one is printed while it is generated,
    the others after it. adapters: [(name, tokenizer), …]; with several, each makes that many samples.
    """
    prompts = [encode_prompt(text, tokenizer, model.cfg)] * s.num_samples
    texts = [shown_prompt(text, tokenizer, model.cfg)] * s.num_samples
    if len(adapters) > 1:  # lora
        from features.lora.sampling import prompts_of_each  # lora
        prompts, texts = prompts_of_each(adapters, text, model.cfg, s.num_samples)  # lora
    print(texts[0], end='', flush=True)
    if model.cfg.n_encoder_layer:  # t5
        from features.t5.sampling import read_sources  # t5
        model, prompts = read_sources(model, tokenizer, prompts, s.max_new_tokens)  # t5
    if s.num_beams:  # t5
        from features.t5.beams import print_best  # t5
        return print_best(model, tokenizer, prompts[0], s)  # t5
    names = 'max_new_tokens', 'temperature', 'top_k', 'top_p', 'min_p', 'repetition_penalty', 'use_cache'
    options = {name: getattr(s, name) for name in names}
    stop = [typed_text(text, 'stop') for text in s.stop]
    for row, piece in stream(model, tokenizer, prompts, stop, generator=generator, compile=compile,
                             **options):
        texts[row] += piece
        if row == 0:
            print(piece, end='', flush=True)
    for text in texts[1:]:
        print('\n---------------\n' + text, end='', flush=True)
    print('\n---------------', flush=True)


def shown_prompt(text, tokenizer, cfg):
    """The prompt as it is printed before the generated text; '' for the source of an encoder-decoder."""
    if tokenizer.prompt_format.suffix or cfg.n_encoder_layer:
        return ''
    return text.removeprefix(tokenizer.eot_text)


def main():
    s = configure(Settings)
    device = pick_device(s.device)
    if s.init_from == 'resume' and not s.out_dir:
        from features.run_folders import last_run
        s.out_dir = last_run()
    where = s.out_dir if s.init_from == 'resume' else s.init_from
    model, tokenizer = load(where, s.which, encoder=True)
    adapters = []
    if s.adapter:  # lora
        from features.lora.sampling import add_adapters  # lora
        adapters = add_adapters(model, tokenizer, s.adapter, where, merge=True)  # lora
        tokenizer = adapters[0][1]  # lora
    model.to(device)
    is_greedy = s.temperature < GREEDY_BELOW or s.num_beams  # then rounding decides which text it is
    dtype = (pick_exact_dtype if is_greedy and not (s.int8 or s.int4) else pick_dtype)(s.dtype, device)
    compile = s.max_new_tokens >= COMPILE_FROM if s.compile == 'auto' else s.compile
    if s.compile == 'auto' and hasattr(model, 'lora'):  # lora
        compile = False  # lora
    compile = s.use_cache and pick_compile(compile, device)
    precision = autocast(device, dtype)
    if dtype != 'float32' or s.int8 or s.int4 or device.type == 'cpu':  # lora: weights are read faster so
        from features.lora.packed import pack  # lora
        pack(model, dtype, 'int4' if s.int4 else 'int8' if s.int8 else '', eager=not compile)  # lora
        precision = nullcontext()  # lora
    if len(adapters) > 1:  # lora
        from features.lora.sampling import select_adapters  # lora
        select_adapters(model, adapters, s.num_samples)  # lora
    more = model, tokenizer, s, torch.Generator().manual_seed(s.seed), compile, adapters
    try:
        with precision:
            if s.chat:  # chat
                from features.chat.talk import talk  # chat
                return talk(*more)  # chat
            if s.interactive:
                print(f'device: {device}, {dtype}')
                print('a prompt a line, \\n in it is a new line; Ctrl-D ends', flush=True)
                from features.interactive import converse
                return converse(*more)
            text = read_prompt(s.start)
            print_samples(text if 'start' in s.given else default_prompt(text, tokenizer), *more)
            print(f'device: {device}, {dtype}', flush=True)
    except NotFinite as error:
        raise UserError(f'{where}: {error}') from None
    except (RuntimeError, MemoryError) as error:
        from features.sizes import is_out_of_memory
        if not is_out_of_memory(error):
            raise
        raise UserError(f'out of memory: lower num_samples={s.num_samples} or '
                        f'max_new_tokens={s.max_new_tokens}') from None


if __name__ == '__main__':
    sys.modules['sample'] = sys.modules['__main__']  # for features that import this file: not a second copy
    run_main(main, output_is_all=True)
