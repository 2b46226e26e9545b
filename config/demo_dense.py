# make demo: a dense decoder with the recipe, on English text that `make data/demo` prepares
#   # as make demo runs it; without --minutes, max_iters applies
#   python train.py config/demo_dense.py --minutes=2
from config.fast import *  # noqa: F403

out_dir = 'out/demo_dense'
dataset = 'demo'

n_layer, n_head, n_embd = 4, 6, 192
block_size = 256

batch_size = 8
gradient_accumulation_steps = 1  # 2,048 tokens per step
max_iters = 400
# between the best for 768 and for 4,096 tokens per step (docs/results/recipe.md and low-rank.md)
muon_lr = 0.04
lr_scale = {r'attn\.[qk]\.': 2}  # queries and keys: the best of 1, 2 and 4, dense and low-rank
eval_interval, eval_iters, log_interval = 100, 14, 20
sample_tokens = 0
compile = False  # two minutes are too short for it, and it is the same for all three
