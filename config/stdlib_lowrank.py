# Low rank in all matrices, with exactly as many weights in the blocks as stdlib_dense.py, but wider
from config.stdlib_dense import *  # noqa: F403

out_dir = 'out/stdlib_lowrank'
n_head, n_embd = 8, 256
rank_qk = rank_vo = rank_mlp = 96
