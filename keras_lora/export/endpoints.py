"""The signatures of a SavedModel: functions from named tensors to named tensors.

Private API of TensorFlow: `save_context`. What is traced outside of it is traced again when it is
saved, and the SavedModel has both: twice the time and twice the graph. That is so for
`keras.export.ExportArchive`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf
from tensorflow.python.saved_model import save_context

from keras_lora.export.resources import below, used_resources
from keras_lora.export.signatures import input_specs, output_names
from keras_lora.inject import unique


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
    options = tf.saved_model.SaveOptions()
    root, traces = tf.Module(), {}
    for endpoint in endpoints:
        function = tf.function(endpoint.call, autograph=False, input_signature=[endpoint.signature])
        setattr(root, endpoint.name, function)
        with save_context.save_context(options):
            traces[endpoint.name] = function.get_concrete_function()
    given = [resource for endpoint in endpoints for resource in endpoint.resources]
    # The model itself is no part: that would store each variable twice (keras issue 23553).
    root.all_variables = unique(v for trace in traces.values() for v in trace.variables)
    root.resources = unique((*below(given), *used_resources(model, list(traces.values()))))
    signatures = {**traces, "serving_default": traces[endpoints[0].name]}
    try:
        tf.saved_model.save(root, str(path), signatures, options)
    except AssertionError as error:  # TensorFlow's, for a captured resource that nothing holds
        raise ValueError(
            "Expected tables and other resources that layers of the model have as attributes. "
            f"Received: {model.name!r}, in which {str(error).splitlines()[0]} Keep it as an "
            "attribute of the layer that uses it."
        ) from error


def servable(output: tf.Tensor) -> tf.Tensor:
    """The output in a type that TensorFlow Serving's REST API can write: no 16-bit floats."""
    return tf.cast(output, tf.float32) if output.dtype in (tf.float16, tf.bfloat16) else output
