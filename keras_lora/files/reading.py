"""What every reader of an adapter's files needs: opening them, their JSON and their tensors.

Nothing that is read is executed or used as a path, and sizes are checked before memory is taken.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, deserialize

from keras_lora.checks import invalid_file

# Bytes: parsed JSON takes up to some twenty-five times its size in memory.
CONFIG_LIMIT = 2**20
HEADER_LIMIT = 2**24  # 100,000 tensors take about 10 MB
# By safetensors' names. The numpy functions of safetensors cannot read bfloat16.
DTYPES = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
}
CODES = {dtype.name: code for code, dtype in DTYPES.items()}


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Within the context, an error of the system becomes an `AdapterFileError`."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links, before Python 3.13
        received, fix = f"{type(error).__name__}: {error}", "check the path, permissions and space"
        raise invalid_file(path, "a path that can be used", received, fix) from error


@contextlib.contextmanager
def opened(file: Path) -> Iterator[io.FileIO]:
    """A file to read, which may be a link, as in a snapshot of the Hugging Face cache."""
    with explained(file):
        target = file.resolve(strict=True)
        # Opening a pipe would wait for its other end.
        if not target.is_file():
            received, fix = "a directory, pipe or device", "copy the adapter again"
            raise invalid_file(file, "a file", received, fix)
        # A buffer would make `read` join two parts, at twice the memory.
        with target.open("rb", buffering=0) as stream:
            yield stream


def check_size(file: Path, size: int, limit: int) -> None:
    if size > limit:
        fix = "keep data out of the config and keys"
        raise invalid_file(file, f"at most {limit} bytes of JSON", size, fix)


def read_header(file: Path, stream: io.FileIO) -> bytes:
    """The JSON at the beginning of a safetensors file."""
    size = os.fstat(stream.fileno()).st_size
    length = int.from_bytes(stream.read(8), "little")
    limit = min(size - 8, HEADER_LIMIT)
    if length > limit:
        received = f"{length} bytes of header in {size} bytes"
        fix = "the file is cut or damaged: copy it again"
        raise invalid_file(file, f"at most {max(limit, 0)} bytes of header", received, fix)
    return stream.read(length)


def read_entries(file: Path, stream: io.FileIO) -> dict[str, dict[str, Any]]:
    """The tensors of a safetensors file in the order of their keys, for `as_array`."""
    stream.seek(0)
    data = stream.readall()
    try:
        return dict(sorted(deserialize(data)))  # type: ignore[no-untyped-call]
    except SafetensorError as error:
        fix = "the file is damaged: copy it or save it again"
        raise invalid_file(file, "a safetensors file", error, fix) from error


def as_array(file: Path, key: str, entry: Mapping[str, Any]) -> np.ndarray:
    try:
        return np.ndarray(entry["shape"], DTYPES[entry["dtype"]], buffer=entry["data"])
    except ValueError as error:
        expected, received = f"a valid numpy shape for {key!r}", f"{entry['shape']} ({error})"
        raise invalid_file(file, expected, received, "save the adapter again") from error


def key_problem(key: object) -> str:
    """Why a key is no name for a tensor, or an empty string."""
    if not isinstance(key, str) or key == "__metadata__":
        return "not a name for a tensor"
    if any(segment in ("", ".", "..") for segment in key.split("/")):
        return "an empty, '.' or '..' segment"
    # NUL and lone surrogates are not printable either.
    return "" if key.isprintable() and "\\" not in key else "a backslash or unprintable character"


def parsed_json(text: str | bytes, file: Path) -> dict[str, Any]:
    """A JSON object that has each key once."""
    try:
        value = json.loads(text, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        fix = "the file is damaged: copy it or save it again"
        raise invalid_file(file, "valid JSON, each key once", error, fix) from error
    if not isinstance(value, dict):
        fix = "copy the adapter or save it again"
        raise invalid_file(file, "a JSON object", type(value).__name__, fix)
    return value


def _object(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f"the key {key!r} twice")
        values[key] = value
    return values
