"""
The folders of runs: their default, what may become one, what is moved aside, and whose they are.
"""
import errno
import json
import os
import shlex
import shutil
import subprocess
import sys
import time

import pytest
from conftest import ROOT, TINY, one_line, run, write_dataset

import checkpoint
import train as training
from configurator import UserError, configure
from features.run_folders import last_run


@pytest.mark.parametrize('args, expected', [
    (['lowrank.py'], 'out/lowrank'), (['lowrank.py', 'other.py'], 'out/other'),
    (['lowrank.py', '--out_dir=x'], 'x'), (['lowrank.py', '--dataset=stories'], 'out/lowrank'),
    (['named.py'], 'out/mine'), ([], 'out/stdlib'), (['--dataset=data/stories/'], 'out/stories'),
    (["--dataset={'a/web': 1, 'code': 2}"], 'out/web+code'), (['--dataset=/'], 'out/run'),
    (['--dataset=x', '--out_dir='], 'out/x'), (['sub/lowrank.v2.py'], 'out/lowrank.v2'),
])
def test_the_default_out_dir_has_the_name_of_the_config_file_or_the_data_set(
        args, expected, tmp_path, monkeypatch):
    (tmp_path / 'sub').mkdir()
    for name in ('lowrank.py', 'other.py', 'sub/lowrank.v2.py'):
        (tmp_path / name).write_text('n_layer = 2\n')
    (tmp_path / 'named.py').write_text("out_dir = 'out/mine'\n")
    monkeypatch.chdir(tmp_path)
    s = configure(training.Settings, args)
    assert (s.out_dir or training.default_out_dir(s)) == expected


def test_a_mixture_of_many_has_a_name_that_a_file_system_takes():
    s = configure(training.Settings, [f'--dataset={ {f"corpus_number_{n}": 1 for n in range(40)} }'])
    assert len(os.path.basename(training.default_out_dir(s))) <= 100


def checkpoint_of(folder, step, time):
    """A folder that looks like a checkpoint, written at this time."""
    path = folder / f'step_{step:08d}'
    path.mkdir(parents=True)
    (path / 'manifest.json').write_text(json.dumps({'step': step, 'files': {}}))
    os.utime(path, (time, time))


def test_without_an_out_dir_the_run_trained_last_is_taken(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match='there is no run in out: give --out_dir=DIR'):
        last_run()
    checkpoint_of(tmp_path / 'out' / 'old', 900, 1000)
    checkpoint_of(tmp_path / 'disk' / 'new', 5, 3000)
    checkpoint_of(tmp_path / 'out' / 'sweeps' / 'demo' / 'a,seed=1', 7, 2000)
    assert last_run() == 'out/sweeps/demo/a,seed=1'
    (tmp_path / 'out' / 'link').symlink_to(tmp_path / 'disk' / 'new')
    (tmp_path / 'out' / 'weights.png').touch()
    (tmp_path / 'out' / 'gone').symlink_to(tmp_path / 'nowhere')
    capsys.readouterr()
    assert last_run() == 'out/link'
    printed = capsys.readouterr()
    assert not printed.out and printed.err.count('\n') == 1 and 'out_dir=out/link' in printed.err
    checkpoint_of(tmp_path / 'out', 20, 4000)  # a run of an older version, whose default was out itself
    assert last_run() == 'out'


def test_train_and_sample_agree_on_the_default(tmp_path):
    """And an older run in out itself stays: it is named, not touched."""
    write_dataset(tmp_path / 'data' / 'counting', vocab_size=257)
    checkpoint_of(tmp_path / 'out', 3, 1000)
    done = run(ROOT / 'train.py', *TINY, '--max_iters=2', '--dataset=counting', cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert 'done: 2 steps; python sample.py --out_dir=out/counting' in done.stdout
    assert 'out itself holds a run' in done.stdout
    assert sorted(os.listdir(tmp_path / 'out')) == ['counting', 'step_00000003']
    done = run(ROOT / 'sample.py', '--num_samples=1', '--max_new_tokens=3', '--device=cpu', cwd=tmp_path)
    assert done.returncode == 0 and done.stderr.startswith('out_dir=out/counting: the last run')
    done = run(ROOT / 'eval.py', 'loss', '--device=cpu', cwd=tmp_path)
    assert done.returncode == 0 and done.stderr.startswith('out_dir=out/counting: the last run')
    os.rename(tmp_path / 'out', tmp_path / 'elsewhere')
    done = run(ROOT / 'sample.py', cwd=tmp_path)
    assert 'there is no run in out' in one_line(done)


# --- which folder may become a run's, and what is moved aside ---

SETTINGS = {'out_dir': 'x', 'init_from': 'auto', 'max_iters': 5, 'n_layer': 1, 'n_embd': 8, 'block_size': 8}


def tree(folder):
    """{path: content} of what is in a folder, the lock of the moment left out."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
            for path in sorted(folder.rglob('*')) if path.name != 'lock'}


@pytest.mark.parametrize('files', [
    {'settings.json': '{"editor": "vi", "n_layer": 3}'}, {'settings.json': ''},
    {'settings.json': '[' * 10 ** 5}, {'notes.md': 'mine'}, {'best': ''},
    {'log.jsonl': '{"step": 1}'}, {'step_00000005/notes': 'mine'},
    {'requirements.txt': 'torch'}, {'lock': 'mine'}, {'src/main.py': 'x'}, {'a/settings.json': SETTINGS},
    {'train_00000.bin': 'data', 'meta.json': '{}'}, {'.git/config': ''},
    {'x.log': 'fine', 'thesis.tex': 'no'},
])
def test_a_folder_without_the_mark_of_a_run_is_left_alone(files, tmp_path):
    for name, content in files.items():
        (tmp_path / 'project' / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / 'project' / name).write_text(content if isinstance(content, str) else json.dumps(content))
    before = tree(tmp_path)
    with pytest.raises(UserError, match='out_dir=.*: give a folder of its own'):
        checkpoint.claim(f'{tmp_path}/project')
    assert tree(tmp_path) == before and not checkpoint.CLAIMED
    assert (tmp_path / 'project' / 'lock').exists() == ('lock' in files)


def test_folders_in_which_users_work_are_refused(tmp_path, monkeypatch):
    (tmp_path / 'home').mkdir()
    (tmp_path / 'here').mkdir()
    monkeypatch.setenv('HOME', str(tmp_path / 'home'))
    monkeypatch.chdir(tmp_path / 'here')
    for path in ('/', '.', '../here', '..', str(tmp_path / 'home'), str(ROOT)):
        with pytest.raises(UserError, match='out_dir='):
            checkpoint.claim(path)
    assert tree(tmp_path) == {'here': None, 'home': None}


@pytest.mark.parametrize('names', [
    [], ['lock'], ['nohup.out'], ['slurm-12.out', 'stdout.txt', 'train.log'], ['output.txt', 'diverged.txt'],
    ['lost+found/'], ['job.o123'], ['logs/none_x1/attempt_0/0/stdout.log'],
])
def test_an_empty_folder_and_logs_of_the_shell_are_no_hindrance(names, tmp_path):
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).mkdir() if name.endswith('/') else (tmp_path / name).touch()
    checkpoint.claim(str(tmp_path))
    checkpoint.prepare_out_dir(str(tmp_path), 0, SETTINGS)
    checkpoint.release(str(tmp_path))
    assert all((tmp_path / name).exists() for name in names if name != 'lock')
    assert json.loads((tmp_path / 'settings.json').read_text()) == SETTINGS


def old_run(folder):
    """A run with notes of the user and another run in it."""
    checkpoint_of(folder, 5, 1000)
    (folder / 'settings.json').write_text(json.dumps(SETTINGS))
    (folder / 'log.jsonl').write_text('{"step": 5}\n')
    (folder / 'notes.md').write_text('mine')
    checkpoint_of(folder / 'other', 7, 1000)


@pytest.mark.parametrize('kind', ['plain', 'link', 'no place beside it'])
def test_only_what_minnow_wrote_is_moved_aside_and_a_link_stays(kind, tmp_path, monkeypatch):
    old_run(tmp_path / 'disk' / 'run')
    out_dir = tmp_path / 'disk' / 'run'
    aside = tmp_path / 'disk' / 'run.old1'
    if kind == 'link':
        out_dir = tmp_path / 'link'
        out_dir.symlink_to(tmp_path / 'disk' / 'run')
    if kind == 'no place beside it':  # a mounted volume
        rename = os.rename

        def same_disk(old, new):
            if not str(new).startswith(f'{out_dir}/'):
                raise OSError(errno.EXDEV, 'Invalid cross-device link')
            rename(old, new)
        monkeypatch.setattr(os, 'rename', same_disk)
        aside = out_dir / 'old1'
    checkpoint.prepare_out_dir(str(out_dir), 0, SETTINGS | {'n_layer': 2})
    checkpoint.release(str(out_dir))
    assert out_dir.is_symlink() == (kind == 'link')
    assert sorted(os.listdir(aside)) == ['log.jsonl', 'settings.json', 'step_00000005']
    assert (out_dir / 'notes.md').read_text() == 'mine' and (out_dir / 'other' / 'step_00000007').is_dir()
    assert not list(out_dir.glob('step_*'))
    assert sorted(os.listdir(tmp_path / 'disk')) == ['run'] + ['run.old1'] * (kind != 'no place beside it')


def test_a_dangling_link_gets_its_folder_but_not_a_disk_that_is_not_mounted(tmp_path):
    (tmp_path / 'link').symlink_to(tmp_path / 'new')
    (tmp_path / 'lost').symlink_to(tmp_path / 'disk' / 'new')
    checkpoint.claim(f'{tmp_path}/link')
    assert (tmp_path / 'new' / 'lock').exists()
    checkpoint.release(f'{tmp_path}/link')
    with pytest.raises(UserError, match='out_dir=.*lost'):
        checkpoint.claim(f'{tmp_path}/lost')
    (tmp_path / 'file').touch()
    for path in ('file', 'file/run'):
        with pytest.raises(UserError, match='out_dir=.*file'):
            checkpoint.claim(f'{tmp_path}/{path}')
    assert sorted(os.listdir(tmp_path)) == ['file', 'link', 'lost'] and not checkpoint.CLAIMED


def test_a_start_that_is_refused_leaves_no_folder(tmp_path):
    out_dir = f'{tmp_path}/a/b/c'
    checkpoint.claim(out_dir)
    assert os.path.exists(f'{out_dir}/lock')
    checkpoint.release(out_dir)
    assert os.listdir(tmp_path) == []


# --- a folder that is no longer where it was ---

WRITES = {
    'a checkpoint': lambda out_dir: checkpoint.save(out_dir, 7, {}, {}, {}),
    'best': lambda out_dir: checkpoint.mark_best(out_dir, 5, 1.0),
    'pruning': lambda out_dir: checkpoint.prune(out_dir, 1),
    'settings.json': lambda out_dir: checkpoint.prepare_out_dir(out_dir, 5, SETTINGS),
}


@pytest.mark.parametrize('what', WRITES)
@pytest.mark.parametrize('how', ['renamed', 'parent renamed', 'removed', 'made anew'])
def test_nothing_is_written_where_another_run_may_be(how, what, tmp_path):
    out_dir, moved = tmp_path / 'out' / 'run', tmp_path / 'out' / 'moved'
    old_run(out_dir)
    checkpoint.claim(str(out_dir))
    if how == 'parent renamed':
        moved = tmp_path / 'elsewhere' / 'run'
        os.rename(tmp_path / 'out', tmp_path / 'elsewhere')
    elif how == 'removed':
        shutil.rmtree(out_dir)
    else:
        os.rename(out_dir, moved)
    if how == 'made anew':
        old_run(out_dir)
        (out_dir / 'lock').touch()
    before = tree(tmp_path)
    words = 'its checkpoints are gone' if how == 'removed' else f'go on with --out_dir={moved}$'
    with pytest.raises(UserError, match=words):
        WRITES[what](str(out_dir))
    assert tree(tmp_path) == before
    checkpoint.release(str(out_dir))
    assert tree(tmp_path) == before and (how != 'made anew' or (out_dir / 'lock').exists())
    if how != 'removed':  # it can be resumed there
        checkpoint.claim(str(moved))
        checkpoint.release(str(moved))


def test_a_run_whose_folder_is_renamed_stops_and_goes_on_there(dataset, tmp_path):
    """With real processes: another run that begins at the old place has none of it."""
    args = [sys.executable, ROOT / 'train.py', *TINY, f'--dataset={dataset}', '--max_iters=100000',
            '--eval_interval=50', '--eval_iters=1']
    first = subprocess.Popen([*args, f'--out_dir={tmp_path}/run'], stdout=subprocess.DEVNULL,
                             stderr=subprocess.PIPE, text=True)
    while first.poll() is None and not (tmp_path / 'run' / 'best').exists():
        time.sleep(0.05)
    os.rename(tmp_path / 'run', tmp_path / 'moved')
    (tmp_path / 'run').mkdir()
    _, said = first.communicate(timeout=120)
    assert first.returncode == 2 and said.count('\n') == 1 and f'--out_dir={tmp_path}/moved' in said, said
    assert os.listdir(tmp_path / 'run') == []
    step = int(checkpoint.find(str(tmp_path / 'moved'))[-8:])
    last = json.loads((tmp_path / 'moved' / 'log.jsonl').read_text().splitlines()[-1])['step']
    assert step >= last  # no step is lost
    done = run('train.py', *args[2:], f'--out_dir={tmp_path}/moved', f'--max_iters={step + 2}')
    assert done.returncode == 0 and f'at step {step}' in done.stdout, done.stderr


@pytest.mark.parametrize('is_there', [False, True])
def test_of_five_starts_in_one_folder_one_trains(is_there, dataset, tmp_path):
    if is_there:
        run('train.py', *TINY, f'--dataset={dataset}', '--max_iters=2', f'--out_dir={tmp_path}/out')
    starts = [subprocess.Popen([sys.executable, ROOT / 'train.py', *TINY, f'--dataset={dataset}',
                                '--max_iters=1000000', '--eval_interval=1000000', f'--batch_size={rows}',
                                *['--init_from=scratch'] * is_there, f'--out_dir={tmp_path}/out'],
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
              for rows in range(2, 7)]
    try:
        while sum(start.poll() is None for start in starts) > 1:
            time.sleep(0.1)
        alive = [start for start in starts if start.poll() is None]
        assert len(alive) == 1
        deadline = time.monotonic() + 60
        settings = tmp_path / 'out' / 'settings.json'
        while time.monotonic() < deadline and not (tmp_path / 'out' / 'log.jsonl').exists():
            time.sleep(0.1)
        rows = 2 + starts.index(alive[0])
        if alive[0].poll() is None:
            assert json.loads(settings.read_text())['batch_size'] in (rows, 4)  # 4: of the run that was there
        for start in starts:
            if start is not alive[0]:
                said = start.stderr.read()
                assert start.returncode == 2 and said.count('\n') == 1, said
    finally:
        for start in starts:
            start.kill()
            start.communicate()


# --- the best checkpoint ---

def evaluated(folder):
    """A run with three checkpoints, the first of which is the best."""
    for step, loss in ((5, 1.0), (10, 3.0), (15, 2.0)):
        checkpoint.save(str(folder), step, {}, {}, {}, keep=5)
        with open(folder / 'log.jsonl', 'a') as f:
            f.write(json.dumps({'step': step, 'val_loss': loss}) + '\n')
    return folder / 'best'


@pytest.mark.parametrize('content', ['', '{"check', 'null', '[]', '{}', '{"checkpoint": 5, "val_loss": 1}',
                                     '{"checkpoint": "step_00000099", "val_loss": 0.1}',
                                     '{"checkpoint": "..", "val_loss": 0.1}', None])
def test_a_damaged_best_is_recovered_and_its_checkpoint_kept(content, tmp_path):
    path = evaluated(tmp_path)
    if content is not None:
        path.write_text(content)
    assert checkpoint.best(str(tmp_path)) == (str(tmp_path / 'step_00000005'), 1.0)
    assert checkpoint.find(str(tmp_path), 'best').endswith('step_00000005')
    checkpoint.save(str(tmp_path), 20, {}, {}, {}, keep=1)
    assert sorted(p.name for p in tmp_path.glob('step_*')) == ['step_00000005', 'step_00000020']
    checkpoint.prepare_out_dir(str(tmp_path), 20, SETTINGS)
    checkpoint.release(str(tmp_path))
    assert json.loads(path.read_text()) == {'checkpoint': 'step_00000005', 'val_loss': 1.0}


def test_while_best_cannot_be_read_nothing_is_pruned(tmp_path, monkeypatch):
    path = evaluated(tmp_path)
    path.write_text(json.dumps({'checkpoint': 'step_00000010', 'val_loss': 0.5}))
    opened = os.open

    def broken(name, *args, **more):
        if str(name) == str(path):
            raise OSError(errno.EIO, os.strerror(errno.EIO), name)
        return opened(name, *args, **more)
    monkeypatch.setattr(os, 'open', broken)
    checkpoint.prune(str(tmp_path), 1)
    assert len(list(tmp_path.glob('step_*'))) == 3
    monkeypatch.undo()
    checkpoint.prune(str(tmp_path), 1)
    assert sorted(p.name for p in tmp_path.glob('step_*')) == ['step_00000010', 'step_00000015']


def test_if_neither_best_nor_the_log_is_readable_nothing_is_guessed(tmp_path, capsys):
    evaluated(tmp_path).write_text('{')
    (tmp_path / 'log.jsonl').write_text('damaged')
    with pytest.raises(UserError, match='nor does log.jsonl say which checkpoint is the best'):
        checkpoint.best(str(tmp_path))
    checkpoint.prune(str(tmp_path), 1)
    assert len(list(tmp_path.glob('step_*'))) == 3
    assert checkpoint.find(str(tmp_path), 'best').endswith('step_00000015')


@pytest.mark.parametrize('log', ['', '{"step": 15, "val_loss": 2.0}\n', 'damaged'])
def test_a_best_is_known_if_the_log_was_cut_too(log, tmp_path):
    path = evaluated(tmp_path)
    checkpoint.mark_best(str(tmp_path), 5, 1.0, keep=5)
    path.write_text('')
    (tmp_path / 'log.jsonl').write_text(log)
    checkpoint.save(str(tmp_path), 20, {}, {}, {}, keep=1)
    assert sorted(p.name for p in tmp_path.glob('step_*')) == ['step_00000005', 'step_00000020']
    assert checkpoint.best(str(tmp_path)) == (str(tmp_path / 'step_00000005'), 1.0)


@pytest.mark.parametrize('content', ['{', '[]', '{"val_loss": NaN}', '{"val_loss": "1"}', '{}'])
def test_a_damaged_loss_of_a_checkpoint_is_none(content, tmp_path):
    evaluated(tmp_path).write_text('')
    (tmp_path / 'step_00000010' / 'val_loss.json').write_text(content)
    assert checkpoint.best(str(tmp_path)) == (str(tmp_path / 'step_00000005'), 1.0)
    (tmp_path / 'log.jsonl').unlink()
    with pytest.raises(UserError, match='which checkpoint is the best'):
        checkpoint.best(str(tmp_path))


# --- names ---

@pytest.mark.parametrize('setting', ['out_dir', 'dataset', 'init_from', 'teacher'])
@pytest.mark.parametrize('name', ['b\udcff', 'a\0b'])
def test_a_path_that_is_not_utf_8_is_refused_before_anything_is_read(name, setting):
    with pytest.raises(UserError, match='not UTF-8|takes a path'):
        configure(training.Settings, [f'--{setting}=data/{name}'])


def test_the_name_of_a_config_file_is_no_way_around(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with open(b'b\xff.py', 'w') as f:
        f.write('n_layer = 1')
    with pytest.raises(UserError, match='out_dir: not UTF-8'):
        training.default_out_dir(configure(training.Settings, [os.fsdecode(b'b\xff.py')]))


def test_names_with_quotes_and_new_lines_work_and_the_printed_command_is_quoted(dataset, tmp_path):
    out_dir = f'{tmp_path}/it\'s "a\nb"'
    for steps in (2, 4):
        done = run('train.py', *TINY, f'--max_iters={steps}', f'--dataset={dataset}', f'--out_dir={out_dir}')
        assert done.returncode == 0, done.stderr
    command = done.stdout.split('done: 4 steps; ')[1]
    assert shlex.split(command) == ['python', 'sample.py', f'--out_dir={out_dir}']


def test_a_sweep_whose_folder_is_renamed_makes_no_other(tmp_path):
    from features.study.jobs import check_place, locked
    with locked(str(tmp_path / 'sweep')) as lock:
        check_place(str(tmp_path / 'sweep'), lock)
        os.rename(tmp_path / 'sweep', tmp_path / 'moved')
        with pytest.raises(UserError, match='was renamed or removed while the sweep was running'):
            check_place(str(tmp_path / 'sweep'), lock)
