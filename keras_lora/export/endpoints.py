"""The signatures of a SavedModel: functions from named tensors to named tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from keras_lora.export.resources import used_resources
from keras_lora.export.signatures import input_specs, output_names


@dataclass(frozen=True)
class Endpoint:
    """One signature of a SavedModel, before it is written.

    Attributes:
        name: The signature's name.
        call: A function of one structure of tensors; traced when the SavedModel is written.
        signature: The `tf.TensorSpec` of each tensor, in the structure that `call` takes.
        resources: Objects outside of the model's layers that a server must fill before it
            answers, such as the vocabulary of a tokenizer.
    """

    name: str
    call: Callable[[Any], Mapping[str, tf.Tensor]]
    signature: Any
    resources: Sequence[Any] = ()


def serve(
    model: keras.Model, given: Any | None = None, names: Sequence[str] | None = None
) -> Endpoint:
    """The endpoint of the model's own outputs.

    Args:
        model: The model.
        given: The option `input_signature`, or None.
        names: Names of the outputs; by default the model's own.
    """

    def call(inputs: Any) -> dict[str, tf.Tensor]:
        outputs = model(inputs, training=False)
        leaves = keras.tree.flatten(outputs)
        named = output_names(model, outputs) if names is None else names
        return dict(zip(named, map(servable, leaves), strict=True))

    return Endpoint("serve", call, input_specs(model, given))


def write_endpoints(model: keras.Model, endpoints: Sequence[Endpoint], path: Path) -> None:
    """Write a SavedModel; the signature of the first endpoint is `serving_default` too.

    Raises:
        ValueError: the endpoints use a table that belongs to no layer of the model.
    """
    archive = keras.export.ExportArchive()
    traces = [_add(archive, endpoint) for endpoint in endpoints]
    given = [resource for endpoint in endpoints for resource in endpoint.resources]
    # The model is not tracked: that would store each variable twice (keras issue 23553).
    for resource in {id(r): r for r in (*given, *used_resources(model, traces))}.values():
        archive.track(resource)
    try:
        archive.write_out(path, verbose=False)
    except AssertionError as error:  # TensorFlow's, for a captured resource that nothing holds
        raise ValueError(
            "Expected tables and other resources that layers of the model have as attributes. "
            f"Received: {model.name!r}, in which {str(error).splitlines()[0]} Keep it as an "
            "attribute of the layer that uses it."
        ) from error


def _add(archive: keras.export.ExportArchive, endpoint: Endpoint) -> Any:
    """Trace an endpoint once: with an `input_signature`, it is again for each name it is served by.

    Returns:
        The `ConcreteFunction`.
    """
    function = tf.function(endpoint.call, autograph=False)
    trace = function.get_concrete_function(endpoint.signature)
    archive.add_endpoint(endpoint.name, function)
    return trace


def servable(output: tf.Tensor) -> tf.Tensor:
    """The output in a type that TensorFlow Serving's REST API can write: no 16-bit floats."""
    return tf.cast(output, tf.float32) if output.dtype in (tf.float16, tf.bfloat16) else output
