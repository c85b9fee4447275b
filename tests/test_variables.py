"""Bare variables: an adapted layer computes what a plain one does with the matrix `W0 + s A B`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import ops
from support.banks import banks, brought_back, randomize
from support.cases import numpy_of
from support.variables import (
    ALPHA,
    CASES,
    DIM,
    INNER,
    MIXTURES,
    OWN,
    RANK,
    STEPS,
    Held,
    Own,
    adapted,
    delta,
    inputs,
    made,
    reference,
)

import keras_lora as kl
from keras_lora.files.adapter_files import write_adapter_files
from keras_lora.files.keys import base_fingerprint
from keras_lora.layers import AdapterBank, factored_calls
from keras_lora.walker import Tree


@pytest.mark.parametrize("name", CASES)
def test_an_adapted_layer_is_a_plain_one_with_the_effective_matrices(name: str) -> None:
    base, x = made(name), inputs()
    model = kl.apply_lora(made(name), kl.LoRAConfig(rank=RANK, alpha=ALPHA, targets=CASES[name][1]))
    np.testing.assert_array_equal(numpy_of(model(x)), numpy_of(base(x)))
    randomize(model)
    expected = numpy_of(reference(name, model)(x))
    for training in (False, True):
        found = numpy_of(model(x, training=training))
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    with kl.merged(model):
        np.testing.assert_allclose(numpy_of(model(x)), expected, rtol=1e-5, atol=1e-5)
    kl.unload_lora(model)
    assert [type(x) for x in model.layers] == [type(x) for x in base.layers]
    np.testing.assert_array_equal(numpy_of(model(x)), numpy_of(base(x)))


@pytest.mark.parametrize("name", ["own", "mixtral", "gemma4"])
def test_training_follows_the_gradient_of_the_matrices(name: str) -> None:
    """With `SGD`: `dA = s G B^T` and `dB = s A^T G`, with the gradient `G` of a plain matrix."""
    model, x = adapted(name), inputs()
    plain = reference(name, model)
    before = {b: [numpy_of(f) for f in b.adapters["default"].factors] for b in banks(model)}
    others = [numpy_of(v) for v in model.non_trainable_variables]
    for network in (model, plain):
        network.compile(keras.optimizers.SGD(0.01), "mse", run_eagerly=True)
        network.fit(x, np.zeros(numpy_of(network(x)).shape), verbose=0)
    moved = {v.path: numpy_of(v) for v in plain.weights}
    for bank, (a, b) in before.items():
        gradient = ALPHA / RANK * (moved[bank.site.matrix.path] - effective_of(bank, a, b))
        if b.ndim == 3:
            expected = (a + gradient @ b.swapaxes(1, 2), b + a.swapaxes(1, 2) @ gradient)
        else:
            rows = gradient.reshape(-1, b.shape[-1])
            columns = a.reshape(-1, RANK)
            expected = (a + (rows @ b.T).reshape(a.shape), b + columns.T @ rows)
        for found, value in zip(bank.adapters["default"].factors, expected, strict=True):
            np.testing.assert_allclose(numpy_of(found), value, rtol=1e-3, atol=1e-5)
    for variable, value in zip(model.non_trainable_variables, others, strict=True):
        np.testing.assert_array_equal(numpy_of(variable), value)


@pytest.mark.parametrize("name", MIXTURES)
def test_the_einsums_of_experts_are_factored(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = adapted(name), inputs()
    factored, seen = numpy_of(model(x)), []
    product = factored_calls._product

    def watched(*args: Any) -> Any:
        total = product(*args)
        seen.append((args[2].site.name, total is not None))
        return total

    monkeypatch.setattr(factored_calls, "_product", watched)
    model(x)
    assert seen == [(bank.site.name, True) for bank in banks(model)]
    monkeypatch.setattr(factored_calls, "_product", lambda *_: None)
    np.testing.assert_allclose(factored, numpy_of(model(x)), rtol=1e-5, atol=1e-5)


def effective_of(bank: AdapterBank, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    w = numpy_of(bank.site.matrix).astype("float64")
    return w + ALPHA / RANK * delta(a.astype("float64"), b.astype("float64"))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mixtral", {"use_dora": True}),
        ("mixtral", {"init": "pissa"}),
        ("own", {"init": "olora"}),
        ("own", {"dropout": 0.5, "use_rslora": True, "freeze_a": True}),
    ],
)
def test_options(name: str, options: dict[str, Any]) -> None:
    base, x = made(name), inputs()
    config = kl.LoRAConfig(rank=RANK, alpha=ALPHA, targets=CASES[name][1], **options)
    model = kl.apply_lora(made(name), config)
    np.testing.assert_allclose(numpy_of(model(x)), numpy_of(base(x)), rtol=1e-4, atol=1e-4)
    randomize(model)
    expected = numpy_of(model(x))
    if options.keys() == {"use_dora"}:
        plain = numpy_of(reference(name, model)(x))
        np.testing.assert_allclose(expected, plain, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(numpy_of(model(x, training=True)), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(numpy_of(kl.merge_lora(model)(x)), expected, rtol=1e-4, atol=1e-4)


def test_experts_begin_each_with_its_principal_part() -> None:
    model = kl.apply_lora(made("mixtral"), kl.LoRAConfig(rank=2, targets="experts", init="pissa"))
    for bank in banks(model):
        a, b = (numpy_of(f) for f in bank.adapters["default"].factors[:2])
        u, s, v = np.linalg.svd(numpy_of(bank.site.matrix).astype("float64"))
        best = np.einsum("edr,er,erk->edk", u[..., :2], s[:, :2], v[:, :2])
        scale = bank.adapters["default"].spec.scaling
        np.testing.assert_allclose(scale * delta(a, b), best, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["positions", "own", "qwen_moe"])
@pytest.mark.parametrize("dtype", ["bfloat16", "mixed_bfloat16"])
def test_low_precision(name: str, dtype: str) -> None:
    base, x = made(name, dtype=dtype), inputs()
    expected = numpy_of(base(x)).astype("float64")
    model = kl.apply_lora(base, kl.LoRAConfig(rank=RANK, alpha=ALPHA, targets=CASES[name][1]))
    assert all(v.dtype == "float32" for v in model.trainable_variables)
    np.testing.assert_array_equal(numpy_of(model(x)).astype("float64"), expected)
    randomize(model)
    found = numpy_of(model(x)).astype("float64")
    assert model(x).dtype == made(name, dtype=dtype)(x).dtype
    merged = numpy_of(kl.merge_lora(model)(x)).astype("float64")
    np.testing.assert_allclose(found, merged, rtol=0, atol=3e-2 * np.abs(merged).max())


@pytest.mark.parametrize("name", ["own", "mixtral", "held"])
def test_files_bring_an_adapter_back(name: str, tmp_path: Path) -> None:
    model, x = adapted(name), inputs()
    brought_back(model, lambda: made(name), x, tmp_path)


@pytest.mark.parametrize("name", ["own", "one of own", "held", "positions"])
def test_a_keras_file_and_a_clone_bring_adapters_back(name: str, tmp_path: Path) -> None:
    model, x = adapted(name), inputs()
    kl.apply_lora(model, kl.LoRAConfig(rank=3, targets=CASES[name][1]), name="second")
    randomize(model)
    kl.set_adapter(model, ["default", "second"])
    expected = numpy_of(model(x))
    model.save(tmp_path / "m.keras")
    classes = {"Own": Own, "Held": Held}
    loaded = keras.saving.load_model(tmp_path / "m.keras", custom_objects=classes)
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    for other in (loaded, clone):
        np.testing.assert_array_equal(numpy_of(other(x)), expected)
        trained = [[v.name for v in m.trainable_variables] for m in (other, model)]
        assert trained[0] == trained[1]
    kl.set_adapter(loaded, "default")
    kl.set_adapter(model, "default")
    np.testing.assert_array_equal(numpy_of(loaded(x)), numpy_of(model(x)))
    kl.unload_lora(loaded)
    np.testing.assert_array_equal(numpy_of(loaded(x)), numpy_of(made(name)(x)))


def test_what_no_config_lists_is_in_no_keras_file(tmp_path: Path) -> None:
    """The mixture's config does not list the experts in it."""
    with pytest.raises(ValueError, match="adapters that no `.keras` file.*merge_lora"):
        adapted("mixtral").save(tmp_path / "m.keras")
    assert not [*tmp_path.iterdir()]


def test_a_checkpoint_of_the_base_fits(tmp_path: Path) -> None:
    base, x = made("own"), inputs()
    expected = numpy_of(base(x))
    base.save_weights(tmp_path / "base.weights.h5")
    model = kl.apply_lora(made("own"), kl.LoRAConfig(rank=RANK, targets=OWN))
    for variable in model.weights:
        if "lora" not in variable.path:
            variable.assign(np.zeros(variable.shape))
    with pytest.warns(UserWarning, match="contains no adapters"):
        model.load_weights(tmp_path / "base.weights.h5")
    np.testing.assert_array_equal(numpy_of(model(x)), expected)


def test_a_merged_copy_and_file_are_plain(tmp_path: Path) -> None:
    model, x = adapted("positions"), inputs()
    expected = numpy_of(model(x))
    kl.merge_lora(model, inplace=False).save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    np.testing.assert_allclose(numpy_of(loaded(x)), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(numpy_of(model(x)), expected)


class Inner(keras.Model):
    """A model with a matrix of its own."""

    def __init__(self) -> None:
        super().__init__(name="inner")
        self.up = keras.layers.Dense(DIM, name="up")
        self.table = self.add_weight(shape=(STEPS, DIM), name="table")

    def call(self, inputs: Any) -> Any:
        return self.up(inputs) + self.table


class Outer(keras.Model):
    """A model with a matrix of its own that Keras names by a number, and another model."""

    def __init__(self) -> None:
        super().__init__(name="outer")
        self.inner = Inner()
        self.scores = self.add_weight(shape=(DIM, INNER))

    def call(self, inputs: Any) -> Any:
        return ops.matmul(self.inner(inputs), self.scores)


def test_matrices_of_models_are_adapted(tmp_path: Path) -> None:
    base, model, x = Outer(), Outer(), inputs()
    expected = numpy_of(base(x))
    model(x)
    for variable, value in zip(model.weights, base.weights, strict=True):
        variable.assign(value)
    kl.apply_lora(model, kl.LoRAConfig(rank=RANK, targets=["scores", "inner/table"]))
    assert set(kl.lora_layers(model)) == {"outer", "inner"}
    np.testing.assert_array_equal(numpy_of(model(x)), expected)
    model.compile("sgd", "mse", run_eagerly=True)
    model.fit(x, expected + 1, epochs=2, verbose=0)  # A follows B
    assert len(model.trainable_variables) == 4
    found = numpy_of(model(x))
    assert np.abs(found - expected).max() > 1e-3
    kl.save_adapter(model, tmp_path / "adapter")
    kl.load_adapter(base, tmp_path / "adapter")
    np.testing.assert_array_equal(numpy_of(base(x)), found)
    with kl.merged(model):
        np.testing.assert_allclose(numpy_of(model(x)), found, rtol=1e-5, atol=1e-6)
    kl.unload_lora(model)
    assert (type(model), type(model.inner)) == (Outer, Inner)
    np.testing.assert_array_equal(numpy_of(model(x)), expected)


def test_a_file_of_0_1_with_numbered_variables_loads(tmp_path: Path) -> None:
    """It had the numbers that Keras gave to the variables in its keys."""
    model, x = adapted("held"), inputs()
    kl.save_adapter(model, tmp_path / "new")
    files = kl.read_adapter_files(tmp_path / "new")
    fingerprint = base_fingerprint(Tree.of(model).named_as_in_0_1())
    assert fingerprint != files.config["base"]["fingerprint"]
    config = files.config | {"base": files.config["base"] | {"fingerprint": fingerprint}}
    write_adapter_files(tmp_path / "old", config, files.tensors, overwrite=False)
    expected = numpy_of(model(x))
    kl.unload_lora(model)
    kl.load_adapter(model, tmp_path / "old")
    np.testing.assert_array_equal(numpy_of(model(x)), expected)


def test_adapters_are_switched_and_combined() -> None:
    model, x = adapted("own"), inputs()
    first = numpy_of(model(x))
    kl.apply_lora(model, kl.LoRAConfig(rank=RANK, targets=["rows"]), name="second")
    kl.set_adapter(model, "default")
    np.testing.assert_array_equal(numpy_of(model(x)), first)
    kl.combine_adapters(model, {"default": 1.0, "second": 1.0}, "sum")
    kl.set_adapter(model, "sum")
    np.testing.assert_allclose(numpy_of(model(x)), first, rtol=1e-4, atol=1e-4)
    kl.set_adapter(model, None)
    np.testing.assert_array_equal(numpy_of(model(x)), numpy_of(made("own")(x)))
