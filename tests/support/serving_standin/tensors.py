"""NumPy arrays and TensorFlow's tensor messages, without TensorFlow's own code for them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from run_saved_model import DTYPES, NUMBERS
from tensorflow.core.framework.tensor_pb2 import TensorProto

from support.serving_standin.failures import invalid_argument

# The field of a message for values of each kind, as `Tensor::AsProtoField` writes them.
_FIELDS: dict[Any, str] = {
    np.float32: "float_val",
    np.float64: "double_val",
    np.int32: "int_val",
    np.uint8: "int_val",
    np.int16: "int_val",
    np.int8: "int_val",
    np.uint16: "int_val",
    np.object_: "string_val",
    np.int64: "int64_val",
    np.bool_: "bool_val",
    np.float16: "half_val",
    np.uint32: "uint32_val",
    np.uint64: "uint64_val",
}


def to_message(array: np.ndarray) -> TensorProto:
    message = TensorProto(dtype=NUMBERS[array.dtype])
    for size in array.shape:
        message.tensor_shape.dim.add(size=size)
    values = array.view(np.uint16) if array.dtype == np.float16 else array
    getattr(message, _FIELDS[array.dtype.type]).extend(values.ravel().tolist())
    return message


def to_array(name: str, message: TensorProto) -> np.ndarray:
    """The array of a message: of its bytes, or of its values, the last one repeated if too few."""
    shape = [dim.size for dim in message.tensor_shape.dim]
    unknown = message.tensor_shape.unknown_rank or min(shape, default=0) < 0
    if unknown or message.dtype not in DTYPES:
        raise invalid_argument(f"tensor parsing error: {name}")
    size, dtype = math.prod(shape), np.dtype(DTYPES[message.dtype])
    values = _content(message, dtype) if message.tensor_content else _listed(message, dtype, size)
    if values is None or values.size != size:
        raise invalid_argument(f"tensor parsing error: {name}")
    return values.reshape(shape)


def _content(message: TensorProto, dtype: np.dtype) -> np.ndarray | None:
    content = message.tensor_content
    fits = not dtype.hasobject and len(content) % dtype.itemsize == 0
    return np.frombuffer(content, dtype) if fits else None


def _listed(message: TensorProto, dtype: np.dtype, size: int) -> np.ndarray:
    given = list(getattr(message, _FIELDS[dtype.type]))
    rest = given[-1:] or [b"" if dtype.hasobject else 0]
    values = given + rest * (size - len(given))
    if dtype == np.float16:
        return np.array(values, np.uint16).view(dtype)
    return np.array(values, dtype)
