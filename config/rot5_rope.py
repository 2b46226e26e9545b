# ROT5 with rotary positions, also in cross-attention (source and target both start at 0): 223,190,016
# parameters with 32,502 tokens
from config.rot5 import *  # noqa: F403

position, cross_rope = 'rope', 'same'
