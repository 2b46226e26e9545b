# Inheritune (Sanyal et al. 2024, arXiv 2404.08634), GPT-2 medium: the first 16 of 24 layers, 253,920,256
# parameters with 50,304 tokens, on the schedule of the whole network (F.2). The authors left positions and
# the final norm behind: --fresh=wpe,norm_f
#   # theirs scale attention by depth
#   torchrun --standalone --nproc_per_node=8 train.py config/gpt2_medium.py --depth_scale=attn
#   python surgery.py inherit --from=out/gpt2_medium --out_dir=out/gpt2_medium_first16 --layers=0-15
#   torchrun --standalone --nproc_per_node=8 train.py config/inheritune_medium.py
from config.gpt2_medium import *  # noqa: F403

out_dir = 'out/inheritune_medium'
init_from = 'out/gpt2_medium_first16'
n_layer, depth_scale = 16, 'attn'

batch_size = 8
gradient_accumulation_steps = 384 // 8  # 393,216 tokens per step
max_iters = 100000
eval_iters = 133
