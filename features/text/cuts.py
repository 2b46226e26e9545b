"""
Counts of the texts that were cut to the context of a network. Every place that cuts texts counts them here
and prints one line:

    cuts = Cuts('sources')
    for ids in sources:
        cuts.add(len(ids), 512)
    print(cuts.line())  # 37 of 1,992 sources cut to 512 tokens, losing up to 1,204
"""
from dataclasses import dataclass


@dataclass
class Cuts:
    """Counts truncated texts: how many, to how many tokens, and how many tokens were lost."""
    what: str  # what is counted, in the plural
    seen: int = 0  # texts, whether they fit or not
    cut: int = 0  # texts that did not fit
    least: int = 0  # tokens that were kept of one that did not: the fewest
    most: int = 0  # and the most
    lost: int = 0  # tokens that were cut off one of them: the most

    def add(self, length, room):
        """Count a text of `length` tokens, of which at most `room` are kept."""
        self.seen += 1
        if length <= room:
            return
        self.least = min(self.least, room) if self.cut else room
        self.most = max(self.most, room)
        self.lost = max(self.lost, length - room)
        self.cut += 1

    def line(self):
        """The counts in one line; '' if no text was truncated."""
        if not self.cut:
            return ''
        kept = f'{self.most:,}'
        if self.least < self.most:
            kept = f'{self.least:,} to {kept}'
        tokens = 'token' if self.most == 1 else 'tokens'
        return f'{self.cut:,} of {self.seen:,} {self.what} cut to {kept} {tokens}, losing up to {self.lost:,}'
