"""Hostile task files, logs of harnesses, summaries, sweeps, config files, prompts and settings."""

import json
import os
from pathlib import Path

from cases import (
    COMPARE,
    CPU,
    ESCAPES,
    PAGE,
    SAMPLE,
    SPECIAL,
    TINY,
    TRAIN,
    Case,
    case,
    documents,
    fifo,
    folder,
    link,
    payload,
)

CASES = []
TASKS = ('eval.py', 'tasks', '--out_dir=run', 'tasks/choices.jsonl', *CPU)
FILE = 'tasks/choices.jsonl'

# -----------------------------------------------------------------------------
# Tasks and the samples that harnesses log

for base in documents(FILE, 'tasks', TASKS, accepted=('it twice',)):
    if not base.name.endswith('it in quotes of Python'):
        CASES.append(base)
Q = {'query': 'x', 'choices': ['a', 'b'], 'gold': 0}
ARC = {'question': 'x', 'choices': {'text': ['a', 'b'], 'label': ['A', 'B']}, 'answerKey': 'A'}
HELLA = {'activity_label': 'x', 'ctx_a': 'a', 'ctx_b': 'b', 'endings': ['c', 'd'], 'label': '0'}
LOGGED = {
    'doc': {},
    'target': '0',
    'arguments': {'gen_args_0': {'arg_0': 'x', 'arg_1': ' a'}, 'gen_args_1': {'arg_0': 'x', 'arg_1': ' b'}},
}
OLMES = {'request': {'context': 'x', 'continuation': ' a'}, 'doc_id': 0, 'idx': 0, 'label': 0}
ITEMS = {
    'gold beyond the choices': Q | {'gold': 2},
    'gold is negative': Q | {'gold': -1},
    'gold is true': Q | {'gold': True},
    'gold is 0.0': Q | {'gold': 0.0},
    'gold is NaN': Q | {'gold': float('nan')},
    'gold is a text': Q | {'gold': '0'},
    'gold is null': Q | {'gold': None},
    'gold is an empty list': Q | {'gold': []},
    'gold is a list in a list': Q | {'gold': [[0]]},
    'gold is 10**400': Q | {'gold': 10**400},
    'no choices': Q | {'choices': []},
    'one choice': Q | {'choices': ['a']},
    'choices are a text': Q | {'choices': 'ab'},
    'choices are an object': Q | {'choices': {'a': 1, 'b': 2}},
    'choices of numbers': Q | {'choices': [1, 2]},
    'an empty choice': Q | {'choices': ['', 'b']},
    'a choice of half a surrogate pair': Q | {'choices': ['\ud800', 'b']},
    'query is a number': Q | {'query': 5},
    'query is null': Q | {'query': None},
    'query is half a surrogate pair': Q | {'query': '\udfff'},
    'a field of escapes': {ESCAPES: 1},
    'no fields': {},
    'fields in capitals': {'QUERY': 'x', 'CHOICES': ['a', 'b'], 'GOLD': 0},
    'ARC with labels that are numbers': ARC | {'choices': {'text': ['a', 'b'], 'label': [1, 2]}},
    'ARC with choices of null': ARC | {'choices': None},
    'ARC with choices of lists': ARC | {'choices': [[]]},
    'ARC without labels': ARC | {'choices': {'text': ['a', 'b']}},
    'ARC with fewer labels': ARC
    | {'choices': {'text': ['a', 'b'], 'label': ['A', 'B', 'C']}, 'answerKey': 'C'},
    'ARC with a key that is a list': ARC | {'answerKey': ['A']},
    'ARC with a key of escapes': ARC | {'answerKey': ESCAPES},
    'HellaSwag without a label': HELLA | {'label': ''},
    'HellaSwag with endings of numbers': HELLA | {'endings': [1, 2]},
    'HellaSwag with a number': HELLA | {'ctx_b': 5},
    'a label of a sample of 10**5 brackets': LOGGED | {'target': '(' * 10**5},
    'a label of a sample that is code': LOGGED | {'target': "__import__('os').system('touch executed')"},
    'a label of a sample of powers': LOGGED | {'target': '9**9**9**9'},
    'a label of a sample of 5,000 digits': LOGGED | {'target': '9' * 5000},
    'a label of a sample with NUL': LOGGED | {'target': 'a\0b'},
    'a sample without arguments': LOGGED | {'arguments': {}},
    'a sample with arguments that are a list': LOGGED | {'arguments': [1]},
    'a sample with arguments of null': LOGGED | {'arguments': {'a': None}},
    'a sample of generated text': LOGGED
    | {'arguments': {'gen_args_0': {'arg_0': 'x', 'arg_1': {'until': []}}}},
    'a sample with a label that is a list': LOGGED | {'target': [[0]]},
    'a sample with blank choices': LOGGED
    | {
        'arguments': {'gen_args_0': {'arg_0': 'x', 'arg_1': ' '}, 'gen_args_1': {'arg_0': 'x', 'arg_1': ' b'}}
    },
    'OLMES with a number of text': OLMES | {'idx': '0'},
    'OLMES with a request of text': OLMES | {'request': 'x'},
    'OLMES with a question that is a list': OLMES | {'doc_id': []},
    'OLMES with a label of 10**400': OLMES | {'label': 10**400},
    'a last word alone': {'text': 'word'},
    'a last word of nothing': {'text': ''},
    'WinoGrande without a gap': {'sentence': 'x', 'option1': 'a', 'option2': 'b', 'answer': '1'},
    'BoolQ with an answer of 2': {'passage': 'x', 'question': 'y', 'answer': 2},
    'BoolQ with an answer that is a list': {'passage': 'x', 'question': 'y', 'answer': []},
    'PIQA with a label of -1': {'goal': 'x', 'sol1': 'a', 'sol2': 'b', 'label': -1},
    'TruthfulQA with targets of null': {'question': 'x', 'mc1_targets': None, 'mc2_targets': {}},
    'TruthfulQA with labels of text': {
        'question': 'x',
        'mc1_targets': {'choices': ['a', 'b'], 'labels': ['1', '0']},
        'mc2_targets': {},
    },
    'MMLU with 200 choices': {'question': 'x', 'subject': 'y', 'choices': ['a'] * 200, 'answer': 200},
}
for name, row in ITEMS.items():
    fine = name in ('OLMES with a label of 10**400',)
    CASES.append(
        case(
            name,
            'tasks',
            FILE,
            (json.dumps(row) + '\n').encode(),
            TASKS,
            expected='accepted' if fine else 'refused',
        )
    )
for name, text in {
    'a number of 5,000 digits': '{"query": ' + '9' * 5000 + '}',
    'NaN': 'NaN',
    'a list in 10**5 others': '[' * 10**5 + ']' * 10**5,
}.items():
    CASES.append(
        case(f'a line of {name}', 'tasks', FILE, (json.dumps(Q) + '\n' + text + '\n').encode(), TASKS)
    )
for name, row in {
    'a query of 1 MB': Q | {'query': 'x ' * 500_000},
    '500 choices': Q | {'choices': [str(n) for n in range(500)]},
    'a query of escapes': Q | {'query': ESCAPES},
    'choices that are equal': Q | {'choices': ['a', 'a']},
}.items():
    CASES.append(
        case(
            name,
            'tasks',
            FILE,
            (json.dumps(row) + '\n').encode(),
            (*TASKS, '--csv=out/items.csv', '--table=out/table.csv'),
            expected='accepted',
        )
    )
for name in ('a=b.jsonl', f'{ESCAPES.replace(";", "_")}.jsonl', '$(touch executed).jsonl', 'a\nb.jsonl'):
    CASES.append(
        case(
            'a name that is odd',
            'tasks',
            f'tasks/{name}',
            (json.dumps(Q) + '\n').encode(),
            (*TASKS[:3], f'tasks/{name}', *CPU),
            expected='accepted',
            like=[TASKS],
        )
    )

SUMMARIES = (
    'eval.py',
    'summaries',
    '--out_dir=t5',
    'text/pairs.jsonl',
    '--max_new_tokens=2',
    '--limit=4',
    *CPU,
)
for base in documents(
    'text/pairs.jsonl',
    'summaries',
    SUMMARIES,
    accepted=('it twice',),
):
    if not base.name.endswith('it in quotes of Python'):
        CASES.append(base)
for name, row in {
    'a target of numbers': {'source': 'x', 'target': 5},
    'targets of nothing': {'source': 'x', 'target': []},
    'targets of numbers': {'source': 'x', 'target': [5]},
    'no target': {'source': 'x'},
    'a source that is a list': {'source': [], 'target': 'x'},
    'half a surrogate pair': {'source': '\ud800', 'target': 'x'},
}.items():
    CASES.append(case(name, 'summaries', 'text/pairs.jsonl', (json.dumps(row) + '\n').encode(), SUMMARIES))

# -----------------------------------------------------------------------------
# Texts: prompts and texts to measure

PROMPT = (*SAMPLE, '--start=FILE:text/prompt.txt')
TEXT = ('eval.py', 'text', 'text/prompt.txt', '--out_dir=run', *CPU)
for name, how in SPECIAL.items():
    fine = name == "a link to a user's file"
    CASES.append(
        case(
            name,
            'texts',
            'text/prompt.txt',
            how,
            PROMPT,
            TEXT,
            expected='accepted' if fine else 'refused',
            secret_is_shown=fine,
        )
    )
for name, (how, expected) in {
    'not UTF-8': (b'a\xff' * 50, 'refused'),
    'UTF-16': ('hello'.encode('utf-16'), 'refused'),
    'half a surrogate pair': (b'\xed\xa0\x80', 'refused'),
    'a login page': (PAGE, 'either'),  # a prompt must fit the context
    'NUL bytes': (bytes(1000), 'accepted'),
    'a text of 5 MB': (b'small cats ' * 500_000, 'either'),
    'a pickle': (payload(), 'refused'),
    'only a line end': (b'\n', 'accepted'),
}.items():
    for command in (PROMPT, TEXT):
        if (
            'NUL' in name
            and command is PROMPT
            or '5 MB' in name
            and command is TEXT
            or 'only' in name
            and command is TEXT
        ):
            continue
        CASES.append(
            case(f'{name}, for {command[0]}', 'texts', 'text/prompt.txt', how, command, expected=expected,
                 names=('prompt.txt', 'the prompt has'))
        )
CASES.append(case('empty', 'texts', 'text/prompt.txt', b'', TEXT))

# -----------------------------------------------------------------------------
# Config files and sweeps: code of the user's own, on a bad day

CONFIG = ('train.py', 'mine.py', '--dataset=data', '--out_dir=out/new', *TINY)
SWEEP = ('compare.py', '--sweep=mine.py', '--dry_run')
for command, kind in ((CONFIG, 'config file'), (SWEEP, 'sweep file')):
    for name, how in {
        'a login page': PAGE,
        'not Python': b'n_layer = = 3',
        'NUL bytes': bytes(100),
        'not UTF-8': b'x = "\xff"',
        'UTF-16': 'n_layer = 2'.encode('utf-16'),
        'an error': b'1/0',
        'an exit': b'raise SystemExit(0)',
        'an exit of Python': b'exit()',
        'an interrupt of text': b'raise Exception("\x1b]52;c;x\x07")',
        'an unknown setting': b'n_layers = 3',
        'a setting of another type': b'n_layer = "two"',
        'a module that is not there': b'import evil_module',
        'a number of 5,000 digits': b'n_layer = ' + b'9' * 5000,
        '1,000 brackets': b'n_layer = ' + b'(' * 1000 + b'1' + b')' * 1000,
        'a recursion': b'def f(): return f()\nn_layer = f()',
        'an unknown name': b'n_layer = evil',
        'a list that contains itself': b'x = []\nx.append(x)\narms = x\nn_layer = x',
        'a name of escapes': 'ªevil = 3'.encode(),
    }.items():
        CASES.append(
            case(name, kind, 'mine.py', how, command, like=[TRAIN if kind == 'config file' else COMPARE])
        )
    for name in sorted(SPECIAL.keys() - {'4 GB of nothing'}):  # it is code, and read whole
        CASES.append(
            case(
                name,
                kind,
                'mine.py',
                SPECIAL[name],
                command,
                like=[TRAIN if kind == 'config file' else COMPARE],
            )
        )
for name, text in {
    'no arms': 'arms = {}',
    'arms are a list': 'arms = []',
    'an arm called ..': "arms = {'..': {}}",
    'an arm of a path': "arms = {'../x': {}}",
    'an arm of escapes': "arms = {'\\x1b]52;c;x\\x07': {}}",
    'an arm of 5,000 characters': "arms = {'x' * 5000: {'n_layer': 1}}",
    'an arm that is a number': "arms = {'a': 5}",
    'an arm called 5': 'arms = {5: {}}',
    'an arm with an unknown setting': "arms = {'a': {'evil': 1}}",
    'seeds of texts': "arms = {'a': {}}\nseeds = ['x']",
    'no seeds': "arms = {'a': {}}\nseeds = []",
    'a budget of evil': "arms = {'a': {}}\nbudget = 'evil'",
    'a base that is not there': "arms = {'a': {}}\nbase = 'nothing.py'",
    'a base that is itself': "arms = {'a': {}}\nbase = 'mine.py'",
    'an arm of NaN': "arms = {'a': {'learning_rate': float('nan'), 'dataset': 'data'}}",
}.items():
    CASES.append(
        case(
            name,
            'sweep file',
            'mine.py',
            text.encode(),
            SWEEP,
            like=[COMPARE],
            names=('mine.py', 'arm', 'seeds', 'n_layer', 'base', 'learning_rate', 'nothing.py', 'budget'),
        )
    )


def results(name, act, command=COMPARE, expected='accepted', **more):
    CASES.append(
        Case(
            f'run/: {name}',
            'results of runs',
            lambda box: act(Path(box, 'run')),
            [command],
            expected,
            **{'names': ('run',)} | more,
        )
    )


results('diverged.txt is a folder', lambda run: (run / 'diverged.txt').mkdir())
results('diverged.txt is a pipe', lambda run: os.mkfifo(run / 'diverged.txt'))
results('a run in it', lambda run: (run / 'out').mkdir())
for name, value in {'[1]': [1], 'text': 'x', 'null': None}.items():
    results(
        f'a log whose loss of the end is {name}',
        lambda run, value=value: (run / 'log.jsonl').write_text(
            json.dumps({'step': 2, 'val_loss': value, 'tokens': 1, 'flops': 1}) + '\n'
        ),
    )

# -----------------------------------------------------------------------------
# Settings on the command line, and folders that they name

for name, value in {
    'n_layer': ('9' * 5000, '1e999', 'NaN', '[1]', '__import__("os")', '2; touch executed', '\u0662'),
    'dataset': (
        "{'data': 9" + '9' * 400 + '}',
        '{"data": {}}',
        '[' * 5000,
        '{' * 300,
        '/dev/zero',
        '../' * 2000,
        'a\nb',
        ESCAPES,
    ),
    'learning_rate': ('nan', '[' * 10**5, '9**9**9'),
    'ranks': ('{"(a+)+$": 1}', '{1: 2}', '[' * 10**4),
    'lr_scale': ('{"(": 1}', '{"' + '(a+)+' * 20 + '$": 1}'),
}.items():
    for text in value:
        CASES.append(
            Case(
                f'--{name}={ascii(text)[:40]}',
                'settings',
                lambda box: None,
                [(*TRAIN, f'--{name}={text}')],
                names=(name,),
                like=[TRAIN],
            )
        )
for kind, how in {
    'a named pipe': fifo,
    'a socket': SPECIAL['a socket'],
    'a link to /dev/zero': link('/dev/zero'),
    'a link to itself': SPECIAL['a link to itself'],
    'a text': PAGE,
}.items():
    for args in (
        ('sample.py', '--out_dir=odd', *CPU),
        ('train.py', '--dataset=odd', '--out_dir=out/new', *TINY),
        (*TRAIN, '--init_from=odd'),
        ('sample.py', '--init_from=hf:odd', *CPU),
        (*SAMPLE, '--adapter=odd'),
        ('compare.py', 'odd', 'run', '--picture='),
        ('surgery.py', 'inherit', '--from=odd', '--out_dir=out/new', '--layers=0'),
    ):
        CASES.append(
            case(
                f'{kind} for {args[0]} {[a for a in args if "odd" in a][0]}',
                'folders',
                'odd',
                how,
                args,
                like=[SAMPLE],
            )
        )
CASES += [
    case(f'{name}, for {args[0]}', 'folders', 'empty', folder, args, like=[SAMPLE], names=('empty',))
    for name, args in {
        'an empty run': ('sample.py', '--out_dir=empty', *CPU),
        'an empty data set': ('train.py', '--dataset=empty', '--out_dir=out/new', *TINY),
        'an empty hf folder': ('sample.py', '--init_from=hf:empty', *CPU),
        'an empty adapter': (*SAMPLE, '--adapter=empty'),
        'an empty corpus': ('prepare.py', 'empty', '--tokenizer=byte', '--out=out/d'),
    }.items()
]
