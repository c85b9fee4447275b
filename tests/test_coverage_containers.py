"""Models of every kind of container are adapted; each passes through `check_adapting`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers, ops
from support.adapting import check_adapting, paths, projections

import keras_lora as kl

pytestmark = [
    pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="takes a GradientTape"),
    # Some kernels of the backbones have a side of one.
    pytest.mark.filterwarnings("ignore:The rank is above:UserWarning"),
]
WIDTH = 6


# --- Containers -----------------------------------------------------------------------------------


def dense(name: str, units: int = WIDTH) -> layers.Dense:
    return layers.Dense(units, activation="tanh", name=name)


def functional() -> keras.Model:
    inputs = keras.Input((WIDTH,))
    return keras.Model(inputs, dense("head")(dense("down")(dense("up", 11)(inputs))))


def sequential() -> keras.Model:
    return keras.Sequential([keras.Input((WIDTH,)), dense("up", 11), dense("down"), dense("head")])


class Plain(keras.Model):
    """A model without a `get_config`."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.head = dense("up", 11), dense("down"), dense("head")

    def call(self, x: Any) -> Any:
        return self.head(self.down(self.up(x)))


@keras.saving.register_keras_serializable("test_coverage")
class Configured(keras.Model):
    """A model with a `get_config`."""

    def __init__(self, width: int = 11, **options: Any) -> None:
        super().__init__(**options)
        self.width = width
        self.up, self.head = dense("up", width), dense("head")

    def call(self, x: Any) -> Any:
        return self.head(self.up(x))

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "width": self.width}


class Listed(keras.Model):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = [dense("first", 11), [dense("second"), dense("third")]]
        self.head = dense("head")

    def call(self, x: Any) -> Any:
        first, (second, third) = self.blocks
        return self.head(third(second(first(x))))


class Mapped(keras.Model):
    def __init__(self) -> None:
        super().__init__()
        self.branches = {"left": dense("left"), "right": dense("right")}
        self.head = dense("head")

    def call(self, x: Any) -> Any:
        return self.head(self.branches["left"](x) + self.branches["right"](x))


class Twins(keras.Model):
    """Two siblings of the same name, which a Functional model would refuse."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = dense("twin"), dense("twin"), dense("head")

    def call(self, x: Any) -> Any:
        return self.head(self.two(self.one(x)))


class Block(layers.Layer):
    """A composite layer."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.inner, self.norm = dense("inner"), layers.LayerNormalization()

    def call(self, x: Any) -> Any:
        return self.norm(x + self.inner(x))


@keras.saving.register_keras_serializable("test_coverage")
class Cell(layers.Layer):
    """A recurrent cell that computes with a layer; Bidirectional copies it by its config."""

    def __init__(self, units: int, **options: Any) -> None:
        super().__init__(**options)
        self.units = self.state_size = self.output_size = units
        self.mix = dense("mix", units)

    def build(self, input_shape: Any) -> None:
        self.mix.build((input_shape[0], input_shape[-1] + self.units))

    def call(self, inputs: Any, states: Any) -> tuple[Any, list[Any]]:
        state = self.mix(ops.concatenate([inputs, states[0]], axis=-1))
        return state, [state]

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "units": self.units}


def nested(inner: Callable[[], keras.Model]) -> keras.Model:
    inside = inner()
    inside.name = "inside"
    inputs = keras.Input((WIDTH,))
    return keras.Model(inputs, dense("head")(inside(dense("outside")(inputs))))


def nested_twice() -> keras.Model:
    inputs = keras.Input((WIDTH,))
    middle = nested(functional)
    middle.name = "middle"
    return keras.Model(inputs, dense("last")(middle(inputs)))


def shared() -> keras.Model:
    inputs, layer = keras.Input((WIDTH,)), dense("shared")
    return keras.Model(inputs, dense("head")(layer(layer(inputs))))


def on_sequence(*inner: layers.Layer) -> keras.Model:
    x = inputs = keras.Input((5, WIDTH))
    for layer in inner:
        x = layer(x)
    return keras.Model(inputs, dense("head")(x))


def attending(layer: layers.Layer) -> keras.Model:
    inputs = keras.Input((5, WIDTH))
    return keras.Model(inputs, dense("head")(layer(inputs, inputs)))


def recurrent() -> keras.Model:
    rnn = layers.RNN(Cell(5, name="cell"), name="rnn", return_sequences=True)
    return on_sequence(layers.Bidirectional(rnn, name="both"))


# The paths are those of "all-linear", which leaves out the head.
CONTAINERS: dict[str, tuple[Callable[[], keras.Model], list[str]]] = {
    "Functional": (functional, ["up", "down"]),
    "Sequential": (sequential, ["up", "down"]),
    "subclassed": (Plain, ["up", "down"]),
    "subclassed with a config": (Configured, ["up"]),
    "Functional in Functional": (
        lambda: nested(functional),
        ["outside", "inside/up", "inside/down", "inside/head"],
    ),
    "Sequential in Functional": (
        lambda: nested(sequential),
        ["outside", "inside/up", "inside/down", "inside/head"],
    ),
    "subclassed in Functional": (
        lambda: nested(Configured),
        ["outside", "inside/up", "inside/head"],
    ),
    "three deep": (
        nested_twice,
        [f"middle/{p}" for p in ("outside", "inside/up", "inside/down", "inside/head", "head")],
    ),
    "list": (Listed, ["first", "second", "third"]),
    "dict": (Mapped, ["left", "right"]),
    "siblings of one name": (Twins, ["twin", "twin#2"]),
    "shared layer": (shared, ["shared"]),
    "composite layer": (lambda: on_sequence(Block(name="block")), ["block/inner"]),
    "MultiHeadAttention": (
        lambda: attending(layers.MultiHeadAttention(2, 5, name="attention")),
        projections("attention"),
    ),
    "GroupQueryAttention": (
        lambda: attending(layers.GroupQueryAttention(5, 4, 2, name="attention")),
        projections("attention"),
    ),
    "TimeDistributed": (
        lambda: on_sequence(layers.TimeDistributed(dense("step"), name="steps")),
        ["steps/step"],
    ),
    "Bidirectional, custom cell": (
        recurrent,
        ["both/forward_rnn/cell/mix", "both/backward_rnn/cell/mix"],
    ),
}
ON_SEQUENCES = {
    "composite layer",
    "MultiHeadAttention",
    "GroupQueryAttention",
    "TimeDistributed",
    "Bidirectional, custom cell",
}


def container(name: str) -> tuple[keras.Model, np.ndarray]:
    shape = (3, 5, WIDTH) if name in ON_SEQUENCES else (3, WIDTH)
    model, inputs = CONTAINERS[name][0](), np.random.default_rng(1).normal(size=shape)
    inputs = inputs.astype("float32")
    model(inputs)
    return model, inputs


@pytest.mark.parametrize("name", CONTAINERS)
def test_container(name: str) -> None:
    model, inputs = container(name)
    assert paths(model) == CONTAINERS[name][1]
    check_adapting(model, inputs)


@pytest.mark.parametrize("name", CONTAINERS)
def test_every_path_names_its_layer(name: str) -> None:
    model, _ = container(name)
    for target in kl.find_targets(model):
        hits = kl.find_targets(model, [target.path])
        assert target.layer in [hit.layer for hit in hits]
        # A name without a number means all siblings of that name.
        assert len({hit.path.split("#")[0] for hit in hits}) == 1
