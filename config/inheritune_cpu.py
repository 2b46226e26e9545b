# Inheritune (Sanyal et al. 2024, arXiv 2404.08634) on a laptop: 8 layers on a folder of novels, then 4 of
# them on the same schedule
#   python prepare.py FOLDER_OF_NOVELS --out=data/novels --tokenizer=bpe:4096
#   python train.py config/inheritune_cpu.py    # the large model
#   python surgery.py inherit --from=out/inheritune_cpu --out_dir=out/inheritune_cpu_first4 --layers=0-3
#   python train.py config/inheritune_cpu.py --n_layer=4 --init_from=out/inheritune_cpu_first4 \
#       --out_dir=out/inheritune_cpu4
#   python experiments/inheritune.py --jobs=2   # the same with controls
from config.fast import *  # noqa: F403

out_dir = 'out/inheritune_cpu'
dataset = 'novels'

n_layer, n_head, n_embd = 8, 3, 96
block_size, batch_size = 256, 8  # 2,048 tokens per step
max_iters = 500
muon_lr = 0.04
eval_interval, eval_iters = 50, 0
sample_tokens = 0
compile = False  # the same for every arm
