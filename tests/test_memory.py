"""The loss does not hold the logits: peak memory of a step against plain cross-entropy, each in its own process."""
import re

from conftest import run


def peak(kind, config):
    done = run('tests/step_memory.py', kind, config, 8, 32768)
    assert done.returncode == 0, done.stderr
    loss, total = re.search(r'loss ([\d.]+), peak (\d+) MiB', done.stdout).groups()
    return float(loss), int(total)


def test_a_step_takes_half_the_memory_of_plain_cross_entropy(tmp_path):
    (tmp_path / 'c.py').write_text("n_layer, n_head, n_embd, block_size, dtype = 1, 2, 64, 512, 'float32'\n")
    (ours, ours_peak), (plain, plain_peak) = peak('chunked', tmp_path / 'c.py'), peak('plain', tmp_path / 'c.py')
    assert abs(ours - plain) < 1e-4 and ours_peak < plain_peak / 2
