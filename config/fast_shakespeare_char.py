# A race: nanoGPT's laptop set-up (its README, "I only have a macbook": 4 layers, 128 wide, context 64, 12
# rows) to 1.88 nats on the whole validation split. Ten seconds on two CPU cores, start and evaluation
# included
#   python prepare.py shakespeare --tokenizer=char --out=data/shakespeare_char
#   python train.py config/fast_shakespeare_char.py
from config.fast import *  # noqa: F403

out_dir = 'out/fast_shakespeare_char'
dataset = 'shakespeare_char'

n_layer, n_head, n_embd = 4, 4, 128
block_size = 64

batch_size = 12
max_iters = 190  # 145,920 tokens, a seventh of an epoch
muon_lr = 0.045
target_val_loss = 1.88
eval_interval, eval_iters, log_interval = 190, 0, 25
sample_tokens = 0
