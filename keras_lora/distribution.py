"""The `tf.distribute` strategy that a layer's variables belong to."""

from __future__ import annotations

import contextlib
from typing import Any

import keras

from keras_lora.layers import sites_of


def strategy_scope(layer: keras.layers.Layer) -> contextlib.AbstractContextManager[Any]:
    """The `tf.distribute` scope of a layer's kernel, in which to make new variables of it."""
    site = next(iter(sites_of(layer).values()))
    strategy = getattr(site.matrix.value, "distribute_strategy", None)
    return contextlib.nullcontext() if strategy is None else strategy.scope()
