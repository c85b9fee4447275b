"""`suggest_learning_rate`: its losses by hand, and the model as it was."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from rich.console import Console
from support import optimizers
from support.cases import snapshot
from support.models import functional

import keras_lora as kl

QUIET = Console(quiet=True)
RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(35, 5)).astype("float32"), RNG.normal(size=(35, 1)).astype("float32")
BATCHES = [(X[i : i + 7], Y[i : i + 7]) for i in range(0, 35, 7)]


def suggest(model: keras.Model, data: Any = BATCHES, **options: Any) -> kl.RateReport:
    return kl.suggest_learning_rate(model, data, console=QUIET, **options)


def line(optimizer: Any = "sgd", **options: Any) -> keras.Model:
    """`x w`, with every weight at a third."""
    kernel = keras.initializers.Constant(1 / 3)
    layer = keras.layers.Dense(1, use_bias=False, kernel_initializer=kernel, name="line")
    model = keras.Sequential([keras.Input((5,)), layer])
    model.compile(optimizer, "mse", **options)
    return model


def losses_by_hand(rate: float, steps: int) -> list[float]:
    """Gradient descent on `mean((x w - y)^2)`."""
    w, losses = np.full((5, 1), 1 / 3), []
    for x, y in [BATCHES[i % len(BATCHES)] for i in range(steps)]:
        losses.append(np.mean((x @ w - y) ** 2))
        w -= rate * 2 / len(x) * x.T @ (x @ w - y)
    return losses


def everything(model: keras.Model) -> Any:
    parts = [model.optimizer, *optimizers.parts(model.optimizer)]
    moments = [v for part in parts for v in part.variables]
    return snapshot([*model.variables, *model.metrics_variables, *moments])


def with_dropout(optimizer: Any, **options: Any) -> keras.Model:
    keras.utils.set_random_seed(0)
    model = functional()
    kl.apply_lora(model, kl.LoRAConfig(rank=2, dropout=0.1))
    model.compile(optimizer, "mse", metrics=["mae"], **options)
    return model


def rows_of(model: keras.Model) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    return rng.normal(size=(12, *model.input_shape[1:])), rng.normal(
        size=(12, *model.output_shape[1:])
    )


def test_losses_are_those_of_gradient_descent_from_the_same_start() -> None:
    rates, steps = [0.3, 0.01, 0.1], 7
    report = suggest(line(), rates=rates, steps=steps)
    expected = {rate: losses_by_hand(rate, steps) for rate in sorted(rates)}
    assert [trial.rate for trial in report.trials] == list(expected)
    for trial in report.trials:
        np.testing.assert_allclose(trial.losses, expected[trial.rate], rtol=1e-4)
        assert trial.loss == pytest.approx(np.mean(expected[trial.rate][3:]), rel=1e-4)
    assert report.learning_rate == min(expected, key=lambda rate: np.mean(expected[rate][3:]))


@pytest.mark.parametrize("first_that_is_too_large", [2.0, 1e25])
def test_rates_above_one_that_diverges_are_left_out(first_that_is_too_large: float) -> None:
    rates = [1e-3, 0.1, first_that_is_too_large, 1e30]
    report = suggest(line(), rates=rates, steps=6)
    assert [trial.rate for trial in report.trials] == rates[:3]
    assert report.learning_rate == 0.1


AT_AN_END = pytest.mark.filterwarnings("ignore:Expected the lowest loss within:UserWarning")


@AT_AN_END
@pytest.mark.parametrize("name", sorted(optimizers.CLASSES.keys() | optimizers.WRAPPERS))
def test_the_model_is_as_it_was(name: str) -> None:
    model = with_dropout(optimizers.optimizer(name), run_eagerly=True)
    x, y = rows_of(model)
    model.fit(x, y, verbose=0)
    before = everything(model)
    suggest(model, [(x, y)], rates=[1e-4, 1e-3, 1e-2], steps=2)
    assert everything(model) == before


@AT_AN_END
def test_training_goes_on_as_without_it() -> None:
    runs = []
    for suggested in (False, True):
        model = with_dropout("adam")
        x, y = rows_of(model)
        if suggested:
            suggest(model, [(x, y)], rates=[1e-4, 1e-3, 1e-2], steps=4)
        model.fit(x, y, batch_size=4, epochs=2, shuffle=False, verbose=0)
        runs.append(everything(model))
    assert runs[0] == runs[1]


@AT_AN_END
def test_an_adapter_that_was_padded_trains_at_its_own_rank() -> None:
    model = with_dropout("adafactor", run_eagerly=True)
    kl.apply_lora(model, kl.LoRAConfig(rank=4), "wide")
    for name in ("wide", "default"):
        kl.set_adapter(model, name)
    x, y = rows_of(model)
    adapter = kl.lora_layers(model)["up"].adapters["default"]
    before = np.array(adapter.a)
    suggest(model, [(x, y)], rates=[1e-3], steps=2)
    np.testing.assert_array_equal(adapter.a, before)


@AT_AN_END
def test_moving_statistics_and_weights_of_rows() -> None:
    inputs = keras.Input((5,))
    x = keras.layers.BatchNormalization()(inputs)
    model = keras.Model(inputs, keras.layers.Dense(1, kernel_initializer="ones", name="line")(x))
    model.compile("sgd", "mse", weighted_metrics=["mae"])
    before = snapshot(model.variables)
    weighted = [(x, y, np.arange(7.0)) for x, y in BATCHES]
    report = suggest(model, weighted, rates=[0.001, 0.01, 0.02], steps=3)
    assert snapshot(model.variables) == before
    again = suggest(model, weighted, rates=[0.01], steps=3)
    assert again.trials[0].losses == report.trials[1].losses


@pytest.mark.parametrize(("rates", "side"), [([1e-5, 1e-4], "higher"), ([0.2, 5.0], "lower")])
def test_an_end_of_the_range_is_said(rates: Sequence[float], side: str) -> None:
    with pytest.warns(UserWarning, match=f"a {side} rate may be better"):
        suggest(line(), rates=rates, steps=4)


def test_a_table_and_a_picture(tmp_path: Path) -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    options: Any = {"rates": [0.001, 0.1, 1e25], "steps": 4, "console": console}
    report = kl.suggest_learning_rate(line(), BATCHES, plot=tmp_path / "rates.png", **options)
    lowest = next(x for x in console.export_text().splitlines() if "lowest" in x)
    assert lowest.split() == [
        "1.0e-01",
        f"{losses_by_hand(0.1, 1)[0]:.4f}",
        lowest.split()[2],
        "lowest",
    ]
    assert lowest.split()[2] == f"{report.best.loss:.4f}"
    assert (tmp_path / "rates.png").read_bytes().startswith(b"\x89PNG")


def frozen() -> keras.Model:
    model = line()
    model.trainable = False
    return model


def scheduled() -> keras.Model:
    schedule = keras.optimizers.schedules.CosineDecay(0.1, 100)
    return line(keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(schedule)))


class Silent(keras.Sequential):
    def train_on_batch(self, *args: Any, **options: Any) -> Any:
        super().train_on_batch(*args, **options)
        return {"error": 1.0}


def silent() -> keras.Model:
    model = Silent([keras.Input((5,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse", run_eagerly=True)
    return model


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (line, {"rates": []}, "Invalid `rates`: expected positive numbers"),
        (line, {"rates": [0.1, 0.0]}, "Invalid `rates`: expected positive numbers"),
        (line, {"rates": [float("nan")]}, "Invalid `rates`"),
        (line, {"rates": "fast"}, "Invalid `rates`"),
        (line, {"steps": 1}, "Invalid `steps`: expected at least 2"),
        (line, {"data": (X, Y)}, r"put the batches in a list: data=\[\(x, y\)\]"),
        (line, {"data": []}, "at least one batch"),
        (line, {"rates": [1e25]}, r"stays finite.*rates=\[1e\+23, 1e\+24\]"),
        (functional, {}, "expected a compiled model"),
        (frozen, {}, "a model in which something trains"),
        (scheduled, {}, "one without a schedule"),
        (silent, {}, r"'loss' among what a step of training returns.*\['error'\]"),
    ],
)
def test_what_is_refused_changes_nothing(make: Any, options: Any, message: str) -> None:
    model = make()
    before = snapshot(model.variables)
    with pytest.raises(ValueError, match=message):
        suggest(model, **{"data": BATCHES, "steps": 8, **options})
    assert snapshot(model.variables) == before
