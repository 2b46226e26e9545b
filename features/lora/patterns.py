"""
The regular expressions in PEFT's adapter_config.json (target_modules, rank_pattern, …), matched in bounded
time. Python's re takes more than the age of the universe for (a+)+$, and cannot be interrupted.

    patterns = Patterns('adapter_config.json')
    patterns[r'.*\\.(q|v)_proj'].matches('layers.0.q_proj')      # as re.fullmatch() does

A pattern is a function from a set of places in the name to the set of places where a match that begins
there may end, so nothing is tried twice. A set is an int with a bit for each place. This works for all that
needs no memory of the text; back references, possessive repeats and the like are refused.
"""
import re
from re import _constants as codes
from re import _parser as parser

from configurator import UserError

LONGEST = 5_000  # characters of a pattern
MOST_WORK = 10 ** 6  # steps for all patterns and names of a file, 3 s; usual ones take about 100 for a name
PLAIN = re.compile(r'\w+(\.\w+)*', re.ASCII)
CATEGORIES = {
    codes.CATEGORY_DIGIT: str.isdecimal,
    codes.CATEGORY_SPACE: str.isspace,
    codes.CATEGORY_WORD: lambda c: c.isalnum() or c == '_',
    codes.CATEGORY_NOT_DIGIT: lambda c: not c.isdecimal(),
    codes.CATEGORY_NOT_SPACE: lambda c: not c.isspace(),
    codes.CATEGORY_NOT_WORD: lambda c: not (c.isalnum() or c == '_'),
}


class TooLong(Exception):
    """The patterns of a file take more than MOST_WORK steps."""


class Patterns(dict):
    """{text: Pattern} of the file `where`, made when it is asked for. Raises UserError as Pattern does."""

    def __init__(self, where):
        super().__init__()
        self.where, self.work = where, 0

    def __missing__(self, text):
        self[text] = Pattern(text, self)
        return self[text]

    def spend(self, steps):
        self.work += steps
        if self.work > MOST_WORK:
            raise TooLong


class Pattern:
    """
    A pattern of a file, whose Patterns count the steps. Raises UserError for an invalid one, for one that is
    not supported, and for one that takes too long.
    """

    def __init__(self, text, file):
        self.text, self.file = text, file
        self.tree = None
        if PLAIN.fullmatch(text):  # most are the name of a module; a dot matches any character
            return
        try:
            if len(text) > LONGEST:
                raise ValueError(f'it has more than {LONGEST:,} characters')
            self.tree = parser.parse(text)
        except (re.error, ValueError, OverflowError, RecursionError) as error:
            raise self.refused(f'is not a valid pattern: {error}') from None
        if self.tree.state.flags & re.IGNORECASE:
            raise self.refused('is a pattern that ignores case, which is not supported')
        self.matches('')  # refuses what is not supported

    def refused(self, why):
        return UserError(f'{self.file.where}: {self.text!r:.100} {why}: name the modules, or let PEFT merge '
                         'it (merge_and_unload), then load the merged folder')

    def matches(self, name):
        """Whether the whole name matches."""
        if self.tree is None:
            return len(name) == len(self.text) and all(map(same, self.text, name))
        return self.ends(name, 1) >> len(name) & 1 == 1

    def matches_end(self, name):
        """Whether the name matches, or its end after a dot: re.match(rf'(.*\\.)?({text})$', name)."""
        starts = [0] + [n + 1 for n, c in enumerate(name) if c == '.']
        if self.tree is None:
            return any(self.matches(name[n:]) for n in starts if len(name) - n == len(self.text))
        return self.ends(name, sum(1 << n for n in starts)) >> len(name) & 1 == 1

    def ends(self, name, places):
        """The places of a name where matches that begin at `places` may end."""
        try:
            return Matching(name, self.file.spend).sequence(self.tree, places)
        except (TooLong, RecursionError):
            raise self.refused('is a pattern that takes too long') from None
        except NotImplementedError as error:
            raise self.refused(f'has {str(error).lower()}, which is not supported') from None


def same(c, other):
    return c in ('.', other)


class Matching:
    """One name while it is matched."""

    def __init__(self, name, spend):
        self.name, self.spend = name, spend
        self.all = (1 << len(name)) - 1  # places before a character

    def sequence(self, items, places):
        for op, value in items:
            if not places:
                return 0
            places = self.item(op, value, places)
        return places

    def item(self, op, value, places):
        self.spend(1)
        if op in (codes.LITERAL, codes.NOT_LITERAL, codes.ANY, codes.IN):
            return self.characters(op, value, places)
        if op is codes.BRANCH:
            found = 0
            for items in value[1]:
                found |= self.sequence(items, places)
            return found
        if op is codes.SUBPATTERN and not value[1] & re.IGNORECASE:
            return self.sequence(value[3], places)
        if op in (codes.MAX_REPEAT, codes.MIN_REPEAT):
            return self.repeat(*value, places)
        if op in (codes.ASSERT, codes.ASSERT_NOT) and value[0] == 1:
            return self.ahead(value[1], places, op is codes.ASSERT)
        if op is codes.AT:
            return sum(1 << n for n in members(places) if self.is_at(value, n))
        raise NotImplementedError(op)

    def characters(self, op, value, places):
        found = 0
        for n in members(places & self.all):
            self.spend(1)
            if is_in(op, value, self.name[n]):
                found |= 2 << n
        return found

    def repeat(self, least, most, items, places):
        found, n = 0, 0
        while places and n < least:
            before, places = places, self.sequence(items, places)
            n = least if places == before else n + 1  # equal from here on
        while places and n <= most:
            if not places & ~found:  # nothing new
                break
            found |= places
            if n < most:
                places = self.sequence(items, places)
            n += 1
        return found

    def ahead(self, items, places, wanted):
        return sum(1 << n for n in members(places) if (self.sequence(items, 1 << n) > 0) == wanted)

    def is_at(self, where, n):
        if where in (codes.AT_BEGINNING, codes.AT_BEGINNING_STRING):
            return n == 0
        if where in (codes.AT_END, codes.AT_END_STRING):
            return n == len(self.name)
        is_word = CATEGORIES[codes.CATEGORY_WORD]
        is_boundary = is_word(self.name[n - 1:n]) != is_word(self.name[n:n + 1])
        if n == 0:
            is_boundary = is_word(self.name[:1])
        if where in (codes.AT_BOUNDARY, codes.AT_NON_BOUNDARY):
            return is_boundary == (where is codes.AT_BOUNDARY)
        raise NotImplementedError(where)


def is_in(op, value, c):
    """Whether an item for one character matches it."""
    if op is codes.ANY:
        return True
    if op is codes.IN:
        is_negated = value[0][0] is codes.NEGATE
        return is_negated != any(is_in(*each, c) for each in value[is_negated:])
    if op is codes.RANGE:
        return value[0] <= ord(c) <= value[1]
    if op is codes.CATEGORY:
        return CATEGORIES[value](c)
    return (ord(c) == value) == (op is codes.LITERAL)


def members(places):
    """The numbers of the bits that are set."""
    while places:
        lowest = places & -places
        yield lowest.bit_length() - 1
        places ^= lowest
