# Beside the finalists on novels: still smaller networks for the same FLOPs, and rank 24 for the dense arm's seconds
#   python compare.py --sweep=config/sweeps/lowrank_size.py --jobs=2
from config.sweeps.lowrank_novels_final import *  # noqa: F403
from config.sweeps.lowrank_novels_final import arms as _arms

seeds = [1, 2, 3]
arms = _arms | {
    'dense320': _arms['dense'] | {'d_ff': 320},
    'qk24_416': _arms['qk24'] | {'d_ff': 416},
    'qk24_320': _arms['qk24'] | {'d_ff': 320},
    'qk24_seconds': _arms['qk24'] | {'budget': 'tokens', 'max_iters': 528},  # a step takes 0.946 of the dense one's time
}
