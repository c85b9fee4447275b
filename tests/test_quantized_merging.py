"""Merging adapters into quantized layers: to floating point, or to integers anew."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from support.cases import (
    Case,
    adapted,
    config,
    kernel_of,
    numpy_of,
    randomize,
    relative,
    snapshot,
)
from support.models import CONFIG, functional, randomize_adapters, state
from support.quantized import CALIBRATED, EXACT, GRIDS, LINEAR, TABLES, quantized

import keras_lora as kl

MERGED = [(case, grid) for case in [*LINEAR[:3], TABLES[0]] for grid in GRIDS]
MERGED = [(c, g) for c, g in MERGED if c in LINEAR or g not in CALIBRATED]
merged_pairs = pytest.mark.parametrize(
    ("case", "grid"), MERGED, ids=[f"{case.id}, {grid}" for case, grid in MERGED]
)


@merged_pairs
def test_dequantized_layers_are_plain_and_compute_as_the_adapted_ones(
    case: Case, grid: str
) -> None:
    plain = case.model()
    model, x = adapted(case, quantized(case, grid)), case.batch()
    output, kernel = numpy_of(model(x)), numpy_of(kernel_of(model.get_layer("case")))
    copies = [] if grid in CALIBRATED else [False]  # their config does not make them anew
    for inplace in [*copies, True]:
        merged = kl.merge_lora(model, inplace=inplace, quantized="dequantize")
        layer = merged.get_layer("case")
        assert (merged is model) is inplace
        assert type(layer) is case.make
        assert layer.dtype_policy == plain.get_layer("case").dtype_policy
        described = [
            [(v.path, v.shape, v.dtype, v.trainable) for v in m.weights] for m in (merged, plain)
        ]
        assert described[0] == described[1]
        assert relative(merged(x), output) <= (1e-5 if grid != "int8" else 0.05)
        np.testing.assert_array_equal(numpy_of(kernel_of(layer)), kernel.astype("float32"))
    GRIDS[grid](model.get_layer("case"))  # as any layer in floating point


@merged_pairs
def test_requantized_layers_have_the_drift_that_is_told(case: Case, grid: str) -> None:
    base = quantized(case, grid)
    paths = sorted(v.path for v in base.weights)
    model, drift = adapted(case, base), dict[str, kl.Drift]()
    kernel = numpy_of(kernel_of(model.get_layer("case")))
    assert kl.merge_lora(model, quantized="requantize", drift=drift) is model
    assert type(model.get_layer("case")) is case.make
    assert sorted(v.path for v in model.weights) == paths
    after = numpy_of(kernel_of(kl.apply_lora(model, config()).get_layer("case")))
    np.testing.assert_allclose(drift["case"].largest, np.abs(after - kernel).max(), rtol=1e-3)
    change = np.linalg.norm(after - kernel) / np.linalg.norm(kernel)
    np.testing.assert_allclose(drift["case"].relative, change, rtol=1e-3)
    bits = 8 if "int8" in grid else 2 if "2 bits" in grid else 4
    assert 0 < change <= 2.0 ** (2 - bits) or "groups" in grid


def test_requantizing_without_adapters_in_reverse_keeps_the_other_matrix() -> None:
    case = TABLES[2]
    model = adapted(case, quantized(case, "int4, groups of 3"))
    names = ("reverse_embeddings", "reverse_embeddings_scale", "reverse_embeddings_zero")
    before = snapshot(getattr(model.get_layer("case"), name) for name in names)
    kl.merge_lora(model, quantized="requantize", drift={})
    assert snapshot(getattr(model.get_layer("case"), name) for name in names) == before
    tokens = np.random.default_rng(5).normal(size=(3, 5)).astype("float32")
    other = adapted(case, quantized(case, "int4, groups of 3"))
    logits = numpy_of(other.get_layer("case")(tokens, reverse=True))
    kl.merge_lora(other, quantized="dequantize")
    assert relative(other.get_layer("case")(tokens, reverse=True), logits) <= 1e-5


def partly() -> keras.Model:
    model = functional()
    model.get_layer("up").quantize("int4")
    kl.apply_lora(model, CONFIG)
    randomize_adapters(model)
    return model


def test_without_a_word_both_ways_are_explained_and_nothing_changes() -> None:
    model = partly()
    before = state(model)
    calls: list[Callable[[], Any]] = [
        lambda: kl.merge_lora(model),
        lambda: kl.merge_lora(model, inplace=False),
        lambda: kl.merged(model).__enter__(),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"\['up'\].*\"dequantize\".*\"requantize\".*drift"):
            call()
        assert state(model) == before
    with pytest.raises(ValueError, match="Invalid `quantized`"):
        kl.merge_lora(model, quantized="float")
    kl.set_adapter(model, None)
    kl.apply_lora(model, kl.LoRAConfig(rank=2, targets=["middle"]), name="other")
    with pytest.warns(UserWarning, match="not active"):
        kl.merge_lora(model)  # no adapter acts on the integers
    assert model.get_layer("up").dtype_policy.quantization_mode == "int4"


def test_drift_is_a_warning_unless_it_is_asked_for() -> None:
    with pytest.warns(UserWarning, match="rounded to integers anew.*up: .*%"):
        kl.merge_lora(partly(), quantized="requantize")


def test_a_compiled_model_goes_on_after_merging() -> None:
    model, x = partly(), np.random.default_rng(5).normal(size=(6, 5)).astype("float32")
    model.compile("sgd", "mse", run_eagerly=keras.backend.backend() == "tensorflow")
    model.fit(x, np.ones((6, 3)), verbose=0)
    adapted_output = numpy_of(model(x))
    kl.merge_lora(model, quantized="dequantize")
    assert relative(model(x), adapted_output) <= 1e-5
    assert all(v.trainable for layer in model.layers if layer.name != "norm" for v in layer.weights)
    before = numpy_of(model.get_layer("up").kernel)
    model.fit(x, np.zeros((6, 3)), verbose=0)
    assert np.abs(numpy_of(model.get_layer("up").kernel) - before).max() > 0


def test_a_layer_that_was_frozen_stays_frozen() -> None:
    case = LINEAR[0]
    model = case.model()
    model.get_layer("case").trainable = False
    GRIDS["int8"](model.get_layer("case"))
    kl.merge_lora(adapted(case, model), quantized="dequantize")
    assert not model.trainable_variables
    assert not any(v.trainable for v in model.weights)


def test_several_adapters_merge_as_their_sum() -> None:
    case, grid = LINEAR[1], next(iter(EXACT))
    model, x = quantized(case, grid), case.batch()
    for name in ("one", "two"):
        kl.apply_lora(model, config(), name=name)
        randomize(kl.lora_layers(model)["case"].adapters[name].factors)
    kl.set_adapter(model, ["one", "two"])
    output = numpy_of(model(x))
    assert relative(kl.merge_lora(model, quantized="dequantize")(x), output) <= 1e-5
