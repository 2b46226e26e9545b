# make demo: a low-rank decoder with exactly as many weights in its blocks as demo_dense.py, but wider
from config.demo_dense import *  # noqa: F403

out_dir = 'out/demo_lowrank'
n_head, n_embd = 8, 256
rank_qk = rank_vo = rank_mlp = 96
