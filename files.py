"""
Files that are there whole or not at all, are on the disk once that is said of them, and belong to one process at a time.
"""
import fcntl
import hashlib
import json
import os
import tempfile
from contextlib import contextmanager

from safetensors import SafetensorError

from configurator import UserError


def sync(path):
    """Flush a file or a folder to the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_json(path, value):
    with open(path, 'w', encoding='utf-8') as f:
        json.dump(value, f, indent=1)


def replace_json(path, value):
    """Write a file whole or not at all: whatever happens, the old or the new one is there."""
    write_json(path + '.tmp', value)
    sync(path + '.tmp')
    os.replace(path + '.tmp', path)


def sha256(path):
    with open(path, 'rb') as f:
        return hashlib.file_digest(f, 'sha256').hexdigest()


@contextmanager
def new_folder(path):
    """A folder to write into, which has the name `path` once it is whole. Raises UserError, which calls it by the setting `to`."""
    if os.path.exists(path):
        raise UserError(f'to={path}: is there already: give a new folder')
    parent = os.path.dirname(os.path.abspath(path))
    try:
        os.makedirs(parent, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=parent) as temporary:
            folder = os.path.join(temporary, 'folder')
            os.mkdir(folder)
            yield folder
            for name in (*os.listdir(folder), '.'):
                sync(os.path.join(folder, name))
            os.rename(folder, path)
            sync(parent)
    except (OSError, SafetensorError) as error:
        raise UserError(f'to={path}: {getattr(error, "strerror", None) or error}: give another folder, or make room') from None


def lock(path):
    """
    Whether a folder, or a file that is made for it, is this process's alone now: a descriptor to close in the end, or None if another process has it. It is let
    go when a process ends, whatever ends it. Where a file system knows no locks (NFS none of folders), anybody has it.
    """
    while True:
        fd = os.open(path, os.O_RDONLY if os.path.isdir(path) else os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return None
        except OSError:
            return fd
        if is_at(fd, path):
            return fd
        os.close(fd)  # another process let it go and removed it in between


def is_at(fd, path):
    """Whether an opened file is the one of this name."""
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except OSError:
        return False
