"""
The corpus stdlib_docs: English about Python, without code. Each module's docstrings are a document, and so is
each of pydoc's chapters on the language.

    python prepare.py stdlib_docs --tokenizer=bpe:2048       # 2 MB, no download
"""
import ast
import os
import re
import tokenize
import warnings

HAVE_DOCSTRINGS = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
CODE = re.compile(r'''
    ^[\ \t]*(?:>>>|\w+\ +::=).*(?:\n[\ \t]*\S.*)*\n?  # an example or a rule of the grammar, to a blank line
  | (?<=:):\n(?:\n*[\ \t]+\S.*)+                      # the indented block after ::
  | ^[\ \t]*[|+].*\n?                                 # a row of a table
''', re.MULTILINE | re.VERBOSE)


def documents_of(path):
    """[(file or file:chapter, text)] of a Python file."""
    if path.endswith(os.path.join('pydoc_data', 'topics.py')):
        from pydoc_data.topics import topics
        return [(f'{path}:{name}', without_code(topics[name])) for name in sorted(topics)]
    text = docstrings_of(path)
    return [(path, text)] if text else []


def docstrings_of(path):
    """The docstrings of a Python file, separated by blank lines; '' if it has none."""
    try:
        with tokenize.open(path) as f, warnings.catch_warnings(action='ignore'):
            tree = ast.parse(f.read())
    except (SyntaxError, ValueError):  # a template, or another version's
        return ''
    found = []
    for node in ast.walk(tree):
        if isinstance(node, HAVE_DOCSTRINGS):
            text = without_code(ast.get_docstring(node) or '')
            if text:
                found.append(text)
    return '\n\n'.join(found)


def without_code(text):
    text = CODE.sub('', text)
    return re.sub(r'\n{3,}', '\n\n', text).strip()
