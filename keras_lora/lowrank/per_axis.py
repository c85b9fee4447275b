"""The factors that Keras's own LoRA has for a layer, converted to this package's and back.

Keras splits the axes of a kernel into the last one and all others. This package splits them into
the axes that an output sums over and the axes that it does not (`EinsumSplit`):

    delta = a b      a: (*kernel.shape[:-1], r)      b: (r, kernel.shape[-1])
    delta = A B      A: (shared, contracted, R)      B: (shared, R, free)

For `btd,dnh->btnh` the same delta needs `R = n r`, since Keras gives each of the `n` heads an
`a` of its own. Both conversions are exact, in float64.
"""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import numpy as np

from keras_lora.lowrank.equations import EinsumSplit, Shape

Array: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"
Pair: TypeAlias = tuple[Array, Array]


def from_per_axis(split: EinsumSplit, a: Array, b: Array) -> Pair:
    """`(A, B)` with `A B = a b`, from the factors that split off the kernel's last axis `l`.

    If `l` is free and `n` are the other free axes,

        A[s, c, (n, r)] = a[s, c, n, r]        B[s, (n, r), n', l] = [n = n'] b[r, l]

    and the mirror image if `l` is contracted. If the rank would be above `min(d, k)`, or if `l` is
    shared, one factor is the identity and the other the delta, of rank `min(d, k)`.

    Args:
        split: The axes of the kernel.
        a: `(*kernel.shape[:-1], r)`.
        b: `(r, kernel.shape[-1])`.

    Returns:
        `A` `(shared, contracted, R)` and `B` `(shared, R, free)` in float64.

    Example:

    >>> from keras_lora.lowrank.equations import split_equation
    >>> a, b = np.ones((768, 12, 2)), np.ones((2, 64))
    >>> big_a, big_b = from_per_axis(split_equation("btd,dnh->btnh"), a, b)
    >>> big_a.shape, big_b.shape
    ((768, 24), (24, 12, 64))
    """
    a, b = np.asarray(a, "float64"), np.asarray(b, "float64")
    shape = (*a.shape[:-1], b.shape[-1])
    outer, rest = _around_last(split)
    copies, rank = _count(split, shape, rest), len(b)
    if split.kernel[-1] in split.shared or copies * rank > min(split.matrix_shape(shape)):
        return _identity_and_delta(split, np.tensordot(a, b, 1))
    shared = _count(split, shape, split.shared)
    order = split.shared + outer + rest + split.rank_label
    plain = np.einsum(f"{split.kernel[:-1]}{split.rank_label}->{order}", a)
    plain = plain.reshape(shared, -1, copies * rank)  # (S, outer, R)
    copied = np.einsum("mn,rl->mrnl", np.eye(copies), b).reshape(copies * rank, -1)
    copied = np.repeat(copied[None], shared, axis=0)  # (S, R, rest l)
    if split.kernel[-1] in split.free:
        return _shaped(split, shape, plain, copied)
    return _shaped(split, shape, copied.swapaxes(1, 2), plain.swapaxes(1, 2))


def to_per_axis(split: EinsumSplit, kernel_shape: Shape, a: Array, b: Array) -> Pair:
    """The inverse of `from_per_axis`: `(a, b)` of the least rank that has `a b = A B`.

    This is the rank of the delta as a matrix of `kernel.shape[:-1]` by `kernel.shape[-1]`, and at
    least 1. For a layer whose `A` and `B` have this layout already, such as `Dense`, they are
    returned as they are.

    Args:
        split: The axes of the kernel.
        kernel_shape: The shape of the kernel.
        a: `A`, `(shared, contracted, R)`.
        b: `B`, `(shared, R, free)`.

    Returns:
        `a` `(*kernel.shape[:-1], r)` and `b` `(r, kernel.shape[-1])` in float64.

    Example:

    >>> from keras_lora.lowrank.equations import split_equation
    >>> split, rng = split_equation("btd,dnh->btnh"), np.random.default_rng(0)
    >>> big_a, big_b = rng.normal(size=(11, 2)), rng.normal(size=(2, 3, 7))
    >>> a, b = to_per_axis(split, (11, 3, 7), big_a, big_b)
    >>> a.shape, b.shape, np.allclose(a @ b, np.tensordot(big_a, big_b, 1))
    ((11, 3, 6), (6, 7), True)
    """
    a, b = np.asarray(a, "float64"), np.asarray(b, "float64")
    last, width = split.kernel[-1], kernel_shape[-1]
    if last in split.shared:
        delta = np.einsum(f"{split.a},{split.b}->{split.kernel}", a, b)
        left, right = _rank_factors(delta.reshape(-1, width))
        return left.reshape(*kernel_shape[:-1], -1), right
    d, k = split.matrix_shape(kernel_shape)
    left, right = a.reshape(-1, d, a.shape[-1]), b.reshape(-1, a.shape[-1], k)
    if last in split.contracted:  # (A B)^T = B^T A^T
        left, right = right.swapaxes(1, 2), left.swapaxes(1, 2)
    left, right = _last_axis_factors(left, right, width)
    labels = split.shared + "".join(_around_last(split))
    size = split.sizes(kernel_shape)
    left = left.reshape(*(size[c] for c in labels), -1)
    order = split.kernel[:-1] + split.rank_label
    return np.einsum(f"{labels}{split.rank_label}->{order}", left), right


def _around_last(split: EinsumSplit) -> tuple[str, str]:
    """The axes of the factor without the kernel's last axis `l`; those of the other except `l`."""
    if split.kernel[-1] in split.free:
        return split.contracted, split.free[:-1]
    return split.free, split.contracted[:-1]


def _count(split: EinsumSplit, shape: Shape, labels: str) -> int:
    size = split.sizes(shape)
    return math.prod(size[c] for c in labels)


def _shaped(split: EinsumSplit, shape: Shape, a: Array, b: Array) -> Pair:
    a_shape, b_shape = split.factor_shapes(shape, a.shape[-1])
    return a.reshape(a_shape), b.reshape(b_shape)


def _identity_and_delta(split: EinsumSplit, delta: Array) -> Pair:
    """`delta = I delta` or `delta = delta I`, whichever has the lower rank."""
    d, k = split.matrix_shape(delta.shape)
    order = split.shared + split.contracted + split.free
    matrices = np.einsum(f"{split.kernel}->{order}", delta).reshape(-1, d, k)
    eyes = np.repeat(np.eye(min(d, k))[None], len(matrices), axis=0)
    factors = (eyes, matrices) if d <= k else (matrices, eyes)
    return _shaped(split, delta.shape, *factors)


def _last_axis_factors(left: Array, right: Array, width: int) -> Pair:
    """`(S, P, R)`, `(S, R, N l)` -> `(S P N, r)`, `(r, l)` with the same product, `l = width`."""
    shared, rows, rank = left.shape
    if shared == 1 and right.shape[-1] == width and rank <= min(rows, width):
        return left[0], right[0]
    q, t = np.linalg.qr(left)  # (S, P, m) (S, m, R); T right has the rank of the product
    u, v = _rank_factors((t @ right).reshape(-1, width))  # (S m N, r) (r, l)
    u = u.reshape(shared, t.shape[1], -1)  # (S, m, N r)
    return (q @ u).reshape(-1, len(v)), v


def _rank_factors(matrix: Array) -> Pair:
    """`(m, r) (r, l)` with `r` the rank of a matrix, or 1 if the matrix is zero."""
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    noise = s[0] * max(matrix.shape) * np.finfo("float64").eps
    rank = max(1, int((s > noise).sum()))
    root = np.sqrt(s[:rank])
    return u[:, :rank] * root, root[:, None] * vt[:rank]
