# The arms of config/sweeps/rot5.py on three seeds, each at its best rates; what that sweep has run is taken
# over
#   python compare.py --sweep=config/sweeps/rot5_final.py --jobs=2
from config.sweeps.rot5 import arms as _searched
from config.sweeps.rot5 import base, budget  # noqa: F401

out = 'out/sweeps/rot5'
seeds = [1, 2, 3]

_best = {'t5': (1e-3, 0.12), 'rope': (2e-3, 0.36), 'gqa': (1e-3, 0.12),
         'moe': (2e-3, 0.12), 'moe_losses': (1e-3, 0.12), 'rope_none': (2e-3, 0.12),
         'rope_offset': (2e-3, 0.36), 'decoder': (2e-3, 0.12)}
arms = {name: _searched[name][0] | {'learning_rate': [rate], 'head_lr': [head]}
        for name, (rate, head) in _best.items()}
