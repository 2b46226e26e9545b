"""
Read a network: from a checkpoint, a training run, an adapter and its base, or a Hugging Face folder.
"""
import gc
import os

from checkpoint import find, load_state, load_weights, read_weights
from configurator import UserError
from features.stored import from_dict


def read_model(where, which='best', encoder=False, untie=False):
    """
    (ModelConfig, {name: tensor}, folder) of a checkpoint directory, of a run's `which` checkpoint, or of
    hf:FOLDER. An adapter is merged into its base; untie=True first gives the head its own matrix. encoder:
    whether the caller supports encoder-decoders. Raises UserError if it does not, and for an adapter that
    cannot be merged.
    """
    if is_foreign(where):  # hf
        from features.hf import reading  # hf
        cfg, weights = reading.load(where)  # hf
        check_kind(where, cfg, encoder)  # hf
        return cfg, weights, reading.find(where)  # hf
    from model import ModelConfig
    folder = find(where, which)
    state = load_state(folder)
    cfg = from_dict(ModelConfig, state['model'], os.path.join(folder, 'state.json'))
    check_kind(where, cfg, encoder)
    if 'base' in state:  # lora
        from features.lora.load import read_merged  # lora
        return *read_merged(where, folder, state, untie), folder  # lora
    from features.sizes import check_sizes
    return cfg, check_sizes(cfg, read_weights(folder), folder), folder


def load_model(where, which='best', encoder=False):
    """(the network in eval mode, folder) of what read_model() reads; adapters may stay beside their base."""
    if not is_foreign(where):  # lora: an adapter
        folder = find(where, which)  # lora
        state = load_state(folder)  # lora
        if 'base' in state:  # lora
            from features.lora import load  # lora
            model = load.load_adapted(state, folder)  # lora
            check_kind(where, model.cfg, encoder)  # lora
            return model, folder  # lora
    cfg, weights, folder = read_model(where, which, encoder)
    return fill(cfg, weights, folder), folder


def fill(cfg, weights, where):
    """
    A model with this ModelConfig and these weights, in eval mode, without a copy: weights of a file that is
    float32 stay mapped into memory. Raises UserError if they differ.
    """
    from model import Unfilled, make_model
    gc.disable()  # a collection in between takes longer than the rest, as torch has a million objects
    try:
        with Unfilled():
            model = make_model(cfg, init=False)
        load_weights(model, weights, where, assign=True)
    finally:
        gc.enable()
    return model.eval()


def check_kind(where, cfg, encoder):
    if cfg.n_encoder_layer and not encoder:
        raise UserError(f'{where}: is an encoder-decoder (n_encoder_layer={cfg.n_encoder_layer}), '
                        'only decoders are supported here: use sample.py')


def tokenizer_of(where, folder):
    """(description, folder of its files) of the tokenizer of what read_model() read from `where`."""
    if is_foreign(where):  # hf
        from features.hf import reading  # hf
        return reading.tokenizer(where)  # hf
    return load_state(folder)['tokenizer'], folder


def inherited_format(where, folder, cfg):
    """The tokenizer.PromptFormat of what read_model() read from `where`, for a run that begins with it."""
    if is_foreign(where):  # hf
        from features.hf.prompts import inherited  # hf
        return inherited(where, cfg)  # hf
    from tokenizer import from_json
    state = load_state(folder)
    return from_json(state.get('prompt', {}), state.get('begin', ()))


GPT2_NAMES = ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl')  # as nanoGPT's init_from has them


def is_foreign(where):
    """Whether `where` names a Hugging Face model: hf:FOLDER, or a published GPT-2."""
    return where.startswith('hf:') or where in GPT2_NAMES
