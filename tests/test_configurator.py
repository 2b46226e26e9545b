"""Settings: what is accepted, what is refused, and with which words."""
import errno
import io
import os
import pty
import re
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Literal

import pytest
from conftest import ROOT, SCRIPTS, one_line, run

from configurator import (
    OLDEST_TORCH,
    PINNED_TORCH,
    FilePath,
    UserError,
    check_torch,
    configure,
    options,
    read_config,
    run_main,
    typed_text,
    whole_text,
)
from features import comment_of, earlier
from features.commands import configure_command
from features.declared import read
from features.help import help_text
from features.stored import from_dict


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
    config.write_text('import math\n_half = 0.5\nlearning_rate = _half * 2\n'
                      'max_iters = int(math.sqrt(400))\n')
    s = configure(Settings, [str(config), '--max_iters=30'])
    assert (s.learning_rate, s.max_iters, s.norm) == (1.0, 30, 'rmsnorm')
    assert s.given == {'learning_rate', 'max_iters'}


def test_a_byte_order_mark_before_a_config_file_is_taken_off(tmp_path):
    (tmp_path / 'c.py').write_bytes(b'\xef\xbb\xbfmax_iters = 30\r\n')
    assert configure(Settings, [str(tmp_path / 'c.py')]).max_iters == 30


def test_an_empty_list_is_text_where_texts_are_wanted():
    for text in ('()', '[]', '( )', '[ ]'):
        assert configure(Settings, [f'--stop={text}', '--stop=b']).stop == [text, 'b']
    assert configure(Settings, ["--stop=['a', 'b']"]).stop == ['a', 'b']


def test_a_config_file_may_name_its_coding_as_python_files_do(tmp_path):
    (tmp_path / 'c.py').write_bytes(b"# -*- coding: latin-1 -*-\nstart = '\xe9\x85'\n")
    assert configure(Settings, [str(tmp_path / 'c.py')]).start == '\xe9\x85'
    (tmp_path / 'c.py').write_bytes('max_iters = 30\n'.encode('utf-16'))
    with pytest.raises(UserError, match='c.py: (SyntaxError|ValueError): '):
        configure(Settings, [str(tmp_path / 'c.py')])


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


@pytest.mark.parametrize('typed, meant', [
    (r'a\nb\tc\rd', 'a\nb\tc\rd'), ('a\nb', 'a\nb'), (r'C:\\new', r'C:\new'), (r'\\\n', '\\\n'),
    (r'\\\\n', r'\\n'), (r'\u00e4 \ud83d\ude00', 'ä 😀'), ('end\\', 'end\\'), ('', ''), ("'\n'", "'\n'"),
    (r'\alpha\d\ \u12 \x41', r'\alpha\d\ \u12 \x41')])
def test_escapes_are_read_in_typed_texts_and_other_backslashes_kept(typed, meant):
    assert typed_text(typed, 'start') == meant


@pytest.mark.parametrize('module, cls, names', [
    ('sample', 'Settings', ['start', 'stop']), ('train', 'Settings', ['sample_prompt']),
    ('features.text.settings', 'TextConfig', ['prompt_template']), ('eval', 'TaskSettings', ['delimiter']),
    ('eval', 'SummarySettings', ['prompt_template'])])
def test_help_says_how_a_new_line_is_typed(module, cls, names):
    settings = help_text(getattr(read(module), cls), 'all').split('\n  --')
    for name in names:
        about, = [' '.join(setting.split()) for setting in settings if setting.startswith(f'{name}=')]
        assert r'\n is a new line' in about


def test_half_a_character_is_refused_and_two_halves_are_one():
    assert whole_text('a\ud83d\ude00b', 'start') == 'a😀b' and whole_text('', 'start') == ''
    assert whole_text('\ufeffa\0', 'start') == '\ufeffa\0'
    for text in ('caf\udce9', '\ude00\ud83d', 'a\ud83d'):
        with pytest.raises(UserError, match="^start: not UTF-8: '.ud.*' after . characters is no character"):
            whole_text(text, 'start')


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
    ('width = 64\nmax_iters = 2 * width\n',
     'width: no such setting; --help lists all; name it _width if it is a variable of this file'),
    ('max_iter = 64\n', 'did you mean max_iters?; name it _max_iter if'),
    ('max_iters = \n', 'SyntaxError'),
    ('import nothing_of_that_name\n', 'ModuleNotFoundError'),
])
def test_a_mistake_in_a_config_file_names_the_file(tmp_path, text, words):
    config = tmp_path / 'c.py'
    config.write_text(text)
    with pytest.raises(UserError) as error:
        configure(Settings, [str(config)])
    assert words in str(error.value) and str(config) in str(error.value)


def test_on_windows_a_script_says_in_one_line_where_it_runs():
    """Simulated: no module fcntl."""
    start = ("import runpy, sys; sys.modules['fcntl'] = None; sys.argv = sys.argv[1:]; "
             "runpy.run_path(sys.argv[0], run_name='__main__')")
    assert 'on Windows run it in WSL' in one_line(run('-c', start, ROOT / 'prepare.py', '--help'))
    for path in ROOT.glob('*.py'):  # or it would fail before configurator.py speaks
        assert not re.search('^(import|from) (fcntl|resource|pwd|termios)', path.read_text(encoding='utf-8'),
                             re.MULTILINE), path


def test_stored_settings_come_back_strictly():
    assert from_dict(Settings, {'max_iters': 3}, 'x').max_iters == 3
    with pytest.raises(UserError, match='x: n_layers'):
        from_dict(Settings, {'n_layers': 3}, 'x')


@dataclass
class Paths:
    positional = 'files'
    out_dir: FilePath = 'out'  # a folder
    start: str = ''  # a text
    dataset: FilePath | dict = 'stdlib'  # data
    adapter: list[FilePath] = field(default_factory=list)  # adapters
    files: list[FilePath] = field(default_factory=list)  # files


@pytest.mark.parametrize('arg, name, value', [
    ('--out_dir=~/a', 'out_dir', '/home/me/a'),
    ('--out_dir=~', 'out_dir', '/home/me'),
    ('--out_dir=hf:~/a', 'out_dir', 'hf:/home/me/a'),
    ('--out_dir=~nobody-of-that-name/a', 'out_dir', '~nobody-of-that-name/a'),
    ('--out_dir=a/~/b~', 'out_dir', 'a/~/b~'),
    ('--start=~/a', 'start', '~/a'),
    ("--dataset={'~/a': 1, 'b': 2}", 'dataset', {'/home/me/a': 1, 'b': 2}),
    ('--adapter=~/a', 'adapter', ['/home/me/a']),
    ('--adapter=x=~/a', 'adapter', ['x=/home/me/a']),
    ("--adapter=['~/a', 'y=~/b']", 'adapter', ['/home/me/a', 'y=/home/me/b']),
    ('~/a.txt', 'files', ['/home/me/a.txt']),
])
def test_a_tilde_is_the_home_directory_in_paths_alone(monkeypatch, arg, name, value):
    monkeypatch.setenv('HOME', '/home/me')
    got = getattr(configure(Paths, [arg]), name)
    assert got == value and type(got) is type(value)


def test_a_tilde_in_a_config_file_and_before_its_name_is_the_home_directory(monkeypatch, tmp_path):
    monkeypatch.setenv('HOME', str(tmp_path))
    (tmp_path / 'c.py').write_text("out_dir = '~/out'\nadapter = ['~/a']\nstart = '~'\n")
    s = Paths(**read_config(Paths, '~/c.py'))
    assert (s.out_dir, s.adapter, s.start) == (f'{tmp_path}/out', [f'{tmp_path}/a'], '~')


def test_every_setting_that_names_a_file_or_a_folder_knows_the_home_directory():
    """By its comment: a setting that is added and speaks of a file has to be a FilePath."""
    import analyze
    import bench
    import compare
    import eval
    import hub
    import prepare
    import sample
    import surgery
    import train
    from features.lora import combine
    from features.moe import experts, upcycle
    from features.study import attention, sweep
    from features.text import settings
    texts = {'start', 'text_key', 'source', 'prompt_template', 'target', 'layers',
             'which', 'stop', 'part', 'split', 'errors', 'reference', 'delimiter',
             'lora_targets', 'wandb_run_name'}  # their comments speak of files, and they are none
    modules = (analyze, attention, bench, combine, compare, eval, experts, hub, prepare, sample, settings,
               surgery, sweep, train, upcycle)
    for module in modules:
        for cls in vars(module).values():
            for part in (cls.__mro__ if is_dataclass(cls) and isinstance(cls, type)
                         and cls.__module__ == module.__name__ else ()):
                for f in fields(part) if is_dataclass(part) else ():
                    names_one = re.search(r'\b(files?|folders?|DIR|FILE|FOLDER|hf:|runs?|checkpoint|where to '
                                          r'draw)\b', comment_of(part, f.name))
                    is_text = any(kind in (str, list[str]) for kind in options(f.type))
                    assert not (names_one and is_text) or f.name in texts, (module.__name__, part.__name__,
                                                                            f.name)


@dataclass
class Copy:
    from_: str = ''  # where it comes from
    stop: list[str] = field(default_factory=list)


def test_a_setting_may_be_named_as_a_word_of_python():
    s = configure(Copy, ['--from=a', '--stop=x', '--stop=y'])
    assert ((s.from_, s.stop, s.given) == ('a', ['x', 'y'], {'from_', 'stop'})
            and "--from=''" in help_text(read('tests.test_configurator').Copy))
    with pytest.raises(UserError, match='--import: no such setting'):
        configure(Copy, ['--import=a'])


def test_the_first_argument_names_a_command():
    commands = {'copy': (len, Copy), 'train': (max, Settings)}
    function, s = configure_command(commands, ['train', '--max_iters=3'])
    assert function is max and s.max_iters == 3
    for argv, words in [([], 'no command given: takes copy or train'), (['cpy'], 'cpy: takes copy or train'),
                        (['copy', '--max_iters=3'], 'no such setting')]:
        with pytest.raises(UserError, match=words):
            configure_command(commands, argv)


# --- the oldest torch ---

@pytest.mark.parametrize('script', SCRIPTS)
def test_every_script_refuses_a_torch_that_is_too_old(script, monkeypatch):
    monkeypatch.setattr('torch.__version__', '2.10.1+cpu')
    expected = (f'{script}: torch 2.10.1+cpu: minnow needs torch {OLDEST_TORCH} or later: '
                f'pip install torch=={PINNED_TORCH}')
    assert one_line(run(script)) == expected


@pytest.mark.parametrize('version, is_refused', [
    ('2.9.1', True), ('1.13.1+cu117', True), ('2.10.0a0+git12', True), ('2.11.0', False),
    ('2.11.0a0+git12', False), ('2.13.0+cpu', False), ('3.0.0', False), ('10.0', False)])
def test_versions_are_compared_as_numbers(version, is_refused, monkeypatch):
    monkeypatch.setattr('torch.__version__', version)
    if is_refused:
        with pytest.raises(UserError, match='minnow needs torch'):
            check_torch()
    else:
        check_torch()


def test_every_script_with_a_main_is_checked():
    """run_main() is where a torch that is too old is noticed."""
    for path in (*ROOT.glob('*.py'), *ROOT.glob('experiments/*.py')):
        is_ours = path.name not in ('same_runs.py', 'core_mutants.py')  # these only start other processes
        if is_ours and "__name__ == '__main__'" in path.read_text():
            assert 'run_main(main' in path.read_text(), path


def test_a_setting_of_an_earlier_version_is_left_out_at_the_value_that_is_built_in_now(monkeypatch):
    monkeypatch.setattr(earlier, 'REMOVED', {'rank_blocks': 0, 'verify_all': ...})
    stored = {'n_layer': 2, 'rank_blocks': 0, 'verify_all': True}
    assert earlier.without_removed(stored, 'state.json') == {'n_layer': 2}
    with pytest.raises(UserError, match='state.json: rank_blocks=16: minnow no longer has this setting'):
        earlier.without_removed({'rank_blocks': 16}, 'state.json')


def test_all_texts_name_the_same_oldest_torch():
    texts = {name: (ROOT / name).read_text()
             for name in ('requirements.txt', 'README.md', 'Makefile')}
    assert re.search(r'^torch==(\S+) .*oldest', texts['requirements.txt'], re.M)[1] == PINNED_TORCH
    for name, pattern in (('requirements.txt', r'; ([\d.]+) is the oldest version'),
                          ('README.md', r'oldest version supported is torch ([\d.]*\d)'),
                          ('Makefile', r'torch==([\d.]+)\.0/')):
        assert re.findall(pattern, texts[name]) == [OLDEST_TORCH], name


@pytest.mark.parametrize('number', [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ESTALE])
def test_a_disk_that_is_full_or_broken_is_one_line_wherever_it_is_written_to(number, capsys, monkeypatch):
    monkeypatch.setattr('sys.stdout', io.TextIOWrapper(io.BytesIO()))

    def main():
        raise OSError(number, os.strerror(number), 'some/file')
    with pytest.raises(SystemExit, match='2'):
        run_main(main)
    to_do = 'check the disk' if number in (errno.EIO, errno.ESTALE) else 'make room'
    assert capsys.readouterr().err.endswith(f': some/file: {os.strerror(number)}: {to_do}, '
                                            'then run the same command\n')


def lost_stream(kind):
    """A stream whose reader has gone, or whose disk is full."""
    if kind == 'full':
        if not Path('/dev/full').is_char_device():
            pytest.skip('this machine has no /dev/full')
        return open('/dev/full', 'w')
    reader, writer = pty.openpty() if kind == 'terminal' else os.pipe()
    os.close(reader)
    return os.fdopen(writer, 'w')


@pytest.mark.parametrize('kind', ['pipe', 'terminal', 'full'])
@pytest.mark.parametrize('output_is_all', [False, True])
def test_output_that_is_lost_ends_only_what_makes_nothing_else(kind, output_is_all, monkeypatch, capsys):
    done = []

    def main():
        print('one', flush=True)
        print('two')
        done.append(True)
    with lost_stream(kind) as stream:
        monkeypatch.setattr('sys.stdout', stream)
        try:
            run_main(main, output_is_all)
            code = 0
        except SystemExit as stop:
            code = stop.code
    assert bool(done) == (not output_is_all)
    assert code == {'pipe': 1, 'terminal': 2, 'full': 2}[kind] * (output_is_all or kind == 'full')
    said = capsys.readouterr().err
    assert said.count('\n') == (code == 2) and ('No space left' in said) == (kind == 'full')


def test_an_error_is_exit_code_2_where_neither_stream_is_left(monkeypatch):
    with lost_stream('terminal') as one, lost_stream('terminal') as other:
        monkeypatch.setattr('sys.stdout', one)
        monkeypatch.setattr('sys.stderr', other)

        def main():
            print('one', flush=True)
            raise UserError('n_layer')
        with pytest.raises(SystemExit, match='2'):
            run_main(main)


def test_stdout_that_was_closed_from_the_start_is_none_to_write_to(monkeypatch):
    monkeypatch.setattr('sys.stdout', None)
    run_main(lambda: print('one', flush=True))
