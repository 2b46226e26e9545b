# The Llama architecture at the size of llama2.c's stories110M: 109,529,856 parameters with 32,000 tokens; the
# rest as in llama_15m.py
from config.llama_15m import *  # noqa: F403

out_dir = 'out/llama_110m'
n_layer, n_head, n_embd, d_ff = 12, 12, 768, 2048
block_size = 1024
batch_size, gradient_accumulation_steps = 16, 8
eval_iters = 267
