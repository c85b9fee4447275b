"""What a SavedModel answers: functions of named tensors, and the names of their inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from keras_lora.export.signatures import input_specs, output_names


@dataclass(frozen=True)
class Endpoint:
    """A signature of a SavedModel: a function of one structure of tensors, and what it takes.

    `call` is traced when the SavedModel is written, with everything that it computes.
    `resources` hold the tables that the SavedModel must fill before it answers: tokenizers.
    """

    name: str
    call: Callable[[Any], Mapping[str, tf.Tensor]]
    signature: Any
    resources: Sequence[Any] = ()


def serve(
    model: keras.Model, given: Any | None = None, names: Sequence[str] | None = None
) -> Endpoint:
    """The model's own outputs, by `names` or by those that the model has for them."""

    def call(inputs: Any) -> dict[str, tf.Tensor]:
        outputs = model(inputs, training=False)
        leaves = keras.tree.flatten(outputs)
        named = output_names(model, outputs) if names is None else names
        return dict(zip(named, map(servable, leaves), strict=True))

    return Endpoint("serve", call, input_specs(model, given))


def write_endpoints(endpoints: Sequence[Endpoint], path: Path) -> None:
    """Write a SavedModel; the signature of the first endpoint is `serving_default` too."""
    archive = keras.export.ExportArchive()
    for endpoint in endpoints:
        archive.add_endpoint(endpoint.name, endpoint.call, input_signature=[endpoint.signature])
    # Not the model: it would store every variable a second time (keras issue 23553).
    for resource in {id(r): r for e in endpoints for r in e.resources}.values():
        archive.track(resource)
    archive.write_out(path, verbose=False)


def servable(output: tf.Tensor) -> tf.Tensor:
    """TensorFlow Serving's REST API has no JSON form of low precision."""
    return tf.cast(output, tf.float32) if output.dtype in (tf.float16, tf.bfloat16) else output
