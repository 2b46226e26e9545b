"""
The corpus stdlib_docs: what the modules of the standard library say about themselves, in English. Each module is a
document; pydoc's chapters on the language stand beside them (sources.py).

    python prepare.py stdlib_docs --tokenizer=bpe:2048       # 2 MB, no download
"""
import ast
import re
import tokenize
import warnings

HAVE_DOCSTRINGS = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
# A doctest: from >>> to the next blank line
EXAMPLE = re.compile(r'^[ \t]*>>>.*(?:\n[ \t]*\S.*)*\n?', re.MULTILINE)


def docstrings_of(path):
    """The docstrings of a Python file without their examples, a blank line between them; '' where it has none."""
    try:
        with tokenize.open(path) as f, warnings.catch_warnings(action='ignore'):
            tree = ast.parse(f.read())
    except (SyntaxError, ValueError):  # a template, or another version's
        return ''
    found = []
    for node in ast.walk(tree):
        if isinstance(node, HAVE_DOCSTRINGS):
            text = EXAMPLE.sub('', ast.get_docstring(node) or '').strip()
            if text:
                found.append(text)
    return '\n\n'.join(found)
