"""
Zero- and few-shot tasks: which of some continuations a model finds most likely, and whether it finds a word
by itself.

A task is a JSONL file, an item per line, in one of three common shapes:

    {"query": "Question: …", "choices": ["…", "…"], "gold": 0}     acc: the choice with the highest
                                                                   log-likelihood; acc_norm: with the highest
                                                                   one per character
    {"sentence_good": "…", "sentence_bad": "…"}                    the same of two whole sentences (BLiMP)
    {"context": "…", "continuation": "…"}                          acc: does greedy decoding write the
                                                                   continuation (LAMBADA); perplexity of it

The rules are those of EleutherAI's lm-evaluation-harness, so that numbers can be compared: where a text is
divided into context and continuation, to which of them a blank belongs, and what is cut off a long context.
test_tasks.py compares every item with it.
"""
import json
import math
import os
import random
from dataclasses import dataclass, replace

from configurator import UserError, typed_text, whole_text
from features.study.likelihoods import score
from features.study.pictures import write_csv
from features.study.stats import mean_and_error, show_error
from sample import read_text

# -----------------------------------------------------------------------------
# Items

@dataclass
class Item:
    """
    One line of a task: which of `choices` follows `context`; with a single choice, whether the model
    generates it.
    """
    context: str
    choices: list[str]
    gold: int
    where: str = ''  # file:line


def read_lines(path, convert):
    """
    [convert(JSON value, 'path:number')] of the lines of a JSONL file; only a newline ends a line. Raises
    UserError with the line number for invalid JSON, and for an empty file.
    """
    out = []
    try:
        with open(path, encoding='utf-8', newline='\n') as f:
            for number, line in enumerate(f, 1):
                line = line.removeprefix('\ufeff')  # some editors begin a file with a byte-order mark
                if line.strip():
                    where = f'{path}:{number}'
                    out.append(convert(parse(line, where), where))
    except OSError as error:
        raise UserError(f'{path}: {error.strerror}') from None
    except UnicodeDecodeError:
        raise UserError(f'{path}: not a text in UTF-8: convert it') from None
    if not out:
        raise UserError(f'{path}: no items in it')
    return out


def parse(line, where):
    """The value of a line of JSON. Raises UserError, with `where`, if it is invalid."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f'{where}: not readable as JSON: {error}') from None


def read_items(path, delimiter=' '):
    """
    The Items of a JSONL file; `delimiter` is put between a query and its choices. Raises UserError with the
    line number for an invalid item.
    """
    items = read_lines(path, lambda fields, where: to_item(fields, delimiter, where))
    with_choices = [len(item.choices) > 1 for item in items]
    if any(with_choices) and not all(with_choices):
        raise UserError(f'{path}: holds items with choices and items without: make two files of it')
    return items


def to_item(fields, delimiter, where):
    """The Item of a line's JSON value. Raises UserError, with `where`, if it is invalid."""
    keys = fields.keys() if isinstance(fields, dict) else set()
    gold = 0
    if {'query', 'choices', 'gold'} <= keys:
        context = fields['query']
        choices = fields['choices']
        gold = fields['gold']
        if not isinstance(choices, list) or len(choices) < 2:
            raise UserError(f'{where}: choices: takes a list of two or more')
        if type(gold) is not int or not 0 <= gold < len(choices):
            raise UserError(f'{where}: gold={gold!r}: takes the number of a choice, from 0')
    elif {'sentence_good', 'sentence_bad'} <= keys:
        context = ''
        choices = [fields['sentence_good'], fields['sentence_bad']]
        delimiter = ''
    elif {'context', 'continuation'} <= keys:
        context = fields['context']
        choices = [fields['continuation']]
    else:
        raise UserError(f'{where}: takes an object with query, choices and gold, '
                        'with sentence_good and sentence_bad, or with context and continuation')
    for text in (context, *choices):
        if not isinstance(text, str):
            raise UserError(f'{where}: {text!r}: takes text')
        whole_text(text, where)
    if not all(choices):
        raise UserError(f'{where}: a choice or continuation is empty')
    return Item(context + delimiter, choices, gold, where)


def with_shots(items, shots, seed=0):
    """
    The items, each after `shots` solved examples: other items of the file, chosen at random by (seed, number
    of the item). Raises UserError if the file has too few.
    """
    if not shots:
        return items
    if shots >= len(items):
        raise UserError(f'shots={shots}: the task has {len(items)} items: lower it')
    out = []
    for n, item in enumerate(items):
        examples = ''
        for number in random.Random(f'{seed} {n}').sample(range(len(items) - 1), shots):
            if number >= n:
                number += 1  # the item itself is left out
            other = items[number]
            examples += f'{other.context}{other.choices[other.gold]}\n\n'
        out.append(replace(item, context=examples + item.context))
    return out


# -----------------------------------------------------------------------------
# Log-likelihoods

def first_ids(tokenizer, ids=()):
    """
    The ids that a model reads to predict the text after these ids: at least one. Of nothing that is the
    bos_token that the model's folder names, as in lm-eval, else the end-of-text token.
    """
    form = tokenizer.prompt_format
    before = [*form.bos, *ids]
    if before:
        return before
    bos = dict(form.names).get('bos_token')
    return [tokenizer.special_tokens().get(bos, tokenizer.eot or 0)]


def encode_pair(tokenizer, context, continuation):
    """
    (ids of the context, ids of the continuation), two lists.
    Spaces at the end of the context move to the continuation, because tokens begin with them. The two are
    encoded as one text, which is split where the context alone ends. A context begins with the start token if
    the model was trained with one; otherwise an empty context is the end-of-text token.
    """
    stripped = context.rstrip()
    continuation = context[len(stripped):] + continuation
    start = tokenizer.encode(stripped)
    whole = tokenizer.encode(stripped + continuation)
    return first_ids(tokenizer, start), whole[len(start):]


def score_items(model, tokenizer, items, device, dtype, batch_tokens=0, what='scored'):
    """
    [[(log-likelihood, greedy) of every choice] of every Item], as returned by score().
    Raises UserError with the line number for text that the tokenizer cannot encode, and for a choice that has
    no tokens, has more than the model can read, or leaves one token of a longer context.
    """
    T = model.cfg.block_size
    pairs = []
    for item in items:
        for choice in item.choices:
            try:
                context, continuation = encode_pair(tokenizer, item.context, choice)
            except UserError as error:
                raise UserError(f'{item.where}: {error}') from None
            if not continuation:
                raise UserError(f'{item.where}: {choice!r} begins inside a token and has no token of its own '
                                'after this context: give another delimiter')
            if len(continuation) > T:
                raise UserError(f'{item.where}: a continuation of {len(continuation)} tokens: '
                                f'the network reads {T}')
            if len(continuation) == T and len(context) > 1:
                raise UserError(f'{item.where}: a continuation of {T} tokens: the network reads {T}, which '
                                f'leaves one of the {len(context)} tokens before it: shorten it')
            pairs.append((context, continuation))
    scores = score(model, pairs, device, dtype, batch_tokens, what)
    out = []
    for item in items:
        out.append(scores[:len(item.choices)])
        scores = scores[len(item.choices):]
    return out


# -----------------------------------------------------------------------------
# Texts

def windows(ids, first, T, stride):
    """
    Yield (context, continuation) so that every token of a text is in one continuation: T tokens after the
    token `first`, then `stride` at a time, each with as many tokens before them as fit into a context of T.
    """
    if ids:
        yield [first], ids[:T]
    for start in range(T, len(ids), stride):
        end = min(len(ids), start + stride)
        yield ids[max(0, end - T - 1):start], ids[start:end]


def score_text(model, tokenizer, text, stride, device, dtype, what='scored', rolling=False):
    """
    (nats, tokens, UTF-8 bytes) of a text. Each token is predicted from all previous tokens that fit, except
    for at most `stride` of them.
    rolling: as lm-eval's loglikelihood_rolling. The windows do not overlap, and a start token that the
    tokenizer writes before a text is predicted too, from another one: 10 nats more for some models.
    Raises UserError for a text that the tokenizer cannot encode.
    """
    from features.text.pieces import encode_long
    try:
        ids = encode_long(tokenizer, text)
    except UserError as error:  # a character that is not in the vocabulary
        raise UserError(f'{what}: {error}') from None
    first = first_ids(tokenizer)[0]
    T = model.cfg.block_size
    if rolling:
        ids = [*tokenizer.prompt_format.bos, *ids]
        stride = T
    scores = score(model, windows(ids, first, T, stride), device, dtype, what=what)
    return -sum(nats for nats, _ in scores), len(ids), len(text.encode())


# -----------------------------------------------------------------------------
# Figures

def figures(items, scores):
    """
    ({measure: (value, standard error)}, [one record per item]) of a task and the scores of its items. For a
    single item, the error is None.
    """
    records = [record_of(n, item, found) for n, (item, found) in enumerate(zip(items, scores))]
    measures = {}
    for name in ('acc', 'acc_norm'):
        if name in records[0]:
            measures[name] = mean_and_error([record[name] for record in records])
    if len(scores[0]) == 1:
        mean, error = mean_and_error([-record['nats'] for record in records])
        perplexity = math.exp(min(mean, 700))  # per continuation
        if error is not None:
            error *= perplexity  # by the delta method
        measures['perplexity'] = perplexity, error
    return measures, records


def record_of(n, item, scores):
    """The result of item number n, with the scores of its choices, as a dict."""
    likelihoods = [nats for nats, _ in scores]
    if len(scores) == 1:
        return {'item': n, 'acc': int(scores[0][1]), 'nats': likelihoods[0]}
    by_length = [nats / len(choice) for nats, choice in zip(likelihoods, item.choices)]
    best = likelihoods.index(max(likelihoods))
    best_by_length = by_length.index(max(by_length))
    return {
        'item': n,
        'acc': int(best == item.gold),
        'acc_norm': int(best_by_length == item.gold),
        'chosen': best,
        'gold': item.gold,
        'nats': ' '.join(f'{nats:.6f}' for nats in likelihoods),
    }


# -----------------------------------------------------------------------------
# The commands

def run(s):
    """python eval.py tasks"""
    if s.csv in s.files:
        raise UserError(f'csv={s.csv}: is a task: give another file')
    delimiter = typed_text(s.delimiter, 'delimiter')
    loaded = {}
    for path in s.files:
        items = with_shots(read_items(path, delimiter), s.shots, s.seed)
        loaded[path] = items[:s.limit or None]
    model, tokenizer, device, dtype = s.load()
    width = max(len(os.path.basename(path)) for path in s.files)
    rows = []
    print(f'{s.out_dir}, {s.shots} examples before each item; ± is the standard error\n')
    for path, items in loaded.items():
        measures, records = figures(items, score_items(model, tokenizer, items, device, dtype, what=path))
        shown = [f'{name} {value:.4f} ± {show_error(error)}' for name, (value, error) in measures.items()]
        print(f'{os.path.basename(path):{width}}  {len(items):6,} items  {"  ".join(shown)}', flush=True)
        for record in records:
            empty = dict.fromkeys(('acc', 'acc_norm', 'chosen', 'gold', 'nats'), '')
            rows.append({'task': path} | empty | record)
    if s.csv:
        write_csv(rows, s.csv)
        print(f'written: {s.csv}')


def run_text(s):
    """python eval.py text"""
    texts = {path: read_text(path) for path in s.files}
    for path, text in texts.items():
        if not text:
            raise UserError(f'{path}: is empty')
    model, tokenizer, device, dtype = s.load()
    T = model.cfg.block_size
    stride = s.stride or max(1, T // 2)
    if stride > T:
        raise UserError(f'stride={stride}: the network reads {T} tokens: lower it')
    for path, text in texts.items():
        nats, tokens, size = score_text(model, tokenizer, text, stride, device, dtype, path, s.rolling)
        loss = nats / tokens
        print(f'{path}: {tokens:,} tokens, {size:,} bytes: {loss:.4f} nats a token, '
              f'perplexity {math.exp(min(700, loss)):.2f}, {nats / math.log(2) / size:.4f} bits per byte')
