"""Models with tables in their layers, such as vocabularies, in a SavedModel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from support import preprocessing
from support.models import randomize_adapters

import keras_lora as kl

TABLES = [
    name
    for name in preprocessing.OTHER_LAYERS
    if name.startswith(("IntegerLookup", "StringLookup", "TextVectorization"))
]


def table(names: list[str]) -> Any:
    values = tf.lookup.KeyValueTensorInitializer(names, tf.range(3, 3 + len(names)))
    return tf.lookup.StaticHashTable(values, 2)


class Tables(keras.layers.Layer):
    """Tables as an attribute, in a list, in a dict, and in a module of TensorFlow."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.one, self.some = table(["ash"]), [table(["oak"]), table(["elm"])]
        self.named = {"inner": [table(["fir"])]}
        self.module, self.modules = tf.Module(), [tf.Module()]
        self.module.table, self.modules[0].table = table(["yew"]), table(["ash", "oak"])
        self.scale = tf.Variable(3.0)

    def call(self, inputs: Any) -> Any:
        kept = [self.one, *self.some, *self.named["inner"], self.module.table]
        found = [each.lookup(inputs) for each in (*kept, self.modules[0].table)]
        return tf.cast(tf.stack(found, -1), "float32") * self.scale

    def compute_output_shape(self, input_shape: Any) -> Any:
        return (*input_shape, 6)


def adapted(model: keras.Model) -> keras.Model:
    kl.apply_lora(model, kl.LoRAConfig(rank=2, targets=["up"]))
    randomize_adapters(model)
    return model


def check_served(model: keras.Model, feeds: dict[str, Any], folder: Path) -> None:
    """The outputs of both kinds of SavedModel are the model's own, and its base's."""
    inputs = {name: tf.constant(value) for name, value in feeds.items()}
    expected = [np.array(y) for y in model(list(inputs.values()))]
    with kl.disable_adapter(model):
        base = [np.array(y) for y in model(list(inputs.values()))]
    kl.export_saved_model(model, folder / "merged")
    kl.export_saved_model(model, folder / "many", adapters=["default"])
    rows = len(next(iter(feeds.values())))
    for name, request, wanted in (
        ("merged", {}, expected),
        ("many", {"adapter": tf.constant(["default"] * rows)}, expected),
        ("many", {"adapter": tf.constant([""] * rows)}, base),
    ):
        served = tf.saved_model.load(str(folder / name))
        answers = served.signatures["serving_default"](**inputs, **request)
        for output, value in zip(model.output_names, wanted, strict=True):
            received = answers[output].numpy()
            assert received.dtype == value.dtype
            if value.dtype.kind == "f":
                np.testing.assert_allclose(received, value, rtol=1e-5, atol=1e-5)
            else:
                np.testing.assert_array_equal(received, value)


@pytest.mark.parametrize("name", TABLES)
def test_every_lookup_of_keras_is_served(name: str, tmp_path: Path) -> None:
    layer, inputs = preprocessing.case(name)
    model = adapted(preprocessing.beside_dense(layer, inputs))
    x = np.ones((len(inputs[0]), 5), "float32")
    check_served(model, {"x": x, "raw_0": inputs[0]}, tmp_path)


def test_tables_are_found_wherever_a_layer_keeps_them(tmp_path: Path) -> None:
    words = np.array([["ash", "oak", "elm"], ["fir", "yew", "ivy"]])
    model = adapted(preprocessing.beside_dense(Tables(name="tables"), [words]))
    check_served(model, {"x": np.ones((2, 5), "float32"), "raw_0": words}, tmp_path)


def test_a_table_that_no_layer_has_is_refused(tmp_path: Path) -> None:
    outside = table(["ash"])

    class Borrowing(keras.layers.Layer):
        def call(self, inputs: Any) -> Any:
            return outside.lookup(inputs)

        def compute_output_spec(self, inputs: Any) -> Any:
            return keras.KerasTensor(inputs.shape, "int32")

    model = adapted(preprocessing.beside_dense(Borrowing(), [preprocessing.WORDS]))
    for adapters in (None, ["default"]):
        with pytest.raises(ValueError, match="Keep it as an attribute of the layer"):
            kl.export_saved_model(model, tmp_path / "1", adapters=adapters)
    assert not list(tmp_path.iterdir())
