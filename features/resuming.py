"""
A run that goes on from the newest checkpoint in its out_dir: what it takes from there, and what must not have
changed.

`s` is train.py's Settings, `ranks` the processes of the run.
"""
import json
import os
from dataclasses import fields
from inspect import get_annotations

import checkpoint
from configurator import UserError
from features import extend, feature_of, part_of
from features.datasets import describe_bos
from features.others import adopt, same_place
from features.sizes import check_sizes
from features.stored import check_resumable, from_dict
from model import ModelConfig, only_in_training
from optim import OptimConfig
from run import Start
from tokenizer import from_json


def resume(s, ranks):
    """The Start from the newest sound checkpoint in out_dir."""
    folder = ranks.from_first(lambda: checkpoint.find(s.out_dir))
    state = checkpoint.load_state(folder)
    stored = state['settings']
    if s.eval_only:  # what the losses of the run are of
        take_over(s, stored, ['objective', 'denoisers', 'packing', 'dataset'])
    else:
        from features.earlier import without_removed
        stored = without_removed(stored, os.path.join(folder, 'state.json'))
    cfg = from_dict(ModelConfig, state['model'], os.path.join(folder, 'state.json'))  # strict
    if 'base' not in state:
        check_sizes(cfg, checkpoint.read_weights(folder), folder)
    if 'base' in state:
        take_over(s, stored, [name for name in stored if name.startswith('lora_')])
    if 'surgery' in state:
        raise UserError(f'out_dir={s.out_dir}: holds the work of surgery.py {state["surgery"]}, '
                        f'not a run that can be resumed: give --init_from={s.out_dir} and another --out_dir')
    check_resumable(state, folder)
    if s.eval_only or stored['init_from'] not in ('auto', 'scratch'):  # as it began: it may have grown since
        own = {name: stored[name] for name in state['model'] if name in stored}
        adopt(s, from_dict(ModelConfig, own, folder), s.out_dir)
    start = Start(folder, state, base=state.get('base'))
    if 'prompt' in state:
        start.form = from_json(state['prompt'])
    if start.base:  # lora
        from features.lora.load import read_base  # lora
        start.weights = read_base(start.base, folder)  # lora
        check_sizes(cfg, start.weights, folder)  # lora
    return start


def take_over(s, stored, names):
    """Copy these stored settings, unless the user set them."""
    for name in names:
        if name not in s.given and name in stored:
            if not hasattr(s, name):
                extend(s, feature_of(type(s), name))
            setattr(s, name, stored[name])


def identity(s):
    """Names of the settings that a resumed run may not change: the model, and the rows that step n reads."""
    network = part_of(s, ModelConfig)
    names = [f.name for f in fields(network) if f.name not in only_in_training(network)]
    names += ['packing', 'objective', 'seed', 'optimizer', 'lora_rank']
    for part in getattr(s, 'parts', ()):
        if not issubclass(part, ModelConfig):
            names += [name for name in get_annotations(part) if name not in getattr(part, 'may_change', ())]
    return names


def check_same_run(s, data, state):
    """Raise UserError unless the stored run is the same: same model, same data in the same order."""
    stored = state['settings']
    to_do = 'give another --out_dir, or --init_from=scratch to begin anew (the old run is moved aside)'

    def refused(setting, other):
        return UserError(f'{setting}: out_dir={s.out_dir} belongs to a run with {other}: {to_do}')
    if s.arch == 'markov':  # markov
        from features.markov.settings import refuse_old_table  # markov
        refuse_old_table(stored, f'out_dir={s.out_dir}: holds', to_do)  # markov
    unset = type(s)()
    for name in identity(s):
        before = stored.get(name, getattr(unset, name))  # the stored run may be older than the setting
        is_idle = name == 'denoisers' and s.objective != 'ul2'
        if json.dumps(getattr(s, name)) != json.dumps(before) and not is_idle:  # as text: the order counts
            raise refused(f'{name}={getattr(s, name)}', f'{name}={before}')
    rows = stored['batch_size'] * stored['gradient_accumulation_steps']
    if s.rows_per_step != rows:
        raise refused(f'batch_size * gradient_accumulation_steps = {s.rows_per_step}', f'{rows} rows a step')
    began = stored['init_from']
    if s.init_from not in ('auto', 'resume') and not same_place(s.init_from, began):
        raise refused(f'init_from={s.init_from}', f'init_from={began}')
    bos = tuple(state.get('begin', ()))
    if data.bos != bos:
        raise UserError(f'packing={s.packing}: rows begin {describe_bos(data.bos)} here, '
                        f'those of the run in {s.out_dir} {describe_bos(bos)}: {to_do}')
    # In their order, whatever their names: the files of a run may be moved, or copied to another machine
    same_files = list(data.fingerprint().values()) == list(state['data'].values())
    if not same_files or shares(s.dataset) != shares(stored['dataset']):
        if s.dataset != stored['dataset']:
            raise refused(f'dataset={s.dataset}', f'dataset={stored["dataset"]}, of other files or weights')
        raise UserError(f'dataset={s.dataset}: '
                        f'its files are not those that the run in {s.out_dir} was trained on: {to_do}')
    s.init_from = began  # whatever the resuming command says


def shares(dataset):
    """The weights of a mixture, in order; None for a single data set."""
    return list(dataset.values()) if isinstance(dataset, dict) else None


def describe_changes(s, stored, ranks):
    """Print the settings of optimizer and loss that differ from the stored ones; they apply from now on."""
    names = [field.name for field in fields(part_of(s, OptimConfig)) if field.name != 'max_iters']
    names += ['label_smoothing', *only_in_training(part_of(s, ModelConfig))]
    changed = [f'{name}={getattr(s, name)} (was {stored[name]})' for name in names
               if name in stored and stored[name] != getattr(s, name)]
    if changed:
        ranks.say(f'changed from here on: {", ".join(changed)}')
