# The low-rank Markov chain: 14,845,952 parameters instead of the table's 840,768,016. The data are those of
# markov_pubmed.py
#   python train.py config/markov_lowrank_pubmed.py
#   python sample.py --out_dir=out/markov_lowrank_pubmed --start="The patients"
out_dir = 'out/markov_lowrank_pubmed'
dataset = 'pubmed'
arch = 'markov'
rank_embed, dropout = 256, 0.1

packing, block_size = 'document', 512  # one abstract per row
batch_size = 16
max_iters = 520
learning_rate = 1e-3
eval_interval, eval_iters = 52, 0
sample_prompt = 'The patients'
