"""
Where a run starts from: random weights, its own newest checkpoint, or weights that were trained elsewhere.

`s` is train.py's Settings, `ranks` its Ranks.
"""
import dataclasses
import itertools
import json
import os
import re
from contextlib import suppress
from functools import partial

import torch

import checkpoint
import hub
from batches import Source, advice, described
from configurator import UserError, check, default_of, expand_home, extend, from_dict, part_of, with_features
from features.lora import adapters, peft_files
from features.lora import layers as lora
from features.t5.objectives import stored_begin, stored_objective
from model import ModelConfig, make_model, only_in_training
from tokenizer import same_ids


def identity(s):
    """The settings that a resumed run may not change: the network, and which rows step n reads (the data are compared by fingerprint)."""
    names = [f.name for f in dataclasses.fields(model_config(s)) if f.name not in only_in_training(type(s))]
    names += ['mix_by', 'packing', 'objective', 'denoisers', 'seed', 'optimizer', 'pseudo_counts']
    names += [f.name for f in dataclasses.fields(lora.LoraConfig) if f.name not in ('lora_dropout', 'lora_plus')]
    return [name for name in names if hasattr(s, name)]


def model_config(s):
    return part_of(s, ModelConfig)


def read_model(where, which='best', encoder=False, untie=False):
    """
    (ModelConfig, {name: tensor}, folder) of a checkpoint directory, of a run's `which` checkpoint, or of what hub.py knows; an adapter is merged into
    its base, which untie=True gives a head of its own. encoder: whether the caller can do with an encoder-decoder; else UserError, as for an adapter that
    cannot be merged.
    """
    if hub.knows(where):
        cfg, weights, folder = *hub.load(where), hub.find(where)
    else:
        folder = checkpoint.find(where, which)
        state = checkpoint.load_state(folder)
        cfg = from_dict(ModelConfig, state['model'], os.path.join(folder, 'state.json'))
        if 'base' in state:
            model = read_adapted(state, folder)
            if untie:
                adapters.untie(model)
            if adapters.obstacle(model):
                raise UserError(f'{where}: {adapters.obstacle(model)}')
            adapters.merge(model)
            cfg, weights = model.cfg, adapters.base_state(model)
        else:
            weights = checkpoint.read_weights(folder)
    check_kind(where, cfg, encoder)
    return cfg, weights, folder


def check_kind(where, cfg, encoder):
    if cfg.n_encoder_layer and not encoder:
        raise UserError(f'{where}: is an encoder-decoder (n_encoder_layer={cfg.n_encoder_layer}), this takes a decoder alone: sample.py runs it')


def load_model(where, which='best', encoder=False):
    """(the model in eval mode, its folder) of what read_model() knows, and of adapters that cannot be merged: they speak beside their base."""
    if not hub.knows(where):
        folder = checkpoint.find(where, which)
        state = checkpoint.load_state(folder)
        if 'base' in state:
            model = read_adapted(state, folder)
            check_kind(where, model.cfg, encoder)
            if adapters.obstacle(model):
                return model, folder
            adapters.merge(model)
            return fill(model.cfg, adapters.base_state(model), folder), folder
    cfg, weights, folder = read_model(where, which, encoder)
    return fill(cfg, weights, folder), folder


def read_base(base, cfg, adapter):
    """The weights that an adapter in the folder `adapter` was trained beside, as its state.json names them; cfg: its network."""
    where = base['from']
    if not hub.knows(where) and not os.path.isdir(where):  # that checkpoint is gone: the run's best one may be the same
        where = os.path.dirname(where)
        if not os.path.isdir(where):
            raise UserError(f'{adapter}: is an adapter beside {base["from"]}, which is not there: put it back')
    _, weights, _ = read_model(where, encoder=True)
    adapters.check_base(weights, base['weights'], where, adapter)
    return shorten(weights, cfg)


def shorten(weights, cfg):
    """Weights with no more learned positions than a network of this ModelConfig has."""
    if cfg.position == 'learned':
        weights['wpe.weight'] = weights['wpe.weight'][:max(cfg.block_size, getattr(cfg, 'source_context', 0))]
    return weights


def read_adapted(state, folder):
    """The network of a checkpoint that holds an adapter, beside its base, in eval mode."""
    cfg = from_dict(ModelConfig, state['model'], os.path.join(folder, 'state.json'))
    model = fill(cfg, read_base(state['base'], cfg, folder), state['base']['from'])
    adapters.add(model, adapters.described(state['lora'], checkpoint.read_weights(folder)), folder, 'default')
    return model


def add_adapters(model, given, base):
    """
    Let adapters speak beside the network of `base`: given, a list of DIR or name=DIR, runs of ours or folders of PEFT's. Returns {name: DIR}. Raises
    UserError for one that is for another network.
    """
    weights, named = model.state_dict(), {}
    if given and hasattr(model, 'lora'):
        raise UserError(f'{base}: is an adapter itself that is not merged: {adapters.obstacle(model)}')
    for entry in given:
        name, where = split_name(entry)
        if name in named or hasattr(torch.nn.ModuleDict(), name):
            raise UserError(f'adapter={entry}: {name!r} is no name for one, or there twice: give another of letters and digits, name=DIR')
        named[name] = where
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
    """The lora.Saved of a run of ours or of a folder of PEFT's, for a network of this ModelConfig with these weights."""
    if peft_files.is_one(where):
        check_adapter(where, base)
        return peft_files.read(where, cfg)
    folder = checkpoint.find(where, 'best')
    state = checkpoint.load_state(folder)
    if 'base' not in state:
        raise UserError(f'adapter={where}: holds a whole network, no adapter: give it as --out_dir or --init_from')
    adapters.check_base(weights, state['base']['weights'], base, where)
    return adapters.described(state['lora'], checkpoint.read_weights(folder))


def check_adapter(where, base):
    """Raise UserError where a folder of PEFT's has a tokenizer that is not that of the base."""
    is_same = True
    with suppress(UserError):  # most have none
        theirs = hub.tokenizer(f'hf:{where}')[::-1]
        folder = '' if hub.knows(base) else checkpoint.find(base, 'best')
        is_same = same_ids(tokenizer_of(base, folder), theirs, is_padded=True)
    if not is_same:
        raise UserError(f'adapter={where}: the tokenizer beside it is not that of {base}: give its own base')


def fill(cfg, weights, where):
    """The network of a ModelConfig in eval mode, with these weights from `where`. Raises UserError where they are not its own."""
    model = make_model(cfg, init=False)
    checkpoint.load_weights(model, weights, where)
    return model.eval()


def validation_sources(where, cfg, dataset='', block_size=0):
    """
    The validation split of every corpus that the network of `where` was trained on, or of `dataset`, as data.Sources with rows of block_size, or
    as long as the network reads. Raises UserError where there is none, or one of another tokenizer.
    """
    folder = hub.find(where) if hub.knows(where) else checkpoint.find(where, 'best')
    state = {} if hub.knows(where) else checkpoint.load_state(folder)
    settings = state.get('settings', {})
    dataset = dataset or settings.get('dataset')  # surgery.py knows none of the weights of others
    if not dataset:
        raise UserError(f'dataset: {where} does not say what it was trained on: give --dataset=NAME')
    sources = []
    for name in dataset if isinstance(dataset, dict) else [dataset]:
        source = Source(name, 'val', block_size or cfg.block_size, 'stream' if block_size else settings.get('packing', 'stream'),
                        objective=None if block_size else partial(stored_objective, settings, cfg),
                        begin=stored_begin(state))
        check_tokenizer(f'dataset={name}', where, folder, source.files)
        if source.files.vocab_size > cfg.vocab_size:
            wanted = state.get('tokenizer', {})
            raise UserError(f'dataset={name}: has {source.files.vocab_size} tokens, the network of {where} '
                            f'{cfg.vocab_size}: prepare it {advice(wanted, folder, source.files)}')
        sources.append(source)
    return sources


def check_tokenizer(setting, where, folder, files):
    """
    Raise UserError unless a data set (data.TokenFiles) has the tokenizer of a network: `where` it is, and its
    folder, as read_model() has them. The message begins with `setting`. Prints a line where the two cannot be
    compared.
    """
    found = files.meta['tokenizer'], files.folder
    try:
        wanted = tokenizer_of(where, folder)
        is_same = same_ids(wanted, found, is_padded=hub.knows(where))
    except UserError as error:
        print(f'{setting}: the tokenizers of {where} and of {files.folder} were not compared ({error}): '
              'make sure that they are the same', flush=True)
        return
    if not is_same:
        which = '' if setting.startswith('dataset=') else f'{files.folder} '
        raise UserError(f'{setting}: {which}was prepared with another tokenizer than the one of {where}: '
                        f'prepare it {advice(*wanted, files)}')


def tokenizer_of(where, folder):
    """(description, folder of its files) of the tokenizer of a network: arguments as in check_tokenizer()."""
    if hub.knows(where):
        return hub.tokenizer(where)[::-1]
    return checkpoint.load_state(folder)['tokenizer'], folder


def description_of(where, folder):
    """The description of a network's tokenizer, {} for weights of others; arguments as in check_tokenizer()."""
    return {} if hub.knows(where) else checkpoint.load_state(folder)['tokenizer']


def find_origin(s, ranks):
    """
    What the run starts from: {} (random weights), {'folder', 'state'} of a checkpoint to go on from, or {'weights', 'tokenizer', 'step',
    'flops', 'moments'} trained elsewhere, whose network becomes that of `s`; tokenizer: the folder with it; moments: the folder with them, if they
    are to be kept.
    """
    found = ranks.from_first(lambda: checkpoint.checkpoints(s.out_dir))
    if found and s.init_from == 'scratch' and was_begun_by(s.out_dir, ranks):
        s.init_from = 'auto'
    if found and s.eval_only and ranks.from_first(partial(began_with_others, s)):
        found = []
    if s.init_from == 'resume' or (found and s.init_from != 'scratch'):
        folder = ranks.from_first(lambda: checkpoint.find(s.out_dir))
        state = checkpoint.load_state(folder)
        for name in ('objective', 'denoisers', 'packing', 'dataset') if s.eval_only else ():  # what the losses of the run are of
            if name not in s.given and name in state['settings']:
                setattr(s, name, state['settings'][name])
        for f in dataclasses.fields(lora.LoraConfig) if 'base' in state else ():
            if f.name not in s.given and f.name in state['settings']:
                setattr(s, f.name, state['settings'][f.name])
        if 'surgery' in state:
            raise UserError(f'out_dir={s.out_dir}: holds the work of surgery.py {state["surgery"]}, not a run to go on with: '
                            f'give --init_from={s.out_dir} and another --out_dir')
        if s.eval_only or state['settings']['init_from'] not in ('auto', 'scratch'):  # as it began: it may have grown since
            began = {name: state['settings'][name] for name in state['model'] if name in state['settings']}
            adopt(s, from_dict(ModelConfig, began, folder), s.out_dir)
        base = {'base': state['base'], 'weights': read_base(state['base'], from_dict(ModelConfig, state['model'], folder), folder)} if 'base' in state else {}
        return {'folder': folder, 'state': state} | base
    if s.init_from in ('auto', 'scratch'):
        if s.lora_rank:
            raise UserError(f'lora_rank={s.lora_rank}: adapters are trained beside weights that are there: give --init_from=DIR')
        return {}
    if hub.knows(s.init_from):
        ranks.from_first(lambda: hub.find(s.init_from))  # one rank downloads
    cfg, weights, folder = read_model(s.init_from, encoder=True)
    if cfg.rank_guide:
        raise UserError(f'init_from={s.init_from}: was saved in the middle of its guided start (rank_guide): let that run go on to the end of it')
    broken = checkpoint.first_not_finite(weights)
    if broken:
        raise UserError(f'init_from={s.init_from}: {broken} is not finite: give other weights')
    adopt(s, cfg, s.init_from)
    base = {'base': {'from': s.init_from if hub.knows(s.init_from) else folder, 'weights': adapters.fingerprint(weights)}} if s.lora_rank else {}
    return {'weights': shorten(weights, model_config(s)), 'tokenizer': folder} | base | kept(s, folder)


def began_with_others(s):
    """Whether init_from names weights, and the run in out_dir did not begin with them."""
    if s.init_from in ('auto', 'scratch', 'resume'):
        return False
    stored = checkpoint.load_state(checkpoint.find(s.out_dir))['settings']
    return not same_place(s.init_from, expand_home(stored['init_from']))


def was_begun_by(out_dir, ranks):
    """
    Whether the run in out_dir was begun by this torchrun job, which has started its processes again after a failure: they are
    to go on, though their command says --init_from=scratch.
    """
    job = ranks.job()
    if os.environ.get('TORCHELASTIC_RESTART_COUNT', '0') == '0':
        return False

    def look():
        try:
            state = checkpoint.load_state(checkpoint.find(out_dir))
        except UserError:  # none is sound
            return False
        return bool(set(job) & set(state.get('job', ())))
    return ranks.from_first(look)


def kept(s, folder):
    """What s.init_keep says to keep of the run that the weights are from, beside them."""
    if s.init_keep == 'weights':
        return {}
    state = {} if hub.knows(s.init_from) else checkpoint.load_state(folder)
    if not any(checkpoint.read_moments(folder).values() if state else ()):
        raise UserError(f"init_keep={s.init_keep}: {s.init_from} has no optimizer's moments: leave it out")
    if is_old_table(state['settings']):
        raise UserError(f'init_keep={s.init_keep}: {s.init_from} holds a Markov table that was counted before '
                        'there was optimizer=counts, its counts in another unit: leave it out')
    if state['settings']['optimizer'] != s.optimizer:
        raise UserError(f'init_keep={s.init_keep}: the moments in {s.init_from} are those of {state["settings"]["optimizer"]}: set optimizer to that')
    if s.init_keep == 'optimizer':
        return {'moments': folder}
    if s.init_keep != 'schedule':
        raise UserError(f'init_keep={s.init_keep}: has no code in origin.py: use weights, optimizer or schedule')
    step, stored = state.get('of_step', state['step']), state['settings']
    rows, before = s.batch_size * s.gradient_accumulation_steps, stored['batch_size'] * stored['gradient_accumulation_steps']
    if rows != before and 'surgery' not in state:
        raise UserError(f'batch_size * gradient_accumulation_steps = {rows}: init_keep=schedule goes on in the data of {s.init_from}, which had {before} '
                        'rows a step: give as many')
    if step >= s.max_iters:
        raise UserError(f'max_iters={s.max_iters}: the weights in {s.init_from} are at step {step} of their schedule: raise it')
    return {'moments': folder, 'step': step, 'flops': state['flops']}


def build_model(s, data, origin, is_blank=False):
    """
    The model on the CPU, from `origin`; is_blank: on the meta device, its shapes alone. Raises UserError where its vocabulary or its run is not that of
    the data.
    """
    s.vocab_size = s.vocab_size or data.vocab_size
    if s.vocab_size < data.vocab_size:
        to_do = 'leave vocab_size out'
        if 'tokenizer' in origin:
            wanted = description_of(s.init_from, origin['tokenizer'])
            to_do = f'prepare it {advice(wanted, origin["tokenizer"], data.sources[0].files)}'
        raise UserError(f'vocab_size={s.vocab_size}: the data set {s.dataset} has {data.vocab_size} tokens: {to_do}')
    check(s)  # once more, now that the vocabulary is known
    if 'state' in origin and not s.eval_only:
        check_same_run(s, data, origin['state'])
    torch.manual_seed(s.seed)
    cfg = model_config(s)
    if 'state' in origin:
        cfg.rank_guide = origin['state']['model'].get('rank_guide', 0)  # gone, if the run is past them
        cfg.n_layer = origin['state']['model']['n_layer']  # grown, perhaps
        cfg.ranks = origin['state']['model'].get('ranks', {})
    with torch.device('meta' if is_blank else 'cpu'):
        model = make_model(cfg, init=not origin)
    if 'weights' in origin and not is_blank:
        checkpoint.load_weights(model, origin['weights'], s.init_from)
    if s.lora_rank:
        lora.begin(model, s, is_new='state' not in origin and not is_blank)
    if 'state' in origin and not is_blank:
        load = adapters.load_state if s.lora_rank else checkpoint.load_weights
        load(model, checkpoint.read_weights(origin['folder']), origin['folder'])
    return model


def find_teacher(s, data, ranks):
    """The network of s.teacher in eval mode, to distil from. Raises UserError unless it knows the same tokens and a context as long."""
    if same_place(s.teacher, s.out_dir):
        raise UserError(f'teacher={s.teacher}: is the out_dir of this run: name another')
    if hub.knows(s.teacher):
        ranks.from_first(lambda: hub.find(s.teacher))  # one rank downloads
    teacher, folder = load_model(s.teacher)
    cfg = teacher.cfg
    if cfg.arch == 'markov':
        raise UserError(f'teacher={s.teacher}: a Markov chain, takes a transformer')
    if cfg.vocab_size != s.vocab_size:
        raise UserError(f'teacher={s.teacher}: its {cfg.vocab_size:,} tokens are not the {s.vocab_size:,} of this run: '
                        f'prepare the data {advice(description_of(s.teacher, folder), folder, data.sources[0].files)}')
    files = data.sources[0].files
    ranks.from_first(partial(check_tokenizer, f'teacher={s.teacher}', s.teacher, folder, files))
    if cfg.block_size < s.block_size:
        raise UserError(f'teacher={s.teacher}: knows {cfg.block_size} positions, fewer than block_size={s.block_size}: lower it')
    return teacher.requires_grad_(False)


def find_reference(s, cfg):
    """(ModelConfig, weights) of s.grow_from, whose blocks this network is to get. Raises UserError where they would not fit."""
    other, weights, _ = read_model(s.grow_from)
    if other.n_layer < s.grow_to:
        raise UserError(f'grow_from={s.grow_from}: has {other.n_layer} blocks, fewer than grow_to={s.grow_to}: lower it')
    if cfg.sizes() != other.sizes():
        raise UserError(f'grow_from={s.grow_from}: its matrices are {other.sizes()}, of this network {cfg.sizes()}: its blocks do not fit')
    for n, name in itertools.product(range(cfg.n_layer), cfg.sizes()):
        if cfg.rank(n, name) != other.rank(n, name):
            raise UserError(f'grow_from={s.grow_from}: blocks.{n}.{name} has rank {other.rank(n, name)}, in this network {cfg.rank(n, name)}: '
                            'its blocks do not fit')
    free = {*only_in_training(type(cfg)), 'n_layer', 'block_size', 'ranks', 'first_block_dense', 'n_kv_head', 'head_dim', 'd_ff', 'zero_init', 'init_std',
            'rank_init'}
    for f in dataclasses.fields(cfg):
        if f.name not in free and getattr(cfg, f.name) != getattr(other, f.name):
            raise UserError(f'grow_from={s.grow_from}: has {f.name}={getattr(other, f.name)}, this network {getattr(cfg, f.name)}: its blocks do not fit')
    return other, weights


def adopt(s, cfg, where):
    """Take the model's settings from weights that were trained elsewhere; only a shorter context, that of an encoder and what matters in training
    alone are the user's."""
    if s.block_size > cfg.block_size and 'block_size' in s.given:
        raise UserError(f'block_size={s.block_size}: the weights in {where} know {cfg.block_size} positions: lower it')
    extend(s, *getattr(cfg, 'features', ()))
    unset = {f.name: default_of(f) for f in dataclasses.fields(with_features(ModelConfig, *getattr(s, 'features', ())))}
    for name, value in (unset | dataclasses.asdict(cfg)).items():
        if name in only_in_training(type(s)) or (name == 'block_size' and name in s.given):
            continue
        if name == 'expert_bias' and name in s.given and value and s.expert_bias:  # there is one: how fast it moves is the user's
            continue
        if name == 'source_size' and cfg.n_encoder_layer:  # it was written for one length, but distances are no parameters
            if name in s.given and cfg.position == 'learned' and s.source_size > cfg.source_context:
                raise UserError(f'source_size={s.source_size}: the weights in {where} know {cfg.source_context} positions: lower it')
            s.source_size = s.source_size if name in s.given and s.source_size else cfg.source_context
            continue
        if name in s.given and getattr(s, name) != value:
            raise UserError(f'{name}={getattr(s, name)}: the weights in {where} have {name}={value}: leave it out')
        setattr(s, name, value)


def same_place(one, other):
    """Whether two settings name the same run, checkpoint or folder, however they are spelled."""
    if one.startswith('hf:') and other.startswith('hf:'):
        return same_place(*(os.path.expanduser(name.removeprefix('hf:')) for name in (one, other)))
    return os.path.realpath(one) == os.path.realpath(other)


def shares(dataset):
    """The weights of a mixture, in their order; None of a single data set."""
    return list(dataset.values()) if isinstance(dataset, dict) else None


def is_old_table(settings):
    """Whether a run with these settings counted a full Markov table when that was still called adamw."""
    is_table = settings.get('arch') == 'markov' and not settings.get('rank_embed')
    return is_table and 'pseudo_counts' not in settings


def check_same_run(s, data, state):
    """Raise UserError unless the stored run is this one: same network, same data in the same order."""
    stored, unset = state['settings'], type(s)()
    to_do = 'give another --out_dir, or --init_from=scratch to begin anew (the old run is moved aside)'
    if is_old_table(stored):
        raise UserError(f'out_dir={s.out_dir}: holds a Markov table that was counted before there was '
                        f'optimizer=counts, its counts in another unit: {to_do}')
    for name in identity(s):
        # as text: the order of a mixture counts; a setting that the stored run did not know was at its default
        before = stored.get(name, getattr(unset, name))
        if json.dumps(getattr(s, name)) != json.dumps(before) and (name != 'denoisers' or s.objective == 'ul2'):
            raise UserError(f'{name}={getattr(s, name)}: out_dir={s.out_dir} belongs to a run with {name}={before}: {to_do}')
    rows, old = s.batch_size * s.gradient_accumulation_steps, stored['batch_size'] * stored['gradient_accumulation_steps']
    if rows != old:
        raise UserError(f'batch_size * gradient_accumulation_steps = {rows}: out_dir={s.out_dir} belongs to a run with {old} rows a step: {to_do}')
    if s.init_from not in ('auto', 'resume') and not same_place(s.init_from, expand_home(stored['init_from'])):
        raise UserError(f'init_from={s.init_from}: out_dir={s.out_dir} belongs to a run with init_from={stored["init_from"]}: {to_do}')
    if data.begin != stored_begin(state):
        raise UserError(f'packing={s.packing}: rows begin {described(data.begin)} here, those of the run in '
                        f'{s.out_dir} {described(stored_begin(state))}: {to_do}')
    # in their order, whatever their names: the files of a run may be moved, or copied to another machine
    is_same = list(data.fingerprint().values()) == list(state['data'].values()) and shares(s.dataset) == shares(stored['dataset'])
    if not is_same and s.dataset != stored['dataset']:
        raise UserError(f'dataset={s.dataset}: out_dir={s.out_dir} belongs to a run with dataset={stored["dataset"]}, of other files or '
                        f'weights: {to_do}')
    if not is_same:
        raise UserError(f'dataset={s.dataset}: its files are not those that the run in {s.out_dir} was trained on: {to_do}')
    s.init_from = stored['init_from']  # what it began with, whatever the resuming command says
