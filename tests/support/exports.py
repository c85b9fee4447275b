"""Small models to export, and what they predict."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import keras_hub
import numpy as np
import tensorflow as tf

import keras_lora as kl
from support.models import (
    composite,
    data,
    functional,
    randomize_adapters,
    subclassed,
)

CONFIG = kl.LoRAConfig(rank=2, alpha=3)


def classifier(dtype: str = "float32", layers: int = 2) -> keras.Model:
    backbone = keras_hub.models.BertBackbone(
        vocabulary_size=31,
        num_layers=layers,
        num_heads=3,
        hidden_dim=15,
        intermediate_dim=17,
        max_sequence_length=13,
        dtype=dtype,
    )
    return keras_hub.models.BertTextClassifier(
        backbone=backbone, num_classes=5, preprocessor=None, dtype=dtype
    )


def tokens() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "token_ids": rng.integers(0, 31, (3, 11)).astype("int32"),
        "segment_ids": np.zeros((3, 11), "int32"),
        "padding_mask": np.ones((3, 11), "int32"),
    }


def two_inputs() -> keras.Model:
    a, b = keras.Input((5,), name="left"), keras.Input((7,), name="right")
    x = keras.layers.Dense(11, activation="gelu", name="up")(keras.layers.Concatenate()([a, b]))
    outputs = [keras.layers.Dense(3, name="class")(x), keras.layers.Dense(2, name="box")(x)]
    return keras.Model([a, b], outputs)


def sequential() -> keras.Model:
    layers = [keras.layers.Dense(7, activation="tanh"), keras.layers.Dense(3, name="head")]
    return keras.Sequential([keras.Input((5,), name="x"), *layers])


def large() -> keras.Model:
    layers = [keras.layers.Dense(257, name="up"), keras.layers.Dense(251, name="head")]
    return keras.Sequential([keras.Input((263,), name="x"), *layers])


def features(model: keras.Model) -> dict[str, np.ndarray]:
    return {model.inputs[0].name: data(model)[0]}


# A model, its feeds by signature name, and the names of its outputs.
EXPORTS: dict[str, tuple[Callable[[], keras.Model], Callable[..., Any], list[str]]] = {
    "functional": (functional, features, ["head"]),
    "composite": (composite, features, ["head"]),
    "sequential": (sequential, features, ["head"]),
    "subclassed": (subclassed, lambda m: {"input_0": data(m)[0]}, ["output_0"]),
    "kerashub task": (classifier, lambda _: tokens(), ["logits"]),
    "bfloat16": (lambda: classifier("bfloat16"), lambda _: tokens(), ["logits"]),
    "mixed float16": (lambda: functional(dtype="mixed_float16"), features, ["head"]),
    "two inputs, two outputs": (
        two_inputs,
        lambda _: {"left": np.ones((3, 5), "float32"), "right": np.ones((3, 7), "float32")},
        ["class", "box"],
    ),
}


def predict(model: keras.Model, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    values: Any = list(feeds.values())
    named = isinstance(getattr(model, "input", None), dict)
    given = feeds if named else values if len(values) > 1 else values[0]
    outputs = model.predict(given, verbose=0)
    return [np.array(y).astype("float32") for y in keras.tree.flatten(outputs)]


def adapted(make: Callable[[], keras.Model]) -> keras.Model:
    model = kl.apply_lora(make(), CONFIG)
    randomize_adapters(model)
    return model


class PythonInside(keras.layers.Layer):
    def call(self, inputs: Any) -> Any:
        return tf.ensure_shape(tf.numpy_function(np.tanh, [inputs], tf.float32), inputs.shape)
