"""What a path holds, told without opening more than a small JSON file."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from enum import StrEnum
from pathlib import Path
from typing import Any


class Kind(StrEnum):
    """The forms in which models and adapters lie on a disk."""

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
# Those that KerasHub, transformers and timm each write into a model's config.json.
_PRESET_FIELDS = {"registered_name", "model_type", "architecture"}
_HANDLE = re.compile(r"\w+://.+|(?!.*\.(keras|h5)$)\w[\w.]*")
CONFIG_FILE, TASK_FILE = "config.json", "task.json"
ADAPTER_CONFIG_FILE = "adapter_config.json"


def kind_of(path: str) -> Kind | None:
    """What is at a path, or None where it is nothing that is known here."""
    place = Path(path)
    if place.is_file():
        return _kind_of_file(place.name)
    return _kind_of_directory(place) if place.is_dir() else None


def is_handle(path: str) -> bool:
    """Whether this names a preset that KerasHub fetches: `hf://...`, or `bert_base_en`."""
    return not Path(path).exists() and bool(_HANDLE.fullmatch(path))


def check_kind(path: str, allowed: Collection[Kind]) -> Kind:
    """The kind of what is at a path.

    Raises:
        ValueError: it is none of these.
    """
    kind = kind_of(path)
    if kind is None and Kind.PRESET in allowed and is_handle(path):
        return Kind.PRESET
    if kind is None or kind not in allowed:
        there = NAMES[kind] if kind else _describe(Path(path))
        *others, last = [NAMES[k] for k in allowed]
        expected = f"{', '.join(others)} or {last}" if others else last
        raise refused(path, expected, there, "give the path of one")
    return kind


def check_free(path: str, kind: Kind, overwrite: bool) -> None:
    """Make sure that a file or directory of this kind may be written at a path.

    Only what is of the same kind is overwritten, so that a slip costs no directory of others.

    Raises:
        ValueError: something is there.
    """
    place = Path(path)
    if not place.exists() and not place.is_symlink():
        return
    if place.is_dir() and not any(place.iterdir()):
        return
    there = kind_of(path)
    if there is not kind:
        there_name = NAMES[there] if there else "something else"
        raise refused(path, f"{NAMES[kind]} or nothing", there_name, "remove it or write elsewhere")
    if not overwrite:
        raise refused(path, "nothing there", NAMES[kind], "pass --overwrite to replace it")


def size_of(path: str) -> int:
    """Bytes of a file, or of all files in a directory."""
    place = Path(path)
    files = [place] if place.is_file() else [f for f in place.rglob("*") if f.is_file()]
    return sum(file.stat().st_size for file in files)


def refused(path: str, expected: str, received: str, fix: str) -> ValueError:
    return ValueError(f"Invalid {path!r}: expected {expected}. Received: {received}; {fix}.")


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object, or an empty one where the file holds none."""
    try:
        value = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _kind_of_file(name: str) -> Kind | None:
    if name.endswith(".lora.h5"):
        return Kind.KERAS_HUB
    return Kind.KERAS if name.endswith(".keras") else None


def _kind_of_directory(place: Path) -> Kind | None:
    if (place / "adapter.safetensors").exists():
        return Kind.NATIVE
    if (place / ADAPTER_CONFIG_FILE).exists() or any(place.glob("adapter_model*")):
        return Kind.PEFT
    if (place / "saved_model.pb").exists():
        return Kind.SAVED_MODEL
    fields = _PRESET_FIELDS & read_json(place / CONFIG_FILE).keys()
    return Kind.PRESET if fields or (place / TASK_FILE).exists() else None


def _describe(place: Path) -> str:
    if not place.exists():
        return "nothing"
    return "a directory of something else" if place.is_dir() else "a file of another kind"
