"""
Read the model.bin of llama2.c, as stories260K.bin: its first format, float32 without a magic number.

    int32 dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, seq_len, then the tensors in float32
    vocab_size < 0: the head is a matrix of its own, at the end

A folder with one such file and no config.json is a Llama. Its tokenizer is tokenizer.bin or tok512.bin.
"""
import os
import struct

import torch

from checkpoint import open_regular
from configurator import UserError

HEADER = 7  # int32
MAGIC = b'24ka'  # of the later formats
BEGIN, END = 1, 2  # <s>, </s>; the stories were trained with <s> between them, so both end a text


def model_file(folder):
    """The path of the model.bin in a folder without config.json; '' if there is none. Raises UserError."""
    if os.path.exists(os.path.join(folder, 'config.json')) or not os.path.isdir(folder):
        return ''
    paths = [os.path.join(folder, name) for name in sorted(os.listdir(folder)) if name.endswith('.bin')]
    found = [path for path in paths if is_model(path)]
    if len(found) > 1:
        raise UserError(f'{folder}: {len(found)} networks of llama2.c in it: give each a folder of its own')
    return found[0] if found else ''


def is_model(path):
    """Whether a file is a model.bin, by its header and its size. Raises UserError for a later format."""
    with open_regular(path) as f:
        start = f.read(4 * HEADER)
    if start.startswith(MAGIC):
        raise UserError(f'{path}: a later format of llama2.c: write it with its export.py --version 0')
    if len(start) < 4 * HEADER:
        return False
    sizes = header(start)
    is_valid = all(0 < size < 2 ** 31 for size in sizes[:5]) and sizes[5] != 0 and sizes[6] > 0
    if not is_valid or sizes[0] % (2 * sizes[3]) or sizes[3] % sizes[4]:
        return False
    count = sum(rows * width for _, rows, width in layout(sizes))
    return os.path.getsize(path) == 4 * (HEADER + count)


def header(start):
    return struct.unpack(f'<{HEADER}i', start)


def read_header(path):
    with open_regular(path) as f:
        return header(f.read(4 * HEADER))


def layout(sizes):
    """[(name, rows, width), …] of a file, in its order; N stands for all layers, one after the other."""
    dim, hidden, layers, heads, kv_heads, vocab, context = sizes
    kv_width = dim // heads * kv_heads
    return [
        ('embed_tokens', abs(vocab), dim),
        ('layers.N.input_layernorm', layers, dim),
        ('layers.N.self_attn.q_proj', layers * dim, dim),
        ('layers.N.self_attn.k_proj', layers * kv_width, dim),
        ('layers.N.self_attn.v_proj', layers * kv_width, dim),
        ('layers.N.self_attn.o_proj', layers * dim, dim),
        ('layers.N.post_attention_layernorm', layers, dim),
        ('layers.N.mlp.gate_proj', layers * hidden, dim),
        ('layers.N.mlp.down_proj', layers * dim, hidden),
        ('layers.N.mlp.up_proj', layers * hidden, dim),
        ('norm', 1, dim),
        ('', context, dim // heads),  # the angles of the positions
        ('lm_head', -vocab if vocab < 0 else 0, dim),
    ]


def config_fields(path):
    """The fields of a config.json for a model.bin."""
    dim, hidden, layers, heads, kv_heads, vocab, context = read_header(path)
    return {
        'model_type': 'llama',
        'hidden_size': dim,
        'intermediate_size': hidden,
        'num_hidden_layers': layers,
        'num_attention_heads': heads,
        'num_key_value_heads': kv_heads,
        'vocab_size': abs(vocab),
        'max_position_embeddings': context,
        'rms_norm_eps': 1e-5,
        'tie_word_embeddings': vocab > 0,
        'bos_token_id': BEGIN,
        'eos_token_id': [BEGIN, END],
    }


class Slice:
    """A tensor with the methods of safetensors' slices."""

    def __init__(self, tensor, heads=0):
        self.tensor, self.heads = tensor, heads

    def get_shape(self):
        return list(self.tensor.shape)

    def get_dtype(self):
        return 'F32'

    def __getitem__(self, rows):
        if not self.heads:
            return self.tensor[rows].clone()
        # llama2.c turns neighbours by an angle, we turn the two halves of a head
        pairs = self.tensor.unflatten(0, (self.heads, -1, 2))  # (H, D/2, 2, C)
        return pairs.transpose(1, 2).flatten(0, 2)[rows]


def read_slices(path):
    """{transformers' name of a tensor, without its prefix: Slice} of a model.bin."""
    sizes = read_header(path)
    layers, heads, kv_heads = sizes[2:5]
    numbers = torch.from_file(path, size=os.path.getsize(path) // 4, dtype=torch.float32)
    turned = {'q_proj': heads, 'k_proj': kv_heads}
    slices, at = {}, HEADER
    for name, rows, width in layout(sizes):
        block = numbers[at:at + rows * width].view(rows, width)
        at += rows * width
        if '.N.' in name:
            for n, part in enumerate(block.chunk(layers)):
                part = part[0] if name.endswith('layernorm') else part
                of_layer = f'{name}.weight'.replace('.N.', f'.{n}.')
                slices[of_layer] = Slice(part, turned.get(name.rpartition('.')[2], 0))
        elif name and rows:
            slices[f'{name}.weight'] = Slice(block[0] if name == 'norm' else block)
    return slices
