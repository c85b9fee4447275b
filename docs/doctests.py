"""Lets the reference show the examples of docstrings as code: an extension of griffe."""

from __future__ import annotations

import re
from typing import Any

import griffe

# Lines from a `>>>` up to the next empty one.
_EXAMPLE = re.compile(r"^>>> .*(?:\n.+)*", re.MULTILINE)


def fenced(docstring: str) -> str:
    """A docstring in Markdown: its examples are blocks of code, its last headings are bold."""
    titled = re.sub(r"^(Example|References?):", r"**\1**", docstring, flags=re.MULTILINE)
    return _EXAMPLE.sub(lambda example: f"```pycon\n{example[0]}\n```", titled)


class Doctests(griffe.Extension):
    """Fences the examples of each object that the reference shows."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = fenced(obj.docstring.value)
