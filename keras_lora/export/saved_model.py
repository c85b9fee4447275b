"""SavedModels that a server runs without Keras and without this package."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from keras_lora.config import invalid
from keras_lora.export.checking import GraphReport, check_saved_model
from keras_lora.export.signatures import input_specs, output_names
from keras_lora.files import PathLike
from keras_lora.inject import merged
from keras_lora.walker import lora_layers


@dataclass(frozen=True)
class Endpoint:
    """A signature of a SavedModel: a function of one structure of tensors, and what it takes."""

    name: str
    call: Callable[[Any], Mapping[str, tf.Tensor]]
    signature: Any


def export_saved_model(
    model: keras.Model,
    path: PathLike,
    *,
    input_signature: Any | None = None,
    overwrite: bool = False,
) -> GraphReport:
    """Write a merged SavedModel for TensorFlow Serving; the model itself is left as it was.

    Against `model.export`: variables are stored once (Keras stores them twice), inputs and
    outputs have names (those of the model's inputs; `output_names`, dict keys or `output_0`,
    `output_1`, ...), float16 and bfloat16 outputs become float32, and a graph that a server
    cannot run is refused. The batch axis is free, as are the axes that the model's inputs leave
    free. The signature is called `serving_default`.

    Args:
        model: A built model, adapted or plain, on the TensorFlow backend. Its active adapters
            are merged for the export alone.
        path: The directory to write; made whole beside it and then renamed.
        input_signature: For a subclassed model whose inputs are not all of its compute dtype: a
            structure of `tf.TensorSpec` or `keras.InputSpec` as its `call` takes it.
        overwrite: Replace `path` if it exists.

    Returns:
        A report on the graph.

    Raises:
        ValueError: another backend than TensorFlow, an unbuilt model, a path that exists, or a
            graph that a server cannot run (XLA or Python operations). Nothing is then written.

    Example:

    >>> import keras, keras_lora as kl, tempfile
    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(5, name="up")])
    >>> model = kl.apply_lora(model, kl.LoRAConfig(targets=["up"], rank=2))
    >>> kl.export_saved_model(model, tempfile.mkdtemp() + "/1").problems
    ()
    """
    target = Path(path)
    check_export(model, target, overwrite)
    endpoints = [serve_endpoint(model, input_signature)]
    with written_whole(target) as written:
        write_merged(model, endpoints, written)
        report = check_saved_model(written)
        if report.problems:
            raise ValueError(
                f"Expected a graph that TensorFlow Serving can run. Received: {model.name!r}, with "
                f"{'; '.join(report.problems)}."
            )
    return report


@contextlib.contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """A path to write, in a directory that goes; it becomes `target` if nothing is raised."""
    parent = target.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent, prefix=f".{target.name}-") as workspace:
        written = Path(workspace, "written")
        yield written
        if target.exists():
            target.rename(Path(workspace, "replaced"))
        written.rename(target)


def serve_endpoint(model: keras.Model, given: Any | None) -> Endpoint:
    """The model's own outputs."""

    def serve(inputs: Any) -> dict[str, tf.Tensor]:
        outputs = model(inputs, training=False)
        leaves = keras.tree.flatten(outputs)
        return dict(zip(output_names(model, outputs), map(_servable, leaves), strict=True))

    return Endpoint("serve", serve, input_specs(model, given))


def write_merged(model: keras.Model, endpoints: Sequence[Endpoint], path: Path) -> None:
    """A SavedModel of the endpoints, with the active adapters of the model merged meanwhile."""
    with merged(model) if lora_layers(model) else contextlib.nullcontext():
        _write(endpoints, path)


def _write(endpoints: Sequence[Endpoint], path: Path) -> None:
    archive = keras.export.ExportArchive()
    # Not `track`: it would store every variable a second time (keras issue 23553).
    for endpoint in endpoints:
        archive.add_endpoint(endpoint.name, endpoint.call, input_signature=[endpoint.signature])
    archive.write_out(path, verbose=False)


def check_export(model: keras.Model, target: Path, overwrite: bool) -> None:
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


def _servable(output: tf.Tensor) -> tf.Tensor:
    return tf.cast(output, tf.float32) if output.dtype in (tf.float16, tf.bfloat16) else output
