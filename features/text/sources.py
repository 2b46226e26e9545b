"""
Sources of text → documents: what prepare.py reads.

    files = find_files(['notes/', 'tinystories'])        # [(path, kind)]
    for task in Reader(files, settings).tasks(cut):      # about 1 MB of text at a time
        for where, text in documents(task, settings):    # 'notes/a.txt:1', 'Once …'

Of the settings of prepare.py it uses text_key, source, target, prompt_template, errors, split, val_fraction and chosen. Memory stays the same however much
text there is, but for the longest line or row, and a longest document that the tokenizer lets nobody part.
"""
import ast
import bz2
import codecs
import difflib
import fnmatch
import glob
import json
import lzma
import os
import re
import string
import sys
import sysconfig
import textwrap
import tokenize
import warnings
import zlib
from dataclasses import dataclass
from hashlib import blake2b

from configurator import UserError, typed_text
from features.text import docs, synthetic
from features.text.download import CORPORA, download_corpus
from tokenizer import ANYWHERE, EOT

TASK_SIZE = 2 ** 20  # bytes or characters of text in a task
HASHED = 2 ** 16  # characters of a document that decide its split
PAIR = '\x1e<|target|>\x1e'  # between the source and the target of a pair, until they are tokens
SECTIONS = ('Features', 'Words', 'Random sentence', 'Summary', 'Story')  # of a document of TinyStories-Instruct, in any order: fields for pairs
HERE = ('stdlib', 'stdlib_docs', 'stdlib_docstrings', *synthetic.NAMES)  # named corpora that are not downloaded


# -----------------------------------------------------------------------------
# Sources → files

ENDINGS = {'.txt': 'text', '.jsonl': 'lines', '.ndjson': 'lines', '.parquet': 'parquet'}
# Plain text too, but a folder of data often has a README.md: these are read where the source itself ends so, as notes/*.md does
NAMED = ('.md', '.markdown', '.rst', '.text')
PACKED = ('.gz', '.bz2', '.xz', '.zst')  # not of .parquet


def find_files(sources, left_out=None):
    """
    [(path, kind)] of all sources, in an order that is always the same. `left_out`: a dict that gets what folders and globs
    hold beside these, {what it is: [how many, the path of one]}; not_read() puts it into words.
    Raises UserError for what is missing, broken, unreadable or of no known kind.
    """
    left_out = {} if left_out is None else left_out
    found = []
    for source in sources:
        if source == 'stdlib':
            found += stdlib_files()
        elif source == 'stdlib_docstrings':
            found += [(path, 'docstrings') for path, kind in stdlib_files() if kind == 'text']
        elif source == 'stdlib_docs':
            found += [(path, 'docs') for path, _ in stdlib_files()]
        elif source in synthetic.NAMES:
            found.append((synthetic.write_text(source), 'text'))
        elif source in CORPORA:
            found += [(path, kind_of(path)) for path in download_corpus(source)]
        elif os.path.isfile(source):
            if not kind_of(source, source):
                raise UserError(f'{source}: takes .txt, .jsonl or .parquet (the first two also as .gz, .bz2, .xz or .zst; '
                                f'{", ".join(NAMED)} as .txt): rename or convert it')
            check_readable(source)
            found.append((source, kind_of(source, source)))
        else:
            found += find_in(source, left_out)
    return found


def find_in(source, left_out):
    """[(path, kind)] of the files of a folder or a glob, sorted by path; counts in `left_out` what it does not read."""
    candidates = walk(source, left_out) if os.path.isdir(source) else expand(source, left_out)
    if not candidates and not os.path.isdir(source):
        names = [*HERE, *CORPORA]
        near = difflib.get_close_matches(source, names, 1)
        raise UserError(f'{source}: no such file or folder; ' + (f'did you mean {near[0]}?' if near else f'the named corpora are {", ".join(names)}'))
    found, seen = [], set()
    for path in sorted(candidates, key=lambda path: (os.path.islink(path), path)):  # of two names, the one that is no link
        if not os.path.exists(path):
            raise UserError(f'{path}: a link to what is not there: mend or remove it')
        if candidates[path] in seen:
            leave_out(left_out, 'linked twice', path)
        elif not os.path.isfile(path):
            leave_out(left_out, 'not a file', path)  # but a pipe, a socket or a device
        elif not kind_of(path, source):
            leave_out(left_out, ''.join(endings(path)) or 'without ending', path)
        else:
            check_readable(path)
            found.append((path, kind_of(path, source)))
        seen.add(candidates[path])
    if not found:
        raise UserError(f'{source}: no .txt, .jsonl or .parquet in it' + f'; {not_read(left_out)}' * bool(left_out))
    return sorted(found)


def walk(top, left_out):
    """
    {path: real path} of everything but folders in a folder, at any depth. Links to folders are followed, but each folder is
    read once: a circle of links ends. Hidden files and folders are left out.
    """
    found, seen = {}, set()
    folders, links = [top], []
    while folders:
        folder = folders.pop()
        real = os.path.realpath(folder)
        if real not in seen:
            seen.add(real)
            for name in names_in(folder):
                path = os.path.join(folder, name)
                is_link = os.path.islink(path)
                if name.startswith('.'):
                    leave_out(left_out, 'hidden', path)
                elif os.path.isdir(path):
                    (links if is_link else folders).append(path)
                else:
                    found[path] = os.path.realpath(path) if is_link else os.path.join(real, name)
        if not folders:  # links come last: a folder with a name of its own here keeps it
            folders, links = sorted(links, reverse=True), []
    return found


def expand(pattern, left_out):
    """{path: real path} of what a glob matches, with ** for any depth. A folder that it matches is read whole."""
    paths = ['/' if pattern.startswith('/') else '']
    parts = [part for part in pattern.split('/') if part]
    while parts and parts[0] != '**':
        part = parts.pop(0)
        named = [path for path in (os.path.join(path, part) for path in paths) if os.path.lexists(path)]
        if glob.has_magic(part) and not named:  # a folder 'notes [1]' is itself, though [1] may stand for 1
            folders = [path for path in paths if os.path.isdir(path or '.')]
            named = [os.path.join(folder, name) for folder in folders for name in names_in(folder)
                     if matches(name, part)]
        paths = named
    found = {}
    for path in paths:
        if not os.path.isdir(path or '.'):
            found |= {path: os.path.realpath(path)} if not parts else {}
            continue
        for inside, real in walk(path, left_out).items():
            if fits(inside[len(path):].strip('/').split('/'), parts):
                found[inside] = real
    return found


def matches(name, part):
    """Whether a part of a glob stands for this name; for a hidden one, only if it begins with a dot itself."""
    return fnmatch.fnmatchcase(name, part) and (part.startswith('.') or not name.startswith('.'))


def fits(names, parts):
    """Whether the parts of a glob match the names of a path, or the first of them: it is in a folder that they match, then."""
    if not parts:
        return True
    if parts[0] == '**':
        return fits(names, parts[1:]) or len(names) > 1 and fits(names[1:], parts)
    return bool(names) and matches(names[0], parts[0]) and fits(names[1:], parts[1:])


def names_in(folder):
    """The names in a folder, sorted. Raises UserError where it cannot be read."""
    try:
        return sorted(os.listdir(folder or '.'))
    except OSError as error:
        raise UserError(f'{folder}: {error.strerror}: make the folder readable, or leave it out') from None


def check_readable(path):
    if not os.access(path, os.R_OK):
        raise UserError(f'{path}: Permission denied: make the file readable, or leave it out')


def leave_out(left_out, what, path):
    left_out.setdefault(what, [0, path])[0] += 1


def not_read(left_out):
    """One line of what find_files() left out, 'not read: 3 .pdf (a/x.pdf), 1 hidden (a/.git)'; '' if that is nothing."""
    if not left_out:
        return ''
    common = sorted(left_out, key=lambda what: (-left_out[what][0], what))
    named = [what for what in common if endings('x' + what)[0] in NAMED]
    said = [f'{left_out[what][0]:,} {printable(what)} ({printable(left_out[what][1])})' for what in common[:8]]
    if common[8:]:
        said.append(f'{sum(left_out[what][0] for what in common[8:]):,} others')
    line = f'not read: {", ".join(said)}'
    if named:
        line += f"; to read {named[0]}, give a glob that ends so: '**/*{named[0]}'"
    return line


def printable(path):
    """A path as text that any terminal takes, on one line."""
    return path if path.isprintable() else ascii(path)


def endings(path):
    """('.txt', '.gz') of a.txt.gz, ('.txt', '') of A.TXT: the ending of the text, and that of the packed file."""
    stem, ending = os.path.splitext(path.lower())
    if ending in PACKED:
        return os.path.splitext(stem)[1], ending
    return ending, ''


def kind_of(path, source=''):
    """text, lines or parquet by the name of a file, which `source` led to; None for what is not read."""
    ending, packed = endings(path)
    if ending in NAMED and endings(source) == (ending, packed):
        return 'text'
    if ending == '.parquet' and packed:
        return None
    return ENDINGS.get(ending)


def stdlib_files():
    """The Python sources of the standard library, each a document, and pydoc's chapters on the language. Not its tests, nor tables of code pages."""
    root, found = sysconfig.get_paths()['stdlib'], []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(f for f in folders if f not in ('site-packages', 'dist-packages', '__pycache__', 'test', 'tests', 'idle_test', 'encodings'))
        for name in sorted(names):
            if name.endswith('.py') and not name.startswith('_sysconfigdata'):
                found.append((os.path.join(folder, name), 'topics' if os.path.basename(folder) == 'pydoc_data' and name == 'topics.py' else 'text'))
    return found


# -----------------------------------------------------------------------------
# Files → tasks

@dataclass
class Task:
    """What a worker takes at a time. The tasks of a run depend on its input alone: not on timing, nor on the number of processes."""
    documents: list = ()  # whole documents, [(file:number, text)],
    side: str = ''        # or a part of a long one, with its side of the split;
    starts: bool = True   # is it the first part,
    ends: bool = True     # the last?
    lines: tuple = ()     # or lines of a .jsonl, for the worker to parse: (bytes, file, number of the first line, its place in the file)


class Reader:
    """
    The files of a run, read as tasks. `position`: bytes read so far; `total`: of how many; part: (number, count) of a stretch of them, which begins
    after `first` bytes and has `last` as its last; (1, 1) is all.
    """

    def __init__(self, files, s, part=(1, 1)):
        self.files, self.s, self.part, self.position = files, s, part, 0
        self.total = sum(os.path.getsize(path) for path, _ in files)
        self.first, self.last = (self.total * n // part[1] for n in (part[0] - 1, part[0]))

    def part_at(self, position):
        """The number of the part that has what is read at this place. It is the same on every machine, whatever part that makes."""
        return min(self.part[1], max(1, -(-position * self.part[1] // max(self.total, 1))))

    def tasks(self, cut):
        """Yield the tasks of the part. cut: where the tokenizer lets long texts be parted, see tokenizer.py."""
        end, at, batch, size = 0, 0, [], 0
        read = {'text': self.text, 'lines': self.lines, 'parquet': self.parquet, 'topics': self.topics,
                'docstrings': self.docstrings, 'docs': self.docs}
        for path, kind in self.files:
            self.position, end = end, end + os.path.getsize(path)
            begins = self.part_at(min(self.position + 1, end))
            if not begins <= self.part[0] <= self.part_at(end):
                continue  # it is not opened
            for task in read[kind](path, cut):
                at = max(begins, self.part_at(self.position)) if task.starts else at  # a document is whole where it starts
                if at > self.part[0]:
                    break
                if at < self.part[0]:
                    continue
                whole = not (task.side or task.lines)
                if whole:  # documents are collected over files
                    batch += task.documents
                    size += len(task.documents[0][1])
                if batch and (size >= TASK_SIZE or not whole):
                    yield Task(batch)
                    batch, size = [], 0
                if not whole:
                    yield task
        if batch:
            yield Task(batch)

    def blocks(self, path):
        """The bytes of a file, unpacked, about a task's worth at a time. Raises UserError for a damaged one."""
        unpack, fault = decompressor(path)
        stream = unpack and unpack()
        behind = False  # is this behind the end of a stream, with nothing unpacked yet?
        with open(path, 'rb') as f:
            while block := f.read(TASK_SIZE // 16 if stream else TASK_SIZE):
                self.position += len(block)
                while block and stream:
                    if stream.eof:
                        block = block.lstrip(b'\0')  # tapes are padded so
                        if not block:
                            break
                        stream, behind = unpack(), True  # several streams in a file, as pigz and cat make them
                    try:
                        data = stream.decompress(block)
                    except fault as error:
                        if behind:
                            raise UserError(f'{path}: has bytes behind its end that are none of it: cut them off') from None
                        raise UserError(f'{path}: damaged, or not packed as its name says ({error}): restore or rename it') from None
                    behind = behind and not data
                    yield data
                    block = stream.unused_data if stream.eof else b''
                yield block
        if stream and not stream.eof:
            tail = ', or has bytes behind its end that are none of it' if behind else ''
            raise UserError(f'{path}: ends in the middle: it was not copied whole{tail}')

    def characters(self, path):
        """Yield (text, is it the last) of a file, about a task's worth at a time."""
        rest, offset, last = b'', 0, False
        blocks = filter(None, self.blocks(path))
        while not last:
            block = next(blocks, None)
            data, last = rest + (block or b''), block is None
            try:
                text, used = codecs.utf_8_decode(data, self.s.errors, last)
            except UnicodeDecodeError as error:
                raise not_utf8(path, offset + error.start) from None
            yield text.removeprefix('\ufeff') if offset == 0 else text, last  # the byte order mark of some editors
            rest, offset = data[used:], offset + used

    def parts(self, path, cut):
        """
        Yield (text, starts, ends): the documents of a .txt, those longer than two tasks in parts. Where files
        were put one behind another, documents may begin with a byte-order mark: it is taken off.
        """
        for text, starts, ends in self.marked_parts(path, cut):
            yield text.removeprefix('\ufeff') if starts else text, starts, ends

    def marked_parts(self, path, cut):
        """parts(), with the byte-order marks."""
        text, starts, separated, held = '', True, False, ''
        for block, last in self.characters(path):
            block = held + block
            # A line that is unfinished, or ends with a \r that a \n may follow, may turn out a separator: it is held back. Of
            # a long line, the last 128 characters: as no separator is as long, neither they nor what is before them is one
            line = len(block) - 1 - max(block.rfind('\n'), block.rfind('\r', 0, max(0, len(block) - 1)))
            held = block[len(block) - (line if line < 256 else 128):] if not last else ''
            *whole, rest = split_at_separators(block[:len(block) - len(held)])
            separated = separated or bool(whole)
            for document in whole:
                yield (text + document).removesuffix('\n').removesuffix('\r'), starts, True  # the separator's own newline
                text, starts = '', True
            text += rest
            while cut and len(text) > 2 * TASK_SIZE and (place := cut.search(text, TASK_SIZE)):
                yield text[:place.start()], starts, False
                text, starts = text[place.start():], False
        if text or not separated:
            yield text, starts, True

    def text(self, path, cut):
        """The documents of a .txt, a task each."""
        number, lengths = 0, None
        for text, starts, ends in self.parts(path, None if self.s.pairs else cut):
            number += starts
            if self.s.pairs:
                text = text_of(sections(text), self.s, f'{path}:{number}')
            if starts and ends:
                yield Task([(f'{path}:{number}', text)])
                continue
            if starts:
                done, boundary = 0, 0 if divide(text, self.s)[0][0] == 'val' else sys.maxsize  # the character where val begins
                if self.s.split == 'tail':
                    lengths = lengths or Reader((), self.s).lengths(path)
                    boundary = int(lengths[number - 1] * (1 - self.s.val_fraction))
            train, val = text[:max(0, boundary - done)], text[max(0, boundary - done):]
            if train or ends and done < boundary:
                yield Task([(f'{path}:{number}', train)], 'train', done == 0, ends or done + len(train) == boundary)
            if val or ends and done >= boundary:
                yield Task([(f'{path}:{number}', val)], 'val', done <= boundary, ends)
            done += len(text)

    def lengths(self, path):
        """Characters of every document of a .txt."""
        lengths = []
        for text, starts, _ in self.parts(path, ANYWHERE):
            lengths += [0] if starts else []
            lengths[-1] += len(text)
        return lengths

    def topics(self, path, cut):
        """pydoc's chapters on the language, each a document."""
        from pydoc_data.topics import topics
        self.position += os.path.getsize(path)
        for name in sorted(topics):
            yield Task([(f'{path}:{name}', topics[name])])

    def docstrings(self, path, cut):
        """The functions of a Python file that say what they do, each a pair: its code without the docstring, and the first line of that."""
        self.position += os.path.getsize(path)
        try:
            with tokenize.open(path) as f, warnings.catch_warnings(action='ignore'):
                code = f.read()
                tree = ast.parse(code)
        except (SyntaxError, ValueError):  # a template, or another version's
            return
        lines = code.split('\n')  # as Python counts them: splitlines() ends one at a form feed too
        for node in ast.walk(tree):
            said = ast.get_docstring(node) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) else None
            if said and len(node.body) > 1 and node.lineno < node.body[0].lineno and node.body[0].end_lineno < node.body[1].lineno:
                source = lines[node.lineno - 1:node.body[0].lineno - 1] + lines[node.body[0].end_lineno:node.end_lineno]
                yield Task([(f'{path}:{node.lineno}', textwrap.dedent('\n'.join(source)) + PAIR + said.partition('\n')[0])])

    def docs(self, path, cut):
        """The docstrings of a Python file, or pydoc's chapters, each a document."""
        self.position += os.path.getsize(path)
        for document in docs.documents_of(path):
            yield Task([document])

    def lines(self, path, cut):
        """The lines of a .jsonl, about a task's worth at a time."""
        blocks, size, line, offset = [], 0, 1, 0
        for block in self.blocks(path):
            blocks.append(block)
            size += len(block)
            if size >= TASK_SIZE and b'\n' in block:
                data = b''.join(blocks)
                end = data.rindex(b'\n') + 1
                yield Task(lines=(data[:end], path, line, offset))
                line, offset = line + data.count(b'\n'), offset + end
                blocks, size = [data[end:]], len(data) - end
        if size:
            yield Task(lines=(b''.join(blocks), path, line, offset))

    def parquet(self, path, cut):
        """The rows of a .parquet, a task each."""
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError:
            raise UserError(f'{path}: reading .parquet takes pyarrow: pip install pyarrow') from None
        keys, number, start = ','.join(fields_of(self.s)).split(','), 0, self.position
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                for key in keys:
                    if key not in file.schema_arrow.names:
                        raise UserError(f'{path}: no column {key}; it has {", ".join(file.schema_arrow.names)}: set --{names_of(self.s)}')
                for batch in file.iter_batches(256, columns=keys):
                    self.position = start + os.path.getsize(path) * (number + len(batch)) // file.metadata.num_rows
                    for row in batch.to_pylist():
                        number += 1
                        yield Task([(f'{path}:{number}', text_of(row, self.s, f'{path}:{number}'))])
        except (pyarrow.ArrowException, UnicodeDecodeError) as error:
            raise UserError(f'{path}: not a sound .parquet ({str(error)[:80]}): restore it') from None


def decompressor(path):
    """(what makes a decompressor, the fault it finds) for a packed file, else None; all have decompress(), eof and unused_data."""
    packed = endings(path)[1]
    if packed == '.gz':
        return lambda: zlib.decompressobj(31), zlib.error
    if packed == '.bz2':
        return bz2.BZ2Decompressor, OSError
    if packed == '.xz':
        return lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ), lzma.LZMAError  # by itself it takes zeros for .lzma
    if packed != '.zst':
        return None, ()
    try:
        import zstandard
    except ImportError:
        raise UserError(f'{path}: reading .zst takes zstandard: pip install zstandard') from None
    return zstandard.ZstdDecompressor(max_window_size=2 ** 31).decompressobj, zstandard.ZstdError


BLANKS = 50  # on either side of a separator, at most
SEPARATOR = re.compile(rf'{re.escape(EOT)}[ \t]{{0,{BLANKS}}}(?:\r\n|\r|\n|\Z)')  # a literal first: ten times as fast as ^[ \t]*


def split_at_separators(text):
    """
    The parts of a text between its separators, lines of <|endoftext|> with blanks, tabs and a byte-order mark
    beside it at most.
    """
    parts, start = [], 0  # start: where the line after the last separator begins
    for found in SEPARATOR.finditer(text):
        before = text[max(start, found.start() - BLANKS - 1):found.start()]
        blanks = len(before) - len(before.rstrip(' \t'))
        begins = found.start() - blanks
        if begins > start and text[begins - 1] == '\ufeff':  # here begins a file that was put behind
            begins -= 1
        if blanks <= BLANKS and (begins == start or text[begins - 1] in '\r\n'):
            parts.append(text[start:begins])
            start = found.end()
    return [*parts, text[start:]]


# -----------------------------------------------------------------------------
# Tasks → documents

def documents(task, s):
    """[(file:number, text)] of a task. Raises UserError that names file and line."""
    if not task.lines:
        return task.documents
    data, path, first, offset = task.lines
    try:
        lines = data.decode('utf-8', s.errors).split('\n')
    except UnicodeDecodeError as error:
        raise not_utf8(path, offset + error.start) from None
    found = []
    for number, line in enumerate(lines, first):
        line = line.removeprefix('\ufeff')  # of a file that was put behind another
        if line and not line.isspace():
            where = f'{path}:{number}'
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f'{where}: broken JSON ({error}): mend or remove the line') from None
            if not isinstance(row, dict):
                raise UserError(f'{where}: takes an object with the field {" and ".join(fields_of(s))}, got a {type(row).__name__}')
            found.append((where, text_of(row, s, where)))
    return found


def sections(text):
    """{name: text} of the SECTIONS of a document, which begin a line with their name and a colon; '' of one that is not there."""
    before, *found = re.split(rf'^({"|".join(SECTIONS)}):', text, flags=re.MULTILINE)
    return dict.fromkeys(SECTIONS, '') | {name: part.strip() for name, part in zip(found[::2], found[1::2])}


def template_fields(template):
    """The fields of a prompt template, NAME of {NAME}; {{ stands for {. Raises ValueError for what is no such template."""
    parts = list(string.Formatter().parse(template))
    if any(spec or conversion for _, _, spec, conversion in parts) or not all(name is None or re.fullmatch(r'\w[\w ]*', name) for _, name, _, _ in parts):
        raise ValueError('has braces that are no {FIELD}')
    return [name for _, name, _, _ in parts if name is not None]


def check_template(template):
    """Raise ValueError, in one line, for what cannot be the setting prompt_template."""
    typed_text(template, 'prompt_template')
    try:
        if template and not template_fields(template):
            raise ValueError('has no {FIELD} in it')
    except ValueError as error:
        raise ValueError(f'prompt_template={template!r}: {error}: takes text with fields in braces, {{{{ for a brace') from None


def fill(template, row):
    """A template, read by typed_text(), with the fields of a row; paragraphs of empty fields are left out."""
    paragraphs = []
    for paragraph in typed_text(template, 'prompt_template').split('\n\n'):
        names = template_fields(paragraph)
        if not names or any(row[name].strip() for name in names):
            paragraphs.append(''.join(text + (row[name] if name else '') for text, name, *_ in string.Formatter().parse(paragraph)))
    return '\n\n'.join(paragraphs)


def fields_of(s):
    """Which fields a row's texts are, several of one with commas between them."""
    return (','.join(template_fields(s.prompt_template)) if s.prompt_template else s.source, s.target) if s.pairs else (s.text_key,)


def names_of(s):
    """The settings that name them."""
    return 'prompt_template and --target' if s.prompt_template else 'source and --target' if s.pairs else 'text_key'


def text_of(row, s, where):
    """The text of a row: its fields of text_key joined with a newline, but for empty ones; of a pair the source, PAIR and the target, '' if one is blank."""
    texts = []
    for keys in fields_of(s):
        found, is_source = {}, s.pairs and not texts
        for key in keys.split(','):
            if key not in row:
                raise UserError(f'{where}: no field {key}; it has {", ".join(row)}: set --{names_of(s)}')
            value = row[key]
            if s.pairs and not is_source and isinstance(value, list):  # several summaries of one text: the first is learned
                value = next((text for text in value if not isinstance(text, str) or text.strip()), None)
            if not isinstance(value, str | None):
                raise UserError(f'{where}: field {key} holds a {type(value).__name__}, not text: set --{names_of(s)}')
            found[key] = value.replace(PAIR, ' ') if value else ''
        texts.append(fill(s.prompt_template, found) if is_source and s.prompt_template else '\n'.join(filter(None, found.values())))
    text = PAIR.join(texts) if all(map(str.strip, texts)) or len(texts) == 1 else ''
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can write half a surrogate pair, which is no character
        if s.errors == 'strict':
            raise UserError(f'{where}: field {" or ".join(fields_of(s))} holds half a surrogate pair: mend it, or use --errors=replace') from None
        text = text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')
    return text


def not_utf8(path, offset):
    return UserError(f'{path}: byte {offset} is not UTF-8: convert the file, or use --errors=replace')


def hash_of(text):
    """A number from 0 to 2**64 - 1 that decides the split of a document: of a pair, its source decides."""
    return int.from_bytes(blake2b(text.partition(PAIR)[0][:HASHED].encode(), digest_size=8).digest(), 'big')


def divide(text, s):
    """A document → [(split, its text)]."""
    if s.split == 'document':
        number = hash_of(text)
        is_val = number < s.val_fraction * 2 ** 64 if s.chosen is None else number in s.chosen
        return [('val' if is_val else 'train', text)]
    n = int(len(text) * (1 - s.val_fraction))  # as nanoGPT cuts Shakespeare
    return [(split, part) for split, part in (('train', text[:n]), ('val', text[n:])) if part]
