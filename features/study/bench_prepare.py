"""
bench.py prepare: speed of prepare.py with GPT-2's BPE, and its memory by size of the text.
"""
import importlib.util
import itertools
import json
import os
import random
import shutil
import sys
import tempfile
from functools import partial

import tokenizer
from configurator import ROOT, UserError
from features.study import bench_peers
from features.study.measure import alternate, run, section

MB = 10 ** 6


def bench_prepare(s, device, machine):
    """Yield the sections of bench.py prepare: whole processes, from their start to the finished files."""
    from features.text.workers import cores
    try:
        tokenizer.new_tokenizer('gpt2')
    except UserError as error:
        yield section('prepare: left out', {}, [str(error)])
        return
    with tempfile.TemporaryDirectory() as folder:
        size, documents = write_text(s, folder, 2 if s.quick else 100)
        arms = {
            'ours': partial(prepare_ours, folder, size, cores()),
            'ours, one process': partial(prepare_ours, folder, size, 1),
        }
        notes = [f'{documents:,} documents; seconds of the whole process, its start included']
        if s.peer:
            add_peer(s, arms, notes, folder, size, documents)
        yield section(f'prepare: {size / MB:.0f} MB of text, GPT-2 BPE', alternate(arms, s.rounds), notes)
    samples = {}
    for mb in (1, 2) if s.quick else (10, 100, 1000):
        with tempfile.TemporaryDirectory() as folder:
            size, _ = write_text(s, folder, mb, txt=False)
            samples |= alternate({f'{mb} MB': partial(prepare_ours, folder, size, cores())}, 1)
    yield section('prepare: memory of all its processes, by size of the text', samples)


def add_peer(s, arms, notes, folder, size, documents):
    """Add nanoGPT's two scripts to the arms, and a description to the notes."""
    from features.text.workers import cores
    arms['nanoGPT, a text'] = partial(prepare_peer, s.peer, 'shakespeare', folder, size, 1, documents)
    notes.append('nanoGPT, a text: its data/shakespeare/prepare.py, encode_ordinary of the whole file')
    if importlib.util.find_spec('datasets'):
        arms['nanoGPT, documents'] = partial(prepare_peer, s.peer, 'openwebtext', folder, size, cores(),
                                             documents)
        notes.append('nanoGPT, documents: its data/openwebtext/prepare.py on the same .jsonl, '
                     'one process per core, with a share of validation documents that it can divide')
    else:
        notes.append('nanoGPT, documents: its data/openwebtext/prepare.py takes datasets, '
                     'which is not installed: left out')


def write_text(s, folder, mb, txt=True):
    """
    Write `mb` MB of documents as text.jsonl (and all in one text.txt): random pieces of the sources s.text,
    as long as web pages, always the same. Returns (bytes, documents).
    """
    texts = source_texts(s)
    longest = 800 if s.quick else 5000
    rng = random.Random(0)
    size = 0
    count = 0
    with (open(os.path.join(folder, 'text.jsonl'), 'w') as lines,
          open(os.path.join(folder, 'text.txt'), 'w') as whole):
        for text in itertools.cycle(texts):
            if size >= mb * MB:
                return size, count
            start = rng.randrange(max(1, len(text) - longest))
            text = text[start:start + longest]
            lines.write(json.dumps({'text': text}) + '\n')
            if txt:
                whole.write(text)
            size += len(text.encode())
            count += 1


def source_texts(s):
    """The non-empty documents of the sources s.text, as a list of texts."""
    from features.text import sources
    from features.text.reader import Reader, documents
    from features.text.settings import TextConfig
    settings = TextConfig(split='document', val_fraction=0.01)
    reader = Reader(sources.find_files(s.text), settings)
    texts = []
    for task in reader.tasks(None):
        for _, text in documents(task, settings):
            if text:
                texts.append(text)
    return texts


def prepare_ours(folder, size, num_proc):
    """{metric: value} of prepare.py on text.jsonl in `folder`, `size` bytes of text."""
    out = os.path.join(folder, 'out')
    command = [sys.executable, os.path.join(ROOT, 'prepare.py'), os.path.join(folder, 'text.jsonl'),
               '--tokenizer=gpt2', f'--out={out}', f'--num_proc={num_proc}']
    _, took, peak = run(command, tree=True)
    shutil.rmtree(out)
    return prepare_figures(size, took, peak, num_proc)


def prepare_peer(peer, name, folder, size, num_proc, documents):
    """{metric: value} of nanoGPT's data/NAME/prepare.py on the same text."""
    took, peak = bench_peers.prepare(peer, name, folder, num_proc, documents)
    return prepare_figures(size, took, peak, num_proc)


def prepare_figures(size, took, peak, num_proc):
    """{metric: value} of `size` bytes in `took` seconds by num_proc processes, with `peak` MiB."""
    rate = size / MB / took
    return {'MB/s': rate, 'MB/s a process': rate / num_proc, 'peak memory, MiB': peak}
