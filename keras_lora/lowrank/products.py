"""How a frozen matrix, and the updates of its adapters, act on an input.

    y = x W0 + sum_i (g_i - 1) x_i W0 + (x_i A_i) B_i

`x_i` is `x`, or `x` after the dropout of adapter `i`; `g_i` is DoRA's gain, or 1. The scale `s_i`
and the gain are part of `B_i`. The gradient of the frozen `W0` is never formed, and `A B` only by
`FormingProducts`.

A kind of layer says how its matrix acts by naming its `Products`; the sum is the same for all.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, final

from keras import ops

from keras_lora.lowrank.equations import (
    EinsumSplit,
    Shape,
    Tensor,
    joint_gain,
    reshaped,
    times,
    transposed,
)


class Term(NamedTuple):
    """What one active adapter adds: `x_i`, `A_i`, `B_i`, and `g_i` where it has DoRA."""

    x: Tensor
    a: Tensor
    b: Tensor
    gain: Tensor | None = None


class Products(ABC):
    """Abstract: how a frozen matrix and a low-rank update act on an input."""

    @abstractmethod
    def base(self, x: Tensor) -> Tensor:
        """`x W0`."""

    @abstractmethod
    def update(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """`(x A) B`."""

    @abstractmethod
    def times_gain(self, product: Tensor, gain: Tensor) -> Tensor:
        """A product, each output times its gain."""


class FormingProducts(Products):
    """Abstract: products of which one with `W = g W0 + A B` formed may cost less than their sum.

    They do where an input is larger than `W` by far, as an image is, so that to form `W` costs less
    than to add a product to another.
    """

    @abstractmethod
    def joint(self, x: Tensor, terms: Sequence[Term], training: bool) -> Tensor | None:
        """`x W` for terms of `x` itself; None where the sum is better."""


def adapted_sum(
    products: Products, x: Tensor, terms: Sequence[Term], training: bool | None = None
) -> Tensor:
    """`x W0 + sum_i (g_i - 1) x_i W0 + (x_i A_i) B_i`; terms without dropout share one gain."""
    if isinstance(products, FormingProducts):
        own = [term for term in terms if term.x is x]
        total = products.joint(x, own, bool(training)) if own else None
        if total is not None:
            others = [term for term in terms if term.x is not x]
            return _with_terms(products, x, total, others)
    total = products.base(x)
    shared = [term.gain for term in terms if term.x is x and term.gain is not None]
    if shared:
        total = products.times_gain(total, joint_gain(shared))
    return _with_terms(products, x, total, terms)


def _with_terms(products: Products, x: Tensor, total: Tensor, terms: Sequence[Term]) -> Tensor:
    for x_i, a, b, gain in terms:
        if x_i is not x and gain is not None:
            total = total + products.times_gain(products.base(x_i), gain - 1)
        total = total + products.update(x_i, a, b)
    return total


def einsum_products(split: EinsumSplit, w: Tensor) -> Products:
    """The products of an einsum: those of matrices if `split.is_matrix_product`."""
    w = ops.stop_gradient(w)
    return Matrices(split, w) if split.is_matrix_product else Einsum(split, w)


def factored_products(split: EinsumSplit, shape: Shape) -> Products:
    """Those of updates alone, beside a matrix of this shape that another function multiplies by."""
    return Matrices(split, None, shape) if split.is_matrix_product else Einsum(split, None)


@final
@dataclass(frozen=True, eq=False)
class Einsum(Products):
    """The products of any einsum."""

    split: EinsumSplit
    w: Tensor | None

    def base(self, x: Tensor) -> Tensor:
        split = self.split
        return ops.einsum(f"{split.input},{split.kernel}->{split.output}", x, self.w)

    def update(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return ops.einsum(self.split.up, ops.einsum(self.split.down, x, a), b)

    def times_gain(self, product: Tensor, gain: Tensor) -> Tensor:
        return self.split.times_gain(product, gain, self.split.output)


@final
class Matrices(Products):
    """The products of matrices: `(n, d) @ (d, k)` and `(n, d) @ (d, r) @ (r, k)`.

    On TensorFlow an einsum costs more than the same product in two dimensions.
    """

    def __init__(self, split: EinsumSplit, w: Tensor | None, shape: Shape = ()) -> None:
        self.split = split
        self.w = w
        self._shape = shape if w is None else tuple(w.shape)
        # Each input with its form in two dimensions, which `base` and `update` both need.
        self._flattened: list[tuple[Tensor, Tensor]] = []

    def base(self, x: Tensor) -> Tensor:
        return self._restored(ops.matmul(self._flat(x), self._columns), x)

    def update(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        split, (d, k) = self.split, self._sides
        a = reshaped(a, split.contracted, split.rank_label, (d, -1))
        b = reshaped(b, split.rank_label, split.free, (-1, k))
        return self._restored(ops.matmul(ops.matmul(self._flat(x), a), b), x)

    def times_gain(self, product: Tensor, gain: Tensor) -> Tensor:
        return self.split.times_gain(product, gain, self.split.output)

    @cached_property
    def _sides(self) -> tuple[int, int]:
        return self.split.matrix_shape(self._shape)

    @cached_property
    def _columns(self) -> Tensor:
        split = self.split
        columns = transposed(self.w, split.kernel, split.contracted + split.free)
        return reshaped(columns, split.contracted, split.free, self._sides)

    def _flat(self, x: Tensor) -> Tensor:
        for known, flat in self._flattened:
            if known is x:
                return flat
        split = self.split
        flat = transposed(x, split.input, split.batch + split.contracted)
        flat = reshaped(flat, split.batch, split.contracted, (-1, self._sides[0]))
        self._flattened.append((x, flat))
        return flat

    def _restored(self, product: Tensor, x: Tensor) -> Tensor:
        split = self.split
        size = split.sizes(self._shape) | dict(zip(split.input, ops.shape(x), strict=True))
        order = split.batch + split.free
        product = reshaped(product, split.batch, split.free, tuple(size[c] for c in order))
        return transposed(product, order, split.output)


@final
@dataclass(frozen=True, eq=False)
class ByRow(Products):
    """The products of a mixed batch: each row `i` has an adapter of its own.

    The factors are `(batch, r, shared, contracted)` and `(batch, r, shared, free)`: the rank comes
    before the kernel's axes, so that factors of any rank lie in one array.

    Attributes:
        split: The einsum; the batch is the first axis of its input and of its output.
        frozen: A function from an input to the products of the matrix that all rows share; not
            called if `kernels` is given.
        kernels: `(batch, *kernel)`, if each row has a matrix of its own.
    """

    split: EinsumSplit
    frozen: Callable[[Tensor], Products]
    kernels: Tensor | None = None

    def base(self, x: Tensor) -> Tensor:
        if self.kernels is None:
            return self.frozen(x).base(x)
        split = self.split
        equation = f"{split.input},{split.input[0]}{split.kernel}->{split.output}"
        return ops.einsum(equation, x, self.kernels)

    def update(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        split = self.split
        row, rank = split.input[0], split.rank_label
        down = f"{split.input},{row}{rank}{split.shared}{split.contracted}->{split.hidden}"
        up = f"{split.hidden},{row}{rank}{split.shared}{split.free}->{split.output}"
        return ops.einsum(up, ops.einsum(down, x, a), b)

    def times_gain(self, product: Tensor, gain: Tensor) -> Tensor:
        split = self.split
        row = split.input[0]
        order = "".join(c for c in split.output if c == row or c in split.outputs)
        gain = transposed(gain, row + split.outputs, order)
        for axis, c in enumerate(split.output):
            gain = gain if c in order else ops.expand_dims(gain, axis)
        return times(product, gain)
