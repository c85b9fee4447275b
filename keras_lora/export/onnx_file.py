"""ONNX files, which `onnxruntime` runs without Keras, TensorFlow and this package.

The SavedModel is converted by `tf2onnx`. Of it this module uses, beyond its documented
`tf2onnx.convert`: `tf2onnx.tf_loader.from_saved_model`, the Python form of its command line, and
the graph that it hands to the handler of an operation.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras

from keras_lora.export.conversion import (
    Arrays,
    Program,
    Runtime,
    RuntimeReport,
    UnsupportedError,
    package,
    write_converted,
)
from keras_lora.export.saved_model import check_export, serve_endpoint
from keras_lora.files import PathLike

_EXTRA = "onnx"
_OPSET = 18  # the newest that tf2onnx writes


def export_onnx(
    model: keras.Model,
    path: PathLike,
    *,
    input_signature: Any | None = None,
    sample: Any | None = None,
    overwrite: bool = False,
) -> RuntimeReport:
    """Write a merged `.onnx` file, and see that `onnxruntime` gives the model's answers with it.

    The model itself is left as it was. Inputs and outputs have the names that
    `export_saved_model` gives them; the batch axis is free, as are the axes that the model's
    inputs leave free. Exact GELU, whose `Erfc` ONNX does not have, is written with `Erf`.

    Needs `pip install "keras-lora[onnx]"`.

    Args:
        model: A built model, adapted or plain, on the TensorFlow backend. Its active adapters
            are merged for the export alone. One of mixed precision computes in float32 there.
        path: The file to write, such as `"model.onnx"`; made whole beside it and then renamed.
        input_signature: As for `export_saved_model`.
        sample: A batch of inputs as `predict` takes it, on which the answers are compared;
            without it, two random ones. Where sizes are free, these have 7 and 5.
        overwrite: Replace `path` if it exists.

    Returns:
        The names and shapes, and the largest difference of the answers.

    Raises:
        ImportError: a package of the extra is not installed.
        ValueError: another backend than TensorFlow, an unbuilt model, a path that exists, weights
            in low precision or above 2 GB, an operation that ONNX does not have, or answers that
            differ by more than 1e-4 (of the largest, where that is above 1). Nothing is then
            written.

    Example:

    >>> import keras, keras_lora as kl, tempfile
    >>> model = keras.Sequential([keras.Input((3,), name="x"), keras.layers.Dense(5, name="up")])
    >>> model = kl.apply_lora(model, kl.LoRAConfig(targets=["up"], rank=2))
    >>> kl.export_onnx(model, tempfile.mkdtemp() + "/model.onnx").inputs
    {'x': (None, 3)}
    """
    target = Path(path)
    check_export(model, target, overwrite)
    endpoint = serve_endpoint(model, input_signature)
    return write_converted(model, endpoint, target, _ONNX, sample)


def _convert(saved_model: Path) -> bytes:
    loader, convert = package("tf2onnx.tf_loader", _EXTRA), package("tf2onnx.convert", _EXTRA)
    graph, inputs, outputs, names = loader.from_saved_model(
        str(saved_model),
        None,
        None,
        tag=["serve"],
        signatures=["serving_default"],
        return_tensors_to_rename=True,
    )
    proto, _ = convert.from_graph_def(
        graph,
        name="keras_lora",
        input_names=inputs,
        output_names=outputs,
        tensors_to_rename=names,
        opset=_OPSET,
        custom_op_handlers={"Erfc": (_write_erfc, [])},
    )
    _check(proto)
    _name_axes(proto)
    return proto.SerializeToString()


def _write_erfc(context: Any, node: Any, name: str, _: Any) -> None:
    """Erfc(x) = 1 - Erf(x), where the result is a factor, as in x Erfc(-x / sqrt(2)) / 2.

    Its error of 1e-7 is then one of 1e-7 of the other factor. The small values of a lone Erfc
    would be lost; it stays, and is refused.
    """
    (x,), (result,) = node.input, node.output
    if any(consumer.type != "Mul" for consumer in context.find_output_consumers(result)):
        return
    shapes, dtypes = node.output_shapes, node.output_dtypes
    one = context.make_const(f"{name}_one", _one(dtypes[0]))
    context.remove_node(node.name)
    erf = context.make_node("Erf", [x])
    context.make_node(
        "Sub",
        [one.output[0], erf.output[0]],
        outputs=[result],
        name=name,
        shapes=shapes,
        dtypes=dtypes,
    )


def _one(dtype: int) -> Any:
    onnx = package("onnx", _EXTRA)
    return onnx.helper.tensor_dtype_to_np_dtype(dtype).type(1)


def _check(proto: Any) -> None:
    onnx = package("onnx", _EXTRA)
    unknown = {n.op_type for n in _nodes(proto.graph) if not onnx.defs.has(n.op_type, n.domain)}
    if unknown:
        reason = f"the operations {sorted(unknown)}, which ONNX has not"
        raise UnsupportedError("onnxruntime", reason, "use others in their place")
    onnx.checker.check_model(proto)


def _nodes(graph: Any) -> Iterator[Any]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _nodes(inner)


def _name_axes(proto: Any) -> None:
    """Names for the free axes of the inputs, which are numbered otherwise."""
    for value in proto.graph.input:
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if dim.dim_param:
                dim.dim_param = f"{value.name}_{axis}" if axis else "batch"


def _load(data: bytes) -> Program:
    runtime = package("onnxruntime", _EXTRA)
    session = runtime.InferenceSession(data, providers=["CPUExecutionProvider"])
    names = tuple(output.name for output in session.get_outputs())

    def run(arrays: Arrays) -> Arrays:
        return dict(zip(names, session.run(None, dict(arrays)), strict=True))

    inputs = {
        value.name: tuple(size if isinstance(size, int) else None for size in value.shape)
        for value in session.get_inputs()
    }
    return Program(inputs, names, run)


_ONNX = Runtime("onnxruntime", _EXTRA, ("tf2onnx", "onnx", "onnxruntime"), _convert, _load)
