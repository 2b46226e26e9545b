"""
A new network out of a trained one.

    python surgery.py inherit --from=out/big --out_dir=out/small --layers=0-11                  # its first layers, or 0,2,4 or last:6
    python surgery.py grow --from=out/small --out_dir=out/big --n_layer=12 --how=zero           # more layers, here the same function
    python surgery.py widen --from=out/small --out_dir=out/wide --n_embd=512 --n_head=8         # wider, the same function
    python surgery.py average --from='out/run/step_*' --out_dir=out/mean                        # the mean of several
    python surgery.py factorize --from=out/dense --out_dir=out/low --rank_qk=48 --rank_vo=64    # low rank: the same in all layers
    python surgery.py factorize --from=hf:FOLDER --out_dir=out/low --energy=0.95                # or each matrix its own
    python surgery.py upcycle --from=out/dense --out_dir=out/moe --n_expert=8                   # a mixture of experts, the same function
    python surgery.py merge --from=out/lora --out_dir=out/merged                                # an adapter and its base, one network
    python surgery.py combine --from=out/base --adapter=A --adapter=B --out_dir=out/both        # several adapters, one
    python train.py --init_from=out/small --out_dir=out/small_tuned                             # and on with it

What it writes is a checkpoint at step 0, with settings and a log as a run has them. Its loss and its size are printed beside the old ones.
"""
import dataclasses
import glob
import json
import os
import re
from contextlib import suppress
from dataclasses import dataclass, field
from statistics import median
from types import SimpleNamespace
from typing import Literal

import torch
import torch.nn as nn

import checkpoint
import hub
from analyze import rank_for
from batches import EVAL_ROWS, Mixture, evaluate
from checkpoint import append, fill, new_folder, read_model, tokenizer_of, write_json
from configurator import FilePath, UserError, check, configure_command, run_main
from features.growth.networks import average, grow, grown_layers, layer_names, parse_layers, refuse_unknown, take_layers, upcycle, widen
from features.lora import adapters, peft_files
from features.lora.load import add_adapters, read_saved, split_name
from features.lora.settings import LoraConfig
from features.scale.ranks import Ranks
from features.study.validation import validation_sources
from features.t5.objectives import find_objective, more_inputs
from model import LowRank, ModelConfig, Transformer, make_model
from tokenizer import load_tokenizer, same_ids


@dataclass
class Settings:
    from_: FilePath = ''  # the old network: a run (its best checkpoint), a checkpoint, hf:FOLDER, gpt2
    out_dir: FilePath = ''  # where the new one goes: a new directory
    dataset: FilePath | dict = 'auto'  # data to measure the losses on; auto = those it was trained on, if they are there; none = no losses

    def check(self):
        """Raise ValueError for values that cannot work."""
        for name in ('from_', 'out_dir'):
            if not getattr(self, name):
                raise ValueError(f'{name.rstrip("_")}: is not given: python surgery.py COMMAND --from=DIR --out_dir=NEW …')


@dataclass
class InheritSettings(Settings):
    layers: str = ''  # blocks to take, as 0-11, 0,2,4, first:6, last:6, middle:6; any order, any number of times
    fresh: str = ''  # what is drawn anew in place of inherited: parts of the tensors' names, with commas: wpe,norm_f is what the original of
    # Inheritune forgot; attn, mlp and norm are possible too
    seed: int = 1337  # of what is drawn anew

    def check(self):
        """Raise ValueError for values that cannot work."""
        if not self.layers:
            raise ValueError('layers: is not given: --layers=0-11, 0,2,4 or last:6')


@dataclass
class GrowSettings(Settings):
    n_layer: int = 0  # how many blocks to have
    how: Literal['stack', 'interleave', 'zero'] = 'stack'  # where the new ones are from: all blocks again on top; each doubled in its place; the
    # same, but silent: the copies' output matrices are zero, so that the function stays

    def check(self):
        """Raise ValueError for values that cannot work."""
        if not 1 <= self.n_layer <= 10000:
            raise ValueError(f'n_layer={self.n_layer}: takes the number of blocks to grow to, at most 10,000')


@dataclass
class WidenSettings(Settings):
    n_embd: int = 0  # new sizes; 0 = as it is
    n_head: int = 0  # heads stay as wide as they are
    d_ff: int = 0
    seed: int = 1337  # of the weights that read what is new

    def check(self):
        """Raise ValueError for values that cannot work."""
        if not (self.n_embd or self.n_head or self.d_ff):
            raise ValueError('n_embd, n_head, d_ff: none is given: what is to be wider?')


@dataclass
class AverageSettings(Settings):
    from_: list[FilePath] = field(default_factory=list)  # the old networks, --from=DIR for each, or a pattern: --from='out/run/step_*'


@dataclass
class FactorizeSettings(Settings):
    dataset: FilePath | dict = 'auto'  # data whose inputs weigh the errors, and to measure the losses on; auto = those it was trained on, if they are
    # there; none = plain SVD
    rank_qk: int = 0  # ranks of the queries' and keys' matrices; 0 = they stay dense
    rank_vo: int = 0  # of the values' and attention's output
    rank_mlp: int = 0  # of the MLP
    energy: float = 0.0  # in place of ranks: each matrix gets the one that keeps this share of its energy, a multiple of 8; it stays dense
    # where two factors would not be smaller. With a dataset, energy is that of its outputs on these data

    def check(self):
        """Raise ValueError for values that cannot work."""
        uniform = [name for name in ('rank_qk', 'rank_vo', 'rank_mlp') if getattr(self, name)]
        for name in uniform:
            if getattr(self, name) < 0:
                raise ValueError(f'{name}={getattr(self, name)}: must not be negative')
        if bool(uniform) == bool(self.energy):
            raise ValueError(f'energy={self.energy:g}, {uniform[0] if uniform else "rank_qk, rank_vo, rank_mlp"}: give either energy or ranks')
        if not 0 <= self.energy < 1:
            raise ValueError(f'energy={self.energy:g}: takes 0 < energy < 1')


@dataclass
class UpcycleSettings(Settings):
    n_expert: int = 8  # each a copy of the MLP that there is
    n_expert_active: int = 1  # of them for a token
    expert_shared: bool = False  # the MLP stays, for all tokens, and the copies beside it are silent at first
    expert_bias: float = 0.0  # as in training: balance without a loss
    seed: int = 1337  # of the routers

    def check(self):
        """Raise ValueError for values that cannot work."""
        if self.n_expert < 2:
            raise ValueError(f'n_expert={self.n_expert}: takes 2 or more')


@dataclass
class MergeSettings(Settings):
    adapter: list[FilePath] = field(default_factory=list)  # what to add to --from: runs of train.py --lora_rank, folders of PEFT's; none = --from is one
    shares: list[float] = field(default_factory=list)  # how many times each is to count; none = once
    untie: bool = False  # give the head a matrix of its own, where the embedding that is adapted is the head too

    def check(self):
        """Raise ValueError for values that cannot work."""
        if self.shares and len(self.shares) != len(self.adapter):
            raise ValueError(f'shares={self.shares}: takes one for each adapter, {len(self.adapter)}')


@dataclass
class CombineSettings(MergeSettings):
    def check(self):
        """Raise ValueError for values that cannot work."""
        super().check()
        if len(self.adapter) < 2 or self.untie:
            raise ValueError(f'adapter: {len(self.adapter)} given: takes two or more, --adapter=DIR for each, and no untie')


# -----------------------------------------------------------------------------
# Factorize

SAMPLE = 2 ** 16  # tokens to measure inputs and losses on


def dense_layers(model):
    """{name: layer} of the dense matrices of the blocks; in a mixture of experts those of attention."""
    return {f'blocks.{name}': layer for name, layer in model.blocks.named_modules() if isinstance(layer, nn.Linear) and '.mlp.shared.' not in name}


@torch.no_grad()
def input_moments(model, data):
    """{name: E[x·xᵀ] (n_in, n_in)} of the inputs x of every dense layer of the blocks, over at most SAMPLE tokens of a Mixture, padding left out."""
    sums, rows, layers, tokens = {}, max(1, SAMPLE // model.cfg.block_size), dense_layers(model), 0

    def watch(name):
        def hook(layer, args):
            x = args[0][real].double()  # (B, T, n_in) → (N, n_in); float32 would round by more than decompose's ridge
            sums[name] = sums.get(name, 0) + x.T @ x
        return hook
    handles = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    model.eval()
    for first in range(0, rows, 8):
        x, y, *more = (torch.from_numpy(a) for a in data.rows(range(first, min(first + 8, rows))))
        real = y >= 0  # for watch()
        tokens += int(real.sum())
        model.hidden(x, **more_inputs(model, more))
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
    keep this share of it. A record says what was kept of a matrix; a bias stays with the outer factor. Raises UserError for a network with
    settings that are not known here.
    """
    refuse_unknown(model.cfg, 'factorized')
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

@dataclass
class Old:
    """A network to operate on, and what belongs to it."""
    model: Transformer
    settings: dict  # of its run; {} of weights of others
    moments: dict  # {name: {what: tensor}} of its optimizer
    state: dict  # state.json
    data: tuple | None  # (training Mixture, validation Sources)
    tokenizer: tuple  # (description, folder of its files)
    begin: tuple  # the start token before a text, (id,) or ()


def read(s, where, encoder=False, untie=False):
    """
    The Old network of `where`, with encoder=True an encoder-decoder too; untie as origin.read_model() has it. Raises UserError for what has no layers,
    is in the middle of a guided start, or is not of the data's tokenizer.
    """
    if os.path.isdir(s.out_dir) and os.listdir(s.out_dir):
        raise UserError(f'out_dir={s.out_dir}: holds something already: give a new directory')
    cfg, weights, folder = read_model(where, encoder=encoder, untie=untie)
    if cfg.arch == 'markov':
        raise UserError(f'from={where}: a Markov chain has no layers: give a transformer')
    if cfg.rank_guide:
        raise UserError(f'from={where}: was saved in the middle of its guided start (rank_guide): let that run go on to the end of it')
    known = hub.knows(where)
    state, moments = ({}, {}) if known else (checkpoint.load_state(folder), checkpoint.read_moments(folder))
    data = open_data(s, where, cfg, state)
    files = data[0].sources[0].files if data else None
    # weights of others go with the tokenizer of the data where there are any
    tokenizer = (state['tokenizer'], folder) if state else (files.meta['tokenizer'], files.folder) if files else hub.tokenizer(where)[::-1]
    begin = tuple(state.get('begin', ()))
    if known and not files and not cfg.n_encoder_layer:
        begin = load_tokenizer(*tokenizer).bos()  # as sample.load() has it
    return Old(fill(cfg, weights, where), state.get('settings', {}), moments, state, data, tokenizer, begin)


def open_data(s, where, cfg, state):
    """(training Mixture, validation Sources) of s.dataset; None if there is none. Raises UserError for one of another tokenizer than that of `where`."""
    settings = state.get('settings', {})
    name = settings.get('dataset', 'none') if s.dataset == 'auto' else s.dataset
    if name == 'none':
        print('no data; --dataset=NAME would measure losses')
        return None
    try:
        data = Mixture(name, 'train', cfg.block_size, 0, settings.get('packing', 'stream'), settings.get('mix_by', 'tokens'),
                       objective=find_objective(settings, cfg), bos=tuple(state.get('begin', ())))
    except UserError as error:
        if s.dataset != 'auto':
            raise
        print(f'no losses: {error}')
        return None
    return data, validation_sources(where, cfg, name)


def validation(cfg, val):
    """Settings of the losses: about SAMPLE validation tokens, or all where there are no more."""
    count = max(1, SAMPLE // cfg.block_size // EVAL_ROWS)
    return {'eval_iters': 0 if all(source.rows <= EVAL_ROWS * count for source in val) else count, 'batch_size': 4}


def losses(model, val):
    """{'val_loss', 'val_bpb'} of a model."""
    return evaluate(model, val, SimpleNamespace(**validation(model.cfg, val), dtype='float32'), Ranks('auto', torch.device('cpu')))


def write(s, command, old, cfg, weights, names=None):
    """
    Print what has become of `old`, and write it: checkpoint, settings.json and log.jsonl, as train.py does of a run of no steps.
    names: {tensor: the old one that it was}, whose optimizer's moments go along.
    """
    new = fill(cfg, weights, s.out_dir)
    before, after = (losses(model, old.data[1]) if old.data else {} for model in (old.model, new))
    for what, size in ('parameters', Transformer.num_params), ('training FLOPs a token', Transformer.flops_per_token):
        print(f'{what:24}{size(old.model):14,} → {size(new):14,}  {size(new) / size(old.model) - 1:+.1%}')
    for name in after:
        print(f'{name:24}{before[name]:14.4f} → {after[name]:14.4f}  {after[name] - before[name]:+.4f}')
    plain = dataclasses.asdict(LoraConfig())  # whatever there was is merged
    settings = old.settings | plain | dataclasses.asdict(cfg) | {'out_dir': s.out_dir, 'init_from': s.from_, 'max_iters': 0}
    if old.data:  # so that compare.py knows what the loss is of
        settings |= validation(cfg, old.data[1]) | ({} if s.dataset == 'auto' else {'dataset': s.dataset})
    description, folder = old.tokenizer
    state = {'step': 0, 'model': dataclasses.asdict(cfg), 'settings': settings, 'tokenizer': description, 'torch': torch.__version__,
             'begin': list(old.begin), 'surgery': command,
             'of_step': old.state.get('of_step', old.state.get('step', 0)), 'flops': old.state.get('flops', 0.0)}
    moments = {name: old.moments[origin] for name, origin in (names or {}).items() if origin in old.moments}
    tokenizer_files = [os.path.join(folder, name) for name in description.get('files', ())]
    write_run(s.out_dir, weights, checkpoint.pack_moments(moments), state, tokenizer_files, after)
    print(f'written: {s.out_dir}; python train.py --init_from={s.out_dir} --out_dir={s.out_dir.rstrip("/")}_tuned')


def write_run(out_dir, weights, moments, state, tokenizer_files, losses=None):
    """A run of no steps as the new folder out_dir, whole or not at all: its checkpoint, settings.json and log.jsonl."""
    checkpoint.check_finite(weights, out_dir)
    with new_folder(out_dir, 'out_dir') as folder:
        checkpoint.write(os.path.join(folder, f'step_{0:08d}'), 0, weights, moments, state, tokenizer_files)
        write_json(os.path.join(folder, 'settings.json'), state['settings'])
        if losses:
            record = {'step': 0, 'tokens': 0, 'flops': 0, 'seconds': 0, **losses}
            append(os.path.join(folder, 'log.jsonl'), json.dumps(record) + '\n')


# -----------------------------------------------------------------------------
# Commands

def run_inherit(s):
    old = read(s, s.from_)
    weights, layers = old.model.state_dict(), parse_layers(s.layers, old.model.cfg.n_layer)
    cfg, taken = take_layers(old.model.cfg, weights, layers)
    torch.manual_seed(s.seed)
    drawn, fresh = make_model(cfg).state_dict(), set()
    for part in filter(None, s.fresh.split(',')):
        found = {name for name in taken if re.search(rf'(^|\.){re.escape(part)}(_\d)?\.', name)}
        if not found:
            parts = sorted({re.sub(r'_\d$', '', part) for name in taken for part in name.split('.')[:-1] if not part.isdecimal()} - {'blocks'})
            raise UserError(f'fresh={s.fresh}: {part!r} is no part of this network: takes {", ".join(parts)}')
        fresh |= found
    print(f'blocks {", ".join(map(str, layers))} of {old.model.cfg.n_layer}' + (f'; drawn anew: {s.fresh}, {len(fresh)} tensors' if fresh else ''))
    names = {name: origin for name, origin in layer_names(weights, layers).items() if name not in fresh}
    write(s, 'inherit', old, cfg, taken | {name: drawn[name] for name in fresh}, names)


def run_grow(s):
    old = read(s, s.from_)
    if s.n_layer <= old.model.cfg.n_layer:
        raise UserError(f'n_layer={s.n_layer}: the network has {old.model.cfg.n_layer} blocks already: give more, or use surgery.py inherit')
    layers, silent = grown_layers(old.model.cfg, s.n_layer, s.how)
    print('blocks ' + ', '.join(f'{layer}{" silent" if n in silent else ""}' for n, layer in enumerate(layers)))
    write(s, 'grow', old, *grow(old.model.cfg, old.model.state_dict(), s.n_layer, s.how))


def run_widen(s):
    old = read(s, s.from_)
    torch.manual_seed(s.seed)
    cfg, weights = widen(old.model.cfg, old.model.state_dict(), s.n_embd, s.n_head, s.d_ff)
    if old.model.cfg.tie and not cfg.tie:
        print('embedding and head are two matrices now: LayerNorm cannot be widened exactly with them tied')
    write(s, 'widen', old, cfg, weights)


def run_average(s):
    folders = [folder for where in s.from_ for folder in (sorted(glob.glob(where)) if glob.has_magic(where) else [where])]
    if len(folders) < 2:
        raise UserError(f"from={', '.join(s.from_)}: {len(folders)} found: give two or more, --from=DIR for each or a pattern as --from='out/run/step_*'")
    old = read(s, folders[-1], encoder=True)
    found = []
    for where in folders[:-1]:
        cfg, weights, folder = read_model(where, encoder=True)
        is_same = True
        with suppress(UserError):  # not known, or not to be had here
            is_same = same_ids(old.tokenizer, tokenizer_of(where, folder), is_padded=hub.knows(where))
        if not is_same:
            raise UserError(f'from={where}: has another tokenizer than {folders[-1]}: leave it out')
        found.append((cfg, weights))
    found.append((old.model.cfg, old.model.state_dict()))
    print(f'the mean of {", ".join(folders)}; beside it, the last of these:')
    write(s, 'average', old, *average(*zip(*found), folders))


def run_factorize(s):
    old = read(s, s.from_)
    low_rank = [name for name, layer in old.model.named_modules() if isinstance(layer, LowRank)]
    if low_rank:
        raise UserError(f'from={s.from_}: {low_rank[0]} is low-rank already: give the dense network')
    plain = {f.name: f.default for f in dataclasses.fields(ModelConfig) if f.name.startswith('rank_') and f.name not in ('rank_embed', 'rank_head')}
    cfg = dataclasses.replace(old.model.cfg, **plain | {'rank_qk': s.rank_qk, 'rank_vo': s.rank_vo, 'rank_mlp': s.rank_mlp, 'ranks': {}})
    check(cfg)
    with torch.device('meta'):
        uniform = {name: layer.down.out_features for name, layer in make_model(cfg).named_modules() if isinstance(layer, LowRank)}
    weights, records = factorize(old.model, uniform, s.energy, input_moments(old.model, old.data[0]) if old.data else None)
    if s.energy:
        cfg = dataclasses.replace(cfg, ranks={r['name']: r['rank'] for r in records if r['rank']})
        if not cfg.ranks:
            raise UserError(f'energy={s.energy:g}: two factors that keep so much would not be smaller than any of the matrices: lower it')
    print(report(records, bool(old.data)) + '\n')
    write(s, 'factorize', old, cfg, weights)


def run_upcycle(s):
    old = read(s, s.from_, encoder=True)
    torch.manual_seed(s.seed)
    write(s, 'upcycle', old, *upcycle(old.model.cfg, old.model.state_dict(), s.n_expert, s.n_expert_active, s.expert_shared, s.expert_bias))


def run_merge(s):
    old = read(s, s.from_, encoder=True, untie=s.untie)
    if not s.adapter and 'base' not in old.state:
        raise UserError(f'from={s.from_}: holds a whole network: give what to add to it, --adapter=DIR')
    model = fill(dataclasses.replace(old.model.cfg), old.model.state_dict(), s.from_)
    if s.adapter:
        names = add_adapters(model, s.adapter, s.from_)
        model.lora.shares = dict(zip(names, s.shares or [1.0] * len(names)))
        if s.untie:
            adapters.untie(model)
        adapters.merge(model)
    write(s, 'merge', old, model.cfg, adapters.base_state(model))


def common_begin(states):
    """The start token of several runs, from their state.json; () where they differ."""
    found = {tuple(state.get('begin', ())) for state in states}
    return found.pop() if len(found) == 1 else ()


def run_combine(s):
    old = read(s, s.from_, encoder=True)
    model = old.model
    folders = [split_name(entry)[1] for entry in s.adapter]
    base = {'from': s.from_, 'weights': adapters.fingerprint(model.state_dict())}
    both = adapters.combine([read_saved(folder, model.cfg, model.state_dict(), s.from_) for folder in folders], s.shares or [1.0] * len(folders))
    adapters.add(model, both, ', '.join(folders), 'default')  # whether it fits
    states = []
    for folder in folders:
        if not peft_files.is_one(folder):
            states.append(checkpoint.load_state(checkpoint.find(folder, 'best')))
    runs = [state['settings'] for state in states]
    settings = {name: value for name, value in (runs or [{}])[0].items() if name in ('dataset', 'objective', 'denoisers', 'packing')
                and all(run.get(name) == value for run in runs)}
    description, folder = old.tokenizer
    state = {'step': 0, 'model': dataclasses.asdict(model.cfg), 'settings': settings, 'tokenizer': description, 'torch': torch.__version__,
             'begin': list(common_begin(states)), 'surgery': 'combine',
             'base': base, 'lora': both.description()}
    tokenizer_files = [os.path.join(folder, name) for name in description.get('files', ())]
    write_run(s.out_dir, both.tensors, {}, state, tokenizer_files)
    print(f'written: {s.out_dir}; python sample.py --out_dir={s.out_dir}')


def main():
    command, s = configure_command({'inherit': (run_inherit, InheritSettings), 'grow': (run_grow, GrowSettings), 'widen': (run_widen, WidenSettings),
                                    'average': (run_average, AverageSettings), 'factorize': (run_factorize, FactorizeSettings),
                                    'upcycle': (run_upcycle, UpcycleSettings), 'merge': (run_merge, MergeSettings),
                                    'combine': (run_combine, CombineSettings)})
    command(s)


if __name__ == '__main__':
    run_main(main)
