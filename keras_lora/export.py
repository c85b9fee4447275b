"""SavedModels that a server runs without Keras and without this package.

Private Keras API in this file, and why (`tests/test_private_api.py` watches each):
    `_build_shapes_dict`: what a subclassed model was built for, which is all that is known of
        its inputs.
"""

from __future__ import annotations

import contextlib
import itertools
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf
from google.protobuf.message import DecodeError
from tensorflow.core.framework import types_pb2
from tensorflow.core.protobuf import saved_model_pb2

from keras_lora.config import invalid
from keras_lora.files import PathLike
from keras_lora.inject import merged
from keras_lora.walker import lora_layers

# TensorFlow Serving's REST API has no JSON form of these.
_LOW_PRECISION = {types_pb2.DT_HALF, types_pb2.DT_BFLOAT16}
_PYTHON_OPS = {"PyFunc", "PyFuncStateless", "EagerPyFunc", "NumpyFunction"}


@dataclass(frozen=True)
class GraphReport:
    """What `check_saved_model` found.

    Attributes:
        operations: Number of operations, functions included.
        problems: What a server cannot run, one sentence each; empty where all is well.
        text_operations: Operations of tensorflow-text, which a server must have linked in.
    """

    operations: int
    problems: Sequence[str]
    text_operations: Sequence[str]


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
    _check_export(model, target, overwrite)
    signature = _input_specs(model, input_signature)
    target.absolute().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        dir=target.absolute().parent, prefix=f".{target.name}-"
    ) as workspace:
        written = Path(workspace, "written")
        with merged(model) if lora_layers(model) else contextlib.nullcontext():
            _write(model, signature, written)
        report = check_saved_model(written)
        if report.problems:
            raise ValueError(
                f"Expected a graph that TensorFlow Serving can run. Received: {model.name!r}, with "
                f"{'; '.join(report.problems)}."
            )
        if target.exists():
            target.rename(Path(workspace, "replaced"))
        written.rename(target)
    return report


def check_saved_model(path: PathLike) -> GraphReport:
    """Read a SavedModel's graph and say what a server with its default settings cannot run.

    Args:
        path: The directory of a SavedModel.

    Returns:
        The report; `problems` is empty where nothing was found.

    Raises:
        ValueError: there is no readable `saved_model.pb`.
    """
    graph = _read_graph(Path(path))
    nodes = list(_nodes(graph))
    ops = {node.op for node in nodes}
    problems = [_XLA.format(op=op) for op in sorted(ops) if op.startswith("Xla")]
    if _must_compile(graph):
        problems.append("a function compiled with jit_compile=True: compile with jit_compile=False")
    problems += [_PYTHON.format(op=op) for op in sorted(ops & _PYTHON_OPS)]
    for name, info in _signature_tensors(graph):
        if info.dtype in _LOW_PRECISION:
            dtype = types_pb2.DataType.Name(info.dtype)
            problems.append(f"{name} of type {dtype}, which has no JSON form: cast it to float32")
    text = sorted(op for op in ops if op.startswith("TFText>"))
    return GraphReport(len(nodes), tuple(problems), tuple(text))


_XLA = "the operation {op}, which needs XLA, and servers have it off: avoid jit-compiled code"
_PYTHON = "the operation {op}, which runs Python: use TensorFlow or keras.ops operations instead"


def _check_export(model: keras.Model, target: Path, overwrite: bool) -> None:
    if keras.backend.backend() != "tensorflow":
        raise invalid(
            "backend",
            "the TensorFlow backend for a SavedModel",
            keras.backend.backend(),
            "merge, save to .keras and export in a process with KERAS_BACKEND=tensorflow",
        )
    if not isinstance(model, keras.Model) or not model.built:
        raise invalid("model", "a built keras.Model", model, "call it on a batch first")
    if target.exists() and not overwrite:
        raise invalid("path", "a path that does not exist", str(target), "pass overwrite=True")


def _input_specs(model: keras.Model, given: Any | None) -> Any:
    """The structure of `tf.TensorSpec` that the model is called with, each leaf with its name."""
    if given is not None:
        structure = given
    elif isinstance(model, keras.Sequential):
        (structure,) = model.inputs
    elif getattr(model, "inputs", None) is not None:
        structure = model.input
    else:
        structure = _built_for(model)
    leaves = keras.tree.flatten(structure)
    names = _leaf_names(structure, "input")
    specs = [_tensor_spec(leaf, name) for leaf, name in zip(leaves, names, strict=True)]
    return keras.tree.pack_sequence_as(structure, specs)


def _built_for(model: keras.Model) -> Any:
    shapes = model._build_shapes_dict or {}
    if len(shapes) != 1:
        raise invalid(
            "model",
            "a model with symbolic inputs, or one built for a single structure of inputs",
            f"{model.name!r} built for {dict(shapes)}",
            "pass input_signature",
        )
    (structure,) = shapes.values()
    return _specs_of_shapes(structure, model.input_dtype)


def _specs_of_shapes(structure: Any, dtype: str) -> Any:
    """A structure of shapes, as a structure of specs: a shape is itself a tuple."""
    if isinstance(structure, Mapping):
        return {key: _specs_of_shapes(value, dtype) for key, value in structure.items()}
    if all(size is None or isinstance(size, int) for size in structure):
        return keras.InputSpec(shape=(None, *structure[1:]), dtype=dtype)
    return [_specs_of_shapes(value, dtype) for value in structure]


def _tensor_spec(leaf: Any, name: str) -> tf.TensorSpec:
    shape = tuple(leaf.shape)
    return tf.TensorSpec((None, *shape[1:]), leaf.dtype, name=getattr(leaf, "name", None) or name)


def _leaf_names(structure: Any, prefix: str) -> list[str]:
    """A name for each leaf: its key in a dict, or `<prefix>_<position>`."""
    if isinstance(structure, Mapping) and not any(map(keras.tree.is_nested, structure.values())):
        return [str(key) for key in sorted(structure)]
    return [f"{prefix}_{i}" for i in range(len(keras.tree.flatten(structure)))]


def _write(model: keras.Model, signature: Any, path: Path) -> None:
    def serve(inputs: Any) -> dict[str, tf.Tensor]:
        outputs = model(inputs, training=False)
        leaves = keras.tree.flatten(outputs)
        return dict(zip(_output_names(model, outputs), map(_servable, leaves), strict=True))

    archive = keras.export.ExportArchive()
    # Not `track`: it would store every variable a second time (keras issue 23553).
    archive.add_endpoint("serve", serve, input_signature=[signature])
    archive.write_out(path, verbose=False)


def _output_names(model: keras.Model, outputs: Any) -> list[str]:
    names = getattr(model, "output_names", None)
    if isinstance(model, keras.Sequential):
        return [model.layers[-1].name]
    if isinstance(outputs, Mapping) or names is None:
        return _leaf_names(outputs, "output")
    return [n if names.count(n) == 1 else f"{n}_{i}" for i, n in enumerate(names)]


def _servable(output: tf.Tensor) -> tf.Tensor:
    return tf.cast(output, tf.float32) if output.dtype in (tf.float16, tf.bfloat16) else output


def _read_graph(path: Path) -> saved_model_pb2.SavedModel:
    file = path / "saved_model.pb"
    try:
        return saved_model_pb2.SavedModel.FromString(file.read_bytes())
    except (OSError, DecodeError) as error:
        raise ValueError(f"Expected a SavedModel. Received: {file}: {error}.") from error


def _nodes(graph: saved_model_pb2.SavedModel) -> Iterator[Any]:
    for meta in graph.meta_graphs:
        yield from meta.graph_def.node
        for function in meta.graph_def.library.function:
            yield from function.node_def


def _must_compile(graph: saved_model_pb2.SavedModel) -> bool:
    functions = (f for meta in graph.meta_graphs for f in meta.graph_def.library.function)
    return any(
        "_XlaMustCompile" in item.attr and item.attr["_XlaMustCompile"].b
        for item in itertools.chain(_nodes(graph), functions)
    )


def _signature_tensors(graph: saved_model_pb2.SavedModel) -> Iterator[tuple[str, Any]]:
    for meta in graph.meta_graphs:
        for name, signature in meta.signature_def.items():
            for kind, tensors in (("input", signature.inputs), ("output", signature.outputs)):
                for key, info in tensors.items():
                    yield f"the {kind} {key!r} of {name!r}", info
