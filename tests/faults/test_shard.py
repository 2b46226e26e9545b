"""
Sharded training (FSDP2) is the same training: the losses of DDP to rounding, and checkpoints that any number
of processes reads, sharded or not.
"""
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, one_line, read_log, train
from processes import SMALL, fingerprint, run_to_end

import checkpoint
from features.networks import load_model

ARGS = [*SMALL, '--warmup_iters=0', '--lr_decay_iters=10', '--batch_size=1',
        '--gradient_accumulation_steps=4']


def near(one, other, most=1e-5):
    """
    Whether two logs have the same steps and the same losses to `most`, norms of the gradient to ten times
    that: these round further apart.
    """
    places = {'train_loss': most, 'val_loss': most, 'grad_norm': 10 * most}
    if [r['step'] for r in one] != [r['step'] for r in other]:
        return False
    return all(abs(a[name] - b[name]) < place for a, b in zip(one, other)
               for name, place in places.items() if name in a)


def finish(folder, dataset, *args, ranks=2):
    codes, said = run_to_end(*ARGS, f'--dataset={dataset}', f'--out_dir={folder}', *args, ranks=ranks,
                             constants={'features.scale.guard.INTERVAL': 3})
    assert codes == [0] * ranks, said
    return said


@pytest.mark.parametrize('args', [
    ['--value_residual', '--bias', '--norm=layernorm'], ['--optimizer=muon', '--rank_mlp=8'],
    ['--n_expert=4', '--expert_aux=0.01', '--expert_bias=0.001', '--shared_width=24', '--shared_gate=True',
     '--dense_layers=[0]'],
    ['--tie', '--recompute', '--sample_tokens=5']],
                         ids=['scalars and biases', 'muon', 'experts', 'tied, recomputed, sampled'])
def test_sharded_over_two_ranks_is_one_process_to_rounding(dataset, tmp_path, args):
    finish(tmp_path / 'sharded', dataset, *args, '--shard')
    finish(tmp_path / 'one', dataset, *args, ranks=1)
    assert near(read_log(tmp_path / 'sharded'), read_log(tmp_path / 'one'),
                1e-4 if 'muon' in args[0] else 1e-5)
    ours, theirs = (checkpoint.read_weights(checkpoint.find(str(tmp_path / name)))
                    for name in ('sharded', 'one'))
    assert {name: t.shape for name, t in ours.items()} == {name: t.shape for name, t in theirs.items()}


@pytest.mark.parametrize('ranks, shard', [(1, False), (4, True), *(
    pytest.param(*case, marks=pytest.mark.slow) for case in ((2, True), (2, False), (4, 2)))])
def test_saved_on_two_ranks_it_goes_on_on_one_or_four_or_under_ddp(dataset, tmp_path, ranks, shard):
    """
    With the same bits: a step whose rate is 0 later they are what they were. And with the losses of a run
    that was not cut, to rounding.
    """
    finish(tmp_path / 'first', dataset, '--shard', '--max_iters=5')
    finish(tmp_path / 'whole', dataset, '--shard')
    still = ['--max_iters=6', '--learning_rate=0', '--min_lr=0']
    for name, args in (('still', still), ('on', [])):
        shutil.copytree(tmp_path / 'first', tmp_path / name)
        finish(tmp_path / name, dataset, f'--shard={shard}', *args, ranks=ranks)
    still, first = (checkpoint.read_weights(checkpoint.find(str(tmp_path / name)))
                    for name in ('still', 'first'))
    assert all(torch.equal(still[key], first[key]) for key in first) and still.keys() == first.keys()
    assert near(read_log(tmp_path / 'on'), read_log(tmp_path / 'whole'))
    if (ranks, shard) == (2, True):
        assert fingerprint(tmp_path / 'on') == fingerprint(tmp_path / 'whole')


def test_one_process_reads_what_a_sharded_run_wrote_in_the_background(dataset, tmp_path):
    finish(tmp_path, dataset, '--shard', '--async_save')
    loss = [r['val_loss'] for r in read_log(tmp_path) if 'val_loss' in r][-1]
    assert f'val_loss {loss:.4f}' in train(tmp_path, *ARGS, '--eval_only', dataset=dataset).stdout
    assert load_model(str(tmp_path))[0](torch.zeros(1, 4, dtype=torch.int64)).isfinite().all()


def test_adapters_train_beside_a_sharded_base(dataset, tmp_path):
    train(tmp_path / 'base', *SMALL, dataset=dataset)
    for name, shard, ranks in (('sharded', True, 2), ('one', False, 1)):
        finish(tmp_path / name, dataset, f'--init_from={tmp_path / "base"}', '--lora_rank=4',
               f'--shard={shard}', ranks=ranks)
    assert near(read_log(tmp_path / 'sharded'), read_log(tmp_path / 'one'))


START = """
import sys
sys.path.insert(0, {root!r})
import train
from configurator import run_main
describe = train.describe
def say(s, run, ranks):
    with open('/proc/self/status') as f:
        peak = next(line.split()[1] for line in f if line.startswith('VmHWM'))
    with open(f'{folder}/peak{{ranks.rank}}', 'w') as f:  # two ranks' prints can run into one line
        f.write(peak)
    describe(s, run, ranks)
train.describe = say
run_main(train.main)
"""


@pytest.mark.slow
def test_only_rank_0_holds_the_whole_network_and_its_moments_at_the_start(dataset, tmp_path):
    (tmp_path / 'start.py').write_text(START.format(root=str(ROOT), folder=tmp_path))
    size = 4 * 12 * 512 ** 2 * 8 / 1e3  # kB of 8 blocks
    args = ['--n_layer=8', '--n_embd=512', '--n_head=4', '--block_size=8', '--batch_size=1',
            '--gradient_accumulation_steps=2', '--eval_iters=1', '--device=cpu', '--dtype=float32',
            '--compile=False', '--shard', f'--dataset={dataset}', f'--out_dir={tmp_path / "out"}']
    for iters, times in ((1, 1), (2, 3)):  # the weights, and with the two moments of a run that goes on
        done = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone',
                               '--nproc_per_node=2', tmp_path / 'start.py', *args, f'--max_iters={iters}'],
                              cwd=ROOT, env=os.environ | {'OMP_NUM_THREADS': '1'}, capture_output=True,
                              text=True)
        assert done.returncode == 0, done.stderr
        peaks = [int((tmp_path / f'peak{rank}').read_text()) for rank in (0, 1)]  # kB
        assert peaks[0] - peaks[1] > 0.6 * times * size, (peaks, size)


def test_bfloat16_is_near_ddp(dataset, tmp_path):
    for name, shard in (('sharded', True), ('ddp', False)):
        finish(tmp_path / name, dataset, '--dtype=bfloat16', f'--shard={shard}')
    assert near(read_log(tmp_path / 'sharded'), read_log(tmp_path / 'ddp'), 0.02)


def test_a_rank_with_an_inf_gradient_and_a_signal_to_one_rank_are_seen_by_all(dataset, tmp_path):
    said = [run_to_end(*ARGS, f'--dataset={dataset}', f'--out_dir={tmp_path / name}',
                       '--shard', '--sample_tokens=5', ranks=2, fault=fault)
            for name, fault in (('inf', 'loss@6/1=inf'), ('term', 'evaluation@5/1=term'))]
    assert said[0][0] == [0, 0] and said[0][1].count('no weight was changed') == 1, said[0][1]
    assert said[1][0] == [143, 143] and 'after step 5;' in said[1][1], said[1][1]


@pytest.mark.parametrize('args, words', [
    (['--shard=3'], 'shard=3'), (['--shard', '--grow_every=5', '--grow_to=4'], 'grow_every')])
def test_what_cannot_be_sharded_is_refused_in_one_line(dataset, tmp_path, args, words):
    codes, said = run_to_end(*ARGS, f'--dataset={dataset}', f'--out_dir={tmp_path / "out"}', *args, ranks=2)
    assert (codes == [2, 2] and words in said and 'Traceback' not in said
            and not (tmp_path / 'out').exists()), said
    assert 'shard=True' in one_line(train(tmp_path / 'out', '--shard', dataset=dataset, check=False))


@pytest.mark.slow
def test_compiled_blocks_are_the_same(dataset, tmp_path):
    for name, compile in (('compiled', True), ('plain', False)):
        # a compiler draws other zeros
        finish(tmp_path / name, dataset, '--shard', '--dropout=0', f'--compile={compile}')
    assert near(read_log(tmp_path / 'compiled'), read_log(tmp_path / 'plain'))
