"""
Factorize the dense matrices of a trained model into two factors each, by a truncated SVD of the matrix, or of
its outputs on data.

    moments = input_moments(model, data)                   # without it: plain SVD of the matrices
    weights, records = factorize(model, {'blocks.0.attn.q': 16}, moments=moments)
    weights, records = factorize(model, {}, energy=0.95)   # the rank of each matrix keeps 95% of its energy
    print(table(records, by_output=False))
"""
from statistics import median

import torch
import torch.nn as nn

from features.growth.networks import refuse_unknown
from features.growth.runs import sample_tokens

# -----------------------------------------------------------------------------
# What a layer reads

def dense_layers(model):
    """{name: layer} of the dense matrices of the blocks; in a mixture of experts those of attention."""
    layers = {}
    for name, layer in model.blocks.named_modules():
        in_mixture = model.cfg.n_expert and '.mlp.' in name
        if isinstance(layer, nn.Linear) and not in_mixture:
            layers[f'blocks.{name}'] = layer
    return layers


@torch.no_grad()
def input_moments(model, data):
    """
    {name: E[x·xᵀ] (n_in, n_in), float64} of the inputs x of every dense layer of the blocks, from about
    sample_tokens() of a Mixture, without padding.
    """
    layers = dense_layers(model)
    sums = {name: 0 for name in layers}
    tokens = 0
    real = None  # (B, T) bool: the tokens of the rows that the model reads now
    last = None, None  # the last input and its x·xᵀ: queries, keys and values have the same, gate and up too

    def watch(name):
        def hook(layer, args):
            nonlocal last
            if args[0] is not last[0]:
                # (B, T, n_in) → (N, n_in); float32 would round by more than decompose's ridge
                x = args[0][real].double()
                last = args[0], x.T @ x
            sums[name] = sums[name] + last[1]
        return hook
    handles = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]

    model.eval()
    rows = max(1, sample_tokens(model) // data.sources[0].block_size)
    for first in range(0, rows, 8):
        x, y, *more = (torch.from_numpy(a) for a in data.rows(range(first, min(first + 8, rows))))
        real = y >= 0
        tokens += int(real.sum())
        inputs = {}
        if more:  # t5
            from features.t5.objectives import more_inputs  # t5
            inputs = more_inputs(model, more)  # t5
        model.hidden(x, **inputs)
    for handle in handles:
        handle.remove()
    return {name: total / tokens for name, total in sums.items()}


# -----------------------------------------------------------------------------
# One matrix

def decompose(weight, moment=None):
    """
    (U, S, R) in float64 with weight = U·diag(S)·R, so that truncation to rank r, W_r, is optimal. Without a
    moment it minimizes |W - W_r|: the SVD. With moment = E[x·xᵀ] = L·Lᵀ it minimizes the error of the
    outputs, E|(W - W_r)·x|² = |(W - W_r)·L|², by the SVD of W·L (SVD-LLM, Wang et al. 2024, arXiv
    2403.07378).
    """
    weight = weight.double()
    if moment is None:
        return torch.linalg.svd(weight, full_matrices=False)
    ridge = 1e-6 * moment.diagonal().mean() + 1e-30  # for inputs that never occur
    L = torch.linalg.cholesky(moment + ridge * torch.eye(len(moment), dtype=moment.dtype))
    U, S, Vh = torch.linalg.svd(weight @ L, full_matrices=False)
    return U, S, torch.linalg.solve_triangular(L, Vh, upper=False, left=False)


def factors(U, S, R, rank):
    """
    (down (rank, n_in), up (n_out, rank)) whose product is the truncation to `rank`. Both have the same
    singular values: the square roots of the product's.
    """
    U, S, Vh = torch.linalg.svd((U[:, :rank] * S[:rank]) @ R[:rank], full_matrices=False)
    root = S[:rank].sqrt()
    return root[:, None] * Vh[:rank], U[:, :rank] * root


def rank_for(s, energy):
    """
    The smallest rank that keeps this share of the sum of squares of the singular values s, which are sorted,
    largest first.
    """
    kept = s.square().cumsum(0)
    return min(len(s), int(torch.searchsorted(kept, energy * kept[-1])) + 1)


# -----------------------------------------------------------------------------
# A network

@torch.no_grad()
def factorize(model, ranks, energy=0.0, moments=None):
    """
    ({name: tensor}, [record of each matrix]) of `model` with its dense matrices factorized. ranks: {name:
    rank}, 0 = dense; or energy > 0: each matrix gets the smallest multiple of 8 that keeps this share of its
    energy, and stays dense if the factors would not be smaller. moments: from input_moments(); then energy
    means the energy of the outputs. A bias stays with the outer factor. Raises UserError for a model with
    settings that are not KNOWN.
    """
    refuse_unknown(model.cfg, 'factorized')
    weights = dict(model.state_dict())
    records = []
    for name, layer in dense_layers(model).items():
        n_out, n_in = layer.weight.shape
        record = {'name': name, 'shape': f'{n_out}x{n_in}', 'rank': 0, 'error': 0.0, 'kept': 1.0}
        records.append(record)
        rank = ranks.get(name, 0)
        if not rank and not energy:
            continue
        U, S, R = decompose(layer.weight, moments[name] if moments else None)
        if not rank:
            rank = -(-rank_for(S, energy) // 8) * 8  # tensor cores want multiples of 8
        if energy and rank * (n_in + n_out) >= n_in * n_out:
            continue
        down, up = factors(U, S, R, rank)
        record['rank'] = rank
        record['error'] = (torch.linalg.norm(up @ down - layer.weight)
                           / torch.linalg.norm(layer.weight)).item()
        record['kept'] = (S[:rank].square().sum() / S.square().sum()).item()
        del weights[f'{name}.weight']
        weights[f'{name}.down.weight'] = down.float()
        weights[f'{name}.up.weight'] = up.float()
        if layer.bias is not None:
            weights[f'{name}.up.bias'] = weights.pop(f'{name}.bias')
    return weights, records


def table(records, by_output):
    """
    A line for every kind of matrix: its ranks, the relative Frobenius error and the share of the energy that
    is kept, as medians over the layers. by_output: this is the energy of the outputs.
    """
    what = 'output' if by_output else 'energy'
    lines = [f'{"matrix":10}  {"shape":>10}  {"rank":>16}  {"error":>7}  {what} kept']
    kinds = {}  # {attn.q: records of all layers}
    for record in records:
        kind = record['name'].split('.', 2)[2]
        kinds.setdefault(kind, []).append(record)
    for kind, found in kinds.items():
        ranks = [record['rank'] or 'dense' for record in found]
        shown = ranks[0] if len(set(ranks)) == 1 else ' '.join(map(str, ranks))
        error = median(record['error'] for record in found)
        kept = median(record['kept'] for record in found)
        lines.append(f'{kind:10}  {found[0]["shape"]:>10}  {shown:>16}  {error:7.3f}  {kept:11.4f}')
    return '\n'.join(lines)
