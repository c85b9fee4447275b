"""The signatures of a SavedModel, and the writing of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf


@dataclass(frozen=True)
class Endpoint:
    """A signature of a SavedModel: a function of one structure of tensors, and what it takes."""

    name: str
    call: Callable[[Any], Mapping[str, tf.Tensor]]
    signature: Any


def write_endpoints(
    endpoints: Sequence[Endpoint], path: Path, resources: Sequence[Any] = ()
) -> None:
    """Write a SavedModel of these endpoints, and of resources that it needs beside variables."""
    archive = keras.export.ExportArchive()
    # Not `track(model)`: it would store every variable a second time (keras issue 23553).
    for resource in resources:
        archive.track(resource)
    for endpoint in endpoints:
        archive.add_endpoint(endpoint.name, endpoint.call, input_signature=[endpoint.signature])
    archive.write_out(path, verbose=False)
