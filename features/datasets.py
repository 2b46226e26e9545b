"""
Which data sets a run has: the one of a run for which none is set, and those of a mixture.
"""
import os

from batches import find_folder
from configurator import UserError


def find_dataset(s, is_new):
    """
    Choose the data set if the user sets none. A config file of a whole run was not written for our default:
    nanoGPT's for GPT-2 mean openwebtext, which is used if it exists. Raises UserError if a new run has none.
    """
    file = s.from_files.get('batch_size') or s.from_files.get('init_from')
    if file and os.path.isdir('data/openwebtext'):
        s.dataset = 'openwebtext'
    elif file and is_new:
        raise UserError(f'dataset: {file} names none: give --dataset=NAME ({s.dataset} is the default here, '
                        'openwebtext in nanoGPT)')
    elif is_new:
        try:
            find_folder(s.dataset)
        except UserError as error:
            raise UserError(f'{error} ({s.dataset} is the default: --dataset=NAME takes another)') from None


def check_alike(sources):
    """Raise UserError unless all sources have the same tokenizer."""
    first = sources[0]
    for source in sources[1:]:
        if first.files.meta.get('chat') != source.files.meta.get('chat'):  # chat
            raise UserError(f'dataset: {first.name} and {source.name} are not conversations '  # chat
                            'of one chat template: prepare them alike')  # chat
        ours, theirs = [(s.files.meta['tokenizer'], s.files.vocab_size, s.bos) for s in (first, source)]
        if ours != theirs:
            problem = f'{first.name} and {source.name} were prepared with different tokenizers'
            from features.text.folders import compare_tokens  # text
            problem = compare_tokens(first, source)  # text: '' if it is one tokenizer in two formats
            if problem:
                raise UserError(f'dataset: {problem}')


def describe_bos(bos):
    return f'with token {bos[0]}' if bos else 'without a start token'
