"""Hostile checkpoints, and what stands beside them in the folder of a run."""

import io
import json
import os
import pickle
import struct
import zipfile
from pathlib import Path

import torch
from cases import (
    COMPARE,
    ESCAPES,
    EXPORT,
    FEW,
    INHERIT,
    LOSS,
    PAGE,
    RESUME,
    SAMPLE,
    WEIGHTS,
    Case,
    Runs,
    case,
    clear,
    documents,
    edit,
    fields,
    fifo,
    folder,
    hole,
    inside,
    link,
    outside,
    payload,
    without,
)
from honest import newest, seal

STEP = 'run/step_00000002'
STATE, MANIFEST, WEIGHTS_FILE, OPTIMIZER = (
    f'{STEP}/{name}' for name in ('state.json', 'manifest.json', 'model.safetensors', 'optimizer.pt')
)
OF_BPE = ('sample.py', '--out_dir=run_bpe', *FEW)
OF_LORA = ('sample.py', '--out_dir=lora', *FEW)
BPE_STATE, BPE_MODEL = 'run_bpe/step_00000002/state.json', 'run_bpe/step_00000002/tokenizer.model'
LORA_STATE = 'lora/step_00000002/state.json'
CASES = []


EITHER = (
    'begin is null',
    'begin is of 10**6 tokens',
    'prompt is with',
    'model.attn_scale = nan',
    'model.softcap = nan',
    'model.rope_theta',
    'model.norm_eps = nan',
    'tokenizer is characters of half',
    'settings are with data of NaN',
)


def state(name, how, *commands, path=STATE, **more):
    expected = 'either' if name.startswith(EITHER) else 'refused'
    CASES.append(
        case(
            name,
            'state.json',
            path,
            how,
            *(commands or (SAMPLE,)),
            sealed=True,
            expected=expected,
            **{
                'names': (
                    'state.json',
                    STEP,
                    'run: the logits',
                    'the byte tokenizer',
                    'the char tokenizer',
                    'the prompt has',
                )
            }
            | more,
        )
    )


# -----------------------------------------------------------------------------
# state.json, with a manifest that agrees

CASES += documents(STATE, 'state.json', SAMPLE, sealed=True, names=('state.json', STEP))
CASES += documents(LORA_STATE, 'state.json', OF_LORA, sealed=True)

for name, value in {'null': None, 'a list': [], 'empty': {}, 'a text': 'decoder', 'a number': 7}.items():
    state(f'model is {name}', fields(model=value))
for key, values in {
    'n_layer': (0, -1, 2.5, True, '2', None, 10**7, 10**12, 2**63, [2]),
    'n_embd': (0, -32, 33, 10**9, 2**40, 1e400),
    'n_head': (0, 3, -2, 10**9),
    'vocab_size': (0, -1, 10**10, 2**62, 'many'),
    'block_size': (0, -1, 2**62, 'long'),
    'd_ff': (-1, 10**12),
    'head_dim': (3, 10**9, -16),
    'n_kv_head': (3, -1),
    'dropout': (2.0, -1.0, 'x'),
    'rope_theta': (0.0, -1.0, float('nan'), float('inf'), 'x'),
    'norm_eps': (float('nan'), -1.0, 'x'),
    'arch': ('evil', None, ['decoder'], '../x'),
    'position': ('evil', 3),
    'mlp': ('os.system', None),
    'norm': ('evil',),
    'ranks': ([], {'blocks.0.attn.q': -1}, {'blocks.0.attn.q': 10**12}, {'../x': 5}),
    'rope_scaling': ({'rope_type': 'evil'}, {'factor': float('nan')}, [1], 'x'),
    'rope_dim': (-1, 3, 10**9),
    'window': (-1, 'x'),
    'n_expert': (-1, 10**7, 'x'),
    'n_encoder_layer': (-1, 10**7),
    'attn_scale': (float('nan'), 'x'),
    'softcap': (float('nan'), -1.0),
    'no_rope': ('x', [10**9], [-1]),
    'rank_qk': (-1, 10**12, 'x'),
    'tie': ('yes', 2, None),
}.items():
    for value in values:
        state(f'model.{key} = {str(value)[:40]}', inside('model', **{key: value}))
state('model has an unknown field', inside('model', evil=1))
state('model has a field of terminal escapes', inside('model', **{ESCAPES: 1}))
state('model has a field of half a surrogate pair', inside('model', **{'\ud800': 1}))
state('no model', without('model'))
state('no tokenizer', without('tokenizer'))
state('model for export has 10**7 layers', inside('model', n_layer=10**7), EXPORT, INHERIT, WEIGHTS, LOSS)
state('model for export is a list', fields(model=[]), EXPORT, INHERIT, WEIGHTS, LOSS)

for name, value in {
    'null': None,
    'a list': [],
    'a text': 'byte',
    'empty': {},
    'of unknown kind': {'kind': 'evil'},
    'of a kind that is a list': {'kind': ['byte']},
    'of a kind of escapes': {'kind': ESCAPES},
    'unknown of 10**15 tokens': {'kind': 'unknown', 'vocab_size': 10**15},
    'characters that are a number': {'kind': 'char', 'chars': 7, 'eot': None},
    'characters of half a surrogate pair': {'kind': 'char', 'chars': '\ud800\udfff', 'eot': None},
    'no characters': {'kind': 'char', 'chars': '', 'eot': None},
    'reserved -5': {'kind': 'byte', 'vocab_size': 257, 'reserved': -5},
    'reserved 10**9': {'kind': 'byte', 'vocab_size': 257, 'reserved': 10**9},
    'reserved a text': {'kind': 'byte', 'vocab_size': 257, 'reserved': 'x'},
    'files is a list': {'kind': 'byte', 'files': ['x']},
    'files is a text': {'kind': 'byte', 'files': 'x'},
    'file with a hash that is a number': {'kind': 'sentencepiece', 'files': {'state.json': 5}},
    'another hash': {'kind': 'byte', 'sha256': '0' * 64},
    'hash is a list': {'kind': 'byte', 'sha256': [1]},
}.items():
    state(f'tokenizer is {name}', fields(tokenizer=value))
SECRET_HASH = '0' * 64
for name in (
    '../../home/.ssh/id_ed25519',
    '../../outside/secret.txt',
    '/etc/passwd',
    '/dev/zero',
    '..',
    '.',
    '',
    'a\0b',
    'a\nb',
    'x' * 5000,
    ESCAPES,
    '\ud800',
    '~/.ssh/id_ed25519',
    'C:\\x',
    'sub/../../x',
):
    shown = ascii(name)[:40]
    state(
        f'tokenizer.files names {shown}',
        inside('tokenizer', files={name: SECRET_HASH}),
        SAMPLE,
        names=('state.json', 'run/'),
    )
    state(
        f'tokenizer.files names {shown} for surgery',
        inside('tokenizer', files={name: SECRET_HASH}),
        INHERIT,
        names=('state.json', 'run/'),
    )


def leads_out(target):
    """tokenizer.files of run's state.json names a file that is a link."""

    def write(path):
        edit(
            lambda value: (
                value | {'tokenizer': value['tokenizer'] | {'files': {'tokenizer.model': SECRET_HASH}}}
            )
        )(path)
        target(path.parent / 'tokenizer.model')

    return write


for name, target in {
    'a link to a secret': outside,
    'a named pipe': fifo,
    'a folder': folder,
    'a link to /dev/zero': link('/dev/zero'),
    'a link to nothing': link('nothing'),
}.items():
    for command in (SAMPLE, INHERIT, EXPORT):
        state(
            f'tokenizer.files names {name}, for {command[0]}',
            leads_out(target),
            command,
            names=('tokenizer.model', 'state.json'),
        )

for name, value in {
    'null': None,
    'a list': [],
    'a text': 'x',
    'with a list as data': {'dataset': ['x']},
    'with data outside': {'dataset': '../../outside'},
    'with data of NaN': {'dataset': {'data': float('nan')}},
    'with a number as data': {'dataset': 7},
    'with an objective that is a list': {'objective': []},
    'with a packing that is a number': {'packing': 3},
}.items():
    state(
        f'settings are {name}',
        fields(settings=value),
        LOSS,
        names=('state.json', 'dataset', 'settings', 'outside'),
    )
for name, value in {
    'null': None,
    'a text': '2',
    'negative': -1,
    'NaN': float('nan'),
    '2.5': 2.5,
    'a list': [2],
    '10**30': 10**30,
    'true': True,
}.items():
    state(f'step is {name}', fields(step=value), RESUME, own=('run',))
state('no step', without('step'), RESUME, own=('run',))
for name, value in {
    'null': None,
    'a text': 'x',
    'a number': 3,
    'outside': [10**9],
    'negative': [-1],
    'text in it': ['x'],
    'of 10**6 tokens': [1] * 10**6,
}.items():
    state(f'begin is {name}', fields(begin=value))
for name, value in {
    'a list': [],
    'a text': 'x',
    'a number': 3,
    'with a template that is a list': {'chat_template': []},
    'with ends that are a text': {'ends': 'x'},
    'with ends outside': {'ends': [10**9]},
    'with an unknown field': {'evil': 1},
    'with names that are a text': {'names': 'x'},
    'with before that is a text': {'before': 'x'},
}.items():
    state(f'prompt is {name}', fields(prompt=value))
for name, value in {
    'null': None,
    'a list': [],
    'empty': {},
    'without weights': {'from': 'run'},
    'itself': {'from': 'lora', 'weights': {}},
    'a number': {'from': 7, 'weights': {}},
    'outside': {'from': '/etc', 'weights': {}},
    'a folder of nothing': {'from': 'hf:/etc', 'weights': {}},
    'with NUL': {'from': 'a\0b', 'weights': {}},
    'with a list of weights': {'from': 'run', 'weights': []},
    'with other weights': {'from': 'run', 'weights': {'x': '0'}},
    'a name of 5,000 characters': {'from': 'x' * 5000, 'weights': {}},
}.items():
    state(
        f'base is {name}', fields(base=value), OF_LORA, path=LORA_STATE, names=('state.json', 'lora', 'run')
    )
for name, value in {
    'null': None,
    'a list': [],
    'empty': {},
    'of rank 10**9': {'rank': 10**9},
    'a text': 'x',
}.items():
    state(f'lora is {name}', fields(lora=value), OF_LORA, path=LORA_STATE, names=('state.json', 'lora'))

# -----------------------------------------------------------------------------
# manifest.json


def manifest(name, how, **more):
    def write(box):
        from cases import only_newest

        only_newest(Path(box, 'run'))
        path = Path(box, MANIFEST)
        path.write_bytes(how) if isinstance(how, bytes) else how(path)

    CASES.append(
        Case(f'{MANIFEST}: {name}', 'manifest.json', write, [SAMPLE], **{'names': ('manifest',)} | more)
    )


for base in documents(MANIFEST, 'manifest.json', SAMPLE, names=('manifest',)):

    def write(box, inner=base.write):
        from cases import only_newest

        only_newest(Path(box, 'run'))
        inner(box)

    base.write = write
    if 'byte-order mark' in base.name and 'only' not in base.name:
        base.expected = 'either'
    CASES.append(base)
for name, value in {'null': None, 'a list': ['state.json'], 'a text': 'x', 'empty': {}}.items():
    manifest(f'files are {name}', fields(files=value))
for name in (
    '../../outside/secret.txt',
    '/dev/zero',
    '/etc/passwd',
    'a\0b',
    '..',
    '',
    'x' * 5000,
    '\ud800',
    ESCAPES,
):
    manifest(
        f'files name {ascii(name)[:40]}',
        inside('files', **{name: {'size': 24, 'sha256': '0' * 64}}),
        names=('manifest', 'run'),
    )
for name, value in {
    'null': None,
    'a list': [],
    'a number': 3,
    'without a hash': {'size': 1},
    'of a negative size': {'size': -1, 'sha256': ''},
    'of NaN bytes': {'size': float('nan'), 'sha256': ''},
}.items():
    manifest(
        f'an entry is {name}', inside('files', **{'state.json': value}), names=('manifest', 'state.json')
    )
manifest(
    'of 100,000 files that are not there',
    inside('files', **{f'x{n}': {'size': 1, 'sha256': ''} for n in range(10**5)}),
    names=('manifest', 'x0'),
)
manifest(
    'a pipe among its files',
    lambda path: (fifo(path.parent / 'pipe'), inside('files', pipe={'size': 0, 'sha256': '0' * 64})(path)),
    names=('pipe', 'manifest'),
)
manifest(
    'a link to /dev/zero among its files',
    lambda path: (
        link('/dev/zero')(path.parent / 'zero'),
        inside('files', zero={'size': 0, 'sha256': '0' * 64})(path),
    ),
    names=('zero', 'manifest'),
)

# -----------------------------------------------------------------------------
# model.safetensors


def header(value, data=b''):
    """The bytes of a safetensors file with a header, a JSON value or bytes, and these numbers."""
    text = value if isinstance(value, bytes) else json.dumps(value).encode()
    return struct.pack('<Q', len(text)) + text + data


def tensors(change):
    """A function that changes {name: tensor} of a safetensors file."""

    def write(path):
        from safetensors.torch import load_file, save_file

        found = load_file(path)
        found = {name: t.clone() for name, t in found.items()}
        path.unlink()
        new = change(found)
        save_file({name: t.clone() for name, t in (found if new is None else new).items()}, path)

    return write


def of_header(change):
    """A function that changes the header of a safetensors file, and leaves its numbers."""

    def write(path):
        data = path.read_bytes()
        (size,) = struct.unpack('<Q', data[:8])
        value = json.loads(data[8 : 8 + size])
        path.write_bytes(header(change(value) or value, data[8 + size :]))

    return write


def first(value):
    return min(name for name in value if name != '__metadata__')


def entry(**changed):
    return of_header(lambda value: value | {first(value): value[first(value)] | changed})


F32 = {'dtype': 'F32', 'shape': [2], 'data_offsets': [0, 8]}
SAFETENSORS = {  # of any safetensors file
    'empty': b'',
    '7 bytes': b'\0' * 7,
    'a login page': PAGE,
    'a pickle that runs a program': payload(),
    'a header of 2**63 bytes': struct.pack('<Q', 2**63) + b'{}',
    'a header of 2**64 - 1 bytes': b'\xff' * 8 + b'{}',
    'a header longer than the file': struct.pack('<Q', 10**6) + b'{}',
    'a header of 0 bytes': bytes(8),
    'a header of 90 MB': header(b'{' + b' ' * 90_000_000 + b'}'),
    'a header of open brackets': header(b'[' * 100_000),
    'a header of open objects': header(b'{"a":' * 100_000),
    'a header that is a list': header([]),
    'a header that is null': header(None),
    'an empty header': header({}),
    'a header with NaN': header(b'{"a": NaN}'),
    'a header that is not UTF-8': header(b'{"\xff": 1}'),
    'a header with an unknown dtype': header({'a': F32 | {'dtype': 'F7'}}, bytes(8)),
    'offsets beyond the file': header(
        {'a': F32 | {'data_offsets': [0, 10**12], 'shape': [25 * 10**10]}}, bytes(8)
    ),
    'negative offsets': header({'a': F32 | {'data_offsets': [-8, 0]}}, bytes(8)),
    'offsets that run backwards': header({'a': F32 | {'data_offsets': [8, 0]}}, bytes(8)),
    'two tensors in the same bytes': header({'a': F32, 'b': F32}, bytes(8)),
    'a gap between tensors': header({'a': F32, 'b': F32 | {'data_offsets': [16, 24]}}, bytes(24)),
    'a shape of 2**64 numbers': header({'a': F32 | {'shape': [2**32, 2**32]}}, bytes(8)),
    'a negative shape': header({'a': F32 | {'shape': [-2]}}, bytes(8)),
    'a shape of 5,000 digits': header(
        b'{"a": {"dtype": "F32", "shape": [' + b'9' * 5000 + b'], "data_offsets": [0, 8]}}', bytes(8)
    ),
    'a shape of 100,000 dimensions': header(
        {'a': F32 | {'shape': [1] * 10**5, 'data_offsets': [0, 4]}}, bytes(4)
    ),
    'the same name twice': header(b'{"a": %b, "a": %b}' % (2 * (json.dumps(F32).encode(),)), bytes(8)),
    'a name of terminal escapes': header({ESCAPES: F32}, bytes(8)),
    'a name of 100,000 characters': header({'a' * 10**5: F32}, bytes(8)),
    'a name with NUL': header({'a\0b': F32}, bytes(8)),
    '100,000 tensors of nothing': header(
        {f't{n}': {'dtype': 'F32', 'shape': [0], 'data_offsets': [0, 0]} for n in range(10**5)}
    ),
    'half of it': lambda path: path.write_bytes(path.read_bytes()[:-100]),
    'bytes after it': lambda path: path.write_bytes(path.read_bytes() + bytes(8)),
    'metadata that is a list': of_header(lambda value: value | {'__metadata__': [1]}),
    'metadata of numbers': of_header(lambda value: value | {'__metadata__': {'a': 1}}),
    'numbers called int32': entry(dtype='I32'),
    'numbers called float64': entry(dtype='F64'),
    'a shape turned': of_header(
        lambda value: (
            value | {first(value): value[first(value)] | {'shape': value[first(value)]['shape'][::-1] + [1]}}
        )
    ),
    'a tensor too many': tensors(lambda found: found | {'evil': torch.zeros(2)}),
    'a tensor with a name of escapes too many': tensors(lambda found: found | {ESCAPES: torch.zeros(2)}),
    'a tensor too few': tensors(lambda found: {name: found[name] for name in found if name != min(found)}),
    'a tensor without numbers': tensors(lambda found: found | {min(found): torch.zeros(0)}),
    'a tensor of one number': tensors(lambda found: found | {min(found): torch.zeros(())}),
    'whole numbers': tensors(lambda found: {name: t.to(torch.int8) for name, t in found.items()}),
    'booleans': tensors(lambda found: {name: t.bool() for name, t in found.items()}),
    'complex numbers': tensors(lambda found: {name: t.to(torch.complex64) for name, t in found.items()}),
    'float8': tensors(lambda found: {name: t.to(torch.float8_e4m3fn) for name, t in found.items()}),
    'NaN': tensors(lambda found: {name: t * float('nan') for name, t in found.items()}),
    'infinite numbers': tensors(lambda found: {name: t + float('inf') for name, t in found.items()}),
    'a named pipe': fifo,
    'a folder': folder,
    'a link to /dev/zero': link('/dev/zero'),
    'a link to nothing': link('nothing'),
    "a link to a user's file": outside,
    '4 GB of nothing': hole,
}


def weights(path, format, *commands, accepted=(), **more):
    """Cases of every document in the place of a safetensors file. names: what a refusal may name instead."""
    return [
        case(
            name, format, path, how, *commands, expected='accepted' if name in accepted else 'refused', **more
        )
        for name, how in SAFETENSORS.items()
    ]


# the wrong kind of numbers is named as the network's, not as the file's
CASES += weights(
    WEIGHTS_FILE,
    'model.safetensors (checkpoint)',
    SAMPLE,
    sealed=True,
    names=('safetensors', STEP, 'weights'),
)
CASES.append(
    case(
        'NaN, for surgery',
        'model.safetensors (checkpoint)',
        WEIGHTS_FILE,
        SAFETENSORS['NaN'],
        INHERIT,
        sealed=True,
        names=('safetensors', 'run', 'out/new'),
    )
)

# -----------------------------------------------------------------------------
# optimizer.pt


def zipped(data, **more):
    """A file of torch.save() whose pickle is `data`; more: further records."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, 'w') as f:
        for name, value in {'data.pkl': data, 'byteorder': b'little', **more, 'version': b'3\n'}.items():
            f.writestr(f'archive/{name}', value)
    return buffer.getvalue()


def saved(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def moments(change):
    """A function that changes what optimizer.pt holds."""

    def write(path):
        value = torch.load(path, weights_only=True)
        new = change(value)
        path.write_bytes(saved(value if new is None else new))

    return write


def of_first(change):
    def apply(value):
        key = min(value['state'])
        value['state'][key] = change(value['state'][key])

    return moments(apply)


def circle():
    value = {}
    value['state'] = value
    return value


def rebuilt(size, stride, offset=0):
    """The bytes of a tensor whose pickle lies about its place in a storage of 4 numbers."""
    data = saved(torch.zeros(4))
    with zipfile.ZipFile(io.BytesIO(data)) as f:
        names = {name: f.read(name) for name in f.namelist()}
    key = next(name for name in names if name.endswith('data.pkl'))

    class Lies:
        def __reduce__(self):
            import torch._utils

            return torch._utils._rebuild_tensor_v2, (Storage(), offset, size, stride, False, {})

    class Storage:
        pass

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            if isinstance(value, Storage):
                return 'storage', torch.FloatStorage, '0', 'cpu', 4
            return None

    buffer = io.BytesIO()
    Pickler(buffer, 2).dump(
        {'state': {0: {'exp_avg': Lies()}}, 'param_groups': [{'param_names': ['wte.weight']}]}
    )
    out = io.BytesIO()
    with zipfile.ZipFile(out, 'w') as f:
        for name, value in names.items():
            f.writestr(name, buffer.getvalue() if name == key else value)
    return out.getvalue()


class Opens:
    def __reduce__(self):
        return open, ('executed', 'w')


class Evaluates:
    def __reduce__(self):
        return eval, ("open('executed', 'w')",)


OPTIMIZERS = {
    'empty': b'',
    'a login page': PAGE,
    'a pickle that runs a program': payload(),
    'a zip whose pickle runs a program': zipped(payload()),
    'saved by torch, and runs a program': lambda path: path.write_bytes(saved({'state': Runs()})),
    'a pickle that opens a file': zipped(pickle.dumps(Opens(), 2)),
    'a pickle that evaluates': zipped(pickle.dumps(Evaluates(), 2)),
    'a pickle of 11 bytes that asks for 4 GB': b'\x80\x04\x8e' + struct.pack('<Q', 2**32),
    'a zip whose pickle asks for 4 GB': zipped(b'\x80\x04\x8e' + struct.pack('<Q', 2**32) + b'.'),
    'a zip whose pickle asks for a long number': zipped(
        b'\x80\x02\x8b' + struct.pack('<i', 2**31 - 1) + b'.'
    ),
    'a zip without a pickle': zipped(b''),
    'half a zip': zipped(pickle.dumps({}, 2))[:60],
    'a zip of nothing': b'PK\x05\x06' + bytes(18),
    'a pickle of 100,000 open lists': zipped(b'\x80\x02' + b'](' * 100_000 + b'.'),
    'text': b'state',
    'a list': lambda path: path.write_bytes(saved([])),
    'a number': lambda path: path.write_bytes(saved(3)),
    'nothing': lambda path: path.write_bytes(saved(None)),
    'a tensor': lambda path: path.write_bytes(saved(torch.zeros(3))),
    'it contains itself': lambda path: path.write_bytes(saved(circle())),
    'strides beyond its numbers': rebuilt((10**6,), (1,)),
    'negative strides': rebuilt((4,), (-1,)),
    'an offset beyond its numbers': rebuilt((4,), (1,), 10**9),
    'a size of 2**62': rebuilt((2**62,), (1,)),
    '10**12 numbers in one': rebuilt((10**12,), (0,)),
    'state is a list': moments(lambda value: value | {'state': []}),
    'no state': moments(lambda value: {'param_groups': value['param_groups']}),
    'groups are a number': moments(lambda value: value | {'param_groups': 5}),
    'groups of texts': moments(lambda value: value | {'param_groups': ['x']}),
    'names that are numbers': moments(lambda value: value | {'param_groups': [{'param_names': [1, 2]}]}),
    'names are a number': moments(lambda value: value | {'param_groups': [{'param_names': 3}]}),
    'other names': moments(lambda value: value | {'param_groups': [{'param_names': ['evil']}]}),
    'a moment is a text': of_first(lambda own: dict.fromkeys(own, 'x')),
    'a moment is a list': of_first(lambda own: [1]),
    'a moment is a number': of_first(lambda own: dict.fromkeys(own, 3)),
    'a moment of another shape': of_first(lambda own: {key: torch.zeros(7, 3) for key in own}),
    'a sparse moment': of_first(
        lambda own: {key: t.to_sparse() if t.dim() > 1 else t for key, t in own.items()}
    ),
    'a moment without numbers': of_first(
        lambda own: {key: torch.empty(t.shape, device='meta') for key, t in own.items()}
    ),
    'moments of whole numbers': of_first(lambda own: {key: t.long() for key, t in own.items()}),
    'moments of NaN': of_first(lambda own: {key: t * float('nan') for key, t in own.items()}),
    'a moment that is expanded': of_first(
        lambda own: {key: torch.zeros(1).expand(t.shape) if t.dim() else t for key, t in own.items()}
    ),
    'an unknown moment': of_first(lambda own: own | {'evil': torch.zeros(3)}),
    'a named pipe': fifo,
    'a folder': folder,
    'a link to /dev/zero': link('/dev/zero'),
    '4 GB of nothing': hole,
    'a link to nothing': link('nothing'),
}
for name, how in OPTIMIZERS.items():
    fine = name in ('a moment that is expanded', 'moments of whole numbers')
    CASES.append(
        case(
            name,
            'optimizer.pt',
            OPTIMIZER,
            how,
            RESUME,
            sealed=True,
            own=('run',),
            names=('optimizer', STEP, 'finite'),
            expected='either' if fine else 'refused',
        )
    )

# -----------------------------------------------------------------------------
# tokenizer.model in a checkpoint, with a state.json that agrees; cases_foreign.py has more

for name, how in {
    'empty': b'',
    'a login page': PAGE,
    'a pickle': payload(),
    'NUL bytes': bytes(1000),
    'a pipe': fifo,
    'a folder': folder,
    'a link to /dev/zero': link('/dev/zero'),
    'a link to a secret': outside,
    '4 GB of nothing': hole,
}.items():

    def write(box, how=how):
        import hashlib

        from cases import only_newest, put

        only_newest(Path(box, 'run_bpe'))
        path = Path(box, BPE_MODEL)
        put(path, how)
        if path.is_file() and not path.is_symlink() and path.stat().st_size < 10**6:
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            inside('tokenizer', files={'tokenizer.model': digest})(Path(box, BPE_STATE))
            seal(path.parent)

    for command in (OF_BPE, ('surgery.py', 'inherit', '--from=run_bpe', '--out_dir=out/new', '--layers=0')):
        CASES.append(
            Case(
                f'{BPE_MODEL}: {name}, for {command[0]}',
                'tokenizer.model',
                write,
                [command],
                'either' if 'surgery.py' in command else 'refused',
                names=('tokenizer.model',),
            )
        )

# -----------------------------------------------------------------------------
# best, log.jsonl, settings.json, lock and the names of a run

OWN = dict(own=('run',))
LAST = (*SAMPLE, '--which=best')
for name, value in {
    'names nothing': {'checkpoint': 'step_00000099', 'val_loss': 1.0},
    'names a folder outside': {'checkpoint': '../outside', 'val_loss': 1.0},
    'names another run': {'checkpoint': '../run_bpe/step_00000002', 'val_loss': 1.0},
    'names the run': {'checkpoint': '.', 'val_loss': 1.0},
    'names /': {'checkpoint': '/', 'val_loss': 1.0},
    'names NUL': {'checkpoint': 'a\0b', 'val_loss': 1.0},
    'names a list': {'checkpoint': [], 'val_loss': 1.0},
    'names nothing at all': {'checkpoint': '', 'val_loss': 1.0},
    'names escapes': {'checkpoint': ESCAPES, 'val_loss': 1.0},
    'names 5,000 characters': {'checkpoint': 'x' * 5000, 'val_loss': 1.0},
    'has a loss of text': {'checkpoint': 'step_00000001', 'val_loss': 'low'},
    'has no loss': {'checkpoint': 'step_00000001'},
    'has a loss of null': {'checkpoint': 'step_00000001', 'val_loss': None},
    'has a loss of NaN': {'checkpoint': 'step_00000001', 'val_loss': float('nan')},
    'has a loss of -infinity': {'checkpoint': 'step_00000001', 'val_loss': float('-inf')},
    'has a loss of 400 digits': {'checkpoint': 'step_00000001', 'val_loss': 10**400},
}.items():
    for command in (LAST, RESUME):
        CASES.append(
            case(
                f'{name}, for {command[0]}',
                'best',
                'run/best',
                json.dumps(value).encode(),
                command,
                expected='accepted',
                **OWN,
            )
        )
for base in documents('run/best', 'best', LAST, RESUME, **OWN):
    is_odd = any(name in base.name for name in ('pipe', 'folder', 'socket', 'link'))
    base.expected = 'either' if is_odd else 'accepted'  # it is found again in the log
    CASES.append(base)

GOOD = '{"step": 0, "tokens": 0, "flops": 0, "val_loss": 5.5, "seconds": 1.0}\n'
LOGS = {
    'step is a text': '{"step": "2", "val_loss": 1.0}',
    'step is null': '{"step": null, "val_loss": 1.0}',
    'step is a list': '{"step": [], "val_loss": 1}',
    'step is NaN': '{"step": NaN, "val_loss": 1.0}',
    'step is negative': '{"step": -5, "val_loss": 1.0}',
    'step is 1e999': '{"step": 1e999, "val_loss": 1}',
    'step has 5,000 digits': '{"step": ' + '9' * 5000 + ', "val_loss": 1}',
    'step has 400 digits': '{"step": ' + '9' * 400 + ', "val_loss": 1}',
    'step is true': '{"step": true, "val_loss": 1}',
    'step is 1.5': '{"step": 1.5, "val_loss": 1}',
    'loss is a text': '{"step": 1, "val_loss": "low"}',
    'loss is null': '{"step": 1, "val_loss": null}',
    'loss is NaN': '{"step": 1, "val_loss": NaN}',
    'loss is a list': '{"step": 1, "val_loss": [1]}',
    'loss has 400 digits': '{"step": 1, "val_loss": ' + '9' * 400 + '}',
    'seconds are a text': '{"step": 1, "val_loss": 1.0, "seconds": "x"}',
    'seconds are null': '{"step": 1, "val_loss": 1.0, "seconds": null}',
    'seconds are a list': '{"step": 1, "seconds": []}',
    'tokens are a text': '{"step": 1, "val_loss": 1.0, "tokens": "x"}',
    'flops are a list': '{"step": 1, "val_loss": 1.0, "flops": []}',
    'a list': '[1, 2]',
    'a number': '5',
    'null': 'null',
    'not JSON': 'evil',
    'a login page': PAGE.decode(),
    'open brackets': '[' * 100_000,
    'terminal escapes': json.dumps({'step': 1, ESCAPES: ESCAPES}),
    'NUL bytes': '\0' * 1000,
    '20 MB in a line': '{"step": 1, "x": "' + 'x' * 20_000_000 + '"}',
    '100,000 empty lines': '\n' * 100_000,
    'a step twice': GOOD + GOOD.strip(),
    'steps backwards': '{"step": 2, "val_loss": 1.0}\n{"step": 1, "val_loss": 2.0}',
    'a byte-order mark': '\ufeff{"step": 1, "val_loss": 1.0}',
    'half a surrogate pair': '{"step": 1, "val_loss": 1, "x": "\\ud800"}',
    'no number of steps': '{"val_loss": 1.0}',
}
for name, text in LOGS.items():
    for command in (COMPARE, RESUME):
        CASES.append(
            case(
                f'{name}, for {command[0]}',
                'log.jsonl',
                'run/log.jsonl',
                (GOOD + text + '\n').encode(),
                command,
                expected='accepted',
                **OWN,
            )
        )
for name, how in {'empty': b'', 'not UTF-8': b'\xff\xfe' * 100, 'a pickle': payload()}.items():
    CASES.append(case(name, 'log.jsonl', 'run/log.jsonl', how, COMPARE, RESUME, expected='accepted', **OWN))
for name, how in {
    'a named pipe': fifo,
    'a folder': folder,
    'a link to /dev/zero': link('/dev/zero'),
    '4 GB of nothing': hole,
}.items():
    CASES.append(case(name, 'log.jsonl', 'run/log.jsonl', how, COMPARE, RESUME, **OWN))

# a run can go on whatever its settings.json says, as the checkpoint has the settings; a comparison cannot
CASES += documents('run/settings.json', 'settings.json', COMPARE, names=('settings.json', 'run'), **OWN)
for key, values in {
    'n_layer': (10**7, 10**12, -1, 'x', None, [2]),
    'n_embd': (10**9, 2**62, 0),
    'vocab_size': (10**12, -5, 'x'),
    'lora_rank': (10**9, -1, 'x'),
    'grow_to': (10**7,),
    'dataset': ([], {'x': 'y'}, 7, '../outside', 'a\0b'),
    'out_dir': (7, '../outside', ESCAPES),
    'seed': ('x', None, 2**70),
    'max_iters': ('x', -1, 10**30),
    'ranks': ([], {'(a+)+$': 1}),
    'arch': ('evil', []),
    'target_val_loss': (float('nan'), 'x'),
}.items():
    for value in values:
        # a value that is of no use is as good as none: older runs have other settings
        CASES.append(
            case(
                f'{key} = {ascii(value)[:40]}',
                'settings.json',
                'run/settings.json',
                fields(**{key: value}),
                COMPARE,
                expected='either',
                names=('settings.json', 'run', key),
                **OWN,
            )
        )

for name, how in {
    'a named pipe': fifo,
    'a folder': folder,
    'a link to /dev/zero': link('/dev/zero'),
    'a link to itself': link('lock'),
}.items():
    CASES.append(case(name, 'lock', 'run/lock', how, RESUME, expected='either', names=('lock', 'run'), **OWN))
CASES.append(
    case(
        'a link to a secret',
        'lock',
        'run/lock',
        outside,
        RESUME,
        expected='either',
        names=('lock', 'run'),
        **OWN,
    )
)
for name, how in {'left by a crash': b'', 'a login page': PAGE, 'NUL bytes': bytes(10**6)}.items():
    CASES.append(case(name, 'lock', 'run/lock', how, RESUME, expected='accepted', **OWN))


def beside(name, act, command=RESUME, expected='accepted', **more):
    """Something in the folder of a run beside its checkpoints."""
    CASES.append(
        Case(
            f'run/: {name}',
            'names in a run',
            lambda box: act(Path(box, 'run')),
            [command],
            expected,
            **OWN | {'names': ('step_', 'run')} | more,
        )
    )


beside('a checkpoint that is a text', lambda run: (run / 'step_00000003').write_text('x'))
beside('a checkpoint that is a pipe', lambda run: os.mkfifo(run / 'step_00000003'))
beside(
    'a checkpoint that is a link to itself', lambda run: (run / 'step_00000003').symlink_to('step_00000003')
)
beside(
    'a checkpoint that is a link to a folder outside',
    lambda run: (run / 'step_00000003').symlink_to('../outside'),
)
beside('a checkpoint that is empty', lambda run: (run / 'step_00000003').mkdir())
beside('a checkpoint of 20 digits', lambda run: (run / ('step_' + '9' * 20)).mkdir())
beside('a checkpoint of 200 digits', lambda run: (run / ('step_' + '9' * 200)).mkdir())
beside('a checkpoint in Arabic digits', lambda run: (run / 'step_٠٠٠٠٠٠٠٣').mkdir())
beside('a checkpoint in capitals', lambda run: (run / 'STEP_00000003').mkdir())
beside('a name with a newline', lambda run: (run / 'step_00000003\n').mkdir())
beside('a name of escapes', lambda run: (run / f'step_00000003{ESCAPES}').mkdir())
beside('a name that is not UTF-8', lambda run: os.mkdir(os.fsencode(run) + b'/step_\xff'))
beside(
    'an unfinished checkpoint that is a link to a folder outside',
    lambda run: (run / 'step_00000003.tmp').symlink_to('../outside'),
)
beside('an unfinished checkpoint that is a file', lambda run: (run / 'step_00000003.tmp').write_text('x'))
beside(
    'a damaged checkpoint that is a link to a folder outside',
    lambda run: (run / 'step_00000003.damaged').symlink_to('../outside'),
)
beside('5,000 empty checkpoints', lambda run: [(run / f'step_{n:08d}').mkdir() for n in range(10, 5010)])
beside(
    'settings.json.tmp is a link to a secret',
    lambda run: (run / 'settings.json.tmp').symlink_to('../outside/secret.txt'),
)
beside(
    'log.jsonl.tmp is a link to a secret',
    lambda run: (run / 'log.jsonl.tmp').symlink_to('../outside/secret.txt'),
)
beside('best.tmp is a pipe', lambda run: os.mkfifo(run / 'best.tmp'))
beside(
    'the checkpoint is a link to that of another run',
    lambda run: (
        clear(run / 'step_00000002'),
        (run / 'step_00000002').symlink_to('../run_bpe/step_00000002'),
    ),
    SAMPLE,
)
for name in ('state.json', 'model.safetensors', 'manifest.json', 'optimizer.pt'):
    beside(f'the newest checkpoint has no {name}', lambda run, name=name: (newest(run) / name).unlink())
    beside(
        f'the newest checkpoint has no {name}, for sample.py',
        lambda run, name=name: (newest(run) / name).unlink(),
        SAMPLE,
    )
