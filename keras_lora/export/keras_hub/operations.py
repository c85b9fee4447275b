"""Two operations of `keras.ops`, replaced during tracing by operations that servers can run.

KerasHub calls both as attributes of `keras.ops`, so no private name of Keras has to be replaced;
`tests/test_private_api.py` watches that Keras and KerasHub still do so.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf


@contextlib.contextmanager
def server_operations() -> Iterator[None]:
    """Within the context `slice_update` needs no XLA, and `convert_to_numpy` takes graph tensors.

    Language models update their caches of keys and values by `slice_update`, which is an XLA
    operation in Keras, and servers have XLA off. Postprocessors begin with `convert_to_numpy`,
    which fails for a tensor of a graph. The replacement returns such a tensor unchanged,
    since TensorFlow's operations follow.
    """
    keras_slice_update, keras_to_numpy = keras.ops.slice_update, keras.ops.convert_to_numpy

    def to_numpy(x: Any) -> Any:
        return x if tf.is_symbolic_tensor(x) else keras_to_numpy(x)

    keras.ops.slice_update, keras.ops.convert_to_numpy = slice_update, to_numpy
    try:
        yield
    finally:
        keras.ops.slice_update, keras.ops.convert_to_numpy = keras_slice_update, keras_to_numpy


def slice_update(inputs: Any, start_indices: Sequence[Any], updates: Any) -> tf.Tensor:
    """`inputs[start : start + updates.shape] = updates`, with `start` clamped to fit as XLA does.

    Args:
        inputs: A tensor.
        start_indices: An index for each axis.
        updates: A tensor of the same rank, larger on no axis.

    Returns:
        A tensor like `inputs`.

    Example:

    >>> slice_update([1, 2, 3, 4], [3], [7, 8]).numpy().tolist()
    [1, 2, 7, 8]
    """
    inputs = tf.convert_to_tensor(inputs)
    updates = tf.convert_to_tensor(updates, inputs.dtype)
    size = tf.shape(updates)
    start = tf.stack([tf.cast(index, tf.int32) for index in start_indices])
    start = tf.clip_by_value(start, 0, tf.shape(inputs) - size)
    updated = tf.raw_ops.TensorStridedSliceUpdate(
        input=inputs, begin=start, end=start + size, strides=tf.ones_like(start), value=updates
    )
    return tf.ensure_shape(updated, inputs.shape)
