# GPT-2 xl: 1,556,840,000 parameters with 50,304 tokens; the rest as in gpt2.py, rates as in Inheritune
# (arXiv 2404.08634, F.2)
from config.gpt2 import *  # noqa: F403

out_dir = 'out/gpt2_xl'
n_layer, n_head, n_embd = 48, 25, 1600
learning_rate, min_lr = 1.5e-4, 1e-5
