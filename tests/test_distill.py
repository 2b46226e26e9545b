"""
Distillation: loss and gradient are those of the definition, in chunks or at once; a run learns from its
teacher and says which it cannot have.
"""
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, TINY, one_line, read_log, train, write_dataset
from test_surgery import random_model

import checkpoint
import model as model_module
from features import build
from features.distill.teacher import ask
from train import Settings

MIX = 0.3
V = 50


def batch():
    torch.manual_seed(1)
    x, y = torch.randint(V, (2, 2, 32))
    return x, y.masked_fill(torch.rand(2, 32) < 0.2, -1)


def network(**settings):
    model = random_model(**dict(vocab_size=V) | settings)
    for p in (model.wte.weight, *([] if model.head is None else [model.head.weight])):
        p.data = torch.randn(p.shape)
    return model


def by_definition(student, teacher):
    """(1 - mix)·CE + mix·KL(teacher ‖ student), the mean over the targets that count."""
    x, y = batch()
    real = y >= 0
    z, t = student(x)[real], teacher(x)[real].detach()
    kl = F.kl_div(z.log_softmax(-1), t.log_softmax(-1), log_target=True, reduction='batchmean')
    return (1 - MIX) * F.cross_entropy(z, y[real]) + MIX * kl


def in_chunks(student, teacher, mix=MIX):
    x, y = batch()
    return student(x, y, teacher=ask(teacher, x, build(Settings, distill_mix=mix)))


# all at once; 20 rows at a time, of which 7
@pytest.mark.parametrize('chunk, block', [(2 ** 25, 2 ** 20), (64 * 20, 64 * 7)])
@pytest.mark.parametrize('student, teacher', [
    (dict(), dict(n_layer=3, n_embd=64, n_head=4)), (dict(softcap=4.0, tie=False), dict(softcap=9.0)),
    (dict(rank_embed=8, rank_head=8), dict(rank_head=8, tie=False))], ids=str)
def test_loss_and_gradient_are_those_of_the_definition(student, teacher, chunk, block, monkeypatch):
    monkeypatch.setattr(model_module, 'CHUNK', chunk)
    monkeypatch.setattr(model_module, 'BLOCK', block)
    student, teacher = network(**student), network(**teacher)
    weights = list(student.parameters())
    losses = by_definition(student, teacher), in_chunks(student, teacher)
    assert torch.isclose(*losses, rtol=1e-5) and losses[0] > 2
    for a, b in zip(*(torch.autograd.grad(loss, weights) for loss in losses)):
        torch.testing.assert_close(a[:V], b[:V], rtol=1e-3, atol=1e-5)


def test_from_itself_there_is_nothing_to_learn():
    model = network()
    loss = in_chunks(model, model, mix=1.0)
    assert (abs(loss) < 1e-6
            and max(g.abs().max() for g in torch.autograd.grad(loss, list(model.parameters()))) < 1e-6)


def test_a_student_follows_its_teacher(dataset, tmp_path):
    train(tmp_path / 'teacher', '--n_layer=3', '--max_iters=150', '--eval_interval=150', dataset=dataset)
    for name, args in [('alone', []), ('taught', [f'--teacher={tmp_path}/teacher', '--distill_mix=0.9'])]:
        train(tmp_path / name, '--max_iters=40', '--eval_interval=40', *args, dataset=dataset)
    alone, taught = (read_log(tmp_path / name) for name in ('alone', 'taught'))
    assert taught[-1]['flops'] > 1.2 * alone[-1]['flops']  # the teacher's forward pass costs
    assert (taught[1]['train_loss'] != alone[1]['train_loss']
            and taught[-1]['val_loss'] != alone[-1]['val_loss'])
    for name, steps in [('parts', 20), ('parts', 40), ('whole', 40)]:
        train(tmp_path / name, f'--max_iters={steps}', '--eval_interval=20', '--lr_decay_iters=40',
              '--warmup_iters=2', f'--teacher={tmp_path}/teacher', dataset=dataset)
    assert read_log(tmp_path / 'parts')[-1] == read_log(tmp_path / 'whole')[-1]  # resumed


def test_two_ranks_and_their_teacher(dataset, tmp_path):
    train(tmp_path / 'teacher', dataset=dataset)
    for nproc in (1, 2):
        train(tmp_path / str(nproc), f'--teacher={tmp_path}/teacher', dataset=dataset, nproc=nproc)
    for a, b in zip(*(read_log(tmp_path / str(nproc)) for nproc in (1, 2))):
        assert a == pytest.approx(b, rel=1e-4)


def test_files_that_are_cut_in_the_middle_lose_no_step(dataset, tmp_path):
    """Those of the data, and those of the teacher, which no longer matter."""
    train(tmp_path / 'teacher', dataset=dataset)
    shutil.copytree(dataset, tmp_path / 'data')
    args = ['train.py', *TINY, f'--dataset={tmp_path}/data', f'--teacher={tmp_path}/teacher',
            '--max_iters=100000', '--eval_interval=100000', f'--out_dir={tmp_path}/out']
    with subprocess.Popen([sys.executable, *args], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          text=True) as process:
        for line in process.stdout:
            if line.startswith('step 5/'):
                for path in (tmp_path / 'teacher').glob('step_*/model.safetensors'):
                    os.truncate(path, 10)
            if line.startswith('step 25/'):
                for path in (tmp_path / 'data').glob('train*.bin'):
                    os.truncate(path, 10)
                break
        said, problem = process.communicate(timeout=120)
    assert process.returncode == 2 and problem.count('\n') == 1 and '.bin: ' in problem, problem
    step = int(re.search(r'saved after step (\d+), because of an error', said)[1])
    assert step >= 25 and checkpoint.find(str(tmp_path / 'out')).endswith(f'step_{step:08d}')


def test_a_teacher_that_cannot_be_had_is_one_line(dataset, tmp_path):
    train(tmp_path / 'teacher', dataset=dataset)
    write_dataset(tmp_path / 'other', vocab_size=70)
    for args, data, words in [([], tmp_path / 'other', 'its 64 tokens are not the 70 of this run'),
                              (['--block_size=64'], dataset, 'knows 32 positions'),
                              (['--distill_mix=0'], dataset, 'takes 0 < distill_mix <= 1'),
                              (['--arch=markov'], dataset, 'goes with arch=decoder alone, not markov')]:
        assert words in one_line(train(tmp_path / 'no', f'--teacher={tmp_path}/teacher', *args, dataset=data,
                                       check=False))
    assert ('belongs to distillation: set teacher too'
            in one_line(train(tmp_path / 'no', '--distill_mix=0.9', dataset=dataset, check=False)))
    assert 'no such directory' in one_line(train(tmp_path / 'no', f'--teacher={tmp_path}/nowhere',
                                                 dataset=dataset, check=False))
    assert not (tmp_path / 'no').exists()
    done = train(tmp_path / 'teacher', f'--teacher={tmp_path}/./teacher/', dataset=dataset, check=False)
    assert 'is the out_dir of this run' in one_line(done)
