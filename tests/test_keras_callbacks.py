"""Each callback of Keras, on an adapted model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from support.models import data, functional, randomize_adapters

import keras_lora as kl

EPOCHS = 3
MOMENTUM = 0.9
Factors = list[np.ndarray]


def model(averages: bool) -> keras.Model:
    made = kl.apply_lora(functional(), kl.LoRAConfig(rank=2, targets=["up", "middle"]))
    randomize_adapters(made)
    optimizer = keras.optimizers.SGD(0.1, use_ema=averages, ema_momentum=MOMENTUM)
    made.compile(optimizer, "mse")
    return made


def factors(adapted: keras.Model) -> Factors:
    layers = kl.lora_layers(adapted).values()
    return [np.array(f) for layer in layers for f in layer.adapters["default"].factors]


class Recorded(keras.callbacks.Callback):
    """The factors after each epoch, as they were before other callbacks changed them."""

    def __init__(self) -> None:
        super().__init__()
        self.epochs: list[Factors] = []

    def on_epoch_end(self, *_: Any, **__: Any) -> None:
        self.epochs.append(factors(self.model))


def last(epochs: list[Factors], _: Factors) -> Factors:
    return epochs[-1]


def first(epochs: list[Factors], _: Factors) -> Factors:
    return epochs[0]


def start(_: list[Factors], before: Factors) -> Factors:
    return before


def average(epochs: list[Factors], _: Factors) -> Factors:
    """The moving averages, of which each step of SGD is one (an epoch has one step)."""
    found = epochs[0]
    for values in epochs[1:]:
        pairs = zip(found, values, strict=True)
        found = [MOMENTUM * old + (1 - MOMENTUM) * new for old, new in pairs]
    return found


# A callback, and the factors that the model has in the end: of the epochs' and the first ones.
Case = tuple[Callable[[Path], Any], Callable[[list[Factors], Factors], Factors]]
CASES: dict[str, Case] = {
    "BackupAndRestore": (lambda p: keras.callbacks.BackupAndRestore(p / "backup"), last),
    "CSVLogger": (lambda p: keras.callbacks.CSVLogger(p / "log.csv"), last),
    # A loss cannot fall by so much: the first epoch stays the best.
    "EarlyStopping": (
        lambda _: keras.callbacks.EarlyStopping(
            "loss", min_delta=1e9, patience=1, restore_best_weights=True
        ),
        first,
    ),
    "History": (lambda _: keras.callbacks.History(), last),
    "LambdaCallback": (lambda _: keras.callbacks.LambdaCallback(), last),
    "LearningRateScheduler": (
        lambda _: keras.callbacks.LearningRateScheduler(lambda epoch, rate: 0.0),
        start,
    ),
    "ModelCheckpoint": (
        lambda p: keras.callbacks.ModelCheckpoint(p / "w.weights.h5", save_weights_only=True),
        last,
    ),
    "ProgbarLogger": (lambda _: keras.callbacks.ProgbarLogger(), last),
    "ReduceLROnPlateau": (lambda _: keras.callbacks.ReduceLROnPlateau("loss"), last),
    "SwapEMAWeights": (lambda _: keras.callbacks.SwapEMAWeights(swap_on_epoch=True), average),
    "TerminateOnNaN": (lambda _: keras.callbacks.TerminateOnNaN(), last),
}
NOT_TRIED = {
    "Callback": "the base class",
    "CallbackList": "what `fit` makes of the others",
    "MonitorCallback": "the base class of those that compare a metric",
    "OrbaxCheckpoint": "it asks for `get_state_tree`: test_keras_savers",
    "RemoteMonitor": "it sends the logs to a server",
    "TensorBoard": "it writes logs, with a package of its own",
}


def test_every_callback_is_accounted_for() -> None:
    public = {n for n, x in vars(keras.callbacks).items() if isinstance(x, type)}
    assert public - {"MonitorCallback"} <= CASES.keys() | NOT_TRIED.keys()
    assert not CASES.keys() & NOT_TRIED.keys()


@pytest.mark.parametrize("name", CASES)
def test_a_callback_leaves_the_base_and_gives_the_factors_that_it_should(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, expected = CASES[name]
    adapted, recorded = model(averages=name == "SwapEMAWeights"), Recorded()
    before = factors(adapted)
    frozen = [np.array(v) for v in adapted.non_trainable_variables if "lora" not in v.path]
    x, y = data(adapted)
    adapted.fit(
        x, y, batch_size=len(x), epochs=EPOCHS, verbose=0, callbacks=[recorded, make(tmp_path)]
    )
    capsys.readouterr()  # the progress bar
    wanted = expected(recorded.epochs, before)
    for value, other in zip(factors(adapted), wanted, strict=True):
        np.testing.assert_allclose(value, other, rtol=1e-5, atol=1e-6)
    for variable, value in zip(
        [v for v in adapted.non_trainable_variables if "lora" not in v.path], frozen, strict=True
    ):
        np.testing.assert_array_equal(variable, value)
    merged = kl.merge_lora(adapted, inplace=False)
    np.testing.assert_allclose(merged(x), adapted.predict(x, verbose=0), rtol=1e-4, atol=1e-5)
