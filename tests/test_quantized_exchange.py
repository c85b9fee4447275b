"""What leaves a quantized base: PEFT's files, which are ordinary ones, and SavedModels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import keras_hub
import numpy as np
import pytest
import tensorflow as tf
from safetensors.numpy import load_file
from support.cases import numpy_of

import keras_lora as kl

pytestmark = pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize` method")


def randomized(model: Any, name: str = "default") -> Any:
    rng = np.random.default_rng(11)
    for _, layer in sorted(kl.lora_layers(model).items()):
        for factor in layer.adapters[name].factors:
            factor.assign(rng.normal(scale=0.3, size=factor.shape))
    return model


def backbone(mode: str) -> Any:
    keras.utils.set_random_seed(3)
    model = keras_hub.models.GPT2Backbone(
        vocabulary_size=11, num_layers=1, num_heads=2, hidden_dim=6, intermediate_dim=5
    )
    if mode:
        model.quantize(mode)
    return model


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_files_of_peft_are_those_of_a_base_in_floating_point(mode: str, tmp_path: Path) -> None:
    config = kl.LoRAConfig(rank=2)
    for name in ("", mode):
        model = randomized(kl.apply_lora(backbone(name), config))
        kl.save_peft_adapter(model, tmp_path / f"of {name}", prefix="transformer.")
    plain, found = (
        load_file(tmp_path / f"of {name}" / "adapter_model.safetensors") for name in ("", mode)
    )
    assert plain.keys() == found.keys()
    for key, value in plain.items():
        np.testing.assert_array_equal(found[key], value)
    kl.load_peft_adapter(loaded := backbone(mode), tmp_path / f"of {mode}")
    inputs = {"token_ids": np.array([[1, 2, 3]]), "padding_mask": np.ones((1, 3), "bool")}
    np.testing.assert_array_equal(numpy_of(loaded(inputs)), numpy_of(model(inputs)))


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="SavedModels")
def test_a_saved_model_computes_as_the_adapted_quantized_model(tmp_path: Path) -> None:
    up = keras.layers.Dense(7, activation="gelu", name="up")
    down = keras.layers.Dense(5, name="down")
    model = keras.Sequential([keras.Input((5,), name="x"), up, down])
    up.quantize("int8")
    down.quantize("int4")
    for name in ("fr", "de"):
        kl.apply_lora(model, kl.LoRAConfig(rank=2, targets=["up", "down"]), name=name)
        randomized(model, name)
    x = np.random.default_rng(5).normal(size=(2, 5)).astype("float32")
    assert kl.export_saved_model(model, tmp_path / "1").problems == ()
    loaded = tf.saved_model.load(str(tmp_path / "1"))
    (found,) = loaded.signatures["serving_default"](x=tf.constant(x)).values()
    np.testing.assert_allclose(found, numpy_of(model(x)), rtol=1e-5, atol=1e-6)
    assert len(kl.lora_layers(model)) == 2

    assert kl.export_saved_model(model, tmp_path / "2", adapters=["fr", "de"]).problems == ()
    many = tf.saved_model.load(str(tmp_path / "2"))
    names = tf.constant(["de", "fr"])
    (rows,) = many.signatures["serving_default"](x=tf.constant(x), adapter=names).values()
    for row, name in zip(rows, ("de", "fr"), strict=True):
        index = ("de", "fr").index(name)
        with kl.use_adapter(model, name):
            expected = numpy_of(model(x))[index]
        np.testing.assert_allclose(row, expected, rtol=1e-5, atol=1e-6)
