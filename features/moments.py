"""
The moments of an optimizer: out of a checkpoint, and into the optimizer of a run that goes on, grows or is
sharded.
"""
import os
import pickle
import pickletools
import zipfile
from collections import OrderedDict

import torch

from checkpoint import first_not_finite, open_regular
from configurator import UserError

MOST = 2 ** 23  # bytes of the pickle that says which tensors there are; they have files of their own
DTYPES = {'FloatStorage': torch.float32, 'HalfStorage': torch.float16, 'BFloat16Storage': torch.bfloat16,
          'DoubleStorage': torch.float64}
TUPLES = {'EMPTY_TUPLE': 0, 'TUPLE1': 1, 'TUPLE2': 2, 'TUPLE3': 3, 'TUPLE': None}  # and how many items
NUMBERS = {'NONE', 'NEWTRUE', 'NEWFALSE', 'BININT', 'BININT1', 'BININT2', 'LONG1', 'BINFLOAT'}
PUTS = ('BINPUT', 'LONG_BINPUT')
GETS = ('BINGET', 'LONG_BINGET')
OPCODES = {*TUPLES, *NUMBERS, *PUTS, *GETS, 'PROTO', 'STOP', 'MARK', 'BINUNICODE', 'EMPTY_DICT', 'SETITEM',
           'SETITEMS', 'EMPTY_LIST', 'APPEND', 'APPENDS', 'GLOBAL', 'REDUCE', 'BINPERSID'}
# The names of an optimizer's tensors: AdamW, Muon, Counts
KINDS = ({'step', 'exp_avg', 'exp_avg_sq'}, {'step', 'momentum'}, {'seen'})


# -----------------------------------------------------------------------------
# Out of a checkpoint

class Unpickler(pickle.Unpickler):
    """
    Reads what torch.save() writes of dicts, lists, text, numbers and tensors, and refuses all else.
    torch.load(weights_only=True) accepts much more, and had vulnerabilities (CVE-2025-32434, CVE-2026-24747).
    """

    def __init__(self, file, archive, root):
        super().__init__(file)
        self.archive, self.root = archive, root
        self.storages = {}

    def find_class(self, module, name):
        if module == 'torch' and name in DTYPES:
            return DTYPES[name]
        known = {('torch._utils', '_rebuild_tensor_v2'): rebuild, ('collections', 'OrderedDict'): OrderedDict}
        if (module, name) not in known:
            raise pickle.UnpicklingError(f'it refers to {module}.{name}')
        return known[module, name]

    def persistent_load(self, identity):
        """The tensor (numbers,) for ('storage', its dtype, the name of its entry, …)."""
        _, dtype, name, *_ = identity
        if name not in self.storages:
            entry = self.archive.getinfo(f'{self.root}/data/{name}')
            data = bytearray(entry.file_size)
            with self.archive.open(entry) as f:
                if f.readinto(data) != len(data):
                    raise EOFError(f'data/{name} is truncated')
            self.storages[name] = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        return self.storages[name]


def rebuild(storage, offset, size, stride, *_):
    return storage.as_strided(size, stride, offset)  # within the storage: RuntimeError else


def read_archive(path):
    """The content of a file that torch.save() has written. Raises UserError for any other file."""
    with open_regular(path) as f:
        try:
            with zipfile.ZipFile(f) as archive:
                entries = archive.infolist()
                held = sum(entry.file_size for entry in entries)
                if any(entry.compress_type for entry in entries) or held > os.path.getsize(path):
                    raise ValueError('its entries are compressed, or overlap')
                root = entries[0].filename.partition('/')[0]
                entry = archive.getinfo(f'{root}/data.pkl')
                if entry.file_size > MOST:
                    raise ValueError(f'data.pkl has more than {MOST:,} bytes')
                check_opcodes(archive.read(entry))
                with archive.open(entry) as pickled:
                    return Unpickler(pickled, archive, root).load()
        except Exception as error:  # a hostile file may raise anything
            reason = ' '.join(str(error).split())[:200] or type(error).__name__
            raise UserError(f'{path}: not readable as the moments of an optimizer: {reason}') from None


def check_opcodes(data):
    """
    Raise ValueError for what torch.save() does not write of tensors. A tuple can only be used twice if it has
    numbers alone, like betas: hashing (t, t) of t = (u, u) and so on takes forever.
    """
    tuples = set()  # that cannot be used again
    before = []
    for opcode, argument, _ in pickletools.genops(data):
        name = opcode.name
        if name not in OPCODES:
            raise ValueError(f'its pickle has {name}')
        if name in PUTS:
            count = TUPLES.get(before[-1], 0)
            if count is None or count and not NUMBERS.issuperset(before[-1 - count:-1]):
                tuples.add(argument)
            continue
        if name in GETS and argument in tuples:
            raise ValueError('its pickle uses a tuple twice')
        before = [*before[-3:], name]


def read_moments(folder):
    """
    {name: {what: tensor}} of a checkpoint's optimizer; {} for a tensor that it has not moved yet. Raises
    UserError for a file that has anything else.
    """
    path = os.path.join(folder, 'optimizer.pt')
    stored = read_archive(path)
    try:
        names = [name for group in stored.get('param_groups', ()) for name in group.get('param_names', ())]
        moments = {name: dict(stored['state'].get(n, {})) for n, name in enumerate(names)}
        tensors = {f'{what} of {name}': t for name, own in moments.items() for what, t in own.items()}
        is_right = (type(stored.get('state', {})) is dict and all(type(name) is str for name in names)
                    and all(not own or own.keys() in KINDS for own in moments.values())
                    and all(isinstance(t, torch.Tensor) for t in tensors.values()))
    except (AttributeError, KeyError, TypeError, ValueError):
        is_right = False
    if not is_right or len(moments) < len(names):
        raise UserError(f'{path}: does not hold the moments of an optimizer: restore it from a copy')
    broken = first_not_finite(tensors)
    if broken:
        raise UserError(f'{path}: {broken} is not finite: restore it from a copy')
    return moments


# -----------------------------------------------------------------------------
# Into an optimizer

def moments_of(optimizer):
    """{name of a tensor: {what: tensor}} of an optimizer."""
    return {name: dict(optimizer.state.get(p, {})) for group in optimizer.param_groups
            for name, p in zip(group['param_names'], group['params'])}


def give_moments(optimizer, moments, place=lambda t, p: t.clone()):  # copied blocks move apart
    """
    Load the moments of those tensors that the optimizer has; learning rates, betas and weight decay do not
    change. Returns the number of tensors. place(tensor, parameter): the part of a moment to keep.
    """
    params = [(p, group.get('muon', False)) for group in optimizer.param_groups for p in group['params']]
    names = [name for group in optimizer.param_groups for name in group['param_names']]
    fit = {}
    for n, (name, (p, is_muon)) in enumerate(zip(names, params)):
        own = moments.get(name, {})
        shapes = {'step': (), 'seen': p.shape[:1]}  # seen: a number a row, of Counts
        if (own and ('momentum' in own) == is_muon
                and all(t.shape == shapes.get(what, p.shape) for what, t in own.items())):
            fit[n] = {what: place(t, p) for what, t in own.items()}
    optimizer.load_state_dict(optimizer.state_dict() | {'state': fit})
    return len(fit)


def load_optimizer(folder, optimizer):
    """Load the moments of a checkpoint of the same model. Raises UserError for moments of other tensors."""
    moments = read_moments(folder)
    if (moments.keys() != moments_of(optimizer).keys()
            or give_moments(optimizer, moments) < sum(map(bool, moments.values()))):
        raise UserError(f'{folder}: its optimizer has the moments of other tensors: '
                        f'give another --out_dir with --init_from={folder}')
