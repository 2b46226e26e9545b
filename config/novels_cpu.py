# A model of English novels, to be fine-tuned on something else: 9 minutes on 2 CPU cores
#   python prepare.py FOLDER_OF_NOVELS --out=data/novels --tokenizer=bpe:4096
#   python train.py config/novels_cpu.py
from config.fast import *  # noqa: F403

out_dir = 'out/novels_cpu'
dataset = 'novels'

n_layer, n_head, n_embd = 4, 3, 192
block_size, batch_size = 256, 16  # 4,096 tokens per step
max_iters = 800
eval_interval, eval_iters = 200, 0
compile = True
