# A small dense decoder on the Python standard library, with AdamW: two minutes on two CPU cores; the pages in
# docs/ work on it
#   python prepare.py stdlib
#   python train.py config/stdlib_dense.py
out_dir = 'out/stdlib_dense'
dataset = 'stdlib'

n_layer, n_head, n_embd = 4, 6, 192  # 1,769,472 weights in the blocks
block_size = 256

batch_size = 8  # 2,048 tokens per step
max_iters = 400
learning_rate, min_lr, schedule = 2e-3, 0.0, 'linear'
eval_interval, eval_iters, log_interval = 100, 13, 20
sample_tokens = 0
