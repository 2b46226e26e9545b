"""
Texts that a network writes from a source, compared with those that people wrote: ROUGE (Lin 2004,
aclanthology.org/W04-1013), computed by Google's rouge-score.

    python eval.py summaries --out_dir=out/pairs dev.jsonl

    rougeL       F1 of the longest common subsequence of words, a text as one sequence
    rougeLsum    the same sentence by sentence, where newlines divide a text (T5's tables have this one)
    stripped     rougeL as ROT5 reports it: lower case, letters only, without stop words; words by their
                 stems, where ROT5 has nltk's lemmas

A word is a run of letters, marks and digits of any script, or one character of a script without spaces.
Google's own words are ASCII only: equal Chinese texts score 0 with them, and "é" divides a word. Scores with
Google's words, as in published tables, are printed too where they differ: rougeL_ascii, rougeLsum_ascii.

Of several references the best one counts, as SciTLDR's authors do it.
"""
import os
import re
import unicodedata
from dataclasses import dataclass

from tqdm import tqdm

from configurator import UserError, whole_text
from features.study.items import read_lines
from features.study.pictures import write_csv
from features.study.stats import mean_and_error, show_error
from features.study.validation import validation_sources
from model import autocast
from sample import generate

# English function words, which carry no topic
STOP_WORDS = set('''
a about above after again against all am an and any are aren as at be because been before being below between
both but by can could couldn d did didn do does doesn doing don down during each few for from further had hadn
has hasn have haven having he her here hers herself him himself his how i if in into is isn it its itself just
ll m ma me might mightn more most must mustn my myself need needn no nor not now o of off on once only or
other our ours ourselves out over own re s same shan she should shouldn so some such t than that the their
theirs them themselves then there these they this those through to too under until up ve very was wasn we were
weren what when where which while who whom why will with won would wouldn y you your yours yourself yourselves
'''.split())

# -----------------------------------------------------------------------------
# Pairs

@dataclass
class Pair:
    """A source and its reference texts."""
    source: str
    references: list[str]


def read_pairs(path, source, target, template=''):
    """
    The Pairs of a JSONL file with these two fields; a target is a text or a list of texts. template: a prompt
    template instead of the source, as in prepare.py. Raises UserError with the line number for an invalid
    pair.
    """
    return read_lines(path, lambda row, where: to_pair(row, source, target, template, where))


def to_pair(row, source, target, template, where):
    """The Pair of a line's JSON value. Raises UserError, with `where`, if it is invalid."""
    from features.text.pairs import fill, template_fields
    sources = template_fields(template) if template else [source]
    setting = 'prompt_template' if template else 'source'
    for key, name in [(key, setting) for key in sources] + [(target, 'target')]:
        if not isinstance(row, dict):
            raise UserError(f'{where}: no field {key}: set --{name}')
        if key not in row:
            raise UserError(f'{where}: no field {key}; it has {", ".join(row)}: set --{name}')
    if template:
        row = row | {key: '' for key in sources if row[key] is None}  # null is empty, as in prepare.py
    references = row[target] if isinstance(row[target], list) else [row[target]]
    texts = [row[key] for key in sources] + references
    if not references or not all(isinstance(text, str) for text in texts):
        raise UserError(f'{where}: {" and ".join(sources)} takes a text, {target} a text or a list of them')
    text = fill(template, row) if template else row[source]
    return Pair(whole_text(text, where), [whole_text(reference, where) for reference in references])


def stored_pairs(files, tokenizer):
    """
    The Pairs of a split made by prepare.py (batches.TokenFiles), decoded from their tokens. Raises UserError
    if it contains no pairs.
    """
    if not files.meta.get('pairs'):
        raise UserError(f'files: none is given, and {files.folder} has no pairs: '
                        'python eval.py summaries --out_dir=DIR FILE.jsonl')
    pairs = []
    for number in range(files.documents):
        begin, end = files.document(number)
        ids = files.read(begin, end - begin).tolist()
        cut = ids.index(tokenizer.eot)
        pairs.append(Pair(tokenizer.decode(ids[:cut]), [tokenizer.decode(ids[cut + 1:-1])]))
    return pairs


# -----------------------------------------------------------------------------
# Writing

def write(model, tokenizer, sources, max_new_tokens, num_beams, batch_size, device, dtype, what='written'):
    """
    [text] that the model generates for each of `sources`: greedily, or by beam search. The longest sources
    come first, so that the rows of a batch have similar lengths.
    A source that is too long is truncated at its end, and a line reports how many were. Raises UserError if
    max_new_tokens leaves a decoder less room for a source than in training (objectives.py): half of its
    context.
    """
    from features.t5.beams import beam_search
    from features.t5.sampling import read_sources
    from features.text.cuts import Cuts
    T = model.cfg.block_size
    room = T - max_new_tokens  # for the source
    if model.cfg.n_encoder_layer:
        room = model.cfg.source_limit
    cuts = Cuts('sources')
    rows = [(n, encode_source(source, tokenizer, model.cfg, room, cuts)) for n, source in enumerate(sources)]
    if cuts.cut and not model.cfg.n_encoder_layer and max_new_tokens > T // 2:
        raise UserError(f'max_new_tokens={max_new_tokens}: leaves {room} of the {T} tokens that the network '
                        f'reads: {cuts.line()}: lower it to {T // 2} or less')
    if cuts.cut:
        print(f'{what}: {cuts.line()}', flush=True)
    rows.sort(key=lambda row: -len(row[1]))
    out = [''] * len(rows)
    size = 1 if num_beams else batch_size
    with tqdm(total=len(rows), desc=what, disable=None, leave=False) as bar, autocast(device, dtype):
        for i in range(0, len(rows), size):
            batch = rows[i:i + size]
            network = model
            prompts = [ids for _, ids in batch]
            if model.cfg.n_encoder_layer:
                network, prompts = read_sources(model, tokenizer, prompts, max_new_tokens)
            if num_beams:
                written = [beam_search(network, prompts[0], max_new_tokens, num_beams, 1.0, tokenizer.ends(),
                                       tokenizer.vocab_size)]
            else:
                steps = generate(network, prompts, max_new_tokens, temperature=0, eot=tokenizer.ends(),
                                 vocab_size=tokenizer.vocab_size)
                written = zip(*(tokens.tolist() for tokens in steps))  # a step is a token of every row
            for (n, _), ids in zip(batch, written):
                text = tokenizer.decode([i for i in ids if i >= 0 and i not in tokenizer.ends()])
                out[n] = text.strip()
            bar.update(len(batch))
    return out


def encode_source(text, tokenizer, cfg, room, cuts):
    """
    The ids of a source with the special tokens that the model saw in training. A source of more than `room`
    tokens is truncated at its end; cuts (a Cuts) counts it.
    """
    from features.t5.sampling import source_format
    form = source_format(tokenizer) if cfg.n_encoder_layer else tokenizer.prompt_format
    ids = tokenizer.encode(text)
    eot = tokenizer.eot or 0
    whole = form.add_to(ids, eot)
    cuts.add(len(whole), room)
    if len(whole) <= room:
        return whole
    around = len(whole) - len(ids)
    return form.add_to(ids[:max(0, room - around)], eot)


# -----------------------------------------------------------------------------
# Scoring

def strip(text):
    """The words of a text without stop words, in lower case, joined by spaces."""
    words = re.findall(r'[a-z]+', text.lower())
    return ' '.join(word for word in words if word not in STOP_WORDS)


class Words:
    """The tokenizer of a RougeScorer: the words of a text of any script, in lower case."""
    # scripts that put no spaces between words, by the names of their characters
    WITHOUT_SPACES = ('CJK', 'HIRAGANA', 'KATAKANA', 'THAI', 'LAO', 'KHMER', 'MYANMAR')

    def tokenize(self, text):
        words, is_open = [], False  # is_open: whether the next letter belongs to the last word
        for character in unicodedata.normalize('NFC', text.lower()):
            kind = unicodedata.category(character)[0]
            if kind not in 'LMN':  # letters, marks, numbers
                is_open = False
            elif unicodedata.name(character, '').startswith(self.WITHOUT_SPACES) and kind != 'M':
                words.append(character)
                is_open = False
            elif is_open or words and kind == 'M':
                words[-1] += character
            else:
                words.append(character)
                is_open = True
        return words


def scorer(stripped=False):
    """
    A function of a text and its references that returns {'rougeL', 'rougeLsum', 'rougeL_ascii',
    'rougeLsum_ascii'} for the best reference, F1 from 0 to 1, and 'stripped' if requested. Raises UserError
    if rouge-score is not installed.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise UserError('summaries: needs rouge-score: pip install rouge-score') from None
    kinds = {'': RougeScorer(['rougeL', 'rougeLsum'], tokenizer=Words()),
             '_ascii': RougeScorer(['rougeL', 'rougeLsum'])}
    stems = RougeScorer(['rougeL'], use_stemmer=True)

    def score(text, references):
        found = {}
        for suffix, kind in kinds.items():
            scores = [kind.score(reference, text) for reference in references]
            for name in ('rougeL', 'rougeLsum'):
                found[name + suffix] = max(score[name].fmeasure for score in scores)
        if stripped:
            scores = [stems.score(strip(reference), strip(text)) for reference in references]
            found['stripped'] = max(score['rougeL'].fmeasure for score in scores)
        return found
    return score


# -----------------------------------------------------------------------------
# The command

def run(s):
    """python eval.py summaries"""
    if s.csv in s.files:
        raise UserError(f'csv={s.csv}: is a file of pairs: give another')
    score = scorer(s.stripped)  # first: it says so if rouge-score is missing
    loaded = {path: read_pairs(path, s.source, s.target, s.prompt_template) for path in s.files}
    model, tokenizer, device, dtype = s.load(encoder=True)
    if not loaded:
        for source in validation_sources(s.out_dir, model.cfg):
            loaded[source.files.folder] = stored_pairs(source.files, tokenizer)
    most = model.cfg.target_limit if model.cfg.n_encoder_layer else model.cfg.block_size
    if s.max_new_tokens >= most:
        raise UserError(f'max_new_tokens={s.max_new_tokens}: the network writes up to {most - 1}: lower it')
    rows = []
    for path, pairs in loaded.items():
        pairs = pairs[:s.limit or None]
        sources = [pair.source for pair in pairs]
        texts = write(model, tokenizer, sources, s.max_new_tokens, s.num_beams, s.batch_size, device, dtype,
                      path)
        scores = [score(text, pair.references) for text, pair in zip(texts, pairs)]
        for pair, text in list(zip(pairs, texts))[:s.show]:
            print(f'source     {" ".join(pair.source.split())[:300]}')
            print(f'reference  {pair.references[0]}')
            print(f'written    {text}\n')
        is_ascii = all(found[name] == found[f'{name}_ascii']
                       for found in scores for name in ('rougeL', 'rougeLsum'))
        measures = []
        for name in scores[0]:
            if is_ascii and name.endswith('_ascii'):
                continue
            mean, error = mean_and_error([100 * found[name] for found in scores])
            measures.append(f'{name} {mean:.2f} ± {show_error(error, 2)}')
        print(f'{os.path.basename(path)}  {len(pairs):,} texts  {"  ".join(measures)}', flush=True)
        for n, (pair, text, found) in enumerate(zip(pairs, texts, scores)):
            rows.append({'file': path, 'item': n, 'written': text, 'reference': pair.references[0],
                         'source': pair.source} | found)
    if s.csv:
        write_csv(rows, s.csv)
        print(f'written: {s.csv}')
