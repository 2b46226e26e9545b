"""
Store matrices in fewer bits: those of a whole model, for decoding, or frozen ones while adapters are trained.

    pack(model, 'bfloat16')           # or kind='int8' or 'int4'; then sample.generate(model, …)
    pack_frozen(model, 'nf4')         # after lora.begin(model, s)
"""
import functools

import torch
import torch.nn as nn
import torch.nn.functional as F

from configurator import UserError
from features.lora import layers as lora
from model import MLP, Attention, attend, cap

# -----------------------------------------------------------------------------
# A matrix in int8, or in four bits

BLOCK = 64  # numbers of a row that share a scale in nf4


@functools.cache
def nf4_pairs():
    """
    The two numbers of each byte of nf4, (256, 2): 16 values from -1 to 1 including zero, with the density of
    a normal distribution (QLoRA, Dettmers et al. 2023, arXiv 2305.14314, section 3 and appendix E).
    """
    positive, negative = (torch.special.ndtri(torch.linspace(0.9677083, 0.5, n, dtype=torch.float64)[:-1])
                          for n in (9, 8))
    levels = (torch.cat([-negative, torch.zeros(1), positive.flip(0)]) / positive[0]).float()
    return torch.cartesian_prod(levels, levels)


def to_bits(weight, kind):
    """
    (stored, scale) of a matrix (n_out, n_in): int8 with one scale per row, or nf4 with two numbers per byte
    and one scale per 64 numbers of a row.
    """
    if kind == 'int8':
        scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127  # (n_out, 1)
        scale = scale.bfloat16().float()  # which torch's kernel takes; off by 1/512, so no number exceeds 127
        return (weight / scale).round().to(torch.int8), scale
    blocks = weight.unflatten(1, (-1, BLOCK))  # (n_out, n_in / 64, 64)
    scale, levels = blocks.abs().amax(2).clamp(min=1e-12).bfloat16(), nf4_pairs()[:16, 1].to(weight.device)
    # of the nearest
    code = torch.bucketize(blocks / scale[..., None].float(), (levels[1:] + levels[:-1]) / 2).flatten(1)
    return (16 * code[:, ::2] + code[:, 1::2]).to(torch.uint8), scale


def from_bits(stored, scale, pairs, dtype):
    """The matrix in dtype."""
    if stored.dtype == torch.uint8:
        blocks = F.embedding(stored.int(), pairs.to(dtype)).flatten(1).unflatten(1, (-1, BLOCK))
        return (blocks * scale[..., None].to(dtype)).flatten(1)
    # scaled before it is multiplied: sums of integers would overflow float16
    return stored.to(dtype) if scale is None else (stored * scale).to(dtype)


class FrozenLinear(torch.autograd.Function):
    """
    x·Wᵀ + b with a frozen matrix. W is unpacked again for the gradient of x, so that only its packed form is
    stored between the passes.
    """

    @staticmethod
    def forward(ctx, x, bias, stored, scale, pairs):
        ctx.save_for_backward(stored, scale, pairs)
        return F.linear(x, from_bits(stored, scale, pairs, x.dtype), bias)

    @staticmethod
    def backward(ctx, dy):
        bias = dy.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        return dy @ from_bits(*ctx.saved_tensors, dy.dtype), bias, None, None, None


# -----------------------------------------------------------------------------
# A layer

def has_onednn(dtype):
    """Whether torch can multiply by a matrix in oneDNN's layout on this CPU."""
    if not torch.backends.mkldnn.is_available():
        return False
    supported = {
        torch.float32: True,
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported(),
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported(),
    }
    return supported.get(dtype, False)


def has_int4():
    """Whether this torch has the kernels for Int4, which are not part of its documented functions."""
    names = '_convert_weight_to_int4pack_for_cpu', '_weight_int4pack_mm_for_cpu'
    return all(hasattr(torch.ops.aten, name) for name in names)


class Packed(nn.Module):
    """
    A linear layer whose weights are stored as `kind` (int8, nf4, bfloat16, …) and multiplied in autocast's
    dtype, or in `dtype`; the rest of the model stays float32.
    The cost of one token is reading the weights. F.linear's kernels are made for many rows. On a CPU, three
    ways are 2 to 4 times faster, all without gradients. Compiled, a product with few rows is written as a
    sum, which becomes one loop that reads the stored weights without copies. Uncompiled, int8 has a kernel of
    torch. And with eager=True, the weights are stored in oneDNN's layout, which cannot be compiled.
    """
    FEW = 4  # rows: up to there the loop is faster
    FEW_INT8 = 32  # the same of the kernel for int8

    def __init__(self, weight, bias, dtype, kind, eager=False):
        super().__init__()
        self.dtype = getattr(torch, dtype)
        stored, scale = (to_bits(weight, kind) if kind in ('int8', 'nf4')
                         else (weight.to(getattr(torch, kind)), None))
        # the kernel for int8 reads 32 numbers at a time, also beyond the end of a row
        self.has_kernel = kind == 'int8' and weight.device.type == 'cpu' and weight.size(1) % 32 == 0
        self.is_blocked = eager and weight.device.type == 'cpu' and has_onednn(stored.dtype)
        if self.is_blocked:
            stored = torch.ops.mkldnn._reorder_linear_weight(stored.detach().contiguous())
        self.register_buffer('stored', stored)
        self.register_buffer('scale', scale)
        self.register_buffer('pairs', nf4_pairs().to(weight.device) if kind == 'nf4' else None)
        if isinstance(bias, nn.Parameter):
            self.bias = bias
        else:
            self.register_buffer('bias', bias)

    @property
    def weight(self):
        """The matrix (n_out, n_in), float32."""
        return from_bits(self.dense(), self.scale, self.pairs, torch.float32)

    def dense(self):
        return self.stored.to_dense() if self.is_blocked else self.stored

    def forward(self, x):  # (…, n_in)
        rows = x.numel() // x.size(-1)
        if torch.compiler.is_compiling() and rows <= self.FEW and self.pairs is None:
            y = (x.unsqueeze(-2) * self.stored.float()).sum(-1)  # (…, n_out)
            y = y if self.scale is None else y * self.scale[:, 0]
            return y if self.bias is None else y + self.bias
        mixed = torch.is_autocast_enabled(x.device.type)
        dtype = torch.get_autocast_dtype(x.device.type) if mixed else self.dtype
        y = self.multiply(x.to(dtype), None if self.bias is None else self.bias.to(dtype), rows)
        return y if mixed else y.float()

    def multiply(self, x, bias, rows):
        """x·Wᵀ + bias in the dtype of x (…, n_in), which has that many rows."""
        if not torch.is_grad_enabled():
            if self.is_blocked and x.dtype == self.stored.dtype:
                return torch.ops.mkldnn._linear_pointwise(x, self.stored, bias, 'none', [], '')
            if self.has_kernel and x.dtype == torch.bfloat16 and rows <= self.FEW_INT8:
                y = torch._weight_int8pack_mm(x.reshape(rows, -1), self.stored, self.scale[:, 0].to(x.dtype))
                y = y if bias is None else y + bias
                return y.unflatten(0, x.shape[:-1])
        return FrozenLinear.apply(x, bias, self.dense(), self.scale, self.pairs)


class Int4(nn.Module):
    """
    A linear layer of a decoding copy on a CPU, in four bits: every GROUP numbers of a row are rounded to 16
    equal steps from their lowest to their highest, 5 bits a weight with the two numbers that say where these
    are. Torch's kernel multiplies in bfloat16 (in float32 it is 40 times slower); many rows are multiplied in
    `dtype`. Its layout of the weights depends on the CPU.
    """
    GROUP = 32

    def __init__(self, weight, bias, dtype):
        super().__init__()
        self.n_out, n_in = weight.shape
        self.dtype = getattr(torch, dtype)
        self.padding = -n_in % self.GROUP  # columns; the kernel takes whole groups, and 16 rows at a time
        weight = F.pad(weight.float(), (0, self.padding, 0, -self.n_out % 16))
        code, scale, middle = to_steps(weight.unflatten(1, (-1, self.GROUP)))
        pack_code = torch.ops.aten._convert_weight_to_int4pack_for_cpu
        self.register_buffer('stored', pack_code(code.flatten(1).int(), 1))
        # (groups, n_out, 2)
        self.register_buffer('scale', torch.cat([scale, middle], 2).transpose(0, 1).contiguous())
        self.register_buffer('bias', None if bias is None else bias.detach())

    def forward(self, x):  # (…, n_in)
        mixed = torch.is_autocast_enabled(x.device.type)
        rows = F.pad(x.reshape(-1, x.size(-1)), (0, self.padding))
        if len(rows) > 2 * rows.size(1):  # unpacking costs as much as that many rows do
            y = F.linear(rows.to(self.dtype), self.padded_weight().to(self.dtype))
        else:
            y = self.multiply(rows.bfloat16())
        y = y[:, :self.n_out].unflatten(0, x.shape[:-1])
        y = y if self.bias is None else y + self.bias.type_as(y)
        return y if mixed else y.float()

    def multiply(self, rows):  # (rows, n_in with padding), bfloat16
        return torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self.stored, self.GROUP, self.scale)

    def padded_weight(self):
        """The matrix in bfloat16, with padding: its products with all unit vectors."""
        return self.multiply(torch.eye(self.GROUP * len(self.scale), dtype=torch.bfloat16)).T

    @property
    def weight(self):
        """The matrix (n_out, n_in), float32."""
        weight = self.padded_weight()
        return weight[:self.n_out, :weight.size(1) - self.padding].float()


def to_steps(groups):
    """
    (code from 0 to 15, scale, middle) of groups (…, numbers): a number is about (code - 8)·scale + middle,
    with both in bfloat16. Of six ranges, the one with the smallest squared error: without its outermost
    numbers, a group has finer steps.
    """
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    best = None
    for share in (1, 0.95, 0.9, 0.85, 0.8, 0.75):
        scale = ((high - low) * share / 15).clamp(min=1e-8).bfloat16()
        middle = ((high + low - 15 * scale.float()) / 2 + 8 * scale.float()).bfloat16()
        code = ((groups - middle.float()) / scale.float() + 8).round().clamp(0, 15)
        error = ((code - 8) * scale.float() + middle.float() - groups).square().sum(-1, keepdim=True)
        if best is None:
            best, least = [code, scale, middle], error
            continue
        best = [torch.where(error < least, new, old) for new, old in zip((code, scale, middle), best)]
        least = torch.minimum(error, least)
    return best


def packed_layer(weight, bias, dtype, kind, eager):
    return Int4(weight, bias, dtype) if kind == 'int4' else Packed(weight, bias, dtype, kind, eager)


def attend_prompt(q, k, v, mask, is_causal, dropout, softcap=0.0, size=128):
    """
    attend() of all tokens of a prompt, causally, in bfloat16. On a CPU `size` queries at a time: half the
    time of torch's fused kernel (2,000 tokens of SmolLM2: 29 against 67 ms a layer). Single tokens are
    attended in float32, because that kernel is 1.6 times slower for them in bfloat16. The result has the
    dtype of q, as adapters expect it.
    """
    (B, H, T, D), shared, dtype, parts = q.shape, k.size(1), q.dtype, []
    if q.device.type != 'cpu' or torch.is_grad_enabled():
        return attend(q, k, v, mask, is_causal, dropout, softcap)
    q, k, v = (t.bfloat16() for t in (q * D ** -0.5, k, v))
    later = torch.ones(size, size, dtype=torch.bool).triu(1)
    for begin in range(0, T, size):
        end = min(begin + size, T)
        rows = q[:, :, begin:end].reshape(B, shared, -1, D)  # of all heads that share keys
        logits = cap(rows @ k[:, :, :end].mT, softcap)
        logits.view(B, H, -1, end)[..., begin:].masked_fill_(later[:end - begin, :end - begin], -torch.inf)
        parts.append((logits.softmax(-1) @ v[:, :, :end]).view(B, H, -1, D))
    return torch.cat(parts, dim=2).to(dtype)


# -----------------------------------------------------------------------------
# A network

def replace_layers(model, module, dtype, kind, which, eager=False):
    """
    Replace every linear layer in `module` for which which(layer) is true by a Packed, and move its hooks.
    """
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            # a tied head multiplies by that one's transpose
            if isinstance(child, nn.Linear) and name != 'wte_up' and which(child):
                packed = packed_layer(child.weight, child.bias, dtype, kind, eager)
                lora.move(model, child, packed)
                setattr(parent, name, packed)


@torch.no_grad()
def pack(model, dtype='bfloat16', kind='', eager=False):
    """
    Convert `model`, in place, to one for decoding only, and return it: its matrices are stored in dtype
    ('float32', 'bfloat16', 'float16'), or as `kind`, int8 or int4, and multiplied in dtype if there are many
    rows. With int4, the head is in int8. A tied head gets a copy; the embedding stays float32, and experts
    always use dtype. eager: the model will not be compiled; on a CPU its products are then 2 to 3 times
    faster. Raises UserError where torch has no kernel for int4.
    """
    if kind == 'int4' and (next(model.parameters()).device.type != 'cpu' or not has_int4()):
        raise UserError('int4=True: torch multiplies by such weights on CPUs alone: use --int8')
    of_head = 'int8' if kind == 'int4' else kind  # SmolLM2: in int4, 4.156 in place of 4.095 nats a token
    if model.cfg.tie and model.cfg.arch == 'decoder':
        # rows that lora.py has trained
        weight = model.wte.tokens.put(model.wte.weight) if hasattr(model.wte, 'tokens') else model.wte.weight
        model.head = Packed(weight, None, dtype, of_head or dtype, eager)
    wide = set()
    if getattr(model.cfg, 't5_scale', False):  # t5
        mlps = [module for module in model.modules() if isinstance(module, MLP)]  # t5
        wide = {layer for mlp in mlps for layer in mlp.down.modules()}  # t5
    if dtype == 'float16':  # which is too narrow for what these are multiplied by
        replace_layers(model, model, 'float32', kind or 'float32', lambda layer: layer in wide, eager)
    if getattr(model, 'head', None) is not None:
        replace_layers(model, model, dtype, of_head or dtype, lambda layer: layer is model.head, eager)
    replace_layers(model, model, dtype, kind or dtype, lambda layer: True, eager)
    if dtype == 'bfloat16':
        for module in model.modules():
            if isinstance(module, Attention):
                module.attend_prompt = attend_prompt
    for module in model.modules():
        if lora.is_of_experts(module) and not (dtype == 'float16' and module in wide):
            module.weight.data = module.weight.to(getattr(torch, dtype))
    return model


@torch.no_grad()
def pack_frozen(model, kind):
    """
    Store the frozen matrices of the blocks as `kind` (int8, nf4, or the name of a dtype), in place, except
    experts. They are multiplied in autocast's dtype, or in float32. Raises UserError for sizes that nf4 does
    not support.
    """
    for name, layer in model.named_modules():
        if kind == 'nf4' and isinstance(layer, nn.Linear) and name.startswith(('blocks.', 'encoder.')):
            if layer.weight.size(1) % BLOCK and not layer.weight.requires_grad:
                raise UserError(f'lora_store=nf4: {name} has rows of {layer.weight.size(1)}, '
                                f'takes multiples of {BLOCK}: use int8')
    for blocks in (model.blocks, getattr(model, 'encoder', None)):
        if blocks is not None:
            replace_layers(model, blocks, 'float32', kind, lambda layer: not layer.weight.requires_grad)


def pack_frozen_of(model, s):
    """
    Store the frozen weights of a run with adapters as lora_store says; float32 and sharded weights are not
    changed.
    """
    kind = lora.how_stored(s)
    if kind != 'float32' and not s.shard:
        pack_frozen(model, kind)
