"""
Low-rank adapters (LoRA, DoRA, QLoRA) on top of frozen weights.

    python train.py --init_from=out/base --out_dir=out/lora --lora_rank=16 --learning_rate=1e-2
"""
import math
from dataclasses import dataclass
from typing import Literal

from features.refusals import refuse_beside


@dataclass
class LoraConfig:
    lora_alpha: float = 16.0  # the adapter's output is scaled by alpha / rank
    lora_rs: bool = False  # scale by alpha / sqrt(rank) instead, so that high ranks learn as fast as low
    # ranks (rsLoRA, Kalajdzievski 2023, arXiv 2312.03732)
    lora_targets: str = 'attn,mlp'  # layers to adapt: attn, mlp, embed, head, or matrix names of minnow (q,
    # attn.o, up, wte, …) or of Hugging Face models (c_attn, q_proj, wi, …); c_attn is one adapter for q, k
    # and v
    lora_dropout: float = 0.0  # dropout on the adapter's input
    lora_dora: bool = False  # train the magnitude and direction of each matrix row separately (DoRA, Liu et
    # al. 2024, arXiv 2402.09353); slower
    lora_store: Literal['auto', 'float32', 'bfloat16', 'float16', 'int8', 'nf4'] = 'auto'  # storage of the
    # frozen matrices of the blocks; auto = compute dtype, which halves the memory without changing the
    # results. int8 and nf4 (QLoRA, Dettmers et al. 2023, arXiv 2305.14314) round the weights: training losses
    # are those of the rounded model; sample.py and eval.py apply the adapter to the exact weights

    may_change = ('lora_dropout',)  # a resumed run may change it

    def check(self):
        """Raise ValueError for values that cannot work."""
        given = getattr(self, 'given', ())
        idle = sorted(name for name in given if name.startswith('lora_') and name != 'lora_rank')
        if idle and not self.lora_rank:
            raise ValueError(f'{idle[0]}={getattr(self, idle[0])}: belongs to adapters: set lora_rank too')
        if self.lora_rank < 0 or not 0 <= self.lora_dropout < 1:
            raise ValueError(f'lora_rank={self.lora_rank}, lora_dropout={self.lora_dropout}: '
                             'takes a rank of at least 0 and 0 <= dropout < 1')
        if not 0 < self.lora_alpha < math.inf:
            raise ValueError(f'lora_alpha={self.lora_alpha}: takes a number above 0')
        if not self.lora_rank:
            return
        refuse_beside(self, 'lora_rank', grow_every=0, arch='decoder')
        if self.shard and self.lora_store not in ('auto', 'float32'):
            raise ValueError(f'shard={self.shard}: does not go with lora_store={self.lora_store}: '
                             'leave it out')
