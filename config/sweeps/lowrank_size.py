# Beside the finalists on novels: every size of MLP at the FLOPs of 500 dense steps, dense and with rank 24 in queries and keys, so that the best
# size of the one is compared with the best of the other; and rank 24 for the dense arm's seconds
#   python compare.py --sweep=config/sweeps/lowrank_size.py --jobs=2
from config.sweeps.lowrank_novels_final import *  # noqa: F403
from config.sweeps.lowrank_novels_final import arms as _arms

seeds = [1, 2, 3]
_dense, _qk24 = _arms['dense'], _arms['qk24']
arms = {
    'dense': _dense | {'seeds': [1]},  # its FLOPs are the budget
    'dense320': _dense | {'d_ff': 320},
    'qk24_320': _qk24 | {'d_ff': 320},
    'dense224': _dense | {'d_ff': 224},
    'qk24_224': _qk24 | {'d_ff': 224},
    'dense128': _dense | {'d_ff': 128},
    'qk24_128': _qk24 | {'d_ff': 128},
    'qk24_416': _qk24 | {'d_ff': 416, 'seeds': [1]},
    'qk24_seconds': _qk24 | {'budget': 'tokens', 'max_iters': 528, 'seeds': [1]},  # a step takes 0.946 of the dense one's time
}
