# The cost of surgery.py factorize after a hundred more steps, compared with the dense model; three learning
# rates each
#   python train.py config/fast.py --out_dir=out/dense --dataset=stories --n_layer=4 --n_embd=192 --n_head=6 \
#       --block_size=256 --batch_size=8 \
#       --max_iters=600 --eval_interval=200 --eval_iters=0
#   python surgery.py factorize --from=out/dense --out_dir=out/cut48 --rank_qk=48 --rank_vo=64 --rank_mlp=96 \
#       --dataset=stories
#   python surgery.py factorize --from=out/dense --out_dir=out/cut24 --rank_qk=24 --rank_vo=48 --rank_mlp=64 \
#       --dataset=stories
#   python surgery.py factorize --from=out/dense --out_dir=out/cutqk --rank_qk=24 --dataset=stories
#   python compare.py --sweep=config/sweeps/factorize.py --jobs=2
import config.fast

base = {key: value for key, value in vars(config.fast).items() if key[0] != '_'} | {
    'dataset': 'stories', 'block_size': 256, 'batch_size': 8, 'max_iters': 100, 'eval_interval': 100,
    'eval_iters': 0, 'sample_tokens': 0}
seeds = [2]  # other rows than the first 600 steps saw
_rates = [{'muon_lr': [rate], 'embed_lr': 10 * rate, 'head_lr': rate / 3, 'scalar_lr': rate / 2}
          for rate in (1e-3, 3e-3, 1e-2)]
arms = {name: [{'init_from': f'out/{name}', **rates} for rates in _rates]
        for name in ('dense', 'cut48', 'cut24', 'cutqk')}
