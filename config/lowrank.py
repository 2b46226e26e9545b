# A low-rank decoder on the Python standard library, sized to the machine
#   python prepare.py stdlib
#   torchrun --nproc_per_node=2 train.py config/lowrank.py       # or: python train.py config/lowrank.py
#   python sample.py --out_dir=out/lowrank --start="def "
import torch

out_dir = 'out/lowrank'
dataset = 'stdlib'
learning_rate, min_lr, schedule = 3e-3, 0.0, 'linear'
sample_prompt = 'def '

if torch.cuda.is_available():  # the shape of "Are Small Language Models Low-rank?": 26M weights in the blocks
    n_layer, n_head, n_embd, d_ff = 4, 18, 1152, 2880
    rank_qk, rank_vo, rank_mlp = 256, 256, 512
    block_size, batch_size, gradient_accumulation_steps = 1024, 16, 2  # 32,768 tokens per step
    max_iters, learning_rate, eval_iters = 2000, 1e-3, 267
else:  # 1.8M weights in the blocks: minutes on two CPU cores
    n_layer, n_head, n_embd = 4, 8, 256
    rank_qk = rank_vo = rank_mlp = 96
    block_size, batch_size = 256, 16  # 4,096 tokens per step
    max_iters, eval_interval, eval_iters = 500, 100, 27
