"""Adapters that began with a counterpart: in files, in resumed runs, and as ordinary LoRA."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from rich.console import Console
from support.broken_runs import CONFIG, BreakAfter, BrokenError, adapted, assert_same, fit, trained
from support.cases import numpy_of, relative
from support.models import data, functional

import keras_lora as kl

PISSA = dataclasses.replace(CONFIG, init="pissa:1", dropout=0.0)


def counterparts(model: keras.Model) -> list[np.ndarray]:
    parts = [x.adapters["default"] for x in kl.lora_layers(model).values()]
    return [np.array(f) for part in parts for f in part.counterpart or ()]


def same_outputs(model: keras.Model, other: keras.Model) -> None:
    x = data(model)[0]
    assert relative(other(x), model(x)) <= 1e-5


def by_adapter(directory: Path) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    def load(_: Any) -> Any:
        keras.utils.set_random_seed(0)
        model = functional()
        kl.load_adapter(model, directory)
        return model

    return lambda model: kl.save_adapter(model, directory), load


def by_weights(directory: Path) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    def load(_: Any) -> Any:
        model = kl.apply_lora(functional(), PISSA)
        model.load_weights(directory / "x.weights.h5")
        return model

    directory.mkdir()
    return lambda model: model.save_weights(directory / "x.weights.h5"), load


@pytest.mark.parametrize("way", [by_adapter, by_weights], ids=lambda way: way.__name__)
def test_an_adapter_from_files_trains_on_as_the_one_that_was_saved(
    way: Any, tmp_path: Path
) -> None:
    save, load = way(tmp_path / "files")
    model = adapted(functional, config=PISSA)
    fit(model)
    save(model)
    again = load(model)
    same_outputs(model, again)
    assert_same(counterparts(again), counterparts(model))
    for each in (model, again):
        each.compile(keras.optimizers.SGD(0.05), "mse")
        fit(each)
    for mine, theirs in zip(trained(again), trained(model), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)


def test_a_keras_file_goes_on_with_the_counterpart(tmp_path: Path) -> None:
    model = adapted(functional, config=PISSA)
    fit(model)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    same_outputs(model, again)
    assert_same(counterparts(again), counterparts(model))
    fit(model)
    fit(again)
    assert_same(trained(again), trained(model))


def test_a_broken_run_goes_on_with_the_counterpart_that_it_had(tmp_path: Path) -> None:
    """A randomised start draws another counterpart in the process that goes on."""
    unbroken, broken, model = (adapted(functional, seed, config=PISSA) for seed in (1, 1, 2))
    assert not np.array_equal(counterparts(broken)[0], counterparts(model)[0])
    fit(unbroken)
    with pytest.raises(BrokenError):
        fit(broken, kl.AdapterCheckpoint(tmp_path, save_freq=3), BreakAfter(10))
    fit(model, kl.AdapterCheckpoint(tmp_path, save_freq=3))
    assert_same(trained(model), trained(unbroken))
    assert_same(counterparts(model), counterparts(unbroken))


@pytest.mark.parametrize(("dtype", "rounding"), [("float32", 1e-6), ("bfloat16", 2e-2)])
def test_files_in_16_bits_are_of_twice_the_rank_and_keep_what_was_learned(
    dtype: str, rounding: float, tmp_path: Path
) -> None:
    model = adapted(functional, config=PISSA)
    fit(model)
    kl.save_adapter(model, tmp_path / "a", dtype=dtype)
    x = data(model)[0]
    with kl.disable_adapter(model):
        base = numpy_of(model(x))
    learned = numpy_of(model(x)) - base
    kl.load_adapter(model, tmp_path / "a", "again")
    kl.set_adapter(model, "again")
    assert relative(numpy_of(model(x)) - base, learned) <= rounding
    part = kl.lora_layers(model)["up"].adapters["again"]
    assert part.spec.rank == (CONFIG.rank if dtype == "float32" else 2 * CONFIG.rank)


def test_an_adapter_with_a_counterpart_takes_the_place_of_its_like_alone(tmp_path: Path) -> None:
    model = adapted(functional, config=PISSA)
    kl.save_adapter(model, tmp_path / "a")
    x = data(model)[0]
    expected = numpy_of(model(x))
    fit(model)
    kl.load_adapter(model, tmp_path / "a", replace=True)
    assert relative(model(x), expected) <= 1e-6
    plain = adapted(functional, config=dataclasses.replace(PISSA, init="gaussian"))
    with pytest.raises(kl.AdapterFileError, match=r"up: a start with a counterpart, 'pissa:1'"):
        kl.load_adapter(plain, tmp_path / "a", replace=True)


def test_a_summary_counts_the_counterpart_as_what_never_trains() -> None:
    model = adapted(functional, config=PISSA)
    summary = kl.lora_summary(model, Console(quiet=True))
    size = sum(x.size for x in counterparts(model))
    rows = sum(row.parameters for row in summary.rows)
    assert size == rows
    base = functional().count_params()
    assert summary.model_parameters == base + rows + size


def test_a_copy_and_a_layer_made_by_hand_have_counterparts() -> None:
    model = adapted(functional, config=PISSA)
    fit(model)
    same_outputs(model, kl.merge_lora(model, inplace=False))
    layer = kl.LoRADense(7, rank=2, alpha=3, init="pissa")
    layer.build((None, 5))
    a, b, a0, b0 = map(numpy_of, layer.adapters["default"].named_factors.values())
    np.testing.assert_array_equal(a @ b, a0 @ b0)
    assert a.any()
    assert [v.name for v in layer.trainable_variables] == ["lora_a", "lora_b"]
    copy = type(layer).from_config(layer.get_config())
    copy.build((None, 5))
    assert [v.shape for v in copy.weights] == [v.shape for v in layer.weights]
