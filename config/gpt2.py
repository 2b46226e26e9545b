# GPT-2 small as nanoGPT trains it: 124M parameters, OpenWebText, 300B tokens
#   python prepare.py openwebtext --tokenizer=gpt2 --val_fraction=0.0005
#   # four days on 8 A100s, validation loss 2.85 (nanoGPT's README)
#   torchrun --standalone --nproc_per_node=8 train.py config/gpt2.py
out_dir = 'out/gpt2'
dataset = 'openwebtext'

n_layer, n_head, n_embd = 12, 12, 768
block_size = 1024
position, norm, mlp = 'learned', 'layernorm', 'gelu'
tie, bias, qk_norm, zero_init, init_std = True, False, False, False, 0.02

batch_size = 12
gradient_accumulation_steps = 5 * 8  # 12 * 1024 * 40 = 491,520 tokens per step
max_iters = 600000
learning_rate, min_lr, warmup_iters = 6e-4, 6e-5, 2000
eval_interval, log_interval = 1000, 10
