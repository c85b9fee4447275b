"""Values of a base's variable that belong to adapters: a classifier head for each task.

A variable that trains beside adapters has a value for each of them, and the base's own. One of
these values is in the variable; the others are parked.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import keras
import numpy as np

from keras_lora.layers.factors import Factor

_OWNED = "_lora_owned"
BASE = ""  # the owner of the base's own value; no adapter has an empty name


class OwnedValues:
    """The values of one variable by owner; the one of `owner` is in the variable.

    `layer` is the layer that the variable belongs to.
    """

    def __init__(self, variable: keras.Variable, layer: keras.layers.Layer) -> None:
        self.variable = variable
        self.layer = layer
        self.owner = BASE
        self._values = {BASE: Factor.inside(variable)}

    @property
    def names(self) -> set[str]:
        return set(self._values)

    @property
    def parked(self) -> dict[str, Factor]:
        """The values that are not in the variable."""
        return {name: value for name, value in self._values.items() if name != self.owner}

    @property
    def held(self) -> tuple[keras.Variable, Factor]:
        """The variable, with the value in it."""
        return self.variable, self._values[self.owner]

    def value(self, name: str) -> np.ndarray:
        return np.array(self._values[name])

    def assign(self, name: str, value: Any) -> None:
        if name in self._values:
            self._values[name].assign(value)
        else:
            self._values[name] = Factor(value, dtype=str(self.variable.dtype))

    def replace(self, name: str, value: Any) -> None:
        """Give an owner the value of another adapter of its name, whose moments are not its own."""
        factor = Factor(value, dtype=str(self.variable.dtype))
        if name == self.owner:
            factor.enter(self.variable)
        self._values[name] = factor

    def switch(self, name: str) -> None:
        """Let the variable have the value of this owner."""
        if name != self.owner:
            self._values[self.owner].leave()
            self._values[name].enter(self.variable)
            self.owner = name

    def remove(self, name: str) -> None:
        """Drop the value of an owner. Where it was in the variable, the base's returns."""
        if self.owner == name:
            self.switch(BASE)
        del self._values[name]


def owned(variable: keras.Variable) -> OwnedValues | None:
    return getattr(variable, _OWNED, None)


def all_owned(variables: Iterable[keras.Variable]) -> list[OwnedValues]:
    return [item for variable in variables if (item := owned(variable)) is not None]


def add_owner(variable: keras.Variable, layer: keras.layers.Layer, name: str) -> OwnedValues:
    """Give an adapter a value of its own of a layer's variable, which starts as the base's."""
    item = owned(variable)
    if item is None:
        item = OwnedValues(variable, layer)
        setattr(variable, _OWNED, item)
    item.assign(name, item.value(BASE))
    return item


def remove_owner(variable: keras.Variable, name: str) -> None:
    """The inverse of `add_owner`."""
    item = owned(variable)
    if item is None or name not in item.names:
        return
    item.remove(name)
    if not item.parked:
        delattr(variable, _OWNED)
