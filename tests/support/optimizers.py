"""Every optimizer of Keras, and training by it in few steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np

import keras_lora as kl

CLASSES: dict[str, type] = {
    name: found
    for name, found in vars(keras.optimizers).items()
    if isinstance(found, type)
    and issubclass(found, keras.optimizers.Optimizer)
    and found is not keras.optimizers.Optimizer
}
WRAPPERS: dict[str, Callable[..., Any]] = {
    "LossScaleOptimizer": lambda inner, other: keras.optimizers.LossScaleOptimizer(inner),
    "MultiOptimizer": lambda inner, other: keras.optimizers.MultiOptimizer(
        keras.optimizers.OptimizerMap(other, {".*(_b|kernel)": inner})
    ),
}
WIDTH, MIDDLE, OUT = 13, 17, 7


def optimizer(name: str, **options: Any) -> Any:
    if name in WRAPPERS:
        inner = keras.optimizers.Adam(0.05, **options), keras.optimizers.SGD(0.05, 0.9, **options)
        return WRAPPERS[name](*inner)
    return CLASSES[name](0.05, **options)


def parts(made: Any) -> list[Any]:
    """The optimizers that a wrapper wraps, or the optimizer itself."""
    inner = getattr(made, "inner_optimizer", None)
    return [inner] if inner is not None else list(getattr(made, "optimizers", [made]))


def scheduled_by_group() -> Any:
    schedule = keras.optimizers.schedules.ExponentialDecay(0.05, 2, 0.7)
    return kl.set_rates(keras.optimizers.AdamW(schedule, use_ema=True), b=3, magnitudes=0.5)


def base() -> keras.Model:
    keras.utils.set_random_seed(3)
    up = keras.layers.Dense(MIDDLE, "tanh", name="up")
    return keras.Sequential([keras.Input((WIDTH,)), up, keras.layers.Dense(OUT, name="head")])


def adapt(model: keras.Model, name: str, **options: Any) -> None:
    """Add an adapter whose values follow from its name."""
    kl.apply_lora(model, kl.LoRAConfig(**{"rank": 2, "targets": ["up"], **options}), name=name)
    rng = np.random.default_rng(len(name))
    for layer in kl.lora_layers(model).values():
        if name in layer.adapters:
            for factor in (layer.adapters[name].a, layer.adapters[name].b):
                factor.assign(rng.normal(size=factor.shape))


def compile_(model: keras.Model, made: Any) -> None:
    model.compile(made, "mse", run_eagerly=keras.backend.backend() == "tensorflow")


def steps(model: keras.Model, count: int) -> None:
    rng = np.random.default_rng(5)
    x, y = rng.normal(size=(3, WIDTH)), rng.normal(size=(3, OUT))
    for _ in range(count):
        model.train_on_batch(x, y)


def values(model: keras.Model, name: str) -> list[np.ndarray]:
    layers = kl.lora_layers(model).values()
    return [np.array(f) for x in layers if name in x.adapters for f in x.adapters[name].factors]
