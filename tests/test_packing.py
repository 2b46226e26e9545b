"""Pairs that share rows: none is lost, none sees another, and the loss and its gradient are those of one padded pair a row."""
import json

import numpy as np
import pytest
import torch
from conftest import read_log, train

from data import Mixture, Source, fill
from model import ModelConfig, make_model
from objectives import Objective
from prepare import Settings, prepare

KINDS = {'rope': dict(position='rope', value_residual=True, qk_norm=True), 'learned': dict(position='learned', bias=True, norm='layernorm'),
         'relative': dict(position='relative', n_kv_head=1), 'experts': dict(n_expert=4, expert_aux=0.0, expert_z=0.0)}


@pytest.fixture(scope='module')
def pairs(tmp_path_factory):
    """Folder of pairs of unlike length, some of them too long for a row."""
    folder, rng = tmp_path_factory.mktemp('packing'), np.random.default_rng(0)
    with open(folder / 'pairs.jsonl', 'w') as f:
        for n in range(150):
            f.write(json.dumps({'q': f'{n}: ' + 'abc ' * int(rng.choice([1, 2, 4, 6, 20])), 'a': 'yes ' * int(rng.integers(1, 4)) + str(n)}) + '\n')
    prepare(Settings([str(folder / 'pairs.jsonl')], source='q', target='a', out=str(folder / 'data'), tokenizer='byte', val_fraction=0.2, num_proc=1))
    return str(folder / 'data')


def rows(folder, packing, split='train', T=64):
    """All rows of a split: x, y and, of packed pairs, pieces."""
    source = Source(folder, split, T, packing, objective=lambda meta: Objective('seq2seq', T, 0, meta=meta))
    return [torch.from_numpy(a) for a in source.batch([source.example(n, 0) for n in range(source.rows)])]


def network(**settings):
    torch.manual_seed(0)
    model = make_model(ModelConfig(**dict(vocab_size=257, block_size=64, n_layer=2, n_head=2, n_embd=32) | settings))
    for p in model.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.1)
    return model


@pytest.mark.parametrize('room, count', [(1, 7), (50, 500), (256, 3000)])
def test_every_document_is_in_one_row_and_no_row_holds_more_than_fits(room, count):
    lengths = np.random.default_rng(1).integers(1, room + 1, count)
    filled = fill(lengths, room)
    assert sorted(np.concatenate(filled).tolist()) == list(range(count)) and max(lengths[row].sum() for row in filled) <= room
    assert len(filled) <= 11 / 9 * np.ceil(lengths.sum() / room) + 4
    assert all(np.array_equal(a, b) for a, b in zip(filled, fill(lengths, room)))


def test_short_ones_fill_what_long_ones_leave():
    assert [row.tolist() for row in fill(np.array([3, 10, 2, 7, 8, 4]), 10)] == [[1], [4, 2], [3, 0], [5]]


@pytest.mark.parametrize('kind', KINDS)
def test_packed_is_padded(pairs, kind):
    def learned(packing):
        model, (x, y, *pieces) = network(**KINDS[kind]), rows(pairs, packing)
        loss = model(x, y, reduction='sum', **({'pieces': pieces[0]} if pieces else {}))
        loss.backward()
        return len(x), (y >= 0).sum(), loss.detach(), [p.grad for p in model.parameters() if p.grad is not None]
    packed, padded = learned('stream'), learned('document')
    assert packed[0] < 0.75 * padded[0] and packed[1] == padded[1] and torch.allclose(packed[2], padded[2], rtol=1e-5)
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-4 * b.abs().max()) for a, b in zip(packed[3], padded[3]))


@pytest.mark.parametrize('kind', KINDS)
def test_a_pair_sees_itself_alone(pairs, kind):
    model, (x, _, pieces) = network(**KINDS[kind]).eval(), rows(pairs, 'stream')
    row = next(n for n in range(len(x)) if pieces[n].max() >= 2)
    x, pieces = x[row][None], pieces[row][None]
    other = torch.where(pieces == 0, x.flip(1), x)
    before, after = (model.hidden(t, pieces=pieces) for t in (x, other))
    assert torch.allclose(before[pieces > 0], after[pieces > 0], atol=1e-5) and not torch.allclose(before[pieces == 0], after[pieces == 0], atol=1e-2)
    alone = model.hidden(x[pieces == 1][None])
    assert torch.allclose(alone[0], before[pieces == 1], atol=1e-5)


def test_every_pair_comes_once_an_epoch_and_a_mixture_knows_how_many_share_a_row(pairs):
    data = Mixture(pairs, 'train', 64, seed=1, objective=lambda meta: Objective('seq2seq', 64, 0, meta=meta))
    count = data.sources[0].rows
    targets = [sorted(tuple(row[row >= 0]) for row in data.rows(range(n, n + count))[1]) for n in (0, count)]
    assert targets[0] == targets[1] == sorted(tuple(row[row >= 0]) for row in rows(pairs, 'stream')[1].numpy())
    with open(f'{pairs}/meta.json') as f:
        assert count < json.load(f)['splits']['train']['documents'] / 1.3


def test_a_run_on_packed_pairs_learns_and_is_judged_as_one_on_padded_ones(pairs, tmp_path):
    args = ['--objective=seq2seq', '--block_size=64', '--max_iters=30', '--eval_interval=30']
    for packing in ('stream', 'document'):
        train(tmp_path / packing, *args, f'--packing={packing}', dataset=pairs)
    logs = {packing: [r['val_loss'] for r in read_log(tmp_path / packing) if 'val_loss' in r] for packing in ('stream', 'document')}
    assert logs['stream'][0] == pytest.approx(logs['document'][0], abs=1e-5)
    assert logs['stream'][-1] < logs['stream'][0] - 2 and logs['document'][-1] < logs['document'][0] - 2
    train(tmp_path / 'taught', *args, f'--teacher={tmp_path}/stream', '--distill_mix=1.0', dataset=pairs)
    assert read_log(tmp_path / 'taught')[-1]['val_loss'] < logs['stream'][0] - 0.5


def test_what_a_teacher_says_of_packed_pairs_is_what_it_says_of_each(pairs):
    from types import SimpleNamespace

    from train import ask
    model, (x, _, pieces) = network(**KINDS['rope']).eval(), rows(pairs, 'stream')
    asked = SimpleNamespace(distill_temperature=1.0, distill_mix=0.5)
    said, alone = (ask(model, x, asked, **more).h.unflatten(0, x.shape) for more in ({'pieces': pieces}, {}))
    assert torch.equal(said, model.before_head(model.hidden(x, pieces=pieces))) and not torch.allclose(said, alone)
