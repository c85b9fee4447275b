"""The invariants of an adapted layer, over every kind of layer; on every backend."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import ops
from support.cases import (
    ALPHA,
    BY_ID,
    CASES,
    IDS,
    LINEAR,
    RANK,
    ROUNDING,
    TABLES,
    Case,
    adapted,
    adapter,
    config,
    kernel_of,
    named,
    numpy_of,
    randomize,
    reference_delta,
    reference_output,
    relative,
    snapshot,
)

import keras_lora as kl
from keras_lora.layers import MixedBatch, site_of

# Some kernels of the cases have a side of one.
pytestmark = pytest.mark.filterwarnings("ignore:The rank is above:UserWarning")
all_cases = pytest.mark.parametrize("case", CASES, ids=IDS)
linear_cases = pytest.mark.parametrize("case", LINEAR, ids=lambda case: case.id)
SCALE = ALPHA / RANK


@all_cases
def test_fresh_adapter_changes_nothing(case: Case) -> None:
    model, x = case.model(), case.batch()
    expected = model.predict(x, verbose=0)
    kl.apply_lora(model, config())
    assert relative(model.predict(x, verbose=0), expected) <= 1e-6


@all_cases
def test_adapted_equals_the_reference(case: Case) -> None:
    model, x = case.model(), case.batch()
    w0 = numpy_of(kernel_of(model.get_layer("case")))
    adapted(case, model)
    a, b = map(numpy_of, adapter(model).factors)
    kernel = w0 + reference_delta(case, a, b, SCALE)
    assert relative(model(x), reference_output(case, model, x, kernel)) <= 1e-5
    assert relative(kernel_of(model.get_layer("case")), kernel) <= 1e-6


@linear_cases
def test_rows_with_factors_of_their_own_equal_the_reference(case: Case) -> None:
    model, x, rng = adapted(case), case.batch(), np.random.default_rng(7)
    (layer,) = kl.lora_layers(model).values()
    w0, split = numpy_of(layer.base_kernel), site_of(layer).split()
    shapes = [factor.shape for factor in adapter(model).factors]
    a, b = (rng.normal(size=(len(x), *shape)).astype("float32") for shape in shapes)
    first = [np.moveaxis(f, axis + 1, 1) for f, axis in zip((a, b), split.rank_axes, strict=True)]
    rows = MixedBatch(
        pytest.fail, (ops.convert_to_tensor(first[0]), ops.convert_to_tensor(first[1]))
    )
    with layer.without_adapters(), layer.computing(rows):
        received = numpy_of(layer(x))
    for i, row in enumerate(x):
        kernel = w0 + reference_delta(case, a[i], b[i], 1)
        assert (
            relative(received[i : i + 1], reference_output(case, model, row[None], kernel)) <= 1e-5
        )


@linear_cases
def test_rows_with_kernels_and_biases_of_their_own_equal_the_reference(case: Case) -> None:
    model, x, rng = adapted(case), case.batch(), np.random.default_rng(7)
    (layer,) = kl.lora_layers(model).values()
    kernels = rng.normal(size=(len(x), *layer.base_kernel.shape)).astype("float32")
    rows, biases = MixedBatch(pytest.fail, kernel=ops.convert_to_tensor(kernels)), None
    if layer.bias is not None:
        biases = rng.normal(size=(len(x), *layer.bias.shape)).astype("float32")
        rows = dataclasses.replace(rows, bias=ops.convert_to_tensor(biases))
    with layer.without_adapters(), layer.computing(rows):
        received = numpy_of(layer(x))
    for i, row in enumerate(x):
        if biases is not None:
            layer.bias.assign(biases[i])
        expected = reference_output(case, model, row[None], kernels[i].astype("float64"))
        assert relative(received[i : i + 1], expected) <= 1e-5


@all_cases
def test_delta_has_true_rank(case: Case) -> None:
    model = adapted(case)
    (layer,) = kl.lora_layers(model).values()
    with layer.without_adapters():
        w0 = numpy_of(layer.kernel)
    inputs, rest = case.equation.split(",")
    kernel, output = rest.split("->")
    shared = [c for c in kernel if c in inputs and c in output]
    contracted = [c for c in kernel if c not in output]
    free = [c for c in kernel if c not in inputs]
    delta = np.einsum(
        f"{kernel}->{''.join(shared + contracted + free)}", numpy_of(layer.kernel) - w0
    )
    size = dict(zip(kernel, w0.shape, strict=True))
    rows = int(np.prod([size[c] for c in contracted]))
    matrices = delta.reshape(-1, rows, int(np.prod([size[c] for c in free])))
    assert max(np.linalg.matrix_rank(m, tol=1e-4) for m in matrices) <= RANK


@all_cases
def test_merged_equals_adapted_and_is_plain(case: Case) -> None:
    model, x = case.model(), case.batch()
    plain, names = type(model.get_layer("case")), [v.name for v in model.weights]
    expected = numpy_of(adapted(case, model)(x))
    kl.merge_lora(model)
    layer = model.get_layer("case")
    assert type(layer) is plain
    assert not [name for name in vars(layer) if "lora" in name and name not in _KERAS_OWN]
    assert [v.name for v in model.weights] == names
    assert relative(model(x), expected) <= 1e-5


_KERAS_OWN = {"lora_rank", "lora_alpha", "lora_enabled"}


@all_cases
def test_unload_gives_the_base_back_bit_for_bit(case: Case) -> None:
    model = case.model()
    base, flags = snapshot(model.weights), [v.trainable for v in model.weights]
    kl.unload_lora(adapted(case, model))
    assert snapshot(model.weights) == base
    assert [v.trainable for v in model.weights] == flags


@all_cases
def test_merged_context_folds_and_restores(case: Case) -> None:
    model, x = case.model(), case.batch()
    adapted(case, model)
    before, expected = snapshot(model.weights), numpy_of(model(x))
    trainable = [v.path for v in model.trainable_variables]
    with kl.merged(model) as plain:
        assert not kl.lora_layers(plain)
        assert relative(plain(x), expected) <= 1e-5
    assert snapshot(model.weights) == before
    assert [v.path for v in model.trainable_variables] == trainable
    np.testing.assert_array_equal(numpy_of(model(x)), expected)


@all_cases
def test_disabled_is_the_base(case: Case) -> None:
    model, x = case.model(), case.batch()
    base = numpy_of(model(x))
    expected = numpy_of(adapted(case, model)(x))
    with kl.disable_adapter(model):
        assert relative(model(x), base) <= 1e-6
    np.testing.assert_array_equal(numpy_of(model(x)), expected)


@all_cases
def test_fit_moves_both_factors_and_nothing_else(case: Case) -> None:
    model, x = case.model(), case.batch(6)
    kl.apply_lora(model, config())
    model.compile("adam", "mse", run_eagerly=case.eager)
    frozen = [v for v in model.weights if not v.trainable]
    before, start = snapshot(frozen), snapshot(adapter(model).factors)
    # Two epochs: the gradient of `B` of an embedding is zero until the rows in `A` have moved.
    model.fit(x, np.ones(model(x).shape), batch_size=2, epochs=2, verbose=0)
    assert snapshot(frozen) == before
    after = snapshot(adapter(model).factors)
    assert all(new != old for new, old in zip(after, start, strict=True))
    slots = [v for v in model.optimizer.variables if "lora" in v.path]
    assert len(slots) == 2 * len(model.trainable_variables) == 4


@all_cases
def test_weights_go_into_a_fresh_base(case: Case, tmp_path: Path) -> None:
    model, x = adapted(case), case.batch()
    model.save_weights(tmp_path / "m.weights.h5")
    fresh = kl.apply_lora(case.model(), config())
    randomize(reversed(fresh.weights))
    fresh.load_weights(tmp_path / "m.weights.h5")
    np.testing.assert_array_equal(numpy_of(fresh(x)), numpy_of(model(x)))


LOW = [*named("dense, activation", "btd,dnh->btnh", "bed,edf->bef", "conv2d, same"), *TABLES]


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("case", LOW, ids=lambda case: case.id)
def test_low_precision_stays_within_rounding(case: Case, dtype: str) -> None:
    model, x = case.model(dtype=dtype), case.batch()
    w0 = numpy_of(kernel_of(model.get_layer("case")))
    adapted(case, model)
    assert {str(v.dtype) for v in adapter(model).factors} == {"float32"}
    a, b = map(numpy_of, adapter(model).factors)
    expected = reference_output(case, model, x, w0 + reference_delta(case, a, b, SCALE))
    assert relative(model(x), expected) <= ROUNDING[dtype]
    kl.merge_lora(model)
    assert relative(model(x), expected) <= ROUNDING[dtype]


def test_bfloat16_keeps_a_delta_that_the_kernel_would_lose() -> None:
    """A delta of rms 2e-5 beside weights of 0.02 is below half of bfloat16's last digit."""
    model = keras.Sequential(
        [keras.Input((251,)), keras.layers.Dense(257, dtype="bfloat16", name="case")]
    )
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 251)).astype("float32")
    model.get_layer("case").kernel.assign(rng.normal(scale=0.02, size=(251, 257)))
    base = numpy_of(model(x))
    kl.apply_lora(model, kl.LoRAConfig(rank=2, alpha=2, targets=["case"]))
    a, b = adapter(model).factors
    a.assign(rng.normal(scale=0.05, size=a.shape))
    b.assign(rng.normal(scale=2e-4, size=b.shape))
    (layer,) = kl.lora_layers(model).values()
    w0 = numpy_of(layer._kernel)
    delta = x.astype("float64") @ numpy_of(a) @ numpy_of(b)
    term = numpy_of(layer.adapted_product(keras.ops.cast(x * 0, "bfloat16")))
    assert not term.any()
    # Only the adapter's product: the base's kernel is zero.
    layer._kernel.assign(np.zeros_like(w0))
    kept = numpy_of(model(x))
    assert np.linalg.norm(kept - delta) < 0.02 * np.linalg.norm(delta)
    summed = numpy_of(keras.ops.cast(w0 + numpy_of(a) @ numpy_of(b), "bfloat16")) - w0
    lost = np.linalg.norm(x @ summed - delta) / np.linalg.norm(delta)
    assert lost > 0.5
    assert base.shape == kept.shape


def test_dropout_acts_on_the_adapter_in_training_only() -> None:
    case = BY_ID["dense, sequence"]
    model, x = case.model(activation=None), case.batch()
    base = numpy_of(model(x))
    model = adapted(case, model, dropout=0.5)
    (layer,) = kl.lora_layers(model).values()
    inference = numpy_of(model(x))
    np.testing.assert_array_equal(numpy_of(model(x, training=False)), inference)
    draws = np.stack([numpy_of(model(x, training=True)) for _ in range(400)])
    assert np.abs(draws[0] - draws[1]).max() > 0.1
    # The mean over many masks is the product without one: inverted dropout.
    assert np.abs(draws.mean(0) - inference).max() < 0.5 * np.abs(inference - base).max()
    for variable in layer.adapters["default"].factors:
        variable.assign(np.zeros(variable.shape))
    np.testing.assert_allclose(numpy_of(model(x, training=True)), base, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("use_rslora", "scale"), [(False, 5 / 4), (True, 5 / 2)])
def test_scaling(use_rslora: bool, scale: float) -> None:
    case = BY_ID["dense"]
    model = case.model()
    w0 = numpy_of(model.get_layer("case").kernel)
    kl.apply_lora(model, kl.LoRAConfig(rank=4, alpha=5, use_rslora=use_rslora, targets=["case"]))
    randomize(adapter(model).factors)
    a, b = map(numpy_of, adapter(model).factors)
    np.testing.assert_allclose(
        numpy_of(kl.merge_lora(model).get_layer("case").kernel), w0 + scale * a @ b, rtol=1e-5
    )


@pytest.mark.parametrize(
    ("init", "spread"), [("kaiming_uniform", 1 / np.sqrt(3 * 251)), ("gaussian", 1 / 47)]
)
def test_a_starts_with_the_spread_that_is_documented(init: str, spread: float) -> None:
    layer = kl.LoRADense(7, rank=47, init=init)
    layer.build((None, 251))
    a, b = layer.adapters["default"].factors
    assert abs(numpy_of(a).std() / spread - 1) < 0.05
    assert not numpy_of(b).any()


def test_direct_use_trains_saves_and_loads(tmp_path: Path) -> None:
    model = keras.Sequential(
        [
            keras.Input((11,), dtype="int32"),
            keras.layers.Embedding(13, 5),
            kl.LoRADense(7, activation="relu", rank=2, alpha=4, dropout=0.1),
            kl.LoRAEinsumDense("btd,dnh->btnh", (None, 2, 3), rank=3, use_rslora=True),
        ]
    )
    x = np.random.default_rng(0).integers(0, 13, (5, 11)).astype("int32")
    assert model.layers[1].compute_output_shape((None, 11, 5)) == (None, 11, 7)
    trainable = [v.name for v in model.trainable_variables]
    assert trainable == ["embeddings", *["lora_a", "lora_b"] * 2]
    model.compile("sgd", "mse")
    model.fit(x, np.ones((5, 11, 2, 3)), verbose=0)
    model.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    np.testing.assert_array_equal(numpy_of(loaded(x)), numpy_of(model(x)))
    assert [v.name for v in loaded.trainable_variables] == trainable
    assert loaded.layers[2].adapters["default"].spec == model.layers[2].adapters["default"].spec
    assert type(kl.unload_lora(loaded).layers[1]) is keras.layers.Dense


def test_masks_pass_through_as_in_dense() -> None:
    for layer in (keras.layers.Dense(7), kl.LoRADense(7, rank=2)):
        inputs = keras.Input((None,), dtype="int32")
        embedded = keras.layers.Embedding(13, 5, mask_zero=True)(inputs)
        pooled = keras.layers.GlobalAveragePooling1D()(layer(embedded))
        model = keras.Model(inputs, pooled)
        x = np.zeros((1, 11), "int32")
        x[0, :3] = 4
        unpadded = numpy_of(model(x[:, :3]))
        np.testing.assert_allclose(numpy_of(model(x)), unpadded, rtol=1e-5)


def test_kernel_is_the_variable_itself_where_nothing_acts() -> None:
    model = adapted(BY_ID["dense"])
    (layer,) = kl.lora_layers(model).values()
    with layer.without_adapters():
        assert layer.kernel is layer._kernel


class Parent(keras.layers.Layer):
    """Keras builds its inner layer at the first call: in a graph, or on symbolic inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = kl.LoRADense(5, rank=2, dropout=0.1)

    def call(self, inputs: Any) -> Any:
        return self.inner(inputs)


@pytest.mark.parametrize("first", ["symbolic", "fit"])
def test_a_layer_that_is_built_within_a_graph_has_its_adapter(first: str) -> None:
    parent = Parent()
    inputs = [keras.Input((3,))] if first == "symbolic" else []
    model = keras.Sequential([*inputs, parent])
    model.compile("sgd", "mse")
    if first == "fit":
        model.fit(np.ones((4, 3)), np.ones((4, 5)), verbose=0)
    adapter = parent.inner.adapters["default"]
    assert 0 < np.abs(np.array(adapter.a)).max() < 1
    np.testing.assert_array_equal(adapter.a, parent.inner.slots[0].a)
    assert (keras.ops.convert_to_numpy(parent.inner.slots[0].scaling) == 8.0).all()
    assert len(parent.trainable_variables) == 2
