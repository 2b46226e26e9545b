# make demo: the same decoder, with queries and keys of rank 24. A smaller model makes more steps in the same
# time
from config.demo_dense import *  # noqa: F403

out_dir = 'out/demo_lowrank'
rank_qk = 24  # of 192; the kind of low rank that wins in docs/results/low-rank.md
