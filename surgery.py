"""
A new network out of a trained one.

    python surgery.py factorize --from=out/dense --out_dir=out/low --rank_qk=48 --rank_vo=64    # the same ranks in all layers
    python surgery.py factorize --from=hf:FOLDER --out_dir=out/low --energy=0.95                # each matrix its own
    python train.py --init_from=out/low --out_dir=out/low_tuned --max_iters=200                 # and a short fine-tune

What it writes is a checkpoint at step 0, with settings and a log as a run has them.
"""
import dataclasses
import json
import os
from dataclasses import dataclass
from statistics import median
from types import SimpleNamespace

import torch
import torch.nn as nn

import checkpoint
import hub
from analyze import rank_for
from configurator import UserError, check, configure_command, run_main
from data import Mixture, Source
from loss import evaluate
from model import LowRank, ModelConfig, make_model
from origin import fill, read_model
from train import Ranks


@dataclass
class FactorizeSettings:
    from_: str = ''  # the dense network: a run (its best checkpoint), a checkpoint, hf:FOLDER, gpt2
    out_dir: str = ''  # where the new one goes: a new directory
    rank_qk: int = 0  # ranks of the queries' and keys' matrices; 0 = they stay dense
    rank_vo: int = 0  # of the values' and attention's output
    rank_mlp: int = 0  # of the MLP
    energy: float = 0.0  # in place of ranks: each matrix gets the one that keeps this share of its energy, a multiple of 8; it stays dense
    # where two factors would not be smaller. With a dataset, energy is that of its outputs on these data
    dataset: str | dict = 'auto'  # whose inputs weigh the errors; auto = the one it was trained on, if it is there; none = plain SVD

    def check(self):
        """Raise ValueError for values that cannot work."""
        for name in ('from_', 'out_dir'):
            if not getattr(self, name):
                raise ValueError(f'{name.rstrip("_")}: is not given: python surgery.py factorize --from=DIR --out_dir=NEW --energy=0.95')
        uniform = [name for name in ('rank_qk', 'rank_vo', 'rank_mlp') if getattr(self, name)]
        if bool(uniform) == bool(self.energy):
            raise ValueError(f'energy={self.energy:g}, {uniform[0] if uniform else "rank_qk, rank_vo, rank_mlp"}: give either energy or ranks')
        if not 0 <= self.energy < 1 or min(self.rank_qk, self.rank_vo, self.rank_mlp) < 0:
            raise ValueError(f'energy={self.energy:g}: takes 0 < energy < 1, and ranks from 0')


# -----------------------------------------------------------------------------
# Factorize

SAMPLE = 2 ** 16  # tokens to measure inputs and losses on


def dense_layers(model):
    """{name: layer} of the dense matrices of the blocks."""
    return {f'blocks.{name}': layer for name, layer in model.blocks.named_modules() if isinstance(layer, nn.Linear)}


@torch.no_grad()
def input_moments(model, data):
    """{name: E[x·xᵀ] (n_in, n_in)} of the inputs x of every dense layer of the blocks, over at most SAMPLE tokens of a Mixture, padding left out."""
    sums, rows, layers, tokens = {}, max(1, SAMPLE // model.cfg.block_size), dense_layers(model), 0

    def watch(name):
        def hook(layer, args):
            x = args[0][real].float()  # (B, T, n_in) → (N, n_in)
            sums[name] = sums.get(name, 0) + (x.T @ x).double()
        return hook
    handles = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    model.eval()
    for first in range(0, rows, 8):
        x, y = (torch.from_numpy(a) for a in data.rows(range(first, min(first + 8, rows))))
        real = y >= 0  # for watch()
        tokens += int(real.sum())
        model.hidden(x)
    for handle in handles:
        handle.remove()
    return {name: total / tokens for name, total in sums.items()}


def decompose(weight, moment=None):
    """
    (U, S, R) in float64 with weight = U·diag(S)·R, so that cut after rank r it is the best one of that rank: in |W - W_r| (the SVD), or
    with E[x·xᵀ] = L·Lᵀ in the outputs, E|(W - W_r)·x|² = |(W - W_r)·L|², by the SVD of W·L (SVD-LLM, Wang et al. 2024, arXiv 2403.07378).
    """
    weight = weight.double()
    if moment is None:
        return torch.linalg.svd(weight, full_matrices=False)
    ridge = 1e-6 * moment.diagonal().mean() + 1e-30  # inputs that never occur
    L = torch.linalg.cholesky(moment + ridge * torch.eye(len(moment), dtype=moment.dtype))
    U, S, Vh = torch.linalg.svd(weight @ L, full_matrices=False)
    return U, S, torch.linalg.solve_triangular(L, Vh, upper=False, left=False)


def factors(U, S, R, rank):
    """(down (rank, n_in), up (n_out, rank)) whose product is the cut at `rank`, with equal singular values: the root of each on either side."""
    U, S, Vh = torch.linalg.svd((U[:, :rank] * S[:rank]) @ R[:rank], full_matrices=False)
    return S[:rank, None].sqrt() * Vh[:rank], U[:, :rank] * S[:rank].sqrt()


@torch.no_grad()
def factorize(model, ranks, energy=0.0, moments=None):
    """
    ({name: tensor}, [record]) of `model` with its dense matrices in two factors: ranks {name: rank}, 0 = dense; energy > 0: ranks that
    keep this share of it. A record says what was kept of a matrix; a bias stays with the outer factor.
    """
    weights, records = dict(model.state_dict()), []
    for name, layer in dense_layers(model).items():
        rank, n_out, n_in = ranks.get(name, 0), *layer.weight.shape
        record = {'name': name, 'shape': f'{n_out}x{n_in}', 'rank': 0, 'error': 0.0, 'kept': 1.0}
        if rank or energy:
            U, S, R = decompose(layer.weight, moments[name] if moments else None)
            rank = rank or -(-rank_for(S, energy) // 8) * 8
            if not energy or rank * (n_in + n_out) < n_in * n_out:
                down, up = factors(U, S, R, rank)
                error = torch.linalg.norm(up @ down - layer.weight) / torch.linalg.norm(layer.weight)
                record |= {'rank': rank, 'error': error.item(), 'kept': (S[:rank].square().sum() / S.square().sum()).item()}
                del weights[f'{name}.weight']
                weights |= {f'{name}.down.weight': down.float(), f'{name}.up.weight': up.float()}
                if layer.bias is not None:
                    weights[f'{name}.up.bias'] = weights.pop(f'{name}.bias')
        records.append(record)
    return weights, records


def report(records, by_output):
    """A line for every kind of matrix: ranks, relative Frobenius error, share of the energy that is kept, medians over the layers."""
    lines = [f'{"matrix":10}  {"shape":>10}  {"rank":>16}  {"error":>7}  {"output" if by_output else "energy"} kept']
    for kind in dict.fromkeys(r['name'].split('.', 2)[2] for r in records):
        found = [r for r in records if r['name'].endswith('.' + kind)]
        ranks = [r['rank'] or 'dense' for r in found]
        shown = ranks[0] if len(set(ranks)) == 1 else ' '.join(map(str, ranks))
        lines.append(f'{kind:10}  {found[0]["shape"]:>10}  {shown:>16}  {median(r["error"] for r in found):7.3f}  {median(r["kept"] for r in found):11.4f}')
    return '\n'.join(lines)


# -----------------------------------------------------------------------------
# From and to the disk

def open_data(s, cfg, settings):
    """(training Mixture, validation Sources) of s.dataset; None for plain SVD."""
    name = settings.get('dataset', 'none') if s.dataset == 'auto' else s.dataset
    if name == 'none':
        print('plain SVD; --dataset=NAME would weigh errors by the inputs on such data')
        return None
    packing = settings.get('packing', 'stream')
    try:
        data = Mixture(name, 'train', cfg.block_size, 0, packing, settings.get('mix_by', 'tokens'))
        return data, [Source(source.name, 'val', cfg.block_size, packing) for source in data.sources]
    except UserError as error:
        if s.dataset != 'auto':
            raise
        print(f'plain SVD: {error}')
        return None


def read(s):
    """
    (model, settings, data, (tokenizer, folder of its files)) of s.from_. Weights of others have no settings, and go with the tokenizer
    of the data where there are any. Raises UserError for a network that is low-rank already and for data of another tokenizer.
    """
    cfg, weights, folder = read_model(s.from_)
    if cfg.arch == 'markov':
        raise UserError(f'from={s.from_}: a Markov chain has no layers to factorize: train one of low rank, --arch=markov --rank_embed=64')
    model = fill(cfg, weights, s.from_)
    low_rank = [name for name, layer in model.named_modules() if isinstance(layer, LowRank)]
    if low_rank:
        raise UserError(f'from={s.from_}: {low_rank[0]} is low-rank already: give the dense network')
    state = {} if hub.knows(s.from_) else checkpoint.load_state(folder)
    data = open_data(s, cfg, state.get('settings', {}))
    files = data[0].sources[0].files if data else None
    if state and files and files.meta['tokenizer'] != state['tokenizer'] or files and files.vocab_size > cfg.vocab_size:
        raise UserError(f'dataset={files.folder}: its tokenizer is not that of {s.from_}: prepare the data with that one, or give --dataset=none')
    tokenizer = (state['tokenizer'], folder) if state else (files.meta['tokenizer'], files.folder) if files else hub.tokenizer(s.from_)[::-1]
    return model, state.get('settings', {}), data, tokenizer


def validation(cfg, val):
    """Settings of the losses: about SAMPLE validation tokens, or all where there are no more."""
    count = max(1, SAMPLE // cfg.block_size // 4)
    return {'eval_iters': 0 if all(source.rows <= 4 * count for source in val) else count, 'batch_size': 4}


def losses(model, val):
    """{'val_loss', 'val_bpb'} of a model."""
    return evaluate(model, val, SimpleNamespace(**validation(model.cfg, val), dtype='float32'), Ranks('auto', torch.device('cpu')))


def save(s, model, settings, tokenizer, record):
    """Write the checkpoint, settings.json and log.jsonl, as train.py does of a run of no steps."""
    settings = settings | dataclasses.asdict(model.cfg) | {'out_dir': s.out_dir, 'init_from': s.from_, 'max_iters': 0}
    checkpoint.prepare_out_dir(s.out_dir, 0, settings)
    description, folder = tokenizer
    state = {'step': 0, 'model': dataclasses.asdict(model.cfg), 'settings': settings, 'tokenizer': description, 'torch': torch.__version__,
             'surgery': 'factorize'}
    checkpoint.save(s.out_dir, 0, model.state_dict(), {}, state, [os.path.join(folder, name) for name in description.get('files', ())])
    if record:
        with open(os.path.join(s.out_dir, 'log.jsonl'), 'w', encoding='utf-8') as f:
            f.write(json.dumps({'step': 0, 'tokens': 0, 'flops': 0, 'seconds': 0, **record}) + '\n')


# -----------------------------------------------------------------------------
# Commands

def run_factorize(s):
    if os.path.isdir(s.out_dir) and os.listdir(s.out_dir):
        raise UserError(f'out_dir={s.out_dir}: holds something already: give a new directory')
    dense, settings, data, tokenizer = read(s)
    plain = {f.name: f.default for f in dataclasses.fields(ModelConfig) if f.name.startswith('rank_') and f.name not in ('rank_embed', 'rank_head')}
    cfg = dataclasses.replace(dense.cfg, **plain | {'rank_qk': s.rank_qk, 'rank_vo': s.rank_vo, 'rank_mlp': s.rank_mlp, 'ranks': {}})
    check(cfg)
    with torch.device('meta'):
        uniform = {name: layer.down.out_features for name, layer in make_model(cfg).named_modules() if isinstance(layer, LowRank)}
    weights, records = factorize(dense, uniform, s.energy, input_moments(dense, data[0]) if data else None)
    if s.energy:
        cfg = dataclasses.replace(cfg, ranks={r['name']: r['rank'] for r in records if r['rank']})
        if not cfg.ranks:
            raise UserError(f'energy={s.energy:g}: two factors that keep so much would not be smaller than any of the matrices: lower it')
    low = fill(cfg, weights, s.out_dir)
    print(report(records, bool(data)) + '\n')
    before, after = (losses(model, data[1]) if data else {} for model in (dense, low))
    for what, old, new in [('parameters', dense.num_params(), low.num_params()), ('training FLOPs a token', dense.flops_per_token(), low.flops_per_token())]:
        print(f'{what:24}{old:14,} → {new:14,}  {new / old - 1:+.1%}')
    for name in after:
        print(f'{name:24}{before[name]:14.4f} → {after[name]:14.4f}  {after[name] - before[name]:+.4f}')
    if data:  # so that compare.py knows what the loss is of
        settings = settings | validation(cfg, data[1]) | ({} if s.dataset == 'auto' else {'dataset': s.dataset})
    save(s, low, settings, tokenizer, after)
    print(f'written: {s.out_dir}; python train.py --init_from={s.out_dir} --out_dir={s.out_dir.rstrip("/")}_tuned')


def main():
    command, s = configure_command({'factorize': (run_factorize, FactorizeSettings)})
    command(s)


if __name__ == '__main__':
    run_main(main)
