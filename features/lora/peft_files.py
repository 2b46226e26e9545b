"""
Read and write adapters in PEFT's format: a folder with adapter_config.json and adapter_model.safetensors.

    write('FOLDER', cfg, saved, 'gpt2')           # write a lora.Saved, for a model with this ModelConfig
    saved = read('FOLDER', cfg)                   # read one, for adapters.add()

PEFT only warns about missing tensors and ignores unknown ones, so an adapter with a wrong prefix has no
effect. Here all names must match exactly.
"""
import dataclasses
import math
import os
import re

import torch
from safetensors import SafetensorError, safe_open

from checkpoint import open_regular, replace_json, write_tensors
from configurator import UserError
from features.folder import new_folder
from features.foreign_json import read_foreign
from features.lora import adapters
from features.lora import layers as lora
from features.lora.patterns import Patterns

ROOT = 'base_model.model.'
HARMLESS = (  # fields that say how it was trained or what the file holds, not what it does to the network
         'peft_type', 'task_type', 'auto_mapping', 'peft_version', 'base_model_name_or_path', 'revision',
         'inference_mode', 'fan_in_fan_out', 'bias', 'init_lora_weights', 'megatron_core', 'loftq_config',
         'eva_config', 'corda_config', 'lora_ga_config', 'qalora_group_size', 'runtime_config',
)
KINDS = {  # of the fields that are read; null is none
         'r': int, 'lora_alpha': (int, float), 'lora_dropout': (int, float), 'use_dora': bool,
         'use_rslora': bool, 'target_modules': (list, str),
         'exclude_modules': (list, str), 'modules_to_save': list, 'layers_to_transform': (int, list),
         'layers_pattern': (list, str), 'ensure_weight_tying': bool,
         'rank_pattern': dict, 'alpha_pattern': dict,
         'trainable_token_indices': (list, dict),
}
MOST = 10_000  # entries of a list of modules, patterns or layers
PLAIN_STARTS = (True, False, 'gaussian', 'orthogonal', 'eva')  # others take something out of the weights


def modules(family, cfg):
    """
    {their module: [ours, …]} of all matrices, tables and norms of a model; several of ours are stacked to one
    of theirs.
    """
    from features.hf.families import FAMILIES
    family, found = FAMILIES[family], {}
    for theirs, ours in (family.names_of(cfg) | {family.head: 'head'}).items():
        if '.E.' in theirs:  # experts are no modules in transformers 5
            continue
        theirs = theirs if theirs == family.head else family.prefix + theirs
        # an adapter there says nothing in transformers 5: the stacks' own names for it are looked at
        if theirs == 'shared':
            found |= {'encoder.embed_tokens': ['wte_encoder'], 'decoder.embed_tokens': ['wte']}
            continue
        count = cfg.n_encoder_layer if ours.startswith('encoder.') else cfg.n_layer
        for n in range(count) if '.N.' in theirs else (0,):
            found[theirs.replace('.N.', f'.{n}.')] = ours.replace('.N.', f'.{n}.').split()
    return found


def is_target(module, wanted, patterns=None):
    """Whether PEFT's target_modules, a list of suffixes or a pattern, match this module."""
    if isinstance(wanted, str):
        return patterns[wanted].matches(module)
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
def write(folder, cfg, saved, kind, base='', positions=0):
    """
    Write a lora.Saved, for a model of this ModelConfig, in PEFT's format for the model of transformers'
    family `kind`: a new folder, complete or not at all. positions: the context of that model, if it is
    longer. Raises UserError for features that PEFT does not have.
    """
    from features.hf.families import FAMILIES
    family = FAMILIES[kind]
    model, name = adapters.blank(cfg), 'default'
    for tensor, t in saved.tensors.items():  # trained whole
        layer, _, parameter = tensor.rpartition('.')
        if '.lora.' not in tensor and layer != 'wte.tokens':
            setattr(model.get_submodule(layer), parameter, torch.nn.Parameter(t.clone()))
    lora.attach(model, saved)
    for p in model.parameters():
        p.requires_grad_(not p.is_meta)
    adapters.load_state(model, saved.tensors, folder)
    tensors, scales, ranks, known, named = {}, {}, {}, modules(kind, cfg), dict(model.named_modules())
    places = {ours: theirs for theirs, parts in known.items() for ours in parts}
    for layer_name in (layer_name for layer_name, layer in lora.adapted(model) if name in layer.lora):
        if layer_name not in places:
            raise UserError(f'{layer_name}: has an adapter, '
                            f'and no place in a network of the family {kind}: leave it out of lora_targets')
    for theirs, ours in known.items():
        layers = [named[part] for part in ours if part in named]
        if not any(name in getattr(layer, 'lora', ()) for layer in layers):
            continue
        A, B, length, scales[theirs] = fuse(layers, name, family.heads_of(f'{theirs}.weight', cfg))
        if ours == ['wpe']:  # nothing was learned about later positions
            lead = rows_of(family, cfg)[f'{theirs}.weight'].lead
            A = torch.nn.functional.pad(A, (lead, max(0, positions - A.size(1))))
        ranks[theirs] = len(A)
        keys = (('lora_embedding_A', 'lora_embedding_B') if isinstance(layers[0], torch.nn.Embedding)
                else ('lora_A.weight', 'lora_B.weight'))
        tensors |= {f'{theirs}.{keys[0]}': A, f'{theirs}.{keys[1]}': B} | (
            {} if length is None else {f'{theirs}.lora_magnitude_vector': length})
    whole = write_whole(model, family, known, ranks, tensors)
    r, alpha = next(iter(ranks.values())), {module: scales[module] * rank for module, rank in ranks.items()}
    config = {
        'peft_type': 'LORA', 'task_type': 'SEQ_2_SEQ_LM' if cfg.n_encoder_layer else 'CAUSAL_LM',
        'base_model_name_or_path': base,
        # alpha says it
        'inference_mode': True, 'r': r, 'lora_alpha': alpha[next(iter(ranks))], 'lora_dropout': saved.dropout,
        'use_rslora': False,
        'use_dora': saved.is_dora, 'bias': trained_biases(family, cfg, ranks, tensors),
        'fan_in_fan_out': kind == 'gpt2',
        'init_lora_weights': True, 'modules_to_save': whole or None,
        'rank_pattern': {module: rank for module, rank in ranks.items() if rank != r},
        'alpha_pattern': {module: a for module, a in alpha.items() if a != alpha[next(iter(ranks))]},
        'target_modules': endings(ranks, known),
        'trainable_token_indices': {places['wte'].rsplit('.', 1)[-1]: saved.tokens} if saved.tokens else None,
    }
    if saved.tokens:
        tensors[f'{places["wte"]}.token_adapter.trainable_tokens_delta'] = model.wte.tokens.values
    with new_folder(folder) as new:
        tensors = {ROOT + module: t.detach().float().contiguous() for module, t in tensors.items()}
        write_tensors(os.path.join(new, 'adapter_model.safetensors'), tensors, {'format': 'pt'})
        replace_json(os.path.join(new, 'adapter_config.json'), dict(sorted(config.items())))


def endings(wanted, known):
    """The last parts of the names of some modules, if no other module ends so; else their names."""
    last = sorted({module.rsplit('.', 1)[-1] for module in wanted})
    if {module for module in known if is_target(module, last)} == set(wanted):
        return last
    return sorted(wanted)


def write_whole(model, family, known, ranks, tensors):
    """Add the fully trained tensors; returns the names of the modules that PEFT must store fully."""
    cfg, whole = model.cfg, set()
    trained = {name: p for name, p in model.named_parameters()
               if p.requires_grad and '.lora.' not in name and name != 'wte.tokens.values'}
    if cfg.tie and 'wte.weight' in trained:  # two modules there, each with a matrix that is trained
        trained['head.weight'] = trained['wte.weight']
    rows = rows_of(family, dataclasses.replace(cfg, tie=False, rank_head=cfg.rank_embed))
    for theirs, ours in known.items():
        for kind in ('weight', 'bias'):
            parts = [trained.pop(f'{part}.{kind}', None) for part in ours]
            if all(part is None for part in parts):
                continue
            row = rows.get(f'{theirs}.{kind}')
            if any(part is None for part in parts) or row is None or kind == 'weight' and theirs in ranks:
                raise UserError(f'{ours[0]}.{kind}: is trained fully, which PEFT does not support here')
            tensor = f'{theirs}.base_layer.bias' if theirs in ranks else f'{theirs}.{kind}'
            tensors[tensor] = row.to_theirs(parts)
            if kind == 'weight':
                whole.add(theirs)
                if f'{theirs}.bias' in rows and any(f'{part}.bias' not in trained for part in ours):
                    raise UserError(f'{ours[0]}.weight: is trained fully, and its bias is not: '
                                    'PEFT supports both or none')
    if trained:
        raise UserError(f'{min(trained)}: is trained fully, which PEFT does not support')
    return endings(whole, known)


def trained_biases(family, cfg, ranks, tensors):
    """PEFT's bias, which says which biases were trained: all, lora_only, or none if these are others."""
    biases = {name for name in rows_of(family, cfg) if name.endswith('.bias')}
    written = {name.replace('.base_layer.', '.') for name in tensors if name.endswith('.bias')}
    of_adapters = {name for name in biases if name.removesuffix('.bias') in ranks}
    if not written:
        return 'none'
    return 'all' if written == biases else 'lora_only' if written == of_adapters else 'none'


def rows_of(family, cfg):
    """{their tensor, with its prefix: names.Row} of a network."""
    from features.hf.names import name_rows
    found = {}
    for row in name_rows(family, cfg):
        is_head = row.theirs.startswith(f'{family.head}.')
        found[row.theirs if is_head else family.prefix + row.theirs] = row
    return found


def family_of(cfg, base):
    """The family whose names a model of this ModelConfig has. Raises UserError if there is none."""
    from features.hf.families import FAMILIES, nearest
    config = os.path.join(base.removeprefix('hf:'), 'config.json')
    if (os.path.isfile(config) and (kind := read_foreign(config).get('model_type')) in FAMILIES
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
    path, weights = (os.path.join(folder, name)
                     for name in ('adapter_config.json', 'adapter_model.safetensors'))
    config = read_foreign(path)
    if config.get('peft_type') != 'LORA':
        raise UserError(f'{path}: peft_type={config.get("peft_type")!r}: takes LORA')
    for field, value in config.items():
        if value and field not in HARMLESS and field not in KINDS:
            raise UserError(f'{path}: {field}={value!r}: minnow does not know this, and it may change the '
                            'network: let PEFT merge it (merge_and_unload), then load the merged folder')
    for field, kind in KINDS.items():
        value = config.get(field)
        if value is not None and not is_valid(field, value, kind):
            raise UserError(f'{path}: {field}={value!r:.100}: is invalid in PEFT')
    if not 0 <= (config.get('lora_dropout') or 0) < 1:
        raise UserError(f'{path}: lora_dropout={config["lora_dropout"]}: takes 0 <= lora_dropout < 1')
    patterns = Patterns(path)
    for field in ('target_modules', 'exclude_modules', 'rank_pattern', 'alpha_pattern'):
        value = config.get(field) or ()
        for pattern in (value,) if isinstance(value, str) else value if isinstance(value, dict) else ():
            patterns[pattern]  # raises UserError for an invalid one
    if config.get('init_lora_weights', True) not in PLAIN_STARTS:
        raise UserError(f'{path}: init_lora_weights={config["init_lora_weights"]!r:.100}: '
                        'this takes a part out of the base; let PEFT convert it to a plain adapter '
                        '(save_pretrained with path_initial_model_for_weight_conversion)')
    pickle = os.path.join(folder, 'adapter_model.bin')
    if os.path.exists(pickle) and not os.path.exists(weights):
        raise UserError(f'{pickle}: is a pickle, which can run code, and is not read: if you trust it, load '
                        'it with PEFT and write it again with save_pretrained(), as safetensors')
    try:
        open_regular(weights).close()
        file = safe_open(weights, 'pt')
        check_prefixes(weights, file.keys())
        tensors = {}
        for name in file.keys():  # some writers leave the name of the adapter in
            plain = re.sub(r'\.(lora_[AB])\.default\.weight$', r'.\1.weight', name.removeprefix(ROOT))
            tensors[plain] = file.get_slice(name)
    except (OSError, SafetensorError) as error:
        raise UserError(f'{weights}: not readable as safetensors: {error}') from None
    of_experts = [name for name in tensors if '.experts.' in name]
    if of_experts:
        raise UserError(f'{weights}: {min(of_experts)}: adapters of experts are not read')
    return Reading(path, config, tensors, cfg, patterns).saved()


def is_valid(field, value, kind):
    """Whether a field of KINDS holds what PEFT writes there."""
    if not isinstance(value, kind) or isinstance(value, bool) != (kind is bool):
        return False
    if isinstance(value, (list, dict)) and len(value) > MOST and field != 'trainable_token_indices':
        return False
    if isinstance(value, list):
        item = int if field in ('layers_to_transform', 'trainable_token_indices') else str
        return all(type(each) is item for each in value)
    return True


def check_prefixes(weights, names):
    """Raise UserError for names as a wrapped network has them: PEFT passes over these tensors in silence."""
    for prefix, wrapper in (('_orig_mod', 'torch.compile'), ('module', 'DataParallel')):
        for name in names:
            if prefix in name.split('.'):
                raise UserError(f'{weights}: {name}: has the prefix {prefix}. of {wrapper}: save the adapter '
                                'of the network inside it, or take the prefix out of the names')


class Reading:
    """One folder while it is read. tensors: {name: slice}; shapes are checked before a tensor is read."""

    def __init__(self, path, config, tensors, cfg, patterns):
        from features.hf.families import FAMILIES, nearest
        self.path, self.config, self.tensors, self.cfg = path, config, tensors, cfg
        self.patterns = patterns
        self.check_shared()
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
        self.head = self.family.head
        self.is_resized = self.vocabulary() != cfg.vocab_size
        self.has_head = self.is_untied()
        self.cfg = dataclasses.replace(cfg, vocab_size=self.vocabulary())
        if self.has_head:
            if cfg.n_encoder_layer:
                self.refuse(f'{self.head}: the head of this network is its embedding, scaled: '
                            'weights of its own are not read')
            self.cfg.tie, self.cfg.rank_head = False, cfg.rank_embed

    def refuse(self, what):
        raise UserError(f'{self.path}: {what}')

    def check_shared(self):
        """T5's embedding has three names in transformers, and PEFT changes nothing at the first."""
        if not self.cfg.n_encoder_layer or not any(name.startswith('shared.') for name in self.tensors):
            return
        if self.is_saved('shared') or any(name.startswith(('shared.lora_', 'shared.token_adapter.'))
                                          for name in self.tensors):
            self.refuse("shared: PEFT's changes to it have no effect, because T5 reads encoder.embed_tokens "
                        'and decoder.embed_tokens: train with target_modules=[…, "embed_tokens"]')
        self.tensors['decoder.embed_tokens.weight'] = self.tensors.pop('shared.weight')  # resized

    def is_saved(self, module):
        """Whether modules_to_save names a module: it was trained whole."""
        return is_target(module, self.config.get('modules_to_save') or ())

    def is_saved_table(self, module):
        """The same for an embedding or a head; one that is both is named once, with ensure_weight_tying."""
        names = [module]
        if self.cfg.tie and self.config.get('ensure_weight_tying'):
            names = [theirs for theirs, ours in self.modules.items() if ours[0] in ('wte', 'head')]
        return any(map(self.is_saved, names))

    def vocabulary(self):
        """The number of tokens, by the tables that the file holds: PEFT writes those that were resized."""
        sizes = {}
        for module, (layer, *_) in self.modules.items():
            for name in (f'{module}.weight', f'{module}.base_layer.weight'):
                if layer in ('wte', 'wte_encoder', 'head') and name in self.tensors:
                    sizes[layer.removesuffix('_encoder')] = self.shape(name)[0]
        found = set(sizes.values()) or {self.cfg.vocab_size}
        if len(found) > 1:
            self.refuse(f'its embedding has {sizes["wte"]} tokens, its head {sizes["head"]}')
        if found != {self.cfg.vocab_size} and len(sizes) == 1 and not self.cfg.tie:
            self.refuse(f'{min(sizes)} has {min(found)} tokens, and only one of embedding and head is in the '
                        'file: save both with save_embedding_layers=True')
        return found.pop()

    def is_untied(self):
        """Whether the head has weights of its own here, and is the embedding in the base."""
        if not self.cfg.tie:
            return False
        if any(name.startswith(f'{self.head}.lora_') for name in self.tensors):
            if self.config.get('ensure_weight_tying'):
                self.refuse('ensure_weight_tying=True: an adapter of both embedding and head is not read: '
                            'let PEFT merge it (merge_and_unload), then load the merged folder')
            return True
        tables = [module for module, ours in self.modules.items()
                  if ours[0] in ('wte', 'head') and f'{module}.weight' in self.tensors]
        is_one = self.config.get('ensure_weight_tying') and len(tables) == 2
        return any(map(self.is_saved, tables)) and not is_one

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
                     if self.patterns[key].matches_end(module)), None)
        value = over if over is not None else self.config.get(field, default)
        if type(value) not in (int, float) or not math.isfinite(value):  # one of a pattern, perhaps
            self.refuse(f'{field}={value!r}: takes a number')
        return value

    def is_meant(self, module, ours):
        """Whether the file says that a module has an adapter."""
        targets = self.config.get('target_modules') or []
        excluded = self.config.get('exclude_modules') or []
        if self.is_saved(module) or is_target(module, excluded, self.patterns):
            return False
        if targets == 'all-linear':  # all but the head
            has = any(name.startswith(f'{module}.lora_') for name in self.tensors)
            return has or re.search(r'\.(attn|cross|mlp)\.[a-z]+$', ours[0]) is not None
        blocks = self.config.get('layers_to_transform')
        if isinstance(targets, str) or blocks in (None, []):
            return is_target(module, targets, self.patterns)
        layers = self.config.get('layers_pattern') or [r'[^.]*']
        numbers = [self.layer(module, name) for name in ([layers] if isinstance(layers, str) else layers)]
        number = next((number for number in numbers if number is not None), None)
        return is_target(module, targets) and number in ([blocks] if isinstance(blocks, int) else blocks)

    def layer(self, module, pattern):
        """The number of the layer of a module: that after a name that matches the pattern; None for none."""
        parts = module.split('.')
        for n in range(1, len(parts) - 1):
            if parts[n].isdecimal() and self.patterns[pattern].matches_end('.'.join(parts[:n])):
                return int(parts[n])

    def saved(self):
        sizes = adapters.sizes(self.cfg)  # {our layer: (n_out, n_in)}
        out = lora.Saved([], float(self.config.get('lora_dropout') or 0), bool(self.config.get('use_dora')))
        for module, ours in self.modules.items():
            if all(name in sizes for name in ours) and self.is_meant(module, ours):
                self.adapter(module, ours, sizes, out)
        self.whole(out)
        self.check_biases(out)
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
        if len(found) == 2 and found[1] >= n_in and found[0] != rank:
            self.refuse(f'{module}: has rank {found[0]}, the file says {rank}')
        lead, longest = 0, n_in
        if ours == ['wpe']:  # theirs may have rows before ours, and a longer context
            lead = rows_of(self.family, self.cfg)[f'{module}.weight'].lead
            longest = max(lead + n_in, found[1])
        A = self.take(f'{module}.{keys[0]}', None, longest)[:, lead:lead + n_in]
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
        """Everything that was trained in addition to adapters: rows of the embedding, modules and biases."""
        out.tokens = self.tokens(out)
        for ending in self.config.get('modules_to_save') or ():
            if not any(is_target(name.rpartition('.')[0], [ending]) for name in self.tensors):
                self.refuse(f'modules_to_save={ending}: not in the file')
        out.is_untied = self.has_head
        if self.is_resized:
            out.vocab_size = self.cfg.vocab_size
        rows = rows_of(self.family, self.cfg)
        for name in sorted(self.left):
            plain = re.sub(r'\.(original_module|modules_to_save)\.', '.', name)
            if plain != name and plain in self.tensors:  # with bias=all PEFT writes some of them twice
                self.left.discard(name)
                continue
            module, _, kind = name.rpartition('.')
            is_base = module.endswith('.base_layer')  # of a module with an adapter
            module = module.removesuffix('.base_layer')
            table = self.modules.get(module, [''])[0].replace('wte_encoder', 'wte')
            if self.cfg.tie and table == 'head':
                table = 'wte'
            if table in ('wte', 'head') and kind == 'weight':
                self.table(name, table, is_base or not self.is_saved_table(module), out)
            elif plain == name and kind in ('weight', 'bias') and (kind == 'bias' or not is_base):
                row = rows.get(f'{module}.{kind}')
                if row is not None:
                    out.tensors |= row.to_ours(self.take(name, *row.shape))

    def tokens(self, out):
        """The tokens whose rows of the embedding were trained whole."""
        tokens = self.config.get('trainable_token_indices')
        if not tokens:
            return []
        if f'{self.head}.token_adapter.trainable_tokens_delta' in self.tensors:
            self.refuse(f'trainable_token_indices={tokens}: rows of the head are not read, only those of the '
                        'embedding')
        found = tokens if isinstance(tokens, list) else next(iter(tokens.values()))
        if (not isinstance(found, list)
                or not all(type(n) is int and 0 <= n < self.cfg.vocab_size for n in found)):
            self.refuse(f'trainable_token_indices={tokens}: '
                        f'takes tokens from 0 to {self.cfg.vocab_size - 1}')
        module = next(theirs for theirs, ours in self.modules.items() if ours == ['wte'])
        out.tensors['wte.tokens.values'] = self.take(f'{module}.token_adapter.trainable_tokens_delta',
                                                     len(found), self.cfg.n_embd)
        return found

    def table(self, name, table, is_base, out):
        """An embedding or a head: that of the base (is_base), or one that was trained."""
        t = self.take(name, self.cfg.vocab_size, self.cfg.n_embd)
        before = (out.beside | out.tensors).get(f'{table}.weight')
        if before is not None and not torch.equal(before[:len(t)], t):
            self.refuse(f'{name}: differs from another table that is the same matrix in this network')
        if is_base:
            out.beside[f'{table}.weight'] = t
        else:
            padding = self.cfg.padded_vocab - self.cfg.vocab_size
            out.tensors[f'{table}.weight'] = torch.nn.functional.pad(t, (0, 0, 0, padding))

    def check_biases(self, out):
        """Refuse a file without the biases that it says were trained."""
        kind, own = self.config.get('bias', 'none'), adapters.blank(self.cfg).state_dict()
        adapted = {name for place in out.places for name in place.names}
        for module, ours in self.modules.items():
            is_trained = kind == 'all' or kind == 'lora_only' and ours[0] in adapted
            if is_trained and f'{ours[0]}.bias' in own and f'{ours[0]}.bias' not in out.tensors:
                self.refuse(f'{module}.bias: not in the file, which says bias={kind!r}')
