"""Read an adapter's directory as `PeftModel.save_pretrained` writes it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from keras_lora.checks import AdapterFileError, warn
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
_OTHER_FILES = {
    "adapter_model.bin": (
        "its tensors are in adapter_model.bin, which would have to be unpickled; load it in PEFT "
        "and save it by save_pretrained(..., safe_serialization=True)"
    ),
    "adapter_model*-of-*.safetensors": (
        "its tensors are in several files; load it in PEFT and save it by save_pretrained"
    ),
    TENSORS_FILE: "it is an adapter of keras_lora itself; read it by load_adapter",
}

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class PeftAdapter:
    """What a directory of PEFT holds.

    Attributes:
        config: `adapter_config.json`, as read.
        modules: What is added to each module, `{name in the base model: PeftModule}`.
        saved: Parameters that take the place of the base's, `{full name: value}`: those of
            `modules_to_save`, trained biases, and embeddings that were saved with the adapter.
        unknown: The keys of the file that are not understood, and not in the above.
        dtypes: `{key: dtype}` of each tensor in the file, the key being as PEFT 0.21 writes it.
            Given to `write_peft_adapter` as `dtype`, the same bytes are written again.
    """

    config: Mapping[str, Any]
    modules: Mapping[str, PeftModule]
    saved: Mapping[str, Array]
    unknown: tuple[str, ...]
    dtypes: Mapping[str, str]


def read_peft_adapter(directory: PathLike) -> PeftAdapter:
    """Read a LoRA adapter of Hugging Face PEFT, after checking all of it.

    Nothing in it is executed or used as a path; the regular expressions of `rank_pattern`,
    `alpha_pattern` and `target_modules` are matched, as PEFT does. The files may be links, as in
    a snapshot of the Hugging Face cache. Values of 16 bits are widened to float32. Peak memory is
    three times the size of the files and 1.5 kilobytes a tensor.

    Args:
        directory: The directory of an adapter.

    Returns:
        The adapter. A `UserWarning` names the fields of the config that this version of the
        package does not know, and the modules that PEFT would leave alone although the file has
        tensors for them.

    Raises:
        AdapterFileError: everything at once that is wrong with the directory: a file that is
            missing or malformed; a `peft_type` other than LoRA; a field that changes the
            computation in a way that A and B do not tell; tensors that are not finite, of another
            dtype or shape than the config says, or one without the other.

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
    root = Path(directory)
    problems: list[str] = []
    config = _attempt(problems, _read_config, root) or {}
    settings = parse_config(config, problems) if config else None
    file = _attempt(problems, _read_tensors, root) or _Tensors()
    problems += file.problems
    if settings is None or not file.values:
        raise peft_error(root, problems or [f"no tensors in {WEIGHTS_FILE}"])
    keys = sort_keys(file.values, problems)
    modules = build_modules(keys, file.values, settings, problems)
    if problems:
        raise peft_error(root, problems)
    _warn(root, settings, modules)
    return PeftAdapter(
        config=config,
        modules=modules,
        saved={name: file.values[key] for name, key in sorted(keys.saved.items())},
        unknown=tuple(sorted([*keys.unknown, *file.unknown])),
        dtypes={name: file.dtypes[key] for name, key in canonical_keys(keys, modules).items()},
    )


def peft_error(root: Path, problems: list[str]) -> AdapterFileError:
    return AdapterFileError(
        f"Invalid {str(root)!r}: expected a LoRA adapter as PEFT saves it, all of which acts "
        f"through A and B. Received: {'; '.join(problems)}. Correct or convert it in PEFT and "
        "save it again."
    )


@dataclass
class _Tensors:
    values: dict[str, Array] = field(default_factory=dict)
    dtypes: dict[str, str] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def add(self, key: str, array: Array) -> None:
        self.values[key], self.dtypes[key] = widened(array), array.dtype.name
        if not np.isfinite(self.values[key]).all():
            self.problems.append(f"{key}: NaN or infinity")

    def leave(self, key: str, code: str) -> None:
        """Of integers are a count of batches and the like, but no factor."""
        if is_factor(key):
            self.problems.append(f"{key}: dtype {code}, expected one of {sorted(DTYPES)}")
        else:
            self.unknown.append(key)


def _attempt(problems: list[str], read: Callable[[Path], T], root: Path) -> T | None:
    try:
        return read(root)
    except AdapterFileError as error:
        problems.append(str(error))
        return None


def _read_config(root: Path) -> dict[str, Any]:
    file = root / CONFIG_FILE
    with opened(file, links=True) as stream:
        check_size(file, os.fstat(stream.fileno()).st_size, CONFIG_LIMIT)
        config = parsed_json(stream.readall(), file)
    if not config:
        raise peft_error(root, [f"an empty {CONFIG_FILE}"])
    return config


def _read_tensors(root: Path) -> _Tensors:
    file = root / WEIGHTS_FILE
    _check_other_files(root)
    with opened(file, links=True) as stream:
        # An entry written twice would be one of the two by chance.
        parsed_json(read_header(file, stream), file)
        entries = read_entries(file, stream)
    tensors = _Tensors()
    for key in list(entries):
        entry = entries.pop(key)  # so that not all are there twice
        if entry["dtype"] in DTYPES:
            tensors.add(key, as_array(file, key, entry))
        else:
            tensors.leave(key, entry["dtype"])
    return tensors


def _check_other_files(root: Path) -> None:
    """Say what to do with the usual others, if what is read here is missing."""
    if (root / WEIGHTS_FILE).exists():
        return
    found = [fix for name, fix in _OTHER_FILES.items() if any(root.glob(name))]
    if found:
        raise peft_error(root, found)


def _warn(root: Path, settings: Settings, modules: Mapping[str, PeftModule]) -> None:
    unknown = unknown_fields(settings.config)
    if unknown:
        _say(
            f"{str(root)!r}: ignored the unknown fields {unknown} of its config; a newer PEFT than "
            "keras_lora knows may have written them, and they may change what the adapter does."
        )
    others = [name for name in modules if not is_targeted(settings.config, name)]
    if others:
        _say(
            f"{str(root)!r}: read {others}, which its target_modules, exclude_modules or "
            "layers_to_transform leave out; PEFT would not load these."
        )


def _say(message: str) -> None:
    warn(message)
