"""What an error about targets says to do instead."""

from __future__ import annotations

import re

import keras
import pytest
from support.models import composite

import keras_lora as kl

HUGGING_FACE = [
    ("q_proj", ["query"]),
    ("self_attn.k_proj", ["key"]),
    ("v_proj", ["value"]),
    ("o_proj", ["attention_output"]),
    ("c_attn", ["key", "query", "value"]),
]


@pytest.mark.parametrize(("name", "closest"), HUGGING_FACE)
def test_names_of_hugging_face_are_translated(name: str, closest: list[str]) -> None:
    with pytest.raises(ValueError, match=re.escape(f"Closest: {closest}")):
        kl.find_targets(composite(), [name])


def test_a_layer_without_matrices_that_can_be_adapted_says_what_else_to_do() -> None:
    layers = keras.layers
    model = keras.Sequential(
        [keras.Input((4, 5)), layers.PReLU(name="slopes"), layers.LSTM(3, name="lstm")]
    )
    with pytest.raises(ValueError, match=r"layers_to_save=\['slopes'\].*register_lora_class"):
        kl.find_targets(model, ["slopes"])
    with pytest.raises(ValueError, match=r"To name the layers inside.*'re:\.\*lstm/\.\*'"):
        kl.find_targets(model, ["lstm"])
    paths = [target.path for target in kl.find_targets(model, "re:.*lstm/.*")]
    assert paths == ["lstm/lstm_cell/kernel", "lstm/lstm_cell/recurrent_kernel"]


def test_a_kernel_without_inputs_is_refused() -> None:
    inputs = keras.Input((0,))
    hidden = keras.layers.Dense(7, name="empty")(inputs)
    with pytest.raises(ValueError, match=r"'empty': expected a kernel without a side of 0"):
        kl.find_targets(keras.Model(inputs, keras.layers.Dense(2)(hidden)))


@pytest.mark.parametrize(
    ("module", "message"), [("tf_keras.src.models", "of Keras 2"), ("numpy", "a Keras model")]
)
def test_what_is_no_model_of_keras_3_is_refused_by_every_verb(module: str, message: str) -> None:
    model = type("Model", (), {"__module__": module})()
    for verb in ("find_targets", "apply_lora", "merge_lora", "lora_layers", "unload_lora"):
        with pytest.raises(ValueError, match=message):
            getattr(kl, verb)(model)
