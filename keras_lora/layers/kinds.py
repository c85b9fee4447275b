"""The matrix `W0` of a layer, adapted or plain: the kernel or, of an embedding, the table.

Private Keras API in this file, and why (`tests/test_private_api.py` watches each):
    `_kernel`, `_embeddings`: the frozen matrix itself, since `kernel` and `embeddings` of an
        adapted layer give the effective one.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import keras
from keras import ops

from keras_lora.lowrank.equations import Shape, Tensor

Layer: TypeAlias = "keras.layers.Layer"


def is_table(layer: Layer) -> bool:
    """Whether the layer looks rows up in its matrix, which has one for each token."""
    return isinstance(layer, keras.layers.Embedding)


def base_kernel(layer: Layer) -> keras.Variable:
    """`W0`."""
    return layer._embeddings if is_table(layer) else layer._kernel


def kernel_shape(layer: Layer) -> Shape:
    return tuple(base_kernel(layer).shape)


def kernel_constraint(layer: Layer) -> Any:
    return layer.embeddings_constraint if is_table(layer) else layer.kernel_constraint


def bias_of(layer: Layer) -> keras.Variable | None:
    return None if is_table(layer) else layer.bias


def wide_dtype(variable: keras.Variable) -> str:
    """The dtype of sums that are rounded once."""
    dtype = keras.backend.standardize_dtype(variable.dtype)
    return "float64" if dtype == "float64" else "float32"


def wide_kernel(layer: Layer) -> Tensor:
    """`W0` in that dtype."""
    kernel = base_kernel(layer)
    return ops.cast(ops.convert_to_tensor(kernel), wide_dtype(kernel))
