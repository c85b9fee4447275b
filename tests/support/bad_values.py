"""Values that no adapter's files may have."""

from __future__ import annotations

from typing import Any

import numpy as np

NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
# Infinity and NaN of each sign; for 16 bits, as bit patterns.
NOT_FINITE = {
    "BF16": np.array([0x7F80, 0xFF80, 0x7FC0, 0xFF81], "<u2"),
    "F16": np.array([0x7C00, 0xFC00, 0x7E00, 0xFC01], "<u2"),
    "F32": np.array([np.inf, -np.inf, np.nan, -np.nan], "<f4"),
    "F64": np.array([np.inf, -np.inf, np.nan, -np.nan], "<f8"),
}
BAD_KEYS = ("/etc/passwd", "a/../b", "..", "a//b", "a/", "", "a\\b", "a\0b", "./a", "a\nb")
BAD_DTYPES = ("I32", "U8", "BOOL", "F8_E4M3", "F33", "float32", "", None, 4)
BAD_SHAPES: tuple[Any, ...] = (
    [2**63],
    [2**64 - 1, 2**64 - 1],
    [-1],
    [1] * 65,
    [0, 2**63],
    [0, 2**62, 8],
    [1.5],
    None,
    "3",
    {},
)
BAD_OFFSETS: tuple[Any, ...] = ([0, 2**63], [-4, 0], [8, 4], [0], [1, 2, 3], None, [2**64, 2**65])
BAD_JSON = (
    b"",
    b"[]",
    b"null",
    b"3",
    b'"text"',
    b"{",
    b"{} {}",
    b'{"a": NaN}',
    b'{"a": 1e999}',
    b'{"a": 1, "a": 1}',
    b'{"a": ' + b"9" * 5000 + b"}",
    b"[" * 100_000,
    b'{"a":' * 3_000 + b"1" + b"}" * 3_000,
    b"\xff\xfe\x00",
    '{"a": 1}'.encode("utf-16"),
    b'{"a": "\\ud800"}',
    b"\0" * 100,
)
LENGTHS = (0, 1, 7, 8, 2**24, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 8, 2**64 - 1, 100_000_000)
