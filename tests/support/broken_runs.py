"""Runs that break and are resumed, over many ways of training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import pytest

import keras_lora as kl
from support.models import composite, data, functional, one_block, subclassed

BATCHES, EPOCHS = 7, 3
CONFIG = kl.LoRAConfig(rank=2, dropout=0.2, layers_to_save=["head"], bias="lora_only")


class BrokenError(Exception):
    pass


class BreakAfter(keras.callbacks.Callback):
    """Stops training by an error in the middle of an epoch."""

    def __init__(self, batches: int) -> None:
        super().__init__()
        self.left = batches

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:  # noqa: ARG002
        self.left -= 1
        if self.left == 0:
            raise BrokenError


class Counter(keras.callbacks.Callback):
    """The epochs that began, and the optimizer's steps when training ended."""

    def __init__(self) -> None:
        super().__init__()
        self.epochs: list[int] = []

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:  # noqa: ARG002
        self.epochs.append(epoch)


def adapted(
    make: Callable[[], keras.Model],
    seed: int = 1,
    optimizer: Any = None,
    config: kl.LoRAConfig = CONFIG,
    **options: Any,
) -> keras.Model:
    """A compiled model: the same base for every seed; other adapters, head and dropout masks."""
    keras.utils.set_random_seed(0)
    model = make()
    keras.utils.set_random_seed(seed)
    kl.apply_lora(model, config)
    metrics = [keras.metrics.MeanAbsoluteError(name="mae")]
    optimizer = optimizer() if optimizer else keras.optimizers.Adam(0.02)
    model.compile(optimizer, "mse", metrics=metrics, **options)
    return model


def fit(model: keras.Model, *callbacks: Any, epochs: int = EPOCHS, **options: Any) -> Any:
    x, y = data(model, 2 * BATCHES)
    defaults = {"batch_size": 2, "shuffle": False, "verbose": 0, "validation_data": (x, y)}
    return model.fit(x, y, epochs=epochs, callbacks=list(callbacks), **(defaults | options))


def trained(model: keras.Model) -> list[np.ndarray]:
    return [np.array(keras.ops.convert_to_numpy(v)) for v in model.trainable_variables]


def assert_same(received: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> None:
    for one, other in zip(received, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)


def scheduled() -> keras.optimizers.Optimizer:
    return keras.optimizers.AdamW(keras.optimizers.schedules.ExponentialDecay(0.02, 5, 0.5))


def accumulating() -> keras.optimizers.Optimizer:
    return keras.optimizers.SGD(0.02, momentum=0.9, gradient_accumulation_steps=2)


def averaging() -> keras.optimizers.Optimizer:
    made = keras.optimizers.Nadam(0.02, use_ema=True, ema_overwrite_frequency=4)
    return kl.set_rates(made, b=4, heads=0.5, biases=2)


def scaled() -> keras.optimizers.Optimizer:
    return keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.02), dynamic_growth_steps=3)


CASES: list[Any] = [
    pytest.param(make, optimizer, freq, after, id=f"{make.__name__}-{name}-{freq}-{after}")
    for make, name, optimizer, freq, after in [
        (functional, "adam", None, "epoch", 10),
        (functional, "adam", None, 3, 2),
        (functional, "scheduled", scheduled, 2, 12),
        (composite, "accumulating", accumulating, 3, 8),
        (one_block, "averaging", averaging, "epoch", 15),
        (subclassed, "scaled", scaled, 7, 16),
        (subclassed, "adam", None, 1, 14),
    ]
]
