# ROT5 with 8 experts instead of every MLP, one active per token: 987,749,376 parameters with 32,502 tokens,
# 195 million active per token
from config.rot5_rope_gqa import *  # noqa: F403

n_expert = 8
