"""
T5's relative positions (Raffel et al. 2020, arXiv 1910.10683): a learned bias for each range of distances.
"""
import math

import torch
import torch.nn as nn

BUCKETS, FURTHEST = 32, 128


class Buckets(nn.Module):
    """
    The bucket of every pair of positions. Half of the buckets are for a single distance each, the others for
    increasing ranges, the last one for all from 128 on. Without causality half of them are for the past, half
    for the rest.
    """

    def __init__(self, is_causal):
        super().__init__()
        self.is_causal = is_causal

    def forward(self, queries, keys):
        """Positions (T,) of queries and (S,) of keys → (1, 1, T, S) int64; -1 for the future, if causal."""
        distance = keys - queries[:, None]  # (T, S)
        if self.is_causal:
            ahead, past, count = 0, (-distance).clamp(min=0), BUCKETS
        else:
            count = BUCKETS // 2
            ahead, past = count * (distance > 0), distance.abs()
        exact = count // 2
        share = torch.log(past.clamp(min=1) / exact) / math.log(FURTHEST / exact)
        far = exact + (share * (count - exact)).long()
        found = ahead + torch.where(past < exact, past, far.clamp(max=count - 1))
        if self.is_causal:
            found = found.masked_fill(distance > 0, -1)
        return found[None, None]


class BucketBias(nn.Embedding):
    """A learned bias for each head and bucket, added to the attention logits (section 2.1)."""

    def __init__(self, n_head):
        super().__init__(BUCKETS, n_head)

    def forward(self, buckets):
        """Buckets (B, 1, T, S), -1 for pairs that do not attend → (B, H, T, S), there -inf."""
        bias = super().forward(buckets[:, 0].clamp(min=0)).permute(0, 3, 1, 2)
        return bias.masked_fill(buckets < 0, -torch.inf)


class RelativeBias(BucketBias):
    """The BucketBias that all blocks of a stack share."""

    def __init__(self, n_head, is_causal):
        super().__init__(n_head)
        self.buckets = Buckets(is_causal)

    def forward(self, queries, keys):
        """Positions (T,) of queries and (S,) of keys → (1, H, T, S); -inf for future positions, if causal."""
        return super().forward(self.buckets(queries, keys))


def positions_of(cfg, is_causal):
    """The module for positions of a stack: the bias of all its blocks, or Buckets for one in each block."""
    if getattr(cfg, 'rel_per_layer', False):
        return Buckets(is_causal)
    return RelativeBias(cfg.n_head, is_causal)


def init_relative(model):
    """Init all BucketBiases."""
    std = model.cfg.init_std or model.cfg.n_embd ** -0.5
    for module in model.modules():
        if isinstance(module, BucketBias):
            nn.init.normal_(module.weight, std=std)
