# ROT5's T5-base: GELU, 223,190,784 parameters with its 32,502 tokens (Mistral's and 502 of its own)
from config.t5_base import *  # noqa: F403

mlp = 'gelu'
