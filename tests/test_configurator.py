"""Settings: what is accepted, what is refused, and with which words."""
import errno
import io
import os
from dataclasses import dataclass, field
from typing import Literal

import pytest

from configurator import UserError, configure, configure_command, from_dict, help_text, run_main


@dataclass
class Settings:
    learning_rate: float = 1e-3  # the rate
    max_iters: int = 10  # how many
    start: str = '\n'  # the prompt,
    # which may be anything
    norm: Literal['rmsnorm', 'layernorm'] = 'rmsnorm'  # which norm
    dataset: str | dict = 'stdlib'  # the data
    compile: bool | Literal['auto'] = 'auto'  # compile?
    min_lr: float | None = None  # lowest rate
    stop: list[str] = field(default_factory=list)  # stops

    def check(self):
        if self.max_iters < 0:
            raise ValueError('max_iters: must not be negative')


def test_defaults_then_config_file_then_command_line(tmp_path):
    config = tmp_path / 'c.py'
    config.write_text('import math\n_half = 0.5\nlearning_rate = _half * 2\nmax_iters = int(math.sqrt(400))\n')
    s = configure(Settings, [str(config), '--max_iters=30'])
    assert (s.learning_rate, s.max_iters, s.norm) == (1.0, 30, 'rmsnorm')
    assert s.given == {'learning_rate', 'max_iters'}


@pytest.mark.parametrize('arg, name, value', [
    ('--learning_rate=1', 'learning_rate', 1.0),  # int for float
    ('--learning_rate=1e-3', 'learning_rate', 1e-3),
    ('--max_iters=1e4', 'max_iters', 10000),
    ('--start=a=b', 'start', 'a=b'),  # cut at the first '=' only
    ('--start=123', 'start', '123'),
    ('--start="quoted"', 'start', '"quoted"'),
    ('--start=', 'start', ''),
    ('--start=None', 'start', 'None'),
    ("--dataset={'a': 100, 'b': 20}", 'dataset', {'a': 100, 'b': 20}),
    ('--compile=False', 'compile', False),
    ('--compile', 'compile', True),
    ('--min_lr=None', 'min_lr', None),
    ('--min_lr=0', 'min_lr', 0.0),
])
def test_values_are_read_as_their_type_wants(arg, name, value):
    got = getattr(configure(Settings, [arg]), name)
    assert got == value and type(got) is type(value)


def test_a_list_is_given_several_times():
    assert configure(Settings, ['--stop=a', '--stop=b']).stop == ['a', 'b']


@pytest.mark.parametrize('arg, words', [
    ('--learning_rat=1', 'did you mean learning_rate'),
    ('--learning_rate=fast', "--learning_rate: got 'fast', takes float"),
    ('--learning_rate=nan', '--learning_rate: got'),
    ('--max_iters=1.5', '--max_iters: got'),
    ('--max_iters=True', '--max_iters: got'),
    ('--norm=batchnorm', "--norm: got 'batchnorm', takes rmsnorm | layernorm"),
    ('--compile=yes', 'takes True or False | auto'),
    ('--max_iters=-1', 'max_iters: must not be negative'),
    ('--start', 'write --start=VALUE'),
    ('nowhere.py', 'no such config file'),
])
def test_a_mistake_is_named_with_what_would_be_right(arg, words):
    with pytest.raises(UserError) as error:
        configure(Settings, [arg])
    assert words in str(error.value) and '\n' not in str(error.value)


@pytest.mark.parametrize('text, words', [
    ('learning_rat = 1\n', 'did you mean learning_rate'),
    ("max_iters = 'many'\n", "max_iters: got 'many', takes int"),
    ('max_iters = \n', 'SyntaxError'),
    ('import nothing_of_that_name\n', 'ModuleNotFoundError'),
])
def test_a_mistake_in_a_config_file_names_the_file(tmp_path, text, words):
    config = tmp_path / 'c.py'
    config.write_text(text)
    with pytest.raises(UserError) as error:
        configure(Settings, [str(config)])
    assert words in str(error.value) and str(config) in str(error.value)


def test_help_shows_every_setting_with_default_and_comment():
    text = help_text(Settings)
    assert '--learning_rate=0.001' in text and 'the rate' in text
    assert 'the prompt, which may be anything' in text  # a comment over two lines


def test_every_script_has_help_for_all_its_settings():
    import prepare
    import sample
    import train
    for module in (train, sample, prepare):
        text = help_text(module.Settings)
        lines = [line for line in text.splitlines() if line.startswith('  --')]
        assert len(lines) == len(module.Settings.__dataclass_fields__)


def test_stored_settings_come_back_strictly():
    assert from_dict(Settings, {'max_iters': 3}, 'x').max_iters == 3
    with pytest.raises(UserError, match='x: n_layers'):
        from_dict(Settings, {'n_layers': 3}, 'x')


@dataclass
class Copy:
    from_: str = ''  # where it comes from
    stop: list[str] = field(default_factory=list)


def test_a_setting_may_be_named_as_a_word_of_python():
    s = configure(Copy, ['--from=a', '--stop=x', '--stop=y'])
    assert (s.from_, s.stop, s.given) == ('a', ['x', 'y'], {'from_', 'stop'}) and "--from=''" in help_text(Copy)
    with pytest.raises(UserError, match='--import: no such setting'):
        configure(Copy, ['--import=a'])


def test_the_first_argument_names_a_command():
    commands = {'copy': (len, Copy), 'train': (max, Settings)}
    function, s = configure_command(commands, ['train', '--max_iters=3'])
    assert function is max and s.max_iters == 3
    for argv, words in [([], 'no command given: takes copy or train'), (['cpy'], 'cpy: takes copy or train'), (['copy', '--max_iters=3'], 'no such setting')]:
        with pytest.raises(UserError, match=words):
            configure_command(commands, argv)


@pytest.mark.parametrize('number', [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO])
def test_a_disk_that_is_full_or_broken_is_one_line_wherever_it_is_written_to(number, capsys, monkeypatch):
    monkeypatch.setattr('sys.stdout', io.TextIOWrapper(io.BytesIO()))

    def main():
        raise OSError(number, os.strerror(number), 'some/file')
    with pytest.raises(SystemExit, match='2'):
        run_main(main)
    assert capsys.readouterr().err.endswith(f': some/file: {os.strerror(number)}: make room, then run the same command\n')
