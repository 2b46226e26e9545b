"""
Every network of minnow, in plain PyTorch. This file imports none of the others: copy it elsewhere and it works.

    model = make_model(ModelConfig(vocab_size=50257, n_layer=12, n_head=12, n_embd=768))
    loss = model(idx, targets)   # idx, targets: (B, T) int64; a target of -1 is ignored
    logits = model(idx)          # (B, T, vocab_size)
    loss = model(idx, targets, source=source)   # with an encoder: source (B, S) int64, -1 where a row is padded

Names are the field's: n_head, n_kv_head, n_embd, block_size. Shapes in comments: B batch, T time, S length of the source, C n_embd,
H heads, D head_dim, V vocabulary, R rank.
"""
import itertools
import math
import re
from dataclasses import dataclass, field, fields
from typing import Literal, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

# -----------------------------------------------------------------------------
# Configuration

@dataclass
class ModelConfig:
    arch: Literal['decoder', 'markov'] = 'decoder'  # markov: the next token follows from the one before alone; a V x V table of logits, or with
    # rank_embed an embedding and a head of that width. It takes vocab_size and block_size, with rank_embed also
    # dropout and softcap, and no other setting of the network
    vocab_size: int = 0  # number of tokens; 0 = as the data set says
    block_size: int = 1024  # context length in tokens
    n_layer: int = 12
    n_encoder_layer: int = 0  # above 0: an encoder-decoder. So many blocks read a source, in both directions; the n_layer blocks of the decoder
    # attend to what they make of it (T5, Raffel et al. 2020, arXiv 1910.10683)
    source_size: int = 0  # the encoder's context in tokens; 0 = block_size
    n_head: int = 12  # query heads
    n_kv_head: int = 0  # heads of keys and values: 0 = n_head (MHA), fewer = GQA, 1 = MQA (Ainslie et al. 2023, arXiv 2305.13245)
    n_embd: int = 768  # width
    head_dim: int = 0  # width of a head; 0 = n_embd / n_head
    d_ff: int = 0  # width of the MLP; 0 = 4 n_embd, or for a gated MLP 8/3 n_embd rounded up to 32 (the same parameters)
    position: Literal['rope', 'learned', 'relative', 'none'] = 'rope'  # rotary (Su et al. 2021, arXiv 2104.09864), a table added to the embedding,
    # or T5's: a number for every head and distance, learned, added to the logits of self-attention
    cross_rope: Literal['none', 'same', 'offset'] = 'none'  # rotary positions between target and source. none: none, as in T5Gemma; same: both count
    # from 0, as ROT5 did; offset: the target goes on counting where its source ends
    rope_theta: float = 10000.0  # base of the rotary frequencies
    norm: Literal['rmsnorm', 'layernorm'] = 'rmsnorm'  # before attention, MLP and head (Zhang & Sennrich 2019, arXiv 1910.07467)
    norm_eps: float = 1e-5
    mlp: Literal['gelu', 'silu', 'relu', 'relu2', 'swiglu', 'geglu'] = 'relu2'  # relu2: So et al. 2021, arXiv 2109.08668; *glu: Shazeer 2020, arXiv 2002.05202
    mlp_norm: bool = False  # a norm on the MLP's hidden layer too
    qk_norm: bool = True  # RMS-normalise each query and key head: no logit growth, higher rates (Henry et al. 2020, arXiv 2010.04245)
    n_expert: int = 0  # above 0: so many MLPs in every block, of which a router picks some for each token; 0 = one, for all
    n_expert_active: int = 1  # how many it picks (1: Switch, Fedus et al. 2021, arXiv 2101.03961; 2: Mixtral)
    expert_shared: bool = False  # and an MLP for all tokens beside them (DeepSeekMoE, arXiv 2401.06066)
    expert_aux: float = 0.01  # weight of the loss that asks for equal loads, in every layer, 1 times it when they are (Switch)
    expert_z: float = 0.001  # weight of the loss that keeps the router's logits small, mean(logsumexp²) (ST-MoE, Zoph et al. 2022, arXiv 2202.08906)
    expert_bias: float = 0.0  # balance without a loss: in every step what an expert is picked by rises by so much if it had too few tokens, and falls
    # if too many (Wang et al. 2024, arXiv 2408.15664: 0.001). Then set expert_aux to 0. To be chosen when a network begins
    softcap: float = 0.0  # bound the logits to ±softcap by tanh; 0 = off (Gemma 2, arXiv 2408.00118)
    zero_init: bool = True  # attention's and MLP's output matrices start at zero: every block starts as the identity
    embed_norm: bool = False  # a norm after the embedding, which then starts at N(0, 1) and takes a high rate (modded-nanogpt, record 8)
    depth_scale: Literal['none', 'attn', 'norm'] = 'none'  # block n, from 1: attn: its attention logits over n (GPT-2's scale_attn_by_inverse_layer_idx;
    # Inheritune, arXiv 2404.08634, trained with it); norm: its norms' outputs over sqrt(n) (Sun et al. 2025, arXiv 2502.05795)
    value_residual: bool = False  # values are a learned mix of the layer's own and the first layer's (Zhou et al. 2024, arXiv 2410.17897)
    tie: bool = True  # one matrix for embedding and head (Press & Wolf 2017, arXiv 1608.05859)
    t5_scale: bool = False  # T5's init and scaling: the embedding starts at N(0, 1), a tied head's logits are over sqrt(n_embd), those of attention
    # are not over sqrt(head_dim) (its queries start that much smaller), output matrices at 1/sqrt(inputs) whatever the depth
    bias: bool = False  # biases in the linear layers and in LayerNorm
    dropout: float = 0.0  # 0 is good for pretraining; 0.1 and more when data repeat many times
    init_std: float = 0.0  # standard deviation of the weights' init; 0 = 1/sqrt(inputs). GPT-2: 0.02
    rank_qk: int = 0  # low rank: a matrix becomes up·down with this inner width; 0 = dense. This one: queries and keys
    rank_vo: int = 0  # values and attention's output
    rank_mlp: int = 0  # all matrices of the MLP
    rank_embed: int = 0  # embedding
    rank_head: int = 0  # output head
    ranks: dict = field(default_factory=dict)  # of single matrices, over these: {'attn.k': 16, 'blocks.3.mlp.down': 0}. attn is cross-attention too, and
    # the encoder's block 3 is as the decoder's
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
        for name in ('vocab_size', 'n_encoder_layer', 'source_size', 'n_kv_head', 'head_dim', 'd_ff', 'softcap', 'init_std', 'rank_embed', 'rank_head',
                     'rank_blocks', 'rank_guide', 'expert_aux', 'expert_z', 'expert_bias'):
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
        if self.cross_rope != 'none' and not (self.n_encoder_layer and self.position == 'rope'):
            raise ValueError(f"cross_rope={self.cross_rope}: turns heads between an encoder and a decoder: set n_encoder_layer, and position='rope'")
        self.check_ranks()
        self.check_experts()
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

    def check_experts(self):
        if self.n_expert == 1 or self.n_expert < 0:
            raise ValueError(f'n_expert={self.n_expert}: takes 0 for one MLP, or 2 and more')
        if self.n_expert and not 1 <= self.n_expert_active <= self.n_expert:
            raise ValueError(f'n_expert_active={self.n_expert_active}: takes 1 to n_expert={self.n_expert}')
        if self.n_expert and (self.rank_mlp or any(rank for name, rank in self.ranks.items() if 'mlp.' in name)):
            raise ValueError(f'n_expert={self.n_expert}: experts are dense: leave rank_mlp, and ranks of the MLP, out')

    def sizes(self):
        """{matrix of a block: (inputs, outputs)}."""
        q, kv, gated = self.n_head * self.d_head, self.kv_heads * self.d_head, self.has_gate
        return {'attn.q': (self.n_embd, q), 'attn.k': (self.n_embd, kv), 'attn.v': (self.n_embd, kv), 'attn.o': (q, self.n_embd),
                'mlp.up': (self.n_embd, self.mlp_width), **({'mlp.gate': (self.n_embd, self.mlp_width)} if gated else {}),
                'mlp.down': (self.mlp_width, self.n_embd)}

    def rank(self, layer, name):
        """The rank of a matrix of a block, 0 for a dense one: the most particular setting counts."""
        general = 0 if self.first_block_dense and layer == 0 else self.ranks.get(name, getattr(self, RANK_OF[name]))
        return self.ranks.get(f'blocks.{layer}.{name}', general)

    @property
    def arch_takes(self):
        """The names of the settings here that have an effect on a network of this arch."""
        if self.arch != 'markov':
            return {f.name for f in fields(ModelConfig)}
        names = {'arch', 'vocab_size', 'block_size', 'rank_embed'}
        return names | {'dropout', 'softcap'} if self.rank_embed else names

    def check_markov(self):
        if self.rank_embed > (self.vocab_size or self.rank_embed):
            raise ValueError(f'rank_embed={self.rank_embed} is larger than the table ({self.vocab_size} x {self.vocab_size}): lower it, or 0 for a full table')
        if self.rank_head:
            raise ValueError(f"rank_head={self.rank_head}: arch='markov' has one rank, rank_embed: leave rank_head out")
        if self.rank_guide:
            raise ValueError(f"rank_guide={self.rank_guide}: arch='markov' has no layers to guide: leave it out")
        if self.n_expert:
            raise ValueError(f"n_expert={self.n_expert}: arch='markov' has no MLPs: leave it out")
        if self.softcap and not self.rank_embed:
            raise ValueError(f"softcap={self.softcap}: arch='markov' takes it with rank_embed only: a full table may learn any logits")

    @property
    def kv_heads(self):
        return self.n_kv_head or self.n_head

    @property
    def d_head(self):
        return self.head_dim or self.n_embd // self.n_head

    @property
    def has_gate(self):
        """Whether the MLP has a second matrix of inputs, by which its hidden layer is multiplied."""
        if self.mlp not in ACTIVATIONS:
            raise no_code(self, 'mlp')
        return self.mlp in GATED_MLPS

    @property
    def mlp_width(self):
        gated = -(-self.n_embd * 8 // (3 * 32)) * 32
        return self.d_ff or (gated if self.has_gate else 4 * self.n_embd)

    @property
    def source_context(self):
        return (self.source_size or self.block_size) if self.n_encoder_layer else 0

    @property
    def padded_vocab(self):
        """Rows of the embedding and the head: a multiple of 64, which tensor cores want (nanoGPT: +25% speed for 50257 → 50304)."""
        return -(-self.vocab_size // 64) * 64


ONLY_IN_TRAINING = ('dropout', 'expert_aux', 'expert_z')  # settings that a network's function does not depend on


def only_in_training(cfg):
    """The settings of a network that its function does not depend on."""
    return ONLY_IN_TRAINING


RANK_OF = {'attn.q': 'rank_qk', 'attn.k': 'rank_qk', 'attn.v': 'rank_vo', 'attn.o': 'rank_vo',
           'mlp.up': 'rank_mlp', 'mlp.gate': 'rank_mlp', 'mlp.down': 'rank_mlp'}  # which setting each matrix follows



def no_code(cfg, name):
    """The error for a choice of a setting that no code acts on: it must not work as another choice in silence."""
    return ValueError(f'{name}={getattr(cfg, name)}: this choice has no code in model.py')


# -----------------------------------------------------------------------------
# Parts

PLAIN_MLPS = {'gelu': lambda x: F.gelu(x, approximate='tanh'), 'silu': F.silu, 'relu': F.relu, 'relu2': lambda x: F.relu(x).square()}
GATED_MLPS = {'swiglu': F.silu, 'geglu': PLAIN_MLPS['gelu']}  # tanh-GELU as in GPT-2, T5 v1.1 and Gemma
ACTIVATIONS = PLAIN_MLPS | GATED_MLPS


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
    setting = 'rank_act_qk' if cfg.rank_act_qk and name in ('attn.q', 'attn.k') else 'rank_act'
    act = getattr(cfg, setting)
    if act not in LATENTS:
        raise no_code(cfg, setting)
    return LowRank(n_in, n_out, rank, act, cfg) if rank else nn.Linear(n_in, n_out, bias=cfg.bias)


def dtype_to_multiply(x, otherwise):
    """autocast's dtype where it is on, for products that it does not know."""
    return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else otherwise


class RMSNorm(nn.RMSNorm):
    def forward(self, x):  # torch's kernel wants weight and input in one dtype; the sum of squares is in float32 all the same
        return F.rms_norm(x, self.normalized_shape, self.weight.type_as(x), self.eps)


def norm(width, cfg):
    if cfg.norm == 'rmsnorm':
        return RMSNorm(width, cfg.norm_eps)
    if cfg.norm == 'layernorm':
        return nn.LayerNorm(width, cfg.norm_eps, bias=cfg.bias)
    raise no_code(cfg, 'norm')


def rotary_table(length, d_head, theta):
    """cos and sin of every position's angles, (2, length, D/2) in float32."""
    angles = torch.outer(torch.arange(length), 1 / theta ** (torch.arange(0, d_head, 2) / d_head))  # rounded as in transformers
    return torch.stack([angles.cos(), angles.sin()])


def rotate(x, table):
    """Turn the pairs (i, i + D/2) of x (B, T, H, D) by their position's angles, table (2, T, D/2) or (2, B, T, D/2): Llama's layout."""
    cos, sin = table.unsqueeze(-2)  # (T, 1, D/2) or (B, T, 1, D/2)
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).type_as(x)


class PositionTable(nn.Embedding):
    def forward(self, positions):  # a slice, or (T,); a slice of a table has a cheap gradient
        return self.weight[positions]


class RelativeBias(nn.Embedding):
    """
    T5's positions (arXiv 1910.10683, 2.1): a learned number for each head and bucket of distances, to be added to the logits of attention.
    Half of the buckets hold one distance each, the other half ever longer ranges, the last one all from 128 on.
    """
    BUCKETS, FURTHEST = 32, 128

    def __init__(self, n_head, is_causal):
        super().__init__(self.BUCKETS, n_head)
        self.is_causal = is_causal

    def forward(self, at, of):
        """Positions at (T,) of queries, of (S,) of keys → (1, H, T, S); -inf for what is in the future of a causal stack."""
        distance = of - at[:, None]  # (T, S)
        half = self.BUCKETS // 2
        if self.is_causal:
            ahead, past, buckets = 0, (-distance).clamp(min=0), self.BUCKETS
        else:
            ahead, past, buckets = half * (distance > 0), distance.abs(), half
        exact = buckets // 2
        far = exact + (torch.log(past.clamp(min=1) / exact) / math.log(self.FURTHEST / exact) * (buckets - exact)).long()
        bias = super().forward(ahead + torch.where(past < exact, past, far.clamp(max=buckets - 1))).permute(2, 0, 1)  # (H, T, S)
        return (bias.masked_fill(distance > 0, -torch.inf) if self.is_causal else bias)[None]


class Places(NamedTuple):
    """Where the tokens are that one kind of attention looks from and at, the same in all blocks of a stack."""
    q: torch.Tensor | None  # angles of the queries' positions, (2, T, D/2) or (2, B, T, D/2), and
    k: torch.Tensor | None  # of the keys'; None: not rotary
    mask: torch.Tensor | None  # what to add to the logits, or bool: True where to look; broadcasts to (B, H, T, S)
    is_causal: bool  # whether, where there is no mask, every token sees those before it alone
    real: torch.Tensor | None = None  # (B, T) bool, of the queries: False for padding; None: none is. For what experts count


class Memory(NamedTuple):
    """What an encoder made of its source."""
    h: torch.Tensor  # (B, S, C)
    mask: torch.Tensor  # (B, 1, 1, S) bool: False where a row is padded
    length: torch.Tensor  # (B,) of its tokens


def attend(q, k, v, mask, is_causal, dropout):
    """
    softmax(q·kᵀ / sqrt(D))·v of q (B, H, T, D) and k, v (B, kv_heads, S, D): torch's fused kernels, but for short rows in bfloat16 on
    a CPU. There the fused kernel multiplies at float32's speed, and a training step of plain attention takes half its time
    (T = 64: 0.7 against 2.7 ms, T = 256: 18 against 34 ms, 128 of 512: 9 against 17; T = 1024: 3 times longer). A learned mask is the
    other exception: that kernel has no backward pass for it, and what torch does in its place takes twice as long, at every length.
    """
    groups = q.size(1) // k.size(1)
    mask = mask.to(q.dtype) if mask is not None and mask.is_floating_point() else mask
    is_learned, is_short = mask is not None and mask.requires_grad, q.dtype == torch.bfloat16 and q.size(2) > 1 and q.size(2) * k.size(2) <= 256 ** 2
    if not (q.device.type == 'cpu' and (is_learned or is_short)):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, dropout_p=dropout, enable_gqa=groups > 1)
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    return F.dropout(attention_matrix(q, k, mask, is_causal), dropout) @ v


def attention_matrix(q, k, mask, is_causal):
    """softmax(q·kᵀ / sqrt(D)) of q (B, H, T, D) and k (B, H, S, D), with a mask as in Places, or causal → (B, H, T, S)."""
    logits = (q * q.size(-1) ** -0.5) @ k.mT
    if is_causal:
        mask = torch.ones(q.size(2), k.size(2), dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
    return logits.softmax(-1, dtype=q.dtype)


class Attention(nn.Module):
    """n_head query heads of x over kv_heads heads of keys and values: those of x itself, or of what an encoder made of a source (is_cross)."""

    def __init__(self, cfg, layer, is_cross=False):
        super().__init__()
        self.cfg, self.layer, self.is_cross = cfg, layer, is_cross
        self.q, self.k, self.v, self.o = (linear(cfg, layer, f'attn.{name}') for name in 'qkvo')
        self.v_mix = nn.Parameter(torch.tensor(0.5)) if cfg.value_residual and layer and not is_cross else None  # share of the first layer's values

    def forward(self, x, at, v0=None, cache=None, memory=None):
        """x (B, T, C), at: Places, memory (B, S, C) → (B, T, C), and the first layer's values v0 (B, T, kv_heads, D) for the layers after it."""
        if self.is_cross:
            q = self.turn(self.heads(self.q, x), at.q)
            k, v = self.look_up(memory, at) if cache is None else cache.once(self.layer, lambda: self.look_up(memory, at))
        else:
            q, k, v, v0 = self.of_itself(x, at, v0)
            if cache is not None:
                k, v = cache.update(self.layer, k, v)  # the past and these: (B, kv_heads, S, D)
        if self.cfg.depth_scale == 'attn':
            q = q / (self.layer + 1)
        if self.cfg.t5_scale:
            q = q * self.cfg.d_head ** 0.5
        y = attend(q, k, v, at.mask, at.is_causal and at.mask is None and x.size(1) > 1, self.cfg.dropout if self.training else 0.0)
        return self.o(y.transpose(1, 2).flatten(2)), v0

    def of_itself(self, x, at, v0):
        """q (B, H, T, D), k, v (B, kv_heads, T, D) of x, and v0."""
        q, k, v = (self.heads(layer, x) for layer in (self.q, self.k, self.v))
        if self.v_mix is not None:
            v = v + self.v_mix * (v0 - v)
        elif self.cfg.value_residual:
            v0 = v
        qk = self.turn(torch.cat([q, k], dim=2), at.q)  # (B, H + kv_heads, T, D): what both need is done once
        return *qk.split([q.size(2), k.size(2)], dim=1), v.transpose(1, 2), v0

    def look_up(self, memory, at):
        """k and v (B, kv_heads, S, D) of memory (B, S, C)."""
        return self.turn(self.heads(self.k, memory), at.k), self.heads(self.v, memory).transpose(1, 2)

    def heads(self, layer, x):
        return layer(x).unflatten(-1, (-1, self.cfg.d_head))  # (B, T, H, D)

    def turn(self, heads, angles):
        """Queries or keys (B, T, H, D), normalised and turned by their positions → (B, H, T, D)."""
        if self.cfg.qk_norm:
            heads = F.rms_norm(heads, (self.cfg.d_head,)).type_as(heads)  # autocast on GPUs makes it float32 (torch 2.13), and a cache holds one dtype
        return (heads if angles is None else rotate(heads, angles)).transpose(1, 2)


class MLP(nn.Module):
    """down(act(up(x))), or of a gated one down(act(gate(x))·up(x))."""

    def __init__(self, cfg, layer, linear=linear):
        super().__init__()
        self.is_wide = cfg.t5_scale  # its hidden layer may pass 65,504, the largest float16
        self.up = linear(cfg, layer, 'mlp.up')
        self.gate = linear(cfg, layer, 'mlp.gate') if 'mlp.gate' in cfg.sizes() else None
        self.norm = norm(cfg.mlp_width, cfg) if cfg.mlp_norm else nn.Identity()
        self.down = linear(cfg, layer, 'mlp.down')
        self.act = ACTIVATIONS[cfg.mlp]

    def forward(self, x, *counts):
        """x (…, C) → (…, C); of Experts x (N, C) and counts (E,), as they take them."""
        up = self.up(x, *counts)
        gate = None if self.gate is None else self.gate(x, *counts)
        if self.is_wide and up.dtype == torch.float16:  # T5's goes on in float32, as in transformers
            with torch.autocast(x.device.type, enabled=False):
                return self.project(up.float(), None if gate is None else gate.float(), counts)
        return self.project(up, gate, counts)

    def project(self, up, gate, counts):
        """up and gate (…, d_ff), gate None without one → (…, C)."""
        h = self.act(up) if gate is None else self.act(gate) * up
        return self.down(self.norm(h), *counts)


def grouped_linear(x, weight, counts):
    """x (N, n_in), of which each of weight (E, n_out, n_in) is to multiply the next counts (E,) rows → (N, n_out)."""
    dtype = dtype_to_multiply(x, weight.dtype)
    x, weight = x.to(dtype), weight.to(dtype)
    if dtype == torch.bfloat16 and all(n % 8 == 0 for n in weight.shape[1:]):  # what grouped_mm takes everywhere: rows of whole 16 bytes
        return F.grouped_mm(x, weight.mT, offs=counts.cumsum(0, dtype=torch.int32))
    return (torch.compiler.disable(one_by_one) if torch.compiler.is_compiling() else one_by_one)(x, weight, counts)


def one_by_one(x, weight, counts):
    return torch.cat([F.linear(rows, w) for rows, w in zip(x.split(counts.tolist()), weight.unbind())])  # unbind: one gradient for all


class Experts(nn.Module):
    """The linear layers `name` of n_expert MLPs in one tensor: x (N, n_in), sorted by expert, and how many rows each has, (E,) → (N, n_out)."""

    def __init__(self, cfg, layer, name):
        super().__init__()
        self.in_features, n_out = cfg.sizes()[name]
        self.weight = nn.Parameter(torch.empty(cfg.n_expert, n_out, self.in_features))
        self.bias = nn.Parameter(torch.empty(cfg.n_expert, n_out)) if cfg.bias else None

    def forward(self, x, counts):
        y = grouped_linear(x, self.weight, counts)
        return y if self.bias is None else y + self.bias.type_as(y).repeat_interleave(counts, 0, output_size=len(y))


class Routing(NamedTuple):
    """What the router of a mixture did with a batch."""
    loss: torch.Tensor  # () float32: to be added to the mean loss
    load: torch.Tensor  # (E,) int64: how many tokens each expert was given, padding left out


class MoE(nn.Module):
    """
    A mixture of experts (Shazeer et al. 2017, arXiv 1701.06538): n_expert MLPs, of which every token is given to the n_expert_active that a
    router likes best, and multiplied by how much. Tokens are sorted by expert and none is dropped, however many want the same one.
    """

    def __init__(self, cfg, layer):
        super().__init__()
        self.cfg = cfg
        self.router = nn.Parameter(torch.empty(cfg.n_expert, cfg.n_embd))
        self.experts = MLP(cfg, layer, Experts)
        self.shared = MLP(cfg, layer) if cfg.expert_shared else None
        self.register_buffer('expert_bias', torch.zeros(cfg.n_expert) if cfg.expert_bias else None)  # of which experts are picked, not of what they are worth
        self.register_buffer('load', torch.zeros(cfg.n_expert, dtype=torch.long), persistent=False)  # since take_loads()

    def forward(self, x, real=None):
        """x (B, T, C), real (B, T): False for padding → (B, T, C), and in training the Routing."""
        h, k = x.flatten(0, 1), self.cfg.n_expert_active  # (N, C)
        with torch.autocast(x.device.type, enabled=False):  # a softmax of bfloat16 logits rounds away what tells experts apart (Switch, 2.4)
            share, chosen, routing = self.route(h.float(), real)
        order = chosen.flatten().argsort(stable=True)  # (N k,)
        counts = torch.zeros_like(self.load).scatter_add(0, chosen.flatten(), torch.ones_like(order))
        y = self.experts(h.repeat_interleave(k, 0)[order], counts)[order.argsort()]  # (N k, C), in the order of the tokens again
        y = (y.unflatten(0, (-1, k)) * share[..., None].type_as(y)).sum(1).view_as(x)
        return (y if self.shared is None else y + self.shared(x)), routing

    def route(self, h, real):
        """h (N, C) float32 → how much of which experts each token gets, both (N, k), and in training the Routing."""
        E, k = self.cfg.n_expert, self.cfg.n_expert_active
        logits = h @ self.router.float().T  # (N, E)
        p = logits.softmax(-1)
        chosen = (p if self.expert_bias is None else p + self.expert_bias).topk(k).indices
        share = p.gather(1, chosen)
        if k > 1:  # of a single one that would leave 1, whatever the router says, and it would learn nothing from the loss
            share = share / share.sum(1, keepdim=True)
        if not self.training:
            return share, chosen, None
        given = F.one_hot(chosen, E).sum(1)  # (N, E)
        weight = torch.ones_like(h[:, 0]) if real is None else real.flatten().float()  # (N,)
        load = weight @ given.float()
        weight = weight / weight.sum().clamp(min=1)
        balance = E * (weight @ given.float() / k) @ (weight @ p)  # of shares of the tokens and mean probabilities: 1 when they are even
        size = weight @ logits.logsumexp(1).square()
        return share, chosen, Routing(self.cfg.expert_aux * balance + self.cfg.expert_z * size, load.long())


class Block(nn.Module):
    def __init__(self, cfg, layer, has_cross=False):
        super().__init__()
        self.norm_1, self.attn = norm(cfg.n_embd, cfg), Attention(cfg, layer)
        self.norm_x, self.cross = (norm(cfg.n_embd, cfg), Attention(cfg, layer, is_cross=True)) if has_cross else (None, None)
        self.norm_2, self.mlp = norm(cfg.n_embd, cfg), (MoE if cfg.n_expert else MLP)(cfg, layer)
        self.drop = nn.Dropout(cfg.dropout)
        self.scale = (layer + 1) ** -0.5 if cfg.depth_scale == 'norm' else 1.0  # of what the norms put out
        if cfg.depth_scale not in ('none', 'attn', 'norm'):
            raise no_code(cfg, 'depth_scale')

    def forward(self, x, at, v0=None, cache=None, memory=None, across=None):
        """
        x (B, T, C) with its Places; in a decoder with an encoder memory (B, S, C) too, and the Places between them → (B, T, C), v0, and of a
        mixture of experts, in training, its Routing.
        """
        y, v0 = self.attn(self.normed(self.norm_1, x), at, v0, cache)
        x = x + self.drop(y)
        if self.cross is not None:
            x = x + self.drop(self.cross(self.normed(self.norm_x, x), across, None, cache, memory)[0])
        h = self.normed(self.norm_2, x)
        y, routing = self.mlp(h, at.real) if isinstance(self.mlp, MoE) else (self.mlp(h), None)
        return x + self.drop(y), v0, routing

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
        dtype = dtype_to_multiply(h, h.dtype)
        w, total = weight.to(dtype), h.new_zeros((), dtype=torch.float32)
        grad_h = torch.empty_like(h) if with_grad else None
        grad_w = torch.zeros_like(weight) if with_grad and weight.requires_grad else None  # not of one that stays as it is
        on_cpu = h.device.type == 'cpu'
        rows = max(1, (CHUNK if on_cpu else GPU_CHUNK) // len(w))
        block = max(1, BLOCK // len(w)) if on_cpu else rows
        for i in range(0, len(h), rows):
            x = h[i:i + rows].to(dtype)
            logits = x @ w.T  # (rows, V padded), and then the gradient with respect to them
            taught = itertools.repeat(None) if teacher is None else (teacher.h[i:i + rows].to(dtype) @ teacher.weight.to(dtype).T).split(block)
            for z, y, t in zip(logits.split(block), targets[i:i + rows].split(block), taught):
                # no += here: torch 2.11 makes every gradient zero where a compiled autograd.Function changes the
                # tensor it returns in place (pytorch issue 180642)
                total = total + loss_and_gradient(z, y, n_vocab, softcap, smoothing, with_grad, teacher, t)
            if with_grad:
                grad_h[i:i + rows] = logits @ w
                if grad_w is not None:
                    grad_w += logits.T @ x
        ctx.save_for_backward(grad_h, grad_w)
        return total

    @staticmethod
    def backward(ctx, grad):
        grad_h, grad_w = ctx.saved_tensors
        # in place, to save memory: so there is one backward pass
        return grad_h.mul_(grad), None if grad_w is None else grad_w.mul_(grad), None, None, None, None, None, None


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
    A decoder, perhaps with an encoder: idx (B, T), source (B, S) → logits (B, T, vocab_size), or with targets the cross-entropy in nats.

    Raises ValueError for a configuration that cannot work and for more tokens than block_size, or source_size.
    """

    def __init__(self, cfg, init=True):  # init=False: the weights will be loaded
        super().__init__()
        cfg.check()
        if not cfg.vocab_size:
            raise ValueError('vocab_size=0: set it to the number of tokens of the data')
        if cfg.position not in ('rope', 'learned', 'relative', 'none'):
            raise no_code(cfg, 'position')
        if cfg.cross_rope not in ('none', 'same', 'offset'):
            raise no_code(cfg, 'cross_rope')
        self.cfg, self.recompute = cfg, False  # recompute: keep only the blocks' inputs for the backward pass (Chen et al. 2016, arXiv 1604.06174)
        self.wte = nn.Embedding(cfg.padded_vocab, cfg.rank_embed or cfg.n_embd)
        self.wte_up = nn.Linear(cfg.rank_embed, cfg.n_embd, bias=False) if cfg.rank_embed else None
        self.wte_encoder = None  # the encoder's, of the same weight: lora.py's, which gives either adapters of its own
        self.wpe = PositionTable(max(cfg.block_size, cfg.source_context), cfg.n_embd) if cfg.position == 'learned' else None
        self.norm_e = norm(cfg.n_embd, cfg) if cfg.embed_norm else nn.Identity()
        self.drop = nn.Dropout(cfg.dropout)
        has_encoder, is_relative = cfg.n_encoder_layer > 0, cfg.position == 'relative'
        self.encoder = nn.ModuleList(Block(cfg, layer) for layer in range(cfg.n_encoder_layer)) if has_encoder else None
        self.rel_encoder = RelativeBias(cfg.n_head, is_causal=False) if has_encoder and is_relative else None
        self.norm_encoder = norm(cfg.n_embd, cfg) if has_encoder else None
        self.blocks = nn.ModuleList(Block(cfg, layer, has_encoder) for layer in range(cfg.n_layer))
        self.rel = RelativeBias(cfg.n_head, is_causal=True) if is_relative else None
        self.norm_f = norm(cfg.n_embd, cfg)
        self.head_down = nn.Linear(cfg.n_embd, cfg.rank_head, bias=False) if cfg.rank_head and not cfg.tie else None
        self.head = None if cfg.tie else nn.Linear(cfg.rank_head or cfg.n_embd, cfg.padded_vocab, bias=False)
        length = cfg.block_size + cfg.source_context if cfg.cross_rope == 'offset' else max(cfg.block_size, cfg.source_context)
        rotary = rotary_table(length, cfg.d_head, cfg.rope_theta) if cfg.position == 'rope' else None
        self.register_buffer('rotary', rotary, persistent=False)
        if init and not self.wte.weight.is_meta:
            self.init_weights()

    # --- forward ---

    def hidden(self, idx, cache=None, memory=None, real=None, routings=None, pieces=None):
        """
        The last layer's normalised output, (B, T, C). `cache` holds the keys and values of earlier tokens (sample.py), memory is what
        encode() made of the source, real (B, T) is False for padding; the layers' Routings, in training, are added to the list routings.
        pieces (B, T) int64: texts of the same number, one after another, share a row and see themselves alone.
        """
        if idx.size(1) > self.cfg.block_size:
            raise ValueError(f'{idx.size(1)} tokens are longer than block_size={self.cfg.block_size}')
        T, S = idx.size(1), 0 if memory is None else memory.h.size(1)
        positions = cache.positions if cache is not None else slice(T)  # a slice, for what it takes of a table has a cheap gradient
        numbers = cache.positions if cache is not None else torch.arange(T, device=idx.device)
        at = Places(*[self.angles(positions)] * 2, None if cache is None else cache.mask, is_causal=True, real=real)
        if self.rel is not None:
            at = at._replace(mask=self.rel(numbers, numbers if cache is None else cache.slots[:cache.used]))
        if pieces is not None:
            own = (pieces[:, None, :, None] == pieces[:, None, None, :]).tril()  # (B, 1, T, T)
            at = at._replace(mask=own if at.mask is None else at.mask.masked_fill(~own, -torch.inf))
            positions = numbers - torch.searchsorted(pieces, pieces) if self.wpe is not None else positions  # turned or near, only distances count
        across = Places(None, None, memory.mask, is_causal=False) if S else None
        if self.cfg.cross_rope != 'none':
            begin = memory.length[:, None] if self.cfg.cross_rope == 'offset' else 0
            across = across._replace(q=self.angles(begin + numbers), k=self.angles(slice(S)))
        x = self.run(self.blocks, self.embed(idx, positions), at, cache, memory.h if S else None, across, routings)
        return self.norm_f(x)

    def encode(self, source, routings=None):
        """The Memory of source (B, S) int64, -1 where a row is padded at its end; every row has a token at least."""
        if source.size(1) > self.cfg.source_context:
            raise ValueError(f'{source.size(1)} tokens are longer than source_size={self.cfg.source_context}')
        real, positions = source >= 0, slice(source.size(1))
        mask = real[:, None, None]
        at = Places(*[self.angles(positions)] * 2, mask, is_causal=False, real=real)
        if self.rel_encoder is not None:
            numbers = torch.arange(source.size(1), device=source.device)
            at = at._replace(mask=self.rel_encoder(numbers, numbers).masked_fill(~mask, -torch.inf))
        x = self.run(self.encoder, self.embed(source.clamp(min=0), positions, self.wte_encoder), at, routings=routings)
        return Memory(self.norm_encoder(x), mask, real.sum(1))

    def angles(self, positions):
        return self.rotary[:, positions] if self.rotary is not None else None

    def embed(self, idx, positions, table=None):
        """Tokens (B, T) at positions, a slice, (T,) or (B, T) → (B, T, C)."""
        x = (table or self.wte)(idx)  # (B, T, C), or (B, T, R) of a low-rank embedding
        if self.wte_up is not None:
            x = self.wte_up(x)  # (B, T, C)
        if self.wpe is not None:
            x = x + self.wpe(positions)
        return self.drop(self.norm_e(x))

    def run(self, blocks, x, at, cache=None, memory=None, across=None, routings=None):
        """x (B, T, C) through all blocks of a stack."""
        v0 = None
        for block in blocks:
            if self.recompute and self.training:
                x, v0, routing = checkpoint(block, x, at, v0, None, memory, across, use_reentrant=False)
            else:
                x, v0, routing = block(x, at, v0, cache, memory, across)
            if routing is not None and routings is not None:
                routings.append(routing)
        return x

    def before_head(self, h):
        """h (…, C) → what the head, or the embedding in its place, is multiplied by: a low-rank head's inner factor is applied here."""
        if self.cfg.tie and self.cfg.t5_scale:
            h = h * self.cfg.n_embd ** -0.5
        if self.cfg.tie:
            return h @ self.wte_up.weight if self.wte_up is not None else h
        return self.head_down(h) if self.head_down is not None else h

    def head_input(self, h):
        """h (…, C) and the matrix (V padded, …) whose product are the logits."""
        return self.before_head(h), (self.wte if self.cfg.tie else self.head).weight

    def logits(self, h):
        """h (…, C) → logits (…, vocab_size) in float32, without the vocabulary's padding."""
        logits = F.linear(*self.head_input(h)) if self.head is None else self.head(self.before_head(h))
        return cap(logits.float()[..., :self.cfg.vocab_size], self.cfg.softcap)

    def forward(self, idx, targets=None, cache=None, reduction='mean', label_smoothing=0.0, teacher=None, source=None, pieces=None):
        """
        idx (B, T) int64 → logits (B, T, vocab_size) float32; with targets (B, T), the loss over the targets that are not
        negative: their mean, or for reduction='sum' their sum (so that the caller can divide by the global batch's count).
        teacher: a Teacher of the same B·T tokens to learn from beside them. source (B, S) int64, as encode() takes it: what the encoder reads.
        pieces (B, T), as hidden() takes it: rows that several texts share.
        """
        if (source is None) != (self.encoder is None):
            raise ValueError('an encoder-decoder takes a source, a decoder none')
        routings = []
        real = (targets >= 0).flip(1).cumsum(1).flip(1) > 0 if self.cfg.n_expert and targets is not None else None  # what no target comes after is padding
        h = self.hidden(idx, cache, None if source is None else self.encode(source, routings), real, routings, pieces)
        if targets is None:
            return self.logits(h)
        h, weight = self.head_input(h)
        cross_entropy = ChunkedCrossEntropy.apply
        if torch.compiler.is_compiling() and not h.is_cuda:  # its loop over blocks is not for the compiler
            cross_entropy = torch.compiler.disable(cross_entropy)
        loss = cross_entropy(h.flatten(0, 1), weight, targets.flatten(), self.cfg.vocab_size, self.cfg.softcap, label_smoothing, torch.is_grad_enabled(),
                             teacher)
        if routings:
            loss = loss + self.account(routings) * (targets >= 0).sum()
        return loss if reduction == 'sum' else loss / (targets >= 0).sum()

    # --- mixtures of experts ---

    def mixtures(self):
        return [module for module in self.modules() if isinstance(module, MoE)]

    def account(self, routings):
        """Count the loads of a training batch; returns what the routers are to learn beside the language, in a scalar that is 0 and has its gradient."""
        for mixture, routing in zip(self.mixtures(), routings):
            mixture.load += routing.load
        extra = sum(routing.loss for routing in routings)
        return extra - extra.detach()  # so that the loss stays nats

    def take_loads(self):
        """How many tokens every expert was given in training since the last call: (layers, E) int64, the encoder's first."""
        loads = torch.stack([mixture.load for mixture in self.mixtures()])
        for mixture in self.mixtures():
            mixture.load.zero_()
        return loads

    def balance(self, loads):
        """A step of expert_bias, if there is one, towards equal loads (layers, E), those of one step of all ranks."""
        for mixture, load in zip(self.mixtures(), loads.float() if self.cfg.expert_bias else ()):
            mixture.expert_bias += self.cfg.expert_bias * torch.sign(load.mean() - load)

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
        rel                         normal, init_std or 1/sqrt(n_embd)
        router                      normal, 0.02: small logits, so that every expert is tried
        norms one, biases zero, the vocabulary's padding zero. t5_scale: see there
        """
        cfg = self.cfg
        for block, depth in [(block, len(stack)) for stack in (self.encoder or (), self.blocks) for block in stack]:
            depth_scale = 1.0 if cfg.t5_scale else 1 / math.sqrt(2 * depth)
            for attention in filter(None, (block.attn, block.cross)):
                init_linear(attention.q, cfg, cfg.d_head ** -0.5 if cfg.t5_scale else 1.0)
                init_linear(attention.k, cfg)
                init_linear(attention.v, cfg)
                init_linear(attention.o, cfg, depth_scale, zero=cfg.zero_init)
            for mlp in [module for module in block.modules() if isinstance(module, MLP)]:
                for layer in filter(None, (mlp.up, mlp.gate)):
                    init_linear(layer, cfg)
                init_linear(mlp.down, cfg, depth_scale, zero=cfg.zero_init)
        for mixture in self.mixtures():
            nn.init.normal_(mixture.router, std=0.02)
        for bias in filter(None, (self.rel, self.rel_encoder)):
            nn.init.normal_(bias.weight, std=cfg.init_std or cfg.n_embd ** -0.5)
        embed_std = min(0.02, 4 / cfg.n_embd) if cfg.tie else 0.02
        if cfg.t5_scale or cfg.embed_norm and not cfg.tie:  # what follows takes the scale out
            embed_std = 1.0
        embed_std = cfg.init_std or embed_std
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

    def num_params(self, active=False):
        """Number of parameters, tied ones once, the vocabulary's padding not counted; active: of the experts those that one token meets."""
        padding = self.cfg.padded_vocab - self.cfg.vocab_size
        padded = [self.wte.weight] + ([] if self.head is None else [self.head.weight])
        idle = sum(self.idle(name, p) for name, p in self.named_parameters()) if active else 0
        return sum(p.numel() for p in self.parameters()) - sum(padding * w.size(1) for w in padded) - idle

    def idle(self, name, p):
        """How many numbers of a tensor a token does not meet: those of the experts that it is not given to."""
        is_expert = re.search(r'\.mlp\.experts\.(up|gate|down)\.', name)
        return p.numel() * (self.cfg.n_expert - self.cfg.n_expert_active) // self.cfg.n_expert if is_expert else 0

    def flops_per_token(self):
        """
        Floating-point operations of training on one token: forward and backward of every matmul that runs (2 + 4 per
        weight, head and factors included, look-ups not; 2 + 2 for one that stays as it is) and of attention at full length, 12 T H D a layer (PaLM,
        arXiv 2204.02311, appendix B: causal kernels do about half of that). With an encoder: on one token of the target and its share,
        source_size / block_size tokens, of the source, by which encoder, keys and values of cross-attention are multiplied. Where
        nothing is trained at all, the operations of the forward pass.
        """
        cfg, T, S = self.cfg, self.cfg.block_size, self.cfg.source_context
        is_trained = any(p.requires_grad for p in self.parameters())

        def passes(p):
            return 3 if p.requires_grad else 2 if is_trained else 1  # forward, gradient of the input, gradient of the weight
        target, source = 0, 0  # weights that are multiplied by a token of either, as often as they are
        for name, p in self.named_parameters():
            if p.ndim < 2 or name.startswith(('wte.', 'wte_encoder.', 'wpe.', 'rel.', 'rel_encoder.')) or name.endswith('.bias'):
                continue
            multiplied = (p.numel() - self.idle(name, p)) * passes(p)
            if re.match(r'encoder\.|blocks\.\d+\.cross\.[kv]\.', name):
                source += multiplied
            else:
                target += multiplied
        if cfg.tie:
            target += sum(p.numel() * passes(p) for p in (self.wte.weight, *(self.wte_up.parameters() if self.wte_up is not None else ())))
        if self.wte_up is not None and S:
            source += self.wte_up.weight.numel() * passes(self.wte_up.weight)
        pairs = cfg.n_layer * T * (T + S) + cfg.n_encoder_layer * S * S  # of a query and a key, in a row
        return 2 * target + 2 * source * S // T + (12 if is_trained else 4) * pairs // T * cfg.n_head * cfg.d_head


def init_linear(layer, cfg, scale=1.0, zero=False):
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
    elif cfg.rank_init == 'orthogonal':
        S = torch.full((rank,), std * math.sqrt(n_in * n_out / rank), device=up.device)
        U, Vh = nn.init.orthogonal_(torch.empty_like(up)), nn.init.orthogonal_(torch.empty_like(down))
    else:
        raise no_code(cfg, 'rank_init')
    down.copy_(S[:, None].sqrt() * Vh)
    up.copy_(U * S.sqrt())


# -----------------------------------------------------------------------------
# Markov chains: the next token follows from the one before alone

class BigramLoss(torch.autograd.Function):
    """
    Sum of -log softmax(table[previous])[target], which reads every row of the table that occurs once, however often it occurs, and holds a few
    rows at a time. Of the gradient, n·softmax(row) - counts of what followed, for n occurrences of a row, the table itself says the softmax:
    backward hands over the counts alone, as a sparse (V, V) tensor of an entry a token, -counts. It adds up over micro-batches and ranks as
    gradients do, and Counts of optim.py steps by it. At V = 29k and 5,500 targets that is 0.1 MB, the rows would be 170, a dense gradient 3,363.
    With sparse=False it is the dense gradient, for any other optimizer.
    """
    @staticmethod
    def forward(ctx, table, previous, targets, sparse):  # (V, V), (N,), (N,)
        rows, which = previous.unique(return_inverse=True)  # (U,), (N,)
        ctx.save_for_backward(table, previous, targets)
        ctx.sparse = sparse
        log_sums = torch.cat([table[some].logsumexp(1) for some in rows.split(64)])  # a few at a time: 7 MB at V = 29k
        return (log_sums[which] - table[previous, targets]).sum()

    @staticmethod
    def backward(ctx, grad):
        table, previous, targets = ctx.saved_tensors
        minus = -grad.expand(len(targets))  # (N,)
        if ctx.sparse:
            entries = torch.stack([previous, targets])  # (2, N)
            counts = torch.sparse_coo_tensor(entries, minus, table.shape, check_invariants=False)
            return counts, None, None, None
        dense = torch.zeros_like(table)
        rows, counts = previous.unique(return_counts=True)  # (U,), (U,)
        for some, n in zip(rows.split(64), counts.split(64)):
            dense[some] = table[some].softmax(1) * (n[:, None] * grad)
        dense.index_put_((previous, targets), minus, accumulate=True)
        return dense, None, None, None


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
        # empty: nn.Embedding would fill it at once, 8 s for 841M numbers. The gradient of a full table is sparse if
        # optim.make_optimizer() sets wte.sparse, which DDP asks too
        self.wte = nn.Embedding.from_pretrained(torch.empty(V, R or V), freeze=False)
        self.drop = nn.Dropout(cfg.dropout)
        self.head = nn.Linear(R, V, bias=False) if R else None
        if init and not self.wte.weight.is_meta:
            self.init_weights()

    def hidden(self, idx, cache=None, memory=None):
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
                raise ValueError(f'label_smoothing={label_smoothing}: a full Markov table has none: set it to 0')
            loss = BigramLoss.apply(self.wte.weight, idx, targets, self.wte.sparse)
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

    def num_params(self, active=False):
        """Number of parameters."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self):
        """Floating-point operations of training on one token: forward and backward of the head, 6 R V; a table is looked up, not multiplied: 0."""
        return 6 * self.cfg.rank_embed * self.cfg.vocab_size


def make_model(cfg, init=True):
    """The network that a ModelConfig describes."""
    if cfg.arch == 'decoder':
        return Transformer(cfg, init)
    if cfg.arch == 'markov':
        return Markov(cfg, init)
    raise no_code(cfg, 'arch')
