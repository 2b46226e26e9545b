"""
The model: a GPT, dense or low-rank, in plain PyTorch. You can copy this file: it works alone.

    model = make_model(ModelConfig(vocab_size=50257, n_layer=12, n_head=12, n_embd=768))
    loss = model(idx, targets)   # idx, targets: (B, T) int64; targets of -1 are ignored
    logits = model(idx)          # (B, T, vocab_size)

A line that ends with # t5, # moe, # markov, # distill, # hf or # lora belongs to that folder in features/.
Shapes in comments: B batch, T tokens, C n_embd, H heads, D head_dim, V vocabulary, R rank.
"""
import math
import re
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

# -----------------------------------------------------------------------------
# Settings

@dataclass
class ModelConfig:
    arch: Literal['decoder', 'markov'] = 'decoder'  # [markov] transformer decoder or Markov chain
    vocab_size: int = 0  # vocabulary size; 0 = from the data set
    block_size: int = 1024  # context length in tokens
    n_layer: int = 12  # number of blocks
    n_encoder_layer: int = 0  # [t5] number of encoder blocks; 0 = decoder only
    n_head: int = 12  # number of query heads
    n_kv_head: int = 0  # number of key and value heads; 0 = n_head, fewer = GQA (arXiv 2305.13245), 1 = MQA
    n_embd: int = 768  # width of the residual stream
    head_dim: int = 0  # width of a head; 0 = n_embd / n_head
    d_ff: int = 0  # hidden width of the MLP; 0 = 4 n_embd; gated: 8/3 n_embd, to a multiple of 32
    position: Literal['rope', 'learned', 'relative', 'none'] = 'rope'  # relative: T5's position bias
    rope_theta: float = 10000.0  # base of the rotary frequencies (Su et al. 2021, arXiv 2104.09864)
    rope_scaling: dict = field(default_factory=dict)  # [hf] slow these down for a longer context, with the
    # keys of Llama 3.1's config.json: {'rope_type': 'llama3', 'factor': 8.0, …}
    rope_dim: int = 0  # dimensions of each head that are rotated; 0 = all (GPT-NeoX, arXiv 2204.06745)
    no_rope: list[int] = field(default_factory=list)  # blocks (0, 1, …) without them: arXiv 2501.18795
    window: int = 0  # tokens that a token attends to, with itself; 0 = all before it (arXiv 2004.05150)
    full_layers: list[int] = field(default_factory=list)  # blocks (0, 1, …) without the window (Gemma 2)
    window_theta: float = 0.0  # rope_theta of blocks with the window; 0 = the angles of the others (Gemma 3)
    norm: Literal['rmsnorm', 'layernorm'] = 'rmsnorm'  # RMSNorm: Zhang & Sennrich 2019, arXiv 1910.07467
    norm_eps: float = 1e-5  # epsilon of the norms
    post_norm: bool | Literal['both'] = False  # norms after attention and MLP instead of before (OLMo 2,
    # arXiv 2501.00656). both: before and after (Gemma 2)
    parallel: bool = False  # attention and MLP read the same x, and both are added to it (GPT-NeoX)
    mlp: Literal['gelu', 'gelu_exact', 'silu', 'relu', 'relu2', 'swiglu', 'geglu'] = 'relu2'  # gated: swiglu,
    # geglu; gelu is the tanh approximation
    mlp_norm: bool = False  # add a norm on the MLP's hidden layer
    qk_norm: bool | Literal['head', 'width'] = True  # RMSNorm on queries and keys: bounded logits, higher
    # rates (arXiv 2010.04245). head: with weights (Qwen3); width: with weights, over all heads (OLMo 2)
    attn_scale: float = 0.0  # factor of the attention logits; 0 = 1/sqrt(head_dim)
    attn_softcap: float = 0.0  # limit attention logits to ±attn_softcap with tanh; 0 = off; slower (Gemma 2)
    n_expert: int = 0  # [moe] number of experts per block; 0 = a single dense MLP
    embed_scale: float = 1.0  # factor of the embedding (Gemma: sqrt(n_embd))
    residual_scale: float = 1.0  # factor of what attention and MLP add to the residual stream (Granite)
    logit_scale: float = 1.0  # factor of the output logits, before softcap (muP, arXiv 2203.03466)
    softcap: float = 0.0  # limit the output logits to ±softcap with tanh; 0 = off (Gemma 2, arXiv 2408.00118)
    zero_init: bool = True  # output matrices of attention and MLP start at zero: blocks start as identity
    embed_norm: bool = False  # a norm after the embedding, which then starts at N(0, 1) and needs a high rate
    depth_scale: Literal['none', 'attn', 'norm'] = 'none'  # attn: divide attention logits of block n by n
    # (Inheritune, arXiv 2404.08634); norm: divide the outputs of its norms by sqrt(n) (arXiv 2502.05795)
    value_residual: bool = False  # mix the first block's values into later ones (arXiv 2410.17897)
    tie: bool = True  # share one matrix between embedding and head (Press & Wolf 2017, arXiv 1608.05859)
    bias: bool = False  # use biases in linear layers and LayerNorm
    qkv_bias: bool | Literal['never'] = False  # use biases in the query, key and value matrices, also without
    # `bias` (Qwen2). never: not there, even with `bias` (GPT-Neo)
    dropout: float = 0.0  # 0 for pretraining; 0.1 or more if the data are repeated many times
    init_std: float = 0.0  # standard deviation of the initial weights; 0 = 1/sqrt(inputs). GPT-2: 0.02
    rank_qk: int = 0  # rank of the query and key matrices, as factors up·down of this inner width; 0 = dense
    rank_vo: int = 0  # rank of the value and attention output matrices
    rank_mlp: int = 0  # rank of all MLP matrices
    rank_embed: int = 0  # rank of the embedding
    rank_head: int = 0  # rank of the output head
    ranks: dict = field(default_factory=dict)  # ranks of single matrices, which override these: {'attn.k':
    # 16, 'blocks.3.mlp.down': 0}; also match cross-attention and an encoder's block 3
    rank_act: Literal['none', 'silu'] = 'none'  # activation between the factors (CoLA, arXiv 2502.10940)

    only_in_training = ('dropout',)  # settings on which a trained network's function does not depend

    @property
    def d_head(self):
        return self.head_dim or self.n_embd // self.n_head

    @property
    def kv_heads(self):
        return self.n_kv_head or self.n_head

    @property
    def window_layers(self):
        return [n for n in range(self.n_layer) if self.window and n not in self.full_layers]

    @property
    def mlp_width(self):
        gated = -(-self.n_embd * 8 // (3 * 32)) * 32
        return self.d_ff or (gated if self.mlp in GATED else 4 * self.n_embd)

    @property
    def padded_vocab(self):  # a multiple of 64: 50304 in place of 50257 is 25% faster on an A100 (nanoGPT)
        return -(-self.vocab_size // 64) * 64

    def sizes(self):
        """{matrix of a block: (inputs, outputs)}."""
        C, q, kv, ff = self.n_embd, self.n_head * self.d_head, self.kv_heads * self.d_head, self.mlp_width
        attention = {'attn.q': (C, q), 'attn.k': (C, kv), 'attn.v': (C, kv), 'attn.o': (q, C)}
        gate = {'mlp.gate': (C, ff)} if self.mlp in GATED else {}
        return attention | {'mlp.up': (C, ff)} | gate | {'mlp.down': (ff, C)}

    def rank(self, layer, name):
        """The rank of a matrix of block `layer`, 0 for a dense one: the most specific setting counts."""
        general = self.ranks.get(name, getattr(self, RANK_OF[name]))
        return self.ranks.get(f'blocks.{layer}.{name}', general)

    def check(self):
        """Raise ValueError, in one line that names the settings, for sizes that cannot work."""
        for name in ('block_size', 'n_layer', 'n_head', 'n_embd'):
            if getattr(self, name) < 1:
                raise ValueError(f'{name}={getattr(self, name)}: must be at least 1')
        for name in ('vocab_size', 'n_kv_head', 'head_dim', 'd_ff', 'rope_dim', 'window', 'window_theta',
                     'attn_scale', 'attn_softcap', 'softcap', 'init_std', 'rank_embed', 'rank_head'):
            if getattr(self, name) < 0:
                raise ValueError(f'{name}={getattr(self, name)}: must not be negative')
        if self.rope_theta <= 0 or self.norm_eps <= 0:
            raise ValueError(f'rope_theta={self.rope_theta}, norm_eps={self.norm_eps}: must be positive')
        if self.rope_scaling:  # hf
            from features.hf.rotary import check_scaling  # hf
            check_scaling(self)  # hf
        if not 0 <= self.dropout < 1:
            raise ValueError(f'dropout={self.dropout}: takes 0 <= dropout < 1')
        if self.arch == 'markov':  # markov
            return  # markov
        if not self.head_dim and self.n_embd % self.n_head:
            raise ValueError(f'n_embd={self.n_embd} is not divisible by n_head={self.n_head}: change one of '
                             'them, or set head_dim')
        if self.n_head % self.kv_heads:
            raise ValueError(f'n_head={self.n_head} is not a multiple of n_kv_head={self.n_kv_head}')
        if self.position == 'rope' and self.d_head % 2:
            raise ValueError(f'head_dim={self.d_head} is odd: rotary positions need an even number; make '
                             "n_embd/n_head even or set position='learned'")
        if self.rope_dim % 2 or self.rope_dim > self.d_head:
            raise ValueError(f'rope_dim={self.rope_dim}: takes an even number up to {self.d_head}')
        for name in ('no_rope', 'full_layers'):
            if not all(0 <= n < self.n_layer for n in getattr(self, name)):
                raise ValueError(f'{name}={getattr(self, name)}: takes blocks from 0 to {self.n_layer - 1}')
        for name in ('no_rope', 'rope_dim', 'window_theta'):
            if getattr(self, name) and self.position != 'rope':
                raise ValueError(f"{name}={getattr(self, name)}: needs position='rope'")
        for name in ('full_layers', 'window_theta'):
            if getattr(self, name) and not self.window:
                raise ValueError(f'{name}={getattr(self, name)}: is about blocks with a window: set window')
        if self.window and self.position == 'relative':
            raise ValueError("position='relative': has no window: leave out window or set position='rope'")
        if self.post_norm and self.depth_scale == 'norm':
            raise ValueError("depth_scale='norm': scales norms before attention and MLP: set post_norm=False")
        self.check_ranks()
        if self.tie and self.rank_head != self.rank_embed:
            raise ValueError(f'rank_head={self.rank_head} differs from rank_embed={self.rank_embed}, but '
                             'tie=True makes them one matrix: set tie=False')

    def check_ranks(self):
        sizes, table = self.sizes(), (self.vocab_size or self.n_embd, self.n_embd)
        ranks = [(RANK_OF[name], getattr(self, RANK_OF[name]), size) for name, size in sizes.items()]
        ranks += [('rank_embed', self.rank_embed, table), ('rank_head', self.rank_head, table)]
        for name, rank in self.ranks.items():
            found = re.fullmatch(r'(?:blocks\.(0|[1-9][0-9]*)\.)?(.*)', str(name), re.DOTALL)
            layer, matrix = found.groups('0')
            if matrix not in sizes or int(layer) >= self.n_layer:
                raise ValueError(f'ranks: {name!r} is not a matrix of the blocks: takes {", ".join(sizes)}, '
                                 'or one of a single block as blocks.0.attn.q')
            ranks.append((f'ranks: {name}', rank, sizes[matrix]))
        for name, rank, (n_in, n_out) in ranks:
            if isinstance(rank, bool) or not isinstance(rank, int) or rank < 0:
                raise ValueError(f'{name}={rank}: takes a whole number, 0 for a dense matrix')
            if rank > min(n_in, n_out):
                raise ValueError(f'{name}={rank} is larger than the matrix ({n_in} x {n_out}): lower it, '
                                 'or 0 for a dense one')


GATED = ('swiglu', 'geglu')
RANK_OF = {'attn.q': 'rank_qk', 'attn.k': 'rank_qk', 'attn.v': 'rank_vo', 'attn.o': 'rank_vo',
           'mlp.up': 'rank_mlp', 'mlp.gate': 'rank_mlp', 'mlp.down': 'rank_mlp'}


def only_in_training(cfg):
    """The names in only_in_training of every dataclass of a ModelConfig."""
    return [name for part in type(cfg).__mro__ for name in vars(part).get('only_in_training', ())]


def no_code(cfg, name, where='model.py'):
    """The error for a choice of a setting that has no code, so that it does not act as another choice."""
    return ValueError(f'{name}={getattr(cfg, name)}: this choice has no code in {where}')


# -----------------------------------------------------------------------------
# Linear layers, dense and low-rank

class LowRank(nn.Module):
    """y = up(act(down(x))): (…, n_in) → (…, R) → (…, n_out)"""

    def __init__(self, n_in, n_out, rank, cfg, bias):
        super().__init__()
        self.down = nn.Linear(n_in, rank, bias=False)
        if cfg.rank_act not in ('none', 'silu'):
            raise no_code(cfg, 'rank_act')
        self.act = F.silu if cfg.rank_act == 'silu' else nn.Identity()
        self.up = nn.Linear(rank, n_out, bias=bias)

    def forward(self, x):
        return self.up(self.act(self.down(x)))


def linear(cfg, layer, name):
    """The linear layer `name`, as in ModelConfig.sizes(), of block `layer`."""
    (n_in, n_out), rank = cfg.sizes()[name], cfg.rank(layer, name)
    bias = cfg.bias
    if cfg.qkv_bias not in (True, False, 'never'):
        raise no_code(cfg, 'qkv_bias')
    if cfg.qkv_bias and name in ('attn.q', 'attn.k', 'attn.v'):
        bias = cfg.qkv_bias is True
    return LowRank(n_in, n_out, rank, cfg, bias) if rank else nn.Linear(n_in, n_out, bias=bias)


def init_linear(layer, cfg, scale=1.0, zero=False):
    """Fill a layer with deviation scale · (init_std or 1/sqrt(inputs)); zero: so that its output is zero."""
    first, last = (layer.down, layer.up) if isinstance(layer, LowRank) else (layer, layer)
    std = scale * (cfg.init_std or first.in_features ** -0.5)
    if first is last:
        nn.init.normal_(layer.weight, std=std)
    else:
        init_factors(first.weight, last.weight, std)
    if zero:
        nn.init.zeros_(last.weight)
    if last.bias is not None:
        nn.init.zeros_(last.bias)


def init_factors(down, up, std):
    """
    Fill down (R, n_in) and up (n_out, R) with the truncated SVD of a dense normal matrix with deviation `std`
    (Khodak et al. 2021, arXiv 2105.01029). At any rank, the product has the norm of the dense matrix.
    """
    rank = len(down)
    dense = torch.empty(len(up), down.size(1), device=up.device).normal_(std=std)
    U, S, Vh = torch.linalg.svd(dense, full_matrices=False)
    U, S, Vh = U[:, :rank], S[:rank] * (S.norm() / S[:rank].norm()), Vh[:rank]
    down.copy_(S[:, None].sqrt() * Vh)
    up.copy_(U * S.sqrt())


# -----------------------------------------------------------------------------
# Norms and positions

class RMSNorm(nn.RMSNorm):
    def forward(self, x):  # torch's kernel wants one dtype; it adds the squares in float32 all the same
        return F.rms_norm(x, self.normalized_shape, self.weight.type_as(x), self.eps)


def norm(width, cfg):
    if cfg.norm == 'rmsnorm':
        return RMSNorm(width, cfg.norm_eps)
    if cfg.norm == 'layernorm':
        return nn.LayerNorm(width, cfg.norm_eps, bias=cfg.bias)
    raise no_code(cfg, 'norm')


def qk_norm(cfg, heads):
    if cfg.qk_norm not in ('head', 'width'):
        raise no_code(cfg, 'qk_norm')
    return RMSNorm(cfg.d_head * (heads if cfg.qk_norm == 'width' else 1), cfg.norm_eps)


def rotary_table(length, d_head, theta, scaling=None):
    """cos and sin of every position's angles, (2, length, D/2) in float32, rounded as in transformers."""
    if torch.get_default_device().type == 'meta':  # torch's arithmetic there imports torch._dynamo: 0.7 s
        return torch.empty(2, length, d_head // 2)
    frequencies, size = 1 / theta ** (torch.arange(0, d_head, 2) / d_head), 1
    if scaling:  # hf
        from features.hf.rotary import scaled  # hf
        frequencies, size = scaled(frequencies, theta, scaling)  # hf
    angles = torch.outer(torch.arange(length), frequencies)
    return torch.stack([angles.cos(), angles.sin()]) * size


def rotate(x, table):
    """
    Turn pairs (i, i + D/2) of x (B, T, H, D), Llama's layout, by a table (2, T, D/2) or (2, B, T, D/2). A
    smaller table turns the first dimensions of x alone.
    """
    cos, sin = table.unsqueeze(-2)  # (T, 1, D/2) or (B, T, 1, D/2)
    size = cos.size(-1)
    a, b, rest = x.float().tensor_split([size, 2 * size], dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1).type_as(x)


# -----------------------------------------------------------------------------
# Attention

class AttentionInputs(NamedTuple):  # what self-attention takes beside x, the same in all blocks
    angles: torch.Tensor | None  # rotary angles of the tokens, (2, T, D/2)
    mask: torch.Tensor | None  # for (B, H, T, S): True where to look, or added to logits; None: causal
    real: torch.Tensor | None = None  # moe: (B, T), False for padding
    local: 'AttentionInputs | None' = None  # the same for blocks with a window


def window_mask(queries, keys, window):
    """(T, S): True where a token at a position of `queries` (T,) attends to one of `keys` (S,)."""
    distance = queries[:, None] - keys
    return (distance >= 0) & (distance < window)


def attend(q, k, v, mask, is_causal, dropout, softcap=0.0):
    """softmax(q·kᵀ / sqrt(D))·v of q (B, H, T, D) and k, v (B, kv_heads, S, D)."""
    groups = q.size(1) // k.size(1)
    if mask is not None and mask.is_floating_point():
        mask = mask.to(q.dtype)
    # torch's fused kernel, which has no softcap. But plain attention in two cases on a CPU: in bfloat16 it
    # takes half the time on short rows (a training step at T = 256: 18 against 34 ms); for a learned mask the
    # kernel has no backward pass, and torch's substitute takes twice as long
    is_short = q.dtype == torch.bfloat16 and q.size(2) > 1 and q.size(2) * k.size(2) <= 256 ** 2
    is_learned = mask is not None and mask.requires_grad
    if not softcap and (q.device.type != 'cpu' or not (is_short or is_learned)):
        return F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal, enable_gqa=groups > 1)
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    return F.dropout(attention_matrix(q, k, mask, is_causal, softcap), dropout) @ v


def attention_matrix(q, k, mask, is_causal, softcap=0.0):
    """softmax(q·kᵀ / sqrt(D)) of q (B, H, T, D) and k (B, H, S, D) → (B, H, T, S)."""
    logits = cap((q * q.size(-1) ** -0.5) @ k.mT, softcap)
    shape = logits.shape
    if is_causal:  # added, so that its backward pass needs no mask
        mask = torch.full((q.size(2), k.size(2)), -torch.inf, dtype=logits.dtype, device=q.device).triu(1)
        if torch.compiler.is_compiling():  # one loop over all rows, each in the cache: 0.75 of the time
            logits, mask = logits.flatten(0, 2), mask.expand(shape).flatten(0, 2)
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
    return logits.softmax(-1, dtype=q.dtype).view(shape)


class Attention(nn.Module):
    """Causal self-attention: n_head heads of queries, kv_heads of keys and values."""

    def __init__(self, cfg, layer):
        super().__init__()
        self.cfg, self.layer = cfg, layer
        self.q, self.k, self.v, self.o = (linear(cfg, layer, f'attn.{name}') for name in 'qkvo')
        self.has_rope, self.has_window = layer not in cfg.no_rope, layer in cfg.window_layers
        self.q_norm = self.k_norm = None  # without weights: turn()
        if cfg.qk_norm not in (True, False):
            self.q_norm, self.k_norm = qk_norm(cfg, cfg.n_head), qk_norm(cfg, cfg.kv_heads)
        # share of the first block's values
        self.v_mix = nn.Parameter(torch.tensor(0.5)) if cfg.value_residual and layer > 0 else None

    def forward(self, x, inputs, v0=None, cache=None):
        """x (B, T, C), AttentionInputs, the first block's values v0 (B, T, kv_heads, D) → (B, T, C), v0."""
        q, k = self.heads(self.q, x, self.q_norm), self.heads(self.k, x, self.k_norm)
        v = self.heads(self.v, x)
        if self.v_mix is not None:
            v = v + self.v_mix * (v0 - v)
        elif self.cfg.value_residual:
            v0 = v
        if self.has_window:
            inputs = inputs.local
        angles = inputs.angles if self.has_rope else None
        qk = self.turn(torch.cat([q, k], dim=2), angles)  # (B, H + kv_heads, T, D): both in one go
        q, k = qk.split([q.size(2), k.size(2)], dim=1)
        v = v.transpose(1, 2)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)  # with those of earlier tokens, (B, kv_heads, S, D)
        return self.output(q, k, v, inputs.mask), v0

    def heads(self, layer, x, norm=None):
        y = layer(x)
        if norm is not None:  # of heads, or of all of them as one
            y = norm(y.unflatten(-1, (-1, len(norm.weight)))).flatten(-2).type_as(y)
        return y.unflatten(-1, (-1, self.cfg.d_head))  # (B, T, H, D)

    def turn(self, heads, angles):
        """Queries or keys (B, T, H, D), normalised and turned by their positions → (B, H, T, D)."""
        if self.cfg.qk_norm is True:  # autocast on GPUs makes it float32 (torch 2.13), a cache has one dtype
            heads = F.rms_norm(heads, (self.cfg.d_head,)).type_as(heads)
        return (heads if angles is None else rotate(heads, angles)).transpose(1, 2)

    def output(self, q, k, v, mask):
        """q (B, H, T, D), k, v (B, kv_heads, S, D) → (B, T, C)."""
        if self.cfg.depth_scale == 'attn':
            q = q / (self.layer + 1)
        if self.cfg.attn_scale:
            q = q * (self.cfg.attn_scale * self.cfg.d_head ** 0.5)
        is_causal = mask is None and q.size(2) > 1  # a single token may look at all that there is
        dropout = self.cfg.dropout if self.training else 0.0
        attends = attend
        if is_causal and hasattr(self, 'attend_prompt'):  # lora: packed in bfloat16
            attends = self.attend_prompt  # lora
        y = attends(q, k, v, mask, is_causal, dropout, self.cfg.attn_softcap)
        return self.o(y.transpose(1, 2).flatten(2))


# -----------------------------------------------------------------------------
# MLP and block

gelu = partial(F.gelu, approximate='tanh')  # as in GPT-2, T5 v1.1 and Gemma
ACTIVATIONS = {'gelu': gelu, 'gelu_exact': F.gelu, 'silu': F.silu, 'relu': F.relu,
               'relu2': lambda x: F.relu(x).square(),  # So et al. 2021, arXiv 2109.08668
               'swiglu': F.silu, 'geglu': gelu}  # Shazeer 2020, arXiv 2002.05202


class MLP(nn.Module):
    """down(act(up(x))), or of a gated one down(act(gate(x))·up(x))."""

    def __init__(self, cfg, layer, linear=linear):
        super().__init__()
        if cfg.mlp not in ACTIVATIONS:
            raise no_code(cfg, 'mlp')
        self.act = ACTIVATIONS[cfg.mlp]
        self.up = linear(cfg, layer, 'mlp.up')
        self.gate = linear(cfg, layer, 'mlp.gate') if cfg.mlp in GATED else None
        self.norm = norm(cfg.mlp_width, cfg) if cfg.mlp_norm else nn.Identity()
        self.down = linear(cfg, layer, 'mlp.down')

    def forward(self, x, *counts):  # (…, C) → (…, C); counts: what experts take beside x
        up = self.up(x, *counts)
        h = self.act(up) if self.gate is None else self.act(self.gate(x, *counts)) * up
        return self.down(self.norm(h), *counts)


def norm_before(cfg):
    return nn.Identity() if cfg.post_norm is True else norm(cfg.n_embd, cfg)


def norm_after(cfg):
    if cfg.post_norm not in (True, False, 'both'):
        raise no_code(cfg, 'post_norm')
    return norm(cfg.n_embd, cfg) if cfg.post_norm else nn.Identity()


class Block(nn.Module):
    def __init__(self, cfg, layer):
        super().__init__()
        if cfg.depth_scale not in ('none', 'attn', 'norm'):
            raise no_code(cfg, 'depth_scale')
        self.norm_scale = (layer + 1) ** -0.5 if cfg.depth_scale == 'norm' else 1.0
        self.parallel, self.residual_scale = cfg.parallel, cfg.residual_scale
        self.norm_a = self.norm_m = nn.Identity()  # after attention and MLP
        self.add_layers(cfg, layer)
        self.drop = nn.Dropout(cfg.dropout)

    def add_layers(self, cfg, layer):
        self.norm_1, self.attn, self.norm_a = norm_before(cfg), Attention(cfg, layer), norm_after(cfg)
        self.norm_2, self.mlp, self.norm_m = norm_before(cfg), make_mlp(cfg, layer), norm_after(cfg)

    def forward(self, x, inputs, v0=None, cache=None):
        """x (B, T, C), AttentionInputs, the first block's values v0 → (B, T, C), v0."""
        y, v0 = self.attn(self.normed(self.norm_1, x), inputs, v0, cache)
        after = self.add(x, self.norm_a(y))
        return self.feed_forward(after, inputs, v0, x if self.parallel else after)

    def feed_forward(self, x, inputs, v0, source):
        """x + the MLP's output for `source`, both (B, T, C)."""
        h = self.normed(self.norm_2, source)
        if hasattr(self.mlp, 'router'):  # moe
            y, routing = self.mlp(h, inputs.real)  # moe
            return self.add(x, self.norm_m(y)), v0, routing  # moe
        return self.add(x, self.norm_m(self.mlp(h))), v0

    def add(self, x, y):
        y = self.drop(y)
        return x + (y if self.residual_scale == 1 else y * self.residual_scale)

    def normed(self, norm, x):
        return norm(x) if self.norm_scale == 1 else norm(x) * self.norm_scale


def make_mlp(cfg, layer, kind=MLP):
    if cfg.n_expert and layer not in cfg.dense_layers:  # moe
        from features.moe.network import Mixture  # moe
        return Mixture(cfg, layer, kind)  # moe
    return kind(cfg, layer)


# -----------------------------------------------------------------------------
# Loss

CHUNK = 2 ** 25  # logits multiplied at a time on a CPU: 64 MiB in bfloat16
BLOCK = 2 ** 20  # of these, how many are worked on at a time: 4 MiB in float32
GPU_CHUNK = 2 ** 28


class ChunkedCrossEntropy(torch.autograd.Function):
    """
    Sum of the cross-entropies of softmax(softcap(h·Wᵀ)), without storing all logits: the head, the loss and
    both gradients are computed chunk by chunk in the forward pass (idea: Liger kernel, arXiv 2410.10989). At
    V = 50k, the logits, their softmax and its gradient take most of a small model's memory. The price is a V
    x C buffer for W's gradient, and no second backward pass. On a CPU, the logits of a chunk become gradients
    block by block in the cache, which takes half the time of torch's cross_entropy. On a GPU, torch.compile
    fuses the passes instead.
    """
    @staticmethod
    def forward(ctx, h, weight, targets, n_vocab, softcap, smoothing, with_grad, teacher=None):
        # h (N, C) and weight (V padded, C) are multiplied in autocast's dtype; targets (N,)
        device = h.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else h.dtype
        w, total = weight.to(dtype), h.new_zeros((), dtype=torch.float32)
        grad_h = torch.empty_like(h) if with_grad else None
        grad_w = torch.zeros_like(weight) if with_grad and weight.requires_grad else None  # frozen: none
        rows = max(1, (CHUNK if device == 'cpu' else GPU_CHUNK) // len(w))
        block = max(1, BLOCK // len(w)) if device == 'cpu' else rows
        for i in range(0, len(h), rows):
            x, y, more = h[i:i + rows].to(dtype), targets[i:i + rows], {}
            logits = x @ w.T  # (rows, V padded), later the gradient with respect to them
            taught = teacher.logits(i, rows, dtype) if teacher else None  # distill
            for j in range(0, len(x), block):
                if teacher is not None:  # distill
                    more = {'teacher': teacher, 'taught': taught[j:j + block]}  # distill
                # no += here: torch 2.11 makes every gradient zero where a compiled autograd.Function changes
                # the tensor it returns in place (pytorch issue 180642)
                total = total + loss_and_gradient(logits[j:j + block], y[j:j + block], n_vocab, softcap,
                                                  smoothing, with_grad, **more)
            if with_grad:
                grad_h[i:i + rows] = logits @ w
                if grad_w is not None:
                    grad_w += logits.T @ x
        ctx.save_for_backward(grad_h, grad_w)
        return total

    @staticmethod
    def backward(ctx, grad):
        grad_h, grad_w = ctx.saved_tensors  # changed in place, to save memory: so there is one backward pass
        return grad_h.mul_(grad), None if grad_w is None else grad_w.mul_(grad), *[None] * 6


def loss_and_gradient(logits, targets, n_vocab, softcap, smoothing, with_grad, teacher=None, taught=None):
    """
    Sum of the cross-entropies of logits (rows, V padded), without the padding. with_grad: overwrite the
    logits with their gradient. In float32, in as few passes as possible.
    """
    real, y = (targets >= 0).unsqueeze(1), targets.clamp(min=0).unsqueeze(1)
    z = logits[:, :n_vocab].float()
    if softcap:
        tanh = torch.tanh(z / softcap)
        z = softcap * tanh
    log_sum = z.logsumexp(1, keepdim=True)
    nll = log_sum - z.gather(1, y)
    if smoothing:
        nll = (1 - smoothing) * nll + smoothing * (log_sum - z.mean(1, keepdim=True))
    if teacher is not None:  # distill
        kl, d_kl = teacher.divergence(z, taught[:, :n_vocab])  # distill
        nll = (1 - teacher.mix) * nll + teacher.mix * kl  # distill
    if with_grad:  # softmax - target distribution
        d = (z - log_sum).exp_()
        if torch.compiler.is_compiling():  # fused, where scatter_add_ writes d to memory: 0.65 of the time
            d += torch.where(torch.arange(n_vocab, device=y.device) == y, smoothing - 1, 0.0)
        else:
            d.scatter_add_(1, y, torch.full_like(log_sum, smoothing - 1))
        if smoothing:
            d -= smoothing / n_vocab
        if teacher is not None:  # distill
            d = (1 - teacher.mix) * d + teacher.mix * d_kl  # distill
        if softcap:
            d *= 1 - tanh.square_()
        logits[:, :n_vocab] = d.mul_(real)
        logits[:, n_vocab:] = 0
    return (nll * real).sum()


def cap(logits, softcap):
    return softcap * torch.tanh(logits / softcap) if softcap else logits


# -----------------------------------------------------------------------------
# The decoder

class Transformer(nn.Module):
    """A decoder. Raises ValueError for settings that cannot work, and for more tokens than block_size."""

    def __init__(self, cfg, init=True):  # init=False: the weights will be loaded
        super().__init__()
        ModelConfig.check(cfg)
        if not cfg.vocab_size:
            raise ValueError('vocab_size=0: set it to the number of tokens of the data')
        positions = ['rope', 'learned', 'none']
        positions.append('relative')  # t5
        if cfg.position not in positions:
            raise no_code(cfg, 'position')
        self.cfg = cfg
        self.recompute = False  # keep only the blocks' inputs for the backward pass (arXiv 1604.06174)
        self.wte = nn.Embedding(cfg.padded_vocab, cfg.rank_embed or cfg.n_embd)
        self.wte_up = nn.Linear(cfg.rank_embed, cfg.n_embd, bias=False) if cfg.rank_embed else None
        self.wpe = nn.Embedding(self.n_positions(), cfg.n_embd) if cfg.position == 'learned' else None
        self.norm_e = norm(cfg.n_embd, cfg) if cfg.embed_norm else nn.Identity()
        self.drop = nn.Dropout(cfg.dropout)
        self.add_blocks()
        if cfg.position == 'relative':  # t5
            from features.t5.positions import positions_of  # t5
            self.rel = positions_of(cfg, is_causal=True)  # t5
        self.norm_f = norm(cfg.n_embd, cfg)
        self.head_down = self.head = None  # tied: wte is the head
        if not cfg.tie and cfg.rank_head:
            self.head_down = nn.Linear(cfg.n_embd, cfg.rank_head, bias=False)
        if not cfg.tie:
            self.head = nn.Linear(cfg.rank_head or cfg.n_embd, cfg.padded_vocab, bias=False)
        for name, table in self.rotary_tables().items():
            self.register_buffer(name, table, persistent=False)
        if init and not self.wte.weight.is_meta:
            self.init_weights()

    def n_positions(self):
        return self.cfg.block_size

    def rotary_tables(self):
        """{buffer: its table or None}; local_rotary is that of blocks with a window."""
        cfg, length, size = self.cfg, self.n_positions(), self.cfg.rope_dim or self.cfg.d_head
        tables = {'rotary': None, 'local_rotary': None}
        if cfg.position == 'rope':
            tables['rotary'] = rotary_table(length, size, cfg.rope_theta, cfg.rope_scaling)
        if cfg.window_theta:
            tables['local_rotary'] = rotary_table(length, size, cfg.window_theta)
        return tables

    def add_blocks(self):
        self.blocks = nn.ModuleList(Block(self.cfg, layer) for layer in range(self.cfg.n_layer))

    # --- forward ---

    def forward(self, idx, targets=None, cache=None, reduction='mean', label_smoothing=0.0, pieces=None,
                teacher=None):
        """
        idx (B, T) int64 → logits (B, T, vocab_size) float32; with targets (B, T), the loss. cache: keys and
        values of earlier tokens (sample.py). pieces (B, T): the index of each token's text, for several texts
        packed into one row and masked from each other.
        """
        h = self.hidden(idx, cache, pieces)
        if targets is None:
            return self.logits(h)
        return self.loss(h, targets, reduction, label_smoothing, teacher)

    def hidden(self, idx, cache=None, pieces=None, *more):
        """The normalised output of the last block, (B, T, C). more: what else the blocks take."""
        T, numbers, mask = idx.size(1), torch.arange(idx.size(1), device=idx.device), None
        if T > self.cfg.block_size and self.cfg.position != 'relative':
            raise ValueError(f'{T} tokens are longer than block_size={self.cfg.block_size}')
        if cache is not None:
            numbers, mask = cache.positions, cache.mask
        if self.cfg.position == 'relative':  # t5
            mask = self.rel(numbers, numbers if cache is None else cache.slots[:cache.used])  # t5
        if pieces is not None:
            same = (pieces[:, None, :, None] == pieces[:, None, None, :]).tril()  # (B, 1, T, T)
            mask = same if mask is None else mask.masked_fill(~same, -torch.inf)
            if self.wpe is not None:  # every text begins at 0; elsewhere only distances count
                numbers = numbers - torch.searchsorted(pieces, pieces)
        x = self.embed(self.wte(idx), numbers)
        inputs = AttentionInputs(None if self.rotary is None else self.rotary[:, numbers], mask)
        if self.cfg.window:
            inputs = inputs._replace(local=self.local_inputs(inputs, numbers, T, cache))
        return self.norm_f(self.run(self.blocks, x, inputs, cache, *more))

    def local_inputs(self, inputs, numbers, T, cache):
        """The AttentionInputs of blocks with a window, from those of the others."""
        if self.local_rotary is not None:
            inputs = inputs._replace(angles=self.local_rotary[:, numbers])
        if cache is not None:
            return inputs._replace(mask=cache.local_mask)
        if T <= self.cfg.window:
            return inputs
        order = torch.arange(T, device=numbers.device)
        mask = window_mask(order, order, self.cfg.window)
        return inputs._replace(mask=mask if inputs.mask is None else mask & inputs.mask)

    def embed(self, x, positions):
        """Rows of the table, (B, T, C) or (B, T, R), of tokens at positions (T,) or (B, T) → (B, T, C)."""
        if self.wte_up is not None:
            x = self.wte_up(x)
        if self.cfg.embed_scale != 1:
            x = x * self.cfg.embed_scale
        if self.wpe is not None:
            x = x + self.wpe(positions)
        return self.drop(self.norm_e(x))

    def run(self, blocks, x, inputs, cache=None, *more):
        """x (B, T, C) through a stack of blocks."""
        v0 = None
        for block in blocks:
            if self.recompute and self.training:
                x, v0 = checkpoint(block, x, inputs, v0, cache, *more, use_reentrant=False)
            else:
                x, v0 = block(x, inputs, v0, cache, *more)
        return x

    def before_head(self, h):
        """h (…, C) → the input of the head's matrix: scaled, and through a low-rank head's inner factor."""
        if self.cfg.logit_scale != 1:
            h = h * self.cfg.logit_scale
        if self.cfg.tie:
            return h if self.wte_up is None else h @ self.wte_up.weight
        return h if self.head_down is None else self.head_down(h)

    def head_input(self, h):
        """h (…, C) → the two factors of the logits: (…, C or R) and the head's matrix (V padded, C or R)."""
        h, weight = self.before_head(h), (self.wte if self.cfg.tie else self.head).weight
        if hasattr(self, 'lora'):  # lora
            return self.lora.head_input(self, h, weight)  # lora
        return h, weight

    def logits(self, h):
        """h (…, C) → logits (…, vocab_size) in float32, without the padding of the vocabulary."""
        logits = F.linear(*self.head_input(h)) if self.head is None else self.head(self.before_head(h))
        return cap(logits.float()[..., :self.cfg.vocab_size], self.cfg.softcap)

    def loss(self, h, targets, reduction='mean', label_smoothing=0.0, teacher=None):
        """Cross-entropy in nats of the targets (B, T) from 0: their mean, or the sum for reduction='sum'."""
        h, weight = self.head_input(h)
        cross_entropy = ChunkedCrossEntropy.apply
        if torch.compiler.is_compiling() and not h.is_cuda:  # its loop over blocks is not for the compiler
            cross_entropy = torch.compiler.disable(cross_entropy)
        loss = cross_entropy(h.flatten(0, 1), weight, targets.flatten(), self.cfg.vocab_size,
                             self.cfg.softcap, label_smoothing, torch.is_grad_enabled(), teacher)
        return loss if reduction == 'sum' else loss / (targets >= 0).sum()

    # --- init ---

    @torch.no_grad()
    def init_weights(self):
        """Fill all weights. A head of its own starts at zero: the first loss is exactly ln V."""
        cfg = self.cfg
        self.init_blocks(self.blocks, 1 / math.sqrt(2 * cfg.n_layer))  # as in GPT-2
        if cfg.position == 'relative':  # t5
            from features.t5.positions import init_relative  # t5
            init_relative(self)  # t5
        std = cfg.init_std or self.embedding_std()
        nn.init.normal_(self.wte.weight, std=std)
        self.wte.weight[cfg.vocab_size:] = 0
        if self.wpe is not None:
            nn.init.normal_(self.wpe.weight, std=std)
        if self.wte_up is not None:
            init_factors(self.wte_up.weight.T, self.wte.weight[:cfg.vocab_size], std)
        if self.head_down is not None:
            std = cfg.init_std or cfg.n_embd ** -0.5
            init_factors(self.head_down.weight, self.head.weight[:cfg.vocab_size], std)
        if self.head is not None:
            nn.init.zeros_(self.head.weight)

    def init_blocks(self, blocks, output_scale, query_scale=1.0):
        """Init matrices with deviation init_std or 1/sqrt(inputs), outputs with output_scale times that."""
        cfg = self.cfg
        for module in blocks.modules():
            if isinstance(module, Attention):
                init_linear(module.q, cfg, query_scale)
                inputs, output = [module.k, module.v], module.o
            elif isinstance(module, MLP):
                inputs, output = [module.up, module.gate], module.down
            else:
                continue
            for layer in inputs:
                if layer is not None:
                    init_linear(layer, cfg)
            init_linear(output, cfg, output_scale, zero=cfg.zero_init)

    def embedding_std(self):
        if self.cfg.tie:  # wide: smaller, or every token would predict itself at first
            return min(0.02, 4 / self.cfg.n_embd)
        return 1.0 if self.cfg.embed_norm else 0.02

    # --- counts ---

    def num_params(self, active=False):
        """Number of parameters, tied ones once, without vocabulary padding. active: those used per token."""
        tables = [self.wte.weight] if self.head is None else [self.wte.weight, self.head.weight]
        padding = (self.cfg.padded_vocab - self.cfg.vocab_size) * sum(table.size(1) for table in tables)
        return sum(p.numel() for p in self.parameters()) - padding

    def flops_per_token(self):
        """Floating-point operations of training on one token (PaLM, arXiv 2204.02311, appendix B)."""
        cfg, is_trained = self.cfg, any(p.requires_grad for p in self.parameters())
        # at full length, 12 T H D a layer, also with a window; causal kernels do about half of that
        attention = (12 if is_trained else 4) * cfg.n_layer * cfg.block_size * cfg.n_head * cfg.d_head
        return 2 * sum(self.multiplications().values()) + attention

    def multiplications(self):
        """{weight: multiplications per token for the forward pass, the input's gradient, the weight's}."""
        is_trained, tables, found = any(p.requires_grad for p in self.parameters()), table_names(self), {}
        for name, p in self.named_parameters():
            passes = 3 if p.requires_grad else 1 + is_trained
            if p.ndim >= 2 and not name.startswith(tables) and not name.endswith('.bias'):
                found[name] = p.numel() * passes
            if self.cfg.tie and name in ('wte.weight', 'wte_up.weight'):  # as the head
                found[name] = found.get(name, 0) + p.numel() * passes
        return found


def table_names(model):
    """('wte.', …): prefixes of the names of tensors that are looked up, not multiplied."""
    return tuple(f'{name}.' for name, module in model.named_modules() if isinstance(module, nn.Embedding))


class Unfilled(TorchFunctionMode):
    """Inside, torch does not fill the layers that are made: their weights will be loaded."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, '__module__', '') != 'torch.nn.init':
            return function(*args, **(kwargs or {}))


def make_model(cfg, init=True):
    """Make the model that a ModelConfig describes. init=False: skip the init; weights will be loaded."""
    if cfg.arch == 'markov':  # markov
        from features.markov.network import Markov  # markov
        return Markov(cfg, init)  # markov
    if cfg.arch != 'decoder':
        raise no_code(cfg, 'arch')
    network = Transformer
    if cfg.n_encoder_layer:  # t5: encoder
        from features.t5.network import EncoderDecoder  # t5: encoder
        network = EncoderDecoder  # t5: encoder
    if cfg.n_expert:  # moe
        from features.moe.network import with_experts  # moe
        network = with_experts(network)  # moe
    return network(cfg, init)


# -----------------------------------------------------------------------------
# How it is computed

def autocast(device, dtype):
    """Context in which matmuls run in `dtype`."""
    if dtype == 'float32':
        return nullcontext()
    return torch.autocast(device.type, getattr(torch, dtype))


def zero(device):
    """A zero to sum losses in: in float64 the order of the sum hardly matters. MPS has float32 only."""
    return torch.zeros((), device=device, dtype=torch.float32 if device.type == 'mps' else torch.float64)


def compile_all(model, by_block=False):
    """
    Compile a model, or each of its blocks, at its first call. Previously compiled code is dropped, because it
    belongs to a model that has changed: torch counts the variants of every function, and beyond a limit it
    does not compile it. Blocks share their code, each with its own constants.
    """
    torch._dynamo.reset()
    blocks = [*getattr(model, 'blocks', ()), *(getattr(model, 'encoder', None) or ())]
    torch._dynamo.config.recompile_limit = 8 * max(1, len(blocks))
    for module in model.blocks if by_block else [model]:
        module.compile(dynamic=False)
