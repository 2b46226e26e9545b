"""
Advice about prepared folders, data/NAME: how to make one that is missing, or that does not fit the others or
a network.
"""
import os
import shlex
from contextlib import suppress

import numpy as np

import checkpoint
from configurator import UserError
from features.datasets import describe_bos
from features.networks import is_foreign, tokenizer_of
from features.text.cuts import Cuts
from features.text.tokenizers import options_of, same_ids


def how_to_make(name):
    """The end of an error message about a missing data set `name`: the command that makes it."""
    from features.text.download import CORPORA
    from features.text.sources import HERE
    corpora = {source.removeprefix('synthetic:'): source for source in (*HERE, *CORPORA)}
    if name in corpora:
        return 'no such data set; first run: ' + shlex.join(['python', 'prepare.py', corpora[name]])
    out = name if os.path.dirname(name) else os.path.join('data', name)
    if name.removesuffix('_char') in corpora:  # nanoGPT's shakespeare_char
        command = ['python', 'prepare.py', corpora[name.removesuffix('_char')], '--tokenizer=char',
                   f'--out={out}']
        return 'no such data set; first run: ' + shlex.join(command)
    if os.path.isfile(name):
        stem = os.path.basename(name).partition('.')[0] or 'mine'
        command = ['python', 'prepare.py', name, f'--out=data/{stem}']
        return f'is a file: first run: {shlex.join(command)}, then give --dataset={stem}'
    return ('no such data set; first run: '
            + shlex.join(['python', 'prepare.py', 'FILE_OR_FOLDER', f'--out={out}']))


def how_to_prepare(wanted, folder, files):
    """
    How to prepare the data of the TokenFiles `files` with the tokenizer of the description `wanted`, whose
    files are in `folder`: 'with OPTIONS: COMMAND'.
    """
    found = files.meta['tokenizer']
    tokenizer, reserve = options_of(wanted, folder)
    is_same = without_sizes(wanted) == without_sizes(found)
    if wanted.get('kind') == 'char' and not is_same:  # no file holds its characters
        return ('together with the text of the other, so that both have the same characters, '
                'or both with --tokenizer=byte')
    options = []
    if not is_same:
        options.append(tokenizer)
    if wanted.get('reserved', 0) != found.get('reserved', 0):
        options.append(reserve)
    command = ['python', 'prepare.py', *earlier_arguments(files.meta.get('source')), tokenizer]
    if wanted.get('reserved'):
        command.append(reserve)
    command.append(f'--out={files.folder.rstrip("/")}2')
    return f'with {" and ".join(options or [tokenizer])}: {shlex.join(command)}'


def how_to_prepare_for(where, folder, files):
    """how_to_prepare() with the tokenizer of a model; arguments as in check_tokenizer()."""
    wanted = {} if is_foreign(where) else checkpoint.load_state(folder)['tokenizer']
    return how_to_prepare(wanted, folder, files)


def check_start(s, start, source):
    """
    check_tokenizer() of a Source for a run that begins with other weights (run.Start), or that is evaluated,
    perhaps on other data than its own.
    """
    if start.state:
        check_tokenizer(f'dataset={source.name}', s.out_dir, start.folder, source.files)
    else:
        check_tokenizer(f'init_from={s.init_from}', s.init_from, start.folder, source.files)


def check_tokenizer(setting, where, folder, files):
    """
    Raise UserError unless a data set (batches.TokenFiles) has the tokenizer of the model that read_model()
    read from `where` and `folder`. setting: the beginning of the message. Prints a line if the two cannot be
    compared.
    """
    try:
        wanted, found = tokenizer_of(where, folder), (files.meta['tokenizer'], files.folder)
        is_same = same_ids(wanted, found, is_padded=is_foreign(where))
    except UserError as error:
        print(f'{setting}: the tokenizers of {where} and of {files.folder} were not compared ({error}): '
              'make sure that they are the same', flush=True)
        return
    if not is_same:
        which = '' if setting.startswith('dataset=') else f'{files.folder} '
        raise UserError(f'{setting}: {which}was prepared with another tokenizer than the one of {where}: '
                        f'prepare it {how_to_prepare_for(where, folder, files)}')


def without_sizes(description):
    return {key: value for key, value in description.items()
            if key not in ('reserved', 'vocab_size', 'sha256')}


USUAL = {'text_key': 'text', 'source': '', 'target': '', 'prompt_template': '', 'val_fraction': 0.01,
         'split': 'auto', 'errors': 'strict'}  # prepare.py's defaults


def earlier_arguments(source):
    """The arguments of prepare.py that made a folder; source: that field of its meta.json."""
    if not isinstance(source, dict):
        source = {}
    paths = source.get('sources')
    if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
        paths = ['FILE_OR_FOLDER']
    options = []
    for name, usual in USUAL.items():
        if source.get(name, usual) != usual:
            options.append(f'--{name}={source[name]}'.replace('\n', '\\n'))
    return [*paths, *options]


def compare_tokens(first, other):
    """Why two Sources cannot be mixed; '' if they can. One tokenizer may be stored in two formats."""
    ours, theirs = first.files.meta['tokenizer'], other.files.meta['tokenizer']
    is_same = ours == theirs
    with suppress(UserError):  # not known, or its library is not here
        is_same = is_same or same_ids((ours, first.files.folder), (theirs, other.files.folder))
    if not is_same or other.files.vocab_size != first.files.vocab_size:
        return (f'{first.name} and {other.name} were prepared with different tokenizers ({ours["kind"]}, '
                f'{theirs["kind"]}): '
                f'prepare {other.name} {how_to_prepare(ours, first.files.folder, other.files)}')
    if other.bos != first.bos:
        return (f'documents of {first.name} begin {describe_bos(first.bos)}, those of {other.name} '
                f'{describe_bos(other.bos)}: prepare both again')
    return ''


def count_long_documents(source):
    """A line about the documents of a Source that are longer than its rows; '' if all fit."""
    cuts = Cuts('documents')
    lengths = np.diff(source.files.bounds) + len(source.bos)
    for length in lengths[lengths > source.length]:
        cuts.add(int(length), source.length)
    cuts.seen = len(lengths)
    if not cuts.cut:
        return ''
    return f'{source.name}, {source.files.split}: {cuts.line()} (packing=document: a random part of each)'
