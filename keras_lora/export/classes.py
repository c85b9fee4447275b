"""The name of the most probable class, beside the numbers of a classifier."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import tensorflow as tf

from keras_lora.checks import invalid
from keras_lora.export.endpoints import Endpoint

LABEL = "label"


def labelled(endpoint: Endpoint, class_names: Sequence[str]) -> Endpoint:
    """The endpoint with one more output, `label`: for each row the class of its largest value."""
    names = list(class_names)

    def call(inputs: Any) -> dict[str, tf.Tensor]:
        outputs = endpoint.call(inputs)
        largest = tf.argmax(_scores(outputs, names), axis=-1)
        return {**outputs, LABEL: tf.gather(tf.constant(names), largest)}

    return dataclasses.replace(endpoint, call=call)


def _scores(outputs: Mapping[str, tf.Tensor], names: list[str]) -> tf.Tensor:
    """The classifier's only output, which has a column for each name.

    Raises:
        ValueError: the model has several outputs, or another number of columns.
    """
    shapes = {name: tuple(output.shape) for name, output in outputs.items()}
    if len(outputs) != 1 or LABEL in outputs:
        raise invalid("class_names", f"a model with one output, not called {LABEL!r}", shapes)
    (scores,) = outputs.values()
    if len(scores.shape) < 2 or scores.shape[-1] != len(names):
        raise invalid(
            "class_names",
            "a name for each column of the model's output",
            names,
            f"the output is {shapes}",
        )
    return scores
