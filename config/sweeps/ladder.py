# The rungs of the ladder that are trained: bigrams by gradient, of full and of low rank, and a small
# transformer
#   python eval.py ladder --dataset=tinystories
import config.fast

base = {'block_size': 256, 'batch_size': 16, 'eval_iters': 0}  # 4,096 tokens per step
_low_rank = {'arch': 'markov', 'max_iters': 500, 'learning_rate': 1e-2, 'schedule': 'linear', 'min_lr': 0.0,
             'weight_decay': 0.0}
arms = {
    'bigram_rank_4': _low_rank | {'rank_embed': 4},
    'bigram_rank_16': _low_rank | {'rank_embed': 16},
    'bigram_rank_64': _low_rank | {'rank_embed': 64},
    'bigram_rank_256': _low_rank | {'rank_embed': 256},
    # the table counts: one pass over the data; it begins as 32 observations of each token's successors
    'bigram': {'arch': 'markov', 'optimizer': 'counts', 'pseudo_counts': 32.0},
    'transformer': {key: value for key, value in vars(config.fast).items() if key[0] != '_'} | {
        'n_layer': 4, 'n_head': 4, 'n_embd': 128, 'max_iters': 500},
}
