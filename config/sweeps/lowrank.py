# Low rank compared with dense: learning-rate sweeps of all arms on one seed, all with the FLOPs of the first
# arm. lowrank_final.py runs the finalists; lowrank_novels.py is the same on novels
#   # or FILE.jsonl --val_fraction=0.05, a small copy
#   python prepare.py tinystories --tokenizer=bpe:4096 --out=data/stories
#   python compare.py --sweep=config/sweeps/lowrank.py --jobs=2
base = 'config/lowrank_study.py'
budget = 'flops'


def _rates(muon_lr, qk, **arm):
    """
    Muon's rates, and the multiples of them that queries and keys take: two lines that cross in the middle of
    both.
    """
    scale = [{r'attn\.[qk]\.': n} for n in qk]
    middle = scale.pop((len(scale) - 1) // 2)
    cross = [arm | {'muon_lr': muon_lr, 'lr_scale': [middle]}]
    return cross + [arm | {'muon_lr': [muon_lr[len(muon_lr) // 2]], 'lr_scale': scale}] * bool(scale)


# 2.65M weights in the blocks, as the dense arm
_wide = {'n_embd': 256, 'n_head': 8, 'd_ff': 592, 'rank_qk': 96, 'rank_vo': 96, 'rank_mlp': 96}

arms = {
    'dense': _rates([0.03, 0.05, 0.08], [1, 2, 4]),
    'qk24': _rates([0.03, 0.05, 0.08], [1, 2, 4], rank_qk=24),  # queries and keys alone: 2.32M
    # dense, with as few weights and FLOPs a token as qk24
    'smaller_dense': _rates([0.03, 0.05, 0.08], [2], d_ff=416),
    'low_rank': _rates([0.02, 0.03, 0.05], [1], **_wide),
    # CoLA. The study had no SiLU in queries and keys, which is 0.015 nats worse (low-rank-structure.md)
    'low_rank_silu': _rates([0.02, 0.03, 0.05], [1], rank_act='silu', **_wide),
}
