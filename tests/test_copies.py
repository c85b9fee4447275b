"""A copy of a model has all that a `.keras` file has, also what no variable holds."""

from __future__ import annotations

import inspect
import random
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from support import keras_hub_tasks, preprocessing
from support.cases import numpy_of
from support.models import randomize_adapters, state

import keras_lora as kl


def check_copy(name: str) -> None:
    layer, inputs = preprocessing.case(name)
    model = preprocessing.beside_dense(layer, inputs)
    kl.apply_lora(model, kl.LoRAConfig(rank=2, targets=["up"]))
    twin = kl.merge_lora(model, inplace=False).get_layer(layer.name)
    given = inputs[0] if len(inputs) == 1 else tuple(inputs)
    options = {"training": True} if "training" in inspect.signature(layer.call).parameters else {}
    results = []
    for each in (twin, layer):
        random.seed(3)  # which AugMix chooses with
        outputs = keras.tree.flatten(each(given, **options))
        results.append([keras.ops.convert_to_numpy(y) for y in outputs])
    for received, expected in zip(*results, strict=True):
        np.testing.assert_array_equal(received, expected)


@pytest.mark.parametrize("name", preprocessing.OTHER_LAYERS)
def test_a_copy_preprocesses_as_its_original(name: str) -> None:
    check_copy(name)


@pytest.mark.parametrize("name", preprocessing.IMAGE_LAYERS)
def test_a_copy_augments_images_as_its_original(name: str) -> None:
    check_copy(name)


@keras.saving.register_keras_serializable("tests")
class Learning(keras.layers.Layer):
    """A layer that learns in three ways: an array of its own, a file, and a layer inside."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.normalization = keras.layers.Normalization(name="normalization")
        self.offset, self.words = np.zeros(5, "float32"), ["unknown"]

    def build(self, input_shape: Any) -> None:
        self.normalization.build(input_shape)

    def call(self, inputs: Any) -> Any:
        return self.normalization(inputs) + self.offset + len(self.words)

    def learn(self, data: np.ndarray) -> None:
        self.normalization.adapt(data)
        self.offset, self.words = data[0], ["ash", "elm", "oak"]

    def save_own_variables(self, store: Any) -> None:
        store["offset"] = self.offset

    def load_own_variables(self, store: Any) -> None:
        self.offset = np.array(store["offset"])

    def save_assets(self, dir_path: str) -> None:
        Path(dir_path, "words").write_text("\n".join(self.words))

    def load_assets(self, dir_path: str) -> None:
        self.words = Path(dir_path, "words").read_text().split("\n")


class Forgetful(Learning):
    def load_own_variables(self, store: Any) -> None:
        raise KeyError(f"nothing was learnt, {store}")


def learning(layer: Learning) -> keras.Model:
    inputs = keras.Input((5,), name="x")
    x = keras.layers.Dense(7, activation="gelu", name="up")(layer(inputs))
    model = keras.Model(inputs, keras.layers.Dense(3, name="head")(x))
    layer.learn(preprocessing.NUMBERS)
    kl.apply_lora(model, kl.LoRAConfig(rank=2))
    randomize_adapters(model)
    return model


def test_a_copy_has_what_layers_inside_of_layers_have_learnt() -> None:
    model = learning(Learning(name="learning"))
    x = preprocessing.NUMBERS[:3] + 1
    expected = numpy_of(model(x))
    np.testing.assert_allclose(
        numpy_of(kl.merge_lora(model, inplace=False)(x)), expected, rtol=1e-5, atol=1e-5
    )
    base = kl.unload_lora(model)
    np.testing.assert_array_equal(
        numpy_of(kl.apply_lora(base, kl.LoRAConfig(rank=2), inplace=False)(x)), numpy_of(base(x))
    )


def test_a_layer_whose_state_cannot_be_copied_is_refused() -> None:
    with keras.saving.custom_object_scope({"Forgetful": Forgetful}):
        model = learning(Forgetful(name="learning"))
        before = state(model)
        with pytest.raises(ValueError, match=r"Forgetful 'learning'.*nothing was learnt.*inplace"):
            kl.merge_lora(model, inplace=False)
    assert state(model) == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"), [("EfficientNetB0", {}), ("MobileNetV3Small", {"alpha": 0.25})]
)
def test_a_copy_of_an_application_computes_the_same(name: str, options: dict[str, Any]) -> None:
    make = getattr(keras.applications, name)
    encoder = make(weights=None, include_top=False, input_shape=(32, 32, 3), **options)
    images = np.random.default_rng(3).normal(50, 3, (5, 32, 32, 3)).astype("float32")
    for layer in encoder.layers:
        if isinstance(layer, keras.layers.Normalization):
            layer.adapt(images)
    pooled = keras.layers.GlobalAveragePooling2D()(encoder.output)
    model = keras.Model(encoder.input, keras.layers.Dense(3, name="head")(pooled))
    kl.apply_lora(model, kl.LoRAConfig(rank=2, targets=["head"]))
    randomize_adapters(model)
    copy = kl.merge_lora(model, inplace=False)
    np.testing.assert_allclose(
        numpy_of(copy(images)), numpy_of(model(images)), rtol=1e-5, atol=1e-5
    )


# KerasHub does not close the file of a SentencePiece vocabulary.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", ["Bert", "Roberta", "DebertaV3"])
def test_a_copy_of_a_task_tokenizes_as_its_original(name: str) -> None:
    task = kl.apply_lora(keras_hub_tasks.CLASSIFIERS[name](), kl.LoRAConfig(rank=2))
    copy = kl.merge_lora(task, inplace=False)
    received, expected = (each.preprocessor(["the good film", "bad"]) for each in (copy, task))
    np.testing.assert_array_equal(numpy_of(received["token_ids"]), numpy_of(expected["token_ids"]))
