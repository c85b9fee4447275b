"""The steps from a model to a file of another runtime: merge, convert, run, compare, write.

A file is written only after its runtime has run it and has given the model's answers.
"""

from __future__ import annotations

import contextlib
import importlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import keras
import numpy as np
import tensorflow as tf

from keras_lora.checks import invalid
from keras_lora.export.endpoints import Endpoint
from keras_lora.export.reports import RuntimeReport, Shape
from keras_lora.export.writing import write_merged
from keras_lora.files.atomic import replaced
from keras_lora.walker import walk

Arrays: TypeAlias = Mapping[str, np.ndarray]

TOLERANCE = 1e-4
# A file of either kind, and the graph to convert, has at most 2 GiB, and has more than weights.
WEIGHTS_LIMIT = 2_000_000_000
_LOW_PRECISION = ("float16", "bfloat16")
# The batches to compare on: the size of the batch, and of every other axis that is free.
_SIZES = ((1, 7), (3, 5))


@dataclass(frozen=True)
class Program:
    """A file that its runtime has loaded."""

    inputs: Mapping[str, Shape]
    outputs: tuple[str, ...]
    run: Callable[[Arrays], Arrays]


@dataclass(frozen=True)
class Runtime:
    """A runtime: how a SavedModel is converted to its file, and how the file is loaded.

    Attributes:
        name: The name in messages.
        extra: The extra of this package that installs `packages`.
        packages: The packages that `convert` and `load` import.
        convert: From the directory of a SavedModel to the content of a file.
        load: From the content of a file to a program.
    """

    name: str
    extra: str
    packages: tuple[str, ...]
    convert: Callable[[Path], bytes]
    load: Callable[[bytes], Program]


def write_converted(
    model: keras.Model, endpoint: Endpoint, target: Path, runtime: Runtime, sample: Any | None
) -> RuntimeReport:
    """Write the endpoint of the merged model for a runtime, if the runtime gives its answers.

    Args:
        model: The model, adapted or plain.
        endpoint: The endpoint to convert, of this model.
        target: The file to write.
        runtime: The runtime.
        sample: A batch of inputs to compare on; random ones if None.

    Raises:
        ImportError: a package of the runtime is not installed.
        ValueError: the runtime cannot run this model.
    """
    _check_packages(runtime)
    _check_precision(model)
    _check_size(model, runtime)
    with _in_float32(model):
        batches = _batches(endpoint, sample)
        expected = [_answers(endpoint, batch) for batch in batches]
        with replaced(target) as written:
            saved_model = written.with_name(f"{written.name}.saved_model")
            write_merged(model, [endpoint], saved_model)
            data = _tried(runtime, runtime.convert, saved_model)
            program = _tried(runtime, runtime.load, data)
            difference = max(
                _compared(runtime, program, batch, answers)
                for batch, answers in zip(batches, expected, strict=True)
            )
            written.write_bytes(data)
    return RuntimeReport(program.inputs, program.outputs, difference)


class UnsupportedError(ValueError):
    """A runtime cannot run this model; the message gives the reason and the fix."""

    def __init__(self, runtime: str, reason: object, fix: str = "") -> None:
        fix = fix or "export it to a SavedModel instead: export_saved_model"
        super().__init__(f"Expected a model that {runtime} can run. Received: {reason}; {fix}.")


def package(name: str, extra: str) -> Any:
    """An optional package.

    Raises:
        ImportError: it is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        fix = f'pip install "keras-lora[{extra}]"'
        raise ImportError(f"Expected the package {name!r}. Received: {error}; {fix}.") from error


def _check_packages(runtime: Runtime) -> None:
    for name in runtime.packages:
        package(name, runtime.extra)


def _check_precision(model: keras.Model) -> None:
    """Refuse float16 and bfloat16 weights: neither runtime computes with them as Keras does."""
    low = [path for path, layer in _low_precision(model) if layer.variable_dtype != "float32"]
    if low:
        raise invalid(
            "model",
            "weights in float32 (mixed precision is fine: the file then computes in float32)",
            f"{model.name!r}, with {len(low)} layers of float16 or bfloat16: {low[:3]}, ...",
            "build the model with dtype='float32', and load the weights into it",
        )


def _low_precision(model: keras.Model) -> list[tuple[str, keras.layers.Layer]]:
    layers = [(model.name, model), *((node.path, node.layer) for node in walk(model))]
    return [(path, x) for path, x in layers if x.compute_dtype in _LOW_PRECISION]


def _check_size(model: keras.Model, runtime: Runtime) -> None:
    size = sum(math.prod(v.shape) * tf.as_dtype(v.dtype).size for v in model.variables)
    if size > WEIGHTS_LIMIT:
        raise UnsupportedError(runtime.name, f"{size} bytes of weights, more than {WEIGHTS_LIMIT}")


@contextlib.contextmanager
def _in_float32(model: keras.Model) -> Iterator[None]:
    """Within the context layers of mixed precision compute in float32, the type of their weights.

    No runtime rounds between operations as mixed precision does.
    """
    policies = [(layer, layer.dtype_policy) for _, layer in _low_precision(model)]
    for layer, _ in policies:
        layer.dtype_policy = "float32"
    try:
        yield
    finally:
        for layer, policy in policies:
            layer.dtype_policy = policy


def _batches(endpoint: Endpoint, sample: Any | None) -> list[Arrays]:
    """Inputs by their names: the sample, or random inputs of two sizes."""
    specs = keras.tree.flatten(endpoint.signature)
    if any(spec.dtype == tf.string for spec in specs):
        fix = "export the part of the model after the string operations"
        raise invalid("model", "inputs that are numbers", "strings", fix)
    if sample is None:
        rng = np.random.default_rng(0)
        return [{s.name: _random(s, rng, *sizes) for s in specs} for sizes in _SIZES]
    leaves = keras.tree.flatten(sample)
    if len(leaves) != len(specs):
        names = [spec.name for spec in specs]
        raise invalid("sample", f"an array for each of {names}", f"{len(leaves)} arrays")
    pairs = zip(specs, leaves, strict=True)
    return [{spec.name: np.asarray(leaf, spec.dtype.as_numpy_dtype) for spec, leaf in pairs}]


def _random(spec: tf.TensorSpec, rng: np.random.Generator, batch: int, size: int) -> np.ndarray:
    first, *rest = [None, *spec.shape[1:]] if spec.shape[0] is None else spec.shape
    shape = (first or batch, *(size if axis is None else axis for axis in rest))
    if spec.dtype.is_floating:
        return rng.normal(size=shape).astype(spec.dtype.as_numpy_dtype)
    # Every vocabulary and every mask has 0 and 1. A row of only zeros would be wholly masked.
    values = rng.integers(0, 2, shape)
    values[..., 0] = 1
    return values.astype(spec.dtype.as_numpy_dtype)


def _answers(endpoint: Endpoint, batch: Arrays) -> Arrays:
    """The model's own answers."""
    tensors = [tf.constant(value) for value in batch.values()]
    try:
        outputs = endpoint.call(keras.tree.pack_sequence_as(endpoint.signature, tensors))
    except Exception as error:  # the model's own code may raise any class
        raise _unfit(batch, error) from error
    answers = {name: np.array(value) for name, value in outputs.items()}
    if not all(np.isfinite(value).all() for value in answers.values()):
        raise _unfit(batch, "NaN or infinity")
    return answers


def _unfit(batch: Arrays, answer: object) -> ValueError:
    shapes = {name: value.shape for name, value in batch.items()}
    return ValueError(
        f"Expected finite answers of the model to compare with, for inputs of the shapes {shapes}. "
        f"Received: {answer}; pass `sample`, a batch of inputs as `predict` takes it."
    )


def _tried(runtime: Runtime, action: Callable[[Any], Any], argument: object) -> Any:
    try:
        return action(argument)
    except UnsupportedError:
        raise
    except Exception as error:  # converters and runtimes raise classes of their own
        raise UnsupportedError(runtime.name, f"{type(error).__name__}: {error}") from error


def _compared(runtime: Runtime, program: Program, batch: Arrays, expected: Arrays) -> float:
    """The largest difference, relative to the largest value of the output if that is above 1."""
    received = _tried(runtime, program.run, batch)
    differences = {name: _difference(received[name], expected[name]) for name in expected}
    wrong = {name: d for name, d in differences.items() if not d <= TOLERANCE}
    if wrong:
        reason = (
            f"answers that differ from the model's by {wrong} (inf: other shape), above {TOLERANCE}"
        )
        raise UnsupportedError(runtime.name, reason)
    return max(differences.values())


def _difference(received: np.ndarray, expected: np.ndarray) -> float:
    if received.shape != expected.shape:
        return math.inf
    wide = expected.astype("float64")
    scale = max(1.0, np.max(np.abs(wide), initial=0.0))
    return float(np.max(np.abs(received - wide), initial=0.0) / scale)
