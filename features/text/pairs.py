"""
Pairs of a source, which a model reads, and a target, which it learns to write (objective=seq2seq): from two
fields of a row, from a prompt template and a field, from the sections of TinyStories-Instruct, or from
Python's docstrings.

    python prepare.py talks.jsonl --source=abstract --target=summary --out=data/talks
    python prepare.py asked.jsonl --prompt_template='Q: {question}\nA: ' --target=answer --out=data/asked
    python prepare.py stdlib_docstrings          # a function's code → the first line of its docstring

Until it is tokenized, a pair is one text: source, PAIR, target. '' stands for a pair of which one side is
blank.
"""
import ast
import re
import string
import textwrap
import tokenize
import warnings

import prepare
from configurator import UserError, typed_text

PAIR = '\x1e<|target|>\x1e'
# of TinyStories-Instruct, in any order
SECTIONS = ('Features', 'Words', 'Random sentence', 'Summary', 'Story')


def has_pairs(s):
    """Whether the documents of these settings are pairs."""
    return bool(s.target) or 'stdlib_docstrings' in s.sources


def source_of(text):
    """The source of a pair; a text that is not a pair is returned unchanged."""
    return text.partition(PAIR)[0]


# -----------------------------------------------------------------------------
# Rows → pairs

def fields_of(s):
    """The fields of a row that the settings `s` read."""
    if not has_pairs(s):
        return s.text_key.split(',')
    return [*source_fields(s), *s.target.split(',')]


def source_fields(s):
    return template_fields(s.prompt_template) if s.prompt_template else s.source.split(',')


def setting_of(s):
    """The settings that name these fields, for messages."""
    if s.prompt_template:
        return 'prompt_template and --target'
    return 'source and --target' if has_pairs(s) else 'text_key'


def text_of(row, s, where):
    """The text of a row; for settings with pairs: source, PAIR, target."""
    if not has_pairs(s):
        return prepare.text_of(row, s, where)
    fields = {}
    for key in source_fields(s):
        fields[key] = clean_field(row, key, s, where)
    source = fill(s.prompt_template, fields) if s.prompt_template else join(fields)
    row = {key: first_text(value) for key, value in row.items()}
    target = join({key: clean_field(row, key, s, where) for key in s.target.split(',')})
    return source + PAIR + target if source.strip() and target.strip() else ''


def clean_field(row, key, s, where):
    """A field of a row as text without PAIR; '' for None."""
    text = prepare.field_of(row, key, s, where, setting_of(s))
    return (text or '').replace(PAIR, ' ')


def first_text(value):
    """
    The first text of a target that is not blank: a target can be a list of texts, for example several
    summaries.
    """
    if not isinstance(value, list):
        return value
    for text in value:
        if not isinstance(text, str) or text.strip():
            return text
    return None


def join(fields):
    return '\n'.join(filter(None, fields.values()))


def encode_pairs(texts, tokenizer, s):
    """Like prepare.encode(), for pairs: an end-of-text token after each source and each target."""
    parts = []
    for text in texts:
        parts += text.split(PAIR)
    ids, lengths = prepare.encode(parts, tokenizer, s)
    return ids, lengths.reshape(-1, 2).sum(1)


def target_bytes(texts):
    return sum(len(text.partition(PAIR)[2].encode()) for text in texts)


# -----------------------------------------------------------------------------
# Prompt templates

def template_fields(template):
    """
    The fields of a prompt template, NAME of {NAME}; {{ means {. Raises ValueError for an invalid template.
    """
    names = []
    for _, name, spec, conversion in string.Formatter().parse(template):
        if spec or conversion or not (name is None or re.fullmatch(r'\w[\w ]*', name)):
            raise ValueError('has braces that are no {FIELD}')
        if name is not None:
            names.append(name)
    return names


def check_template(template):
    """Raise a one-line ValueError if prompt_template is invalid."""
    typed_text(template, 'prompt_template')
    try:
        if template and not template_fields(template):
            raise ValueError('has no {FIELD} in it')
    except ValueError as error:
        raise ValueError(f'prompt_template={template!r}: {error}: takes text with fields in braces, '
                         '{{ for a brace') from None


def fill(template, row):
    """
    Fill a template, read by typed_text(), with the fields of a row; drops paragraphs with only empty fields.
    """
    paragraphs = []
    for paragraph in typed_text(template, 'prompt_template').split('\n\n'):
        names = template_fields(paragraph)
        if names and not any(row[name].strip() for name in names):
            continue
        filled = ''
        for text, name, *_ in string.Formatter().parse(paragraph):
            filled += text + (row[name] if name else '')
        paragraphs.append(filled)
    return '\n\n'.join(paragraphs)


# -----------------------------------------------------------------------------
# Other pairs

def sections(text):
    """
    {name: text} of the SECTIONS of a document: each begins with its name and a colon on a line. '' = missing.
    """
    _, *found = re.split(rf'^({"|".join(SECTIONS)}):', text, flags=re.MULTILINE)
    texts = dict.fromkeys(SECTIONS, '')
    for name, part in zip(found[::2], found[1::2]):
        texts[name] = part.strip()
    return texts


def check_sections(s, files):
    """Raise UserError if pairs are to be read from plain text by fields that are not in SECTIONS."""
    plain = [path for path, kind in files if kind in ('text', 'topics')]
    fields = fields_of(s)
    if has_pairs(s) and plain and set(fields) - set(SECTIONS):
        raise UserError(f'{plain[0]}: has no fields {",".join(fields)}: pairs are read from .jsonl and '
                        f'.parquet, or from .txt with the sections {", ".join(SECTIONS)}')


def docstring_pairs(path):
    """
    Yield (line number, pair) of the functions of a Python file that have a docstring: the code without it,
    and its first line.
    """
    try:
        with tokenize.open(path) as f, warnings.catch_warnings(action='ignore'):
            code = f.read()
            tree = ast.parse(code)
    except (SyntaxError, ValueError):  # a template, or another version's
        return
    lines = code.split('\n')  # as Python counts them: splitlines() would end one at a form feed too
    for node in ast.walk(tree):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or len(node.body) < 2:
            continue
        said, first, second = ast.get_docstring(node), node.body[0], node.body[1]
        if said and node.lineno < first.lineno and first.end_lineno < second.lineno:
            source = lines[node.lineno - 1:first.lineno - 1] + lines[first.end_lineno:node.end_lineno]
            yield node.lineno, textwrap.dedent('\n'.join(source)) + PAIR + said.partition('\n')[0]


def check_end_of_text(tokenizer, name):
    if tokenizer.eot is None:
        raise UserError(f'tokenizer={name}: has no end-of-text token, '
                        'which separates the source of a pair from its target: use another')


