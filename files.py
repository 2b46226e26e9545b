"""
Files that are there whole or not at all, are on the disk once that is said of them, and belong to one process at a time.
"""
import hashlib
import json
import os
import re
import tempfile
from contextlib import contextmanager, suppress

from configurator import UserError

# -----------------------------------------------------------------------------
# Write. Every function here raises OSError where the system refuses: a full disk, a quota, a limit, a broken disk

@contextmanager
def writing(what, to_do):
    """Turn the OSError of whatever is written inside into a UserError: `what` could not be written, and what to do."""
    try:
        yield
    except BrokenPipeError:  # no file: run_main() knows what to do
        raise
    except OSError as error:
        reason = error.strerror or error
        if isinstance(error.filename, str):
            reason = f'{error.filename}: {reason}'
        raise UserError(f'{what}: could not be written ({reason}): {to_do}') from None


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


def write_tensors(path, tensors, metadata=None):
    """Write {name: tensor} as safetensors."""
    import safetensors.torch  # here, as below: the processes of prepare.py do without torch, which takes seconds to import
    try:
        safetensors.torch.save_file(tensors, path, metadata)
    except safetensors.SafetensorError as error:  # it has the number of the system's error in its text alone
        found = re.search(r'\(os error (\d+)\)', str(error))
        if not found:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1]))) from None


def write_torch(path, value):
    """torch.save() to a file."""
    import torch
    with open(path, 'wb') as f:
        watched = Watched(f)
        try:
            torch.save(value, watched)
        except RuntimeError:  # "unexpected pos": torch does not say what went wrong
            if watched.error is None:
                raise
            raise watched.error from None


class Watched:
    """An open file that remembers the OSError which its last write ended with."""

    def __init__(self, file):
        self.file, self.error, self.flush = file, None, file.flush

    def write(self, data):
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise


@contextmanager
def replacing(path, mode='w', suffix='.tmp'):
    """
    An opened file ('w': text, 'wb': bytes) that takes the place of `path` once it is whole and on the disk. If anything
    goes wrong before that, the old file stays and nothing else does. suffix: of its name until then.
    """
    encoding, newline = (None, None) if 'b' in mode else ('utf-8', '')
    if os.path.exists(path) and not os.path.isfile(path):  # /dev/stdout: nothing can take its place
        with open(path, mode, encoding=encoding, newline=newline) as f:
            yield f
        return
    path = os.path.realpath(path)  # a link stays a link
    temporary = path + suffix
    try:
        with open(temporary, mode, encoding=encoding, newline=newline) as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise


def replace_text(path, text):
    with replacing(path) as f:
        f.write(text)


def replace_json(path, value):
    replace_text(path, json.dumps(value, indent=1))


def write_all(f, data):
    """Write all bytes to an unbuffered file: the system may take a part of them at a time."""
    data = memoryview(data)
    while data:
        data = data[f.write(data):]


def append(path, text):
    """Add text to the end of a file: all of it, or nothing."""
    with open(path, 'ab', buffering=0) as f:
        size = f.tell()
        try:
            write_all(f, text.encode())
        except OSError:
            with suppress(OSError):
                f.truncate(size)
            raise


def sha256(path):
    with open(path, 'rb') as f:
        return hashlib.file_digest(f, 'sha256').hexdigest()


# -----------------------------------------------------------------------------
# Folders

@contextmanager
def new_folder(path, setting='to'):
    """
    A folder to write into, which takes the name `path` once it is whole. Raises UserError, which calls it by its setting, where
    there is something already or it cannot be written.
    """
    if os.path.exists(path) and not (os.path.isdir(path) and not os.listdir(path)):
        raise UserError(f'{setting}={path}: is there already: give a new folder')
    parent = os.path.dirname(os.path.abspath(path))
    with writing(f'{setting}={path}', 'give another folder, or make room'):
        os.makedirs(parent, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=parent) as temporary:
            folder = os.path.join(temporary, 'folder')
            os.mkdir(folder)
            yield folder
            for name in (*os.listdir(folder), '.'):
                sync(os.path.join(folder, name))
            os.rename(folder, path)
            sync(parent)


# -----------------------------------------------------------------------------
# Belong to one process

def lock(path):
    """
    Whether a folder, or a file that is made for it, is this process's alone now: a descriptor to close in the end, or None if another process has it. It is let
    go when a process ends, whatever ends it. Where a file system knows no locks (NFS none of folders), anybody has it.
    """
    import fcntl  # here: on Windows, which has none, configurator.py has to speak first
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
