"""
ROUGE of texts that a network writes: the scores are those of rouge-score, against the best of several
references; the texts do not depend on the batch.
"""
import csv
import json
import re

import pytest
import torch
from conftest import one_line, run
from test_export import written
from test_model import tiny

import sample
from configurator import UserError
from features.study import summaries
from features.study.summaries import read_pairs, scorer, strip, write
from tokenizer import ByteTokenizer, PromptFormat


def test_scores_by_hand():
    """The common subsequence has 4 words, the text 5, the reference 6: F1 = 2 · 4/5 · 4/6 / (4/5 + 4/6)."""
    score = scorer(stripped=True)('the cat sat on mats', ['the cat lay on the mats'])
    assert score['rougeL'] == pytest.approx(2 * (4 / 5) * (4 / 6) / (4 / 5 + 4 / 6)) == score['rougeLsum']
    assert score['stripped'] == pytest.approx(2 / 3)  # cat sat mat, cat lay mat
    assert scorer()('a b', ['x y', 'a b', 'a c'])['rougeL'] == 1  # the best of three


def test_sentences_may_change_places_for_rougelsum():
    score = scorer()('second thing.\nfirst thing.', ['first thing.\nsecond thing.'])
    assert score['rougeLsum'] == 1 and score['rougeL'] == pytest.approx(0.5)


@pytest.mark.parametrize('text', ['今天天气很好。', 'आज मौसम अच्छा है', 'Сегодня хорошая погода',
                                  'Die schöne Straße', 'วันนี้อากาศดี', 'naïve café', 'a cat_1 sat'])
def test_equal_texts_score_one_in_every_script_and_other_texts_do_not(text):
    score = scorer()
    assert score(text, [text])['rougeL'] == score(text, [text])['rougeLsum'] == 1
    assert score(text, ['x y z'])['rougeL'] == 0
    assert score('schön', ['schon'])['rougeL'] == 0 and score('sch\u0308on', ['x'])['rougeL'] == 0


def test_words_are_those_of_rouge_score_in_ascii_and_characters_where_there_are_no_spaces():
    from rouge_score.tokenizers import DefaultTokenizer
    text = "It's 12.5 o'clock: the_cat (sat) ON 3 mats!\n\tDone"
    assert summaries.Words().tokenize(text) == DefaultTokenizer().tokenize(text)
    assert summaries.Words().tokenize('今天 GPT2 好') == ['今', '天', 'gpt2', '好']
    assert summaries.Words().tokenize('cafe\u0301 É') == ['café', 'é']
    found = scorer()('今天', ['今天'])
    assert found['rougeL'] == 1 and found['rougeL_ascii'] == 0


def test_what_rot5_strips():
    assert strip("The dogs weren't 42, were they? They RAN!") == 'dogs ran'


@torch.no_grad()
@pytest.mark.parametrize('settings', [dict(n_encoder_layer=2, cross_rope='offset'), dict()], ids=str)
def test_a_batch_writes_what_its_rows_write(settings):
    model, tokenizer = (tiny(vocab_size=257, block_size=48, zero_init=False, **settings).eval(),
                        ByteTokenizer())
    sources = ['one', 'a longer source than that', 'x' * 100, '']
    together = write(model, tokenizer, sources, 12, 0, 3, torch.device('cpu'), 'float32')
    alone = [write(model, tokenizer, [source], 12, 0, 3, torch.device('cpu'), 'float32')[0]
             for source in sources]
    assert together == alone and len(set(alone)) > 1
    assert len(write(model, tokenizer, sources[:2], 12, 2, 3, torch.device('cpu'), 'float32')) == 2


@torch.no_grad()
@pytest.mark.parametrize('settings, room', [(dict(n_encoder_layer=2, source_size=32), 32), ({}, 24)], ids=str)
def test_sources_that_are_cut_are_counted(settings, room, capsys):
    model, tokenizer = tiny(vocab_size=257, block_size=48, **settings).eval(), ByteTokenizer()
    tokenizer = tokenizer.with_format(PromptFormat(suffix=(256,)))
    options = 0, 3, torch.device('cpu'), 'float32', 'dev.jsonl'
    write(model, tokenizer, ['a' * (room - 1), 'b'], 24, *options)
    assert capsys.readouterr().out == ''
    write(model, tokenizer, ['a' * room, 'b', 'c' * 99], 24, *options)
    said = capsys.readouterr().out
    assert said == f'dev.jsonl: 2 of 3 sources cut to {room} tokens, losing up to {100 - room}\n'
    if room == 24:
        with pytest.raises(UserError, match='max_new_tokens=47: leaves 1 of the 48 .* lower it to 24'):
            write(model, tokenizer, ['ab'], 47, *options)


def test_the_command_prints_means_and_writes_a_table(tmp_path):
    folder = written(tmp_path / 'run', tiny(vocab_size=257, block_size=48, n_encoder_layer=2, source_size=64,
                                            zero_init=False), ByteTokenizer())
    path = tmp_path / 'pairs.jsonl'
    path.write_text(''.join(json.dumps({'text': f'text {n}', 'short': ['a', f'b {n}']}) + '\n'
                            for n in range(5)))
    done = run('eval.py', 'summaries', f'--out_dir={folder}', path, '--source=text',
               '--target=short', '--max_new_tokens=10', f'--csv={tmp_path}/t.csv',
               '--stripped=True', '--device=cpu', '--dtype=float32')
    assert (done.returncode == 0 and 'pairs.jsonl  5 texts  rougeL ' in done.stdout
            and 'reference  a' in done.stdout), done.stdout + done.stderr
    rows = list(csv.DictReader(open(tmp_path / 't.csv', encoding='utf-8')))
    assert len(rows) == 5 and rows[3]['source'] == 'text 3'
    done = run('eval.py', 'summaries', f'--out_dir={folder}', path, '--source=text', '--target=short',
               '--max_new_tokens=4', '--limit=1', '--device=cpu')
    assert re.search(r'  1 texts  rougeL [\d.]+ ± n/a', done.stdout), done.stdout + done.stderr
    model, tokenizer = sample.load(folder, encoder=True)
    assert (rows[3]['written']
            == write(model, tokenizer, ['text 3'], 10, 0, 1, torch.device('cpu'), 'float32')[0])


@pytest.mark.parametrize('line, words', [
    ('{"source": 3, "target": "x"}', 'takes a text'), ('{"source": "x", "target": []}', 'or a list of them'),
    ('{"source": "x"}', 'no field target; it has source: set --target'), ('[1]', 'no field source'),
    ('{', 'JSON'), (r'{"source": "\udce9", "target": "x"}', 'not UTF-8'),
    (r'{"source": "x", "target": "\udce9"}', 'not UTF-8')])
def test_a_line_that_is_no_pair_is_named(line, words, tmp_path):
    (tmp_path / 'p.jsonl').write_text('{"source": "x", "target": "y"}\n' + line + '\n')
    with pytest.raises(UserError, match=r'p\.jsonl:2: ') as caught:
        read_pairs(str(tmp_path / 'p.jsonl'), 'source', 'target')
    assert words in str(caught.value)


def test_only_a_newline_ends_a_line_of_pairs_and_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / 'p.jsonl').write_bytes(b'\xef\xbb\xbf'
                                       + '{"source":\r"x\u2028y",\r"target": "\x85"}\r\n'.encode())
    (pair,) = read_pairs(str(tmp_path / 'p.jsonl'), 'source', 'target')
    assert pair.source == 'x\u2028y' and pair.references == ['\x85']


def test_more_than_the_network_writes_is_refused(tmp_path):
    folder = written(tmp_path / 'run', tiny(vocab_size=257, n_encoder_layer=2), ByteTokenizer())
    (tmp_path / 'p.jsonl').write_text('{"source": "x", "target": "y"}')
    assert 'max_new_tokens=100' in one_line(run('eval.py', 'summaries', f'--out_dir={folder}',
                                                tmp_path / 'p.jsonl'))
    assert 'no-such.jsonl' in one_line(run('eval.py', 'summaries', f'--out_dir={folder}', 'no-such.jsonl'))
    assert summaries.STOP_WORDS >= {'the', 'not'}
