"""
prepare.py leaves alone what it did not write: folders under its temporary names, files that a record of its
progress names, and data sets that another process makes at the same moment.
"""
import json
import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT
from test_prepare import contents, do, story, write_jsonl

from configurator import UserError
from features.text import parts, pipeline, tokenfiles
from features.text.tokenfiles import MARK


@pytest.fixture(autouse=True)
def large(monkeypatch):
    """All is prepared as a large corpus is."""
    monkeypatch.setattr(pipeline, 'IN_MEMORY', 0)
    monkeypatch.setattr(pipeline, 'SAVE_EVERY', 0)


def snapshot(folder):
    """{path: its bytes, its target, or None for a folder} of everything in a folder."""
    found = {}
    for path in sorted(folder.rglob('*')):
        found[str(path)] = (os.readlink(path) if path.is_symlink()
                            else path.read_bytes() if path.is_file() else None)
    return found


def a_thesis(tmp_path):
    (tmp_path / 'out.part').mkdir()
    (tmp_path / 'out.part' / 'thesis.txt').write_text('years of work')


def a_thesis_beside_our_files(tmp_path):
    a_thesis(tmp_path)
    for name in (MARK, 'train_00000.bin', 'progress.json'):
        (tmp_path / 'out.part' / name).write_text('{}')


def a_data_set(tmp_path):
    do(tmp_path / 'out.part', tmp_path / 'x.jsonl', val_fraction=0.3)


def a_link(tmp_path):
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine' / 'train_00000.bin').write_text('mine')
    os.symlink('mine', tmp_path / 'out.part')


def a_file(tmp_path):
    (tmp_path / 'out.part').write_text('a download of mine')


def a_folder_under_our_name(tmp_path):
    (tmp_path / 'out.part' / 'train_00000.bin').mkdir(parents=True)
    (tmp_path / 'out.part' / MARK).write_text('')


def a_link_under_our_name(tmp_path):
    (tmp_path / 'mine').write_text('mine')
    (tmp_path / 'out.part').mkdir()
    (tmp_path / 'out.part' / MARK).write_text('')
    os.symlink('../mine', tmp_path / 'out.part' / 'train_00000.bin')


def inside(tmp_path):
    (tmp_path / 'out' / '.part').mkdir(parents=True)
    (tmp_path / 'out' / '.part' / 'thesis.txt').write_text('years of work')


def beside(tmp_path):
    (tmp_path / 'out' / '.part').mkdir(parents=True)
    (tmp_path / 'out' / 'thesis.txt').write_text('years of work')


@pytest.mark.parametrize('plant', [a_thesis, a_thesis_beside_our_files, a_data_set, a_link, a_file,
                                   a_folder_under_our_name, a_link_under_our_name, inside, beside])
@pytest.mark.parametrize('is_wrong', [False, True])
def test_a_folder_of_others_under_a_temporary_name_is_left_as_it_is(tmp_path, plant, is_wrong):
    path = write_jsonl(tmp_path / 'x.jsonl', map(story, range(50)))
    plant(tmp_path)
    before = snapshot(tmp_path)
    with pytest.raises(UserError, match='did not write|no folder of prepare.py|was not made by prepare.py'):
        do(tmp_path / 'out', path, val_fraction=0.3, text_key='wrong' if is_wrong else 'text')
    assert snapshot(tmp_path) == before


def test_a_merge_leaves_a_folder_of_others_as_it_is(tmp_path):
    path = write_jsonl(tmp_path / 'x.jsonl', map(story, range(50)))
    for part in ('1/2', '2/2'):
        do(tmp_path / 'out', path, part=part, val_fraction=0.3)
    a_thesis(tmp_path)
    before = snapshot(tmp_path)
    with pytest.raises(UserError, match='thesis.txt.*did not write'):
        parts.merge(str(tmp_path / 'out'))
    assert snapshot(tmp_path) == before


def stopped(tmp_path, monkeypatch, out):
    """A run that was stopped half-way."""
    path = write_jsonl(tmp_path / 'x.jsonl', map(story, range(50)))

    def stop(*args):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, 'publish', stop)
        with pytest.raises(KeyboardInterrupt):
            do(out, path, val_fraction=0.3)
    return path


def test_what_a_user_puts_into_our_folder_survives_an_error(tmp_path, monkeypatch):
    path = stopped(tmp_path, monkeypatch, tmp_path / 'out')
    assert MARK in os.listdir(tmp_path / 'out.part')

    def harm(*args):
        (tmp_path / 'out.part' / 'thesis.txt').write_text('years of work')
        raise UserError('an error')
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, 'run', harm)
        with pytest.raises(UserError, match='an error'):
            do(tmp_path / 'out', path, val_fraction=0.3)
    assert (tmp_path / 'out.part' / 'thesis.txt').read_text() == 'years of work'


@pytest.mark.parametrize('harm', [
    lambda record: record['shards']['train'][0].update(file='../victim.bin'),
    lambda record: record['shards']['train'][0].update(tokens=-1),
    lambda record: record['shards'].update(train=7),
    lambda record: record.update(tasks='many'),
    lambda record: record.update(used='zz'),
    lambda record: record.update(longest=[1]),
    lambda record: record.update(literal={'a': 'b'}),
    lambda record: record.pop('tokenizer'),
    lambda record: record.update(chosen={'a': 1}),
    lambda record: record.update(split=[])])
def test_a_record_of_the_progress_that_is_not_ours_leads_nowhere(tmp_path, monkeypatch, harm):
    path = stopped(tmp_path, monkeypatch, tmp_path / 'out')
    do(tmp_path / 'ref', path, val_fraction=0.3)
    (tmp_path / 'victim.bin').write_bytes(b'x' * 10 ** 5)
    record = json.loads((tmp_path / 'out.part' / 'progress.json').read_text())
    for side in record['shards'].values():
        for shard in side:
            shard.pop('sha256', None)
    harm(record)
    (tmp_path / 'out.part' / 'progress.json').write_text(json.dumps(record))
    do(tmp_path / 'out', path, val_fraction=0.3)
    assert contents(tmp_path / 'out') == contents(tmp_path / 'ref')
    assert (tmp_path / 'victim.bin').read_bytes() == b'x' * 10 ** 5


def test_a_data_set_that_is_made_while_this_run_waits_is_not_overwritten(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / 'x.jsonl', map(story, range(50)))
    lock = tokenfiles.lock

    def slow(part):
        monkeypatch.setattr(tokenfiles, 'lock', lock)
        shutil.rmtree(part)  # as the other one renames it
        do(tmp_path / 'out', path, val_fraction=0.3)
        os.makedirs(part)
        return lock(part)
    monkeypatch.setattr(tokenfiles, 'lock', slow)
    with pytest.raises(UserError, match='was made while this command started'):
        do(tmp_path / 'out', path, val_fraction=0.2)
    assert sorted(os.listdir(tmp_path)) == ['out', 'x.jsonl']
    assert do(tmp_path / 'out', path, val_fraction=0.3)


@pytest.mark.parametrize('is_inside', [False, True])
def test_files_that_appear_in_the_folder_during_the_run_are_not_overwritten(tmp_path, monkeypatch, is_inside):
    path = write_jsonl(tmp_path / 'x.jsonl', map(story, range(50)))
    out, publish = tmp_path / 'out', pipeline.publish
    if is_inside:
        out.mkdir()

    def appears(*args):
        out.mkdir(exist_ok=True)
        (out / 'train_00000.bin').write_text('mine')
        publish(*args)
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, 'publish', appears)
        with pytest.raises(UserError, match='out.*: fix that.*the same command continues'):
            do(out, path, val_fraction=0.3)
    assert (out / 'train_00000.bin').read_text() == 'mine' and not (out / 'meta.json').exists()
    os.unlink(out / 'train_00000.bin')
    if not is_inside:
        out.rmdir()
    do(out, path, val_fraction=0.3)
    do(tmp_path / 'ref', path, val_fraction=0.3)
    assert contents(out) == contents(tmp_path / 'ref')


@pytest.mark.parametrize('how', ['renamed', 'made anew', 'removed'])
def test_a_folder_above_that_goes_during_the_run_is_one_line_and_nothing_is_made_elsewhere(
        tmp_path, monkeypatch, how):
    path, encode = write_jsonl(tmp_path / 'x.jsonl', map(story, range(50))), pipeline.publish
    parent = tmp_path / 'data'
    parent.mkdir()

    def goes(*args):
        if how == 'removed':
            shutil.rmtree(parent)
        else:
            os.rename(parent, tmp_path / 'moved')
        if how == 'made anew':
            parent.mkdir()
            (parent / 'mine').write_text('mine')
        encode(*args)
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, 'publish', goes)
        with pytest.raises(UserError, match='data/out.*could not be written|No such file') as error:
            do(parent / 'out', path, val_fraction=0.3)
    assert '\n' not in str(error.value)
    left = {'renamed': ['moved', 'x.jsonl'], 'removed': ['x.jsonl']}
    assert sorted(os.listdir(tmp_path)) == left.get(how, ['data', 'moved', 'x.jsonl'])
    if how == 'made anew':
        assert os.listdir(parent) == ['mine']
    if how != 'removed':  # what is there goes on
        do(tmp_path / 'moved' / 'out', path, val_fraction=0.3)
        do(tmp_path / 'ref', path, val_fraction=0.3)
        assert contents(tmp_path / 'moved' / 'out') == contents(tmp_path / 'ref')
        assert os.listdir(tmp_path / 'moved') == ['out']


@pytest.mark.parametrize('harm, words', [
    (lambda out: os.unlink(out / 'train_00000.bin'), 'train_00000.bin: No such file'),
    (lambda out: (out / 'val_00000.idx').write_bytes(b'1'), 'val_00000.idx: has 1 bytes'),
    (lambda out: change(out, split=7), 'meta.json is not as prepare.py writes it'),
    (lambda out: change(out, splits={}), 'meta.json is not as prepare.py writes it'),
    (lambda out: change(out, vocab_size=None), 'vocab_size has an invalid value'),
    (lambda out: change(out, tokenizer=[]), 'tokenizer has an invalid value'),
    (lambda out: change(out, source=[]), 'was not made by prepare.py')])
def test_a_complete_data_set_that_is_damaged_is_one_line(tmp_path, harm, words):
    path = write_jsonl(tmp_path / 'x.jsonl', map(story, range(50)))
    do(tmp_path / 'out', path, val_fraction=0.3)
    harm(tmp_path / 'out')
    before = snapshot(tmp_path)
    with pytest.raises(UserError, match=words):
        do(tmp_path / 'out', path, val_fraction=0.3)
    assert snapshot(tmp_path) == before


def change(out, **changes):
    meta = json.loads((out / 'meta.json').read_text())
    (out / 'meta.json').write_text(json.dumps(meta | changes))


def test_parts_that_do_not_fit_are_refused_without_asserts_too(tmp_path):
    """PYTHONOPTIMIZE=1 leaves out every assert."""
    path = write_jsonl(tmp_path / 'x.jsonl', map(story, range(60)))
    for part in ('1/3', '2/3', '3/3'):
        do(tmp_path / 'out', path, part=part, val_fraction=0.3)
    folder = tmp_path / 'out.parts'
    shutil.copytree(folder, tmp_path / 'sound')
    do(tmp_path / 'other', path, part='2/3', val_fraction=0.2)
    kinds = {
        'twice': ('2_of_3', folder / '1_of_3', 'is not the part'),
        'other settings': ('2_of_3', tmp_path / 'other.parts' / '2_of_3', 'another val_fraction'),
        'overlapping': ('1_of_2', folder / '1_of_3', 'parts of 2 and of 3'),
        'missing': ('2_of_3', None, 'part 2 of 3 missing'),
    }
    for name, source, words in kinds.values():
        shutil.rmtree(folder)
        shutil.copytree(tmp_path / 'sound', folder)
        shutil.rmtree(folder / name, ignore_errors=True)
        if source:
            shutil.copytree(tmp_path / 'sound' / source.name if folder in source.parents else source,
                            folder / name)
        done = subprocess.run([sys.executable, '-O', 'prepare.py', f'--merge={tmp_path}/out'], cwd=ROOT,
                              capture_output=True, text=True)
        assert done.returncode == 2 and words in done.stderr and len(done.stderr.splitlines()) == 1, done
        assert not (tmp_path / 'out').exists()
