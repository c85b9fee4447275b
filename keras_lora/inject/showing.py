"""`model.summary()` of an adapted model: Keras's own table, in which adapted layers are named.

An adapted class has the name of its base, from which Keras makes the paths of a weights file
(`LoRALayer.__init_subclass__`); the table prints that name too. So Keras is given stand-ins, whose
classes have the names to print. The layers themselves stay as they are, for other threads too.

Private Keras API in this file, and why (`tests/test_private_api.py` watches each):
    `_operations`: the rows of the table of a Functional model.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import keras

from keras_lora.layers import LoRALayer
from keras_lora.walker import Tree


def name_adapted(tree: Tree) -> None:
    """Let `summary` name the adapted layers. The inverse is `name_none`."""
    for model in tree.models:
        model.summary = partial(_summary, model)


def name_none(tree: Tree) -> None:
    """The inverse of `name_adapted`."""
    for model in tree.models:
        vars(model).pop("summary", None)


def _summary(model: keras.Model, *args: Any, **kwargs: Any) -> None:
    type(model).summary(_StandIn(model, type(model)), *args, **kwargs)


class _StandIn:
    """A layer or a model for Keras's table, which differs in its class alone."""

    def __init__(self, layer: Any, shown_class: type) -> None:
        self._layer, self._shown_class = layer, shown_class

    @property  # type: ignore[misc]  # typeshed lets it be assigned to
    def __class__(self) -> type:
        return self._shown_class

    @property
    def layers(self) -> list[_StandIn]:
        return list(map(_row, self._layer.layers))

    @property
    def _operations(self) -> list[_StandIn]:
        return list(map(_row, self._layer._operations))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)


def _row(layer: Any) -> _StandIn:
    return _StandIn(layer, type(_shown_name(layer), (), {}))


def _shown_name(layer: Any) -> str:
    """The name of the layer's class; of a layer around adapted ones, their number too."""
    if isinstance(layer, LoRALayer):
        return type(layer).__qualname__.rpartition(".")[2]
    count = len(Tree.of(layer).adapted) if isinstance(layer, keras.layers.Layer) else 0
    return f"{type(layer).__name__}, {count} adapted" if count else type(layer).__name__
