# GPT-2 large: 773,582,080 parameters with 50,304 tokens; the rest as in gpt2.py, rates as in Inheritune
# (arXiv 2404.08634, F.2)
from config.gpt2 import *  # noqa: F403

out_dir = 'out/gpt2_large'
n_layer, n_head, n_embd = 36, 20, 1280
learning_rate, min_lr = 2e-4, 1e-5
