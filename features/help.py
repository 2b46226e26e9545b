"""
The text of --help: the settings of the core and of features with their defaults and the comments beside them,
from the sources (declared.py); and the refusals of settings that are not there.
"""
import ast
import difflib
import glob
import inspect
import os
import re
import sys
import textwrap
import typing
from functools import partial

from configurator import ROOT, FilePath, UserError, options, refuse, run_main
from features import (
    HELP,
    comment_of,
    default_of,
    feature_names,
    feature_of,
    feature_parts,
    fields_of,
    source_of,
    with_features,
)
from features.commands import no_command, takes
from features.declared import parse, read, read_script

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


def answer(path):
    """
    Print the help of a script that sys.argv asks for, and exit. Returns if the sources do not tell it: names
    that come from import *, settings chosen at run time. After its imports, the script calls configure(), and
    that answer_after_all().
    """
    try:
        say = partial(print, script_help(path, sys.argv[1:]))
    except UserError as error:
        say = partial(refuse, error)
    except Exception:  # a mistake in a setting is shown by its import
        return
    run_main(say, output_is_all=True)
    sys.exit(0)


def answer_after_all(cls):
    """Print the help of the dataclass `cls` itself that sys.argv asks for, and exit."""
    print(help_text(cls, asked(sys.argv)))
    sys.exit(0)


def asked(argv):
    """'all', a feature or '': what --help in argv asks for."""
    return next(filter(HELP.fullmatch, argv)).partition('=')[2]


def script_help(path, argv):
    """
    The help of a script for these arguments: of the settings that it configures, or, if it has commands and
    argv names none, its docstring. Raises UserError for a command or a feature that is not there.
    """
    script = read_script(path)
    settings, has_commands = find_settings(path)
    if has_commands:
        commands = commands_in(script, settings)
        if argv[0] in ('--help', '-h'):
            return f'{script.__doc__.strip()}\n\nThe first argument {takes(commands)}'
        if argv[0] not in commands:
            raise no_command(argv, commands)
        settings = commands[argv[0]]
    return help_text(script.evaluate(settings), asked(argv))


def find_settings(path):
    """
    (the first argument of the script's call of configure() or configure_command() for the command line,
    whether it is the second one), from its source.
    """
    for node in ast.walk(parse(path)):
        name = ast.unparse(node.func) if isinstance(node, ast.Call) else ''
        is_whole = name and (len(node.args) == 1 or 'sys.argv' in ast.unparse(node))
        if name.removeprefix('configurator.') in ('configure', 'configure_command') and is_whole:
            return node.args[0], name == 'configure_command'
    raise LookupError(f'{path}: calls neither configure(SETTINGS) nor configure_command(COMMANDS)')


def commands_in(script, node):
    """{command: the expression for its dataclass} in the argument of configure_command()."""
    if isinstance(node, ast.Name):
        node = script.nodes[node.id].value
    return {key.value: value.elts[1] for part in ast.walk(node) if isinstance(part, ast.Dict)
            for key, value in zip(part.keys, part.values, strict=True)}


def help_text(cls, which=''):
    """
    The text of --help of a dataclass or its outline: of a training run the settings in FIRST, else all of the
    core; then the names of the features. which='all': all of the core; which=NAME: those of the feature NAME.
    Raises UserError for another name.
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
                file = os.path.relpath(source_of(part), ROOT)
                groups[f'{part.__name__} ({file})'] = inspect.get_annotations(part)
    core = getattr(cls, 'core', cls)
    is_outline = '_path' in vars(core)
    lines = [((read if is_outline else sys.modules.get)(core.__module__).__doc__ or '').strip()]
    for title, names in groups.items():
        lines += ['', title, *(help_line(cls, fields[name]) for name in names if name in fields)]
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


def find_in_features(cls, key, where, hint):
    """find_field() for a setting that the core does not have."""
    fields = all_fields(cls)
    if key == 'help':
        answer_after_all(cls)
    if key not in fields:
        near = difflib.get_close_matches(key, fields, 1, 0.5)
        hint = (f'; did you mean {near[0].rstrip("_")}?' if near else '; --help lists all') + hint
        raise UserError(f'{where}: no such setting{hint}')
    return fields[key]


def no_config_file(path):
    """The UserError for a config file that is not there."""
    near = difflib.get_close_matches(path, glob.glob('config/**/*.py', recursive=True), 1)
    return UserError(f'{path}: no such config file'
                     + (f'; did you mean {near[0]}?' if near else ' (settings are given as --key=value)'))


def about_feature(name):
    """The first paragraph of the docstring of a feature's settings, in one line."""
    text = read(f'features.{name}.settings').__doc__
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


NAMES = {type(None): 'None', bool: 'True or False', list: 'a list', FilePath: 'a path'}


def describe(annotation):
    names = []
    for kind in options(annotation):
        inner = typing.get_args(kind)
        if typing.get_origin(kind) is list:
            names.append(f'a list of {describe(inner[0])}')
        elif inner:  # the choices of a Literal
            names += map(str, inner)
        else:
            names.append(NAMES.get(kind, kind.__name__))
    return ' | '.join(names)
