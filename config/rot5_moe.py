# ROT5 with 8 experts in place of every MLP, of which a token meets one: 987,749,376 parameters with 32,502
# tokens, 195 million for a token
from config.rot5_rope_gqa import *  # noqa: F403

n_expert = 8
