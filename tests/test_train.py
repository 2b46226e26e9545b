"""
Training as a user runs it: resume = uninterrupted, accumulation = ranks = big batch, evaluation disturbs
nothing, signals lose nothing, bad input is one line. Every claim of equality is bit for bit.
"""
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import chdir
from functools import partial
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, one_line, read_log, run, sha256, train, write_dataset
from inject import inject
from safetensors.torch import load_file

import checkpoint
import sample
import train as training
from batches import Batches, Mixture, Source, evaluate, validation_batch, validation_rows
from configurator import UserError
from features.networks import read_model
from features.scale.ranks import Ranks
from model import ChunkedCrossEntropy, ModelConfig, Transformer, compile_all
from optim import FirstSteps, Interval, Muon
from run import StopSignal
from sample import show_sample
from tokenizer import new_tokenizer
from train import Settings


def last(out_dir):
    """(weights, optimizer state) of the newest checkpoint."""
    folder = checkpoint.find(str(out_dir))
    return load_file(f'{folder}/model.safetensors'), torch.load(f'{folder}/optimizer.pt', weights_only=True)


def same(a, b):
    """Whether two nests of dicts, lists and tensors are equal bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.fixture(scope='module')
def whole(dataset, tmp_path_factory):
    """Ten uninterrupted steps, dropout on."""
    out = tmp_path_factory.mktemp('whole')
    train(out, '--dropout=0.1', dataset=dataset)
    return out


# --- resume ---

def test_ten_steps_are_five_and_five_in_a_new_process(whole, dataset, tmp_path):
    train(tmp_path, '--dropout=0.1', '--max_iters=5', '--lr_decay_iters=10', '--warmup_iters=0',
          dataset=dataset)
    train(tmp_path, '--dropout=0.1', '--lr_decay_iters=10', '--warmup_iters=0', dataset=dataset)
    assert same(last(whole), last(tmp_path))  # weights, moments, the optimizer's own step
    assert read_log(whole) == read_log(tmp_path)  # losses, norms, rates
    assert len(last(tmp_path)[1]['state']) == len(last(tmp_path)[0])  # moments for every tensor


def test_the_scaler_of_float16_goes_on_where_it_was(dataset, tmp_path):
    """It counts the steps without an overflow: after a resume it must not begin at zero."""
    for steps in (3, 5):
        train(tmp_path, '--dtype=float16', f'--max_iters={steps}', dataset=dataset)
        state = checkpoint.load_state(checkpoint.find(str(tmp_path)))
        assert state['scaler']['_growth_tracker'] == steps


def test_a_gradient_is_clipped_before_the_update(dataset, tmp_path):
    """Of a gradient of norm 1e-12 AdamW's epsilon leaves nothing: the weights stay where they began."""
    for most in ('1e-12', '1'):
        train(tmp_path / most, f'--grad_clip={most}', '--weight_decay=0', '--max_iters=3',
              '--checkpoint_interval=1', '--keep_checkpoints=3', dataset=dataset)
        first, last_ = (checkpoint.read_weights(tmp_path / most / f'step_0000000{n}') for n in (1, 3))
        change = max((last_[name] - first[name]).abs().max().item() for name in first)
        assert (change < 1e-6) == (most == '1e-12')


MUON = ['--optimizer=muon', '--tie=False', '--embed_norm', '--value_residual', '--mlp=swiglu',
        '--embed_lr=0.3', '--dropout=0.1']


def test_with_muon_too_ten_steps_are_five_and_five_and_two_ranks_are_one(dataset, tmp_path):
    for name, steps, nproc in (('one', (10,), 1), ('parts', (5, 10), 1), ('two', (10,), 2)):
        for max_iters in steps:
            train(tmp_path / name, *MUON, '--gradient_accumulation_steps=2', f'--max_iters={max_iters}',
                  '--lr_decay_iters=10', '--warmup_iters=0', dataset=dataset, nproc=nproc)
    assert (same(last(tmp_path / 'one'), last(tmp_path / 'parts'))
            and read_log(tmp_path / 'one') == read_log(tmp_path / 'parts'))
    assert same(last(tmp_path / 'one'), last(tmp_path / 'two'))


def test_resuming_with_another_optimizer_is_refused_and_with_other_rates_every_tensor_keeps_its_own_moments(
        dataset, tmp_path):
    train(tmp_path, '--max_iters=2', '--optimizer=muon', "--lr_scale={'attn.k': 2}", dataset=dataset)
    assert 'optimizer=adamw' in one_line(train(tmp_path, '--max_iters=3', '--optimizer=adamw',
                                               dataset=dataset, check=False))
    before = moments(tmp_path)
    train(tmp_path, '--max_iters=3', '--optimizer=muon', "--lr_scale={'attn.v': 0, 'attn.k': 3}",
          dataset=dataset)
    after = moments(tmp_path)
    assert before.keys() == after.keys()
    for name, m in before.items():
        likeness = {other: torch.cosine_similarity(m.flatten(), t.flatten(), dim=0)
                    for other, t in after.items() if t.shape == m.shape}
        assert max(likeness, key=likeness.get) == name


def test_the_run_of_a_deleted_optimizer_is_read_but_not_resumed(dataset, tmp_path):
    train(tmp_path, '--max_iters=2', '--optimizer=muon', dataset=dataset)
    folder = Path(checkpoint.find(str(tmp_path)))
    state = json.loads((folder / 'state.json').read_text())
    state['settings']['optimizer'] = 'spectron'
    (folder / 'state.json').write_text(json.dumps(state))
    manifest = json.loads((folder / 'manifest.json').read_text())
    manifest['files']['state.json'] = {'size': (folder / 'state.json').stat().st_size,
                                       'sha256': sha256(folder / 'state.json')}
    (folder / 'manifest.json').write_text(json.dumps(manifest))
    for optimizer, words in (('muon', 'belongs to a run with optimizer=spectron'),
                             ('spectron', "got 'spectron', takes adamw | muon | counts")):
        done = train(tmp_path, '--max_iters=3', f'--optimizer={optimizer}', dataset=dataset, check=False)
        assert words in one_line(done)
    read_model(str(tmp_path))


def moments(out_dir):
    """{name: momentum} of the matrices under Muon."""
    state = last(out_dir)[1]
    names = [name for group in state['param_groups'] for name in group['param_names']]
    return {name: state['state'][n]['momentum'] for n, name in enumerate(names)
            if 'momentum' in state['state'][n]}


def test_a_run_stops_at_its_target_and_stays_there(dataset, tmp_path):
    race = ['--eval_interval=2', '--max_iters=100', '--target_val_loss=3.9']
    done = train(tmp_path, *race, dataset=dataset)
    records = [r for r in read_log(tmp_path) if 'val_loss' in r]
    assert records[-1]['val_loss'] <= 3.9 < records[-2]['val_loss'] and 2 < records[-1]['step'] < 100
    # a race does not stop for the loss it starts with
    assert records[0]['step'] == 2 and f'step {records[-1]["step"]}' in done.stdout
    train(tmp_path, *race, dataset=dataset)
    assert checkpoint.find(str(tmp_path)).endswith(f'step_{records[-1]["step"]:08d}')


def test_the_seconds_of_the_log_count_from_the_start_of_the_process(dataset, tmp_path):
    began = time.monotonic()
    train(tmp_path, '--max_iters=1', dataset=dataset, env={})  # a process of its own
    whole = time.monotonic() - began
    seconds = [json.loads(line)['seconds'] for line in open(tmp_path / 'log.jsonl')]
    assert whole / 2 < seconds[0] <= seconds[-1] < whole + 0.1  # most of it is loading torch
    train(tmp_path, '--max_iters=2', dataset=dataset, env={})
    # and goes on adding up
    assert ([json.loads(line)['seconds'] for line in open(tmp_path / 'log.jsonl')][-1]
            > seconds[-1] + whole / 4)


def test_the_next_batch_is_read_ahead_and_is_the_same(dataset):
    s = Settings(dataset=dataset, block_size=32, batch_size=2, gradient_accumulation_steps=2, seed=3)
    data, ranks = Mixture(dataset, 'train', 32, 3), Ranks(torch.device('cpu'))
    ahead = Batches(data, s, ranks)
    for step in (0, 1, 2, 7, 8, 3):  # in order, and anywhere
        micro, targets = ahead(step)
        assert [first for first, _, _ in micro] == [4 * step, 4 * step + 2] and targets == 4 * 32
        assert all(torch.equal(torch.from_numpy(data.rows(range(first, first + 2))[0]), x)
                   for first, x, _ in micro)


def test_the_same_seed_is_the_same_run_and_another_is_not(whole, dataset, tmp_path):
    train(tmp_path / 'a', '--dropout=0.1', dataset=dataset)
    train(tmp_path / 'b', '--dropout=0.1', '--seed=1', dataset=dataset)
    assert same(last(whole), last(tmp_path / 'a')) and not same(last(whole), last(tmp_path / 'b'))


def test_dropout_is_on(whole, dataset, tmp_path):
    train(tmp_path, dataset=dataset)
    assert not same(last(whole), last(tmp_path))


def test_a_finished_run_says_so_and_a_longer_one_goes_on(dataset, tmp_path):
    train(tmp_path, dataset=dataset)
    before = os.listdir(tmp_path)
    assert 'done: 10 steps' in train(tmp_path, dataset=dataset).stdout and os.listdir(tmp_path) == before
    train(tmp_path, '--max_iters=12', dataset=dataset)
    assert checkpoint.find(str(tmp_path)).endswith('step_00000012')


def test_scratch_moves_the_old_run_aside(dataset, tmp_path):
    train(tmp_path / 'run', dataset=dataset)
    train(tmp_path / 'run', '--init_from=scratch', '--n_layer=1', '--max_iters=1', dataset=dataset)
    assert checkpoint.find(str(tmp_path / 'run.old1')).endswith('step_00000010')
    assert (checkpoint.find(str(tmp_path / 'run')).endswith('step_00000001')
            and not list(tmp_path.glob('*/lock')))


def test_init_from_a_run_takes_its_weights_and_network_with_a_fresh_schedule(whole, dataset, tmp_path):
    done = run('train.py', f'--out_dir={tmp_path}', f'--dataset={dataset}',
               *[a for a in TINY if not a.startswith(('--n_', '--block'))],
               f'--init_from={whole}', '--max_iters=1', '--learning_rate=0')
    assert done.returncode == 0, done.stderr
    best = checkpoint.find(str(whole), 'best')
    assert same(last(tmp_path)[0], load_file(f'{best}/model.safetensors'))
    refused = train(tmp_path / 'other', f'--init_from={whole}', '--n_layer=3', dataset=dataset, check=False)
    assert 'n_layer=3' in one_line(refused) and not (tmp_path / 'other').exists()


def test_after_a_damaged_checkpoint_the_steps_are_made_again_and_nothing_sound_is_lost(whole, dataset,
                                                                                       tmp_path):
    train(tmp_path, '--dropout=0.1', '--checkpoint_interval=1', '--keep_checkpoints=3', dataset=dataset)
    with open(tmp_path / 'step_00000010' / 'model.safetensors', 'ab') as f:
        f.write(b'x')
    train(tmp_path, '--dropout=0.1', '--keep_checkpoints=1', dataset=dataset)
    assert same(last(whole), last(tmp_path)) and read_log(whole) == read_log(tmp_path)  # the log was cut, too
    assert {p.name for p in tmp_path.glob('step_*')} == {'step_00000010', 'step_00000010.damaged'}


def test_a_changed_weight_decay_counts_from_where_the_run_goes_on(whole, dataset, tmp_path):
    shorter = ['--dropout=0.1', '--lr_decay_iters=10', '--warmup_iters=0']
    train(tmp_path, *shorter, '--max_iters=5', dataset=dataset)
    train(tmp_path, *shorter, '--weight_decay=9.0', dataset=dataset)
    assert not same(last(whole)[0], last(tmp_path)[0])


# --- ranks, accumulation ---

def test_two_ranks_are_one_rank_with_two_micro_batches(dataset, tmp_path):
    for name, nproc in (('one', 1), ('two', 2)):
        train(tmp_path / name, '--dropout=0.1', '--gradient_accumulation_steps=2', dataset=dataset,
              nproc=nproc)
    assert same(last(tmp_path / 'one'), last(tmp_path / 'two'))
    one, two = read_log(tmp_path / 'one'), read_log(tmp_path / 'two')
    assert [r.get('train_loss') for r in one] == [r.get('train_loss') for r in two]
    assert all(abs(a['val_loss'] - b['val_loss']) < 1e-6 for a, b in zip(one, two) if 'val_loss' in a)


def test_ranks_with_unequal_numbers_of_targets_are_one_rank_too(dataset, tmp_path):
    for name, nproc in (('one', 1), ('two', 2)):
        train(tmp_path / name, '--packing=document', '--gradient_accumulation_steps=2', dataset=dataset,
              nproc=nproc)
    assert same(last(tmp_path / 'one'), last(tmp_path / 'two'))


def test_accumulation_is_the_big_batch_also_when_rows_have_unequal_numbers_of_targets(dataset, tmp_path):
    """Documents, padded: the mean is over the global batch's real tokens, not the mean of means."""
    for name, sizes in (('big', (8, 1)), ('small', (2, 4))):
        train(tmp_path / name, '--packing=document', f'--batch_size={sizes[0]}',
              f'--gradient_accumulation_steps={sizes[1]}', '--learning_rate=1e-3', dataset=dataset)
    big, small = read_log(tmp_path / 'big'), read_log(tmp_path / 'small')
    assert all(abs(a['train_loss'] - b['train_loss']) < 1e-5 for a, b in zip(big, small) if 'train_loss' in a)


def test_a_batch_on_two_ranks_is_shared_when_there_is_one_micro_batch(dataset, tmp_path):
    train(tmp_path, dataset=dataset, nproc=2)
    train(tmp_path / 'one', dataset=dataset)
    ours, one = read_log(tmp_path), read_log(tmp_path / 'one')
    assert all(abs(a['train_loss'] - b['train_loss']) < 1e-4 for a, b in zip(ours, one) if 'train_loss' in a)


# --- steps that are left out ---

def test_steps_that_were_trained_before_they_were_to_be_left_out_count_as_tokens(dataset, tmp_path,
                                                                                 monkeypatch):
    """
    A spike in update 46 leaves ten out, of which the checkpoint that the run goes back to, at 40, has trained
    the first three.
    """
    inject('loss@46=large', monkeypatch.setattr)
    args = ['--rewind_spikes=6', '--eval_interval=1000', '--checkpoint_interval=20', '--lr_decay_iters=70',
            '--warmup_iters=0']
    done = train(tmp_path, *args, '--max_iters=60', dataset=dataset)
    assert 'on without steps 41 to 47' in done.stdout
    tokens = {r['step']: r['tokens'] // (4 * 32) for r in read_log(tmp_path)}
    assert list(tokens.values()) == sorted(tokens.values())
    assert [tokens[step] for step in (40, 48, 60)] == [40, 41, 53]
    # 5 was trained long ago
    monkeypatch.setattr(training, 'train', partial(training.train, left_out=[5, 66]))
    train(tmp_path, *args[1:], '--max_iters=70', dataset=dataset)
    tokens = {r['step']: r['tokens'] // (4 * 32) for r in read_log(tmp_path)}
    assert [tokens[step] for step in (60, 61, 70)] == [53, 54, 62]


# --- evaluation ---

def test_evaluating_every_step_changes_nothing(whole, dataset, tmp_path):
    train(tmp_path, '--dropout=0.1', '--eval_interval=1', '--sample_tokens=5', dataset=dataset)
    never = tmp_path / 'never'
    train(never, '--dropout=0.1', '--eval_interval=1000', dataset=dataset)
    assert same(last(whole), last(tmp_path)) and same(last(whole), last(never))


def test_the_validation_rows_do_not_depend_on_the_batch_size(dataset):
    torch.manual_seed(0)
    model = Transformer(ModelConfig(vocab_size=64, block_size=8, n_layer=1, n_head=2, n_embd=16,
                                    zero_init=False))
    torch.nn.init.normal_(model.wte.weight)
    source, ranks = Source(dataset, 'val', 8, 'stream'), Ranks(torch.device('cpu'))
    assert source.rows > 36

    def val_loss(eval_iters, batch_size):
        s = SimpleNamespace(eval_iters=eval_iters, batch_size=batch_size, dtype='float32')
        return evaluate(model, [source], s, ranks)['val_loss']
    for eval_iters, rows in (1, 12), (3, 36), (0, source.rows):
        x, y = map(torch.from_numpy, validation_batch(source, validation_rows(source, rows), 0))
        wanted = model(x, y).item()
        assert [val_loss(eval_iters, n) for n in (1, 4, 5, 8, 1000)] == pytest.approx([wanted] * 5, abs=1e-5)
    assert val_loss(1, 8) != pytest.approx(val_loss(3, 8), abs=1e-5)


def test_eval_only_prints_the_losses_and_writes_nothing(whole, dataset, tmp_path):
    before = sorted((p, p.stat().st_mtime_ns) for p in whole.rglob('*'))
    done = train(whole, '--dropout=0.1', '--eval_only=True', dataset=dataset)
    assert f'val_loss {read_log(whole)[-1]["val_loss"]:.4f}' in done.stdout
    assert sorted((p, p.stat().st_mtime_ns) for p in whole.rglob('*')) == before
    train(tmp_path / 'new', '--eval_only=True', dataset=dataset)
    assert not (tmp_path / 'new').exists()


def test_eval_only_takes_network_and_data_from_the_run(dataset, tmp_path):
    """Other heads have the same shapes, other tokenizers as many tokens: neither is evaluated in silence."""
    train(tmp_path / 'run', '--max_iters=1', dataset=dataset)
    write_dataset(tmp_path / 'other')
    meta = json.loads((tmp_path / 'other' / 'meta.json').read_text())
    meta['tokenizer']['vocab_size'] += 1
    (tmp_path / 'other' / 'meta.json').write_text(json.dumps(meta))
    args = [f'--out_dir={tmp_path}/run', '--eval_only', '--device=cpu', '--dtype=float32', '--eval_iters=0']

    def loss(*more):
        done = run('train.py', *args, *more)
        assert done.returncode == 0, done.stderr
        return done.stdout.split('val_loss ')[1]
    assert loss() == loss(f'--dataset={dataset}') == loss(f'--dataset={dataset}', *TINY)
    for more, words in ((['--n_head=4'], 'n_head=4: the weights in .* have n_head=2'),
                        ([f'--dataset={tmp_path}/other'], 'prepared with another tokenizer')):
        done = run('train.py', *args, *more)
        assert done.returncode == 2 and re.search(words, done.stderr)


def test_eval_only_is_of_the_weights_that_init_from_names(dataset, tmp_path):
    """
    nanoGPT's config/eval_gpt2.py, where out holds another run: its losses are not taken for those of GPT-2.
    """
    for name, seed in (('one', 1), ('other', 2)):
        train(tmp_path / name, f'--seed={seed}', '--max_iters=1', dataset=dataset)
    train(tmp_path / 'tuned', f'--init_from={tmp_path}/one', '--max_iters=1', dataset=dataset)

    def loss(out_dir, *args):
        done = train(tmp_path / out_dir, '--eval_only', *args, dataset=dataset)
        return done.stdout.split('val_loss ')[1].split(',')[0]
    assert loss('one') != loss('other')
    assert loss('other', f'--init_from={tmp_path}/one') == loss('one')
    assert loss('tuned', f'--init_from={tmp_path}/one') == loss('tuned') != loss('one')


def test_the_log_has_what_the_design_promises(whole):
    records = [json.loads(line) for line in (whole / 'log.jsonl').read_text().splitlines()]
    training, evaluation = [r for r in records if 'train_loss' in r], [r for r in records if 'val_loss' in r]
    assert ([r['step'] for r in evaluation] == [0, 5, 10]
            and [r['step'] for r in training] == list(range(1, 11)))
    assert {'step', 'tokens', 'flops', 'seconds', 'train_loss', 'lr', 'grad_norm', 'tokens_per_second',
            'mfu'} <= training[0].keys()
    assert {'val_loss', 'val_bpb', 'peak_memory_bytes'} <= evaluation[0].keys()
    assert training[-1]['tokens'] == 10 * 4 * 32 and evaluation[-1]['val_loss'] < evaluation[0]['val_loss']


def test_a_mixture_is_validated_by_source(tmp_path):
    for n in range(2):
        write_dataset(tmp_path / f'd{n}', seed=n)
    mixture = {str(tmp_path / 'd0'): 3, str(tmp_path / 'd1'): 1}
    train(tmp_path / 'out', dataset=mixture)
    record = [r for r in read_log(tmp_path / 'out') if 'val_loss' in r][-1]
    a, b = (record[f'val_loss/{name}'] for name in mixture)
    assert min(a, b) < record['val_loss'] < max(a, b)
    bits = [record[f'val_bpb/{name}'] for name in mixture]
    assert min(bits) < record['val_bpb'] < max(bits)
    meta = json.loads((tmp_path / 'd1' / 'meta.json').read_text())
    del meta['splits']['val']['bytes']
    (tmp_path / 'd1' / 'meta.json').write_text(json.dumps(meta))
    train(tmp_path / 'unknown', dataset=mixture)
    record = [r for r in read_log(tmp_path / 'unknown') if 'val_loss' in r][-1]
    # a total over what has no bytes would be too high
    assert {name for name in record if 'bpb' in name} == {f'val_bpb/{tmp_path / "d0"}'}


def test_label_smoothing_and_bfloat16_train(dataset, tmp_path):
    train(tmp_path, '--label_smoothing=0.1', '--dtype=bfloat16', dataset=dataset)
    losses = [r['train_loss'] for r in read_log(tmp_path) if 'train_loss' in r]
    assert losses[-1] < losses[0]


def test_compiled_and_plain_are_the_same_run(whole, dataset, tmp_path):
    """And a compiled run's checkpoint is an ordinary one: same names, resumed without compiling."""
    train(tmp_path, '--dropout=0.0', '--compile=True', '--max_iters=5', '--lr_decay_iters=10',
          dataset=dataset, timeout=300)
    train(tmp_path, '--dropout=0.0', '--lr_decay_iters=10', dataset=dataset)
    train(tmp_path / 'plain', '--dropout=0.0', dataset=dataset)
    compiled, plain = read_log(tmp_path), read_log(tmp_path / 'plain')
    assert all(abs(a['train_loss'] - b['train_loss']) < 1e-4 for a, b in zip(compiled, plain)
               if 'train_loss' in a)
    assert last(tmp_path)[0].keys() == last(whole)[0].keys()


# --- runs that learn nothing ---

def no_gradient(ctx, grad):
    """In place of the loss's backward(): torch 2.11 did this to an operation in place, compiled."""
    return *(None if t is None else 0 * t for t in ctx.saved_tensors), *[None] * 6


@pytest.mark.parametrize(
    'args', [[], ['--optimizer=muon', '--tie=False', '--warmup_iters=9'], ['--gradient_accumulation_steps=2'],
             ['--lr_decay_iters=5', '--min_lr=1e-4', '--max_iters=30']])
def test_a_gradient_of_zero_from_the_start_ends_the_run(dataset, tmp_path, monkeypatch, args):
    monkeypatch.setattr(ChunkedCrossEntropy, 'backward', no_gradient)
    last_step = 10
    if '--max_iters=30' in args:
        monkeypatch.setattr(training, 'train', partial(training.train, left_out=[3]))
        last_step = 11
    said = one_line(train(tmp_path, *args, dataset=dataset, check=False))
    assert (f'the gradient of every tensor was exactly zero in steps 1 to {last_step}' in said
            and torch.__version__ in said)


def test_a_loss_that_never_changes_ends_the_run(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(Muon, 'step', lambda self: None)
    said = one_line(train(tmp_path, '--tie=False', dataset=dataset, check=False))  # a head of zeros
    assert 'the loss was exactly 4.1589 in steps 1 to 10' in said and 'learning_rate=0.01' in said


@pytest.mark.parametrize('args', [['--learning_rate=0', '--tie=False', '--max_iters=12'], ['--max_iters=9'],
                                  ['--max_iters=9', '--tie=False']])
def test_a_run_that_is_not_to_learn_or_is_too_short_to_tell_goes_on(dataset, tmp_path, monkeypatch, args):
    monkeypatch.setattr(ChunkedCrossEntropy, 'backward', no_gradient)
    assert 'done' in train(tmp_path, *args, dataset=dataset).stdout


def test_a_table_of_counts_has_no_gradient_and_goes_on(dataset, tmp_path):
    args = ['--arch=markov', '--optimizer=counts', '--block_size=32', '--batch_size=4', '--max_iters=12',
            '--device=cpu', '--sample_tokens=0']
    done = run('train.py', f'--out_dir={tmp_path}', f'--dataset={dataset}', *args)
    assert 'done' in done.stdout, done.stderr


@pytest.mark.parametrize('losses, norms, targets, rates, words', [
    ([3.0] * 10, [0.0] * 10, [5] * 10, [0.1] * 10, 'the gradient of every tensor'),
    (range(10, 20), [0.0] * 10, [5] * 10, [1e-9] * 10, 'the gradient of every tensor'),
    ([3.0] * 10, [1.0] * 10, [5] * 10, [0.1] * 10, 'the loss was exactly 3.0000 in steps 1 to 10'),
    ([3.0] * 10, [1.0] * 10, [5] * 10, [0.0] * 9 + [0.1], 'the loss was exactly'),
    ([3.0] * 14, [1.0] * 14, [5, 0, 0, 0, 0] + [5] * 9, [0.1] * 14, 'in steps 1 to 14'),
    ([3.0] * 9 + [3.1], [0.0] * 9 + [1e-9], [5] * 10, [0.1] * 10, ''),
    ([3.0] * 10, [0.0] * 10, [0] * 10, [0.1] * 10, ''),  # every target is masked, or every step was skipped
    ([0.0] * 10, [0.0] * 10, [5] * 10, [0.1] * 10, ''),  # a text of one letter
    ([1e-6] * 10, [0.1] * 10, [5] * 10, [0.1] * 10, ''),  # learned already: float32 rounds
    ([3.0] * 10, [0.1] * 10, [5] * 10, [1e-7] * 10, ''),  # a warm-up so long that nothing shows yet
    ([3.0] * 10, [0.0] * 10, [5] * 10, [0.0] * 10, ''),
    ([3.0] * 20, [0.1] * 20, [5] * 20, [0.1] * 3 + [0.0] * 17, 'the loss'),
    # the first ten count
    ([*range(10, 20), *[3.0] * 20], [*[1.0] * 10, *[0.0] * 20], [5] * 30, [0.1] * 30, '')])
def test_the_first_steps_are_judged_and_no_others(losses, norms, targets, rates, words):
    class TwoRanks:
        @staticmethod
        def sum(*values):
            return [2 * value for value in values]  # another has the same
    first, s, said = FirstSteps(), Settings(), ''
    try:
        for step, (loss, norm, count, rate) in enumerate(zip(losses, norms, targets, rates)):
            done = training.Step(torch.tensor(loss * count / 2), count, torch.tensor(norm / 2), stop=False)
            first.add(step + 1, done, rate, s, TwoRanks())
    except UserError as error:
        said = str(error)
    assert said.count('\n') == 0 and (words in said if words else not said)


# --- the progress line ---

def test_a_progress_line_after_a_resume_is_about_all_of_its_steps(dataset, tmp_path):
    """Also where the run was stopped between two of them: its loss, and the loads of experts."""
    args = ['--log_interval=4', '--eval_interval=100', '--lr_decay_iters=12', '--warmup_iters=0',
            '--n_expert=4']
    train(tmp_path / 'whole', *args, '--max_iters=12', dataset=dataset)
    for max_iters in (1, 3, 6, 12):
        train(tmp_path / 'cut', *args, f'--max_iters={max_iters}', dataset=dataset)
    records = [[r for r in read_log(tmp_path / name) if 'train_loss' in r] for name in ('whole', 'cut')]
    assert records[0] == records[1] and [r['step'] for r in records[0]] == [1, 4, 8, 12]


def test_the_speed_is_that_of_steps_which_compile_nothing():
    interval = Interval(torch.device('cpu'))
    for seconds in (60.0, 0.5, 0.5):
        interval.time(seconds, is_slow=False)
    assert interval.steps_per_second() == 2  # the first of a process is slow in any case
    interval.reset()
    interval.time(30.0, is_slow=True)
    assert interval.steps_per_second() == 1 / 30 and interval.steps == 0  # all that is known
    interval.time(0.25, is_slow=False)
    assert interval.steps_per_second() == 4


def test_how_long_it_will_take_is_said_after_the_second_step_of_a_process(dataset, tmp_path):
    for max_iters, first in ((6, 1), (9, 7)):
        said = train(tmp_path, f'--max_iters={max_iters}', dataset=dataset).stdout
        lines = [line for line in said.splitlines() if 'tokens/s' in line]
        assert (lines[0].startswith(f'step {first}/')
                and [line.endswith('left') for line in lines] == [False] + [True] * (len(lines) - 1))


# --- Weights & Biases ---

class Tracker:
    """What is used of the module wandb, and of the run that its init() returns."""
    __spec__ = ModuleSpec('wandb', None)
    Error = type('Error', (Exception,), {})

    def __init__(self):
        self.given, self.steps, self.step, self.problem = [], [], 0, None

    def login(self, verify):
        if self.problem:
            raise self.Error(self.problem)

    def init(self, **given):
        self.given.append(given)
        return self

    def log(self, record, step):
        self.steps.append(step)
        self.step = step
        if step == 7:
            raise self.Error('gone')


@pytest.fixture
def tracker(monkeypatch):
    tracker = Tracker()
    monkeypatch.setitem(sys.modules, 'wandb', tracker)
    monkeypatch.delenv('WANDB_MODE', raising=False)
    return tracker


def test_a_resumed_run_goes_on_in_its_run_of_wandb_and_does_without_it_where_it_fails(dataset, tmp_path,
                                                                                      tracker):
    train(tmp_path / 'a', '--wandb_log', '--max_iters=5', dataset=dataset)
    train(tmp_path / 'a', '--wandb_log', '--max_iters=6', dataset=dataset)
    assert tracker.steps == [0, 1, 2, 3, 4, 5, 5, 6, 6]  # an evaluation has its step's loss beside it
    said = train(tmp_path / 'a', '--wandb_log', '--max_iters=8', dataset=dataset).stdout
    assert (said.count('wandb_log: gone: from here on, ') == 1 and 'done: 8 steps' in said
            and tracker.steps[-1] == 7)
    train(tmp_path / 'b', '--wandb_log', '--max_iters=2', dataset=dataset)
    ids = [given['id'] for given in tracker.given]
    assert ids[0] == ids[1] == ids[2] != ids[3] and {given['resume'] for given in tracker.given} == {'allow'}
    assert (tmp_path / 'a' / 'wandb_id').read_text() == ids[0] + '\n'
    train(tmp_path / 'a', '--wandb_log', '--max_iters=2', '--init_from=scratch', dataset=dataset)
    assert tracker.given[-1]['id'] not in ids  # another run


def test_nothing_is_written_where_wandb_does_not_know_the_user(dataset, tmp_path, tracker, monkeypatch):
    tracker.problem = 'No API key configured.'
    said = one_line(train(tmp_path / 'out', '--wandb_log', dataset=dataset, check=False))
    assert said.endswith('wandb_log=True: No API key configured: run wandb login, or set WANDB_MODE=offline')
    assert not (tmp_path / 'out').exists()
    monkeypatch.setenv('WANDB_MODE', 'offline')
    train(tmp_path / 'out', '--wandb_log', '--max_iters=2', dataset=dataset)


def test_nothing_is_written_where_wandb_is_not_installed(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr('features.study.wandb_log.find_spec', lambda name: None)
    said = one_line(train(tmp_path / 'out', '--wandb_log', dataset=dataset, check=False))
    assert said.endswith('wandb_log=True: wandb is not installed: pip install wandb')
    assert not (tmp_path / 'out').exists()


@pytest.mark.slow
def test_two_runs_of_wandb_itself_without_a_network_are_one(dataset, tmp_path):
    pytest.importorskip('wandb')
    args = [f'--out_dir={tmp_path}', f'--dataset={dataset}', *TINY, '--wandb_log']
    for max_iters in (5, 10):
        done = run('train.py', *args, f'--max_iters={max_iters}', env={'WANDB_MODE': 'offline'})
        assert done.returncode == 0, done.stderr
    runs = [path.name for path in (tmp_path / 'wandb').glob('offline-run-*')]
    assert (len(runs) == 2
            and {name.rpartition('-')[2] for name in runs} == {(tmp_path / 'wandb_id').read_text().strip()})


# --- checkpoints ---

def test_only_the_newest_and_the_best_are_kept(dataset, tmp_path):
    train(tmp_path, '--checkpoint_interval=1', '--keep_checkpoints=2', '--eval_interval=4', '--max_iters=10',
          dataset=dataset)
    steps = {int(p.name[5:]) for p in tmp_path.glob('step_*')}
    best = json.loads((tmp_path / 'best').read_text())
    assert steps == {9, 10, int(best['checkpoint'][5:])}
    assert best['val_loss'] == min(r['val_loss'] for r in read_log(tmp_path) if 'val_loss' in r)


def test_always_save_checkpoint_false_saves_what_is_better_and_the_end(dataset, tmp_path):
    train(tmp_path, '--always_save_checkpoint=False', '--learning_rate=30', '--warmup_iters=5',
          '--eval_interval=5', dataset=dataset)
    best = json.loads((tmp_path / 'best').read_text())
    assert {p.name for p in tmp_path.glob('step_*')} == {best['checkpoint'], 'step_00000010'}


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_after_the_step_and_the_run_goes_on_bitwise(dataset, tmp_path, number):
    slow = ['--max_iters=400', '--eval_interval=1000', '--n_embd=64', '--batch_size=16', '--log_interval=1']
    args = [sys.executable, 'train.py', f'--out_dir={tmp_path / "cut"}', f'--dataset={dataset}', *TINY, *slow]
    process = subprocess.Popen(args, cwd=ROOT, env=os.environ | {'OMP_NUM_THREADS': '1'},
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for line in process.stdout:
        if line.startswith('step 20/'):
            process.send_signal(number)
            break
    output = process.stdout.read()
    assert process.wait(30) == 128 + number and f'stopped by {number.name}' in output, output
    stopped_at = int(checkpoint.find(str(tmp_path / 'cut'))[-8:])
    assert 20 <= stopped_at < 400
    end = f'--max_iters={stopped_at + 5}'
    for name in ('cut', 'whole'):
        train(tmp_path / name, *slow, end, '--lr_decay_iters=400', '--warmup_iters=20', dataset=dataset)
    assert same(last(tmp_path / 'cut'), last(tmp_path / 'whole'))


def test_sigterm_to_torchrun_saves_once_on_all_ranks(dataset, tmp_path):
    args = [sys.executable, '-m', 'torch.distributed.run', '--standalone',
            '--nproc_per_node=2', 'train.py', f'--out_dir={tmp_path}', f'--dataset={dataset}',
            *TINY, '--max_iters=100000', '--eval_interval=100000']
    process = subprocess.Popen(args, cwd=ROOT, env=os.environ | {'OMP_NUM_THREADS': '1'},
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for line in process.stdout:
        if line.startswith('step 20/'):
            process.send_signal(signal.SIGTERM)
            break
    output = process.stdout.read()
    process.wait(60)
    assert 'stopped by SIGTERM' in output and len(list(tmp_path.glob('step_*'))) == 1, output
    assert checkpoint.damage(checkpoint.find(str(tmp_path))) is None


def test_a_loss_that_is_not_finite_stops_the_run_and_is_never_saved(dataset, tmp_path):
    done = train(tmp_path, '--learning_rate=1e30', '--warmup_iters=0', '--grad_clip=0', '--eval_interval=1',
                 '--softcap=0', dataset=dataset, check=False)
    assert 'not finite' in one_line(done) and 'learning_rate' in one_line(done)
    for folder in tmp_path.glob('step_*'):
        assert all(t.isfinite().all() for t in load_file(f'{folder}/model.safetensors').values())


# --- bad input: one line, exit code 2, nothing written ---

@pytest.mark.parametrize('args, words', [
    (['--dataset=nowhere'], 'python prepare.py FILE_OR_FOLDER --out=data/nowhere'),
    (['--n_layers=2'], 'did you mean n_layer'),
    (['--n_embd=33'], 'n_embd=33 is not divisible by n_head=2'),
    (['--n_kv_head=3'], 'n_kv_head'),
    (['--rank_qk=64'], 'rank_qk=64 is larger'),
    (['--rank_embed=64'], 'rank_embed=64 is larger'),
    (['--vocab_size=10'], 'vocab_size=10'),
    (['--learning_rate=fast'], 'takes float'),
    (['--sample_prompt=caf\udce9'], 'sample_prompt: not UTF-8'),
    (['--batch_size=0'], 'batch_size=0'),
    (['--device=tpu'], 'device=tpu'),
    (['--device=cuda:9'], 'device=cuda:9'),
    (['--init_from=nowhere'], 'nowhere: no such directory'),
    (['--init_from=resume'], 'no such directory'),
    (['--init_from=hf:nowhere'], 'nowhere'),
    (['--packing=documents'], 'stream | aligned | document'),
    (['config/nothing.py'], 'no such config file'),
    (['--seed=99999999999999999999'], 'seed='),
    (['config/gpt2.py', *TINY, '--learning_rate=3e-5'],
     'min_lr=6e-05: is above learning_rate=3e-05: lower it or leave it out'),
    (['--out_dir=README.md'], 'out_dir=README.md'),
    (['--rank_embed=40', '--rank_head=40', '--n_embd=128', '--vocab_size=64', '--rank_embed=100'],
     'rank_embed=100 is larger'),
])
def test_bad_input_is_one_line_and_nothing_is_written(dataset, tmp_path, args, words):
    done = train(tmp_path / 'out', *args, dataset=dataset, check=False)
    assert words in one_line(done) and not (tmp_path / 'out').exists()


def test_an_out_dir_of_another_run_is_left_alone(whole, dataset, tmp_path):
    write_dataset(tmp_path / 'other', seed=9)
    before = sorted((p, p.stat().st_mtime_ns) for p in whole.rglob('*'))
    for arg, words in (('--n_layer=3', 'n_layer=3'), ('--seed=2', 'seed=2'), ('--batch_size=2', '= 2'),
                       (f'--dataset={tmp_path / "other"}', 'dataset=')):
        refused = one_line(train(whole, '--dropout=0.1', arg, dataset=dataset, check=False))
        assert words in refused and 'belongs to' in refused
    assert sorted((p, p.stat().st_mtime_ns) for p in whole.rglob('*')) == before


def test_data_that_changed_under_a_run_are_noticed(tmp_path):
    write_dataset(tmp_path / 'd', seed=1)
    train(tmp_path / 'out', dataset=tmp_path / 'd')
    (tmp_path / 'd').rename(tmp_path / 'old')
    write_dataset(tmp_path / 'd', seed=2)
    assert 'its files are not those' in one_line(train(tmp_path / 'out', '--max_iters=20',
                                                       dataset=tmp_path / 'd', check=False))


def test_the_same_data_under_another_name_go_on(tmp_path, monkeypatch):
    """
    Another spelling, or a copy elsewhere: their fingerprint decides. The log keeps the names of the
    beginning.
    """
    for n in range(2):
        write_dataset(tmp_path / f'd{n}', seed=n)
    shutil.copytree(tmp_path / 'd1', tmp_path / 'copy')
    first, second = str(tmp_path / 'd0'), str(tmp_path / 'd1')
    train(tmp_path / 'one', '--max_iters=2', dataset=first)
    for n, name in enumerate((f'{first}/', f'{tmp_path}/./d0', os.path.relpath(first, ROOT)), 3):
        assert f'resuming {tmp_path}/one' in train(tmp_path / 'one', f'--max_iters={n}', dataset=name).stdout
    args, mixture = ['--lr_decay_iters=11', '--warmup_iters=0'], {first: 3, second: 1}
    train(tmp_path / 'two', *args, '--max_iters=5', dataset=mixture)
    train(tmp_path / 'two', *args, '--max_iters=10', dataset={f'{first}/': 3, str(tmp_path / 'copy'): 1})
    train(tmp_path / 'two', *args, '--max_iters=11', dataset=mixture)
    train(tmp_path / 'whole', *args, '--max_iters=11', dataset=mixture)
    assert read_log(tmp_path / 'two') == read_log(tmp_path / 'whole')
    assert {name for r in read_log(tmp_path / 'two') for name in r if '/' in name} == {
        f'val_{what}/{name}' for what in ('loss', 'bpb') for name in (first, second)}
    for mixture in ({second: 3, first: 1}, {first: 3, second: 2}, {first: 3, first + '/': 1}):
        said = one_line(train(tmp_path / 'two', '--max_iters=12', dataset=mixture, check=False))
        assert 'belongs to a run with dataset=' in said, said


def test_weights_that_are_not_finite_are_not_trained(whole, dataset, tmp_path):
    folder = checkpoint.find(str(whole))
    weights = checkpoint.read_weights(folder)
    name = next(iter(weights))
    weights[name].view(-1)[0] = float('nan')
    checkpoint.write(str(tmp_path / 'broken'), 1, weights, {}, checkpoint.load_state(folder))
    refused = train(tmp_path / 'run', f'--init_from={tmp_path}/broken', dataset=dataset, check=False)
    assert f'init_from={tmp_path}/broken: {name} is not finite' in one_line(refused)
    assert not (tmp_path / 'run').exists()


def test_init_from_may_be_spelled_otherwise_too(dataset, whole, tmp_path):
    args = [f'--out_dir={tmp_path}', f'--dataset={dataset}', *TINY]
    for n, name in enumerate((whole, f'{whole}/', f'{whole.parent}/./{whole.name}',
                              os.path.relpath(whole, ROOT)), 1):
        assert run('train.py', *args, f'--init_from={name}', f'--max_iters={n}').returncode == 0
    said = one_line(run('train.py', *args, f'--init_from={tmp_path}', '--max_iters=9'))
    assert 'belongs to a run with init_from=' in said


def test_a_rank_that_others_have_left_says_where_the_reason_is():
    ranks = Ranks(torch.device('cpu'))
    ranks.check_complete(RuntimeError('shape mismatch'))
    with pytest.raises(UserError, match='^another rank has ended: its error is above; '):
        ranks.check_complete(RuntimeError('[gloo] Connection closed by peer [::1]:4242'))


def test_two_ranks_say_a_mistake_once(dataset, tmp_path):
    done = train(tmp_path / 'out', '--n_kv_head=3', dataset=dataset, nproc=2, check=False)
    assert done.returncode != 0 and done.stderr.count('train.py: n_head=2 is not a multiple') == 1


def test_out_of_memory_says_which_settings_to_lower(dataset, tmp_path):
    limit = ('import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_AS, (4 * 2**30,) * 2); '
             f"sys.argv = sys.argv[1:]; sys.path.insert(0, '{ROOT}'); "
             "runpy.run_path(sys.argv[0], run_name='__main__')")
    done = run('-c', limit, str(ROOT / 'train.py'), f'--dataset={dataset}', f'--out_dir={tmp_path / "out"}',
               *TINY, '--n_embd=8192', '--n_layer=40')
    line = one_line(done)
    assert 'out of memory: ' in line and 'n_layer=40' in line and 'n_embd=8192' in line


# --- nanoGPT's files ---

def test_nanogpts_config_files_are_accepted_as_they_are(tmp_path):
    """The settings of its five kinds of config file, by name; the README's laptop line trains."""
    from configurator import read_config
    files = {
        'train_shakespeare_char': """
            out_dir = 'out-shakespeare-char'; eval_interval = 250; eval_iters = 200; log_interval = 10
            always_save_checkpoint = False; wandb_log = False; wandb_project = 'shakespeare-char'
            wandb_run_name = 'mini-gpt'; dataset = 'shakespeare_char'; gradient_accumulation_steps = 1
            batch_size = 64; block_size = 256; n_layer = 6; n_head = 6; n_embd = 384; dropout = 0.2
            learning_rate = 1e-3; max_iters = 5000; lr_decay_iters = 5000; min_lr = 1e-4; beta2 = 0.99
            warmup_iters = 100""",
        'train_gpt2': """
            wandb_log = True; wandb_project = 'owt'; wandb_run_name='gpt2-124M'; batch_size = 12
            block_size = 1024; gradient_accumulation_steps = 5 * 8; max_iters = 600000
            lr_decay_iters = 600000; eval_interval = 1000; eval_iters = 200; log_interval = 10
            weight_decay = 1e-1""",
        'finetune_shakespeare': """
            import time; out_dir = 'out-shakespeare'; eval_interval = 5; eval_iters = 40; wandb_log = False
            wandb_project = 'shakespeare'; wandb_run_name = 'ft-' + str(time.time())
            dataset = 'shakespeare'; init_from = 'gpt2-xl'; always_save_checkpoint = False
            batch_size = 1; gradient_accumulation_steps = 32; max_iters = 20; learning_rate = 3e-5
            decay_lr = False""",
        'eval_gpt2': """
            batch_size = 8; eval_iters = 500; eval_only = True; wandb_log = False; init_from = 'gpt2'"""}
    for name, text in files.items():
        (tmp_path / f'{name}.py').write_text(textwrap.dedent(text))
        Settings(**read_config(Settings, str(tmp_path / f'{name}.py')))


def test_the_default_data_set_is_named_and_not_guessed_for_a_config_file_of_a_whole_run(dataset, tmp_path):
    (tmp_path / 'data').mkdir()
    (tmp_path / 'data' / 'stdlib').symlink_to(dataset)
    (tmp_path / 'rates.py').write_text('learning_rate = 1e-2\n')
    (tmp_path / 'eval_gpt2.py').write_text('batch_size = 8\neval_iters = 1\nwandb_log = False\n')
    with chdir(tmp_path), pytest.MonkeyPatch.context() as patch:
        def begin(*args):
            patch.setattr('sys.argv', ['train.py', *TINY, '--max_iters=1', *args])
            try:
                training.main()
            except SystemExit as stop:
                assert not stop.code
        with pytest.raises(UserError, match=r'dataset: eval_gpt2.py names none: give --dataset=NAME'):
            begin('eval_gpt2.py')
        assert not (tmp_path / 'out').exists()
        begin('rates.py')
        begin('eval_gpt2.py', '--out_dir=out/rates', '--max_iters=2', '--batch_size=4')  # a run goes on
        (tmp_path / 'data' / 'stdlib').unlink()
        with pytest.raises(UserError, match=r'prepare.py stdlib .*\(stdlib is the default: '
                           r'--dataset=NAME takes another\)'):
            begin('--out_dir=new')
        begin('eval_gpt2.py', '--out_dir=new', f'--dataset={dataset}')
        # the default of nanoGPT, whose config this is
        (tmp_path / 'data' / 'openwebtext').symlink_to(dataset)
        for steps in (1, 2):
            begin('eval_gpt2.py', '--out_dir=own', '--batch_size=4', f'--max_iters={steps}')
        assert json.loads((tmp_path / 'own' / 'settings.json').read_text())['dataset'] == 'openwebtext'


def test_the_default_data_set_is_said_to_be_the_default(dataset, tmp_path, capsys, monkeypatch):
    (tmp_path / 'data').mkdir()
    (tmp_path / 'data' / 'stdlib').symlink_to(dataset)
    monkeypatch.chdir(tmp_path)
    for args, count in (([], 1), (['--dataset=stdlib', '--out_dir=other'], 0)):
        monkeypatch.setattr('sys.argv', ['train.py', *TINY, '--max_iters=1', *args])
        with pytest.raises(SystemExit):
            training.main()
        assert capsys.readouterr().out.count('dataset=stdlib is the default') == count


def test_nanogpts_prepared_shakespeare_and_laptop_command_line_train_here(tmp_path):
    folder = tmp_path / 'data' / 'shakespeare_char'
    folder.mkdir(parents=True)
    text = 'First Citizen:\nBefore we proceed any further, hear me speak.\n\n' * 300
    chars = sorted(set(text))
    stoi = {c: i for i, c in enumerate(chars)}
    ids = np.array([stoi[c] for c in text], dtype=np.uint16)
    ids[:-2000].tofile(folder / 'train.bin')
    ids[-2000:].tofile(folder / 'val.bin')
    (folder / 'meta.pkl').write_bytes(pickle.dumps({'vocab_size': len(chars), 'itos': dict(enumerate(chars)),
                                                    'stoi': stoi}))
    line = ('--device=cpu --compile=False --eval_iters=20 --log_interval=1 --block_size=64 '
            '--batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --max_iters=20 --lr_decay_iters=2000 '
            '--dropout=0.0').split()  # its README's, fewer steps
    (tmp_path / 'train_shakespeare_char.py').write_text(
        "out_dir = 'out-shakespeare-char'\ndataset = 'shakespeare_char'\nalways_save_checkpoint = False\n")
    done = run(ROOT / 'train.py', 'train_shakespeare_char.py', *line, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    sampled = run(ROOT / 'sample.py', '--out_dir=out-shakespeare-char', '--device=cpu', '--num_samples=1',
                  '--max_new_tokens=20', cwd=tmp_path)
    assert sampled.returncode == 0 and sampled.stdout.strip(), sampled.stderr
    assert Path(folder / 'train.bin').stat().st_size == 2 * (len(text) - 2000)


@pytest.mark.parametrize('below, dtype', [(50, '<u2'), (70000, '<u4')])
def test_a_nanogpt_folder_of_an_unknown_tokenizer_trains_and_no_text_is_made_up(tmp_path, below, dtype):
    folder, out = tmp_path / 'data', tmp_path / 'out'
    folder.mkdir()
    for split in ('train', 'val'):
        np.random.default_rng(0).integers(below, size=500).astype(dtype).tofile(folder / f'{split}.bin')
    (folder / 'meta.pkl').write_bytes(pickle.dumps({'vocab_size': below}))
    done = train(out, '--max_iters=1', '--n_layer=1', '--n_embd=8', '--sample_tokens=5', dataset=folder)
    assert (done.stdout.count('its tokenizer is not known') == 1 and '\n    |' not in done.stdout
            and '\nno sample' not in done.stdout)
    assert ('tokenizer of this network is not known'
            in one_line(run('sample.py', f'--out_dir={out}', '--device=cpu')))
    assert ('tokenizer of this network is not known'
            in one_line(run('eval.py', 'text', f'--out_dir={out}', ROOT / 'README.md', '--device=cpu')))
    assert run('eval.py', 'loss', f'--out_dir={out}', '--device=cpu').returncode == 0
    done = run('hub.py', 'export', '--as=custom', f'--out_dir={out}', f'--to={tmp_path / "hf"}')
    assert (done.returncode == 0 and 'no tokenizer is written' in done.stdout
            and not (tmp_path / 'hf' / 'tokenizer.json').exists())



def test_the_prompt_of_samples_is_typed_as_in_sample(dataset, capsys):
    s = Settings(sample_tokens=1, sample_prompt=r'one\n\\n', dtype='float32')
    ranks = Ranks(torch.device('cpu'))
    model = Transformer(ModelConfig(vocab_size=257, block_size=32, n_layer=1, n_head=2, n_embd=16))
    show_sample(model, s, Mixture(str(dataset), 'train', 32, 1), ranks)
    assert capsys.readouterr().out.startswith('    | one\n    | \\n')


def test_samples_begin_at_the_end_of_text_where_the_vocabulary_has_no_new_line(dataset, capsys, monkeypatch):
    monkeypatch.setattr(sample, 'load_tokenizer', lambda description, folder: new_tokenizer('char', ['ACGT']))
    model = Transformer(ModelConfig(vocab_size=5, block_size=32, n_layer=1, n_head=2, n_embd=16))
    s, ranks = Settings(sample_tokens=5, dtype='float32'), Ranks(torch.device('cpu'))
    for given, shown in (set(), '    | '), ({'sample_prompt'}, "no sample: character '\\n' is not among"):
        s.given = given
        show_sample(model, s, Mixture(str(dataset), 'train', 32, 1), ranks)
        assert capsys.readouterr().out.startswith(shown)


def test_a_damaged_network_writes_no_sample_and_training_goes_on(dataset, capsys):
    s, ranks = Settings(sample_tokens=20, dtype='float32'), Ranks(torch.device('cpu'))
    model = Transformer(ModelConfig(vocab_size=257, block_size=32, n_layer=1, n_head=2, n_embd=16))
    model.norm_f.weight.data[0] = torch.nan
    show_sample(model, s, Mixture(str(dataset), 'train', 32, 1), ranks)
    assert 'no sample: the logits are NaN or infinite' in capsys.readouterr().out and model.training


@pytest.fixture
def own_recompile_limit():
    """compile_all() changes torch's: as it was, in the end. monkeypatch would delete it (pytest 9)."""
    with torch._dynamo.config.patch(recompile_limit=8):
        yield


@pytest.mark.slow
def test_blocks_are_compiled_one_by_one_and_not_for_samples(dataset, monkeypatch, own_recompile_limit):
    """
    As --shard has them; each with constants of its own, of which there are more than torch compiles by
    itself.
    """
    made, ran, compile_module = [], [], torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, 'compile',
                        lambda self, **options: compile_module(self, backend=counting, **options))

    def counting(graph, inputs):
        made.append(graph)
        return lambda *args: ran.append(graph) or graph.forward(*args)

    def blocks_run():
        ran.clear()
        model(x, x).backward()
        return len(ran)
    s, ranks, data = (Settings(compile=True, sample_tokens=20, dtype='float32'),
                      Ranks(torch.device('cpu')), Mixture(str(dataset), 'train', 32, 1))
    model = Transformer(ModelConfig(vocab_size=257, block_size=32, n_layer=9, n_head=2, n_embd=16,
                                    depth_scale='norm'))
    x, ranks.lockstep = torch.arange(64).view(2, 32), True
    compile_all(model, by_block=True)
    assert blocks_run() == 9
    show_sample(model, s, data, ranks)
    assert len(made) == 9 and blocks_run() == 9


def test_a_run_with_a_setting_that_this_code_does_not_know_is_refused(dataset, tmp_path):
    """As after a change to model.py that was taken back: the network would be another one."""
    train(tmp_path, dataset=dataset)
    folder = checkpoint.find(str(tmp_path))
    state = checkpoint.load_state(folder)
    state['model']['dilation'] = state['settings']['dilation'] = 5
    weights, moments = (checkpoint.read_weights(folder),
                        torch.load(f'{folder}/optimizer.pt', weights_only=True))
    checkpoint.save(str(tmp_path), state['step'], weights, moments, state)
    done = train(tmp_path, '--max_iters=20', dataset=dataset, check=False)
    assert 'dilation: no such setting' in one_line(done)


def test_a_run_of_an_earlier_version_goes_on_if_its_settings_act_as_today(dataset, tmp_path):
    train(tmp_path, dataset=dataset)
    folder = checkpoint.find(str(tmp_path))
    state, weights = checkpoint.load_state(folder), checkpoint.read_weights(folder)
    moments = torch.load(f'{folder}/optimizer.pt', weights_only=True)
    state['model']['rank_blocks'] = state['settings']['rank_blocks'] = 0
    state['settings'] |= {'mix_by': 'tokens', 'verify_data': False}
    checkpoint.save(str(tmp_path), state['step'], weights, moments, state)
    assert 'done: 12 steps' in train(tmp_path, '--max_iters=12', dataset=dataset).stdout
    state['settings']['rank_guide'] = 3
    checkpoint.save(str(tmp_path), 12, weights, moments, state)
    done = train(tmp_path, '--max_iters=14', dataset=dataset, check=False)
    assert 'state.json: rank_guide=3: minnow no longer has this setting' in one_line(done)


def test_a_resumed_run_says_which_settings_of_the_optimizer_it_changes(dataset, tmp_path):
    train(tmp_path, dataset=dataset)
    said = train(tmp_path, '--max_iters=12', '--schedule=linear', '--dropout=0.1', dataset=dataset).stdout
    assert 'changed from here on: schedule=linear (was cosine), dropout=0.1 (was 0.0)' in said
    assert 'changed' not in train(tmp_path, '--max_iters=14', '--schedule=linear', '--dropout=0.1',
                                  dataset=dataset).stdout


@pytest.mark.parametrize('first, seconds, ends', [(signal.SIGTERM, 1, False), (signal.SIGTERM, 6, True),
                                                  (signal.SIGINT, 6, True), (signal.SIGINT, 1, False)])
def test_a_sigterm_ends_the_process_at_once_if_it_comes_late(first, seconds, ends, monkeypatch):
    """torchrun forwards a signal within seconds; somebody who sends one later does not want to wait."""
    stop, killed = StopSignal(), []
    monkeypatch.setattr('os.kill', lambda pid, number: killed.append(number))
    monkeypatch.setattr('signal.signal', lambda number, handler: None)
    stop.remember(first, None)
    assert stop and not killed
    stop.since -= seconds
    stop.remember(signal.SIGTERM, None)
    assert killed == [signal.SIGTERM] * ends
