"""
Files that somebody else may have written: refused in one line, before anything of them is copied or read
without an end.
"""
import ast
import hashlib
import json
import os
import pickle
import resource
import shutil
import socket
import zipfile
from collections import OrderedDict

import pytest
import torch
from conftest import ROOT, one_line, run_here, train

import checkpoint
from checkpoint import open_regular, own_file, read_json
from configurator import UserError
from features.folder import new_folder
from features.foreign_json import read_foreign
from features.moments import read_archive, read_moments
from features.records import read
from features.stored import checked


def odd_files(folder):
    """{name: path} of what has a file's name and is no regular file: reading some would never end."""
    paths = {name: str(folder / name) for name in ('folder', 'pipe', 'zero', 'to_pipe', 'nowhere', 'circle')}
    os.mkdir(paths['folder'])
    os.mkfifo(paths['pipe'])
    for name, to in (('zero', '/dev/zero'), ('to_pipe', 'pipe'), ('nowhere', 'gone'), ('circle', 'circle')):
        os.symlink(to, paths[name])
    with socket.socket(socket.AF_UNIX) as s:
        s.bind(str(folder / 'socket'))
    return paths | {'socket': str(folder / 'socket'), 'device': '/dev/zero', 'absent': str(folder / 'absent')}


def test_only_a_regular_file_is_opened(tmp_path):
    for path in odd_files(tmp_path).values():
        for reader in (open_regular, read_json):
            with pytest.raises(UserError, match=path):
                reader(path)
    with pytest.raises(UserError, match='null'):
        open_regular('a\0b')


def test_a_name_out_of_a_file_stays_in_its_folder(tmp_path):
    folder = tmp_path / 'folder'
    odd_files(tmp_path)
    (tmp_path / 'secret').write_text('mine')
    (folder / 'deep').mkdir()
    (folder / 'deep' / 'a').write_text('a')
    for name in ('', '.', '..', '../secret', 'deep/a', './a', str(tmp_path / 'secret'), 'a\0', 'deep',
                 'absent', None, 3, True, ['secret'], b'secret'):
        with pytest.raises(UserError, match='folder'):
            own_file(str(folder), name)
    for name in odd_files(folder):
        if name != 'device':
            with pytest.raises(UserError, match=name):
                own_file(str(folder), name)


def test_a_hash_decides_about_a_link(tmp_path):
    """The cache of huggingface_hub has links in snapshots/, to files in blobs/."""
    (tmp_path / 'blobs').mkdir()
    (tmp_path / 'blobs' / 'b').write_text('its')
    (tmp_path / 'secret').write_text('mine')
    folder = tmp_path / 'snapshots' / 'main'
    folder.mkdir(parents=True)
    (folder / 'tokenizer.json').symlink_to('../../blobs/b')
    (folder / 'other.json').symlink_to(tmp_path / 'secret')
    right = hashlib.sha256(b'its').hexdigest()
    assert own_file(str(folder), 'tokenizer.json', right) == str(folder / 'tokenizer.json')
    assert own_file(str(folder), 'tokenizer.json') == str(folder / 'tokenizer.json')
    with pytest.raises(UserError, match='other.json'):
        own_file(str(folder), 'other.json', right)


@pytest.mark.parametrize('text, reason', [
    (b'', 'Expecting value'),
    (b'{', 'JSON'),
    (b'[]', 'holds a list'),
    (b'3', 'holds a int'),
    (b'{"a": NaN}', 'finite'),
    (b'{"a": [-Infinity]}', 'finite'),
    (b'{"a": 1e999}', 'finite'),
    (b'{"a": ' + b'9' * 400 + b'}', 'finite'),
    (b'{"a": ' + b'9' * 100_000 + b'}', 'digits'),
    (b'{"a": 1, "a": 2}', 'twice'),
    (b'{"a": {"b": 1, "c": 2, "b": 1}}', 'twice'),
    (b'{"a": "\xff"}', 'utf-8'),
    ('{"a": 1}'.encode('utf-16'), 'utf-8'),
    (b'[' * 100_000, 'JSON'),
    (b'{"a":' * 100_000, 'JSON'),
    (b'{"a": ' + b'[1, ' * 101 + b'2' + b']' * 101 + b'}', 'levels'),
    (b'{"a": 1}' + b' ' * 2 ** 23, 'bytes'),
    (b'{"a": 1} {"b": 1}', 'Extra data'),
])
def test_json_of_others_is_one_line(tmp_path, text, reason):
    (tmp_path / 'a.json').write_bytes(text)
    with pytest.raises(UserError, match=f'a.json.*{reason}') as error:
        read_json(str(tmp_path / 'a.json'))
    assert len(str(error.value)) < 300 + len(str(tmp_path)) and '\n' not in str(error.value)


def test_json_that_is_right(tmp_path):
    text = '\ufeff{"a": [1, -2, 1.5, 1e3, 1' + '0' * 30 + ', true, null, "ä"], "b": {}}'
    (tmp_path / 'a.json').write_text(text, encoding='utf-8')
    value = {'a': [1, -2, 1.5, 1000.0, 10 ** 30, True, None, 'ä'], 'b': {}}
    assert read_json(str(tmp_path / 'a.json')) == value
    (tmp_path / 'a.json').write_text('[1]')
    assert read_json(str(tmp_path / 'a.json'), list) == [1]


# --- what minnow writes: for whom, and whole or not at all ---

@pytest.mark.parametrize('umask', [0o022, 0o002, 0o077])
def test_all_files_follow_the_umask(tmp_path, umask):
    """safetensors 0.8 writes files that only their owner can read."""
    state = {'state': {}, 'param_groups': []}
    (tmp_path / 'private').touch(mode=0o600)
    before = os.umask(umask)
    try:
        tokenizer = {'tokenizer.model': b'its'}
        checkpoint.save(str(tmp_path / 'run'), 1, {'w': torch.zeros(3)}, state, {}, tokenizer)
        with new_folder(str(tmp_path / 'new')) as folder:
            checkpoint.write_tensors(os.path.join(folder, 'model.safetensors'), {'w': torch.zeros(3)})
    finally:
        os.umask(before)
    found = [*(tmp_path / 'run').rglob('*'), *(tmp_path / 'new').rglob('*'), tmp_path / 'new']
    assert len(found) == 8
    for path in found:
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~umask, path


def test_a_checkpoint_that_may_not_be_read_says_so(tmp_path, monkeypatch):
    for step in (1, 2):
        checkpoint.save(str(tmp_path), step, {'w': torch.zeros(3)}, {'state': {}}, {})

    def refuse(path):
        if 'step_00000002' in str(path):
            raise PermissionError(13, 'Permission denied', path)
        return sha256(path)
    sha256 = checkpoint.sha256
    monkeypatch.setattr(checkpoint, 'sha256', refuse)
    with pytest.raises(UserError, match='step_00000002.*Permission denied.*chmod'):  # not the one before
        checkpoint.find(str(tmp_path))


@pytest.mark.parametrize('command', [
    ['surgery.py', 'inherit', '--from={}/run', '--layers=0', '--out_dir={}/new', '--dataset=none'],
    ['hub.py', 'export', '--out_dir={}/run', '--to={}/new', '--as=custom']], ids=['surgery', 'export'])
def test_a_full_disk_leaves_nothing_of_a_new_folder(tmp_path, dataset, command):
    train(tmp_path / 'run', '--max_iters=2', dataset=dataset)
    command = [word.format(tmp_path) for word in command]
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob('*')}
    largest = 20_000  # bytes: the weights have more
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    for most in (0, 1, 7, 100, 500, 1000, 2000, 5000, largest):
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, unlimited[1]))
        try:
            done = run_here(command)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        assert f'{tmp_path}/new: could not be written' in one_line(done) and 'make room' in one_line(done)
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob('*')} == before
    assert run_here(command).returncode == 0  # as the line says


def test_our_own_files_do_not_follow_a_link(tmp_path):
    """Those of a run's folder that somebody else made; a path that the user gave may be a link."""
    secret, path = tmp_path / 'secret', tmp_path / 'best'
    secret.write_text('mine')
    for name in ('best', 'best.tmp'):
        (tmp_path / name).symlink_to(secret)
    checkpoint.replace_json(str(path), {'a': 1})
    assert secret.read_text() == 'mine' and not path.is_symlink() and read_json(str(path)) == {'a': 1}
    path.unlink()
    for name in ('best', 'best.tmp'):
        os.mkfifo(tmp_path / name)
    checkpoint.replace_json(str(path), {'a': 2})
    assert read_json(str(path)) == {'a': 2}


# --- the files of a checkpoint; tests/hostile has some hundred more ---

def store(path, value, entries=(), compress=zipfile.ZIP_STORED):
    """A file like torch.save()'s with this pickle."""
    with zipfile.ZipFile(path, 'w', compress) as archive:
        archive.writestr('x/data.pkl', value if isinstance(value, bytes) else pickle.dumps(value, protocol=2))
        for name, data in entries:
            archive.writestr(f'x/data/{name}', data)


class Call:
    def __init__(self, function, *args):
        self.reduced = function, args

    def __reduce__(self):
        return self.reduced


def test_the_moments_that_torch_saves_are_read_bitwise(tmp_path):
    tensors = {'step': torch.tensor(3.0), 'exp_avg': torch.randn(4, 5).T, 'exp_avg_sq': torch.rand(5, 4)}
    value = {'state': {0: tensors, 1: {'step': torch.zeros(()), 'momentum': torch.randn(7).bfloat16()}},
             'param_groups': [{'lr': 1e-3, 'betas': (0.9, 0.95), 'muon': False, 'params': [0, 1],
                               'param_names': ['a', 'b']}] + [{'betas': (0.9, 0.95), 'param_names': []}]}
    value['param_groups'][1]['betas'] = value['param_groups'][0]['betas']
    checkpoint.write_torch(str(tmp_path / 'optimizer.pt'), value)
    found = read_moments(str(tmp_path))
    for n, name in enumerate('ab'):
        assert found[name].keys() == value['state'][n].keys()
        for what, t in value['state'][n].items():
            assert found[name][what].dtype == t.dtype and torch.equal(found[name][what], t)
    assert read_archive(str(tmp_path / 'optimizer.pt'))['param_groups'] == value['param_groups']


def test_a_pickle_that_does_more_than_hold_tensors_is_refused_at_once(tmp_path):
    path = tmp_path / 'optimizer.pt'
    tower = ()
    for _ in range(60):  # hash() of it takes 2 ** 60 steps
        tower = (tower, tower)
    tower = b'\x80\x02}' + pickle.dumps(tower, protocol=2)[2:-1] + b'K\x01s.'  # {tower: 1}
    for value in (Call(os.mkdir, str(tmp_path / 'canary')), Call(bytearray, 10 ** 11), tower,
                  Call(OrderedDict, [[1]]), b'', b'\x80\x02.', b'\x80\x02' + b'(' * 1000, [], 3, {'state': 3},
                  {'state': {}, 'param_groups': [{'param_names': [['a']]}]},
                  {'state': {0: {'step': 3}}, 'param_groups': [{'param_names': ['a']}]},
                  {'state': {}, 'param_groups': [{'param_names': ['a', 'a']}]}):
        store(path, value)
        with pytest.raises(UserError, match='optimizer.pt'):
            read_moments(str(tmp_path))
    store(path, {'state': {}}, [('0', bytes(10 ** 6))], zipfile.ZIP_DEFLATED)
    with pytest.raises(UserError, match='compressed'):
        read_moments(str(tmp_path))
    assert not (tmp_path / 'canary').exists()


def test_numbers_beyond_the_entry_are_not_read(tmp_path):
    """torch.load() takes the number of elements from the pickle."""
    checkpoint.write_torch(str(tmp_path / 'whole'), {'state': {0: {'seen': torch.ones(1000)}},
                                                     'param_groups': [{'param_names': ['a']}]})
    with zipfile.ZipFile(tmp_path / 'whole') as whole, zipfile.ZipFile(tmp_path / 'optimizer.pt', 'w') as cut:
        for name in whole.namelist():
            cut.writestr(name, whole.read(name)[:400] if '/data/' in name else whole.read(name))
    with pytest.raises(UserError, match='out of bounds'):
        read_moments(str(tmp_path))


STATE = {'step': 3, 'model': {'vocab_size': 64}, 'settings': {}, 'tokenizer': {'kind': 'byte'}}


INVALID = {
    'step': [True, -1, 2 ** 60, None, 1.0],
    'flops': [-1, '1'],
    'model': [[], {'n_layer': 'x', 'vocab_size': 64}, {'vocab_size': 64, 'nothing': 1}, {'vocab_size': 0}],
    'settings': [None, {'dtype': 16}, {'init_from': ['a']}],
    'tokenizer': [{}, 'byte', {'kind': 'x', 'files': {'../../.ssh/id_x': '0' * 64}},
                  {'kind': 'x', 'files': ['a']}, {'kind': 'x', 'files': {'a': 'no hash'}},
                  {'kind': 'byte', 'reserved': 10 ** 9}],
    'begin': [3, [64], ['a'], [1, 2]],
    'data': [[], {'a': 1}],
    'scaler': [3, {'scale': 'x'}],
    'prompt': [[], {'ends': [99]}, {'bos': 3}, {'chat_template': 3}, {'names': []}],
    'interval': [[], {'nats': []}, {'nats': [1], 'targets': 1, 'loads': [[1], [1, 2]]}],
    'left_out': [3, [-1]],
    'losses': [['a']],
    'skipped': [-1],
    'job': [3],
    'fits': [[[1]], [[1, 2, 1.5]], [[1, 2, 0.5, 3]], [[1, 2.5]], [[1, 2, -0.5]]],
    'surgery': [3],
    'base': ['x'],
    'lora': [{}],
}


@pytest.mark.parametrize('field', INVALID)
def test_a_field_of_state_json_is_what_minnow_writes(field):
    assert checked(STATE, 'state.json')['model'] == {'vocab_size': 64}
    for value in INVALID[field]:
        with pytest.raises(UserError, match='^state.json: '):
            checked(STATE | {field: value}, 'state.json')
    if field in STATE:
        with pytest.raises(UserError, match=f'{field} is missing'):
            checked({name: STATE[name] for name in STATE if name != field}, 'state.json')


def test_records_of_a_log_that_are_none_are_passed_over(tmp_path):
    right = {'step': 1, 'val_loss': 2.0, 'expert_load': [[0.5, 0.5]]}
    wrong = [{'step': 1.0}, {'step': True}, {'step': 1, 'val_loss': [1]}, {'step': 1, 'lr': None}, [1], 3, {}]
    lines = [json.dumps(record) for record in (*wrong, right)]
    lines += ['{', '[' * 10 ** 5, 'x' * 3_000_000, '\0' * 100, '{"step": ' + '9' * 10 ** 5 + '}']
    (tmp_path / 'log.jsonl').write_bytes('\n'.join(lines).encode() + b'\n\xff\n')
    assert read(str(tmp_path / 'log.jsonl')) == [right]
    with open(tmp_path / 'log.jsonl', 'r+b') as f:
        f.truncate(2 ** 31)
    with pytest.raises(UserError, match='move it away'):
        read(str(tmp_path / 'log.jsonl'))


@pytest.mark.parametrize('text, value', [
    ('{"a": 1, "a": 2}', {'a': 2}), ('{"a": {"b": 1}, "a": 3}', {'a': 3}), ('{"a": NaN}', {'a': 'NaN'}),
    ('{"a": [-Infinity, 1]}', {'a': ['-Infinity', 1]}), ('{"a": 1e999}', {'a': '1e999'}),
    ('{"a": 1' + '0' * 400 + '}', {'a': '1' + '0' * 400})])
def test_a_file_of_others_means_what_it_means_to_json_load_and_one_of_ours_is_strict(tmp_path, text, value):
    (tmp_path / 'x.json').write_text(text)
    assert read_foreign(str(tmp_path / 'x.json')) == value
    with pytest.raises(UserError, match='not readable as JSON'):
        checkpoint.read_json(str(tmp_path / 'x.json'))


@pytest.mark.parametrize('is_given', [False, True])
def test_a_file_of_the_user_beside_one_that_is_written_stays(tmp_path, is_given):
    """A name that the user gives may stand beside anything; our own temporary names are taken over."""
    for name in ('x', 'x.tmp', f'x.{os.getpid()}.tmp'):
        (tmp_path / name).write_text('mine')
    before = set(os.listdir(tmp_path))
    if is_given:
        with pytest.raises(OSError, match='exists'), checkpoint.replacing(tmp_path / 'x', is_given=True):
            pass
        assert {name: (tmp_path / name).read_text() for name in before} == dict.fromkeys(before, 'mine')
        os.unlink(tmp_path / f'x.{os.getpid()}.tmp')
    checkpoint.replace_text(tmp_path / 'x', 'new', is_given)
    assert (tmp_path / 'x').read_text() == 'new'
    assert (tmp_path / 'x.tmp').exists() == is_given and len(list(tmp_path.glob('x.*.tmp'))) == (not is_given)


@pytest.mark.parametrize('how', ['renamed', 'made anew', 'removed', 'error'])
def test_nothing_is_left_of_a_new_folder_whose_parent_goes(tmp_path, how):
    parent, moved = tmp_path / 'a' / 'b', tmp_path / 'moved'
    with pytest.raises(UserError, match='could not be written|an error') as error:
        with new_folder(str(parent / 'new')) as folder:
            checkpoint.replace_text(os.path.join(folder, 'file'), 'text')
            if how == 'removed':
                shutil.rmtree(parent)
            elif how == 'error':
                raise UserError('an error')
            else:
                os.rename(parent, moved)
            if how == 'made anew':
                parent.mkdir()
                (parent / 'mine').write_text('mine')
            checkpoint.replace_text(os.path.join(folder, 'more'), 'text')
    assert '\n' not in str(error.value)
    if how in ('renamed', 'made anew'):
        assert os.listdir(moved) == []
    assert [path.name for path in (tmp_path / 'a').rglob('*')] == ['b', 'mine'] * (how == 'made anew') \
        if (tmp_path / 'a').exists() else how != 'made anew'


# What runs code, or reads what may; SECURITY.md says where
RISKY = {'exec', 'eval', 'compile', '__import__', 'torch.load', 'pickle.load', 'pickle.loads', 'os.system',
         'pickle.Unpickler', 'pickle._Unpickler', 'runpy.run_path', 'np.load', 'marshal.loads', 'os.popen'}
KNOWN = {
    'configurator.py': {'exec', 'compile'},  # config files
    'features/declared.py': {'exec', 'eval', 'compile'},  # our own settings, for --help
    'features/text/nanogpt.py': {'pickle._Unpickler'},  # of the opcodes that it has looked at
    'features/study/bench_race.py': {'torch.load'},  # of its own peer
}


def risky_calls(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            if ast.unparse(node.func) in RISKY:
                yield ast.unparse(node.func)
            for keyword in node.keywords:
                if keyword.arg in ('allow_pickle', 'shell', 'trust_remote_code'):
                    yield ast.unparse(keyword)


def test_code_is_run_only_where_it_is_trusted():
    found = {str(path.relative_to(ROOT)): set(risky_calls(path))
             for path in [*ROOT.glob('*.py'), *ROOT.glob('features/**/*.py')]}
    assert {name: calls for name, calls in found.items() if calls} == KNOWN
