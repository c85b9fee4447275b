"""A collector of everything that is wrong with an input, so that one error tells all of it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator


class Problems:
    """What is wrong with an input, one sentence each, in the order of finding.

    Functions that read a part of the input take the collector and go on after a problem. The
    function that knows the whole input raises them together.

    Example:

    >>> problems = Problems()
    >>> problems.add("r: missing")
    >>> with problems.caught(ValueError, part="lora_alpha"):
    ...     raise ValueError("expected a number")
    >>> str(problems)
    'r: missing; lora_alpha: expected a number'
    """

    def __init__(self) -> None:
        self._found: list[str] = []

    def __bool__(self) -> bool:
        return bool(self._found)

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __str__(self) -> str:
        return "; ".join(self._found)

    def add(self, *problems: str) -> None:
        self._found += problems

    @contextlib.contextmanager
    def caught(self, *errors: type[Exception], part: str = "") -> Iterator[None]:
        """Within the context, one of these errors becomes a problem of the input, or of a part."""
        try:
            yield
        except errors as error:
            self.add(f"{part}: {error}" if part else str(error))

    def raise_any(self, error: Callable[[str], Exception]) -> None:
        """Raise `error(all problems)`, if there are any."""
        if self:
            raise error(str(self))
