"""
Adapters read from checkpoints of ours and from PEFT's folders, and their base network found again.
"""
import os
import re
from contextlib import suppress

import torch

import checkpoint
from checkpoint import fill, read_model
from configurator import UserError, from_dict
from features.hf import reading
from features.lora import adapters, layers, peft_files
from model import ModelConfig


def read_merged(where, folder, state, untie=False):
    """
    (ModelConfig, {name: tensor}) of an adapter's checkpoint merged into its base; untie=True gives the head a
    matrix of its own first. Raises UserError for an adapter that cannot be merged.
    """
    model = read_adapted(state, folder)
    if untie:
        adapters.untie(model)
    if adapters.obstacle(model):
        raise UserError(f'{where}: {adapters.obstacle(model)}')
    adapters.merge(model)
    return model.cfg, adapters.base_state(model)


def load_adapted(state, folder):
    """
    The network of an adapter's checkpoint in eval mode: merged into its base, or beside it where it cannot
    be.
    """
    model = read_adapted(state, folder)
    if adapters.obstacle(model):
        return model
    adapters.merge(model)
    return fill(model.cfg, adapters.base_state(model), folder)


def read_adapted(state, folder):
    """The network of an adapter's checkpoint, the adapter beside its base, in eval mode."""
    cfg = from_dict(ModelConfig, state['model'], os.path.join(folder, 'state.json'))
    model = fill(cfg, read_base(state['base'], cfg, folder), state['base']['from'])
    saved = adapters.described(state['lora'], checkpoint.read_weights(folder))
    adapters.add(model, saved, folder, 'default')
    return model


def read_base(base, cfg, adapter):
    """
    The weights beside which the adapter in the folder `adapter` was trained; base: its state.json's entry;
    cfg: its network. Raises UserError where they are gone or have changed.
    """
    where = base['from']
    # that checkpoint is gone: the run's best one may be the same
    if not checkpoint.is_foreign(where) and not os.path.isdir(where):
        where = os.path.dirname(where)
        if not os.path.isdir(where):
            raise UserError(f'{adapter}: is an adapter beside {base["from"]}, '
                            'which is not there: put it back')
    _, weights, _ = read_model(where, encoder=True)
    adapters.check_base(weights, base['weights'], where, adapter)
    return checkpoint.shorten(weights, cfg)


def add_adapters(model, given, base):
    """
    Put adapters beside the network of `base`. given: a list of DIR or name=DIR, runs of ours or folders of
    PEFT's. Returns {name: DIR}. Raises UserError for one that belongs to another network.
    """
    if given and hasattr(model, 'lora'):
        raise UserError(f'{base}: is an adapter itself that is not merged: {adapters.obstacle(model)}')
    named = {}
    for entry in given:
        name, where = split_name(entry)
        if name in named or hasattr(torch.nn.ModuleDict(), name):
            raise UserError(f'adapter={entry}: {name!r} is no name for one, or there twice: '
                            'give another of letters and digits, name=DIR')
        named[name] = where
    weights = model.state_dict()
    loaded = {name: read_saved(where, model.cfg, weights, base) for name, where in named.items()}
    for name, saved in loaded.items():
        adapters.add(model, saved, named[name], name)
    return named


def split_name(entry):
    """(name, DIR) of name=DIR, or of DIR alone, which may have = in it too."""
    name, equals, where = entry.partition('=')
    if equals and re.fullmatch(r'\w[\w-]*', name) and not os.path.isdir(entry):
        return name, where
    return re.sub(r'\W', '_', os.path.basename(os.path.normpath(entry))), entry


def read_saved(where, cfg, weights, base):
    """
    The Saved adapter of a run of ours or of a folder of PEFT's, for a network of this ModelConfig with these
    weights.
    """
    if peft_files.is_one(where):
        check_adapter(where, base)
        return peft_files.read(where, cfg)
    folder = checkpoint.find(where, 'best')
    state = checkpoint.load_state(folder)
    if 'base' not in state:
        raise UserError(f'adapter={where}: holds a whole network, no adapter: '
                        'give it as --out_dir or --init_from')
    adapters.check_base(weights, state['base']['weights'], base, where)
    return adapters.described(state['lora'], checkpoint.read_weights(folder))


def check_adapter(where, base):
    """Raise UserError where a folder of PEFT's has a tokenizer that is not that of the base."""
    is_same = True
    with suppress(UserError):  # most have none
        own = reading.tokenizer(f'hf:{where}')
        folder = '' if checkpoint.is_foreign(base) else checkpoint.find(base, 'best')
        from features.text.tokenizers import same_ids  # text
        is_same = same_ids(checkpoint.tokenizer_of(base, folder), own, is_padded=True)  # text
    if not is_same:
        raise UserError(f'adapter={where}: the tokenizer beside it is not that of {base}: give its own base')


def begin(model, s, start, is_blank):
    """
    Put adapters beside a network and freeze the rest: those of the settings, or the trained ones of the
    checkpoint that the run goes on from. is_blank: their shapes alone.
    """
    if start.state is None:
        return layers.begin(model, s)
    saved = adapters.described(start.state['lora'], checkpoint.read_weights(start.folder))
    saved.dropout = s.lora_dropout
    layers.share_table(model)
    layers.attach(model, saved)
    layers.freeze(model, saved.tensors)
    if not is_blank:
        adapters.load_state(model, saved.tensors, start.folder)
