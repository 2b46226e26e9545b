"""
The loss does not hold the logits: peak memory of a step against plain cross-entropy, each in its own process.
"""
import pytest
import torch

from features.study.bench_train import step_memory


@pytest.mark.full
def test_a_step_takes_half_the_memory_of_plain_cross_entropy():
    sizes = {'n_layer': 1, 'n_head': 2, 'n_embd': 64, 'block_size': 512, 'batch_size': 8, 'vocab_size': 32768}
    ours, plain = (step_memory(kind, sizes, torch.device('cpu'), dtype='float32')
                   for kind in ('ours', 'ours with F.cross_entropy'))
    assert (abs(ours['loss'] - plain['loss']) < 1e-4
            and ours['peak memory, MiB'] < plain['peak memory, MiB'] / 2)
