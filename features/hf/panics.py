"""
Calls of the tokenizers library, which is written in Rust: what goes wrong inside of it is one line of ours.
"""
import functools
import os
from contextlib import contextmanager

from configurator import UserError


def call(where, function, *args, **options):
    """
    function(…) of the tokenizers library. Raises UserError, which begins with `where`, for whatever goes
    wrong in it: it raises nothing narrower than Exception, and a panic of Rust is not even one.
    """
    try:
        with without_stderr():
            return function(*args, **options)
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != 'PanicException':  # Ctrl-C
            raise
        raise UserError(f'{where}: {" ".join(str(error).split())[:300]}') from None


@contextmanager
def without_stderr():
    """Inside, what is written to file descriptor 2 is dropped: Rust writes every panic there."""
    try:
        kept = os.dup(2)
    except OSError:  # it is closed
        yield
        return
    os.dup2(null(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


@functools.cache
def null():
    return os.open(os.devnull, os.O_WRONLY)
