"""Paths of layers for people: many as one, and long ones in a narrow column."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions
from rich.measure import Measurement
from rich.text import Text

_NUMBERS = re.compile(r"(\d+)")
# So much of each segment of a path stays, if the column has room for it. If not, so little of those
# stays that are before the last one, which tells the layers of a block apart, and have no range.
_SHORTEST, _TRACE = 9, 4


@dataclass(frozen=True)
class PathCell:
    """A path in a table. It takes the width that is left, and is shortened in the middle."""

    path: str

    def __rich_measure__(self, _: Console, options: ConsoleOptions) -> Measurement:
        width = min(len(self.path), options.max_width)
        return Measurement(min(width, _SHORTEST), width)

    def __rich_console__(self, _: Console, options: ConsoleOptions) -> list[Text]:
        return [Text(shortened(self.path, options.max_width), no_wrap=True)]


def shortened(path: str, width: int) -> str:
    """A path in at most `width` characters: long segments lose their middle, the last one last.

    Example:

    >>> shortened("backbone/transformer_layer_12/self_attention/query", 40)
    'backbone/tra…layer_12/sel…ttention/query'
    """
    segments = path.split("/")
    sizes = [len(segment) for segment in segments]
    before, every = range(len(sizes) - 1), range(len(sizes))
    single = [i for i in before if "[" not in segments[i]]
    for some, least in ((before, _SHORTEST), (single, _TRACE), (every, _SHORTEST)):
        while _length(sizes) > width and max((sizes[i] for i in some), default=0) > least:
            sizes[max(some, key=sizes.__getitem__)] -= 1
    text = "/".join(map(_cut, segments, sizes))
    return text if len(text) <= width else _cut(path, width)


def _length(sizes: Sequence[int]) -> int:
    return sum(sizes) + len(sizes) - 1


def _cut(text: str, size: int) -> str:
    """The beginning and, since it has the number of a layer, more of the end."""
    if len(text) <= size:
        return text
    head = (size - 1) // 3
    return f"{text[:head]}…{text[len(text) - (size - 1 - head) :]}"


def template(path: str) -> str:
    """What paths have in common that differ in numbers alone."""
    return _NUMBERS.sub("0", path)


def joined(paths: Sequence[str]) -> str:
    """One text for paths of one template.

    Example:

    >>> joined([f"layer_{i}/query" for i in range(30)])
    'layer_[0-29]/query'
    >>> joined(["layer_0/dense_1", "layer_2/dense_3"])
    'layer_[0,2]/dense_[1,3]'
    """
    columns = zip(*map(_NUMBERS.split, paths), strict=True)
    return "".join(map(_range, columns))


def _range(parts: Sequence[str]) -> str:
    """The numbers at one place of the paths; the text at one place is the same in all."""
    if len(set(parts)) == 1:
        return parts[0]
    numbers = sorted(set(map(int, parts)))
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return f"[{','.join(str(r[0]) if len(r) == 1 else f'{r[0]}-{r[-1]}' for r in runs)}]"
