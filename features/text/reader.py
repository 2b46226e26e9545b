"""
Files → tasks → documents, for a corpus of any size: packed files, .parquet, Python's standard library, pairs.

    for task in Reader(files, s).tasks(cut_of(tokenizer)):  # about TASK_SIZE bytes of text at a time
        for where, text in documents(task, s):            # 'notes/a.txt:1', 'Once …'

`s`: the settings of prepare.py. Memory does not grow with the text, but with its longest line or row, and
with its longest document if the tokenizer cannot cut it; LONGEST limits both. A small file that unpacks to
far more text than text ever shrinks by is refused: check_growth().
"""
import bz2
import codecs
import lzma
import os
import re
import sys
import zlib
from dataclasses import dataclass

from checkpoint import open_regular
from configurator import UserError
from features.text import docs, pairs
from features.text.pieces import ANYWHERE
from features.text.sources import endings
from prepare import decode, divide, parse
from tokenizer import EOT

TASK_SIZE = 2 ** 20  # bytes or characters of text in a task
LONGEST = 2 ** 27  # bytes or characters: of a line of a .jsonl, and of a document that cannot be cut
PIECE = 2 ** 10  # bytes that are unpacked at a time: at most 32 MB, whatever the format
GROWTH = 1000  # unpacked bytes for each packed one that are believed; text has 3 to 50
SMALL = 2 ** 24  # unpacked bytes that are read at any rate


@dataclass
class Task:
    """
    A unit of work for a process: whole documents, a part of a long document, or lines of a .jsonl. The tasks
    of a run depend only on its input, not on timing or the number of processes.
    """
    documents: list = ()  # [('notes.txt:1', text)]: whole documents,
    side: str = ''        # or a part of a long one, on this side of the split;
    starts: bool = True   # whether it is the first part,
    ends: bool = True     # and the last
    lines: tuple = ()  # or lines that the process parses: (bytes, path, number of the first line, its place
    # in bytes)


def documents(task, s):
    """[(where, text)] of a task. Raises UserError that names the file and the line."""
    if not task.lines:
        return task.documents
    data, path, first, offset = task.lines
    found = []
    for number, line in enumerate(decode(data, s, path, offset).split('\n'), first):
        line = line.removeprefix('\ufeff')  # files that were joined have byte-order marks inside
        if line and not line.isspace():
            where = f'{path}:{number}'
            found.append((where, pairs.text_of(parse(line, where), s, where)))
    return found


class Reader:
    """
    The files of a run, read as tasks. position: bytes read so far, of `total`. part: (number, count) of a
    range of the files, which begins after `first` bytes and ends at `last`; (1, 1) = everything.
    """

    def __init__(self, files, s, part=(1, 1)):
        self.files, self.s, self.part = files, s, part
        self.position = 0
        self.total = sum(os.path.getsize(path) for path, _ in files)
        self.first = self.total * (part[0] - 1) // part[1]
        self.last = self.total * part[0] // part[1]

    def part_at(self, position):
        """The number of the part that this position belongs to, the same on every machine."""
        return min(self.part[1], max(1, -(-position * self.part[1] // max(self.total, 1))))

    def tasks(self, cut):
        """Yield the tasks of the part. cut: where the tokenizer lets long texts be cut, see tokenizer.py."""
        batch, size = [], 0
        end = 0  # of the file, in bytes of all files
        for path, kind in self.files:
            self.position = end
            end += os.path.getsize(path)
            for task in self.tasks_of_part(path, kind, cut, end):
                is_whole = not (task.side or task.lines)
                if is_whole:  # such documents are collected, across files too
                    batch += task.documents
                    size += len(task.documents[0][1])
                if batch and (size >= TASK_SIZE or not is_whole):
                    yield Task(batch)
                    batch, size = [], 0
                if not is_whole:
                    yield task
        if batch:
            yield Task(batch)

    def tasks_of_part(self, path, kind, cut, end):
        """
        Yield the tasks of a file that belong to the part. A file without any is not opened. end: of the file.
        """
        begins = self.part_at(min(self.position + 1, end))
        if not begins <= self.part[0] <= self.part_at(end):
            return
        at = begins
        for task in self.read(path, kind, cut):
            if task.starts:  # a long document belongs to the part in which it starts
                at = max(begins, self.part_at(self.position))
            if at > self.part[0]:
                return
            if at == self.part[0]:
                yield task

    def read(self, path, kind, cut):
        """The tasks of a file: one per document, parts of a long document, or lines of a .jsonl."""
        if kind == 'text':
            return self.text(path, cut)
        if kind == 'lines':
            return self.lines(path)
        if kind == 'parquet':
            return self.parquet(path)
        if kind == 'topics':
            return self.topics(path)
        if kind == 'docs':
            return self.docs(path)
        return self.docstrings(path)

    # --- .txt ---

    def text(self, path, cut):
        """Yield the documents of a .txt, one task each; long ones in parts, unless they are pairs."""
        number, lengths = 0, None
        has_pairs = pairs.has_pairs(self.s)
        for text, starts, ends in self.parts(path, None if has_pairs else cut):
            number += starts
            where = f'{path}:{number}'
            if has_pairs:
                text = pairs.text_of(pairs.sections(text), self.s, where)
            if starts and ends:
                yield Task([(where, text)])
                continue
            if starts:
                done = 0  # characters of the document before this part
                if self.s.split == 'tail':
                    lengths = lengths or Reader((), self.s).lengths(path)
                    boundary = int(lengths[number - 1] * (1 - self.s.val_fraction))
                else:
                    is_val = divide(text, self.s)[0][0] == 'val'
                    boundary = 0 if is_val else sys.maxsize
            yield from part_tasks(where, text, done, boundary, ends)
            done += len(text)

    def parts(self, path, cut):
        """
        Yield (text, starts, ends): the documents of a .txt, those longer than two tasks in parts. A
        byte-order mark at the start of a document, from joined files, is removed.
        """
        for text, starts, ends in self.marked_parts(path, cut):
            yield text.removeprefix('\ufeff') if starts else text, starts, ends

    def marked_parts(self, path, cut):
        """parts(), with the byte-order marks."""
        text, starts, separated, held, tried = '', True, False, '', 0  # tried: up to where there is no cut
        for block, last in self.characters(path):
            block = held + block
            # The last line is held back if it is unfinished, or ends with a \r that a \n may follow: it may
            # become a separator. Of a long line only 128 characters are held back: no separator is as long as
            # that
            line = len(block) - 1 - max(block.rfind('\n'), block.rfind('\r', 0, max(0, len(block) - 1)))
            held = '' if last else block[len(block) - (line if line < 256 else 128):]
            *whole, rest = split_at_separators(block[:len(block) - len(held)])
            separated = separated or bool(whole)
            for document in whole:
                # the separator's newline
                yield (text + document).removesuffix('\n').removesuffix('\r'), starts, True
                text, starts, tried = '', True, 0
            text += rest
            while cut and len(text) > 2 * TASK_SIZE:
                place = cut.search(text, max(TASK_SIZE, tried))
                if not place:
                    tried = len(text) - 1
                    break
                yield text[:place.start()], starts, False
                text, starts, tried = text[place.start():], False, 0
            if len(text) > LONGEST:
                raise UserError(f'{path}: has a document of more than {LONGEST:,} characters, which this '
                                'tokenizer cannot cut: separate documents by lines of <|endoftext|>')
        if text or not separated:
            yield text, starts, True

    def lengths(self, path):
        """The number of characters of every document of a .txt."""
        lengths = []
        for text, starts, _ in self.parts(path, ANYWHERE):
            if starts:
                lengths.append(0)
            lengths[-1] += len(text)
        return lengths

    def characters(self, path):
        """Yield (text, whether it is the last) of a file, about one task's size at a time."""
        rest, offset, last = b'', 0, False
        blocks = filter(None, self.blocks(path))
        while not last:
            block = next(blocks, None)
            last = block is None
            data = rest + (block or b'')
            try:
                text, used = codecs.utf_8_decode(data, self.s.errors, last)
            except UnicodeDecodeError:
                decode(data, self.s, path, offset)  # raises the UserError
                raise
            yield text.removeprefix('\ufeff') if offset == 0 else text, last
            rest, offset = data[used:], offset + used

    # --- other kinds ---

    def lines(self, path):
        """Yield the lines of a .jsonl, about TASK_SIZE bytes at a time."""
        blocks, size, line, offset = [], 0, 1, 0
        for block in self.blocks(path):
            blocks.append(block)
            size += len(block)
            if size >= TASK_SIZE and b'\n' in block:
                data = b''.join(blocks)
                end = data.rindex(b'\n') + 1
                yield Task(lines=(data[:end], path, line, offset))
                line += data.count(b'\n')
                offset += end
                blocks, size = [data[end:]], len(data) - end
            if size > LONGEST:
                raise UserError(f'{path}:{line}: is a line of more than {LONGEST:,} bytes: '
                                'take a document in each line')
        if size:
            yield Task(lines=(b''.join(blocks), path, line, offset))

    def parquet(self, path):
        """Yield the rows of a .parquet, one task each."""
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError:
            raise UserError(f'{path}: reading .parquet needs pyarrow: pip install pyarrow') from None
        keys, made, start, size = pairs.fields_of(self.s), 0, self.position, os.path.getsize(path)
        try:
            with open_regular(path) as f, pyarrow.parquet.ParquetFile(f) as file:
                names = file.schema_arrow.names
                for key in keys:
                    if key not in names:
                        setting = pairs.setting_of(self.s)
                        raise UserError(f'{path}: no column {key}; it has {", ".join(names)}: '
                                        f'set --{setting}')
                check_pages(file.metadata, path)
                number = 0
                for batch in file.iter_batches(16, columns=keys):  # a row may have 16 MB
                    read = size * (number + len(batch)) // max(1, file.metadata.num_rows)
                    self.position = start + min(read, size)
                    for row in batch.to_pylist():
                        number += 1
                        where = f'{path}:{number}'
                        text = pairs.text_of(row, self.s, where)
                        made += len(text)
                        check_growth(path, made, size)
                        yield Task([(where, text)])
                if number != file.metadata.num_rows:
                    raise UserError(f'{path}: has {number:,} rows where it says {file.metadata.num_rows:,}: '
                                    'restore it')
        except UserError:
            raise
        except (pyarrow.ArrowException, OSError, MemoryError, ValueError, OverflowError) as error:
            reason = ' '.join(str(error).split())[:80]
            raise UserError(f'{path}: not a valid .parquet ({reason}): restore it') from None

    def topics(self, path):
        """Yield pydoc's chapters on the Python language, one task each."""
        from pydoc_data.topics import topics
        self.position += os.path.getsize(path)
        for name in sorted(topics):
            yield Task([(f'{path}:{name}', topics[name])])

    def docstrings(self, path):
        """Yield a pair for each function of a Python file that has a docstring, one task each."""
        self.position += os.path.getsize(path)
        for line, pair in pairs.docstring_pairs(path):
            yield Task([(f'{path}:{line}', pair)])

    def docs(self, path):
        """Yield the docstrings of a Python file, or pydoc's chapters, one task each."""
        self.position += os.path.getsize(path)
        for document in docs.documents_of(path):
            yield Task([document])

    def blocks(self, path):
        """
        Yield the decompressed bytes of a file, about TASK_SIZE at a time. Raises UserError for a damaged
        file.
        """
        unpack, fault = decompressor(path)
        if not unpack:
            with open(path, 'rb') as f:
                while block := f.read(TASK_SIZE):
                    self.position += len(block)
                    yield block
            return
        stream, made, given = unpack(), 0, 0  # unpacked and packed bytes so far
        behind = False  # whether this is behind the end of a stream, with nothing unpacked yet
        with open(path, 'rb') as f:
            while block := f.read(TASK_SIZE // 16):
                self.position += len(block)
                given += len(block)
                while block:
                    if stream.eof:
                        block = block.lstrip(b'\0')  # tapes are padded with zeros
                        if not block:
                            break
                        stream, behind = unpack(), True  # pigz and cat make several streams in a file
                    parts, at = [], 0
                    while at < len(block) and not stream.eof:
                        try:
                            parts.append(stream.decompress(block[at:at + PIECE]))
                        except fault as error:
                            if behind:
                                raise UserError(f'{path}: has extra bytes after its end: '
                                                'remove them') from None
                            raise UserError(f'{path}: damaged, or not compressed as its name says '
                                            f'({error}): restore or rename it') from None
                        at += PIECE
                        made += len(parts[-1])
                        behind = behind and not parts[-1]
                        check_growth(path, made, given)
                    block = stream.unused_data + block[at:] if stream.eof else b''
                    yield b''.join(parts)
        if not stream.eof:
            tail = ', or has extra bytes after its end' if behind else ''
            raise UserError(f'{path}: is truncated{tail}: copy it again')


def check_growth(path, made, given):
    """Raise UserError if `given` bytes of a file, which are packed, made far more text than text has."""
    if made > SMALL and made > GROWTH * given:
        raise UserError(f'{path}: {given:,} bytes of it unpack to more than {made:,}: '
                        'unpack it yourself, if this is right')


def check_pages(metadata, path):
    """
    check_growth() of a .parquet by its own figures, as a page is read whole. They are those of all columns:
    pyarrow ends the process where the figures of one column contradict its type.
    """
    for n in range(metadata.num_row_groups):
        check_growth(path, metadata.row_group(n).total_byte_size, os.path.getsize(path))


def part_tasks(where, text, done, boundary, ends):
    """
    The tasks of a part of a long document: its characters before the boundary are for training, the others
    for validation. done: characters of the document before this part; ends: whether it is the last part.
    """
    train = text[:max(0, boundary - done)]
    val = text[max(0, boundary - done):]
    if train or ends and done < boundary:
        yield Task([(where, train)], 'train', done == 0, ends or done + len(train) == boundary)
    if val or ends and done >= boundary:
        yield Task([(where, val)], 'val', done <= boundary, ends)


def decompressor(path):
    """
    (function that makes a decompressor, the exception for damaged data) of a compressed file, else (None,
    ()). All decompressors have decompress(), eof and unused_data.
    """
    packed = endings(path)[1]
    if packed == '.gz':
        return lambda: zlib.decompressobj(31), zlib.error
    if packed == '.bz2':
        return bz2.BZ2Decompressor, OSError
    if packed == '.xz':
        # the default takes zeros for .lzma
        return lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ), lzma.LZMAError
    if packed != '.zst':
        return None, ()
    try:
        import zstandard
    except ImportError:
        raise UserError(f'{path}: reading .zst needs zstandard: pip install zstandard') from None
    return zstandard.ZstdDecompressor(max_window_size=2 ** 31).decompressobj, zstandard.ZstdError


# -----------------------------------------------------------------------------
# The separators of a .txt, 20 times as fast as prepare.SEPARATOR: the regular expression begins with a
# literal

BLANKS = 50  # on either side of a separator, at most
SEPARATOR = re.compile(rf'{re.escape(EOT)}[ \t]{{0,{BLANKS}}}(?:\r\n|\r|\n|\Z)')


def split_at_separators(text):
    """The parts of a text between lines that contain only <|endoftext|>, spaces or a byte-order mark."""
    parts, start = [], 0  # start: where the line after the last separator begins
    for found in SEPARATOR.finditer(text):
        before = text[max(start, found.start() - BLANKS - 1):found.start()]
        blanks = len(before) - len(before.rstrip(' \t'))
        begins = found.start() - blanks
        if begins > start and text[begins - 1] == '\ufeff':
            begins -= 1
        if blanks <= BLANKS and (begins == start or text[begins - 1] in '\r\n'):
            parts.append(text[start:begins])
            start = found.end()
    return [*parts, text[start:]]
