"""The tables of adapters in a SavedModel: a checkpoint in its assets, and variables of any length.

The graph declares variables whose first axis is free. A server fills them after loading, from
`assets/adapters`. So one more adapter is another file there: neither the graph nor the file of the
base's variables changes.

Private TensorFlow API in this file, and why (`tests/test_private_api.py` watches each):
    `_track_trackable`: the only way to tie an asset to a resource of one's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import tensorflow as tf

from keras_lora.export.many.tables import NAMES, PLACES, Array, Piece, rows_key, widths

ADAPTERS = "adapters"  # the prefix of the checkpoint's two files
INDEX, DATA = f"{ADAPTERS}.index", f"{ADAPTERS}.data-00000-of-00001"


def write_tensors(tensors: Mapping[str, Array], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tf.device("CPU"):
        tf.raw_ops.SaveV2(
            prefix=str(folder / ADAPTERS),
            tensor_names=list(tensors),
            shape_and_slices=[""] * len(tensors),
            tensors=[tf.constant(value) for value in tensors.values()],
        )


def read_tensors(folder: Path) -> dict[str, Array]:
    """The inverse of `write_tensors`.

    Raises:
        ValueError: there are no such files, or they are damaged.
    """
    try:
        reader = tf.train.load_checkpoint(str(folder / ADAPTERS))
        return {key: reader.get_tensor(key) for key in reader.get_variable_to_shape_map()}
    except (tf.errors.OpError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"Expected tables of adapters. Received: {str(folder / INDEX)!r}: {error}. Export the "
            "model again."
        ) from error


class StoredTables(tf.saved_model.experimental.TrackableResource):
    """Variables for tables, which are filled whenever the SavedModel is loaded."""

    def __init__(self, pieces: Sequence[Piece], folder: Path) -> None:
        super().__init__()
        self._index = self._track_trackable(tf.saved_model.Asset(str(folder / INDEX)), "index")
        self._track_trackable(tf.saved_model.Asset(str(folder / DATA)), "data")
        self._pieces = tuple(pieces)
        self._variables = {
            NAMES: _variable(NAMES, (), tf.string),
            PLACES: _variable(PLACES, (len(self._pieces), 2), tf.int32),
        }
        for width in widths(pieces):
            self._variables[rows_key(width)] = _variable(rows_key(width), (width,), tf.float32)
        for i, variable in enumerate(self._variables.values()):
            self._track_trackable(variable, f"variable_{i}")

    @property
    def names(self) -> tf.Tensor:
        """The names of the slots, `(slots,)`; that of the base is empty."""
        return self._variables[NAMES].value()

    def take(self, slots: tf.Tensor) -> dict[str, tf.Tensor]:
        """What the adapter in each slot has of each piece, by key.

        Factors are `(batch, r, ...)`, with `r` the highest rank among these slots and zeros where
        an adapter's is lower; other values are `(batch, *value)`.
        """
        first, count = tf.unstack(tf.gather(self._variables[PLACES], slots), axis=2)
        highest = tf.maximum(tf.reduce_max(count, axis=0), 1)  # (pieces,)
        steps = tf.range(tf.reduce_max(highest))
        rows = tf.where(steps < count[..., None], first[..., None] + steps, 0)
        taken = {}
        for i, piece in enumerate(self._pieces):
            wanted = rows[:, i, : highest[i]] if piece.is_factor else rows[:, i, 0]
            found = tf.gather(self._variables[rows_key(piece.width)], wanted)
            taken[piece.key] = _unfolded(found, piece.inner)
        return taken

    def _create_resource(self) -> tf.Tensor:
        # The variables hold everything. A resource is what has code that runs after loading.
        return tf.raw_ops.VarHandleOp(dtype=tf.bool, shape=[])

    def _initialize(self) -> None:
        values = tf.raw_ops.RestoreV2(
            prefix=tf.strings.regex_replace(self._index.asset_path, r"\.index$", ""),
            tensor_names=list(self._variables),
            shape_and_slices=[""] * len(self._variables),
            dtypes=[variable.dtype for variable in self._variables.values()],
        )
        for variable, value in zip(self._variables.values(), values, strict=True):
            variable.assign(tf.ensure_shape(value, variable.shape))


def _variable(name: str, shape: tuple[int, ...], dtype: tf.DType) -> tf.Variable:
    empty = np.zeros((0, *shape), object if dtype == tf.string else dtype.as_numpy_dtype)
    start = tf.constant(empty, dtype)
    return tf.Variable(start, shape=(None, *shape), name=name, trainable=False)


def _unfolded(rows: tf.Tensor, inner: Sequence[int]) -> tf.Tensor:
    """The last axis as these."""
    if len(inner) == 1:
        return rows
    outer = rows.shape[:-1]
    unfolded = tf.reshape(rows, tf.concat([tf.shape(rows)[:-1], inner], 0))
    return tf.ensure_shape(unfolded, (*outer, *inner))
