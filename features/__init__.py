"""
Features: one folder each, which can be deleted. Here is how their settings join those of the core.

features/NAME/settings.py holds dataclasses. One that inherits a dataclass of the core (MoEConfig of
ModelConfig) is added to whatever inherits that one too; one that inherits none is added to the settings of
train.py, which say `features = ()`. A core field whose comment begins with [NAME] is the feature's switch:
the core asks for it, and any value but its default brings in the feature's other settings.
"""
import dataclasses
import functools
import glob
import importlib
import inspect
import os
import re

HERE = os.path.dirname(os.path.realpath(__file__))


def build(cls, **values):
    """
    An instance of `cls` with these values and with the other settings of each feature that they use:
    build(ModelConfig, n_expert=4, n_expert_active=2). Raises UserError for a switch whose feature is not
    there.
    """
    return with_features(cls, *features_used(cls, values))(**values)


def features_used(cls, values):
    """The names of the features to which these settings, {name: value}, belong, sorted."""
    used, core = set(), core_fields(cls)
    for key, value in values.items():
        if key not in core:
            used.add(feature_of(cls, key))
        elif switch_of(cls, key) and value != default_of(core[key]):
            used.add(switch_of(cls, key))
            if not os.path.isdir(os.path.join(HERE, switch_of(cls, key))):
                from configurator import UserError
                raise UserError(f'{key}={value}: belongs to features/{switch_of(cls, key)}, '
                                'which is not here: leave it out')
    return sorted(used - {None})


def with_features(cls, *names):
    """The dataclass `cls` with the settings of these features, beside those it has already."""
    core = getattr(cls, 'core', cls)
    names = {*names, *getattr(cls, 'features', ())}
    return join(core, tuple(sorted(name for name in names if feature_classes(core, name))))


@functools.cache
def join(core, names):
    parts = [part for name in names for part in feature_classes(core, name)]
    if not parts:
        return core
    # MoEConfig is a ModelConfig
    bases = parts if any(issubclass(part, core) for part in parts) else [core, *parts]
    joined = type(core.__name__, tuple(bases), {'__module__': core.__module__, '__doc__': core.__doc__})
    joined.core, joined.features = core, names
    return dataclasses.dataclass(joined)


def feature_classes(core, name):
    """The dataclasses in features/NAME/settings.py that belong to the dataclass `core`."""
    if not os.path.exists(os.path.join(HERE, name, 'settings.py')):
        return []
    module = importlib.import_module(f'features.{name}.settings')
    found = [part for part in vars(module).values() if dataclasses.is_dataclass(part)
             and part.__module__ == module.__name__]
    return [part for part in found if belongs(part, core)]


def belongs(part, core):
    """Whether a feature's dataclass `part` is to be added to the settings `core`."""
    bases = [base for base in part.__mro__[1:] if dataclasses.is_dataclass(base)]
    return issubclass(core, bases[0]) if bases else hasattr(core, 'features')


def feature_names():
    """The features that have settings, sorted."""
    return sorted(os.path.basename(os.path.dirname(path))
                  for path in glob.glob(f'{HERE}/*/settings.py'))


def feature_of(cls, key):
    """The feature that has the setting `key` for `cls`; None if there is none."""
    core = getattr(cls, 'core', cls)
    for name in feature_names():
        for part in feature_classes(core, name):
            if key in own_fields(part):
                return name
    return None


def feature_parts(cls):
    """The dataclasses of features that were added to the core dataclass `cls`."""
    core = getattr(cls, 'core', cls)
    return [part for part in cls.__mro__ if dataclasses.is_dataclass(part) and part is not cls
            and not issubclass(core, part)]


def own_fields(part):
    """The names that a dataclass declares itself, without those that it inherits."""
    return vars(part).get('__annotations__', {})


def core_fields(cls):
    """{name: field} of the settings that `cls` has without features."""
    return {field.name: field for field in dataclasses.fields(getattr(cls, 'core', cls))}


@functools.cache
def switch_of(cls, key):
    """
    The feature whose switch the core field `key` of `cls` is: the NAME of a comment that begins with [NAME].
    """
    for part in cls.__mro__:
        if key in own_fields(part):
            found = re.match(r'\[(\w+)\]', comments_of(part).get(key, ''))
            return found[1] if found else None
    return None


def extend(settings, *names):
    """
    Add the settings of these features to `settings`, in place, each at its default. None stands for no
    feature.
    """
    wider = with_features(type(settings), *(name for name in names if name))
    for field in dataclasses.fields(wider):
        if field.name not in vars(settings):
            setattr(settings, field.name, default_of(field))
    settings.__class__ = wider


def part_of(settings, cls):
    """
    The dataclass `cls` out of settings that inherit it (ModelConfig out of train.py's), features included.
    """
    cls = with_features(cls, *getattr(settings, 'features', ()))
    return cls(**{field.name: getattr(settings, field.name) for field in dataclasses.fields(cls)})


def settings_of(cls, name):
    """[(field, comment)] of the feature `name` for `cls`: its switches in the core, then its own."""
    found = []
    for part in (*cls.__mro__, *feature_classes(getattr(cls, 'core', cls), name)):
        if dataclasses.is_dataclass(part):
            is_core = part in cls.__mro__
            for field in dataclasses.fields(part):
                if field.name in own_fields(part) and (not is_core or switch_of(cls, field.name) == name):
                    found.append((field, comments_of(part).get(field.name)))
    return found


def about_feature(name):
    """The first paragraph of the docstring of a feature's settings, in one line."""
    module = importlib.import_module(f'features.{name}.settings')
    return ' '.join((module.__doc__ or name).strip().partition('\n\n')[0].split())


def default_of(field):
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


@functools.cache
def comments_of(part):
    """
    {field: comment beside it} for the fields declared in the body of the dataclass `part` itself, read from
    its source.
    """
    comments, name = {}, None
    for line in inspect.getsource(part).split('\n')[1:]:
        code, _, comment = line.partition('  # ')
        head = code.strip().partition(':')[0]
        if head in vars(part).get('__annotations__', {}):
            name = head
            comments[name] = comment.strip()
        elif name and comment and not code.strip():  # a comment that goes on in the next line
            comments[name] += ' ' + comment.strip()
        else:
            name = None
    return comments
