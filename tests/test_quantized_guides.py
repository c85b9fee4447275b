"""The orders in which KerasHub's guides quantize and adapt a language model with a tied head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import keras_hub
import numpy as np
import pytest
from support.cases import numpy_of, relative

import keras_lora as kl

pytestmark = [
    pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize` method"),
    pytest.mark.filterwarnings("ignore:`shuffle=True` was passed"),
]
TOKENS = np.random.default_rng(1).integers(1, 61, (4, 7))
INPUTS = {"token_ids": TOKENS, "padding_mask": np.ones((4, 7), "bool")}
PROMPT = {**INPUTS, "padding_mask": np.arange(7)[None] < np.full((4, 1), 3)}


def gemma() -> Any:
    keras.utils.set_random_seed(3)
    backbone = keras_hub.models.GemmaBackbone(
        vocabulary_size=61,
        num_layers=1,
        num_query_heads=2,
        num_key_value_heads=1,
        hidden_dim=16,
        intermediate_dim=32,
        head_dim=8,
    )
    rng = np.random.default_rng(0)
    for variable in backbone.weights:
        if len(variable.shape) > 1:
            variable.assign(rng.normal(scale=0.2, size=variable.shape))
    return keras_hub.models.GemmaCausalLM(backbone, preprocessor=None)


def fall(model: Any) -> float:
    """By how much the loss falls in a few steps."""
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.02), loss, run_eagerly=True, jit_compile=False)
    losses = model.fit(INPUTS, np.roll(TOKENS, -1, 1), epochs=8, verbose=0).history["loss"]
    return float(losses[0] - losses[-1])


def test_int8_then_lora_learns_as_in_floating_point(tmp_path: Path) -> None:
    config = kl.LoRAConfig(rank=4)
    expected = fall(kl.apply_lora(gemma(), config))
    model = gemma()
    model.quantize("int8")
    base = numpy_of(model(INPUTS))
    kl.apply_lora(model, config)
    np.testing.assert_array_equal(numpy_of(model(INPUTS)), base)
    assert fall(model) == pytest.approx(expected, rel=0.3)

    kl.save_adapter(model, tmp_path / "adapter")
    fresh = gemma()
    fresh.quantize("int8")
    np.testing.assert_array_equal(numpy_of(fresh(INPUTS)), base)  # int8 alone
    kl.load_adapter(fresh, tmp_path / "adapter")
    fresh.compile(run_eagerly=True)
    np.testing.assert_array_equal(numpy_of(fresh(INPUTS)), numpy_of(model(INPUTS)))
    answers = [m.generate(PROMPT, stop_token_ids=None)["token_ids"] for m in (model, fresh)]
    np.testing.assert_array_equal(*answers)


def test_lora_then_int8_goes_on_and_merges() -> None:
    model = kl.apply_lora(gemma(), kl.LoRAConfig(rank=4))
    assert fall(model) > 0.1
    adapted = numpy_of(model(INPUTS))
    model.quantize("int8")
    assert relative(model(INPUTS), adapted) <= 0.1
    assert fall(model) > 0.1
    trained = numpy_of(model(INPUTS))
    model.generate(PROMPT, stop_token_ids=None)
    kl.merge_lora(model, quantized="requantize", drift={})
    assert relative(model(INPUTS), trained) <= 0.1
    model.generate(PROMPT, stop_token_ids=None)
