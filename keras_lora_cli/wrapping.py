"""Text that may be a long path, in a column of any width."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions
from rich.measure import Measurement
from rich.text import Text

# A line may end after each of these, and elsewhere only if the column is narrower than a word.
_WORD = re.compile(r"[^/. ]*[/. ]+|[^/. ]+")


@dataclass(frozen=True)
class Wrapped:
    """Text whose lines end after a space, a slash or a dot."""

    text: str

    def __rich_measure__(self, _: Console, options: ConsoleOptions) -> Measurement:
        longest = max(map(cell_len, _WORD.findall(self.text)), default=0)
        measured = Measurement(longest, cell_len(self.text))
        return measured.with_maximum(options.max_width)

    def __rich_console__(self, _: Console, options: ConsoleOptions) -> Iterator[Text]:
        line = ""
        for word in _WORD.findall(self.text):
            if line and cell_len(line + word.rstrip()) > options.max_width:
                yield Text(line.rstrip(), overflow="fold")
                line = ""
            line += word
        yield Text(line, overflow="fold")
