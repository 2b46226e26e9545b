"""
The commands of surgery.py that change a model's size: inherit, grow, widen, average, factorize. They call
networks.py and factorize.py; `s` is the command's settings.
"""
import dataclasses
import glob
import re
from contextlib import suppress

import torch

from configurator import UserError, check
from features.growth.factorize import factorize, input_moments, table
from features.growth.networks import (
    average,
    grow,
    grown_layers,
    parse_layers,
    take_layers,
    widen,
)
from features.growth.runs import read, write
from features.networks import is_foreign, read_model, tokenizer_of
from model import LowRank, make_model


def run_inherit(s):
    """python surgery.py inherit"""
    old = read(s, s.from_, encoder=True)
    cfg = old.model.cfg
    encoder = encoder_layers(s, cfg)
    whose = 'the network' if encoder is None else 'the decoder'
    layers = parse_layers(s.layers, cfg.n_layer, whose=whose)
    said = f'blocks {", ".join(map(str, layers))} of {cfg.n_layer}'
    if encoder is not None:
        said += f'; of the encoder {", ".join(map(str, encoder))} of {cfg.n_encoder_layer}'
    cfg, taken = take_layers(cfg, old.model.state_dict(), layers, encoder=encoder)
    torch.manual_seed(s.seed)
    drawn = make_model(cfg).state_dict()
    fresh = fresh_names(s.fresh, taken)
    if fresh:
        said += f'; drawn anew: {s.fresh}, {len(fresh)} tensors'
    print(said)
    for name in fresh:
        taken[name] = drawn[name]
    write(s, 'inherit', old, cfg, taken)


def encoder_layers(s, cfg):
    """The blocks to copy of an encoder, those of s.layers by default; None for a decoder."""
    if not cfg.n_encoder_layer:
        if s.encoder_layers:
            raise UserError(f'encoder_layers={s.encoder_layers}: {s.from_} has no encoder: leave it out')
        return None
    if s.encoder_layers:
        return parse_layers(s.encoder_layers, cfg.n_encoder_layer, 'encoder_layers', 'the encoder')
    return parse_layers(s.layers, cfg.n_encoder_layer, whose='without encoder_layers, they are also those of '
                                                             'the encoder, which')


def fresh_names(fresh, weights):
    """
    The names of the tensors in the parts listed in the setting `fresh`. Raises UserError for unknown parts.
    """
    found = set()
    for part in fresh.split(','):
        if not part:
            continue
        names = {name for name in weights if re.search(rf'(^|\.){re.escape(part)}(_[\dx])?\.', name)}
        if not names:
            raise UserError(f'fresh={fresh}: {part!r} is no part of this network: '
                            f'takes {", ".join(parts_of(weights))}')
        found |= names
    return found


def parts_of(weights):
    """The parts of a model that `fresh` can name: q, attn, wte, norm, …"""
    parts = set()
    for name in weights:
        for part in name.split('.')[:-1]:
            if not part.isdecimal():
                parts.add(re.sub(r'_[\dx]$', '', part))
    return sorted(parts - {'blocks'})


def run_grow(s):
    """python surgery.py grow"""
    old = read(s, s.from_)
    cfg = old.model.cfg
    if s.n_layer <= cfg.n_layer:
        raise UserError(f'n_layer={s.n_layer}: the network has {cfg.n_layer} blocks already: give more, '
                        'or use surgery.py inherit')
    layers, silent = grown_layers(cfg, s.n_layer, s.how)
    said = [f'{layer} silent' if n in silent else f'{layer}' for n, layer in enumerate(layers)]
    print(f'blocks {", ".join(said)}')
    cfg, weights, _ = grow(cfg, old.model.state_dict(), s.n_layer, s.how)
    write(s, 'grow', old, cfg, weights)


def run_widen(s):
    """python surgery.py widen"""
    old = read(s, s.from_)
    torch.manual_seed(s.seed)
    cfg, weights = widen(old.model.cfg, old.model.state_dict(), s.n_embd, s.n_head, s.d_ff)
    if old.model.cfg.tie and not cfg.tie:
        print('embedding and head are two matrices now: LayerNorm cannot be widened exactly with them tied')
    write(s, 'widen', old, cfg, weights)


def run_average(s):
    """python surgery.py average"""
    folders = []
    for where in s.from_:
        folders += sorted(glob.glob(where)) if glob.has_magic(where) else [where]
    if len(folders) < 2:
        raise UserError(f"from={', '.join(s.from_)}: {len(folders)} found: give two or more, "
                        "--from=DIR for each or a pattern as --from='out/run/step_*'")
    old = read(s, folders[-1], encoder=True)
    cfgs = []
    weights = []
    for where in folders[:-1]:
        cfg, tensors, folder = read_model(where, encoder=True)
        if not has_tokenizer_of(old, where, folder):
            raise UserError(f'from={where}: has another tokenizer than {folders[-1]}: leave it out')
        cfgs.append(cfg)
        weights.append(tensors)
    cfgs.append(old.model.cfg)
    weights.append(old.model.state_dict())
    print(f'the mean of {", ".join(folders)}; beside it, the last of these:')
    cfg, means = average(cfgs, weights, folders)
    write(s, 'average', old, cfg, means)


def has_tokenizer_of(old, where, folder):
    """Whether the model of `where` has the same tokenizer as an Old one; True if this is not known."""
    with suppress(UserError):  # it is not known, or its files are not here
        theirs = tokenizer_of(where, folder)
        own = old.tokenizer, old.tokenizer_folder
        from features.text.tokenizers import same_ids  # text
        return same_ids(own, theirs, is_padded=is_foreign(where))  # text
    return True


def run_factorize(s):
    """python surgery.py factorize"""
    old = read(s, s.from_)
    for name, layer in old.model.named_modules():
        if isinstance(layer, LowRank):
            raise UserError(f'from={s.from_}: {name} is low-rank already: give the dense network')
    cfg = with_ranks(old.model.cfg, s)
    check(cfg)
    moments = None
    if old.data is not None:
        moments = input_moments(old.model, old.data)
    weights, records = factorize(old.model, uniform_ranks(cfg), s.energy, moments)
    if s.energy:
        cfg = dataclasses.replace(cfg, ranks={r['name']: r['rank'] for r in records if r['rank']})
        if not cfg.ranks:
            raise UserError(f'energy={s.energy:g}: two factors that keep so much would not be smaller than '
                            'any of the matrices: lower it')
    print(table(records, by_output=moments is not None) + '\n')
    write(s, 'factorize', old, cfg, weights)


def with_ranks(cfg, s):
    """
    A ModelConfig with the ranks of factorize's settings; other low-rank settings of the blocks get their
    defaults.
    """
    ranks = {}
    for field in dataclasses.fields(cfg):
        is_embedding = field.name in ('rank_embed', 'rank_head')
        if field.name.startswith('rank_') and not is_embedding:
            ranks[field.name] = field.default
    ranks |= {'rank_qk': s.rank_qk, 'rank_vo': s.rank_vo, 'rank_mlp': s.rank_mlp, 'ranks': {}}
    return dataclasses.replace(cfg, **ranks)


def uniform_ranks(cfg):
    """{name: rank} of the low-rank layers of a model."""
    with torch.device('meta'):
        model = make_model(cfg)
    return {name: layer.down.out_features for name, layer in model.named_modules()
            if isinstance(layer, LowRank)}
