# A dense and a low-rank decoder, two rates and two seeds each: eight small runs on the Python standard
# library
#   python prepare.py stdlib && python compare.py --sweep=config/sweeps/demo.py
base = {'dataset': 'stdlib', 'n_layer': 2, 'n_head': 4, 'block_size': 128, 'batch_size': 8, 'max_iters': 100,
        'schedule': 'linear', 'min_lr': 0.0, 'eval_interval': 25, 'eval_iters': 7, 'log_interval': 10}
seeds = [1, 2]
budget = 'flops'  # the low-rank arm takes as many steps as the dense one's FLOPs allow
arms = {
    'dense': {'n_embd': 96, 'learning_rate': [2e-3, 4e-3]},
    'low_rank': {'n_embd': 128, 'rank_qk': 48, 'rank_vo': 48, 'rank_mlp': 48, 'learning_rate': [2e-3, 4e-3]},
}
