"""The kind of model or adapter at a path, found without opening more than a small JSON file."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from enum import StrEnum
from pathlib import Path
from typing import Any


class Kind(StrEnum):
    """The formats of models and adapters on a disk."""

    KERAS = "keras"
    PRESET = "preset"
    SAVED_MODEL = "saved-model"
    NATIVE = "native"
    PEFT = "peft"
    KERAS_HUB = "keras-hub"


ADAPTERS = (Kind.NATIVE, Kind.PEFT, Kind.KERAS_HUB)
BASES = (Kind.KERAS, Kind.PRESET)
NAMES = {
    Kind.KERAS: "a .keras file",
    Kind.PRESET: "a preset directory",
    Kind.SAVED_MODEL: "a SavedModel directory",
    Kind.NATIVE: "an adapter's directory",
    Kind.PEFT: "an adapter's directory of PEFT",
    Kind.KERAS_HUB: "a .lora.h5 file",
}
# The fields by which a config.json of KerasHub, transformers or timm is known as a model's.
_PRESET_FIELDS = {"registered_name", "model_type", "architecture"}
_HANDLE = re.compile(r"\w+://.+|(?!.*\.(keras|h5)$)\w[\w.]*")
CONFIG_FILE, TASK_FILE = "config.json", "task.json"
ADAPTER_CONFIG_FILE = "adapter_config.json"


def kind_of(path: str) -> Kind | None:
    """The kind of the file or directory at a path; None if it is none of `Kind`."""
    file = Path(path)
    if file.is_file():
        return _kind_of_file(file.name)
    return _kind_of_directory(file) if file.is_dir() else None


def is_handle(path: str) -> bool:
    """Whether this names a preset that KerasHub fetches: `hf://...`, or `bert_base_en`."""
    return not Path(path).exists() and bool(_HANDLE.fullmatch(path))


def check_kind(path: str, allowed: Collection[Kind]) -> Kind:
    """The kind of the file or directory at a path.

    Raises:
        ValueError: it is none of the allowed kinds.
    """
    kind = kind_of(path)
    if kind is None and Kind.PRESET in allowed and is_handle(path):
        return Kind.PRESET
    if kind is None or kind not in allowed:
        received = NAMES[kind] if kind else _describe(Path(path))
        *others, last = [NAMES[k] for k in allowed]
        expected = f"{', '.join(others)} or {last}" if others else last
        raise refused(path, expected, received, "give the path of one")
    return kind


def check_free(path: str, kind: Kind, overwrite: bool) -> None:
    """Make sure that a file or directory of this kind may be written at a path.

    Only a file or directory of the same kind is overwritten, so that a wrong path costs nothing.

    Raises:
        ValueError: the path exists, and is of another kind or not to be overwritten.
    """
    target = Path(path)
    if not target.exists() and not target.is_symlink():
        return
    if target.is_dir() and not any(target.iterdir()):
        return
    found = kind_of(path)
    if found is not kind:
        name = NAMES[found] if found else "something else"
        raise refused(path, f"{NAMES[kind]} or nothing", name, "remove it or write elsewhere")
    if not overwrite:
        raise refused(path, "a free path", NAMES[kind], "pass --overwrite to replace it")


def size_of(path: str) -> int:
    """Bytes of a file, or of all files in a directory."""
    root = Path(path)
    files = [root] if root.is_file() else [f for f in root.rglob("*") if f.is_file()]
    return sum(file.stat().st_size for file in files)


def refused(path: str, expected: str, received: str, fix: str) -> ValueError:
    return ValueError(f"Invalid {path!r}: expected {expected}. Received: {received}; {fix}.")


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file, or an empty one if the file has none."""
    try:
        value = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _kind_of_file(name: str) -> Kind | None:
    if name.endswith(".lora.h5"):
        return Kind.KERAS_HUB
    return Kind.KERAS if name.endswith(".keras") else None


def _kind_of_directory(root: Path) -> Kind | None:
    if (root / "adapter.safetensors").exists():
        return Kind.NATIVE
    if (root / ADAPTER_CONFIG_FILE).exists() or any(root.glob("adapter_model*")):
        return Kind.PEFT
    if (root / "saved_model.pb").exists():
        return Kind.SAVED_MODEL
    fields = _PRESET_FIELDS & read_json(root / CONFIG_FILE).keys()
    return Kind.PRESET if fields or (root / TASK_FILE).exists() else None


def _describe(root: Path) -> str:
    if not root.exists():
        return "nothing"
    return "a directory of something else" if root.is_dir() else "a file of another kind"
