"""What is published is whole; what is damaged is noticed, named and passed over; nothing is unpickled."""
import os
import pickle
import shutil

import pytest
import torch
from conftest import pack_moments

import checkpoint
from configurator import UserError
from features.moments import load_optimizer


def state(value):
    return {'w': torch.full((4, 4), float(value))}, {'state': {0: {'step': torch.tensor(float(value))}},
                                                     'param_groups': [{'lr': 0.1}]}, {'step': value}


@pytest.fixture
def run(tmp_path):
    for step in (1, 2, 3):
        checkpoint.save(str(tmp_path), step, *state(step), keep=3)
    return tmp_path


def test_what_was_saved_comes_back(run):
    folder = checkpoint.find(str(run))
    assert (checkpoint.read_json(f'{folder}/state.json') == {'step': 3}
            and torch.equal(checkpoint.read_weights(folder)['w'], torch.full((4, 4), 3.0)))
    assert sorted(os.listdir(folder)) == ['manifest.json', 'model.safetensors', 'optimizer.pt', 'state.json']


def test_a_number_that_is_not_finite_is_found_wherever_it_is():
    t = torch.zeros(10, 10)
    sound = {'a': t, 'b': torch.zeros(()), 'c': torch.zeros(0), 'd': torch.zeros(9, dtype=torch.int64)}
    assert checkpoint.first_not_finite(sound, 7) is None
    for place in (0, 6, 7, 50, 99):
        for value in (torch.nan, torch.inf, -torch.inf):
            broken = t.clone()
            broken.view(-1)[place] = value
            for view in (broken, broken.T):
                assert checkpoint.first_not_finite({**sound, 'e': view, 'f': view}, 7) == 'e'


FILES = ['model.safetensors', 'optimizer.pt', 'state.json', 'manifest.json']


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(size):
    return lambda path: os.truncate(path, size if size >= 0 else path.stat().st_size + size)


@pytest.mark.parametrize('name', FILES)
@pytest.mark.parametrize('damage',
                         [flip, truncate(0), truncate(1), truncate(-1), os.remove,
                          lambda path: shutil.copy(path.parent.parent / 'step_00000002' / path.name, path)],
                         ids=['bit', 'empty', 'one byte', 'last byte', 'removed', 'of another step'])
def test_a_damaged_file_is_noticed_and_the_one_before_is_taken(run, capsys, name, damage):
    damage(run / 'step_00000003' / name)
    assert checkpoint.find(str(run)).endswith('step_00000002') and 'step_00000003' in capsys.readouterr().out


def test_when_none_is_sound_the_run_does_not_begin_anew(run):
    for folder in run.iterdir():
        flip(folder / 'model.safetensors')
    with pytest.raises(UserError, match='no checkpoint in it is undamaged'):
        checkpoint.find(str(run))


def test_what_a_crash_leaves_is_never_taken_and_is_cleaned_away(run):
    shutil.copytree(run / 'step_00000003', run / 'step_00000004.tmp')
    assert checkpoint.find(str(run)).endswith('step_00000003')
    checkpoint.save(str(run), 4, *state(4), keep=1)
    assert os.listdir(run) == ['step_00000004']


def test_every_file_is_flushed_before_the_name_is_given(tmp_path, monkeypatch):
    events, fsync, rename = [], os.fsync, os.rename
    monkeypatch.setattr(os, 'fsync', lambda fd: (
        events.append(('fsync', os.readlink(f'/proc/self/fd/{fd}'), os.fstat(fd).st_size)), fsync(fd)))
    monkeypatch.setattr(os, 'rename', lambda a, b: (events.append(('rename', b, 0)), rename(a, b)))
    checkpoint.save(str(tmp_path), 1, *state(1))
    at = [kind for kind, _, _ in events].index('rename')
    flushed = {os.path.basename(path).removesuffix('.tmp'): size for kind, path, size in events[:at]}
    assert {n: os.path.getsize(tmp_path / 'step_00000001' / n) for n in FILES}.items() <= flushed.items()
    assert events[at + 1][1] == str(tmp_path)  # then the directory that holds the name


def test_the_best_is_never_pruned(run):
    checkpoint.mark_best(str(run), 1, 0.5, keep=3)
    for step in (4, 5, 6):
        checkpoint.save(str(run), step, *state(step), keep=2)
    assert sorted(n for n in os.listdir(run) if n != 'best') == ['step_00000001', 'step_00000005',
                                                                 'step_00000006']
    assert checkpoint.find(str(run), 'best').endswith('1') and checkpoint.find(str(run)).endswith('6')


def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(run, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(checkpoint, 'replace_json', full)
    with pytest.raises(UserError, match='No space left on device.*make room'):
        checkpoint.save(str(run), 4, *state(4))
    monkeypatch.undo()
    assert checkpoint.find(str(run)).endswith('3') and not (run / 'step_00000004.tmp').exists()


def test_a_pickle_in_place_of_the_optimizer_is_not_run(run, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / 'canary'),)
    (run / 'step_00000003' / 'optimizer.pt').write_bytes(pickle.dumps(Evil()))
    with pytest.raises(UserError, match='optimizer.pt: not readable'):
        load_optimizer(str(run / 'step_00000003'),
                       torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))]))
    assert not (tmp_path / 'canary').exists()


@pytest.mark.parametrize('weights, words', [
    ({}, 'weight: found no such tensor'), ({'weight': torch.zeros(2, 3), 'x': torch.zeros(1)}, 'x: found'),
    ({'weight': torch.zeros(3, 2)}, r'found \[3, 2\]')])
def test_weights_of_another_network_are_refused_by_the_tensors_name(weights, words):
    with pytest.raises(UserError, match=words):
        checkpoint.load_weights(torch.nn.Linear(3, 2, bias=False), weights, 'there')


def test_moments_go_by_name_and_those_of_another_tensor_are_refused(tmp_path):
    def adam(**shapes):
        return torch.optim.AdamW([(name, torch.nn.Parameter(torch.zeros(shape)))
                                  for name, shape in shapes.items()])
    moments = {name: {'step': torch.tensor(3.0), 'exp_avg': torch.full((2, 3), float(n)),
                      'exp_avg_sq': torch.ones(2, 3)} for n, name in enumerate('ab', 1)}
    checkpoint.save(str(tmp_path), 1, {}, pack_moments(moments), {})
    optimizer = adam(b=(2, 3), a=(2, 3))
    load_optimizer(f'{tmp_path}/step_00000001', optimizer)
    assert [optimizer.state[p]['exp_avg'][0, 0] for p in optimizer.param_groups[0]['params']] == [2, 1]
    for other in (adam(a=(2, 3)), adam(a=(2, 3), c=(2, 3)), adam(a=(2, 3), b=(3, 2))):
        with pytest.raises(UserError, match='the moments of other tensors'):
            load_optimizer(f'{tmp_path}/step_00000001', other)


def test_a_lock_that_was_removed_by_hand_is_not_taken_for_held(tmp_path):
    """Another process may have locked a new file of that name meanwhile."""
    checkpoint.claim(str(tmp_path))
    (tmp_path / 'lock').unlink()
    other = checkpoint.lock(str(tmp_path / 'lock'))
    with pytest.raises(UserError, match='another process is training in it'):
        checkpoint.claim(str(tmp_path))
    os.close(other)
    checkpoint.claim(str(tmp_path))
    checkpoint.release(str(tmp_path))
    assert not (tmp_path / 'lock').exists()
