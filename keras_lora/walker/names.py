"""Layers by their names, as a user writes them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence

from keras_lora.walker.tree import Node


def matches(name: str, path: str) -> bool:
    """Whether a name, as a user writes it, names the layer at `path`.

    Example:

    >>> matches("attention.query", "block/attention/query"), matches("foo", "block/foobar")
    (True, False)
    >>> matches("re:.*/query", "block/attention/query")
    True
    """
    if name.startswith("re:"):
        return re.fullmatch(name[3:], path) is not None
    wanted, segments = _segments(name), _segments(path)
    exact = segments[-len(wanted) :] == wanted
    return exact or _segments(re.sub(r"#\d+", "", path))[-len(wanted) :] == wanted


def match_names(names: Iterable[str], nodes: Sequence[Node], argument: str) -> list[Node]:
    """The nodes that the names match.

    Raises:
        ValueError: a name matches no layer.
    """
    names = list(names)
    missing = [n for n in names if not any(matches(n, node.path) for node in nodes)]
    if missing:
        raise unmatched(argument, missing, [node.path for node in nodes])
    return [node for node in nodes if any(matches(name, node.path) for name in names)]


def _segments(path: str) -> list[str]:
    return path.replace(".", "/").split("/")


def listed(nodes: Sequence[Node]) -> str:
    classes = (type(n.layer) for n in nodes)
    return ", ".join(
        f"'{n.path}' ({c.__module__}.{c.__qualname__})"
        for n, c in zip(nodes[:5], classes, strict=False)
    ) + (f" and {len(nodes) - 5} more" if len(nodes) > 5 else "")


def unmatched(argument: str, missing: Sequence[str], paths: Sequence[str]) -> ValueError:
    close = {
        match
        for name in missing
        for match in difflib.get_close_matches(
            name, sorted({p.split("/")[-1] for p in paths} | set(paths)), n=3, cutoff=0.4
        )
    }
    return ValueError(
        f"Expected every name in `{argument}` to match a layer. Received: {list(missing)}, which "
        f"match none. Closest: {sorted(close)}. The model has: {shortened(paths)}."
    )


def shortened(paths: Sequence[str]) -> str:
    shown = ", ".join(paths[:20])
    return f"{shown} and {len(paths) - 20} more" if len(paths) > 20 else shown
