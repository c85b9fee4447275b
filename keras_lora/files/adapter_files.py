"""An adapter's directory: `adapter_config.json` for people, `adapter.safetensors` for everything.

The metadata of `adapter.safetensors` holds `format_version`, the config once more (`config`, as
JSON with sorted keys, no spaces, ASCII) and `digest`: the SHA-256 of that JSON and a line feed,
then for each key in sorted order of `["key", "dtype", [shape]]` as JSON, a line feed and the
tensor's bytes. So this one file is the adapter, and one rename replaces it.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save

from keras_lora.checks import AdapterFileError, warn

PathLike: TypeAlias = str | os.PathLike[str]

CONFIG_FILE = "adapter_config.json"
TENSORS_FILE = "adapter.safetensors"
FORMAT_VERSION = "1"

_TEMPORARY = re.compile(r"\.adapter(_config\.json|\.safetensors)\.[0-9a-f]{32}\.tmp")
# Bytes: parsed JSON takes up to some twenty-five times its size in memory.
CONFIG_LIMIT = 2**20
_HEADER_LIMIT = 2**24  # 100,000 tensors take about 10 MB
# safetensors names these, and its numpy functions cannot read the first.
DTYPES = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
}
CODES = {dtype.name: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True, eq=False)
class AdapterFiles:
    """What an adapter's directory holds.

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

    One process at a time writes to a directory: it removes the temporary files of any other, as
    those of a killed one.

    Args:
        directory: Where to; made, with its parents, if it does not exist. Other files in it stay.
        config: Values that JSON has: no NaN, no infinity; 1 MiB of them at most.
        tensors: Arrays of float16, bfloat16, float32 or float64. A key is a name of
            printable segments with `/` between them, such as `"dense/lora_a"`.
        overwrite: Replace an adapter that is there.
        finite: Refuse NaN and infinity.

    Raises:
        AdapterFileError: a value outside the above, an adapter is there and `overwrite` is false,
            something that is no adapter is in the way, or the system refuses. The adapter that
            was there is still there.

    Example:

    >>> import tempfile
    >>> directory = tempfile.mkdtemp()
    >>> write_adapter_files(directory, {"rank": 4}, {"a": np.zeros(3)}, overwrite=False)
    >>> read_adapter_files(directory).tensors
    {'a': array([0., 0., 0.])}
    """
    root = Path(directory)
    plain = json.loads(_canonical(config, root / CONFIG_FILE))
    contents = {
        CONFIG_FILE: json.dumps(plain, indent=2).encode() + b"\n",
        TENSORS_FILE: _serialized(plain, tensors, root / TENSORS_FILE, finite),
    }
    check_size(root / CONFIG_FILE, len(contents[CONFIG_FILE]), CONFIG_LIMIT)
    with explained(root):
        _check_target(root, overwrite)
        root.mkdir(parents=True, exist_ok=True)
        for file in _leftovers(root):
            file.unlink()
        _replace(root, contents)


def read_adapter_files(directory: PathLike, *, finite: bool = True) -> AdapterFiles:
    """Read an adapter after checking all of it; nothing in it is executed or used as a path.

    Peak memory is twice the size of the files, 1.5 kilobytes a tensor, and the parsed config.

    Args:
        directory: The directory of an adapter.
        finite: Refuse NaN and infinity.

    Returns:
        The config and the tensors. Where `adapter_config.json` differs from the config inside
        `adapter.safetensors`, a `UserWarning` says so and the latter counts.

    Raises:
        AdapterFileError: a file is missing, unreadable, a link that leads out of the directory,
            malformed, of an unknown format, or changed since it was written; a key, a dtype or a
            value is not allowed.

    Example:

    >>> import tempfile
    >>> directory = tempfile.mkdtemp()
    >>> write_adapter_files(directory, {"rank": 4}, {"a": np.zeros(3)}, overwrite=False)
    >>> read_adapter_files(directory).config
    {'rank': 4}
    """
    file = Path(directory) / TENSORS_FILE
    with opened(file) as stream:
        header = read_header(file, stream)
        entries = read_entries(file, stream)
    metadata = _metadata(file, header)
    tensors = _arrays(file, entries)
    if metadata["digest"] != _digest(metadata["config"], tensors):
        expected = f"content of the digest {metadata['digest']!r}"
        _fail(file, expected, "other content", "the file is damaged: copy it or save it again")
    if finite:
        _check_finite(file, tensors)
    return AdapterFiles(_compared_config(file, metadata["config"]), tensors)


def read_adapter_config(directory: PathLike) -> dict[str, Any]:
    """Read an adapter's config alone. Without the tensors, the digest is NOT checked.

    Args:
        directory: The directory of an adapter.

    Returns:
        The config; a `UserWarning` is given as by `read_adapter_files`.

    Raises:
        AdapterFileError: as by `read_adapter_files`, for all but the tensors.

    Example:

    >>> import tempfile
    >>> directory = tempfile.mkdtemp()
    >>> write_adapter_files(directory, {"rank": 4}, {"a": np.zeros(3)}, overwrite=False)
    >>> read_adapter_config(directory)
    {'rank': 4}
    """
    file = Path(directory) / TENSORS_FILE
    with opened(file) as stream:
        header = read_header(file, stream)
    return _compared_config(file, _metadata(file, header)["config"])


def _fail(file: Path, expected: str, received: object, fix: str) -> NoReturn:
    message = f"Invalid {str(file)!r}: expected {expected}. Received: {received}; {fix}."
    raise AdapterFileError(message)


@contextlib.contextmanager
def explained(file: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links, before Python 3.13
        received = f"{type(error).__name__}: {error}"
        _fail(file, "a path that can be used", received, "check the path, permissions and space")


def _check_entries(file: Path, codes: Mapping[str, str]) -> None:
    problems = {
        key: key_problem(key) or ("" if code in DTYPES else f"dtype {code}")
        for key, code in codes.items()
    }
    _refuse(file, {key: problem for key, problem in problems.items() if problem})


def key_problem(key: object) -> str:
    if not isinstance(key, str) or key == "__metadata__":
        return "not a name for a tensor"
    if any(segment in ("", ".", "..") for segment in key.split("/")):
        return "an empty, '.' or '..' segment"
    # Not printable are NUL and lone surrogates too.
    return "" if key.isprintable() and "\\" not in key else "a backslash or unprintable character"


def _check_finite(file: Path, tensors: Mapping[str, np.ndarray]) -> None:
    with np.errstate(invalid="ignore"):  # ml_dtypes warns of a signalling NaN
        bad = [key for key, array in tensors.items() if not np.isfinite(array).all()]
    _refuse(file, dict.fromkeys(bad, "NaN or infinity"))


def _refuse(file: Path, problems: Mapping[str, str]) -> None:
    if problems:
        expected = f"finite tensors of {sorted(CODES)} with keys such as 'dense/lora_a'"
        received = ", ".join(f"{key!r} ({problem})" for key, problem in problems.items())
        _fail(file, expected, received, "rename, convert or repair these and save again")


def check_size(file: Path, size: int, limit: int) -> None:
    if size > limit:
        _fail(file, f"at most {limit} bytes of JSON", size, "keep data out of the config and keys")


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
        _fail(file, "values that JSON has, all finite", error, "correct the config")


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
    check_size(file, int.from_bytes(data[:8], "little"), _HEADER_LIMIT)
    return data


def _check_target(root: Path, overwrite: bool) -> None:
    config, tensors = root / CONFIG_FILE, root / TENSORS_FILE
    for file in (config, tensors):
        if file.is_symlink() or (file.exists() and not file.is_file()):
            _fail(file, "a file, or nothing", "a link, directory or device", "remove it")
    if tensors.exists() and not overwrite:
        _fail(root, "no adapter there", "one", "pass overwrite=True to replace it")
    # PEFT's config has this name too. A killed save of ours leaves a temporary file beside it.
    if config.exists() and not tensors.exists() and not _leftovers(root):
        received = f"one without {TENSORS_FILE}, as other programs write"
        _fail(config, "an adapter's config, or nothing", received, "remove it or write elsewhere")


def _leftovers(root: Path) -> list[Path]:
    return [file for file in root.glob(".adapter*.tmp") if _TEMPORARY.fullmatch(file.name)]


def _replace(root: Path, contents: Mapping[str, bytes]) -> None:
    """Write each file beside its place, then move all there; the last is the one that counts."""
    temporary = {name: root / f".{name}.{secrets.token_hex(16)}.tmp" for name in contents}
    try:
        for name, file in temporary.items():
            write_new(file, contents[name])
        for name, file in temporary.items():
            file.replace(root / name)
        sync(root)
    finally:
        for file in temporary.values():
            file.unlink(missing_ok=True)


def write_new(file: Path, data: bytes) -> None:
    with file.open("xb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def sync(root: Path) -> None:
    if os.name != "nt":  # Windows cannot open a directory.
        descriptor = os.open(root, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def opened(file: Path, *, links: bool = False) -> Iterator[io.FileIO]:
    """A file to read, which may be a link out of its directory if `links`."""
    with explained(file):
        target = file.resolve(strict=True)
        if not links and not target.is_relative_to(file.parent.resolve()):
            fix = "put a copy in the place of the link"
            _fail(file, "a file in its directory", f"a link to {str(target)!r}", fix)
        # Opening a pipe would wait for its other end.
        if not target.is_file():
            _fail(file, "a file", "a directory, pipe or device", "copy the adapter again")
        # A buffer would make `read` join two parts, at twice the memory.
        with target.open("rb", buffering=0) as stream:
            yield stream


def read_header(file: Path, stream: io.FileIO) -> bytes:
    size = os.fstat(stream.fileno()).st_size
    length = int.from_bytes(stream.read(8), "little")
    limit = min(size - 8, _HEADER_LIMIT)
    if length > limit:
        received = f"{length} bytes of header in {size} bytes"
        _fail(file, f"at most {max(limit, 0)}", received, "it is cut or damaged: copy it again")
    return stream.read(length)


def read_entries(file: Path, stream: io.FileIO) -> dict[str, dict[str, Any]]:
    stream.seek(0)
    data = stream.readall()
    try:
        return dict(sorted(deserialize(data)))  # type: ignore[no-untyped-call]
    except SafetensorError as error:
        _fail(file, "a safetensors file", error, "it is damaged: copy it or save it again")


def _metadata(file: Path, header: bytes) -> dict[str, str]:
    found = parsed_json(header, file).get("__metadata__")
    metadata = found if isinstance(found, dict) else {}
    version = metadata.get("format_version")
    if version != FORMAT_VERSION:
        expected = f"an adapter of keras-lora, of format_version {FORMAT_VERSION!r}"
        _fail(file, expected, repr(version), "install the keras-lora that wrote it, if one did")
    if not all(isinstance(metadata.get(name), str) for name in ("config", "digest")):
        expected = "the strings 'config' and 'digest' in its metadata"
        _fail(file, expected, sorted(metadata), "save the adapter again")
    return metadata


def _arrays(file: Path, entries: Mapping[str, Mapping[str, Any]]) -> dict[str, np.ndarray]:
    _check_entries(file, {key: entry["dtype"] for key, entry in entries.items()})
    return {key: as_array(file, key, entry) for key, entry in entries.items()}


def as_array(file: Path, key: str, entry: Mapping[str, Any]) -> np.ndarray:
    try:
        return np.ndarray(entry["shape"], DTYPES[entry["dtype"]], buffer=entry["data"])
    except ValueError as error:
        expected = f"a shape for {key!r} that numpy has"
        _fail(file, expected, f"{entry['shape']} ({error})", "save the adapter again")


def _compared_config(file: Path, text: str) -> dict[str, Any]:
    """The config inside `adapter.safetensors`, compared with the one for people."""
    check_size(file, len(text), CONFIG_LIMIT)
    config = parsed_json(text, file)
    if _canonical(config, file) != text:
        _fail(file, "its config as canonical JSON", "other JSON", "save the adapter again")
    shown = file.with_name(CONFIG_FILE)
    with opened(shown) as stream:
        check_size(shown, os.fstat(stream.fileno()).st_size, CONFIG_LIMIT)
        data = stream.readall()
    if _canonical(parsed_json(data, shown), shown) != text:
        message = (
            f"Expected in {str(shown)!r} the config inside {TENSORS_FILE}. Received: another; a "
            f"save was interrupted or the JSON was edited. The one inside {TENSORS_FILE} counts: "
            "save the adapter again to make both the same."
        )
        warn(message)
    return config


def parsed_json(text: str | bytes, file: Path) -> dict[str, Any]:
    try:
        value = json.loads(text, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        _fail(file, "valid JSON, each key once", error, "it is damaged: copy it or save it again")
    if not isinstance(value, dict):
        _fail(file, "a JSON object", type(value).__name__, "copy the adapter or save it again")
    return value


def _object(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f"the key {key!r} twice")
        values[key] = value
    return values
