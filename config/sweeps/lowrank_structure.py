# Low rank in all matrices, and what gives them full rank again or bounds their step: leads of 200 steps on
# novels, every arm for the FLOPs of the dense one
#   python compare.py --sweep=config/sweeps/lowrank_structure.py --jobs=2
from config.sweeps.lowrank import _wide, base, budget  # noqa: F401

_wide = _wide | {'dataset': 'novels'}
_rates = {'muon_lr': [0.02, 0.04]}
arms = {
    'dense': {'dataset': 'novels', 'max_iters': 200, 'muon_lr': [0.05], 'lr_scale': [{r'attn\.[qk]\.': 2}]},
    'low_rank': _wide | _rates,
    'identity': _wide | _rates | {'rank_identity': True},
    'blocks': _wide | _rates | {'rank_blocks': 16},
    # the steps of low_rank; what the guides cost comes on top
    'guide': _wide | _rates | {'rank_guide': 50, 'budget': 'tokens', 'max_iters': 193},
    'spectron': _wide | {'optimizer': 'spectron', 'muon_lr': [0.05, 0.1, 0.2]},
}
