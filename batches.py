"""
Token files → batches. The order of the data is a function, not a state:

    batch = f(seed, global sample number)

So a resumed run needs only one integer, the global batch is the same for any number of ranks and
micro-batches, and evaluation never affects training. In memory are, if rows begin with documents, 8 bytes
for each: 1e11 rows cost as much as ten.

    data = Mixture({'tinystories': 100, 'dolly': 20}, 'train', block_size=256, seed=1)
    x, y = data.rows(range(32))   # (32, 256) int64 each: y is x one token later, -1 where there is no target

The path of a batch from a step: Batches → Mixture.rows → Source.row → TokenFiles.read.
"""
import functools
import hashlib
import json
import math
import os
from bisect import bisect_right
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Literal

import numpy as np
import torch

from checkpoint import is_file_name, open_regular, read_files, read_json
from configurator import FilePath, UserError
from model import autocast, zero

VERIFY_UP_TO = 2 ** 28  # bytes: at every start the hashes of splits up to this size are checked, in 0.2 s
EVAL_ROWS = 12  # rows of each of eval_iters, nanoGPT's default batch: the loss does not depend on batch_size


def most_open_files():
    """Files of data sets that are open at a time: a corpus may have thousands of shards."""
    import resource  # not on Windows
    return max(16, min(resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2, 4096))


OPEN_FILES = most_open_files()  # opening one more takes 11 µs


@dataclass
class DataConfig:
    dataset: FilePath | dict = 'stdlib'  # name under data/, or a folder; {'wiki': 100, 'dolly': 20} = a
    # mixture; its weights count tokens
    objective: Literal['causal', 'prefix', 'ul2', 'seq2seq'] = 'causal'  # [t5] causal: the next token;
    # prefix: the end of a row from its beginning; ul2: masked spans (needs prepare.py --reserve=100);
    # seq2seq: the target of a pair from its source (prepare.py --source=… --target=…)
    packing: Literal['stream', 'aligned', 'document'] = 'stream'  # stream: a row is the next block_size
    # tokens; aligned: the same, from the first document start in them (some tokens come twice per epoch,
    # others never); document: one document after a start token, padded, or a random crop


# -----------------------------------------------------------------------------
# Shuffling without an index

def permute(i, n, key):
    """
    The position of i in a keyed permutation of range(n): a Feistel network of 6 rounds over the next even
    number of bits, repeated until the result is below n (Black & Rogaway 2002, "Ciphers with arbitrary finite
    domains"). It costs 20 µs, where an array of n numbers would cost memory.
    """
    half = max(1, ((n - 1).bit_length() + 1) // 2)  # bits of either half
    mask = (1 << half) - 1
    keys = [splitmix(key * 6 + r) for r in range(6)]
    while True:
        left, right = i >> half, i & mask
        for k in keys:
            left, right = right, left ^ (mix(right ^ k) & mask)
        i = left << half | right
        if i < n:
            return i


def splitmix(*numbers):
    """A 64-bit hash of integers; makes one seed from (seed, epoch, …)."""
    state = 0
    for number in numbers:
        state = mix((state + number + 0x9E3779B97F4A7C15) % 2 ** 64)
    return state


def mix(x):
    """The last step of splitmix64: each bit of the 64-bit result depends on every bit of x."""
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2 ** 64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2 ** 64
    return x ^ x >> 31


# -----------------------------------------------------------------------------
# Token files

class DataError(UserError):
    """A file of a data set cannot be read, or is not the one of the start. A run can still be saved."""


class DataFile:
    """
    A file of a prepared folder, opened when it is read. size: in bytes; sha256: its hash, if known, which is
    checked at the start if is_small. Raises DataError.
    """

    def __init__(self, path, size, sha256=None, is_small=True):
        self.path, self.size, self.sha256, self.identity = path, size, sha256, None
        with self.open() as f:
            if is_small and sha256 and self.hash(f) != sha256:
                raise DataError(f'{path}: its contents do not match the hash in meta.json (damaged file): '
                                'prepare the data set again')

    def hash(self, f):
        try:
            return hashlib.file_digest(f, 'sha256').hexdigest()
        except OSError as error:
            raise self.unreadable(error) from None

    def open(self):
        """The file, open; the same one as at the start."""
        try:
            f = open_regular(self.path)
        except UserError as error:
            raise self.unreadable(error) from None
        look = os.fstat(f.fileno())
        found = look.st_dev, look.st_ino, look.st_size, look.st_mtime_ns
        if found != (self.identity or found) or look.st_size != self.size:
            from features.trouble import check_again
            check_again(self, f)
        self.identity = found
        return f

    def unreadable(self, error):
        from features.trouble import advice
        return DataError(advice(error, self))

    def read(self, start, length):
        """Bytes [start, start + length). They are not mapped: a file that is cut then ends the process."""
        data = b''
        while len(data) < length:
            try:
                more = os.pread(opened(self).fileno(), length - len(data), start + len(data))
            except OSError as error:
                raise self.unreadable(error) from None
            if not more:
                raise DataError(f'{self.path}: was truncated during the run: prepare it again')
            data = data + more if data else more  # in one piece, up to 2 GB
        return data


@functools.lru_cache(OPEN_FILES)
def opened(file):
    """The open file of a DataFile. Those that were not read for long are closed."""
    return file.open()


class TokenFiles:
    """One split ('train' or 'val') of a prepared folder: its shards, read as one long array of tokens."""

    def __init__(self, folder, split):
        self.folder, self.split, self.meta = folder, split, read_meta(folder)
        self.vocab_size = self.meta['vocab_size']
        self.dtype = np.dtype(self.meta['dtype']).newbyteorder('<')
        info = self.meta['splits'].get(split, {'shards': []})
        self.bytes = info.get('bytes', 0)  # of text; 0 = not known
        self.shards = info['shards']
        self.files, self.index = [], []  # DataFiles of each shard
        self.starts = [0]  # where each shard starts, and the last one ends, in tokens
        self.documents = sum(shard.get('documents', 0) for shard in self.shards)
        is_small = sum(shard['bytes_on_disk'] for shard in self.shards) <= VERIFY_UP_TO
        for shard in self.shards:
            path = os.path.join(folder, shard['file'])
            self.files.append(DataFile(path, shard['bytes_on_disk'], shard.get('sha256'), is_small))
            if shard.get('documents'):
                path = path.removesuffix('.bin') + '.idx'
                self.index.append(DataFile(path, 8 * shard['documents'], shard['idx_sha256'], is_small))
            self.starts.append(self.starts[-1] + shard['bytes_on_disk'] // self.dtype.itemsize)
        self.tokens = self.starts[-1]
        if self.tokens < 2:
            raise UserError(f'{folder}: its {split} split holds no tokens to train on: '
                            'prepare it again with more text (python prepare.py --help)')

    def read(self, start, length):
        """Tokens [start, start + length), int64, fewer at the end. A memmap would fill the memory."""
        end, parts = min(start + length, self.tokens), [np.empty(0, self.dtype)]
        while start < end:
            shard = bisect_right(self.starts, start) - 1
            file, offset = self.files[shard], start - self.starts[shard]
            n = min(end, self.starts[shard + 1]) - start
            part = np.frombuffer(file.read(offset * self.dtype.itemsize, n * self.dtype.itemsize), self.dtype)
            if part.max() >= self.vocab_size:
                raise DataError(f'{file.path}: token {part.max()} near position {offset} is beyond the '
                                f'vocabulary of {self.vocab_size}: the file is damaged or of another '
                                'tokenizer; prepare it again')
            parts.append(part)
            start += n
        return np.concatenate(parts).astype(np.int64)

    @functools.cached_property
    def bounds(self):
        """Where the documents start, and the last one ends, in tokens, (documents + 1,) int64, in memory."""
        bounds = []
        for first, end, file in zip(self.starts, self.starts[1:], self.index):
            starts = np.frombuffer(file.read(0, file.size), '<i8')
            if starts[0] or starts[-1] >= end - first or (starts[:-1] >= starts[1:]).any():
                raise DataError(f'{file.path}: does not rise from 0 to the end of its .bin (damaged file): '
                                'prepare the data set again')
            bounds.append(first + starts)
        return np.concatenate([*bounds, [self.tokens]])

    def document(self, number):
        """(first, last + 1) token positions of a document."""
        return self.bounds[number:number + 2].tolist()


def find_folder(name):
    """data/NAME, or NAME itself if that is a folder. Raises UserError that says which command makes it."""
    for folder in (os.path.join('data', name), name):
        if os.path.isdir(folder):
            return folder
    problem = f'no such data set; first run: python prepare.py FILE_OR_FOLDER --out=data/{name}'
    from features.text.folders import how_to_make  # text
    problem = how_to_make(name)  # text
    raise UserError(f'dataset={name}: {problem}')


def read_meta(folder):
    """The content of meta.json in a prepared folder. Raises UserError if it is invalid."""
    path = os.path.join(folder, 'meta.json')
    if not os.path.exists(path):
        if os.path.exists(os.path.join(folder, 'train.bin')):  # text
            from features.text.nanogpt import describe_folder  # text
            return describe_folder(folder)  # text
        raise UserError(f'{folder}: neither meta.json nor train.bin in it: '
                        'prepare it (python prepare.py --help)')
    try:
        meta = read_json(path, most=2 ** 25)
    except UserError as error:
        raise UserError(f'{error}: prepare the data set again') from None
    if meta.get('format') != 1:
        raise UserError(f'{path}: format {meta.get("format")!r:.100} is newer than this minnow: update it')
    check_meta(meta, path)
    return meta


def check_meta(meta, path):
    """Raise UserError for an invalid field of meta.json. File names must not point outside the folder."""
    def check(is_right, field):
        if not is_right:
            raise UserError(f'{path}: {field} has an invalid value: prepare the data set again')

    tokenizer, vocab_size, splits = meta.get('tokenizer'), meta.get('vocab_size'), meta.get('splits')
    check(type(tokenizer) is dict and type(tokenizer.get('kind')) is str, 'tokenizer')
    files, reserved = tokenizer.get('files', {}), tokenizer.get('reserved', 0)
    check(is_count(reserved), 'tokenizer')
    check(type(files) is dict and all(is_file_name(name) for name in files), 'tokenizer.files')
    check(is_count(vocab_size) and reserved < vocab_size <= 2 ** 32, 'vocab_size')
    for name in ('eot', 'bos'):
        check(meta.get(name) is None or is_count(meta[name]) and meta[name] < vocab_size, name)
    check(meta.get('dtype') in ('uint16', 'uint32'), 'dtype')
    check(type(splits) is dict, 'splits')
    for name, split in splits.items():
        where = f'splits.{name}'
        check(type(split) is dict and type(split.get('shards')) is list, where)
        check(is_count(split.get('bytes', 0)), where)
        check(all(type(shard) is dict for shard in split['shards']), where)
        has_index = any(shard.get('documents') for shard in split['shards'])
        for shard in split['shards']:
            check(is_file_name(shard.get('file')), where)
            check(shard['file'].endswith('.bin'), where)
            check(is_count(shard.get('bytes_on_disk')), where)
            tokens, rest = divmod(shard['bytes_on_disk'], np.dtype(meta['dtype']).itemsize)
            check(not rest and shard.get('tokens', tokens) == tokens, f'{where}.shards.tokens')
            check(is_count(shard.get('documents', 0)), where)
            check(bool(shard.get('documents')) == (has_index and tokens > 0), f'{where}.shards.documents')
            check(not shard.get('documents') or 'idx_sha256' in shard, where)
            check(all(type(shard.get(name, '')) is str for name in ('sha256', 'idx_sha256')), where)
        for name in ('tokens', 'documents') if has_index else ():
            total = sum(shard.get(name, 0) for shard in split['shards'])
            check(split.get(name, total) == total, f'{where}.{name}')


def is_count(value):
    return type(value) is int and 0 <= value < 2 ** 62


# -----------------------------------------------------------------------------
# One corpus

class Source:
    """
    One corpus as numbered rows of tokens: row(number) for number in range(rows) covers the split once.

    bos: the start token before every document, (id,) or (), where a row is a document; None = as the data set
    has it. (A network that was trained without one is evaluated without one.)
    """

    def __init__(self, name, split, block_size, packing='stream', bos=None):
        if packing not in ('stream', 'aligned', 'document'):
            raise UserError(f'packing={packing}: has no code in batches.py: use stream, aligned or document')
        self.name, self.block_size, self.packing, self.bos = name, block_size, packing, ()
        self.files = TokenFiles(find_folder(name), split)
        self.length = block_size + 1  # tokens of a row: the first is no target, the last is nothing else
        self.stride = block_size  # tokens from one row to the next
        self.rows = -(-(self.files.tokens - 1) // block_size)  # rounded up
        if packing != 'stream' and not self.files.documents:
            raise UserError(f'packing={packing}: {name} has no .idx of its documents (a nanoGPT folder?): '
                            'use packing=stream')
        if packing != 'stream':
            self.bounds = self.files.bounds  # read now, not in the middle of a run
        if packing == 'document':
            self.rows = self.files.documents
            self.bos = start_token(self.files.meta) if bos is None else tuple(bos)

    def row(self, number, noise=0):
        """Up to self.length tokens, int64. noise: a number that picks the crop of a long document."""
        if self.packing != 'document':
            start = number * self.stride
            if self.packing == 'aligned':
                document = self.bounds[np.searchsorted(self.bounds, start)]
                if document < min(start + self.stride, self.files.tokens - 1):
                    start = int(document)
            return self.files.read(start, self.length)
        first, end = self.files.document(number)
        start = first - len(self.bos)  # the start token counts as the document's first one
        excess = end - start - self.length
        if excess > 0:
            start += splitmix(noise) % (excess + 1)
            end = start + self.length
        if start >= first:  # a crop from the middle has no start token
            return self.files.read(start, end - start)
        return np.append(self.bos, self.files.read(first, end - first))

    def batch(self, rows, height=0):
        """x, y (B, block_size) int64, B = len(rows) or height; after a row ends, x is 0 and y is -1."""
        shape = max(len(rows), height), self.block_size
        x, y = np.zeros(shape, np.int64), np.full(shape, -1, np.int64)
        for n, tokens in enumerate(rows):
            x[n, :len(tokens) - 1] = tokens[:-1]
            y[n, :len(tokens) - 1] = tokens[1:]
        return x, y

    def tokens_per_row(self):
        """Mean number of targets in a row."""
        if self.packing in ('stream', 'aligned'):
            return (self.files.tokens - 1) / self.rows
        targets = np.diff(self.files.bounds) + len(self.bos) - 1  # all tokens of a row but its first
        if not (targets > 0).any():
            raise UserError(f'packing=document: no document of {self.name} has more than one token: '
                            'use packing=stream')
        return float(np.minimum(targets, self.stride).sum() / self.rows)

    def bytes_per_token(self):
        """Bytes of text per target; 0 if not known. For pairs, only the bytes of the targets count."""
        return 0 if self.files.meta.get('pairs') else self.files.bytes / self.files.tokens

    def too_long(self):
        """A line about documents that are longer than a row; '' if all fit, or if rows are not documents."""
        if self.packing == 'document':  # text
            from features.text.folders import count_long_documents  # text
            return count_long_documents(self)  # text
        return ''


def open_source(name, split, block_size, packing='stream', bos=None, objective=None):
    """The Source of a corpus. objective: an Objective of features/t5; None = predict the next token."""
    if 'chat' in read_meta(find_folder(name)):  # chat: made with prepare.py --messages
        from features.chat.data import ChatSource  # chat
        return ChatSource(name, split, block_size, packing, objective)  # chat
    if objective is not None:  # t5
        from features.t5.objectives import open_source_for  # t5
        return open_source_for(objective, name, split, block_size, packing)  # t5
    return Source(name, split, block_size, packing, bos)


def start_token(meta):
    """(id,) of the start token of a document: BOS, else the end-of-text token; () if there is neither."""
    for name in ('bos', 'eot'):
        if meta.get(name) is not None:
            return (meta[name],)
    return ()


# -----------------------------------------------------------------------------
# The training data

class Mixture:
    """
    The training data: maps sample i of the run to a row of one of its sources.

    Each source goes through all its rows exactly once an epoch, in another order each epoch. Of any first n
    samples a source has its share, give or take one for every other source.
    """

    def __init__(self, dataset, split, block_size, seed, packing='stream', objective=None, bos=None):
        weights = dataset if isinstance(dataset, dict) else {dataset: 1}
        for name, weight in weights.items() or [('', 0)]:
            if type(name) is not str or type(weight) not in (int, float) or not 1e-6 <= weight <= 1e6:
                raise UserError(f'dataset={dataset}: a mixture takes names, '
                                'and for each a number between 1e-6 and 1e6')
        self.seed, self.sources, shares = seed, [], []
        for name, weight in weights.items():
            source = open_source(name, split, block_size, packing, bos, objective)
            share = Fraction(str(weight))  # of the rows
            if source.packing not in ('stream', 'aligned'):  # whose rows are not full alike
                share /= Fraction(source.tokens_per_row()).limit_denominator(10 ** 6)
            self.sources.append(source)
            shares.append(share)
        if len(self.sources) > 1:
            from features.datasets import check_alike
            check_alike(self.sources)
        self.bos, self.vocab_size = self.sources[0].bos, self.sources[0].files.vocab_size
        scale = math.lcm(*(share.denominator for share in shares))
        self.shares = [int(share * scale) for share in shares]  # integers: locate() is exact for any i
        rates = [source.bytes_per_token() for source in self.sources]  # of text, for each target
        targets = [share * source.tokens_per_row() for share, source in zip(shares, self.sources)]
        self.bytes_per_token = np.average(rates, weights=targets) if all(rates) else 0  # 0 = not known
        # Now, because a checkpoint is also written when the data are gone
        self.prints = [self.hash(source) for source in self.sources]
        files = self.sources[0].files
        self.tokenizer_files = read_files(files.folder, files.meta['tokenizer'].get('files', {}))

    def locate(self, i):
        """Sample i → (index of its source, number of earlier samples from that source)."""
        left = sum(self.shares)
        for k, share in enumerate(self.shares):  # source k takes its share of the samples that 0…k-1 left
            before = i * share // left
            if (i + 1) * share // left > before:
                return k, before
            i, left = i - before, left - share
        raise AssertionError('the last source takes all that is left')

    def rows(self, samples):
        """x, y (B, block_size) int64 of B global sample numbers: a function of them and the seed."""
        rows = []
        for sample in samples:
            k, n = self.locate(int(sample))
            source = self.sources[k]
            epoch, place = divmod(n, source.rows)
            number = permute(place, source.rows, splitmix(self.seed, k, epoch))
            rows.append(source.row(number, noise=splitmix(self.seed, k, epoch, number)))
        return self.sources[0].batch(rows)

    def epochs(self, samples):
        """Number of epochs of each source in the first `samples` samples: {name: epochs}."""
        total = sum(self.shares)
        return {source.name: samples * share / total / source.rows
                for share, source in zip(self.shares, self.sources)}

    def bits_per_byte(self, nats_per_token):
        """A loss in bits per byte of text; None if the number of bytes is not known."""
        return nats_per_token / math.log(2) / self.bytes_per_token if self.bytes_per_token else None

    def fingerprint(self):
        """{name of a source: hash of its files}: the data of a resumed run must not have changed."""
        return {source.name: digest for source, digest in zip(self.sources, self.prints)}

    def hash(self, source):
        meta = {key: value for key, value in source.files.meta.items() if key != 'bos'}
        text, pieces = json.dumps(meta, sort_keys=True), ()
        if not all('sha256' in shard for shard in source.files.shards):  # text: nanoGPT's
            from features.text.nanogpt import identify  # text
            text, pieces = identify(source.files)  # text
        if source.packing == 'pairs':  # t5: once they were padded
            text += 'packed'  # t5
        if source.bos:
            text += f'begin {list(source.bos)}'
        found = hashlib.sha256(text.encode())
        for piece in pieces:
            found.update(piece)
        return found.hexdigest()


# -----------------------------------------------------------------------------
# The data of a run

def open_data(s, start, ranks):
    """(the Mixture to train on, [the Source to validate on, for each of its sources]). Raises UserError."""
    objective = None
    if s.objective != 'causal' or s.n_encoder_layer:  # t5
        from features.t5.objectives import find_objective  # t5
        objective = find_objective(vars(s), s, start.form)  # t5
    bos = None
    if start.state and s.eval_only:  # judged on rows as it knows them
        bos = tuple(start.state.get('begin', ()))
    data = Mixture(s.dataset, 'train', s.block_size, s.seed, s.packing, objective, bos)
    val = [open_source(source.name, 'val', s.block_size, s.packing, bos, objective)
           for source in data.sources]
    if ranks.world > 1:  # scale
        from features.scale.guard import check_same_start  # scale
        check_same_start(ranks, asdict(s), data.fingerprint())  # scale
    if start.folder and (s.eval_only or not start.state):  # text
        from features.text.folders import check_start  # text
        ranks.from_first(lambda: check_start(s, start, data.sources[0]))  # text
    return data, val


# -----------------------------------------------------------------------------
# The batches of a step

class Batches:
    """This rank's micro-batches. A thread reads those of the next step during the current step."""

    def __init__(self, data, s, ranks):
        self.data, self.s, self.ranks = data, s, ranks
        self.thread = ThreadPoolExecutor(1)
        self.ahead = {}  # {step: its future}

    def __call__(self, step):
        """([(first sample number, x, y), …], how many targets are in them); x, y: (B, block_size) int64."""
        now = self.ahead.pop(step, None) or self.thread.submit(self.read, step)
        self.ahead = {step + 1: self.thread.submit(self.read, step + 1)}
        return now.result()

    def of_all(self, step, trouble, stop):
        """(this rank's micro-batches, targets in those of all ranks, how many are to stop), or Trouble."""
        try:
            batches, targets = self(step)
        except (UserError, OSError) as error:
            batches, targets, trouble = [], 0, error
        return batches, *sum_all(self.ranks, trouble, targets, stop)

    def read(self, step):
        batches, targets = [], 0
        for samples in micro_batches(self.s, step, self.ranks.rank, self.ranks.world):
            arrays = self.data.rows(samples)
            targets += int((arrays[1] >= 0).sum())
            tensors = [torch.from_numpy(array) for array in arrays]
            if self.ranks.device.type == 'cuda':
                tensors = [t.pin_memory() for t in tensors]  # then the copy to the GPU waits for nothing
            batches.append((samples[0], *tensors))
        return batches, targets


def micro_batches(s, step, rank, world):
    """The sample numbers of the micro-batches of a rank, ranges one after another."""
    rows = s.batch_size * s.gradient_accumulation_steps // world  # of this rank
    size = min(s.batch_size, rows)
    while rows % size:
        size -= 1
    first = (step * world + rank) * rows
    return [range(i, i + size) for i in range(first, first + rows, size)]


# -----------------------------------------------------------------------------
# The validation loss: of the same rows in the same order, whatever the training does

@torch.no_grad()
def evaluate(model, sources, s, ranks, stop=False):
    """
    {'val_loss': nats per token, 'val_bpb': bits per byte of text}, and of a mixture the same per source as
    'val_loss/NAME', computed by all ranks together. Each token has the same weight. val_bpb is absent where
    the bytes of text are not known. None, on all ranks, if `stop` becomes true on one of them.
    """
    model.eval()
    result, total = {}, np.zeros(3)  # nats, targets, bytes of text
    for source in sources:
        nats, targets, is_stopped = sum_losses(model, source, s, ranks, stop)
        if is_stopped:
            break
        sums = np.array([nats, targets, targets * source.bytes_per_token()])
        total += sums
        if len(sources) > 1:
            result |= losses(*sums.tolist(), '/' + source.name)
    model.train()
    if is_stopped:
        return None
    if not all(source.bytes_per_token() for source in sources):
        total[2] = 0
    return losses(*total.tolist()) | result


def sum_losses(model, source, s, ranks, stop):
    """(nats, targets, whether to stop), summed over the validation rows of a Source and the ranks."""
    numbers = validation_rows(source, EVAL_ROWS * s.eval_iters)
    most = -(-len(numbers) // ranks.world)  # all ranks make as many passes, some perhaps an empty one
    height = min(4 * s.batch_size, most)  # without gradients, four times the rows fit
    nats, targets, trouble = zero(ranks.device), 0, None
    for i in range(0, most, height):
        mine = numbers[ranks.rank::ranks.world][i:i + height]
        try:
            batch = validation_batch(source, mine, height)
        except (UserError, OSError) as error:
            trouble = error
        if ranks.any(stop or trouble):
            break
        new_nats, new_targets = batch_loss(model, batch, ranks.device, s.dtype)
        nats, targets = nats + new_nats, targets + new_targets
        ranks.alive()
    return sum_all(ranks, trouble, nats.item(), targets, bool(stop))


def sum_all(ranks, trouble, *values):
    """ranks.sum(*values), of all ranks. Raises Trouble on all if one has met an error, `trouble`."""
    *sums, count = ranks.sum(*values, trouble is not None)
    if count:
        from features.rescue import raise_together
        raise_together(trouble, ranks)
    return sums


def batch_loss(model, batch, device, dtype):
    """(summed loss in nats, which stays on the device; number of targets) of a validation_batch()."""
    x, y, *more = [torch.from_numpy(a).to(device) for a in batch]
    inputs = {}
    if more:  # t5
        from features.t5.objectives import more_inputs  # t5
        inputs = more_inputs(model, more)  # t5
    with autocast(device, dtype):
        return model(x, y, reduction='sum', **inputs), int((y >= 0).sum())


def validation_rows(source, count):
    """Numbers of `count` rows to evaluate on, spread over the split, the same in all runs; 0 = all."""
    if not count or count >= source.rows:
        return np.arange(source.rows)
    return np.sort([permute(i, source.rows, 0) for i in range(count)])


def validation_batch(source, numbers, height=0):
    """Mixture.rows() for rows of a Source by their numbers; their crops and masks are the same each time."""
    return source.batch([source.row(int(number), noise=int(number)) for number in numbers], height)


def losses(nats, targets, text_bytes, suffix=''):
    """{'val_loss', 'val_bpb'} of summed nats; text_bytes: of the targets, 0 = not known."""
    result = {'val_loss' + suffix: nats / max(targets, 1)}
    if text_bytes:
        result['val_bpb' + suffix] = nats / math.log(2) / text_bytes
    return result
