# nanoGPT's laptop set-up (its README, "I only have a macbook"): the same sizes, data, steps and AdamW, in
# minnow's default network
#   python prepare.py shakespeare --tokenizer=char --out=data/shakespeare_char
#   python train.py config/shakespeare_char_cpu.py
out_dir = 'out/shakespeare_char_cpu'
dataset = 'shakespeare_char'

n_layer, n_head, n_embd = 4, 4, 128
block_size = 64

batch_size = 12
max_iters = 2000
learning_rate, min_lr, warmup_iters, beta2 = 1e-3, 1e-4, 100, 0.99
eval_interval, eval_iters, log_interval = 250, 0, 50  # 0: the whole validation split
dtype = 'float32'  # too small to gain from bfloat16
