"""The memory of a graph of TensorFlow: what is alive at each operation, in the order of the graph.

    alive(i) = sum of bytes of the tensors that operations up to i make and i or later ones read

An operation that only looks at its input shares its memory, and one that goes value by value writes
into an input that nobody reads after it, as TensorFlow's executor lets it. Values of variables are
not counted here.

Private TensorFlow API in this file, and why (`tests/test_memory_plan.py` watches it):
    `_get_function`: the only way to the shapes of the tensors in a loop.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from keras_lora.checks import warn

# Operations whose output is the memory of their first input; of IdentityN, each of its own.
_VIEWS = {
    *("Reshape", "Identity", "IdentityN", "StopGradient", "PreventGradient", "ExpandDims"),
    *("Squeeze", "ReadVariableOp", "Snapshot", "EnsureShape"),
}
# Operations that may write into an input of the size of their output.
_BY_VALUE = {
    *("AddN", "AddV2", "Add", "BiasAdd", "Cast", "DivNoNan", "Elu", "Erf", "Exp", "Log", "Maximum"),
    *("Minimum", "Mul", "MulNoNan", "Neg", "Pow", "RealDiv", "Relu", "ReluGrad", "Rsqrt"),
    *("RsqrtGrad", "SelectV2", "Selu", "Sigmoid", "SigmoidGrad", "Softmax", "Softplus", "Sqrt"),
    *("SqrtGrad", "Square", "SquaredDifference", "Sub", "Tanh", "TanhGrad", "LogSoftmax"),
}
_OUTSIDE = {"Const", "Placeholder", "VarHandleOp"}
_INNER = {"While": "body", "StatelessWhile": "body", "PartitionedCall": "f"}
_INNER["StatefulPartitionedCall"] = "f"
# Products of these are computed in float32 by TensorFlow on a CPU: from copies, into a copy.
_PRODUCTS = {"MatMul", "BatchMatMulV2", "BatchMatMulV3", "Einsum"}


@dataclass(frozen=True)
class Alive:
    """The bytes that are alive at one operation, by what the tensors are."""

    parts: Mapping[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


@dataclass
class _Memory:
    """Which tensors are alive, while a graph is gone through."""

    sizes: dict[int, int]
    kinds: dict[int, str]
    alive: set[int] = field(default_factory=set)
    total: int = 0

    def add(self, buffer: int) -> None:
        if buffer not in self.alive:
            self.alive.add(buffer)
            self.total += self.sizes[buffer]

    def remove(self, buffer: int) -> None:
        if buffer in self.alive:
            self.alive.remove(buffer)
            self.total -= self.sizes[buffer]

    def parts(self) -> Counter[str]:
        found: Counter[str] = Counter()
        for buffer in self.alive:
            found[self.kinds[buffer]] += self.sizes[buffer]
        return found


Kinds = Callable[[Any], str]


def peak_of(graph: Any, kept: Iterable[Any], kind_of: Kinds, inner_kind: str) -> Alive:
    """The moment of a graph at which most is alive.

    Args:
        graph: A `FuncGraph`.
        kept: Tensors that are read after the graph ends.
        kind_of: What a tensor is.
        inner_kind: What the tensors inside of loops are.
    """
    kept = list(kept)
    operations = _needed(graph, kept)
    buffers = _buffers(operations)
    made = {b for b in buffers.values() if b is not None}
    tensors = {id(t): t for op in operations for t in op.outputs}
    _warn_of_unknown([tensors[b] for b in made])
    memory = _Memory({b: _bytes(tensors[b]) for b in made}, {b: kind_of(tensors[b]) for b in made})
    last = _last_reads(operations, buffers, kept)
    peak = Alive({})
    for index, op in enumerate(operations):
        extra = _inside(op, kind_of, inner_kind)
        dying = [b for t in op.inputs if (b := buffers.get(id(t))) and last[b] == index]
        own = [id(t) for t in op.outputs if buffers.get(id(t)) == id(t)]
        if op.type in _BY_VALUE:
            _reuse(memory, own, dying)
        for buffer in own:
            memory.add(buffer)
        if memory.total + extra > peak.total:
            peak = Alive(memory.parts() + Counter({inner_kind: extra} if extra else {}))
        for buffer in [*dying, *(b for b in own if last.get(b, -1) <= index)]:
            memory.remove(buffer)
    return peak


def _needed(graph: Any, kept: Sequence[Any]) -> list[Any]:
    """The operations that the outputs and the assignments to variables need, in order."""
    needed: set[int] = set()
    left = [*(t.op for t in kept), *graph.control_outputs]
    while left:
        op = left.pop()
        if id(op) not in needed:
            needed.add(id(op))
            left += [*(t.op for t in op.inputs), *op.control_inputs]
    return [op for op in graph.get_operations() if id(op) in needed]


def _buffers(operations: Sequence[Any]) -> dict[int, int | None]:
    """The tensor whose memory each tensor is in; None for what is not in the graph's memory."""
    buffers: dict[int, int | None] = {}
    for op in operations:
        for index, tensor in enumerate(op.outputs):
            if op.type in _OUTSIDE:
                buffers[id(tensor)] = None
            elif op.type in _VIEWS and op.inputs:
                source = op.inputs[index if op.type == "IdentityN" else 0]
                buffers[id(tensor)] = buffers.get(id(source))
            else:
                buffers[id(tensor)] = id(tensor)
    return buffers


def _last_reads(
    operations: Sequence[Any], buffers: Mapping[int, int | None], kept: Iterable[Any]
) -> dict[int, int]:
    last: dict[int, int] = {}
    for index, op in enumerate(operations):
        last |= {b: index for t in op.inputs if (b := buffers.get(id(t)))}
    return last | {b: len(operations) for t in kept if (b := buffers.get(id(t)))}


def _reuse(memory: _Memory, own: Sequence[int], dying: list[int]) -> None:
    """Let outputs take the memory of inputs of their size that nobody reads any more."""
    for buffer in own:
        same = [b for b in dying if b in memory.alive and memory.sizes[b] == memory.sizes[buffer]]
        if same:
            memory.remove(same[0])


def _inside(op: Any, kind_of: Kinds, inner_kind: str) -> int:
    """The bytes that an operation takes while it runs, beside its inputs and outputs."""
    if op.type in _INNER:
        name = op.get_attr(_INNER[op.type]).name
        graph = op.graph._get_function(name).graph
        return peak_of(graph, graph.outputs, kind_of, inner_kind).total
    if op.type in _PRODUCTS and op.outputs[0].dtype.name == "bfloat16":
        return 2 * sum(_bytes(t) for t in [*op.inputs, *op.outputs])
    if op.type == "TensorListStack":  # the list has the same values once more
        return _bytes(op.outputs[0])
    return 0


def _bytes(tensor: Any) -> int:
    shape = tensor.shape
    known = shape.is_fully_defined() and tensor.dtype.name not in ("variant", "resource", "string")
    return math.prod(shape) * tensor.dtype.size if known else 0


def _warn_of_unknown(tensors: Iterable[Any]) -> None:
    names = [
        t.op.name
        for t in tensors
        if t.dtype.is_floating and not t.shape.is_fully_defined() and t.op.type not in _INNER
    ]
    if names:
        warn(
            "Expected tensors whose shapes follow from `batch_shape`. Received: "
            f"{len(names)} of another size, which the plan does not count, such as {names[0]!r}."
        )
