"""
Trained adapters: save and load them, check their base, combine them, merge them into the weights, and use a
different one for each row of a batch.

    python sample.py --out_dir=out/lora                            # loads the base too
    # several adapters of one base, PEFT's too (peft_files.py)
    python sample.py --out_dir=out/base --adapter=out/lora --adapter=law=FOLDER
    python surgery.py merge --from=out/lora --out_dir=out/merged   # merge into the base
    python surgery.py combine --from=out/base --adapter=A --adapter=B --out_dir=out/both
"""
import zlib

import torch
import torch.nn as nn

from configurator import UserError
from features.lora.layers import (
    OF_TOKENS,
    Place,
    Saved,
    adapted,
    attach,
    is_of_experts,
    layers_of,
    share_table,
    tables,
)
from model import make_model

# -----------------------------------------------------------------------------
# Saved and loaded

def described(description, tensors):
    """
    The Saved of a checkpoint, from its state.json's entry `lora` and its {name: tensor}. Earlier versions
    with PiSSA subtracted B0·A0 from the weight: here the factors get it too, and the weight stays complete.
    """
    tensors = dict(tensors)
    places = []
    for names, rank, scale in description['places']:
        for name in names:
            A, B = f'{name}.lora.A', f'{name}.lora.B'
            A0, B0 = tensors.pop(f'{A}0', None), tensors.pop(f'{B}0', None)
            if B0 is not None:
                tensors[B] = torch.cat([tensors[B], -B0], dim=-1)
                rank = tensors[B].size(-1)
            if A0 is not None and A in tensors:  # layers that share it keep it once
                tensors[A] = torch.cat([tensors[A], A0], dim=-2)
        places.append(Place(tuple(names), rank, scale))
    return Saved(places, description['dropout'], description['is_dora'], description['tokens'], tensors)


def take(model, name='default'):
    """The current adapter of a model, as a Saved."""
    return described(model.lora.known[name].description(), state(model, name))


def state(model, name='default'):
    """{name: tensor} of everything that the adapter of this name trains."""
    kept = {tensor: p for tensor, p in model.named_parameters() if f'.lora.{name}.' in tensor}
    kept |= {tensor: p for tensor, p in model.named_parameters()
             if p.requires_grad and '.lora.' not in tensor or tensor == 'wte.tokens.values'}
    return {tensor.replace(f'.lora.{name}.', '.lora.'): t for tensor, t in kept.items()}


@torch.no_grad()
def load_state(model, tensors, where, name='default'):
    """
    Load what state() returned. Names must match exactly. Raises UserError that names the first mismatch.
    """
    whole = {tensor: p for tensor, p in model.named_parameters()
             if tensor in tensors and '.lora.' not in tensor}
    own = state(model, name) | whole
    for tensor in sorted(own.keys() | tensors.keys()):
        found, wanted = (list(some[tensor].shape) if tensor in some else 'no such tensor'
                         for some in (tensors, own))
        if found != wanted:
            raise UserError(f'{where}: {tensor}: found {found}, the adapter of this network has {wanted}: '
                            'it belongs to another base')
        own[tensor].copy_(tensors[tensor])


def blank(cfg):
    """The model without its weights, for attaching adapters."""
    with torch.device('meta'):
        model = make_model(cfg, init=False)
        share_table(model)
    return model


def sizes(cfg):
    """{layer: (n_out, n_in) of what can have an adapter}, a table's as Adapter has it."""
    model, found = blank(cfg), {}
    for name in layers_of(model):
        layer = model.get_submodule(name)
        n_out, n_in = layer.weight.shape[-2:]
        n_out, n_in = (cfg.vocab_size if name in OF_TOKENS else n_out), n_in
        found[name] = (n_in, n_out) if isinstance(layer, nn.Embedding) else (n_out, n_in)
    return found


def add(model, saved, where, name):
    """
    Add a Saved to a model under a name, and activate it. Raises UserError, naming `where` it is from, if it
    is for another model.
    """
    others = list(model.lora.known.values()) if hasattr(model, 'lora') else []
    if others and any(each.is_more for each in (saved, *others)):
        raise UserError(f'{where}: weights were trained fully beside it, or beside the previous one: '
                        'such an adapter can only be used alone')
    if saved.is_untied:
        untie(model)
    if saved.vocab_size:
        resize(model, saved.vocab_size, saved.beside | saved.tensors)
    for tensor, t in saved.beside.items():
        found = model.get_parameter(tensor)[:len(t)]
        # in half precision, perhaps
        if found.shape != t.shape or not torch.allclose(found.float(), t, rtol=1e-2, atol=1e-4):
            raise UserError(f'{where}: {tensor}: the one that came along is not that of this network: '
                            'it is an adapter for another base')
    model.requires_grad_(False)
    share_table(model)
    attach(model, saved, name)
    load_state(model, saved.tensors, where, name)


def fingerprint(weights):
    """{name: checksum} of the weights of a base model, to recognize it."""
    return {name: zlib.crc32(t.reshape(-1).view(torch.uint8).numpy()) for name, t in weights.items()}


def check_base(weights, known, where, adapter):
    """Raise UserError unless these weights, from `where`, are those that the adapter was trained on."""
    found = fingerprint(weights)
    for name in sorted(known.keys() | found.keys()):
        if found.get(name) != known.get(name):
            raise UserError(f'{adapter}: is an adapter for another base than what is in {where} now: '
                            f'{name} differs: restore that, or train it again')


# -----------------------------------------------------------------------------
# Added up, and merged: one network again

def combine(adapters, shares):
    """
    One Saved equal to the weighted sum of several: their factors are concatenated, which is exact; its rank
    is the sum of theirs. Raises UserError.
    """
    for each in adapters:
        if each.is_dora or each.tokens or each.is_more:
            raise UserError('adapter: those of DoRA, and weights trained whole beside one, do not add up: '
                            'merge one, then train the next beside that')
    groups = {}  # {layer: layers that share its A}, alone where adapters differ
    for names in (place.names for each in adapters for place in each.places):
        for name in names:
            groups[name] = names if groups.get(name, names) == names else (name,)
    groups = {name: names if all(groups[other] == names for other in names) else (name,)
              for name, names in groups.items()}
    out = Saved([])
    for names in dict.fromkeys(groups.values()):
        As, Bs = [], {name: [] for name in names}
        for each, share in zip(adapters, shares):
            place = next((place for place in each.places if names[0] in place.names), None)
            if place is not None:
                As.append(each.tensors[f'{place.names[0]}.lora.A'])
                for name in names:
                    Bs[name].append(share * place.scale * each.tensors[f'{name}.lora.B'])
        out.places.append(Place(names, sum(A.size(-2) for A in As), 1.0))
        out.tensors |= ({f'{names[0]}.lora.A': torch.cat(As, dim=-2)}
                        | {f'{name}.lora.B': torch.cat(B, dim=-1) for name, B in Bs.items()})
    return out


def obstacle(model):
    """Why the adapters of a model cannot be merged into its weights; '' if they can."""
    if model.cfg.n_encoder_layer and any(hasattr(table, 'lora') for table in tables(model)):
        return ('encoder and decoder have adapters of their own beside one embedding: '
                'leave it out of lora_targets')
    if model.cfg.tie and hasattr(model.wte, 'lora'):
        return ('the embedding is the head too, which has no adapter: '
                'surgery.py merge --untie=True makes them two')
    return ''


@torch.no_grad()
def merge(model):
    """
    Add the adapters to the weights, in float32, and deactivate them. Returns {layer: its weight before}, for
    unmerge(). Raises UserError if a weight cannot represent the result.
    """
    if obstacle(model):
        raise UserError(f'adapters cannot be merged: {obstacle(model)}')
    before = {}
    for name, layer in adapted(model):
        before[name] = layer.weight.clone()
        changes = [share * layer.lora[n].change(layer) for n, share in model.lora.shares.items()
                   if n in layer.lora]
        layer.weight.copy_(layer.weight.float() + sum(changes))
    if hasattr(model.wte, 'tokens'):
        before.setdefault('wte', model.wte.weight.clone())
        model.wte.weight.copy_(model.wte.tokens.put(model.wte.weight))
    model.lora.silent, model.lora.shares = model.lora.shares, {}
    return before


@torch.no_grad()
def unmerge(model, before):
    """Undo merge()."""
    for name, weight in before.items():
        model.get_submodule(name).weight.copy_(weight)
    model.lora.shares = model.lora.silent


@torch.no_grad()
def untie(model):
    """Give the head its own copy of the embedding matrix; the function does not change."""
    cfg, wte = model.cfg, model.wte
    if not cfg.tie:
        return
    scale = cfg.n_embd ** -0.5 if getattr(cfg, 't5_scale', False) else 1.0
    cfg.tie, cfg.rank_head = False, cfg.rank_embed
    model.head = nn.Linear(wte.weight.size(1), len(wte.weight), bias=False, device=wte.weight.device)
    model.head.weight.copy_((wte.tokens.put(wte.weight) if hasattr(wte, 'tokens') else wte.weight) * scale)
    if cfg.rank_embed:
        model.head_down = nn.Linear(cfg.n_embd, cfg.rank_embed, bias=False, device=wte.weight.device)
        model.head_down.weight.copy_(model.wte_up.weight.T)


@torch.no_grad()
def resize(model, vocab_size, rows):
    """Give a model this many tokens. rows: {'wte.weight': …, 'head.weight': …}, tables of the new size."""
    cfg = model.cfg
    kept, cfg.vocab_size = min(vocab_size, cfg.vocab_size), vocab_size
    for name in ('wte', 'head'):
        table = getattr(model, name)
        if table is None:
            continue
        weight = table.weight.new_zeros(cfg.padded_vocab, table.weight.size(1))
        weight[:kept] = table.weight[:kept]
        weight[kept:vocab_size] = rows[f'{name}.weight'][kept:vocab_size]
        table.weight = nn.Parameter(weight)


def base_state(model):
    """{name: tensor} of a model without its adapters."""
    return {name: t for name, t in model.state_dict().items()
            if '.lora.' not in name and not name.startswith(('wte_encoder.', 'wte.tokens.'))}


# -----------------------------------------------------------------------------
# A row of a batch, an adapter

@torch.no_grad()
def select(model, names):
    """
    Use the adapter names[n] for row n of every batch, none if that is ''; select(model, []) activates all
    adapters in all rows again.
    """
    model.lora.rows = {}
    for layer_name, layer in adapted(model) if names else ():
        of_rows = [layer.lora[name] if name in layer.lora else None for name in names]
        for adapter in filter(None, of_rows):
            if adapter.length is not None or is_of_experts(layer):
                raise UserError(f'{layer_name}: adapters with DoRA, or of experts, cannot differ between the '
                                'rows of a batch')
        rank = max((adapter.A.size(0) for adapter in filter(None, of_rows)), default=1)
        some = next(iter(layer.lora.values()))
        n_out = some.of(layer).size(0) if some.is_table else layer.weight.size(0)
        A, B = some.A.new_zeros(len(names), rank, some.A.size(1)), some.B.new_zeros(len(names), n_out, rank)
        for n, adapter in enumerate(of_rows):
            if adapter is not None:
                A[n, :len(adapter.A)], B[n, :len(adapter.B), :len(adapter.A)] = (adapter.A,
                                                                                 adapter.scale * adapter.B)
        model.lora.rows[layer] = A, B
