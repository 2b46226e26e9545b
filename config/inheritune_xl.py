# Inheritune (Sanyal et al. 2024, arXiv 2404.08634), GPT-2 xl: the first 24 of 48 layers, 819,483,200
# parameters with 50,304 tokens, on the schedule of the whole network (F.2). The authors left positions and
# the final norm behind: --fresh=wpe,norm_f
#   # theirs scale attention by depth
#   torchrun --standalone --nproc_per_node=8 train.py config/gpt2_xl.py --depth_scale=attn
#   python surgery.py inherit --from=out/gpt2_xl --out_dir=out/gpt2_xl_first24 --layers=0-23
#   torchrun --standalone --nproc_per_node=8 train.py config/inheritune_xl.py
from config.gpt2_xl import *  # noqa: F403

out_dir = 'out/inheritune_xl'
init_from = 'out/gpt2_xl_first24'
n_layer, depth_scale = 24, 'attn'

batch_size = 8
gradient_accumulation_steps = 128 // 8  # 131,072 tokens per step
max_iters = 100000
eval_iters = 133
