"""
The settings that a script declares, from its source: it is not run, as importing torch takes over a second.

The outline of a dataclass is this dataclass without its methods; its bases are outlines too. The names that
it uses are looked up in the source: imports, constants, other dataclasses. Any other name, such as a class
that is no dataclass or a name bound twice or in an `if`, comes from its module, which then is imported.
"""
import ast
import functools
import importlib
import os
from importlib.util import find_spec

from features import ROOT


def read_script(path):
    """The Outlines of a script."""
    return read(os.path.relpath(os.path.realpath(path), ROOT).removesuffix('.py').replace(os.sep, '.'))


@functools.cache
def read(name):
    """The Outlines of the module with this name, in this repository."""
    return Outlines(name, os.path.join(ROOT, *name.split('.')) + '.py')


def read_settings(name):
    """Outlines of a module in which all dataclasses have been read."""
    module = read(name)
    for key, node in module.nodes.items():
        if is_dataclass(node):
            getattr(module, key)
    return module


class Outlines:
    """
    A module of this repository. Its dataclasses (as outlines), constants and imports are attributes, each
    evaluated when it is first asked for.
    """

    def __init__(self, name, path):
        tree = parse(path)
        self.__name__, self._path = name, path
        self.__doc__ = ast.get_docstring(tree, clean=False)
        self.nodes = {}
        for name, node in bound(tree):
            is_changed = name in self.nodes and not isinstance(node, (ast.Import, ast.ImportFrom))
            self.nodes[name] = None if is_changed else node

    def __getattr__(self, name):
        if name not in self.nodes:
            raise AttributeError(f'{self._path}: has no {name}')
        value = self.look_up(name, self.nodes[name])
        setattr(self, name, value)
        return value

    def look_up(self, name, node):
        """The value of a name that the statement `node` binds."""
        if is_dataclass(node):
            return self.outline(node)
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            return self.evaluate(node.value)
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            alias = next(alias for alias in node.names if bound_by(alias) == name)
            if isinstance(node, ast.ImportFrom):
                return imported(node.module, alias.name)
            return find(alias.name if alias.asname else name)
        return getattr(importlib.import_module(self.__name__), name)

    def evaluate(self, node):
        """The value of an expression at the top of the module."""
        return eval(compile(ast.Expression(node), self._path, 'eval'), self.names_in(node))

    def outline(self, node):
        """The outline of a dataclass."""
        node.body = [part for part in node.body if not isinstance(part, ast.FunctionDef)] or [ast.Pass()]
        space = self.names_in(node)
        code = ast.fix_missing_locations(ast.Module([node], []))
        exec(compile(code, self._path, 'exec'), space)
        cls = space[node.name]
        cls._path = self._path
        cls._read_settings = staticmethod(read_settings)
        return cls

    def names_in(self, node):
        """{name: value} of those names in `node` that are bound at the top of the module."""
        used = {part.id for part in ast.walk(node)
                if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Load)}
        return {name: getattr(self, name) for name in used & self.nodes.keys()} | {'__name__': self.__name__}


def parse(path):
    """The syntax tree of a file."""
    with open(path, 'rb') as f:
        return ast.parse(f.read(), path)


def bound(tree):
    """
    (name, the statement that binds it) of the names at the top of a module. None for a function and for a
    class that is no dataclass: to keep their trees would double the time.
    """
    for node in tree.body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            yield node.name, node if is_dataclass(node) else None
            continue
        for part in ast.walk(node):
            if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store):
                yield part.id, node
            elif isinstance(part, ast.alias):
                yield bound_by(part), node


def bound_by(alias):
    """The name that an import binds: os for `import os.path`."""
    return alias.asname or alias.name.partition('.')[0]


def is_dataclass(node):
    """Whether a statement is a class decorated with @dataclass, @dataclasses.dataclass or @dataclass(…)."""
    names = [ast.unparse(part).partition('(')[0] for part in getattr(node, 'decorator_list', ())]
    return isinstance(node, ast.ClassDef) and 'dataclass' in [name.rpartition('.')[2] for name in names]


def imported(module, name):
    """What `from module import name` binds, with outlines of the modules in this repository."""
    found = find(module)
    try:
        return getattr(found, name)
    except AttributeError:  # a module in a folder
        return find(f'{module}.{name}')


def find(name):
    """The Outlines of a module of this repository; any other module itself."""
    spec = find_spec(name)
    if spec and spec.origin == os.path.join(ROOT, *name.split('.')) + '.py':
        return read(name)
    return importlib.import_module(name)
