# The Llama architecture at the size of llama2.c's stories15M: 15,191,712 parameters with 32,000 tokens
#   python prepare.py tinystories --tokenizer=FILE.model && python train.py config/llama_15m.py
out_dir = 'out/llama_15m'
dataset = 'tinystories'

n_layer, n_head, n_embd, d_ff = 6, 6, 288, 768
block_size = 256
position, norm, mlp = 'rope', 'rmsnorm', 'swiglu'
tie, qk_norm, zero_init, init_std = True, False, False, 0.02

batch_size = 128
gradient_accumulation_steps = 4  # 128 * 256 * 4 = 131,072 tokens per step
max_iters = 100000
eval_iters = 2133
learning_rate, min_lr, warmup_iters, dropout = 5e-4, 0.0, 1000, 0.1
