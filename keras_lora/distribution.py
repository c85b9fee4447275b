"""The strategy or mesh that a model's variables belong to."""

from __future__ import annotations

import contextlib
from typing import Any

import keras

from keras_lora.layers import sites_of


def strategy_scope(layer: keras.layers.Layer) -> contextlib.AbstractContextManager[Any]:
    """The `tf.distribute` scope of a layer's kernel, to make new variables of the layer in."""
    site = next(iter(sites_of(layer).values()))
    strategy = getattr(site.matrix.value, "distribute_strategy", None)
    return contextlib.nullcontext() if strategy is None else strategy.scope()
