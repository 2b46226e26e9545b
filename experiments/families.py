"""
The table of docs/results/families.md from the tests: for each family, how many of its random folders pass
each test, and the largest difference of logits beside transformers', as a share of the largest logit.

    pip install transformers peft
    python experiments/families.py
"""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
import features  # noqa: I001 — first: your random.py or data/ then hides no module of ours or of a library
if __name__ == '__main__':
    features.start(__file__)

import re
import subprocess
import tempfile
import xml.etree.ElementTree
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

from configurator import UserError, configure, run_main

ROOT = Path(__file__).parent.parent
FILES = ('tests/test_families.py', 'tests/test_families_moe.py', 'tests/test_families_t5.py')
COLUMNS = {  # test: its column
    'test_logits_and_greedy_text_are_those_of_transformers': 'logits, greedy text',
    'test_the_export_loads_in_transformers_with_nothing_missing': 'export',
    'test_adapters_go_to_peft_and_come_back': 'LoRA',
    'test_layers_are_inherited_and_attention_is_measured': 'inherit, attention',
    'test_choices_of_a_task_are_scored_as_transformers_scores_them': 'tasks',
}


@dataclass
class Settings:
    pass


def results():
    """The test cases of a run of the tests: [(test, case, passed, {property: value}), …]."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / 'report.xml'
        command = [sys.executable, '-m', 'pytest', '-q', '-W', 'ignore', '-o', 'junit_family=xunit1',
                   f'--junitxml={report}', *FILES]
        subprocess.run(command, cwd=ROOT, stdout=sys.stderr)
        if not report.exists():
            raise UserError('the tests did not run: see above')
        found = []
        for case in xml.etree.ElementTree.parse(report).iter('testcase'):
            name = re.fullmatch(r'(\w+)\[(.*)\]', case.get('name'))
            if name and name[1] in COLUMNS:
                passed = not any(case.find(kind) is not None for kind in ('failure', 'error', 'skipped'))
                values = {item.get('name'): item.get('value') for item in case.iter('property')}
                found.append((name[1], name[2], passed, values))
        return found


def main():
    configure(Settings)
    cases = results()
    family_of = {case: values['family'] for _, case, _, values in cases if 'family' in values}
    passed, asked, largest = defaultdict(Counter), defaultdict(Counter), Counter()
    for test, case, is_passed, values in cases:
        family = family_of.get(case, case)
        asked[family][test] += 1
        passed[family][test] += is_passed
        largest[family] = max(largest[family], float(values.get('difference', 0)))
    print('| model_type | ' + ' | '.join(COLUMNS.values()) + ' | largest difference |')
    print('|---' * (len(COLUMNS) + 2) + '|')
    for family in asked:
        counts = [f'{passed[family][test]} of {asked[family][test]}' for test in COLUMNS]
        print(f'| {family} | ' + ' | '.join(counts) + f' | {largest[family]:.1e} |')


if __name__ == '__main__':
    run_main(main)
