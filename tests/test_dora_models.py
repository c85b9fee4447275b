"""DoRA in whole models: switching, training, files, and the norms of a base that changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from support.cases import (
    numpy_of,
    relative,
    snapshot,
)
from support.models import composite, data, functional, randomize_adapters, state

import keras_lora as kl

# Some kernels of the models have a side of one.
pytestmark = pytest.mark.filterwarnings("ignore:The rank is above:UserWarning")
DORA = kl.LoRAConfig(rank=2, alpha=3, use_dora=True)


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
    """The effective kernels with the active adapter, in float64, from the base's present values."""
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
    """The adapted model gives the outputs of a plain model with the effective kernels."""
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
    """After each kind was active once; a slot keeps its size if a lower rank follows."""
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


def other_base() -> keras.Model:
    model = functional()
    rng = np.random.default_rng(8)
    for variable in model.weights:
        variable.assign(rng.uniform(0.1, 0.9, variable.shape))
    return model


@pytest.mark.filterwarnings("ignore:The weights file contains no adapters")
def test_the_norms_are_those_of_a_base_that_is_loaded(tmp_path: Path) -> None:
    other_base().save_weights(tmp_path / "base.weights.h5")
    fresh = kl.apply_lora(functional(), DORA)
    kl.apply_lora(fresh, kl.LoRAConfig(rank=1, use_dora=True), name="waits")
    fresh.load_weights(tmp_path / "base.weights.h5")
    x, _ = data(fresh)
    for name in ["default", "waits"]:  # not trained, so the outputs are the base's
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
        plain.set_weights(other_base().get_weights())  # undone at the end of the context
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
