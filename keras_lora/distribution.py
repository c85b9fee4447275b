"""The strategy or mesh that a model's variables belong to."""

from __future__ import annotations

import contextlib
from typing import Any

import keras

from keras_lora.layers import (
    site_of,
)


def strategy_scope(layer: keras.layers.Layer) -> contextlib.AbstractContextManager[Any]:
    """The `tf.distribute` scope of a layer's kernel, to make new variables of the layer in."""
    strategy = getattr(site_of(layer).matrix.value, "distribute_strategy", None)
    return contextlib.nullcontext() if strategy is None else strategy.scope()
