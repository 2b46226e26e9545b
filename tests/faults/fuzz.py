"""
Input nobody thought of: settings, token files, folders of Hugging Face's and PEFT's kind, lines of JSON, each
a good one with a few random edits. Whatever comes of it is right or is a UserError of one line: never another
exception, never a hang, and never a wrong success.

    python tests/faults/fuzz.py 100000              # cases of each kind; or with names: 100000 settings lines
"""
import copy
import dataclasses
import json
import math
import os
import shutil
import signal
import sys
import tempfile
import time
from functools import cache
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from conftest import write_dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from batches import Mixture, read_meta
from configurator import UserError, configure
from features import build
from features.hf import reading
from features.lora import peft_files
from features.lora.layers import begin
from features.stored import from_dict
from features.text import reader
from features.text.settings import TextConfig
from model import make_model
from tokenizer import load_tokenizer
from train import Settings

# -----------------------------------------------------------------------------
# Edits

JUNK = st.recursive(st.none() | st.booleans() | st.integers(-10, 10) | st.integers() | st.floats()
                    | st.text(max_size=12), lambda inner: st.lists(inner, max_size=3)
                    | st.dictionaries(st.text(max_size=8), inner, max_size=3), max_leaves=4)
BYTES = st.lists(st.tuples(st.sampled_from(['flip', 'set', 'cut', 'insert', 'remove']),
                           st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=8)),
                 min_size=1, max_size=4)
GRAFTS = st.lists(st.tuples(st.integers(0, 10 ** 6), st.sampled_from(['set', 'remove', 'add']), JUNK),
                  min_size=1, max_size=3)


def edit_bytes(data, edits):
    data = bytearray(data)
    for how, where, new in edits:
        at = int(where * len(data))
        if how == 'flip' and data:
            data[at] ^= 1 << new[0] % 8
        elif how == 'set':
            data[at:at + len(new)] = new
        elif how == 'cut':
            del data[at:]
        elif how == 'insert':
            data[at:at] = new
        elif how == 'remove':
            del data[at:at + len(new)]
    return bytes(data)


def edit_json(tree, grafts):
    """Values of a nest of dicts and lists replaced, removed or added."""
    tree = copy.deepcopy(tree)
    for n, how, value in grafts:
        places = []

        def visit(node):
            for key in node if isinstance(node, dict) else range(len(node)):
                places.append((node, key))
                if isinstance(node[key], (dict, list)):
                    visit(node[key])
        visit(tree)
        if places:
            node, key = places[n % len(places)]
            if how == 'remove':
                del node[key]
            elif how == 'add' and isinstance(node, dict):
                node[key + '_'] = value
            else:
                node[key] = value
    return tree


def right_or_refused(act):
    """What act() returns, or None if it refused in one line."""
    try:
        return act()
    except UserError as error:
        assert str(error).strip()
        return None


def same(a, b):
    return a == b or isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b)


# -----------------------------------------------------------------------------
# Settings

NAMES = [f.name for f in dataclasses.fields(Settings)]
GOOD = st.sampled_from(['1', '2', '8', '0.5', 'True', 'False', 'None', 'rope', 'muon', 'auto', "{'a': 1}",
                        '[1, 2]', '1e3', '-1', ''])
ARGS = st.lists(st.builds('--{}={}'.format, st.sampled_from(NAMES) | st.text(max_size=10),
                          GOOD | JUNK.map(repr) | st.text(max_size=20)) | st.text(max_size=12), max_size=6)


def settings_case(args):
    """A command line gives settings of the declared types, which give themselves again, or is refused."""
    args = [arg for arg in args
            if arg not in ('--help', '-h') and (arg.startswith('--') or not os.path.exists(arg))]
    found = right_or_refused(lambda: configure(Settings, args))
    if found is not None:
        values = dataclasses.asdict(found)
        again = from_dict(Settings, values, 'again')
        assert all(same(value, getattr(again, name)) for name, value in values.items())


# -----------------------------------------------------------------------------
# Token files

@cache
def prepared():
    """{file: bytes} of a data set, and its first rows."""
    with tempfile.TemporaryDirectory() as folder:
        write_dataset(Path(folder, 'd'), documents=20, shards=2)
        files = {path.name: path.read_bytes() for path in sorted(Path(folder, 'd').iterdir())}
        return files, Mixture(f'{folder}/d', 'train', 16, 1).rows(range(8))


TOKENS = st.tuples(st.sampled_from(['meta.json', 'train_00000.bin', 'train_00001.bin', 'train_00000.idx']),
                   BYTES, GRAFTS, st.booleans(), st.sampled_from(['stream', 'aligned', 'document']))


def tokens_case(case):
    """
    Token files that are not as they were written are refused; with another meta.json, rows have their shape
    and tokens of the vocabulary.
    """
    (name, edits, grafts, structured, packing), (files, right) = case, prepared()
    changed = edit_bytes(files[name], edits)
    if name == 'meta.json' and structured:
        changed = json.dumps(edit_json(json.loads(files[name]), grafts)).encode()
    with tempfile.TemporaryDirectory() as folder:
        for other, data in files.items():
            Path(folder, other).write_bytes(changed if other == name else data)
        rows = right_or_refused(lambda: Mixture(folder, 'train', 16, 1, packing).rows(range(8)))
        if rows is not None:
            right_or_refused(lambda: load_tokenizer(read_meta(folder)['tokenizer'], folder))
    if rows is None:
        return
    assert name == 'meta.json' or changed == files[name]
    assert all(a.shape == (8, 16) and a.dtype == np.int64 for a in rows[:2]) and rows[0].min() >= 0
    if changed == files[name] and packing == 'stream':
        assert all((a == b).all() for a, b in zip(rows, right))


# -----------------------------------------------------------------------------
# Folders of Hugging Face's kind, and adapters

@cache
def llama():
    """
    {file: bytes} of a small network, its ModelConfig, and {file: bytes} of PEFT's folder of an adapter for
    it.
    """
    from transformers import LlamaConfig, LlamaForCausalLM
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
                                     num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=16,
                                     bos_token_id=1, eos_token_id=2)).save_pretrained(f'{folder}/base')
        cfg, weights = reading.load(f'hf:{folder}/base')
        model = make_model(cfg, init=False)
        model.load_state_dict(weights)
        begin(model, build(Settings, lora_rank=2))
        from features.lora import adapters
        saved = adapters.described(model.lora.known['default'].description(), adapters.state(model))
        peft_files.write(f'{folder}/adapter', cfg, saved, 'llama')
        read = [{path.name: path.read_bytes() for path in Path(folder, name).iterdir()}
                for name in ('base', 'adapter')]
        return read[0], cfg, read[1]


FOLDER = st.tuples(st.booleans(), BYTES, GRAFTS, st.booleans())


def changed_folder(folder, files, config, weights, case):
    in_config, edits, grafts, structured = case
    for name, data in files.items():
        if name == config and in_config:
            data = (json.dumps(edit_json(json.loads(data), grafts)).encode() if structured
                    else edit_bytes(data, edits))
        elif name == weights and not in_config:
            data = edit_bytes(data, edits)
        Path(folder, name).write_bytes(data)


def hub_case(case):
    """A folder gives exactly the tensors of the network that its config.json asks for, or is refused."""
    with tempfile.TemporaryDirectory() as folder:
        changed_folder(folder, llama()[0], 'config.json', 'model.safetensors', case)
        found = right_or_refused(lambda: reading.load(f'hf:{folder}'))
    if found:
        cfg, weights = found
        with torch.device('meta'):
            wanted = {name: t.shape for name, t in make_model(cfg, init=False).state_dict().items()}
        assert {name: t.shape for name, t in weights.items()} == wanted


def adapter_case(case):
    """
    A folder of PEFT's gives an adapter whose tensors have the shapes that the network wants, or is refused.
    """
    files, cfg = llama()[2], llama()[1]
    with tempfile.TemporaryDirectory() as folder:
        changed_folder(folder, files, 'adapter_config.json', 'adapter_model.safetensors', case)
        saved = right_or_refused(lambda: peft_files.read(folder, cfg))
        if saved is not None:
            from features.lora import adapters
            model = make_model(cfg, init=False)
            right_or_refused(lambda: adapters.add(model, saved, folder, 'default'))


# -----------------------------------------------------------------------------
# Lines of JSON

ROW = st.dictionaries(st.sampled_from(['text', 'source', 'target', 'x']), JUNK | st.text(), max_size=3) | JUNK
LINES = st.tuples(st.lists(ROW, max_size=4), BYTES, st.booleans(),
                  st.sampled_from([{}, {'source': 'source', 'target': 'target'},
                                   {'prompt_template': 'Q: {source}\n\n{x}\n\nA: ', 'target': 'target'}]),
                  st.sampled_from(['strict', 'replace']))


def lines_case(case):
    """Every line that is not blank gives one text that can be written as UTF-8, or the file is refused."""
    rows, edits, is_edited, pair, errors = case
    data = '\n'.join(map(json.dumps, rows)).encode()
    data = edit_bytes(data, edits) if is_edited else data
    found = right_or_refused(lambda: reader.documents(reader.Task(lines=(data, 'x.jsonl', 1, 0)),
                                                      TextConfig(['x.jsonl'], errors=errors, **pair)))
    if found is not None:
        assert len(found) == sum(bool(line) and not line.isspace() for line in data.decode('utf-8', 'replace')
                                 .removeprefix('\ufeff').split('\n'))
        assert all(isinstance(text, str) and text.encode() is not None for _, text in found)


# -----------------------------------------------------------------------------

KINDS = {'settings': (ARGS, settings_case), 'tokens': (TOKENS, tokens_case), 'hub': (FOLDER, hub_case),
         'adapter': (FOLDER, adapter_case), 'lines': (LINES, lines_case)}


def fuzz(kind, cases, seconds=20):
    """
    Run so many cases of a kind, none of which may take longer than `seconds`. Raises what a case raises, with
    the smallest case found that does.
    """
    strategy, check = KINDS[kind]

    def too_long(number, frame):
        raise TimeoutError(f'a case took more than {seconds} s')

    @settings(max_examples=cases, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(strategy)
    def run(case):
        signal.alarm(seconds)
        try:
            check(case)
        finally:
            signal.alarm(0)
    before = signal.signal(signal.SIGALRM, too_long)
    try:
        # what is said beside the result, as that compiling is not possible
        with mock.patch('builtins.print'):
            run()
    finally:
        signal.signal(signal.SIGALRM, before)


if __name__ == '__main__':
    if os.path.isdir('/dev/shm') and shutil.disk_usage('/dev/shm').free > 2 ** 26:
        tempfile.tempdir = '/dev/shm'  # in memory
    for kind in sys.argv[2:] or KINDS:
        began = time.monotonic()
        fuzz(kind, int(sys.argv[1]))
        print(f'{kind}: {sys.argv[1]} cases, each right or refused in one line, '
              f'in {time.monotonic() - began:.0f} s', flush=True)
