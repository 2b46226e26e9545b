"""bench.py race: the same text for all, the same evaluator, as many steps as fit into the time."""
import json
import math

import pytest
import torch
import torch.nn.functional as F

from bench import Settings, parts_of
from configurator import UserError, configure
from features.study import bench_race

# A nanoGPT and a nanochat that learn nothing: all tokens stay equally likely, so that the score is known
NANOGPT = {
    'config/train_shakespeare_char.py': '',
    'model.py': '''
from dataclasses import dataclass
import torch

@dataclass
class GPTConfig:
    n_layer: int
    n_head: int
    n_embd: int
    block_size: int
    vocab_size: int
    dropout: float
    bias: bool

class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.table = torch.nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, x, y):
        assert x.shape[1] <= self.config.block_size
        return self.table.expand(*x.shape, -1), None
''',
    'train.py': '''
import os, pickle, sys, time
import torch
from model import GPT, GPTConfig
torch.manual_seed(1337)
given = dict(text[2:].split('=') for text in sys.argv[2:])
args = {key: int(given[key]) for key in ('n_layer', 'n_head', 'n_embd', 'block_size')}
with open(os.path.join('data', given['dataset'], 'meta.pkl'), 'rb') as f:
    args['vocab_size'] = pickle.load(f)['vocab_size']
for split in ('train', 'val'):
    assert os.path.getsize(os.path.join('data', given['dataset'], split + '.bin')) > 100
model = GPT(GPTConfig(**args, dropout=0.0, bias=False))
for step in range(int(given['max_iters'])):
    time.sleep(0.002)
    print(f'iter {step}: loss 1.0000, time 2.00ms, mfu 0.00%')
os.makedirs(given['out_dir'], exist_ok=True)
torch.save({'model': model.state_dict(), 'model_args': args}, os.path.join(given['out_dir'], 'ckpt.pt'))
with open('seed', 'w') as f:
    f.write(str(torch.initial_seed()))
''',
}
NANOCHAT = {
    'nanochat/__init__.py': '',
    'nanochat/checkpoint_manager.py': '''
from types import SimpleNamespace
import torch

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(sequence_len=32)
        self.table = torch.nn.Parameter(torch.zeros(257))

    def forward(self, x):
        return self.table.expand(*x.shape, -1)

class Bytes:
    def encode(self, text):
        return list(text.encode())

    def decode(self, ids):
        return bytes(ids).decode()

    def get_bos_token_id(self):
        return 256

def load_model(source, device, phase, model_tag):
    return Model(), Bytes(), {}
''',
    'scripts/__init__.py': '',
    'scripts/tok_train.py': 'import sys; open("vocabulary", "w").write(sys.argv[1])',
    'scripts/base_train.py': '''
import glob, json, os
import pyarrow.parquet
import torch
torch.manual_seed(42)
folder = os.path.join(os.environ['NANOCHAT_BASE_DIR'], 'base_data_climbmix')
*train, val = sorted(glob.glob(os.path.join(folder, '*.parquet')))
documents = [pyarrow.parquet.read_table(path).column('text').to_pylist() for path in (*train, val)]
with open('documents.json', 'w') as f:
    json.dump(documents, f)
''',
}


def write_program(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return str(folder)


def write_files(folder, count=8):
    """`count` books of 6,000 characters; in every line of book n is the word bookn."""
    folder.mkdir()
    words = 'the old sea was calm and we went on board to see who had come with him'.split()
    for n in range(count):
        lines = [f'book{n} {" ".join(words[(i * k + n) % len(words)] for k in range(9))} {i}'
                 for i in range(110)]
        (folder / f'{n}.txt').write_text('\n'.join(lines))
    return str(folder)


def test_all_programs_get_the_same_text_and_are_scored_alike(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench_race, 'check_nanochat', lambda folder: None)  # no need of rustbpe here
    s = Settings(what=['race'], quick=True, rounds=1, text=[write_files(tmp_path / 'books')],
                 peer=write_program(tmp_path / 'gpt', NANOGPT),
                 nanochat=write_program(tmp_path / 'chat', NANOCHAT))
    part, = bench_race.bench_race(s, torch.device('cpu'), {})
    figures = part['medians']
    assert list(figures) == ['ours', 'nanoGPT', 'nanochat']
    for metric in (bench_race.IN_ROWS, bench_race.ALONE):
        # 320 and 257 tokens, equally likely
        assert math.isclose(figures['nanoGPT'][metric] * figures['nanoGPT']['bytes a token'],
                            math.log2(320), rel_tol=1e-5)
        assert math.isclose(figures['nanochat'][metric], math.log2(257), rel_tol=1e-5)
        # trained a little
        assert 0 < figures['ours'][metric] < figures['nanoGPT'][metric]
    assert figures['ours']['bytes a token'] == figures['nanoGPT']['bytes a token'] > 1.5
    assert figures['nanochat']['bytes a token'] == 1
    assert {values['tokens'] for values in figures.values()} == {bench_race.QUICK_TOKENS}
    assert part['notes'][5].startswith('bits per byte, each document alone: nanochat 8.0056')
    assert 'seed 1' in capsys.readouterr().out

    train, val = json.loads((tmp_path / 'chat' / 'documents.json').read_text())
    text = '\n'.join(path.read_text() for path in (tmp_path / 'books').iterdir())
    assert all(len(piece) <= 900 and piece in text for piece in train + val)
    names = {n for n in range(8) if any(f'book{n} ' in piece for piece in train)}
    assert names == {0, 1, 2, 3, 4, 5, 7}  # the seventh is held out
    assert sum(map(len, train + val)) == sum(len((tmp_path / 'books' / f'{n}.txt').read_text())
                                             for n in names)
    assert (tmp_path / 'gpt' / 'seed').read_text() == '1'  # in place of its 1337
    assert (tmp_path / 'chat' / 'vocabulary').read_text() == '--vocab-size=320'


def test_a_document_is_cut_behind_white_space_and_nothing_is_lost():
    text = ('word ' * 300 + '\n') * 3 + 'x' * 2000 + ' end'
    found = bench_race.pieces(text)
    assert ''.join(found) == text and max(map(len, found)) <= 900
    assert all(piece[-1] in ' \n' or 'x' in piece for piece in found[:-1])
    assert bench_race.pieces('') == bench_race.pieces(' \n') == []


def test_the_steps_of_another_program_fill_the_time():
    class Slow(bench_race.Peer):
        folder = 'slow'
        tokens = 4096
        time = r'step \d+ ([\d.]+)ms'

        def __init__(self):
            self.runs = []

        def run(self, seed, steps):
            self.runs.append(steps)
            compiling = 60 if len(self.runs) == 1 else 4  # then it is on disk
            lines = [(0, 'hello')] + [(0, f'step {n} {9000 if n == 0 else 500}ms') for n in range(steps)]
            return lines, compiling + 0.5 * steps, 100

    slow = Slow()
    trained = slow.train(seed=1, minutes=5)
    assert slow.runs == [2, 29, (300 - 4) * 2]
    assert trained.tokens == 4096 * 592 and trained.seconds == 300
    slow.train(seed=2, minutes=5)  # its code is compiled already
    assert slow.runs[3:] == [29, 592]
    assert slow.train(seed=1, tokens=1e6).tokens == 244 * 4096
    with pytest.raises(UserError, match='minutes=0.05: slow needs 4 s'):
        slow.train(seed=1, minutes=0.05)


def test_every_token_of_the_text_is_scored_once_given_those_before_it_in_its_row():
    generator = torch.Generator().manual_seed(0)
    near, far = torch.randn(2, 11, 11, generator=generator)

    def logits(x):  # causal
        return near[x] + far[x].cumsum(1)

    ids = [10, *torch.randint(10, (13,), generator=generator).tolist(), 10, 3, 4]
    rows = bench_race.rows_of(ids, 5)
    assert [len(row) for row in rows] == [6, 6, 6, 2]
    assert [token for row in rows for token in row[1:]] == ids[1:]
    expected = 0.0
    for row in rows:
        for n in range(1, len(row)):
            if row[n] != 10:
                found = logits(torch.tensor([row[:n]]))[0, -1]
                expected += F.cross_entropy(found, torch.tensor(row[n])).item()
    assert math.isclose(bench_race.nats_of(logits, rows, 5, 10, batch=3), expected, rel_tol=1e-5)


@pytest.mark.parametrize('args, names', [(['--nanochat=nowhere'], 'nanochat=nowhere'),
                                         (['--minutes=0'], 'minutes=0'),
                                         (['--tokens=-1'], 'tokens=-1')])
def test_bad_input_names_the_setting(args, names):
    with pytest.raises(UserError, match=names):
        configure(Settings, ['race', *args])


def test_too_few_documents_are_one_line(tmp_path):
    s = Settings(what=['race'], text=[write_files(tmp_path / 'books', 6)])
    with pytest.raises(UserError, match='has 6 documents: the race holds out one in 7'):
        next(bench_race.bench_race(s, torch.device('cpu'), {}))


def test_the_race_is_not_a_part_of_all():
    assert 'race' not in parts_of(['all']) and 'train' in parts_of(['all'])
    assert parts_of(['race', 'all'])[-1] == 'race' and parts_of(['race']) == ['race']
