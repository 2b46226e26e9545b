"""
The commands merge and combine of surgery.py: merge adapters into the weights of their base model, or combine
several adapters into one.

    python surgery.py merge --from=out/lora --out_dir=out/merged                           # into one model
    python surgery.py combine --from=out/base --adapter=A --adapter=B --out_dir=out/both   # one adapter
"""
import dataclasses
import shlex

import checkpoint
from configurator import UserError
from features.lora import adapters, peft_files
from features.lora.load import add_adapters, read_saved, split_name
from features.networks import fill


def run_merge(s):
    """python surgery.py merge"""
    from features.growth.runs import read, write
    old = read(s, s.from_, encoder=True, untie=s.untie)
    if not s.adapter and 'base' not in old.state:
        raise UserError(f'from={s.from_}: is a complete model: give adapters to merge, --adapter=DIR')
    # a copy: old is measured beside it
    model = fill(dataclasses.replace(old.model.cfg), old.model.state_dict(), s.from_)
    if s.adapter:  # otherwise read() has merged it
        names = add_adapters(model, s.adapter, s.from_)
        model.lora.shares = dict(zip(names, shares_of(s)))
        if s.untie:
            adapters.untie(model)
        adapters.merge(model)
    write(s, 'merge', old, model.cfg, adapters.base_state(model))


def shares_of(s):
    """The weight of each adapter."""
    return s.shares or [1.0] * len(s.adapter)


def run_combine(s):
    """python surgery.py combine"""
    from features.growth.runs import new_state, read, write_run
    old = read(s, s.from_, encoder=True)
    model = old.model
    folders = [split_name(entry)[1] for entry in s.adapter]
    base = {'from': s.from_, 'weights': adapters.fingerprint(model.state_dict())}
    saved = [read_saved(folder, model.cfg, model.state_dict(), s.from_) for folder in folders]
    both = adapters.combine(saved, shares_of(s))
    adapters.add(model, both, ', '.join(folders), 'default')  # raises UserError unless it fits
    states = []
    for folder in folders:
        if not peft_files.is_one(folder):
            states.append(checkpoint.load_state(checkpoint.find(folder, 'best')))
    state = new_state('combine', model.cfg, common_settings(states), old.tokenizer, common_begin(states))
    state['prompt'] = old.form.as_json()
    state['base'] = base
    state['lora'] = both.description()
    write_run(s.out_dir, both.tensors, state, old.tokenizer_folder)
    print(f'written: {s.out_dir}; python sample.py', shlex.quote(f'--out_dir={s.out_dir}'))


def common_settings(states):
    """The settings of data and objective that all of these runs have in common, from their state.json."""
    if not states:
        return {}
    runs = [state['settings'] for state in states]
    common = {}
    for name, value in runs[0].items():
        is_of_data = name in ('dataset', 'objective', 'denoisers', 'packing')
        if is_of_data and all(run.get(name) == value for run in runs):
            common[name] = value
    return common


def common_begin(states):
    """The start token of several runs, (id,) or (), from their state.json; () if they differ."""
    found = {tuple(state.get('begin', ())) for state in states}
    if len(found) == 1:
        return found.pop()
    return ()
