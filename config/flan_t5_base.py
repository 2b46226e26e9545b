# T5 1.1 and Flan-T5-base (Chung et al. 2022, arXiv 2210.11416): T5 with a gated MLP and a head of its own;
# 247,577,856 parameters with 32,128 tokens
from config.t5_base import *  # noqa: F403

mlp, d_ff, tie = 'geglu', 2048, False
