"""The fields of a config as values of the types that JSON and Keras's files have."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Collection, Mapping
from typing import Any

from keras_lora.checks import is_flag, is_number


def to_write(config: Any, later: Collection[str]) -> dict[str, Any]:
    """The fields by name, without later ones at their defaults."""
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    return {k: _listed(v) for k, v in values.items() if v or k not in later}


def _listed(value: Any) -> Any:
    """The value with lists in place of tuples, which JSON has not."""
    if isinstance(value, Mapping):
        return {key: _listed(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value


def make_plain(config: Any) -> None:
    """Give the fields of a config that was checked the types that JSON and Keras's files have."""
    for field_ in dataclasses.fields(config):
        object.__setattr__(config, field_.name, _plain(getattr(config, field_.name)))


def _plain(value: Any) -> Any:
    """The value without types of NumPy, enumerations and other subclasses of Python's types."""
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(map(_plain, value))
    if isinstance(value, str):
        return str.__str__(value)  # `str` would give an enumeration's name
    if is_flag(value):
        return bool(value)
    if isinstance(value, numbers.Integral):
        return int(value)
    return float(value) if is_number(value) else value
