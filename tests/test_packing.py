"""
Pairs that share rows: none is lost, none sees another, and the loss and its gradient are those of one padded
pair a row.
"""
import json

import numpy as np
import pytest
import torch
from conftest import read_log, run, train

from batches import Mixture, open_source, validation_batch
from features import build
from features.growth import factorize
from features.t5.objectives import Objective
from features.t5.pairs import pack
from features.text.settings import TextConfig
from model import ModelConfig, make_model
from prepare import prepare

KINDS = {'rope': dict(position='rope', value_residual=True, qk_norm=True),
         'learned': dict(position='learned', bias=True, norm='layernorm'),
         'relative': dict(position='relative', n_kv_head=1),
         'experts': dict(n_expert=4, expert_aux=0.0, expert_z=0.0)}


@pytest.fixture(scope='module')
def pairs(tmp_path_factory):
    """Folder of pairs of unlike length, some of them too long for a row."""
    folder, rng = tmp_path_factory.mktemp('packing'), np.random.default_rng(0)
    with open(folder / 'pairs.jsonl', 'w') as f:
        for n in range(150):
            f.write(json.dumps({'q': f'{n}: ' + 'abc ' * int(rng.choice([1, 2, 4, 6, 20])),
                                'a': 'yes ' * int(rng.integers(1, 4)) + str(n)}) + '\n')
    prepare(TextConfig([str(folder / 'pairs.jsonl')], source='q', target='a', out=str(folder / 'data'),
                       tokenizer='byte', val_fraction=0.2, num_proc=1))
    return str(folder / 'data')


def rows(folder, packing, split='train', T=64):
    """All rows of a split: x, y and, of packed pairs, pieces."""
    source = open_source(folder, split, T, packing, objective=Objective('seq2seq'))
    return [torch.from_numpy(a) for a in validation_batch(source, range(source.rows))]


def network(**settings):
    torch.manual_seed(0)
    model = make_model(
        build(ModelConfig, **dict(vocab_size=257, block_size=64, n_layer=2, n_head=2, n_embd=32) | settings))
    for p in model.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.1)
    return model


def together(lengths, room):
    numbers, until = pack(lengths, room)
    return np.split(numbers, until[:-1])


@pytest.mark.parametrize('room, count', [(1, 7), (50, 500), (256, 3000)])
def test_every_document_is_in_one_row_and_no_row_holds_more_than_fits(room, count):
    lengths = np.random.default_rng(1).integers(1, room + 1, count)
    filled = together(lengths, room)
    assert (sorted(np.concatenate(filled).tolist()) == list(range(count))
            and max(lengths[row].sum() for row in filled) <= room)
    assert len(filled) <= 11 / 9 * np.ceil(lengths.sum() / room) + 4
    assert all(np.array_equal(a, b) for a, b in zip(filled, together(lengths, room)))


def test_short_ones_fill_what_long_ones_leave():
    # in the order of the first of each
    assert [row.tolist() for row in together(np.array([3, 10, 2, 7, 8, 4]), 10)] == [[3, 0], [1], [4, 2], [5]]


@pytest.mark.parametrize('kind', KINDS)
def test_packed_is_padded(pairs, kind):
    def learned(packing):
        model, (x, y, *pieces) = network(**KINDS[kind]), rows(pairs, packing)
        loss = model(x, y, reduction='sum', **({'pieces': pieces[0]} if pieces else {}))
        loss.backward()
        return (len(x), (y >= 0).sum(), loss.detach(),
                [p.grad for p in model.parameters() if p.grad is not None])
    packed, padded = learned('stream'), learned('document')
    assert (packed[0] < 0.75 * padded[0] and packed[1] == padded[1]
            and torch.allclose(packed[2], padded[2], rtol=1e-5))
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-4 * b.abs().max())
               for a, b in zip(packed[3], padded[3]))


@pytest.mark.parametrize('kind', KINDS)
def test_a_pair_sees_itself_alone(pairs, kind):
    model, (x, _, pieces) = network(**KINDS[kind]).eval(), rows(pairs, 'stream')
    row = next(n for n in range(len(x)) if pieces[n].max() >= 2)
    x, pieces = x[row][None], pieces[row][None]
    other = torch.where(pieces == 0, x.flip(1), x)
    before, after = (model.hidden(t, pieces=pieces) for t in (x, other))
    assert (torch.allclose(before[pieces > 0], after[pieces > 0], atol=1e-5)
            and not torch.allclose(before[pieces == 0], after[pieces == 0], atol=1e-2))
    alone = model.hidden(x[pieces == 1][None])
    assert torch.allclose(alone[0], before[pieces == 1], atol=1e-5)


def test_every_pair_comes_once_an_epoch_and_a_mixture_knows_how_many_share_a_row(pairs):
    data = Mixture(pairs, 'train', 64, seed=1, objective=Objective('seq2seq'))
    count = data.sources[0].rows
    targets = [sorted(tuple(row[row >= 0]) for row in data.rows(range(n, n + count))[1]) for n in (0, count)]
    assert (targets[0] == targets[1]
            == sorted(tuple(row[row >= 0]) for row in rows(pairs, 'stream')[1].numpy()))
    with open(f'{pairs}/meta.json') as f:
        assert count < json.load(f)['splits']['train']['documents'] / 1.3


def test_a_run_on_packed_pairs_learns_and_is_judged_as_one_on_padded_ones(pairs, tmp_path):
    # attention is zero at first else
    args = ['--objective=seq2seq', '--block_size=64', '--max_iters=30', '--eval_interval=30',
            '--zero_init=False']
    for packing in ('stream', 'document'):
        train(tmp_path / packing, *args, f'--packing={packing}', dataset=pairs)
    logs = {packing: [r['val_loss'] for r in read_log(tmp_path / packing) if 'val_loss' in r]
            for packing in ('stream', 'document')}
    assert logs['stream'][0] == pytest.approx(logs['document'][0], abs=1e-5)
    assert logs['stream'][-1] < logs['stream'][0] - 2 and logs['document'][-1] < logs['document'][0] - 2
    train(tmp_path / 'next', *args, f'--init_from={tmp_path}/stream', '--max_iters=1', dataset=pairs)
    assert read_log(tmp_path / 'next')[0]['val_loss'] == pytest.approx(logs['stream'][-1], abs=1e-5)
    done = run('eval.py', 'loss', f'--out_dir={tmp_path}/stream', '--dtype=float32')
    assert (float(done.stdout.split(' nats a token')[0].split()[-1])
            == pytest.approx(logs['stream'][-1], abs=1e-4))
    done = run('surgery.py', 'factorize', f'--from={tmp_path}/stream', f'--out_dir={tmp_path}/low',
               '--rank_qk=16')
    assert done.returncode == 0, done.stderr


def test_a_step_on_all_pairs_is_the_same_packed_and_padded_with_a_teacher_too(pairs, tmp_path):
    train(tmp_path / 'teacher', '--objective=seq2seq', '--block_size=64', '--zero_init=False',
          '--max_iters=2', dataset=pairs)
    losses = {}
    for packing in ('stream', 'document'):
        for teacher in ('', f'{tmp_path}/teacher'):
            out = tmp_path / f'{packing}{bool(teacher)}'
            train(out, '--objective=seq2seq', '--block_size=64', '--zero_init=False',
                  '--max_iters=1', f'--packing={packing}', f'--teacher={teacher}',
                  f'--batch_size={len(rows(pairs, packing)[0])}', dataset=pairs)
            losses[packing, bool(teacher)] = next(r['train_loss'] for r in read_log(out) if 'train_loss' in r)
    assert losses['stream', False] == pytest.approx(losses['document', False], abs=1e-5)
    assert (losses['stream', True] == pytest.approx(losses['document', True], abs=1e-5)
            != losses['stream', False])


def test_moments_of_packed_pairs_are_those_of_padded_ones(pairs, monkeypatch):
    def moments(packing):
        data = Mixture(pairs, 'train', 64, seed=1, packing=packing, objective=Objective('seq2seq'))
        monkeypatch.setattr(factorize, 'sample_tokens', lambda model: data.sources[0].rows * 64)
        return factorize.input_moments(network(), data)
    packed, padded = moments('stream'), moments('document')
    assert all(torch.allclose(t, padded[name], atol=1e-6 * t.abs().max()) for name, t in packed.items())


def test_the_weights_of_a_mixture_of_packed_pairs_count_tokens(tmp_path):
    folders = []
    # of the latter a row has room for one: half of it is padding
    for name, answer in (('short', 'c'), ('half', 'c' * 30)):
        (tmp_path / f'{name}.jsonl').write_text(''.join(json.dumps({'q': f'{n:03}', 'a': answer}) + '\n'
                                                        for n in range(300)))
        folders.append(str(tmp_path / name))
        prepare(TextConfig([f'{tmp_path}/{name}.jsonl'], source='q', target='a', out=folders[-1],
                           tokenizer='byte', val_fraction=0.1, num_proc=1))
    data = Mixture(dict.fromkeys(folders, 1), 'train', 64, seed=1, objective=Objective('seq2seq'))
    x, _, _ = data.rows(range(600))
    of = np.array([data.locate(n)[0] for n in range(600)])
    counted = (x > 0).sum(1)
    assert counted[of == 0].sum() == pytest.approx(counted[of == 1].sum(), rel=0.05)
