"""
Where pairs come from: prompt templates, the sections of TinyStories-Instruct, the docstrings of the standard
library.
"""
import ast
import csv
import json

import numpy as np
import pytest
from conftest import one_line, run, train

from configurator import UserError
from features.study.summaries import read_pairs
from features.text.pairs import fill, sections, text_of
from features.text.reader import Reader, documents
from features.text.settings import TextConfig
from features.text.sources import find_files
from tokenizer import ByteTokenizer

ALPACA = r'### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n'


def pairs_of(folder):
    """{source: target} of a prepared folder of bytes, both splits."""
    found = {}
    for split in ('train', 'val'):
        ids = np.fromfile(f'{folder}/{split}_00000.bin', '<u2')
        parts = [ByteTokenizer().decode(part) for part in np.split(ids, np.flatnonzero(ids == 256) + 1)[:-1]]
        found |= dict(zip(parts[::2], parts[1::2]))
    return {source.removesuffix('<|endoftext|>'): target.removesuffix('<|endoftext|>')
            for source, target in found.items()}


def prepared(tmp_path, *args):
    done = run('prepare.py', *args, '--tokenizer=byte', '--val_fraction=0.3', f'--out={tmp_path}/data')
    assert done.returncode == 0, done.stderr
    assert '--objective=seq2seq' in done.stdout
    return pairs_of(tmp_path / 'data')


# --- templates ---

def test_a_template_is_filled_and_its_empty_paragraphs_left_out():
    row = {'instruction': 'Add {1} and 2.', 'input': '', 'output': '3'}
    assert fill(ALPACA, row) == '### Instruction:\nAdd {1} and 2.\n\n### Response:\n'
    assert (fill(ALPACA, row | {'input': 'x'}) == '### Instruction:\nAdd {1} and 2.\n\n### Input:\nx\n\n'
            '### Response:\n')
    assert fill('{{{input}}}', row | {'input': 'x'}) == '{x}'
    assert fill(r'\\n{input}\t', row | {'input': r'\n'}) == r'\n\n' + '\t'  # a field is as it is


def test_pairs_by_a_template(tmp_path):
    rows = [{'instruction': f'Count to {n}.', 'input': 'aloud' * (n % 2), 'output': f'1 to {n}'}
            for n in range(40)]
    (tmp_path / 'asked.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    found = prepared(tmp_path, tmp_path / 'asked.jsonl', f'--prompt_template={ALPACA}', '--target=output')
    assert found == {fill(ALPACA, row): row['output'] for row in rows}
    assert ([(p.source, p.references)
             for p in read_pairs(str(tmp_path / 'asked.jsonl'), '', 'output', ALPACA)]
            == [(a, [b]) for a, b in ((fill(ALPACA, r), r['output']) for r in rows)])
    (tmp_path / 'null.jsonl').write_text('{"instruction": "Go.", "input": null, "output": "Gone."}\n')
    assert (read_pairs(str(tmp_path / 'null.jsonl'), '', 'output', ALPACA)[0].source == '### Instruction:\n'
            'Go.\n\n### Response:\n')
    with pytest.raises(UserError,
                       match='no field question; it has instruction, input, output: set --prompt_template'):
        read_pairs(str(tmp_path / 'asked.jsonl'), '', 'output', '{question}')


@pytest.mark.parametrize('args, words', [
    (['--prompt_template=hello', '--target=b'], 'has no {FIELD}'),
    (['--prompt_template={a!r}', '--target=b'], 'braces that are no {FIELD}'),
    (['--prompt_template={a', '--target=b'], "prompt_template='{a'"),
    (['--prompt_template={}', '--target=b'], 'braces that are no {FIELD}'),
    (['--prompt_template={a}\udce9', '--target=b'], 'prompt_template: not UTF-8'),
    (['--prompt_template={a}', '--source=a', '--target=b'], 'source=a'),
    (['--prompt_template={a}'], 'target='),
    (['--prompt_template={c}', '--target=b'], 'no field c; it has a, b: set --prompt_template and --target')])
def test_templates_that_cannot_be_are_refused(args, words, tmp_path):
    (tmp_path / 'p.jsonl').write_text('{"a": "x", "b": "y"}\n')
    assert words in one_line(run('prepare.py', tmp_path / 'p.jsonl', *args, '--tokenizer=byte',
                                 f'--out={tmp_path}/out'))
    assert not list(tmp_path.glob('out*'))


# --- TinyStories-Instruct ---

TALES = ('Features: Dialogue\nWords: quit, oak\nSummary: Two play.\nStory: \n\nSara said:\n"Summary of it: '
         'fun."\n\nThey went home.\n', 'Story:\n\nA cat.\n\nIt sat.\nSummary: A cat sat.\nWords: sat\n',
         'Words: sad\nStory: Without a summary.\n')


def test_sections_come_in_any_order():
    first, second, third = map(sections, TALES)
    assert (first['Words'] == 'quit, oak'
            and first['Story'] == 'Sara said:\n"Summary of it: fun."\n\nThey went home.')
    assert second == {'Features': '', 'Words': 'sat', 'Random sentence': '', 'Summary': 'A cat sat.',
                      'Story': 'A cat.\n\nIt sat.'}
    assert third['Summary'] == ''


def test_pairs_of_sections(tmp_path):
    more = [f'Summary: {n} is it.\nStory: A tale of {n}.\n' for n in range(30)]
    (tmp_path / 'tales.txt').write_text('<|endoftext|>\n'.join([*TALES, *more]))
    found = prepared(tmp_path, tmp_path / 'tales.txt', '--source=Story', '--target=Summary')
    assert (len(found) == 32 and found['A cat.\n\nIt sat.'] == 'A cat sat.'
            and found['A tale of 7.'] == '7 is it.')
    refused = run('prepare.py', tmp_path / 'tales.txt', '--source=Tale', '--target=Summary',
                  f'--out={tmp_path}/other')
    assert 'has no fields Tale,Summary' in one_line(refused)


def test_a_network_is_held_against_its_own_validation_pairs(tmp_path):
    (tmp_path / 'tales.txt').write_text('<|endoftext|>\n'.join(f'Summary: {n} is it.\n'
                                                               f'Story: A tale of {n}.\n' for n in range(30)))
    found = prepared(tmp_path, tmp_path / 'tales.txt', '--source=Story', '--target=Summary')
    train(tmp_path / 'run', '--objective=seq2seq', '--n_encoder_layer=1', '--block_size=16',
          '--source_size=24', '--max_iters=2', dataset=tmp_path / 'data')
    done = run('eval.py', 'summaries', f'--out_dir={tmp_path}/run', '--max_new_tokens=8',
               f'--csv={tmp_path}/t.csv', '--device=cpu')
    rows = list(csv.DictReader(open(tmp_path / 't.csv', encoding='utf-8')))
    assert done.returncode == 0 and f'{len(rows)} texts' in done.stdout and 1 < len(rows) < 30
    assert all(found[row['source']] == row['reference'] for row in rows)


# --- docstrings ---

CODE = '''
class A:
    @staticmethod
    def f(x,
          y):
        """Add two numbers.

        At length."""
        def inner():
            "What is inside."
            return x
        return x + y

def only(): "Said beside its name."
def without(): return 1
async def g():
    \'\'\'Wait.\'\'\'
    # a comment that stays
    await x
def blank():
    """
    Below.
    """
    pass
'''


def test_a_function_and_the_first_line_of_its_docstring(tmp_path):
    (tmp_path / 'a.py').write_text(CODE)
    (tmp_path / 'broken.py').write_text('def f(:')
    s = TextConfig(sources=['stdlib_docstrings'], split='document', val_fraction=0.1)
    files = [(str(tmp_path / name), 'docstrings') for name in ('a.py', 'broken.py')]
    found = [text for task in Reader(files, s).tasks(None) for _, text in documents(task, s)]
    assert found == [text_of({'a': source, 'b': target}, TextConfig(source='a', target='b'), '')
                     for source, target in (
                         ('async def g():\n    # a comment that stays\n    await x', 'Wait.'),
                         ('def blank():\n    pass', 'Below.'),
                         ('def f(x,\n      y):\n    def inner():\n        "What is inside."\n        return '
                          'x\n    return x + y', 'Add two numbers.'),
                         ('def inner():\n    return x', 'What is inside.'))]
    for text in found:
        ast.parse(text.partition('\x1e')[0])


def test_the_lines_of_code_are_those_that_python_counts(tmp_path):
    """A form feed, as the standard library has them, and other signs in strings end no line."""
    code = 'x = "\u2028\x1c"\n\x0c\ndef f(x):\n    """Add one."""\n    y = "\x85"\n    return x + 1\n'
    code += '\x0c\r\ndef g(x):\r\n    """Add two."""\r\n    return x\r\n'
    (tmp_path / 'a.py').write_bytes(code.encode())
    s = TextConfig(sources=['stdlib_docstrings'], split='document')
    found = [text for task in Reader([(str(tmp_path / 'a.py'), 'docstrings')], s).tasks(None)
             for _, text in documents(task, s)]
    assert [tuple(text.split('\x1e<|target|>\x1e')) for text in found] == [
        ('def f(x):\n    y = "\x85"\n    return x + 1', 'Add one.'), ('def g(x):\n    return x', 'Add two.')]


def test_the_standard_librarys_docstrings_are_pairs():
    files = find_files(['stdlib_docstrings'])
    assert len(files) > 300 and all(kind == 'docstrings' for _, kind in files)
    for args, words in ((['stdlib_docstrings', 'stdlib'], 'prepare it alone'),
                        (['stdlib_docstrings', '--source=a', '--target=b'], 'prepare it alone'),
                        (['stdlib_docstrings', '--split=tail'], 'split=tail')):
        assert words in one_line(run('prepare.py', *args, '--out=nowhere'))
