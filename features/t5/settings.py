"""
Encoder-decoders and their objectives (T5, UL2, ROT5): a bidirectional encoder reads the source, and the
decoder attends to its output. Objectives: denoising, prefix, pairs.

    python train.py config/rot5_cpu.py
"""
from dataclasses import dataclass, fields
from typing import Literal

from batches import DataConfig
from configurator import UserError
from features import default_of
from features.t5.objectives import parse_denoisers
from model import ModelConfig, only_in_training

# Settings that the blocks of an encoder-decoder act on. Any other one, such as a new one, has to be at its
# default
READ = {
    'vocab_size', 'block_size', 'n_layer', 'n_encoder_layer', 'n_head', 'n_kv_head', 'n_embd', 'head_dim',
    'd_ff', 'position', 'rope_theta', 'rope_scaling', 'norm', 'norm_eps', 'mlp', 'mlp_norm', 'qk_norm',
    'n_expert', 'softcap', 'zero_init', 'embed_norm', 'depth_scale', 'value_residual', 'tie', 'bias',
    'qkv_bias', 'init_std', 'rank_qk', 'rank_vo', 'rank_mlp', 'rank_embed', 'rank_head', 'ranks', 'rank_act',
}

UNLIMITED = 2 ** 31


@dataclass
class T5Config(ModelConfig):
    source_size: int = 0  # context length of the encoder in tokens; 0 = block_size. With position='relative'
    # both are lengths of rows in training alone: such a network reads and writes texts of any length
    cross_rope: Literal['none', 'same', 'offset'] = 'none'  # rotary positions in cross-attention. none: none,
    # as in T5Gemma; same: source and target both start at 0, as in ROT5; offset: the target continues the
    # source's positions
    rel_per_layer: bool = False  # for position='relative': every block has a position bias of its own, as in
    # UMT5 (arXiv 2304.09151), instead of one for the encoder and one for the decoder
    t5_scale: bool = False  # T5's init and scaling: the embedding starts at N(0, 1); logits of a tied head
    # are divided by sqrt(n_embd); attention logits are not divided by sqrt(head_dim), so queries start
    # smaller; output matrices start at 1/sqrt(inputs) at any depth

    @property
    def source_context(self):
        """Context length of the encoder in tokens, 0 without an encoder."""
        return (self.source_size or self.block_size) if self.n_encoder_layer else 0

    @property
    def source_limit(self):
        """The most tokens that the encoder can read. T5's relative positions know every distance."""
        return UNLIMITED if self.position == 'relative' else self.source_context

    @property
    def target_limit(self):
        """The most tokens that the decoder can read."""
        return UNLIMITED if self.position == 'relative' else self.block_size

    def check(self):
        """Raise ValueError for values that cannot work."""
        for name in ('n_encoder_layer', 'source_size'):
            if getattr(self, name) < 0:
                raise ValueError(f'{name}={getattr(self, name)}: must not be negative')
        if self.cross_rope != 'none' and not (self.n_encoder_layer and self.position == 'rope'):
            raise ValueError(f'cross_rope={self.cross_rope}: turns heads between an encoder and a decoder: '
                             "set n_encoder_layer, and position='rope'")
        if self.rel_per_layer and not (self.n_encoder_layer and self.position == 'relative'):
            raise ValueError('rel_per_layer=True: is for the position biases of an encoder-decoder: set '
                             "n_encoder_layer, and position='relative'")
        for f in fields(ModelConfig):
            value, is_read = getattr(self, f.name), f.name in READ or f.name in only_in_training(self)
            if self.n_encoder_layer and not is_read and value != default_of(f):
                raise ValueError(f'{f.name}={value}: an encoder-decoder does not act on it: leave it out')
        is_new = getattr(self, 'init_from', 'auto') in ('auto', 'scratch')  # else init_from has a network
        if self.n_encoder_layer or not is_new:
            return
        if self.source_size:
            raise ValueError(f'source_size={self.source_size}: is the context of an encoder: '
                             'set n_encoder_layer too')
        if self.t5_scale:
            raise ValueError('t5_scale=True: is the scaling of an encoder-decoder: set n_encoder_layer too')


@dataclass
class ObjectiveConfig(DataConfig):
    denoisers: str | list = 'ul2r'  # for objective=ul2: t5, ul2r, ul2, or [[span, rate, weight, mode], …] as
    # in features/t5/objectives.py

    def check(self):
        """Raise ValueError for values that cannot work."""
        parse_denoisers(self.denoisers)
        if self.objective != 'causal' and self.arch == 'markov':
            raise ValueError(f"objective={self.objective}: arch='markov' has no source: leave it out")
        if self.objective == 'causal' and self.n_encoder_layer and not self.plan:
            raise ValueError(f"n_encoder_layer={self.n_encoder_layer}: objective='causal' leaves the "
                             "encoder without a source: set it to ul2, prefix or seq2seq")


def adopt_source_size(s, cfg, where):
    """
    Set the encoder's context length of a run that starts from the weights of a model with the ModelConfig
    cfg: it was trained with one length, but the length is not a weight, so the user may choose another.
    """
    if 'source_size' in s.given and cfg.position == 'learned' and s.source_size > cfg.source_context:
        raise UserError(f'source_size={s.source_size}: '
                        f'the weights in {where} know {cfg.source_context} positions: lower it')
    if 'source_size' not in s.given or not s.source_size:
        s.source_size = cfg.source_context
