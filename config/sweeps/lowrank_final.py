# The finalists of config/sweeps/lowrank.py on five seeds, each at its best rates; what that sweep has run is taken over
#   python compare.py --sweep=config/sweeps/lowrank_final.py --jobs=2
from config.sweeps.lowrank import _qk, base, budget  # noqa: F401

out = 'out/sweeps/lowrank'
seeds = [1, 2, 3, 4, 5]

arms = {
    'dense': {'muon_lr': [0.05], 'lr_scale': [{_qk: 2}]},
    'qk24': {'rank_qk': 24, 'muon_lr': [0.03], 'lr_scale': [{_qk: 2}]},
}
