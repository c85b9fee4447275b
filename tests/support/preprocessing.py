"""Every preprocessing layer of Keras, with what it has learnt, and inputs for it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import keras
import numpy as np

layers = keras.layers
Layer: TypeAlias = "keras.layers.Layer"

_RNG = np.random.default_rng(3)
IMAGES = _RNG.integers(0, 255, (2, 11, 13, 3)).astype("float32")
NUMBERS = (50 + 10 * _RNG.normal(size=(7, 5))).astype("float32")
INTEGERS = np.array([[3, 17, 5], [5, 2, 17]], "int64")
WORDS = np.array([["ash", "oak"], ["elm", "fir"]])
SENTENCES = np.array(["the ash and the oak", "an elm"])
SOUND = _RNG.normal(size=(2, 67)).astype("float32")


def adapted(layer: Layer, data: Any) -> Layer:
    """The layer after it has learnt from the data: a mean, a vocabulary, borders of bins."""
    layer.adapt(data)
    return layer


def _images(layer: Layer) -> tuple[Layer, Sequence[np.ndarray]]:
    return layer, [IMAGES]


# One row or more for each layer whose constructor has options that must be given, or that learns.
# A layer that is not listed augments images, and is made without options.
_CASES: dict[str, Callable[[], tuple[Layer, Sequence[np.ndarray]]]] = {
    "CategoryEncoding": lambda: (layers.CategoryEncoding(19), [INTEGERS]),
    "CenterCrop": lambda: _images(layers.CenterCrop(7, 5)),
    "Discretization": lambda: (adapted(layers.Discretization(num_bins=3), NUMBERS), [NUMBERS]),
    "Discretization of borders": lambda: (layers.Discretization([47.0, 53.0]), [NUMBERS]),
    # Alone, its symbolic output is its input, which Keras takes for a cycle.
    "Equalization": lambda: _images(layers.Pipeline([layers.Equalization()])),
    "HashedCrossing": lambda: (
        layers.HashedCrossing(5, dtype="int32"),
        [WORDS[:, :1], WORDS[:, 1:]],
    ),
    "Hashing": lambda: (layers.Hashing(5, salt=3), [WORDS]),
    "IntegerLookup": lambda: (adapted(layers.IntegerLookup(), INTEGERS), [INTEGERS]),
    "IntegerLookup of a vocabulary": lambda: (layers.IntegerLookup(vocabulary=[5, 3]), [INTEGERS]),
    "MaxNumBoundingBoxes": lambda: _images(layers.MaxNumBoundingBoxes(3)),
    "MelSpectrogram": lambda: (layers.MelSpectrogram(32, 16, num_mel_bins=3), [SOUND]),
    "Normalization": lambda: (adapted(layers.Normalization(), NUMBERS), [NUMBERS]),
    "Normalization, inverted": lambda: (
        adapted(layers.Normalization(axis=None, invert=True), NUMBERS),
        [NUMBERS],
    ),
    "Normalization by a mean": lambda: (layers.Normalization(mean=3.0, variance=2.0), [NUMBERS]),
    "Pipeline": lambda: _images(
        layers.Pipeline([adapted(layers.Normalization(), IMAGES), layers.RandomFlip(seed=3)])
    ),
    "RandomBrightness": lambda: _images(layers.RandomBrightness(0.3)),
    "RandomColorDegeneration": lambda: _images(layers.RandomColorDegeneration(0.3)),
    "RandomContrast": lambda: _images(layers.RandomContrast(0.3)),
    "RandomCrop": lambda: _images(layers.RandomCrop(7, 5)),
    "RandomHue": lambda: _images(layers.RandomHue(0.3)),
    "RandomPosterization": lambda: _images(layers.RandomPosterization(3)),
    "RandomRotation": lambda: _images(layers.RandomRotation(0.3)),
    "RandomSaturation": lambda: _images(layers.RandomSaturation(0.3)),
    "RandomSharpness": lambda: _images(layers.RandomSharpness(0.3)),
    "RandomShear": lambda: _images(layers.RandomShear((0.1, 0.3))),
    "RandomTranslation": lambda: _images(layers.RandomTranslation(0.3, 0.3)),
    "RandomZoom": lambda: _images(layers.RandomZoom(0.3)),
    "Rescaling": lambda: (layers.Rescaling(3.0, 2.0), [NUMBERS]),
    "Resizing": lambda: _images(layers.Resizing(7, 5)),
    "STFTSpectrogram": lambda: (layers.STFTSpectrogram(frame_length=13), [SOUND[..., None]]),
    "StringLookup": lambda: (adapted(layers.StringLookup(), WORDS), [WORDS]),
    "StringLookup, several unknown": lambda: (
        adapted(layers.StringLookup(num_oov_indices=3, mask_token="elm"), WORDS[:1]),
        [WORDS],
    ),
    "StringLookup of counts": lambda: (
        adapted(layers.StringLookup(output_mode="tf_idf"), WORDS),
        [WORDS],
    ),
    "TextVectorization": lambda: (adapted(layers.TextVectorization(), SENTENCES), [SENTENCES]),
    "TextVectorization of counts": lambda: (
        adapted(layers.TextVectorization(output_mode="tf_idf"), SENTENCES),
        [SENTENCES],
    ),
}


# Keras gives strings on TensorFlow alone.
if keras.backend.backend() == "tensorflow":
    _CASES["StringLookup, inverted"] = lambda: (
        layers.StringLookup(vocabulary=["ash", "oak", "elm"], invert=True),
        [INTEGERS % 4],
    )


def _class_names(images: bool) -> set[str]:
    found = inspect.getmembers(keras.layers, inspect.isclass)
    modules = {name: cls.__module__ for name, cls in found}
    ours = {name: m for name, m in modules.items() if ".layers.preprocessing." in m}
    return {name for name, module in ours.items() if (".image_preprocessing." in module) == images}


IMAGE_LAYERS = sorted(_class_names(images=True))
OTHER_LAYERS = sorted(_class_names(images=False) | _CASES.keys() - set(IMAGE_LAYERS))


def case(name: str) -> tuple[Layer, Sequence[np.ndarray]]:
    """A preprocessing layer, and its inputs."""
    return _CASES[name]() if name in _CASES else _images(getattr(layers, name)())


def beside_dense(layer: Layer, inputs: Sequence[np.ndarray]) -> keras.Model:
    """A model of a dense layer and, on inputs of its own, a preprocessing layer."""
    x = keras.Input((5,), name="x")
    given = [
        keras.Input(a.shape[1:], dtype=_dtype(a), name=f"raw_{i}") for i, a in enumerate(inputs)
    ]
    preprocessed = layer(given[0] if len(given) == 1 else tuple(given))
    return keras.Model([x, *given], [keras.layers.Dense(7, name="up")(x), preprocessed])


def _dtype(array: np.ndarray) -> str:
    return "string" if array.dtype.kind == "U" else str(array.dtype)
