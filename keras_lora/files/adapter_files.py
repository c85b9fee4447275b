"""An adapter's directory: `adapter_config.json` for people, `adapter.safetensors` for programs.

The metadata of `adapter.safetensors` has `format_version`, the config once more (`config`, as
JSON with sorted keys, no spaces, ASCII) and `digest`: the SHA-256 of that JSON and a line feed,
then for each key in sorted order of `["key", "dtype", [shape]]` as JSON, a line feed and the
tensor's bytes. So `adapter.safetensors` alone is the adapter, and one rename replaces it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from safetensors.numpy import save

from keras_lora.checks import given_path, invalid_file, warn
from keras_lora.files.atomic import leftovers, locked, write_files
from keras_lora.files.reading import (
    CODES,
    CONFIG_LIMIT,
    DTYPES,
    HEADER_LIMIT,
    as_array,
    check_size,
    explained,
    key_problem,
    opened,
    parsed_json,
    read_entries,
    read_header,
)

PathLike: TypeAlias = str | os.PathLike[str]

CONFIG_FILE = "adapter_config.json"
TENSORS_FILE = "adapter.safetensors"
FORMAT_VERSION = "1"
# In the order of writing: the adapter is replaced when the last one is.
_FILES = (CONFIG_FILE, TENSORS_FILE)


@dataclass(frozen=True, eq=False)
class AdapterFiles:
    """What an adapter's directory contains.

    Attributes:
        config: The config, as plain JSON values.
        tensors: The tensors, in the sorted order of their keys.
    """

    config: dict[str, Any]
    tensors: dict[str, np.ndarray]


def write_adapter_files(
    directory: PathLike,
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    *,
    overwrite: bool,
    finite: bool = True,
) -> None:
    """Write an adapter such that a process killed at any moment leaves the old one or the new one.

    Processes that write to one directory wait for each other: the last one counts.

    Args:
        directory: The directory to write; made, with its parents, if it does not exist. Other
            files in it stay.
        config: Values that JSON has: no NaN, no infinity; 1 MiB of them at most.
        tensors: Arrays of float16, bfloat16, float32 or float64. A key is a name of
            printable segments with `/` between them, such as `"dense/lora_a"`.
        overwrite: Replace an adapter that the directory has.
        finite: Refuse NaN and infinity.

    Raises:
        AdapterFileError: `config` or `tensors` has a value outside the above; the directory has
            an adapter and `overwrite` is false, or has files of another program under the names
            to write; or the system refuses. An adapter that the directory had is unchanged.

    Example:

    >>> import tempfile
    >>> directory = tempfile.mkdtemp()
    >>> write_adapter_files(directory, {"rank": 4}, {"a": np.zeros(3)}, overwrite=False)
    >>> read_adapter_files(directory).tensors
    {'a': array([0., 0., 0.])}
    """
    root = given_path(directory)
    plain = json.loads(_canonical(config, root / CONFIG_FILE))
    contents = {
        CONFIG_FILE: json.dumps(plain, indent=2).encode() + b"\n",
        TENSORS_FILE: _serialized(plain, tensors, root / TENSORS_FILE, finite),
    }
    check_size(root / CONFIG_FILE, len(contents[CONFIG_FILE]), CONFIG_LIMIT)
    with explained(root):
        root.mkdir(parents=True, exist_ok=True)
        with locked(root):
            _check_target(root, overwrite)
            for file in leftovers(root, _FILES):
                file.unlink()
            write_files(root, contents)


def read_adapter_files(directory: PathLike, *, finite: bool = True) -> AdapterFiles:
    """Read an adapter after checking all of it; no content is executed or used as a path.

    Peak memory is twice the size of the files, 1.5 kilobytes a tensor, and the parsed config.

    Args:
        directory: The directory of an adapter.
        finite: Refuse NaN and infinity.

    Returns:
        The config and the tensors. Where `adapter_config.json` differs from the config inside
        `adapter.safetensors`, the config inside counts and a `UserWarning` says so.

    Raises:
        AdapterFileError: a file is missing, unreadable, malformed, of an unknown format, or changed
            since it was written; a key, a dtype or a value is not allowed.

    Example:

    >>> import tempfile
    >>> directory = tempfile.mkdtemp()
    >>> write_adapter_files(directory, {"rank": 4}, {"a": np.zeros(3)}, overwrite=False)
    >>> read_adapter_files(directory).config
    {'rank': 4}

    Reference: the safetensors format, https://huggingface.co/docs/safetensors.
    """
    file = given_path(directory) / TENSORS_FILE
    with opened(file) as stream:
        header = read_header(file, stream)
        entries = read_entries(file, stream)
    metadata = _metadata(file, header)
    tensors = _arrays(file, entries)
    if metadata["digest"] != _digest(metadata["config"], tensors):
        expected = f"content with the digest {metadata['digest']!r}"
        fix = "the file is damaged: copy it or save it again"
        raise invalid_file(file, expected, "other content", fix)
    if finite:
        _check_finite(file, tensors)
    return AdapterFiles(_compared_config(file, metadata["config"]), tensors)


def read_adapter_config(directory: PathLike) -> dict[str, Any]:
    """Read an adapter's config alone. Without the tensors, the digest is NOT checked.

    Args:
        directory: The directory of an adapter.

    Returns:
        The config; with the same `UserWarning` as `read_adapter_files`.

    Raises:
        AdapterFileError: as by `read_adapter_files`, except for errors in the tensors.

    Example:

    >>> import tempfile
    >>> directory = tempfile.mkdtemp()
    >>> write_adapter_files(directory, {"rank": 4}, {"a": np.zeros(3)}, overwrite=False)
    >>> read_adapter_config(directory)
    {'rank': 4}
    """
    file = given_path(directory) / TENSORS_FILE
    with opened(file) as stream:
        header = read_header(file, stream)
    return _compared_config(file, _metadata(file, header)["config"])


def _check_entries(file: Path, codes: Mapping[str, str]) -> None:
    problems = {
        key: key_problem(key) or ("" if code in DTYPES else f"dtype {code}")
        for key, code in codes.items()
    }
    _refuse(file, {key: problem for key, problem in problems.items() if problem})


def _check_finite(file: Path, tensors: Mapping[str, np.ndarray]) -> None:
    with np.errstate(invalid="ignore"):  # ml_dtypes warns of a signalling NaN
        bad = [key for key, array in tensors.items() if not np.isfinite(array).all()]
    _refuse(file, dict.fromkeys(bad, "NaN or infinity"))


def _refuse(file: Path, problems: Mapping[str, str]) -> None:
    if problems:
        expected = f"finite tensors of {sorted(CODES)} with keys such as 'dense/lora_a'"
        received = ", ".join(f"{key!r} ({problem})" for key, problem in problems.items())
        fix = "rename, convert or repair these tensors and save again"
        raise invalid_file(file, expected, received, fix)


def _digest(config: str, tensors: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256(f"{config}\n".encode())
    for key in sorted(tensors):
        array = tensors[key]
        digest.update(f"{json.dumps([key, array.dtype.name, array.shape])}\n".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)  # bfloat16 has no buffer of its own
    return digest.hexdigest()


def _canonical(config: Mapping[str, Any], file: Path) -> str:
    try:
        return json.dumps(dict(config), sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        expected = "values that JSON has, all finite"
        raise invalid_file(file, expected, error, "correct the config") from error


def _serialized(
    config: Mapping[str, Any], tensors: Mapping[str, Any], file: Path, finite: bool
) -> bytes:
    text = _canonical(config, file)
    arrays = {key: np.asarray(value) for key, value in tensors.items()}
    codes = {key: CODES.get(array.dtype.name, array.dtype.name) for key, array in arrays.items()}
    _check_entries(file, codes)
    arrays = {k: np.asarray(a, dtype=DTYPES[codes[k]], order="C") for k, a in arrays.items()}
    if finite:
        _check_finite(file, arrays)
    metadata = {"format_version": FORMAT_VERSION, "config": text, "digest": _digest(text, arrays)}
    data = save(arrays, metadata)
    check_size(file, int.from_bytes(data[:8], "little"), HEADER_LIMIT)
    return data


def _check_target(root: Path, overwrite: bool) -> None:
    config, tensors = root / CONFIG_FILE, root / TENSORS_FILE
    for file in (config, tensors):
        if file.is_symlink() or (file.exists() and not file.is_file()):
            received = "a link, directory or device"
            raise invalid_file(file, "a file, or nothing", received, "remove it")
    if tensors.exists() and not overwrite:
        fix = "pass overwrite=True to replace the adapter"
        raise invalid_file(root, "no adapter in the directory", "an adapter", fix)
    # PEFT's config has this name too. A killed save of ours leaves a temporary file beside it.
    if config.exists() and not tensors.exists() and not leftovers(root, _FILES):
        expected = f"nothing, or a config with {TENSORS_FILE} beside it"
        fix = "remove the config or write to another directory"
        raise invalid_file(config, expected, "a config as other programs write, such as PEFT", fix)


def _metadata(file: Path, header: bytes) -> dict[str, str]:
    found = parsed_json(header, file).get("__metadata__")
    metadata = found if isinstance(found, dict) else {}
    version = metadata.get("format_version")
    if version != FORMAT_VERSION:
        expected = f"an adapter of keras-lora, of format_version {FORMAT_VERSION!r}"
        fix = "install the version of keras-lora that wrote the file, if one did"
        raise invalid_file(file, expected, repr(version), fix)
    if not all(isinstance(metadata.get(name), str) for name in ("config", "digest")):
        expected = "the strings 'config' and 'digest' in the metadata"
        raise invalid_file(file, expected, sorted(metadata), "save the adapter again")
    return metadata


def _arrays(file: Path, entries: Mapping[str, Mapping[str, Any]]) -> dict[str, np.ndarray]:
    _check_entries(file, {key: entry["dtype"] for key, entry in entries.items()})
    return {key: as_array(file, key, entry) for key, entry in entries.items()}


def _compared_config(file: Path, text: str) -> dict[str, Any]:
    """The config inside `adapter.safetensors`, compared with the one for people."""
    check_size(file, len(text), CONFIG_LIMIT)
    config = parsed_json(text, file)
    if _canonical(config, file) != text:
        expected = "a config as JSON with sorted keys and no spaces"
        raise invalid_file(file, expected, "other JSON", "save the adapter again")
    shown = file.with_name(CONFIG_FILE)
    with opened(shown) as stream:
        check_size(shown, os.fstat(stream.fileno()).st_size, CONFIG_LIMIT)
        data = stream.readall()
    if _canonical(parsed_json(data, shown), shown) != text:
        warn(
            f"Expected in {str(shown)!r} the config inside {TENSORS_FILE}. Received: another "
            "config, since a save was interrupted or the JSON was edited. The config inside "
            f"{TENSORS_FILE} counts: save the adapter again to make both the same."
        )
    return config
