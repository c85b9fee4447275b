"""What a model has compiled: functions go stale when its layers change, optimizers too."""

from __future__ import annotations

import gc
from collections.abc import Iterable
from typing import Any

import keras

from keras_lora.walker import walk

_FUNCTIONS = ("train_function", "test_function", "predict_function", "generate_function")


def models_around(layers: Iterable[keras.layers.Layer]) -> list[keras.Model]:
    """Every live model that contains one of the layers, however deep.

    A layer does not know what contains it, and an outer model that has run `predict` keeps a
    graph of the layer as it was. So all live objects are looked through: the types first,
    since `isinstance` would touch the lazy proxies that some libraries leave around.
    """
    wanted = {id(layer) for layer in layers}
    models = [o for o in gc.get_objects() if issubclass(type(o), keras.Model)]
    return [m for m in models if any(id(node.layer) in wanted for node in walk(m))]


def reset_functions(model: keras.Model) -> None:
    """Drop the compiled functions; Keras makes new ones when they are next needed."""
    for name in _FUNCTIONS:
        if getattr(model, name, None) is not None:
            setattr(model, name, None)


def fresh_optimizer(model: keras.Model) -> Any | None:
    """A new optimizer of the same configuration, or None where the model has none built.

    Raises:
        ValueError: the optimizer cannot be made from its own config.
    """
    optimizer = getattr(model, "optimizer", None)
    if optimizer is None or not optimizer.built:
        return None
    try:
        return type(optimizer).from_config(optimizer.get_config())
    except Exception as error:
        raise ValueError(
            "The variables that train are about to change, and the compiled optimizer must be "
            f"built anew. Expected one that from_config(get_config()) can make. Received: "
            f"{type(optimizer).__name__}, which cannot ({error}). Compile the model after this "
            "call instead: set model.optimizer = None first."
        ) from error
