"""The steps that every export has: checking the model, and writing it merged."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

import keras

from keras_lora.checks import invalid
from keras_lora.export.endpoints import Endpoint, write_endpoints
from keras_lora.inject import merged
from keras_lora.walker import lora_layers


def check_export(model: keras.Model, target: Path, overwrite: bool) -> None:
    """Refuse another backend than TensorFlow, an unbuilt model, and a path that exists.

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


def write_merged(model: keras.Model, endpoints: Sequence[Endpoint], path: Path) -> None:
    """Write a SavedModel of the endpoints; the model is merged until it is written."""
    with merged(model) if lora_layers(model) else contextlib.nullcontext():
        write_endpoints(model, endpoints, path)
