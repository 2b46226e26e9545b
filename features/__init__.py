"""
Features: each has its own folder, which can be deleted. This file adds their settings to those of the core.

features/NAME/settings.py holds dataclasses. If one inherits a dataclass of the core (MoEConfig inherits
ModelConfig), its settings are added to every class that inherits the same one. If it inherits none, they are
added to train.py's Settings, which has `features = ()`. A core field whose comment begins with [NAME]
switches the feature on: any value except its default adds the feature's other settings.
"""
import os
import sys

HERE = os.path.dirname(os.path.realpath(__file__))
ROOT = os.path.dirname(HERE)
MODULES = set('analyze batches bench checkpoint compare configurator eval hub model optim prepare run sample '
              'surgery tokenizer train'.split())  # at the top of this repository
FOLDERS = {'config', 'experiments'}


class Finder:
    """
    Python asks it first for every import. A module or folder of ours is the one in this repository, whatever
    else has its name. All other names are looked up in this folder and in the working folder last.
    """

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name in MODULES:
            return spec_from_file_location(name, os.path.join(ROOT, f'{name}.py'))
        if name in FOLDERS:
            spec = ModuleSpec(name, None, is_package=True)
            spec.submodule_search_locations = [os.path.join(ROOT, name)]
            return spec
        if sys.path[:1] in ([ROOT], ['']):  # a script puts it there, so that it finds this file
            look_here_last()


def look_here_last():
    """Move this repository and the working folder to the end of sys.path."""
    last = [path for path in sys.path if os.path.exists(path or '.')
            and any(os.path.samefile(path or '.', folder) for folder in ('.', ROOT))]
    sys.path[:] = [path for path in sys.path if path not in last] + list(dict.fromkeys(last))


look_here_last()
sys.meta_path.insert(0, Finder)

import signal

if os.path.dirname(os.path.realpath(getattr(sys.modules['__main__'], '__file__', None) or '')) == ROOT:
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:  # a script: until run_main(), Ctrl-C
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # ends it as other signals do, without a traceback

import dataclasses
import functools
import gc
import glob
import importlib
import inspect
import itertools
import linecache
import re
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location

HELP = re.compile('-h|--help(=.*)?', re.DOTALL)  # an argument that asks for it


def start(path):
    """
    Begin a script, before it imports torch. With --help, print that and exit, in 0.2 s, if the sources tell
    it; else configure() does. Nothing is garbage-collected until run_main(): that takes a tenth of the time
    of importing torch.
    """
    if any(map(HELP.fullmatch, sys.argv[1:])):
        from features.help import answer
        answer(path)
    gc.disable()


# -----------------------------------------------------------------------------
# Settings with those of features

def build(cls, **values):
    """
    An instance of `cls` with these values, including the settings of the features that they use:
    build(ModelConfig, n_expert=4, n_expert_active=2). Raises UserError if a feature's folder is missing.
    """
    used, fields = set(), fields_of(cls)
    for key, value in values.items():
        name = feature_of(cls, key)
        if name and (key not in fields or value != default_of(fields[key])):
            used.add(name)
            if not os.path.isdir(os.path.join(HERE, name)):
                from configurator import UserError
                raise UserError(f'{key}={value}: belongs to features/{name}, which is not here: leave it out')
    return with_features(cls, *used)(**values)


def with_features(cls, *names):
    """The dataclass `cls` with the settings of these features added."""
    core = getattr(cls, 'core', cls)
    names = sorted({*names, *getattr(cls, 'features', ())} - {None})
    return join(core, tuple(name for name in names if feature_parts(core, name)))


@functools.cache
def join(core, names):
    parts = [part for name in names for part in feature_parts(core, name)]
    if not parts:
        return core
    # MoEConfig is a ModelConfig
    bases = parts if any(issubclass(part, core) for part in parts) else [core, *parts]
    joined = type(core.__name__, tuple(bases), {'__module__': core.__module__, '__doc__': core.__doc__})
    joined.core, joined.features, joined.parts = core, names, parts
    return dataclasses.dataclass(joined)


def extend(settings, *names):
    """Add the settings of these features (None = no feature) to `settings`, in place, at their defaults."""
    wider = with_features(type(settings), *names)
    for field in dataclasses.fields(wider):
        if field.name not in vars(settings):
            setattr(settings, field.name, default_of(field))
    settings.__class__ = wider


def part_of(settings, cls):
    """An instance of `cls` from settings that inherit it (ModelConfig from train.py's), with features."""
    cls = with_features(cls, *getattr(settings, 'features', ()))
    return cls(**{field.name: getattr(settings, field.name) for field in dataclasses.fields(cls)})


# -----------------------------------------------------------------------------
# Which settings there are

def feature_names():
    """The features that have settings, sorted."""
    return sorted(path.split(os.sep)[-2] for path in glob.glob(f'{HERE}/*/settings.py'))


@functools.cache
def feature_parts(core, name):
    """The dataclasses in features/NAME/settings.py that are added to the dataclass `core`."""
    if name not in feature_names():
        return []
    read = getattr(core, '_read_settings', importlib.import_module)  # of an outline (declared.py): outlines
    module, parts = read(f'features.{name}.settings'), []
    for part in vars(module).values():
        if dataclasses.is_dataclass(part) and part.__module__ == module.__name__:
            base = part.__mro__[1]
            if issubclass(core, base) and (base is not object or hasattr(core, 'features')):
                parts.append(part)
    return parts


def fields_of(cls):
    """{name: field} of the settings that `cls` has."""
    return {field.name: field for field in dataclasses.fields(cls)}


@functools.cache
def feature_of(cls, key):
    """The feature that the setting `key` of `cls` switches on, or that can add it; None for neither."""
    if key in fields_of(cls):
        mark = re.match(r'\[(\w+)\]', comment_of(cls, key))
        return mark[1] if mark else None
    for name in feature_names():
        if any(key in fields_of(part) for part in feature_parts(getattr(cls, 'core', cls), name)):
            return name


def default_of(field):
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def comment_of(cls, key):
    """The comment beside the setting `key`, read from the source of the dataclass that declares it."""
    for part in cls.__mro__:
        if key in inspect.get_annotations(part):
            return comments_of(part).get(key, '')


def source_of(part):
    """The path of the file that declares the dataclass `part`, which may be an outline (declared.py)."""
    return vars(part).get('_path') or inspect.getsourcefile(part)


@functools.cache
def comments_of(part):
    """{name: comment} of the settings that are declared in the body of the dataclass `part` itself."""
    comments, name, column, names = {}, None, 0, inspect.get_annotations(part)
    lines = iter(linecache.getlines(source_of(part)))
    class_line = re.compile(rf'( *)class {part.__name__}\s*[(:]')  # inspect would parse the whole file
    [indent] = next(filter(None, map(class_line.match, lines))).groups()
    # A comment or a docstring may stand at the margin, within the class
    is_next = re.compile(rf' {{0,{len(indent)}}}(@\w|class \w+\s*[(:]|(async )?def \w+\()').match
    for line in itertools.takewhile(lambda line: not is_next(line), lines):
        code, _, comment = line.partition('  # ')
        head = code.strip().partition(':')[0]
        if head in names:
            name, column = head, line.index(head)
            comments[name] = comment.strip()
        elif name and line.strip() and line[column:column + 1] in tuple(' #)]}'):  # it goes on in this line
            comments[name] = f'{comments[name]} {comment.strip()}'.strip()
        else:
            name = None
    return comments
