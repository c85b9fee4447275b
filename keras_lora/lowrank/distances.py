"""How far two adapters of one layer are apart, from their factors alone.

    D_i = c_i A_i B_i        distance = |D_1 - D_2|        cosine = <D_1, D_2> / (|D_1| |D_2|)

with Frobenius norms. The `(d, k)` matrices are never formed. With the orthogonal `Q_A`, `Q_B` of
the QR decompositions of `[A_1, A_2]` and `[B_1; B_2]^T`, `D_i = Q_A C_i Q_B^T`, so norms and
products of the `D_i` are those of the small `C_i`. The Gram matrices of the factors would give
them too, with half of the digits lost where the two deltas are close.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from keras_lora.checks import invalid
from keras_lora.lowrank.combining import WeightedFactors
from keras_lora.lowrank.decomposing import Array


@dataclass(frozen=True)
class Distance:
    """How far two arrays, or the deltas of two adapters, are apart.

    Attributes:
        norms: The Frobenius norm of each.
        distance: The Frobenius norm of their difference.
        cosine: The cosine of the angle between them, in [-1, 1]; 1 if both are zero, 0 if only
            one is.
    """

    norms: tuple[float, float]
    distance: float
    cosine: float

    @property
    def relative(self) -> float:
        """The distance divided by the larger norm, in [0, 2]; 0 if both are zero."""
        return self.distance / max(self.norms) if any(self.norms) else 0.0


def delta_distance(first: WeightedFactors, second: WeightedFactors) -> Distance:
    """How far the deltas of two adapters of one layer are apart.

    Args:
        first: `c A B` of one adapter; `c` is its scaling.
        second: `c A B` of the other adapter, of any rank.

    Raises:
        ValueError: the adapters are of layers with different shapes.

    Example:

    >>> a, b = np.eye(11, 2)[None], np.eye(2, 13)[None]
    >>> first, second = WeightedFactors(a, b, 1.0), WeightedFactors(a[..., :1], b[:, :1], 2.0)
    >>> distance = delta_distance(first, second)
    >>> distance.norms == (2**0.5, 2), distance.distance == 2**0.5, round(distance.relative, 3)
    (True, True, 0.707)
    """
    if first.shape != second.shape:
        raise invalid("second", f"factors of a delta of shape {first.shape}", second.shape)
    a = np.linalg.qr(np.concatenate([first.a, second.a], 2)).R  # (shared, m, r_1 + r_2)
    b = np.linalg.qr(np.concatenate([first.b, second.b], 1).mT).R  # (shared, n, r_1 + r_2)
    own = np.arange(a.shape[2]) < first.rank
    cores = [
        term.coefficient * a[..., mask] @ b[..., mask].mT
        for term, mask in ((first, own), (second, ~own))
    ]
    return array_distance(*cores)


def array_distance(first: Array, second: Array) -> Distance:
    """How far two arrays of one shape are apart.

    Raises:
        ValueError: the shapes differ.

    Example:

    >>> array_distance(np.array([3.0, 0.0]), np.array([0.0, 4.0]))
    Distance(norms=(3.0, 4.0), distance=5.0, cosine=0.0)
    """
    if first.shape != second.shape:
        raise invalid("second", f"an array of shape {first.shape}", second.shape)
    x, y = (np.asarray(value, np.float64).ravel() for value in (first, second))
    norms = float(np.linalg.norm(x)), float(np.linalg.norm(y))
    if not all(norms):
        cosine = float(not any(norms))
    else:
        cosine = float(np.clip((x / norms[0]) @ (y / norms[1]), -1, 1))
    return Distance(norms, float(np.linalg.norm(x - y)), cosine)
