"""What a server with its default settings cannot run, read off a SavedModel's graph."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError
from tensorflow.core.framework import types_pb2
from tensorflow.core.protobuf import saved_model_pb2

from keras_lora.files import PathLike

# TensorFlow Serving's REST API has no JSON form of these.
_LOW_PRECISION = {types_pb2.DT_HALF, types_pb2.DT_BFLOAT16}
# Those operations of tensorflow-text that are not called `TFText>...`.
TEXT_OPERATIONS = {
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


def check_saved_model(path: PathLike) -> GraphReport:
    """Read a SavedModel's graph and say what a server with its default settings cannot run.

    Args:
        path: The directory of a SavedModel.

    Returns:
        The report; `problems` is empty where nothing was found.

    Raises:
        ValueError: there is no readable `saved_model.pb`.
    """
    graph = read_graph(Path(path))
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
    text = sorted(op for op in ops if op.startswith("TFText>") or op in TEXT_OPERATIONS)
    return GraphReport(len(nodes), tuple(problems), tuple(text))


_XLA = "the operation {op}, which needs XLA, and servers have it off: avoid jit-compiled code"
_PYTHON = "the operation {op}, which runs Python: use TensorFlow or keras.ops operations instead"


def read_graph(path: Path) -> saved_model_pb2.SavedModel:
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
