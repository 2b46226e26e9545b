"""
A new folder that is there complete or not at all, for commands that write a run, an adapter or a data set.
"""
import os
import tempfile
from contextlib import contextmanager

from checkpoint import sync, writing
from configurator import UserError


@contextmanager
def new_folder(path, setting='to'):
    """
    Make a folder that gets the name `path` once it is complete. Raises UserError, which names the setting, if
    `path` exists or cannot be written.
    """
    if os.path.exists(path) and not (os.path.isdir(path) and not os.listdir(path)):
        raise UserError(f'{setting}={path}: already exists: give a new folder')
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
