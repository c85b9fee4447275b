"""Read an adapter's directory as `PeftModel.save_pretrained` writes it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from keras_lora.checks import AdapterFileError, given_path, invalid_file, warn
from keras_lora.exchange.peft_files.config import (
    Settings,
    is_targeted,
    parse_config,
    unknown_fields,
)
from keras_lora.exchange.peft_files.tensors import (
    Array,
    PeftModule,
    build_modules,
    canonical_keys,
    is_factor,
    sort_keys,
    widened,
)
from keras_lora.exchange.peft_files.token_rows import PeftTokens, read_tokens
from keras_lora.exchange.problems import Problems
from keras_lora.files.adapter_files import CONFIG_FILE, TENSORS_FILE, PathLike
from keras_lora.files.reading import (
    CONFIG_LIMIT,
    DTYPES,
    as_array,
    check_size,
    opened,
    parsed_json,
    read_entries,
    read_header,
)

WEIGHTS_FILE = "adapter_model.safetensors"
# Other files with the tensors of an adapter: for each, what was received, and the fix.
_OTHER_FILES = {
    "adapter_model.bin": (
        "tensors in adapter_model.bin, whose reading could execute code",
        "load the adapter in PEFT and save it with save_pretrained(..., safe_serialization=True)",
    ),
    "adapter_model*-of-*.safetensors": (
        "tensors in several files",
        "load the adapter in PEFT and save it with save_pretrained",
    ),
    TENSORS_FILE: ("an adapter of keras_lora itself", "load it with load_adapter"),
}


@dataclass(frozen=True, eq=False)
class PeftAdapter:
    """The content of a directory that PEFT wrote.

    Attributes:
        config: `adapter_config.json`, as read.
        modules: The LoRA of each module, `{name in the base model: PeftModule}`.
        saved: Parameters that replace parameters of the base, `{full name: value}`: those of
            `modules_to_save`, trained biases, and embedding matrices saved with the adapter.
        tokens: Rows that replace rows of embedding matrices, `{module: PeftTokens}`.
        unknown: The keys of the file that are not understood; their tensors are left out.
        dtypes: `{key: dtype}` of each tensor in the file, with the key as PEFT 0.21 writes it.
            With this as its `dtype`, `write_peft_adapter` writes the same bytes again.
    """

    config: Mapping[str, Any]
    modules: Mapping[str, PeftModule]
    saved: Mapping[str, Array]
    tokens: Mapping[str, PeftTokens]
    unknown: tuple[str, ...]
    dtypes: Mapping[str, str]


def read_peft_adapter(directory: PathLike) -> PeftAdapter:
    """Read a LoRA adapter of Hugging Face PEFT, after checking all of it.

    No content is executed or used as a path. The regular expressions of `rank_pattern`,
    `alpha_pattern` and `target_modules` are matched with module names, as in PEFT. The files may
    be links, as in a snapshot of the Hugging Face cache. Values of 16 bits become float32. Peak
    memory is three times the size of the files and 1.5 kilobytes a tensor.

    Args:
        directory: The directory of an adapter.

    Returns:
        The adapter. A `UserWarning` names the fields of the config that this version of the
        package does not know, and the modules whose tensors PEFT would not load.

    Raises:
        AdapterFileError: everything that is wrong with the directory, at once: a file that is
            missing or malformed; a `peft_type` other than LoRA; a field that changes the
            computation in a way that A and B cannot express; tensors that are not finite, or of
            another dtype or shape than the config says; a factor without the other one.

    Example:

    >>> import tempfile
    >>> from keras_lora.exchange.peft_files import PeftModule, write_peft_adapter
    >>> module = PeftModule(a=np.ones((2, 7)), b=np.ones((5, 2)), rank=2, alpha=8)
    >>> directory = tempfile.mkdtemp()
    >>> write_peft_adapter(directory, {"layers.0.q_proj": module})
    >>> read = read_peft_adapter(directory).modules["layers.0.q_proj"]
    >>> read.scaling, read.a.shape
    (4.0, (2, 7))
    """
    root = given_path(directory)
    _check_other_files(root)
    problems, error = Problems(), partial(peft_error, root)
    config = _read_config(root, problems)
    settings = parse_config(config, problems) if config else None
    file = _read_tensors(root, problems)
    if settings is None or not file.values:
        problems.raise_any(error)
        raise error(f"no tensors in {WEIGHTS_FILE}")
    keys = sort_keys(file.values, problems)
    modules = build_modules(keys, file.values, settings, problems)
    tokens = read_tokens(keys, file.values, settings.config, problems)
    problems.raise_any(error)
    _warn(root, settings, modules)
    return PeftAdapter(
        config=config,
        modules=modules,
        saved={name: file.values[key] for name, key in sorted(keys.saved.items())},
        tokens=tokens,
        unknown=tuple(sorted([*keys.unknown, *file.unknown])),
        dtypes={name: file.dtypes[key] for name, key in canonical_keys(keys, modules).items()},
    )


def peft_error(root: Path, problems: str) -> AdapterFileError:
    expected = "a LoRA adapter as PEFT saves it, whose whole effect is in A, B and magnitudes"
    return invalid_file(root, expected, problems, "correct it in PEFT and save it again")


class _Tensors:
    """The tensors of a file whose dtypes are read, and the keys of the others."""

    def __init__(self, problems: Problems) -> None:
        self.values: dict[str, Array] = {}
        self.dtypes: dict[str, str] = {}
        self.unknown: list[str] = []
        self._problems = problems

    def add(self, key: str, array: Array) -> None:
        self.values[key], self.dtypes[key] = widened(array), array.dtype.name
        if not np.isfinite(self.values[key]).all():
            self._problems.add(f"{key}: NaN or infinity")

    def leave_out(self, key: str, code: str) -> None:
        """Refuse a factor of integers; a count of batches in a batch norm is only left out."""
        if is_factor(key):
            self._problems.add(f"{key}: dtype {code}, expected one of {sorted(DTYPES)}")
        else:
            self.unknown.append(key)


def _read_config(root: Path, problems: Problems) -> dict[str, Any]:
    """The config; an empty one, and the reason in `problems`, where it cannot be read."""
    file = root / CONFIG_FILE
    with problems.caught(AdapterFileError):
        with opened(file) as stream:
            check_size(file, os.fstat(stream.fileno()).st_size, CONFIG_LIMIT)
            config = parsed_json(stream.readall(), file)
        if not config:
            problems.add(f"an empty {CONFIG_FILE}")
        return config
    return {}


def _read_tensors(root: Path, problems: Problems) -> _Tensors:
    """The tensors; none, and the reason in `problems`, where they cannot be read."""
    tensors, file = _Tensors(problems), root / WEIGHTS_FILE
    with problems.caught(AdapterFileError):
        for key, entry in _entries(file):
            if entry["dtype"] in DTYPES:
                tensors.add(key, as_array(file, key, entry))
            else:
                tensors.leave_out(key, entry["dtype"])
        return tensors
    return _Tensors(problems)


def _entries(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with opened(file) as stream:
        # Refuses a key that is written twice, of which `read_entries` would give one entry.
        parsed_json(read_header(file, stream), file)
        entries = read_entries(file, stream)
    for key in list(entries):
        yield key, entries.pop(key)  # which frees the memory of the entry before


def _check_other_files(root: Path) -> None:
    if (root / WEIGHTS_FILE).exists():
        return
    for pattern, (received, fix) in _OTHER_FILES.items():
        if any(root.glob(pattern)):
            raise invalid_file(
                root, f"an adapter with its tensors in {WEIGHTS_FILE}", received, fix
            )


def _warn(root: Path, settings: Settings, modules: Mapping[str, PeftModule]) -> None:
    unknown = unknown_fields(settings.config)
    if unknown:
        warn(
            f"{str(root)!r}: ignored the unknown fields {unknown} of the config; a newer version "
            "of PEFT than keras_lora knows may have written them, and they may change what the "
            "adapter computes."
        )
    plain = [name for name, module in modules.items() if not module.experts]
    others = [name for name in plain if not is_targeted(settings.config, name)]
    if others:
        warn(
            f"{str(root)!r}: read {others}, which target_modules, exclude_modules or "
            "layers_to_transform of the config leave out; PEFT would not load these modules."
        )
