"""The steps that every export has: checking the model, and writing it merged."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path

import keras

from keras_lora.checks import invalid
from keras_lora.export.endpoints import Endpoint, write_endpoints
from keras_lora.inject import is_merged_apart, merged
from keras_lora.walker import lora_layers

# What a SavedModel's directory can have, by TensorFlow, Keras 2 and this package.
_PARTS = {
    "saved_model.pb",
    "variables",
    "assets",
    "assets.extra",
    "debug",
    "fingerprint.pb",
    "keras_metadata.pb",
}


def check_export(
    model: keras.Model, target: Path, overwrite: bool, foreign: Callable[[Path], str]
) -> None:
    """Refuse another backend than TensorFlow, an unbuilt model, and a path that exists.

    Args:
        model: The model.
        target: The path to write.
        overwrite: Whether a file or directory of the kind that is written may be replaced.
        foreign: For a path that exists, what is there that is not of this kind, or "".

    Raises:
        ValueError: one of these.
    """
    if keras.backend.backend() != "tensorflow":
        raise invalid(
            "backend",
            "the TensorFlow backend to export",
            keras.backend.backend(),
            "merge, save to .keras and export in a process with KERAS_BACKEND=tensorflow",
        )
    if not isinstance(model, keras.Model) or not model.built:
        raise invalid("model", "a built keras.Model", model, "call it on a batch first")
    if target.exists() and not overwrite:
        raise invalid("path", "a path that does not exist", str(target), "pass overwrite=True")
    found = foreign(target) if target.exists() else ""
    if found:
        raise invalid(
            "path",
            "a path that does not exist, or one of what is written, to overwrite",
            f"{str(target)!r}, {found}",
            "remove it, or write elsewhere",
        )


def no_saved_model(target: Path) -> str:
    """What makes a path no SavedModel and nothing else; "" for an empty directory too."""
    if not target.is_dir():
        return "a file"
    names = {item.name for item in target.iterdir()}
    if names and "saved_model.pb" not in names:
        return f"a directory without saved_model.pb, with {sorted(names)[:5]}"
    others = sorted(names - _PARTS)
    return f"a SavedModel with other files beside it, {others[:5]}" if others else ""


def no_file(target: Path, mark: bytes, where: int) -> str:
    """What makes a path no file with these bytes at this place; "" for an empty file too."""
    if not target.is_file():
        return "a directory"
    with target.open("rb") as file:
        beginning = file.read(where + len(mark))
    return "a file of another kind" if beginning and beginning[where:] != mark else ""


def write_merged(model: keras.Model, endpoints: Sequence[Endpoint], path: Path) -> None:
    """Write a SavedModel of the endpoints; the model is merged until it is written.

    Adapters on quantized layers are served beside them: integers cannot take them exactly.
    """
    banks = [bank for layer in lora_layers(model).values() for bank in layer.banks.values()]
    apart = not banks or any(map(is_merged_apart, banks))
    with contextlib.nullcontext() if apart else merged(model):
        write_endpoints(model, endpoints, path)
