# The base of config/sweeps/rot5.py, which measures ROT5's changes to T5: a plain T5 of laptop size,
# pretrained with UL2R's denoisers
#   # or FILE.jsonl --val_fraction=0.05, a small copy
#   python prepare.py tinystories --tokenizer=bpe:4096 --reserve=100 --out=data/denoise
#   python train.py config/rot5_study.py
from config.rot5 import *  # noqa: F403

out_dir = 'out/rot5_study'
dataset, objective = 'denoise', 'ul2'

n_encoder_layer, n_layer = 3, 3
n_head, n_embd, head_dim, d_ff = 4, 128, 32, 512
source_size, block_size, batch_size = 256, 128, 16
dropout = 0.0  # 2 epochs
max_iters = 500
optimizer, learning_rate, head_lr = 'adamw', 2e-3, 0.12
beta2, grad_clip, weight_decay = 0.98, 1.0, 0.01
schedule, warmup_iters, min_lr = 'linear', 50, 0.0
eval_interval, eval_iters = 500, 0  # the whole split, at the end
sample_tokens = 0
compile = False
