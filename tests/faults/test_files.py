"""
A published checkpoint is whole, or is reported and passed over; the one before is kept until the new one is
on the disk. Damage of every kind to every file, and the order of flushing, are in test_checkpoint.py.
"""
import json
import os
import random
import resource
import shutil
import signal
import time
from functools import partial

import pytest
import torch
from conftest import ROOT, TINY, one_line, read_log, run, train
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from processes import SMALL, Processes, fingerprint, run_to_end, step_of

import checkpoint
from checkpoint import append, replace_text, write_torch
from configurator import UserError
from features.moments import read_moments
from features.scale import background

OFTEN = ['--checkpoint_interval=2', '--eval_interval=100']
POINTS = ['save:begin', 'save:weights', 'save:optimizer', 'save:state', 'save:manifest', 'save:flushed',
          'save:renamed', 'save:end', 'save:prune']  # of inject.py


# --- killed while it saves ---

@pytest.fixture(scope='module')
def whole(tmp_path_factory, dataset):
    folder = tmp_path_factory.mktemp('whole')
    train(folder, *SMALL, *OFTEN, dataset=dataset)
    return fingerprint(folder)


@pytest.mark.parametrize('point, background', [*((point, False) for point in POINTS),
                                               ('save:optimizer', True), ('save:renamed', True)])
def test_killed_at_a_point_of_saving_even_twice_the_run_ends_as_if_it_had_not_been(whole, dataset, tmp_path,
                                                                                   point, background):
    args = [*SMALL, f'--dataset={dataset}', f'--out_dir={tmp_path}', *OFTEN, f'--async_save={background}']
    at = '' if point == 'save:prune' else '@6'
    for _ in range(2):
        codes, said = run_to_end(*args, fault=f'{point}{at}=kill')
        assert codes == [-signal.SIGKILL], said
        published = checkpoint.checkpoints(str(tmp_path))
        assert step_of(tmp_path) == (6 if point in ('save:renamed', 'save:end', 'save:prune') else 4)
        assert all(checkpoint.damage(folder) is None for folder in published)
        state = checkpoint.load_state(published[0])
        assert (state['step'] == step_of(tmp_path)
                == next(iter(read_moments(published[0]).values()))['step'])
        if point in ('save:renamed', 'save:end', 'save:prune'):
            break
    codes, said = run_to_end(*args)
    assert codes == [0] and fingerprint(tmp_path) == whole, said
    assert not list(tmp_path.glob('*.tmp')) and len(list(tmp_path.glob('step_*'))) <= 3


# --- nothing left that is sound ---

def test_when_all_are_damaged_the_run_ends_with_an_error_and_does_not_begin_anew(dataset, tmp_path):
    train(tmp_path, dataset=dataset)
    for folder in tmp_path.glob('step_*'):
        with open(folder / 'model.safetensors', 'r+b') as f:
            f.seek(-1, 2)
            last = f.read(1)
            f.seek(-1, 2)
            f.write(bytes([last[0] ^ 4]))
    before = sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob('*'))
    assert ('no checkpoint in it is undamaged (step_00000010: model.safetensors'
            in one_line(train(tmp_path, '--max_iters=20', dataset=dataset, check=False)))
    assert sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob('*')) == before


# --- a full disk ---

@pytest.mark.parametrize('point', ['save:begin', 'save:optimizer', 'save:manifest', 'save:flushed', 'log'])
def test_a_full_disk_ends_the_run_in_one_line_and_the_same_command_goes_on(dataset, tmp_path, point):
    args = [*TINY, f'--dataset={dataset}', f'--out_dir={tmp_path}']
    codes, said = run_to_end(*args, fault=f'{point}@10=full')
    assert (codes == [2] and said.count('No space left on device') == 1 and str(tmp_path) in said
            and 'make room' in said)
    assert step_of(tmp_path) == (10 if point == 'log' else 5) and not list(tmp_path.glob('*.tmp'))
    assert run_to_end(*args)[0] == [0] and step_of(tmp_path) == 10


def test_files_that_may_not_grow_are_the_same_without_a_fault(dataset, tmp_path):
    """RLIMIT_FSIZE: the system itself refuses to write beyond 100 kB, half of the moments."""
    limit = ('import resource, runpy, sys; '
             f'resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, {resource.RLIM_INFINITY})); '
             f"sys.argv = sys.argv[1:]; sys.path.insert(0, '{ROOT}'); "
             "runpy.run_path(sys.argv[0], run_name='__main__')")
    done = run('-c', limit, str(ROOT / 'train.py'), f'--out_dir={tmp_path}', f'--dataset={dataset}', *TINY)
    assert ('File too large' in one_line(done) and not checkpoint.checkpoints(str(tmp_path))
            and not list(tmp_path.glob('*.tmp')))


# About 1.2 MB for a checkpoint, of which four are there at a time, so that 6 MB is enough
ON_A_SMALL_DISK = ['--n_embd=64', '--vocab_size=64', '--max_iters=6', '--eval_interval=2', '--log_interval=2']


def fill_and_go_on(disk, name, room, *more, dataset):
    """
    A run in a folder of a SmallDisk with `room` bytes, then the same command with enough of it. Returns
    whether the first one ended with a full disk: in one line, without half a file, its checkpoints sound.
    """
    out_dir = disk.folder / name
    args = ['train.py', f'--out_dir={out_dir}', f'--dataset={dataset}', *TINY, *ON_A_SMALL_DISK, *more]
    disk.leave(room)
    done = run(*args)
    is_full = done.returncode != 0
    if is_full:
        said = one_line(done)
        assert 'No space left on device' in said and 'make room' in said, said
    assert not list(disk.folder.rglob('*.tmp')), list(disk.folder.rglob('*.tmp'))
    assert all(checkpoint.damage(folder) is None for folder in checkpoint.checkpoints(str(out_dir)))
    disk.leave(None)
    again = run(*args)
    assert again.returncode == 0, again.stdout + again.stderr
    return is_full


@pytest.fixture(scope='module')
def whole_run(tmp_path_factory, dataset):
    folder = tmp_path_factory.mktemp('whole_run')
    train(folder, dataset=dataset)
    return folder


def full_again_and_again(disk, rooms, dataset, folder):
    """
    Runs with each of these amounts of room, which end as one with enough of it. Returns how many found their
    disk full.
    """
    train(folder, *ON_A_SMALL_DISK, dataset=dataset)
    count = 0
    for n, room in enumerate(rooms):
        out_dir = disk.folder / str(n)
        more = ['--async_save'] if n % 2 else []
        count += fill_and_go_on(disk, str(n), room, *more, dataset=dataset)
        assert fingerprint(out_dir) == fingerprint(folder) and read_log(out_dir) == read_log(folder), room
        assert (out_dir / 'best').read_bytes() == (folder / 'best').read_bytes(), room
        shutil.rmtree(out_dir)
    return count


def test_a_disk_without_room_ends_a_run_in_one_line_at_any_point_and_it_goes_on_bitwise(small_disk, dataset,
                                                                                        tmp_path):
    """The log of the beginning, the moments of the first checkpoint, the weights of the second."""
    rooms = [4096, 900_000, 1_600_000]
    assert full_again_and_again(small_disk, rooms, dataset, tmp_path / 'whole') == len(rooms)


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob('*')
                  if path.is_file() and path.name != 'ballast')


@pytest.mark.parametrize('room', [4096, 60_000])
def test_other_scripts_leave_nothing_half_on_a_full_disk_and_the_same_command_works_later(small_disk,
                                                                                          whole_run, room):
    new = small_disk.folder / 'new'
    for command in (['surgery.py', 'grow', f'--from={whole_run}',
                     f'--out_dir={new}', '--n_layer=3', '--dataset=none'],
                    ['hub.py', 'export', f'--out_dir={whole_run}', f'--to={new}', '--as=custom']):
        small_disk.leave(room)
        said = one_line(run(*command))
        assert ('No space left on device' in said and 'make room' in said
                and not files(small_disk.folder)), said
        small_disk.leave(None)
        assert run(*command).returncode == 0
        shutil.rmtree(new)


def test_figures_and_tables_are_written_whole_or_not_at_all(small_disk, whole_run):
    csv, page = small_disk.folder / 'table.csv', small_disk.folder / 'page.png'
    command = ['compare.py', whole_run, f'--csv={csv}', f'--picture={page}']
    assert run(*command).returncode == 0
    before = csv.read_bytes(), page.read_bytes()
    for room, name in ((0, 'table.csv'), (4096, 'page.png')):
        small_disk.leave(room)
        said = one_line(run(*command))
        assert f'{name}: could not be written (No space left on device)' in said, said
        assert ((csv.read_bytes(), page.read_bytes()) == before
                and files(small_disk.folder) == ['page.png', 'table.csv'])
        small_disk.leave(None)


def test_a_file_is_appended_to_or_replaced_whole_or_not_at_all(small_disk):
    """Also through a link that the user gave, which stays one; a device is then written to as it is."""
    path, link = small_disk.folder / 'a', small_disk.folder / 'link'
    replace_text(path, 'old\n')
    link.symlink_to(path)
    small_disk.leave(4096)
    for write in (append, replace_text):
        with pytest.raises(OSError, match='No space left'):
            write(link, 'x' * 20_000)
        assert path.read_text() == 'old\n' and files(small_disk.folder) == ['a', 'link']
    with pytest.raises(OSError, match='No space left'):
        replace_text(link, 'x' * 20_000, is_given=True)
    append(link, 'more\n')
    assert path.read_text() == 'old\nmore\n'
    replace_text(link, 'new\n', is_given=True)
    assert link.is_symlink() and path.read_text() == 'new\n'
    replace_text(link, 'own\n')
    assert not link.is_symlink() and path.read_text() == 'new\n'
    os.truncate(path, 2)  # the end of a line is lost, not the next one
    append(path, 'more\n')
    assert path.read_text() == 'ne\nmore\n'
    replace_text(os.devnull, 'gone', is_given=True)
    assert not os.path.isfile(os.devnull)


def test_an_error_of_torch_that_is_not_the_disk_s_stays_one(tmp_path):
    with pytest.raises(RuntimeError, match='torch'):
        write_torch(tmp_path / 'x', Torch())


class Torch:
    def __reduce__(self):
        raise RuntimeError('torch')


@pytest.mark.slow
def test_a_disk_without_room_at_sixty_random_points(small_disk, dataset, tmp_path):
    chance = random.Random(0)
    rooms = [chance.randrange(4_000_000) for _ in range(60)]
    count = full_again_and_again(small_disk, rooms, dataset, tmp_path / 'whole')
    print(f'{count} of {len(rooms)} found the disk full')
    assert count > 40


# --- what is kept ---

def state(value):
    return {'w': torch.full((2,), float(value))}, {'state': {}, 'param_groups': []}, {'step': value}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(keep=st.integers(1, 4), actions=st.lists(st.sampled_from(
    ['save', 'save', 'save', 'best', 'spoil the newest', 'spoil the oldest', 'leave half']), max_size=14))
def test_the_best_and_the_last_sound_ones_are_never_removed(tmp_path_factory, keep, actions):
    out, step, best, sound = str(tmp_path_factory.mktemp('kept')), 0, None, []  # sound: steps, oldest first
    for action in actions:
        folders = checkpoint.checkpoints(out)
        if action == 'save':
            step += 1
            checkpoint.save(out, step, *state(step), keep=keep)
            sound.append(step)
            assert not [name for name in os.listdir(out) if name.endswith('.tmp')]
        elif action == 'best' and step in sound:
            best = step
            checkpoint.mark_best(out, step, 1.0, keep)
        elif action.startswith('spoil') and folders:
            spoilt = folders[0 if 'newest' in action else -1]
            with open(f'{spoilt}/state.json', 'a') as f:
                f.write(' ')
            sound = [n for n in sound if n != int(spoilt[-8:])]
        elif action == 'leave half':
            os.makedirs(f'{out}/step_{step + 1:08d}.tmp', exist_ok=True)
        there = {int(folder[-8:]) for folder in checkpoint.checkpoints(out)}
        assert set(sound[-keep:]) | ({best} if best else set()) <= there
        sound = [n for n in sound if n in there]
        if sound:
            assert checkpoint.find(out).endswith(f'{sound[-1]:08d}')


# --- in the background ---

def test_what_is_saved_in_the_background_is_what_was_there_at_the_call(tmp_path):
    weights, moments = {'w': torch.ones(1000)}, {'state': {0: {'m': torch.ones(1000)}}, 'param_groups': []}
    background.submit(partial(time.sleep, 0.2))  # the thread has something to do first
    background.submit(partial(checkpoint.save, str(tmp_path), 1, state={}), weights, moments)
    weights['w'].zero_()
    moments['state'][0]['m'].zero_()
    background.wait()
    assert checkpoint.read_weights(f'{tmp_path}/step_00000001')['w'].sum() == 1000
    assert (torch.load(f'{tmp_path}/step_00000001/optimizer.pt', weights_only=True)['state'][0]['m'].sum()
            == 1000)


def test_the_thread_ends_once_all_is_written(tmp_path):
    """Also where a run ends with an error: what is being written then is the newest checkpoint."""
    background.submit(partial(time.sleep, 0.2))
    background.submit(partial(checkpoint.save, str(tmp_path), 1, {'w': torch.ones(1000)}, {}, {}))
    background.close()
    assert checkpoint.find(str(tmp_path)).endswith('step_00000001')


def test_what_goes_wrong_in_the_background_is_said_at_the_next_save_or_the_end(dataset, tmp_path):
    args = [*TINY, f'--dataset={dataset}', '--async_save']
    for point, name in (('save:manifest@5', 'next'), ('save:manifest@10', 'end')):
        codes, said = run_to_end(*args, f'--out_dir={tmp_path / name}', fault=f'{point}=full')
        assert codes == [2] and said.count('No space left on device') == 1, said
    assert not checkpoint.checkpoints(str(tmp_path / 'next')) and step_of(tmp_path / 'end') == 5
    with pytest.raises(UserError):
        checkpoint.find(str(tmp_path / 'next'))


def test_a_best_one_that_was_not_marked_is_marked_when_the_run_goes_on(dataset, tmp_path, monkeypatch):
    """Its evaluation is in the log by then, as the background writes later."""
    mark_best = checkpoint.mark_best

    def full(out_dir, step, *args):
        if step == 10:
            raise UserError('best: could not be written')
        mark_best(out_dir, step, *args)
    monkeypatch.setattr(checkpoint, 'mark_best', full)
    one_line(train(tmp_path, '--async_save', dataset=dataset, check=False))
    assert (checkpoint.best(str(tmp_path))[0].endswith('step_00000005')
            and read_log(tmp_path)[-1]['step'] == 10)
    monkeypatch.undo()
    train(tmp_path, '--async_save', dataset=dataset)
    assert checkpoint.best(str(tmp_path))[0].endswith('step_00000010')
    assert [r['step'] for r in read_log(tmp_path) if 'val_loss' in r] == [0, 5, 10]


def test_a_checkpoint_of_the_background_is_of_its_step_however_late_it_is_written(dataset, tmp_path):
    args = [*SMALL, f'--dataset={dataset}', '--eval_interval=100', '--checkpoint_interval=4',
            '--keep_checkpoints=9']
    assert (run_to_end(*args, f'--out_dir={tmp_path / "late"}', '--async_save', fault='save:begin@4=slow')[0]
            == [0])
    assert run_to_end(*args, f'--out_dir={tmp_path / "at once"}')[0] == [0]
    late, at_once = (checkpoint.read_weights(str(tmp_path / name / 'step_00000004'))
                     for name in ('late', 'at once'))
    assert all(torch.equal(late[name], at_once[name]) for name in at_once)


def test_damage_is_found_where_a_file_cannot_be_read_and_a_broken_log_is_no_obstacle(dataset, tmp_path,
                                                                                     monkeypatch):
    train(tmp_path, dataset=dataset)
    with open(tmp_path / 'log.jsonl', 'a') as f:
        f.write('\0\0\0\n{"step": 1')
    train(tmp_path, '--max_iters=12', dataset=dataset)
    assert read_log(tmp_path)[-1]['step'] == 12

    def broken_disk(path):
        raise OSError(5, 'Input/output error')
    monkeypatch.setattr(checkpoint, 'sha256', broken_disk)
    assert 'Input/output error' in checkpoint.damage(checkpoint.checkpoints(str(tmp_path))[0])


def test_saved_in_the_background_a_run_is_the_same_run(whole, dataset, tmp_path):
    train(tmp_path, *SMALL, *OFTEN, '--async_save', dataset=dataset)
    assert (fingerprint(tmp_path) == whole
            and json.loads((tmp_path / 'best').read_text())['checkpoint'] == 'step_00000010')
    train(tmp_path / 'plain', *SMALL, *OFTEN, dataset=dataset)
    assert read_log(tmp_path) == read_log(tmp_path / 'plain')


def test_a_signal_while_the_background_writes_waits_for_it(dataset, tmp_path):
    processes = Processes(*SMALL, f'--dataset={dataset}', f'--out_dir={tmp_path}', '--async_save',
                          '--max_iters=100000', '--eval_interval=5', fault='save:manifest=slow')
    assert processes.wait_for('step 5:')
    processes.kill(signal.SIGTERM)
    codes, said = processes.wait()
    assert codes == [128 + signal.SIGTERM] and f'after step {step_of(tmp_path)};' in said
    assert all(checkpoint.damage(folder) is None for folder in checkpoint.checkpoints(str(tmp_path)))
