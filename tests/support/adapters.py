"""A model with three adapters, and the kernels that they should make."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

import keras_lora as kl
from support.cases import numpy_of
from support.models import data, functional, randomize_adapters

# Of different targets, ranks, scales and dropout.
CONFIGS = {
    "fr": kl.LoRAConfig(rank=3, alpha=5, dropout=0.2),
    "de": kl.LoRAConfig(rank=2, alpha=7, targets=["up"], use_rslora=True),
    "it": kl.LoRAConfig(rank=1, alpha=2, targets=["up", "middle"]),
}


class Counter(keras.layers.Layer):
    """Returns its input, and counts how often its Python runs: once for each trace."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.calls = 0

    def call(self, inputs: Any) -> Any:
        self.calls += 1
        return inputs


def counted() -> tuple[keras.Model, Counter]:
    inputs = keras.Input((5,), name="features")
    x = keras.layers.Dense(7, activation="gelu", name="up")(inputs)
    counter = Counter(name="counter")
    x = keras.layers.Dense(11, activation="tanh", name="middle")(counter(x))
    return keras.Model(inputs, keras.layers.Dense(3, name="head")(x), name="mlp"), counter


def with_adapters(model: keras.Model, names: Sequence[str] = tuple(CONFIGS)) -> keras.Model:
    for name in names:
        kl.apply_lora(model, CONFIGS[name], name=name)
    randomize_adapters(model)
    return model


def fit(model: keras.Model, epochs: int = 1) -> None:
    x, y = data(model)
    model.fit(x, y, batch_size=2, epochs=epochs, shuffle=False, verbose=0)


def factors(model: keras.Model, name: str) -> dict[str, tuple[bytes, ...]]:
    layers = kl.lora_layers(model).items()
    return {
        path: tuple(np.array(f).tobytes() for f in layer.adapters[name].factors)
        for path, layer in layers
        if name in layer.adapters
    }


def kernels_by_hand(model: keras.Model, weights: dict[str, float]) -> dict[str, np.ndarray]:
    """W0 + sum_i weight_i s_i A_i B_i of each Dense layer, in float64."""
    kernels = {}
    for path, layer in kl.lora_layers(model).items():
        total = numpy_of(layer.base_kernel)
        for name, weight in weights.items():
            if name in layer.adapters:
                spec = layer.adapters[name].spec
                s = spec.alpha / (np.sqrt(spec.rank) if spec.use_rslora else spec.rank)
                a, b = (np.array(f, "float64") for f in layer.adapters[name].factors)
                total = total + weight * s * a @ b
        kernels[path] = total
    return kernels


def assert_acts(model: keras.Model, weights: dict[str, float]) -> None:
    expected = kernels_by_hand(model, weights)
    for path, layer in kl.lora_layers(model).items():
        np.testing.assert_allclose(numpy_of(layer.kernel), expected[path], rtol=1e-5, atol=1e-6)
    plain = functional() if model.name == "mlp" and "norm" in layer_names(model) else counted()[0]
    plain.set_weights([numpy_of(v) for v in base_variables(model)])
    for path, kernel in expected.items():
        plain.get_layer(path).kernel.assign(kernel)
    x, _ = data(model)
    np.testing.assert_allclose(
        numpy_of(model.predict(x, verbose=0)), numpy_of(plain(x)), rtol=1e-4, atol=1e-5
    )


def layer_names(model: keras.Model) -> list[str]:
    return [layer.name for layer in model.layers]


def base_variables(model: keras.Model) -> list[keras.Variable]:
    ours = {id(v) for layer in kl.lora_layers(model).values() for v in layer.adapter_variables}
    return [v for v in model.weights if id(v) not in ours]


def heads() -> keras.Model:
    """Two adapters that each train the head, one of them its biases too."""
    model = functional()
    model.compile("adam", "mse")
    kl.apply_lora(model, kl.LoRAConfig(rank=2, layers_to_save=["head"]), name="one")
    fit(model)
    options: Any = {"bias": "lora_only", "layers_to_save": ["head", "norm"]}
    kl.apply_lora(model, kl.LoRAConfig(rank=2, **options), name="two")
    fit(model)
    return model


WEIGHTS = {"fr": 0.7, "de": -1.3, "it": 2.0}
