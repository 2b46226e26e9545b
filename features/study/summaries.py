"""
Texts that a network writes from a source, held against those that people wrote: ROUGE (Lin 2004, aclanthology.org/W04-1013), by Google's rouge-score.

    rougeL       F1 of the longest common subsequence of words, a text as one sequence
    rougeLsum    the same sentence by sentence, of which newlines part a text (the one that T5's tables have)
    stripped     rougeL as ROT5 reports it: lower case, letters alone, without stop-words; words by their stems, where ROT5 has lemmas of nltk's

Of several references the best one counts, as SciTLDR's authors do.
"""
import re
from dataclasses import dataclass

from tqdm import tqdm

from configurator import UserError, whole_text
from device import autocast
from features.study.tasks import read_lines
from features.text.cuts import Cuts
from features.text.sources import fill, template_fields
from sample import beam_search, encode_prompt, generate

# English function words: what carries no topic
STOP_WORDS = set('''a about above after again against all am an and any are aren as at be because been before being below between both but by can could couldn d
did didn do does doesn doing don down during each few for from further had hadn has hasn have haven having he her here hers herself him himself his how i if
in into is isn it its itself just ll m ma me might mightn more most must mustn my myself need needn no nor not now o of off on once only or other our ours
ourselves out over own re s same shan she should shouldn so some such t than that the their theirs them themselves then there these they this those through
to too under until up ve very was wasn we were weren what when where which while who whom why will with won would wouldn y you your yours yourself
yourselves'''.split())


@dataclass
class Pair:
    """One line of a file of pairs."""
    source: str
    references: list[str]


def read_pairs(path, source, target, template=''):
    """
    The Pairs of a JSONL file with these two fields, or with a prompt template in place of the source, as prepare.py takes it; the target is a text or
    a list of them. Raises UserError, with the line, for whatever is none.
    """
    return read_lines(path, lambda row, where: to_pair(row, source, target, template, where))


def to_pair(row, source, target, template, where):
    read = [('prompt_template', key) for key in template_fields(template)] if template else [('source', source)]
    if template and isinstance(row, dict):
        row = row | {key: '' for _, key in read if key in row and row[key] is None}  # as in prepare.py
    for name, key in (*read, ('target', target)):
        if not isinstance(row, dict) or key not in row:
            raise UserError(f'{where}: no field {key}' + (f'; it has {", ".join(row)}' if isinstance(row, dict) else '') + f': set --{name}')
    references = row[target] if isinstance(row[target], list) else [row[target]]
    if not all(isinstance(row[key], str) for _, key in read) or not references or not all(isinstance(text, str) for text in references):
        raise UserError(f'{where}: {" and ".join(key for _, key in read)} takes a text, {target} a text or a list of them')
    text = fill(template, row) if template else row[source]
    return Pair(whole_text(text, where), [whole_text(reference, where) for reference in references])


def stored_pairs(files, tokenizer):
    """The Pairs of a split that prepare.py made (data.TokenFiles), read back from their tokens. Raises UserError if they are none."""
    if not files.meta.get('pairs'):
        raise UserError(f'files: none is given, and {files.folder} has no pairs: python eval.py summaries --out_dir=DIR FILE.jsonl')
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
    [text] that the network writes for each of `sources`: greedily, or by a beam search. The longest come
    first, so that rows of a batch are alike.

    A source that is too long loses its end, and one line says how many did. Raises UserError where
    max_new_tokens leaves a decoder less room for a source than training does (objectives.py): half of its
    context.
    """
    source_context = getattr(model.cfg, 'source_context', 0)
    room = source_context or model.cfg.block_size - max_new_tokens  # of what is read
    cuts = Cuts('sources')
    encoded = [encode_prompt(source, tokenizer, model.cfg, room, cuts, is_typed=False) for source in sources]
    rows = [(n, *ids) for n, ids in enumerate(encoded)]
    T = model.cfg.block_size
    if cuts.cut and not source_context and max_new_tokens > T // 2:
        raise UserError(f'max_new_tokens={max_new_tokens}: leaves {room} of the {T} tokens that the network '
                        f'reads: {cuts.line()}: lower it to {T // 2} or less')
    if cuts.cut:
        print(f'{what}: {cuts.line()}', flush=True)
    rows.sort(key=lambda row: -len(row[2] or row[1]))
    out, size = [''] * len(rows), 1 if num_beams else batch_size
    with tqdm(total=len(rows), desc=what, disable=None, leave=False) as bar, autocast(device, dtype):
        for i in range(0, len(rows), size):
            batch = rows[i:i + size]
            if num_beams:
                (_, prompt, source), = batch
                written = [beam_search(model, prompt, max_new_tokens, num_beams, 1.0, tokenizer.eot, tokenizer.vocab_size, source)]
            else:
                drawn = generate(model, [prompt for _, prompt, _ in batch], max_new_tokens, temperature=0, eot=tokenizer.eot, vocab_size=tokenizer.vocab_size,
                                 sources=[source for *_, source in batch] if model.cfg.n_encoder_layer else None)
                written = zip(*(tokens.tolist() for tokens in drawn))
            for (n, *_), ids in zip(batch, written):
                out[n] = tokenizer.decode([i for i in ids if i >= 0 and i != tokenizer.eot]).strip()
            bar.update(len(batch))
    return out


# -----------------------------------------------------------------------------
# Scoring

def strip(text):
    """The words of a text that carry its topic, in lower case."""
    return ' '.join(word for word in re.findall(r'[a-z]+', text.lower()) if word not in STOP_WORDS)


def scorer(stripped=False):
    """
    A function of a text and its references → {'rougeL', 'rougeLsum'[, 'stripped']}, F1 from 0 to 1, against the best of them. Raises UserError without
    rouge-score.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise UserError('summaries: takes rouge-score: pip install rouge-score') from None
    plain, stems = RougeScorer(['rougeL', 'rougeLsum']), RougeScorer(['rougeL'], use_stemmer=True)

    def score(text, references):
        scores = [plain.score(reference, text) for reference in references]
        found = {name: max(score[name].fmeasure for score in scores) for name in ('rougeL', 'rougeLsum')}
        if stripped:
            found['stripped'] = max(stems.score(strip(reference), strip(text))['rougeL'].fmeasure for reference in references)
        return found
    return score
