"""
What did not fit and was cut. Every place that cuts a text to the context of a network counts it here, and says it in one line at its end:

    cuts = Cuts('sources')
    for ids in sources:
        cuts.add(len(ids), 512)  # 512 of them are kept
    print(cuts.line())           # 37 of 1,992 sources were cut to 512 tokens, losing up to 1,204
"""
from dataclasses import dataclass

import numpy as np


@dataclass
class Cuts:
    """Counts of the texts that were cut. `seen`: all of them; `cut`: those that were too long."""
    what: str  # what is counted, in the plural
    seen: int = 0
    cut: int = 0
    least: int = 0  # tokens that were kept of a text that was cut: the fewest
    most: int = 0  # and the most
    lost: int = 0  # tokens that were cut off: the most

    def add(self, lengths, room):
        """Count texts of so many tokens, of which `room` are kept. Both are an int or an int64 array (texts,)."""
        lengths, room = np.broadcast_arrays(np.atleast_1d(lengths), room)
        too_long = lengths > room
        self.seen += lengths.size
        if not too_long.any():
            return
        kept = room[too_long]
        self.least = min(self.least, int(kept.min())) if self.cut else int(kept.min())
        self.most = max(self.most, int(kept.max()))
        self.lost = max(self.lost, int((lengths - room).max()))
        self.cut += int(too_long.sum())

    def line(self):
        """What was cut, without a full stop; '' where nothing was."""
        if not self.cut:
            return ''
        kept = f'{self.least:,}' if self.least == self.most else f'{self.least:,} to {self.most:,}'
        tokens = 'token' if self.most == 1 else 'tokens'
        verb = 'was' if self.cut == 1 else 'were'
        return f'{self.cut:,} of {self.seen:,} {self.what} {verb} cut to {kept} {tokens}, losing up to {self.lost:,}'
