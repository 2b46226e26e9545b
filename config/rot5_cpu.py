# An encoder-decoder for a laptop: pretrain with UL2R's denoisers, then fine-tune on pairs
#   # or FILE.jsonl --val_fraction=0.05, a small copy
#   python prepare.py tinystories --tokenizer=bpe:4096 --reserve=100 --out=data/denoise
#   python train.py config/rot5_cpu.py
#   python prepare.py talks.jsonl --source=source --target=target --tokenizer=data/denoise/tokenizer.model \
#       --reserve=100 --out=data/pairs
#   python train.py --init_from=out/rot5_cpu --out_dir=out/pairs --dataset=data/pairs --objective=seq2seq
from config.fast import *  # noqa: F403

out_dir = 'out/rot5_cpu'
dataset, objective = 'denoise', 'ul2'

n_encoder_layer, n_layer = 4, 4
n_head, n_kv_head, n_embd = 6, 2, 192
source_size, block_size, batch_size = 256, 128, 16
max_iters = 600
eval_interval, eval_iters = 200, 27
sample_tokens = 0  # no samples: they would need a source with masked spans
