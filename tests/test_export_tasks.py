"""Tasks in SavedModels: labels, strings and images in, probabilities and labels out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import keras_hub
import numpy as np
import pytest
import tensorflow as tf
from keras_hub import models
from support import keras_hub_tasks
from support.keras_hub_backbones import BACKBONES
from support.models import composite, data, functional, state, subclassed
from support.tasks import NAMES, TEXTS, Service, adapted, bytes_of

import keras_lora as kl
from keras_lora.export.keras_hub.preprocessing import classify

pytest_plugins = ["support.tasks"]


# --- Class names ------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [functional, composite, subclassed])
def test_the_label_is_the_name_of_the_largest_output(
    make: Callable[[], keras.Model], tmp_path: Path
) -> None:
    model = adapted(make())
    kl.export_saved_model(model, tmp_path / "1", class_names=NAMES)
    served = tf.saved_model.load(str(tmp_path / "1")).signatures["serving_default"]
    x, _ = data(model)
    answers = served(**{next(iter(served.structured_input_signature[1])): tf.constant(x)})
    (numbers,) = {*answers} - {"label"}
    expected = np.array(model(x))
    np.testing.assert_allclose(answers[numbers], expected, rtol=1e-4, atol=1e-5)
    labels = answers["label"].numpy().astype("str")
    assert labels.tolist() == np.array(NAMES)[expected.argmax(-1)].tolist()
    assert len(set(labels.ravel())) > 1


def two_outputs() -> keras.Model:
    inputs = keras.Input((5,))
    x = keras.layers.Dense(7)(inputs)
    return keras.Model(inputs, [keras.layers.Dense(3)(x), keras.layers.Dense(3)(x)])


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (functional, {"class_names": ["a", "b"]}, "a name for each column"),
        (two_outputs, {"class_names": NAMES}, "a model with one output"),
        (functional, {"class_names": "abc"}, "distinct strings"),
        (functional, {"class_names": ["a", "b", "a"]}, "distinct strings"),
        (functional, {"class_names": [0, 1, 2]}, "distinct strings"),
        (functional, {"preprocessing": True}, "a KerasHub task"),
        (functional, {"preprocessing": ()}, "a KerasHub task"),
        (functional, {"max_length": 3}, "not a CausalLM"),
        (functional, {"stop_token_ids": [3]}, "not a CausalLM"),
    ],
)
def test_arguments_that_are_not_for_the_model(
    make: Callable[[], keras.Model], options: Any, message: str, tmp_path: Path
) -> None:
    model = adapted(make())
    before = state(model)
    with pytest.raises(ValueError, match=message):
        kl.export_saved_model(model, tmp_path / "1", **options)
    assert state(model) == before
    assert not list(tmp_path.iterdir())


# --- Classifiers, preprocessing included ------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", list(keras_hub_tasks.CLASSIFIERS))
def test_strings_to_probabilities_and_labels(name: str, service: Service, tmp_path: Path) -> None:
    model = keras_hub_tasks.CLASSIFIERS[name]()
    model.preprocessor(["a"])  # makes a layer now, so that the state stays the same
    adapted(model)
    expected = np.array(keras.ops.softmax(model.predict(TEXTS, verbose=0)))
    before = state(model)
    report = kl.export_saved_model(model, tmp_path / "1", preprocessing=True, class_names=NAMES)
    assert report.text_operations
    assert state(model) == before
    answers = service.answer(tmp_path / "1", {"text": TEXTS})
    assert sorted(answers) == ["label", "probabilities"]
    np.testing.assert_allclose(answers["probabilities"], expected, rtol=1e-5, atol=1e-6)
    assert answers["label"].tolist() == np.array(NAMES)[expected.argmax(-1)].tolist()
    np.testing.assert_array_equal(keras.ops.softmax(model.predict(TEXTS, verbose=0)), expected)


def test_pairs_of_segments(service: Service, tmp_path: Path) -> None:
    model = adapted(keras_hub_tasks.CLASSIFIERS["Bert"]())
    kl.export_saved_model(model, tmp_path / "1", preprocessing=("premise", "hypothesis"))
    answers = service.answer(tmp_path / "1", {"premise": TEXTS, "hypothesis": TEXTS[::-1]})
    expected = keras.ops.softmax(model.predict((TEXTS, TEXTS[::-1]), verbose=0))
    np.testing.assert_allclose(answers["probabilities"], expected, rtol=1e-5, atol=1e-6)


def image_classifier(converter: Any) -> keras.Model:
    preprocessor = models.ViTImageClassifierPreprocessor(image_converter=converter)
    network, _ = BACKBONES["ViTBackbone"]()
    return models.ViTImageClassifier(network, num_classes=3, preprocessor=preprocessor)


@pytest.mark.parametrize("resized", [True, False])
def test_raw_images_to_probabilities(resized: bool, service: Service, tmp_path: Path) -> None:
    size = {"image_size": (16, 16)} if resized else {}
    model = adapted(image_classifier(keras_hub.layers.ImageConverter(scale=1 / 255, **size)))
    kl.export_saved_model(model, tmp_path / "1", preprocessing=True)
    shape = (2, 23, 19, 3) if resized else (2, 16, 16, 3)
    images = np.random.default_rng(0).integers(0, 256, shape).astype("float32")
    answers = service.answer(tmp_path / "1", {"image": images})
    expected = keras.ops.softmax(model.predict(images, verbose=0))
    np.testing.assert_allclose(answers["probabilities"], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("classes", "activation", "loss", "expected"),
    [
        (3, None, "auto", keras.ops.softmax),
        (3, "softmax", "auto", lambda x: x),
        (3, "sigmoid", "binary_crossentropy", lambda x: x),
        (3, None, keras.losses.BinaryCrossentropy(from_logits=True), keras.ops.sigmoid),
        (3, None, "binary_crossentropy", keras.ops.sigmoid),
        (1, None, "mse", keras.ops.sigmoid),
    ],
)
def test_probabilities_follow_the_activation_and_the_loss(
    classes: int, activation: Any, loss: Any, expected: Any
) -> None:
    tokenizer = models.BertTokenizer(keras_hub_tasks.word_pieces())
    model = keras_hub_tasks.classifier("Bert", tokenizer, classes, activation=activation)
    model.compile(loss=loss)
    outputs = model.predict(TEXTS, verbose=0)
    answers = classify(model, True).call({"text": tf.constant(TEXTS)})
    np.testing.assert_allclose(answers["probabilities"], expected(outputs), rtol=1e-5)


def without_preprocessor() -> keras.Model:
    model = keras_hub_tasks.CLASSIFIERS["Bert"]()
    model.preprocessor = None
    return model


def squashed() -> keras.Model:
    tokenizer = models.BertTokenizer(keras_hub_tasks.word_pieces())
    return keras_hub_tasks.classifier("Bert", tokenizer, activation="tanh")


@pytest.mark.parametrize(
    ("make", "preprocessing", "message"),
    [
        (without_preprocessor, True, "a model without a preprocessor"),
        (squashed, True, "whose activation is None"),
        (keras_hub_tasks.CLASSIFIERS["Bert"], "text", "distinct names of segments"),
        (keras_hub_tasks.CLASSIFIERS["Bert"], ["a", "a"], "distinct names of segments"),
        (lambda: image_classifier(None), ("a", "b"), "True for a classifier of images"),
    ],
)
def test_preprocessing_that_is_not_for_the_task(
    make: Callable[[], keras.Model], preprocessing: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        kl.export_saved_model(make(), tmp_path / "1", preprocessing=preprocessing)
    assert not list(tmp_path.iterdir())


def test_words_of_the_training_data_are_not_exported(tmp_path: Path) -> None:
    """KerasHub's byte-pair tokenizers remember the pieces of each word, joined by blanks."""
    model = keras_hub_tasks.CLASSIFIERS["Roberta"]()
    words = tf.data.Dataset.from_tensors(["zqjxk"]).map(model.preprocessor.tokenizer)
    assert [len(tokens) for batch in words for tokens in batch] == [5]
    kl.export_saved_model(model, tmp_path / "1", preprocessing=True)
    written = bytes_of(tmp_path / "1")
    assert b"z q j x k" not in written
    assert b"<mask>" in written
