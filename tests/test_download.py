"""
A download goes on where it broke, is checked, and never lies half there under its own name. The server is on
this machine.
"""
import gzip
import hashlib
import json
import os
import threading
import urllib.error
import urllib.request
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from configurator import UserError
from features.text import download as module
from features.text.download import CORPORA, download, download_corpus

BODY = bytes(range(256)) * 4096  # 1 MB


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        server.asked.append((self.path, self.headers.get('Range')))
        if self.path.startswith('/moved'):
            self.send_response(302)
            self.send_header('Location', '/file')
            self.end_headers()
            return
        if server.fail:
            self.send_error(server.fail.pop())
            return
        if self.path in server.pages:  # {path: (status, headers, body)}, and the connection closes
            status, headers, body = server.pages[self.path]
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)
            return
        if self.path not in server.bodies:
            self.send_error(404)
            return
        body, start = server.bodies[self.path], 0
        if 'Range' in self.headers and server.ranges:
            start = int(self.headers['Range'][6:-1])
            if start >= len(body):
                self.send_error(416)
                return
            self.send_response(206)
            start += server.shift
            self.send_header('Content-Range', f'bytes {start}-{len(body) - 1}/{len(body)}')
        else:
            self.send_response(200)
        self.send_header('Content-Length', str(len(body) - start))
        self.end_headers()
        end = start + server.breaks.pop(0) if server.breaks else len(body)  # then the connection closes
        self.wfile.write(body[start:end])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(module, 'WAIT', 0)
    server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    server.bodies, server.asked, server.breaks, server.fail, server.ranges, server.shift = {
        '/file': BODY}, [], [], [], True, 0
    server.pages = {}
    server.url = f'http://127.0.0.1:{server.server_port}'
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize('known', [{}, {'size': len(BODY), 'sha256': hashlib.sha256(BODY).hexdigest()}])
def test_whole_at_once(server, tmp_path, known):
    path = tmp_path / 'new' / 'file'
    download(server.url + '/moved', str(path), **known)  # a redirect on the way
    assert path.read_bytes() == BODY and os.listdir(path.parent) == ['file']
    asked = len(server.asked)
    download(server.url + '/file', str(path), **known)  # it is there: nothing is asked
    assert len(server.asked) == asked


def test_a_broken_connection_goes_on_where_it_stopped(server, tmp_path):
    server.breaks = [100_000, 300_000]
    download(server.url + '/file', str(tmp_path / 'file'))
    assert (tmp_path / 'file').read_bytes() == BODY
    assert [r for _, r in server.asked] == [None, 'bytes=100000-', 'bytes=400000-']


def test_a_later_run_goes_on_too(server, tmp_path):
    (tmp_path / 'file.part').write_bytes(BODY[:700_000])
    download(server.url + '/file', str(tmp_path / 'file'), size=len(BODY))
    assert (tmp_path / 'file').read_bytes() == BODY and server.asked == [('/file', 'bytes=700000-')]


def test_a_full_disk_is_one_line_and_the_download_goes_on_later(server, small_disk):
    path = small_disk.folder / 'file'
    small_disk.leave(300_000)
    with pytest.raises(UserError, match='file: could not be written .No space left on device.: make room'):
        download(server.url + '/file', str(path))
    kept = (small_disk.folder / 'file.part').stat().st_size
    small_disk.leave(None)
    download(server.url + '/file', str(path))
    assert path.read_bytes() == BODY and kept > 200_000 and server.asked[-1] == ('/file', f'bytes={kept}-')


def test_a_server_without_ranges_sends_it_all_again(server, tmp_path):
    server.ranges = False
    (tmp_path / 'file.part').write_bytes(b'x' * 700_000)
    download(server.url + '/file', str(tmp_path / 'file'))
    assert (tmp_path / 'file').read_bytes() == BODY


def test_a_server_that_sends_another_range_is_not_believed(server, tmp_path):
    server.shift = 10
    (tmp_path / 'file.part').write_bytes(BODY[:700_000])
    with pytest.raises(UserError, match='bytes where'):
        download(server.url + '/file', str(tmp_path / 'file'), size=len(BODY))
    assert not (tmp_path / 'file').exists()


def test_a_part_longer_than_the_file_is_thrown_away(server, tmp_path):
    (tmp_path / 'file.part').write_bytes(b'x' * (len(BODY) + 5))
    download(server.url + '/file', str(tmp_path / 'file'))
    assert (tmp_path / 'file').read_bytes() == BODY


def test_busy_servers_are_asked_again_but_not_for_ever(server, tmp_path):
    server.fail = [503, 429, 500]
    download(server.url + '/file', str(tmp_path / 'file'))
    assert (tmp_path / 'file').read_bytes() == BODY
    server.fail, server.asked = [503] * 100, []
    with pytest.raises(UserError, match='could not be downloaded .*Service Unavailable'):
        download(server.url + '/file', str(tmp_path / 'other'))
    assert len(server.asked) == module.TRIES and not (tmp_path / 'other').exists()


def test_many_breaks_are_borne_as_long_as_something_comes(server, tmp_path):
    server.breaks = [50_000] * 15
    download(server.url + '/file', str(tmp_path / 'file'))
    assert (tmp_path / 'file').read_bytes() == BODY


@pytest.mark.parametrize('known, message', [({'size': 5}, '1048576 bytes where 5 are expected'),
                                            ({'size': 2 ** 21}, '1048576 bytes where 2097152'),
                                            ({'sha256': '0' * 64}, 'another SHA-256')])
def test_a_changed_file_is_refused(server, tmp_path, known, message):
    with pytest.raises(UserError, match=message):
        download(server.url + '/file', str(tmp_path / 'file'), **known)
    assert os.listdir(tmp_path) == []


def test_a_file_of_another_size_in_place_is_named(server, tmp_path):
    (tmp_path / 'file').write_bytes(b'half')
    with pytest.raises(UserError, match='has 4 bytes where 1048576 are expected: delete it'):
        download(server.url + '/file', str(tmp_path / 'file'), size=len(BODY))


def test_nothing_there_and_no_network(server, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r'/missing: could not be downloaded \(HTTP 404\): '
                       r'get the file elsewhere and put it at .*file'):
        download(server.url + '/missing', str(tmp_path / 'file'))
    assert len(server.asked) == 1  # asking again would not help
    server.shutdown()
    server.server_close()
    with pytest.raises(UserError,
                       match='Connection refused.*run the same command again when the network is back'):
        download(server.url + '/file', str(tmp_path / 'file'))
    assert not (tmp_path / 'file').exists()


def test_two_processes_do_not_write_one_file(server, tmp_path):
    import fcntl
    with open(tmp_path / 'file.part', 'ab') as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UserError, match='another process is downloading it'):
            download(server.url + '/file', str(tmp_path / 'file'))


def test_a_named_corpus_comes_through_the_same_code(server, tmp_path, monkeypatch):
    """MINNOW_MIRROR asks another host for the same paths; sizes and hashes are checked as ever."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('MINNOW_MIRROR', server.url + '/')
    for name, (base, files) in list(CORPORA.items()):
        path = '/' + base.split('/', 3)[3]
        small = dict(list(files.items())[:2])
        server.bodies |= {path + file: f'{name} {file}\n'.encode() for file in small}
        monkeypatch.setitem(CORPORA, name, (base, {file: (len(f'{name} {file}\n'), None) for file in small}))
        found = download_corpus(name)
        assert found == [os.path.join('data', 'downloads', name, file) for file in small]
        assert [open(p).read() for p in found] == [f'{name} {file}\n' for file in small]


def test_revisions_are_pinned():
    for name, (base, files) in CORPORA.items():
        assert (base.startswith('https://') and base.endswith('/')
                and any(len(part) == 40 for part in base.split('/'))), name
        assert all(size is None or size > 0 for size, _ in files.values())
    assert CORPORA['shakespeare'][1]['input.txt'][0] == 1115394


# --- servers that give something else ---

PAGE = b'<!DOCTYPE html><html><body>Please log in</body></html>'
TENSORS = json.dumps({'a': {'dtype': 'F32', 'shape': [4], 'data_offsets': [0, 16]}}).encode()
TENSORS = len(TENSORS).to_bytes(8, 'little') + TENSORS + bytes(16)
WHOLE = {'model.safetensors': TENSORS, 'config.json': b'{"a": [1, 2, 3]}',
         'a.parquet': b'PAR1' + bytes(40) + b'PAR1', 'text.jsonl.gz': gzip.compress(b'{"text": "one"}' * 99)}


@pytest.mark.parametrize('name', [*WHOLE, 'text.txt'])
@pytest.mark.parametrize('kind', ['text/html; charset=utf-8', 'application/octet-stream', None])
@pytest.mark.parametrize('has_part', [False, True])
def test_a_login_page_never_becomes_the_file(server, tmp_path, name, kind, has_part):
    server.pages['/' + name] = 200, {'Content-Type': kind} if kind else {}, PAGE
    if has_part:
        (tmp_path / f'{name}.part').write_bytes(b'begun')
    with pytest.raises(UserError, match='gave text/html from 127|gave a web page'):
        download(f'{server.url}/{name}', str(tmp_path / name))
    assert os.listdir(tmp_path) in ([], [f'{name}.part']) and not (tmp_path / name).exists()
    del server.pages['/' + name]
    server.bodies['/' + name] = b'begun' + BODY if name not in WHOLE else WHOLE[name]
    (tmp_path / f'{name}.part').unlink(missing_ok=True)
    download(f'{server.url}/{name}', str(tmp_path / name))  # the same command, where the network is right
    assert (tmp_path / name).read_bytes() == server.bodies['/' + name]


@pytest.mark.parametrize('name', WHOLE)
@pytest.mark.parametrize('left', [0, 3, 0.5, -1])
def test_a_body_cut_short_is_seen_without_size_and_hash(server, tmp_path, name, left):
    """An old server that closes the connection at the end, without a Content-Length."""
    body = WHOLE[name]
    cut = body[:int(left * len(body)) if isinstance(left, float) else left]
    server.pages['/' + name] = 200, {}, cut
    with pytest.raises(UserError, match='gave (an empty file|no whole )'):
        download(f'{server.url}/{name}', str(tmp_path / name))
    assert os.listdir(tmp_path) == []
    server.pages['/' + name] = 200, {}, body
    download(f'{server.url}/{name}', str(tmp_path / name))
    assert (tmp_path / name).read_bytes() == body


@pytest.mark.parametrize('found', [BODY, BODY[:-1] + b'x'])
def test_the_hash_that_the_hub_gives_is_compared(server, tmp_path, found):
    digest = hashlib.sha256(BODY).hexdigest()
    server.pages['/resolve'] = 302, {'Location': '/cdn', 'X-Linked-Etag': f'"{digest}"'}, b''
    server.bodies['/cdn'] = found
    if found == BODY:
        download(server.url + '/resolve', str(tmp_path / 'file'))
        assert (tmp_path / 'file').read_bytes() == BODY
    else:
        with pytest.raises(UserError, match='another SHA-256'):
            download(server.url + '/resolve', str(tmp_path / 'file'))
        assert os.listdir(tmp_path) == []


@pytest.mark.parametrize('status', [401, 403, 404, 410, 451])
def test_an_error_page_is_no_file(server, tmp_path, status):
    server.pages['/file'] = status, {'Content-Type': 'application/octet-stream'}, BODY
    with pytest.raises(UserError, match=f'HTTP {status}'):
        download(server.url + '/file', str(tmp_path / 'file'))
    assert not (tmp_path / 'file').exists()


def test_a_body_without_end_is_cut_off(server, tmp_path):
    server.pages['/file'] = 200, {}, BODY * 8
    with pytest.raises(UserError, match='bytes where 1048576 are expected'):
        download(server.url + '/file', str(tmp_path / 'file'), size=len(BODY))
    assert os.listdir(tmp_path) == []


def test_a_page_that_an_earlier_version_kept_is_downloaded_again(server, tmp_path):
    (tmp_path / 'config.json').write_bytes(PAGE)
    server.bodies['/config.json'] = WHOLE['config.json']
    download(server.url + '/config.json', str(tmp_path / 'config.json'))
    assert (tmp_path / 'config.json').read_bytes() == WHOLE['config.json']


def test_no_redirect_leaves_https():
    request = urllib.request.Request('https://a/x')
    with pytest.raises(urllib.error.HTTPError):
        module.Redirects().redirect_request(request, None, 302, 'Found', Message(), 'http://b/x')
