# Low rank in all matrices, with and without an activation between the factors: 200 steps on novels, three
# seeds, every arm for the FLOPs of the dense one. Nine other arms lost to these, and their settings were
# deleted: commit ef0ee9f ran them (docs/results/low-rank-structure.md)
#   python compare.py --sweep=config/sweeps/lowrank_structure.py --jobs=2
from config.sweeps.lowrank import _wide, base, budget  # noqa: F401

seeds = [1, 2, 3]

_wide = _wide | {'dataset': 'novels', 'muon_lr': [0.02, 0.04]}
_dense = {'dataset': 'novels', 'muon_lr': [0.05], 'lr_scale': [{r'attn\.[qk]\.': 2}]}
arms = {
    'dense': _dense | {'max_iters': 200},
    'qk24': _dense | {'rank_qk': 24},
    'low_rank': _wide,
    'silu': _wide | {'rank_act': 'silu'},
}
