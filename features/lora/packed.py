"""
Store matrices in fewer bits: those of a whole model, for decoding, or frozen ones while adapters are trained.

    pack(model, 'bfloat16')           # or kind='int8'; then sample.generate(model, …)
    pack_frozen(model, 'nf4')         # after lora.begin(model, s)
"""
import functools

import torch
import torch.nn as nn
import torch.nn.functional as F

from configurator import UserError
from features.lora import layers as lora
from model import MLP

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
# A layer, a network

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


def replace_layers(model, module, dtype, kind, which, eager=False):
    """
    Replace every linear layer in `module` for which which(layer) is true by a Packed, and move its hooks.
    """
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            # a tied head multiplies by that one's transpose
            if isinstance(child, nn.Linear) and name != 'wte_up' and which(child):
                packed = Packed(child.weight, child.bias, dtype, kind, eager)
                lora.move(model, child, packed)
                setattr(parent, name, packed)


@torch.no_grad()
def pack(model, dtype='bfloat16', kind='', eager=False):
    """
    Convert `model`, in place, to one for decoding only, and return it: its matrices are stored in dtype
    ('float32', 'bfloat16', 'float16'), or in int8 and multiplied in dtype if there are many rows. A tied head
    gets a copy; the embedding stays float32, and experts always use dtype. eager: the model will not be
    compiled; on a CPU its products are then 2 to 3 times faster.
    """
    if model.cfg.tie and model.cfg.arch == 'decoder':
        # rows that lora.py has trained
        weight = model.wte.tokens.put(model.wte.weight) if hasattr(model.wte, 'tokens') else model.wte.weight
        model.head = Packed(weight, None, dtype, kind or dtype, eager)
    wide = set()
    if getattr(model.cfg, 't5_scale', False):  # t5
        mlps = [module for module in model.modules() if isinstance(module, MLP)]  # t5
        wide = {layer for mlp in mlps for layer in mlp.down.modules()}  # t5
    if dtype == 'float16':  # which is too narrow for what these are multiplied by
        replace_layers(model, model, 'float32', kind or 'float32', lambda layer: layer in wide, eager)
    replace_layers(model, model, dtype, kind or dtype, lambda layer: True, eager)
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
