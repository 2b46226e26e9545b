# make demo: nanoGPT's model and optimizer, with the sizes, data and time of demo_dense.py
out_dir = 'out/demo_nanogpt'
dataset = 'demo'

n_layer, n_head, n_embd = 4, 6, 192
block_size = 256
position, norm, mlp = 'learned', 'layernorm', 'gelu'
tie, bias, qk_norm, zero_init, init_std = True, False, False, False, 0.02
embed_norm, value_residual, softcap = False, False, 0.0

batch_size = 8
gradient_accumulation_steps = 1  # 2,048 tokens per step
max_iters = 400
optimizer = 'adamw'
learning_rate, min_lr, schedule = 1e-3, 1e-4, 'cosine'
warmup_iters = None  # 5% of max_iters, as in nanoGPT's configs for Shakespeare
embed_lr = head_lr = scalar_lr = None  # learning_rate
beta1, beta2, weight_decay, grad_clip = 0.9, 0.99, 0.1, 1.0
eval_interval, eval_iters, log_interval = 100, 14, 20
sample_tokens = 0
compile = False  # two minutes are too short for it, and it is the same for all three
