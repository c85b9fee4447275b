"""DoRA: the invariants over every kind of layer, and what it has beyond LoRA; on every backend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from support.cases import (
    ALPHA,
    CASES,
    LINEAR,
    LINEAR_IDS,
    RANK,
    ROUNDING,
    TABLES,
    Case,
    adapted,
    adapter,
    config,
    numpy_of,
    randomize,
    reference_delta,
    reference_dora,
    reference_output,
    relative,
    snapshot,
)
from support.models import composite, data, functional, randomize_adapters, state

import keras_lora as kl

# Some kernels of the table have a side of one.
pytestmark = pytest.mark.filterwarnings("ignore:The rank is above:UserWarning")
linear_cases = pytest.mark.parametrize("case", LINEAR, ids=LINEAR_IDS)
SCALE = ALPHA / RANK
DORA = kl.LoRAConfig(rank=2, alpha=3, use_dora=True)


def reference_kernel(case: Case, model: keras.Model, w0: np.ndarray) -> np.ndarray:
    a, b, m = map(numpy_of, adapter(model).factors)
    return reference_dora(case, w0 + reference_delta(case, a, b, SCALE), m)


@linear_cases
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


@linear_cases
def test_fit_moves_its_factors_alone_and_weights_continue(case: Case, tmp_path: Path) -> None:
    model, x = case.model(), case.batch(6)
    kl.apply_lora(model, config(use_dora=True))
    model.compile("adam", "mse", run_eagerly=keras.backend.backend() == "tensorflow")
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
@pytest.mark.parametrize("case", [CASES[2], CASES[6], CASES[16]], ids=lambda c: c.id)
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
    case = CASES[6]
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


@pytest.mark.parametrize("case", [CASES[1], CASES[9], CASES[16]], ids=lambda c: c.id)
def test_dropout_is_on_both_products(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """x W0 + (g - 1) drop(x) W0 + g s (drop(x) A) B, as in PEFT."""
    mask = np.random.default_rng(4).integers(0, 2, (3, *case.input_shape)).astype("float32")
    monkeypatch.setattr(
        "keras_lora.layers.lora_layer.dropped", lambda x, *_: 2 * x * keras.ops.array(mask)
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
    """Where A B = -W0 the norm is what rounding leaves of it."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(5, RANK)), rng.normal(size=(RANK, 7))
    model = dense_with((-SCALE * a @ b).astype("float32"))
    for factor, value in zip(adapter(model).factors[:2], (a, b), strict=True):
        factor.assign(value)
    assert np.abs(numpy_of(model.get_layer("case").kernel)).max() < 1e-2


@pytest.mark.parametrize("index", [0, 1, 2])
def test_what_is_not_finite_is_refused_and_leaves_with_its_adapter(index: int) -> None:
    model = kl.apply_lora(functional(), DORA)
    x, _ = data(model)
    with kl.disable_adapter(model):
        base = numpy_of(model(x))
    factor = kl.lora_layers(model)["up"].adapters["default"].factors[index]
    factor.assign(np.full(factor.shape, np.nan))
    with pytest.raises(ValueError, match=r"NaN or infinity in \['up'\]"):
        kl.merge_lora(model)
    with kl.disable_adapter(model):
        np.testing.assert_array_equal(numpy_of(model(x)), base)
    kl.apply_lora(model, kl.LoRAConfig(rank=2), name="plain")
    assert relative(model(x), base) <= 1e-6


def kernels(model: keras.Model) -> dict[str, np.ndarray]:
    """W of the adapter that acts, if any, in float64, from the base as it is now."""
    found = {}
    for path, layer in kl.lora_layers(model).items():
        found[path] = numpy_of(layer.base_kernel)
        for name in layer.active_adapters:
            adapter = layer.adapters[name]
            a, b, *m = map(numpy_of, adapter.factors)
            kernel = found[path] + adapter.scaling * a @ b
            found[path] = m[0] * kernel / np.linalg.norm(kernel, axis=0) if m else kernel
    return found


def assert_acts(model: keras.Model) -> None:
    """The adapted model computes what a plain one with the kernels of the equation does."""
    plain = functional()
    base = [v for x in model.layers for v in getattr(x, "base_variables", x.weights)]
    plain.set_weights([numpy_of(v) for v in base])
    for path, kernel in kernels(model).items():
        plain.get_layer(path).kernel.assign(kernel)
    x, _ = data(model)
    expected = numpy_of(plain(x))
    np.testing.assert_allclose(numpy_of(model.predict(x, verbose=0)), expected, 1e-4, 1e-5)


CONFIGS = {
    "plain": kl.LoRAConfig(rank=3, alpha=5),
    "dora": kl.LoRAConfig(rank=2, alpha=7, use_dora=True),
    "partly": kl.LoRAConfig(rank=1, alpha=2, use_dora=True, targets=["up"]),
}


def with_adapters(model: keras.Model) -> keras.Model:
    for name, options in CONFIGS.items():
        kl.apply_lora(model, options, name=name)
    randomize_adapters(model)
    return model


def test_switching_between_both_kinds_traces_nothing() -> None:
    """Once each kind has acted; ranks go down where the kind changes, and slots do not shrink."""
    model = with_adapters(functional())
    model.compile("sgd", "mse")
    x, y = data(model)
    for name in CONFIGS:
        kl.set_adapter(model, name)
    variables = [id(v) for v in model.variables]
    model.predict(x, verbose=0)
    model.fit(x, y, verbose=0)
    functions = model.predict_function, model.train_function
    for name in ["plain", "partly", "dora", "plain", "dora"]:
        kl.set_adapter(model, name)
        assert_acts(model)
        before = {n: snapshot(factors_of(model, n)) for n in CONFIGS}
        model.fit(x, y, verbose=0)
        after = {n: snapshot(factors_of(model, n)) for n in CONFIGS}
        assert [n for n in CONFIGS if after[n] != before[n]] == [name]
        assert_acts(model)
    assert (model.predict_function, model.train_function) == functions
    assert [id(v) for v in model.variables] == variables


def factors_of(model: keras.Model, name: str) -> list[Any]:
    layers = kl.lora_layers(model).values()
    return [f for x in layers if name in x.adapters for f in x.adapters[name].factors]


def test_a_layer_that_never_had_dora_has_no_variable_more() -> None:
    model = with_adapters(functional())
    names = {path: len(x.adapter_variables) for path, x in kl.lora_layers(model).items()}
    assert names == {"up": 7, "middle": 7}
    plain = kl.apply_lora(functional(), CONFIGS["plain"])
    assert {len(x.adapter_variables) for x in kl.lora_layers(plain).values()} == {4}


def test_training_in_turns_is_training_without_a_break() -> None:
    def trained(turns: list[str]) -> keras.Model:
        keras.utils.set_random_seed(1)
        model = functional()
        for name in ["dora", "plain"]:
            kl.apply_lora(model, CONFIGS[name], name=name)
        model.compile(keras.optimizers.AdamW(0.01), "mse")
        x, y = data(model)
        for name in turns:
            kl.set_adapter(model, name)
            model.fit(x, y, batch_size=2, epochs=2, shuffle=False, verbose=0)
        return model

    turns, unbroken = trained(["dora", "plain", "dora"]), trained(["dora", "dora", "plain"])
    for name in ["dora", "plain"]:
        assert snapshot(factors_of(turns, name)) == snapshot(factors_of(unbroken, name))


@pytest.mark.parametrize("make", [functional, composite])
def test_adapters_go_through_files(make: Any, tmp_path: Path) -> None:
    model = kl.apply_lora(make(), DORA)
    randomize_adapters(model)
    kl.save_adapter(model, tmp_path / "adapter")
    tensors = kl.read_adapter_files(tmp_path / "adapter").tensors
    endings = {key.rsplit("/", 1)[1] for key in tensors}
    assert endings == {"lora_a", "lora_b", "lora_magnitude"}
    other = make()
    with kl.merged(model) as plain:
        pass
    for variable, value in zip(other.weights, base_values(plain), strict=True):
        variable.assign(value)
    kl.load_adapter(other, tmp_path / "adapter", "again")
    x, _ = data(model)
    np.testing.assert_allclose(numpy_of(other(x)), numpy_of(model(x)), rtol=1e-5, atol=1e-6)
    assert snapshot(factors_of(other, "again")) == snapshot(factors_of(model, "default"))


def base_values(model: keras.Model) -> list[np.ndarray]:
    ours = {id(v) for x in kl.lora_layers(model).values() for v in x.adapter_variables}
    return [numpy_of(v) for v in model.weights if id(v) not in ours]


@pytest.mark.filterwarnings("ignore:Skipping nested container:UserWarning")
def test_files_of_the_other_kind_are_refused(tmp_path: Path) -> None:
    dora, plain = kl.apply_lora(functional(), DORA), kl.apply_lora(functional(), CONFIGS["plain"])
    kl.save_adapter(dora, tmp_path / "dora")
    before = state(plain)
    with pytest.raises(kl.AdapterFileError, match="up: DoRA among slots without a magnitude"):
        kl.load_adapter(plain, tmp_path / "dora", replace=True)
    assert state(plain) == before
    kl.save_adapter(plain, tmp_path / "plain")
    kl.load_adapter(dora, tmp_path / "dora", replace=True)
    dora.save_weights(tmp_path / "dora.weights.h5")
    with pytest.raises(ValueError, match="lora_magnitude.default is not expected"):
        plain.load_weights(tmp_path / "dora.weights.h5")


def test_a_plain_adapter_replaces_one_with_a_magnitude_in_place(tmp_path: Path) -> None:
    plain = kl.apply_lora(functional(), kl.LoRAConfig(rank=1, alpha=2))
    randomize_adapters(plain)
    kl.save_adapter(plain, tmp_path / "plain")
    model = kl.apply_lora(functional(), DORA)
    randomize_adapters(model)
    model.predict(data(model)[0], verbose=0)
    function = model.predict_function
    kl.load_adapter(model, tmp_path / "plain", replace=True)
    assert_acts(model)
    assert model.predict_function is function


def test_a_keras_file_continues_exactly(tmp_path: Path) -> None:
    layers = [kl.LoRADense(7, rank=2, use_dora=True, name="up"), keras.layers.Dense(3)]
    model = keras.Sequential([keras.Input((5,)), *layers])
    x = np.random.default_rng(0).normal(size=(6, 5)).astype("float32")
    model.compile("adam", "mse")
    model.fit(x, np.ones((6, 3)), verbose=0)
    model.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    np.testing.assert_array_equal(numpy_of(loaded(x)), numpy_of(model(x)))
    for m in (model, loaded):
        m.fit(x, np.ones((6, 3)), verbose=0)
    np.testing.assert_array_equal(numpy_of(loaded(x)), numpy_of(model(x)))


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


def other_base() -> keras.Model:
    model = functional()
    rng = np.random.default_rng(8)
    for variable in model.weights:
        variable.assign(rng.uniform(0.1, 0.9, variable.shape))
    return model


@pytest.mark.filterwarnings("ignore:The weights file holds no adapters")
def test_the_norms_are_those_of_a_base_that_is_loaded(tmp_path: Path) -> None:
    other_base().save_weights(tmp_path / "base.weights.h5")
    fresh = kl.apply_lora(functional(), DORA)
    kl.apply_lora(fresh, kl.LoRAConfig(rank=1, use_dora=True), name="waits")
    fresh.load_weights(tmp_path / "base.weights.h5")
    x, _ = data(fresh)
    for name in ["default", "waits"]:  # not trained: still nothing changes
        kl.set_adapter(fresh, name)
        assert relative(fresh(x), other_base()(x)) <= 1e-6
    trained = kl.apply_lora(functional(), DORA)
    randomize_adapters(trained)
    before = snapshot(factors_of(trained, "default"))
    trained.load_weights(tmp_path / "base.weights.h5")
    assert snapshot(factors_of(trained, "default")) == before
    assert_acts(trained)


def test_the_norms_follow_the_base_through_every_change() -> None:
    model = kl.apply_lora(functional(), DORA)
    randomize_adapters(model)
    with kl.merged(model) as plain:
        plain.set_weights(other_base().get_weights())  # does not stay
    assert_acts(model)
    layer = kl.lora_layers(model)["up"]
    layer.fold()
    assert_acts(model)
    layer.assign_base(np.random.default_rng(2).normal(size=(5, 7)))
    assert_acts(model)
    kl.unload_lora(model)
    model.set_weights(other_base().get_weights())
    kl.apply_lora(model, DORA)
    assert_acts(model)


def test_scaling_is_of_the_direction_and_goes_into_files(tmp_path: Path) -> None:
    model = kl.apply_lora(functional(), DORA)
    randomize_adapters(model)
    for factor in (-0.5, 0.0):
        kl.scale_adapter(model, "default", factor)
        assert_acts(model)
    kl.scale_adapter(model, "default", 2)
    kl.save_adapter(model, tmp_path)
    kl.load_adapter(model, tmp_path, "again")
    x, _ = data(model)
    expected = numpy_of(model(x))
    kl.set_adapter(model, "again")
    np.testing.assert_array_equal(numpy_of(model(x)), expected)


def test_what_needs_the_update_as_a_b_refuses_by_name(tmp_path: Path) -> None:
    model = with_adapters(functional())
    before = state(model)
    with pytest.raises(ValueError, match=r"without DoRA.*Received: \['dora'\]"):
        kl.combine_adapters(model, {"plain": 0.5, "dora": 0.5}, "both")
    with pytest.raises(ValueError, match=r"without DoRA.*Received: \['dora'\].*save_adapter"):
        kl.save_keras_hub_lora(model, tmp_path / "x.lora.h5", "dora")
    assert state(model) == before


def test_a_class_without_magnitudes_refuses_before_anything_changes() -> None:
    class Twice(keras.layers.Dense):
        def call(self, inputs: Any) -> Any:
            return super().call(super().call(inputs))

    class LoRATwice(kl.LoRADense, Twice):
        takes_dora = False

    kl.register_lora_class(Twice, LoRATwice)
    model = keras.Sequential([keras.Input((5,)), Twice(5, name="twice"), keras.layers.Dense(2)])
    before = state(model)
    with pytest.raises(ValueError, match=r"`use_dora`: expected False for \['twice'\].*exclude"):
        kl.apply_lora(model, kl.LoRAConfig(rank=2, targets=["twice"], use_dora=True))
    assert state(model) == before
    with pytest.raises(ValueError, match="`use_dora`: expected False"):
        LoRATwice(5, use_dora=True)
    kl.apply_lora(model, kl.LoRAConfig(rank=2, targets=["twice"]))


def test_the_magnitude_counts_among_the_parameters() -> None:
    model = kl.apply_lora(functional(), DORA)
    summary = kl.lora_summary(model)
    assert [row.parameters for row in summary.rows] == [2 * (5 + 7) + 7, 2 * (7 + 11) + 11]
    assert summary.trained.parameters == 2 * (5 + 7) + 7 + 2 * (7 + 11) + 11


@pytest.mark.skipif(keras.backend.backend() == "torch", reason="torch has no XLA here")
def test_it_trains_with_xla_as_without() -> None:
    results = []
    for jit in (False, True):
        keras.utils.set_random_seed(3)
        model = kl.apply_lora(functional(), DORA)
        model.compile(keras.optimizers.SGD(0.1), "mse", jit_compile=jit)
        model.fit(*data(model), batch_size=2, shuffle=False, verbose=0)
        results.append([numpy_of(v) for v in model.trainable_variables])
    for plain, compiled in zip(*results, strict=True):
        np.testing.assert_allclose(compiled, plain, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("case", TABLES, ids=lambda c: c.id)
def test_an_embedding_has_no_magnitude(case: Case) -> None:
    model = case.model()
    with pytest.raises(ValueError, match=r"use_dora.*False for \['case'\]"):
        kl.apply_lora(model, config(use_dora=True))
    assert not kl.lora_layers(model)
