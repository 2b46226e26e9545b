# config/sweeps/lowrank_final.py on novels
from config.sweeps.lowrank_final import *  # noqa: F403
from config.sweeps.lowrank_final import arms as _arms

out = 'out/sweeps/lowrank_novels'
arms = {name: {'dataset': 'novels', **arm} for name, arm in _arms.items()}
arms['qk24']['muon_lr'] = [0.03]
