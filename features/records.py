"""
The log.jsonl of a run, which somebody else may have written.
"""
import json
import os
from contextlib import suppress
from functools import partial

from checkpoint import open_regular
from configurator import UserError

MOST = 2 ** 30  # bytes: a million records have 200 MB
LONGEST = 2 ** 20  # bytes of a line


def read(path):
    """The records of a log.jsonl, without truncated or damaged lines. Raises UserError for no such file."""
    with open_regular(path) as f:
        if os.fstat(f.fileno()).st_size > MOST:
            raise UserError(f'{path}: has more than {MOST:,} bytes: move it away')
        found = []
        for line in iter(partial(f.readline, LONGEST), b''):
            with suppress(ValueError, RecursionError):
                record = json.loads(line)
                if is_record(record):
                    found.append(record)
        return found


def is_record(value):
    if type(value) is not dict or type(value.get('step')) is not int:
        return False
    return all(type(value[name]) in (int, float) or name == 'expert_load' for name in value)
