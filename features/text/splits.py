"""
The split of corpora with few documents: which of them are for validation, and whether each is cut in two.
"""
from dataclasses import replace
from itertools import islice

import prepare
from configurator import UserError
from features.text.pairs import has_pairs, source_of
from features.text.pieces import ANYWHERE
from features.text.reader import Reader, Task, documents

# characters for validation of a small corpus, if that is more than val_fraction: about 5,000 tokens
VAL_SIZE = 20_000


def divide(text, s):
    """Like prepare.divide(); for a pair, its source decides the side."""
    if not has_pairs(s):
        return prepare.divide(text, s)
    side = prepare.divide(source_of(text), s)[0][0]
    return [(side, text)]


def is_few(s, files):
    """Whether these are .txt files with fewer than 200 documents in all."""
    if has_pairs(s) or len(files) >= 200 or any(kind != 'text' for _, kind in files):
        return False
    reader = Reader(files, s)
    starts = (1 for path, _ in files for _, is_start, _ in reader.parts(path, ANYWHERE) if is_start)
    return len(list(islice(starts, 200))) < 200


def choose(s, found, by_default):
    """choose_from() for documents [(where, text)] in memory; None unless s.split is document."""
    return choose_from([Task(found)], s, by_default) if s.split == 'document' else None


def choose_from(tasks, s, by_default):
    """
    If there are few documents, the hashes of those for validation; None if there are enough that each hash
    can decide by itself.
    The chosen documents have about val_fraction of the text; with by_default (val_fraction is not set)
    VAL_SIZE characters, if that is more, up to a tenth of the text. Duplicates are on the same side. Both
    sides get some documents, unless all are duplicates. The result does not depend on the order of the
    documents or on parts.
    """
    sizes, count = {}, 0  # {hash: characters of all documents that have it}
    rarer = min(s.val_fraction, 1 - s.val_fraction)
    for task in tasks:
        for _, text in documents(task, s):
            if not task.side and not text.strip():
                continue
            if task.starts:
                number = prepare.hash_of(source_of(text))
                sizes.setdefault(number, 0)
                count += 1
            sizes[number] += len(text)
        if count * rarer >= 10 or count >= 1000:
            return None
    if not count or not by_default and count * rarer < 0.5:  # so few for one side were asked for
        return None
    if len(sizes) == 1:
        return []  # all documents are equal: check_sides() refuses them
    return smallest_hashes(sizes, s.val_fraction, by_default)


def smallest_hashes(sizes, val_fraction, by_default):
    """
    The smallest of the hashes {hash: characters} that have about val_fraction of all characters; at least
    one.
    """
    total = sum(sizes.values())
    wanted = val_fraction * total
    if by_default:
        wanted = max(wanted, min(total / 10, VAL_SIZE))
    most = max(1, int(len(sizes) * max(0.5, val_fraction)))
    room = min(1.25 * wanted, total - min(sizes.values()))  # something is left for training
    chosen, size = [], 0
    for number in sorted(sizes):
        if size < wanted and len(chosen) < most and size + sizes[number] <= room:
            chosen.append(number)
            size += sizes[number]
    return chosen or [min(sizes, key=lambda number: (sizes[number], number))]


def tasks_to_choose_from(files, s):
    return Reader(files, replace(s, split='document')).tasks(ANYWHERE)


def advice_for(s):
    """What to do if a side of the split has no documents, for an error message."""
    advice = ('use another --val_fraction' if getattr(s, 'chosen', None) is None
              else 'give more documents that differ')
    if s.split == 'document' and not has_pairs(s) and not s.messages:
        advice += ', or use --split=tail'
    return advice


def check_sides(splits, s, empty=0):
    """Raise UserError if there is nothing to train on or to validate on."""
    if not any(split['tokens'] for split in splits.values()):
        rest = f', {empty} empty documents' if empty else ''
        raise UserError(f'{" ".join(s.sources)}: no text in it{rest}')
    prepare.check_sides({side: split['documents'] for side, split in splits.items()}, s)
