"""The shortest names by which PEFT finds certain modules and no others."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def target_modules(adapted: Iterable[str], all_modules: Iterable[str] | None) -> list[str] | str:
    """The value of PEFT's `target_modules` that matches the adapted modules and no others.

    PEFT takes a name in a list for every module whose name ends in `.name` too. So where one
    module's whole name is the ending of another's, a regular expression stands for the list.
    Names have two segments where possible: RoBERTa's head has a module `dense` too, which
    `output.dense` does not match.

    Args:
        adapted: The names of the adapted modules.
        all_modules: The names of all modules that PEFT could match. Without them the whole names
            of the adapted modules are returned.

    Example:

    >>> target_modules(["a.0.q", "a.1.q"], ["a.0.q", "a.1.q", "a.0.k"])
    ['q']
    >>> target_modules(["a.0.output.dense"], ["a.0.output.dense"])
    ['output.dense']
    >>> target_modules(["a.0.q", "a.1.q"], None)
    ['a.0.q', 'a.1.q']
    >>> target_modules(["q"], ["q", "a.q"])
    '(q)'
    """
    names = sorted(adapted)
    if all_modules is None:
        return names
    endings = shortest_endings(names, set(all_modules) - set(names))
    if None in endings.values():
        return f"({'|'.join(re.escape(name) for name in names)})"
    return sorted({_with_owner(name, str(ending)) for name, ending in endings.items()})


def value_and_pattern(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The most common value, and `{expression: value}` for the modules with another value.

    PEFT takes the value of the first expression with `re.match(rf"(.*\\.)?({expression})$", name)`.

    Example:

    >>> value_and_pattern({"a.1.q": 8, "a.11.q": 4, "a.2.q": 8})
    (8, {'11\\\\.q': 4})
    """
    common = Counter(values.values()).most_common(1)[0][0]
    pattern = {}
    for value in sorted(set(values.values()) - {common}):
        names = [name for name, v in values.items() if v == value]
        endings = shortest_endings(names, set(values) - set(names))
        for name, ending in endings.items():
            pattern[f"^{re.escape(name)}$" if ending is None else re.escape(ending)] = value
    return common, dict(sorted(pattern.items()))


def shortest_endings(names: Sequence[str], others: Iterable[str]) -> dict[str, str | None]:
    """For each name its shortest ending of whole segments that none of `others` has, or None."""
    taken = {ending for other in others for ending in _endings(other)}
    return {name: next((e for e in _endings(name) if e not in taken), None) for name in names}


def _with_owner(name: str, ending: str) -> str:
    *_, owner, last = ("", *name.split("."))
    return ending if ending != last or not owner or owner.isdigit() else f"{owner}.{last}"


def _endings(name: str) -> list[str]:
    segments = name.split(".")
    return [".".join(segments[i:]) for i in reversed(range(len(segments)))]
