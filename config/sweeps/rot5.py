# ROT5's ladder, step by step: T5 → rotary positions → fewer heads with keys → experts → their losses, the
# three kinds of rotary positions between target and source, and a decoder that reads the source as a prefix.
# Every arm's rate on one seed, and all arms for the FLOPs of the first
#   # or FILE.jsonl --val_fraction=0.05, a small copy
#   python prepare.py tinystories --tokenizer=bpe:4096 --reserve=100 --out=data/denoise
#   python compare.py --sweep=config/sweeps/rot5.py --jobs=2
base = 'config/rot5_study.py'
budget = 'flops'

# head_lr: of the tied embedding, which is N(0, 1) and takes a high one; higher once
_rates = {'learning_rate': [1e-3, 2e-3, 4e-3], 'head_lr': [0.12]}
_rope = {'position': 'rope', 'cross_rope': 'same'}
_gqa = _rope | {'n_kv_head': 1}  # a third as in ROT5 does not divide four heads
_moe = _gqa | {'n_expert': 8, 'expert_aux': 0.0, 'expert_z': 0.0}
arms = {
    't5': {},
    'rope': _rope,
    'gqa': _gqa,
    'moe': _moe,
    'moe_losses': _moe | {'expert_aux': 0.01, 'expert_z': 0.001},
    'rope_none': _rope | {'cross_rope': 'none'},
    'rope_offset': _rope | {'cross_rope': 'offset'},
    # 256: rows of 190 tokens, as the others'
    'decoder': {'n_encoder_layer': 0, 'source_size': 0, 'n_layer': 6, 'block_size': 256, 'position': 'rope'},
}
_high = ('t5', 'rope', 'gqa', 'moe')  # arms with 4e-3 too, by far the worst in all four
arms = {name: [arm | (_rates if name in _high else _rates | {'learning_rate': [1e-3, 2e-3]}),
               arm | {'learning_rate': [2e-3], 'head_lr': [0.36]}] for name, arm in arms.items()}
# further where the best was at the edge
for _names, _rate, _head in ((('t5', 'gqa', 'moe_losses'), 5e-4, 0.12), (('rope', 'rope_offset'), 2e-3, 1.0)):
    for _name in _names:
        arms[_name].append(arms[_name][0] | {'learning_rate': [_rate], 'head_lr': [_head]})
