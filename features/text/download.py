"""
Files and named corpora from the network. A file has its name only when it is complete and checked.

    download('https://…/TinyStories-train.txt', 'data/downloads/TinyStories-train.txt', size=1924281556)
    download_corpus('tinystories')    # all files of a named corpus; returns their paths

PATH.part keeps what has arrived, so that a broken download is resumed where it stopped, in this run or the
next. A login page, a body of another size or hash, and a file that is not of its format never become PATH.
"""
import gzip
import http.client
import json
import os
import re
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
import zlib
from hashlib import file_digest

from tqdm import tqdm

from checkpoint import writing
from configurator import UserError
from features.text.tokenfiles import write_all

TRIES = 5  # attempts without a new byte: about 15 s, with the waits between them
WAIT = 1.0  # seconds before the second try, doubled each time
TIMEOUT = 60  # seconds without a byte
HEADER = 100_000_000  # bytes of a safetensors header, at most
# faults that may pass
PASSING = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError)

# name: (folder at a pinned revision, {file: (bytes, sha256)}); None = not known
HUB = 'https://huggingface.co/datasets/'
CORPORA = {
    'shakespeare': (
        'https://raw.githubusercontent.com/karpathy/char-rnn/6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e/data/'
        'tinyshakespeare/',
        {'input.txt': (1115394, '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed')}),
    'tinystories': (
        HUB + 'roneneldan/TinyStories/resolve/f54c09fd23315a6f9c86f9dc80f725de7d8f9c64/',
        {'TinyStories-train.txt': (
            1924281556, 'c5cf5e22ff13614e830afbe61a99fbcbe8bcb7dd72252b989fa1117a368d401f')}),
    'openwebtext': (  # 24 GB, 8,013,769 documents
                    HUB
                    + 'Skylion007/openwebtext/resolve/79d93d786212f7344586290adb811d4ae6a1762c/plain_text/',
                    {f'train-{i:05d}-of-00080.parquet': (None, None) for i in range(80)}),
    'fineweb_edu':
    (  # 29 GB, 9,672,101 documents, 10 billion tokens
     HUB + 'HuggingFaceFW/fineweb-edu/resolve/87f09149ef4734204d70ed1d046ddc9ca3f2b8f9/sample/10BT/',
     {f'{i:03d}_00000.parquet': (size, None) for i, size in enumerate((
         2152819114, 2152222432, 2151796315, 2152437524, 2152338550, 2152189947, 2152689867,
         2150686637, 2151274846, 2151913277, 2152798864, 2152323681, 2152069689, 540632672))}),
    'pubmed': (
        HUB
        + 'casinca/PUBMED_title_abstracts_2019_baseline/resolve/3c1200427f2fdb4d16809a876a391dff65dacb66/',
        {'PUBMED_title_abstracts_2019_baseline.jsonl.zst': (
            6858474994, 'b628b942d1e891b6e8ffdb6d10918108db3d6b2ebd25808de6757251ec9ba67b')}),
}


def download_corpus(name):
    """
    The paths of the files of a named corpus; missing files are downloaded. The environment variable
    MINNOW_MIRROR=http://… sets another host.
    """
    base, files = CORPORA[name]
    if mirror := os.environ.get('MINNOW_MIRROR'):
        base = mirror.rstrip('/') + urllib.parse.urlsplit(base).path
    for file, (size, sha256) in files.items():
        download(base + file, os.path.join('data', 'downloads', name, file), size, sha256)
    return [os.path.join('data', 'downloads', name, file) for file in files]


def download(url, path, size=None, sha256=None):
    """
    Download the file at `url` to `path`, unless it exists. size, sha256: of the file, if known. Raises
    UserError that says what to do; the next attempt continues where this one stopped.
    """
    if os.path.exists(path):
        if size is not None and os.path.getsize(path) != size:
            raise UserError(f'{path}: has {os.path.getsize(path)} bytes where {size} are expected: '
                            'delete it to have it downloaded again')
        if not wrong_format(path, os.path.basename(path), size or sha256):
            return
        os.unlink(path)  # a login page, perhaps, which earlier versions kept
    with writing(path, 'make room; the same command continues from there'):
        os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
        # unbuffered: nothing is left to write when the disk is full
        with open(path + '.part', 'ab', buffering=0) as f:
            complete(url, f, path, size, sha256)


def complete(url, f, path, size, sha256):
    """Finish the download into PATH.part, which is open as `f`, check it and rename it."""
    import fcntl  # here: Windows has none, and configurator.py says so first
    tries, is_known = 0, size is not None or sha256 is not None
    try:
        fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f'{path}: another process is downloading it: wait for that one') from None
    while True:
        before = f.tell()
        try:
            size, linked = fetch(url, f, size, os.path.basename(path))
            break
        except PASSING as error:
            code = getattr(error, 'code', None)
            # the server is not just busy: another try would not help
            if code and code < 500 and code not in (408, 429):
                raise UserError(f'{url}: could not be downloaded (HTTP {code}): '
                                f'get the file elsewhere and put it at {path}') from None
            tries = tries + 1 if f.tell() <= before else 1
            if tries == TRIES:
                raise UserError(f'{url}: could not be downloaded ({getattr(error, "reason", error)}): '
                                'run the same command again when the network is back, '
                                f'or put the file at {path} yourself') from None
            time.sleep(WAIT * 2 ** (tries - 1))
    os.fsync(f.fileno())
    fault = fault_of(f.name, size, sha256 or linked) or wrong_format(f.name, os.path.basename(path), is_known)
    if fault:
        os.unlink(f.name)
        raise UserError(f'{url}: gave {fault}: it was changed there, or damaged on its way: '
                        f'run the same command again, or put the file at {path} yourself')
    os.replace(f.name, path)


def fault_of(path, size, sha256):
    """How a file differs from this size and hash (None = not known); '' if it does not."""
    found = os.path.getsize(path)
    if not found:
        return 'an empty file'
    if size is not None and found != size:
        return f'{found} bytes where {size} are expected'
    if sha256 is not None:
        with open(path, 'rb') as f:
            if file_digest(f, 'sha256').hexdigest() != sha256:
                return 'contents with another SHA-256 than expected'
    return ''


def wrong_format(path, name, is_known=False):
    """
    Why the file at `path` is none of the format that its name ends with; '' if it is, or is of another.
    is_known: its size or hash is known and was compared; a web page is found out anyway.
    """
    size = os.path.getsize(path)
    with open(path, 'rb') as f:
        start = f.read(512)
        if re.match(rb'(\xef\xbb\xbf)?\s*(<!doctype\s+html|<html)', start, re.IGNORECASE):
            return 'a web page (to log in?)'
        if is_known:
            return ''
        if name.endswith('.parquet'):
            f.seek(max(0, size - 4))
            return '' if start[:4] == f.read(4) == b'PAR1' and size >= 12 else 'no whole parquet file'
        try:
            if name.endswith('.safetensors'):
                length = int.from_bytes(start[:8], 'little')
                f.seek(8)
                header = json.loads(f.read(min(length, HEADER)))
                ends = [item['data_offsets'][1] for key, item in header.items() if key != '__metadata__']
                if 8 + length + max(ends, default=0) != size:
                    return 'no whole safetensors file'
            elif name.endswith('.json'):
                json.loads(start + f.read())
            elif name.endswith('.gz'):
                f.seek(0)
                with gzip.open(f) as unpacked:
                    while unpacked.read(2 ** 20):
                        pass
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError, OverflowError,
                MemoryError, EOFError, gzip.BadGzipFile, zlib.error):
            return f'no whole {name.rpartition(".")[2]} file'
    return ''


class Redirects(urllib.request.HTTPRedirectHandler):
    """
    Follows redirects, except from https to another scheme. linked: the SHA-256 that the Hub gives for a large
    file before it leads to it, else None.
    """
    linked = None

    def redirect_request(self, request, response, code, message, headers, url):
        if request.full_url.startswith('https:') and not url.startswith('https:'):
            raise urllib.error.HTTPError(url, 400, 'leads from https elsewhere', headers, response)
        found = re.fullmatch(r'"([0-9a-f]{64})"', headers.get('X-Linked-Etag', ''))
        if found:
            self.linked = found[1]
        return super().redirect_request(request, response, code, message, headers, url)


def fetch(url, f, size, name):
    """
    Append the rest of the file at `url` to the open file `f`. Returns (the size of the whole file, its
    SHA-256 if the Hub gives one), None where not known. Raises UserError for a web page.
    """
    have = f.tell()
    if have == size:
        return size, None
    headers = {'User-Agent': 'minnow'}
    if have:
        headers['Range'] = f'bytes={have}-'
    redirects = Redirects()
    opener = urllib.request.build_opener(redirects)
    try:
        response = opener.open(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:  # the file is shorter than what is here
            empty(f)
            raise ConnectionError('what was downloaded before is of another file; starting over') from None
        raise
    with response:
        kind = response.headers.get_content_type()
        if kind in ('text/html', 'application/xhtml+xml') or response.headers.get('Content-Encoding'):
            if not have:
                os.unlink(f.name)
            raise UserError(f'{url}: gave {kind} from {urllib.parse.urlsplit(response.url).netloc}, not the '
                            'file: a network that wants a login, perhaps: run the same command again in '
                            'another, or put the file in its place yourself')
        content_range = response.headers.get('Content-Range', '')
        if response.status == 206 and content_range.startswith(f'bytes {have}-'):
            total = content_range.rpartition('/')[2]
        else:  # the server sends the whole file
            have, total = 0, response.headers.get('Content-Length') or ''
            empty(f)
        total = int(total) if total.isdecimal() else None
        with tqdm(desc=name, initial=have, total=total or size, unit='B', unit_scale=True,
                  disable=None) as bar:
            while block := response.read(2 ** 20):
                write_all(f, block)
                bar.update(len(block))
                if size is not None and f.tell() > size:
                    break  # it may never end
    if total is not None and f.tell() < min(total, size or total):
        raise ConnectionError(f'the connection broke after {f.tell()} of {total} bytes')
    return (total if size is None else size), redirects.linked


def empty(f):
    f.seek(0)
    f.truncate()
