# The base of config/sweeps/lowrank.py, which compares low rank with dense: a decoder with 2.65M weights in
# its blocks and the recipe of config/fast.py.
#   # or FILE.jsonl --val_fraction=0.05, a small copy
#   python prepare.py tinystories --tokenizer=bpe:4096 --out=data/stories
#   python train.py config/lowrank_study.py
from config.fast import *  # noqa: F403

out_dir = 'out/lowrank_study'
dataset = 'stories'

n_layer, n_head, n_embd = 6, 6, 192
block_size, batch_size = 256, 16  # 4,096 tokens per step
max_iters = 500
# the whole split, at the end: schedules that end are not compared in their middle
eval_interval, eval_iters = 500, 0
sample_tokens = 0
# the same for every arm; dtype: bfloat16 where the machine has it, as for the figures in docs/results
compile = False
