"""
Files of every shape become the requests that lm-eval's own tasks make of the same records, and its figures;
a file of no known shape is refused in one line that names what is missing.
"""
import json
import os

import pytest

from configurator import UserError
from features.study import items
from features.study.items import Item, file_and_delimiter, read_items, read_tasks, with_shots
from features.study.tasks import chance, figures

LABELS = ['A', 'B', 'C', 'D']
FOUR = {'text': ['one', 'two more', 'a 3', 'four'], 'label': LABELS}
# the data sets' own fields: file of lm-eval's task, records, and which of our tasks it is
DATA_SETS = {
    'lambada': ('lambada/lambada_openai.yaml', [
        {'text': 'a cat sat on the mat and looked at the dog'}, {'text': 'He said: "no, no"'}]),
    'arc': ('arc/arc_easy.yaml', [
        {'id': '1', 'question': 'What is 3 + 1?', 'choices': FOUR, 'answerKey': 'D'},
        {'id': '2', 'question': 'What is 1?', 'choices': FOUR | {'label': ['1', '2', '3', '4']},
         'answerKey': '1'}]),
    'openbookqa': ('openbookqa/openbookqa.yaml', [
        {'id': '1', 'question_stem': 'The sun is', 'choices': FOUR, 'answerKey': 'C'}]),
    'piqa': ('piqa/piqa.yaml', [
        {'goal': 'open a door', 'sol1': 'push it', 'sol2': 'eat the door', 'label': 0},
        {'goal': 'Close it.', 'sol1': 'push', 'sol2': 'pull it shut', 'label': 1}]),
    'sciq': ('sciq/sciq.yaml', [
        {'question': 'What is wet?', 'distractor1': 'fire', 'distractor2': 'sand', 'distractor3': 'the moon',
         'correct_answer': 'water', 'support': support} for support in ('', ' Water is wet.')]),
    'hellaswag': ('hellaswag/hellaswag.yaml', [
        {'ind': 4, 'activity_label': 'Baking', 'ctx_a': 'A man [title] mixes  dough.', 'ctx_b': 'then he',
         'ctx': '', 'endings': ['bakes it.', ' eats [step] it all.', 'runs', 'is a loaf'], 'label': '2'}]),
    'winogrande': ('winogrande/default.yaml', [
        {'sentence': 'The cup does not fit in the bag as the _ is too big.', 'option1': 'cup',
         'option2': 'bag', 'answer': '1'},
        {'sentence': 'Ann thanked Eve, but it was _.', 'option1': 'Ann', 'option2': 'Eve', 'answer': '2'}]),
    'boolq': ('super_glue/boolq/default.yaml', [
        {'passage': 'Cats purr.', 'question': 'do cats purr', 'idx': 0, 'label': 1},
        {'passage': 'Dogs bark.', 'question': 'do dogs purr', 'idx': 1, 'label': 0}]),
    'mmlu': ('mmlu/default/mmlu_abstract_algebra.yaml', [
        {'question': ' Which is 2? ', 'subject': 'abstract_algebra', 'choices': ['1', '2', '3', '4'],
         'answer': 1}]),
    'truthfulqa mc1': ('truthfulqa/truthfulqa_mc1.yaml', 'truthfulqa'),
    'truthfulqa mc2': ('truthfulqa/truthfulqa_mc2.yaml', 'truthfulqa'),
}
TRUTHFULQA = [{'question': 'Is the earth flat?',
               'mc1_targets': {'choices': ['No', 'Yes', 'Yes it is flat'], 'labels': [1, 0, 0]},
               'mc2_targets': {'choices': ['No', 'It is round', 'Yes'], 'labels': [1, 1, 0]}},
              {'question': 'What do cats eat?',
               'mc1_targets': {'choices': ['Fish', 'Stones'], 'labels': [1, 0]},
               'mc2_targets': {'choices': ['Fish', 'Meat and fish', 'Stones', 'Cars'],
                               'labels': [1, 1, 0, 0]}}]


def write(path, lines):
    path.write_text('\n'.join(map(json.dumps, lines)) + '\n')
    return str(path)


# --- the oracle: lm-eval's own tasks ---

@pytest.fixture(scope='module')
def theirs(tmp_path_factory):
    """
    {data set: (its file, samples of lm-eval)}: its task of that name on our records, with the likelihoods of
    its dummy model.
    """
    lm_eval = pytest.importorskip('lm_eval')
    from lm_eval.tasks import TaskManager
    folder = tmp_path_factory.mktemp('tasks')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('HF_DATASETS_CACHE', str(folder / 'cache'))
        files = {}
        for name, (path, records) in DATA_SETS.items():
            task = name.replace(' ', '_')
            files[name] = write(folder / f'{task}.jsonl', TRUTHFULQA if records == 'truthfulqa' else records)
            config = {'include': os.path.join(os.path.dirname(lm_eval.__file__), 'tasks', path),
                      'task': f'ours_{task}', 'dataset_path': 'json', 'dataset_name': None, 'tag': None,
                      'training_split': None, 'validation_split': None, 'test_split': 'train',
                      'fewshot_split': None, 'dataset_kwargs': {'data_files': files[name]}}
            (folder / f'{task}.yaml').write_text(json.dumps(config))  # JSON is YAML
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        tasks = [f'ours_{name.replace(" ", "_")}' for name in DATA_SETS]
        results = lm_eval.simple_evaluate(model='dummy', tasks=tasks, num_fewshot=0, task_manager=manager,
                                          log_samples=True, bootstrap_iters=0)
    out = {}
    for name, task in zip(DATA_SETS, tasks):
        samples = sorted(results['samples'][task], key=lambda sample: sample['doc_id'])
        out[name] = files[name], samples
    return out


def moved(context, continuation):
    """A request with the blanks between its parts in the continuation, where every model reads them."""
    stripped = context.rstrip()
    return stripped, context[len(stripped):] + continuation


def compare(items, samples):
    """Items against lm-eval's samples: requests, and what its likelihoods make of them."""
    scores = []
    for item, sample in zip(items, samples, strict=True):
        wanted = [moved(*request[:2]) for request in sample['arguments']]
        assert [moved(*pair) for pair in item.pairs()] == wanted
        responses = [part[0] if isinstance(part[0], (list, tuple)) else part for part in sample['resps']]
        scores.append([(float(nats), str(greedy) == 'True') for nats, greedy in responses])
    return figures(items, scores)[1]


@pytest.mark.parametrize('name', DATA_SETS)
def test_requests_and_figures_are_those_of_lm_evals_own_tasks(theirs, name):
    path, samples = theirs[name]
    _, _, task = name.partition(' ')
    records = compare(read_tasks(path)[task], samples)
    for record, sample in zip(records, samples):
        if task == 'mc2':
            assert record['mass'] == pytest.approx(sample['acc'])
        else:
            assert record['acc'] == sample['acc']
        if 'acc_norm' in sample:
            assert record['acc_norm'] == sample['acc_norm']


@pytest.mark.parametrize('name', DATA_SETS)
def test_logged_samples_of_lm_eval_are_read(theirs, name, tmp_path):
    """The file that lm-eval writes with --log_samples, in its own words."""
    from lm_eval.loggers import EvaluationTracker
    _, samples = theirs[name]
    tracker = EvaluationTracker(output_path=str(tmp_path))
    tracker.general_config_tracker.model_name_sanitized = 'model'
    tracker.date_id = 'now'
    tracker.save_results_samples('logged', [dict(sample) for sample in samples])
    if name == 'winogrande':  # the log has the text after the option, and not which option is right
        with pytest.raises(UserError, match='target=.*: takes the number of a choice or its text'):
            read_items(f'{tmp_path}/model/samples_logged_now.jsonl')
        return
    records = compare(read_items(f'{tmp_path}/model/samples_logged_now.jsonl'), samples)
    if not name.startswith('truthfulqa mc2'):  # lm-eval reads its labels elsewhere
        assert [record['acc'] for record in records] == [sample['acc'] for sample in samples]


# --- MosaicML's and OLMES's shapes ---

def test_schemas_score_what_follows_each_context(tmp_path):
    line = {'context_options': ['The cup is big. The cup', 'The cup is big. The bag'],
            'continuation': 'is small', 'gold': 1}
    [item] = read_items(write(tmp_path / 'a.jsonl', [line]))
    assert item.pairs() == [('The cup is big. The cup ', 'is small'),
                            ('The cup is big. The bag ', 'is small')]
    measures, [record] = figures([item], [[(-3.0, False), (-2.0, False)]])
    assert measures == {'acc': (1, None)} and record['chosen'] == 1 and chance([item]) == 0.5
    [item] = read_items(write(tmp_path / 'a.jsonl', [line]), own_delimiter=': ')
    assert item.pairs()[0][0] == 'The cup is big. The cup: '
    shown = with_shots([item, Item('', ['x', 'x'], 0, contexts=['p ', 'q '])], 1)
    assert shown[0].pairs()[1] == ('p x\n\nThe cup is big. The bag: ', 'is small')


def test_several_choices_may_be_right(tmp_path):
    lines = [{'query': 'a', 'choices': ['b', 'ccc', 'd'], 'gold': gold} for gold in ([0, 2], [1])]
    items = read_items(write(tmp_path / 'a.jsonl', lines))
    scores = [[(-1.0, False), (-2.0, False), (-3.0, False)]] * 2
    measures, records = figures(items, scores)
    total = 2.718281828 ** -1 + 2.718281828 ** -2 + 2.718281828 ** -3
    assert [record['mass'] for record in records] == pytest.approx(
        [(2.718281828 ** -1 + 2.718281828 ** -3) / total, 2.718281828 ** -2 / total])
    assert [(record['acc'], record['acc_norm']) for record in records] == [(1, 0), (0, 1)]
    assert records[0]['gold'] == '0 2' and set(measures) == {'acc', 'acc_norm', 'mass'}
    assert chance(items) == pytest.approx(0.5)
    shown = with_shots(items, 1)
    assert shown[1].context.startswith('a b\n\n')


def test_requests_of_olmes_are_put_together(tmp_path):
    lines = []
    for number, text in enumerate([' hide and seek', ' soccer']):
        for question in (3, 1):
            lines.append({'request_type': 'loglikelihood', 'doc': {}, 'idx': number, 'doc_id': question,
                          'label': 1, 'request': {'context': f'Question: {question}\nAnswer:',
                                                  'continuation': text}})
    items = read_items(write(tmp_path / 'requests.jsonl', lines))
    assert [item.pairs() for item in items] == [
        [(f'Question: {question}\nAnswer: ', text) for text in ('hide and seek', 'soccer')]
        for question in (3, 1)]
    assert [item.gold for item in items] == [1, 1] and items[0].where.endswith('requests.jsonl:1')
    for wrong, words in (({'doc_id': []}, 'takes whole numbers'), ({'idx': 'x'}, 'takes whole numbers'),
                         ({'doc_id': 3}, 'doc_id=3, idx=0: is there twice')):
        with pytest.raises(UserError, match='requests.jsonl:2: .*' + words):
            read_items(write(tmp_path / 'requests.jsonl', [lines[0], lines[1] | wrong]))
    lines[1] = {'context': 'a', 'continuation': 'b'}
    with pytest.raises(UserError, match='requests.jsonl:2: takes an object with request, doc_id'):
        read_items(write(tmp_path / 'requests.jsonl', lines))


def test_a_file_may_have_a_delimiter_of_its_own(tmp_path):
    choice = write(tmp_path / 'choice.jsonl', [{'query': 'Q', 'choices': ['a', 'b'], 'gold': 0}])
    pair = write(tmp_path / 'pair.jsonl', [{'sentence_good': 'He is.', 'sentence_bad': 'He are.'}])
    assert file_and_delimiter(choice) == (choice, None)
    assert file_and_delimiter(rf'{choice}=\nAnswer: ') == (choice, '\nAnswer: ')
    assert file_and_delimiter('no=such.jsonl') == ('no', 'such.jsonl')
    assert read_items(choice, 'x', '\nA: ')[0].context == 'Q\nA: '
    assert read_items(choice, 'x')[0].context == 'Qx'
    assert read_items(pair, 'x')[0].context == '' and read_items(pair, 'x', ' ')[0].context == ' '
    odd = write(tmp_path / 'a=b.jsonl', [{'context': 'a', 'continuation': 'b'}])
    assert file_and_delimiter(odd) == (odd, None)
    with pytest.raises(UserError, match="piqa.jsonl:1: .* prompt of its own: leave out the delimiter ': '"):
        read_items(write(tmp_path / 'piqa.jsonl', DATA_SETS['piqa'][1]), own_delimiter=': ')
    with pytest.raises(UserError, match='has the tasks mc1 and mc2'):
        read_items(write(tmp_path / 'mc.jsonl', TRUTHFULQA))


# --- what is refused ---

PIQA, ARC, MC = DATA_SETS['piqa'][1][0], DATA_SETS['arc'][1][0], TRUTHFULQA[0]


@pytest.mark.parametrize('line, words', [
    ({'query': 'a', 'choices': ['b', 'c']}, r'\(choices, gold, query: gold is missing\)'),
    ({'goal': 'a', 'sol1': 'b', 'label': 0}, r'no known task has goal, sol1, label: .*sol2 is missing'),
    ({'x': 1}, 'no known task has x: takes an object with query'), ({}, 'has nothing'),
    ({'text': 'a', 'url': 'b'}, 'no known task has text, url'),
    ({'context': 'a', 'answer': 'b', 'aliases': []}, 'no known task has context, answer, aliases'),
    ({'text': 'word'}, 'text: takes text that ends with a space and a word'),
    ({'text': 3}, 'text=3: takes text'),
    (PIQA | {'label': -1}, 'label=-1: takes 0 or 1: use a split that has labels'),
    (PIQA | {'sol1': None}, 'None: takes text'),
    (ARC | {'answerKey': ''}, "answerKey='': takes A or B or C or D"),
    (ARC | {'choices': ['a']}, "choices='a': takes an object"),
    (ARC | {'question_concept': 'a'}, 'no known task has'),
    (ARC | {'choices': {}}, 'choices={}: takes an object'),
    (ARC | {'choices': {'text': ['a']}}, 'choices.text: takes a list'),
    (ARC | {'choices': {'text': ['a', 'b'], 'label': ['A', 'B', 'C']}, 'answerKey': 'C'},
     'choices: 2 texts, 3 labels'),
    (MC | {'mc1_targets': {'choices': ['a', 'b'], 'labels': [0, 0]}}, r'mc1_targets.labels=\[0, 0\]: takes'),
    (MC | {'mc2_targets': {'choices': ['a', 'b'], 'labels': [0, 0, 1]}}, 'mc2_targets.labels='),
    ({'query': 'a', 'choices': ['b', 'c'], 'gold': []}, r'gold=\[\]: takes'),
    ({'query': 'a', 'choices': ['b', 'c'], 'gold': [0, 2]}, r'gold=\[0, 2\]: takes'),
    ({'query': 3, 'choices': ['b', 'c'], 'gold': 0}, 'query=3: takes text'),
    ({'context_options': ['a', 3], 'continuation': 'b', 'gold': 0}, '3: takes text'),
    ({'context_options': ['a', 'c'], 'continuation': '', 'gold': 0}, 'is empty'),
    ({'arguments': {'gen_args_0': {'arg_0': 'a', 'arg_1': {'until': []}}}, 'doc': {}, 'target': 'x'},
     'arguments: of a task that generates text'),
    ({'arguments': {'a': {'arg_0': 'a', 'arg_1': 'b'}, 'b': {'arg_0': 'a', 'arg_1': 'c'}}, 'doc': {},
      'target': '{[]: 1}'}, 'takes the number of a choice or its text'),
    ({'arguments': {}, 'doc': {}, 'target': 'x'}, 'arguments={}: takes an object'),
    ({'arguments': 3, 'doc': {}, 'target': 'x'}, 'arguments=3: takes an object'),
    ({'sentence': 'a', 'option1': 'b', 'option2': 'c', 'answer': '1'}, 'sentence: has no _'),
    ({'passage': 'a', 'question': 'b', 'answer': 'yes'}, "label='yes': takes 0 or 1"),
    ({'passage': [], 'question': 'b', 'answer': True}, 'takes text')])
def test_a_line_that_cannot_be_read_is_named(line, words, tmp_path):
    path = write(tmp_path / 'task.jsonl', [line])
    with pytest.raises(UserError, match=words) as caught:
        read_tasks(path)
    assert '\n' not in str(caught.value) and str(caught.value).startswith(f'{path}:1: ')


def test_a_file_that_is_none_or_has_a_line_without_an_end_is_refused(tmp_path, monkeypatch):
    path = tmp_path / 'task.jsonl'
    os.mkfifo(path)
    with pytest.raises(UserError, match='task.jsonl: is a folder, a pipe'):
        read_tasks(path)
    path = write(tmp_path / 'long.jsonl', [PIQA, PIQA | {'goal': 'a' * 1000}])
    monkeypatch.setattr(items, 'LONGEST', 1000)
    with pytest.raises(UserError, match='long.jsonl:2: a line of more than 1,000 bytes'):
        read_tasks(path)
