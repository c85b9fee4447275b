"""Values of a base's variable that belong to adapters: a classifier head for each task.

A variable that trains beside adapters has a value for each of them, and the base's own. One of
these values is in the variable; the others are parked.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import keras
import numpy as np
from keras import ops

_OWNED = "_lora_owned"
BASE = ""  # the name under which the base owns a value; no adapter has an empty name


class OwnedValues:
    """The values of one variable by adapter name, without that of the present owner."""

    def __init__(self, variable: keras.Variable) -> None:
        self.variable = variable
        self.owner = BASE
        self.parked: dict[str, np.ndarray] = {}

    @property
    def names(self) -> set[str]:
        return {self.owner, *self.parked}

    def value(self, name: str) -> np.ndarray:
        if name == self.owner:
            return np.array(ops.convert_to_numpy(self.variable), copy=True)
        return self.parked[name]

    def assign(self, name: str, value: Any) -> None:
        if name == self.owner:
            self.variable.assign(value)
        else:
            self.parked[name] = np.array(value, copy=True)

    def switch(self, name: str) -> None:
        """Let the variable have the value of this name."""
        if name != self.owner:
            self.parked[self.owner] = self.value(self.owner)
            self.variable.assign(self.parked.pop(name))
            self.owner = name


def owned(variable: keras.Variable) -> OwnedValues | None:
    return getattr(variable, _OWNED, None)


def all_owned(variables: Iterable[keras.Variable]) -> list[OwnedValues]:
    return [item for variable in variables if (item := owned(variable)) is not None]


def add_owner(variable: keras.Variable, name: str) -> OwnedValues:
    """Give an adapter a value of its own, which starts as the base's."""
    item = owned(variable)
    if item is None:
        item = OwnedValues(variable)
        setattr(variable, _OWNED, item)
    item.assign(name, item.value(BASE))
    return item


def remove_owner(variable: keras.Variable, name: str) -> None:
    """The inverse of `hold`. Where the adapter's value was in the variable, the base's returns."""
    item = owned(variable)
    if item is None or name not in item.names:
        return
    if item.owner == name:
        item.switch(BASE)
    del item.parked[name]
    if not item.parked:
        delattr(variable, _OWNED)


def forget_owners(variable: keras.Variable) -> None:
    """Drop every value but the one in the variable."""
    if owned(variable) is not None:
        delattr(variable, _OWNED)
