"""Adapted layers in a `RematScope`: they compute and train as without it, dropout included."""

from __future__ import annotations

import contextlib
from typing import Any

import keras
import numpy as np
import pytest
from support.cases import numpy_of
from support.models import randomize_adapters

import keras_lora as kl

MODES = ["full", "activations", "larger_than", "list_of_layers"]
TOKENS = np.array([[3, 0, 12], [7, 7, 1]])
Y = np.random.default_rng(1).normal(size=(2, 3, 2)).astype("float32")


def scope(mode: str | None) -> Any:
    if mode is None:
        return contextlib.nullcontext()
    return keras.RematScope(mode, output_size_threshold=1, layer_names=["tokens", "up", "mixed"])


def trained(mode: str | None, config: kl.LoRAConfig, eager: bool = False) -> list[np.ndarray]:
    """What two steps from the same start train, and the outputs then."""
    keras.utils.set_random_seed(1)
    with scope(mode):
        layers = [
            keras.layers.Embedding(13, 5, name="tokens"),
            keras.layers.Dense(7, activation="gelu", name="up"),
            keras.layers.EinsumDense("abc,cd->abd", (None, 11), activation="tanh", name="mixed"),
        ]
    model = keras.Sequential([keras.Input((3,), dtype="int32"), *layers, keras.layers.Dense(2)])
    kl.apply_lora(model, config)
    randomize_adapters(model)
    model.compile(keras.optimizers.SGD(0.1), "mse", run_eagerly=eager)
    model.fit(TOKENS, Y, epochs=2, batch_size=2, shuffle=False, verbose=0)
    values = [numpy_of(variable) for variable in model.trainable_variables]
    return [*values, numpy_of(model.predict(TOKENS, verbose=0))]


CONFIGS = {
    "plain": kl.LoRAConfig(rank=2, targets="all"),
    "dropout and DoRA": kl.LoRAConfig(rank=2, dropout=0.5, use_dora=True, bias="lora_only"),
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.filterwarnings("ignore:The RematScope at call time:UserWarning")
def test_training_is_the_same_in_every_mode(name: str) -> None:
    expected = trained(None, CONFIGS[name], eager=True)
    for mode in MODES:
        check(trained(mode, CONFIGS[name], eager=True), expected, mode)


@pytest.mark.filterwarnings("ignore:The RematScope at call time:UserWarning")
def test_compiled_training_is_the_same() -> None:
    config = CONFIGS["dropout and DoRA"]
    check(trained("full", config), trained(None, config), "full")


def check(received: list[np.ndarray], expected: list[np.ndarray], mode: str) -> None:
    for ours, theirs in zip(received, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6, err_msg=mode)


@pytest.mark.skipif(
    keras.backend.backend() == "jax", reason="Keras itself passes `reverse` as a tensor there"
)
def test_a_model_made_in_a_scope_merges_and_saves_as_any_other(tmp_path: Any) -> None:
    with scope("full"):
        layer = keras.layers.ReversibleEmbedding(13, 5, name="tokens")
        tokens = keras.Input((3,), dtype="int32")
        up = keras.layers.Dense(5, name="up")(layer(tokens))
        model = keras.Model(tokens, layer(up, reverse=True))
    kl.apply_lora(model, kl.LoRAConfig(rank=2, targets="all", dropout=0.1))
    randomize_adapters(model)
    expected = numpy_of(model(TOKENS))
    model.save(tmp_path / "adapted.keras")
    again = keras.models.load_model(tmp_path / "adapted.keras")
    np.testing.assert_allclose(numpy_of(again(TOKENS)), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        numpy_of(kl.merge_lora(model)(TOKENS)), expected, rtol=1e-4, atol=1e-5
    )
