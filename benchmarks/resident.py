"""The memory and the bytes read of a call, and a model of a billion parameters. Linux, glibc."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterable
from pathlib import Path

import keras
import keras_hub

MIB = 2**20
# Of the environment of a process: TensorFlow computes one operation at a time, and glibc gives
# freed blocks of 128 KiB and more back at once. By itself it raises this limit up to 32 MiB.
SPARING = {"TF_NUM_INTEROP_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(2**17)}


def billion(layers: int, width: int, dtype: str = "float32") -> keras.Model:
    """A Llama-shaped backbone: 1.1 billion parameters with 16 layers of 2048."""
    return keras_hub.models.LlamaBackbone(
        vocabulary_size=32000,
        num_layers=layers,
        num_query_heads=width // 64,
        num_key_value_heads=width // 256,
        hidden_dim=width,
        intermediate_dim=4 * width,
        dtype=dtype,
    )


def size(variables: Iterable[keras.Variable]) -> int:
    """The bytes of the variables' values."""
    return sum(v.value.dtype.size * int(v.value.shape.num_elements()) for v in variables)


def resident(key: str, process: int | str = "self") -> int:
    """Bytes of a process: `VmRSS` is the present size, `VmHWM` the peak since `forget_peak`.

    0 if the process has ended.
    """
    return 1024 * _of_a_process(process, "status", key)


def read_so_far() -> int:
    """Bytes that this process has read, from a disk or from the system's cache."""
    return _of_a_process("self", "io", "rchar")


def forget_peak() -> None:
    """Start a new peak. Freed memory is given back first: its reuse would not raise the peak."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def _of_a_process(process: int | str, file: str, key: str) -> int:
    lines = Path("/proc", str(process), file).read_text(encoding="utf-8").splitlines()
    return next((int(line.split()[1]) for line in lines if key in line), 0)
