# ROT5-mini: 10 + 10 layers of 512, 46,814,208 parameters with 32,502 tokens
from config.rot5_rope import *  # noqa: F403

n_encoder_layer, n_layer = 10, 10
n_head, n_kv_head, n_embd, head_dim, d_ff = 16, 4, 512, 32, 512
