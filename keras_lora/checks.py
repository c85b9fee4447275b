"""The form of error messages (expected, received, fix), and the line that warnings point at."""

from __future__ import annotations

import inspect
import math
import numbers
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np

# The packages whose frames a warning skips, to point at the line that a user wrote.
_PASSED_OVER = {"keras_lora", "keras_lora_cli", "keras", "keras_hub", "contextlib"}


class AdapterFileError(ValueError):
    """An adapter's files cannot be read, written or used; the message says why, and the fix.

    Example:

    >>> from keras_lora.files.adapter_files import read_adapter_files
    >>> try:
    ...     read_adapter_files("nowhere")
    ... except AdapterFileError as error:
    ...     print(str(error)[:70])
    Invalid 'nowhere/adapter.safetensors': expected a path that can be use
    """


def invalid(name: str, expected: str, received: object, fix: str = "") -> ValueError:
    """The project's one form of message for a bad argument."""
    message = f"Invalid `{name}`: expected {expected}. Received: {name}={received!r}"
    return ValueError(f"{message}; {fix}." if fix else f"{message}.")


def invalid_file(
    path: str | os.PathLike[str], expected: str, received: object, fix: str
) -> AdapterFileError:
    """The project's one form of message for a bad file or directory of an adapter."""
    name = os.fspath(path)
    return AdapterFileError(f"Invalid {name!r}: expected {expected}. Received: {received}; {fix}.")


def given_path(path: str | os.PathLike[str]) -> Path:
    """A path as a user gave it; `~` is the home directory, as in a shell.

    Raises:
        ValueError: an empty path, which for Python is the working directory.

    Example:

    >>> given_path("~/adapters").is_absolute()
    True
    """
    if not os.fspath(path):
        raise invalid("path", "a path", path, "the working directory is '.'")
    return Path(path).expanduser()


def check_rank(rank: object) -> None:
    if isinstance(rank, bool) or not isinstance(rank, numbers.Integral) or rank < 1:
        raise invalid("rank", "a positive integer", rank, "try rank=8")


def check_tokens(tokens: object) -> tuple[int, ...]:
    """Token ids in sorted order.

    Raises:
        ValueError: no list of different integers from 0 on.
    """
    expected = "a list of different token ids, as integers from 0 on"
    if isinstance(tokens, str | bytes) or not isinstance(tokens, Sequence | np.ndarray):
        raise invalid("train_tokens", expected, tokens)
    wrong = [t for t in tokens if is_flag(t) or not isinstance(t, numbers.Integral) or t < 0]
    if wrong or len(set(tokens)) < len(tokens):
        wrong = wrong or sorted({t for t in tokens if list(tokens).count(t) > 1})
        raise invalid("train_tokens", expected, wrong)
    return tuple(sorted(map(int, tokens)))


def check_alpha(alpha: object) -> None:
    if not is_finite(alpha):
        raise invalid("alpha", "a finite number", alpha, "try alpha=2 * rank")


def is_finite(value: object) -> bool:
    return is_number(value) and math.isfinite(value)  # type: ignore[arg-type]


def is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def is_flag(value: object) -> bool:
    return isinstance(value, bool | np.bool_)


def warn(message: str) -> None:
    """Warn at the line that called into this package, however deep in it the warning arises."""
    frame, level = inspect.currentframe(), 1
    while frame is not None and _is_passed_over(frame.f_globals.get("__name__", "")):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def _is_passed_over(module: str) -> bool:
    return module.split(".", maxsplit=1)[0] in _PASSED_OVER
