# The low-rank half of "Are Small Language Models Low-rank?": wider (1152), every matrix of the blocks
# low-rank, a norm inside the MLP and a low-rank untied head: 25,972,992 parameters in four blocks, 96,604,288
# with 49,954 tokens. The rest as in lowrank28m_dense.py
from config.lowrank28m_dense import *  # noqa: F403

out_dir = 'out/lowrank28m'
n_head, n_embd, d_ff = 18, 1152, 2880
rank_qk, rank_vo, rank_mlp, rank_head = 256, 256, 512, 256
mlp_norm, tie = True, False
