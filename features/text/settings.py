"""
Corpora of any size and kind: several processes, pairs of a source and a target, reserved tokens, and parts
that are prepared on several machines.

    python prepare.py pairs.jsonl --source=question --target=answer --out=data/pairs
"""
import re
from dataclasses import dataclass

from configurator import FilePath
from features.text.pairs import check_template, has_pairs
from prepare import Settings


@dataclass
class TextConfig(Settings):
    num_proc: int = 0  # number of processes for large corpora; 0 = chosen by size
    source: str = ''  # for pairs (objective=seq2seq): the source field
    target: str = ''  # the target field; a document is source, end-of-text, target, end-of-text
    prompt_template: str = ''  # in place of source, a template: 'Q: {question}\nA: '; \n is a new line
    reserve: int = 0  # number of tokens that no text contains (objective=ul2): 100 for 512-token rows
    part: str = ''  # 3/64 = prepare only part 3 of 64, for example on several machines
    merge: FilePath = ''  # merge all parts into this folder: --merge=OUT, without other settings

    def check(self):
        """Raise ValueError for values that cannot work."""
        self.check_pairs()
        if not 0 <= self.reserve <= 10000:
            raise ValueError(f'reserve={self.reserve}: takes 0 to 10000')
        if self.num_proc < 0:
            raise ValueError(f'num_proc={self.num_proc}: '
                             'takes a number of processes, or 0 for one on every core')
        found = re.fullmatch(r'(\d{1,6})/(\d{1,6})', self.part)
        if self.part and not (found and 1 <= int(found[1]) <= int(found[2])):
            raise ValueError(f'part={self.part}: takes a part and how many there are, as in 3/64')
        others = sorted(getattr(self, 'given', set()) - {'merge'})
        if self.merge and others:
            raise ValueError(f'{others[0]}={getattr(self, others[0])}: --merge=OUT takes no other setting: '
                             'leave it out')

    def check_pairs(self):
        reading = self.source or self.prompt_template
        if self.source and self.prompt_template:
            raise ValueError(f'source={self.source}: prompt_template names the fields that are read: '
                             'leave one of them out')
        if bool(reading) != bool(self.target):
            raise ValueError(f'source={reading}, target={self.target}: '
                             'a pair has both: give both fields, or none')
        check_template(self.prompt_template)
        if 'stdlib_docstrings' in self.sources and (len(self.sources) > 1 or self.target):
            raise ValueError('sources: stdlib_docstrings has pairs already: prepare it alone, '
                             'without source and target')
        if has_pairs(self) and self.split == 'tail':
            raise ValueError('split=tail: cuts documents in two, which pairs do not allow: '
                             'use split=document')
