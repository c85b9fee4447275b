"""Each warning names the line of the user's call, however deep in the package or in Keras."""

# A lambda stands for the user's line: the warning must name the lambda's frame.
# ruff: noqa: PLW0108

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from support.broken_runs import BreakAfter, BrokenError, adapted, fit
from support.models import data, functional

import keras_lora as kl
from keras_lora.files.adapter_files import write_adapter_files

CONFIG = kl.LoRAConfig(rank=2, targets=["up"])
DROPOUT = kl.LoRAConfig(rank=2, targets=["up"], dropout=0.5)


class Doubled(keras.layers.Dense):
    def call(self, inputs: Any, training: bool | None = None) -> Any:
        return 2 * super().call(inputs, training=training)


def partly_adaptable() -> keras.Model:
    return keras.Sequential(
        [keras.Input((5,)), Doubled(5, name="double"), keras.layers.Dense(7), keras.layers.Dense(3)]
    )


def one(config: kl.LoRAConfig = CONFIG) -> keras.Model:
    return kl.apply_lora(functional(), config)


def two() -> keras.Model:
    return kl.apply_lora(one(), CONFIG, name="two")


def saved(path: Path, config: kl.LoRAConfig = CONFIG) -> Path:
    kl.save_adapter(one(config), path)
    return path


def of_more_layers(path: Path) -> Path:
    return saved(path, kl.LoRAConfig(rank=2, targets=["up", "middle"]))


def with_unknown_field(path: Path) -> Path:
    files = kl.read_adapter_files(saved(path))
    config = files.config | {"of_a_newer_version": 1}
    write_adapter_files(path, config, files.tensors, overwrite=True)
    return path


def edited(path: Path) -> Path:
    file = saved(path) / "adapter_config.json"
    file.write_text(file.read_text().replace("keras_version", "the_version"))
    return path


def without_middle() -> keras.Model:
    inputs = keras.Input((5,))
    x = keras.layers.Dense(7, name="up")(inputs)
    return keras.Model(inputs, keras.layers.Dense(3, name="head")(x))


def base_weights(path: Path) -> Path:
    path.mkdir()
    functional().save_weights(path / "base.weights.h5")
    return path / "base.weights.h5"


def of_unregistered_loss() -> keras.Model:
    model = functional()
    model.compile("sgd", loss=lambda y, p: keras.ops.mean(keras.ops.square(y - p)))
    return model


def compiled() -> keras.Model:
    model = one()
    model.compile("sgd", "mse")
    return model


def ended(path: Path) -> kl.AdapterCheckpoint:
    fit(adapted(functional), kl.AdapterCheckpoint(path), epochs=1)
    return kl.AdapterCheckpoint(path)


def broken(path: Path) -> kl.AdapterCheckpoint:
    with pytest.raises(BrokenError):
        fit(adapted(functional), kl.AdapterCheckpoint(path, save_freq=2), BreakAfter(3))
    return kl.AdapterCheckpoint(path, save_freq=2)


def of_other_metrics(_: Path) -> keras.Model:
    model = adapted(functional, 2)
    model.compile(keras.optimizers.Adam(0.02), "mse", metrics=["mse", "mae", "mape"])
    return model


def unmonitored(path: Path) -> list[keras.callbacks.Callback]:
    return [kl.AdapterCheckpoint(path, monitor="nothing", save_best_only=True, mode="min")]


X, Y = np.ones((7, 5), "float32"), np.ones((7, 3), "float32")

# A text of the warning; a function from a directory to the call's arguments; the call, on one line.
CASES: dict[str, tuple[Callable[[Path], tuple[Any, ...]], Callable[..., Any]]] = {
    "leaves out 'double'": (lambda _: (partly_adaptable(),), lambda m: kl.apply_lora(m)),
    "all' leaves out": (lambda _: (partly_adaptable(),), lambda m: kl.find_targets(m, "all")),
    "rank is above": (
        lambda _: (functional(), kl.LoRAConfig(rank=50)),
        lambda m, config: kl.apply_lora(m, config),
    ),
    "was not compiled": (
        lambda _: (of_unregistered_loss(),),
        lambda m: kl.apply_lora(m, CONFIG, inplace=False),
    ),
    "Merging drops": (lambda _: (two(),), lambda m: kl.merge_lora(m)),
    "no such layer": (
        lambda path: (without_middle(), of_more_layers(path)),
        lambda m, path: kl.load_adapter(m, path, allow_other_base=True),
    ),
    "unknown fields": (
        lambda path: (functional(), with_unknown_field(path)),
        lambda m, path: kl.load_adapter(m, path),
    ),
    "save was interrupted": (
        lambda path: (edited(path),),
        lambda path: kl.read_adapter_files(path),
    ),
    "dropout is left out": (
        lambda path: (one(), saved(path, DROPOUT)),
        lambda m, path: kl.load_adapter(m, path, replace=True),
    ),
    "contains no adapters": (
        lambda path: (one(), base_weights(path)),
        lambda m, path: m.load_weights(path),
    ),
    "best or not": (
        lambda path: (compiled(), unmonitored(path)),
        lambda m, callbacks: m.fit(X, Y, verbose=0, callbacks=callbacks),
    ),
    "has ended": (
        lambda path: (adapted(functional, 2), ended(path)),
        lambda m, checkpoint: m.fit(X, Y, verbose=0, callbacks=[checkpoint]),
    ),
    "first part": (
        lambda path: (of_other_metrics(path), broken(path)),
        lambda m, checkpoint: m.fit(*data(m, 7), batch_size=1, verbose=0, callbacks=[checkpoint]),
    ),
}


@pytest.mark.parametrize("message", CASES)
def test_a_warning_names_the_line_of_the_call(message: str, tmp_path: Path) -> None:
    prepare, call = CASES[message]
    needed = prepare(tmp_path / "files")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call(*needed)
    (warning,) = [w for w in caught if message in str(w.message)]
    assert (warning.filename, warning.lineno) == (__file__, call.__code__.co_firstlineno)
