"""Adapters on quantized layers: the frozen product is Keras's own; on every backend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import ops
from support.cases import (
    ALPHA,
    RANK,
    Case,
    adapted,
    adapter,
    config,
    kernel_of,
    numpy_of,
    randomize,
    reference_delta,
    reference_dora,
    reference_output,
    relative,
    snapshot,
)
from support.models import CONFIG, functional, randomize_adapters, state
from support.quantized import GRIDS, LINEAR, PAIR_IDS, PAIRS, TABLES, quantized

import keras_lora as kl

pytestmark = [
    pytest.mark.filterwarnings("ignore:The rank is above:UserWarning"),
    pytest.mark.filterwarnings("ignore:The use of `x.T` on tensors:UserWarning"),  # in Keras
]
pairs = pytest.mark.parametrize(("case", "grid"), PAIRS, ids=PAIR_IDS)
SCALE = ALPHA / RANK
LOOSE = 0.05  # of a product that rounds its inputs to 8 bits


@pairs
def test_fresh_is_the_quantized_base_and_adapted_the_reference(case: Case, grid: str) -> None:
    model, x = quantized(case, grid), case.batch()
    base, before = numpy_of(model(x)), snapshot(model.weights)
    layer = kl.lora_layers(kl.apply_lora(model, config()))["case"]
    np.testing.assert_array_equal(numpy_of(model(x)), base)
    w0 = numpy_of(kernel_of(layer))
    rounding = LOOSE if grid == "int8" else 1e-5
    if case.id != "reversible, untied":
        assert relative(base, reference_output(case, model, x, w0)) <= rounding

    randomize(adapter(model).factors)
    a, b = map(numpy_of, adapter(model).factors)
    kernel = w0 + reference_delta(case, a, b, SCALE)
    assert relative(kernel_of(layer), kernel) <= 1e-6
    assert relative(model(x), reference_output(case, model, x, kernel)) <= rounding
    with layer.without_adapters():
        np.testing.assert_array_equal(numpy_of(layer(x, **case.call)), base)
    kl.unload_lora(model)
    assert snapshot(model.weights) == before
    np.testing.assert_array_equal(numpy_of(model(x)), base)


@pytest.mark.parametrize("grid", GRIDS)
def test_dora_on_a_quantized_base_equals_the_reference(grid: str) -> None:
    case = LINEAR[1]
    model, x = quantized(case, grid), case.batch()
    base = numpy_of(model(x))
    layer = kl.lora_layers(kl.apply_lora(model, config(use_dora=True)))["case"]
    assert relative(model(x), base) <= 1e-5
    w0 = numpy_of(layer.kernel)
    randomize(adapter(model).factors)
    a, b, m = map(numpy_of, adapter(model).factors)
    kernel = reference_dora(case, w0 + reference_delta(case, a, b, SCALE), m)
    assert relative(layer.kernel, kernel) <= 1e-5
    rounding = LOOSE if grid == "int8" else 1e-4
    assert relative(model(x), reference_output(case, model, x, kernel)) <= rounding


@pytest.mark.parametrize("dtype", ["mixed_bfloat16", "bfloat16", "mixed_float16"])
@pytest.mark.parametrize("case", [LINEAR[1], TABLES[0], TABLES[3]], ids=lambda case: case.id)
def test_low_precision(case: Case, dtype: str) -> None:
    model, x = quantized(case, "int4, groups of 3", dtype=dtype), case.batch()
    base = numpy_of(model(x))
    layer = kl.lora_layers(kl.apply_lora(model, config()))["case"]
    np.testing.assert_array_equal(numpy_of(model(x)), base)
    assert {v.dtype for v in layer.trainable_variables} == {"float32"}
    variable_dtype = keras.DTypePolicy(dtype).variable_dtype
    assert keras.backend.standardize_dtype(kernel_of(layer).dtype) == variable_dtype


@pytest.mark.parametrize("case", [LINEAR[0], LINEAR[2], TABLES[0]], ids=lambda case: case.id)
def test_training_moves_the_factors_alone(case: Case) -> None:
    model, x = quantized(case, "int8"), case.batch()
    kl.apply_lora(model, config())
    model.compile("sgd", "mse", run_eagerly=case.eager)
    before = {id(v): snapshot([v]) for v in model.weights}
    model.fit(x, np.ones(model(x).shape), epochs=2, verbose=0)
    moved = {v.name for v in model.weights if snapshot([v]) != before[id(v)]}
    assert moved == {"lora_a", "lora_b"}


class Tied(keras.Model):
    """Token ids to logits by one matrix, as small language models have it."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.table = keras.layers.ReversibleEmbedding(13, 5, tie_weights=tied, name="table")
        self.up = keras.layers.Dense(5, name="up")

    def call(self, tokens: Any) -> Any:
        return self.table(self.up(self.table(tokens)), reverse=True)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("targets", [["up"], ["up", "table"]], ids=["plain", "adapted"])
def test_the_gradient_of_a_quantized_reverse_is_that_of_floating_point(
    targets: list[str], tied: bool
) -> None:
    """Keras's own int8 reverse has none but that of the largest hidden state."""
    steps, x = [], np.arange(14).reshape(2, 7) % 13
    for mode in ("int8", None):
        model = Tied(tied)
        model(x)
        randomize(model.weights)
        if mode is not None:
            model.table.quantize(mode)
        base = numpy_of(model(x))
        kl.apply_lora(model, kl.LoRAConfig(rank=2, targets=targets))
        np.testing.assert_array_equal(numpy_of(model(x)), base)
        randomize_adapters(model)
        before = list(map(numpy_of, model.trainable_variables))
        model.compile("sgd", "mse", run_eagerly=keras.backend.backend() == "tensorflow")
        model.train_on_batch(x, np.ones((2, 7, 13)))
        moved = zip(model.trainable_variables, before, strict=True)
        steps.append([numpy_of(after) - value for after, value in moved])
        kl.unload_lora(model)
        assert "quantized_call" not in vars(model.table)
    for step, expected in zip(*steps, strict=True):
        assert relative(step, expected) <= LOOSE


def test_files_say_how_the_base_was_quantized(tmp_path: Path) -> None:
    case = LINEAR[0]
    model, x = adapted(case, quantized(case, "int4, groups of 3")), case.batch()
    kl.save_adapter(model, tmp_path)
    assert kl.read_adapter_config(tmp_path)["quantization"] == {"case": "int4/3"}

    same = quantized(case, "int4, groups of 3")
    kl.load_adapter(same, tmp_path)
    np.testing.assert_array_equal(numpy_of(same(x)), numpy_of(model(x)))
    for other, now in [
        (case.model(), "floating point"),
        (quantized(case, "int8"), "int8"),
        (quantized(case, "int4"), "int4/128"),
    ]:
        with pytest.warns(UserWarning, match=f"case: int4/3, now {now}"):
            kl.load_adapter(other, tmp_path)
        assert list(kl.lora_layers(other)) == ["case"]


@pytest.mark.parametrize("case", [LINEAR[1], TABLES[1]], ids=lambda case: case.id)
def test_models_and_weights_in_files_go_on(case: Case, tmp_path: Path) -> None:
    model, x = adapted(case, quantized(case, "int4, groups of 3")), case.batch()
    expected = numpy_of(model(x))
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(numpy_of(loaded(x)), expected)
    model.save_weights(tmp_path / "a.weights.h5")
    fresh = kl.apply_lora(quantized(case, "int4, groups of 3"), config())
    fresh.load_weights(tmp_path / "a.weights.h5")
    np.testing.assert_array_equal(numpy_of(fresh(x)), expected)


def test_adapters_are_switched_and_checkpoints_kept(tmp_path: Path) -> None:
    model = functional()
    model.get_layer("up").quantize("int8")
    x = np.random.default_rng(5).normal(size=(6, 5)).astype("float32")
    base = numpy_of(model(x))
    for name in ("fr", "de"):
        kl.apply_lora(model, CONFIG, name=name)
        randomize_adapters(model)
    outputs: dict[str, np.ndarray] = {}
    for name in ("fr", "de", "fr", "de"):
        kl.set_adapter(model, name)
        outputs.setdefault(name, numpy_of(model(x)))
        np.testing.assert_array_equal(numpy_of(model(x)), outputs[name])
    with kl.disable_adapter(model):
        np.testing.assert_array_equal(numpy_of(model(x)), base)
    model.compile("sgd", "mse", run_eagerly=keras.backend.backend() == "tensorflow")
    checkpoint = kl.AdapterCheckpoint(tmp_path / "run", name="de")
    model.fit(x, np.ones((6, 3)), verbose=0, callbacks=[checkpoint])
    assert any((tmp_path / "run").rglob("adapter.safetensors"))


class Doubled(keras.layers.Dense):
    def call(self, inputs: Any, training: bool | None = None) -> Any:  # noqa: ARG002
        return 2 * ops.matmul(inputs, self.kernel)


def _of(layer: keras.layers.Layer, mode: str, inputs: tuple[int, ...] = (5,)) -> keras.Model:
    model = keras.Sequential([keras.Input(inputs), layer])
    if mode:
        layer.quantize(mode, type_check=False)
    return model


def _uncalibrated() -> keras.Model:
    layer = keras.layers.Dense(7, name="case")
    model = _of(layer, "")
    config = keras.quantizers.GPTQConfig(dataset=None, tokenizer=None, group_size=3)
    layer.quantize("gptq", config=config)
    return model


def test_what_is_not_known_is_refused_by_name() -> None:
    refused = [
        (_of(keras.layers.Dense(7, name="case"), "float8"), r"one of \('int8'.*'float8'"),
        (_uncalibrated(), "calibrated weights.*'gptq'"),
    ]
    for model, message in refused:
        before = state(model)
        with pytest.raises(ValueError, match=message):
            kl.apply_lora(model, config())
        assert state(model) == before
    with pytest.raises(ValueError, match="floating-point weights of a layer of this kind"):
        kl.LoRAConv1D(3, 2, dtype="int8_from_float32")


def test_a_class_with_a_computation_of_its_own_is_refused() -> None:
    class LoRADoubled(kl.LoRALayer, Doubled):
        def call(self, inputs: Any, training: bool | None = None) -> Any:
            return 2 * self.adapted_product(inputs, training)

    kl.register_lora_class(Doubled, LoRADoubled)
    with pytest.raises(ValueError, match="computes as Dense does.*Doubled"):
        kl.apply_lora(_of(Doubled(7, name="case"), "int8"), config())


def test_integers_take_no_values_of_floating_point() -> None:
    case = LINEAR[0]
    model = adapted(case, quantized(case, "int8"))
    with pytest.raises(ValueError, match="quantized.*dequantize"):
        kl.lora_layers(model)["case"].assign_base(np.ones((5, 7)))
    model.compile("sgd", "mse")
    data = [(case.batch(), np.ones((3, 11, 7)))]
    with pytest.raises(ValueError, match="quantized and have no gradient.*lora_ga"):
        kl.apply_lora(model, config(init="lora_ga"), name="other", data=data)


def test_starts_begin_from_the_weight_in_floating_point() -> None:
    case = LINEAR[0]
    for init in ("pissa", "olora", "orthogonal"):
        model, x = quantized(case, "int4, groups of 3"), case.batch()
        base = numpy_of(model(x))
        kl.apply_lora(model, config(init=init))
        assert relative(model(x), base) <= 1e-6
    w0 = numpy_of(
        kernel_of(kl.lora_layers(kl.apply_lora(quantized(case, "int8"), config()))["case"])
    )
    part = adapter(kl.apply_lora(quantized(case, "int8"), config(init="pissa")))
    u, values, v = np.linalg.svd(w0)
    best = (u[:, :RANK] * values[:RANK]) @ v[:RANK]
    assert relative(SCALE * numpy_of(part.a) @ numpy_of(part.b), best) <= 1e-5
