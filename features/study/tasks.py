"""
Zero- and few-shot tasks: which of some continuations a model finds most likely, and whether it finds a word
by itself. items.py reads the files, likelihoods.py computes the scores.

The rules are those of EleutherAI's lm-evaluation-harness, so that numbers can be compared: where a text is
divided into context and continuation, to which of them a blank belongs, and what is cut off a long context.
test_tasks.py and test_likelihoods.py compare every item with it.
"""
import math
from dataclasses import replace

from configurator import UserError, typed_text
from features.study import task_tables
from features.study.items import file_and_delimiter, read_tasks, with_shots
from features.study.likelihoods import score
from features.study.pictures import figure, write_csv
from features.study.stats import mean_and_error, show_error
from sample import read_text

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


def encode_source(tokenizer, context, continuation):
    """
    (ids that the encoder of an encoder-decoder reads, ids that its decoder writes), two lists. Spaces at the
    end of the context move to the continuation, as in encode_pair(), but each is encoded by itself. The
    special tokens that the model saw around a source in training stand around the context. The name of a
    special token is that token: a task may ask for the text of T5's <extra_id_0>.
    """
    from features.t5.sampling import source_format
    stripped = context.rstrip()
    source = source_format(tokenizer).add_to(tokenizer.encode_special(stripped), tokenizer.eot or 0)
    return source, tokenizer.encode_special(context[len(stripped):] + continuation)


def score_items(model, tokenizer, items, device, dtype, batch_tokens=0, what='scored'):
    """
    [[(log-likelihood, greedy) of every choice] of every Item], as returned by score().
    Raises UserError with the line number for text that the tokenizer cannot encode, and for a choice that has
    no tokens, has more than the model can read, or leaves one token of a longer context.
    """
    encode = encode_source if model.cfg.n_encoder_layer else encode_pair
    pairs = []
    for item in items:
        for before, choice in item.pairs():
            try:
                context, continuation = encode(tokenizer, before, choice)
                check_pair(model.cfg, context, continuation, choice)
            except UserError as error:
                raise UserError(f'{item.where}: {error}') from None
            pairs.append((context, continuation))
    start = 0
    if model.cfg.n_encoder_layer:
        from features.t5.sampling import decoder_start
        start = decoder_start(tokenizer)
    scores = score(model, pairs, device, dtype, batch_tokens, what, start=start)
    out = []
    for item in items:
        out.append(scores[:len(item.choices)])
        scores = scores[len(item.choices):]
    return out


def check_pair(cfg, context, continuation, choice):
    """Raise UserError for the ids of a choice that cannot be scored after the ids of its context."""
    if cfg.n_encoder_layer:
        T = cfg.target_limit
        if not continuation:
            raise UserError(f'{choice!r} has no token: leave it out')
        if max(context + continuation) >= cfg.vocab_size:
            raise UserError(f'{choice!r}, or the text before it, has a special token beyond the '
                            f'{cfg.vocab_size} tokens of the network: leave it out')
    else:
        T = cfg.block_size
        if not continuation:
            raise UserError(f'{choice!r} begins inside a token and has no token of its own after this '
                            'context: give another delimiter')
        if len(continuation) == T and len(context) > 1:
            raise UserError(f'a continuation of {T} tokens: the network reads {T}, which leaves one of the '
                            f'{len(context)} tokens before it: shorten it')
    if len(continuation) > T:
        raise UserError(f'a continuation of {len(continuation)} tokens: the network reads {T}')


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

MEASURES = 'acc', 'acc_norm', 'mass'


def figures(items, scores):
    """
    ({measure: (value, standard error)}, [one record per item]) of a task and the scores of its items. For a
    single item, the error is None.
    """
    records = [record_of(n, item, found) for n, (item, found) in enumerate(zip(items, scores))]
    measures = {}
    for name in MEASURES:
        if all(name in record for record in records):
            measures[name] = mean_and_error([record[name] for record in records])
    if len(scores[0]) == 1:
        mean, error = mean_and_error([-record['nats'] for record in records])
        perplexity = math.exp(min(mean, 700))  # per continuation
        if error is not None:
            error *= perplexity  # by the delta method
        measures['perplexity'] = perplexity, error
    return measures, records


def record_of(n, item, scores):
    """
    The result of item number n, with the scores of its choices, as a dict.
    acc: whether the most likely choice is right; acc_norm: the most likely per character, not for schemas,
    where all choices are the same text; mass: where several choices may be right, their share of the
    probability of all (TruthfulQA's MC2).
    """
    likelihoods = [nats for nats, _ in scores]
    if len(scores) == 1:
        return {'item': n, 'acc': int(scores[0][1]), 'nats': likelihoods[0]}
    best = likelihoods.index(max(likelihoods))
    record = {'item': n, 'acc': int(best in item.right())}
    if len({context for context, _ in item.pairs()}) == 1:
        by_length = [nats / len(choice) for nats, choice in zip(likelihoods, item.choices)]
        record['acc_norm'] = int(by_length.index(max(by_length)) in item.right())
    if isinstance(item.gold, list):
        shares = [math.exp(nats - max(likelihoods)) for nats in likelihoods]
        record['mass'] = sum(shares[number] for number in item.gold) / sum(shares)
    record['chosen'] = best
    record['gold'] = ' '.join(map(str, item.right()))
    record['nats'] = ' '.join(f'{nats:.6f}' for nats in likelihoods)
    return record


def chance(items):
    """The acc of random guessing; None for a task without choices."""
    if len(items[0].choices) == 1:
        return None
    return sum(len(item.right()) / len(item.choices) for item in items) / len(items)


# -----------------------------------------------------------------------------
# The commands

def run(s):
    """python eval.py tasks"""
    loaded = load_tasks(s)
    taken = {file_and_delimiter(given)[0]: 'a task' for given in s.files}
    for name in ('csv', 'table', 'picture'):
        path = getattr(s, name)
        if path and path in taken:
            raise UserError(f'{name}={path}: is {taken[path]}: give another file')
        taken[path] = f'the file of {name}'
    if s.picture:
        figure(1, 1)  # before the work: it says so if matplotlib is missing
    networks = [s] + [replace(s, out_dir=path, adapter='') for path in s.beside]
    names = names_of(networks)
    results = []  # of every network on every task
    for name, network in zip(names, networks):
        results += evaluate(name, network, loaded)
    if len(networks) > 1:
        print('\n' + task_tables.differences(results))
    if s.csv:
        write_csv(task_tables.item_rows(results), s.csv)
        print(f'written: {s.csv}')
    if s.table:
        write_csv(task_tables.rows(results), s.table)
        print(f'written: {s.table}')
    if s.picture:
        task_tables.draw(results, s.picture)
        print(f'drawn: {s.picture}')


def load_tasks(s):
    """{name of a task: its Items} of the settings' files."""
    delimiter = typed_text(s.delimiter, 'delimiter')
    loaded = {}
    for given in s.files:
        path, own = file_and_delimiter(given)
        for name, items in read_tasks(path, delimiter, own).items():
            loaded[f'{path} {name}'.strip()] = with_shots(items, s.shots, s.seed)[:s.limit or None]
    return loaded


def names_of(networks):
    """The names of these settings' networks in tables. Raises UserError for a network that is there twice."""
    names = []
    for network in networks:
        name = network.out_dir + (f' + {network.adapter}' if network.adapter else '')
        if name in names:
            raise UserError(f'beside={network.out_dir}: is evaluated already: give another one')
        names.append(name)
    return names


def evaluate(name, network, loaded):
    """[Result of every task] of a network. Prints a line for each."""
    model, tokenizer, device, dtype = network.load(encoder=True)
    print(f'{name}, {network.shots} examples before each item; ± is the standard error\n')
    labels = task_tables.short_names(loaded)
    width = max(map(len, labels.values()))
    out = []
    for path, items in loaded.items():
        scores = score_items(model, tokenizer, items, device, dtype, what=path)
        measures, records = figures(items, scores)
        result = task_tables.Result(name, path, labels[path], len(items), chance(items), measures, records)
        shown = []
        for measure, (value, error) in measures.items():
            if value < 1e6:
                shown.append(f'{measure} {value:.4f} ± {show_error(error)}')
            else:  # a perplexity that means: nothing like it
                shown.append(f'{measure} {value:.1e}')
        if result.chance is not None:
            shown.append(f'chance {result.chance:.4f}')
        print(f'{labels[path]:{width}}  {len(items):6,} items  {"  ".join(shown)}', flush=True)
        out.append(result)
    return out


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
