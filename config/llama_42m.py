# The Llama architecture at the size of llama2.c's stories42M: 41,689,600 parameters with 32,000 tokens; the
# rest as in llama_15m.py
from config.llama_15m import *  # noqa: F403

out_dir = 'out/llama_42m'
n_layer, n_head, n_embd, d_ff = 8, 8, 512, 1376
block_size = 1024
batch_size, gradient_accumulation_steps = 16, 8
eval_iters = 267
