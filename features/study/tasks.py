"""
Zero- and few-shot tasks: which of some continuations does a model find likeliest, and does it find a word by itself.

A task is a JSONL file, an item a line, in one of three common shapes:

    {"query": "Question: …", "choices": ["…", "…"], "gold": 0}     which choice: acc by log-likelihood, acc_norm by log-likelihood a character
    {"sentence_good": "…", "sentence_bad": "…"}                    the same of two whole sentences (BLiMP)
    {"context": "…", "continuation": "…"}                          acc: is the continuation what greedy decoding writes (LAMBADA); perplexity of it

The rules are those of EleutherAI's lm-evaluation-harness, so that the numbers can be compared: where a text is parted, whose blank it is, what
of a long context is cut. test_tasks.py holds item by item against it.
"""
import json
import math
import random
from dataclasses import dataclass, replace

import torch
from tqdm import tqdm

from configurator import UserError, whole_text
from device import NOT_FINITE, autocast
from features.text.cuts import Cuts
from features.text.pieces import encode_long

# -----------------------------------------------------------------------------
# Items

@dataclass
class Item:
    """One line of a task: what of `choices` follows `context`; a single choice is to be written by itself."""
    context: str
    choices: list[str]
    gold: int
    where: str = ''  # file:line


def read_lines(path, convert):
    """
    [convert(JSON value, 'path:number')] of the lines of a JSONL file; only a newline ends a line. Raises
    UserError, with the line, for what is no JSON, and for an empty file.
    """
    out = []
    try:
        with open(path, encoding='utf-8', newline='\n') as f:
            for number, line in enumerate(f, 1):
                line = line.removeprefix('\ufeff')  # some editors begin a file with a byte-order mark
                if line.strip():
                    out.append(convert(parse(line, f'{path}:{number}'), f'{path}:{number}'))
    except OSError as error:
        raise UserError(f'{path}: {error.strerror}') from None
    except UnicodeDecodeError:
        raise UserError(f'{path}: not a text in UTF-8: convert it') from None
    if not out:
        raise UserError(f'{path}: no items in it')
    return out


def parse(line, where):
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f'{where}: not readable as JSON: {error}') from None


def read_items(path, delimiter=' '):
    """The Items of a JSONL file; `delimiter` parts a query from its choices. Raises UserError, with the line, for whatever is none."""
    items = read_lines(path, lambda fields, where: to_item(fields, delimiter, where))
    if len({len(item.choices) == 1 for item in items}) > 1:
        raise UserError(f'{path}: holds items with choices and items without: make two files of it')
    return items


def to_item(fields, delimiter, where):
    keys = fields.keys() if isinstance(fields, dict) else set()
    if {'query', 'choices', 'gold'} <= keys:
        context, choices, gold = fields['query'], fields['choices'], fields['gold']
        if not isinstance(choices, list) or len(choices) < 2:
            raise UserError(f'{where}: choices: takes a list of two or more')
        if type(gold) is not int or not 0 <= gold < len(choices):
            raise UserError(f'{where}: gold={gold!r}: takes the number of a choice, from 0')
    elif {'sentence_good', 'sentence_bad'} <= keys:
        context, choices, gold, delimiter = '', [fields['sentence_good'], fields['sentence_bad']], 0, ''
    elif {'context', 'continuation'} <= keys:
        context, choices, gold = fields['context'], [fields['continuation']], 0
    else:
        raise UserError(f'{where}: takes an object with query, choices and gold, with sentence_good and sentence_bad, or with context and continuation')
    for text in (context, *choices):
        if not isinstance(text, str):
            raise UserError(f'{where}: {text!r}: takes text')
        whole_text(text, where)
    if not all(choices):
        raise UserError(f'{where}: a choice or continuation is empty')
    return Item(context + delimiter, choices, gold, where)


def with_shots(items, shots, seed=0):
    """The items, each after `shots` others of the file with their answers, drawn by (seed, its number). Raises UserError if there are too few."""
    if not shots:
        return items
    if shots >= len(items):
        raise UserError(f'shots={shots}: the task has {len(items)} items: lower it')
    out = []
    for n, item in enumerate(items):
        others = random.Random(f'{seed} {n}').sample(range(len(items) - 1), shots)
        shown = [items[other + (other >= n)] for other in others]
        examples = ''.join(f'{other.context}{other.choices[other.gold]}\n\n' for other in shown)
        out.append(replace(item, context=examples + item.context))
    return out


# -----------------------------------------------------------------------------
# Log-likelihoods

def encode_pair(tokenizer, context, continuation):
    """
    (ids of the context, of the continuation). Blanks at the context's end belong to the continuation, as tokens begin with them; the two are encoded
    as one text, and parted where the context by itself ends. A context begins with the start token, if the
    network was trained with one; else an empty one is the end of the text before.
    """
    kept = context.rstrip()
    continuation, context = context[len(kept):] + continuation, kept
    whole, start = tokenizer.encode(context + continuation), tokenizer.encode(context)
    return tokenizer.context(start), whole[len(start):]


CONTEXTS = 'contexts (one for each choice)'  # how score() calls what it cuts
BATCH_TOKENS = {'cpu': 1024, 'cuda': 8192}  # of a batch: on a CPU what its caches hold of the activations, a tenth faster than 8192


@torch.no_grad()
def score(model, pairs, device, dtype, batch_tokens=0, what='scored', cuts=None):
    """
    [(log-likelihood of the continuation in nats, whether greedy decoding would write it)] of pairs (ids of a context, ids of what follows), in
    their order. The longest go first, those of about one length together; only what is asked for passes
    through the head.

    A context that is too long loses its beginning. cuts: the Cuts that counts them, for a caller that says
    it; without one, a line says it here.

    Raises UserError for a continuation that is longer than the context of the network, and for a network
    whose answer is not finite.
    """
    T, rows, batch_tokens = model.cfg.block_size, [], batch_tokens or BATCH_TOKENS.get(device.type, 8192)
    own = Cuts(CONTEXTS) if cuts is None else cuts
    for n, (context, continuation) in enumerate(pairs):
        if len(continuation) > T:
            raise UserError(f'a continuation of {len(continuation)} tokens is longer than the {T} that the network reads')
        own.add(len(context), T + 1 - len(continuation))
        rows.append((n, (context + continuation)[-T - 1:], len(continuation)))
    rows.sort(key=lambda row: (-len(row[1]), row[1]))
    out = [None] * len(rows)
    with tqdm(total=len(rows), desc=what, disable=None, leave=False) as bar:
        while rows:
            width = len(rows[0][1]) - 1
            count = max(1, batch_tokens // max(1, width))
            batch, rows = rows[:count], rows[count:]
            for (n, *_), result in zip(batch, score_batch(model, batch, width, device, dtype)):
                out[n] = result
                if not math.isfinite(result[0]):
                    raise UserError(f'{what}: the log-likelihood of item {n} is {result[0]}: {NOT_FINITE}')
            bar.update(len(batch))
    if own.cut and cuts is None:
        print(f'{what}: the network reads {T} tokens: {own.line()}', flush=True)
    return out


def score_batch(model, batch, width, device, dtype):
    x = torch.zeros(len(batch), width, dtype=torch.int64)
    for row, (_, ids, _) in zip(x, batch):
        row[:len(ids) - 1] = torch.tensor(ids[:-1])
    asked = torch.zeros(len(batch), width, dtype=torch.bool)  # positions whose next token is one of the continuation
    for row, (_, ids, length) in zip(asked, batch):
        row[len(ids) - 1 - length:len(ids) - 1] = True
    targets = torch.tensor([token for _, ids, length in batch for token in ids[len(ids) - length:]]).to(device)
    with autocast(device, dtype):
        logits = model.logits(model.hidden(x.to(device))[asked.to(device)])  # (all asked, V)
    nats = -torch.nn.functional.cross_entropy(logits, targets, reduction='none')
    greedy, lengths = logits.argmax(-1) == targets, [length for *_, length in batch]
    return [(part.double().sum().item(), bool(hits.all())) for part, hits in zip(nats.split(lengths), greedy.split(lengths))]


def score_items(model, tokenizer, items, device, dtype, batch_tokens=0, what='scored'):
    """
    [[(log-likelihood, greedy) of every choice] of every Item].

    Raises UserError, with the line, for text that the tokenizer cannot write, and for a choice that has no
    tokens, has more than the network reads, or leaves one token of a longer context.
    """
    T, pairs = model.cfg.block_size, []
    for item in items:
        for choice in item.choices:
            try:
                context, continuation = encode_pair(tokenizer, item.context, choice)
            except UserError as error:
                raise UserError(f'{item.where}: {error}') from None
            pairs.append((context, continuation))
            if not continuation:
                raise UserError(f'{item.where}: {choice!r} begins inside a token and has none of its own after this context: give another delimiter')
            if len(continuation) > T:
                raise UserError(f'{item.where}: a continuation of {len(continuation)} tokens: '
                                f'the network reads {T}')
            if len(continuation) == T and len(context) > 1:
                raise UserError(f'{item.where}: a continuation of {T} tokens: the network reads {T}, which '
                                f'leaves one of the {len(context)} tokens before it: shorten it')
    found = iter(score(model, pairs, device, dtype, batch_tokens, what))
    return [[next(found) for _ in item.choices] for item in items]


def windows(ids, first, T, stride):
    """
    Yields (context, continuation) so that every token of a text is in one continuation: T after the token `first`, then `stride` at a time, each with as
    many tokens before them as a network that reads T has room for.
    """
    start = 0
    while start < len(ids):
        end = min(len(ids), start + (stride if start else T))
        yield (ids[max(0, end - T - 1):start] if start else [first]), ids[start:end]
        start = end


def score_text(model, tokenizer, text, stride, device, dtype, what='scored'):
    """(nats, tokens, bytes in UTF-8) of a text, each token given all the tokens that fit before it but for `stride` of them at most."""
    try:
        ids = encode_long(tokenizer, text)
    except UserError as error:  # a character that is not in the vocabulary
        raise UserError(f'{what}: {error}') from None
    pairs = windows(ids, tokenizer.context()[0], model.cfg.block_size, stride)
    found = score(model, pairs, device, dtype, what=what)
    return -sum(nats for nats, _ in found), len(ids), len(text.encode())


# -----------------------------------------------------------------------------
# Figures

def mean_and_error(values):
    """(mean, its standard error, None of a single value)."""
    n, mean = len(values), sum(values) / len(values)
    if n == 1:
        return mean, None
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n)


def show_error(error, digits=4):
    """A standard error as text; n/a: a single value has none."""
    return 'n/a' if error is None else f'{error:.{digits}f}'


def figures(items, scores):
    """({measure: (value, standard error)}, a record for each item) of a task; the error of a single item is None."""
    records = []
    for n, (item, found) in enumerate(zip(items, scores)):
        likelihoods = [nats for nats, _ in found]
        if len(found) == 1:
            records.append({'item': n, 'acc': int(found[0][1]), 'nats': likelihoods[0]})
        else:
            by_length = [nats / len(choice) for nats, choice in zip(likelihoods, item.choices)]
            best, best_by_length = (max(range(len(found)), key=values.__getitem__) for values in (likelihoods, by_length))
            records.append({'item': n, 'acc': int(best == item.gold), 'acc_norm': int(best_by_length == item.gold), 'chosen': best, 'gold': item.gold,
                            'nats': ' '.join(f'{nats:.6f}' for nats in likelihoods)})
    measures = {name: mean_and_error([r[name] for r in records]) for name in ('acc', 'acc_norm') if name in records[0]}
    if len(scores[0]) == 1:
        mean, error = mean_and_error([-r['nats'] for r in records])
        perplexity = math.exp(min(mean, 700))  # of a word
        measures['perplexity'] = perplexity, None if error is None else perplexity * error  # by the delta method
    return measures, records
