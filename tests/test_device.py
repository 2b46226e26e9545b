"""The machine, as far as a CPU can show it."""
import pytest
import torch

import configurator
from configurator import UserError
from features.sizes import is_out_of_memory
from model import autocast


def test_bfloat16_is_taken_on_a_cpu_only_where_a_matmul_is_faster(monkeypatch):
    cpu = torch.device('cpu')
    # emulated bf16 can be 100 times slower
    for speed, choice in ((0.01, 'float32'), (1.2, 'float32'), (4.0, 'bfloat16')):
        monkeypatch.setattr(configurator, 'matmul_flops',
                            lambda d, dtype, n=512, speed=speed: speed if dtype == torch.bfloat16 else 1.0)
        assert configurator.pick_dtype('auto', cpu) == choice
        assert configurator.pick_dtype('float32', cpu) == 'float32'


def test_what_rounding_would_change_is_in_float32_unless_another_dtype_is_asked_for(monkeypatch):
    cpu, speeds = torch.device('cpu'), {torch.bfloat16: 4.0, torch.float32: 1.0}
    monkeypatch.setattr(configurator, 'matmul_flops', lambda d, dtype: speeds[dtype])
    torch.set_float32_matmul_precision('high')
    assert configurator.pick_exact_dtype('bfloat16', cpu) == 'bfloat16'
    assert torch.get_float32_matmul_precision() == 'high'
    assert configurator.pick_exact_dtype('auto', cpu) == 'float32'
    assert torch.get_float32_matmul_precision() == 'highest'


def test_who_asks_for_bfloat16_where_it_is_slow_is_told(monkeypatch, capsys):
    for speed, said in ((0.01, 'dtype=bfloat16: 100 times slower than float32 on this CPU'), (0.8, '')):
        monkeypatch.setattr(configurator, 'matmul_flops',
                            lambda d, dtype, n=512, speed=speed: speed if dtype == torch.bfloat16 else 1.0)
        assert configurator.pick_dtype('bfloat16', torch.device('cpu')) == 'bfloat16'
        out = capsys.readouterr().out
        assert out.startswith(said) and bool(out) == bool(said)


def test_the_matmul_is_really_timed():
    assert 1e8 < configurator.matmul_flops(torch.device('cpu'), torch.float32) < 1e14


def test_autocast_multiplies_in_the_dtype():
    a = torch.ones(4, 4)
    for name in ('float32', 'bfloat16'):
        with autocast(torch.device('cpu'), name):
            assert (a @ a).dtype == getattr(torch, name)


def test_without_a_compiler_training_goes_on(monkeypatch, capsys):
    monkeypatch.setattr(configurator.shutil, 'which', lambda name: None)
    assert (configurator.pick_compile(True, torch.device('cpu')) is False
            and 'no C++ compiler' in capsys.readouterr().out)
    assert configurator.pick_compile('auto', torch.device('cpu')) is False


@pytest.mark.parametrize('name', ['tpu', 'cuda:x', 'cpu:1', 'cuda:99'])
def test_a_device_that_is_not_there_is_named(name):
    with pytest.raises(UserError, match=f'device={name}'):
        configurator.pick_device(name)


@pytest.mark.parametrize('error, is_it', [
    (MemoryError(), True), (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), True),
    (torch.OutOfMemoryError('CUDA out of memory.'), True), (RuntimeError('shape mismatch'), False)])
def test_out_of_memory_is_told_from_other_errors(error, is_it):
    assert is_out_of_memory(error) is is_it
