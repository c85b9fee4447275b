"""One SavedModel for many adapters: its size, its C clients, and generation by row."""

from __future__ import annotations

from pathlib import Path

import keras
import keras_hub
import numpy as np
import pytest
import tensorflow as tf
from support.mixed_batches import (
    HEAD,
    MIX,
    NAMES,
    RNG,
    adapted,
    assert_rows,
    client,
    config,
    normal,
)

import keras_lora as kl


def two_outputs() -> keras.Model:
    inputs = keras.Input((5,), name="x")
    x = keras.layers.Dense(7, activation="gelu", name="up")(inputs)
    outputs = [keras.layers.Dense(3, name="class")(x), keras.layers.Dense(2, name="plain")(inputs)]
    return keras.Model(inputs, outputs)


@pytest.mark.slow
def test_an_unknown_name_fails_its_request_in_the_c_library(tmp_path: Path) -> None:
    """Even if the fetched output depends on no adapter."""
    model = adapted(two_outputs, (config(2, ["up"]), config(3, ["class"])))
    kl.export_saved_model(model, tmp_path / "1", adapters=["fr", "de"])
    x, names = normal(5), [name.replace("it", "fr") for name in MIX]
    bad = [[*names[:-1], "zz"], ["fr"], names * 2]
    received, refused = client(tmp_path / "1", {"x": x, "adapter": names}, bad)
    for name in ("fr", "de", ""):
        kl.set_adapter(model, name or None)
        rows = [i for i, other in enumerate(names) if other == name]
        for key, expected in zip(("class", "plain"), model(x), strict=True):
            assert_rows(received[key][rows], np.array(expected)[rows])
    assert [code for code, _ in refused] == [3] * 6  # INVALID_ARGUMENT
    for _, message in refused[:2]:
        assert "one of: fr, de; or an empty string for the base. Received: zz" in message
    for _, message in refused[2:]:
        assert "Expected one adapter for each row" in message


def large() -> keras.Model:
    inputs = keras.Input((263,), name="x")
    x = keras.layers.Dense(257, name="up")(inputs)
    return keras.Model(inputs, keras.layers.Dense(251, name="head")(x))


def stored(path: Path) -> int:
    return sum(f.stat().st_size for f in path.rglob("*.data-*"))


def test_the_size_is_that_of_the_base_and_the_adapters(tmp_path: Path) -> None:
    """Nothing is padded, although the ranks differ and the adapters have heads."""
    configs = (config(1, ["up"]), config(113, ["up"]), config(2, ["up"], **HEAD))
    model = adapted(large, configs)
    kl.export_saved_model(model, tmp_path / "1", adapters=NAMES)
    adapters = (1 + 113 + 2) * (263 + 257) + (257 + 1) * 251
    base = (263 + 1) * 257 + (257 + 1) * 251
    assert 4 * (base + adapters) <= stored(tmp_path / "1") <= 1.02 * 4 * (base + adapters)


@pytest.mark.slow
def test_generation_by_row_equals_generation_with_each_adapter(tmp_path: Path) -> None:
    backbone = keras_hub.models.GPT2Backbone(
        vocabulary_size=31,
        num_layers=1,
        num_heads=3,
        hidden_dim=15,
        intermediate_dim=17,
        max_sequence_length=13,
    )

    def make() -> keras.Model:
        task = keras_hub.models.GPT2CausalLM(backbone=backbone, preprocessor=None)
        task.compile(sampler="greedy")
        return task

    model = adapted(make, (config(2, "all-linear"), config(5, "attention", bias="all")))
    kl.export_saved_model(model, tmp_path / "1", adapters=["fr", "de"], stop_token_ids=None)
    mask = np.zeros((3, 11), "int32")
    mask[:, :4] = 1
    prompt = {"token_ids": RNG.integers(1, 31, (3, 11)).astype("int32") * mask}
    prompt["padding_mask"] = mask
    loaded = tf.saved_model.load(str(tmp_path / "1"))
    given = {name: tf.constant(value) for name, value in prompt.items()}
    received = loaded.signatures["generate"](adapter=tf.constant(["de", "", "fr"]), **given)
    written = []
    for row, name in enumerate(("de", "", "fr")):
        kl.set_adapter(model, name or None)
        written.append(model.generate(prompt, stop_token_ids=None)["token_ids"][row])
        np.testing.assert_array_equal(received["token_ids"][row], written[row])
    assert len({tuple(row[4:]) for row in written}) > 1
