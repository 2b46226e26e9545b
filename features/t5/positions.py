"""
T5's relative positions (Raffel et al. 2020, arXiv 1910.10683): a learned bias for each range of distances.
"""
import math

import torch
import torch.nn as nn


class RelativeBias(nn.Embedding):
    """
    A learned bias for each head and bucket of distances, added to the attention logits (section 2.1). Half of
    the buckets are for a single distance each, the others for increasing ranges, the last one for all from
    128 on.
    """
    BUCKETS, FURTHEST = 32, 128

    def __init__(self, n_head, is_causal):
        super().__init__(self.BUCKETS, n_head)
        self.is_causal = is_causal

    def forward(self, queries, keys):
        """Positions (T,) of queries and (S,) of keys → (1, H, T, S); -inf for future positions, if causal."""
        distance = keys - queries[:, None]  # (T, S)
        bias = super().forward(self.buckets(distance)).permute(2, 0, 1)  # (H, T, S)
        if self.is_causal:
            bias = bias.masked_fill(distance > 0, -torch.inf)
        return bias[None]

    def buckets(self, distance):
        """The bucket of each distance. Without causality half of them are for the past, half for the rest."""
        if self.is_causal:
            ahead, past, count = 0, (-distance).clamp(min=0), self.BUCKETS
        else:
            count = self.BUCKETS // 2
            ahead, past = count * (distance > 0), distance.abs()
        exact = count // 2
        share = torch.log(past.clamp(min=1) / exact) / math.log(self.FURTHEST / exact)
        far = exact + (share * (count - exact)).long()
        return ahead + torch.where(past < exact, past, far.clamp(max=count - 1))


def init_relative(model):
    """Init the RelativeBias of each stack."""
    std = model.cfg.init_std or model.cfg.n_embd ** -0.5
    nn.init.normal_(model.rel.weight, std=std)
    if model.cfg.n_encoder_layer:
        nn.init.normal_(model.rel_encoder.weight, std=std)
