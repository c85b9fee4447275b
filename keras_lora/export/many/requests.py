"""Which adapter each row of a request wants, checked within the graph.

What fails is the request: its outputs depend on the check, so that none can be had without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

INPUT = "adapter"


def one_for_each_row(wanted: tf.Tensor, inputs: Sequence[tf.Tensor]) -> tf.Tensor:
    """The same, which cannot be had where the other inputs have more rows or fewer."""
    sizes = [tf.shape(x)[0] for x in inputs]
    fits = tf.reduce_all(tf.equal(tf.stack(sizes), tf.shape(wanted)[0]))
    received = tf.strings.as_string(tf.stack([*sizes, tf.shape(wanted)[0]]))
    return _checked(
        wanted,
        fits,
        f"Expected one {INPUT} for each row. Received: {len(inputs)} other inputs and {INPUT}, of "
        "the sizes ",
        received,
    )


def slots_of_names(wanted: tf.Tensor, names: tf.Tensor) -> tf.Tensor:
    """The slot of each name; that of the base is empty."""
    same = tf.equal(wanted[:, None], names[None, :])
    known = tf.reduce_any(same, axis=1)
    return _checked(
        tf.argmax(tf.cast(same, tf.int32), axis=1, output_type=tf.int32),
        tf.reduce_all(known),
        tf.strings.join(
            [
                f"Expected {INPUT} to be one of: ",
                tf.strings.reduce_join(names[1:], separator=", "),
                "; or an empty string for the base. Received: ",
            ]
        ),
        tf.boolean_mask(wanted, ~known),
    )


def slots_of_indices(wanted: tf.Tensor, names: tf.Tensor) -> tf.Tensor:
    """The slot of each index; that of the base is -1."""
    last = tf.shape(names)[0] - 2
    known = (wanted >= -1) & (wanted <= last)
    return _checked(
        wanted + 1,
        tf.reduce_all(known),
        tf.strings.join(
            [
                f"Expected {INPUT} to be an index from 0 to ",
                tf.strings.as_string(last),
                ", of: ",
                tf.strings.reduce_join(names[1:], separator=", "),
                "; or -1 for the base. Received: ",
            ]
        ),
        tf.strings.as_string(tf.boolean_mask(wanted, ~known)),
    )


def _checked(value: tf.Tensor, holds: tf.Tensor, message: Any, received: tf.Tensor) -> tf.Tensor:
    """The value, which cannot be had where the condition does not hold."""
    text = tf.strings.join([message, tf.strings.reduce_join(received, separator=", ")])
    with tf.control_dependencies([tf.debugging.Assert(holds, [text])]):
        return tf.identity(value)
