# Beside the finalists on novels: every size of MLP at the FLOPs of 500 dense steps, dense and with rank 24 in
# queries and keys, so that the best size of the one is compared with the best of the other, on three seeds;
# and rank 24 for the dense arm's seconds
#   python compare.py --sweep=config/sweeps/lowrank_size.py --jobs=2
from config.sweeps.lowrank_novels_final import *  # noqa: F403
from config.sweeps.lowrank_novels_final import arms as _arms

seeds = [1]
_dense, _qk24 = _arms['dense'], _arms['qk24']
arms = {'dense': _dense}  # its FLOPs are the budget
for _width in (320, 224, 128, 64):
    _seeds = {'seeds': [1, 2, 3]} if _width == 128 else {}  # dense is at its best there
    arms |= {f'dense{_width}': _dense | {'d_ff': _width} | _seeds,
             f'qk24_{_width}': _qk24 | {'d_ff': _width} | _seeds}
# a step takes 0.946 of the dense one's time
arms |= {'qk24_416': _qk24 | {'d_ff': 416}, 'qk24_seconds': _qk24 | {'budget': 'tokens', 'max_iters': 528}}
