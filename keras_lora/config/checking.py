"""What the fields of a config may be."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from keras_lora.checks import check_tokens, invalid
from keras_lora.initializers import start_of

PRESETS = ("attention", "all-linear", "convolutions", "experts", "all")

Targets = str | Sequence[str] | Callable[[Any], bool]


def check_start(init: str, alphas: Iterable[float]) -> None:
    """
    Raises:
        ValueError: a part of `W0` cannot be `s A0 B0`, since the scale `s` is not positive.
    """
    start = start_of(init)
    divides = start.has_counterpart or start.measures == "weights"
    wrong = [alpha for alpha in alphas if alpha <= 0] if divides else []
    if wrong:
        raise invalid("alpha", f"a positive number for init={init!r}", wrong[0])


def tokens_of(tokens: object) -> tuple[int, ...] | dict[str, tuple[int, ...]]:
    if not isinstance(tokens, Mapping):
        return check_tokens(tokens)
    check_names("train_tokens", list(tokens))
    if not all(map(len, tokens.values())):
        raise invalid("train_tokens", "at least one token id for each name", tokens)
    return {name: check_tokens(ids) for name, ids in tokens.items()}


def check_targets(targets: object) -> None:
    """Refuse what is no form of `targets`.

    Raises:
        ValueError: an unknown preset, or names that are no names.
    """
    if callable(targets) or targets in PRESETS:
        return
    if isinstance(targets, str):
        if targets.startswith("re:"):
            check_names("targets", [targets])
            return
        raise invalid(
            "targets",
            f"one of {PRESETS}, a pattern 're:...', a list of names, or a function of a target",
            targets,
            f"for a layer of that name write targets=[{targets!r}]",
        )
    if not check_names("targets", targets):
        raise invalid("targets", "at least one name", targets, 'try targets="all-linear"')


def check_names(field_name: str, names: object) -> tuple[str, ...]:
    """The names as a tuple.

    Raises:
        ValueError: no list, an empty name, or a regular expression that cannot be parsed.
    """
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise invalid(field_name, "a list of names", names, "put the name in a list")
    for name in names:
        if not isinstance(name, str) or not name:
            raise invalid(field_name, "names, as non-empty strings", names)
        if name.startswith("re:"):
            _check_expression(field_name, name)
    return tuple(names)


def _check_expression(field_name: str, name: str) -> None:
    try:
        re.compile(name[3:])
    except re.error as error:
        expected = f"a regular expression after 're:' ({error})"
        raise invalid(field_name, expected, name) from error


def pattern_of(field_name: str, pattern: object, check: Callable[[object], None]) -> dict[str, Any]:
    if not isinstance(pattern, Mapping):
        raise invalid(field_name, "a mapping of names to values", pattern)
    check_names(field_name, list(pattern))
    for value in pattern.values():
        check(value)
    return dict(pattern)
