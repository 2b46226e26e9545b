"""How a process of ours begins, prints and ends: its descriptors, signals and terminal."""
import fcntl
import os
import pty
import resource
import select
import signal
import subprocess
import sys
import termios
import threading
import time
from contextlib import suppress

import pytest
from conftest import ROOT

import configurator
from configurator import STOP_SIGNALS, UserError, run_main, visible

CLIPBOARD = '\x1b]52;c;aGk=\x07'


def start(code, **options):
    """A started process that runs these lines as a script of ours does."""
    command = [sys.executable, '-c', 'import os, sys, time\nimport configurator\n' + code]
    return subprocess.Popen(command, env=os.environ | {'PYTHONPATH': str(ROOT)}, text=True, **options)


def large_pages():
    """When the kernel gives pages of 2 MiB: 'always [madvise] never', the choice in brackets."""
    with suppress(OSError), open('/sys/kernel/mm/transparent_hugepage/enabled') as f:
        return f.read()
    return '[never]'


def everything(descriptor):
    """All bytes that have been written to the other end; closes this one."""
    said = b''
    while select.select([descriptor], [], [], 0.1)[0]:
        try:
            said += os.read(descriptor, 10_000)
        except OSError:  # a terminal that nobody writes to any more
            break
    os.close(descriptor)
    return said


# --- what is printed ---

@pytest.mark.parametrize('text, shown', [
    (CLIPBOARD, r'\x1b]52;c;aGk=\x07'), ('\x9b2J', r'\x9b2J'), ('a\rb', r'a\rb'), ('\x7f\x08', r'\x7f\x08'),
    ('\u202etxt', r'\u202etxt'), ('\u2028', r'\u2028'), ('a\tb\nc é 漢 🙂 \xa0|', 'a\tb\nc é 漢 🙂 \xa0|')])
def test_characters_that_command_a_terminal_are_shown_as_text(text, shown):
    assert visible(text) == shown


def test_no_control_character_is_left_but_new_lines_and_tabs():
    controls = [chr(n) for n in (*range(32), *range(127, 160))]
    assert {c for c in controls if c in visible(''.join(controls))} == {'\t', '\n'}


def test_an_error_with_a_name_of_a_file_of_any_length_stays_one_line_that_a_terminal_can_show(capsys):
    def main():
        raise UserError(f'weights.safetensors: {"x" * 10 ** 6}: no such tensor: restore it')
    with pytest.raises(SystemExit):
        run_main(main)
    line = capsys.readouterr().err
    assert len(line) < 1000 and 'weights.safetensors: xxx' in line
    assert line.endswith('xxx: no such tensor: restore it\n')


def printed(monkeypatch, main, output_is_all, terminal):
    """The bytes that main() prints to stdout: a terminal, or a pipe."""
    reader, writer = pty.openpty() if terminal else os.pipe()
    with os.fdopen(writer, 'w') as stream:
        monkeypatch.setattr('sys.stdout', stream)
        run_main(main, output_is_all)
        return everything(reader)


@pytest.mark.parametrize('output_is_all, terminal, is_exact', [
    (True, True, False), (True, False, True), (False, True, False), (False, False, False)])
def test_generated_text_is_exact_in_a_pipe_alone(output_is_all, terminal, is_exact, monkeypatch):
    """Piece by piece, as it is generated."""
    def main():
        for piece in CLIPBOARD:
            print(piece, end='', flush=True)
        print()
    found = printed(monkeypatch, main, output_is_all, terminal)
    assert found.rstrip(b'\r\n') == (CLIPBOARD if is_exact else visible(CLIPBOARD)).encode()


def test_an_error_is_one_line_without_control_characters_wherever_it_goes(capsys):
    def main():
        raise UserError(f'{CLIPBOARD}\r\u202e\x85a\nb.txt: no such file')
    with pytest.raises(SystemExit, match='2'):
        run_main(main)
    assert capsys.readouterr().err.endswith(': \\x1b]52;c;aGk=\\x07\\r\\u202e\\x85a b.txt: no such file\n')


def test_a_progress_bar_moves_the_cursor_and_a_name_in_it_does_not():
    code = """
from tqdm import tqdm
def main():
    with tqdm(total=2, desc=sys.argv[1]), tqdm(total=2, desc='inner') as inner:
        inner.update(1)
    print('\\x1b[1;31mred\\x1b[0m', file=sys.stderr)
configurator.run_main(main)"""
    for name, is_plain in (('plain', True), (CLIPBOARD, False)):
        ours, theirs = pty.openpty()
        termios.tcsetwinsize(ours, (24, 80))
        with start(code.replace('sys.argv[1]', repr(name)), stderr=theirs) as process:
            assert process.wait(30) == 0
        os.close(theirs)
        said = everything(ours)
        assert b'\x1b[A' in said and b'\rinner' in said and (b'\rplain' in said) == is_plain, said
        assert b'\x1b]' not in said and b'\x1b[1' not in said and b'red' in said, said


# --- nobody reads it ---

def test_a_reader_that_stops_reading_does_not_stop_a_run(monkeypatch):
    """More than a pipe holds; at the end the latest is still to come, if it is read again."""
    monkeypatch.setattr(configurator.Output, 'PATIENCE', 0.05)
    reader, writer = os.pipe()
    with os.fdopen(writer, 'w') as stream:
        monkeypatch.setattr('sys.stdout', stream)
        began = time.monotonic()

        def main():
            for n in range(3000):
                print(f'step {n}', 'x' * 100, flush=True)
            assert time.monotonic() - began < 5
            end = time.monotonic() + 10
            while '2999' not in os.read(reader, 2 ** 16).decode():
                assert time.monotonic() < end
                sys.stdout.flush()
        run_main(main)
    os.close(reader)


@pytest.mark.parametrize('output_is_all', [False, True])
def test_a_pipe_that_does_not_wait_gets_everything(output_is_all, monkeypatch):
    """Whoever starts a process may give it a pipe that is not blocking: BlockingIOError."""
    reader, low = os.pipe()
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    writer = fcntl.fcntl(low, fcntl.F_DUPFD, min(1024, most - 1))  # as in a process with many open files
    os.close(low)
    os.set_blocking(writer, False)
    found = []

    def read():
        while data := os.read(reader, 1000):
            found.append(data)
    thread = threading.Thread(target=read)
    thread.start()
    with os.fdopen(writer, 'w') as stream:
        monkeypatch.setattr('sys.stdout', stream)
        run_main(lambda: [print('x' * 100) for _ in range(3000)], output_is_all)
    thread.join()
    os.close(reader)
    assert sum(map(len, found)) == 3000 * 101


@pytest.mark.parametrize('closed', ['>&-', '2>&-', '<&-', '<&- >&- 2>&-'])
def test_a_descriptor_that_was_closed_is_not_given_to_a_file(closed, tmp_path):
    """Nor to one of a process that it starts."""
    code = f"""
import subprocess
def main():
    with open({str(tmp_path / 'data')!r}, 'w') as f:
        print('printed', flush=True)
        print('printed', file=sys.stderr, flush=True)
        os.system('echo printed; echo printed >&2')
        subprocess.run(['sh', '-c', 'echo printed || touch {tmp_path}/failed; echo printed >&2'])
        f.write(str(f.fileno()))
configurator.run_main(main)"""
    command = ['bash', '-c', f'"$@" {closed}', 'sh', sys.executable, '-c',
               'import os, sys\nimport configurator' + code]
    done = subprocess.run(command, env=os.environ | {'PYTHONPATH': str(ROOT)}, capture_output=True,
                          timeout=60)
    assert done.returncode == 0, done.stderr
    assert int((tmp_path / 'data').read_text()) > 2 and not (tmp_path / 'failed').exists()


# --- signals ---

@pytest.mark.parametrize('number', STOP_SIGNALS, ids=lambda number: number.name)
def test_a_signal_ends_a_script_in_one_line_after_its_clean_up(number, tmp_path):
    """However often it comes."""
    code = f"""
def main():
    try:
        print('begun', flush=True)
        time.sleep(60)
    finally:
        time.sleep(0.2)
        open({str(tmp_path / 'cleaned')!r}, 'w').close()
configurator.run_main(main)"""
    # a shell's background jobs, perhaps these tests, ignore SIGINT
    with start(code, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)) as process:
        process.stdout.readline()
        process.send_signal(number)
        if number != signal.SIGINT:
            time.sleep(0.05)
            process.send_signal(number)
        _, said = process.communicate(timeout=30)
    assert process.returncode == 128 + number and (tmp_path / 'cleaned').exists(), said
    assert said == f'-c: stopped by {number.name}; run the same command again\n'


@pytest.mark.parametrize('script', sorted(path.name for path in ROOT.glob('*.py')
                                          if "__name__ == '__main__'" in path.read_text()))
def test_ctrl_c_while_a_script_is_loaded_is_no_traceback(script, tmp_path):
    (tmp_path / 'dataclasses.py').write_text('import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n'
                                             'for _ in range(1000): pass\n')
    done = subprocess.run([sys.executable, ROOT / script], cwd=ROOT, text=True,
                          env=os.environ | {'PYTHONPATH': str(tmp_path)}, capture_output=True, timeout=60,
                          preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    assert (done.returncode, done.stderr) == (-signal.SIGINT, ''), done


def test_importing_minnow_leaves_ctrl_c_as_it_is(tmp_path):
    code = 'import signal, sample; assert signal.getsignal(signal.SIGINT) == signal.default_int_handler'
    subprocess.run([sys.executable, '-c', code], cwd=ROOT, check=True,
                   preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))


def test_a_script_under_nohup_goes_on_after_sighup():
    code = """
def main():
    print('begun', flush=True)
    time.sleep(0.3)
configurator.run_main(main)"""
    with start(code, stdout=subprocess.PIPE,
               preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)) as process:
        process.stdout.readline()
        process.send_signal(signal.SIGHUP)
        assert process.wait(30) == 0


@pytest.mark.skipif('[madvise]' not in large_pages(), reason='this kernel does not wait to be asked')
@pytest.mark.parametrize('script, by_user, are_large', [('sample', {}, True), ('train', {}, False),
                                                        ('sample', {'THP_MEM_ALLOC_ENABLE': '0'}, False)])
def test_sample_takes_large_pages_of_memory(script, by_user, are_large):
    """Of 16,384 pages of 4 KiB, less than a quarter: the kernel may be out of large ones now and then."""
    code = (f'import runpy, sys; sys.argv = ["{script}.py", "--nonsense"]\n'
            f'try: runpy.run_path("{script}.py", run_name="__main__")\n'
            'except SystemExit: import torch; from resource import getrusage\n'
            'before = getrusage(0).ru_minflt; torch.ones(2 ** 24); print(getrusage(0).ru_minflt - before)')
    environment = {name: value for name, value in os.environ.items() if name != 'THP_MEM_ALLOC_ENABLE'}
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT, check=True,
                          env=environment | by_user)
    assert (int(done.stdout) < 4096) == are_large
