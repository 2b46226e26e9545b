# LoRA adapters on Python code for a model that was trained on novels
#   # after config/novels_cpu.py
#   python prepare.py stdlib --out=data/code --tokenizer=data/novels/tokenizer.model --val_fraction=0.02
#   # or another --init_from, with its own tokenizer
#   python train.py config/lora_code.py
#   python sample.py --out_dir=out/lora_code --start="def "
init_from = 'out/novels_cpu'
out_dir = 'out/lora_code'
dataset = 'code'

lora_rank = 16
learning_rate = 1e-2  # adapters need ten times the learning rate of full fine-tuning
weight_decay, schedule, min_lr = 0.0, 'linear', 0.0

block_size, batch_size = 256, 16  # 4,096 tokens per step
max_iters = 100
eval_interval, eval_iters = 100, 0
sample_prompt = 'def '
