# The dense half of "Are Small Language Models Low-rank?": 28,317,696 parameters in four blocks, 66,683,136
# with 49,954 tokens. Prepare the corpora of the mixture with one tokenizer (here the Chinese-LLaMA
# sentencepiece model the blog used), e.g.
#   python prepare.py FILE.jsonl --out=data/tinystories_zh --tokenizer=chinese_llama_sp.model
# The blog trained on each row's last token, in pure bfloat16 and without warm-up; here every token counts,
# weights are float32.
out_dir = 'out/lowrank28m_dense'
dataset = {'tinystories_zh': 200, 'dolly_zh': 20, 'oasst_zh': 50}  # counts tokens; the blog's, documents

n_layer, n_head, n_embd = 4, 12, 768
block_size = 1024
mlp, tie = 'silu', True

batch_size = 8
gradient_accumulation_steps = 15  # 120 rows per step
max_iters = 20000
learning_rate, warmup_iters = 6e-4, 1000
eval_interval, eval_iters = 1000, 33
