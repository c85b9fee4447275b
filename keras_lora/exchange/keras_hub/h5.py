"""The arrays of KerasHub's `.lora.h5` files, apart from any model.

`backbone.save_lora_weights("x.lora.h5")` stores, with `i` counting the layers of the backbone
that have weights,

    /lora/vars/rank     /lora/<i>/vars/lora_kernel_a     /lora/<i>/vars/lora_kernel_b

so a file has one rank, and no names of layers. It has no alpha either: `backbone.enable_lora(r)`
always takes `alpha = r`, so that the scale is 1.

Reference:
    `Backbone.save_lora_weights` and `Backbone.load_lora_weights` in
    `keras_hub/src/models/backbone.py` of KerasHub 0.32.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py  # type: ignore[import-untyped]
import numpy as np

from keras_lora.checks import AdapterFileError, given_path, invalid_file
from keras_lora.exchange.problems import Problems
from keras_lora.files.adapter_files import PathLike
from keras_lora.files.atomic import replaced
from keras_lora.lowrank.per_axis import Array, Pair

SUFFIX = ".lora.h5"
KEYS = ("lora_kernel_a", "lora_kernel_b")
_EXPECTED = "a whole file of KerasHub's save_lora_weights"
_FIX = "copy the file again or save it again"
# What h5py raises for a damaged file, and what the checks of this module raise about one key.
_H5_ERRORS = (OSError, RuntimeError, KeyError, TypeError, ValueError)


def read_keras_hub_lora(path: PathLike) -> dict[int, Pair]:
    """The arrays of a `.lora.h5` file as KerasHub writes it, `{number of the layer: (a, b)}`.

    No other file is opened: links, and datasets whose values are in another file, are refused.
    A dataset larger than the file is refused too, and so is a key that KerasHub does not write.

    Args:
        path: A file whose name ends in `.lora.h5`.

    Returns:
        `a` `(*kernel.shape[:-1], r)` and `b` `(r, kernel.shape[-1])` in float64, all of one `r`.

    Raises:
        AdapterFileError: the file is missing, damaged or of another kind; everything that is
            wrong with it is listed, key by key.

    Example:

    >>> import tempfile
    >>> file = f"{tempfile.mkdtemp()}/x.lora.h5"
    >>> write_keras_hub_arrays(file, 2, {5: (np.ones((11, 3, 2)), np.ones((2, 7)))})
    >>> {i: (a.shape, b.shape) for i, (a, b) in read_keras_hub_lora(file).items()}
    {5: ((11, 3, 2), (2, 7))}
    """
    source = checked_name(path)
    # Before opening, which would wait for the other end of a pipe.
    if not source.is_file():
        raise invalid_file(source, "a file", "no file", "check the path")
    try:
        with h5py.File(source, "r") as file:
            return _read_groups(file, source, source.stat().st_size)
    except AdapterFileError:
        raise
    except _H5_ERRORS as error:
        raise invalid_file(source, _EXPECTED, error, _FIX) from error


def write_keras_hub_arrays(path: PathLike, rank: int, pairs: Mapping[int, Pair]) -> None:
    """The inverse of `read_keras_hub_lora`, in float32.

    Args:
        path: A file name that ends in `.lora.h5`. A file of that name is replaced.
        rank: The rank `r` of all pairs.
        pairs: `{number of the layer: (a, b)}`, in the shapes that `read_keras_hub_lora` returns.

    Raises:
        AdapterFileError: the system refuses to write. A file of that name is unchanged.

    Example:

    >>> import tempfile
    >>> file = f"{tempfile.mkdtemp()}/x.lora.h5"
    >>> write_keras_hub_arrays(file, 2, {5: (np.ones((11, 2)), np.ones((2, 7)))})
    """
    target = checked_name(path)
    try:
        with replaced(target, make_parents=False) as written, h5py.File(written, "w") as file:
            file["lora/vars/rank"] = rank
            for i, pair in pairs.items():
                for key, value in zip(KEYS, pair, strict=True):
                    file[f"lora/{i}/vars/{key}"] = value.astype("float32")
    except OSError as error:
        fix = "check that the directory exists, its permissions and the space on the disk"
        raise invalid_file(target, "a path that can be written", error, fix) from error


def checked_name(path: PathLike) -> Path:
    if not os.fspath(path).endswith(SUFFIX):
        expected = f"a name that ends in {SUFFIX}"
        fix = "rename the file, since KerasHub demands this ending"
        raise invalid_file(path, expected, "another name", fix)
    return given_path(path)


def _read_groups(file: Any, source: Path, size: int) -> dict[int, Pair]:
    lora = _child(file, "lora", h5py.Group)
    rank = _read_rank(lora, size)
    pairs: dict[int, Pair] = {}
    problems = Problems()
    for key in sorted(set(lora) - {"vars"}):
        with problems.caught(*_H5_ERRORS, part=f"/lora/{key}"):
            number = _number(key)
            pairs[number] = _read_pair(_child(lora, key, h5py.Group), rank, size)
    if not problems and not pairs:
        problems.add("/lora has no layers")
    problems.raise_any(lambda received: invalid_file(source, _EXPECTED, received, _FIX))
    return dict(sorted(pairs.items()))


def _read_rank(lora: Any, size: int) -> int:
    values = _child(lora, "vars", h5py.Group)
    _check_keys(values, ["rank"])
    rank = _values(values, "rank", "iu", size)
    if rank.shape != () or rank < 1:
        raise ValueError(f"/lora/vars/rank is {rank.tolist()}, expected a positive integer")
    return int(rank)


def _read_pair(group: Any, rank: int, size: int) -> Pair:
    _check_keys(group, ["vars"])
    values = _child(group, "vars", h5py.Group)
    _check_keys(values, KEYS)
    a, b = (_values(values, key, "f", size).astype("float64") for key in KEYS)
    if a.shape[-1:] != (rank,) or b.shape != (rank, b.size // rank):
        raise ValueError(
            f"factors of shapes {a.shape} and {b.shape}, expected (..., {rank}) and ({rank}, ...)"
        )
    for key, value in zip(KEYS, (a, b), strict=True):
        if not np.isfinite(value).all():
            raise ValueError(f"{key} has values that are not finite")
    return a, b


def _number(key: str) -> int:
    if not (key.isascii() and key.isdecimal()) or str(int(key)) != key:
        raise ValueError("not the number of a layer")
    return int(key)


def _check_keys(group: Any, expected: Sequence[str]) -> None:
    if sorted(group) != sorted(expected):
        raise ValueError(f"{group.name} has keys {sorted(group)}, expected {sorted(expected)}")


def _child(group: Any, name: str, kind: type) -> Any:
    """A member of a group that is in the same file."""
    place = f"{group.name.rstrip('/')}/{name}"
    if name not in set(group):  # `name in group` would open the file of an external link
        raise ValueError(f"{place} is missing")
    if group.id.links.get_info(name.encode()).type != h5py.h5l.TYPE_HARD:
        raise ValueError(f"{place} is a link, and links are not followed")
    child = group[name]
    if not isinstance(child, kind):
        raise ValueError(f"{place} is a {type(child).__name__}, expected a {kind.__name__}")
    return child


def _values(group: Any, name: str, kinds: str, size: int) -> Array:
    data = _child(group, name, h5py.Dataset)
    if data.is_virtual or data.external:
        raise ValueError(f"{data.name} has its values in another file")
    if data.dtype.kind not in kinds:
        raise ValueError(f"{data.name} has dtype {data.dtype}, expected one of kind {kinds!r}")
    if data.nbytes > size:
        raise ValueError(f"{data.name} claims {data.nbytes} bytes, in a file of {size} bytes")
    return np.asarray(data[()])
