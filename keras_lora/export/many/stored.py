"""The stacks of adapters in a SavedModel: a checkpoint in its assets, and variables of any length.

The graph declares variables whose first axis is free. A server fills them after loading, from
`assets/adapters`. So one more adapter is another checkpoint in the assets: neither the graph nor
the file of the base's variables changes.

Private TensorFlow API in this file, and why (`tests/test_private_api.py` watches each):
    `_track_trackable`: the only way to tie an asset to a resource of one's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import tensorflow as tf

from keras_lora.export.many.stacks import (
    NAMES,
    PLACES,
    AdapterTensor,
    Array,
    stack_key,
    widths,
)

ADAPTERS = "adapters"  # the prefix of the checkpoint's two files
INDEX, DATA = f"{ADAPTERS}.index", f"{ADAPTERS}.data-00000-of-00001"


def write_stacks(stacks: Mapping[str, Array], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tf.device("CPU"):
        tf.raw_ops.SaveV2(
            prefix=str(folder / ADAPTERS),
            tensor_names=list(stacks),
            shape_and_slices=[""] * len(stacks),
            tensors=[tf.constant(value) for value in stacks.values()],
        )


def read_stacks(folder: Path) -> dict[str, Array]:
    """The inverse of `write_stacks`.

    Raises:
        ValueError: the files are missing or damaged.
    """
    try:
        reader = tf.train.load_checkpoint(str(folder / ADAPTERS))
        return {key: reader.get_tensor(key) for key in reader.get_variable_to_shape_map()}
    except (tf.errors.OpError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"Expected the stored adapters of an export. Received: {str(folder / INDEX)!r}: "
            f"{error}. Export the model again."
        ) from error


def stored_names(saved_model: Path) -> list[str]:
    """The names of the adapters that a SavedModel serves, without the base."""
    reader = tf.train.load_checkpoint(str(saved_model / "assets" / ADAPTERS))
    _, *names = reader.get_tensor(NAMES).tolist()
    return [name.decode() for name in names]


class StoredStacks(tf.saved_model.experimental.TrackableResource):
    """Variables for stacks, which are filled whenever the SavedModel is loaded."""

    def __init__(self, tensors: Sequence[AdapterTensor], folder: Path) -> None:
        super().__init__()
        self._index = self._track_trackable(tf.saved_model.Asset(str(folder / INDEX)), "index")
        self._track_trackable(tf.saved_model.Asset(str(folder / DATA)), "data")
        self._tensors = tuple(tensors)
        self._variables = {
            NAMES: _variable(NAMES, (), tf.string),
            PLACES: _variable(PLACES, (len(self._tensors), 2), tf.int32),
        }
        for width in widths(tensors):
            self._variables[stack_key(width)] = _variable(stack_key(width), (width,), tf.float32)
        for i, variable in enumerate(self._variables.values()):
            self._track_trackable(variable, f"variable_{i}")

    @property
    def names(self) -> tf.Tensor:
        """The names of the base, which is empty, and of the adapters: `(1 + adapters,)`."""
        return self._variables[NAMES].value()

    def take(self, numbers: tf.Tensor) -> dict[str, tf.Tensor]:
        """For each row of the batch the tensors of the adapter with this number, by key.

        Args:
            numbers: The number of each row's adapter, `(batch,)`; 0 is the base.

        Returns:
            Factors `(batch, r, ...)`, where `r` is the highest rank in the batch and the vectors
            beyond an adapter's own rank are zero; other values `(batch, *value)`.
        """
        first, count = tf.unstack(tf.gather(self._variables[PLACES], numbers), axis=2)
        highest = tf.maximum(tf.reduce_max(count, axis=0), 1)  # (tensors,)
        steps = tf.range(tf.reduce_max(highest))
        vectors = tf.where(steps < count[..., None], first[..., None] + steps, 0)
        taken = {}
        for i, tensor in enumerate(self._tensors):
            wanted = vectors[:, i, : highest[i]] if tensor.is_factor else vectors[:, i, 0]
            found = tf.gather(self._variables[stack_key(tensor.width)], wanted)
            taken[tensor.key] = _unfolded(found, tensor.vector_shape)
        return taken

    def _create_resource(self) -> tf.Tensor:
        # An empty variable: the resource is only needed for `_initialize`, which runs on loading.
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


def _unfolded(flat: tf.Tensor, shape: Sequence[int]) -> tf.Tensor:
    """`(..., width)` as `(..., *shape)`."""
    if len(shape) == 1:
        return flat
    outer = flat.shape[:-1]
    unfolded = tf.reshape(flat, tf.concat([tf.shape(flat)[:-1], shape], 0))
    return tf.ensure_shape(unfolded, (*outer, *shape))
