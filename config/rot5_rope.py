# ROT5 with rotary positions, between target and source too (both count from 0): 223,190,016 parameters with
# 32,502 tokens
from config.rot5 import *  # noqa: F403

position, cross_rope = 'rope', 'same'
