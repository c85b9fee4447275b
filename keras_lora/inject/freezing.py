"""Which variables train. `freeze` and `thaw` are inverses: every flag comes back as it was."""

from __future__ import annotations

from collections.abc import Iterable

import keras

from keras_lora.layers import WAS_TRAINABLE, remember_flag
from keras_lora.walker import Layer, Tree


def freeze(tree: Tree, selected: Iterable[keras.Variable]) -> None:
    """Let exactly the selected variables of a model train.

    A layer without any of them is frozen as a layer too: a frozen `BatchNormalization` must not
    move its statistics.
    """
    chosen = {id(v) for v in selected}
    for layer in tree.layers:
        remember_flag(layer)
    for variable in tree.root.variables:
        remember_flag(variable)
    for layer in tree.layers:
        layer.trainable = any(id(v) in chosen for v in layer.variables)
    for variable in tree.root.variables:
        variable.trainable = id(variable) in chosen


def thaw(tree: Tree) -> None:
    """Give every layer and variable the flag that it had before `freeze`."""
    variables = [(v, original_flag(v)) for v in tree.root.variables]
    layers = [(layer, original_flag(layer)) for layer in tree.layers]
    # Parents first: to set the flag of a layer sets the flags of every layer below.
    for item, flag in layers + variables:
        item.trainable = flag
        if hasattr(item, WAS_TRAINABLE):
            delattr(item, WAS_TRAINABLE)


def original_flag(item: Layer | keras.Variable) -> bool:
    """The trainable flag from before `freeze`; the present one if it was never frozen."""
    return bool(getattr(item, WAS_TRAINABLE, item.trainable))


def own_trainable_variables(tree: Tree, layer: Layer) -> list[keras.Variable]:
    """The variables of a layer that train once nothing is frozen (no moving statistics)."""
    flags = [(v, v.trainable) for v in layer.variables]
    layers = [(item, item.trainable) for item in tree.within(layer)]
    layer.trainable = False  # on TensorFlow to set the present flag does nothing
    layer.trainable = True
    trainable = list(layer.trainable_variables)
    for item, flag in layers:
        item.trainable = flag
    for variable, flag in flags:
        variable.trainable = flag
    return trainable
