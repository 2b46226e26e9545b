"""
Files and named corpora from the network: streamed, resumed, checked, and never half there under their own name.

    download('https://…/TinyStories-train.txt', 'data/downloads/tinystories/TinyStories-train.txt', size=1924281556)
    download_corpus('tinystories')    # the same, and returns the paths

What has arrived is kept in PATH.part, so a broken download goes on where it stopped, in this run or the next.
"""
import http.client
import os
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from hashlib import file_digest

from tqdm import tqdm

from checkpoint import write_all, writing
from configurator import UserError

TRIES = 5  # in a row without a new byte, some 15 s in all with the waits between them
WAIT = 1.0  # seconds before the second try, doubled each time
TIMEOUT = 60  # seconds without a byte
PASSING = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError)  # faults worth another try

HUB = 'https://huggingface.co/datasets/'
CORPORA = {  # name: (folder at a pinned revision, {file: (size, sha256)}), None for what is not known
    'shakespeare': ('https://raw.githubusercontent.com/karpathy/char-rnn/6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e/data/tinyshakespeare/', {
        'input.txt': (1115394, '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed')}),
    'tinystories': (HUB + 'roneneldan/TinyStories/resolve/f54c09fd23315a6f9c86f9dc80f725de7d8f9c64/', {
        'TinyStories-train.txt': (1924281556, 'c5cf5e22ff13614e830afbe61a99fbcbe8bcb7dd72252b989fa1117a368d401f')}),
    'openwebtext': (HUB + 'Skylion007/openwebtext/resolve/79d93d786212f7344586290adb811d4ae6a1762c/plain_text/', {
        f'train-{i:05d}-of-00080.parquet': (None, None) for i in range(80)}),  # 24 GB, 8,013,769 documents
    'fineweb_edu': (HUB + 'HuggingFaceFW/fineweb-edu/resolve/87f09149ef4734204d70ed1d046ddc9ca3f2b8f9/sample/10BT/', {
        f'{i:03d}_00000.parquet': (size, None) for i, size in enumerate((  # 29 GB, 9,672,101 documents, 10 billion tokens
            2152819114, 2152222432, 2151796315, 2152437524, 2152338550, 2152189947, 2152689867,
            2150686637, 2151274846, 2151913277, 2152798864, 2152323681, 2152069689, 540632672))}),
    'pubmed': (HUB + 'casinca/PUBMED_title_abstracts_2019_baseline/resolve/3c1200427f2fdb4d16809a876a391dff65dacb66/', {
        'PUBMED_title_abstracts_2019_baseline.jsonl.zst': (6858474994, 'b628b942d1e891b6e8ffdb6d10918108db3d6b2ebd25808de6757251ec9ba67b')}),
}


def download_corpus(name):
    """The paths of a named corpus's files, downloaded if they are not there. MINNOW_MIRROR=http://… names another host to ask."""
    base, files = CORPORA[name]
    if mirror := os.environ.get('MINNOW_MIRROR'):
        base = mirror.rstrip('/') + urllib.parse.urlsplit(base).path
    for file, (size, sha256) in files.items():
        download(base + file, os.path.join('data', 'downloads', name, file), size, sha256)
    return [os.path.join('data', 'downloads', name, file) for file in files]


def download(url, path, size=None, sha256=None):
    """
    Make `path` hold the file at `url`, unless it exists. size, sha256: what it must have, where known.
    Raises UserError that says what to do; what has arrived by then serves the next attempt.
    """
    if os.path.exists(path):
        if size is not None and os.path.getsize(path) != size:
            raise UserError(f'{path}: has {os.path.getsize(path)} bytes where {size} are expected: delete it to have it downloaded again')
        return
    with writing(path, 'make room; the same command goes on from there'):
        os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
        with open(path + '.part', 'ab', buffering=0) as f:  # unbuffered: nothing is left to write when the disk is full
            complete(url, f, path, size, sha256)


def complete(url, f, path, size, sha256):
    """download() into PATH.part, which is opened as f."""
    import fcntl  # here: on Windows, which has none, configurator.py has to speak first
    part, tries = f.name, 0
    try:
        fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f'{path}: another process is downloading it: wait for that one') from None
    while True:
        before = f.tell()
        try:
            size = fetch(url, f, size, os.path.basename(path))
            break
        except PASSING as error:
            code = getattr(error, 'code', None)
            if code and code < 500 and code not in (408, 429):  # not a busy server: asking again will not help
                raise UserError(f'{url}: could not be downloaded (HTTP {code}): get the file elsewhere and put it at {path}') from None
            tries = tries + 1 if f.tell() <= before else 1
            if tries == TRIES:
                raise UserError(f'{url}: could not be downloaded ({getattr(error, "reason", error)}): run the same command again when the network '
                                f'is back, or put the file at {path} yourself') from None
            time.sleep(WAIT * 2 ** (tries - 1))
    os.fsync(f.fileno())
    wrong = None
    if size is not None and f.tell() != size:
        wrong = f'{f.tell()} bytes where {size} are expected'
    elif sha256 is not None:
        with open(part, 'rb') as whole:
            if file_digest(whole, 'sha256').hexdigest() != sha256:
                wrong = 'contents with another SHA-256 than expected'
    if wrong:
        os.unlink(part)
        raise UserError(f'{url}: gave {wrong}: it was changed there, or damaged on its way: run the same command again, or put the file at {path} yourself')
    os.replace(part, path)


def fetch(url, f, size, name):
    """Append to the open file `f` what it lacks of the file at `url`; returns the whole size, None if that is not known."""
    have = f.tell()
    if have == size:
        return size
    headers = {'User-Agent': 'minnow'} | ({'Range': f'bytes={have}-'} if have else {})
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:  # nothing from there on: what is here is no beginning of that file
            empty(f)
            raise ConnectionError('what was downloaded before is of another file; starting over') from None
        raise
    with response:
        content_range = response.headers.get('Content-Range', '')
        if response.status == 206 and content_range.startswith(f'bytes {have}-'):
            total = content_range.rpartition('/')[2]
        else:  # the server sends the whole file, whatever it was asked for
            have, total = 0, response.headers.get('Content-Length') or ''
            empty(f)
        total = int(total) if total.isdecimal() else None
        with tqdm(desc=name, initial=have, total=total or size, unit='B', unit_scale=True, disable=None) as bar:
            while block := response.read(2 ** 20):
                write_all(f, block)
                bar.update(len(block))
    if total is not None and f.tell() < total:
        raise ConnectionError(f'the connection broke after {f.tell()} of {total} bytes')
    return total if size is None else size


def empty(f):
    f.seek(0)
    f.truncate()
