# The finalists of config/sweeps/lowrank.py on five seeds, each with its best learning rates; finished runs of
# that sweep are reused
#   python compare.py --sweep=config/sweeps/lowrank_final.py --jobs=2
from config.sweeps.lowrank import base, budget  # noqa: F401

out = 'out/sweeps/lowrank'
seeds = [1, 2, 3, 4, 5]

_qk2 = {r'attn\.[qk]\.': 2}
arms = {
    'dense': {'muon_lr': [0.05], 'lr_scale': [_qk2]},
    'qk24': {'rank_qk': 24, 'muon_lr': [0.05], 'lr_scale': [_qk2]},
    'smaller_dense': {'d_ff': 416, 'muon_lr': [0.05], 'lr_scale': [_qk2]},
}
