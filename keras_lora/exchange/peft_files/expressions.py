"""The regular expressions in a config of somebody else, of which each match ends soon.

Python's `re` tries every way in which the parts of an expression can share a text, for as long as
that takes. So the ways are estimated first.
"""

from __future__ import annotations

import itertools
import math
import re
import warnings
from dataclasses import dataclass

_NAME = 64  # characters of a module's name
_MOST_WAYS = 10**8  # about a second for a name
# An escape, a set of characters, the beginning of a group, or any other character.
_TOKEN = re.compile(
    r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\((?:\?(?:P?<[^>]*>|[:=!]|<[=!]))?|.", re.DOTALL
)
_REPEAT = re.compile(r"[*+]|\{\d*,?\d*\}")
_WORD = re.compile(r"(\w|\\\.|[.-])*")


@dataclass
class _Group:
    """A group that is open: where its alternatives begin, and whether parts of it may vary."""

    starts: list[int]
    varies: bool = False


def compiled(expression: str) -> re.Pattern[str]:
    """An expression to match with names of modules.

    Raises:
        ValueError: the expression could take forever to match.
        re.error: it is no regular expression.

    Example:

    >>> bool(compiled(r".*\\.layers\\.\\d+\\.(q|v)_proj").fullmatch("model.layers.3.q_proj"))
    True
    >>> compiled("(a+)+b")
    Traceback (most recent call last):
        ...
    ValueError: matching could take forever: list the names of the modules instead
    """
    if _ways(expression) > _MOST_WAYS:
        raise ValueError("matching could take forever: list the names of the modules instead")
    with warnings.catch_warnings():
        # Python warns of syntax whose meaning may change in a later version.
        warnings.simplefilter("ignore")
        return re.compile(expression)


def _ways(expression: str) -> float:
    """An upper estimate of the ways to match a name, infinite for repeats inside repeats."""
    groups, repeats, ways, position = [_Group([0])], 0, 1.0, 0
    closed: _Group | None = None
    repeated = False
    while token := _REPEAT.match(expression, position) or _TOKEN.match(expression, position):
        position, text = token.end(), token[0]
        is_repeat = _REPEAT.fullmatch(text) is not None
        if is_repeat:
            if closed is not None and closed.varies:
                return math.inf
            repeats, groups[-1].varies = repeats + 1, True
        elif text == "?" and not repeated:  # after a repeat it says only what is tried first
            ways, groups[-1].varies = 2 * ways, True
        elif text == "|":
            groups[-1].starts.append(position)
        closed = None
        if text.startswith("("):
            groups.append(_Group([position]))
        elif text == ")" and len(groups) > 1:
            closed = groups.pop()
            ways *= _alternatives(expression, closed, token.start())
            groups[-1].varies |= closed.varies
        repeated = is_repeat
    ways *= _alternatives(expression, groups[0], position)
    return ways * math.comb(_NAME + repeats, repeats)


def _alternatives(expression: str, group: _Group, end: int) -> int:
    """How many alternatives of a group may match at one place."""
    ends = [start - 1 for start in group.starts[1:]] + [end]
    texts = [expression[a:b] for a, b in zip(group.starts, ends, strict=True)]
    group.varies |= len(texts) > 1
    words = sorted(texts)
    distinct = all(not b.startswith(a) for a, b in itertools.pairwise(words))
    return 1 if distinct and all(map(_WORD.fullmatch, texts)) else len(texts)
