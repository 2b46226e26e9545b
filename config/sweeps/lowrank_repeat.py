# The finalists on one novel of 0.1 million tokens, read about 20 times
#   python prepare.py Doyle_Lost_1912.txt --out=data/lost_world --tokenizer=data/novels/tokenizer.model --val_fraction=0.1
#   python compare.py --sweep=config/sweeps/lowrank_repeat.py --jobs=2
from config.sweeps.lowrank_novels_final import *  # noqa: F403
from config.sweeps.lowrank_novels_final import arms as _arms

out = 'out/sweeps/lowrank_repeat'
seeds = [1, 2, 3]
arms = {name: arm | {'dataset': 'lost_world'} for name, arm in _arms.items()}
