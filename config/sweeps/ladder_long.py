# The transformer of config/sweeps/ladder.py with twice the steps: dependence on two previous tokens takes
# longer to learn than on one
#   python eval.py ladder --dataset=markov2 --sweep=config/sweeps/ladder_long.py
from config.sweeps.ladder import arms as _arms
from config.sweeps.ladder import base  # noqa: F401

arms = {'transformer': _arms['transformer'] | {'max_iters': 1000}}
