"""
Markov chains: the table against dense cross-entropy and against counting, its memory, and its way through
train.py and sample.py.
"""
import json
import math

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from conftest import ROOT, one_line, read_log, run, write_dataset

import checkpoint
from configurator import configure
from features import build, part_of
from features.lora.packed import pack
from features.markov.settings import free_memory
from model import ModelConfig, make_model
from optim import OptimConfig, clip_gradient, make_optimizer
from sample import generate
from train import Settings


def chain(seed=0, **settings):
    torch.manual_seed(seed)
    return make_model(build(ModelConfig, **{'arch': 'markov', 'vocab_size': 50, 'block_size': 16} | settings))


def tokens(vocab_size=50, rows=6, length=17, seed=1):
    """x, y of random text, the common tokens first; the last targets of two rows are padding."""
    torch.manual_seed(seed)
    text = torch.multinomial(1 / torch.arange(1.0, vocab_size + 1), rows * length,
                             replacement=True).view(rows, length)
    x, y = text[:, :-1].clone(), text[:, 1:].clone()
    x[:2, 9:], y[:2, 8:] = 0, -1
    return x, y


# -----------------------------------------------------------------------------
# The network

@pytest.mark.parametrize('name, count',
                         [('markov_pubmed', 840_768_016), ('markov_lowrank_pubmed', 14_845_952)])
def test_the_configs_have_the_parameters_of_the_originals(name, count):
    s = configure(Settings, [str(ROOT / f'config/{name}.py'), '--vocab_size=28996'])
    with torch.device('meta'):
        model = make_model(part_of(s, ModelConfig))
    assert model.num_params() == count
    assert model.flops_per_token() == (6 * 256 * 28996 if s.rank_embed else 0)


def test_the_first_losses_are_those_of_normal_logits():
    """
    Logits of variance v: ln V + v/2. The low-rank ones have R · 1 · 1/3R, over the share that dropout keeps.
    At V = 28,996: 10.775 and 10.460.
    """
    V = 3000
    x, y = torch.randint(V, (2, 60_000), generator=torch.Generator().manual_seed(0))
    assert chain(vocab_size=V)(x[None], y[None]).item() == pytest.approx(math.log(V) + 1 / 2, abs=0.01)
    low = chain(vocab_size=V, rank_embed=64, dropout=0.1)(x[None, :10_000], y[None, :10_000]).item()
    assert low == pytest.approx(math.log(V) + 1 / 3 / 0.9 / 2, abs=0.01)


def test_loss_and_gradient_of_the_table_are_those_of_dense_cross_entropy():
    """
    The sparse gradient is counts alone; with count · softmax(row), which the table knows, it is the dense
    one.
    """
    model, (x, y) = chain(), tokens()
    weight = model.wte.weight
    dense = torch.nn.Embedding(50, 50, _weight=weight.detach().clone())
    theirs = F.cross_entropy(dense(x).flatten(0, 1), y.flatten(), ignore_index=-1)
    ours = model(x, y)
    theirs.backward()
    ours.backward()
    assert not weight.grad.is_sparse and (weight.grad - dense.weight.grad).abs().max() < 1e-6
    weight.grad, model.wte.sparse = None, True
    model(x, y).backward()
    assert weight.grad.is_sparse and weight.grad._nnz() == (y >= 0).sum()
    minus_counts = weight.grad.to_dense()
    gradient = minus_counts - minus_counts.sum(1, keepdim=True) * weight.softmax(1)
    assert abs(ours - theirs) < 1e-6 and (gradient - dense.weight.grad).abs().max() < 1e-6
    assert torch.allclose(model(x), dense(x))


def test_loss_and_gradients_of_the_low_rank_chain_are_those_of_dense_cross_entropy():
    (x, y), model = tokens(), chain(rank_embed=8)
    theirs = F.cross_entropy(model(x).flatten(0, 1), y.flatten(), ignore_index=-1)
    wanted = torch.autograd.grad(theirs, list(model.parameters()))
    ours = model(x, y)
    for ours_, theirs_ in zip(torch.autograd.grad(ours, list(model.parameters())), wanted):
        assert (ours_ - theirs_).abs().max() < 1e-6
    assert abs(ours - theirs) < 1e-6


@pytest.mark.parametrize('rank', [0, 8])
def test_padding_changes_nothing(rank):
    x, y = tokens()
    longer_x, longer_y = F.pad(x, (0, 5), value=7), F.pad(y, (0, 5), value=-1)
    losses, gradients = [], []
    for idx, targets in ((x, y), (longer_x, longer_y)):
        model = chain(rank_embed=rank)
        losses.append(model(idx, targets))
        losses[-1].backward()
        gradients.append(model.wte.weight.grad.to_dense())
    assert losses[0] == losses[1] and torch.equal(*gradients)


def test_a_constant_on_all_logits_changes_nothing():
    """One of the originals begins with `weight -= 10`: to a softmax that is nothing."""
    x, y = tokens()
    losses, tables = [], []
    for shift in (0, 10):
        model = chain()
        model.wte.weight.data -= shift
        optimizer = make_optimizer(model, build(OptimConfig, optimizer='counts', pseudo_counts=1.0))
        losses.append(model(x, y))
        losses[-1].backward()
        optimizer.step()
        tables.append(model.wte.weight.detach().softmax(1))
    assert abs(losses[0] - losses[1]) < 1e-5 and torch.allclose(*tables, atol=1e-6)


# -----------------------------------------------------------------------------
# Training is counting

def count(x, y, vocab_size=50):
    real = y >= 0
    return torch.zeros(vocab_size, vocab_size).index_put_((x[real], y[real]), torch.ones(()), accumulate=True)


def learn(model, batches, **settings):
    optimizer = make_optimizer(model, build(OptimConfig,
                                            **{'optimizer': 'counts', 'pseudo_counts': 100.0} | settings))
    for x, y in batches:
        model(x, y, reduction='sum').backward()
        clip_gradient(model, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


@pytest.mark.parametrize('rows', [1, 2, 6])
def test_an_epoch_is_add_k_smoothing_in_any_batches(rows):
    """After three, every count is tripled. The prior is the table's start, weighing pseudo_counts."""
    model, (x, y) = chain(), tokens()
    start, counts = model.wte.weight.detach().softmax(1), count(x, y)
    learn(model, 3 * list(zip(x.split(rows), y.split(rows))), pseudo_counts=4.0)
    oracle = (3 * counts + 4 * start) / (3 * counts.sum(1, keepdim=True) + 4)
    assert torch.allclose(model.wte.weight.softmax(1), oracle, rtol=1e-4)


def test_only_what_was_seen_is_written():
    model, (x, y) = chain(), tokens()
    before = model.wte.weight.detach().clone()
    learn(model, [(x, y)], pseudo_counts=1.0)
    assert torch.equal(model.wte.weight != before, count(x, y) > 0)


def test_the_whole_text_at_once_leads_to_the_frequencies():
    model, (x, y) = chain(), tokens()
    counts = count(x, y)
    frequencies = counts / counts.sum(1, keepdim=True)
    entropy = -(counts * frequencies.log()).nansum() / counts.sum()
    assert model(x, y) > entropy + 1
    learn(model, 1000 * [(x, y)], pseudo_counts=1.0)
    assert 0 < model(x, y) - entropy < 0.002


def test_adamw_is_adamw_on_the_table():
    """torch's own, with decay on all rows, those never seen too, and clipping."""
    model, (x, y) = chain(), tokens()
    theirs = torch.nn.Embedding(50, 50, _weight=model.wte.weight.detach().clone())
    adamw = torch.optim.AdamW(theirs.parameters(), lr=0.1, betas=(0.9, 0.999), weight_decay=0.01)
    ours = make_optimizer(model, OptimConfig(learning_rate=0.1, weight_decay=0.01, beta2=0.999))
    for _ in range(5):
        F.cross_entropy(theirs(x).flatten(0, 1), y.flatten(), ignore_index=-1).backward()
        model(x, y).backward()
        for network, optimizer in ((theirs, adamw), (model, ours)):
            clip_gradient(network, 0.05)
            optimizer.step()
            optimizer.zero_grad()
    assert torch.allclose(model.wte.weight, theirs.weight, atol=1e-5)


@pytest.mark.full
@pytest.mark.parametrize('optimizer, tables, V', [('counts', 1, 16384), ('adamw', 4, 8192)])
def test_counting_takes_the_memory_of_one_table_and_adamw_of_four(optimizer, tables, V):
    """Two steps in a process of their own. AdamW holds weights, gradient and two moments."""
    code = '''if True:
        import json, torch
        from run import peak_memory
        from model import ModelConfig, make_model
        from features import build
        from optim import OptimConfig, clip_gradient, make_optimizer
        def steps(V):
            model = make_model(build(ModelConfig, arch='markov', vocab_size=V, block_size=512))
            optimizer = make_optimizer(model, build(OptimConfig, optimizer=OPTIMIZER, pseudo_counts=100.0))
            for _ in range(2):
                x, y = torch.randint(V, (2, 8, 512))
                model(x, y).backward()
                clip_gradient(model, 1.0)
                optimizer.step()
                optimizer.zero_grad()
        steps(50)  # what torch itself takes
        before = peak_memory(torch.device('cpu'))
        steps(SIZE)
        print(json.dumps((peak_memory(torch.device('cpu')) - before) / (4 * SIZE ** 2)))'''
    found = json.loads(run('-c', code.replace('OPTIMIZER', repr(optimizer)).replace('SIZE', str(V))).stdout)
    assert 0.9 * tables < found < 4 / 3 * tables


# -----------------------------------------------------------------------------
# train.py and sample.py

CHAIN = ['--arch=markov', '--block_size=32', '--batch_size=4', '--device=cpu', '--dtype=float32',
         '--max_iters=10', '--log_interval=1', '--eval_interval=5', '--eval_iters=0', '--sample_tokens=0']
MARKOV = ['--optimizer=counts', '--pseudo_counts=1']
ADAMW = ['--learning_rate=0.3', '--weight_decay=0.01']
LOW = ['--rank_embed=16', '--dropout=0.1', '--learning_rate=3e-2']


def train(out_dir, *args, dataset, nproc=1, check=True):
    """conftest's, of a chain in place of a transformer."""
    done = run('train.py', f'--out_dir={out_dir}', f'--dataset={dataset}', *CHAIN, *args, nproc=nproc)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def weights(out_dir, step=10):
    return safetensors.torch.load_file(f'{out_dir}/step_{step:08d}/model.safetensors')


@pytest.mark.parametrize('args', [MARKOV, ADAMW, LOW], ids=['table', 'adamw', 'low rank'])
def test_a_resumed_run_is_the_same_bit_for_bit(tmp_path, dataset, args):
    train(tmp_path / 'whole', *args, dataset=dataset)
    until = ['--lr_decay_iters=10'] if args != MARKOV else []
    train(tmp_path / 'parts', *args, '--max_iters=5', *until, dataset=dataset)
    done = train(tmp_path / 'parts', *args, *until, dataset=dataset)
    assert 'resuming' in done.stdout and 'a Markov chain' in done.stdout
    whole, parts = (weights(tmp_path / name) for name in ('whole', 'parts'))
    assert all(torch.equal(t, parts[name]) for name, t in whole.items())
    states = [torch.load(f'{tmp_path}/{name}/step_00000010/optimizer.pt', weights_only=True)['state']
              for name in ('whole', 'parts')]
    assert all(torch.equal(t, states[1][n][key]) for n, state in states[0].items()
               for key, t in state.items())


@pytest.mark.parametrize('args', [['--gradient_accumulation_steps=2'],
                                  ['--gradient_accumulation_steps=2', 'nproc=2']],
                         ids=['micro-batches', 'ranks'])
def test_micro_batches_and_ranks_see_the_same_counts(tmp_path, dataset, args):
    train(tmp_path / 'whole', *MARKOV, '--batch_size=8', dataset=dataset)
    nproc = 2 if 'nproc=2' in args else 1
    train(tmp_path / 'split', *MARKOV, '--batch_size=4', args[0], dataset=dataset, nproc=nproc)
    whole, split = (weights(tmp_path / name)['wte.weight'] for name in ('whole', 'split'))
    assert torch.allclose(whole, split, atol=1e-5)


def test_counts_have_no_norm_and_go_on(tmp_path, dataset):
    assert 'done' in train(tmp_path, *MARKOV, '--max_iters=12', dataset=dataset).stdout


@pytest.mark.parametrize('args', [MARKOV, ADAMW, LOW], ids=['table', 'adamw', 'low rank'])
def test_training_learns_what_counting_says_and_sample_reads_the_checkpoint(tmp_path, args):
    write_dataset(tmp_path / 'data', vocab_size=257)  # what the byte tokenizer has
    train(tmp_path / 'run', *args, '--max_iters=200', '--eval_interval=200', '--log_interval=200',
          '--packing=document', dataset=tmp_path / 'data')
    first, last = (r['val_loss'] for r in read_log(tmp_path / 'run') if 'val_loss' in r)
    assert first > 5.5 and last < 1.4  # a stride of 1, 2 or 3: ln 3 = 1.1
    done = run('sample.py', f'--out_dir={tmp_path}/run', '--start=a', '--max_new_tokens=50', '--int8',
               '--device=cpu')
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize('rank', [0, 8])
def test_generation_goes_on_past_block_size(rank):
    model = chain(rank_embed=rank, block_size=4).eval()
    follows = model.logits(model.hidden(torch.arange(50))).argmax(-1)
    wanted = [3]
    for _ in range(20):
        wanted.append(int(follows[wanted[-1]]))
    for network, use_cache in ((model, True), (model, False), (pack(model, 'float32'), True)):
        assert ([3] + [int(t) for t in generate(network, [[3]], 20, temperature=0, use_cache=use_cache)]
                == wanted)


@pytest.mark.parametrize('args, words', [
    (['--rank_embed=65'], 'rank_embed=65'),
    (['--label_smoothing=0.1'], 'label_smoothing=0.1'),
    (['--minutes=1'], 'arch=markov'),
    (['--dropout=1'], 'dropout=1'),
    (['--optimizer=muon'], 'optimizer=muon: a Markov chain has no matrices for Muon: use adamw'),
    (['--optimizer=counts', '--rank_embed=4'],
     'optimizer=counts: counts what follows what in a full Markov table'),
    (['--optimizer=counts', '--arch=decoder'],
     'optimizer=counts: counts what follows what in a full Markov table'),
    (['--optimizer=counts', '--pseudo_counts=0'], 'pseudo_counts=0.0: takes a number above 0'),
    # what has no effect is not accepted in silence
    *[([f'--{name}'], f'{name.partition("=")[0]}={name.partition("=")[2]}: arch=markov (a full Markov table) '
       'ignores it: leave it out')
      for name in ('rank_head=4', 'softcap=30.0', 'dropout=0.1', 'n_layer=6', 'n_head=12', 'rank_qk=8',
                   'n_expert=4', 'tie=False', 'position=rope')],
    (['--rank_embed=8', '--n_embd=64'],
     'n_embd=64: arch=markov (a low-rank Markov chain) ignores it: leave it out'),
    *[(['--optimizer=counts', f'--{name}'], f'{name}: optimizer=counts ignores it: leave it out')
      for name in ('learning_rate=0.1', 'weight_decay=0.01', 'beta1=0.9', 'grad_clip=1.0', 'muon_lr=0.02',
                   'min_lr=0.1')],
    (['--pseudo_counts=10'], 'pseudo_counts=10.0: optimizer=adamw ignores it: leave it out'),
    (['--muon_lr=0.1'], 'muon_lr=0.1: belongs to Muon: set optimizer=muon too'),
])
def test_what_cannot_work_is_refused_in_one_line(tmp_path, dataset, args, words):
    assert words in one_line(train(tmp_path / 'run', *args, dataset=dataset, check=False))


def test_a_recipe_can_be_tried_without_its_muon(tmp_path, dataset):
    """
    A config file gives all that a recipe has; an optimizer named on the command line leaves what is Muon's
    idle.
    """
    s = configure(Settings, [str(ROOT / 'config/fast.py'), '--optimizer=adamw'])
    assert s.muon_lr == 0.03 and not s.uses_muon
    assert configure(Settings, ['--depth=3', '--muon_lr=0.1']).muon_lr == 0.1  # the dial takes Muon
    chain = [str(ROOT / 'config/markov_pubmed.py')]
    assert configure(Settings, chain).pseudo_counts == 100
    assert configure(Settings, [*chain, '--optimizer=adamw', '--learning_rate=0.1']).optimizer == 'adamw'


def test_what_a_table_takes_is_said_before_it_is_taken(tmp_path, dataset, monkeypatch):
    said = 'the table of 64 x 64 takes 0.0 GB with its gradient and two moments'
    assert said in train(tmp_path / 'adamw', '--max_iters=1', dataset=dataset).stdout
    assert said not in train(tmp_path / 'counts', *MARKOV, '--max_iters=1', dataset=dataset).stdout
    import features.markov.settings as running
    monkeypatch.setattr(running, 'free_memory', lambda device: 4 * 64 ** 2 * 4 - 1)
    refused = one_line(train(tmp_path / 'none', '--max_iters=1', dataset=dataset, check=False))
    assert ('optimizer=adamw: a full Markov table of 64 tokens takes 0.0 GB' in refused
            and '--optimizer=counts' in refused)
    assert not (tmp_path / 'none').exists()
    monkeypatch.setattr(running, 'free_memory', lambda device: 4 * 64 ** 2 * 4)
    train(tmp_path / 'enough', '--max_iters=1', dataset=dataset)
    assert free_memory(torch.device('cpu')) > 2 ** 20


def test_a_table_that_was_counted_under_adamw_s_name_is_read_and_not_gone_on_with(tmp_path, dataset):
    train(tmp_path / 'new', *MARKOV, dataset=dataset)
    folder = checkpoint.find(str(tmp_path / 'new'))
    state, moments = checkpoint.load_state(folder), torch.load(f'{folder}/optimizer.pt', weights_only=True)
    del state['settings']['pseudo_counts']
    state['settings'] |= {'optimizer': 'adamw', 'learning_rate': 100.0}
    moments['state'][0]['step'] = torch.zeros(())
    checkpoint.save(str(tmp_path / 'old'), state['step'], checkpoint.read_weights(folder), moments, state)
    for args in (MARKOV, ['--learning_rate=100']):
        refused = one_line(train(tmp_path / 'old', *args, '--max_iters=20', dataset=dataset, check=False))
        assert (f'out_dir={tmp_path}/old: '
                'holds a Markov table that was counted before there was optimizer=counts' in refused)
    losses = [train(tmp_path / name, '--eval_only', dataset=dataset).stdout.split('val_loss ')[1]
              .split(',')[0] for name in ('new', 'old')]
    assert losses[0] == losses[1]
    train(tmp_path / 'next', *MARKOV, f'--init_from={tmp_path}/old', '--max_iters=1', dataset=dataset)
    refused = one_line(train(tmp_path / 'new', '--optimizer=counts', '--pseudo_counts=2', '--max_iters=20',
                             dataset=dataset, check=False))
    assert 'pseudo_counts=2.0: out_dir=' in refused
