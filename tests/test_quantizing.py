"""Quantizing puts other variables in the place of a model's: refused while there are adapters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from support.adapters import heads
from support.cases import numpy_of
from support.models import CONFIG, data, every_model, functional, randomize_adapters, state

import keras_lora as kl

REFUSED = r"adapte.*Merge first: merge_lora\(model\)"


@every_model
def test_a_model_with_adapters_is_not_quantized(make: Callable[[], keras.Model]) -> None:
    model = kl.apply_lora(make(), CONFIG)
    outer = keras.Sequential([keras.Input(data(model)[0].shape[1:]), model])
    before = state(outer)
    for mode in ["int8", "int4", "float8"]:
        for quantized in [model, outer, *kl.lora_layers(model).values()]:
            with pytest.raises(ValueError, match=REFUSED):
                quantized.quantize(mode, type_check=False)
    with pytest.raises(ValueError, match=REFUSED):
        model.quantize("int8", filters="head")
    assert state(outer) == before


def test_an_adapted_layer_takes_no_quantized_policy() -> None:
    model = kl.apply_lora(functional(), CONFIG)
    with pytest.raises(ValueError, match=REFUSED):
        model.get_layer("up").dtype_policy = "int8_from_float32"


@pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize` method")
def test_a_merged_model_is_quantized_whole() -> None:
    model = kl.apply_lora(functional(), CONFIG)
    randomize_adapters(model)
    x, _ = data(model)
    expected = numpy_of(kl.merge_lora(model)(x))
    model.quantize("int8")
    quantized = [x for x in model.layers if x.dtype_policy.quantization_mode == "int8"]
    assert [layer.name for layer in quantized] == ["up", "middle", "head"]
    np.testing.assert_allclose(numpy_of(model(x)), expected, atol=0.1 * np.abs(expected).max())


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
