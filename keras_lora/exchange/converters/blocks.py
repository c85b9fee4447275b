"""Where the matrix of a kernel is inside a Hugging Face weight."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from keras_lora.exchange.converters.tensors import (
    Array,
    Computed,
    Shapes,
    Traced,
    Weight,
    demands,
    evaluate,
    nodes,
    weight_keys,
)
from keras_lora.lowrank.equations import EinsumSplit, Shape


@dataclass(frozen=True, eq=False)
class Block:
    """Where the matrix of a kernel is inside a Hugging Face weight: its rows and columns.

        kernel[i, o] = weight[rows[o], columns[i]]

    Attributes:
        weight: The key of the weight, such as `"model.layers.0.self_attn.q_proj.weight"`.
        shape: `(out, in)` of the whole Hugging Face matrix. Where a converter takes only the
            beginning of a matrix, the smallest shape that the matrix can have.
        stored_transposed: Whether the weight is stored as `(in, out)`, as in GPT-2's `Conv1D`.
        rows: For each output of the kernel (its free axes, flattened), the row in the matrix.
        columns: For each input of the kernel (its contracted axes, flattened), the column.
    """

    weight: str
    shape: tuple[int, int]
    stored_transposed: bool
    rows: Array
    columns: Array

    def read(self, tensor: Array) -> Array:
        """The kernel as a matrix `(in, out)`, from the stored weight."""
        matrix = tensor.T if self.stored_transposed else tensor
        return matrix[np.ix_(self.rows, self.columns)].T


_NOT_A_BLOCK = "its inputs are not the columns of a matrix, nor its outputs the rows"


class RefusedError(ValueError):
    """The matrix of a kernel is no block of one weight; the message says why."""


@dataclass(frozen=True)
class ConvertedKernel:
    """A kernel of the Keras model: its shape, its axes, and the value from the converter."""

    value: Traced
    split: EinsumSplit
    shape: Shape

    def alternatives(self) -> list[Shapes]:
        """The shapes that the weights can have; `(out, in)`, as in `nn.Linear`, comes first.

        The order matters only where an axis has one element. Otherwise only one of the two
        shapes gives blocks.
        """
        inputs, outputs = self.split.matrix_shape(self.shape)
        guesses = list(dict.fromkeys([(outputs, inputs), (inputs, outputs)]))
        found = demands(self.value, self.shape, guesses)
        return sorted(found, key=lambda shapes: set(shapes.values()) != {(outputs, inputs)})


class Locator:
    """Finds blocks, once for all kernels of one form, since the layers of a model repeat."""

    def __init__(self) -> None:
        self.found: dict[object, tuple[list[str], tuple[Block, ...]]] = {}

    def shapes(self, kernel: ConvertedKernel) -> Shapes:
        """The shapes of a kernel's weights with which the kernel is made of blocks.

        Raises:
            RefusedError: there are no such shapes.
        """
        reason = _without_shapes(kernel.value)
        for shapes in kernel.alternatives():
            try:
                self.blocks(kernel, shapes)
            except RefusedError as error:
                reason = str(error)
            else:
                return shapes
        keys = dict.fromkeys(weight_keys(kernel.value))
        raise RefusedError(f"{reason}: {', '.join(keys)}")

    def blocks(self, kernel: ConvertedKernel, shapes: Mapping[str, Shape]) -> tuple[Block, ...]:
        """The block of each index of the kernel's shared axes.

        Raises:
            RefusedError: the kernel is not made of blocks.
        """
        used = weight_keys(kernel.value)
        keys = list(dict.fromkeys(used))
        form = kernel, tuple(keys.index(k) for k in used), tuple(shapes[k] for k in keys)
        if form not in self.found:
            self.found[form] = keys, tuple(_blocks(kernel, keys, shapes))
        first_keys, blocks = self.found[form]
        return tuple(
            dataclasses.replace(block, weight=keys[first_keys.index(block.weight)])
            for block in blocks
        )


def _without_shapes(value: Traced) -> str:
    functions = [node.function for node in nodes(value) if isinstance(node, Computed)]
    computed = f"computed with {', '.join(dict.fromkeys(functions))}"
    return computed if functions else "taken from no matrix of as many elements"


def _blocks(
    kernel: ConvertedKernel, keys: Sequence[str], shapes: Mapping[str, Shape]
) -> Iterator[Block]:
    if any(len(shapes[key]) != 2 for key in keys):
        raise RefusedError(f"a weight of {len(shapes[keys[0]])} axes instead of a matrix")
    if _is_whole(kernel, shapes):
        inputs, outputs = kernel.shape
        yield Block(keys[0], (outputs, inputs), True, np.arange(outputs), np.arange(inputs))
        return
    starts = np.cumsum([0, *(math.prod(shapes[key]) for key in keys)])
    try:
        indices = evaluate(kernel.value, _indices(keys, shapes, starts))
    except ValueError as error:  # numpy raises it where shapes do not fit
        raise RefusedError(f"the slices of {keys} contradict each other: {error}") from error
    for matrix in _matrices(kernel, indices):
        n = int(np.searchsorted(starts, matrix[0, 0], "right")) - 1
        if matrix.min() < starts[n] or matrix.max() >= starts[n + 1]:
            raise RefusedError("made of several weights")
        yield _block(keys[n], shapes[keys[n]], matrix - starts[n])


def _is_whole(kernel: ConvertedKernel, shapes: Mapping[str, Shape]) -> bool:
    """Whether a kernel `(in, out)` is a whole weight in the same order.

    An embedding matrix is one, and an index for each of its elements would take gigabytes.
    """
    split, value = kernel.split, kernel.value
    in_order = split.kernel == split.contracted + split.free and len(split.kernel) == 2
    return in_order and isinstance(value, Weight) and shapes[value.key] == kernel.shape


def _indices(keys: Sequence[str], shapes: Mapping[str, Shape], starts: Array) -> dict[str, Array]:
    """The number of each element, counted over all weights one after the other."""
    dtype = "int32" if starts[-1] <= np.iinfo("int32").max else "int64"
    ends = zip(keys, starts, starts[1:], strict=False)
    return {k: np.arange(start, end, dtype=dtype).reshape(shapes[k]) for k, start, end in ends}


def _matrices(kernel: ConvertedKernel, indices: Array) -> Array:
    """The indices of a kernel as `(shared, in, out)`."""
    split = kernel.split
    order = split.shared + split.contracted + split.free
    in_order = indices.transpose([split.kernel.index(c) for c in order])
    return in_order.reshape(-1, *split.matrix_shape(kernel.shape))


def _block(key: str, shape: Shape, indices: Array) -> Block:
    """The block of a kernel `(in, out)`, from the indices of its elements in the weight.

    For a weight `(out, in)` of `width` columns, `indices[i, o] = rows[o] * width + columns[i]`.
    So `indices` is the sum of its first row and its first column, up to a constant. Along the
    outputs only the weight's row changes, and along the inputs only its column; for a weight
    `(in, out)` the reverse.
    """
    along_out, along_in = indices[0], indices[:, 0]
    if (indices != along_in[:, None] + (along_out - along_out[0])).any():
        raise RefusedError(_NOT_A_BLOCK)
    (out_0, out_1), (in_0, in_1) = (
        np.divmod(along.astype("int64"), shape[1]) for along in (along_out, along_in)
    )
    if _constant(out_1) and _constant(in_0):
        return Block(key, (shape[0], shape[1]), False, out_0, in_1)
    if _constant(out_0) and _constant(in_1):
        return Block(key, (shape[1], shape[0]), True, out_1, in_0)
    raise RefusedError(_NOT_A_BLOCK)


def _constant(values: Array) -> bool:
    return bool((values == values[0]).all())
