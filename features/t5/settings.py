"""
Encoder-decoders (T5): an encoder reads a source in both directions, and the decoder attends to its output.
"""
from dataclasses import dataclass
from typing import Literal

from model import ModelConfig


@dataclass
class T5Config(ModelConfig):
    source_size: int = 0  # context of the encoder in tokens; 0 = block_size
    cross_rope: Literal['none', 'same', 'offset'] = 'none'  # rotary positions in cross-attention. none: as
    # in T5Gemma; same: source and target count from 0, as in ROT5; offset: the target counts on from its end
    t5_scale: bool = False  # T5's init and scaling: the embedding starts at N(0, 1) and a tied head's logits
    # are over sqrt(n_embd); attention logits are not over sqrt(head_dim), queries start that much smaller;
    # output matrices start at 1/sqrt(inputs) whatever the depth

    @property
    def source_context(self):
        """Context of the encoder in tokens, 0 without one."""
        return (self.source_size or self.block_size) if self.n_encoder_layer else 0

    def check(self):
        """Raise ValueError for values that cannot work."""
        for name in ('n_encoder_layer', 'source_size'):
            if getattr(self, name) < 0:
                raise ValueError(f'{name}={getattr(self, name)}: must not be negative')
        if self.cross_rope != 'none' and not (self.n_encoder_layer and self.position == 'rope'):
            raise ValueError(f'cross_rope={self.cross_rope}: turns heads between an encoder and a decoder: '
                             "set n_encoder_layer, and position='rope'")
        is_new = getattr(self, 'init_from', 'auto') in ('auto', 'scratch')  # else init_from has a network
        if self.n_encoder_layer or not is_new:
            return
        if self.source_size:
            raise ValueError(f'source_size={self.source_size}: is the context of an encoder: '
                             'set n_encoder_layer too')
        if self.t5_scale:
            raise ValueError('t5_scale=True: is the scaling of an encoder-decoder: set n_encoder_layer too')
