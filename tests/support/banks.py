"""Models of which a layer has several adapted matrices."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import keras
import numpy as np

import keras_lora as kl
from keras_lora.layers import AdapterBank
from support.cases import numpy_of


def banks(model: keras.Model) -> Iterator[AdapterBank]:
    """The banks that have adapters."""
    for layer in kl.lora_layers(model).values():
        yield from (bank for bank in layer.banks.values() if bank.adapters)


def randomize(model: keras.Model) -> None:
    rng = np.random.default_rng(11)
    for bank in banks(model):
        for adapter in bank.adapters.values():
            for factor in adapter.factors:
                factor.assign(rng.normal(scale=0.4, size=factor.shape))


def brought_back(
    model: keras.Model, made: Callable[[], keras.Model], x: np.ndarray, folder: Path
) -> keras.Model:
    """A model of the same base that takes the adapter from an adapter file and from weights."""
    expected, loaded = numpy_of(model(x)), made()
    kl.save_adapter(model, folder / "adapter")
    kl.load_adapter(loaded, folder / "adapter")
    np.testing.assert_array_equal(numpy_of(loaded(x)), expected)
    model.save_weights(folder / "m.weights.h5")
    randomize(loaded)
    loaded.load_weights(folder / "m.weights.h5")
    np.testing.assert_array_equal(numpy_of(loaded(x)), expected)
    return loaded
