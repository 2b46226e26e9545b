"""
Sources of text → files: what prepare.py reads, and the corpora that it knows by name.

    left_out = {}
    files = find_files(['notes/', 'tinystories'], left_out)   # [(path, kind)]
    print(not_read(left_out))                                 # not read: 3 .pdf (notes/x.pdf)
"""
import difflib
import fnmatch
import glob
import os
import sysconfig

from configurator import UserError
from features.text import synthetic
from features.text.download import CORPORA, download_corpus
from prepare import KINDS

# named corpora that are not downloaded
HERE = ('stdlib', 'stdlib_docs', 'stdlib_docstrings', *synthetic.NAMES)


# -----------------------------------------------------------------------------
# Named corpora

def named_corpora():
    """The names of all corpora that prepare.py makes or downloads by name."""
    return [*HERE, *CORPORA]


def name_of(sources):
    """The name of the corpus if it is the only source, else ''."""
    return sources[0] if len(sources) == 1 and sources[0] in named_corpora() else ''


def folder_of(sources):
    """
    The default of --out: data/NAME for a single named corpus, else ''. Raises UserError for a missing source,
    because a misspelt name is more likely than a missing --out.
    """
    name = name_of(sources)
    if name:
        return os.path.join('data', name.removeprefix('synthetic:'))
    find_files([source for source in sources if source not in CORPORA])
    return ''


def usual_fraction(sources):
    """The default of val_fraction, before its limit for large corpora; higher for small named corpora."""
    name = name_of(sources)
    if name == 'shakespeare':
        return 0.1
    return 0.05 if name in HERE else 0.01


# -----------------------------------------------------------------------------
# Sources → files

ENDINGS = {**KINDS, '.parquet': 'parquet'}
# Plain text too. A folder of data often has a README.md, so these are read only if the source ends so, as
# notes/*.md does
NAMED = ('.md', '.markdown', '.rst', '.text')
PACKED = ('.gz', '.bz2', '.xz', '.zst')  # of .txt and .jsonl


def find_files(sources, left_out=None):
    """
    [(path, kind)] of all sources, always in the same order. left_out: a dict that gets the other contents of
    folders, {ending or reason: [count, one path]}; not_read() formats it as a line. Raises UserError for
    sources that are missing, broken, unreadable or of an unknown kind.
    """
    left_out = {} if left_out is None else left_out
    found = []
    for source in sources:
        if source in named_corpora():
            found += corpus_files(source)
        elif os.path.isfile(source):
            found.append((source, check_file(source)))
        else:
            found += find_in(source, left_out)
    return found


def corpus_files(name):
    """[(path, kind)] of a named corpus, which is downloaded or made if necessary."""
    if name == 'stdlib':
        return stdlib_files()
    if name == 'stdlib_docs':
        return [(path, 'docs') for path, _ in stdlib_files()]
    if name == 'stdlib_docstrings':
        return [(path, 'docstrings') for path, kind in stdlib_files() if kind == 'text']
    if name in synthetic.NAMES:
        return [(synthetic.write_text(name), 'text')]
    return [(path, kind_of(path)) for path in download_corpus(name)]


def stdlib_files():
    """
    [(path, kind)] of the Python files of the standard library, one document each, and of pydoc's chapters on
    the language. Its tests and encoding tables are left out.
    """
    skipped = ('site-packages', 'dist-packages', '__pycache__', 'test', 'tests', 'idle_test', 'encodings')
    found = []
    for folder, folders, names in os.walk(sysconfig.get_paths()['stdlib']):
        folders[:] = sorted(name for name in folders if name not in skipped)
        for name in sorted(names):
            path = os.path.join(folder, name)
            if path.endswith('pydoc_data/topics.py'):
                found.append((path, 'topics'))
            elif name.endswith('.py') and not name.startswith('_sysconfigdata'):
                found.append((path, 'text'))
    return found


def check_file(path):
    """The kind of a source file. Raises UserError if it cannot be read."""
    kind = kind_of(path, path)
    if not kind:
        raise UserError(f'{path}: takes .txt, .jsonl or .parquet (the first two also as .gz, .bz2, '
                        f'.xz or .zst; {", ".join(NAMED)} as .txt): rename or convert it')
    check_readable(path)
    return kind


def find_in(source, left_out):
    """
    [(path, kind)] of the files of a folder or a glob, sorted by path. Files that are not read are counted in
    `left_out`.
    """
    is_folder = os.path.isdir(source)
    candidates = walk(source, left_out) if is_folder else expand(source, left_out)
    if not candidates and not is_folder:
        raise missing(source)
    found, seen = [], set()
    # a file's own name before links to it
    for path in sorted(candidates, key=lambda path: (os.path.islink(path), path)):
        if not os.path.exists(path):
            raise UserError(f'{path}: a broken link: fix or remove it')
        kind = kind_of(path, source)
        if candidates[path] in seen:
            leave_out(left_out, 'linked twice', path)
        elif not os.path.isfile(path):
            leave_out(left_out, 'not a file', path)  # a pipe, a socket or a device
        elif not kind:
            leave_out(left_out, ''.join(endings(path)) or 'without ending', path)
        else:
            check_readable(path)
            found.append((path, kind))
        seen.add(candidates[path])
    if not found:
        rest = f'; {not_read(left_out)}' if left_out else ''
        raise UserError(f'{source}: no .txt, .jsonl or .parquet in it{rest}')
    return sorted(found)


def missing(source):
    """The UserError for a source that does not exist."""
    names = named_corpora()
    near = difflib.get_close_matches(source, names, 1)
    hint = f'did you mean {near[0]}?' if near else f'the named corpora are {", ".join(names)}'
    return UserError(f'{source}: no such file or folder; {hint}')


def walk(top, left_out):
    """
    {path: real path} of all files in a folder, recursively. Links to folders are followed, but each folder is
    read once, so that a cycle of links ends. Hidden files and folders are left out.
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
                elif os.path.isdir(path) and is_link:
                    links.append(path)
                elif os.path.isdir(path):
                    folders.append(path)
                else:
                    found[path] = os.path.realpath(path) if is_link else os.path.join(real, name)
        if not folders:  # links come last, so that a folder inside `top` keeps its own name
            folders, links = sorted(links, reverse=True), []
    return found


def expand(pattern, left_out):
    """
    {path: real path} of the files that a glob matches; ** matches any depth. A matching folder is read
    recursively.
    """
    paths = ['/' if pattern.startswith('/') else '']
    parts = [part for part in pattern.split('/') if part]
    while parts and parts[0] != '**':
        paths = step(paths, parts.pop(0))
    found = {}
    for path in paths:
        if os.path.isdir(path or '.'):
            for inside, real in walk(path, left_out).items():
                if fits(inside[len(path):].strip('/').split('/'), parts):
                    found[inside] = real
        elif not parts:
            found[path] = os.path.realpath(path)
    return found


def step(paths, part):
    """The paths that match one part of a glob."""
    named = [os.path.join(path, part) for path in paths if os.path.lexists(os.path.join(path, part))]
    if named or not glob.has_magic(part):  # a folder 'notes [1]' is itself, though [1] may stand for 1
        return named
    found = []
    for folder in paths:
        if os.path.isdir(folder or '.'):
            found += [os.path.join(folder, name) for name in names_in(folder) if matches(name, part)]
    return found


def matches(name, part):
    """Whether a part of a glob matches a name; hidden names need a dot at the beginning of the part."""
    return fnmatch.fnmatchcase(name, part) and (part.startswith('.') or not name.startswith('.'))


def fits(names, parts):
    """
    Whether the parts of a glob match the names of a path, or its first names, so that the path is inside a
    match.
    """
    if not parts:
        return True
    if parts[0] == '**':
        return fits(names, parts[1:]) or len(names) > 1 and fits(names[1:], parts)
    return bool(names) and matches(names[0], parts[0]) and fits(names[1:], parts[1:])


def names_in(folder):
    """The names in a folder, sorted. Raises UserError if it cannot be read."""
    try:
        return sorted(os.listdir(folder or '.'))
    except OSError as error:
        raise UserError(f'{folder}: {error.strerror}: make the folder readable, or leave it out') from None


def check_readable(path):
    if not os.access(path, os.R_OK):
        raise UserError(f'{path}: Permission denied: make the file readable, or leave it out')


def endings(path):
    """('.txt', '.gz') of a.txt.gz, ('.txt', '') of A.TXT: the endings of the text and of the compression."""
    stem, ending = os.path.splitext(path.lower())
    if ending in PACKED:
        return os.path.splitext(stem)[1], ending
    return ending, ''


def kind_of(path, source=''):
    """text, lines or parquet by the name of a file, which was found by `source`; None for other files."""
    ending, packed = endings(path)
    if ending in NAMED and endings(source) == (ending, packed):
        return 'text'
    if ending == '.parquet' and packed:
        return None
    return ENDINGS.get(ending)


# -----------------------------------------------------------------------------
# Files that are left out

def leave_out(left_out, reason, path):
    left_out.setdefault(reason, [0, path])[0] += 1


def not_read(left_out):
    """
    A line about the files that find_files() left out, 'not read: 3 .pdf (a/x.pdf), 1 hidden (a/.git)'; '' if
    there are none.
    """
    if not left_out:
        return ''
    common = sorted(left_out, key=lambda reason: (-left_out[reason][0], reason))
    listed = [f'{left_out[reason][0]:,} {printable(reason)} ({printable(left_out[reason][1])})'
              for reason in common[:8]]
    if common[8:]:
        listed.append(f'{sum(left_out[reason][0] for reason in common[8:]):,} others')
    line = f'not read: {", ".join(listed)}'
    text = [reason for reason in common if endings('x' + reason)[0] in NAMED]
    if text:
        line += f"; to read {text[0]}, give a glob that ends so: '**/*{text[0]}'"
    return line


def printable(path):
    """A path as text on one line that any terminal can show."""
    return path if path.isprintable() else ascii(path)
