# Inheritune from OpenLLaMA-3B: the first 13 of 26 layers, 1,815,638,400 parameters, trained on 391M tokens.
# The authors' code drew the embedding and the final norm anew: --fresh=wte,norm_f
#   python surgery.py inherit --from=hf:open_llama_3b --out_dir=out/open_llama_first13 --layers=0-12
#   python prepare.py CORPUS.jsonl --tokenizer=open_llama_3b/tokenizer.model --out=data/redpajama
#   torchrun --standalone --nproc_per_node=8 train.py config/inheritune_openllama.py
out_dir = 'out/inheritune_openllama'
init_from = 'out/open_llama_first13'
dataset = 'redpajama'

n_layer, n_head, n_embd, d_ff = 13, 32, 3200, 8640
block_size, vocab_size = 2048, 32000
mlp, norm_eps, qk_norm, tie = 'swiglu', 1e-6, False, False

batch_size, gradient_accumulation_steps = 1, 8
max_iters = 23875
eval_iters = 17
learning_rate, warmup_iters, decay_lr = 3e-4, 1000, False
weight_decay, grad_clip = 0.01, 0.0
