"""Quantizing under adapters, which puts other variables in the place of those of the base."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from support.adapters import heads
from support.cases import numpy_of, relative, snapshot
from support.models import (
    CONFIG,
    data,
    functional,
    one_block,
    randomize_adapters,
    state,
    subclassed,
)

import keras_lora as kl

pytestmark = pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize` method")


@pytest.mark.parametrize(
    ("make", "mode"), [(functional, "int4"), (one_block, "int8"), (subclassed, "int8")]
)
def test_a_model_is_quantized_under_its_adapters(
    make: Callable[[], keras.Model], mode: str
) -> None:
    model, twin = (kl.apply_lora(make(), CONFIG) for _ in range(2))
    twin.set_weights(model.get_weights())
    for each in (model, twin):
        randomize_adapters(each)
    x, _ = data(model)
    factors = snapshot(model.trainable_variables)
    adapted, trained = numpy_of(model(x)), ids(model.trainable_variables)

    model.quantize(mode)
    layers = kl.lora_layers(model)
    assert {x.dtype_policy.quantization_mode for x in layers.values()} == {mode}
    assert ids(model.trainable_variables) == trained
    assert snapshot(model.trainable_variables) == factors
    assert 0 < relative(model(x), adapted) <= 0.3
    # As when the base was quantized first.
    kl.save_adapter(model, folder := Path(tempfile.mkdtemp()) / "adapter")
    kl.unload_lora(twin).quantize(mode)
    kl.load_adapter(twin, folder)
    np.testing.assert_array_equal(numpy_of(model(x)), numpy_of(twin(x)))
    kl.unload_lora(model)
    np.testing.assert_array_equal(numpy_of(model(x)), numpy_of(kl.unload_lora(twin)(x)))


def test_no_compiled_function_goes_on_with_the_base_from_before() -> None:
    model = kl.apply_lora(functional(), CONFIG)
    randomize_adapters(model)
    x, _ = data(model)
    outer = keras.Sequential([keras.Input(x.shape[1:]), model])
    outer.predict(x, verbose=0)
    model.quantize("int4")
    assert relative(outer.predict(x, verbose=0), model(x)) <= 1e-5


def test_what_cannot_be_quantized_under_adapters_changes_nothing() -> None:
    model = kl.apply_lora(functional(), CONFIG)
    half = kl.apply_lora(functional(dtype="float16"), CONFIG)
    partly = functional()
    partly.get_layer("up").quantize("int8")
    kl.apply_lora(partly, CONFIG)
    config = keras.quantizers.GPTQConfig(dataset=None, tokenizer=None)
    cases: list[tuple[keras.Model, dict[str, Any], str]] = [
        (model, {"mode": "float8"}, r"merge_lora\(model\)"),
        (model, {"mode": "gptq", "config": config}, r"merge_lora\(model\)"),
        (model, {"config": config}, r"merge_lora\(model\)"),
        (half, {"mode": "int8"}, "float16"),
        (partly, {"mode": "int8"}, "already quantized"),
    ]
    for quantized, options, message in cases:
        before = state(quantized)
        with pytest.raises(ValueError, match=message):
            quantized.quantize(**options)
        assert state(quantized) == before
    for layer in kl.lora_layers(model).values():
        with pytest.raises(ValueError, match=r"adapte.*model\.quantize"):
            layer.quantize("int8")


def test_a_head_that_trains_in_full_stays_in_floating_point() -> None:
    model = heads()
    before = snapshot(model.get_layer("head").weights)
    with pytest.warns(UserWarning, match=r"train in full: \['head'\]"):
        model.quantize("int8")
    assert snapshot(model.get_layer("head").weights) == before
    assert model.get_layer("head").dtype_policy.quantization_mode is None
    kl.set_adapter(model, "two")


def test_a_part_may_be_quantized_before_and_after() -> None:
    model, x = functional(), data(functional())[0]
    model.quantize("int8", filters="up")
    kl.apply_lora(model, kl.LoRAConfig(rank=2, targets=["up", "middle"], use_dora=True))
    fresh = numpy_of(model(x))
    model.quantize("int4", filters="middle")
    assert relative(model(x), fresh) <= 0.3
    modes = [x.dtype_policy.quantization_mode for x in kl.lora_layers(model).values()]
    assert modes == ["int8", "int4"]
    middle = kl.lora_layers(model)["middle"]
    norms = numpy_of(middle.bank.squared_norms)
    with middle.without_adapters():
        np.testing.assert_allclose(norms, (numpy_of(middle.kernel) ** 2).sum(0), rtol=1e-5)
    randomize_adapters(model)
    adapted = numpy_of(model(x))
    kl.merge_lora(model, quantized="dequantize")
    assert relative(model(x), adapted) <= 0.05


def test_an_adapted_layer_takes_no_quantized_policy() -> None:
    model = kl.apply_lora(functional(), CONFIG)
    with pytest.raises(ValueError, match=r"adapte.*merge_lora\(model\)"):
        model.get_layer("up").dtype_policy = "int8_from_float32"


def test_a_merged_model_is_quantized_whole() -> None:
    model = kl.apply_lora(functional(), CONFIG)
    randomize_adapters(model)
    x, _ = data(model)
    expected = numpy_of(kl.merge_lora(model)(x))
    model.quantize("int8")
    quantized = [x for x in model.layers if x.dtype_policy.quantization_mode == "int8"]
    assert [layer.name for layer in quantized] == ["up", "middle", "head"]
    np.testing.assert_allclose(numpy_of(model(x)), expected, atol=0.1 * np.abs(expected).max())


def ids(variables: Any) -> list[int]:
    return [id(v) for v in variables]


VERBS: dict[str, Callable[[keras.Model, Path], Any]] = {
    "set_adapter": lambda model, _: kl.set_adapter(model, "one"),
    "set no adapter": lambda model, _: kl.set_adapter(model, None),
    "delete_adapter": lambda model, _: kl.delete_adapter(model, "one"),
    "apply_lora": lambda model, _: kl.apply_lora(model, CONFIG, name="three"),
    "merge_lora": lambda model, _: kl.merge_lora(model),
    "a merged copy": lambda model, _: kl.merge_lora(model, inplace=False),
    "unload_lora": lambda model, _: kl.unload_lora(model),
    "save_adapter": lambda model, path: kl.save_adapter(model, path / "one", "one"),
    "disable_adapter": lambda model, _: kl.disable_adapter(model).__enter__(),
    "merged": lambda model, _: kl.merged(model).__enter__(),
}


def test_no_verb_goes_on_with_a_head_that_is_another_variable_now(tmp_path: Path) -> None:
    model = heads()
    model.get_layer("head").quantize("int8")
    before = state(model)
    for verb in VERBS.values():
        with pytest.raises(ValueError, match=r"place of \['head/kernel'.*load the base"):
            verb(model, tmp_path)
        assert state(model) == before
    assert not list(tmp_path.iterdir())


def test_a_part_of_a_model_does_not_miss_the_head_that_it_lacks() -> None:
    encoder = functional()
    outputs = keras.layers.Dense(2, name="task")(encoder.output)
    model = keras.Model(encoder.input, outputs)
    kl.apply_lora(model, kl.LoRAConfig(rank=2, targets=["up"], layers_to_save=["task"]))
    kl.set_adapter(encoder, None)
    kl.set_adapter(encoder, "default")
    assert kl.lora_layers(model)["up"].active_adapters == ("default",)
