# config/sweeps/lowrank.py on novels
#   python prepare.py FOLDER_OF_NOVELS --out=data/novels --tokenizer=bpe:4096
#   python compare.py --sweep=config/sweeps/lowrank_novels.py --jobs=2
from config.sweeps.lowrank import *  # noqa: F403
from config.sweeps.lowrank import _rates
from config.sweeps.lowrank import arms as _arms

_best = {'qk24': _rates([0.02, 0.03, 0.05], [1, 2, 4, 8], rank_qk=24)}  # here its cross has another middle
arms = {name: [{'dataset': 'novels', **grid} for grid in grids] for name, grids in (_arms | _best).items()}
