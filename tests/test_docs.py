"""
README.md, docs/ and the features' READMEs: links lead somewhere, commands name scripts and settings that
exist, lines are short.

A fenced block that begins with ```sh nanogpt holds commands for a clone of nanoGPT, which are not ours.
"""
import importlib
import os
import re
import shlex
import sys

import pytest
from conftest import ROOT

import configurator
from features import HELP
from features.help import script_help

README = ROOT / 'README.md'
DOCS = [README, *sorted(ROOT.glob('docs/**/*.md'))]
PAGES = [*DOCS, *sorted(ROOT.glob('features/*/README.md'))]
YOURS = {'config/mine.py', 'config/sweeps/mine.py'}  # files that a page tells its reader to write


def name(path):
    return str(path.relative_to(ROOT))


def read(path):
    return path.read_text(encoding='utf-8')


# -----------------------------------------------------------------------------
# The parts of a page

def split(text):
    """(lines outside fenced blocks, [(what stands behind the opening fence, lines of the block)])."""
    prose, blocks, block = [], [], None
    for line in text.split('\n'):
        if not line.startswith('```'):
            (prose if block is None else block).append(line)
        elif block is None:
            block = []
            blocks.append((line[3:].strip(), block))
        else:
            block = None
    return prose, blocks


def anchors(text):
    """What the headings of a page are called after a #, as GitHub makes them."""
    found = set()
    for line in split(text)[0]:
        if re.match('#+ ', line):
            heading = re.sub(r'\]\([^)]*\)', '', line.lstrip('#').strip()).lower()
            slug = re.sub(r'[^\w\- ]', '', heading).replace(' ', '-')
            count = sum(1 for other in found if re.fullmatch(re.escape(slug) + r'(-\d+)?', other))
            found.add(f'{slug}-{count}' if count else slug)
    return found


def links(text):
    """The targets of all links and pictures of a page."""
    prose = re.sub('`[^`]*`', '', '\n'.join(split(text)[0]))
    return re.findall(r'\]\(([^)\s]+)\)', prose)


def commands(text):
    """
    The commands of a page, as lists of words: lines of its fenced blocks that begin with python, torchrun or
    make, and the same between backquotes in its prose, unless a … leaves something out or no script is named.
    """
    prose, blocks = split(text)
    lines = []
    for kind, block in blocks:
        if kind != 'sh nanogpt':
            lines += '\n'.join(block).replace('\\\n', ' ').split('\n')
    lines += [code for code in re.findall('`([^`]+)`', ' '.join(prose)) if '…' not in code]
    pattern = r'(python|torchrun) .*\.py|make '
    return [shlex.split(line, comments=True) for line in lines if re.match(pattern, line)]


# -----------------------------------------------------------------------------
# Links and lines

@pytest.mark.parametrize('page', PAGES, ids=name)
def test_every_link_leads_to_a_file_and_a_heading(page):
    for link in links(read(page)):
        if re.match(r'[a-z]+:', link):
            continue
        path, _, anchor = link.partition('#')
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f'{link}: no such file'
        assert not anchor or anchor in anchors(read(target)), f'{link}: no such heading'


def test_anchors_are_those_of_github():
    text = ('# A data set of 10^11 windows\n## `eval.py`, twice: why?\n## Same\n## Same\n'
            '```sh\n# a comment\n```\n### See [this page](x.md)')
    expected = {'a-data-set-of-1011-windows', 'evalpy-twice-why', 'same', 'same-1', 'see-this-page'}
    assert anchors(text) == expected


def test_every_page_is_linked_from_an_index():
    results = ROOT / 'docs' / 'results'
    tasks = {f'docs/{page.name}' for page in ROOT.glob('docs/*.md')}
    studies = {page.name for page in results.glob('*.md')} - {'README.md'}
    assert tasks <= set(links(read(README)))
    assert studies <= set(links(read(results / 'README.md')))


def test_the_readme_is_short():
    assert len(read(README).splitlines()) <= 220


@pytest.mark.parametrize('page', DOCS, ids=name)
def test_lines_are_short_but_for_tables_and_fenced_blocks(page):
    long = [line for line in split(read(page))[0] if len(line) > 110 and not line.startswith('|')]
    assert not long


# -----------------------------------------------------------------------------
# Commands

class Accepted(Exception):
    """The settings of a command are accepted: its script stops before it does anything."""


def accept(patch, script, args):
    """
    Let a script read its settings from `args`, and do nothing with them. Raises UserError for wrong ones.
    Scripts in tests/ have no settings.
    """
    path = ROOT / script
    assert path.is_file(), f'{script}: no such script'
    if script.startswith('tests/'):
        return
    if any(map(HELP.fullmatch, args)):
        return script_help(path, args)
    module = importlib.import_module(script.removesuffix('.py').replace('/', '.'))
    configure = configurator.configure

    def stop_after(cls, argv=None):
        configure(cls, argv)
        raise Accepted

    patch.setattr(sys, 'argv', [script, *args])
    patch.setattr(configurator, 'configure', stop_after)  # configure_command() calls it too
    patch.setattr(module, 'configure', stop_after, raising=False)
    # clones of nanoGPT and nanochat are not here: only names and types
    if any(arg.startswith(('--peer=', '--nanochat=')) for arg in args):
        patch.setattr(configurator, 'check', lambda settings, where='': None)
    with pytest.raises(Accepted):
        module.main()


def check_command(words):
    """Raise AssertionError or UserError for a script, a make target or a setting that does not exist."""
    if words[0] == 'make':
        targets = re.findall(r'^([\w-]+):', read(ROOT / 'Makefile'), re.MULTILINE)
        assert words[1] in targets, f'make {words[1]}: no such target'
        return
    script = next((word for word in words if word.endswith('.py')), None)
    if words[:3] == ['python', '-m', 'pytest']:
        assert script is None or (ROOT / script).is_file(), f'{script}: no such file'
    else:
        with pytest.MonkeyPatch.context() as patch:
            accept(patch, script, words[words.index(script) + 1:])


@pytest.mark.parametrize('page', PAGES, ids=name)
def test_every_command_names_a_script_and_settings_that_exist(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    wrong = []
    for words in commands(read(page)):
        try:
            check_command(words)
        except (AssertionError, configurator.UserError) as error:
            wrong.append(f'{shlex.join(words)}\n    {error}')
    assert not wrong, '\n'.join(wrong)


def test_commands_are_found_and_wrong_ones_are_noticed(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert len(commands(read(README))) > 15
    text = ('Run `python a.py --b=c`, not `python d.py …`.\n```sh\npython e.py \\\n    --f=g  # h\n```\n'
            '```sh nanogpt\npython i.py\n```\n')
    assert commands(text) == [['python', 'e.py', '--f=g'], ['python', 'a.py', '--b=c']]
    check_command(['torchrun', '--nproc_per_node=2', 'train.py', 'config/lowrank.py', '--n_layer=2'])
    check_command(['python', 'surgery.py', 'inherit', '--from=a', '--out_dir=b', '--layers=0-1'])
    wrong = """
        python trane.py
        python train.py --n_layers=2
        python train.py config/none.py
        python train.py --n_layer=two
        python surgery.py inherits
        python surgery.py inherit --layer=0-1
        python experiments/blog.py --quik
        make demos
    """
    for line in wrong.strip().split('\n'):
        with pytest.raises((AssertionError, configurator.UserError)):
            check_command(line.split())


@pytest.mark.parametrize('page', PAGES, ids=name)
def test_every_config_and_experiment_that_is_named_exists(page):
    prose, blocks = split(read(page))
    text = '\n'.join(prose + [line for kind, block in blocks if kind != 'sh nanogpt' for line in block])
    for path in set(re.findall(r'\b(?:config|experiments|launch)/[\w/]+\.\w+', text)) - YOURS:
        assert os.path.isfile(ROOT / path), path
