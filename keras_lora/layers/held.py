"""Values of a base's variable that belong to adapters: a classifier head for each task.

A variable that trains beside adapters has a value for each of them, and the base's own. One of
these values is in the variable; the others are held aside.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import keras
import numpy as np
from keras import ops

_HELD = "_lora_held"
BASE = ""  # the name under which the base's own value is held; no adapter has an empty name


class Held:
    """The values of one variable by adapter name, without that of the present holder."""

    def __init__(self, variable: keras.Variable) -> None:
        self.variable = variable
        self.holder = BASE
        self.aside: dict[str, np.ndarray] = {}

    @property
    def names(self) -> set[str]:
        return {self.holder, *self.aside}

    def value(self, name: str) -> np.ndarray:
        if name == self.holder:
            return np.array(ops.convert_to_numpy(self.variable), copy=True)
        return self.aside[name]

    def assign(self, name: str, value: Any) -> None:
        if name == self.holder:
            self.variable.assign(value)
        else:
            self.aside[name] = np.array(value, copy=True)

    def switch(self, name: str) -> None:
        """Let the variable have the value of this name."""
        if name != self.holder:
            self.aside[self.holder] = self.value(self.holder)
            self.variable.assign(self.aside.pop(name))
            self.holder = name


def held(variable: keras.Variable) -> Held | None:
    return getattr(variable, _HELD, None)


def all_held(variables: Iterable[keras.Variable]) -> list[Held]:
    return [item for variable in variables if (item := held(variable)) is not None]


def hold(variable: keras.Variable, name: str) -> Held:
    """Give an adapter a value of its own, which starts as the base's."""
    item = held(variable)
    if item is None:
        item = Held(variable)
        setattr(variable, _HELD, item)
    item.assign(name, item.value(BASE))
    return item


def release(variable: keras.Variable, name: str) -> None:
    """The inverse of `hold`. Where the adapter's value was in the variable, the base's returns."""
    item = held(variable)
    if item is None or name not in item.names:
        return
    if item.holder == name:
        item.switch(BASE)
    del item.aside[name]
    if not item.aside:
        delattr(variable, _HELD)


def forget(variable: keras.Variable) -> None:
    """Drop every value but the one in the variable."""
    if held(variable) is not None:
        delattr(variable, _HELD)
