"""Which adapter each row of a request names, checked within the graph.

A wrong name or index fails its request: the outputs depend on the check, so that no output is
computed without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

INPUT = "adapter"


def one_for_each_row(named: tf.Tensor, inputs: Sequence[tf.Tensor]) -> tf.Tensor:
    """`named`, which fails the request if another input has more rows or fewer."""
    sizes = [tf.shape(x)[0] for x in inputs]
    fits = tf.reduce_all(tf.equal(tf.stack(sizes), tf.shape(named)[0]))
    received = tf.strings.as_string(tf.stack([*sizes, tf.shape(named)[0]]))
    return _checked(
        named,
        fits,
        f"Expected one {INPUT} for each row. Received: {len(inputs)} other inputs and {INPUT}, of "
        "the sizes ",
        received,
    )


def numbers_of_names(named: tf.Tensor, names: tf.Tensor) -> tf.Tensor:
    """The number of each name among the stored names; the base has the empty name and number 0."""
    same = tf.equal(named[:, None], names[None, :])
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
        tf.boolean_mask(named, ~known),
    )


def numbers_of_indices(named: tf.Tensor, names: tf.Tensor) -> tf.Tensor:
    """The number of each index; the base has index -1 and number 0."""
    last = tf.shape(names)[0] - 2
    known = (named >= -1) & (named <= last)
    return _checked(
        named + 1,
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
        tf.strings.as_string(tf.boolean_mask(named, ~known)),
    )


def _checked(value: tf.Tensor, holds: tf.Tensor, message: Any, received: tf.Tensor) -> tf.Tensor:
    """The value, which fails the request if the condition does not hold."""
    text = tf.strings.join([message, tf.strings.reduce_join(received, separator=", ")])
    with tf.control_dependencies([tf.debugging.Assert(holds, [text])]):
        return tf.identity(value)
