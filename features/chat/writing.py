"""
prepare.py --messages: conversations → token files with a mask.

    OUT/train_00000.mask …, val_00000.mask …   uint8: 1 for each token of the assistant's turns, else 0

The other files are those of prepare.py; a document is a conversation. meta.json also has the chat template
and the tokens that end a turn.
"""
import hashlib
import heapq
import os
import time
from dataclasses import replace

import numpy as np
from tqdm import tqdm

import prepare as core
from checkpoint import replace_json, sha256
from configurator import UserError
from features.chat.conversations import read
from features.chat.template import Template
from features.folder import new_folder
from features.refusals import refuse_beside
from tokenizer import EOT, PromptFormat, needs_text, new_tokenizer


def check_settings(s):
    """Raise ValueError for settings of prepare.py that do not go with messages."""
    refuse_beside(s, 'messages', source='', target='', prompt_template='', reserve=0, part='',
                  special_tokens='text', text_key='text')
    if s.split == 'tail':
        raise ValueError('split=tail: cuts conversations in two: use split=document')


def prepare(s, out):
    """Prepare the conversations. Returns the same as prepare.prepare()."""
    if not out:
        raise UserError(f'out: name the folder to make for {" ".join(s.sources)}, as in --out=data/mine')
    form, origin = find_template(s)
    needs_text(s.tokenizer)  # raises UserError for a wrong name
    files = core.find_files(s.sources)
    for path, kind in files:
        if kind != 'lines':
            raise UserError(f'{path}: takes .jsonl with --messages: leave it out')
    by_default = s.val_fraction is None
    s = replace(s, val_fraction=s.val_fraction or 0.01, split='document')
    source = core.describe(s, files)
    source |= {'messages': True, 'template': hashlib.sha256(form.chat_template.encode()).hexdigest()}
    if os.path.lexists(out) and not (os.path.isdir(out) and not os.listdir(out)):  # text
        from features.text.pipeline import finished  # text
        return out, finished(out, source, s.val_fraction), None  # text
    with new_folder(out, 'out') as folder:
        return out, *write(s, files, source, folder, form, origin, by_default)


def find_template(s):
    """
    (PromptFormat, its origin) of the folder that the tokenizer is of; an empty one if there is none. Replaces
    s.tokenizer=hf:FOLDER by its file.
    """
    if s.tokenizer.startswith('hf:'):
        from features.hf.reading import tokenizer_file
        s.tokenizer = tokenizer_file(s.tokenizer)
    folder = os.path.dirname(s.tokenizer)
    if os.path.isfile(os.path.join(folder, 'tokenizer_config.json')):
        from features.hf.prompts import chat_template, token_names
        template = chat_template(folder)
        if template:
            return PromptFormat(chat_template=template, names=token_names(folder)), f'that of {folder}'
    return PromptFormat(), 'the default one'


def write(s, files, source, folder, form, origin, by_default):
    """Write the files of a data set into a folder. Returns (meta.json, figures for the summary)."""
    began = time.monotonic()
    found = [conversation for path, _ in files for conversation in read(path, s)]
    if not found:
        raise UserError(f'{" ".join(s.sources)}: no conversation in it')
    tokenizer = None
    if not needs_text(s.tokenizer):
        tokenizer = new_tokenizer(s.tokenizer)
    # A tokenizer that is trained on the text knows one special token, EOT
    template = Template(form, tokenizer or new_tokenizer('byte'), origin)
    texts = [about(where, template.render, messages) for where, messages in found]
    if tokenizer is None:
        tokenizer = new_tokenizer(s.tokenizer, [template.shown(text.replace(EOT, '')) for text in texts])
        template = Template(form, tokenizer, origin)
    from features.text.splits import choose  # text
    s.chosen = choose(s, list(zip([where for where, _ in found], texts)), by_default)  # text
    sides = {'train': [], 'val': []}
    for (where, messages), text in zip(found, texts):
        (side, _), = core.divide(text, s)
        sides[side].append((where, messages))
    core.check_sides({side: len(parts) for side, parts in sides.items()}, s)

    splits, figures, ends = {}, Figures(tokenizer), set()
    for side, parts in sides.items():
        size = core.size_of(tokenizer, s)
        splits[side] = write_side(folder, side, parts, template, size, figures, ends)
    meta = core.meta_of(s, tokenizer, tokenizer.save(folder), splits, source)
    meta['chat'] = {'chat_template': template.text, 'ends': sorted(ends), 'names': template.names}
    replace_json(os.path.join(folder, 'meta.json'), meta)
    return meta, figures.summary(splits, time.monotonic() - began)


def write_side(folder, side, conversations, template, size, figures, ends):
    """
    Write the token file, the index and the mask of train or val. size: of the vocabulary. Returns its entry
    of meta.json.
    """
    path = os.path.join(folder, f'{side}_00000')
    counts = {'tokens': 0, 'documents': len(conversations), 'bytes': 0, 'targets': 0}
    dtype = core.dtype_of(template.tokenizer)
    with open(f'{path}.bin', 'wb') as tokens, open(f'{path}.idx', 'wb') as index, \
            open(f'{path}.mask', 'wb') as masks:
        for where, messages in tqdm(conversations, desc=f'tokenizing {side}', disable=None):
            ids, mask, own_ends = about(where, template.example, messages)
            if ids.min() < 0 or ids.max() >= size:  # as uint16 it would be another
                raise UserError(f'{where}: gives a token beyond the vocabulary of {size}: the file of the '
                                'tokenizer is damaged, or the network has no row for a special token')
            index.write(np.array([counts['tokens']], '<u8').tobytes())
            tokens.write(ids.astype(dtype).tobytes())
            masks.write(mask.tobytes())
            ends |= own_ends
            counts['tokens'] += len(ids)
            counts['targets'] += int(mask.sum())
            counts['bytes'] += sum(len(message['content'].encode()) for message in messages)
            figures.add(where, messages, ids)
    shard = {'file': f'{side}_00000.bin', **counts, 'bytes_on_disk': os.path.getsize(f'{path}.bin'),
             'sha256': sha256(f'{path}.bin'), 'idx_sha256': sha256(f'{path}.idx'),
             'mask_sha256': sha256(f'{path}.mask')}
    return {**counts, 'shards': [shard]}


def about(where, function, messages):
    """function(messages); a UserError that it raises begins with the conversation's place."""
    try:
        return function(messages)
    except UserError as error:
        raise UserError(f'{where}: {error}') from None


class Figures:
    """The figures for the summary of prepare.py, as features/text/figures.py has them."""

    def __init__(self, tokenizer):
        self.tokenizer, self.used = tokenizer, np.zeros(tokenizer.vocab_size, bool)
        self.unknown, self.longest = 0, []
        self.literal = dict.fromkeys(tokenizer.special_tokens(), 0)

    def add(self, where, messages, ids):
        self.used[ids] = True
        self.unknown += int(np.count_nonzero(ids == self.tokenizer.unk))
        self.longest = heapq.nlargest(5, [*self.longest, (len(ids), where)])
        for name in self.literal:
            self.literal[name] += sum(message['content'].count(name) for message in messages)

    def summary(self, splits, seconds):
        tokens, size = (sum(split[key] for split in splits.values()) for key in ('tokens', 'bytes'))
        return {'unused': 1 - self.used.mean(), 'unknown': self.unknown / tokens, 'empty': 0,
                'longest': self.longest, 'literal': self.literal, 'seconds': seconds,
                'speed': size / 1e6 / seconds, 'num_proc': 1}
