# ROT5 with rotary positions and 4 heads of keys and values for 12 of queries: 194,878,464 parameters with
# 32,502 tokens
from config.rot5_rope import *  # noqa: F403

n_kv_head = 4
