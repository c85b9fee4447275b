"""Layers that use the variables of other layers, found before anything changes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import CodeType
from typing import Any

import keras
import numpy as np
import pytest
from keras import ops
from support.cases import numpy_of
from support.models import randomize_adapters, state

import keras_lora as kl
from keras_lora.inject.sources import ASSIGNING

CONFIG = kl.LoRAConfig(rank=2, targets=["up"])
Matrix = Callable[[keras.layers.Dense], Any]


class Tied(keras.layers.Layer):
    """A decoder that reads a matrix of its encoder at each call."""

    def __init__(self, encoder: keras.layers.Dense, matrix: Matrix, **options: Any) -> None:
        super().__init__(**options)
        self.encoder = encoder
        self.matrix = matrix

    def call(self, inputs: Any) -> Any:
        return inputs @ ops.transpose(self.matrix(self.encoder))


class Keeping(keras.layers.Layer):
    """A decoder that keeps the matrix of its encoder."""

    def __init__(self, matrix: Any, **options: Any) -> None:
        super().__init__(**options)
        self.matrix = matrix

    def call(self, inputs: Any) -> Any:
        kept = self.matrix
        kept = kept["kernel"] if isinstance(kept, dict) else kept
        return inputs @ ops.transpose(kept[0] if isinstance(kept, list | tuple) else kept)


class TiedModel(keras.Model):
    """A model whose own `call` ties the output to the input."""

    def __init__(self) -> None:
        super().__init__(name="decoder")
        self.encoder = keras.layers.Embedding(13, 5, name="up")

    def call(self, inputs: Any) -> Any:
        return self.encoder(inputs) @ ops.transpose(self.encoder.weights[0])


def first_of(layer: keras.layers.Layer) -> Any:
    return helper(layer)


def helper(layer: keras.layers.Layer) -> Any:
    return layer.variables[0]


def autoencoder(decoder: Callable[[keras.layers.Dense, Any], Any]) -> keras.Model:
    inputs = keras.Input((5,))
    encoder = keras.layers.Dense(7, name="up")
    return keras.Model(inputs, decoder(encoder, encoder(inputs)))


def reading(matrix: Matrix) -> Callable[[keras.layers.Dense, Any], Any]:
    return lambda encoder, x: Tied(encoder, matrix, name="decoder")(x)


def keeping(container: Callable[[Any], Any]) -> Callable[[keras.layers.Dense, Any], Any]:
    return lambda encoder, x: Keeping(container(encoder.kernel), name="decoder")(x)


READERS: dict[str, Callable[[keras.layers.Dense, Any], Any]] = {
    "weights": reading(lambda layer: layer.weights[0]),
    "trainable_weights": reading(lambda layer: layer.trainable_weights[0]),
    "trainable_variables": reading(lambda layer: layer.trainable_variables[0]),
    "variables": reading(lambda layer: layer.variables[0]),
    "getattr": reading(lambda layer: getattr(layer, "_trainable_variables")[0]),  # noqa: B009
    "helper": reading(first_of),
    "lambda": lambda encoder, x: keras.layers.Lambda(
        lambda x: x @ ops.transpose(encoder.weights[0]), name="decoder"
    )(x),
    "attribute": keeping(lambda kernel: kernel),
    "list": keeping(lambda kernel: [kernel]),
    "tuple": keeping(lambda kernel: (kernel,)),
    "dict": keeping(lambda kernel: {"kernel": kernel}),
    "operation": lambda encoder, x: ops.einsum("bi,ji->bj", x, encoder.kernel),
}


@pytest.mark.parametrize("reader", READERS)
def test_a_matrix_that_another_layer_computes_with_is_not_adapted(reader: str) -> None:
    model = autoencoder(READERS[reader])
    before = state(model)
    with pytest.raises(ValueError, match=r"that of 'up'.*Exclude \['up'\].*`layer.kernel`") as e:
        kl.apply_lora(model, CONFIG)
    assert "'decoder'" in str(e.value) or reader == "operation"
    assert state(model) == before


def test_a_subclassed_model_that_reads_a_matrix_is_refused() -> None:
    model = TiedModel()
    model(np.zeros((1, 3), "int32"))
    before = state(model)
    with pytest.raises(ValueError, match="'decoder' reads that of 'up'.*`layer.embeddings`"):
        kl.apply_lora(model, kl.LoRAConfig(rank=2, targets="all"))
    assert state(model) == before


def test_a_decoder_that_reads_the_effective_matrix_follows_the_adapter() -> None:
    model = autoencoder(reading(lambda layer: layer.kernel))
    layer = model.get_layer("up")
    kl.apply_lora(model, CONFIG)
    randomize_adapters(model)
    x = np.random.default_rng(3).normal(size=(4, 5)).astype("float32")
    a, b = (numpy_of(v).astype("float64") for v in layer.adapters["default"].factors)
    kernel = numpy_of(layer.base_kernel) + layer.adapters["default"].scaling * a @ b
    expected = (x @ kernel + numpy_of(layer.bias)) @ kernel.T
    np.testing.assert_allclose(numpy_of(model(x)), expected, rtol=1e-4, atol=1e-4)
    kl.merge_lora(model)
    np.testing.assert_allclose(numpy_of(model(x)), expected, rtol=1e-4, atol=1e-4)


def test_a_decoder_that_is_made_after_the_adapter_is_found_by_merging() -> None:
    inputs = keras.Input((5,))
    encoder = kl.apply_lora(keras.Sequential([inputs, keras.layers.Dense(7, name="up")]), CONFIG)
    up = encoder.get_layer("up")
    decoder = Tied(up, lambda layer: layer.weights[0], name="decoder")
    model = keras.Model(inputs, decoder(encoder(inputs)))
    before = state(model)
    with pytest.raises(ValueError, match="'decoder' reads that of 'up'"):
        kl.merge_lora(model)
    with pytest.raises(ValueError, match="'decoder' reads that of 'up'"), kl.merged(model):
        pytest.fail("the model is merged")
    assert state(model) == before
    kl.unload_lora(model)


def test_layers_of_keras_assign_to_variables_in_known_methods_alone() -> None:
    """What `call` assigns to moves in training. A frozen `BatchNormalization` moves nothing, and
    the states of an `RNN` are of the batch before. The others are refused, or said.
    """
    classes: list[tuple[str, Any]] = inspect.getmembers(keras.layers, inspect.isclass)
    layers = [(name, item) for name, item in classes if issubclass(item, keras.layers.Layer)]
    found = {name for name, layer in layers if names(layer.call) & {"assign", "assign_add"}}
    recurrent = {name for name, layer in layers if issubclass(layer, keras.layers.RNN)}
    known = {"BatchNormalization", *(layer.__name__ for layer in ASSIGNING)}
    assert found - recurrent == known


def names(function: Any) -> set[str]:
    def inner(code: CodeType) -> set[str]:
        parts = [inner(const) for const in code.co_consts if isinstance(const, CodeType)]
        return {*code.co_names}.union(*parts)

    return inner(inspect.unwrap(function).__code__)


class Averaging(keras.layers.Layer):
    """A layer that moves a variable of its own in training, frozen or not."""

    def build(self, shape: Any) -> None:
        self.mean = self.add_weight(shape=(shape[-1],), name="mean")

    def call(self, inputs: Any, training: bool = False) -> Any:
        if training:
            self.mean.assign(0.9 * self.mean + 0.1 * ops.mean(inputs, axis=0))
        return inputs - self.mean


class Counting(Averaging):
    """Likewise, of state that is no trained variable."""

    def build(self, shape: Any) -> None:
        super().build(shape)
        self.mean.trainable = False


MOVING: dict[str, Callable[[], keras.layers.Layer]] = {
    "spectral": lambda: keras.layers.SpectralNormalization(keras.layers.Dense(7), name="moving"),
    "averaging": lambda: Averaging(name="moving"),
    "counting": lambda: Counting(name="moving"),
}


def beside(kind: str) -> keras.Model:
    moving, up = MOVING[kind](), keras.layers.Dense(3, name="up")
    return keras.Sequential([keras.Input((5,)), moving, up])


def test_a_base_that_would_move_in_training_is_refused_and_state_is_said() -> None:
    message = r"\['moving'\], which assign to .*`layers_to_save`"
    for kind in ["spectral", "averaging"]:
        model = beside(kind)
        before = state(model)
        with pytest.raises(ValueError, match=message):
            kl.apply_lora(model, CONFIG)
        assert state(model) == before
    with pytest.warns(UserWarning, match=message):
        kl.apply_lora(beside("counting"), CONFIG)


@pytest.mark.parametrize("make", [keras.layers.BatchNormalization, keras.layers.LSTM])
def test_layers_that_keep_frozen_statistics_or_states_are_fine(make: Any) -> None:
    options = {"stateful": True, "units": 7} if make is keras.layers.LSTM else {}
    inputs = keras.Input((3, 5), batch_size=2)
    up = keras.layers.Dense(5, name="up")
    lambda_ = keras.layers.Lambda(lambda x: x + ops.sum(up.variables[1]))
    model = keras.Model(inputs, make(**options)(lambda_(up(inputs))))
    kl.apply_lora(model, CONFIG)
    assert list(kl.lora_layers(model)) == ["up"]


@pytest.mark.parametrize("kind", MOVING)
def test_what_moves_in_training_can_belong_to_the_adapter(kind: str) -> None:
    model = beside(kind)
    before = [numpy_of(v) for v in model.weights]
    config = kl.LoRAConfig(rank=2, targets=["up"], layers_to_save=["moving"])
    kl.apply_lora(model, config)
    model.compile("sgd", "mse")
    x = np.random.default_rng(3).normal(size=(4, 5)).astype("float32")
    model.fit(x, np.ones((4, 3)), verbose=0)
    adapted = numpy_of(model(x))
    kl.set_adapter(model, None)
    assert np.abs(numpy_of(model(x)) - adapted).max() > 1e-3
    kl.set_adapter(model, "default")
    np.testing.assert_array_equal(numpy_of(model(x)), adapted)
    kl.unload_lora(model)
    for variable, value in zip(model.weights, before, strict=True):
        np.testing.assert_array_equal(numpy_of(variable), value)


def test_a_layer_that_is_normalized_is_not_adapted() -> None:
    dense = keras.layers.Dense(7, name="up")
    model = keras.Sequential([keras.Input((5,)), keras.layers.SpectralNormalization(dense)])
    with pytest.raises(ValueError, match=r"'spectral_norm\w+' keeps that of 'up'"):
        kl.apply_lora(model, CONFIG)
