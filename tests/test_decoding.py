"""experiments/decoding.py: the arms take turns on one text; a peer that cannot run is named and left out."""
import pytest
from conftest import one_line, run
from test_hub import saved

from experiments import decoding
from features.hf.tokenizer_json import to_json
from tokenizer import ByteTokenizer

pytestmark = pytest.mark.full  # a process for each arm


def test_arms_write_the_same_text_and_missing_peers_are_named(tmp_path):
    folder = saved(tmp_path / 'hf', 'llama', vocab_size=300)
    (tmp_path / 'hf' / 'tokenizer.json').write_text(to_json(ByteTokenizer()))
    args = ['experiments/decoding.py', f'--init_from=hf:{folder}', '--tokens=5', '--rounds=2', '--prompt=abc',
            f'--work={tmp_path}/work']
    done = run(*args, '--arms=minnow float32', '--arms=minnow int8', '--arms=transformers float32',
               '--arms=llama.cpp Q8_0')
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    ours = [line for line in lines if line[:2] == ['minnow', 'float32']]
    assert float(ours[0][2]) > 0 and ours[-1][-1] == '5'  # tokens/s; tokens that are equal
    assert {'minnow int8', 'transformers float32'} <= {' '.join(line[:2]) for line in lines}
    assert 'left out' in done.stdout and 'llama.cpp Q8_0' in done.stdout
    assert 'arms=minnow int3' in one_line(run(*args, '--arms=minnow int3'))


def test_rows_and_long_prompts(tmp_path):
    folder = saved(tmp_path / 'hf', 'llama', vocab_size=300)
    (tmp_path / 'hf' / 'tokenizer.json').write_text(to_json(ByteTokenizer()))
    done = run('experiments/decoding.py', f'--init_from=hf:{folder}', '--tokens=3', '--rounds=1',
               '--prompt=abc', '--rows=2', '--prompt_tokens=7', f'--work={tmp_path}/work',
               '--arms=minnow int4', '--arms=transformers float32')
    assert done.returncode == 0 and '3 tokens after 7, 2 row(s)' in done.stdout, done.stdout + done.stderr


def test_equal_tokens_are_counted_up_to_the_first_that_differs():
    assert decoding.equal([1, 2, 3, 4], [1, 2, 4, 4]) == 2
    assert decoding.equal([1, 2], [1, 2]) == 2
