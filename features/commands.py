"""
Scripts with commands, each with settings of its own: surgery.py, hub.py, analyze.py and eval.py.
"""
import sys

import configurator
from configurator import UserError


def configure_command(commands, argv=None):
    """
    (function, its settings) of the command that the first argument names, as in `surgery.py grow --from=DIR`.
    commands: {name: (function, its dataclass)}. Raises UserError as configure() does.
    """
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in commands:
        function, cls = commands[argv[0]]
        s = configurator.configure(cls, argv[1:])
        if getattr(s, 'out_dir', None) == '':
            from features.run_folders import last_run
            s.out_dir = last_run()
        return function, s
    raise no_command(argv, commands)


def no_command(argv, commands):
    """The UserError for a first argument that names no command."""
    return UserError(f'{argv[0] if argv else "no command given"}: {takes(commands)}')


def takes(commands):
    return f'takes {" or ".join(commands)}, then its settings; --help after it lists them'
