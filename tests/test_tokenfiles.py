"""
Shards hold whole documents; parts of a corpus that several machines made are together what one would have
made.
"""
import gzip
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, run
from test_prepare import contents, do, read, story, write_jsonl

from batches import Mixture, TokenFiles
from configurator import UserError
from features.text import parts, pipeline, tokenfiles
from features.text import reader as reading
from features.text.parts import part_folder
from features.text.reader import Reader, Task
from features.text.settings import TextConfig
from features.text.sources import find_files


def test_shards_hold_whole_documents_and_together_the_same(tmp_path, monkeypatch):
    given = write_jsonl(tmp_path / 'x.jsonl', [story(n) for n in range(300)]), tmp_path / 'long.txt'
    given[1].write_text(story(300, 3000))
    do(tmp_path / 'one', *given, val_fraction=0.1)
    monkeypatch.setattr(reading, 'TASK_SIZE', 1000)
    monkeypatch.setattr(tokenfiles, 'SHARD_TOKENS', 5000)
    monkeypatch.setattr(pipeline, 'IN_MEMORY', 0)
    meta = do(tmp_path / 'many', *given, val_fraction=0.1)
    assert len(meta['splits']['train']['shards']) > 5 and len(meta['splits']['val']['shards']) > 1
    # the long one is in the last
    assert all(5000 <= shard['tokens'] < 5000 + 3000 for shard in meta['splits']['train']['shards'][:-1])
    for split in ('train', 'val'):
        assert read(tmp_path / 'one', split) == read(tmp_path / 'many', split)


# --- parts ---

@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
    """Files of every kind, some empty, one packed, one with a document of many tasks."""
    folder = tmp_path_factory.mktemp('corpus')
    write_jsonl(folder / 'a.jsonl', [story(n) for n in range(120)] + ['', ' '])
    (folder / 'b.txt').write_text('')
    (folder / 'c.txt').write_text('\n<|endoftext|>\n'.join(story(n, 30) for n in range(200, 240)))
    (folder / 'd.txt').write_text(story(300, 9000))
    (folder / 'e.jsonl.gz').write_bytes(
        gzip.compress('\n'.join(json.dumps({'text': story(n)}) for n in range(400, 500)).encode()))
    (folder / 'z.txt').write_text('')
    return folder


def stream(folder):
    """{split: (its tokens, where its documents start and end)}"""
    found = {}
    for split in ('train', 'val'):
        files = TokenFiles(str(folder), split)
        found[split] = files.read(0, files.tokens), [files.document(n) for n in range(files.documents)]
    return found


def in_parts(out, count, *given, **settings):
    for n in range(1, count + 1):
        do(out, *given, part=f'{n}/{count}', **settings)
    return parts.merge(str(out))[1]


@pytest.mark.parametrize('split', ['document', 'tail'])
def test_any_number_of_parts_is_together_the_whole(corpus, tmp_path, monkeypatch, split):
    monkeypatch.setattr(reading, 'TASK_SIZE', 3000)
    whole = do(tmp_path / 'whole', corpus, split=split, val_fraction=0.2)
    expected = stream(tmp_path / 'whole')
    for count in (1, 2, 3, 8, 60):
        meta = in_parts(tmp_path / f'{count}', count, corpus, split=split, val_fraction=0.2)
        for name, (tokens, places) in stream(tmp_path / f'{count}').items():
            assert np.array_equal(tokens, expected[name][0]) and places == expected[name][1]
            assert {key: meta['splits'][name][key] for key in ('tokens', 'documents', 'bytes')} == {
                key: whole['splits'][name][key] for key in ('tokens', 'documents', 'bytes')}
        assert (meta | {'splits': 0} == whole | {'splits': 0}
                and (count < 3 or len(meta['splits']['train']['shards']) > 2))
        assert all(np.array_equal(a, b) for a, b in zip(*(
            Mixture(str(tmp_path / name), 'train', 16, 1).rows(range(20)) for name in ('whole', f'{count}'))))


def test_an_empty_folder_takes_the_parts(corpus, tmp_path):
    do(tmp_path / 'whole', corpus, val_fraction=0.2)
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out.parts' / '2_of_2').mkdir(parents=True)
    in_parts(tmp_path / 'out', 2, corpus, val_fraction=0.2)
    assert len(contents(tmp_path / 'out')) == 9 and '.part' not in os.listdir(tmp_path / 'out')
    assert all(np.array_equal(a[0], b[0]) and a[1] == b[1]
               for a, b in zip(stream(tmp_path / 'out').values(), stream(tmp_path / 'whole').values()))


def test_parts_of_few_documents_agree_on_who_validates(tmp_path):
    write_jsonl(tmp_path / 'a.jsonl', [story(n) for n in range(30)])
    write_jsonl(tmp_path / 'b.jsonl', [story(n) for n in range(20, 50)])
    given = tmp_path / 'a.jsonl', tmp_path / 'b.jsonl'
    do(tmp_path / 'whole', *given)
    in_parts(tmp_path / 'parts', 3, *given)
    expected, found = stream(tmp_path / 'whole'), stream(tmp_path / 'parts')
    assert all(np.array_equal(found[split][0], expected[split][0]) and found[split][1] == expected[split][1]
               for split in found)
    assert 3 <= len(expected['val'][1]) <= 12


def test_what_is_read_before_the_place_in_a_file_moves_is_in_one_part(tmp_path, monkeypatch):
    """As the first of very short rows of a .parquet are."""
    for name in 'ab':
        (tmp_path / f'{name}.txt').write_text(10 * name)
    monkeypatch.setattr(Reader, 'text', lambda self, path, cut: iter([Task([(path, 'first')])]))
    files = find_files([str(tmp_path)])
    for count in (1, 2, 3, 40):
        found = [task.documents[0][0] for n in range(1, count + 1)
                 for task in Reader(files, TextConfig(), (n, count)).tasks(None)]
        assert found[0] == files[0][0] and len(found) == (2 if count > 1 else 1)


def test_a_part_reads_no_file_beside_its_own(corpus, monkeypatch):
    opened, blocks = {}, Reader.blocks
    monkeypatch.setattr(Reader, 'blocks',
                        lambda self, path: (opened[self.part[0]].add(Path(path).name), blocks(self, path))[1])
    files, tasks = find_files([str(corpus)]), []
    for n in range(1, 5):
        opened[n] = set()
        tasks += Reader(files, TextConfig(), (n, 4)).tasks(None)
    assert opened[1] == {'a.jsonl'} and opened[4] == {'d.txt', 'e.jsonl.gz', 'z.txt'}, opened
    assert (sum(len(task.documents) for task in tasks) == 40 + 1 + 2
            and sum(bool(task.lines) for task in tasks) == 2)


def test_a_machine_for_each_part_one_of_which_is_killed(corpus, tmp_path):
    """
    As on a command line: the same command with another --part; what was killed goes on; then all are one, and
    the command without --part knows it.
    """
    copies = [tmp_path / f'machine{n}' / 'corpus' for n in range(3)]
    for n, copy in enumerate(copies):
        shutil.copytree(corpus, copy)
        for path in copy.iterdir():
            os.utime(path, (n, n))  # copied at another time
    code = ('import prepare; from features.text import pipeline, reader; reader.TASK_SIZE = 3000; '
            'pipeline.SAVE_EVERY = 0\n{}\n'
            'prepare.run_main(prepare.main)')
    killed = ('import os, signal; replace = pipeline.replace_json\n'
              'pipeline.replace_json = lambda path, value: (replace(path, value), value.get("tasks") '
              '== 9 and os.kill(os.getpid(), signal.SIGKILL))')
    command = [sys.executable, '-c', code.format('pass'), 'corpus', '--tokenizer=bpe:700',
               '--val_fraction=0.2', f'--out={tmp_path / "out"}', '--num_proc=1']
    environment = os.environ | {'PYTHONPATH': str(ROOT)}
    dies = subprocess.run([*command[:2], code.format(killed), *command[3:], '--part=2/3'],
                          cwd=copies[1].parent, env=environment)
    assert dies.returncode == -9 and (tmp_path / 'out.parts/2_of_3.part/progress.json').exists()
    processes = [subprocess.Popen([*command, f'--part={n + 1}/3'], cwd=copy.parent, env=environment,
                                  stdout=subprocess.PIPE, text=True) for n, copy in enumerate(copies)]
    said = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0] and 'goes on after' in said[1]
    assert all(f'python prepare.py --merge={tmp_path / "out"}\n' in text for text in said)
    merged = run('prepare.py', f'--merge={tmp_path / "out"}')
    assert merged.returncode == 0 and f'{tmp_path / "out"}: made of 3 parts' in merged.stdout, merged.stderr
    again = subprocess.run(command, cwd=copies[0].parent, env=environment, capture_output=True, text=True)
    assert 'already prepared' in again.stdout, again.stderr
    assert subprocess.run([*command, f'--out={tmp_path / "whole"}'], cwd=copies[0].parent,
                          env=environment).returncode == 0
    assert all(np.array_equal(a[0], b[0]) and a[1] == b[1]
               for a, b in zip(stream(tmp_path / 'out').values(), stream(tmp_path / 'whole').values()))
    shutil.rmtree(tmp_path / 'out.parts')  # what was linked stays
    assert stream(tmp_path / 'out')


def test_where_files_cannot_be_linked_they_are_copied(corpus, tmp_path, monkeypatch):
    def no_links(*args):
        raise PermissionError('no links here')
    monkeypatch.setattr(os, 'link', no_links)
    in_parts(tmp_path / 'out', 3, corpus, val_fraction=0.2)
    do(tmp_path / 'whole', corpus, val_fraction=0.2)
    assert all(np.array_equal(a[0], b[0])
               for a, b in zip(stream(tmp_path / 'out').values(), stream(tmp_path / 'whole').values()))


def damaged(out, corpus):
    shard = next(path for path in sorted(Path(f'{out}.parts/2_of_3').glob('*.bin')))
    data = bytearray(shard.read_bytes())
    data[5] ^= 1
    shard.write_bytes(data)


def of_others(out, corpus):
    shutil.rmtree(f'{out}.parts/2_of_3')
    write_jsonl(corpus / 'f.jsonl', ['one more'])
    do(out, corpus, part='2/3', val_fraction=0.2)


def taken_twice(out, corpus):
    shutil.rmtree(f'{out}.parts/2_of_3')
    shutil.copytree(f'{out}.parts/1_of_3', f'{out}.parts/2_of_3')


def leads_out(out, corpus):
    path = Path(f'{out}.parts/2_of_3/meta.json')
    path.write_text(path.read_text().replace('"val": {', '"../val": {'))


def half_done(out, corpus):
    os.makedirs(f'{out}.part')
    Path(f'{out}.part/progress.json').write_text('{}')


def otherwise(out, corpus):
    shutil.rmtree(f'{out}.parts/3_of_3')
    do(out, corpus, part='3/3', val_fraction=0.3)


@pytest.mark.parametrize('harm, words', [
    (lambda out, corpus: shutil.rmtree(f'{out}.parts/2_of_3'), 'part 2 of 3 missing'),
    (lambda out, corpus: os.rename(f'{out}.parts/2_of_3', f'{out}.parts/2_of_3.part'), 'part 2 of 3 missing'),
    (lambda out, corpus: os.makedirs(f'{out}.parts/1_of_4'), 'parts of 3 and of 4'),
    (lambda out, corpus: shutil.rmtree(f'{out}.parts'), 'no parts in'),
    (lambda out, corpus: os.makedirs(f'{out}/mine'), 'exists'),
    (damaged, '2_of_3/train_00000.bin: its contents do not match'),
    (of_others, '2_of_3: was prepared from other input files'),
    (otherwise, '3_of_3: was prepared with another val_fraction'),
    (taken_twice, '2_of_3: is not the part that its name says'),
    (leads_out, '2_of_3: is not the part'), (half_done, 'out.part holds an interrupted run without --part')])
def test_parts_that_do_not_make_a_whole_are_named(corpus, tmp_path, harm, words):
    own = shutil.copytree(corpus, tmp_path / 'corpus')
    for n in (1, 2, 3):
        do(tmp_path / 'out', own, part=f'{n}/3', val_fraction=0.2)
    harm(str(tmp_path / 'out'), own)
    before = sorted(tmp_path.rglob('*'))
    with pytest.raises(UserError) as error:
        parts.merge(str(tmp_path / 'out'))
    assert (words in str(error.value) and '\n' not in str(error.value)
            and sorted(tmp_path.rglob('*')) == before)


@pytest.mark.parametrize('args, words', [
    (['--part=0/3'], 'part=0/3'), (['--part=4/3'], 'part=4/3'), (['--part=third'], 'part=third'),
    (['--merge=out', '--tokenizer=byte'], 'tokenizer=byte'), (['x.jsonl', '--part=1/2'], 'x.jsonl')])
def test_bad_parts_are_refused_in_one_line(tmp_path, args, words):
    done = run('prepare.py', *args, *[f'--out={tmp_path / "out"}'] * ('--merge=out' not in args))
    assert (done.returncode == 2 and len(done.stderr.splitlines()) == 1 and words in done.stderr
            and not list(tmp_path.iterdir()))


def test_a_part_with_bad_input_leaves_the_others_alone(corpus, tmp_path):
    do(tmp_path / 'out', corpus, part='1/2')
    before = contents(part_folder(str(tmp_path / 'out'), 1, 2))
    write_jsonl(tmp_path / 'bad.jsonl', ['fine'] * 20)
    with open(tmp_path / 'bad.jsonl', 'a') as f:
        f.write('{broken')
    with pytest.raises(UserError, match='broken JSON'):
        do(tmp_path / 'out', tmp_path / 'bad.jsonl', part='2/2')
    assert (contents(part_folder(str(tmp_path / 'out'), 1, 2)) == before
            and os.listdir(tmp_path / 'out.parts') == ['1_of_2'])
