"""
The validation data of a network: what it was trained on, or another data set of its tokenizer.
"""
import dataclasses

import checkpoint
from batches import open_source
from configurator import UserError
from features.networks import inherited_format, is_foreign


def validation_sources(where, cfg, dataset='', block_size=0):
    """
    The validation split of every corpus that the model of `where` was trained on, or of `dataset`, as
    batches.Sources with rows of block_size, or of the model's context length; an encoder reads as many.
    Raises UserError if there is none, or one of another tokenizer.
    """
    state = {}
    if is_foreign(where):
        from features.hf import reading
        folder = reading.find(where)
    else:
        folder = checkpoint.find(where, 'best')
        state = checkpoint.load_state(folder)
    settings = state.get('settings', {})
    dataset = dataset or settings.get('dataset')  # surgery.py knows none of the weights of others
    if not dataset:
        raise UserError(f'dataset: {where} does not say what it was trained on: give --dataset=NAME')
    packing = settings.get('packing', 'stream')
    if block_size:
        packing = 'stream'
    objective = None
    if cfg.n_encoder_layer or not block_size and settings.get('objective', 'causal') != 'causal':  # t5
        from features.t5.objectives import find_objective  # t5
        objective = find_objective(settings, cfg, inherited_format(where, folder, cfg))  # t5
        if block_size:  # t5
            objective = dataclasses.replace(objective, source_size=block_size)  # t5
    bos = tuple(state.get('begin', ()))
    sources = []
    for name in dataset if isinstance(dataset, dict) else [dataset]:
        source = open_source(name, 'val', block_size or cfg.block_size, packing, bos=bos, objective=objective)
        from features.text.folders import check_tokenizer, how_to_prepare_for  # text
        check_tokenizer(f'dataset={name}', where, folder, source.files)  # text
        to_do = 'with that tokenizer'
        if source.files.vocab_size > cfg.vocab_size:
            to_do = how_to_prepare_for(where, folder, source.files)  # text
            raise UserError(f'dataset={name}: has {source.files.vocab_size} tokens, the network of {where} '
                            f'{cfg.vocab_size}: prepare it {to_do}')
        sources.append(source)
    return sources
