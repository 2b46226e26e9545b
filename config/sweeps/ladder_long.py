# The transformer of config/sweeps/ladder.py for twice the steps: pairs of tokens take a network longer to
# find than single ones
#   python eval.py ladder --dataset=markov2 --sweep=config/sweeps/ladder_long.py
from config.sweeps.ladder import arms as _arms
from config.sweeps.ladder import base  # noqa: F401

arms = {'transformer': _arms['transformer'] | {'max_iters': 1000}}
