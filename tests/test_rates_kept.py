"""Learning rates by group in configs and files, and the plain optimizer of a plain model."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from support.cases import numpy_of
from support.optimizers import (
    CLASSES,
    OUT,
    WIDTH,
    adapt,
    base,
    compile_,
    optimizer,
    parts,
    steps,
    values,
)
from support.rates import RATES, everything, rated

import keras_lora as kl


def test_lora_plus_is_the_case_of_b() -> None:
    found = kl.LoRAPlus("adam", ratio=5)
    config = kl.set_rates(keras.optimizers.Adam(name=found.name), b=5).get_config()
    assert found.get_config() == config
    others = dict.fromkeys(("a", "magnitudes", "tokens", "heads", "biases"), 1)
    assert config["rates"] == {"b": 5} | others


@pytest.mark.parametrize("name", CLASSES)
def test_rates_come_back_from_a_config_and_go(name: str) -> None:
    found = kl.set_rates(optimizer(name, weight_decay=0.3), **RATES)
    config = keras.saving.serialize_keras_object(found)
    again = keras.saving.deserialize_keras_object(copy.deepcopy(config))  # which is changed
    assert keras.saving.serialize_keras_object(again) == config
    for part, other in zip(parts(found), parts(again), strict=True):
        assert type(part) is type(other)
        assert part.get_config()["rates"] == RATES
        assert part.weight_decay == 0.3
    for part in parts(kl.set_rates(again)):
        assert type(part) in (type(x) for x in parts(optimizer(name)))
        assert "rates" not in part.get_config()


def test_a_callback_that_sets_the_rate_sets_it_for_all_groups() -> None:
    found = rated()
    model = everything()
    compile_(model, found)
    model.optimizer.learning_rate = 0.5
    assert float(found.learning_rate) == 0.5


@pytest.mark.parametrize("before", [0, 2])
def test_a_keras_file_goes_on_with_the_same_rates(before: int, tmp_path: Path) -> None:
    model = everything()
    compile_(model, rated())
    steps(model, before)
    model.save(tmp_path / "m.keras")
    again = keras.saving.load_model(tmp_path / "m.keras")
    compile_(again, again.optimizer)
    for each in (model, again):
        steps(each, 2)
    for found, right in zip(again.trainable_variables, model.trainable_variables, strict=True):
        np.testing.assert_allclose(numpy_of(found), numpy_of(right), rtol=1e-4, atol=1e-6)


class Stop(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:  # noqa: ARG002
        if epoch == 2:
            raise InterruptedError


@pytest.mark.parametrize("make", [rated, lambda: kl.LoRAPlus(keras.optimizers.Adam(0.02), 8)])
def test_a_backup_goes_on_with_the_same_rates(make: Callable[[], Any], tmp_path: Path) -> None:
    x, y = np.ones((4, WIDTH)), np.ones((4, OUT))
    moved: list[list[np.ndarray]] = []
    for callbacks in ([], [Stop()], []):
        model = everything()
        compile_(model, make())
        backup = [keras.callbacks.BackupAndRestore(tmp_path)] if moved else []
        with contextlib.suppress(InterruptedError):
            model.fit(x, y, 2, epochs=4, shuffle=False, callbacks=backup + callbacks, verbose=0)
        moved.append([numpy_of(v) for v in model.trainable_variables])
    for found, expected in zip(moved[2], moved[0], strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def plain_copy_of(model: keras.Model) -> keras.Model:
    return kl.merge_lora(model, inplace=False)


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("verb", [kl.merge_lora, kl.unload_lora, plain_copy_of])
def test_a_plain_model_has_a_plain_optimizer(
    verb: Callable[[keras.Model], keras.Model], trained: bool
) -> None:
    model = everything()
    compile_(model, keras.optimizers.LossScaleOptimizer(rated()))
    if trained:
        steps(model, 1)
    (part,) = parts(verb(model).optimizer)
    assert type(part) is type(keras.optimizers.Adam())


def test_a_merged_context_has_a_plain_optimizer() -> None:
    model = everything()
    compile_(model, rated())
    with kl.merged(model) as plain:
        saved = plain.get_compile_config()["optimizer"]
    assert "keras_lora" not in str(saved)
    assert model.optimizer.get_config()["rates"] == RATES


def test_an_optimizer_of_another_class_keeps_its_rates_when_it_is_made_anew() -> None:
    class Halved(keras.optimizers.SGD):
        def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
            super().update_step(gradient / 2, variable, learning_rate)

        _parallel_update_step = None  # Keras's one call on torch is not this class's

    model = base()
    compile_(model, kl.set_rates(Halved(0.1), b=4))
    adapt(model, "a")
    before = values(model, "a")
    steps(model, 1)
    adapt(model, "bb", layers_to_save=["head"])
    assert model.optimizer.get_config()["rates"]["b"] == 4
    assert float(model.optimizer.learning_rate) == pytest.approx(0.1)
    assert abs(values(model, "a")[1] - before[1]).max() > 0


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "zero": (lambda: kl.set_rates("sgd", a=0), "Invalid `a`: expected a finite number above 0"),
    "infinite": (lambda: kl.LoRAPlus("sgd", float("inf")), "Invalid `b`"),
    "a flag": (lambda: kl.set_rates("sgd", heads=True), "Invalid `heads`"),
    "a function": (
        lambda: kl.set_rates(keras.optimizers.MultiOptimizer(lambda _: rated()), b=2),
        "OptimizerMap, whose optimizers are known",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused(kind: str) -> None:
    call, message = REFUSED[kind]
    with pytest.raises(ValueError, match=message):
        call()


def test_a_built_optimizer_is_refused() -> None:
    found = keras.optimizers.SGD(0.1)
    found.build([keras.Variable(np.ones(2))])
    with pytest.raises(ValueError, match="one that is not built.*compile the model with a new one"):
        kl.set_rates(found, b=2)
    assert type(found) is type(keras.optimizers.SGD())
