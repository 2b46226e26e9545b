# The recipe: the same loss with a fraction of the tokens. Each part is a flag; docs/results/recipe.md has the
# effect of each. To use it, begin a config file with `from config.fast import *` and add the data and the
# sizes; train.py --depth=N derives the sizes that are not set
optimizer = 'muon'  # for the matrices of the blocks, AdamW for the rest
muon_lr, embed_lr, head_lr, scalar_lr = 0.03, 0.3, 0.01, 0.015
beta1, beta2, weight_decay, grad_clip = 0.8, 0.95, 0.1, 0.0
# no warm-up (Muon's step is bounded), a long linear cooldown
schedule, cooldown, warmup_iters, min_lr = 'wsd', 0.6, 0, 0.0

position, mlp, qk_norm, zero_init = 'rope', 'swiglu', True, True
tie, embed_norm, value_residual = False, True, True
softcap = 15.0
