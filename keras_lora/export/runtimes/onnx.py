"""ONNX files, which `onnxruntime` runs without Keras, TensorFlow and this package.

The SavedModel is converted by parts of `tf2onnx`. Its one documented call for a graph,
`tf2onnx.convert.from_graph_def`, copies the weights for each optimization and gives no choice of
optimizations. `tests/test_export_runtimes.py` watches all of these parts:
`tf_loader.from_saved_model`, `tfonnx.process_tf_graph` (documented for handlers of operations),
`optimizer.optimize_graph` with a choice of its classes, and the graph that a handler is given.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_lora.checks import given_path
from keras_lora.export.endpoints import serve
from keras_lora.export.reports import RuntimeReport
from keras_lora.export.runtimes.conversion import (
    Arrays,
    Program,
    Runtime,
    UnsupportedError,
    package,
    write_converted,
)
from keras_lora.export.writing import check_export, no_file
from keras_lora.files.adapter_files import PathLike

_EXTRA = "onnx"
_OPSET = 18  # the newest that tf2onnx writes
_MARK = b"\x08"  # a file begins with its first field, the number of ONNX's version


def export_onnx(
    model: keras.Model,
    path: PathLike,
    *,
    input_signature: Any | None = None,
    sample: Any | None = None,
    overwrite: bool = False,
) -> RuntimeReport:
    """Write a merged `.onnx` file, with which `onnxruntime` gives the model's answers.

    The model itself stays as it is. Inputs and outputs have the names that
    `export_saved_model` gives them; the batch axis is free, as are the axes that the model's
    inputs leave free. Exact GELU, whose `Erfc` ONNX does not have, is written with `Erf`.

    Needs `pip install "keras-lora[onnx]"`.

    Args:
        model: A built model, adapted or plain, on the TensorFlow backend. Its active adapters
            are merged for the export alone. A file of mixed precision computes in float32.
        path: The file to write, such as `"model.onnx"`. It is written under another name and
            renamed when whole.
        input_signature: As for `export_saved_model`.
        sample: A batch of inputs as `predict` takes it, on which the answers are compared. By
            default two random batches, with sizes 7 and 5 on free axes.
        overwrite: Replace `path` if it exists and is such a file.

    Returns:
        The names and shapes, and the largest difference of the answers.

    Raises:
        ImportError: TensorFlow or a package of the extra is not installed.
        ValueError: the backend is not TensorFlow, the model is not built, the path exists, the
            weights are in float16 or bfloat16 or above 2 GB, ONNX does not have an operation, or
            the answers differ by more than 1e-4 (times the largest answer if that is above 1).
            Nothing is written.

    Example:

    >>> import keras, keras_lora as kl, tempfile
    >>> model = keras.Sequential([keras.Input((3,), name="x"), keras.layers.Dense(5, name="up")])
    >>> model = kl.apply_lora(model, kl.LoRAConfig(targets=["up"], rank=2))
    >>> kl.export_onnx(model, tempfile.mkdtemp() + "/model.onnx").inputs
    {'x': (None, 3)}

    Reference:
        ONNX operators, https://onnx.ai/onnx/operators/
    """
    target = given_path(path)
    check_export(model, target, overwrite, lambda path: no_file(path, _MARK, 0))
    endpoint = serve(model, input_signature)
    return write_converted(model, endpoint, target, ONNX, sample)


# Without "EinsumOptimizer", which stores the kernels of attention layers twice.
# It is not needed, since onnxruntime has Einsum.
_OPTIMIZERS = (
    "TransposeOptimizer",
    "ConstFoldOptimizer",
    "LoopOptimizer",
    "MergeDuplicatedNodesOptimizer",
    "ReshapeOptimizer",
    "GlobalPoolOptimizer",
    "IdentityOptimizer",
    "BackToBackOptimizer",
)


def _convert(saved_model: Path) -> bytes:
    optimizer = package("tf2onnx.optimizer", _EXTRA)
    chosen = {name: getattr(optimizer, name) for name in _OPTIMIZERS}
    graph = optimizer.optimize_graph(_onnx_graph(saved_model), False, chosen)
    proto = graph.make_model("a Keras model")
    _share_transposed(proto.graph)
    _name_axes(proto.graph)
    _check(proto)
    return proto.SerializeToString()


def _onnx_graph(saved_model: Path) -> Any:
    graph, inputs, outputs, names = package("tf2onnx.tf_loader", _EXTRA).from_saved_model(
        str(saved_model),
        None,
        None,
        tag=["serve"],
        signatures=["serving_default"],
        return_tensors_to_rename=True,
    )
    with tf.Graph().as_default() as frozen:
        tf.import_graph_def(graph, name="")
        return package("tf2onnx.tfonnx", _EXTRA).process_tf_graph(
            frozen,
            opset=_OPSET,
            input_names=inputs,
            output_names=outputs,
            tensors_to_rename=names,
            custom_op_handlers={"Erfc": (_write_erfc, [])},
        )


def _write_erfc(context: Any, node: Any, name: str, _: Any) -> None:
    """Erfc(z) = 1 - Erf(z), within the exact GELU x Erfc(-x / sqrt(2)) / 2.

    The difference loses the small values of Erfc, which belong to large x. In GELU these are
    multiplied by x, so that an error of 1e-7 |x| remains. Outside of such a product Erfc stays,
    and `_check` refuses it.
    """
    (z,), (result,) = node.input, node.output
    if not _multiplies(context, result, _scaled(context, z)):
        return
    shapes, dtypes = node.output_shapes, node.output_dtypes
    one = context.make_const(f"{name}_one", _one(dtypes[0]))
    context.remove_node(node.name)
    erf = context.make_node("Erf", [z])
    context.make_node(
        "Sub",
        [one.output[0], erf.output[0]],
        outputs=[result],
        name=name,
        shapes=shapes,
        dtypes=dtypes,
    )


def _multiplies(context: Any, factor: str, x: str) -> bool:
    """Whether `factor` is only used in products with multiples of `x`."""
    consumers = context.find_output_consumers(factor)
    return bool(consumers) and all(_is_product(context, c, factor, x) for c in consumers)


def _is_product(context: Any, node: Any, factor: str, x: str) -> bool:
    if node.type != "Mul":
        return False
    (other,) = [name for name in node.input if name != factor] or [factor]
    if context.get_node_by_output(other).is_const():
        return _multiplies(context, node.output[0], x)
    return _scaled(context, other) == x


def _scaled(context: Any, name: str) -> str:
    """The tensor of which a tensor is a constant multiple."""
    node = context.get_node_by_output(name)
    free = [i for i in node.input if not context.get_node_by_output(i).is_const()]
    return _scaled(context, free[0]) if node.type in ("Mul", "Neg") and len(free) == 1 else name


def _one(dtype: int) -> Any:
    onnx = package("onnx", _EXTRA)
    return onnx.helper.tensor_dtype_to_np_dtype(dtype).type(1)


def _check(proto: Any) -> None:
    onnx = package("onnx", _EXTRA)
    unknown = {n.op_type for n in _nodes(proto.graph) if not onnx.defs.has(n.op_type, n.domain)}
    if unknown:
        reason = f"the operations {', '.join(sorted(unknown))}"
        raise UnsupportedError("onnxruntime", reason, "use other operations")
    onnx.checker.check_model(proto)


def _nodes(graph: Any) -> Iterator[Any]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _nodes(inner)


def _share_transposed(graph: Any) -> None:
    """Store a matrix once if it is also used transposed, as an embedding that is also the head.

    TensorFlow has folded the transpose into a second constant.
    """
    onnx = package("onnx", _EXTRA)
    kept: dict[tuple[int, ...], dict[str, np.ndarray]] = {}
    for tensor in list(graph.initializer):
        if len(tensor.dims) == 2 and all(tensor.dims):
            array = onnx.numpy_helper.to_array(tensor)
            twin = _transposed(array, kept.get(array.shape[::-1], {}))
            if twin is None:
                kept.setdefault(array.shape, {})[tensor.name] = array
            else:
                graph.initializer.remove(tensor)
                node = onnx.helper.make_node("Transpose", [twin], [tensor.name], perm=[1, 0])
                graph.node.insert(0, node)


def _transposed(array: np.ndarray, others: Mapping[str, np.ndarray]) -> str | None:
    # One row is compared first, since all square matrices of one size are compared in pairs.
    equal = (
        name
        for name, other in others.items()
        if np.array_equal(other[:, 0], array[0]) and np.array_equal(other.T, array)
    )
    return next(equal, None)


def _name_axes(graph: Any) -> None:
    """Name the free axes of the inputs, to which tf2onnx has given numbers."""
    for value in graph.input:
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


ONNX = Runtime("onnxruntime", _EXTRA, ("tf2onnx", "onnx", "onnxruntime"), _convert, _load)
