"""
Make a new model from a trained one.

    python surgery.py inherit --from=out/big --out_dir=out/small --layers=0-11
    python surgery.py inherit --from=hf:T5 --out_dir=out/small --layers=0-5 --encoder_layers=0-11
    python surgery.py grow --from=out/small --out_dir=out/big --n_layer=12 --how=zero
    python surgery.py widen --from=out/small --out_dir=out/wide --n_embd=512 --n_head=8
    python surgery.py average --from='out/run/step_*' --out_dir=out/mean
    python surgery.py factorize --from=out/dense --out_dir=out/low --rank_qk=48 --rank_vo=64
    python surgery.py factorize --from=hf:FOLDER --out_dir=out/low --energy=0.95
    python surgery.py upcycle --from=out/dense --out_dir=out/moe --n_expert=8
    python surgery.py merge --from=out/lora --out_dir=out/merged
    python surgery.py combine --from=out/base --adapter=A --adapter=B --out_dir=out/both
    python train.py --init_from=out/small --out_dir=out/small_tuned      # then train on

    inherit     keep some of the layers: the first ones, or others (0,2,4 or last:6)
    grow        add layers; with --how=zero the model computes the same function
    widen       enlarge n_embd, n_head or d_ff; the model computes the same function
    average     average the weights of several models
    factorize   factorize matrices to low rank: given ranks, or a rank for each matrix by its energy
    upcycle     convert to a mixture of experts; the model computes the same function
    merge       merge an adapter into its base model
    combine     combine several adapters into one

Each command writes a run with one checkpoint at step 0, and prints the size and loss of the old and the new
model.
"""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))
import features  # noqa: I001 — first: your random.py or data/ then hides no module of ours or of a library
if __name__ == '__main__':
    features.start(__file__)

from dataclasses import dataclass, field
from typing import Literal

from configurator import FilePath, run_main
from features.commands import configure_command
from features.growth import commands
from features.lora import combine  # lora
from features.moe import upcycle  # moe


@dataclass
class SurgerySettings:
    from_: FilePath = ''  # the old model: a run (its best checkpoint), a checkpoint, hf:FOLDER, gpt2
    out_dir: FilePath = ''  # folder for the new model; it must not exist yet
    dataset: FilePath | dict = 'auto'  # data to measure the losses on; auto = the data of the old run, if
    # they are there; none = no losses

    def check(self):
        """Raise ValueError for values that cannot work."""
        for name in ('from_', 'out_dir'):
            if not getattr(self, name):
                raise ValueError(f'{name.rstrip("_")}: is not given: '
                                 'python surgery.py COMMAND --from=DIR --out_dir=NEW …')


@dataclass
class InheritSettings(SurgerySettings):
    layers: str = ''  # blocks to copy: 0-11, 0,2,4, first:6, last:6 or middle:6; in any order, also repeated
    encoder_layers: str = ''  # blocks to copy of an encoder-decoder's encoder; '' = as layers
    fresh: str = ''  # parts to re-initialize instead, separated by commas: attn, mlp, norm, norm_f, wpe.
    # Inheritune's own code forgets wpe,norm_f
    seed: int = 1337  # seed for the re-initialized parts

    def check(self):
        """Raise ValueError for values that cannot work."""
        if not self.layers:
            raise ValueError('layers: is not given: --layers=0-11, 0,2,4 or last:6')


@dataclass
class GrowSettings(SurgerySettings):
    n_layer: int = 0  # new number of blocks
    how: Literal['stack', 'interleave', 'zero'] = 'stack'  # source of the new blocks. stack: repeat all
    # blocks on top; interleave: repeat each block several times; zero: the same, with output matrices of
    # zero, so that the model computes the same function

    def check(self):
        """Raise ValueError for values that cannot work."""
        if not 1 <= self.n_layer <= 10000:
            raise ValueError(f'n_layer={self.n_layer}: takes the new number of blocks, at most 10,000')


@dataclass
class WidenSettings(SurgerySettings):
    n_embd: int = 0  # new width; 0 = unchanged
    n_head: int = 0  # new number of heads of the same width; 0 = unchanged
    d_ff: int = 0  # new hidden width of the MLP; 0 = unchanged
    seed: int = 1337  # seed for the weights that read the new dimensions

    def check(self):
        """Raise ValueError for values that cannot work."""
        if not (self.n_embd or self.n_head or self.d_ff):
            raise ValueError('n_embd, n_head, d_ff: none is given: give at least one')


@dataclass
class AverageSettings(SurgerySettings):
    from_: list[FilePath] = field(default_factory=list)  # the old models: --from=DIR for each, or a pattern:
    # --from='out/run/step_*'


@dataclass
class FactorizeSettings(SurgerySettings):
    dataset: FilePath | dict = 'auto'  # data to weight the errors by and to measure the losses on; auto = the
    # data of the old run, if they are there; none = plain SVD, no losses
    rank_qk: int = 0  # rank of queries and keys; 0 = dense
    rank_vo: int = 0  # rank of values and attention output; 0 = dense
    rank_mlp: int = 0  # rank of all MLP matrices; 0 = dense
    energy: float = 0.0  # instead of ranks: each matrix gets the smallest rank, a multiple of 8, that keeps
    # this share of its energy (with a dataset: of the energy of its outputs); it stays dense if factors would
    # not be smaller

    def check(self):
        """Raise ValueError for values that cannot work."""
        uniform = [name for name in ('rank_qk', 'rank_vo', 'rank_mlp') if getattr(self, name)]
        for name in uniform:
            if getattr(self, name) < 0:
                raise ValueError(f'{name}={getattr(self, name)}: must not be negative')
        if bool(uniform) == bool(self.energy):
            named = uniform[0] if uniform else 'rank_qk, rank_vo, rank_mlp'
            raise ValueError(f'energy={self.energy:g}, {named}: give either energy or ranks')
        if not 0 <= self.energy < 1:
            raise ValueError(f'energy={self.energy:g}: takes 0 < energy < 1')


@dataclass
class UpcycleSettings(SurgerySettings):
    n_expert: int = 8  # number of experts; each starts as a copy of the MLP
    n_expert_active: int = 1  # experts per token
    expert_bias: float = 0.0  # load balancing without a loss, as in train.py
    seed: int = 1337  # seed for the routers

    def check(self):
        """Raise ValueError for values that cannot work."""
        if self.n_expert < 2:
            raise ValueError(f'n_expert={self.n_expert}: takes 2 or more')


@dataclass
class MergeSettings(SurgerySettings):
    adapter: list[FilePath] = field(default_factory=list)  # adapters to merge into --from: runs of train.py
    # --lora_rank or PEFT folders; none = --from is itself a run with an adapter
    shares: list[float] = field(default_factory=list)  # weight of each adapter; none = 1 for all
    untie: bool = False  # give the head its own matrix, if the adapted embedding is tied to it

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
            raise ValueError(f'adapter: {len(self.adapter)} given: takes two or more, '
                             '--adapter=DIR for each, and no untie')


COMMANDS = {
    'inherit': (commands.run_inherit, InheritSettings),
    'grow': (commands.run_grow, GrowSettings),
    'widen': (commands.run_widen, WidenSettings),
    'average': (commands.run_average, AverageSettings),
    'factorize': (commands.run_factorize, FactorizeSettings),
    'upcycle': (upcycle.run, UpcycleSettings),  # moe
    'merge': (combine.run_merge, MergeSettings),  # lora
    'combine': (combine.run_combine, CombineSettings),  # lora
}


def main():
    command, s = configure_command(COMMANDS)
    command(s)


if __name__ == '__main__':
    run_main(main)
