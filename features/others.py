"""
A run that begins with the weights of another (--init_from=DIR, hf:FOLDER or gpt2), or resumes after that.

`s` is train.py's Settings, `ranks` the processes of the run.
"""
import os
from dataclasses import fields

import checkpoint
from configurator import UserError
from features import default_of, extend, part_of
from features.networks import inherited_format, is_foreign, read_model
from model import ModelConfig, only_in_training
from run import Start


def begin_with_others(s, ranks):
    """The Start from the weights that init_from names."""
    if is_foreign(s.init_from):  # hf
        from features.hf import reading  # hf
        ranks.from_first(lambda: reading.find(s.init_from))  # hf: one rank downloads
    cfg, weights, folder = read_model(s.init_from, encoder=True)
    broken = checkpoint.first_not_finite(weights)
    if broken:
        raise UserError(f'init_from={s.init_from}: {broken} is not finite: give other weights')
    adopt(s, cfg, s.init_from)
    start = Start(folder, weights=weights)
    start.form = inherited_format(s.init_from, folder, cfg)
    if s.lora_rank:  # lora
        from features.lora.adapters import fingerprint  # lora
        where = s.init_from if is_foreign(s.init_from) else folder  # lora
        start.base = {'from': where, 'weights': fingerprint(weights)}  # lora
    return start


def began_with_others(s):
    """Whether init_from names weights and the run in out_dir did not start from them."""
    if s.init_from in ('auto', 'scratch', 'resume'):
        return False
    stored = checkpoint.load_state(checkpoint.find(s.out_dir))['settings']
    return not same_place(s.init_from, stored.get('init_from', 'scratch'))


def same_place(one, other):
    """Whether two settings name the same run, checkpoint or folder in different spellings."""
    if one.startswith('hf:') and other.startswith('hf:'):
        one, other = one.removeprefix('hf:'), other.removeprefix('hf:')
    return os.path.realpath(one) == os.path.realpath(os.path.expanduser(other))


def adopt(s, cfg, where):
    """
    Take the model settings from the ModelConfig of loaded weights. The user may set a shorter context and
    settings that matter only in training. Raises UserError for any other setting that differs.
    """
    extend(s, *getattr(cfg, 'features', ()))
    chosen = set(only_in_training(cfg))
    if 'block_size' in s.given:
        chosen.add('block_size')
        if s.block_size > cfg.block_size and cfg.position != 'relative':
            raise UserError(f'block_size={s.block_size}: '
                            f'the weights in {where} know {cfg.block_size} positions: lower it')
    if cfg.n_expert:  # moe
        from features.moe.settings import may_choose  # moe
        chosen |= may_choose(s, cfg)  # moe
    if cfg.n_encoder_layer:  # t5
        from features.t5.settings import adopt_source_size  # t5
        adopt_source_size(s, cfg, where)  # t5
        chosen.add('source_size')  # t5
    for setting in fields(part_of(s, ModelConfig)):
        name = setting.name
        value = getattr(cfg, name, default_of(setting))
        if name in chosen:
            continue
        if name in s.given and getattr(s, name) != value:
            raise UserError(f'{name}={getattr(s, name)}: the weights in {where} have {name}={value}: '
                            'leave it out')
        setattr(s, name, value)
