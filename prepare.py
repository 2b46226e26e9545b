"""
Turn any text into token files.

    python prepare.py                                           # Python's standard library: no download
    python prepare.py book.txt --tokenizer=char --out=data/book
    python prepare.py notes/ chats.jsonl --text_key=title,body --tokenizer=bpe:8192 --out=data/mine

A source is a .txt file, a .jsonl (or .ndjson) file with a document in each line, or a folder of such files. A
.txt is one document, or several that are separated by lines of <|endoftext|>. This file reads all text into
memory. features/text adds large corpora (several processes, resumable), compressed files, .parquet,
globs, named corpora such as tinystories, pairs of a source and a target, and parts on several machines.

    OUT/train_00000.bin …, val_00000.bin …   token ids, little-endian uint16 (uint32 above 65,536 tokens); the
                                             end-of-text token ends each document
        train_00000.idx …, val_00000.idx …   uint64: where each document starts in the .bin file, in tokens
        meta.json                            the tokenizer, counts, sizes and hashes

OUT appears when it is complete. The same command gives the same bytes every time.
"""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))
import features  # noqa: I001 — first: your random.py or data/ then hides no module of ours or of a library
if __name__ == '__main__':
    features.start(__file__)

import hashlib
import json
import re
import time
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from tqdm import tqdm

from checkpoint import replace_json, sha256
from configurator import FilePath, UserError, configure, run_main
from features import extend, with_features
from tokenizer import EOT, load_tokenizer, needs_text, new_tokenizer

BATCH = 250  # documents that are tokenized at a time
HASHED = 2 ** 16  # characters at the start of a document, whose hash decides its side of the split


@dataclass
class Settings:
    positional = 'sources'
    sources: list[FilePath] = field(default_factory=lambda: ['stdlib'])  # files, folders, globs, or one of:
    # stdlib, stdlib_docs, stdlib_docstrings, shakespeare, tinystories, openwebtext, fineweb_edu, pubmed,
    # synthetic:markov, synthetic:markov2, synthetic:markov3
    out: FilePath = ''  # output folder; '' = data/NAME for a named corpus
    tokenizer: FilePath = 'bpe:4096'  # bpe:N (BPE trained on the text; 4096 for small models), char, byte,
    # gpt2, cl100k_base, o200k_base, FILE.model (sentencepiece), FILE.json (tokenizers), FILE.txt (BERT),
    # FILE.bin (llama2.c) or hf:FOLDER (that of a Hugging Face folder)
    special_tokens: Literal['text', 'parse'] = 'text'  # names of special tokens in documents: text = they
    # are ordinary text; parse = they are these tokens, as in chats that are written out
    messages: bool = False  # [chat] .jsonl of conversations: messages of role and content, or
    # conversations of from and value. Only the assistant's turns are trained
    text_key: str = 'text'  # text field of .jsonl and .parquet; a,b joins several fields with newlines
    val_fraction: float | None = None  # share for validation; None = 0.01, more for small, less for large
    # texts
    split: Literal['auto', 'document', 'tail'] = 'auto'  # document: by a hash of each, so duplicates stay
    # together; tail: validate on the end of each document; auto: tail for .txt with fewer than 200 documents
    errors: Literal['strict', 'replace'] = 'strict'  # for invalid UTF-8: stop, or read it as U+FFFD

    def check(self):
        """Raise ValueError for values that cannot work."""
        if '' in self.sources:  # it would mean the whole working directory
            raise ValueError('sources: one is empty, perhaps an unset variable: name a file or a folder')
        if self.val_fraction is not None and not 0 < self.val_fraction < 1:
            raise ValueError(f'val_fraction={self.val_fraction}: takes a number between 0 and 1')
        if self.messages:  # chat
            from features.chat.writing import check_settings  # chat
            check_settings(self)  # chat


# -----------------------------------------------------------------------------
# Sources → files → documents

KINDS = {'.txt': 'text', '.jsonl': 'lines', '.ndjson': 'lines'}
SEPARATOR = re.compile(r'(?<![^\r\n])\ufeff?[ \t]{0,50}' + re.escape(EOT) + r'[ \t]{0,50}(?:\r\n|\r|\n|\Z)')


def find_files(sources):
    """[(path, kind)] of the files in the sources, always in the same order."""
    found = []
    for source in sources:
        paths = [source]
        for folder, _, names in os.walk(source):  # of a file, it finds nothing
            paths += [os.path.join(folder, name) for name in names]
        files = [(path, kind_of(path)) for path in paths if kind_of(path) and os.path.isfile(path)]
        if not files:
            raise UserError(f'{source}: no such file or folder, or no .txt or .jsonl in it')
        found += sorted(files)
    return found


def kind_of(path):
    """'text' or 'lines', by the file extension; None for others."""
    return KINDS.get(os.path.splitext(path.lower())[1])


def read(path, kind, s):
    """Yield (where, text) of each document of a file; where is for example 'notes.txt:2'."""
    with open(path, 'rb') as f:
        if kind == 'text':
            for number, text in enumerate(separate(decode(f.read(), s, path)), 1):
                yield f'{path}:{number}', text
            return
        offset = 0  # of the line in the file, in bytes
        for number, data in enumerate(f, 1):
            line = decode(data, s, path, offset).removeprefix('\ufeff')
            offset += len(data)
            if line and not line.isspace():
                where = f'{path}:{number}'
                yield where, text_of(parse(line, where), s, where)


def decode(data, s, path, offset=0):
    """The text of bytes at `offset` in a file. Raises UserError for invalid UTF-8."""
    try:
        return data.decode('utf-8', s.errors)
    except UnicodeDecodeError as error:
        place = f'{path}: byte {offset + error.start}'
        raise UserError(f'{place} is not UTF-8: convert the file, or use --errors=replace') from None


def separate(text):
    """Split a .txt into documents. Drops a byte-order mark before a document: joined files have several."""
    *documents, last = SEPARATOR.split(text.removeprefix('\ufeff'))
    documents = [document.removesuffix('\n').removesuffix('\r') for document in documents]
    if last or not documents:
        documents.append(last)
    return [document.removeprefix('\ufeff') for document in documents]


def parse(line, where):
    """A line of a .jsonl → its row, {field: value}."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f'{where}: broken JSON ({error}): fix or remove the line') from None
    if not isinstance(row, dict):
        raise UserError(f'{where}: takes an object with a field for the text, got a {type(row).__name__}')
    return row


def text_of(row, s, where):
    """The text of a row: its fields in text_key, joined by newlines, without empty ones."""
    texts = [field_of(row, key, s, where) for key in s.text_key.split(',')]
    return '\n'.join(filter(None, texts))


def field_of(row, key, s, where, setting='text_key'):
    """A field of a row: text, or None. Raises UserError for other types."""
    if key not in row:
        raise UserError(f'{where}: no field {key}; it has {", ".join(row)}: set --{setting}')
    text = row[key]
    if not isinstance(text, str | None):
        raise UserError(f'{where}: field {key} holds a {type(text).__name__}, not text: set --{setting}')
    if text and re.search('[\ud800-\udfff]', text):  # JSON can spell half a character
        if s.errors == 'strict':
            raise UserError(f'{where}: {key} has half a surrogate pair: fix it, or use --errors=replace')
        text = text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')
    return text


# -----------------------------------------------------------------------------
# Documents → sides of the split → tokens → files

def divide(text, s):
    """A document → [(side, its text)]."""
    if s.split == 'tail':
        n = int(len(text) * (1 - s.val_fraction))  # as nanoGPT cuts Shakespeare
        return [(side, part) for side, part in (('train', text[:n]), ('val', text[n:])) if part]
    number = hash_of(text)
    is_val = number < s.val_fraction * 2 ** 64
    if getattr(s, 'chosen', None) is not None:  # text: few documents
        is_val = number in s.chosen  # text
    return [('val' if is_val else 'train', text)]


def hash_of(text):
    """A number below 2**64; equal documents have equal numbers."""
    return int.from_bytes(hashlib.blake2b(text[:HASHED].encode(), digest_size=8).digest(), 'big')


def check_sides(counts, s):
    """Raise UserError if train or val has no documents. counts: {side: number of documents}."""
    for side, other in (('train', 'val'), ('val', 'train')):
        if not counts[side]:
            advice = 'use another --val_fraction, or --split=tail'
            from features.text.splits import advice_for  # text
            advice = advice_for(s)  # text
            raise UserError(f'val_fraction={s.val_fraction}: leaves nothing for {side} of {counts[other]} '
                            f'document(s) with split={s.split}: {advice}')


def encode(texts, tokenizer, s):
    """(ids of all texts, each followed by an end-of-text token, uint16 or uint32; ids per text)."""
    ids, lengths = tokenizer.encode_documents(texts, s.special_tokens == 'parse')
    size = size_of(tokenizer, s)
    if len(ids) and not 0 <= ids.min() <= ids.max() < size:  # as uint16 it would be another
        reason = (f'gave a token beyond its vocabulary of {size}: its file is damaged, or '
                  'the text has a token that the network has not: leave out --special_tokens=parse')
        raise UserError(f'tokenizer {tokenizer.kind}: {reason}')
    return ids.astype(dtype_of(tokenizer)), lengths


def size_of(tokenizer, s):
    """The number of tokens that prepared data can have."""
    if os.path.isfile(s.tokenizer):  # hf
        from features.hf.prompts import size_in_network  # hf
        return size_in_network(tokenizer, s.tokenizer)  # hf
    return tokenizer.vocab_size


def dtype_of(tokenizer):
    return np.dtype('<u2' if tokenizer.vocab_size <= 2 ** 16 else '<u4')


def write_side(folder, side, texts, tokenizer, s):
    """Write the token file and the index of train or val. Returns its entry of meta.json."""
    path = os.path.join(folder, f'{side}_00000')
    counts = {'tokens': 0, 'documents': len(texts), 'bytes': sum(len(text.encode()) for text in texts)}
    with open(f'{path}.bin', 'wb') as token_file, open(f'{path}.idx', 'wb') as index:
        for n in tqdm(range(0, len(texts), BATCH), desc=f'tokenizing {side}', disable=None):
            ids, lengths = encode(texts[n:n + BATCH], tokenizer, s)
            starts = counts['tokens'] + np.cumsum(lengths) - lengths
            token_file.write(ids.tobytes())
            index.write(starts.astype('<u8').tobytes())
            counts['tokens'] += len(ids)
    shard = {'file': f'{side}_00000.bin', **counts, 'bytes_on_disk': os.path.getsize(f'{path}.bin'),
             'sha256': sha256(f'{path}.bin'), 'idx_sha256': sha256(f'{path}.idx')}
    return {**counts, 'shards': [shard]}


# -----------------------------------------------------------------------------
# The run

def prepare(s):
    """Prepare the sources. Returns (folder, meta.json, figures for the summary; None if already complete)."""
    out = s.out.rstrip('/')
    if s.messages:  # chat
        from features.chat import writing  # chat
        return writing.prepare(s, out)  # chat
    if s.tokenizer.startswith('hf:'):  # hf
        from features.hf.reading import tokenizer_file  # hf
        s.tokenizer = tokenizer_file(s.tokenizer)  # hf
    extend(s, 'text')  # text
    from features.text import pipeline  # text
    if pipeline.is_needed(s, out):  # text: it is, but for some megabytes of .txt and .jsonl and a new folder
        return pipeline.prepare(s, out)  # text
    if not out:
        raise UserError(f'out: name the folder to make for {" ".join(s.sources)}, as in --out=data/mine')
    needs_text(s.tokenizer)  # raises UserError for a wrong name
    files = find_files(s.sources)
    from features.folder import new_folder
    with new_folder(out, 'out') as folder:
        return out, *prepare_in_memory(s, files, folder)


def prepare_in_memory(s, files, folder):
    """Write token files and meta.json into a folder. Returns (meta.json, figures for the summary)."""
    began, by_default = time.monotonic(), s.val_fraction is None
    s = replace(s, val_fraction=s.val_fraction or 0.01)
    source = describe(s, files)
    found = [document for path, kind in files for document in read(path, kind, s)]
    texts = [text for _, text in found]
    if not any(text and not text.isspace() for text in texts):
        raise UserError(f'{" ".join(s.sources)}: no text in it, {len(texts)} empty documents')
    if s.split == 'auto':
        few = len(texts) < 200 and all(kind == 'text' for _, kind in files)
        s = replace(s, split='tail' if few else 'document')
    from features.text.splits import choose  # text
    s.chosen = choose(s, found, by_default)  # text
    tokenizer = new_tokenizer(s.tokenizer, texts)
    sides = {'train': [], 'val': []}
    for text in texts:
        if text and not text.isspace():
            for side, part in divide(text, s):
                sides[side].append(part)
    check_sides({side: len(parts) for side, parts in sides.items()}, s)
    splits = {side: write_side(folder, side, parts, tokenizer, s) for side, parts in sides.items()}
    meta = meta_of(s, tokenizer, tokenizer.save(folder), splits, source)
    replace_json(os.path.join(folder, 'meta.json'), meta)
    figures = {'seconds': time.monotonic() - began}
    from features.text.figures import figures_of  # text
    figures |= figures_of(found, folder, meta, s, tokenizer, figures['seconds'])  # text
    return meta, figures


def describe(s, files):
    """Everything that determines the result: the settings, and a hash of the inputs' names, sizes, times."""
    paths = [path for path, _ in files]
    if os.path.isfile(s.tokenizer):
        paths.append(s.tokenizer)
    inputs = json.dumps([(path, os.stat(path).st_size, os.stat(path).st_mtime_ns) for path in paths])
    names = ('sources', 'tokenizer', 'text_key', 'val_fraction', 'split', 'errors')
    settings = {name: getattr(s, name) for name in names}
    if s.special_tokens != 'text':
        settings['special_tokens'] = s.special_tokens
    return {**settings, 'inputs': hashlib.sha256(inputs.encode()).hexdigest()}


def meta_of(s, tokenizer, description, splits, source):
    """The content of meta.json."""
    size = size_of(tokenizer, s)
    meta = {'format': 1, 'tokenizer': description, 'vocab_size': size, 'eot': tokenizer.eot}
    if tokenizer.start():
        meta['bos'] = tokenizer.start()[0]
    return {**meta, 'dtype': dtype_of(tokenizer).name, 'split': s.split, 'splits': splits, 'source': source}


def summary(out, meta, figures, state='already prepared'):
    """Print a summary of a prepared data set. figures: None if it was already complete."""
    print(f'{out}: {"ready" if figures else state}')
    total = dict.fromkeys(('documents', 'tokens', 'bytes'), 0)
    for side, split in meta['splits'].items():
        print(f'    {side:5} {split["documents"]:>12,} documents {split["tokens"]:>15,} tokens '
              f'{split["bytes"]:>16,} bytes of text {len(split["shards"]):>4} shard(s)')
        total = {key: total[key] + split[key] for key in total}
    rate, rest = f'{total["bytes"] / total["tokens"]:.3f} bytes a token', '--minutes=5'
    if meta.get('pairs'):  # text
        rate = f'{total["tokens"] / total["documents"]:,.0f} tokens a pair'  # text
        rest = '--objective=seq2seq'  # text
    if 'chat' in meta:  # chat
        targets = sum(split['targets'] for split in meta['splits'].values())  # chat
        rate = f'{targets / total["tokens"]:.1%} of the tokens are trained'  # chat
    kind, dtype = meta['tokenizer']['kind'], np.dtype(meta['dtype']).newbyteorder('<')
    print(f'    {rate}; tokenizer {kind} of {meta["vocab_size"]:,}, {dtype.name}; split by {meta["split"]}')
    val = meta['splits']['val']['tokens']
    if val < 1000:
        advice = 'give more text, or a larger --val_fraction'
        print(f'    val has {val:,} tokens, too few for a reliable loss: {advice}')
    from features.text.figures import print_figures  # text
    print_figures(meta, figures)  # text
    ids = np.fromfile(os.path.join(out, 'train_00000.bin'), dtype, count=60)
    print(f'    train begins: {load_tokenizer(meta["tokenizer"], out).decode(ids)!r}')
    print(f'next: python train.py --dataset={out.removeprefix("data/")} {rest}')


def main():
    s = configure(with_features(Settings, 'text'))
    if s.part or s.merge:  # text
        from features.text import parts  # text
        return parts.main(s)  # text
    summary(*prepare(s))


if __name__ == '__main__':
    from prepare import main  # under its own name: features/text imports this file too
    run_main(main)
