"""DoRA: the invariants over every kind of layer; on every backend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from support.cases import (
    ALPHA,
    BY_ID,
    CONVOLUTIONS,
    LINEAR,
    RANK,
    ROUNDING,
    TABLES,
    Case,
    adapted,
    adapter,
    config,
    named,
    numpy_of,
    randomize,
    reference_delta,
    reference_dora,
    reference_output,
    relative,
    snapshot,
)

import keras_lora as kl

# Some kernels of the cases have a side of one.
pytestmark = pytest.mark.filterwarnings("ignore:The rank is above:UserWarning")
dora_cases = pytest.mark.parametrize("case", [*LINEAR, *CONVOLUTIONS], ids=lambda case: case.id)
SCALE = ALPHA / RANK


def reference_kernel(case: Case, model: keras.Model, w0: np.ndarray) -> np.ndarray:
    a, b, m = map(numpy_of, adapter(model).factors)
    return reference_dora(case, w0 + reference_delta(case, a, b, SCALE), m)


@dora_cases
def test_the_invariants_of_an_adapted_layer(case: Case) -> None:
    model, x = case.model(), case.batch()
    base, flags = snapshot(model.weights), [v.trainable for v in model.weights]
    output, w0 = numpy_of(model(x)), numpy_of(model.get_layer("case").kernel)
    kl.apply_lora(model, config(use_dora=True))
    assert relative(model(x), output) <= 1e-6

    randomize(adapter(model).factors)
    kernel = reference_kernel(case, model, w0)
    expected = reference_output(case, model, x, kernel)
    assert relative(model(x), expected) <= 1e-5
    assert relative(model.get_layer("case").kernel, kernel) <= 1e-5
    with kl.disable_adapter(model):
        assert relative(model(x), output) <= 1e-6

    before = snapshot(model.weights)
    with kl.merged(model) as plain:
        assert relative(plain(x), expected) <= 1e-5
    assert snapshot(model.weights) == before
    assert relative(model(x), expected) <= 1e-5

    kl.unload_lora(model)
    assert snapshot(model.weights) == base
    assert [v.trainable for v in model.weights] == flags


@dora_cases
def test_fit_moves_its_factors_alone_and_weights_continue(case: Case, tmp_path: Path) -> None:
    model, x = case.model(), case.batch(6)
    kl.apply_lora(model, config(use_dora=True))
    model.compile("adam", "mse", run_eagerly=case.eager)
    frozen = [v for v in model.weights if not v.trainable]
    before, start = snapshot(frozen), snapshot(adapter(model).factors)
    model.fit(x, np.ones(model(x).shape), batch_size=2, verbose=0)
    assert snapshot(frozen) == before
    after = snapshot(adapter(model).factors)
    assert all(new != old for new, old in zip(after, start, strict=True))
    assert [v.name for v in model.trainable_variables] == ["lora_a", "lora_b", "lora_magnitude"]

    model.save_weights(tmp_path / "m.weights.h5")
    fresh = kl.apply_lora(case.model(), config(use_dora=True))
    randomize(reversed(fresh.weights))
    fresh.load_weights(tmp_path / "m.weights.h5")
    np.testing.assert_array_equal(numpy_of(fresh(x)), numpy_of(model(x)))
    expected = numpy_of(model(x))
    assert relative(kl.merge_lora(model)(x), expected) <= 1e-5


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize(
    "case",
    named("dense, activation", "btd,dnh->btnh", "bed,edf->bef", "conv2d, same"),
    ids=lambda c: c.id,
)
def test_low_precision_stays_within_rounding(case: Case, dtype: str) -> None:
    model, x = case.model(dtype=dtype), case.batch()
    w0 = numpy_of(model.get_layer("case").kernel)
    adapted(case, model, use_dora=True)
    assert {str(v.dtype) for v in adapter(model).factors} == {"float32"}
    expected = reference_output(case, model, x, reference_kernel(case, model, w0))
    assert relative(model(x), expected) <= ROUNDING[dtype]
    kl.merge_lora(model)
    assert relative(model(x), expected) <= ROUNDING[dtype]


@pytest.mark.parametrize("dtype", ["mixed_bfloat16", "bfloat16"])
def test_a_small_gain_is_not_lost_in_16_bits(dtype: str) -> None:
    """A gain of 1.003 is 1 in bfloat16; over many outputs its effect must stay."""
    model = keras.Sequential(
        [keras.Input((251,)), keras.layers.Dense(257, dtype=dtype, name="case")]
    )
    x = np.random.default_rng(0).normal(size=(31, 251)).astype("float32")
    kl.apply_lora(model, config(use_dora=True))
    base = numpy_of(model(x))
    m = adapter(model).factors[2]
    m.assign(1.003 * np.array(m))
    moved = numpy_of(model(x))
    assert 1.002 < np.vdot(moved, base) / np.vdot(base, base) < 1.004


def test_deltas_of_several_adapters_add_up() -> None:
    case = BY_ID["btd,dnh->btnh"]
    model, x = case.model(), case.batch()
    w0 = numpy_of(model.get_layer("case").kernel)
    for name, dora in [("one", True), ("plain", False), ("two", True)]:
        kl.apply_lora(model, config(use_dora=dora), name=name)
        randomize(adapter(model, name).factors)
    total = w0
    for name in ("one", "plain", "two"):
        a, b, *m = map(numpy_of, adapter(model, name).factors)
        kernel = w0 + reference_delta(case, a, b, SCALE)
        total = total + (reference_dora(case, kernel, *m) if m else kernel) - w0
    kl.set_adapter(model, ["one", "plain", "two"])
    assert relative(model.get_layer("case").kernel, total) <= 1e-5
    assert relative(model(x), reference_output(case, model, x, total)) <= 1e-5


@pytest.mark.parametrize(
    "case",
    named("dense, no bias", "btd,nhd->btnh", "bed,edf->bef"),
    ids=lambda c: c.id,
)
def test_dropout_is_on_both_products(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """x W0 + (g - 1) drop(x) W0 + g s (drop(x) A) B, as in PEFT."""
    mask = np.random.default_rng(4).integers(0, 2, (3, *case.input_shape)).astype("float32")
    monkeypatch.setattr(
        "keras_lora.layers.slot_adapters.dropped", lambda x, *_: 2 * x * keras.ops.array(mask)
    )
    model, x = case.model(activation=None), case.batch()
    w0 = numpy_of(model.get_layer("case").kernel)
    adapted(case, model, use_dora=True, dropout=0.5)
    kernel = reference_kernel(case, model, w0)
    linear = reference_output(case, model, x, w0)
    linear += np.einsum(case.equation, 2 * x.astype("float64") * mask, kernel - w0)
    assert relative(model(x, training=True), linear) <= 1e-5
    assert relative(model(x), reference_output(case, model, x, kernel)) <= 1e-5


def dense_with(w0: np.ndarray) -> keras.Model:
    layer = keras.layers.Dense(w0.shape[1], use_bias=False, name="case")
    model = keras.Sequential([keras.Input((w0.shape[0],)), layer])
    layer.kernel.assign(w0)
    return kl.apply_lora(model, config(use_dora=True))


def test_an_output_without_weights_is_no_nan() -> None:
    w0 = np.random.default_rng(0).normal(size=(5, 7)).astype("float32")
    w0[:, 3] = 0
    model, x = dense_with(w0), np.ones((3, 5), "float32")
    assert relative(model(x), x @ w0) <= 1e-6
    model.compile(keras.optimizers.SGD(0.1), "mse")
    model.fit(x, np.ones((3, 7)), epochs=2, verbose=0)
    for factor in adapter(model).factors:
        assert np.isfinite(factor).all()
    assert np.isfinite(numpy_of(kl.merge_lora(model).get_layer("case").kernel)).all()


def test_weights_that_cancel_leave_a_bounded_gain() -> None:
    """If s A B = -W0, the norm of the sum is only a rounding error."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(5, RANK)), rng.normal(size=(RANK, 7))
    model = dense_with((-SCALE * a @ b).astype("float32"))
    for factor, value in zip(adapter(model).factors[:2], (a, b), strict=True):
        factor.assign(value)
    assert np.abs(numpy_of(model.get_layer("case").kernel)).max() < 1e-2


class Parent(keras.layers.Layer):
    def __init__(self) -> None:
        super().__init__()
        self.inner = kl.LoRADense(5, rank=2, use_dora=True)

    def call(self, inputs: Any) -> Any:
        return self.inner(inputs)


@pytest.mark.parametrize("first", ["symbolic", "fit"])
def test_a_layer_that_is_built_within_a_graph_starts_at_the_norms(first: str) -> None:
    parent = Parent()
    model = keras.Sequential([*([keras.Input((3,))] if first == "symbolic" else []), parent])
    model.compile(keras.optimizers.SGD(0.0), "mse")
    if first == "fit":
        model.fit(np.ones((4, 3)), np.ones((4, 5)), verbose=0)
    norms = np.linalg.norm(numpy_of(parent.inner.base_kernel), axis=0)
    np.testing.assert_allclose(np.array(parent.inner.adapters["default"].magnitude), norms, 1e-6)
    assert len(parent.trainable_variables) == 3


@pytest.mark.parametrize("case", TABLES, ids=lambda c: c.id)
def test_an_embedding_has_no_magnitude(case: Case) -> None:
    model = case.model()
    with pytest.raises(ValueError, match=r"use_dora.*False for \['case'\]"):
        kl.apply_lora(model, config(use_dora=True))
    assert not kl.lora_layers(model)
