# ROT5 with rotary positions and GQA (12 query heads, 4 key-value heads): 194,878,464 parameters with 32,502
# tokens
from config.rot5_rope import *  # noqa: F403

n_kv_head = 4
