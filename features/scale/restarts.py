"""
torchrun starts the processes of a run again after an error. If the folder of the run was renamed or removed
by then, they must not begin a new run at the old place.
"""
import json
import os
import shlex
from contextlib import suppress

from checkpoint import replace_json
from configurator import UserError


def note():
    """A file in torchrun's own folder, the same for all its attempts; '' without torchrun."""
    folder, _, found = os.environ.get('TORCHELASTIC_ERROR_FILE', '').partition('/attempt_')
    return os.path.join(folder, 'out_dir.json') if found else ''


def remember(out_dir):
    """Write down in which folder the run is, for the processes after these."""
    if note():
        with suppress(OSError):
            replace_json(note(), {'inode': os.stat(out_dir).st_ino})


def check(out_dir, ranks):
    """Raise UserError on all ranks if these processes are not the first and the run's folder has gone."""
    if os.environ.get('TORCHELASTIC_RESTART_COUNT', '0') == '0':
        return
    inode = None
    with suppress(OSError, ValueError, TypeError, KeyError), open(note(), encoding='utf-8') as f:
        inode = json.load(f)['inode']
    noted = [value for value in ranks.gather(inode) if value is not None]  # rank 0 may be elsewhere now
    if noted:
        ranks.from_first(lambda: check_is_there(out_dir, noted[0]))


def check_is_there(out_dir, inode):
    """Raise UserError if out_dir is not the folder with this inode."""
    with suppress(OSError):
        if os.stat(out_dir).st_ino == inode:
            return
    to_do = 'start it again by hand'
    parent = os.path.dirname(os.path.realpath(out_dir))
    with suppress(OSError), os.scandir(parent) as entries:
        for entry in entries:
            if entry.inode() == inode and entry.is_dir(follow_symlinks=False):
                to_do = f'go on with {shlex.quote(f"--out_dir={entry.path}")}'
    raise UserError(f'out_dir={out_dir}: was renamed or removed while this run trained in it, '
                    f'so that no new run begins there: {to_do}')
