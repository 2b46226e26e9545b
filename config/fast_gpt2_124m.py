# A race: GPT-2 124M's size to 3.28 nats, nanoGPT's loss after 10 billion tokens of FineWeb (modded-nanogpt's
# track 1), in about 1.7 billion. The numbers are those that modded-nanogpt and nanochat found at this size;
# this file itself has not been run on a GPU yet (docs/results)
#   python prepare.py fineweb_edu --tokenizer=gpt2 --val_fraction=0.002
#   # or: python train.py config/fast_gpt2_124m.py
#   torchrun --standalone --nproc_per_node=8 train.py config/fast_gpt2_124m.py
from config.fast import *  # noqa: F403

out_dir = 'out/fast_gpt2_124m'
dataset = 'fineweb_edu'

n_layer, n_head, n_embd = 12, 6, 768
block_size = 1024
mlp = 'relu2'  # as good as a gated one from this size on, and faster

batch_size = 32
gradient_accumulation_steps = 16  # 32 * 1024 * 16 = 524,288 tokens per step
max_iters = 3250
muon_lr, head_lr, weight_decay = 0.025, 0.004, 0.05
target_val_loss = 3.28
eval_interval, eval_iters, log_interval = 125, 853, 10  # 10.5 million tokens of validation
