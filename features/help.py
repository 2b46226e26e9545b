"""
The text of --help: the settings of the core and of features with their defaults and the comments beside them.
"""
import importlib
import inspect
import os
import re
import sys
import textwrap
import typing

from configurator import ROOT, UserError, describe, options
from features import (
    comment_of,
    default_of,
    feature_names,
    feature_of,
    feature_parts,
    fields_of,
    with_features,
)

# The settings of a training run that --help shows; --help=all shows the others too
FIRST = {
    'What to train on': ['dataset', 'packing', 'block_size', 'batch_size', 'gradient_accumulation_steps',
                         'seed'],
    'The network': ['n_layer', 'n_head', 'n_kv_head', 'n_embd', 'position', 'norm', 'mlp', 'tie', 'dropout',
                    'rank_qk', 'rank_mlp'],
    'The optimizer': ['optimizer', 'learning_rate', 'muon_lr', 'max_iters', 'warmup_iters', 'schedule',
                      'weight_decay'],
    'The run': ['out_dir', 'init_from', 'device', 'dtype', 'compile', 'eval_interval', 'log_interval',
                'minutes'],
}


def help_text(cls, which=''):
    """
    The text of --help: of a training run the settings in FIRST, else all of the core; then the names of the
    features. which='all': all of the core; which=NAME: those of the feature NAME. Raises UserError for
    another name.
    """
    fields, features = all_fields(cls), {}
    for name in fields:
        features.setdefault(feature_of(cls, name), []).append(name)
    features = {name: features[name] for name in feature_names() if name in features}
    if which not in ('', 'all', *features):
        raise UserError(f'--help={which}: takes {", ".join(["all", *features])}')
    if which in features:
        cls = with_features(cls, which)
        lines = [help_line(cls, fields[name]) for name in features[which]]
        return '\n'.join([about_feature(which), '', *lines])
    groups = FIRST
    is_short = 'eval_interval' in fields and not which
    if not is_short:
        groups = {}
        for part in reversed(cls.__mro__):
            if inspect.get_annotations(part):
                file = os.path.relpath(inspect.getsourcefile(part), ROOT)
                groups[f'{part.__name__} ({file})'] = inspect.get_annotations(part)
    lines = [(sys.modules[cls.__module__].__doc__ or '').strip()]
    for title, names in groups.items():
        lines += ['', title, *(help_line(cls, fields[name]) for name in names)]
    if features:
        lines += ['', 'Features: --help=NAME lists their settings']
        lines += [two_columns(name, about_feature(name)) for name in features]
    if is_short:
        lines += ['', '--help=all lists every setting of the core']
    return '\n'.join(lines)


def all_fields(cls):
    """{name: field} of the settings that `cls` has, then of those that features can add to it."""
    found = fields_of(cls)
    for name in feature_names():
        for part in feature_parts(getattr(cls, 'core', cls), name):
            found |= fields_of(part)
    return found


def about_feature(name):
    """The first paragraph of the docstring of a feature's settings, in one line."""
    text = importlib.import_module(f'features.{name}.settings').__doc__
    return ' '.join(text.strip().partition('\n\n')[0].split())


def help_line(cls, field):
    comment = re.sub(r'^\[\w+\] ', '', comment_of(cls, field.name))  # without the mark of a switch
    if any(typing.get_origin(kind) is typing.Literal for kind in options(field.type)):
        comment = f'{describe(field.type)}: {comment}'
    return two_columns(f'--{field.name.rstrip("_")}={default_of(field)!r}', comment)


def two_columns(name, text):
    """A name and its explanation, wrapped beside it."""
    first = f'  {name}'.ljust(36) + '  '
    text = textwrap.fill(text, 110, initial_indent=first, subsequent_indent=38 * ' ', break_long_words=False,
                         break_on_hyphens=False)
    return text or first.rstrip()
