"""Small models for the tests: of prime dimensions, one for each way that Keras builds models."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest

import keras_lora as kl

BATCH = 6


class Block(keras.layers.Layer):
    """A composite layer: its config does not list its sublayers."""

    def __init__(self, width: int = 5, **options: Any) -> None:
        super().__init__(**options)
        self.width = width
        self.attention = keras.layers.MultiHeadAttention(3, 2, name="attention")
        self.norm = keras.layers.LayerNormalization(name="norm")
        self.up = keras.layers.Dense(7, activation="gelu", name="up")
        self.down = keras.layers.Dense(width, name="down")

    def build(self, input_shape: Any) -> None:
        self.attention.build(input_shape, input_shape)
        self.norm.build(input_shape)
        self.up.build(input_shape)
        self.down.build((*input_shape[:-1], 7))

    def call(self, inputs: Any) -> Any:
        x = self.norm(inputs + self.attention(inputs, inputs))
        return x + self.down(self.up(x))

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "width": self.width}


def functional(**options: Any) -> keras.Model:
    """Dense layers only, all of them in the model's own config."""
    inputs = keras.Input((5,), name="features")
    x = keras.layers.Dense(7, activation="gelu", name="up", **options)(inputs)
    x = keras.layers.BatchNormalization(name="norm")(x)
    x = keras.layers.Dense(11, activation="tanh", name="middle", **options)(x)
    return keras.Model(inputs, keras.layers.Dense(3, name="head", **options)(x), name="mlp")


def composite(blocks: int = 2) -> keras.Model:
    """Transformer blocks, whose layers no config lists, and a head."""
    inputs = keras.Input((None, 5), name="sequence")
    x = inputs
    for i in range(blocks):
        x = keras.saving.register_keras_serializable("tests")(Block)(name=f"block_{i}")(x)
    x = keras.layers.GlobalAveragePooling1D(name="pool")(x)
    return keras.Model(inputs, keras.layers.Dense(3, name="head")(x), name="encoder")


def one_block() -> keras.Model:
    """A `composite` that is traced in half the time."""
    return composite(1)


class Subclassed(keras.Model):
    """A model with no graph and no config."""

    def __init__(self) -> None:
        super().__init__(name="subclassed")
        self.up = keras.layers.Dense(7, activation="gelu", name="up")
        self.blocks = [keras.layers.Dense(7, name=f"block_{i}") for i in range(2)]
        self.head = keras.layers.Dense(3, name="head")

    def call(self, inputs: Any) -> Any:
        x = self.up(inputs)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def subclassed() -> keras.Model:
    model = Subclassed()
    model(np.zeros((1, 5), "float32"))
    return model


def data(model: keras.Model, size: int = BATCH) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(5)
    shape = (11, 5) if model.name == "encoder" else (5,)
    return rng.normal(size=(size, *shape)).astype("float32"), rng.normal(size=(size, 3))


def randomize_adapters(model: keras.Model, scale: float = 0.3) -> None:
    rng = np.random.default_rng(11)
    for layer in kl.lora_layers(model).values():
        for adapter in layer.adapters.values():
            for variable in adapter.factors:
                variable.assign(rng.normal(scale=scale, size=variable.shape))


def state(model: keras.Model) -> Any:
    """All that a failed call must not change: classes, variables, values and flags."""
    layers = model._flatten_layers()
    return (
        [(type(layer), layer.trainable) for layer in layers],
        [(id(v), v.trainable, np.array(v).tobytes()) for v in model.variables],
        sorted(name for layer in layers for name in vars(layer) if "lora" in name),
    )


CONFIG = kl.LoRAConfig(rank=2, alpha=3)
MODELS = [functional, composite, subclassed]
every_model = pytest.mark.parametrize("make", MODELS)


def names(variables: Any) -> list[str]:
    return sorted({v.name for v in variables})
