"""
sample.py --interactive and --chat: text that is typed on the terminal.
"""
import sys

import sample
from configurator import UserError, typed_text, visible


def typed_lines(setting):
    """The lines that are typed on the terminal, as they come. Raises UserError if it is closed."""
    if sys.stdin is None:  # Python has none where it was closed from the start
        raise UserError(f'{setting}=True: its input is closed')
    # only a newline ends a line; typed_text() refuses what invalid UTF-8 becomes
    sys.stdin.reconfigure(newline='\n', errors='surrogateescape')
    for line in sys.stdin:
        size = len(line.encode('utf-8', 'surrogateescape'))
        if size == 4096 and sys.stdin.isatty():  # Linux drops the rest of a longer line
            print('a terminal takes no longer line than 4,095 bytes: shorten it, or type it into a file and '
                  f'give that with <: --{setting} < FILE', flush=True)
        else:
            yield line.removesuffix('\n').removesuffix('\r').removeprefix('\ufeff')


def converse(*more):
    """Call print_samples() for each line of the terminal. An invalid prompt does not end the program."""
    for text in typed_lines('interactive'):
        try:
            sample.print_samples(typed_text(text, 'start'), *more)
        except sample.NotFinite:  # no other prompt would do
            raise
        except UserError as error:
            print(visible(str(error)), flush=True)
