"""Classifiers of KerasHub in one graph, from strings or images to probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_lora.checks import invalid
from keras_lora.export.endpoints import Endpoint
from keras_lora.export.keras_hub.tasks import is_task, preprocessor_of, tokenizer_resources

_BINARY = (keras.losses.BinaryCrossentropy, keras.losses.BinaryFocalCrossentropy)


def classify(model: keras.Model, preprocessing: bool | Sequence[str]) -> Endpoint:
    """The endpoint that takes strings or images and gives `probabilities`.

    Args:
        model: A text or image classifier of KerasHub with its preprocessor.
        preprocessing: True, or the names of the segments that make one row.

    Raises:
        ValueError: the model is no such classifier, or has an activation that gives no
            probabilities.
    """
    signature = _raw_specs(model, preprocessing)
    preprocessor = preprocessor_of(model)
    to_probabilities = _to_probabilities(model)

    def call(inputs: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        segments = tuple(inputs[name] for name in signature)
        # Without `y`, the preprocessor would take a pair of segments for a row and its label.
        features = preprocessor(segments if len(segments) > 1 else segments[0], y=None)
        outputs = tf.cast(model(features, training=False), tf.float32)
        return {"probabilities": to_probabilities(outputs)}

    return Endpoint("serve", call, signature, tokenizer_resources(preprocessor))


def string_spec(name: str) -> tf.TensorSpec:
    return tf.TensorSpec((None,), tf.string, name=name)


def _raw_specs(model: keras.Model, preprocessing: bool | Sequence[str]) -> dict[str, tf.TensorSpec]:
    if is_task(model, "TextClassifier"):
        names = ["text"] if isinstance(preprocessing, bool) else preprocessing
        return {name: string_spec(name) for name in names}
    if is_task(model, "ImageClassifier") and preprocessing is True:
        return {"image": _image_spec(model)}
    raise invalid(
        "preprocessing",
        "False, or a KerasHub task of text (classifier or language model), or True for a "
        "classifier of images",
        preprocessing,
        f"{model.name!r} is a {type(model).__name__}",
    )


def _image_spec(model: keras.Model) -> tf.TensorSpec:
    """The images of a batch have one size: the model's or, if they are resized, any size."""
    shape = list(model.input.shape)
    converter = preprocessor_of(model).image_converter
    if converter is not None and converter.image_size is not None:
        first = 1 if converter.data_format == "channels_last" else 2
        shape[first : first + 2] = [None, None]
    return tf.TensorSpec(shape, tf.float32, name="image")


def _to_probabilities(model: keras.Model) -> Any:
    """The function from the task's outputs to probabilities.

    Without an activation, it is sigmoid for a binary loss or a single output, and softmax for
    any other.
    """
    activation = keras.activations.get(model.activation)
    if activation in (keras.activations.softmax, keras.activations.sigmoid):
        return keras.activations.linear
    if activation is not keras.activations.linear:
        raise invalid(
            "preprocessing",
            "a classifier whose activation is None, 'softmax' or 'sigmoid'",
            activation.__name__,
        )
    loss = getattr(model, "loss", None)
    binary = isinstance(loss, _BINARY) or loss in ("binary_crossentropy", "bce")
    binary = binary or model.output.shape[-1] == 1
    return keras.activations.sigmoid if binary else keras.activations.softmax
