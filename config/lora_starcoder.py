# The blog's set-up: adapters on attention, MLP and embeddings of StarCoderBase 1B: 12,091,392 of
# 1,149,298,688 parameters are trained (1.0521%)
#   python train.py config/lora_starcoder.py --init_from=hf:FOLDER --dataset=code   # bigcode/starcoderbase-1b
n_layer, n_head, n_kv_head, n_embd, d_ff = 24, 16, 1, 2048, 8192
vocab_size, block_size = 49152, 8192
position, norm, mlp = 'learned', 'layernorm', 'gelu'
qk_norm, zero_init, tie, bias, init_std = False, False, True, True, 0.02

lora_rank, lora_alpha, lora_dropout = 16, 8, 0.1
lora_targets = 'c_attn,c_proj,c_fc,wte,wpe'
init_from = 'hf:starcoderbase-1b'

out_dir = 'out/lora_starcoder'
learning_rate, weight_decay, max_iters = 3e-4, 0.0, 1000
batch_size, gradient_accumulation_steps = 1, 16
eval_iters = 17
