"""
Low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685): the weights of a model are frozen, and a product
of two thin matrices is trained and added to some of them, W·x + scale·B·(A·x).

    # out_dir holds the adapter alone
    python train.py --init_from=out/base --out_dir=out/lora --lora_rank=16 --learning_rate=1e-2

An adapter is attached to its layer by a forward hook. So model.py needs no code for it, and the layer's
weight keeps its name. adapters.py has the functions for trained adapters.
"""
import math
import re
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from configurator import UserError
from model import ModelConfig

# -----------------------------------------------------------------------------
# One adapter

class Adapter(nn.Module):
    """
    The trained update of one weight W (n_out, n_in): scale·B·A with A (R, n_in) and B (n_out, R); with
    is_dora also the norm of every row. For an embedding table, W is its transpose. Each expert of a mixture
    has its own adapter, A (E, R, n_in) and B (E, n_out, R). rows: the rows of a table or head that are
    tokens, not padding. B is initialized to zero, for a table A (as in PEFT), so that nothing changes before
    the first step.
    """

    def __init__(self, layer, rank, scale, dropout=0.0, is_dora=False, rows=None):
        super().__init__()
        self.is_table = isinstance(layer, nn.Embedding)
        self.scale, self.dropout, self.rows = scale, dropout, rows
        *stack, n_out, n_in = self.of(layer).shape
        n_out, n_in = (n_out, rows or n_in) if self.is_table else (rows or n_out, n_in)
        self.A = nn.Parameter(torch.zeros(*stack, rank, n_in))
        self.B = nn.Parameter(torch.zeros(*stack, n_out, rank))
        if self.is_table:
            nn.init.normal_(self.B)
        else:
            nn.init.uniform_(self.A, -n_in ** -0.5, n_in ** -0.5)
        self.length = None
        if is_dora:
            is_meta = layer.weight.is_meta
            length = torch.empty(n_out) if is_meta else self.of(layer).detach().float().norm(dim=-1)
            self.length = nn.Parameter(length)

    def of(self, layer):
        """The weight of the layer, as (…, n_out, n_in)."""
        weight = layer.weight[:self.rows]
        return weight.T if self.is_table else weight

    def delta(self):
        """The update of the weight, (…, n_out, n_in)."""
        return self.scale * self.B @ self.A

    def stretch(self, layer):
        """
        The factor by which rows are rescaled, (n_out,): DoRA's magnitude divided by the norm of W + delta,
        which is detached from the gradient (its section 4.3).
        """
        with torch.no_grad(), torch.autocast(self.A.device.type, enabled=False):
            norm = (self.of(layer).float() + self.delta()).norm(dim=-1)
        # a row of zeros has no length yet
        return torch.where(norm > 0, self.length / norm.clamp(min=1e-30), 1.0)

    def forward(self, layer, y, x, *counts):
        """The adapter's output to add to y, the layer's output for x; counts as Experts take them."""
        if self.is_table:
            z = self.A.T[x] if isinstance(x, slice) else F.embedding(x, self.A.T)  # (…, R)
        else:
            z = multiply(F.dropout(x, self.dropout, self.training), self.A, *counts)
        added = self.fit(multiply(self.scale * z, self.B, *counts), y.size(-1))
        if self.length is None:
            return added
        bias = 0 if getattr(layer, 'bias', None) is None else layer.bias
        # autocast leaves the bias in float32
        return (self.fit(self.stretch(layer), y.size(-1)).type_as(y) * (y - bias + added) + bias
                - y).type_as(y)

    def fit(self, t, n_out):
        """Pad t (…, n_out) of tokens to the width of a padded head."""
        return t if t.size(-1) == n_out else F.pad(t, (0, n_out - t.size(-1)))

    def change(self, layer):
        """The merged weight minus the weight of the layer, in its shape and float32."""
        change = self.delta()
        if self.length is not None:
            change = self.stretch(layer)[:, None] * (self.of(layer).float() + change) - self.of(layer).float()
        change = change.T if self.is_table else change
        return F.pad(change, (0, 0, 0, layer.weight.size(-2) - change.size(-2)))


def multiply(x, weight, *counts):
    if counts:  # moe
        from features.moe.network import grouped_linear  # moe
        return grouped_linear(x, weight, *counts)  # moe
    return F.linear(x, weight)


def is_of_experts(layer):
    """Whether the weight of a layer is a stack of matrices, one per expert."""
    weight = layer._parameters.get('weight')  # not the property of a Packed, which unpacks it
    return not isinstance(layer, nn.Linear) and weight is not None and weight.ndim == 3


# -----------------------------------------------------------------------------
# Which weights

OF_TOKENS = ('wte', 'wte_encoder', 'head')  # layers whose weight has a row for each token, and padding
GROUPS = {'attn': ('q', 'k', 'v', 'o'), 'mlp': ('up', 'gate', 'down'), 'embed': ('wte', 'wpe'),
          'head': ('head',), 'shared': ('mlp.shared.up', 'mlp.shared.gate', 'mlp.shared.down')}
# the last: a factor
MATRIX = re.compile(r'((?:encoder|blocks)\.\d+\.)(attn|cross|mlp|mlp\.shared)\.(?:experts\.)?'
                    r'(q|k|v|o|up|gate|down)(?:\.(?:up|down))?')


class Place(NamedTuple):
    """Layers that share one A, and the settings of their adapter."""
    names: tuple
    rank: int
    scale: float


def layers_of(model):
    """
    {name: (prefix, label)} of the layers that can have an adapter; a label is for example attn.q or wte.
    """
    found = {}
    for name, module in model.named_modules():
        if match := MATRIX.fullmatch(name):
            if isinstance(module, nn.Linear) or is_of_experts(module):
                found[name] = match[1], f'{match[2]}.{match[3]}'
        elif name in (*OF_TOKENS, 'wpe'):
            found[name] = '', name.removesuffix('_encoder')
    return found


def labels_of(target):
    """What a target names, a tuple of labels each; several in one are one matrix to Hugging Face."""
    if target in GROUPS:
        return [(label,) for label in GROUPS[target]]
    found = [(target,)]
    from features.hf.families import FAMILIES  # hf
    tables = [{'embed_tokens': 'wte'}]  # hf
    for family in FAMILIES.values():  # hf
        for mlp in ('relu', 'geglu'):  # hf: T5 has two lists of names
            tables.append(family.names_of(ModelConfig(mlp=mlp)) | {family.head: 'head'})  # hf
    for names in tables:  # hf
        for theirs, ours in names.items():  # hf
            if theirs.split('.')[-1] == target:  # hf
                found.append(tuple(re.sub(r'^(encoder|blocks)\.N\.', '', name)  # hf
                                   for name in ours.split()))  # hf
    return found


def chosen(model, s):
    """
    {layer: layers that share an A with it} of the layers selected by a LoraConfig. Raises UserError for a
    target that matches no layer.
    """
    layers, found = layers_of(model), {}
    for target in s.lora_targets.split(','):
        matched = False
        for labels in labels_of(target.strip()):
            for name, (before, label) in layers.items():
                if label in labels or label.split('.')[-1] in labels:
                    is_whole = name == before + label  # not a factor, or experts
                    found[name] = before + ' '.join(labels) if len(labels) > 1 and is_whole else name
                    matched = True
        if not matched:
            raise UserError(f'lora_targets: {target!r} matches nothing: '
                            f'takes {", ".join(GROUPS)}, or matrices of this network by name: '
                            f'{", ".join(dict.fromkeys(label for _, label in layers.values()))}')
    return {name: found[name] for name in layers if name in found}


def places(model, s):
    """
    The Places of the adapters of a LoraConfig. Raises UserError for layers that the model does not have, and
    for a rank larger than a matrix.
    """
    together = {}
    for name, key in chosen(model, s).items():
        together.setdefault(key, []).append(name)
    scale = s.lora_alpha / (math.sqrt(s.lora_rank) if s.lora_rs else s.lora_rank)
    found = []
    for names in together.values():
        weights = [model.get_submodule(name).weight for name in names]
        n_in, n_out = weights[0].size(-1), sum(weight.size(-2) for weight in weights)
        if s.lora_rank > min(n_in, n_out):
            raise UserError(f'lora_rank={s.lora_rank}: is more than {names[0]} has, {n_in} x {n_out}: '
                            'lower it')
        found.append(Place(tuple(names), s.lora_rank, scale))
    return found


# -----------------------------------------------------------------------------
# A network and its adapters

class Tokens(nn.Module):
    """
    Rows of an embedding that are trained fully and replace those of the table: index (N,), values (N, C).
    """

    def __init__(self, table, index):
        super().__init__()
        weight = torch.zeros(table.weight.shape) if table.weight.is_meta else table.weight.detach()
        self.register_buffer('index', torch.tensor(index, device=weight.device), persistent=False)
        # of values, -1 for other tokens
        self.register_buffer('row', torch.full((len(weight),), -1, device=weight.device), persistent=False)
        self.row[self.index] = torch.arange(len(index), device=weight.device)
        self.values = nn.Parameter(weight[self.index].float())

    def hook(self, layer, args, y):
        row = self.row[args[0]]
        return torch.where(row[..., None] >= 0, F.embedding(row.clamp(min=0), self.values).type_as(y), y)

    def put(self, weight):
        """The table's weight with these rows replaced."""
        return weight.index_copy(0, self.index, self.values.type_as(weight))


def row_change(A, B, x):
    """
    The output of adapters A (B, R, n_in) and B (B, n_out, R), a different one per row, for x: (B, T, n_in) or
    (B, n_in), tokens (B, T), or positions.
    """
    if isinstance(x, slice) or x.ndim == 1:
        z = A[:, :, x].mT  # (B, T, R)
    elif x.is_floating_point():
        z = x @ A.mT if x.ndim == 3 else torch.einsum('bi,bri->br', x, A)[:, None]
    else:
        z = A.gather(2, x[:, None].expand(-1, A.size(1), -1)).mT
    return ((z @ B.mT).view(*x.shape[:-1], -1) if not isinstance(x, slice) and x.is_floating_point()
            else z @ B.mT)


class Active:
    """
    The adapters of a model, known {name: Saved}, and which of them are active: shares {name: weight}; or, if
    each row of a batch has its own, rows {layer: (A, B)} from select().
    """

    def __init__(self):
        self.known, self.shares, self.rows = {}, {}, {}

    def hook(self, layer, args, y):
        if self.rows:
            return y + row_change(*self.rows[layer], *args)
        out = y
        for name, share in self.shares.items():
            if name in layer.lora:
                change = layer.lora[name](layer, y, *args)
                out = out + (change if share == 1 else share * change)
        return out

    def head_input(self, model, h, weight):
        """
        Transformer.head_input() with adapters and trained rows. An adapter adds columns: h·Wᵀ + z·Bᵀ = [h
        z]·[W B]ᵀ.
        """
        if model.cfg.tie:
            return h, model.wte.tokens.put(weight) if hasattr(model.wte, 'tokens') else weight
        columns, longer, inputs = [], 1.0, [h]
        for name, share in self.shares.items():
            if name in getattr(model.head, 'lora', ()):
                adapter = model.head.lora[name]
                B = adapter.B
                if adapter.length is not None:
                    stretch = adapter.stretch(model.head)[:, None]
                    B, longer = (stretch * B,
                                 longer + share * F.pad(stretch - 1, (0, 0, 0, len(weight) - len(stretch))))
                z = F.linear(F.dropout(h, adapter.dropout, adapter.training), adapter.A)
                inputs.append(share * adapter.scale * z)
                columns.append(F.pad(B, (0, 0, 0, len(weight) - len(B))))
        if not columns:
            return h, weight
        return torch.cat(inputs, dim=-1), torch.cat([longer * weight, *columns], dim=1)


@dataclass
class Saved:
    """An adapter as it is saved: how to attach it, and the tensors for load_state()."""
    places: list
    dropout: float = 0.0
    is_dora: bool = False
    tokens: list = field(default_factory=list)  # of the embedding, trained whole
    tensors: dict = field(default_factory=dict)
    beside: dict = field(default_factory=dict)  # tensors of its base that came along
    vocab_size: int = 0  # number of tokens, if its base was resized; 0 = as in the base
    is_untied: bool = False  # whether the head has weights of its own, and is the embedding in the base

    @property
    def is_more(self):
        """Whether it changes more than adapters can: then it can only be used alone."""
        return self.is_untied or self.vocab_size > 0 or any('.lora.' not in name for name in self.tensors)

    def description(self):
        """Everything except the tensors, for JSON."""
        return {'places': self.places, 'dropout': self.dropout, 'is_dora': self.is_dora,
                'tokens': self.tokens}


def attach(model, saved, name='default'):
    """
    Attach the adapters of a Saved to the layers of its Places, under a name, with its trained embedding rows;
    its tensors are not loaded yet. All existing adapters become active with weight 1.
    """
    if not hasattr(model, 'lora'):
        model.lora = Active()
    for names, rank, scale in saved.places:
        first = None
        for layer_name in names:
            layer = model.get_submodule(layer_name)
            if saved.is_dora and is_of_experts(layer):
                raise UserError(f'lora_dora=True: {layer_name} are experts, takes single matrices: '
                                'leave them out of lora_targets')
            rows = model.cfg.vocab_size if layer_name in OF_TOKENS else None
            adapter = Adapter(layer, rank, scale, saved.dropout, saved.is_dora, rows).train(model.training)
            adapter = adapter if layer.weight.is_meta else adapter.to(layer.weight.device)
            first = first or adapter
            adapter.A = first.A
            if not hasattr(layer, 'lora'):
                layer.lora = nn.ModuleDict()
                layer.register_forward_hook(model.lora.hook)
            layer.lora[name] = adapter
    model.lora.shares[name], model.lora.known[name] = 1.0, saved
    if saved.tokens:
        model.wte.tokens = Tokens(model.wte, saved.tokens)
        for table in tables(model):
            table.register_forward_hook(model.wte.tokens.hook)


def share_table(model):
    """
    Give an encoder its own embedding module with the same weight, so that each stack can have its own
    adapter.
    """
    if model.cfg.n_encoder_layer and model.wte_encoder is None:  # t5
        model.wte_encoder = nn.Embedding(1, 1)  # t5
        model.wte_encoder.weight = model.wte.weight  # t5


def tables(model):
    """The embedding modules, one per stack of a model."""
    if model.cfg.n_encoder_layer and model.wte_encoder is not None:  # t5
        return [model.wte, model.wte_encoder]  # t5
    return [model.wte]


def begin(model, s):
    """
    Attach the adapters of a LoraConfig to a model and freeze the rest. Raises UserError if they do not fit.
    """
    share_table(model)
    attach(model, Saved(places(model, s), s.lora_dropout, s.lora_dora))
    freeze(model)


def move(model, layer, other):
    """Move the hooks of a layer to the layer that replaces it; after merge() there are none."""
    if hasattr(layer, 'lora') and model.lora.shares:
        other.lora = layer.lora
        other.register_forward_hook(model.lora.hook)


def adapted(model):
    """[(name, layer)] of the layers that have adapters."""
    return [(name, layer) for name, layer in model.named_modules()
            if isinstance(getattr(layer, 'lora', None), nn.ModuleDict)]


def freeze(model, whole=()):
    """Freeze everything except the adapters and the tensors with the names `whole`."""
    for name, p in model.named_parameters():
        p.requires_grad_('.lora.' in name or name in whole)


def how_stored(s):
    """What lora_store says of a run; auto is float32 beside DoRA, which measures the rows of the weights."""
    return s.lora_store if s.lora_store != 'auto' else 'float32' if s.lora_dora else s.dtype


def memory(model, total):
    """
    A line with the memory for training the adapters of a model with `total` parameters, compared with
    training all weights: gradients in float32, two moments of AdamW.
    """
    held = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    base = total - sum(p.numel() for name, p in model.named_parameters() if '.lora.' in name)

    def in_words(weights, gradients, moments):
        return (f'{weights / 1e6:,.1f} MB of weights, {gradients / 1e6:,.1f} MB of gradients, '
                f'{moments / 1e6:,.1f} MB of moments')
    return (f'lora: {trained:,} of {total:,} parameters are trained ({trained / total:.4%}): '
            f'{in_words(held, 4 * trained, 8 * trained)}; '
            f'all weights would be {in_words(4 * base, 4 * base, 8 * base)}')
