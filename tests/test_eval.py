"""eval.py loss gives the loss that training gave; the ladder compares all models on the same tokens."""
import json
import math
import re
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import one_line, read_log, run, train, write_dataset

import checkpoint
from batches import Source, TokenFiles
from configurator import UserError
from eval import LadderSettings, LossSettings, main
from features.markov import ngrams
from features.study import ladder
from features.study.ladder import Rung, count_rungs, ladder_table, plan_training
from features.study.split_loss import row_losses
from features.study.stats import loss_and_error
from model import ModelConfig, Transformer

SWEEP = """
base = {'block_size': 32, 'batch_size': 8, 'eval_iters': 0, 'device': 'cpu', 'dtype': 'float32',
        'log_interval': 50}
arms = {
    'bigram_rank_4': {'arch': 'markov', 'rank_embed': 4, 'max_iters': 5},
    'bigram_rank_256': {'arch': 'markov', 'rank_embed': 256, 'max_iters': 5},
    'bigram': {'arch': 'markov', 'optimizer': 'counts', 'pseudo_counts': 1.0},
    'transformer': {'n_layer': 1, 'n_head': 2, 'n_embd': 16, 'max_iters': 5},
}
"""


@pytest.fixture(scope='module')
def trained(dataset, tmp_path_factory):
    """out_dir of a run whose evaluations cover the whole validation split."""
    out_dir = tmp_path_factory.mktemp('trained') / 'out'
    train(out_dir, dataset=dataset)
    return out_dir


# --- the loss ---

def test_it_is_the_loss_that_training_saw_on_the_whole_split(trained, dataset):
    last = read_log(trained)[-1]
    done = run('eval.py', 'loss', f'--out_dir={trained}', '--which=last', '--device=cpu', '--dtype=float32')
    assert done.returncode == 0, done.stderr
    found = re.search(r'([\d.]+) nats a token ± ([\d.]+) .* ([\d.]+) bits per byte', done.stdout).groups()
    assert float(found[0]) == pytest.approx(last['val_loss'], abs=2e-4)
    assert float(found[2]) == pytest.approx(last['val_bpb'], abs=2e-4)
    assert f'all {TokenFiles(dataset, "val").tokens - 1:,} targets' in done.stdout
    assert 0 < float(found[1]) < 0.5


def test_the_error_is_that_of_a_mean_of_documents_not_of_rows():
    rng = np.random.default_rng(0)
    alone = rng.normal(3, 1, 3200)  # each row is a document of its own
    mean, error = loss_and_error(alone * 10, np.full(3200, 10))
    assert mean == pytest.approx(alone.mean()) and error == pytest.approx(3200 ** -0.5, rel=0.25)
    alike = np.repeat(rng.normal(3, 1, 320), 10)  # ten rows to a document
    assert loss_and_error(alike * 10, np.full(3200, 10))[1] == pytest.approx(320 ** -0.5, rel=0.25)
    assert loss_and_error(np.array([2.0, 30.0]), np.array([1, 9]))[0] == 3.2  # every token weighs the same


def test_a_single_row_has_no_standard_error(trained, tmp_path):
    assert loss_and_error(np.array([6.0]), np.array([2])) == (3.0, None)
    # the other row has no targets
    assert loss_and_error(np.array([6.0, 0.0]), np.array([2, 0])) == (3.0, None)
    assert loss_and_error(np.array([6.0, 8.0]), np.array([2, 2]))[1] > 0
    assert '2.0000     n/a' in ladder_table([Rung('one', 'counts', 2.0, None)],
                                            SimpleNamespace(bytes=50, tokens=100), None)
    write_dataset(tmp_path / 'one', documents=4, shards=1, seed=1)
    done = run('eval.py', 'loss', f'--out_dir={trained}', f'--dataset={tmp_path / "one"}', '--device=cpu',
               '--dtype=float32')
    assert ' nats a token ± n/a (standard error: 1 parts)' in done.stdout, done.stdout + done.stderr


def test_another_data_set_needs_the_same_tokenizer(trained, tmp_path):
    write_dataset(tmp_path / 'same', seed=5)
    write_dataset(tmp_path / 'other', vocab_size=63)
    s = LossSettings(device='cpu', dtype='float32')
    folder = str(trained / 'step_00000010')
    [split] = row_losses(folder, str(tmp_path / 'same'), s)
    assert split.targets.sum() == TokenFiles(str(tmp_path / 'same'), 'val').tokens - 1
    assert split.nats.min() > 0
    message = one_line(run('eval.py', 'loss', f'--out_dir={trained}', f'--dataset={tmp_path / "other"}'))
    assert 'other: was prepared with another tokenizer' in message
    assert ('prepare it with --tokenizer=byte: '
            f'python prepare.py FILE_OR_FOLDER --tokenizer=byte --out={tmp_path}/other2' in message)


def test_weights_that_were_trained_elsewhere_need_a_data_set(dataset, tmp_path):
    """
    surgery.py writes such a checkpoint from weights of the hub, without data: its settings have no dataset
    and no packing.
    """
    model = Transformer(ModelConfig(vocab_size=64, block_size=32, n_layer=1, n_head=2, n_embd=16))
    state = {'step': 0, 'model': asdict(model.cfg), 'settings': asdict(model.cfg),
             'tokenizer': TokenFiles(dataset, 'val').meta['tokenizer']}
    folder, s = (checkpoint.save(str(tmp_path), 0, model.state_dict(), {}, state),
                 LossSettings(device='cpu', dtype='float32'))
    with pytest.raises(UserError, match='dataset: .* does not say what it was trained on'):
        row_losses(folder, '', s)
    [split] = row_losses(folder, dataset, s)
    assert split.source.name == dataset and split.nats.min() > 0


def test_a_command_is_loaded_when_it_is_called():
    code = "import eval, sys; print([name for name in sys.modules if name.startswith('features.study')])"
    assert run('-c', code).stdout == '[]\n'


# --- the ladder ---

def test_counted_models_meet_the_targets_of_trained_ones(dataset):
    files, source = ([TokenFiles(dataset, split) for split in ('train', 'val')],
                     Source(dataset, 'val', 32, 'stream'))
    stream, val = (f.read(0, f.tokens) for f in files)
    targets = np.concatenate([source.row(n)[1:] for n in range(source.rows)])
    assert (targets == val[1:]).all()
    below, bigrams, above = count_rungs(stream, val, 64)
    names = [rung.name for rung in below + bigrams + above]
    assert names == ['uniform', 'unigram', 'bigram, rank 4, SVD', 'bigram, add k', 'bigram, interpolated',
                     'Kneser–Ney, 3 tokens', 'Kneser–Ney, 5 tokens']
    assert below[0].loss == pytest.approx(math.log(64))
    assert above[1].loss == pytest.approx(ngrams.kneser_ney(stream, val, 64, 5).mean())


@pytest.mark.full
def test_the_ladder_trains_what_is_missing_and_draws_all_in_order(tmp_path, capsys):
    write_dataset(tmp_path / 'counting')
    meta = json.loads((tmp_path / 'counting' / 'meta.json').read_text())
    (tmp_path / 'counting' / 'meta.json').write_text(json.dumps(meta | {'entropy': 0.5}))
    (tmp_path / 'arms.py').write_text(SWEEP)
    args = {'dataset': str(tmp_path / 'counting'), 'sweep': str(tmp_path / 'arms.py'),
            'out': str(tmp_path / 'out'), 'device': 'cpu', 'dtype': 'float32'}
    ladder.run(LadderSettings(**args))
    first = capsys.readouterr().out
    assert (tmp_path / 'out' / 'ladder.png').read_bytes().startswith(b'\x89PNG')
    # rank 256 is left out: there are 64 tokens
    assert re.findall(r'^(.+?)  +[\d.]+ +[\d.]+ +[\d.]+ +[-\d.]+%$', first, re.MULTILINE) == [
        'uniform', 'unigram', 'bigram, rank 4, SVD', 'bigram rank 4, gradient',
        'bigram, gradient', 'bigram, add k', 'bigram, interpolated',
        'Kneser–Ney, 3 tokens', 'Kneser–Ney, 5 tokens', 'transformer', 'entropy of the source']
    assert '3 to do' in first
    ladder.run(LadderSettings(**args, picture=''))
    again = capsys.readouterr().out
    assert '0 to do' in again
    assert again.partition('counting:')[2] == first.partition('counting:')[2].partition('\n\ndrawn')[0] + '\n'
    # the full bigram counted, in one pass over the data
    log = read_log(tmp_path / 'out' / 'bigram,seed=1')
    assert log[-1]['step'] == math.ceil((meta['splits']['train']['tokens'] - 1) / 256)
    values = dict(re.findall(r'^(bigram, \S+(?: k)?)  +([\d.]+)', first, re.MULTILINE))
    assert abs(float(values['bigram, gradient']) - float(values['bigram, add k'])) < 0.1


def test_a_pass_over_the_data_counts_accumulated_rows(dataset, tmp_path):
    (tmp_path / 'arms.py').write_text(SWEEP)
    (tmp_path / 'more.py').write_text(SWEEP + "base['gradient_accumulation_steps'] = 2")
    steps = [plan_training(LadderSettings(dataset=dataset, sweep=str(tmp_path / name), out='out'),
                           TokenFiles(dataset, 'train')).arms['bigram']['max_iters']
             for name in ('arms.py', 'more.py')]
    assert steps[1] == math.ceil(steps[0] / 2)


def test_the_table_says_how_far_above_the_entropy():
    class Files:
        bytes, tokens = 50, 100
    assert (ladder_table([Rung('one', 'counts', 2.0, 0.1), Rung('entropy of the source', 'limit', 1.6)],
                         Files, 1.6).splitlines()[1:]
            == [
                f'one                        2.0000  0.1000     {4 / math.log(2):.4f}             25.00%',
                f'entropy of the source      1.6000  0.0000     {3.2 / math.log(2):.4f}              0.00%'])
    Files.bytes = 0
    assert '        -' in ladder_table([Rung('one', 'counts', 2.0)], Files, None)


def test_every_rung_has_the_same_targets(dataset, tmp_path):
    arms = (SWEEP.partition('arms')[0] + "arms = {'bigram': {'arch': 'markov', 'packing': 'document', "
            "'max_iters': 1}}")
    (tmp_path / 'arms.py').write_text(arms)
    with pytest.raises(UserError, match='packing=document leaves out some targets'):
        ladder.run(LadderSettings(dataset=dataset, sweep=str(tmp_path / 'arms.py'), out=str(tmp_path / 'out'),
                                  device='cpu', dtype='float32'))
    (tmp_path / 'arms.py').write_text(SWEEP.replace("'rank_embed': 4,", "'rank_embed': [4, 8],"))
    with pytest.raises(UserError, match=r'bigram_rank_4: rank_embed=\[4, 8\]: the ladder takes one value'):
        ladder.run(LadderSettings(dataset=dataset, sweep=str(tmp_path / 'arms.py'),
                                  out=str(tmp_path / 'out')))
    (tmp_path / 'arms.py').write_text("base = {'block_size': 8, 'batch_size': 2}\n"
                                      "arms = {'a': [{'arch': 'markov'}]}")
    with pytest.raises(UserError, match='arms: a: the ladder takes one dict'):
        ladder.run(LadderSettings(dataset=dataset, sweep=str(tmp_path / 'arms.py'),
                                  out=str(tmp_path / 'out')))
    (tmp_path / 'arms.py').write_text('base = "config/fast.py"\narms = {"a": {}}')
    with pytest.raises(UserError, match='base: the ladder takes a dict'):
        ladder.run(LadderSettings(dataset=dataset, sweep=str(tmp_path / 'arms.py'),
                                  out=str(tmp_path / 'out')))


@pytest.mark.parametrize('args, expected', [
    ([], 'no command given: takes loss or text or tasks'),
    (['task'], 'task: takes loss or text or tasks'),
    (['loss', '--out_dir=nowhere'], 'nowhere: no such directory'),
    (['loss', '--out=x'], '--out: no such setting'),
    (['ladder', '--dataset=nope'], 'dataset=nope: no such data set'),
    (['ladder', '--dataset=DATA', '--sweep=nope.py'], 'nope.py: no such config file'),
    (['ladder', '--dataset=DATA', '--sweep=', '--picture=/proc/x/y.png'], 'picture=/proc/x/y.png')])
def test_bad_input_is_refused(dataset, args, expected, monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['eval.py', *[arg.replace('DATA', dataset) for arg in args]])
    with pytest.raises(UserError, match=re.escape(expected)):
        main()


def test_a_data_set_without_documents_climbs_too(tmp_path):
    """nanoGPT's train.bin and val.bin: no .idx, no bytes; losses in nats alone."""
    write_dataset(tmp_path / 'counting', shards=1)
    folder = tmp_path / 'nano'
    folder.mkdir()
    for split in ('train', 'val'):
        (folder / f'{split}.bin').write_bytes((tmp_path / 'counting' / f'{split}_00000.bin').read_bytes())
    done = run('eval.py', 'ladder', f'--dataset={folder}', '--sweep=', f'--picture={tmp_path / "p.png"}')
    assert done.returncode == 0 and Path(tmp_path / 'p.png').exists(), done.stderr
    assert re.search(r'uniform +10.8249 +0.0000 +-\n', done.stdout)
