"""
Settings: defaults < config file < --key=value.

    python train.py config/lowrank.py --n_layer=6 --learning_rate=1e-3 --start="a=b"

A setting is declared once, as a dataclass field with a comment beside it, in the file that uses it. A
script's Settings inherits the dataclasses it needs. The settings of a feature are in
features/NAME/settings.py and are added when one of them is used. A config file is a small Python file of
assignments (nanoGPT's work unchanged). It is code and runs with your permissions: read it before you use it.
`--help` prints the settings with their defaults and comments, `--help=NAME` those of a feature.
"""
import ast
import atexit
import dataclasses
import errno
import gc
import io
import keyword
import math
import os
import re
import select
import shutil
import signal
import sys
import threading
import time
import traceback
import types
import typing
from collections import deque
from contextlib import suppress
from importlib.util import find_spec

from features import build, fields_of

try:
    import fcntl  # noqa: F401 — every script takes locks; Windows has none of these
except ImportError:
    print('minnow runs on Linux and macOS; on Windows run it in WSL: wsl --install, then the same commands',
          file=sys.stderr)
    sys.exit(2)

IMPORTED = time.perf_counter()
ROOT = os.path.dirname(os.path.realpath(__file__))  # the folder of this repository
OLDEST_TORCH = '2.11'  # the oldest version with which the tests pass: make test-oldest
PINNED_TORCH = '2.13.0'  # the version in requirements.txt


class UserError(Exception):
    """An error that the user can fix. Its text is one line that names the setting or file and the fix."""


class FilePath(str):
    """The type of a setting that is a path: a str with ~ expanded, which a shell does not do after --out=."""


# -----------------------------------------------------------------------------
# The process: how it begins, what it says, how it ends

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
DISK_ERRORS = (*NO_ROOM, errno.EIO, errno.EROFS, errno.ESTALE)
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
# Characters that command a terminal (C0, C1) or change the order of its text
CONTROLS = re.compile('[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]')


class Stopped(KeyboardInterrupt):
    """A signal has asked this process to stop; its argument is the signal's number."""


def run_main(main, output_is_all=False):
    """
    Call main(). A UserError, an old torch or a full disk becomes a one-line error and exit code 2; a signal
    that stops it becomes a line and exit code 128 + its number. output_is_all: main() only prints, so it
    stops if nobody can read its output, which is exact unless it is a terminal.
    """
    if not gc.isenabled():  # features.start() has stopped it
        gc.freeze()  # nor look at torch's million objects later: the exit is 0.4 s faster
        gc.enable()
    atexit.register(gc.freeze)  # nor at what was imported since: another 0.8 s if torch compiles
    for number in range(3):  # where one was closed, the next file would take its number, and what is printed
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    stdout, stderr, safe_path = sys.stdout, sys.stderr, os.environ.get('PYTHONSAFEPATH', '')
    sys.stdout, sys.stderr = Output(stdout, output_is_all), Output(stderr, has_bars=True)
    os.environ['PYTHONSAFEPATH'] = '1'  # for what libraries start: no modules out of the working folder
    sys.stdout.reconfigure(errors='replace')  # a terminal that cannot show a character is no reason to stop
    try:
        listen(interrupt)
        check_torch()
        main()
        sys.stdout.flush()
        if sys.stdout.lost:  # the tables of compare.py, perhaps
            refuse(f'stdout: {sys.stdout.lost.strerror}: some of what was printed is lost, nothing else')
    except UserError as error:
        refuse(error)
    except KeyboardInterrupt as stop:
        number = signal.Signals(*stop.args or [signal.SIGINT])
        refuse(f'stopped by {number.name}; run the same command again', 128 + number)
    except BrokenPipeError:  # | head has seen enough
        leave(1)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            where = f'{error.filename}: ' if error.filename else ''
            to_do = 'make room' if error.errno in NO_ROOM else 'check the disk'
            refuse(f'{where}{error.strerror}: {to_do}, then run the same command')
        if os.environ.get('WORLD_SIZE', '1') == '1':
            raise
        traceback.print_exc()
        leave(1)
    finally:
        listen(signal.SIG_DFL)  # a traceback of Python's own end says nothing
        with suppress(OSError):
            sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr, os.environ['PYTHONSAFEPATH'] = stdout, stderr, safe_path


def listen(handler):
    """Call handler(number, frame) at the signals that ask to stop. Under nohup, SIGHUP does not."""
    for number in STOP_SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


def interrupt(number, frame, last=[-math.inf]):  # noqa: B006 - when the last one came
    """
    Signal handler that raises Stopped. Signals of the next five seconds are the same one: a shell, the system
    and torchrun send several. But a second Ctrl-C counts.
    """
    if number == signal.SIGINT or time.monotonic() - last[0] > 5:
        last[0] = time.monotonic()
        raise Stopped(number)


class Output:
    """
    stdout or stderr that may become unwritable: the terminal is closed, the program reading the pipe has
    ended or stopped reading, or the disk is full. is_needed: True waits for the reader, and raises an OSError
    then; False drops the output and continues. has_bars: tqdm may move the cursor. lost: the OSError of a
    full disk, reported at the end. Control characters are shown as text, but in the output that is_needed,
    unless it is a terminal.
    """
    PATIENCE = 2.0  # seconds to wait for a reader that has stopped reading
    BAR = re.compile(r'\r[^\x00-\x1f\x7f-\x9f]*\r?|(\n|\x1b\[A)*')

    def __init__(self, stream, is_needed=False, has_bars=False):
        # Python has none where it was closed from the start
        self.stream = stream or open(os.devnull, 'w', encoding='utf-8')
        self.is_needed, self.has_bars, self.lost = is_needed, has_bars, None
        self.is_exact = is_needed and not self.stream.isatty()
        self.pending = deque(maxlen=10_000)  # pieces of text; of more than these the first are dropped
        self.writer = None  # a thread, as the reader of a pipe may never read again

    def write(self, text):
        if not (self.is_exact or self.has_bars and self.BAR.fullmatch(text)):
            text = visible(re.sub(r'\x1b\[[\d;]*m', '', text) if self.has_bars else text)  # wandb has colors
        self.pending.append(text)
        if '\n' in text:
            self.flush()
        return len(text)

    def flush(self):
        if self.writer and self.writer.is_alive():
            return
        text = ''.join(self.pending)
        self.pending.clear()
        if self.is_needed:
            self.send(text)
        elif text:
            self.writer = threading.Thread(target=self.send, args=[text], daemon=True)
            try:
                self.writer.start()
            except RuntimeError:  # no more threads on this machine
                self.send(text)
            else:
                self.writer.join(self.PATIENCE)

    def send(self, text):
        """Write text to the descriptor itself: a thread that waits must not hold the lock of a stream."""
        try:
            fd = self.stream.fileno()
            data = text.encode(self.encoding, self.errors)
            while data:
                try:
                    data = data[os.write(fd, data):]
                except BlockingIOError:  # whoever started this process wants it so
                    room = select.poll()  # select() takes no descriptor above 1,023
                    room.register(fd, select.POLLOUT)
                    room.poll()
        except io.UnsupportedOperation:  # a stream in memory
            self.stream.write(text)
        except OSError as error:
            error.filename = 'stdout'
            if self.is_needed:
                raise
            if error.errno in NO_ROOM:  # there may be room again
                self.lost = error
                return
            with suppress(OSError), open(os.devnull, 'wb') as null:
                os.dup2(null.fileno(), fd)

    def __getattr__(self, name):
        return getattr(self.stream, name)


def visible(text):
    r"""`text` with its CONTROLS spelled out, as \x1b; new lines and tabs stay."""
    return CONTROLS.sub(lambda found: ascii(found[0])[1:-1], text)


def check_torch():
    """Raise UserError if this script has imported a torch older than OLDEST_TORCH."""
    if 'torch' not in sys.modules:  # prepare.py works without it
        return
    found = sys.modules['torch'].__version__  # as 2.13.0+cpu, 2.12.0a0+git123
    oldest = [int(number) for number in OLDEST_TORCH.split('.')]
    if [int(number) for number in re.findall(r'\d+', found)[:2]] < oldest:
        raise UserError(f'torch {found}: minnow needs torch {OLDEST_TORCH} or later: '
                        f'pip install torch=={PINNED_TORCH}')


def refuse(reason, code=2):
    """Print a one-line error and exit with this code."""
    name, rank = os.path.basename(sys.argv[0]), os.environ.get('RANK', '0')
    if rank != '0':  # rank 0 finds most mistakes too: it says them, and torchrun ends the others
        listen(signal.SIG_DFL)
        time.sleep(3)
        name += f': rank {rank}'
    line = ' '.join(visible(str(reason)).split())
    if len(line) > 1000:  # a name out of a file
        line = f'{line[:500]} … {line[-400:]}'
    print(f'{name}: {line}', file=sys.stderr)
    leave(code)


def process_age():
    """Seconds since this process began, imports included; else since this file was imported."""
    try:
        with open('/proc/self/stat', encoding='utf-8') as f:
            fields = f.read().rpartition(')')[2].split()
        ticks = int(fields[19])  # field 22: when it began, in clock ticks since the machine did
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf('SC_CLK_TCK')
    except (OSError, AttributeError):
        return time.perf_counter() - IMPORTED


def leave(code):
    """Exit; one of several ranks without clean-up, in which NCCL would wait and gloo's threads may abort."""
    if os.environ.get('WORLD_SIZE', '1') != '1':  # torchrun has started others too
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
    An instance of the dataclass `cls` from its defaults, overridden by config files and --key=value in order.
    A bare argument is a config file, or, if cls.positional names a list setting, an item of that list. A list
    setting can be given several times (--stop=a --stop=b); a bare --flag means True. Raises UserError for an
    unknown key, a wrong type, an invalid choice, and for the errors of cls.check().
    """
    argv = sys.argv[1:] if argv is None else argv
    positional = getattr(cls, 'positional', None)
    given, lists, from_files, config_file = {}, {}, {}, ''
    for arg in argv:
        if arg.startswith('--'):
            key, equals, text = arg[2:].partition('=')  # only at the first '=': --start="a=b" works
            setting = find_field(cls, key, f'--{key}')
            if not equals and bool not in options(setting.type):
                raise UserError(f'--{key}: has no value: write --{key}=VALUE, in one word')
            value = parse(text if equals else 'True', setting, f'--{key}')
            if isinstance(value, list):
                value = lists[key] = lists.get(key, []) + value
            given[setting.name] = value
        elif positional:
            given.setdefault(positional, []).extend(convert([arg], find_field(cls, positional, arg), arg))
        else:
            assigned, config_file = read_config(cls, arg), arg
            given.update(assigned)
            from_files |= dict.fromkeys(assigned, arg)
    settings = build(cls, **given)
    settings.given = set(given)  # what the user asked for, as against what is a default
    settings.from_files = from_files  # {setting: the last config file that assigns it}
    settings.config_file = config_file  # the last one; '' = none
    check(settings)
    return settings


def check(settings, where=''):
    """Run check() of every dataclass that `settings` inherits. Raises UserError, with `where` before it."""
    for part in type(settings).__mro__:
        if 'check' in vars(part):
            try:
                part.check(settings)
            except ValueError as error:  # model.py knows none of our files, so it raises plain ValueErrors
                raise UserError(f'{where}: {error}' if where else error) from None


def read_config(cls, path):
    """The settings that the Python file `path` assigns, as a dict. It is executed in its own namespace."""
    path = expand_home(path)
    if not os.path.isfile(path):
        from features.help import no_config_file
        raise no_config_file(path)
    namespace = {'__file__': path, '__name__': 'config'}
    try:
        with open(path, 'rb') as f:  # compile() knows byte-order marks and codings
            exec(compile(f.read(), path, 'exec'), namespace)
    except (Exception, SystemExit) as error:
        raise UserError(f'{path}: {type(error).__name__}: {error}') from None
    given = {}
    for key, value in namespace.items():
        # A name that is no helper of the file must be a setting: a typo must not pass in silence
        if not (key.startswith('_') or isinstance(value, types.ModuleType) or callable(value)):
            hint = f'; name it _{key} if it is a variable of this file'
            field = find_field(cls, key, f'{path}: {key}', hint)
            given[key] = convert(value, field, f'{path}: {key}')
    return given


# -----------------------------------------------------------------------------
# values

def find_field(cls, key, where, hint=''):
    """The field of `cls` for a setting. If there is none, raises UserError with a similar name and `hint`."""
    if keyword.iskeyword(key):
        key += '_'  # --from=DIR sets the field from_, as Python cannot have one named from
    fields = fields_of(cls)
    if key not in fields:
        from features.help import find_in_features
        return find_in_features(cls, key, where, hint)
    return fields[key]


def parse(text, field, where):
    """The value for `field` in a command-line `text`: a Python literal if possible, else the text itself."""
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


def convert(value, field, where):
    """Convert `value` to the annotation of `field`. Raises UserError that says which values are accepted."""
    kinds = options(field.type)
    for kind in kinds:
        with suppress(ValueError, OverflowError):
            value = as_kind(value, kind)
            if kind is dict and FilePath in kinds:  # a mixture: {folder: its share}
                value = {as_kind(key, FilePath): item for key, item in value.items()}
            return value
    from features.help import describe
    raise UserError(f'{where}: got {value!r}, takes {describe(field.type)}')


def as_kind(value, kind):
    """`value` as one type of an annotation wants it. Raises ValueError if it is of another."""
    inner = typing.get_args(kind)
    if typing.get_origin(kind) is list:
        items = value if isinstance(value, (list, tuple)) else [value]
        return [as_kind(item, inner[0]) for item in items]
    if kind is FilePath and type(value) is str and '\0' not in value:
        return expand_home(whole_text(value, repr(value)))  # other libraries read no path that is not UTF-8
    if kind is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    if kind is int and type(value) is float and value.is_integer():  # --max_iters=1e4
        return int(value)
    if type(value) is kind or value in inner:  # inner: the choices of a Literal
        return value
    raise ValueError


def expand_home(path):
    """Replace ~ with the home directory: at the beginning of a path, or after hf: or an adapter's name=."""
    start = re.match(r'(hf:|[\w-]+=)?', path)[0]
    return start + os.path.expanduser(path.removeprefix(start))


def typed_text(text, where):
    r"""
    Replace escapes in the text of the setting `where`, from a shell, a config file or a terminal: \n is a new
    line, \t a tab, \r a carriage return, \\ a backslash, \u00e4 the character with that number. Other
    backslashes stay. Raises UserError like whole_text().
    """
    def meaning(found):
        return found[0].encode().decode('unicode_escape')
    return whole_text(re.sub(r'\\([ntr\\]|u[0-9a-fA-F]{4})', meaning, text), where)


def whole_text(text, where):
    """
    The text of `where` with its surrogate pairs joined, which JSON may contain. Raises UserError for a single
    surrogate: that is how Python reads invalid UTF-8 from a command line or a terminal.
    """
    text = text.encode('utf-16-le', 'surrogatepass').decode('utf-16-le', 'surrogatepass')
    half = re.search('[\ud800-\udfff]', text)
    if half:
        place = f'{half[0]!r} after {half.start()} characters'
        raise UserError(f'{where}: not UTF-8: {place} is no character: takes text in UTF-8')
    return text


def options(annotation):
    """int | None → (int, NoneType); Literal['a', 'b'] → (Literal['a', 'b'],)"""
    is_union = typing.get_origin(annotation) in (types.UnionType, typing.Union)
    return typing.get_args(annotation) if is_union else (annotation,)


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
    """torch.device for a setting. Raises UserError if this machine does not have it."""
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
    """The name of a dtype. On a CPU a timed matmul decides: bfloat16 can be 4x faster or 100x slower."""
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
    """pick_dtype() for evaluation, greedy decoding and beam search: auto is float32, without tf32."""
    import torch
    dtype = 'float32' if name == 'auto' else pick_dtype(name, device)
    if dtype == 'float32':
        torch.set_float32_matmul_precision('highest')
    return dtype


def pick_compile(setting, device, flops=0.0):
    """
    Whether to compile; prints a line if it cannot work. auto: on CUDA, and on a CPU for runs of at least 5e13
    `flops`, two minutes: compiling takes 20 s there and saves a quarter of the time (10.6M parameters in
    bfloat16: 8,900 against 6,400 tokens/s).
    """
    if setting == 'auto':
        setting = device.type == 'cuda' or (device.type == 'cpu' and flops >= 5e13)
    if not setting:
        return False
    missing = ''
    if device.type == 'cpu' and not any(map(shutil.which, (os.environ.get('CXX', 'g++'), 'clang++', 'cl'))):
        missing = 'C++ compiler'
    if device.type == 'cuda' and find_spec('triton') is None:
        missing = 'triton'
    if missing:
        print(f'compile: no {missing} on this machine, continuing without it', flush=True)
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
    """Seconds of the fastest call of compute() among those that fit into `seconds`, at least three."""
    times, end = [], time.perf_counter() + seconds
    while len(times) < 4 or time.perf_counter() < end:
        start = time.perf_counter()
        compute()
        times.append(time.perf_counter() - start)
    return min(times[1:])  # the first one sets things up


# dense bf16 (V100, T4: fp16) peaks, from the makers' data sheets
PEAK_FLOPS = {'H200': 989e12, 'H100 PCIe': 756e12, 'H100': 989e12, 'GH200': 989e12, 'B200': 2250e12,
              'A100': 312e12, 'A10G': 70e12, 'A10': 125e12, 'L40S': 362e12, 'L40': 181e12, 'L4': 121e12,
              'RTX 5090': 209e12, 'RTX 4090': 165e12, 'RTX 3090': 71e12, 'V100': 125e12, 'T4': 65e12}


def peak_flops(device, dtype):
    """FLOP/s the device could reach: by a GPU's data sheet, by a CPU's best matmul; None = not known."""
    import torch
    if device.type == 'cpu':
        return matmul_flops(device, getattr(torch, dtype), 1024, seconds=0.1)
    if device.type == 'cuda' and dtype != 'float32':
        for name, peak in PEAK_FLOPS.items():
            if name in torch.cuda.get_device_name(device):
                return peak
    return None
