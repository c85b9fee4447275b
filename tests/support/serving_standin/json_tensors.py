"""From the JSON of TensorFlow Serving's REST API to arrays, and back, as its `json_tensor.cc`."""

from __future__ import annotations

import base64
import binascii
import json
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from run_saved_model import DTYPES
from tensorflow.core.framework.types_pb2 import DataType

from support.serving_standin.failures import invalid_argument

Tensors = dict[str, np.ndarray]
Types = Mapping[str, int]  # TF_DataType by input
MAX_RANK = 64  # of NumPy
FLOAT_MAX = sys.float_info.max


def parse(body: bytes) -> dict[str, Any]:
    """The object at the start of a body; the rest of the body is not read."""
    text = body.decode("utf-8", "surrogateescape").lstrip()
    if not text:
        raise invalid_argument("JSON Parse error: The document is empty")
    try:
        document, _ = json.JSONDecoder().raw_decode(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise invalid_argument(f"JSON Parse error: {error}") from error
    if not isinstance(document, dict):
        raise invalid_argument(f"JSON Value: {_shown(document)} Is not object")
    return document


def signature_name(document: Mapping[str, Any]) -> str:
    name = document.get("signature_name", "")
    if not isinstance(name, str):
        raise invalid_argument(
            f"JSON Value: {_shown(document)} not formatted correctly. "
            "'signature_name' key must be a string value."
        )
    return name


def inputs(document: Mapping[str, Any], types: Types) -> tuple[Tensors, bool]:
    """The tensors of a request, and whether the request gives rows."""
    if "instances" in document and "inputs" in document:
        raise invalid_argument(
            f"JSON Value: {_shown(document)} Not formatted correctly expecting only one of "
            "'inputs' or 'instances' keys to exist "
        )
    if "instances" in document:
        return _rows(document, types), True
    if "inputs" in document:
        return _columns(document["inputs"], types), False
    raise invalid_argument("Missing 'inputs' or 'instances' key")


def _rows(document: Mapping[str, Any], types: Types) -> Tensors:
    rows = document["instances"]
    if not isinstance(rows, list):
        raise invalid_argument(
            f"JSON Value: {_shown(document)} Expecting 'instances' to be an list/array"
        )
    if not rows:
        raise invalid_argument(f"JSON Value: {_shown(document)} No values in 'instances' array")
    if not isinstance(rows[0], dict) and len(types) > 1:
        raise invalid_argument(
            "instances is a plain list, but expecting list of objects as multiple input tensors "
            "required as per tensorinfo_map"
        )
    named = _is_object(rows[0])
    columns: dict[str, list[np.ndarray]] = {name: [] for name in types}
    for i, row in enumerate(rows):
        if _is_object(row) != named:
            expected = "object but got list" if named else "value/list but got object"
            raise invalid_argument(f"Expecting {expected} at item {i} of input list")
        _add_row(columns, row if named else {next(iter(types)): row}, types, i)
    return {name: np.stack(values) for name, values in columns.items()}


def _add_row(
    columns: dict[str, list[np.ndarray]], row: Mapping[str, Any], types: Types, i: int
) -> None:
    if set(row) != set(types):
        raise invalid_argument(
            f"Failed to process element: {i} of 'instances' list. JSON object: {_shown(row)} "
            f"keys must be equal to: {','.join(sorted(types))}"
        )
    for name, value in row.items():
        tensor = _tensor(value, types[name])
        column = columns[name]
        if column and column[0].shape != tensor.shape:
            raise invalid_argument(
                f"Failed to process element: {i} key: {name} of 'instances' list. Error: Expecting "
                f"shape {list(column[0].shape)} but got: {list(tensor.shape)}"
            )
        column.append(tensor)


def _columns(value: Any, types: Types) -> Tensors:
    if not _is_object(value):
        if len(types) > 1:
            raise invalid_argument(
                "inputs is a plain value/list, but expecting an object as multiple input tensors "
                "required as per tensorinfo_map"
            )
        value = {next(iter(types)): value}
    for name in types:
        if name not in value:
            raise invalid_argument(f"Missing named input: {name} in 'inputs' object.")
    return {name: _tensor(value[name], dtype) for name, dtype in types.items()}


def _is_object(value: Any) -> bool:
    return isinstance(value, dict) and not _is_base64(value)


def _is_base64(value: Any) -> bool:
    return isinstance(value, dict) and list(value) == ["b64"] and isinstance(value["b64"], str)


def _tensor(value: Any, dtype: int) -> np.ndarray:
    """An array of a value or of nested lists, in the shape of the first list of each level."""
    if dtype not in DTYPES:
        raise invalid_argument(f"Conversion of JSON Value: {_shown(value)} to type: {_type(dtype)}")
    shape, first = [], value
    while isinstance(first, list):
        shape.append(len(first))
        first = first[0] if first else None
    if len(shape) > MAX_RANK:
        raise invalid_argument(f"A tensor has at most {MAX_RANK} dimensions here, not {len(shape)}")
    leaves = np.array(list(_leaves(value, dtype, shape, 0)), object)
    with np.errstate(over="ignore"):  # a number too large for a float32 is infinite
        return leaves.astype(DTYPES[dtype]).reshape(shape)


def _leaves(value: Any, dtype: int, shape: list[int], level: int) -> Iterator[Any]:
    if not isinstance(value, list):
        if level != len(shape):
            raise invalid_argument(
                f"JSON Value: {_shown(value)} found at incorrect level: {level + 1} in the JSON "
                f"DOM. Expected at level: {len(shape)}"
            )
        yield _leaf(value, dtype)
        return
    if level >= len(shape):
        raise invalid_argument(
            f"Encountered list at unexpected level: {level} expected < {len(shape)}"
        )
    if len(value) != shape[level]:
        raise invalid_argument(
            f"Encountered list at unexpected size: {len(value)} at level: {level} "
            f"expected size: {shape[level]}"
        )
    for item in value:
        yield from _leaves(item, dtype, shape, level + 1)


def _leaf(value: Any, dtype: int) -> Any:
    kind = DTYPES[dtype]
    if kind is np.object_ and _is_base64(value):
        return _decoded(value["b64"])
    if kind is np.object_ and isinstance(value, str):
        return value.encode("utf-8", "surrogateescape")
    if kind is np.bool_ and isinstance(value, bool):
        return value
    if issubclass(kind, np.number) and _fits(value, kind):
        return value
    raise invalid_argument(
        f"JSON Value: {_shown(value)} Type: {type(value).__name__} is not of expected type: "
        f"{_type(dtype)}"
    )


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise invalid_argument("Unable to base64 decode") from error


def _fits(value: Any, kind: Any) -> bool:
    if isinstance(value, bool):
        return False
    if issubclass(kind, np.floating):
        return isinstance(value, float) or (isinstance(value, int) and abs(value) < FLOAT_MAX)
    limits = np.iinfo(kind)
    return isinstance(value, int) and limits.min <= value <= limits.max


def _type(dtype: int) -> str:
    return DataType.Name(dtype).removeprefix("DT_").lower()


def _shown(value: Any) -> str:
    return json.dumps(value)[:256]


def answer(outputs: Mapping[str, np.ndarray], rows: bool) -> bytes:
    """The JSON of a response. A single output is its value; several are an object."""
    if rows:
        return _encode({"predictions": _by_row(outputs)})
    columns = {name: _values(name, array) for name, array in outputs.items()}
    return _encode({"outputs": columns if len(columns) > 1 else next(iter(columns.values()))})


def _by_row(outputs: Mapping[str, np.ndarray]) -> list[Any]:
    sizes = {}
    for name, array in outputs.items():
        if not array.ndim:
            raise invalid_argument(f"Tensor name: {name} has no shape information ")
        sizes[name] = len(array)
    if len(set(sizes.values())) > 1:
        raise invalid_argument(f"Tensor names have inconsistent batch sizes: {sizes}")
    columns = {name: _values(name, array) for name, array in outputs.items()}
    if len(columns) == 1:
        return next(iter(columns.values()))
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _values(name: str, array: np.ndarray) -> Any:
    if array.dtype == np.float16:
        raise invalid_argument("Failed to write JSON value for tensor type: half")
    if array.dtype == np.float32:
        # The shortest digits that give this float32; as a float64 it would have more.
        return np.array([float(str(x)) for x in array.ravel()], float).reshape(array.shape).tolist()
    if array.dtype.type is np.object_:
        encode = _as_base64 if name.endswith("_bytes") else _as_text
        nested = np.empty(array.shape, object)
        for i, value in enumerate(array.flat):
            nested.flat[i] = encode(value)
        return nested.tolist()
    return array.tolist()


def _as_base64(value: bytes) -> dict[str, str]:
    return {"b64": base64.b64encode(value).decode()}


def _as_text(value: bytes) -> str:
    return value.decode("utf-8", "surrogateescape")


def error(message: str) -> bytes:
    return _encode({"error": message})


def _encode(document: Any) -> bytes:
    return json.dumps(document, indent=1, ensure_ascii=False).encode("utf-8", "surrogateescape")
