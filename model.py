"""
Every network of minnow, in plain PyTorch. This file imports none of the others: copy it elsewhere and it works.

    model = make_model(ModelConfig(vocab_size=50257, n_layer=12, n_head=12, n_embd=768))
    loss = model(idx, targets)   # idx, targets: (B, T) int64; a target of -1 is ignored
    logits = model(idx)          # (B, T, vocab_size)

Names are the field's: n_head, n_kv_head, n_embd, block_size. Shapes in comments: B batch, T time, C n_embd, H heads,
D head_dim, V vocabulary, R rank.
"""
import itertools
import math
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

# -----------------------------------------------------------------------------
# Configuration

@dataclass
class ModelConfig:
    arch: Literal['decoder', 'markov'] = 'decoder'  # markov: the next token follows from the one before alone; a V x V table of logits, or with
    # rank_embed an embedding and a head of that width. It knows vocab_size and block_size, and with rank_embed dropout and softcap; the rest is ignored
    vocab_size: int = 0  # number of tokens; 0 = as the data set says
    block_size: int = 1024  # context length in tokens
    n_layer: int = 12
    n_head: int = 12  # query heads
    n_kv_head: int = 0  # heads of keys and values: 0 = n_head (MHA), fewer = GQA, 1 = MQA (Ainslie et al. 2023, arXiv 2305.13245)
    n_embd: int = 768  # width
    head_dim: int = 0  # width of a head; 0 = n_embd / n_head
    d_ff: int = 0  # width of the MLP; 0 = 4 n_embd, or for a gated MLP 8/3 n_embd rounded up to 32 (the same parameters)
    position: Literal['rope', 'learned', 'none'] = 'rope'  # rotary (Su et al. 2021, arXiv 2104.09864), or a table added to the embedding
    rope_theta: float = 10000.0  # base of the rotary frequencies
    norm: Literal['rmsnorm', 'layernorm'] = 'rmsnorm'  # before attention, MLP and head (Zhang & Sennrich 2019, arXiv 1910.07467)
    norm_eps: float = 1e-5
    mlp: Literal['gelu', 'silu', 'relu2', 'swiglu', 'geglu'] = 'relu2'  # relu2: So et al. 2021, arXiv 2109.08668; *glu: Shazeer 2020, arXiv 2002.05202
    mlp_norm: bool = False  # a norm on the MLP's hidden layer too
    qk_norm: bool = True  # RMS-normalise each query and key head: no logit growth, higher rates (Henry et al. 2020, arXiv 2010.04245)
    softcap: float = 0.0  # bound the logits to ±softcap by tanh; 0 = off (Gemma 2, arXiv 2408.00118)
    zero_init: bool = True  # attention's and MLP's output matrices start at zero: every block starts as the identity
    embed_norm: bool = False  # a norm after the embedding, which then starts at N(0, 1) and takes a high rate (modded-nanogpt, record 8)
    depth_scale: Literal['none', 'attn', 'norm'] = 'none'  # block n, from 1: attn: its attention logits over n (GPT-2's scale_attn_by_inverse_layer_idx;
    # Inheritune, arXiv 2404.08634, trained with it); norm: its norms' outputs over sqrt(n) (Sun et al. 2025, arXiv 2502.05795)
    value_residual: bool = False  # values are a learned mix of the layer's own and the first layer's (Zhou et al. 2024, arXiv 2410.17897)
    tie: bool = True  # one matrix for embedding and head (Press & Wolf 2017, arXiv 1608.05859)
    bias: bool = False  # biases in the linear layers and in LayerNorm
    dropout: float = 0.0  # 0 is good for pretraining; 0.1 and more when data repeat many times
    init_std: float = 0.0  # standard deviation of the weights' init; 0 = 1/sqrt(inputs). GPT-2: 0.02
    rank_qk: int = 0  # low rank: a matrix becomes up·down with this inner width; 0 = dense. This one: queries and keys
    rank_vo: int = 0  # values and attention's output
    rank_mlp: int = 0  # all matrices of the MLP
    rank_embed: int = 0  # embedding
    rank_head: int = 0  # output head
    ranks: dict = field(default_factory=dict)  # of single matrices, over these: {'attn.k': 16, 'blocks.3.mlp.down': 0}
    first_block_dense: bool = False  # the first block stays as it is (Pufferfish, Wang et al. 2021, arXiv 2103.03936)
    rank_act: Literal['none', 'silu', 'rmsnorm', 'silu+rmsnorm'] = 'none'  # between the factors (silu: CoLA, Liu et al. 2025, arXiv 2502.10940;
    # rmsnorm: DeepSeek-V2's latents, arXiv 2405.04434)
    rank_act_qk: Literal['none', 'silu', 'rmsnorm', 'silu+rmsnorm'] | None = None  # of queries and keys; None = rank_act
    rank_init: Literal['spectral', 'orthogonal', 'normal'] = 'spectral'  # spectral: truncated SVD of the dense init (Khodak et al. 2021, arXiv
    # 2105.01029); orthogonal: all singular values equal (Kamalakara et al. 2022, arXiv 2209.13569); normal: both factors; all of the dense one's norm
    rank_identity: bool = False  # add a learned multiple of the input where it fits, so that the matrix has full rank again
    rank_blocks: int = 0  # add a block-diagonal matrix of so many blocks, for full rank too (Wei et al. 2024, arXiv 2406.16450)
    rank_guide: int = 0  # self-guided start: a dense matrix beside the factors, whose share falls from 1 to 0 in so many steps (the same)

    def check(self):
        """Raise ValueError, in one line that names the settings, for sizes that cannot work."""
        for name in ('block_size', 'n_layer', 'n_head', 'n_embd'):
            if getattr(self, name) < 1:
                raise ValueError(f'{name}={getattr(self, name)}: must be at least 1')
        if self.rope_theta <= 0 or self.norm_eps <= 0:
            raise ValueError(f'rope_theta={self.rope_theta}, norm_eps={self.norm_eps}: must be positive')
        for name in ('vocab_size', 'n_kv_head', 'head_dim', 'd_ff', 'softcap', 'init_std', 'rank_embed', 'rank_head', 'rank_blocks', 'rank_guide'):
            if getattr(self, name) < 0:
                raise ValueError(f'{name}={getattr(self, name)}: must not be negative')
        if not 0 <= self.dropout < 1:
            raise ValueError(f'dropout={self.dropout}: takes 0 <= dropout < 1')
        if self.arch == 'markov':
            return self.check_markov()
        if not self.head_dim and self.n_embd % self.n_head:
            raise ValueError(f'n_embd={self.n_embd} is not divisible by n_head={self.n_head}: change one of them, or set head_dim')
        if self.n_head % self.kv_heads:
            raise ValueError(f'n_head={self.n_head} is not a multiple of n_kv_head={self.n_kv_head}')
        if self.position == 'rope' and self.d_head % 2:
            raise ValueError(f"head_dim={self.d_head} is odd: rotary positions turn pairs; make n_embd/n_head even or set position='learned'")
        self.check_ranks()
        if self.tie and self.rank_head != self.rank_embed:
            raise ValueError(f'rank_head={self.rank_head} differs from rank_embed={self.rank_embed}, but tie=True makes them one matrix: set tie=False')

    def check_ranks(self):
        sizes = self.sizes()
        for name in self.ranks:
            layer, _, matrix = name[7:].partition('.') if str(name).startswith('blocks.') else ('0', '', name)
            if matrix not in sizes or not layer.isdecimal() or str(int(layer)) != layer or int(layer) >= self.n_layer:
                raise ValueError(f'ranks: {name!r} is no matrix of the blocks: takes {", ".join(sizes)}, or one of a single block as blocks.0.attn.q')
        table = (self.vocab_size or self.n_embd, self.n_embd)
        named = [(group, getattr(self, group), sizes[name]) for name, group in RANK_OF.items() if name in sizes]
        named += [(f'ranks: {name}', rank, sizes[name.split('.', 2)[-1] if name.startswith('blocks.') else name]) for name, rank in self.ranks.items()]
        for name, rank, (n_in, n_out) in named + [('rank_embed', self.rank_embed, table), ('rank_head', self.rank_head, table)]:
            if isinstance(rank, bool) or not isinstance(rank, int) or rank < 0:
                raise ValueError(f'{name}={rank}: takes a whole number, 0 for a dense matrix')
            if rank > min(n_in, n_out):
                raise ValueError(f'{name}={rank} is larger than the matrix ({n_in} x {n_out}): lower it, or 0 for a dense one')
        layers = {int(name.split('.')[1]) for name in self.ranks if name.startswith('blocks.')}  # those with ranks of their own,
        layers |= set(range(min(self.n_layer, len(self.ranks) + 2)))  # the first, and one of the others at least
        low_rank = {name for name in sizes for layer in layers if self.rank(layer, name)}
        for name in ('first_block_dense', 'rank_identity', 'rank_blocks', 'rank_guide'):
            if getattr(self, name) and not low_rank:
                raise ValueError(f'{name}={getattr(self, name)}: no matrix of the blocks is low-rank: set rank_qk, rank_vo, rank_mlp or ranks too')
        for name in low_rank if self.rank_blocks else ():
            if any(n % self.rank_blocks for n in sizes[name]):
                raise ValueError(f'rank_blocks={self.rank_blocks}: does not divide both sides of {name}, {sizes[name][0]} x {sizes[name][1]}')

    def sizes(self):
        """{matrix of a block: (inputs, outputs)}."""
        q, kv, gated = self.n_head * self.d_head, self.kv_heads * self.d_head, self.mlp in ('swiglu', 'geglu')
        return {'attn.q': (self.n_embd, q), 'attn.k': (self.n_embd, kv), 'attn.v': (self.n_embd, kv), 'attn.o': (q, self.n_embd),
                'mlp.up': (self.n_embd, self.mlp_width), **({'mlp.gate': (self.n_embd, self.mlp_width)} if gated else {}),
                'mlp.down': (self.mlp_width, self.n_embd)}

    def rank(self, layer, name):
        """The rank of a matrix of a block, 0 for a dense one: the most particular setting counts."""
        general = 0 if self.first_block_dense and layer == 0 else self.ranks.get(name, getattr(self, RANK_OF[name]))
        return self.ranks.get(f'blocks.{layer}.{name}', general)

    def check_markov(self):
        if self.rank_embed > (self.vocab_size or self.rank_embed):
            raise ValueError(f'rank_embed={self.rank_embed} is larger than the table ({self.vocab_size} x {self.vocab_size}): lower it, or 0 for a full table')
        if self.rank_head:
            raise ValueError(f"rank_head={self.rank_head}: arch='markov' has one rank, rank_embed: leave rank_head out")
        if self.rank_guide:
            raise ValueError(f"rank_guide={self.rank_guide}: arch='markov' has no layers to guide: leave it out")
        if self.softcap and not self.rank_embed:
            raise ValueError(f"softcap={self.softcap}: arch='markov' takes it with rank_embed only: a full table may learn any logits")

    @property
    def kv_heads(self):
        return self.n_kv_head or self.n_head

    @property
    def d_head(self):
        return self.head_dim or self.n_embd // self.n_head

    @property
    def mlp_width(self):
        gated = -(-self.n_embd * 8 // (3 * 32)) * 32
        return self.d_ff or (gated if self.mlp in ('swiglu', 'geglu') else 4 * self.n_embd)

    @property
    def padded_vocab(self):
        """Rows of the embedding and the head: a multiple of 64, which tensor cores want (nanoGPT: +25% speed for 50257 → 50304)."""
        return -(-self.vocab_size // 64) * 64


RANK_OF = {'attn.q': 'rank_qk', 'attn.k': 'rank_qk', 'attn.v': 'rank_vo', 'attn.o': 'rank_vo',
           'mlp.up': 'rank_mlp', 'mlp.gate': 'rank_mlp', 'mlp.down': 'rank_mlp'}  # which setting each matrix follows


# -----------------------------------------------------------------------------
# Parts

ACTIVATIONS = {'gelu': lambda x: F.gelu(x, approximate='tanh'), 'silu': F.silu, 'relu2': lambda x: F.relu(x).square()}
ACTIVATIONS |= {'swiglu': F.silu, 'geglu': ACTIVATIONS['gelu']}  # tanh-GELU as in GPT-2, T5 v1.1 and Gemma


LATENTS = {'none': lambda z: z, 'silu': F.silu, 'rmsnorm': lambda z: F.rms_norm(z, z.shape[-1:]),
           'silu+rmsnorm': lambda z: F.rms_norm(F.silu(z), z.shape[-1:])}


class LowRank(nn.Module):
    """
    A low-rank linear layer, y = up(act(down(x))): (…, n_in) → (…, R) → (…, n_out). What brings the full rank back is added, if asked
    for: a multiple of the input, a block-diagonal matrix. While it is guided, y is share·guide(x) + (1 - share)·that.
    """

    def __init__(self, n_in, n_out, rank, act, cfg):
        super().__init__()
        self.down = nn.Linear(n_in, rank, bias=False)
        self.up = nn.Linear(rank, n_out, bias=cfg.bias)
        self.act = LATENTS[act]
        self.identity = nn.Parameter(torch.zeros(())) if cfg.rank_identity and n_in == n_out else None
        n = cfg.rank_blocks
        self.blocks = nn.Parameter(torch.empty(n, n_out // n, n_in // n)) if n else None
        self.guide = nn.Linear(n_in, n_out, bias=False) if cfg.rank_guide else None
        self.register_buffer('share', torch.ones(()) if cfg.rank_guide else None)

    def forward(self, x):
        y = self.up(self.act(self.down(x)))
        if self.identity is not None:
            y = y + self.identity * x.type_as(y)
        if self.blocks is not None:
            y = y + torch.einsum('...ni,noi->...no', x.unflatten(-1, (len(self.blocks), -1)), self.blocks.type_as(x)).flatten(-2)
        return y if self.guide is None else y + self.share.type_as(y) * (self.guide(x) - y)

    def is_linear(self):
        """Whether the layer is one matrix; with an activation between its factors it is two."""
        probe = torch.tensor([-1.0, 2.0])
        return torch.equal(self.act(probe), probe)

    def matrix(self):
        """The one matrix (n_out, n_in) that a linear layer is."""
        weight = self.up.weight @ self.down.weight
        if self.identity is not None:
            weight = weight + self.identity * torch.eye(len(weight))
        if self.blocks is not None:
            weight = weight + torch.block_diag(*self.blocks)
        return weight if self.guide is None else torch.lerp(weight, self.guide.weight, self.share)


def linear(cfg, layer, name):
    """The linear layer `name` of block `layer`, as in ModelConfig.sizes(): dense, or low-rank."""
    (n_in, n_out), rank = cfg.sizes()[name], cfg.rank(layer, name)
    act = cfg.rank_act_qk if cfg.rank_act_qk and name in ('attn.q', 'attn.k') else cfg.rank_act
    return LowRank(n_in, n_out, rank, act, cfg) if rank else nn.Linear(n_in, n_out, bias=cfg.bias)


class RMSNorm(nn.RMSNorm):
    def forward(self, x):  # torch's kernel wants weight and input in one dtype; the sum of squares is in float32 all the same
        return F.rms_norm(x, self.normalized_shape, self.weight.type_as(x), self.eps)


def norm(width, cfg):
    return RMSNorm(width, cfg.norm_eps) if cfg.norm == 'rmsnorm' else nn.LayerNorm(width, cfg.norm_eps, bias=cfg.bias)


def rotary_table(length, d_head, theta):
    """cos and sin of every position's angles, (2, length, D/2) in float32."""
    angles = torch.outer(torch.arange(length), 1 / theta ** (torch.arange(0, d_head, 2) / d_head))  # rounded as in transformers
    return torch.stack([angles.cos(), angles.sin()])


def rotate(x, table):
    """Turn the pairs (i, i + D/2) of x (B, T, H, D) by their position's angles, table (2, T, D/2): Llama's layout."""
    cos, sin = table[:, None, :, None, :]  # (1, T, 1, D/2)
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).type_as(x)


def attend(q, k, v, mask, is_causal, dropout):
    """
    softmax(q·kᵀ / sqrt(D))·v of q (B, H, T, D) and k, v (B, kv_heads, S, D): torch's fused kernels, but for short rows in bfloat16 on
    a CPU. There the fused kernel multiplies at float32's speed, and a training step of plain attention takes half its time
    (T = 64: 0.7 against 2.7 ms, T = 256: 18 against 34 ms, T = 1024: 3 times longer).
    """
    groups = q.size(1) // k.size(1)
    if not (q.device.type == 'cpu' and q.dtype == torch.bfloat16 and is_causal and k.size(2) <= 256):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, dropout_p=dropout, enable_gqa=groups > 1)
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    return F.dropout(attention_matrix(q, k), dropout) @ v


def attention_matrix(q, k):
    """softmax(q·kᵀ / sqrt(D)), causal: q and k (B, H, T, D), of as many heads → (B, H, T, T)."""
    future = torch.ones(q.size(2), k.size(2), dtype=torch.bool, device=q.device).triu(1)
    return ((q * q.size(-1) ** -0.5) @ k.mT).masked_fill(future, -torch.inf).softmax(-1, dtype=q.dtype)


class Attention(nn.Module):
    """Causal self-attention with n_head query heads over kv_heads key and value heads."""

    def __init__(self, cfg, layer):
        super().__init__()
        self.cfg, self.layer = cfg, layer
        self.q, self.k, self.v, self.o = (linear(cfg, layer, f'attn.{name}') for name in 'qkvo')
        self.v_mix = nn.Parameter(torch.tensor(0.5)) if cfg.value_residual and layer else None  # share of the first layer's values

    def forward(self, x, rotary, v0=None, cache=None):
        """x (B, T, C) → (B, T, C), and the first layer's values v0 (B, T, kv_heads, D) for the layers after it."""
        B, T, _ = x.shape
        D = self.cfg.d_head
        q = self.q(x).view(B, T, -1, D)  # (B, T, H, D)
        k = self.k(x).view(B, T, -1, D)  # (B, T, kv_heads, D)
        v = self.v(x).view(B, T, -1, D)
        if self.v_mix is not None:
            v = v + self.v_mix * (v0 - v)
        elif self.cfg.value_residual:
            v0 = v
        qk = torch.cat([q, k], dim=2)  # (B, T, H + kv_heads, D): what both need is done once
        if self.cfg.qk_norm:
            qk = F.rms_norm(qk, (D,))
        if rotary is not None:
            qk = rotate(qk, rotary)
        q, k = qk.transpose(1, 2).split([q.size(2), k.size(2)], dim=1)  # (B, H, T, D)
        if self.cfg.depth_scale == 'attn':
            q = q / (self.layer + 1)
        v = v.transpose(1, 2)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)  # the past and these: (B, kv_heads, S, D)
        y = attend(q, k, v, cache.mask if cache is not None else None, T == k.size(2) and T > 1, self.cfg.dropout if self.training else 0.0)
        return self.o(y.transpose(1, 2).reshape(B, T, -1)), v0


class MLP(nn.Module):
    def __init__(self, cfg, layer):
        super().__init__()
        self.up = linear(cfg, layer, 'mlp.up')
        self.gate = linear(cfg, layer, 'mlp.gate') if 'mlp.gate' in cfg.sizes() else None
        self.norm = norm(cfg.mlp_width, cfg) if cfg.mlp_norm else nn.Identity()
        self.down = linear(cfg, layer, 'mlp.down')
        self.act = ACTIVATIONS[cfg.mlp]

    def forward(self, x):
        h = self.act(self.gate(x)) * self.up(x) if self.gate is not None else self.act(self.up(x))
        return self.down(self.norm(h))


class Block(nn.Module):
    def __init__(self, cfg, layer):
        super().__init__()
        self.norm_1, self.attn = norm(cfg.n_embd, cfg), Attention(cfg, layer)
        self.norm_2, self.mlp = norm(cfg.n_embd, cfg), MLP(cfg, layer)
        self.drop = nn.Dropout(cfg.dropout)
        self.scale = (layer + 1) ** -0.5 if cfg.depth_scale == 'norm' else 1.0  # of what the norms put out

    def forward(self, x, rotary, v0=None, cache=None):
        y, v0 = self.attn(self.normed(self.norm_1, x), rotary, v0, cache)
        x = x + self.drop(y)
        return x + self.drop(self.mlp(self.normed(self.norm_2, x))), v0

    def normed(self, norm, x):
        return norm(x) if self.scale == 1 else norm(x) * self.scale


# -----------------------------------------------------------------------------
# Loss

CHUNK = 2 ** 25  # logits multiplied at a time on a CPU: 64 MiB in bfloat16
BLOCK = 2 ** 20  # of these, how many are worked on at a time: 4 MiB in float32
GPU_CHUNK = 2 ** 28


@dataclass
class Teacher:
    """What another network has to say about a batch, for distillation (Hinton et al. 2015, arXiv 1503.02531): its logits are made where they are needed."""
    h: torch.Tensor  # (N, C'), and
    weight: torch.Tensor  # (V padded, C'), of which the logits are the product, as head_input() returns them
    softcap: float
    temperature: float  # of both distributions
    mix: float  # the loss is (1 - mix)·cross-entropy + mix·temperature²·KL(teacher ‖ student)


class ChunkedCrossEntropy(torch.autograd.Function):
    """
    Sum of the cross-entropies of softmax(softcap(h·Wᵀ)) without ever holding all logits: head, loss and both gradients
    run chunk by chunk in the forward pass. At V = 50k the logits, their softmax and its gradient are most of a small
    model's memory; the price is one V x C buffer for W's gradient, and no second backward. (The idea: Liger kernel,
    arXiv 2410.10989.) On a CPU a chunk's logits become gradients a block at a time, in its cache: half the time of
    torch's cross_entropy on all of them. On a GPU torch.compile fuses the passes instead.
    """
    @staticmethod
    def forward(ctx, h, weight, targets, n_vocab, softcap, smoothing, with_grad, teacher=None):
        # h (N, C) and weight (V padded, C) in the dtype to multiply in, targets (N,)
        dtype = torch.get_autocast_dtype(h.device.type) if torch.is_autocast_enabled(h.device.type) else h.dtype
        w, total = weight.to(dtype), h.new_zeros((), dtype=torch.float32)
        grad_h = torch.empty_like(h) if with_grad else None
        grad_w = torch.zeros_like(weight) if with_grad else None
        on_cpu = h.device.type == 'cpu'
        rows = max(1, (CHUNK if on_cpu else GPU_CHUNK) // len(w))
        block = max(1, BLOCK // len(w)) if on_cpu else rows
        for i in range(0, len(h), rows):
            x = h[i:i + rows].to(dtype)
            logits = x @ w.T  # (rows, V padded), and then the gradient with respect to them
            taught = itertools.repeat(None) if teacher is None else (teacher.h[i:i + rows].to(dtype) @ teacher.weight.to(dtype).T).split(block)
            for z, y, t in zip(logits.split(block), targets[i:i + rows].split(block), taught):
                total += loss_and_gradient(z, y, n_vocab, softcap, smoothing, with_grad, teacher, t)
            if with_grad:
                grad_h[i:i + rows] = logits @ w
                grad_w += logits.T @ x
        ctx.save_for_backward(grad_h, grad_w)
        return total

    @staticmethod
    def backward(ctx, grad):
        grad_h, grad_w = ctx.saved_tensors
        return grad_h.mul_(grad), grad_w.mul_(grad), None, None, None, None, None, None


def loss_and_gradient(logits, targets, n_vocab, softcap, smoothing, with_grad, teacher=None, taught=None):
    """
    Sum of the cross-entropies of logits (rows, V padded), those of the padding left out; with_grad: the logits give their place to the
    gradient of that sum. The arithmetic is in float32, in as few passes as it takes. taught (rows, V padded): the teacher's logits.
    """
    real = (targets >= 0).unsqueeze(1)
    y = targets.clamp(min=0).unsqueeze(1)
    z = logits[:, :n_vocab].float()
    if softcap:
        tanh = torch.tanh(z / softcap)
        z = softcap * tanh
    log_sum = z.logsumexp(1, keepdim=True)
    nll = log_sum - z.gather(1, y)
    if smoothing:
        nll = (1 - smoothing) * nll + smoothing * (log_sum - z.mean(1, keepdim=True))
    if teacher is not None:
        own, theirs = ((x / teacher.temperature).log_softmax(1) for x in (z, cap(taught[:, :n_vocab].float(), teacher.softcap)))
        nll = (1 - teacher.mix) * nll + teacher.mix * teacher.temperature ** 2 * (theirs.exp() * (theirs - own)).sum(1, keepdim=True)
    if with_grad:  # softmax - target distribution
        d = (z - log_sum).exp_()
        d.scatter_add_(1, y, torch.full_like(log_sum, smoothing - 1))
        if smoothing:
            d -= smoothing / n_vocab
        if teacher is not None:
            d = (1 - teacher.mix) * d + teacher.mix * teacher.temperature * (own.exp() - theirs.exp())
        if softcap:
            d *= 1 - tanh.square_()
        logits[:, :n_vocab] = d.mul_(real)
        logits[:, n_vocab:] = 0
    return (nll * real).sum()


def cap(logits, softcap):
    return softcap * torch.tanh(logits / softcap) if softcap else logits


# -----------------------------------------------------------------------------
# The model

class Transformer(nn.Module):
    """
    A decoder: idx (B, T) → logits (B, T, vocab_size), or with targets the cross-entropy in nats.

    Raises ValueError for a configuration that cannot work and for more tokens than block_size.
    """

    def __init__(self, cfg, init=True):  # init=False: the weights will be loaded
        super().__init__()
        cfg.check()
        if not cfg.vocab_size:
            raise ValueError('vocab_size=0: set it to the number of tokens of the data')
        self.cfg, self.recompute = cfg, False  # recompute: keep only the blocks' inputs for the backward pass (Chen et al. 2016, arXiv 1604.06174)
        self.wte = nn.Embedding(cfg.padded_vocab, cfg.rank_embed or cfg.n_embd)
        self.wte_up = nn.Linear(cfg.rank_embed, cfg.n_embd, bias=False) if cfg.rank_embed else None
        self.wpe = nn.Embedding(cfg.block_size, cfg.n_embd) if cfg.position == 'learned' else None
        self.norm_e = norm(cfg.n_embd, cfg) if cfg.embed_norm else nn.Identity()
        self.drop = nn.Dropout(cfg.dropout)
        self.blocks = nn.ModuleList(Block(cfg, layer) for layer in range(cfg.n_layer))
        self.norm_f = norm(cfg.n_embd, cfg)
        self.head_down = nn.Linear(cfg.n_embd, cfg.rank_head, bias=False) if cfg.rank_head and not cfg.tie else None
        self.head = None if cfg.tie else nn.Linear(cfg.rank_head or cfg.n_embd, cfg.padded_vocab, bias=False)
        rotary = rotary_table(cfg.block_size, cfg.d_head, cfg.rope_theta) if cfg.position == 'rope' else None
        self.register_buffer('rotary', rotary, persistent=False)
        if init and not self.wte.weight.is_meta:
            self.init_weights()

    # --- forward ---

    def hidden(self, idx, cache=None):
        """The last layer's normalised output, (B, T, C). `cache` holds the keys and values of earlier tokens (sample.py)."""
        if idx.size(1) > self.cfg.block_size:
            raise ValueError(f'{idx.size(1)} tokens are longer than block_size={self.cfg.block_size}')
        positions = cache.positions if cache is not None else slice(idx.size(1))
        x = self.wte(idx)  # (B, T, C), or (B, T, R) of a low-rank embedding
        if self.wte_up is not None:
            x = self.wte_up(x)  # (B, T, C)
        if self.wpe is not None:
            x = x + self.wpe.weight[positions]
        x = self.drop(self.norm_e(x))
        rotary = self.rotary[:, positions] if self.rotary is not None else None
        v0 = None
        for block in self.blocks:
            if self.recompute and self.training:
                x, v0 = checkpoint(block, x, rotary, v0, use_reentrant=False)
            else:
                x, v0 = block(x, rotary, v0, cache)
        return self.norm_f(x)

    def head_input(self, h):
        """h (…, C) and the matrix (V padded, …) whose product are the logits: a low-rank head's inner factor is applied here."""
        if self.cfg.tie:
            return (h @ self.wte_up.weight if self.wte_up is not None else h), self.wte.weight
        return (self.head_down(h) if self.head_down is not None else h), self.head.weight

    def logits(self, h):
        """h (…, C) → logits (…, vocab_size) in float32, without the vocabulary's padding."""
        h, weight = self.head_input(h)
        logits = (F.linear(h, weight) if self.head is None else self.head(h)).float()[..., :self.cfg.vocab_size]
        return cap(logits, self.cfg.softcap)

    def forward(self, idx, targets=None, cache=None, reduction='mean', label_smoothing=0.0, teacher=None):
        """
        idx (B, T) int64 → logits (B, T, vocab_size) float32; with targets (B, T), the loss over the targets that are not
        negative: their mean, or for reduction='sum' their sum (so that the caller can divide by the global batch's count).
        teacher: a Teacher of the same B·T tokens to learn from beside them.
        """
        h = self.hidden(idx, cache)
        if targets is None:
            return self.logits(h)
        h, weight = self.head_input(h)
        cross_entropy = ChunkedCrossEntropy.apply
        if torch.compiler.is_compiling() and not h.is_cuda:  # its loop over blocks is not for the compiler
            cross_entropy = torch.compiler.disable(cross_entropy)
        loss = cross_entropy(h.flatten(0, 1), weight, targets.flatten(), self.cfg.vocab_size, self.cfg.softcap, label_smoothing, torch.is_grad_enabled(),
                             teacher)
        return loss if reduction == 'sum' else loss / (targets >= 0).sum()

    # --- the guides of low-rank layers ---

    def set_guides(self, step):
        """Their share in update number `step`: a cosine from 1 to 0 over rank_guide steps."""
        for layer in self.low_rank_layers():
            layer.share.fill_(0.5 * (1 + math.cos(math.pi * min(1, step / self.cfg.rank_guide))))

    def drop_guides(self):
        """Go on without them: their parameters are gone."""
        for layer in self.low_rank_layers():
            layer.guide = layer.share = None
        self.cfg.rank_guide = 0

    def low_rank_layers(self):
        return [layer for layer in self.modules() if isinstance(layer, LowRank)]

    # --- init ---

    @torch.no_grad()
    def init_weights(self):
        """
        wte, wpe                    normal, init_std or 0.02 (1 before embed_norm); tied and wide: 4/n_embd, or every token would
                                    predict itself at first
        head, untied                zero: the first loss is exactly ln V
        q, k, v, MLP up and gate    normal, init_std or 1/sqrt(inputs)
        o, MLP down                 zero, or the same over sqrt(2 n_layer), as in GPT-2
        low-rank factors            of the matrix they stand for: rank_init
        norms one, biases zero, the vocabulary's padding zero
        """
        cfg = self.cfg
        for block in self.blocks:
            for layer in (block.attn.q, block.attn.k, block.attn.v, block.attn.o, block.mlp.up, block.mlp.gate, block.mlp.down):
                if layer is not None:
                    is_output = layer in (block.attn.o, block.mlp.down)
                    init_linear(layer, cfg, 1 / math.sqrt(2 * cfg.n_layer) if is_output else 1.0, zero=is_output and cfg.zero_init)
        embed_std = cfg.init_std or (min(0.02, 4 / cfg.n_embd) if cfg.tie else 1.0 if cfg.embed_norm else 0.02)  # norms take the scale out
        nn.init.normal_(self.wte.weight, std=embed_std)
        self.wte.weight[cfg.vocab_size:] = 0
        if self.wpe is not None:
            nn.init.normal_(self.wpe.weight, std=embed_std)
        if self.wte_up is not None:
            init_factors(self.wte_up.weight.T, self.wte.weight[:cfg.vocab_size], embed_std, cfg)
        if self.head_down is not None:
            init_factors(self.head_down.weight, self.head.weight[:cfg.vocab_size], cfg.init_std or cfg.n_embd ** -0.5, cfg)
        if self.head is not None:
            nn.init.zeros_(self.head.weight)

    # --- sizes ---

    def factors(self):
        """The weights (down, up) of every low-rank layer of the blocks."""
        return [(layer.down.weight, layer.up.weight) for layer in self.low_rank_layers()]

    def num_params(self):
        """Number of parameters, tied ones once, the vocabulary's padding not counted."""
        padding = self.cfg.padded_vocab - self.cfg.vocab_size
        padded = [self.wte.weight] + ([] if self.head is None else [self.head.weight])
        return sum(p.numel() for p in self.parameters()) - sum(padding * w.size(1) for w in padded)

    def flops_per_token(self):
        """
        Floating-point operations of training on one token: forward and backward of every matmul that runs (2 + 4 per
        weight, head and factors included, look-ups not) and of attention at full length, 12 T H D a layer (PaLM,
        arXiv 2204.02311, appendix B: causal kernels do about half of that).
        """
        cfg = self.cfg
        matmuls = sum(p.numel() for name, p in self.named_parameters() if p.ndim >= 2 and name not in ('wte.weight', 'wpe.weight'))
        if cfg.tie:
            matmuls += self.wte.weight.numel() + (self.wte_up.weight.numel() if self.wte_up is not None else 0)
        return 6 * matmuls + 12 * cfg.n_layer * cfg.block_size * cfg.n_head * cfg.d_head


def init_linear(layer, cfg, scale, zero):
    """Init a dense or low-rank layer whose product has deviation scale * (init_std or 1/sqrt(inputs)); zero: whose output is zero."""
    low_rank = isinstance(layer, LowRank)
    n_in, last = (layer.down.in_features, layer.up) if low_rank else (layer.in_features, layer)
    std = scale * (cfg.init_std or n_in ** -0.5)
    if low_rank:
        init_factors(layer.down.weight, layer.up.weight, std, cfg)
        if layer.blocks is not None:
            nn.init.normal_(layer.blocks, std=0 if zero else std)
    else:
        nn.init.normal_(layer.weight, std=std)
    if zero:
        nn.init.zeros_(last.weight)
    if low_rank and layer.guide is not None:  # as the product, so that without an activation nothing jumps when its share begins to fall
        layer.guide.weight.copy_(layer.up.weight @ layer.down.weight)
    if last.bias is not None:
        nn.init.zeros_(last.bias)


def init_factors(down, up, std, cfg):
    """
    Fill down (R, n_in) and up (n_out, R) so that up·down stands for a dense normal (n_out, n_in) of deviation `std`: its Frobenius norm is
    that one's at any rank, so that comparing ranks does not compare scales.
    """
    (rank, n_in), n_out = down.shape, len(up)
    if cfg.rank_init == 'normal':  # the product of R terms has deviation sqrt(R) * factor_std²
        factor_std = math.sqrt(std / math.sqrt(rank))
        nn.init.normal_(down, std=factor_std)
        nn.init.normal_(up, std=factor_std)
        return
    if cfg.rank_init == 'spectral':
        U, S, Vh = torch.linalg.svd(torch.empty(n_out, n_in, device=up.device).normal_(std=std), full_matrices=False)
        U, S, Vh = U[:, :rank], S[:rank] * (S.norm() / S[:rank].norm()), Vh[:rank]
    else:
        S = torch.full((rank,), std * math.sqrt(n_in * n_out / rank), device=up.device)
        U, Vh = nn.init.orthogonal_(torch.empty_like(up)), nn.init.orthogonal_(torch.empty_like(down))
    down.copy_(S[:, None].sqrt() * Vh)
    up.copy_(U * S.sqrt())


# -----------------------------------------------------------------------------
# Markov chains: the next token follows from the one before alone

class BigramLoss(torch.autograd.Function):
    """
    Sum of -log softmax(table[previous])[target], which reads every row of the table that occurs once, however often it occurs, and holds a few
    rows at a time. Of the gradient, n·softmax(row) - counts of what followed, for n occurrences of a row, the table itself says the softmax:
    backward hands over the counts alone, as a sparse (V, V) tensor of an entry a token, -counts. It adds up over micro-batches and ranks as
    gradients do, and Muon.count() of optim.py steps by it. At V = 29k and 5,500 targets that is 0.1 MB, the rows would be 170, a dense gradient 3,363.
    """
    @staticmethod
    def forward(ctx, table, previous, targets):  # (V, V), (N,), (N,)
        rows, which = previous.unique(return_inverse=True)  # (U,), (N,)
        ctx.save_for_backward(previous, targets)
        ctx.shape = table.shape
        log_sums = torch.cat([table[some].logsumexp(1) for some in rows.split(64)])  # a few at a time: 7 MB at V = 29k
        return (log_sums[which] - table[previous, targets]).sum()

    @staticmethod
    def backward(ctx, grad):
        entries = torch.stack(ctx.saved_tensors)  # (2, N)
        return torch.sparse_coo_tensor(entries, -grad.expand(entries.size(1)), ctx.shape, check_invariants=False), None, None


class Markov(nn.Module):
    """
    A first-order Markov chain, with Transformer's interface: the logits of the next token are a row of a table (V, V), one row for each
    previous token; with rank_embed = R a product (V, R)·(R, V), two factors because one, E·Eᵀ, could not tell ab from ba.
    """

    def __init__(self, cfg, init=True):  # init=False: the weights will be loaded
        super().__init__()
        cfg.check()
        if not cfg.vocab_size:
            raise ValueError('vocab_size=0: set it to the number of tokens of the data')
        self.cfg, self.recompute = cfg, False  # recompute: nothing to compute again
        V, R = cfg.vocab_size, cfg.rank_embed
        # empty: nn.Embedding would fill it at once, 8 s for 841M numbers; sparse: tells DDP what its gradient will be
        self.wte = nn.Embedding.from_pretrained(torch.empty(V, R or V), freeze=False, sparse=not R)
        self.drop = nn.Dropout(cfg.dropout)
        self.head = nn.Linear(R, V, bias=False) if R else None
        if init and not self.wte.weight.is_meta:
            self.init_weights()

    def hidden(self, idx, cache=None):
        """What logits() wants of each token: (B, T, R), or for a full table idx itself. The past is of no use, so the cache stays empty."""
        return idx if self.head is None else self.drop(self.wte(idx))

    def logits(self, h):
        """h (…, R), or indices (…) of a full table → logits (…, vocab_size) in float32."""
        if self.head is None:
            return self.wte.weight[h].float()
        return cap(self.head(h).float(), self.cfg.softcap)

    def compile(self, *args, **kwargs):
        """Does nothing: the sizes in forward() differ from batch to batch."""

    def forward(self, idx, targets=None, cache=None, reduction='mean', label_smoothing=0.0):
        """As Transformer's."""
        if targets is None:
            return self.logits(self.hidden(idx))
        real = targets >= 0  # no token needs its neighbours, so padding is left out before it costs anything
        idx, targets = idx[real], targets[real]  # (N,)
        if self.head is None:
            if label_smoothing:
                raise ValueError(f'label_smoothing={label_smoothing}: a full Markov table is smoothed by a lower learning_rate instead: set it to 0')
            loss = BigramLoss.apply(self.wte.weight, idx, targets)
        else:
            loss = ChunkedCrossEntropy.apply(self.hidden(idx), self.head.weight, targets, self.cfg.vocab_size, self.cfg.softcap, label_smoothing,
                                             torch.is_grad_enabled())
        return loss if reduction == 'sum' else loss / len(targets)

    @torch.no_grad()
    def init_weights(self):
        """Logits of deviation 1: the table, or the embedding, normal, and the head uniform in ±1/sqrt(R). The first loss of a table is ln V + 1/2."""
        nn.init.normal_(self.wte.weight)
        if self.head is not None:
            nn.init.uniform_(self.head.weight, -self.cfg.rank_embed ** -0.5, self.cfg.rank_embed ** -0.5)

    def num_params(self):
        """Number of parameters."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self):
        """Floating-point operations of training on one token: forward and backward of the head, 6 R V; a table is looked up, not multiplied: 0."""
        return 6 * self.cfg.rank_embed * self.cfg.vocab_size


def make_model(cfg, init=True):
    """The network that a ModelConfig describes."""
    return (Markov if cfg.arch == 'markov' else Transformer)(cfg, init)
