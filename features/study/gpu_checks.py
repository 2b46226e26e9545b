"""
bench.py gpu, its checks: does a device compute what a CPU computes?

Each function yields (name of a row, a function that returns its text and whether all is right).
"""
import copy
import json
import os
import random
import sys
import tempfile
from functools import partial

import torch

import checkpoint
import prepare
import sample
import train
from configurator import ROOT
from features import build
from model import ModelConfig, autocast, compile_all, make_model

RECORDED = os.path.join(ROOT, 'features', 'study', 'gpu_losses.json')  # {config: losses of its first steps}

# -----------------------------------------------------------------------------
# Gradients

KINDS = {
    'default': {},
    'GPT-2': {'position': 'learned', 'norm': 'layernorm', 'mlp': 'gelu', 'bias': True, 'qk_norm': False},
    'recipe': {'mlp': 'swiglu', 'tie': False, 'embed_norm': True, 'value_residual': True, 'softcap': 15.0},
    'grouped queries': {'n_kv_head': 2, 'mlp': 'geglu', 'qk_norm': 'head', 'parallel': True},
    'windows': {'window': 12, 'full_layers': [1], 'window_theta': 50.0, 'post_norm': 'both'},
    'attention softcap': {'attn_softcap': 5.0, 'n_kv_head': 1, 'logit_scale': 0.5},
    'low rank': {'rank_qk': 8, 'rank_vo': 16, 'rank_mlp': 24, 'rank_embed': 8, 'rank_head': 8,
                 'rank_act': 'silu', 'mlp_norm': True},
    'experts': {'n_expert': 4, 'n_expert_active': 2, 'mlp': 'swiglu'},
    'shared experts': {'n_expert': 4, 'shared_width': 32, 'shared_gate': True, 'dense_layers': [0]},
    'T5': {'n_encoder_layer': 2, 'position': 'relative', 'mlp': 'geglu', 'qk_norm': False, 't5_scale': True},
    'ROT5': {'n_encoder_layer': 2, 'n_kv_head': 2, 'cross_rope': 'same'},
    'Markov': {'arch': 'markov'},
    'low-rank Markov': {'arch': 'markov', 'rank_embed': 8},
    'LoRA': {},
    'packed texts': {},
    'recompute': {},
}


def check_gradients(s, device):
    """Gradients of every kind of network on the device, as they are and compiled, against a CPU's."""
    torch.set_float32_matmul_precision('highest')
    for kind, settings in KINDS.items():
        yield kind, partial(compare_gradients, s, device, kind, settings)


def compare_gradients(s, device, kind, settings):
    model = random_network(s, **settings)
    inputs = random_batch(model.cfg)
    if kind == 'LoRA':
        from features.lora import layers
        layers.begin(model, build(train.Settings, lora_rank=4))
        shake(model, 0.1)
    if kind == 'packed texts':
        inputs['pieces'] = torch.arange(model.cfg.block_size).expand_as(inputs['idx']) // 5
    model.recompute = kind == 'recompute'
    exact = gradients(model, inputs, torch.device('cpu'), 'float32')
    on_device = copy.deepcopy(model).to(device)
    compiled = copy.deepcopy(on_device)
    compile_all(compiled)
    errors = []
    for dtype in ('float32', 'bfloat16'):
        for copied in (on_device, compiled):
            errors.append(distance(gradients(copied, inputs, device, dtype), exact))
    plain32, compiled32, plain16, compiled16 = errors
    text = (f'largest relative error: float32 {plain32:.0e}, compiled {compiled32:.0e}; '
            f'bfloat16 {plain16:.3f}, compiled {compiled16:.3f}')
    return text, max(plain32, compiled32) < 1e-3 and plain16 < 0.5 and compiled16 < 2 * plain16 + 0.05


def random_network(s, std=0.05, **settings):
    """A network on the CPU without a weight that is zero."""
    torch.manual_seed(0)
    width = 32 if s.quick else 128
    sizes = {'vocab_size': 300, 'block_size': width, 'n_layer': 2, 'n_head': 4, 'n_embd': width}
    model = make_model(build(ModelConfig, **sizes | settings))
    shake(model, std)
    return model


@torch.no_grad()
def shake(model, std):
    for p in model.parameters():
        p += std * torch.randn(p.shape)


def random_batch(cfg):
    """Arguments of a network's forward pass: 8 rows, the last targets of one masked."""
    x = torch.randint(cfg.vocab_size, (8, cfg.block_size + 1))
    inputs = {'idx': x[:, :-1].contiguous(), 'targets': x[:, 1:].clone()}
    inputs['targets'][0, -5:] = -1
    if cfg.n_encoder_layer:
        inputs['source'] = x[:, :-4].clone()
        inputs['source'][1, -5:] = -1
    return inputs


def gradients(model, inputs, device, dtype):
    """{parameter: gradient} on the CPU."""
    with autocast(device, dtype):
        loss = model(**{name: array.to(device) for name, array in inputs.items()})
    loss.backward()
    found = {name: p.grad.float().cpu() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def distance(found, exact):
    """The largest relative error of a tensor; one of less than a thousandth of the whole counts as that."""
    whole = torch.stack([g.norm() for g in exact.values()]).norm()
    errors = [(found[name] - g).norm() / max(g.norm(), 1e-3 * whole) for name, g in exact.items()]
    return torch.stack(errors).max().item()


# -----------------------------------------------------------------------------
# Losses, and a run that is resumed

# Settings beside SMALL's
CONFIGS = {
    'gpt2': [],
    'fast_gpt2_124m': [],
    'llama_15m': ['--learning_rate=3e-3'],
    'demo_lowrank': [],
    'lowrank28m': ['--rank_qk=16', '--rank_vo=16', '--rank_mlp=32', '--rank_head=32', '--learning_rate=1e-3'],
    'inheritune_medium': ['--init_from=scratch', '--learning_rate=3e-3'],
    'novels_cpu': [],
    'markov_lowrank_pubmed': ['--rank_embed=16', '--learning_rate=3e-2'],
    'rot5_cpu': ['--n_encoder_layer=2'],
    'rot5_moe': ['--n_encoder_layer=2', '--objective=ul2', '--learning_rate=1e-3'],
    'flan_t5_base': ['--n_encoder_layer=2', '--objective=ul2', '--learning_rate=3e-3'],
    'lora_code': [],  # on gpt2
}
SMALL = ['--block_size=64', '--batch_size=8', '--gradient_accumulation_steps=1', '--max_iters=20',
         '--lr_decay_iters=20', '--warmup_iters=2', '--dropout=0', '--eval_interval=1000', '--eval_iters=1',
         '--log_interval=1', '--sample_tokens=0']


def check_losses(s, device):
    """Losses of the first 20 steps of config files, with small networks, against those of a CPU."""
    recorded = {}
    if os.path.exists(RECORDED):
        with open(RECORDED) as f:
            recorded = json.load(f)
    with tempfile.TemporaryDirectory() as folder:
        for config in CONFIGS:
            yield config, partial(compare_losses, s, device, config, folder, recorded)
    if s.record:
        lines = [f'"{config}": {losses}' for config, losses in recorded.items() if config in CONFIGS]
        with open(RECORDED, 'w') as f:
            f.write('{' + ',\n'.join(lines) + '}\n')


def compare_losses(s, device, config, folder, recorded):
    losses = train_small(config, folder, device)
    if s.record:
        recorded[config] = losses
    expected = recorded.get(config, [])
    if len(losses) != len(expected):
        return f'{len(losses)} losses, {len(expected)} recorded', False
    away = max(abs(a - b) for a, b in zip(losses, expected))
    return f'{losses[0]:.3f} to {losses[-1]:.3f}, at most {away:.4f} away from a CPU in float32', away < 0.03


def train_small(config, folder, device, *options, out=''):
    """The losses of the steps of train.py with a config file; its run is in the folder `out` of `folder`."""
    dataset, out = os.path.join(folder, 'data'), os.path.join(folder, out or config)
    if not os.path.exists(dataset):
        write_text(os.path.join(folder, 'text.jsonl'))
        call(prepare.main, 'prepare.py', os.path.join(folder, 'text.jsonl'), f'--out={dataset}',
             '--tokenizer=byte', '--reserve=20', '--val_fraction=0.1', '--num_proc=1')
    if config == 'lora_code':
        base = os.path.join(folder, 'gpt2')
        if not os.path.exists(base):
            train_small('gpt2', folder, device)
        options = [*options, f'--init_from={base}']
    sizes = [] if config.startswith('markov') else ['--n_layer=2', '--n_head=4', '--n_embd=64']
    exact = ['--dtype=float32', '--compile=False'] if device.type == 'cpu' else ['--compile=True']
    call(train.main, 'train.py', os.path.join(ROOT, 'config', f'{config}.py'), *SMALL, *sizes, *exact,
         *CONFIGS[config], f'--dataset={dataset}', f'--out_dir={out}', f'--device={device}', *options)
    with open(os.path.join(out, 'log.jsonl')) as log:
        records = [json.loads(line) for line in log]
    return [round(record['train_loss'], 4) for record in records if 'train_loss' in record]


def write_text(path):
    """Texts that can be learned: letters in the order of the alphabet, some of them left out."""
    rng = random.Random(0)
    with open(path, 'w') as f:
        for _ in range(400):
            letters = [rng.randrange(26)]
            for _ in range(rng.randrange(60, 200)):
                letters.append((letters[-1] + rng.randrange(1, 4)) % 26)
            f.write(json.dumps({'text': ''.join(chr(97 + n) for n in letters)}) + '\n')


def call(main, *argv):
    """Run a script of ours in this process. Raises RuntimeError unless it ends well."""
    before, sys.argv = sys.argv, list(argv)
    try:
        main()
    except SystemExit as end:
        if end.code:
            raise RuntimeError(f'{argv[0]}: exit code {end.code}') from None
    finally:
        sys.argv = before


def check_resume(s, device):
    """A run that stops and goes on against one that does not."""
    yield '20 steps, 10 + 10 steps', partial(compare_resumed, device)


def compare_resumed(device):
    with tempfile.TemporaryDirectory() as folder:
        ends = []
        for out, stops in (('whole', [20]), ('again', [20]), ('resumed', [10, 20])):
            for steps in stops:
                train_small('novels_cpu', folder, device, f'--max_iters={steps}', out=out)
            newest = checkpoint.checkpoints(os.path.join(folder, out))[0]
            ends.append(checkpoint.read_weights(newest))
    whole, again, resumed = ends
    away, noise = (max((other[name] - whole[name]).abs().max().item() for name in whole)
                   for other in (resumed, again))
    if not away:
        return 'bit for bit the same weights', True
    return f'weights differ by {away:.0e}; those of two whole runs by {noise:.0e}', away < 10 * noise


# -----------------------------------------------------------------------------
# Sampling

def check_sampling(s, device):
    """Greedy text beyond the context with a cache, compiled, and without a cache."""
    torch.set_float32_matmul_precision('highest')
    for kind, settings in KINDS.items():
        if settings and 'arch' not in settings or kind == 'default':
            yield kind, partial(compare_texts, s, device, settings)


def compare_texts(s, device, settings):
    model = random_network(s, 0.2, **settings).to(device).eval()
    prompts = [[1, 2, 3], [7, 8, 9, 4, 2]]
    if model.cfg.n_encoder_layer:
        from features.t5.sampling import Decoder
        model = Decoder(model, [[5, 6, 7, 8], [9, 10]])
    torch._dynamo.reset()  # it compiles a function only so many times
    texts = []
    for options in ({'use_cache': False}, {}, {'compile': True}):
        written = sample.generate(model, prompts, 2 * model.cfg.block_size, temperature=0, **options)
        texts.append(torch.stack(list(written), dim=1))
    plain, cached, compiled = texts
    alike = [(other == plain).float().mean().item() for other in (cached, compiled)]
    return (f'{plain.numel()} tokens, {len(plain.unique())} kinds: cached {alike[0]:.0%} equal, '
            f'compiled {alike[1]:.0%}', alike == [1, 1])
