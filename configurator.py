"""
Settings: defaults < config file < --key=value.

    python train.py config/lowrank.py --n_layer=6 --learning_rate=1e-3 --start="a=b"

A setting is declared once, as a dataclass field with a comment beside it, in the file that uses it; a
script's Settings inherits the dataclasses it needs. The settings of a feature stand in
features/NAME/settings.py and are added when one of them is used. A config file is a small Python file of
assignments (nanoGPT's run unchanged). It is code and runs with your rights: read a stranger's before you use
it. `--help` prints the settings with their defaults and comments, `--help=NAME` those of a feature.
"""
import ast
import dataclasses
import difflib
import errno
import glob
import inspect
import keyword
import math
import os
import re
import shutil
import sys
import textwrap
import time
import traceback
import types
import typing
from contextlib import suppress
from importlib.util import find_spec

from features import (
    about_feature,
    build,
    comments_of,
    core_fields,
    default_of,
    feature_classes,
    feature_names,
    own_fields,
    settings_of,
)

try:
    import fcntl  # noqa: F401 — every script takes locks; Windows has none of these
except ImportError:
    print('minnow runs on Linux and macOS; on Windows run it in WSL: wsl --install, then the same commands',
          file=sys.stderr)
    sys.exit(2)

ROOT = os.path.dirname(os.path.realpath(__file__))  # the folder of this repository
OLDEST_TORCH = '2.11'  # the oldest version with which the tests pass: make test-oldest
PINNED_TORCH = '2.13.0'  # the version in requirements.txt


class UserError(Exception):
    """
    Something the user can mend. The text is one line that names the setting or the file and what to change.
    """


class FilePath(str):
    """
    The type of a setting that names a file or a folder. Its values are plain str in which ~ has become the
    home directory: a shell does that at the beginning of a word alone, not after --out=.
    """


# -----------------------------------------------------------------------------
# The process: how it begins, what it says, how it ends

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)


def run_main(main, output_is_all=False):
    """
    Call main(). A UserError, an old torch or a disk that is full or broken becomes one line on stderr and
    exit code 2; Ctrl-C becomes exit code 130.
    output_is_all: whether main() only prints: it then ends when nobody can read its output.
    """
    stdout, stderr = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = Output(stdout, output_is_all), Output(stderr, False)
    sys.stdout.reconfigure(errors='replace')  # a terminal that cannot show a character is no reason to stop
    try:
        check_torch()
        main()
        sys.stdout.flush()
        if sys.stdout.lost:  # the tables of compare.py, perhaps
            raise sys.stdout.lost
    except UserError as error:
        refuse(error)
    except KeyboardInterrupt:
        leave(130)
    except BrokenPipeError:  # | head has seen enough
        silence(stdout)
        leave(1)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            where = f'{error.filename}: ' if error.filename else ''
            refuse(f'{where}{error.strerror}: make room, then run the same command')
        if not among_others():
            raise
        traceback.print_exc()
        leave(1)
    finally:
        sys.stdout, sys.stderr = stdout, stderr
        for stream in filter(None, (stdout, stderr)):
            try:
                stream.flush()
            except OSError:  # or Python tries once more, and complains
                silence(stream)


class Output:
    """
    stdout or stderr, which may be gone: its terminal was closed, the program behind its pipe has ended, its
    disk is full.
    is_needed: True raises an OSError for that; False drops the output, and the process goes on.
    lost: the OSError of a full disk, to be told in the end.
    """

    def __init__(self, stream, is_needed):
        # Python has none where it was closed from the start
        self.stream = stream or open(os.devnull, 'w', encoding='utf-8')
        self.is_needed, self.lost = is_needed, None

    def write(self, text):
        return self.attempt(self.stream.write, text)

    def flush(self):
        return self.attempt(self.stream.flush)

    def attempt(self, act, *args):
        try:
            return act(*args)
        except OSError as error:
            error.filename = 'stdout'
            if self.is_needed:
                raise
            if error.errno in (errno.ENOSPC, errno.EDQUOT):  # there may be room again
                self.lost = error
            else:
                silence(self.stream)

    def __getattr__(self, name):
        return getattr(self.stream, name)


def silence(stream):
    """Let a stream that cannot be written to lead nowhere."""
    with suppress(OSError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def check_torch():
    """Raise UserError if this script has imported a torch older than OLDEST_TORCH."""
    if 'torch' not in sys.modules:  # prepare.py works without it
        return
    found = sys.modules['torch'].__version__  # as 2.13.0+cpu, 2.12.0a0+git123
    if parse_version(found) < parse_version(OLDEST_TORCH):
        raise UserError(f'torch {found}: minnow needs torch {OLDEST_TORCH} or later: '
                        f'pip install torch=={PINNED_TORCH}')


def parse_version(text):
    """[major, minor] of a version."""
    return [int(number) for number in re.findall(r'\d+', text)[:2]]


def refuse(reason):
    """Say in one line why this process ends, and exit with code 2."""
    rank = os.environ.get('RANK', '0')
    # under torchrun every rank finds most mistakes: the first says it and torchrun ends the others, else they
    # speak up
    if rank != '0':
        time.sleep(3)
    name = os.path.basename(sys.argv[0])
    prefix = f'{name}: rank {rank}: ' if rank != '0' else f'{name}: '
    print(prefix + ' '.join(str(reason).split()), file=sys.stderr)
    leave(2)


def among_others():
    """Whether this is one of several processes that torchrun started."""
    return int(os.environ.get('WORLD_SIZE', 1)) > 1


def leave(code):
    """
    Exit. One of several ranks does without tidying up: NCCL would wait for the others, and gloo's threads,
    now and then, abort or wait for ever.
    """
    if among_others():
        if 'wandb' in sys.modules:
            sys.modules['wandb'].finish(exit_code=code)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


# -----------------------------------------------------------------------------
# defaults < config file < command line

def configure(cls, argv=None):
    """
    An instance of the dataclass `cls` from its defaults, then config files, then --key=value, in the order
    given.

    A bare argument is a config file, unless cls.positional names a list setting that collects the bare ones.
    A list setting may be given several times (--stop=a --stop=b); a bare --flag means True.
    Raises UserError for an unknown key, a wrong type or a bad choice, and whatever cls.check() finds.
    """
    argv = sys.argv[1:] if argv is None else argv
    for arg in argv:
        if arg in ('--help', '-h') or arg.startswith('--help='):
            print(help_text(cls, arg.partition('=')[2]))
            sys.exit(0)
    positional = getattr(cls, 'positional', None)
    given, lists, from_files = {}, {}, {}
    for arg in argv:
        if arg.startswith('--'):
            key, equals, text = arg[2:].partition('=')  # only at the first '=': --start="a=b" works
            setting = find_field(cls, key, f'--{key}')
            if not equals and bool not in options(setting.type):
                raise UserError(f'--{key}: has no value: write --{key}=VALUE, in one word')
            value = parse(text if equals else 'True', setting, f'--{key}')
            given[setting.name] = lists.setdefault(key, []) if isinstance(value, list) else value
            if isinstance(value, list):
                given[setting.name] += value
        elif positional:
            given.setdefault(positional, []).extend(convert([arg], find_field(cls, positional, arg), arg))
        else:
            assigned = read_config(cls, arg)
            given.update(assigned)
            from_files |= dict.fromkeys(assigned, arg)
    settings = build(cls, **given)
    settings.given = set(given)  # what the user asked for, as against what is a default
    settings.from_files = from_files  # {setting: the last config file that assigns it}
    check(settings)
    return settings


def configure_command(commands, argv=None):
    """
    (function, its settings) of the command that the first argument names: `python surgery.py factorize
    --from=DIR`.
    commands: {name: (function, its dataclass)}. Raises UserError as configure() does, and for no such
    command.
    """
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in commands:
        function, cls = commands[argv[0]]
        return function, configure(cls, argv[1:])
    takes = f'takes {" or ".join(commands)}, then its settings; --help after it lists them'
    if argv and argv[0] in ('--help', '-h'):
        print(sys.modules[next(iter(commands.values()))[1].__module__].__doc__.strip()
              + f'\n\nThe first argument {takes}')
        sys.exit(0)
    raise UserError(f'{argv[0] if argv else "no command given"}: {takes}')


def check(settings, where=''):
    """
    Run the checks of every dataclass that `settings` inherits; their ValueErrors become UserErrors, after
    `where` the settings are from.
    """
    for part in type(settings).__mro__:
        if 'check' in vars(part):
            try:
                part.check(settings)
            except ValueError as error:  # model.py knows none of our files, so it raises plain ValueErrors
                raise UserError(f'{where}: {error}' if where else error) from None


def refuse_idle(settings, part, takes, why):
    """
    Raise ValueError for a setting of the dataclass `part` that the user gave although it has no effect: one
    that is not among the names `takes`. why: what ignores it.
    """
    idle = sorted(getattr(settings, 'given', set()) & {f.name for f in dataclasses.fields(part)} - takes)
    if idle:
        raise ValueError(f'{idle[0]}={getattr(settings, idle[0])}: {why} ignores it: leave it out')


def refuse_beside(settings, name, **plain):
    """
    Raise ValueError for a setting that does not go with the setting `name`: one that is not at this plain
    value.
    """
    for other, value in plain.items():
        found = getattr(settings, other, value)
        if found != value:
            raise ValueError(f'{name}={getattr(settings, name)}: goes with {other}={value} alone, '
                             f'not {found}: leave it out')


def read_config(cls, path):
    """The settings that the Python file `path` assigns, as a dict. It runs in a namespace of its own."""
    path = expand_home(path)
    if not os.path.isfile(path):
        near = difflib.get_close_matches(path, glob.glob('config/**/*.py', recursive=True), 1)
        raise UserError(f'{path}: no such config file'
                        + (f'; did you mean {near[0]}?' if near else ' (settings are given as --key=value)'))
    namespace = {'__file__': path, '__name__': 'config'}
    try:
        with open(path, 'rb') as f:  # compile() knows byte-order marks and codings
            exec(compile(f.read(), path, 'exec'), namespace)
    except (Exception, SystemExit) as error:
        raise UserError(f'{path}: {type(error).__name__}: {error}') from None
    given = {}
    for key, value in namespace.items():
        # helpers of the file: _names, imports, functions. Everything else must be a setting, or a typo would
        # pass in silence
        if not (key.startswith('_') or isinstance(value, types.ModuleType) or callable(value)):
            hint = f'; name it _{key} if it is a variable of this file'
            field = find_field(cls, key, f'{path}: {key}', hint)
            given[key] = convert(value, field, f'{path}: {key}')
    return given


def from_dict(cls, values, where):
    """
    An instance of `cls` from a dict (settings.json, a checkpoint's): strict in keys and types, as files are.
    Settings of a feature that is not used are left out: checkpoints of before features had folders hold all
    of them.
    """
    converted = {}
    for key, value in values.items():
        field = find_field(cls, key, f'{where}: {key}')
        value = convert(value, field, f'{where}: {key}')
        if field.name in core_fields(cls) or value != default_of(field):
            converted[field.name] = value
    settings = build(cls, **converted)
    check(settings, where)
    return settings


# Settings of earlier versions, each with the only value that this version still acts on;
# ... = any value, as it changed no result or stands elsewhere in the checkpoint
REMOVED = {
    'mix_by': 'tokens',
    'verify_data': ...,
    'first_block_dense': False,
    'rank_act_qk': None,
    'rank_init': ...,
    'rank_identity': False,
    'rank_blocks': 0,
    'rank_guide': 0,
    'factor_decay': 'factor',
    'momentum': 0.95,
    'momentum_warmup': 300,
    'eps': 1e-8,
    'lora_alphas': ..., 'lora_bias': ..., 'lora_layers': ..., 'lora_ranks': ..., 'lora_tokens': ...,
    'lora_whole': ...,
}


def without_removed(values, where):
    """
    A stored dict of settings without those in REMOVED. Raises UserError for one at another value: what it did
    has no code any more.
    """
    for name in REMOVED.keys() & values.keys():
        if REMOVED[name] not in (values[name], ...):
            raise UserError(f'{where}: {name}={values[name]}: minnow no longer has this setting: '
                            'use the version that wrote this')
    return {name: value for name, value in values.items() if name not in REMOVED}


# -----------------------------------------------------------------------------
# values

def find_field(cls, key, where, hint=''):
    """
    The field of `cls` for a setting. Raises UserError with the nearest name and `hint` if there is none.
    """
    if keyword.iskeyword(key):
        key += '_'  # --from=DIR sets the field from_, as Python cannot have one named from
    fields = {field.name: field for field in dataclasses.fields(cls)}
    if key not in fields:
        for name in feature_names():
            for part in feature_classes(getattr(cls, 'core', cls), name):
                fields |= {field.name: field for field in dataclasses.fields(part)}
    if key not in fields:
        near = difflib.get_close_matches(key, fields, 1, 0.5)
        hint = (f'; did you mean {near[0].rstrip("_")}?' if near else '; --help lists all') + hint
        raise UserError(f'{where}: no such setting{hint}')
    return fields[key]


def parse(text, field, where):
    """
    The value that `text` of a command line has for `field`: a Python literal where that fits, else the text
    itself.
    """
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        value = text
    if value in ([], ()) and list[str] in options(field.type):
        value = text  # --stop=[] ends a sample before these two characters
    try:
        return convert(text if isinstance(value, str) else value, field, where)
    except UserError:
        return convert(text, field, where)  # --start=123 and --out_dir=1e5 stay text where text is wanted


ESCAPES = {'n': '\n', 't': '\t', 'r': '\r', '\\': '\\'}


def typed_text(text, where):
    r"""
    The text that the setting `where` means, whether a shell, a config file or a terminal gave it: \n is a
    new line, \t a tab, \r a carriage return, \\ a backslash, \u00e4 the character of that number. Other
    backslashes are themselves. Raises UserError as whole_text() does.
    """
    def meaning(found):
        code = found[1]
        return chr(int(code[1:], 16)) if code[0] == 'u' else ESCAPES[code]
    return whole_text(re.sub(r'\\([ntr\\]|u[0-9a-fA-F]{4})', meaning, text), where)


def whole_text(text, where):
    """
    A text that can be written in UTF-8: two halves of a character, as JSON may spell one, become one. Raises
    UserError, which calls the text `where`, for a half alone. Python reads bytes of a command line or a
    terminal that are not UTF-8 as such halves.
    """
    text = text.encode('utf-16-le', 'surrogatepass').decode('utf-16-le', 'surrogatepass')
    half = re.search('[\ud800-\udfff]', text)
    if half:
        place = f'{half[0]!r} after {half.start()} characters'
        raise UserError(f'{where}: not UTF-8: {place} is no character: takes text in UTF-8')
    return text


def expand_home(path):
    """
    A path with the home directory in place of ~ at its beginning, also after hf: and an adapter's name=.
    """
    found = re.fullmatch(r'(hf:|[\w-]+=)?(~.*)', path, re.DOTALL)
    return (found[1] or '') + os.path.expanduser(found[2]) if found else path


def expand_paths(value, field):
    """
    The value of a setting, with expand_home() of each path if its type has FilePath in it: of a dict the keys
    are paths.
    """
    if not any(kind in (FilePath, list[FilePath]) for kind in options(field.type)):
        return value
    if isinstance(value, str):
        return expand_home(value)
    if isinstance(value, list):
        return [expand_paths(item, field) for item in value]
    if isinstance(value, dict):
        return {expand_paths(key, field): item for key, item in value.items()}
    return value


def convert(value, field, where):
    """
    `value` as the annotation of `field` wants it. Raises UserError that names the setting, what it got and
    what it takes.
    """
    value = expand_paths(value, field)
    for kind in options(field.type):
        if kind is type(None) and value is None:
            return value
        if typing.get_origin(kind) is typing.Literal:
            if any(type(value) is type(choice) and value == choice for choice in typing.get_args(kind)):
                return value
        elif (kind is float and isinstance(value, (int, float)) and not isinstance(value, bool)
              and math.isfinite(value)):
            return float(value)
        elif kind is int and isinstance(value, float) and value.is_integer():  # --max_iters=1e4
            return int(value)
        elif kind in (int, bool, str, dict, list) and type(value) is kind:
            return value
        elif kind is FilePath and type(value) is str:
            return value
        elif typing.get_origin(kind) is list:
            items, inner = value if isinstance(value, (list, tuple)) else [value], typing.get_args(kind)[0]
            if inner is float and all(type(item) in (int, float) for item in items):
                return [float(item) for item in items]
            if all(isinstance(item, str if inner is FilePath else inner) for item in items):
                return list(items)
    raise UserError(f'{where}: got {value!r}, takes {describe(field.type)}')


def options(annotation):
    """int | None → (int, NoneType); Literal['a', 'b'] → (Literal['a', 'b'],)"""
    return (typing.get_args(annotation) if typing.get_origin(annotation) in (types.UnionType, typing.Union)
            else (annotation,))


NAMES = {type(None): 'None', bool: 'True or False', list: 'a list', FilePath: 'a path'}


def describe(annotation):
    names = []
    for kind in options(annotation):
        if typing.get_origin(kind) is typing.Literal:
            names += [str(choice) for choice in typing.get_args(kind)]
        elif typing.get_origin(kind) is list:
            inner = typing.get_args(kind)[0]
            names.append(f'a list of {NAMES.get(inner, inner.__name__)}')
        else:
            names.append(NAMES.get(kind, kind.__name__))
    return ' | '.join(names)


# -----------------------------------------------------------------------------
# --help

def help_text(cls, which=''):
    """
    The text of --help: the settings of `cls` that people set first, in the groups of cls.help_first, if it
    has some, else all; then the features. which='all': all of the core; which=NAME: those of the feature
    NAME. Raises UserError for another name.
    """
    parts = [part for part in reversed(cls.__mro__) if dataclasses.is_dataclass(part)]
    features = {name: settings for name in feature_names() if (settings := settings_of(cls, name))}
    if which in features:
        return '\n'.join([about_feature(name=which), '',
                          *(help_line(*setting) for setting in features[which])])
    if which not in ('', 'all'):
        raise UserError(f'--help={which}: takes {", ".join(["all", *features])}')
    lines = [(sys.modules[cls.__module__].__doc__ or '').strip()]
    groups = getattr(cls, 'help_first', None)
    if groups and not which:
        own = {field.name: (field, comments_of(part).get(field.name)) for part in parts
               for field in dataclasses.fields(part) if field.name in own_fields(part)}
        for title, names in groups.items():
            lines += ['', title, *(help_line(*own[name]) for name in names)]
    else:
        for part in parts:
            fields = [field for field in dataclasses.fields(part) if field.name in own_fields(part)]
            if fields:
                lines += ['', f'{part.__name__} ({os.path.basename(inspect.getsourcefile(part))})']
                lines += [help_line(field, comments_of(part).get(field.name)) for field in fields]
    if features:
        lines += ['', 'Features: --help=NAME lists their settings']
        lines += [two_columns(name, about_feature(name)) for name in features]
    if groups and not which:
        lines += ['', '--help=all lists every setting of the core']
    return '\n'.join(lines)


def help_line(field, comment):
    features = '|'.join(os.listdir(os.path.join(ROOT, 'features')))
    comment = re.sub(rf'^(\[\w+\]|({features}):) ', '', comment or '')  # without the mark of a feature
    return two_columns(f'--{field.name.rstrip("_")}={default_of(field)!r}', choices(field.type) + comment)


def two_columns(name, text):
    """A name and its explanation, wrapped beside it."""
    lines = textwrap.wrap(text, 72, break_long_words=False, break_on_hyphens=False) or ['']
    first = f'  {name}'.ljust(36) + '  ' + lines[0]
    return '\n'.join([first.rstrip(), *(38 * ' ' + line for line in lines[1:])])


def choices(annotation):
    return (describe(annotation) + ': '
            if any(typing.get_origin(kind) is typing.Literal for kind in options(annotation)) else '')


# -----------------------------------------------------------------------------
# The machine: which device, which number format. Measured where documentation misleads. torch is imported
# where it is needed, as prepare.py does without it

@dataclasses.dataclass
class NumericConfig:
    device: str = 'auto'  # cpu, cuda, cuda:1, mps; auto = the fastest available
    dtype: typing.Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto'  # dtype of the matmuls; weights
    # stay float32. auto = bfloat16 where it is faster; float32 for greedy decoding, beam search and eval.py


@dataclasses.dataclass
class DeviceConfig(NumericConfig):
    compile: bool | typing.Literal['auto'] = 'auto'  # use torch.compile; auto = where it saves time: training
    # on CUDA, training on CPU for minutes, sampling 4,000 tokens


def pick_device(name):
    """torch.device for a setting. Raises UserError for one that this machine has not."""
    import torch
    count = {'cuda': torch.cuda.device_count(), 'mps': int(torch.backends.mps.is_available()), 'cpu': 1}
    if name == 'auto':
        name = next(kind for kind in count if count[kind])
    kind, _, number = name.partition(':')
    if kind not in count or (number and not number.isdigit()):
        raise UserError(f'device={name}: takes auto, cpu, cuda, cuda:N or mps')
    if not number and kind == 'cuda':
        number = os.environ.get('LOCAL_RANK', '')  # torchrun: a GPU each
    number = int(number or 0)
    if number >= count[kind]:
        raise UserError(f'device={name}: this machine has {count[kind]} {kind} device(s), '
                        f'number {number} was asked for; --device=cpu works everywhere')
    if kind == 'cuda':
        name = f'cuda:{number}'
        torch.cuda.set_device(name)
    torch.set_float32_matmul_precision('high')  # tf32 where there is any
    return torch.device(name)


def pick_dtype(name, device):
    """
    'float32', 'bfloat16' or 'float16'. On a CPU a timed matmul decides: bfloat16 can be 4x faster or 100x
    slower there. One line says so to a user who asks for it where it is slow.
    """
    import torch
    if device.type == 'cuda' and name == 'auto':
        return 'bfloat16' if torch.cuda.is_bf16_supported(including_emulation=False) else 'float16'
    if device.type == 'cpu' and name in ('auto', 'bfloat16'):
        gain = matmul_flops(device, torch.bfloat16) / matmul_flops(device, torch.float32)
        if name == 'auto':
            return 'bfloat16' if gain > 1.5 else 'float32'
        if gain < 0.5:
            print(f'dtype=bfloat16: {1 / gain:.0f} times slower than float32 on this CPU, '
                  'which has no instructions for it: leave it out', flush=True)
    return 'float32' if name == 'auto' else name


def pick_exact_dtype(name, device):
    """
    pick_dtype() for results that rounding would change: evaluations, greedy text, beams. auto is 'float32',
    and float32 is multiplied without tf32.
    """
    import torch
    dtype = 'float32' if name == 'auto' else pick_dtype(name, device)
    if dtype == 'float32':
        torch.set_float32_matmul_precision('highest')
    return dtype


def pick_compile(setting, device, flops=0.0):
    """
    Whether to compile; one line says so where it cannot work. auto: on CUDA, and on a CPU for a run of 5e13
    `flops` or more, two minutes: compiling takes 20 s there and saves a fourth of the time (10.6M parameters
    in bfloat16: 8,900 against 6,400 tokens/s).
    """
    is_wanted = setting
    if setting == 'auto':
        is_wanted = device.type == 'cuda' or (device.type == 'cpu' and flops >= 5e13)
    if not is_wanted:
        return False
    missing = ''
    if device.type == 'cpu' and not any(map(shutil.which, (os.environ.get('CXX', 'g++'), 'clang++', 'cl'))):
        missing = 'C++ compiler'
    if device.type == 'cuda' and find_spec('triton') is None:
        missing = 'triton'
    if missing:
        print(f'compile: no {missing} on this machine, going on without', flush=True)
        return False
    import torch._dynamo
    torch._dynamo.config.suppress_errors = True  # code that cannot be compiled runs as it is
    return True


def matmul_flops(device, dtype, n=512, seconds=0.02):
    """FLOP/s of an n x n matmul: the fastest of those that fit into `seconds`, at least three."""
    import torch
    a = torch.ones(n, n, device=device, dtype=dtype)
    b = torch.ones(n, n, device=device, dtype=dtype)
    return 2 * n ** 3 / fastest(lambda: (a @ b)[0, 0].item(), seconds)


def fastest(compute, seconds):
    """Seconds of the fastest compute() of those that fit into `seconds`, at least three."""
    times, end = [], time.perf_counter() + seconds
    while len(times) < 4 or time.perf_counter() < end:
        start = time.perf_counter()
        compute()
        times.append(time.perf_counter() - start)
    return min(times[1:])  # the first one sets things up


def is_out_of_memory(error):
    """Whether an error of torch or Python means that memory is used up."""
    text = str(error)
    return isinstance(error, MemoryError) or 'out of memory' in text or "can't allocate memory" in text
