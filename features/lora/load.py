"""
Load adapters from our checkpoints and from PEFT folders, with their base model.
"""
import os
import re
from contextlib import suppress

import torch

import checkpoint
from configurator import UserError
from features.lora import adapters, layers, peft_files
from features.networks import fill, is_foreign, read_model, tokenizer_of
from features.sizes import check_sizes
from features.stored import from_dict
from model import ModelConfig


def read_merged(where, folder, state, untie=False):
    """
    (ModelConfig, {name: tensor}) of an adapter's checkpoint, merged into its base; untie=True first gives the
    head its own matrix. Raises UserError for an adapter that cannot be merged.
    """
    model = read_adapted(state, folder)
    if untie:
        adapters.untie(model)
    if adapters.obstacle(model):
        raise UserError(f'{where}: {adapters.obstacle(model)}')
    adapters.merge(model)
    return model.cfg, adapters.base_state(model)


def load_adapted(state, folder):
    """The model of an adapter's checkpoint in eval mode, merged into its base if possible."""
    model = read_adapted(state, folder)
    if adapters.obstacle(model):
        return model
    adapters.merge(model)
    return fill(model.cfg, adapters.base_state(model), folder)


def read_adapted(state, folder):
    """The model of an adapter's checkpoint in eval mode, with the adapter as separate layers."""
    cfg = from_dict(ModelConfig, state['model'], os.path.join(folder, 'state.json'))
    weights = read_base(state['base'], folder)
    check_sizes(cfg, weights, folder)
    model = fill(cfg, weights, state['base']['from'])
    saved = adapters.described(state['lora'], checkpoint.read_weights(folder))
    adapters.add(model, saved, folder, 'default')
    return model


READING = []  # the bases that are being read: an adapter may stand beside another one


def read_base(base, adapter):
    """
    The base weights of the adapter in the folder `adapter`; base: its state.json's entry.
    Raises UserError if they are missing or have changed.
    """
    where = base['from']
    # that checkpoint is gone: the run's best one may be the same
    if not is_foreign(where) and not os.path.isdir(where):
        where = os.path.dirname(where)
        if not os.path.isdir(where):
            raise UserError(f'{os.path.join(adapter, "state.json")}: is an adapter beside {base["from"]}, '
                            'which does not exist: restore it')
    path = os.path.join(adapter, 'state.json')
    if where in READING:
        raise UserError(f'{path}: base: {where} is an adapter beside itself')
    READING.append(where)
    try:
        _, weights, _ = read_model(where, encoder=True)
    except UserError as error:
        raise UserError(f'{path}: base: {error}') from None
    finally:
        READING.pop()
    adapters.check_base(weights, base['weights'], where, adapter)
    return weights


def add_adapters(model, given, base):
    """
    Add adapters to the model of `base`. given: a list of DIR or name=DIR, our runs or PEFT folders. Returns
    {name: DIR}. Raises UserError for an adapter of another model.
    """
    if given and hasattr(model, 'lora'):
        raise UserError(f'{base}: is an adapter itself that is not merged: {adapters.obstacle(model)}')
    named = {}
    for entry in given:
        name, where = split_name(entry)
        if name in named or hasattr(torch.nn.ModuleDict(), name):
            raise UserError(f'adapter={entry}: {name!r} is not a valid name, or is used twice: '
                            'give another of letters and digits, name=DIR')
        named[name] = where
    weights = model.state_dict()
    loaded = {name: read_saved(where, model.cfg, weights, base) for name, where in named.items()}
    for name, saved in loaded.items():
        adapters.add(model, saved, named[name], name)
    return named


def split_name(entry):
    """(name, DIR) from name=DIR, or from DIR alone, which may contain = too."""
    name, equals, where = entry.partition('=')
    if equals and re.fullmatch(r'\w[\w-]*', name) and not os.path.isdir(entry):
        return name, where
    return re.sub(r'\W', '_', os.path.basename(os.path.normpath(entry))), entry


def read_saved(where, cfg, weights, base):
    """
    The Saved adapter of one of our runs or of a PEFT folder, for a model with this ModelConfig and these
    weights.
    """
    if peft_files.is_one(where):
        check_adapter(where, base)
        return peft_files.read(where, cfg)
    folder = checkpoint.find(where, 'best')
    state = checkpoint.load_state(folder)
    if 'base' not in state:
        raise UserError(f'adapter={where}: is a complete model, not an adapter: '
                        'give it as --out_dir or --init_from')
    adapters.check_base(weights, state['base']['weights'], base, where)
    return adapters.described(state['lora'], checkpoint.read_weights(folder))


def check_adapter(where, base):
    """Raise UserError if a PEFT folder has a tokenizer that differs from the base's."""
    from features.hf import reading
    is_same = True
    with suppress(UserError):  # most have none
        own = reading.tokenizer(f'hf:{where}')
        folder = '' if is_foreign(base) else checkpoint.find(base, 'best')
        from features.text.tokenizers import same_ids  # text
        is_same = same_ids(tokenizer_of(base, folder), own, is_padded=True)  # text
    if not is_same:
        raise UserError(f'adapter={where}: the tokenizer beside it is not that of {base}: give its own base')


def begin(model, s, start, is_blank):
    """
    Add adapters to a model and freeze the rest: new ones from the settings, or those of the checkpoint that
    the run resumes from. is_blank: only their shapes.
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
