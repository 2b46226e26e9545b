"""
The state.json of a checkpoint, which somebody else may have written: each field must have a value of the kind
that minnow writes there.
"""
import os
import re

from checkpoint import is_file_name, step_of
from configurator import UserError, check, convert, find_field
from features import build, default_of, fields_of
from features.earlier import without_removed
from model import ModelConfig


def is_count(value):
    return type(value) is int and 0 <= value < 2 ** 53


def is_number(value):
    return type(value) in (int, float)


def is_flag(value):
    return type(value) is bool


def is_text(value):
    return type(value) is str


def is_list(is_item, most=2 ** 53):
    return lambda value: type(value) is list and len(value) <= most and all(map(is_item, value))


def is_dict(is_value, is_name=is_text):
    return lambda value: (type(value) is dict and all(map(is_name, value))
                          and all(map(is_value, value.values())))


def is_record(**kinds):
    """A dict with these fields and perhaps others."""
    return lambda value: type(value) is dict and all(
        name in value and is_kind(value[name]) for name, is_kind in kinds.items())


def is_hash(value):
    return is_text(value) and re.fullmatch('[0-9a-f]{64}', value)


def is_tokenizer(value):
    files = is_dict(is_hash, is_file_name)
    return (is_record(kind=is_text)(value) and files(value.get('files', {}))
            and is_count(value.get('reserved', 0)))


def is_prompt(value):
    kinds = {'bos': is_tokens, 'ends': is_list(is_count), 'chat_template': is_text, 'names': is_dict(is_text)}
    return type(value) is dict and all(kinds[name](value[name]) for name in kinds.keys() & value.keys())


def is_interval(value):
    is_right = is_record(nats=is_list(is_number), targets=is_number)(value) and value['nats']
    loads = value.get('loads') if is_right else None
    is_table = is_list(is_list(is_number))
    return is_right and (not loads or is_table(loads) and len({len(row) for row in loads}) == 1)


def is_scaler(value):
    names = ('scale', 'growth_factor', 'backoff_factor', 'growth_interval', '_growth_tracker')
    return value == {} or is_record(**dict.fromkeys(names, is_number))(value) and value['scale'] > 0


def is_place(value):
    return (type(value) is list and len(value) == 3 and is_list(is_text)(value[0]) and value[0]
            and is_count(value[1]) and is_number(value[2]))


def is_fit(value):
    return (type(value) is list and len(value) in (2, 3) and is_list(is_count)(value[:2])
            and all(is_number(share) and 0 <= share <= 1 for share in value[2:]))


is_tokens = is_list(is_count, most=1)
FIELDS = {
    'step': is_count,
    'flops': lambda value: is_number(value) and value >= 0,
    'model': is_dict(lambda value: True),
    'settings': is_dict(lambda value: True),
    'tokenizer': is_tokenizer,
    'begin': is_tokens,
    'data': is_dict(is_text),
    'scaler': is_scaler,
    'prompt': is_prompt,
    'base': is_record(**{'from': is_text, 'weights': is_dict(is_count)}),
    'lora': is_record(places=is_list(is_place), tokens=is_list(is_count), is_dora=is_flag,
                      dropout=lambda value: is_number(value) and 0 <= value < 1),
    'fits': is_list(is_fit),
    'left_out': is_list(is_count),
    'losses': is_list(is_number),
    'interval': lambda value: value is None or is_interval(value),
    'skipped': is_count,
    'job': is_list(is_text),
    'surgery': is_text,
}
NEEDED = ['step', 'model', 'settings', 'tokenizer']


def checked(state, path):
    """
    The content of the state.json at `path`, with the settings converted to their types. Raises UserError that
    names the field for one that is missing or has an invalid value.
    """
    for name in NEEDED:
        if name not in state:
            refuse(path, name, 'is missing')
    for name in FIELDS.keys() & state.keys():
        if not FIELDS[name](state[name]):
            refuse(path, name, f'has an invalid value ({shown(state[name])})')
    if ('base' in state) != ('lora' in state):
        refuse(path, 'base, lora', 'belong together')

    model = converted(ModelConfig, without_removed(state['model'], path), path)
    vocab_size = from_dict(ModelConfig, model, path).vocab_size
    prompt = state.get('prompt', {})
    tokens = [*state.get('begin', ()), *prompt.get('bos', ()), *prompt.get('ends', ())]
    if tokens and max(tokens) >= vocab_size:
        refuse(path, 'begin, prompt', f'have token {max(tokens)}, beyond the vocabulary of {vocab_size}')
    if not vocab_size > state['tokenizer'].get('reserved', 0):
        refuse(path, 'model: vocab_size', f'is {vocab_size}, too small for the tokenizer')
    from train import Settings
    optimizer = {name: value for name, value in state['settings'].items() if name == 'optimizer'}
    if not all(map(is_text, optimizer.values())):  # perhaps one that is gone: it is read, and not resumed
        refuse(path, 'settings: optimizer', f'has an invalid value ({shown(optimizer["optimizer"])})')
    others = {name: value for name, value in state['settings'].items() if name != 'optimizer'}
    settings = converted(Settings, others, f'{path}: settings', is_strict=False)
    return state | {'model': model, 'settings': settings | optimizer}


def check_resumable(state, folder):
    """Raise UserError unless the state of the checkpoint in `folder` has all that a run goes on with."""
    path = os.path.join(folder, 'state.json')
    for name in ('data', 'scaler'):
        if name not in state:
            refuse(path, name, 'is missing')
    for name in ('dtype', 'batch_size', 'gradient_accumulation_steps', 'init_from', 'dataset'):
        if name not in state['settings']:
            refuse(path, f'settings: {name}', 'is missing')
    if state['step'] != step_of(folder):
        refuse(path, 'step', f'is {state["step"]}, the folder is that of step {step_of(folder)}')


def refuse(path, field, problem):
    raise UserError(f'{path}: {field} {problem}: restore the checkpoint from a copy')


def converted(cls, values, where, is_strict=True):
    """
    A dict of settings with each value as its field has it. Raises UserError for a wrong type and, if strict,
    for an unknown setting; otherwise that stays: another version knows it.
    """
    found = {}
    for name, value in values.items():
        try:
            field = find_field(cls, name, f'{where}: {name}')
        except UserError:
            if is_strict:
                raise
            found[name] = value
            continue
        found[name] = convert(value, field, f'{where}: {name}')
    return found


def shown(value):
    text = repr(value)
    return text if len(text) < 100 else text[:100] + '…'


def from_dict(cls, values, where):
    """
    An instance of `cls` from a dict (settings.json, a checkpoint's). Raises UserError as configure() does.
    Settings of unused features are left out: checkpoints from before features had folders hold all.
    """
    converted = {}
    for key, value in values.items():
        field = find_field(cls, key, f'{where}: {key}')
        value = convert(value, field, f'{where}: {key}')
        if field.name in fields_of(cls) or value != default_of(field):
            converted[field.name] = value
    settings = build(cls, **converted)
    check(settings, where)
    return settings
