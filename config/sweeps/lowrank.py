# What low rank costs, and where it pays: the rates of every arm on one seed, every arm for the FLOPs of the first. The finalists follow in
# lowrank_final.py; the same on novels in lowrank_novels.py
#   python prepare.py tinystories --tokenizer=bpe:4096 --val_fraction=0.05 --out=data/stories
#   python compare.py --sweep=config/sweeps/lowrank.py --jobs=2
base = 'config/lowrank_study.py'
budget = 'flops'

_qk = r'attn\.[qk]\.'
_rates = {'muon_lr': [0.03, 0.05], 'lr_scale': [{_qk: 2}, {_qk: 4}]}
_wide = {'n_embd': 256, 'n_head': 8, 'd_ff': 592, 'rank_qk': 96, 'rank_vo': 96, 'rank_mlp': 96}  # 2.65M weights in the blocks, as the dense arm

arms = {
    'dense': _rates,
    'qk24': {'rank_qk': 24, 'muon_lr': [0.03, 0.05], 'lr_scale': [{_qk: 1}, {_qk: 2}]},  # queries and keys alone: 2.32M
    'smaller_dense': {'d_ff': 416, **_rates},  # dense, with as few weights and as many tokens as qk24
    'low_rank': {**_wide, 'muon_lr': [0.03, 0.05]},
    'low_rank_silu': {**_wide, 'rank_act': 'silu', 'rank_act_qk': 'none', 'muon_lr': [0.03, 0.05]},  # CoLA, but for queries and keys
}
