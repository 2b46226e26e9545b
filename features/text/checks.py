"""
The checks of the settings that prepare.py has for this feature.
"""
import re

from features.text.pairs import check_template, has_pairs


def check(s):
    """Raise ValueError for settings of prepare.py that cannot work."""
    check_pairs(s)
    if not 0 <= s.reserve <= 10000:
        raise ValueError(f'reserve={s.reserve}: takes 0 to 10000')
    if s.num_proc < 0:
        raise ValueError(f'num_proc={s.num_proc}: takes a number of processes, or 0 for one on every core')
    found = re.fullmatch(r'(\d{1,6})/(\d{1,6})', s.part)
    if s.part and not (found and 1 <= int(found[1]) <= int(found[2])):
        raise ValueError(f'part={s.part}: takes a part and how many there are, as in 3/64')
    others = sorted(getattr(s, 'given', set()) - {'merge'})
    if s.merge and others:
        raise ValueError(f'{others[0]}={getattr(s, others[0])}: --merge=OUT takes no other setting: '
                         'leave it out')


def check_pairs(s):
    """Raise ValueError for settings of pairs that cannot work."""
    reading = s.source or s.prompt_template
    if s.source and s.prompt_template:
        raise ValueError(f'source={s.source}: prompt_template names the fields that are read: '
                         'leave one of them out')
    if bool(reading) != bool(s.target):
        raise ValueError(f'source={reading}, target={s.target}: a pair has both: give both fields, or none')
    check_template(s.prompt_template)
    if 'stdlib_docstrings' in s.sources and (len(s.sources) > 1 or s.target):
        raise ValueError('sources: stdlib_docstrings has pairs already: prepare it alone, '
                         'without source and target')
    if has_pairs(s) and s.split == 'tail':
        raise ValueError('split=tail: cuts documents in two, which pairs do not allow: use split=document')
