"""
The honest folders that hostile files are put into: one of every format that minnow reads, all tiny, made by
minnow's own scripts where they write it. make(folder, call): call(*args) runs a script in the folder.
"""

import json
import os
import pickle
import shutil
import struct
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

LINES = [
    f'The {n} small cats sat on mat {n * 7 % 13}, and the old dog saw {n * 5 % 11} of them.'
    for n in range(40)
]
TINY = (
    '--n_layer=2',
    '--n_head=2',
    '--n_embd=32',
    '--block_size=32',
    '--batch_size=2',
    '--device=cpu',
    '--dtype=float32',
    '--max_iters=2',
    '--log_interval=1',
    '--eval_interval=1',
    '--eval_iters=1',
    '--sample_tokens=0',
    '--warmup_iters=0',
)
LLAMA = ('--mlp=swiglu', '--qk_norm=False')


def make(folder, call):
    """Write all honest folders. Raises what `call` raises where minnow refuses its own."""
    folder = Path(folder)
    texts(folder / 'text')
    tasks(folder / 'tasks')
    call('prepare.py', 'text/a.txt', '--tokenizer=byte', '--out=data', '--val_fraction=0.2')
    call('prepare.py', 'text/a.txt', '--tokenizer=bpe:290', '--out=data_bpe', '--val_fraction=0.2')
    call(
        'prepare.py',
        'text/chats.jsonl',
        '--messages',
        '--tokenizer=byte',
        '--out=data_chat',
        '--val_fraction=0.2',
    )
    call(
        'prepare.py',
        'text/pairs.jsonl',
        '--source=source',
        '--target=target',
        '--tokenizer=byte',
        '--out=data_pairs',
        '--val_fraction=0.2',
    )
    for run, data in (('run', 'data'), ('run_bpe', 'data_bpe')):
        call('train.py', f'--dataset={data}', f'--out_dir={run}', *TINY, *LLAMA)
    call('train.py', '--dataset=data', '--init_from=run', '--out_dir=lora', '--lora_rank=2', *TINY[4:])
    call('hub.py', 'export', '--out_dir=run', '--to=hf')
    call('hub.py', 'export', '--out_dir=run_bpe', '--to=hf_bpe')
    call('hub.py', 'export', '--out_dir=lora', '--to=peft')
    shards(folder / 'hf', folder / 'hf_shards')
    beside_sentencepiece(folder / 'hf_bpe', folder / 'data_bpe', folder / 'hf_sp')
    nanogpt(folder / 'nano')
    llama2c(folder / 'llama2c')
    bert(folder / 'bert')
    adapted = ('--n_layer=1', '--n_encoder_layer=1', '--objective=seq2seq')
    call('train.py', '--dataset=data_pairs', '--out_dir=t5', *TINY[1:], *adapted)


# -----------------------------------------------------------------------------


def write_lines(path, rows):
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))


def texts(folder):
    """Corpora: .txt, .jsonl of texts, pairs and conversations."""
    folder.mkdir(parents=True)
    (folder / 'a.txt').write_text('\n<|endoftext|>\n'.join(LINES * 4))
    write_lines(folder / 'rows.jsonl', [{'text': line} for line in LINES])
    write_lines(folder / 'pairs.jsonl', [{'source': line[:15], 'target': line[15:]} for line in LINES])
    write_lines(
        folder / 'chats.jsonl',
        [
            {
                'messages': [
                    {'role': 'user', 'content': line[:15]},
                    {'role': 'assistant', 'content': line[15:]},
                ]
            }
            for line in LINES
        ],
    )
    (folder / 'prompt.txt').write_text('The 3 small cats')


def tasks(folder):
    """Task files: a shape of each kind, and the samples that harnesses log."""
    folder.mkdir(parents=True)
    write_lines(
        folder / 'choices.jsonl',
        [{'query': f'{n} + 1 is', 'choices': [str(n + 1), 'no'], 'gold': 0} for n in range(3)],
    )
    write_lines(folder / 'lambada.jsonl', [{'context': 'the cat sat on', 'continuation': 'mat'}] * 3)
    write_lines(folder / 'blimp.jsonl', [{'sentence_good': 'a cat sits', 'sentence_bad': 'a cat sit'}] * 3)


def shards(whole, folder):
    """A Hugging Face folder in two files and an index."""
    shutil.copytree(whole, folder)
    tensors = load_file(folder / 'model.safetensors')
    (folder / 'model.safetensors').unlink()
    names, weight_map = sorted(tensors), {}
    for n in range(2):
        file = f'model-{n + 1:05d}-of-00002.safetensors'
        part = {name: tensors[name].contiguous() for name in names[n::2]}
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {'metadata': {}, 'weight_map': weight_map}
    (folder / 'model.safetensors.index.json').write_text(json.dumps(index))


def beside_sentencepiece(whole, data, folder):
    """A Hugging Face folder with tokenizer.model and the files that transformers writes beside it."""
    shutil.copytree(whole, folder)
    (folder / 'tokenizer.json').unlink()
    shutil.copy(data / 'tokenizer.model', folder)
    eot = '<|endoftext|>'
    for name, value in (
        ('tokenizer_config.json', {'eos_token': eot, 'added_tokens_decoder': {}}),
        ('special_tokens_map.json', {'eos_token': eot}),
        ('added_tokens.json', {}),
        ('generation_config.json', {'eos_token_id': 1}),
    ):
        (folder / name).write_text(json.dumps(value))


def nanogpt(folder):
    """nanoGPT's data: uint16 tokens and a meta.pkl of characters."""
    folder.mkdir()
    text = '\n'.join(LINES * 4)
    chars = sorted(set(text))
    ids = np.array([chars.index(c) for c in text], np.uint16)
    ids.tofile(folder / 'train.bin')
    ids[:2000].tofile(folder / 'val.bin')
    itos = dict(enumerate(chars))
    (folder / 'meta.pkl').write_bytes(
        pickle.dumps({'vocab_size': len(chars), 'itos': itos, 'stoi': {c: i for i, c in itos.items()}})
    )


def llama2c(folder):
    """llama2.c's model.bin and tokenizer.bin."""
    folder.mkdir()
    dim, hidden, layers, heads, vocab, context = 16, 24, 1, 2, 300, 32
    sizes = (dim, hidden, layers, heads, heads, vocab, context)
    count = (
        vocab * dim
        + layers * (2 * dim + 4 * dim * dim + 3 * dim * hidden)
        + dim
        + 2 * context * dim // heads // 2
    )
    torch.manual_seed(0)
    numbers = 0.1 * torch.randn(count)
    (folder / 'model.bin').write_bytes(struct.pack('<7i', *sizes) + numbers.numpy().tobytes())
    (folder / 'tokenizer.bin').write_bytes(tokenizer_bin())


def tokenizer_bin(pieces=None):
    """The bytes of llama2.c's tokenizer.bin: (score, piece) of all 300 tokens unless `pieces` are given."""
    if pieces is None:
        pieces = [(0.0, b'<unk>'), (0.0, b'\n<s>\n'), (0.0, b'\n</s>\n')]
        pieces += [(0.0, b'<0x%02X>' % byte) for byte in range(256)]
        pieces += [(-float(n), bytes([ord(' ') + n])) for n in range(41)]
    data = struct.pack('<i', 10)
    for score, piece in pieces:
        data += struct.pack('<fi', score, len(piece)) + piece
    return data


def bert(folder):
    """A vocab.txt of BERT, a vocab.json and a merges.txt of GPT-2."""
    folder.mkdir()
    words = sorted({word.strip(',.') for line in LINES for word in line.lower().split()})
    letters = [chr(n) for n in range(ord('a'), ord('z') + 1)]
    vocab = [
        '[PAD]',
        '[UNK]',
        '[CLS]',
        '[SEP]',
        '[MASK]',
        ',',
        '.',
        *letters,
        *('##' + c for c in letters),
        *words,
    ]
    (folder / 'vocab.txt').write_text('\n'.join(dict.fromkeys(vocab)) + '\n')
    (folder / 'vocab.json').write_text(json.dumps({piece: n for n, piece in enumerate(letters)}))
    (folder / 'merges.txt').write_text('#version: 0.2\na b\n')


def seal(folder):
    """Let the manifest of a checkpoint agree with its files: sizes and hashes of all, whatever they hold."""
    import hashlib

    folder = Path(folder)
    files = {}
    for path in sorted(folder.iterdir()):
        if path.name != 'manifest.json' and path.is_file():
            data = path.read_bytes()
            files[path.name] = {'size': len(data), 'sha256': hashlib.sha256(data).hexdigest()}
    manifest = json.loads((folder / 'manifest.json').read_text())
    manifest['files'] = files
    (folder / 'manifest.json').write_text(json.dumps(manifest))


def newest(run):
    """The newest checkpoint of a run."""
    return Path(run, max(name for name in os.listdir(run) if name.startswith('step_')))
