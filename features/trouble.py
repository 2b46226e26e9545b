"""
What batches.py needs only when a file of a data set cannot be read, or is not the one of the start.
"""
import errno
import os

from batches import DataError

ADVICE = {
    errno.EMFILE: 'raise the limit of open files (ulimit -n 4096)',
    errno.ENFILE: 'too many files are open on this machine: end other programs',
    errno.ENOMEM: 'free some memory, then run the same command',
    errno.EACCES: 'make it readable',
    errno.EIO: 'the disk failed: copy the data set to another one, then run the same command',
    errno.ESTALE: 'it was replaced on the file server: mount it again, then run the same command',
}


def advice(error, file):
    """The line for an error of the system, as an OSError or a UserError, about a batches.DataFile."""
    text = str(error)
    if isinstance(error, OSError):
        text = f'{file.path}: {error.strerror}'
    for code, to_do in ADVICE.items():
        if os.strerror(code) in text:
            return f'{text}: {to_do}'
    return f'{text}: {to_do_for(file)}'


def to_do_for(file):
    if file.identity:  # it was there at the start
        return 'put the data set back as it was, then run the same command'
    return 'prepare the data set again'


def check_again(file, f):
    """
    Raise DataError unless the open file `f` has the size of the DataFile `file` and, if that was opened
    before, its contents: it may be the same file, copied once more.
    """
    found = os.fstat(f.fileno()).st_size
    if found != file.size:
        now = ' now' if file.identity else ''
        raise DataError(f'{file.path}: has {found} bytes{now} where {file.size} are expected: '
                        f'{to_do_for(file)}')
    if not file.identity:
        return
    if not file.sha256 or file.hash(f) != file.sha256:
        raise DataError(f'{file.path}: was changed during the run: {to_do_for(file)}')
