"""A run that was interrupted ends with the same bits as one that was not, wherever the interruption came."""
import random
import time

import pytest
import torch
from conftest import pack_moments, read_log, train, write_dataset
from processes import SMALL, Processes, fingerprint, run_to_end, step_of

import checkpoint
from features.moments import load_optimizer, read_moments


def half(folder, dataset, *args):
    train(folder, *SMALL, '--max_iters=5', '--lr_decay_iters=10', '--warmup_iters=0', *args, dataset=dataset)
    return folder


def test_five_and_five_are_ten_and_without_moments_step_or_seeds_they_are_not(dataset, tmp_path, monkeypatch):
    more = ['--lr_decay_iters=10', '--warmup_iters=0']
    train(tmp_path / 'whole', *SMALL, *more, dataset=dataset)
    right = fingerprint(tmp_path / 'whole')

    def go_on(name):
        train(tmp_path / name, *SMALL, *more, dataset=dataset)
        return fingerprint(tmp_path / name)
    assert (go_on(half(tmp_path / 'cut', dataset)) == right
            and read_log(tmp_path / 'cut') == read_log(tmp_path / 'whole'))

    def spoil(name, change):  # the checkpoint of a run that was cut, written again with a change
        out_dir = str(half(tmp_path / name, dataset))
        folder = checkpoint.find(out_dir)
        state, weights, moments = (checkpoint.load_state(folder), checkpoint.read_weights(folder),
                                   read_moments(folder))
        change(state, moments)
        checkpoint.save(out_dir, 5, weights, pack_moments(moments), state)
        return go_on(name)
    assert spoil('same', lambda state, moments: None) == right
    assert spoil('moments', lambda state,
                 moments: [t.zero_() for tensors in moments.values() for t in tensors.values()]) != right
    assert (spoil('count', lambda state, moments: [tensors['step'].fill_(1) for tensors in moments.values()])
            != right)
    with pytest.raises(AssertionError, match='step is 4, the folder is that of step 5'):
        spoil('step', lambda state, moments: state.update(step=4))
    half(tmp_path / 'seeds', dataset)
    monkeypatch.setattr(torch, 'manual_seed', lambda seed: None)
    assert go_on('seeds') != right


@pytest.mark.full
@pytest.mark.parametrize('ranks', [1, 2])
def test_killed_anywhere_again_and_again_the_end_is_the_same(dataset, tmp_path, ranks):
    args = [*SMALL, f'--dataset={dataset}', '--max_iters=150', '--checkpoint_interval=4',
            '--eval_interval=50', '--warmup_iters=2']
    assert run_to_end(*args, f'--out_dir={tmp_path / "whole"}', ranks=ranks)[0] == [0] * ranks
    chance, kills = random.Random(ranks), 0
    while True:
        processes = Processes(*args, f'--out_dir={tmp_path / "cut"}', ranks=ranks)
        if kills < 4 and processes.wait_for('step'):
            time.sleep(chance.random() * 0.3)
            processes.kill()
            kills += 1
        codes, said = processes.wait()
        if codes == [0] * ranks:
            break
        assert codes == [-9] * ranks, said
    assert kills == 4 and fingerprint(tmp_path / 'cut') == fingerprint(tmp_path / 'whole')
    assert read_log(tmp_path / 'cut') == read_log(tmp_path / 'whole')


def test_the_log_of_two_ranks_that_are_stopped_between_two_progress_lines_is_that_of_the_whole(
        dataset, tmp_path):
    """Losses that each rank adds up for itself, and how many steps were skipped."""
    args = [*SMALL, f'--dataset={dataset}', '--log_interval=4', '--eval_interval=100', '--lr_decay_iters=12',
            '--warmup_iters=0']
    for name, ends in (('whole', (12,)), ('cut', (6, 12))):
        for max_iters in ends:
            codes, said = run_to_end(*args, f'--max_iters={max_iters}', f'--out_dir={tmp_path / name}',
                                     ranks=2, fault='loss@4/1=nan')
            assert codes == [0, 0], said
    records = [[r for r in read_log(tmp_path / name) if 'train_loss' in r] for name in ('whole', 'cut')]
    assert records[0] == records[1] and records[0][-1]['skipped'] == 1


def test_resuming_after_the_first_or_last_step_and_twice_without_a_step(dataset, tmp_path):
    args, ends = [*SMALL, '--lr_decay_iters=10', '--warmup_iters=0', '--gradient_accumulation_steps=2'], set()
    for step in (1, 9, 10):
        for until in sorted({step, 10}):
            train(tmp_path / str(step), *args, f'--max_iters={until}', dataset=dataset)
        ends.add(fingerprint(tmp_path / str(step)))
        for _ in range(2):
            assert 'done: 10 steps' in train(tmp_path / str(step), *args, dataset=dataset).stdout
            ends.add(fingerprint(tmp_path / str(step)))
    assert len(ends) == 1


def test_resuming_at_every_step_across_the_end_of_an_epoch(tmp_path):
    write_dataset(tmp_path / 'few', documents=8)
    args = [*SMALL, '--max_iters=40', '--warmup_iters=0', '--eval_interval=100', '--lr_decay_iters=40']
    train(tmp_path / 'whole', *args, dataset=tmp_path / 'few')
    for until in (*range(1, 12), 40):
        train(tmp_path / 'cut', *args, f'--max_iters={until}', dataset=tmp_path / 'few')
    assert fingerprint(tmp_path / 'cut') == fingerprint(tmp_path / 'whole')


def test_every_moment_is_restored_also_of_a_tensor_that_never_moved(dataset, tmp_path):
    half(tmp_path, dataset, '--position=learned', '--block_size=32')
    folder = checkpoint.find(str(tmp_path))
    moments, weights = read_moments(folder), checkpoint.read_weights(folder)
    assert (set(moments) == set(weights)
            and all({'exp_avg', 'exp_avg_sq', 'step'} <= set(tensors) for tensors in moments.values()))
    parameters = {name: torch.nn.Parameter(t.clone()) for name, t in weights.items()}
    optimizer = torch.optim.AdamW(list(parameters.items()))
    load_optimizer(folder, optimizer)
    for name, p in parameters.items():
        assert all(torch.equal(optimizer.state[p][what], t) for what, t in moments[name].items())
    never = torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.AdamW([('never', never), ('moved', torch.nn.Parameter(torch.zeros(2)))])
    packed = {'never': {},
              'moved': {'step': torch.tensor(2.0), 'exp_avg': torch.ones(2), 'exp_avg_sq': torch.ones(2)}}
    checkpoint.save(str(tmp_path), 9, {}, pack_moments(packed), {})
    load_optimizer(f'{tmp_path}/step_00000009', optimizer)
    assert not optimizer.state[never] and step_of(tmp_path) == 9


@pytest.mark.slow
def test_a_compiled_run_resumes_bitwise_and_goes_on_without_a_compiler(dataset, tmp_path):
    args = [*SMALL, f'--dataset={dataset}', '--warmup_iters=0', '--lr_decay_iters=10', '--compile=True']
    assert run_to_end(*args, f'--out_dir={tmp_path / "whole"}')[0] == [0]
    for until in (5, 10):
        assert run_to_end(*args, f'--out_dir={tmp_path / "cut"}', f'--max_iters={until}')[0] == [0]
    assert fingerprint(tmp_path / 'cut') == fingerprint(tmp_path / 'whole')
    plain = [*args, '--dropout=0']  # a compiler draws other zeros
    assert run_to_end(*plain, f'--out_dir={tmp_path / "compiled"}')[0] == [0]
    for until, compile in ((5, True), (10, False)):
        assert run_to_end(*plain, f'--out_dir={tmp_path / "both"}', f'--max_iters={until}',
                          f'--compile={compile}')[0] == [0]
    ours, theirs = (checkpoint.read_weights(checkpoint.find(str(tmp_path / name)))
                    for name in ('both', 'compiled'))
    assert ours.keys() == theirs.keys()
    assert all(abs(a[name] - b[name]) < 1e-5
               for a, b in zip(read_log(tmp_path / 'both'), read_log(tmp_path / 'compiled'))
               for name in ('train_loss', 'val_loss') if name in a)
