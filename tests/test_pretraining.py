"""
experiments/pretraining.py: no dev text is seen in training, both arms learn from the same pairs, and the
table has the figures of the runs and the texts.
"""
import csv
import json
import statistics
import sys

import pytest
from conftest import read_log, runs_here

from configurator import UserError
from experiments import pretraining
from features.study import tuning
from features.study.runs import read_settings
from features.study.summaries import scorer

SIZES = dict(n_encoder_layer=1, n_layer=1, n_head=2, n_kv_head=1, n_embd=32, source_size=48, block_size=64,
             batch_size=4, max_iters=4, tuning_iters=4, eval_interval=2, eval_iters=1, dtype='float32')


pytestmark = pytest.mark.full  # whole experiments, on small networks


def abstracts(names):
    return [{'source': f'The {name} of the sea was seen by nobody. It sang songs of {name} all night long.',
             'target': [f'A {name} sang.', f'Song: {name}']} for name in names]


@pytest.fixture(scope='module')
def study(tmp_path_factory):
    """The folder of the whole experiment with tiny networks and two seeds, its runs in this process."""
    folder = tmp_path_factory.mktemp('pretraining')
    names = [f'{a}{b}{c}' for a in ('mer', 'sel', 'kor') for b in ('lin', 'tar', 'mo', 'vea', 'nu')
             for c in ('a', 'e', 'ix')]
    for name, rows in (('pairs', abstracts(names[:-5])), ('dev', abstracts(names[-5:])),
                       ('more', [{'text': 'Kelp grows.'}])):
        (folder / f'{name}.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    code = [[{'source': f'def {name}_{n}(x):\n    return {n} * x', 'target': f'Say {name}.'}
             for n, name in enumerate(some)] for some in (names[:-5], names[-5:])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, 'run_missing', runs_here(patch))
        patch.setattr(tuning, 'FURTHER', 0)  # networks of this size have no best rate
        patch.setattr(pretraining, 'functions', lambda: code)
        patch.setattr(sys, 'argv', [
            'pretraining.py', f'--pairs={folder}/pairs.jsonl', f'--dev={folder}/dev.jsonl',
            f'--text={folder}/more.jsonl', f'--out_dir={folder}/out', '--seeds=[1, 2]', '--scales=[1.0, 0.5]',
            '--tokenizer=bpe:300', *(f'--{key}={value}' for key, value in SIZES.items())])
        pretraining.main()
    return folder / 'out'


def runs(study, pattern):
    """{seed: folder} of the runs with such a name."""
    return {int(folder.name.rsplit('=', 1)[1]): folder for folder in study.glob(pattern)}


def test_pretraining_sees_sources_alone_and_nothing_that_is_judged(study):
    text = [json.loads(line)['text'] for line in (study / 'data/text.jsonl').open()]
    assert text[-1] == 'Kelp grows.' and len(text) == 81
    for row in abstracts(['nuix']):
        assert row['source'] not in text
    assert not any('Say ' in each or 'Song:' in each or 'sang.' in each for each in text)


def test_functions_are_parted_by_their_files():
    learned, judged = pretraining.functions()
    assert len(learned) > 3000 and len(judged) > 100
    taught, known = ({row['source'] for row in rows} for rows in (learned, judged))
    assert not taught & known
    files = [rows for rows in pretraining.functions_by_file().values()
             if any(row['source'] in known for row in rows)]
    assert len(files) > 10
    assert all(row['source'] in known | taught for rows in files for row in rows)
    # whole files, except for functions that other files have too
    assert sum(row['source'] in known for rows in files for row in rows) > 0.9 * sum(map(len, files))


def test_every_seed_starts_from_its_own_network_or_from_none(study):
    for task in ('abstracts', 'functions'):
        for seed in (1, 2):
            assert all(read_settings(folder).init_from == 'auto'
                       for folder in study.glob(f'{task}/none,*seed={seed}'))
            assert ({read_settings(folder).init_from for folder in study.glob(f'{task}/ul2,*seed={seed}')}
                    == {f'{study}/pretrained,seed={seed}'})
        given = [read_settings(folder) for folder in study.glob(f'{task}/*')]
        assert len(given) == 6
        assert len({(s.dataset, s.objective, s.max_iters, s.block_size) for s in given}) == 1


def test_the_table_says_what_the_runs_and_the_texts_said(study):
    rows = [[cell.strip() for cell in line.split('|')[1:-1]]
            for line in (study / 'table.md').read_text().splitlines()[2:]]
    texts = list(csv.DictReader((study / 'texts.csv').open(newline='')))
    score = scorer()
    for task in ('abstracts', 'functions'):
        table = {row[1]: row[2:] for row in rows if row[0] == task}
        assert len(table) == 3
        found = {}
        for arm in ('none', 'ul2'):
            losses = [read_log(folder)[-1]['val_loss'] for folder in runs(
                study / task, f'{arm},muon_lr={0.03 * float(table[arm][0]):g},*').values()]
            assert len(losses) == 2 and table[arm][1].startswith(f'{statistics.mean(losses):.4f} ±')
            for seed in '12':
                mine = [row for row in texts if (row['task'], row['arm'], row['seed']) == (task, arm, seed)]
                assert len(mine) == 5
                references = [[row['reference']] if task == 'functions'
                              else next(pair['target'] for pair in abstracts([row['reference'].split()[1]]))
                              for row in mine]
                found[arm, seed] = 100 * statistics.mean(score(row['written'], each)['rougeL']
                                                         for row, each in zip(mine, references))
            assert table[arm][2].startswith(f'{statistics.mean(found[arm, seed] for seed in "12"):.2f} ±')
        difference = statistics.mean(found['ul2', seed] - found['none', seed] for seed in '12')
        assert table['ul2'][3].startswith(f'{difference:+.2f}')
        assert (0 < float(table['its first sentence' if task == 'abstracts' else "the function's name"][2])
                < 100)


def test_no_pairs_is_one_line(monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['pretraining.py'])
    with pytest.raises(UserError, match='pairs, dev: give two files'):
        pretraining.main()
