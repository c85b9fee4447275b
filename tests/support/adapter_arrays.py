"""Arrays of every type and shape that an adapter's directory can have."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from keras_lora.checks import AdapterFileError
from keras_lora.files.adapter_files import (
    AdapterFiles,
    read_adapter_files,
    write_adapter_files,
)

DTYPES = (np.float16, ml_dtypes.bfloat16, np.float32, np.float64)
SHAPES: tuple[tuple[int, ...], ...] = ((), (7,), (3, 5, 2), (0,), (2, 0, 3))
CONFIG = {"rank": 2, "alpha": 0.1, "targets": ["käse", "b"], "none": None, "deep": {"z": 1, "a": 2}}
DIFFERENT = "save was interrupted or the JSON was edited"
documented_warning = pytest.mark.filterwarnings(f"ignore:.*{DIFFERENT}:UserWarning")


def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        f"{np.dtype(dtype).name}/{len(shape)}.{int(np.prod(shape))}": np.asarray(
            rng.normal(size=shape)
        ).astype(dtype)
        for dtype in DTYPES
        for shape in SHAPES
    }


def assert_same(loaded: AdapterFiles, config: object, tensors: dict[str, np.ndarray]) -> None:
    assert loaded.config == config
    assert list(loaded.tensors) == sorted(tensors)
    for key, array in tensors.items():
        found = loaded.tensors[key]
        assert (found.dtype, found.shape) == (array.dtype, array.shape), key
        assert found.tobytes() == array.tobytes(), key


def names(directory: Path) -> list[str]:
    return sorted(file.name for file in directory.iterdir())


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    directory = tmp_path / "adapter"
    write_adapter_files(directory, CONFIG, arrays(), overwrite=False)
    return directory


# Bytes of memory for a few tensors' objects, and for nested lists until Python's JSON parser fails.
SMALL = 128 * 1024


def size_of(path: Path) -> int:
    found = [path] if path.is_file() else [f for f in path.glob("*") if f.is_file()]
    return sum(f.stat().st_size for f in found)


def read_traced(directory: Path) -> tuple[AdapterFiles | AdapterFileError, int]:
    """The result or the error of reading, and the peak of its memory in bytes."""
    result: AdapterFiles | AdapterFileError
    tracemalloc.start()
    try:
        result = read_adapter_files(directory)
    except AdapterFileError as error:
        result = error
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return result, peak
