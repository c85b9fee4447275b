"""Starts from `W0` itself: `A0 B0` is a part of `W0` that the adapter goes on to train.

What is not in `A0 B0` stays frozen. `W0` is not changed: `h = x W0 + s (x A B - x A0 B0)`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, TypeAlias, final

import keras
import numpy as np
from keras import ops

from keras_lora.initializers.starts import FrozenMatrix, Start, Started
from keras_lora.lowrank.decomposing import balanced
from keras_lora.lowrank.equations import Shape, Tensor

Array: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"

# Columns beyond the rank that a randomised SVD works with (Halko et al. 2011, section 4.2).
_OVERSAMPLING = 10


@final
@dataclass(frozen=True)
class PiSSA(Start):
    """The principal part of `W0`: its best approximation of rank `r`.

        W0 = U S V^T      A0 = U_r sqrt(S_r / s)      B0 = sqrt(S_r / s) V_r^T

    so that `s A0 B0 = U_r S_r V_r^T`.

    The adapter trains the directions in which `W0` is largest.

    Attributes:
        iterations: None for the exact SVD, or the number of power iterations of a randomised one.

    References: Meng, Wang and Zhang 2024, "PiSSA: Principal Singular Values and Singular Vectors
    Adaptation of Large Language Models", https://arxiv.org/abs/2404.02948, section 3; Halko,
    Martinsson and Tropp 2011, "Finding Structure with Randomness", algorithms 4.4 and 5.1.
    """

    iterations: int | None = None

    has_counterpart: ClassVar[bool] = True

    def started(self, w: FrozenMatrix, rank: int, scaling: float) -> Started:
        normal = keras.initializers.RandomNormal(stddev=1.0)

        def pair() -> tuple[Array, Array]:
            matrices = ops.convert_to_numpy(w.values())
            if self.iterations is None:
                u, values, v = np.linalg.svd(matrices, full_matrices=False)
            else:
                u, values, v = randomized_svd(matrices, rank, self.iterations, normal)
            return balanced(u, values, v, rank, scaling)

        return together(rank, pair)


@final
@dataclass(frozen=True)
class OLoRA(Start):
    """Orthonormal directions of the outputs, from the QR decomposition of `W0`.

        W0^T = Q R      A0 = R_r^T   (d, r)      B0 = Q_r^T   (r, k), with orthonormal rows

    `Q_r` are the first `r` columns of `Q`, `R_r` the first `r` rows of `R`.

    Reference: Büyükakyüz 2024, "OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models",
    https://arxiv.org/abs/2406.01775, section 3.
    """

    has_counterpart: ClassVar[bool] = True

    def started(self, w: FrozenMatrix, rank: int, scaling: float) -> Started:  # noqa: ARG002
        def pair() -> tuple[Array, Array]:
            matrices = ops.convert_to_numpy(w.values())
            # Q_r depends on the first columns of W0^T alone, and R_r = Q_r^T W0^T.
            q, _ = np.linalg.qr(matrices[:, :rank].swapaxes(1, 2))
            return matrices @ q, q.swapaxes(1, 2)

        return together(rank, pair)


def randomized_svd(
    w: Array, rank: int, iterations: int, normal: Callable[[Shape, str], Tensor]
) -> tuple[Array, Array, Array]:
    """The largest singular values and vectors of each matrix, by a random basis of its range.

    Args:
        w: `(shared, d, k)`.
        rank: How many are asked for; some more are returned.
        iterations: Of the power method: each multiplies `W` by `W W^T`.
        normal: Draws standard normal values.

    Returns:
        `U (shared, d, n)`, `S (shared, n)` and `V^T (shared, n, k)`.

    Reference: Halko, Martinsson and Tropp 2011, algorithms 4.4 and 5.1.
    """
    shared, d, k = w.shape
    columns = min(rank + _OVERSAMPLING, d, k)
    start = ops.convert_to_numpy(normal((shared, k, columns), "float32"))
    basis = _conditioned(w @ start.astype(w.dtype))
    for _ in range(iterations):
        rows = basis.swapaxes(1, 2) @ w  # W^T Q would take twice the time
        basis = _conditioned(w @ _conditioned(rows.swapaxes(1, 2)))
    basis = np.linalg.qr(basis)[0]
    u, values, v = np.linalg.svd(basis.swapaxes(1, 2) @ w, full_matrices=False)
    return basis @ u, values, v


def _conditioned(columns: Array) -> Array:
    """Nearly orthonormal columns with the same span.

    By Cholesky's decomposition of their products, which takes a tenth of the time of QR: between
    the steps of the power method the columns need only stay independent.
    """
    products = (columns.swapaxes(1, 2) @ columns).astype("float64")
    try:
        inverse = np.linalg.inv(np.linalg.cholesky(products)).swapaxes(1, 2)
    except np.linalg.LinAlgError:  # the columns are nearly dependent
        return np.linalg.qr(columns)[0]
    return columns @ inverse.astype(columns.dtype)


def together(rank: int, pair: Callable[[], tuple[Array, Array]]) -> Started:
    """Both factors from one computation; zeros where the matrices have no more directions."""
    once = cache(pair)

    def a(shape: Shape, dtype: str) -> Tensor:
        return ops.convert_to_tensor(padded(once()[0], 2, rank).reshape(shape), dtype)

    def b(shape: Shape, dtype: str) -> Tensor:
        return ops.convert_to_tensor(padded(once()[1], 1, rank).reshape(shape), dtype)

    return Started(a, b)


def padded(factor: Array, axis: int, rank: int) -> Array:
    """A factor with zeros for the directions that are missing."""
    missing = rank - factor.shape[axis]
    return np.pad(factor, [(0, missing if axis == i else 0) for i in range(3)])
