"""The name of the most probable class, beside the numbers of a classifier."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from keras_lora.checks import invalid
from keras_lora.export.endpoints import Endpoint

LABEL = "label"


def labelled(endpoint: Endpoint, class_names: Sequence[str]) -> Endpoint:
    """The same outputs and `label`: a string for each row, the class of its largest value.

    Raises:
        ValueError: names that are not distinct strings.
    """
    names = _checked(class_names)

    def call(inputs: Any) -> dict[str, tf.Tensor]:
        outputs = dict(endpoint.call(inputs))
        scores = _scores(outputs, names)
        return {**outputs, LABEL: tf.gather(tf.constant(names), tf.argmax(scores, axis=-1))}

    return dataclasses.replace(endpoint, call=call)


def _checked(class_names: Sequence[str]) -> list[str]:
    names = [class_names] if isinstance(class_names, str) else list(class_names)
    distinct = len(names) > 1 and len(set(names)) == len(names)
    if not distinct or not all(isinstance(name, str) for name in names):
        raise invalid("class_names", "two or more distinct strings", class_names)
    return names


def _scores(outputs: dict[str, tf.Tensor], names: list[str]) -> tf.Tensor:
    """The classifier's only output, of as many columns as there are names."""
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
