"""
Tasks have the numbers of lm-evaluation-harness for every item, whatever the batches; texts are read in
windows; a file that is no task is refused in one line.
"""
import copy
import csv
import functools
import importlib.metadata
import json
import math
import os
import re
import sys

import pytest
import torch
from conftest import ROOT, one_line, run
from test_hub import saved, theirs, write_tokenizer

from configurator import UserError
from eval import TaskSettings
from features.study import harness
from features.study.items import Item, file_and_delimiter, read_items, with_shots
from features.study.likelihoods import score
from features.study.stats import mean_and_error, show_error
from features.study.tasks import encode_pair, figures, names_of, score_items, score_text, windows
from sample import generate, load
from tokenizer import ByteTokenizer, PromptFormat, new_tokenizer

LAMBADA = [{'context': f'the {n} small cats sat on a very old mat, and then the {n}', 'continuation': word}
           for n, word in enumerate(['cat', 'mat', 'a', 'old dog'])]
CHOICES = [{'query': f'Question: what is {n} + 1?', 'choices': ['one', 'two or more', 'a 3', f'{n + 1}'],
            'gold': n % 4} for n in range(6)]
PAIRS = [{'sentence_good': f'{name} sees herself.', 'sentence_bad': f'{name} sees himself.'}
         for name in ('Anna', 'Eve', 'Ada')]
CPU = torch.device('cpu')


def write(path, items):
    path.write_text('\n'.join(map(json.dumps, items)) + '\n')
    return str(path)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """The folder of a random GPT-2 on bytes, as transformers writes it."""
    folder = saved(tmp_path_factory.mktemp('gpt2'), vocab_size=257, n_positions=96)
    write_tokenizer(folder, 257)
    with open(os.path.join(folder, 'tokenizer_config.json'), 'w') as f:
        json.dump({'eos_token': '<|endoftext|>'}, f)
    return folder


@pytest.fixture(scope='module')
def model(folder):
    return load(f'hf:{folder}')


# --- the oracle ---

def by_harness(lm_eval, lm, tmp_path):
    """{task: [the sample's results]} of lm-evaluation-harness on LAMBADA, CHOICES and PAIRS."""
    shape = {'test_split': 'train', 'dataset_path': 'json', 'metadata': {'version': 1}}
    choice = {'output_type': 'multiple_choice', 'metric_list': [{'metric': 'acc'}, {'metric': 'acc_norm'}]}
    configs = {
        'ours_lambada': {'output_type': 'loglikelihood', 'doc_to_text': '{{context}}',
                         'doc_to_target': ' {{continuation}}',
                         'metric_list': [{'metric': 'perplexity'}, {'metric': 'acc'}]},
        'ours_choices': choice | {'doc_to_text': '{{query}}\nAnswer:', 'doc_to_target': '{{gold}}',
                                  'doc_to_choice': '{{choices}}'},
        'ours_pairs': choice | {'doc_to_text': '', 'doc_to_target': 0, 'doc_to_choice': '{{[sentence_good, '
                                'sentence_bad]}}', 'target_delimiter': ' '}}
    for name, items in (('ours_lambada', LAMBADA), ('ours_choices', CHOICES), ('ours_pairs', PAIRS)):
        data = write(tmp_path / f'{name}.jsonl', items)
        # JSON is YAML
        (tmp_path / f'{name}.yaml').write_text(
            json.dumps(shape | configs[name] | {'task': name, 'dataset_kwargs': {'data_files': data}}))
    from lm_eval.tasks import TaskManager
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    return lm_eval.simple_evaluate(model=lm, tasks=list(configs), num_fewshot=0, task_manager=manager,
                                   log_samples=True, bootstrap_iters=100)


def test_item_by_item_the_numbers_are_those_of_the_harness(folder, model, tmp_path, monkeypatch):
    lm_eval = pytest.importorskip('lm_eval')
    import transformers
    from lm_eval.models.huggingface import HFLM
    for name in ('HF_HUB_OFFLINE', 'HF_DATASETS_OFFLINE'):
        monkeypatch.setenv(name, '1')
    monkeypatch.setenv('HF_DATASETS_CACHE', str(tmp_path / 'cache'))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=f'{folder}/tokenizer.json',
                                                     eos_token='<|endoftext|>')
    lm = HFLM(pretrained=theirs('gpt2', vocab_size=257, n_positions=96), tokenizer=tokenizer, batch_size=2,
              max_length=96, device='cpu')
    results = by_harness(lm_eval, lm, tmp_path)
    for task, delimiter in (('ours_lambada', ' '), ('ours_choices', '\nAnswer: '), ('ours_pairs', ' ')):
        items = read_items(f'{tmp_path}/{task}.jsonl', delimiter)
        if task == 'ours_pairs':
            for item in items:
                # the harness' delimiter before the first word
                item.choices = [' ' + choice for choice in item.choices]
        scores = score_items(*model, items, CPU, 'float32')
        samples = sorted(results['samples'][task], key=lambda sample: sample['doc_id'])
        for ours, sample in zip(scores, samples, strict=True):
            responses = [r[0] if isinstance(r[0], (list, tuple)) else r for r in sample['resps']]
            for (nats, greedy), (wanted, wanted_greedy) in zip(ours, responses, strict=True):
                assert nats == pytest.approx(float(wanted), abs=1e-3, rel=1e-5)
                assert greedy == (str(wanted_greedy) == 'True')
        if task == 'ours_pairs':
            continue  # lm-eval counts its characters without that blank
        measures, records = figures(items, scores)
        assert [r['acc'] for r in records] == [sample['acc'] for sample in samples]
        for name, (value, error) in measures.items():
            assert value == pytest.approx(results['results'][task][f'{name},none'], rel=1e-4)
            if name != 'perplexity':
                assert error == pytest.approx(results['results'][task][f'{name}_stderr,none'], rel=1e-4)


def run_harness(folder, tmp_path, tasks, **options):
    args = ['harness', f'--out_dir=hf:{folder}', f'--include={tmp_path}', '--device=cpu', '--dtype=float32']
    return run('eval.py', *args, f'--tasks={tasks}', **options)


def test_the_harness_runs_on_our_models_by_itself(folder, tmp_path, monkeypatch):
    lm_eval = pytest.importorskip('lm_eval')
    monkeypatch.setenv('HF_DATASETS_CACHE', str(tmp_path / 'cache'))
    by_harness(lm_eval, 'dummy', tmp_path)  # writes the files
    ours_alone = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
    # lm-eval's own are thousands of files: 20 seconds
    monkeypatch.setattr('lm_eval.tasks.TaskManager', ours_alone)
    done = run_harness(folder, tmp_path, 'ours_choices,ours_lambada')
    assert done.returncode == 0, done.stderr
    ours = run('eval.py', 'tasks', f'--out_dir=hf:{folder}', '--dtype=float32', '--delimiter=\nAnswer: ',
               f'{tmp_path}/ours_choices.jsonl')
    found = {line.split('|')[5].strip(): float(line.split('|')[7]) for line in done.stdout.splitlines()
             if line.startswith(('|ours_choices', '|    '))}
    assert f'acc {found["acc"]:.4f}' in ours.stdout
    assert "lm-eval has no such task" in run_harness(folder, tmp_path, 'ours_choices,nothing').stderr


@pytest.mark.slow
def test_the_harness_runs_beside_its_own_tasks_in_a_process_of_its_own(folder, tmp_path, monkeypatch):
    lm_eval = pytest.importorskip('lm_eval')
    monkeypatch.setenv('HF_DATASETS_CACHE', str(tmp_path / 'cache'))
    by_harness(lm_eval, 'dummy', tmp_path)
    offline = {'HF_HUB_OFFLINE': '1', 'HF_DATASETS_CACHE': f'{tmp_path}/cache'}
    done = run_harness(folder, tmp_path, 'ours_choices,ours_lambada', env=offline)
    assert done.returncode == 0 and '|ours_choices' in done.stdout, done.stderr


def test_every_context_begins_with_the_start_token_in_the_harness_too(folder, monkeypatch):
    lm_eval = pytest.importorskip('lm_eval')
    from lm_eval.api.instance import Instance
    network, tokenizer = load(f'hf:{folder}')
    tokenizer = tokenizer.with_format(PromptFormat((7,)))
    ids_of = tokenizer.encode
    assert encode_pair(tokenizer, '', 'b') == ([7], ids_of('b'))
    assert encode_pair(tokenizer, 'a', ' b') == ([7, *ids_of('a')], ids_of(' b'))
    monkeypatch.setattr(lm_eval, 'simple_evaluate', lambda model, **_: model)
    # reads all tasks: ten seconds
    monkeypatch.setattr('lm_eval.tasks.TaskManager', lambda include_path: None)
    lm = harness.evaluate(network, tokenizer, [], 0, 0, CPU, 'float32')
    pairs = [('', 'b'), ('a', ' b'), ('', 'the cat')]
    found = lm.loglikelihood([Instance('loglikelihood', {}, pair, 0) for pair in pairs], disable_tqdm=True)
    assert found == score(network, [encode_pair(tokenizer, *pair) for pair in pairs], CPU, 'float32')
    rolling = lm.loglikelihood_rolling([Instance('loglikelihood_rolling', {}, ('the cat',), 0)])
    # as lm-eval's own models: the start token, which the tokenizer writes, is predicted from another one
    [(nats, _)] = score(network, [([7], [7, *ids_of('the cat')])], CPU, 'float32')
    assert rolling == [pytest.approx(nats, abs=1e-4)]
    written = lm.generate('a', {'max_gen_toks': 5})
    prompt = [7, *ids_of('a')]
    ids = [int(row[0]) for row in generate(network, [prompt], 5, temperature=0)]
    assert written == tokenizer.decode([*prompt, *ids])[len(tokenizer.decode(prompt)):]


@pytest.mark.full
def test_the_harness_lets_our_models_write(model, tmp_path):
    """generate_until: greedy, up to a stop string or so many tokens; the end of a long prompt."""
    pytest.importorskip('lm_eval')
    network, tokenizer = model
    harness_task(tmp_path, ['the cat', 'a mat ' * 40], until=['\n\n'], max_gen_toks=12)
    results = harness.evaluate(network, tokenizer, ['ours_writes'], 0, 0, CPU, 'float32', str(tmp_path))
    for sample in results['samples']['ours_writes']:
        prompt = tokenizer.encode(sample['doc']['text'])[-84:]
        ids = [row[0] for row in generate(network, [prompt], 12, temperature=0)]
        assert (sample['resps'][0][0]
                == tokenizer.decode(prompt + [int(i) for i in ids])[len(tokenizer.decode(prompt)):])


def test_no_file_of_ours_hides_a_library():
    """The folder of a script is first on sys.path: evaluate.py once hid the package that lm-eval imports."""
    names = {path.stem for path in ROOT.glob('*.py')}
    libraries = importlib.metadata.packages_distributions().keys() | sys.stdlib_module_names
    assert 'torch' in libraries and not names & libraries, names & libraries


def harness_task(folder, texts, **generation):
    """
    Write tasks of lm-eval with these prompts: ours_writes generates a text after each, ours_scores scores an
    x.
    """
    data = write(folder / 'data.jsonl', [{'text': text} for text in texts])
    task = {'task': 'ours_writes', 'output_type': 'generate_until', 'generation_kwargs': generation,
            'dataset_path': 'json', 'dataset_kwargs': {'data_files': data}, 'test_split': 'train',
            'doc_to_text': '{{text}}', 'doc_to_target': 'x', 'metric_list': [{'metric': 'exact_match'}]}
    (folder / 'task.yaml').write_text(json.dumps(task))
    scored = {'task': 'ours_scores', 'output_type': 'loglikelihood'}
    scored['metric_list'] = [{'metric': 'perplexity'}]
    (folder / 'scored.yaml').write_text(json.dumps(task | scored))


@pytest.mark.full
def test_the_harness_reads_prompts_whole_and_says_what_it_cuts(model, tmp_path, monkeypatch, capsys):
    """
    lm-eval's default of 256 new tokens is more than this context of 96; the prompt is still read as far as it
    fits.
    """
    pytest.importorskip('lm_eval')
    monkeypatch.setenv('HF_DATASETS_CACHE', str(tmp_path / 'cache'))
    read = []

    def stream(model, tokenizer, prompts, stop, max_new_tokens, temperature):
        read.append((len(prompts[0]), max_new_tokens))
        return [(0, 'x')] * max_new_tokens
    monkeypatch.setattr(harness, 'stream', stream)
    harness_task(tmp_path, ['a' * 30, 'b' * 90, 'c' * 200], until=['\n\n'])
    harness.evaluate(*model, ['ours_writes', 'ours_scores'], 0, 0, CPU, 'float32', str(tmp_path))
    assert read == [(30, 67), (90, 48), (48, 49)]
    assert capsys.readouterr().out.splitlines()[-1] == (
        'harness: the network reads 96 tokens: '
        '1 of 3 contexts (one for each choice) cut to 96 tokens, losing up to 104; '
        '1 of 3 prompts cut to 48 tokens, losing up to 152; '
        '1 of 3 prompts, for the end of a text, cut to 41 tokens, losing up to 49; '
        '3 of 3 values of max_gen_toks cut to 48 to 67 tokens, losing up to 208')


@pytest.mark.parametrize('T', [1, 2, 3, 8, 9])
def test_some_of_a_prompt_is_read_to_the_end_of_the_text(T):
    for length in range(1, 3 * T):
        for asked in range(3 * T):
            kept, most = harness.fit(length, asked, T)
            window = 0  # where generate()'s begins
            for end in range(kept, kept + most):
                window = end - max(1, T // 2) if end - window > T else window
                assert window < kept and harness.still_read(kept, end - kept + 1, T) == kept - window
            assert 0 < kept <= min(length, T) and (kept == length or length > T) and most <= asked
            assert most == asked or most >= T // 2
            if length > T and asked <= T // 2:
                assert (kept, most) == (T - asked, asked)  # as lm-eval's own models do


# --- scores ---

def test_scores_do_not_depend_on_the_batches_and_are_sums_of_log_softmax(model):
    network, tokenizer = model
    torch.manual_seed(0)
    pairs = [(torch.randint(257, (n,)).tolist(), torch.randint(257, (1 + n % 5,)).tolist())
             for n in (1, 30, 7, 95, 12, 200, 3)]
    found = score(network, pairs, CPU, 'float32')
    for few in (1, 64, 300):
        assert all(a[0] == pytest.approx(b[0], abs=1e-4) and a[1] == b[1]
                   for a, b in zip(found, score(network, pairs, CPU, 'float32', batch_tokens=few)))
    for (context, continuation), (nats, greedy) in zip(pairs, found):
        ids = torch.tensor([(context + continuation)[-97:]])
        log_probs = network(ids[:, :-1])[0].log_softmax(-1)[-len(continuation):]
        wanted = log_probs.gather(1, torch.tensor(continuation)[:, None])
        assert nats == pytest.approx(wanted.sum().item(), abs=1e-4)
        assert greedy == (log_probs.argmax(1).tolist() == continuation)
    likely = [network(torch.tensor([[5, 9]]))[0, -1].argmax().item()]
    assert score(network, [([5, 9], likely)], CPU, 'float32')[0][1]
    with pytest.raises(UserError, match='a continuation of 97 tokens is longer than the 96'):
        score(network, [([1], [2] * 97)], CPU, 'float32')


def test_contexts_that_are_cut_are_counted(model, capsys):
    network, tokenizer = model
    items = [Item('x' * 90, ['abc', 'abcdef'], 0), Item('x' * 96, ['abc', 'a'], 0)]
    items += [Item('x' * 300, ['b' * 95, 'a'], 0)]
    score_items(network, tokenizer, items[:1], CPU, 'float32')
    score_text(network, tokenizer, 'x' * 300, 10, CPU, 'float32')
    assert capsys.readouterr().out == ''
    score_items(network, tokenizer, items, CPU, 'float32', what='task.jsonl')
    assert capsys.readouterr().out == (
        'task.jsonl: the network reads 96 tokens: '
        '3 of 6 contexts (one for each choice) cut to 2 to 96 tokens, losing up to 298\n')
    gone = Item('what?', ['b' * 96, 'a'], 0, 'task.jsonl:7')
    with pytest.raises(UserError, match='jsonl:7: a continuation of 96 tokens: .* one of the 5 tokens'):
        score_items(network, tokenizer, [gone], CPU, 'float32')


def test_blanks_go_with_the_continuation():
    tokenizer = ByteTokenizer()
    assert encode_pair(tokenizer, 'ab ', 'c') == (list(b'ab'), list(b' c'))
    assert encode_pair(tokenizer, '', 'ab') == ([256], list(b'ab'))


def test_every_token_of_a_text_is_predicted_once_from_all_that_fits(model):
    network, tokenizer = model
    text = 'the cat sat on the mat. ' * 20
    ids = tokenizer.encode(text)
    for T, stride in ((96, 48), (96, 96), (10, 3), (1000, 1000)):
        parts = list(windows(ids, 256, T, stride))
        assert [token for _, continuation in parts for token in continuation] == ids
        assert all(len(c) + len(n) <= T + 1 for c, n in parts)
    assert all(len(context) + len(continuation) == 97
               for context, continuation in list(windows(ids, 256, 96, 48))[1:])
    nats, tokens, size = score_text(network, tokenizer, text, 1, CPU, 'float32')
    padded = [256] + ids
    exact = -sum(network(torch.tensor([padded[max(0, n - 95):n + 1]]))[0, -1].log_softmax(-1)[padded[n + 1]]
                 .item() for n in range(len(ids)))
    assert (tokens, size) == (len(ids), len(text)) and nats == pytest.approx(exact, rel=1e-4)


def test_examples_are_others_with_their_answers_and_always_the_same():
    items = [Item(f'Q{n}? ', ['no', f'yes{n}'], 1) for n in range(8)]
    shown = with_shots(items, 2)
    assert shown == with_shots(items, 2) != with_shots(items, 2, seed=1) and with_shots(items, 0) is items
    for n, item in enumerate(shown):
        parts = item.context.split('\n\n')
        assert parts[2] == f'Q{n}? '
        assert all(part == f'Q{part[1]}? yes{part[1]}' and part[1] != str(n) for part in parts[:2])
        assert parts[0] != parts[1]
    with pytest.raises(UserError, match='shots=8: the task has 8 items'):
        with_shots(items, 8)


def test_figures_and_their_errors():
    measures, records = figures([Item('', ['ab', 'abcd'], 1)] * 2,
                                [[(-2.0, False), (-3.0, False)], [(-1.0, True), (-4.0, False)]])
    assert measures['acc'] == (0, 0)
    assert measures['acc_norm'] == (0.5, pytest.approx(0.5))
    assert [r['chosen'] for r in records] == [0, 0]
    measures, _ = figures([Item('', ['x'], 0)] * 3, [[(-1.0, True)], [(-2.0, False)], [(-3.0, True)]])
    assert measures['acc'][0] == pytest.approx(2 / 3)
    assert measures['perplexity'][0] == pytest.approx(math.exp(2))
    assert mean_and_error([1, 2, 3, 4]) == (2.5, pytest.approx(math.sqrt(5 / 3 / 4)))


def test_a_single_item_has_no_standard_error():
    assert (figures([Item('', ['ab', 'abcd'], 1)], [[(-2.0, False), (-3.0, False)]])[0]
            == {'acc': (0, None), 'acc_norm': (1, None)})
    assert figures([Item('', ['x'], 0)], [[(-1.0, True)]])[0] == {'acc': (1, None),
                                                                  'perplexity': (pytest.approx(math.e), None)}
    assert (show_error(None), show_error(0.12345), show_error(0.12345, 2)) == ('n/a', '0.1235', '0.12')


# --- as a user runs it ---

def test_tasks_and_texts_from_the_command_line(folder, tmp_path):
    files = [write(tmp_path / 'lambada.jsonl', LAMBADA), write(tmp_path / 'choices.jsonl', CHOICES),
             write(tmp_path / 'pairs.jsonl', PAIRS)]
    done = run('eval.py', 'tasks', f'--out_dir=hf:{folder}', *files, '--dtype=float32',
               f'--csv={tmp_path}/items.csv')
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert any('lambada.jsonl' in line and 'perplexity' in line for line in lines)
    assert any('choices.jsonl' in line and 'acc_norm' in line for line in lines)
    rows = list(csv.DictReader(open(tmp_path / 'items.csv')))
    assert len(rows) == 13 and rows[4]['gold'] == '0' and len(rows[4]['nats'].split()) == 4
    assert ' 2 items' in run('eval.py', 'tasks', f'--out_dir=hf:{folder}', files[1], '--limit=2',
                             '--shots=1').stdout
    assert '0 ± n/a  acc_norm' in run('eval.py', 'tasks', f'--out_dir=hf:{folder}', files[1],
                                      '--limit=1').stdout
    (tmp_path / 'a.txt').write_text('naïve cats ' * 30)
    done = run('eval.py', 'text', f'--out_dir=hf:{folder}', f'{tmp_path}/a.txt')
    assert (done.returncode == 0 and '360 tokens, 360 bytes' in done.stdout
            and 'perplexity' in done.stdout), done.stderr


@pytest.fixture(scope='module')
def other(tmp_path_factory):
    """The folder of another network, with the same tokenizer."""
    folder = saved(tmp_path_factory.mktemp('other'), vocab_size=257, n_positions=96, n_layer=1)
    write_tokenizer(folder, 257)
    return folder


SCHEMAS = [{'context_options': [f'the cat saw {n} dogs as the {name}' for name in ('cat', 'dogs')],
            'continuation': word, 'gold': n % 2} for n, word in enumerate(['ran', 'was big', 'sat'])]
WINOGRANDE = [{'sentence': f'The {n} cats saw it as the _ ran.', 'option1': 'cat', 'option2': 'dog',
               'answer': '2'} for n in range(3)]
SEVERAL = [{'query': f'What is {n}?', 'choices': ['a number', 'a cat', 'two words'], 'gold': [0, 2]}
           for n in range(4)]


def test_one_command_evaluates_a_table_beside_another_network(folder, other, tmp_path):
    tasks = {'choices': CHOICES, 'lambada': LAMBADA, 'schemas': SCHEMAS, 'winogrande': WINOGRANDE,
             'several': SEVERAL}
    files = [write(tmp_path / f'{name}.jsonl', items) for name, items in tasks.items()]
    files[0] += r'=\nAnswer: '
    done = run('eval.py', 'tasks', f'--out_dir=hf:{folder}', *files, '--dtype=float32',
               f'--beside=hf:{other}', f'--csv={tmp_path}/items.csv', f'--table={tmp_path}/table.csv',
               f'--picture={tmp_path}/a.png')
    assert done.returncode == 0, done.stderr
    assert (tmp_path / 'a.png').read_bytes().startswith(b'\x89PNG')
    table = list(csv.DictReader(open(tmp_path / 'table.csv')))
    measures = {}
    for row in table:
        measures.setdefault(os.path.basename(row['task']), []).append(row['measure'])
    assert measures == {
        'choices.jsonl': ['acc', 'acc_norm'] * 2, 'lambada.jsonl': ['acc', 'perplexity'] * 2,
        'schemas.jsonl': ['acc'] * 2, 'winogrande.jsonl': ['acc'] * 2,
        'several.jsonl': ['acc', 'acc_norm', 'mass'] * 2}
    items = list(csv.DictReader(open(tmp_path / 'items.csv')))
    assert len(items) == 2 * (6 + 4 + 3 + 3 + 4)
    assert {row['network'] for row in items} == {f'hf:{folder}', f'hf:{other}'}
    for row in table:  # the table has the means of the items, and their standard errors
        of_items = [float(item[row['measure']]) for item in items if row['measure'] != 'perplexity'
                    and (item['network'], item['task']) == (row['network'], row['task'])]
        if of_items:
            mean, error = mean_and_error(of_items)
            assert (float(row['value']), float(row['standard_error'])) == pytest.approx((mean, error))
            chance = {'choices': 1 / 4, 'several': 2 / 3, 'schemas': 1 / 2, 'winogrande': 1 / 2}
            name = os.path.basename(row['task']).removesuffix('.jsonl')
            assert row['chance'] == '' or float(row['chance']) == pytest.approx(chance[name])
    mass = [[float(item['mass']) for item in items if item['mass'] and item['network'] == f'hf:{name}']
            for name in (folder, other)]
    mean, error = mean_and_error([a - b for a, b in zip(*mass)])
    [line] = [line for line in done.stdout.splitlines() if line.split()[:2] == ['several.jsonl', 'mass']]
    assert f'= {mean:+.4f} ± {error:.4f}  hf:{other}' in line
    model, tokenizer = load(f'hf:{folder}')  # the delimiter of the first file alone
    [(path, own)] = [file_and_delimiter(files[0])]
    nats = score_items(model, tokenizer, read_items(path, own), CPU, 'float32')
    assert own == '\nAnswer: ' and items[0]['nats'] == ' '.join(f'{value:.6f}' for value, _ in nats[0])


def test_an_adapter_stands_beside_its_model(folder, tmp_path):
    task = write(tmp_path / 'a.jsonl', LAMBADA)
    assert names_of([TaskSettings(out_dir='a', adapter='x'), TaskSettings(out_dir='a')]) == ['a + x', 'a']
    for args, words in (([f'--beside=hf:{folder}'], 'beside=.*: is evaluated already'),
                        ([f'--table={task}'], 'table=.*: is a task: give another file'),
                        ([f'--csv={tmp_path}/b.csv', f'--table={tmp_path}/b.csv'], 'table=.*: is the file'),
                        ([f'--picture={task}'], 'picture=.*: is a task')):
        message = one_line(run('eval.py', 'tasks', f'--out_dir=hf:{folder}', task, *args))
        assert re.search(words, message), message


@pytest.mark.parametrize('line, words', [
    ('{"query": "a", "choices": ["b"], "gold": 0}', 'choices: takes a list of two'),
    ('{"query": "a", "choices": ["b", "c"], "gold": 2}', 'gold=2: takes'),
    ('{"query": "a", "choices": ["b", "c"], "gold": true}', 'gold=True'),
    ('{"query": "a", "choices": ["b", 3], "gold": 0}', '3: takes text'),
    ('{"context": "a", "continuation": ""}', 'is empty'), ('{"context": "a"}', 'takes an object with query'),
    ('[1]', 'takes an object'), ('{"context": "a", "continuation": "\\ud800"}', 'takes text'),
    ('{"context": ', 'not readable as JSON'), ('', 'no items in it'), ('[' * 100_000, 'not readable as JSON'),
    ('{"query": "a", "choices": ["b", "c"], "gold": 0}\n{"context": "a", "continuation": "b"}', 'make two')],
                         ids=range(12))
def test_a_broken_line_is_named(line, words, tmp_path):
    (tmp_path / 'task.jsonl').write_text('\n' + line + '\n')
    with pytest.raises(UserError, match=words) as caught:
        read_items(f'{tmp_path}/task.jsonl')
    assert '\n' not in str(caught.value) and f'{tmp_path}/task.jsonl' in str(caught.value)
    assert words in ('no items in it', 'make two') or 'jsonl:2:' in str(caught.value)


class Pairs(ByteTokenizer):
    """Bytes, but for 'on', which is one token."""

    def encode(self, text):
        return [128 if b == 0 else b for b in text.replace('on', '\0').encode()]


def test_a_choice_without_a_token_of_its_own_is_named(model, tmp_path):
    path = write(tmp_path / 'task.jsonl', [{'query': 'o', 'choices': ['k', 'n'], 'gold': 1}])
    with pytest.raises(UserError, match=f"{path}:1: 'n' begins inside a token"):
        score_items(model[0], Pairs(), read_items(path, delimiter=''), CPU, 'float32')
    with pytest.raises(UserError, match=f'{path}:1: a continuation of 100 tokens: the network reads 96'):
        score_items(model[0], Pairs(),
                    read_items(write(tmp_path / 'task.jsonl', [{'context': 'o', 'continuation': 'x' * 99}])),
                    CPU, 'float32')


def test_text_that_cannot_be_encoded_or_read_is_named(model, tmp_path):
    path = write(tmp_path / 'task.jsonl', [{'context': 'ab', 'continuation': 'Z'}])
    tokenizer = new_tokenizer('char', ['ab '])
    with pytest.raises(UserError, match=f"^{path}:1: character 'Z' is not among"):
        score_items(model[0], tokenizer, read_items(path), CPU, 'float32')
    with pytest.raises(UserError, match="^a.txt: character 'Z' is not among"):
        score_text(model[0], tokenizer, 'aZ', 8, CPU, 'float32', 'a.txt')
    (tmp_path / 'task.jsonl').write_bytes('{"context": "a", "continuation": "b"}'.encode('utf-16'))
    with pytest.raises(UserError, match=f'^{path}:1: not a text in UTF-8: convert it'):
        read_items(path)


def test_damaged_weights_score_nothing(model):
    broken = copy.deepcopy(model[0])
    broken.norm_f.weight.data[0] = math.nan
    with pytest.raises(UserError, match='is nan: the weights are damaged'):
        score(broken, [([1], [2])], CPU, 'float32')


def test_examples_come_from_the_whole_file_whatever_the_limit(folder, tmp_path):
    task, tables = write(tmp_path / 'task.jsonl', CHOICES), []
    for limit in (0, 1):
        run('eval.py', 'tasks', f'--out_dir=hf:{folder}', task, '--shots=2', f'--limit={limit}',
            f'--csv={tmp_path}/{limit}.csv', '--dtype=float32')
        tables.append(list(csv.DictReader(open(tmp_path / f'{limit}.csv'))))
    assert len(tables[1]) == 1 < len(tables[0]) and tables[0][0]['nats'][:6] == tables[1][0]['nats'][:6]


def test_line_ends_and_a_byte_order_mark_are_read_as_they_are(folder, tmp_path):
    (tmp_path / 'a.txt').write_bytes(b'one\r\ntwo\r\n')
    assert ' 10 bytes' in run('eval.py', 'text', f'--out_dir=hf:{folder}', f'{tmp_path}/a.txt').stdout
    (tmp_path / 'task.jsonl').write_bytes(b'\xef\xbb\xbf' + json.dumps(LAMBADA[0]).encode() + b'\r\n')
    assert len(read_items(f'{tmp_path}/task.jsonl')) == 1


def test_only_a_newline_ends_a_line(tmp_path):
    text = 'a\u2028b\x85c\x0bd'
    lines = [json.dumps({'context': text, 'continuation': ' e'}, ensure_ascii=False).replace(': ', ':\r'),
             json.dumps(LAMBADA[0])]
    # two files, one after the other
    (tmp_path / 'task.jsonl').write_bytes('\r\n'.join(['\ufeff' + line for line in lines]).encode())
    assert ([item.context for item in read_items(f'{tmp_path}/task.jsonl')]
            == [f'{text} ', LAMBADA[0]['context'] + ' '])


def test_a_byte_order_mark_is_no_text(folder, tmp_path):
    shown = []
    for mark in (b'', b'\xef\xbb\xbf'):
        (tmp_path / 'a.txt').write_bytes(mark + b'one two')
        shown.append(run('eval.py', 'text', f'--out_dir=hf:{folder}', f'{tmp_path}/a.txt', '--device=cpu',
                         '--dtype=float32').stdout)
    assert shown[0] == shown[1] and ' 7 bytes' in shown[0]


def test_what_cannot_be_evaluated_is_one_line(folder, tmp_path):
    task = write(tmp_path / 'task.jsonl', LAMBADA)
    for command, args, words in [
            ('tasks', [], 'files: none is given'), ('tasks', [f'{tmp_path}/no.jsonl'], 'No such file'),
            ('tasks', [task, '--shots=9'], 'shots=9'), ('text', [], 'files: none is given'),
            ('text', [f'{tmp_path}/no.txt'], 'No such file'), ('text', [task, '--stride=97'], 'stride=97'),
            ('text', ['/dev/null'], '/dev/null: is a folder, a pipe or a device'),
            ('tasks', [task, f'--csv={task}'], 'is a task'),
            ('harness', [], 'tasks: none is given'), ('harness', ['--tasks=a', '--shots=-1'], 'shots=-1')]:
        assert words in one_line(run('eval.py', command, f'--out_dir=hf:{folder}', *args))
