"""
Read and write adapters in PEFT's format: a folder with adapter_config.json and adapter_model.safetensors.

    write('FOLDER', cfg, saved, family='gpt2')    # write a lora.Saved, for a model with this ModelConfig
    saved = read('FOLDER', cfg)                   # read one, for adapters.add()

PEFT only warns about missing tensors and ignores unknown ones, so an adapter with a wrong prefix has no
effect. Here all names must match exactly.
"""
import math
import os
import re

import torch
from safetensors import SafetensorError, safe_open

from checkpoint import new_folder, replace_json, write_tensors
from configurator import UserError
from features.lora import adapters
from features.lora import layers as lora

ROOT = 'base_model.model.'
EXACT = {  # fields that change what an adapter does, and the only value that we follow
         'lora_bias': False, 'use_qalora': False, 'use_bdlora': None, 'layer_replication': None,
         'alora_invocation_tokens': None, 'target_parameters': None,
         'megatron_config': None, 'kasa_config': None, 'velora_config': None, 'monteclora_config': None,
         'arrow_config': None,
}
KINDS = {  # of the fields that are read; null is none
         'r': int, 'lora_alpha': (int, float), 'lora_dropout': (int, float), 'use_dora': bool,
         'use_rslora': bool, 'target_modules': (list, str),
         'exclude_modules': (list, str), 'modules_to_save': list, 'layers_to_transform': (int, list),
         'rank_pattern': dict, 'alpha_pattern': dict,
         'trainable_token_indices': (list, dict),
}
PLAIN_STARTS = (True, False, 'gaussian', 'orthogonal', 'eva')  # others take something out of the weights


def modules(family, cfg):
    """
    {their module: [ours, …]} of all matrices, tables and norms of a model; several of ours are stacked to one
    of theirs.
    """
    from features.hf.families import FAMILIES
    family, found = FAMILIES[family], {}
    for theirs, ours in (family.names_of(cfg) | {family.head: 'head'}).items():
        theirs = theirs if theirs == family.head else family.prefix + theirs
        # an adapter there says nothing in transformers 5: the stacks' own names for it are looked at
        if theirs == 'shared':
            found |= {'encoder.embed_tokens': ['wte_encoder'], 'decoder.embed_tokens': ['wte']}
            continue
        count = cfg.n_encoder_layer if ours.startswith('encoder.') else cfg.n_layer
        for n in range(count) if '.N.' in theirs else (0,):
            found[theirs.replace('.N.', f'.{n}.')] = ours.replace('.N.', f'.{n}.').split()
    return found


def is_target(module, wanted):
    """Whether PEFT's target_modules, a list of suffixes or a pattern, match this module."""
    if isinstance(wanted, str):
        return re.fullmatch(wanted, module) is not None
    return any(module == ending or module.endswith('.' + ending) for ending in wanted)


# -----------------------------------------------------------------------------
# Out

def fuse(layers, name, heads=0):
    """
    (A, B, magnitude or None, scale) of one of their matrices that consists of several of ours, in float32;
    not all of ours need an adapter. heads: as in names.Row.
    """
    from features.hf.names import join
    with_adapter = {layer: layer.lora[name] for layer in layers if name in getattr(layer, 'lora', ())}
    some = list(with_adapter.values())
    is_one, scale = len({id(adapter.A) for adapter in some}) == 1, some[0].scale
    As = [adapter.A for adapter in some][:1 if is_one else None]
    rows, lengths, begin = [], [], 0
    for layer in layers:
        adapter = with_adapter.get(layer)
        if adapter is None:
            rows.append(torch.zeros(layer.weight.size(-2), sum(map(len, As))))
        elif is_one:
            rows.append(adapter.B)
        else:  # a block of columns for each
            rows.append(torch.nn.functional.pad(adapter.B * (adapter.scale / scale),
                                                (begin, sum(map(len, As)) - begin - len(adapter.A))))
            begin += len(adapter.A)
        if some[0].length is not None:
            if adapter is None:
                raise UserError('lora_dora=True: q, k and v are one matrix there: '
                                'give adapters to all of them, or to none')
            lengths.append(adapter.length)
    return torch.cat(As), join(rows, heads), join(lengths, heads) if lengths else None, scale


@torch.no_grad()
def write(folder, cfg, saved, family, base=''):
    """
    Write a lora.Saved, for a model of this ModelConfig, in PEFT's format for the model of transformers'
    `family`: a new folder, complete or not at all. Raises UserError for features that PEFT does not have.
    """
    from features.hf.families import FAMILIES
    model, name = adapters.blank(cfg), 'default'
    for tensor, t in saved.tensors.items():  # trained whole
        layer, _, kind = tensor.rpartition('.')
        if '.lora.' not in tensor and layer != 'wte.tokens':
            setattr(model.get_submodule(layer), kind, torch.nn.Parameter(t.clone()))
    lora.attach(model, saved)
    for p in model.parameters():
        p.requires_grad_(not p.is_meta)
    adapters.load_state(model, saved.tensors, folder)
    tensors, scales, ranks, known, named = {}, {}, {}, modules(family, cfg), dict(model.named_modules())
    places = {ours: theirs for theirs, parts in known.items() for ours in parts}
    for layer_name in (layer_name for layer_name, layer in lora.adapted(model) if name in layer.lora):
        if layer_name not in places:
            raise UserError(f'{layer_name}: has an adapter, '
                            f'and no place in a network of the family {family}: leave it out of lora_targets')
    for theirs, ours in known.items():
        layers = [named[part] for part in ours if part in named]
        if not any(name in getattr(layer, 'lora', ()) for layer in layers):
            continue
        heads = FAMILIES[family].heads_of(f'{theirs}.weight', cfg)
        A, B, length, scales[theirs] = fuse(layers, name, heads)
        ranks[theirs] = len(A)
        keys = (('lora_embedding_A', 'lora_embedding_B') if isinstance(layers[0], torch.nn.Embedding)
                else ('lora_A.weight', 'lora_B.weight'))
        tensors |= {f'{theirs}.{keys[0]}': A, f'{theirs}.{keys[1]}': B} | (
            {} if length is None else {f'{theirs}.lora_magnitude_vector': length})
    whole = write_whole(model, known, ranks, tensors, FAMILIES[family])
    r, alpha = next(iter(ranks.values())), {module: scales[module] * rank for module, rank in ranks.items()}
    endings = sorted({module.rsplit('.', 1)[-1] for module in ranks})
    config = {
        'peft_type': 'LORA', 'task_type': 'SEQ_2_SEQ_LM' if cfg.n_encoder_layer else 'CAUSAL_LM',
        'base_model_name_or_path': base,
        # alpha says it
        'inference_mode': True, 'r': r, 'lora_alpha': alpha[next(iter(ranks))], 'lora_dropout': saved.dropout,
        'use_rslora': False,
        'use_dora': saved.is_dora, 'bias': 'all' if any(tensor.endswith('.bias') for tensor in tensors)
        else 'none', 'fan_in_fan_out': family == 'gpt2',
        'init_lora_weights': True, 'modules_to_save': whole or None,
        'rank_pattern': {module: rank for module, rank in ranks.items() if rank != r},
        'alpha_pattern': {module: a for module, a in alpha.items() if a != alpha[next(iter(ranks))]},
        'target_modules': endings
        if {module for module in known if is_target(module, endings)} == ranks.keys() else sorted(ranks),
        'trainable_token_indices': {places['wte'].rsplit('.', 1)[-1]: saved.tokens} if saved.tokens else None,
    }
    if saved.tokens:
        tensors[f'{places["wte"]}.token_adapter.trainable_tokens_delta'] = model.wte.tokens.values
    with new_folder(folder) as new:
        tensors = {ROOT + module: t.detach().float().contiguous() for module, t in tensors.items()}
        write_tensors(os.path.join(new, 'adapter_model.safetensors'), tensors, {'format': 'pt'})
        replace_json(os.path.join(new, 'adapter_config.json'), dict(sorted(config.items())))


def write_whole(model, known, ranks, tensors, family):
    """Add the fully trained tensors; returns the suffixes of the modules that PEFT must store fully."""
    from features.hf.names import join
    trained, whole = {name: p for name, p in model.named_parameters()
                      if p.requires_grad and '.lora.' not in name and name != 'wte.tokens.values'}, set()
    for theirs, ours in known.items():
        for kind in ('weight', 'bias'):
            parts = [trained.pop(f'{part}.{kind}', None) for part in ours]
            if all(part is None for part in parts):
                continue
            if (any(part is None for part in parts)
                    or kind == 'weight' and (theirs in ranks or parts[0].ndim > 1)):
                raise UserError(f'{ours[0]}.{kind}: is trained fully, which PEFT does not support here')
            tensor = f'{theirs}.{kind}'
            t = join(parts, family.heads_of(tensor, model.cfg)) - family.shift_of(tensor)
            tensors[f'{theirs}.base_layer.bias' if theirs in ranks else tensor] = t
            whole |= {theirs.rsplit('.', 1)[-1]} if kind == 'weight' else set()
    if trained:
        raise UserError(f'{min(trained)}: is trained fully, which PEFT does not support')
    return sorted(whole)


def family_of(cfg, base):
    """The family whose names a model of this ModelConfig has. Raises UserError if there is none."""
    from features.hf.config_json import read_json
    from features.hf.families import FAMILIES, nearest
    config = os.path.join(base.removeprefix('hf:'), 'config.json')
    if (os.path.isfile(config) and (kind := read_json(config).get('model_type')) in FAMILIES
            and FAMILIES[kind].names_of(cfg)):
        return kind
    kind, in_the_way = nearest(cfg)
    if in_the_way:
        raise UserError(f'{", ".join(in_the_way)}: no class of transformers has this (the nearest '
                        f'is {kind}), so PEFT has no place for the adapter: surgery.py merge, '
                        'then hub.py export --as=custom')
    return kind


# -----------------------------------------------------------------------------
# In

def is_one(folder):
    """Whether a folder is an adapter in PEFT's format."""
    return os.path.isfile(os.path.join(folder, 'adapter_config.json'))


def read(folder, cfg):
    """
    The lora.Saved of a folder, for a model of this ModelConfig. Raises a one-line UserError if it is not
    exactly an adapter for this model.
    """
    from features.hf.config_json import read_json
    path, weights = (os.path.join(folder, name)
                     for name in ('adapter_config.json', 'adapter_model.safetensors'))
    config = read_json(path)
    if config.get('peft_type') != 'LORA':
        raise UserError(f'{path}: peft_type={config.get("peft_type")!r}: takes LORA')
    for field, plain in EXACT.items():
        if config.get(field, plain) not in (plain, None):
            raise UserError(f'{path}: {field}={config[field]!r}: takes {plain}: minnow does not support it')
    for field, kind in KINDS.items():
        value = config.get(field)
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool) != (kind is bool)):
            raise UserError(f'{path}: {field}={value!r}: is invalid in PEFT')
        if (isinstance(value, list)
                and not all(type(item) is (int if field in ('layers_to_transform', 'trainable_token_indices')
                                           else str) for item in value)):
            raise UserError(f'{path}: {field}={value!r}: is invalid in PEFT')
    if not 0 <= (config.get('lora_dropout') or 0) < 1:
        raise UserError(f'{path}: lora_dropout={config["lora_dropout"]}: takes 0 <= lora_dropout < 1')
    patterns = [config.get(field) for field in ('target_modules', 'exclude_modules')
                if isinstance(config.get(field), str)]
    for pattern in (*patterns, *(config.get('rank_pattern') or ()), *(config.get('alpha_pattern') or ())):
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(f'{path}: {pattern!r} is not a valid pattern: {error}') from None
    if config.get('init_lora_weights', True) not in PLAIN_STARTS:
        raise UserError(f'{path}: init_lora_weights={config["init_lora_weights"]!r}: '
                        'this takes a part out of the base; let PEFT convert it to a plain adapter '
                        '(save_pretrained with path_initial_model_for_weight_conversion)')
    try:
        file = safe_open(weights, 'pt')
        tensors = {name.removeprefix(ROOT): file.get_slice(name) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise UserError(f'{weights}: not readable as safetensors: {error}') from None
    return Reading(path, config, tensors, cfg).saved()


class Reading:
    """One folder while it is read. tensors: {name: slice}; shapes are checked before a tensor is read."""

    def __init__(self, path, config, tensors, cfg):
        from features.hf.families import FAMILIES, nearest
        self.path, self.config, self.tensors, self.cfg = path, config, tensors, cfg
        self.left = set(tensors)
        stems = {re.sub(
            r'\.(lora_|token_adapter\.|base_layer\.|original_module\.|modules_to_save\.|weight$|bias$).*', '',
            name) for name in tensors}
        fits = {kind: len(stems - modules(kind, cfg).keys()) for kind, family in FAMILIES.items()
                if family.names_of(cfg)}
        own, _ = nearest(cfg)  # of several with the same names
        kind = min(fits, key=lambda kind: (fits[kind], kind != own))
        if fits[kind] or not stems:
            stray = min(stems - modules(kind, cfg).keys(), default='no tensor')
            raise UserError(f'{path}: {stray}: no family that we know ({", ".join(fits)}) has this: '
                            'it is an adapter for another network')
        self.modules, self.family = modules(kind, cfg), FAMILIES[kind]

    def refuse(self, what):
        raise UserError(f'{self.path}: {what}')

    def shape(self, name):
        """The shape of a tensor, a list, by the header of the file."""
        if name not in self.tensors:
            self.refuse(f'{name}: not in the file, which says that there is an adapter')
        return self.tensors[name].get_shape()

    def take(self, name, *shape):
        """A tensor of the file in float32, which must have this shape; None for a size: any size."""
        found = self.shape(name)
        if len(found) != len(shape) or any(size not in (None, n) for n, size in zip(found, shape)):
            self.refuse(f'{name}: {found}, '
                        f'this network takes {["any" if size is None else size for size in shape]}: '
                        'it is an adapter for another base')
        dtype = self.tensors[name].get_dtype()
        if dtype not in ('F32', 'F16', 'BF16'):
            self.refuse(f'{name}: {dtype}, takes float32, float16 or bfloat16')
        t = self.tensors[name][:].float()
        if not t.isfinite().all():
            self.refuse(f'{name}: holds NaN or infinity')
        self.left.discard(name)
        return t

    def number(self, field, pattern, module, default):
        """lora_alpha or r of a module."""
        over = next((value for key, value in (self.config.get(pattern) or {}).items()
                     if re.match(rf'(.*\.)?({key})$', module)), None)
        value = over if over is not None else self.config.get(field, default)
        if type(value) not in (int, float) or not math.isfinite(value):  # one of a pattern, perhaps
            self.refuse(f'{field}={value!r}: takes a number')
        return value

    def saved(self):
        sizes = adapters.sizes(self.cfg)  # {our layer: (n_out, n_in)}
        out = lora.Saved([], float(self.config.get('lora_dropout') or 0), bool(self.config.get('use_dora')))
        targets, blocks = self.config.get('target_modules') or [], self.config.get('layers_to_transform')
        blocks = [blocks] if isinstance(blocks, int) else blocks
        for module, ours in self.modules.items():
            if not all(name in sizes for name in ours):
                continue
            number = re.search(r'\.(\d+)\.', module)
            meant = (is_target(module, targets)
                     and not is_target(module, self.config.get('exclude_modules') or [])
                     and (blocks is None or number and int(number[1]) in blocks))
            has = any(name.startswith(f'{module}.lora_') for name in self.tensors)
            if has and (meant or targets == 'all-linear') or meant and not isinstance(targets, str):
                self.adapter(module, ours, sizes, out)
        self.whole(out)
        if self.left:
            self.refuse(f'{min(self.left)}: this model has no such tensor')
        return out

    def adapter(self, module, ours, sizes, out):
        from features.hf.names import split
        n_in, n_out = sizes[ours[0]][1], sum(sizes[name][0] for name in ours)
        is_table = ours[0] in ('wte', 'wte_encoder', 'wpe')
        keys = ('lora_embedding_A', 'lora_embedding_B') if is_table else ('lora_A.weight', 'lora_B.weight')
        rank = self.number('r', 'rank_pattern', module, 8)
        found = self.shape(f'{module}.{keys[0]}')
        if found[1:] == [n_in] and found[0] != rank:
            self.refuse(f'{module}: has rank {found[0]}, the file says {rank}')
        A = self.take(f'{module}.{keys[0]}', None, n_in)
        B = self.take(f'{module}.{keys[1]}', n_out, len(A))
        length = self.take(f'{module}.lora_magnitude_vector', n_out) if out.is_dora else None
        alpha = self.number('lora_alpha', 'alpha_pattern', module, 8)
        out.places.append(lora.Place(tuple(ours), len(A), alpha / (
            math.sqrt(len(A)) if self.config.get('use_rslora') else len(A))))
        first = next(name for name in sizes if name in ours)  # layers that share A store it once
        out.tensors[f'{first}.lora.A'] = A
        rows = [sizes[name][0] for name in ours]
        heads = self.family.heads_of(f'{module}.weight', self.cfg)
        for name, part in zip(ours, split(B, rows, heads)):
            out.tensors[f'{name}.lora.B'] = part
        for name, part in zip(ours, split(length, rows, heads) if length is not None else ()):
            out.tensors[f'{name}.lora.length'] = part

    def whole(self, out):
        """Everything that was trained in addition to adapters: rows of the embedding, norms and biases."""
        from features.hf.names import split
        tokens = self.config.get('trainable_token_indices')
        if tokens:
            out.tokens = tokens if isinstance(tokens, list) else next(iter(tokens.values()))
            if (not isinstance(out.tokens, list)
                    or not all(type(n) is int and 0 <= n < self.cfg.vocab_size for n in out.tokens)):
                self.refuse(f'trainable_token_indices={tokens}: '
                            f'takes tokens from 0 to {self.cfg.vocab_size - 1}')
            module = next(theirs for theirs, ours in self.modules.items() if ours == ['wte'])
            out.tensors['wte.tokens.values'] = self.take(f'{module}.token_adapter.trainable_tokens_delta',
                                                         len(out.tokens), self.cfg.n_embd)
        for ending in self.config.get('modules_to_save') or ():
            if not any(is_target(name.rpartition('.')[0], [ending]) for name in self.tensors):
                self.refuse(f'modules_to_save={ending}: not in the file')
        own = adapters.blank(self.cfg).state_dict()
        for name in sorted(self.left):
            module, _, kind = name.rpartition('.')
            plain = re.sub(r'\.(original_module|modules_to_save)\.', '.', name)
            if plain != name and plain in self.tensors:  # with bias=all PEFT writes some of them twice
                self.left.discard(name)
                continue
            module = module if kind == 'weight' else module.removesuffix('.base_layer')
            # of an embedding that is adapted, and of its head, PEFT keeps the base too
            if name.endswith('.base_layer.weight'):
                layer = self.modules[module.removesuffix('.base_layer')][0].replace('wte_encoder', 'wte')
                out.beside[f'{layer}.weight'] = self.take(name, None, self.cfg.n_embd)
                continue
            ours = [f'{part}.{kind}' for part in self.modules.get(module, ())]
            if ours and len(self.shape(name)) == 1 and all(part in own for part in ours):
                lengths = [len(own[part]) for part in ours]
                tensor = f'{module}.{kind}'
                t = self.take(name, sum(lengths)) + self.family.shift_of(tensor)
                out.tensors |= zip(ours, split(t, lengths, self.family.heads_of(tensor, self.cfg)))
