# GPT-2 medium: 354,599,936 parameters with 50,304 tokens; the rest as in gpt2.py, rates as in Inheritune
# (arXiv 2404.08634, F.2)
from config.gpt2 import *  # noqa: F403

out_dir = 'out/gpt2_medium'
n_layer, n_head, n_embd = 24, 16, 1024
learning_rate, min_lr = 3e-4, 1e-5
