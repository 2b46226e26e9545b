# Readable stories from ten minutes on two CPU cores
#   # or your own copy: python prepare.py FILE.jsonl --out=data/tinystories --tokenizer=bpe:4096
#   python prepare.py tinystories --tokenizer=bpe:4096
#   python train.py config/tinystories_cpu.py
#   python sample.py --out_dir=out/tinystories_cpu --start="once upon a time"
out_dir = 'out/tinystories_cpu'
dataset = 'tinystories'

n_layer, n_head, n_embd = 4, 8, 256
block_size = 256

batch_size = 16  # 4,096 tokens per step
max_iters = 1200
learning_rate, min_lr, schedule = 3e-3, 0.0, 'linear'
eval_interval, eval_iters = 200, 0
sample_prompt = 'once upon a time'
compile = True
