"""Recurrent cells: adapted, they compute what plain ones do with the kernels `W0 + s A B`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers
from support.banks import banks, brought_back, randomize
from support.cases import numpy_of

import keras_lora as kl
from keras_lora.layers import AdapterBank

RANK, ALPHA = 2, 3
Shape = tuple[int, ...]
STEPS: Shape = (7, 3)
Make = Callable[[], keras.layers.Layer]

# The shape of an input without its batch, and the layer.
CASES: dict[str, tuple[Shape, Make]] = {
    "LSTM": (STEPS, lambda: layers.LSTM(5, return_sequences=True)),
    "LSTM, one product for each gate": (STEPS, lambda: layers.LSTM(5, implementation=1)),
    "LSTM without bias, unrolled": (STEPS, lambda: layers.LSTM(5, use_bias=False, unroll=True)),
    "LSTM with dropouts": (STEPS, lambda: layers.LSTM(5, dropout=0.5, recurrent_dropout=0.5)),
    "GRU": (STEPS, lambda: layers.GRU(5)),
    "GRU, reset before": (STEPS, lambda: layers.GRU(5, reset_after=False)),
    "SimpleRNN": (STEPS, lambda: layers.SimpleRNN(5)),
    "Bidirectional": (STEPS, lambda: layers.Bidirectional(layers.GRU(5))),
    "stacked cells": (STEPS, lambda: layers.RNN([layers.LSTMCell(5), layers.GRUCell(2)])),
    "ConvLSTM1D": ((5, 7, 3), lambda: layers.ConvLSTM1D(2, 3)),
    "ConvLSTM2D": ((2, 7, 5, 3), lambda: layers.ConvLSTM2D(2, (3, 2), padding="same")),
}


def made(name: str) -> keras.Model:
    keras.utils.set_random_seed(7)
    shape, make = CASES[name]
    return keras.Sequential([keras.Input(shape), make()], name="net")


def inputs(name: str) -> np.ndarray:
    return np.random.default_rng(5).normal(size=(2, *CASES[name][0])).astype("float32")


def adapted(name: str, **options: Any) -> keras.Model:
    config = kl.LoRAConfig(rank=RANK, alpha=ALPHA, targets="all", **options)
    model = kl.apply_lora(made(name), config)
    randomize(model)
    return model


def pairs(model: keras.Model, plain: keras.Model) -> dict[int, keras.Variable]:
    """The variables of a plain model, by the ids of the adapted model's."""
    base = [v for v in model.weights if "lora" not in v.path]
    return {id(v): other for v, other in zip(base, plain.weights, strict=True)}


def reference(name: str, model: keras.Model) -> keras.Model:
    """A plain model with the effective kernels, from float64."""
    plain = made(name)
    plain_of = pairs(model, plain)
    for bank in banks(model):
        w = numpy_of(bank.site.matrix).astype("float64")
        a, b = (numpy_of(f).astype("float64") for f in bank.adapters["default"].factors)
        plain_of[id(bank.site.matrix)].assign(w + ALPHA / RANK * np.tensordot(a, b, 1))
    return plain


@pytest.mark.parametrize("name", CASES)
def test_an_adapted_layer_is_a_plain_one_with_the_effective_kernels(name: str) -> None:
    base, x = made(name), inputs(name)
    model = kl.apply_lora(made(name), kl.LoRAConfig(rank=RANK, alpha=ALPHA, targets="all"))
    np.testing.assert_array_equal(numpy_of(model(x)), numpy_of(base(x)))
    randomize(model)
    expected = numpy_of(reference(name, model)(x))
    np.testing.assert_allclose(numpy_of(model(x)), expected, rtol=1e-5, atol=1e-6)
    if name != "LSTM with dropouts":
        found = numpy_of(model(x, training=True))
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    with kl.merged(model):
        np.testing.assert_allclose(numpy_of(model(x)), expected, rtol=1e-5, atol=1e-6)
    kl.unload_lora(model)
    np.testing.assert_array_equal(numpy_of(model(x)), numpy_of(base(x)))


@pytest.mark.parametrize(
    ("name", "eager"),
    [("LSTM", False), *((name, True) for name in CASES if "dropouts" not in name)],
)
def test_training_follows_the_gradient_of_the_kernels(name: str, eager: bool) -> None:
    """With `SGD`: `dA = s G B^T` and `dB = s A^T G`, with the gradient `G` of a plain kernel."""
    model, x = adapted(name), inputs(name)
    plain = reference(name, model)
    before = [[numpy_of(f) for f in bank.adapters["default"].factors] for bank in banks(model)]
    plain_of = pairs(model, plain)
    kernels = {key: numpy_of(v).astype("float64") for key, v in plain_of.items()}
    for network in (model, plain):
        network.compile(keras.optimizers.SGD(0.1), "mse", run_eagerly=eager)
        network.fit(x, np.zeros(numpy_of(network(x)).shape), verbose=0)
    for bank, (a, b) in zip(banks(model), before, strict=True):
        key = id(bank.site.matrix)
        step = ALPHA / RANK * (numpy_of(plain_of[key]) - kernels[key])
        rows, columns = step.reshape(-1, b.shape[1]), a.reshape(-1, RANK)
        expected = (a + (rows @ b.T).reshape(a.shape), b + columns.T @ rows)
        for found, value in zip(bank.adapters["default"].factors, expected, strict=True):
            np.testing.assert_allclose(numpy_of(found), value, rtol=1e-3, atol=1e-5)


def test_a_cell_is_made_from_its_config() -> None:
    """Not that of a `ConvLSTM`, whose config lacks an argument in Keras."""
    for name in ("LSTM", "GRU", "SimpleRNN"):
        (cell,) = kl.lora_layers(adapted(name)).values()
        made = type(cell).from_config(cell.get_config())
        assert made.get_config() == cell.get_config()


@pytest.mark.parametrize("name", ["LSTM", "GRU"])
@pytest.mark.parametrize("options", [{"use_dora": True}, {"dropout": 0.5}])
def test_training_computes_what_inference_does(name: str, options: dict[str, Any]) -> None:
    model, x = adapted(name, **options), inputs(name)
    found, expected = (numpy_of(model(x, training=training)) for training in (True, False))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
def test_a_kernel_is_formed_once_a_call(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = keras.Sequential(
        [keras.Input(STEPS), layers.LSTM(5, unroll=True, dtype=dtype, name="lstm")]
    )
    kl.apply_lora(model, kl.LoRAConfig(rank=RANK, targets="all"))
    read: list[AdapterBank] = []
    kernel: Any = AdapterBank.kernel

    def counted(bank: AdapterBank) -> Any:
        read.append(bank)
        return kernel.fget(bank)

    monkeypatch.setattr(AdapterBank, "kernel", property(counted))
    output = model(np.ones((2, *STEPS), "float32"))
    assert len(read) == 2
    assert keras.backend.standardize_dtype(output.dtype) == model.layers[0].compute_dtype


def test_a_state_is_kept_from_batch_to_batch() -> None:
    def stateful() -> keras.Model:
        keras.utils.set_random_seed(7)
        return keras.Sequential(
            [keras.Input(batch_shape=(2, *STEPS)), layers.GRU(5, stateful=True)], name="net"
        )

    model, plain = stateful(), stateful()
    kl.apply_lora(model, kl.LoRAConfig(rank=RANK, targets="all"))
    x = inputs("GRU")
    for _ in range(2):
        np.testing.assert_array_equal(numpy_of(model(x)), numpy_of(plain(x)))


class Counting:
    """A cell that is no layer."""

    state_size = output_size = 1
    compute_dtype = "float32"

    def call(self, inputs: Any, states: Any) -> Any:  # noqa: ARG002
        return states[0], [states[0] + 1]

    __call__ = call

    def get_initial_state(self, batch_size: Any = None) -> Any:
        return [keras.ops.zeros((batch_size, 1))]


def test_cells_of_others_compute_as_ever() -> None:
    output = layers.RNN(Counting())(np.ones((2, *STEPS), "float32"))
    np.testing.assert_array_equal(numpy_of(output), [[6.0], [6.0]])


@pytest.mark.parametrize("options", [{}, {"use_dora": True, "bias": "lora_only"}])
def test_files_bring_an_adapter_back(options: dict[str, Any], tmp_path: Path) -> None:
    name = "Bidirectional"
    model, x = adapted(name, **options), inputs(name)
    expected, loaded = numpy_of(model(x)), brought_back(model, lambda: made(name), x, tmp_path)
    kl.set_adapter(loaded, None)
    np.testing.assert_allclose(numpy_of(loaded(x)), numpy_of(made(name)(x)), rtol=1e-4, atol=1e-7)
    kl.merge_lora(model).save(tmp_path / "m.keras")
    merged = keras.saving.load_model(tmp_path / "m.keras")
    np.testing.assert_allclose(numpy_of(merged(x)), expected, rtol=1e-5, atol=1e-6)


def test_presets_and_names_select_matrices() -> None:
    model = keras.Sequential([keras.Input(STEPS), layers.LSTM(5, name="lstm"), layers.Dense(3)])
    paths = [target.path for target in kl.find_targets(model, "all")]
    assert paths == ["lstm/lstm_cell/kernel", "lstm/lstm_cell/recurrent_kernel"]
    (target,) = kl.find_targets(model, ["recurrent_kernel"])
    assert target.kernel_shape == (5, 20)
    kl.apply_lora(model, kl.LoRAConfig(rank=RANK, targets=["recurrent_kernel"]))
    assert [tuple(v.shape) for v in model.trainable_variables] == [(5, RANK), (RANK, 20)]


def test_a_model_whose_config_lists_its_cells_is_saved_whole_or_refused(tmp_path: Path) -> None:
    name = "stacked cells"
    model, x = adapted(name), inputs(name)
    model.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    np.testing.assert_array_equal(numpy_of(loaded(x)), numpy_of(model(x)))
    for config in (
        kl.LoRAConfig(rank=2, targets=["recurrent_kernel"]),
        kl.LoRAConfig(rank=2, targets="all", rank_pattern={"recurrent_kernel": 1}),
    ):
        model = kl.apply_lora(made(name), config)
        with pytest.raises(ValueError, match="adapters that no `.keras` file"):
            model.save(tmp_path / "m.keras")
    with pytest.raises(ValueError, match="adapters that no `.keras` file"):
        adapted("LSTM").save(tmp_path / "m.keras")


def test_adapters_of_other_forms_are_refused(tmp_path: Path) -> None:
    model = adapted("LSTM")
    with pytest.raises(ValueError, match="lstm_cell"):
        kl.save_peft_adapter(model, tmp_path / "peft")
    if keras.backend.backend() == "tensorflow":
        with pytest.raises(ValueError, match="lstm_cell"):
            kl.export_saved_model(model, tmp_path / "many", adapters=["default"])
    assert not [*tmp_path.iterdir()]
    with pytest.raises(ValueError, match="kernel_constraint"):
        kl.find_targets(
            keras.Sequential(
                [keras.Input(STEPS), layers.LSTM(5, kernel_constraint="non_neg", name="lstm")]
            ),
            "all",
        )
