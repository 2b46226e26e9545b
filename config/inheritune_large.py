# Inheritune (Sanyal et al. 2024, arXiv 2404.08634), GPT-2 large: the first 18 of 36 layers, 419,641,600
# parameters with 50,304 tokens, on the schedule of the whole network (F.2). The authors left positions and
# the final norm behind: --fresh=wpe,norm_f
#   # theirs scale attention by depth
#   torchrun --standalone --nproc_per_node=8 train.py config/gpt2_large.py --depth_scale=attn
#   python surgery.py inherit --from=out/gpt2_large --out_dir=out/gpt2_large_first18 --layers=0-17
#   torchrun --standalone --nproc_per_node=8 train.py config/inheritune_large.py
from config.gpt2_large import *  # noqa: F403

out_dir = 'out/inheritune_large'
init_from = 'out/gpt2_large_first18'
n_layer, depth_scale = 18, 'attn'

batch_size = 8
gradient_accumulation_steps = 128 // 8  # 131,072 tokens per step
max_iters = 100000
eval_iters = 133
