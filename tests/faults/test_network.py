"""
Two hosts, network namespaces on this machine, one of which is cut off from the other while they train. Takes
root and iproute2, or it is skipped.
"""
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT
from processes import SMALL, fingerprint, run_to_end

ADDRESSES = ['10.77.0.1', '10.77.0.2']
TORCHRUN = [sys.executable, '-m', 'torch.distributed.run', '--nnodes=2', '--nproc_per_node=1',
            '--rdzv_backend=c10d', f'--rdzv_endpoint={ADDRESSES[0]}:29500',
            '--rdzv_id=1', '--max_restarts=3', 'train.py']


class Host:
    """A network namespace with an end of a cable, and the torchrun in it."""

    def __init__(self, number, folder):
        self.number, self.name, self.output = (number, f'minnow{os.getpid()}-{number}',
                                               Path(folder, f'host{number}.txt'))
        self.torchrun = None

    def plug_in(self):
        for args in (['addr', 'add', f'{ADDRESSES[self.number]}/24', 'dev', 'cable'],
                     ['link', 'set', 'lo', 'up'], ['link', 'set', 'cable', 'up']):
            subprocess.run(['ip', '-n', self.name, *args], check=True)

    def start(self, args):
        """
        What each host of a cluster is to run. The first offers the meeting place; torchrun would find that
        out by names, which there are none of here.
        """
        command = [*TORCHRUN[:-1], f'--local_addr={ADDRESSES[self.number]}',
                   f'--rdzv_conf=is_host={1 - self.number}', TORCHRUN[-1], *args]
        environment = os.environ | {'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': '',
                                    'GLOO_SOCKET_IFNAME': 'cable', 'TORCH_DISABLE_SHARE_RDZV_TCP_STORE': '1'}
        with open(self.output, 'a') as f:
            self.torchrun = subprocess.Popen(['ip', 'netns', 'exec', self.name, *command], cwd=ROOT,
                                             env=environment, stdout=f, stderr=f)

    def cable(self, state):
        subprocess.run(['ip', '-n', self.name, 'link', 'set', 'cable', state], check=True)

    def processes(self):
        return [int(pid) for pid in subprocess.run(['ip', 'netns', 'pids', self.name], capture_output=True,
                                                   text=True).stdout.split()]

    def power_off(self):
        for pid in self.processes():
            os.kill(pid, signal.SIGKILL)
        if self.torchrun:
            self.torchrun.wait()

    def said(self):
        return self.output.read_text() if self.output.exists() else ''


@pytest.fixture
def hosts(tmp_path):
    pair = [Host(n, tmp_path) for n in range(2)]
    if not shutil.which('ip') or any(subprocess.run(['ip', 'netns', 'add', host.name],
                                                    capture_output=True).returncode for host in pair):
        pytest.skip('no network namespaces here')
    try:
        subprocess.run(['ip', 'link', 'add', 'cable', 'netns', pair[0].name, 'type', 'veth', 'peer', 'name',
                        'cable', 'netns', pair[1].name], check=True)
        for host in pair:
            host.plug_in()
        yield pair
    finally:
        for host in pair:
            host.power_off()
            subprocess.run(['ip', 'netns', 'delete', host.name])


def wait_for(condition, seconds):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


def args_of(dataset, out_dir):
    return [*SMALL, f'--dataset={dataset}', f'--out_dir={out_dir}', '--max_iters=400', '--eval_interval=400',
            '--checkpoint_interval=20', '--hang_timeout=10']


@pytest.mark.slow
@pytest.mark.parametrize('how', ['switched off', 'cut off'])
def test_a_host_that_was_cut_off_and_started_again_finds_the_run_going_on(dataset, tmp_path, hosts, how):
    """
    The other notices, ends its process, waits; with the host that is back it goes on from the newest
    checkpoint to the end of a run nobody disturbed.
    """
    first, second = hosts
    for host in hosts:
        host.start(args_of(dataset, tmp_path / 'out'))
    assert wait_for(lambda: 'step 100/' in first.said() + second.said(), 90), first.said() + second.said()
    second.cable('down')
    if how == 'switched off':
        second.power_off()
    for host in hosts[:1 if how == 'switched off' else 2]:  # what is alive does not wait for ever
        assert wait_for(lambda: 'no progress for hang_timeout=10 seconds' in host.said(), 60), host.said()
    second.power_off()
    second.cable('up')
    second.start(args_of(dataset, tmp_path / 'out'))
    assert [host.torchrun.wait(120) for host in hosts] == [0, 0], first.said() + second.said()
    assert 'resuming' in first.said() + second.said()
    assert run_to_end(*args_of(dataset, tmp_path / 'whole'), ranks=2)[0] == [0, 0]
    assert fingerprint(tmp_path / 'out') == fingerprint(tmp_path / 'whole')
