"""Classifiers of KerasHub from raw rows, strings or images, to probabilities, in one graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_lora.checks import invalid
from keras_lora.export.endpoints import Endpoint
from keras_lora.export.keras_hub.tasks import is_task, preprocessor_of, tables_of

_BINARY = (keras.losses.BinaryCrossentropy, keras.losses.BinaryFocalCrossentropy)


def classify(model: keras.Model, preprocessing: bool | Sequence[str]) -> Endpoint:
    """Raw rows in, `probabilities` out.

    Args:
        model: A text or image classifier of KerasHub with its preprocessor.
        preprocessing: True, or the names of the segments that make one row.

    Raises:
        ValueError: another model, or an activation that gives no probabilities.
    """
    signature = _raw_specs(model, preprocessing)
    preprocessor = preprocessor_of(model)
    to_probabilities = _to_probabilities(model)

    def call(inputs: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        segments = tuple(inputs[name] for name in signature)
        # y is given, or a pair of segments would be taken for a row and its label.
        features = preprocessor(segments if len(segments) > 1 else segments[0], y=None)
        outputs = tf.cast(model(features, training=False), tf.float32)
        return {"probabilities": to_probabilities(outputs)}

    return Endpoint("serve", call, signature, tables_of(preprocessor))


def string_spec(name: str) -> tf.TensorSpec:
    return tf.TensorSpec((None,), tf.string, name=name)


def _raw_specs(model: keras.Model, preprocessing: bool | Sequence[str]) -> dict[str, tf.TensorSpec]:
    if is_task(model, "TextClassifier"):
        names = ["text"] if preprocessing is True else _segment_names(preprocessing)
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


def _segment_names(names: object) -> list[str]:
    listed = list(names) if isinstance(names, Sequence) and not isinstance(names, str) else []
    if not listed or len(set(listed)) < len(listed) or not all(isinstance(n, str) for n in listed):
        raise invalid("preprocessing", "True, or distinct names of segments", names)
    return listed


def _image_spec(model: keras.Model) -> tf.TensorSpec:
    """Images of one size in a batch, of any where the preprocessor resizes them."""
    shape = list(model.input.shape)
    converter = preprocessor_of(model).image_converter
    if converter is not None and converter.image_size is not None:
        first = 1 if converter.data_format == "channels_last" else 2
        shape[first : first + 2] = [None, None]
    return tf.TensorSpec(shape, tf.float32, name="image")


def _to_probabilities(model: keras.Model) -> Any:
    """What takes the task's outputs to probabilities; without an activation, the loss decides."""
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
