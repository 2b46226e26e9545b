"""
The files in launch/ are short, can be read by those they are for, give torchrun flags it has, and run as far
as one machine without GPUs can.
"""
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, TINY

import checkpoint
from configurator import configure
from train import Settings

LAUNCH = sorted((ROOT / 'launch').iterdir())
SMALL = [*TINY, '--batch_size=4']


def test_they_are_three_and_short():
    assert ([path.name for path in LAUNCH] == ['sky.yaml', 'slurm.sbatch', 'trainjob.yaml']
            and all(len(path.read_text().splitlines()) <= 40 for path in LAUNCH))


def test_bash_and_yaml_can_read_them():
    subprocess.run(['bash', '-n', ROOT / 'launch/slurm.sbatch'], check=True)
    sky, job = (yaml.safe_load((ROOT / 'launch' / name).read_text())
                for name in ('sky.yaml', 'trainjob.yaml'))
    assert (sky['num_nodes'] == 2 and job['kind'] == 'TrainJob'
            and job['spec']['runtimeRef'] == {'name': 'torch-distributed'})
    subprocess.run(['bash', '-n'], input=sky['run'], text=True, check=True)


def test_their_settings_are_some_that_a_job_can_be_started_again_with():
    """
    A config that is there, a data set, an out_dir on the disk that all share, and no --init_from=scratch,
    which begins anew.
    """
    sky, job = (yaml.safe_load((ROOT / 'launch' / name).read_text())
                for name in ('sky.yaml', 'trainjob.yaml'))
    sky_args = f'{sky["envs"]["ARGS"]} {sky["run"].split("$ARGS")[1]}'.split()
    for args in (sky_args, job['spec']['trainer']['args']):
        s = configure(Settings, args)
        assert s.out_dir == '/runs/out' and s.dataset.startswith('/runs/') and s.init_from == 'auto'
    slurm = (ROOT / 'launch/slurm.sbatch').read_text()
    assert (configure(Settings, re.search(r'sbatch launch/slurm.sbatch (.*)', slurm)[1].split())
            .out_dir.startswith('/shared/'))


def test_torchrun_has_the_flags_they_give_it():
    known = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--help'], capture_output=True,
                           text=True, check=True).stdout
    for path in LAUNCH:
        flags = set(re.findall(
            r'--(?:nnodes|nproc_per_node|node_rank|master_\w+|rdzv_\w+|max_restarts|shutdown_timeout)',
            path.read_text()))
        assert ({'--max_restarts', '--shutdown_timeout'} <= flags
                and all(flag in known for flag in flags)), path


@pytest.fixture
def machine(tmp_path):
    """The environment of a process on a machine without GPUs whose `torchrun` is ours, and a free port."""
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    bins = tmp_path / 'bin'
    bins.mkdir()
    (bins / 'torchrun').write_text('#!/usr/bin/env bash\n'
                                   f'exec {sys.executable} -m torch.distributed.run "$@"\n')
    (bins / 'srun').write_text('#!/usr/bin/env bash\nexec "$@"\n')
    (bins / 'scontrol').write_text('#!/usr/bin/env bash\n[ "$1" = show ] && echo 127.0.0.1 || echo "$@" >> '
                                   f'{tmp_path}/scontrol.log\n')
    (bins / 'scancel').write_text('#!/usr/bin/env bash\nkill -TERM $(pgrep -P $PPID -f distributed.run)\n')
    for script in bins.iterdir():
        script.chmod(0o755)
    return os.environ | {'PATH': f'{bins}:{os.environ["PATH"]}', 'OMP_NUM_THREADS': '1',
                         'CUDA_VISIBLE_DEVICES': ''}, port


def start(command, env, **options):
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            text=True, start_new_session=True, **options)


@pytest.mark.slow
def test_slurm_a_job_that_is_told_to_stop_saves_and_queues_again(machine, dataset, tmp_path):
    env, port = machine
    script = (ROOT / 'launch/slurm.sbatch').read_text().replace(':29500', f':{port}').replace(
        'nproc_per_node=auto', 'nproc_per_node=2')
    (tmp_path / 'job').write_text(script)
    env |= {'SLURM_SUBMIT_DIR': str(ROOT), 'SLURM_JOB_NODELIST': 'here', 'SLURM_JOB_NUM_NODES': '1',
            'SLURM_JOB_ID': '7'}
    command = ['bash', tmp_path / 'job', *SMALL, f'--dataset={dataset}', f'--out_dir={tmp_path / "out"}',
               '--eval_interval=100000']
    job, said = start([*command, '--max_iters=100000'], env), ''
    for line in job.stdout:
        said += line
        if line.startswith('step 20/'):
            os.kill(job.pid, signal.SIGTERM)  # to the batch script alone, as --signal=B: does
    assert job.wait(120) == 0 and said.count('stopped by SIGTERM') == 1, said
    assert (tmp_path / 'scontrol.log').read_text() == 'requeue 7\n'
    step = int(checkpoint.find(str(tmp_path / 'out'))[-8:])
    again = start([*command, f'--max_iters={step + 5}'], env)
    said = again.communicate(timeout=120)[0]
    assert again.returncode == 0 and f'resuming {tmp_path}/out at step {step}' in said, said


@pytest.mark.slow
@pytest.mark.parametrize('name', ['sky', 'trainjob'])
def test_two_nodes_of_the_others_meet(machine, dataset, tmp_path, name):
    (env, port), settings = machine, [*SMALL, f'--dataset={dataset}']
    file = yaml.safe_load((ROOT / f'launch/{name}.yaml').read_text().replace('/runs/', f'{tmp_path}/')
                          .replace('29500', str(port)))
    nodes = []
    for rank in range(2):
        if name == 'sky':
            own = {'SKYPILOT_NODE_IPS': '127.0.0.1\n127.0.0.1', 'SKYPILOT_NUM_NODES': '2',
                   'SKYPILOT_NUM_GPUS_PER_NODE': '1', 'SKYPILOT_NODE_RANK': str(rank),
                   'ARGS': ' '.join(settings)}
            nodes.append(start(['bash', '-c', file['run']], env | own))
        else:
            trainer = file['spec']['trainer']
            own = {'PET_NNODES': '2', 'PET_NPROC_PER_NODE': '1', 'PET_NODE_RANK': str(rank),
                   'PET_MASTER_ADDR': '127.0.0.1', 'PET_MASTER_PORT': str(port)}
            args = [arg for arg in trainer['args'] if not arg.startswith(('config', '--dataset', '--device'))]
            nodes.append(start([*trainer['command'], *settings, *args],
                               env | own | {entry['name']: entry['value'] for entry in trainer['env']}))
        time.sleep(0.2)
    said = [node.communicate(timeout=150)[0] for node in nodes]
    assert ([node.returncode for node in nodes] == [0, 0]
            and sum('processes: 2' in text for text in said) == 1), said
    assert Path(checkpoint.find(f'{tmp_path}/out')).name == 'step_00000010'
