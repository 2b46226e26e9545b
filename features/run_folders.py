"""
The folders of runs, where checkpoint.py does the usual things alone: which run was trained last.
"""
import glob
import os
import sys
from contextlib import suppress

import checkpoint
from configurator import UserError

DEPTH = 4  # of a run under out/: out/sweeps/NAME/RUN has three


def last_run(top='out'):
    """The run in or under `top` with the newest checkpoint; says which. Raises UserError if there is none."""
    times = {}
    for depth in range(DEPTH):
        for folder in glob.glob(os.path.join(glob.escape(top), *['*'] * depth)):
            with suppress(OSError, UserError):  # of others, or removed in between
                found = checkpoint.checkpoints(folder)
                if found:
                    times[folder] = os.stat(found[0]).st_mtime
    if not times:
        raise UserError(f'out_dir: none is given, and there is no run in {top}: give --out_dir=DIR')
    newest = max(times, key=times.get)
    print(f'out_dir={newest}: the last run trained; --out_dir=DIR takes another', file=sys.stderr, flush=True)
    return newest
