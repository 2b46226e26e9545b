# Low rank in all matrices, and settings that give it full rank again or bound its step: 200 steps on novels,
# three seeds, every arm for the FLOPs of the dense one
#   python compare.py --sweep=config/sweeps/lowrank_structure.py --jobs=2
from config.sweeps.lowrank import _wide, base, budget  # noqa: F401

seeds = [1, 2, 3]

_rates = {'muon_lr': [0.02, 0.04]}
_wide = _wide | _rates | {'dataset': 'novels'}
_dense = {'dataset': 'novels', 'muon_lr': [0.05], 'lr_scale': [{r'attn\.[qk]\.': 2}]}
arms = {
    'dense': _dense | {'max_iters': 200},
    'dense_momentum_at_once': _dense | {'momentum_warmup': 0},
    'qk24': _dense | {'rank_qk': 24},
    'low_rank': _wide,
    'identity': _wide | {'rank_identity': True},
    'blocks': _wide | {'rank_blocks': 16},
    # the steps of low_rank; what the guides cost comes on top
    'guide': _wide | {'rank_guide': 50, 'budget': 'tokens', 'max_iters': 193},
    'first_block_dense': _wide | {'first_block_dense': True},
    'silu': _wide | {'rank_act': 'silu'},
    'silu_but_for_qk': _wide | {'rank_act': 'silu', 'rank_act_qk': 'none'},
    'decay_of_the_product': _wide | {'factor_decay': 'product'},
    'no_decay': _wide | {'factor_decay': 'none'},
    'spectron': _wide | {'optimizer': 'spectron', 'muon_lr': [0.05, 0.1, 0.2]},
}
