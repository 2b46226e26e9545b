# T5-base (Raffel et al. 2020, arXiv 1910.10683): 222,903,552 parameters with its 32,128 tokens
#   # google-t5/t5-base
#   python sample.py --init_from=hf:FOLDER --start="translate English to German: The house is wonderful."
n_encoder_layer, n_layer = 12, 12
n_head, n_embd, head_dim, d_ff = 12, 768, 64, 3072
block_size = 512
position, norm, norm_eps, mlp = 'relative', 'rmsnorm', 1e-6, 'relu'
qk_norm, zero_init, t5_scale, tie, bias, dropout = False, False, True, True, False, 0.1
