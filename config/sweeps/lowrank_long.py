# The finalists of config/sweeps/lowrank_novels.py at four times the tokens, with their rates
#   python compare.py --sweep=config/sweeps/lowrank_long.py --jobs=2
from config.sweeps.lowrank_novels_final import *  # noqa: F403
from config.sweeps.lowrank_novels_final import arms as _arms

out = 'out/sweeps/lowrank_long'
seeds = [1, 2, 3]
arms = _arms | {'dense': {**_arms['dense'], 'max_iters': 2000}}
