"""Keras's private API that quantized layers build on: a test fails where Keras changes it."""

from __future__ import annotations

import keras
import pytest

import keras_lora  # noqa: F401  (which wraps `Model.quantize`)


def test_what_quantizing_sets_and_asks() -> None:
    """So `dequantize` is its inverse, and a refusal comes before anything changes."""
    layer = keras.layers.EinsumDense("btd,dnh->btnh", (None, 2, 7))
    layer.build((None, 3, 5))
    assert "should_quantize_layer" in keras.Model.quantize.__wrapped__.__globals__
    layer._check_quantize_args("int8", "float32")
    layer.quantize("int8")
    assert layer._is_quantized
    assert layer.quantization_config.mode == "int8"
    assert layer.dtype_policy.get_config()["source_name"] == "float32"
    assert layer._adjust_scale_for_dequant(layer.kernel_scale).shape == (1, 2, 7)
    with pytest.raises(ValueError, match="already quantized"):
        layer._check_quantize_args("int8", "float32")
    layer = keras.layers.Dense(7)
    layer.build((None, 5))
    config = keras.quantizers.GPTQConfig(dataset=None, tokenizer=None, group_size=3)
    layer.quantize("gptq", config=config)
    assert not layer.is_gptq_calibrated
    assert str(layer.dtype_policy.name) == "gptq/4/3_from_float32"


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_the_integers_of_quantized_layers(mode: str) -> None:
    dense, table = keras.layers.Dense(7), keras.layers.Embedding(13, 5)
    for layer, shape, attribute in [(dense, (3, 5), "_kernel"), (table, (3,), "_embeddings")]:
        layer.build(shape)
        layer.quantize(mode)
        assert getattr(layer, attribute).dtype == "int8"
    assert dense.input_spec.axes[-1] == 5


def test_a_layer_of_another_mode_runs_its_quantized_call() -> None:
    """And looks the method up on the object, so that one of its own comes first."""
    layer = keras.layers.Dense(7)
    layer.build((3, 5))
    layer.quantize("int8")
    vars(layer)["quantized_call"] = lambda x: x + 1
    assert float(keras.ops.sum(layer(keras.ops.ones((2, 5))))) == 20


def test_a_variable_may_stand_for_one_of_another_shape() -> None:
    variable = keras.Variable(0.0, trainable=False)
    variable._shape = (5, 7)
    assert tuple(variable.shape) == (5, 7)
