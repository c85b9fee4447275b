"""The parts of a SavedModel's graph that a server with its default settings cannot run."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow as tf
from google.protobuf.message import DecodeError
from tensorflow.core.framework import types_pb2
from tensorflow.core.protobuf import saved_model_pb2

from keras_lora.checks import given_path
from keras_lora.export.reports import GraphReport
from keras_lora.files.adapter_files import PathLike

# The types that TensorFlow Serving reads from JSON and writes to it (its json_tensor.cc).
_JSON_TYPES = {
    types_pb2.DT_FLOAT,
    types_pb2.DT_DOUBLE,
    types_pb2.DT_INT8,
    types_pb2.DT_INT16,
    types_pb2.DT_INT32,
    types_pb2.DT_INT64,
    types_pb2.DT_UINT8,
    types_pb2.DT_UINT32,
    types_pb2.DT_UINT64,
    types_pb2.DT_BOOL,
    types_pb2.DT_STRING,
}
_PYTHON_OPS = {"PyFunc", "PyFuncStateless", "EagerPyFunc"}
# The operations of tensorflow-text whose names do not begin with "TFText>".
_TEXT_OPS = {
    "CaseFoldUTF8",
    "ConstrainedSequence",
    "FastBertNormalize",
    "FastWordpieceTokenizeWithOffsets",
    "FindSourceOffsets",
    "MaxSpanningTree",
    "NormalizeUTF8",
    "NormalizeUTF8WithOffsetsMap",
    "PhraseTokenize",
    "RegexSplitWithOffsets",
    "RougeL",
    "SentenceFragments",
    "SentenceFragmentsV2",
    "SentencepieceDetokenizeOp",
    "SentencepieceIdToStringOp",
    "SentencepieceOp",
    "SentencepieceStringToIdOp",
    "SentencepieceTokenizeOp",
    "SentencepieceTokenizeWithOffsetsOp",
    "SentencepieceVocabSizeOp",
    "SplitMergeTokenizeWithOffsets",
    "TokenizerFromLogits",
    "UnicodeScriptTokenizeWithOffsets",
    "WhitespaceTokenizeWithOffsets",
    "WordpieceTokenizeWithOffsets",
}


def check_saved_model(path: PathLike) -> GraphReport:
    """Read a SavedModel's graph and list what a server with its default settings cannot run.

    Problems in the graph and its functions: an operation of XLA or a function that must be
    compiled, since servers have XLA off; an operation that runs Python; an operation that neither
    TensorFlow nor tensorflow-text has. Problems in the signatures: a type that JSON lacks, a sparse
    or ragged tensor, or no signature at all. The graph is read and not run;
    `examples/run_saved_model.py` runs it.

    Args:
        path: The directory of a SavedModel.

    Returns:
        The report; its `problems` are empty if a server can run the graph.

    Raises:
        ImportError: TensorFlow is not installed.
        ValueError: `saved_model.pb` is missing or cannot be read.

    Example:

    >>> import keras, keras_lora as kl, tempfile
    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(5)])
    >>> path = tempfile.mkdtemp() + "/1"
    >>> model.export(path, verbose=False)
    >>> kl.check_saved_model(path).problems
    ()

    Reference:
        TensorFlow Serving, `util/json_tensor.cc` and `model_servers/main.cc`.
    """
    graph = read_graph(given_path(path))
    nodes = list(_nodes(graph))
    ops = {node.op for node in nodes} - _function_names(graph)
    text = sorted(filter(_is_text, ops))
    problems = [*_operation_problems(ops, graph), *_signature_problems(graph)]
    return GraphReport(len(nodes), tuple(problems), tuple(text))


def _operation_problems(ops: set[str], graph: saved_model_pb2.SavedModel) -> Iterator[str]:
    for op in sorted(ops):
        if op.startswith("Xla"):
            yield (
                f"the operation {op}, which needs XLA, and servers have XLA off: leave out "
                "keras.ops.slice_update and other functions that make it"
            )
        elif op in _PYTHON_OPS:
            yield f"the operation {op}, which runs Python: use TensorFlow or keras.ops"
        elif not (_is_text(op) or op.startswith("_") or op in _core_operations()):
            yield (
                f"the operation {op}, which TensorFlow does not have: use operations of "
                "TensorFlow, or a server that was built with this one"
            )
    if _must_compile(graph):
        yield "a function compiled with jit_compile=True: compile with jit_compile=False"


def _is_text(op: str) -> bool:
    return op.startswith("TFText>") or op in _TEXT_OPS


@functools.cache
def _core_operations() -> frozenset[str]:
    """TensorFlow's own operations. `tf.raw_ops` lists none that other libraries have loaded."""
    return frozenset(dir(tf.raw_ops))


def _signature_problems(graph: saved_model_pb2.SavedModel) -> Iterator[str]:
    if not any("serve" in meta.meta_info_def.tags for meta in graph.meta_graphs):
        yield "no graph with the tag 'serve', which servers load: export with export_saved_model"
    tensors = list(_signature_tensors(graph))
    if not tensors:
        yield "no signature, so that a request has nothing to call: export with signatures"
    for name, info in tensors:
        if info.WhichOneof("encoding") != "name":
            yield f"{name}, which is sparse or ragged: use dense tensors"
        elif info.dtype not in _JSON_TYPES:
            dtype = types_pb2.DataType.Name(info.dtype)
            yield f"{name} of type {dtype}, which has no JSON form: cast it, for example to float32"


def read_graph(path: Path) -> saved_model_pb2.SavedModel:
    """Raises:
    ValueError: `saved_model.pb` is missing or cannot be read.
    """
    file = path / "saved_model.pb"
    try:
        return saved_model_pb2.SavedModel.FromString(file.read_bytes())
    except (OSError, DecodeError) as error:
        raise ValueError(
            f"Expected a SavedModel. Received: {file}: {error}. Give the directory that "
            "export_saved_model wrote."
        ) from error


def _nodes(graph: saved_model_pb2.SavedModel) -> Iterator[Any]:
    for meta in graph.meta_graphs:
        yield from meta.graph_def.node
        for function in meta.graph_def.library.function:
            yield from function.node_def


def _function_names(graph: saved_model_pb2.SavedModel) -> set[str]:
    """The functions' names: a call of a function may be an operation of the same name."""
    return {f.signature.name for meta in graph.meta_graphs for f in meta.graph_def.library.function}


def _must_compile(graph: saved_model_pb2.SavedModel) -> bool:
    functions = (f for meta in graph.meta_graphs for f in meta.graph_def.library.function)
    return any(
        "_XlaMustCompile" in item.attr and item.attr["_XlaMustCompile"].b
        for item in itertools.chain(_nodes(graph), functions)
    )


def _signature_tensors(graph: saved_model_pb2.SavedModel) -> Iterator[tuple[str, Any]]:
    for meta in graph.meta_graphs:
        for name, signature in meta.signature_def.items():
            if name == "__saved_model_init_op":
                continue  # called by the loader, not by requests
            for kind, tensors in (("input", signature.inputs), ("output", signature.outputs)):
                for key, info in tensors.items():
                    yield f"the {kind} {key!r} of {name!r}", info
