"""
Files that somebody else may have written: refused in one line, before anything of them is copied or read
without an end.
"""
import hashlib
import os
import socket

import pytest

from checkpoint import open_regular, own_file, read_json
from configurator import UserError


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
        for read in (open_regular, read_json):
            with pytest.raises(UserError, match=path):
                read(path)
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
