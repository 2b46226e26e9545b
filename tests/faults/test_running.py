"""Signals, numbers that are not finite, spikes, hangs, restarts and drift while a run goes on."""
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, read_log, run_here, write_dataset
from processes import SMALL, Processes, fingerprint, run_to_end, step_of

import checkpoint
import run
import train
from configurator import STOP_SIGNALS, UserError, listen
from features.scale import ranks
from run import StopSignal, set_up

SLOW = pytest.mark.slow
LONG = ['--max_iters=100000', '--eval_interval=100000', '--lr_decay_iters=400', '--warmup_iters=20']
STOPPED = re.compile(r'stopped by SIGTERM after step (\d+); the same command continues from there')


def torchrun(*args, nproc=2, options=(), script='train.py', **environment):
    """A started `torchrun train.py ARGS` in a session of its own."""
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={nproc}',
               *options, script, *map(str, args)]
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | {'OMP_NUM_THREADS': '1'} | environment,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            text=True, start_new_session=True)


# --- signals ---

@pytest.mark.parametrize('ranks, whom, where', [
    (1, 0, 'step 20/'), (2, 1, 'step 20/'), (2, 1, 'evaluation'), (1, 0, 'save:optimizer'),
    *(pytest.param(*case, marks=SLOW)
      for case in ((2, None, 'step 20/'), (1, 0, 'epochs:'), (1, 0, 'evaluation'), (1, 0, 'sample')))])
def test_a_signal_leaves_one_checkpoint_at_the_end_of_a_step_and_the_run_goes_on_bitwise(dataset, tmp_path,
                                                                                         ranks, whom, where):
    """
    To one process, to all of two ranks or to the second alone; in a step, at the start, in an evaluation, a
    sample, a save.
    """
    args, at_a_point = ([*SMALL, *LONG, f'--dataset={dataset}'],
                        where in ('evaluation', 'sample', 'save:optimizer'))
    more = ['--sample_tokens=20', '--eval_interval=20'] if at_a_point else []
    processes = Processes(*args, *more, f'--out_dir={tmp_path / "cut"}', ranks=ranks,
                          fault=f'{where}@20/{whom}=term' * at_a_point)
    if not at_a_point:
        assert processes.wait_for(where)
        processes.kill(signal.SIGTERM, whom)
    codes, said = processes.wait()
    assert codes == [128 + signal.SIGTERM] * ranks and said.count('stopped by SIGTERM') == 1, said
    step = int(STOPPED.search(said)[1])
    assert step_of(tmp_path / 'cut') == step and all(
        checkpoint.damage(folder) is None for folder in checkpoint.checkpoints(str(tmp_path / 'cut')))
    if at_a_point:  # an evaluation that was left is made again
        assert step == (21 if where == 'sample' else 20)
        assert (any(r['step'] == 20 and 'val_loss' in r for r in read_log(tmp_path / 'cut'))
                == (where == 'sample'))
    for name in ('cut', 'whole'):
        assert (run_to_end(*args, f'--max_iters={step + 3}', f'--out_dir={tmp_path / name}', ranks=ranks)[0]
                == [0] * ranks)
    assert fingerprint(tmp_path / 'cut') == fingerprint(tmp_path / 'whole')


def test_a_signal_ends_a_rank_that_waits_for_one_that_never_comes(monkeypatch):
    """At the start, torch waits half an hour for it, and no handler of Python runs."""
    def look(*args, **more):
        seen.update({number: signal.getsignal(number) for number in STOP_SIGNALS})
    seen, stop, before = {}, StopSignal(), {number: signal.getsignal(number) for number in STOP_SIGNALS}
    monkeypatch.setenv('WORLD_SIZE', '2')
    monkeypatch.setattr(ranks.dist, 'init_process_group', look)
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        listen(stop.remember)
        ranks.Ranks(torch.device('cpu'))
        ignored = {number for number in STOP_SIGNALS if signal.getsignal(number) != stop.remember}
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert seen.pop(signal.SIGHUP) == signal.SIG_IGN and ignored == {signal.SIGHUP}
    assert set(seen.values()) == {signal.SIG_DFL}


def test_a_signal_while_minutes_are_measured_leaves_nothing_behind(dataset, tmp_path):
    args = [*SMALL, f'--dataset={dataset}', f'--out_dir={tmp_path / "out"}', '--minutes=1', '--depth=2',
            '--compile=False']
    args = [arg for arg in args
            if not arg.startswith(('--max_iters', '--n_', '--learning_rate', '--batch_size'))]
    codes, said = run_to_end(*args, fault='loss@3=term')
    assert (codes == [128 + signal.SIGTERM] and 'stopped by SIGTERM; run' in said
            and not (tmp_path / 'out').exists()), said


@pytest.mark.parametrize('number, code',
                         [(signal.SIGINT, -signal.SIGINT), (signal.SIGTERM, 128 + signal.SIGTERM)])
def test_a_second_ctrl_c_ends_it_at_once_and_damages_nothing_and_a_second_sigterm_is_the_same_one(
        dataset, tmp_path, number, code):
    processes = Processes(*SMALL, *LONG, f'--dataset={dataset}', f'--out_dir={tmp_path}',
                          '--checkpoint_interval=1', fault='save:manifest=slow')
    assert processes.wait_for('step 3/')
    processes.kill(number)
    time.sleep(0.1)
    processes.kill(number)
    codes, said = processes.wait()
    assert codes == [code] and checkpoint.damage(checkpoint.find(str(tmp_path))) is None, said


@pytest.mark.parametrize('ranks, number', [
    (1, signal.SIGHUP), (2, signal.SIGUSR1), (1, signal.SIGXCPU),
    *(pytest.param(*case, marks=SLOW)
      for case in ((2, signal.SIGHUP), (1, signal.SIGUSR1), (1, signal.SIGUSR2), (2, signal.SIGXCPU)))])
def test_other_signals_save_as_sigterm_does_however_often_they_come(dataset, tmp_path, ranks, number):
    processes = Processes(*SMALL, *LONG, f'--dataset={dataset}', f'--out_dir={tmp_path}', ranks=ranks,
                          fault='save:manifest=slow')
    assert processes.wait_for('step 20/')
    processes.kill(number)
    time.sleep(0.1)
    processes.kill(number)
    codes, said = processes.wait()
    assert (codes == [128 + number] * ranks
            and f'stopped by {number.name} after step {step_of(tmp_path)};' in said), said
    assert checkpoint.damage(checkpoint.find(str(tmp_path))) is None


def test_a_terminal_that_is_closed_is_a_sighup_and_nothing_else(dataset, tmp_path):
    """Every line that is printed after it fails with EIO."""
    ours, theirs = pty.openpty()
    processes = Processes(*SMALL, *LONG, f'--dataset={dataset}', f'--out_dir={tmp_path}',
                          output=os.ttyname(theirs))
    wait_for_line(ours, b'step 20/')
    os.close(theirs)
    os.close(ours)
    step = len(read_log(tmp_path))
    while len(read_log(tmp_path)) < step + 2:  # it goes on without
        time.sleep(0.01)
    processes.kill(signal.SIGHUP)  # the kernel does this to the session of a real one
    processes.processes[0].join(60)
    assert processes.processes[0].exitcode == 128 + signal.SIGHUP
    assert step_of(tmp_path) >= 20 and checkpoint.damage(checkpoint.find(str(tmp_path))) is None


def test_a_run_goes_on_when_nobody_reads_what_it_prints(dataset, tmp_path):
    os.mkfifo(tmp_path / 'pipe')
    reader = os.open(tmp_path / 'pipe', os.O_RDONLY | os.O_NONBLOCK)
    os.set_blocking(reader, True)
    processes = Processes(*SMALL, f'--dataset={dataset}', f'--out_dir={tmp_path / "out"}', '--max_iters=60',
                          output=str(tmp_path / 'pipe'))
    wait_for_line(reader, b'step 5/')
    os.close(reader)
    processes.processes[0].join(60)
    assert (processes.processes[0].exitcode == 0 and step_of(tmp_path / 'out') == 60
            and read_log(tmp_path / 'out')[-1]['step'] == 60)


def wait_for_line(descriptor, words):
    """Read from a terminal or a pipe until these words came."""
    said, end = b'', time.monotonic() + 60
    while words not in said and time.monotonic() < end:
        if select.select([descriptor], [], [], 1)[0]:
            said += os.read(descriptor, 4096)
    assert words in said, said


def test_who_ignores_sighup_as_nohup_asks_still_ignores_it():
    stop = StopSignal()
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        listen(stop.remember)
        assert (signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
                and signal.getsignal(signal.SIGTERM) == stop.remember)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        listen(stop.remember)
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.number == signal.SIGHUP
        os.kill(os.getpid(), signal.SIGTERM)  # the first of its kind
        assert stop.number == signal.SIGTERM
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_signal_in_a_step_that_is_skipped_or_that_spikes_is_heard(dataset, tmp_path):
    args = [*SMALL, f'--dataset={dataset}', '--max_iters=150', '--eval_interval=1000',
            '--checkpoint_interval=20']
    for name, more, fault, step in (('skipped', [], 'step@30=term loss@30=nan', 31),
                                    ('spike', ['--rewind_spikes=6'], 'step@95=term loss@95=large', 81)):
        codes, said = run_to_end(*args, *more, f'--out_dir={tmp_path / name}', fault=fault)
        assert codes == [128 + signal.SIGTERM] and step_of(tmp_path / name) == step, said


# --- numbers that are not finite ---

@pytest.mark.parametrize('fault', [pytest.param('loss@6/1=nan', marks=SLOW), 'loss@6/1=inf', 'step@6/1=inf'])
def test_a_loss_or_gradient_of_one_rank_that_is_not_finite_changes_nothing_on_any(dataset, tmp_path, fault):
    """… so that the run is the one that was told to leave that step out, and all ranks stay alike."""
    args = [*SMALL, f'--dataset={dataset}']
    codes, said = run_to_end(*args, f'--out_dir={tmp_path / "nan"}', ranks=2, fault=fault,
                             constants={'features.scale.guard.INTERVAL': 1})
    assert codes == [0, 0] and said.count('step 7: the loss or its gradient is not finite; '
                                          'no weight was changed') == 1, said
    assert run_to_end(*args, f'--out_dir={tmp_path / "left"}', left_out=[6], ranks=2)[0] == [0, 0]
    assert run_to_end(*args, f'--out_dir={tmp_path / "whole"}', ranks=2)[0] == [0, 0]
    assert fingerprint(tmp_path / 'nan') == fingerprint(tmp_path / 'left') != fingerprint(tmp_path / 'whole')
    records = {r['step']: r for r in read_log(tmp_path / 'nan')}
    assert ('train_loss' not in records[7] and records[7]['skipped'] == records[9]['skipped'] == 1
            and 'skipped' not in records[6])


@pytest.mark.parametrize('optimizer', ['adamw', pytest.param('muon', marks=SLOW)])
def test_too_many_in_a_row_end_the_run_and_the_last_checkpoint_is_sound_and_finite(dataset, tmp_path,
                                                                                   optimizer):
    faults = ' '.join(f'loss@{step}=nan' for step in (2, *range(6, 30)))
    codes, said = run_to_end(*SMALL, f'--dataset={dataset}', f'--out_dir={tmp_path}',
                             '--max_iters=30', '--checkpoint_interval=1', f'--optimizer={optimizer}',
                             fault=faults, constants={'train.MAX_SKIPPED': 3})
    assert (codes == [2] and 'not finite at step 10: lower' in said
            and said.count('no weight was changed') == 5)
    assert step_of(tmp_path) == 6 and all(
        t.isfinite().all() for t in checkpoint.read_weights(checkpoint.find(str(tmp_path))).values())
    # numbers that json knows
    assert json.loads((tmp_path / 'log.jsonl').read_text().splitlines()[-1])['step'] == 9


def test_one_that_is_not_finite_at_the_end_or_at_an_evaluation_loses_nothing(dataset, tmp_path):
    codes, said = run_to_end(*SMALL, f'--dataset={dataset}', f'--out_dir={tmp_path}',
                             fault='loss@4=nan loss@9=nan')
    assert (codes == [0] and step_of(tmp_path) == 10
            and json.loads((tmp_path / 'best').read_text())['checkpoint'] == 'step_00000010'), said


def test_a_best_one_that_could_not_be_written_does_not_take_the_place_of_the_one_before(dataset, tmp_path):
    codes, said = run_to_end(*SMALL, f'--dataset={dataset}', f'--out_dir={tmp_path}', '--async_save',
                             fault='save:manifest@10=full')
    assert codes == [2] and json.loads((tmp_path / 'best').read_text())['checkpoint'] == 'step_00000005', said


@SLOW
def test_with_float16_too_small_factors_are_no_skipped_steps_and_nan_is(dataset, tmp_path):
    args = [*SMALL, f'--dataset={dataset}', '--dtype=float16', '--max_iters=60', '--eval_interval=1000']
    codes, said = run_to_end(*args, f'--out_dir={tmp_path / "nan"}',
                             fault=' '.join(f'loss@{step}=nan' for step in range(5, 60)))
    assert (codes == [2] and 'not finite at step' in said
            and not checkpoint.checkpoints(str(tmp_path / 'nan'))), said
    codes, said = run_to_end(*args, f'--out_dir={tmp_path / "inf"}', '--rewind_spikes=6',
                             fault='loss@5=inf loss@40=nan')
    assert codes == [0] and 'no weight was changed' not in said and all(map(torch.isfinite, map(
        torch.sum, checkpoint.read_weights(checkpoint.find(str(tmp_path / 'inf'))).values()))), said


@pytest.mark.parametrize('args', [['--n_expert=4', '--expert_bias=0.01'],
                                  ['--grow_every=5', '--grow_to=3', '--n_layer=2']],
                         ids=['experts', 'growth'])
def test_a_skipped_step_leaves_the_bias_of_experts_and_the_schedule_of_growth(dataset, tmp_path, args):
    for name, left_out, fault in (('nan', [], 'loss@5=nan'), ('left', [5], '')):
        codes, said = run_to_end(*SMALL, f'--dataset={dataset}', f'--out_dir={tmp_path / name}', *args,
                                 left_out=left_out, fault=fault)
        assert codes == [0] and said.count('grown to 3 layers') == ('--grow_to=3' in args), said
    assert fingerprint(tmp_path / 'nan') == fingerprint(tmp_path / 'left')


def test_weights_that_are_not_finite_are_never_written(tmp_path):
    with pytest.raises(UserError, match='step_00000001: not written, as b is not finite'):
        checkpoint.save(str(tmp_path), 1, {'a': torch.ones(2), 'b': torch.tensor([1.0, torch.inf])}, {}, {})
    assert not os.listdir(tmp_path)


# --- spikes ---

def poisoned(folder):
    """
    The counting data, but a part of it is noise, which a network that has learned to count finds surprising.
    """
    import hashlib

    import numpy as np
    write_dataset(folder, documents=600, shards=1)
    tokens = np.fromfile(folder / 'train_00000.bin', '<u2')
    tokens[len(tokens) // 2:][:600] = np.random.default_rng(0).integers(0, 61, 600)
    tokens.tofile(folder / 'train_00000.bin')
    meta = json.loads((folder / 'meta.json').read_text())
    meta['splits']['train']['shards'][0]['sha256'] = hashlib.sha256(tokens.tobytes()).hexdigest()
    (folder / 'meta.json').write_text(json.dumps(meta))
    return folder


@pytest.mark.parametrize('ranks', [1, pytest.param(2, marks=SLOW)])
def test_a_spike_rewinds_and_the_run_is_the_one_that_left_those_steps_out_from_the_start(tmp_path, ranks):
    """By a fault: the loss of one step is infinite no more, but large."""
    args = [*SMALL, f'--dataset={poisoned(tmp_path / "d")}', '--max_iters=150', '--eval_interval=1000',
            '--checkpoint_interval=20', '--learning_rate=1e-2']
    codes, said = run_to_end(*args, f'--out_dir={tmp_path / "spike"}', '--rewind_spikes=6', ranks=ranks,
                             fault='loss@95=large')
    assert codes == [0] * ranks, said
    found = re.findall(r'step 96: loss .* back to the last checkpoint, '
                       r'and on without steps 87 to 96 \(samples 344 to 383\)', said)
    assert len(found) == 1 and said.count('standard deviations') == 1 and 'at step 80' in said, said
    assert run_to_end(*args, f'--out_dir={tmp_path / "left"}', left_out=[*range(86, 96)],
                      ranks=ranks)[0] == [0] * ranks
    assert fingerprint(tmp_path / 'spike') == fingerprint(tmp_path / 'left')
    assert (read_log(tmp_path / 'spike') == read_log(tmp_path / 'left')
            and read_log(tmp_path / 'left')[-1]['tokens'] == (150 - 10) * 4 * 32)


@SLOW
def test_a_run_that_rewound_resumes_exactly_and_one_that_always_spikes_is_given_up(dataset, tmp_path):
    args = [*SMALL, f'--dataset={dataset}', '--eval_interval=1000', '--checkpoint_interval=20',
            '--rewind_spikes=6', '--lr_decay_iters=150', '--warmup_iters=0']
    for name, steps in (('whole', (150,)), ('cut', (110, 150))):
        for max_iters in steps:
            codes, said = run_to_end(*args, f'--out_dir={tmp_path / name}', f'--max_iters={max_iters}',
                                     fault='loss@95=large')
            assert codes == [0], said
    assert fingerprint(tmp_path / 'whole') == fingerprint(tmp_path / 'cut')
    faults = ' '.join(f'loss@{step}=large' for step in range(60, 150))
    codes, said = run_to_end(*args, f'--out_dir={tmp_path / "always"}', '--max_iters=150', fault=faults)
    assert codes == [2] and '5 rewinds did not help' in said and step_of(tmp_path / 'always') == 60, said


# --- two of them ---

@pytest.mark.parametrize('more', [[], ['--init_from=scratch'], ['--max_iters=5', '--init_from=scratch']])
def test_a_second_process_does_not_train_in_the_same_out_dir(dataset, tmp_path, more):
    """
    It would mix up checkpoints, or move those of a run that goes on. A process that was killed is in nobody's
    way.
    """
    args = [*SMALL, *LONG, f'--dataset={dataset}', f'--out_dir={tmp_path / "out"}', '--checkpoint_interval=5']
    processes = Processes(*args)
    assert processes.wait_for('step 20/')
    codes, said = run_to_end(*args, *more)
    assert (codes == [2] and 'another process is training in it' in said and 'moved' not in said
            and os.listdir(tmp_path) == ['out']), said
    assert processes.wait_for('step 40/')
    processes.kill()
    processes.wait()
    step = step_of(tmp_path / 'out')
    assert run_to_end(*args, f'--max_iters={step + 2}')[0] == [0] and step_of(tmp_path / 'out') == step + 2


def test_out_dir_is_claimed_before_it_is_read_and_let_go_at_the_end(dataset, tmp_path, monkeypatch):
    """Or what another process writes while this one starts would be taken for damaged."""
    args = [*SMALL, f'--dataset={dataset}', f'--out_dir={tmp_path}']
    run_here(['train.py', *args])
    held = []
    monkeypatch.setattr(train, 'set_up', lambda *args: held.append(list(checkpoint.CLAIMED)) or set_up(*args))
    run_here(['train.py', *args, '--max_iters=12'])
    run_here(['train.py', *args, '--max_iters=12', '--eval_only'])
    assert (held == [[str(tmp_path)], []] and not checkpoint.CLAIMED and not (tmp_path / 'lock').exists()
            and step_of(tmp_path) == 12)


# --- hangs and restarts ---

@pytest.mark.full
def test_a_rank_that_hangs_ends_the_run_which_says_which_and_where(dataset, tmp_path):
    began = time.monotonic()
    args = [*SMALL, *LONG, f'--dataset={dataset}', f'--out_dir={tmp_path}', '--hang_timeout=10']
    codes, said = run_to_end(*args, ranks=2, fault='step@5/1=hang')
    assert None not in codes and 0 not in codes and 1 in codes and time.monotonic() - began < 60, said
    assert 'last to move on: rank 1 (' in said and 'last to move on: rank 0' not in said
    assert 'in hang' in said and 'in train_step' in said  # where rank 1 stands, and rank 0


@pytest.mark.full
def test_a_run_that_is_suspended_has_not_hung(dataset, tmp_path):
    processes = Processes(*SMALL, *LONG, f'--dataset={dataset}', f'--out_dir={tmp_path}', '--hang_timeout=8',
                          ranks=2)
    assert processes.wait_for('step 5/')
    processes.kill(signal.SIGSTOP)
    time.sleep(9)
    processes.kill(signal.SIGCONT)
    time.sleep(1)
    processes.kill(signal.SIGTERM)
    assert processes.wait()[0] == [128 + signal.SIGTERM] * 2


class AtOnce:
    """
    In place of a thread of ranks.Watch: what asks the store runs at once, and the watch itself when the test
    calls it.
    """
    def __init__(self, target, daemon):
        self.target = target

    def start(self):
        if self.target.__name__ != 'look':
            self.target()

    def join(self, timeout):
        pass

    def is_alive(self):
        return False


def test_a_rank_that_ends_with_an_error_asks_rank_0_no_more():
    """Rank 0 may be gone, and torch prints a stack of C++ for each call that finds its store closed."""
    def refuse():
        raise UserError('no room')
    for end in (lambda: mine.from_first(refuse),
                lambda: mine.check_complete(RuntimeError('Connection closed by peer'))):
        mine = ranks.Ranks(torch.device('cpu'))
        mine.watch = SimpleNamespace(store=ranks.dist.HashStore(), beat=lambda doing: None, quiet=0.0)
        with pytest.raises(UserError):
            end()
        assert mine.watch.store is None


@pytest.mark.parametrize('compiles, other, ends_at', [
    (False, 'to compute gradients', 10), (True, 'to compute gradients', 100),
    (False, 'to compute gradients, compiling', 100), (False, 'to work for all', 100)])
def test_a_compilation_may_take_ten_times_hang_timeout(compiles, other, ends_at, monkeypatch, capsys):
    """Of this rank or of another one, for which this one waits. The time is not real."""
    slept = []
    monkeypatch.setattr(ranks.dist.distributed_c10d, '_get_default_store', ranks.dist.HashStore)
    monkeypatch.setattr(ranks.threading, 'Thread', AtOnce)
    monkeypatch.setattr(ranks.time, 'sleep', slept.append)
    monkeypatch.setattr(ranks.os, '_exit', lambda code: None)
    watch = ranks.Watch(0, 2, 10.0)
    watch.store.set('1', json.dumps((0, other)))
    mine = ranks.Ranks(torch.device('cpu'))
    mine.watch = watch
    with mine.patient(compiles):
        watch.look()
    assert sum(slept[:-1]) == pytest.approx(ends_at)  # the last one lets the others speak
    said = capsys.readouterr().err
    assert 'no progress for hang_timeout=10 seconds' in said and ('(to begin, compiling)' in said) == compiles
    assert not watch.compiles and watch.quiet == 0  # the time begins anew


def test_the_first_step_and_the_first_evaluation_of_a_network_compile(dataset, tmp_path, monkeypatch):
    done, patient = [], run.OneProcess.patient

    def noted(self, compiles):
        done.append(compiles)
        return patient(self, compiles)
    monkeypatch.setattr(run.OneProcess, 'patient', noted)
    monkeypatch.setattr(torch.nn.Module, 'compile', lambda self, **options: None)
    args = ['train.py', *SMALL, f'--dataset={dataset}', f'--out_dir={tmp_path}', '--grow_every=3',
            '--grow_to=4', '--eval_interval=2', '--max_iters=6']
    assert run_here([*args, '--compile=True']).returncode == 0
    first, later = [True, True], [False]  # an evaluation and a step
    assert done == [*first, *later * 3, *[True], *[True], *later * 3]
    done.clear()
    assert run_here([*args, '--compile=False', '--init_from=scratch']).returncode == 0 and not any(done)


@SLOW
@pytest.mark.parametrize('init_from', ['auto', 'scratch'])
def test_after_a_crash_torchrun_starts_it_again_and_the_end_is_the_same(dataset, tmp_path, init_from):
    args = [*SMALL, f'--dataset={dataset}', '--checkpoint_interval=2', f'--init_from={init_from}']
    process = torchrun(*args, f'--out_dir={tmp_path / "crash"}', options=['--max_restarts=1'],
                       script='tests/inject.py', FAULT='step@5/1=exit',
                       TORCH_DISABLE_SHARE_RDZV_TCP_STORE='1')
    said, code = process.communicate(timeout=120)[0], process.wait()
    assert (code == 0 and 'resuming' in said and 'exitcode  : 13' not in said
            and not (tmp_path / 'crash.old1').exists()), said
    assert run_to_end(*args, f'--out_dir={tmp_path / "whole"}', ranks=2)[0] == [0, 0]
    assert fingerprint(tmp_path / 'crash') == fingerprint(tmp_path / 'whole')


def test_from_scratch_a_job_that_is_started_again_goes_on_with_what_it_began_and_with_nothing_older(
        dataset, tmp_path):
    args = [*SMALL, f'--dataset={dataset}', f'--out_dir={tmp_path / "out"}', '--checkpoint_interval=2',
            '--init_from=scratch']

    def attempt(number, job, fault=''):
        log = f'/tmp/torchelastic_x/none_{job}/attempt_{number}/0/error.json'
        codes, said = run_to_end(*args, fault=fault, TORCHELASTIC_RESTART_COUNT=str(number),
                                 TORCHELASTIC_RUN_ID='none', TORCHELASTIC_ERROR_FILE=log)
        return codes[0], said
    assert attempt(0, 'a', 'step@7=kill')[0] == -signal.SIGKILL and step_of(tmp_path / 'out') == 6
    code, said = attempt(1, 'a')
    assert (code == 0 and f'resuming {tmp_path}/out at step 6' in said
            and os.listdir(tmp_path) == ['out']), said
    code, said = attempt(1, 'b')  # another job, whose first attempt ended before it began
    assert code == 0 and 'resuming' not in said and sorted(os.listdir(tmp_path)) == ['out', 'out.old1'], said
    code, said = attempt(0, 'b')  # as it was told
    assert (code == 0 and 'resuming' not in said
            and sorted(os.listdir(tmp_path)) == ['out', 'out.old1', 'out.old2']), said


@pytest.mark.parametrize('how, ranks', [
    ('renamed', 2), ('made anew', 1), ('renamed and killed', 1), pytest.param('removed', 1, marks=SLOW)])
def test_a_job_that_is_started_again_begins_no_new_run_where_its_folder_was(dataset, tmp_path, how, ranks):
    out_dir, moved, job = tmp_path / 'out' / 'run', tmp_path / 'out' / 'moved', tmp_path / 'torchelastic_x'
    job.mkdir()
    args = [*SMALL, *LONG, f'--dataset={dataset}', f'--out_dir={out_dir}', '--checkpoint_interval=20']

    def attempt(number):
        return Processes(*args, ranks=ranks, TORCHELASTIC_RESTART_COUNT=str(number),
                         TORCHELASTIC_ERROR_FILE=f'{job}/attempt_{number}/0/error.json')
    first = attempt(0)
    assert first.wait_for('step 25/')
    if how == 'removed':
        shutil.rmtree(out_dir, ignore_errors=True)
        shutil.rmtree(out_dir, ignore_errors=True)  # a file may have been made in between
    else:
        os.rename(out_dir, moved)
    if how == 'renamed and killed':
        first.kill()
    codes, said = first.wait()
    assert codes == [-9 if 'killed' in how else 2] * ranks, said
    if how == 'made anew':
        out_dir.mkdir()
    codes, said = attempt(1).wait()
    assert codes == [2] * ranks and said.count('\n') == ranks and 'was renamed or removed' in said, said
    assert how == 'removed' or f'go on with --out_dir={moved}\n' in said
    assert os.listdir(out_dir) == [] if how == 'made anew' else not out_dir.exists()


def test_a_job_that_is_started_again_in_its_folder_goes_on(dataset, tmp_path):
    """Also behind a link, and where no checkpoint is there yet."""
    (tmp_path / 'disk').mkdir()
    (tmp_path / 'link').symlink_to('disk')
    args = [*SMALL, f'--dataset={dataset}', f'--out_dir={tmp_path / "link"}']
    more = {'TORCHELASTIC_ERROR_FILE': f'{tmp_path}/attempt_1/0/error.json'}
    assert run_to_end(*args, fault='step@3=kill', TORCHELASTIC_RESTART_COUNT='0', **more)[0] == [-9]
    assert json.loads((tmp_path / 'out_dir.json').read_text())
    for expected in ('step 1/', 'resuming'):
        codes, said = run_to_end(*args, TORCHELASTIC_RESTART_COUNT='1', **more)
        assert codes == [0] and expected in said, said


@pytest.mark.parametrize('more', [['--async_save'], ['--shard'],
                                  pytest.param(['--shard', '--async_save'], marks=SLOW)])
def test_a_folder_that_is_renamed_during_a_save_gets_it_whatever_the_ranks_hold(dataset, tmp_path, more):
    out_dir, moved = tmp_path / 'out' / 'run', tmp_path / 'out' / 'moved'
    processes = Processes(*SMALL, *LONG, f'--dataset={dataset}', f'--out_dir={out_dir}', *more,
                          '--checkpoint_interval=20', ranks=2, fault='save:optimizer@20=slow')
    end = time.monotonic() + 60
    while not list(out_dir.glob('step_00000020.tmp/optimizer.pt')) and time.monotonic() < end:
        time.sleep(0.005)
    os.rename(out_dir, moved)
    codes, said = processes.wait()
    assert codes == [2, 2] and said.count(f'go on with --out_dir={moved}\n') == 2, said
    assert os.listdir(tmp_path / 'out') == ['moved'] and 'Traceback' not in said
    steps = [int(name) for name in re.findall(r'step (\d+)/', said)]
    assert step_of(moved) >= max(steps) and not list(moved.glob('*.tmp'))


@pytest.mark.parametrize('is_there', [True, pytest.param(False, marks=SLOW)])
def test_of_two_jobs_of_two_ranks_in_one_folder_one_trains(dataset, tmp_path, is_there):
    args = [*SMALL, f'--dataset={dataset}', f'--out_dir={tmp_path / "out"}', '--max_iters=40',
            '--eval_interval=20']
    if is_there:
        assert run_to_end(*args, '--max_iters=20')[0] == [0]
    slow = ' '.join(f'step@{step}=slow' for step in range(5, 25))  # else one may end before the other begins
    jobs = [Processes(*args, f'--batch_size={rows}', *['--init_from=scratch'] * is_there, ranks=2, fault=slow)
            for rows in (2, 6)]
    ended = [job.wait() for job in jobs]
    codes = [codes for codes, _ in ended]
    assert sorted(codes) == [[0, 0], [2, 2]], ended
    won, lost = codes.index([0, 0]), codes.index([2, 2])
    lines = ended[lost][1].splitlines()
    assert len(lines) == 2 and all('another process is training in it' in line for line in lines), lines
    assert json.loads((tmp_path / 'out' / 'settings.json').read_text())['batch_size'] == (2, 6)[won]
    state = checkpoint.load_state(checkpoint.find(str(tmp_path / 'out')))
    assert state['settings']['batch_size'] == (2, 6)[won] and state['step'] == 40
    assert sorted(os.listdir(tmp_path)) == ['out', *['out.old1'] * is_there]


def test_a_rank_that_waits_to_say_its_line_is_ended_by_torchrun_without_another(tmp_path):
    code = "import configurator; print('begun', flush=True); configurator.run_main(main)"
    code = f"def main(): raise configurator.UserError('said by rank 0')\n{code}"
    rank = os.environ | {'RANK': '1', 'WORLD_SIZE': '2'}
    with subprocess.Popen([sys.executable, '-c', code], cwd=ROOT, stdout=subprocess.PIPE, text=True,
                          stderr=subprocess.PIPE, env=rank) as process:
        process.stdout.readline()
        time.sleep(0.5)
        process.terminate()
        assert process.communicate(timeout=30)[1] == '' and process.returncode == -signal.SIGTERM


def test_who_stops_a_run_from_scratch_is_told_how_it_goes_on(dataset, tmp_path):
    args = [*SMALL, f'--dataset={dataset}', f'--out_dir={tmp_path}', '--eval_interval=100',
            '--init_from=scratch']
    codes, said = run_to_end(*args, fault='step@5=term')
    assert (codes == [128 + signal.SIGTERM]
            and 'the same command without --init_from=scratch continues from there' in said), said
    codes, said = run_to_end(*args[:-1], fault='step@8=term')
    assert (codes == [128 + signal.SIGTERM] and '; the same command continues from there' in said
            and step_of(tmp_path) == 9), said


# --- drift ---

def test_weights_that_differ_between_ranks_stop_the_run_naming_rank_and_tensor(dataset, tmp_path):
    codes, said = run_to_end(*SMALL, f'--dataset={dataset}', f'--out_dir={tmp_path}', ranks=2,
                             fault='step@5/1=shift', constants={'features.scale.guard.INTERVAL': 4})
    assert (codes == [2, 2]
            and 'weights of rank 1 are not those of rank 0 after step 8 (wte.weight)' in said), said
    codes, said = run_to_end(*SMALL, f'--dataset={dataset}', f'--out_dir={tmp_path}2', ranks=2,
                             fault='step@5/1=shift')
    assert codes == [0, 0], said  # after ten steps there was no check: nobody notices


def test_other_data_or_settings_on_one_rank_are_noticed_before_the_first_step(dataset, tmp_path):
    write_dataset(tmp_path / 'a' / 'd', seed=1)
    write_dataset(tmp_path / 'b' / 'd', seed=2)
    for each, words in (([['--seed=1'], ['--seed=2']], 'seed=2 on rank 1, 1 on rank 0'),
                        ([[f'--dataset={dataset}'], [f'--dataset={tmp_path / "a" / "d"}']], 'dataset=')):
        codes, said = run_to_end(*SMALL, f'--dataset={dataset}', f'--out_dir={tmp_path / "out"}', ranks=2,
                                 each=each)
        assert codes == [2, 2] and words in said and not (tmp_path / 'out').exists(), said
    # each has its own copy
    codes, said = run_to_end(*SMALL, '--dataset=d', f'--out_dir={tmp_path / "out"}', ranks=2,
                             folders=[tmp_path / 'a', tmp_path / 'b'])
    assert (codes == [2, 2] and 'the files of rank 1 are not those of rank 0' in said
            and not (tmp_path / 'out').exists()), said


# --- an error outside of the steps ---

@pytest.mark.parametrize('ranks, fault, step, words, more', [
    (1, 'batch@33=eio', 33, 'some/file: Input/output error', []),
    pytest.param(1, 'val@40=eio', 40, 'some/file: Input/output error', ['--async_save'], marks=SLOW),
    (1, 'log@33=full', 33, 'log.jsonl: could not be written', []),
    pytest.param(1, 'val@40=memory', 40, 'out of memory: lower batch_size', [], marks=SLOW),
    pytest.param(2, 'batch@33/1=eio', 33, 'rank 1: some/file: Input/output error', [], marks=SLOW),
    (2, 'val@40/1=eio', 40, 'rank 1: some/file: Input/output error', []),
    (2, 'step@33/1=exit', 33, 'another rank has ended', []),
    pytest.param(2, 'val@40/1=memory', 40, 'another rank has ended', [], marks=SLOW),
    pytest.param(2, 'log@33=full', 33, 'log.jsonl: could not be written', [], marks=SLOW),
    (2, 'batch@33/1=eio', 33, 'rank 1: some/file: Input/output error', ['--shard']),
    pytest.param(2, 'val@40/1=eio', 40, 'rank 1: some/file: Input/output error', ['--shard'], marks=SLOW)])
def test_an_error_outside_of_the_steps_loses_none_of_them(dataset, tmp_path, ranks, fault, step, words, more):
    """And the run goes on bit for bit."""
    args = [*SMALL, *LONG, f'--dataset={dataset}', '--always_save_checkpoint=False', *more]
    codes, said = run_to_end(*args, '--eval_interval=20', f'--out_dir={tmp_path / "cut"}', ranks=ranks,
                             fault=fault)
    assert codes[0] == 2 and words in said and 'Traceback' not in said, said
    assert 'rank 1: rank 1' not in said, said
    assert f'saved after step {step}, because of an error' in said and step_of(tmp_path / 'cut') == step, said
    for name in ('cut', 'whole'):
        assert (run_to_end(*args, f'--max_iters={step + 3}', '--eval_interval=20',
                           f'--out_dir={tmp_path / name}', ranks=ranks)[0] == [0] * ranks)
    assert fingerprint(tmp_path / 'cut') == fingerprint(tmp_path / 'whole')
    if 'log' not in fault and 'memory' not in fault and 'exit' not in fault:
        assert read_log(tmp_path / 'cut') == read_log(tmp_path / 'whole')


@pytest.mark.parametrize('fault', ['log@33=full_once', 'log@40=full_twice'])
def test_a_record_that_was_not_written_at_first_is_in_the_log(dataset, tmp_path, fault):
    """The step that it is of is saved, and not made again. Step 40 has two, and is saved before both."""
    args = [*SMALL, *LONG, f'--dataset={dataset}', '--eval_interval=20']
    codes, said = run_to_end(*args, f'--out_dir={tmp_path / "cut"}', fault=fault)
    assert codes == [2] and 'log.jsonl: could not be written' in said, said
    assert step_of(tmp_path / 'cut') == int(fault[4:6])
    for name in ('cut', 'whole'):
        assert run_to_end(*args, '--max_iters=43', f'--out_dir={tmp_path / name}')[0] == [0]
    assert read_log(tmp_path / 'cut') == read_log(tmp_path / 'whole')


def test_the_log_of_a_run_whose_folder_was_renamed_has_all_records(dataset, tmp_path):
    """Also the one whose writing found that out: the step that it is of is saved in the new place."""
    args = [*SMALL, *LONG, f'--dataset={dataset}']
    processes = Processes(*args, f'--out_dir={tmp_path / "cut"}')
    assert processes.wait_for('step 20/')
    (tmp_path / 'cut').rename(tmp_path / 'new')
    codes, said = processes.wait()
    step = step_of(tmp_path / 'new')
    assert codes == [2] and step >= 20 and not (tmp_path / 'cut').exists(), said
    for name in ('new', 'whole'):
        assert run_to_end(*args, f'--max_iters={step + 3}', f'--out_dir={tmp_path / name}')[0] == [0]
    assert read_log(tmp_path / 'new') == read_log(tmp_path / 'whole')


def test_the_first_loss_after_a_rank_has_died_is_one_of_all_ranks(dataset, tmp_path):
    """The steps since the last line of the log are left out: the dead rank had a part of their losses."""
    args = [*SMALL, *LONG, f'--dataset={dataset}', '--log_interval=10']
    codes, said = run_to_end(*args, f'--out_dir={tmp_path / "cut"}', ranks=2, fault='step@38/1=exit')
    assert 'saved after step 38, because of an error' in said, said
    for name in ('cut', 'whole'):
        assert run_to_end(*args, '--max_iters=40', f'--out_dir={tmp_path / name}', ranks=2)[0] == [0, 0]
    ours, theirs = ({record['step']: record for record in read_log(tmp_path / name) if 'lr' in record}
                    for name in ('cut', 'whole'))
    assert ours[30] == theirs[30] and ours[40]['grad_norm'] == theirs[40]['grad_norm']
    assert ours[40]['train_loss'] == pytest.approx(theirs[40]['train_loss'], rel=0.2)
