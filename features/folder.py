"""
A new folder that is there complete or not at all, for commands that write a run, an adapter or a data set.
"""
import os
import shutil
import tempfile
from contextlib import contextmanager, suppress

from checkpoint import make_folders, sync, writing
from configurator import UserError
from features.run_folders import place_of


@contextmanager
def new_folder(path, setting='to'):
    """
    Make a folder that gets the name `path` once it is complete. Raises UserError, which names the setting, if
    `path` exists or cannot be written. Then nothing is left, not even where a folder above it was renamed.
    """
    if os.path.exists(path) and not (os.path.isdir(path) and not os.listdir(path)):
        raise UserError(f'{setting}={path}: already exists: give a new folder')
    parent, name = os.path.split(os.path.abspath(path))
    with writing(f'{setting}={path}', 'give another folder, or make room'):
        made = make_folders(parent)
        try:
            with temporary_folder(parent, name[:50] + '.tmp') as temporary:
                folder = os.path.join(temporary, 'folder')
                os.mkdir(folder)
                yield folder
                for each in (*os.listdir(folder), '.'):
                    sync(os.path.join(folder, each))
                os.rename(folder, path)
                sync(parent)
        except BaseException:
            for each in made:
                with suppress(OSError):  # it is not empty
                    os.rmdir(each)
            raise


@contextmanager
def temporary_folder(parent, prefix):
    """A folder in `parent` that is removed in the end, wherever it is then."""
    path = tempfile.mkdtemp(dir=parent, prefix=prefix)
    fd = os.open(path, os.O_RDONLY)
    try:
        yield path
    finally:
        shutil.rmtree(place_of(fd) or path, ignore_errors=True)
        os.close(fd)
