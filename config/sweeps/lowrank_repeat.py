# The finalists on one novel of a quarter of a million tokens, for 2, 4 and 8 epochs: each arm uses its best
# number of epochs
#   python prepare.py Doyle_Micah_1889.txt --out=data/micah --tokenizer=data/novels/tokenizer.model \
#       --val_fraction=0.1
#   python compare.py --sweep=config/sweeps/lowrank_repeat.py --jobs=2
from config.sweeps.lowrank_novels_final import arms as _arms
from config.sweeps.lowrank_novels_final import base  # noqa: F401

seeds = [1, 2, 3]
arms = {name: arm | {'dataset': 'micah', 'max_iters': [125, 250, 500]} for name, arm in _arms.items()}
