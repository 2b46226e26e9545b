"""
An encoder-decoder (T5, Raffel et al. 2020, arXiv 1910.10683), made from the parts of model.py.

    model = make_model(build(ModelConfig, n_encoder_layer=12, t5_scale=True, position='relative', …))
    loss = model(idx, targets, source=source)   # source (B, S) int64, -1 where a row is padded at its end

S stands for the length of the source in comments on shapes.
"""
import math
import re
from typing import NamedTuple

import torch
import torch.nn as nn

from features.t5.positions import BucketBias, positions_of
from features.t5.settings import T5Config
from model import MLP, Attention, AttentionInputs, Block, Transformer, make_mlp, no_code, norm

# -----------------------------------------------------------------------------
# Blocks

class EncoderOutput(NamedTuple):
    h: torch.Tensor  # (B, S, C)
    mask: torch.Tensor  # (B, 1, 1, S) bool: False where a row is padded
    length: torch.Tensor  # (B,) tokens of each row


class CrossInputs(NamedTuple):
    """The inputs of cross-attention besides x and the encoder's output, the same in all blocks."""
    query_angles: torch.Tensor | None  # rotary, of the target's tokens, (2, T, D/2) or (2, B, T, D/2)
    key_angles: torch.Tensor | None  # of the source's tokens, (2, S, D/2)
    mask: torch.Tensor  # as in EncoderOutput


class T5Attention(Attention):
    """Self-attention of an encoder-decoder; causal if there is no mask."""

    def __init__(self, cfg, layer):
        super().__init__(cfg, layer)
        self.rel = BucketBias(cfg.n_head) if cfg.rel_per_layer else None

    def forward(self, x, inputs, v0=None, cache=None):
        """Like Attention.forward(); with a position bias of its own, inputs.mask holds Buckets."""
        if self.rel is not None:
            inputs = inputs._replace(mask=self.rel(inputs.mask))
        return super().forward(x, inputs, v0, cache)

    def output(self, q, k, v, mask):
        """Like Attention.output(); with t5_scale, logits are not divided by sqrt(D)."""
        if self.cfg.t5_scale:
            q = q * self.cfg.d_head ** 0.5
        return super().output(q, k, v, mask)


class CrossAttention(T5Attention):
    """Attention with queries from x, keys and values from the encoder's output."""

    def __init__(self, cfg, layer):
        super().__init__(cfg, layer)
        self.v_mix = None  # the source has values of its own
        self.rel = None  # and no positions

    def forward(self, x, encoded, inputs, cache=None):
        """x (B, T, C), encoded (B, S, C), CrossInputs → (B, T, C)."""
        q = self.turn(self.heads(self.q, x, self.q_norm), inputs.query_angles)
        if cache is None:
            k, v = self.look_up(encoded, inputs)
        else:
            if cache.source[self.layer] is None:  # the first step
                cache.source[self.layer] = self.look_up(encoded, inputs)
            k, v = cache.source[self.layer]
        return self.output(q, k, v, inputs.mask)

    def look_up(self, encoded, inputs):
        """k and v (B, kv_heads, S, D)."""
        k = self.turn(self.heads(self.k, encoded, self.k_norm), inputs.key_angles)
        return k, self.heads(self.v, encoded).transpose(1, 2)


class WideMLP(MLP):
    """T5's hidden layer may exceed 65,504, the largest float16, so it stays float32, as in transformers."""

    def forward(self, x, *counts):
        up = self.up(x, *counts)
        gate = None if self.gate is None else self.gate(x, *counts)
        if up.dtype != torch.float16:
            return self.project(up, gate, *counts)
        with torch.autocast(x.device.type, enabled=False):
            return self.project(up.float(), None if gate is None else gate.float(), *counts)

    def project(self, up, gate, *counts):
        h = self.act(up) if gate is None else self.act(gate) * up
        return self.down(self.norm(h), *counts)


class EncoderBlock(Block):
    def add_layers(self, cfg, layer):
        self.norm_1, self.attn = norm(cfg.n_embd, cfg), T5Attention(cfg, layer)
        self.add_mlp(cfg, layer)

    def add_mlp(self, cfg, layer):
        self.norm_2, self.mlp = norm(cfg.n_embd, cfg), make_mlp(cfg, layer, WideMLP if cfg.t5_scale else MLP)


class DecoderBlock(EncoderBlock):
    def add_layers(self, cfg, layer):
        self.norm_1, self.attn = norm(cfg.n_embd, cfg), T5Attention(cfg, layer)
        self.norm_x, self.cross = norm(cfg.n_embd, cfg), CrossAttention(cfg, layer)
        self.add_mlp(cfg, layer)

    def forward(self, x, inputs, v0, cache, encoded, cross):
        """Like Block.forward(); encoded (B, S, C), cross: the CrossInputs."""
        y, v0 = self.attn(self.normed(self.norm_1, x), inputs, v0, cache)
        x = x + self.drop(y)
        x = x + self.drop(self.cross(self.normed(self.norm_x, x), encoded, cross, cache))
        return self.feed_forward(x, inputs, v0, x)


# -----------------------------------------------------------------------------
# The network

class EncoderDecoder(Transformer):
    """
    An encoder and a decoder. Raises ValueError also for more tokens than source_size, unless the positions
    are relative.
    """

    def __init__(self, cfg, init=True):
        T5Config.check(cfg)
        if cfg.cross_rope not in ('none', 'same', 'offset'):
            raise no_code(cfg, 'cross_rope', 'features/t5/network.py')
        super().__init__(cfg, init)
        if cfg.position not in ('rope', 'learned', 'relative', 'none'):
            raise no_code(cfg, 'position', 'features/t5/network.py')

    def n_positions(self):
        cfg = self.cfg
        if cfg.cross_rope == 'offset':
            return cfg.block_size + cfg.source_context
        return max(cfg.block_size, cfg.source_context)

    def add_blocks(self):
        cfg = self.cfg
        self.wte_encoder = None  # with LoRA: a module of the same weight for the encoder
        self.encoder = nn.ModuleList(EncoderBlock(cfg, layer) for layer in range(cfg.n_encoder_layer))
        self.rel_encoder = positions_of(cfg, is_causal=False) if cfg.position == 'relative' else None
        self.norm_encoder = norm(cfg.n_embd, cfg)
        self.blocks = nn.ModuleList(DecoderBlock(cfg, layer) for layer in range(cfg.n_layer))

    def forward(self, idx, targets=None, cache=None, reduction='mean', label_smoothing=0.0, source=None):
        """Like Transformer.forward(). source (B, S) int64: the encoder's input, -1 for padding at the end."""
        if source is None:
            raise ValueError('an encoder-decoder takes a source')
        h = self.hidden(idx, cache, self.encode(source))
        if targets is None:
            return self.logits(h)
        return self.loss(h, targets, reduction, label_smoothing)

    def encode(self, source):
        """The EncoderOutput of source (B, S); every row needs at least one token."""
        if source.size(1) > self.cfg.source_limit:
            raise ValueError(f'{source.size(1)} tokens are longer than source_size={self.cfg.source_context}')
        real = source >= 0
        mask = real[:, None, None]
        positions = torch.arange(source.size(1), device=source.device)
        inputs = AttentionInputs(None if self.rotary is None else self.rotary[:, positions], mask)
        if self.rel_encoder is not None:
            bias = self.rel_encoder(positions, positions)
            hidden = -1 if self.cfg.rel_per_layer else -torch.inf
            inputs = inputs._replace(mask=bias.masked_fill(~mask, hidden))
        if self.cfg.n_expert:  # moe
            inputs = inputs._replace(real=real)  # moe
        x = self.embed((self.wte_encoder or self.wte)(source.clamp(min=0)), positions)
        return EncoderOutput(self.norm_encoder(self.run(self.encoder, x, inputs)), mask, real.sum(1))

    def hidden(self, idx, cache=None, encoded=None):
        """Like Transformer.hidden(); encoded: the result of encode()."""
        cross = CrossInputs(None, None, encoded.mask)
        if self.cfg.cross_rope != 'none':
            positions = torch.arange(idx.size(1), device=idx.device) if cache is None else cache.positions
            if self.cfg.cross_rope == 'offset':
                positions = encoded.length[:, None] + positions  # (B, T)
            source = torch.arange(encoded.h.size(1), device=idx.device)
            cross = CrossInputs(self.rotary[:, positions], self.rotary[:, source], encoded.mask)
        return super().hidden(idx, cache, None, encoded.h, cross)

    def before_head(self, h):
        if self.cfg.tie and self.cfg.t5_scale:
            h = h * self.cfg.n_embd ** -0.5
        return super().before_head(h)

    # --- init, counts ---

    def init_blocks(self, blocks, output_scale):
        """Init both stacks, the encoder first. t5_scale: see T5Config."""
        cfg = self.cfg
        for stack in (self.encoder, blocks):
            output_scale, query_scale = 1 / math.sqrt(2 * len(stack)), 1.0
            if cfg.t5_scale:
                output_scale, query_scale = 1.0, cfg.d_head ** -0.5
            super().init_blocks(stack, output_scale, query_scale)

    def embedding_std(self):
        return 1.0 if self.cfg.t5_scale else super().embedding_std()

    def flops_per_token(self):
        """
        Like Transformer.flops_per_token(), for one target token and its share of the source, source_size /
        block_size tokens, in the encoder and in the keys and values of cross-attention.
        """
        cfg, T, S = self.cfg, self.cfg.block_size, self.cfg.source_context
        target, source = 0, 0
        for name, count in self.multiplications().items():
            if re.match(r'encoder\.|blocks\.\d+\.cross\.[kv]\.', name):
                source += count
            else:
                target += count
            if name == 'wte_up.weight':  # the source's embedding
                source += count // (2 if cfg.tie else 1)
        pairs = cfg.n_layer * T * (T + S) + cfg.n_encoder_layer * S * S  # of a query and a key, in a row
        passes = 12 if any(p.requires_grad for p in self.parameters()) else 4
        return 2 * target + 2 * source * S // T + passes * pairs // T * cfg.n_head * cfg.d_head
