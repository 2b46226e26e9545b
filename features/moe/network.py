"""
Mixtures of experts (Shazeer et al. 2017, arXiv 1701.06538) in place of the MLPs of model.py.

    model = make_model(build(ModelConfig, n_expert=8, n_expert_active=2, vocab_size=50257))
    loss = model(idx, targets)
    loads = model.take_loads()   # tokens of each expert, (layers, E) int64

E stands for the number of experts in comments on shapes, N for B·T, k for the active ones.
"""
import dataclasses
import functools
import re
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from features.moe.settings import MoEConfig

# -----------------------------------------------------------------------------
# Linear layers of experts

def grouped_linear(x, weight, counts):
    """x (N, n_in), sorted by expert, weight (E, n_out, n_in), counts (E,) rows per expert → (N, n_out)."""
    device, dtype = x.device.type, weight.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    x, weight = x.to(dtype), weight.to(dtype)
    if dtype == torch.bfloat16 and all(n % 8 == 0 for n in weight.shape[1:]):  # grouped_mm: of 16 bytes
        return F.grouped_mm(x, weight.mT, offs=counts.cumsum(0, dtype=torch.int32))
    product = torch.compiler.disable(one_by_one) if torch.compiler.is_compiling() else one_by_one
    return product(x, weight, counts)


def one_by_one(x, weight, counts):
    rows = x.split(counts.tolist())
    weights = weight.unbind()  # one gradient for all
    # experts without tokens cost nothing: with 8 of 128, a decoding step takes half the time
    return torch.cat([F.linear(some, w) for some, w in zip(rows, weights) if len(some)])


class Experts(nn.Module):
    """The linear layers `name` of all experts in one tensor."""

    def __init__(self, cfg, layer, name):
        super().__init__()
        self.in_features, n_out = cfg.sizes()[name]
        self.weight = nn.Parameter(torch.empty(cfg.n_expert, n_out, self.in_features))
        self.bias = nn.Parameter(torch.empty(cfg.n_expert, n_out)) if cfg.bias else None

    def forward(self, x, counts):
        """x (N, n_in), sorted by expert, counts (E,) rows per expert → (N, n_out)."""
        y = grouped_linear(x, self.weight, counts)
        if self.bias is None:
            return y
        return y + self.bias.type_as(y).repeat_interleave(counts, 0, output_size=len(y))


# -----------------------------------------------------------------------------
# The mixture in a block

class Routing(NamedTuple):
    """The routing of a batch, in training."""
    loss: torch.Tensor  # () float32, to be added to the mean loss
    load: torch.Tensor  # (E,) int64: tokens of each expert, without padding


class Mixture(nn.Module):
    """
    n_expert MLPs. A router picks n_expert_active of them for each token and weights their outputs. Tokens are
    sorted by expert. No token is dropped, whatever the load of an expert. With shared_width, all tokens go
    through one more MLP (DeepSeekMoE, arXiv 2401.06066).
    """

    def __init__(self, cfg, layer, mlp):  # mlp: the class of each expert
        super().__init__()
        self.cfg = cfg
        self.router = nn.Parameter(torch.empty(cfg.n_expert, cfg.n_embd))
        self.experts = mlp(with_width(cfg, cfg.expert_width), layer, Experts)
        self.shared = self.shared_router = None
        if cfg.shared_width:
            self.shared = mlp(with_width(cfg, cfg.shared_width), layer)
        if cfg.shared_gate:
            self.shared_router = nn.Parameter(torch.empty(1, cfg.n_embd))
        bias = torch.zeros(cfg.n_expert) if cfg.expert_bias else None
        self.register_buffer('expert_bias', bias)  # decides which experts are picked, not their weights
        load = torch.zeros(cfg.n_expert, dtype=torch.long)
        self.register_buffer('load', load, persistent=False)  # since take_loads()

    def forward(self, x, real=None):
        """x (B, T, C), real (B, T): False for padding → (B, T, C), and in training also the Routing."""
        h, k = x.flatten(0, 1), self.cfg.n_expert_active  # (N, C)
        # bfloat16 rounds away what tells experts apart (Switch, 2.4)
        with torch.autocast(x.device.type, enabled=False):
            share, chosen, routing = self.route(h.float(), real)
        order = chosen.flatten().argsort(stable=True)  # (N k,)
        counts = torch.zeros_like(self.load).scatter_add(0, chosen.flatten(), torch.ones_like(order))
        # (N k, C), in the tokens' order
        y = self.experts(h.repeat_interleave(k, 0)[order], counts)[order.argsort()]
        y = (y.unflatten(0, (-1, k)) * share[..., None].type_as(y)).sum(1).view_as(x)
        if self.shared is not None:
            y = y + self.shared_output(x)
        return y, routing

    def shared_output(self, x):
        """The shared expert's output for x (B, T, C), scaled by its gate."""
        y = self.shared(x)
        if self.shared_router is None:
            return y
        with torch.autocast(x.device.type, enabled=False):
            gate = F.linear(x.float(), self.shared_router.float()).sigmoid()  # (B, T, 1)
        return y * gate.type_as(y)

    def route(self, h, real):
        """h (N, C) float32 → shares and numbers of each token's experts, (N, k), in training the Routing."""
        E, k = self.cfg.n_expert, self.cfg.n_expert_active
        logits = h @ self.router.float().T  # (N, E)
        p = logits.softmax(-1)
        chosen = (p if self.expert_bias is None else p + self.expert_bias).topk(k).indices
        share = p.gather(1, chosen)
        if self.cfg.is_renormed:
            share = share / share.sum(1, keepdim=True)
        if not self.training:
            return share, chosen, None
        given = F.one_hot(chosen, E).sum(1)  # (N, E)
        weight = torch.ones_like(h[:, 0]) if real is None else real.flatten().float()  # (N,)
        load = weight @ given.float()
        weight = weight / weight.sum().clamp(min=1)
        # shares of the tokens times mean probabilities: 1 if both are even
        balance = E * (weight @ given.float() / k) @ (weight @ p)
        size = weight @ logits.logsumexp(1).square()
        return share, chosen, Routing(self.cfg.expert_aux * balance + self.cfg.expert_z * size, load.long())


def with_width(cfg, width):
    """A ModelConfig whose MLPs have this hidden width; 0 = unchanged."""
    return dataclasses.replace(cfg, d_ff=width or cfg.d_ff)


# -----------------------------------------------------------------------------
# The network

@functools.cache
def with_experts(network):
    """The class `network`, Transformer or a subclass, with a Mixture in its blocks."""
    class ExpertNetwork(WithExperts, network):
        pass
    return ExpertNetwork


class WithExperts:
    """The part of a network that collects the Routings of its experts, adds their losses and counts loads."""

    def __init__(self, cfg, init=True):
        MoEConfig.check(cfg)
        super().__init__(cfg, init)
        self.real = self.routings = None  # of the forward pass that is running

    def forward(self, idx, targets=None, *args, **more):
        """Like forward() of the model without experts."""
        self.routings = []
        if targets is not None:  # a token is padding if no target comes after it
            self.real = (targets >= 0).flip(1).cumsum(1).flip(1) > 0
        out = super().forward(idx, targets, *args, **more)
        self.real = self.routings = None
        return out

    def run(self, blocks, x, inputs, cache=None, *more):
        if inputs.real is None:  # an encoder knows its own
            inputs = inputs._replace(real=self.real)
        v0 = None
        for block in blocks:
            if self.recompute and self.training:
                x, v0, *routing = checkpoint(block, x, inputs, v0, cache, *more, use_reentrant=False)
            else:
                x, v0, *routing = block(x, inputs, v0, cache, *more)
            if self.routings is not None:
                self.routings += [each for each in routing if each is not None]  # of a dense block: none
        return x

    def loss(self, h, targets, reduction='mean', *args, **more):
        """A term of value 0 has the gradient of the routers' losses, so that the loss stays in nats."""
        loss, count = super().loss(h, targets, 'sum', *args, **more), (targets >= 0).sum()
        if self.routings:
            extra = sum(routing.loss for routing in self.routings)
            loss = loss + (extra - extra.detach()) * count
            for mixture, routing in zip(self.mixtures(), self.routings):
                mixture.load += routing.load
        return loss if reduction == 'sum' else loss / count

    def mixtures(self):
        """The Mixture of each layer that has one, those of the encoder first."""
        return [module for module in self.modules() if isinstance(module, Mixture)]

    def take_loads(self):
        """Tokens of each expert in training since the last call, (layers, E) int64."""
        loads = torch.stack([mixture.load for mixture in self.mixtures()])
        for mixture in self.mixtures():
            mixture.load.zero_()
        return loads

    def balance(self, loads):
        """Update expert_bias towards equal loads. loads (layers, E): of one step, of all ranks."""
        if self.cfg.expert_bias:
            for mixture, load in zip(self.mixtures(), loads.float()):
                mixture.expert_bias += self.cfg.expert_bias * torch.sign(load.mean() - load)

    def init_blocks(self, *args):
        """The routers' weights start small, so that every expert is used."""
        super().init_blocks(*args)
        for mixture in self.mixtures():
            nn.init.normal_(mixture.router, std=0.02)
            if mixture.shared_router is not None:
                nn.init.normal_(mixture.shared_router, std=0.02)

    # --- counts: a token meets n_expert_active of the experts ---

    def num_params(self, active=False):
        count = super().num_params()
        if active:
            for name, p in self.named_parameters():
                if is_of_experts(name):
                    count -= p.numel() * (self.cfg.n_expert - self.cfg.n_expert_active) // self.cfg.n_expert
        return count

    def multiplications(self):
        counts = super().multiplications()
        for name in counts:
            if is_of_experts(name):
                counts[name] = counts[name] * self.cfg.n_expert_active // self.cfg.n_expert
        return counts


def is_of_experts(name):
    """Whether a parameter of this name is a stack with one part per expert."""
    return re.search(r'\.mlp\.experts\.(up|gate|down)\.', name) is not None
