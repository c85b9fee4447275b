"""Which variables train. `freeze` and `thaw` are inverses: every flag comes back as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Set
from typing import TypeAlias

import keras

from keras_lora.layers import WAS_TRAINABLE, remember_flag
from keras_lora.walker import Layer, Tree

Item: TypeAlias = "Layer | keras.Variable"

# The attribute of a layer or variable: whether the last `freeze` froze it.
_FROZEN = "_lora_frozen"


def freeze(tree: Tree, selected: Iterable[keras.Variable]) -> None:
    """Let exactly the selected variables of a model train.

    A layer without any of them is frozen as a layer too: a frozen `BatchNormalization` must not
    move its statistics.
    """
    for item in [*tree.layers, *tree.root.variables]:
        remember_flag(item)
    let_train(tree, selected)
    for item in [*tree.layers, *tree.root.variables]:
        setattr(item, _FROZEN, not item.trainable)


def let_train(tree: Tree, selected: Iterable[keras.Variable]) -> None:
    """`freeze`, without a note of the flags from before."""
    chosen = {id(v) for v in selected}
    for layer in tree.layers:
        layer.trainable = any(id(v) in chosen for v in layer.variables)
    for variable in tree.root.variables:
        variable.trainable = id(variable) in chosen


def thawed_by_others(items: Iterable[Item]) -> list[Item]:
    """What `freeze` froze and trains nevertheless, as after `model.trainable = True`."""
    return [item for item in items if item.trainable and getattr(item, _FROZEN, False)]


def thaw(tree: Tree, held: Set[int] = frozenset()) -> None:
    """Give every layer and variable the flag that it had before `freeze`.

    Those with an id in `held` stay as they are.
    """
    items = [*tree.layers, *tree.root.variables]
    flags = [item.trainable if id(item) in held else original_flag(item) for item in items]
    # Parents first: to set the flag of a layer sets the flags of every layer below.
    for item, flag in zip(items, flags, strict=True):
        item.trainable = flag
        for name in (WAS_TRAINABLE, _FROZEN):
            if id(item) not in held and hasattr(item, name):
                delattr(item, name)


def original_flag(item: Item) -> bool:
    """The trainable flag from before `freeze`; the present one if it was never frozen."""
    return bool(getattr(item, WAS_TRAINABLE, item.trainable))


def own_trainable_variables(tree: Tree, layer: Layer) -> list[keras.Variable]:
    """The variables of a layer that train once nothing is frozen (no moving statistics)."""
    with flags_kept([*tree.within(layer), *layer.variables]):
        layer.trainable = False  # on TensorFlow to set the present flag does nothing
        layer.trainable = True
        return list(layer.trainable_variables)


@contextlib.contextmanager
def flags_kept(items: Iterable[Item]) -> Iterator[None]:
    """At the end of the context the trainable flags are as before: layers first, parents first."""
    flags = [(item, item.trainable) for item in items]
    try:
        yield
    finally:
        for item, flag in flags:
            item.trainable = flag
