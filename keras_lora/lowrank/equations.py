"""The equations of low-rank adaptation, and nothing else.

    h = x W0 + s (x A) B        s = alpha / r,   or alpha / sqrt(r) for rsLoRA
    W' = m (W0 + s A B) / |W0 + s A B|                    for DoRA

Every kernel belongs to an einsum ``input,kernel->output``; a `Dense` is the einsum
``...a,ab->...b``. The kernel's axes fall into three groups (`EinsumSplit`), and the shapes of
`A` and `B`, the factored product and the delta all follow from them.

References:
    Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", section 4.1.
    Kalajdzievski 2023, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA".
    Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation", sections 4.1 and 4.3.
"""

from __future__ import annotations

import math
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

from keras import ops

Tensor = Any
Shape = tuple[int, ...]
Pair = tuple[Tensor, Tensor]
Update = tuple[Tensor, Tensor, Tensor | None]  # `A`, `B`, which has the scale, and DoRA's gain `g`

_ROUNDING = 2.0**-23  # of float32


def scaling(alpha: float, rank: int, use_rslora: bool) -> float:
    """The factor `s` in front of `A B`.

    Example:

    >>> scaling(16, 4, use_rslora=False), scaling(16, 4, use_rslora=True)
    (4.0, 8.0)
    """
    return alpha / math.sqrt(rank) if use_rslora else alpha / rank


@dataclass(frozen=True)
class EinsumSplit:
    """An einsum ``input,kernel->output`` whose kernel is factored through a rank axis.

    The axes of the kernel are *contracted* (in the input, not in the output), *free* (in the
    output, not in the input) or *shared* (in both, as the axis of experts). Then

        A: (shared, contracted, r)      B: (shared, r, free)

    so that `delta = A B`, seen as a matrix for each shared index, has rank `r` at most.

    Example:

    >>> split = split_equation("btd,dnh->btnh", 3)
    >>> split.factor_shapes((768, 12, 64), rank=8)
    ((768, 8), (8, 12, 64))
    >>> split.down, split.up
    ('btd,da->bta', 'bta,anh->btnh')
    """

    input: str
    kernel: str
    output: str

    @cached_property
    def contracted(self) -> str:
        return "".join(c for c in self.kernel if c not in self.output)

    @cached_property
    def free(self) -> str:
        return "".join(c for c in self.kernel if c not in self.input)

    @cached_property
    def shared(self) -> str:
        return "".join(c for c in self.kernel if c in self.input and c in self.output)

    @cached_property
    def rank_label(self) -> str:
        used = self.input + self.kernel + self.output
        return next(c for c in string.ascii_letters if c not in used)

    @cached_property
    def a(self) -> str:
        return self.shared + self.contracted + self.rank_label

    @cached_property
    def b(self) -> str:
        return self.shared + self.rank_label + self.free

    @cached_property
    def outputs(self) -> str:
        """The axes that norms and magnitudes of the kernel have: one number for each output."""
        return self.shared + self.free

    @cached_property
    def batch(self) -> str:
        """The input's axes that pass into the output and are not in the kernel."""
        return "".join(c for c in self.input if c in self.output and c not in self.kernel)

    @cached_property
    def hidden(self) -> str:
        """The axes of `x A`."""
        return "".join(c for c in self.input if c in self.output) + self.rank_label

    @cached_property
    def down(self) -> str:
        """The einsum of `x A`."""
        return f"{self.input},{self.a}->{self.hidden}"

    @cached_property
    def up(self) -> str:
        """The einsum of `(x A) B`."""
        return f"{self.hidden},{self.b}->{self.output}"

    @property
    def rank_axes(self) -> tuple[int, int]:
        """Where the rank is among the axes of `A` and of `B`."""
        return self.a.index(self.rank_label), self.b.index(self.rank_label)

    @cached_property
    def is_matrix_product(self) -> bool:
        """Whether the einsum is one product of two matrices, (n, d) @ (d, k).

        It is not when an axis is shared, or when the input has an axis that is summed away
        without the kernel.
        """
        summed = set(self.input) - set(self.output) - set(self.kernel)
        return not self.shared and not summed and bool(self.contracted)

    def sizes(self, kernel_shape: Shape) -> dict[str, int]:
        return dict(zip(self.kernel, kernel_shape, strict=True))

    def matrix_shape(self, kernel_shape: Shape) -> tuple[int, int]:
        """`(d, k)`: the number of inputs and of outputs at one shared index."""
        size = self.sizes(kernel_shape)
        return (
            math.prod(size[c] for c in self.contracted),
            math.prod(size[c] for c in self.free),
        )

    def stacked_shape(self, kernel_shape: Shape) -> tuple[int, int, int]:
        """`(shared, d, k)`: a matrix for each index of the shared axes."""
        size = self.sizes(kernel_shape)
        return math.prod(size[c] for c in self.shared), *self.matrix_shape(kernel_shape)

    def stacked(self, w: Tensor) -> Tensor:
        """A kernel as `(shared, d, k)`."""
        shape, order = self.stacked_shape(tuple(w.shape)), self.shared + self.contracted + self.free
        return ops.reshape(transposed(w, self.kernel, order), shape)

    def factor_shapes(self, kernel_shape: Shape, rank: int) -> tuple[Shape, Shape]:
        size = {**self.sizes(kernel_shape), self.rank_label: rank}
        return tuple(size[c] for c in self.a), tuple(size[c] for c in self.b)

    def norm_shape(self, kernel_shape: Shape) -> Shape:
        size = self.sizes(kernel_shape)
        return tuple(size[c] for c in self.outputs)

    def matrices(self, a: Tensor, b: Tensor, kernel_shape: Shape) -> tuple[Tensor, Tensor]:
        """`A` and `B` as `(shared, d, r)` and `(shared, r, k)`."""
        d, k = self.matrix_shape(kernel_shape)
        rank = a.shape[-1]
        return a.reshape(-1, d, rank), b.reshape(-1, rank, k)

    def factors(self, a: Tensor, b: Tensor, kernel_shape: Shape) -> tuple[Tensor, Tensor]:
        """The inverse of `matrices`."""
        shapes = self.factor_shapes(kernel_shape, a.shape[-1])
        return a.reshape(shapes[0]), b.reshape(shapes[1])

    def delta(self, a: Tensor, b: Tensor) -> Tensor:
        """`A B` in the shape of the kernel."""
        return ops.einsum(f"{self.a},{self.b}->{self.kernel}", a, b)

    def effective(self, w: Tensor, updates: Sequence[Update]) -> Tensor:
        """`W = g W0 + sum_i A_i B_i`, with `g = 1 + sum_i (g_i - 1)`."""
        gains = [gain for _, _, gain in updates if gain is not None]
        total = self.times_gain(w, joint_gain(gains), self.kernel) if gains else w
        for a, b, _ in updates:
            # Not `+=`: on torch `total` is still the memory of the variable.
            total = total + self.delta(a, b)
        return total

    def squared_norms(self, w: Tensor) -> Tensor:
        """`|W|^2` of each output, over the contracted axes."""
        squares = transposed(ops.square(w), self.kernel, self.contracted + self.outputs)
        return ops.sum(squares, list(range(len(self.contracted)))) if self.contracted else squares

    def gain(self, w: Tensor, squared: Tensor, a: Tensor, b: Tensor, magnitude: Tensor) -> Tensor:
        """DoRA's `g = m / |W0 + A B|` of each output, so that `W' = g (W0 + A B)`.

            |W0 + A B|^2 = |W0|^2 + B . (2 A^T W0 + A^T A B)        summed over the rank

        `squared` is `|W0|^2`; nothing of the kernel's shape is formed. The norm is a constant in
        the gradient. For an output whose norm is zero, `W'` is zero and `g` is 1.

        Reference: Liu et al. 2024, equation 5 and section 4.3.
        """
        w, a, b = map(ops.stop_gradient, (w, a, b))
        _, d, k = self.stacked_shape(tuple(w.shape))
        w = self.stacked(w)
        a, b = ops.reshape(a, (-1, d, a.shape[-1])), ops.reshape(b, (-1, a.shape[-1], k))
        a_t = ops.transpose(a, (0, 2, 1))
        cross = ops.cast(ops.matmul(ops.cast(a_t, w.dtype), w), b.dtype)  # (shared, r, k)
        change = ops.sum(b * (2 * cross + ops.matmul(ops.matmul(a_t, a), b)), 1)
        total = squared + ops.reshape(change, squared.shape)
        # Where W0 and A B cancel, the difference is rounding.
        norm = ops.stop_gradient(ops.sqrt(ops.maximum(total, _ROUNDING * squared)))
        return ops.where(norm > 0, magnitude / ops.where(norm > 0, norm, 1), 1)

    def times_gain(self, x: Tensor, gain: Tensor, axes: str) -> Tensor:
        """`x` times the gain of each output; `axes` are those of `x`."""
        order = "".join(c for c in axes if c in self.outputs)
        size = dict(zip(self.outputs, gain.shape, strict=True))
        gain = transposed(gain, self.outputs, order)
        return times(x, ops.reshape(gain, [size.get(c, 1) for c in axes]))


def beside_counterpart(
    pair: Pair, counterpart: Pair, axis: int, join: Callable[..., Tensor]
) -> Pair:
    """`A B - A0 B0` as one product of twice the rank: `[A - A0 | A0] [B ; B - B0]`.

    The same as `[A | A0] [B ; -B0]`, but exactly zero at the start, and with no two large products
    that cancel: what was learned keeps its digits in 16 bits.

    Args:
        pair: `A`, with the rank as its last axis, and `B`.
        counterpart: `A0` and `B0`, likewise.
        axis: Where the rank is among the axes of `B`.
        join: Concatenates tensors of this kind.
    """
    (a, b), (a0, b0) = pair, counterpart
    return join([a - a0, a0], -1), join([b, b - b0], axis)


def joint_gain(gains: Sequence[Tensor]) -> Tensor:
    """What `W0` is multiplied by with several active adapters: `1 + sum_i (g_i - 1)`."""
    first, *others = gains
    return sum((gain - 1 for gain in others), first)


def times(x: Tensor, gain: Tensor) -> Tensor:
    """`x * gain` in the dtype of the gain: rounded to 16 bits, a gain near 1 would become 1."""
    return ops.cast(ops.cast(x, gain.dtype) * gain, x.dtype)


def transposed(x: Tensor, labels: str, order: str) -> Tensor:
    if labels == order:
        return x
    return ops.transpose(x, [labels.index(c) for c in order])


def reshaped(x: Tensor, left: str, right: str, shape: tuple[Any, ...]) -> Tensor:
    """Reshape between a matrix and the axes `left + right`: no change if each is one axis."""
    return x if len(left) == len(right) == 1 else ops.reshape(x, shape)


@cache
def split_equation(equation: str, input_rank: int | None = None) -> EinsumSplit:
    """Parse an `EinsumDense` equation for inputs of `input_rank` axes.

    An ellipsis, on the left or on the right, becomes labels of its own. Without an input
    rank it stands for no axis, which leaves the kernel's own axes as they are.

    Raises:
        ValueError: an axis is written twice in one operand (a diagonal), which has no
            factors of low rank.

    Example:

    >>> split_equation("...x,xy->...y", 3)
    EinsumSplit(input='abx', kernel='xy', output='aby')
    """
    inputs, rest = equation.replace(" ", "").split(",")
    kernel, output = rest.split("->")
    named = len(inputs.replace("...", ""))
    elided = (input_rank or named) - named if "..." in inputs else 0
    unused = [c for c in string.ascii_letters if c not in equation]
    labels = "".join(unused[:elided])
    operands = inputs.replace("...", labels), kernel, output.replace("...", labels)
    if any(len(set(operand)) < len(operand) for operand in operands):
        raise ValueError(
            "Expected an einsum equation in which each operand names an axis once. "
            f"Received: equation={equation!r}. Exclude this layer: a diagonal has no low-rank "
            "factors."
        )
    return EinsumSplit(*operands)
