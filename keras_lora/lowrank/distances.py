"""How far two adapters of one layer are apart, from their factors alone.

    D_i = c_i A_i B_i        distance = |D_1 - D_2|        cosine = <D_1, D_2> / (|D_1| |D_2|)

with Frobenius norms. Of the `(d, k)` matrices none is formed: with the orthogonal `Q_A`, `Q_B` of
`[A_1, A_2]` and `[B_1; B_2]^T`, `D_i = Q_A C_i Q_B^T`, and norms and products are those of the
small `C_i`. The Gram matrices of the factors give them too, but lose half of the digits where the
two are close.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from keras_lora.checks import invalid
from keras_lora.lowrank.combining import Array, WeightedFactors


@dataclass(frozen=True)
class Distance:
    """Two arrays, or two deltas, against each other.

    Attributes:
        norms: The Frobenius norm of each.
        distance: That of their difference.
        cosine: Of the angle between them, in [-1, 1]; 1 where both are zero, 0 where one is.
    """

    norms: tuple[float, float]
    distance: float
    cosine: float

    @property
    def relative(self) -> float:
        """The distance by the larger of the norms, in [0, 2]; 0 where both are zero."""
        return self.distance / max(self.norms) if any(self.norms) else 0.0


def delta_distance(first: WeightedFactors, second: WeightedFactors) -> Distance:
    """How far the deltas of two adapters of one layer are apart.

    Args:
        first: `c A B` of one adapter; `c` is its scaling.
        second: That of the other, of any rank.

    Raises:
        ValueError: they are of layers of other shapes.

    Example:

    >>> a, b = np.eye(11, 2)[None], np.eye(2, 13)[None]
    >>> first, second = WeightedFactors(a, b, 1.0), WeightedFactors(a[..., :1], b[:, :1], 2.0)
    >>> distance = delta_distance(first, second)
    >>> distance.norms == (2**0.5, 2), distance.distance == 2**0.5, round(distance.relative, 3)
    (True, True, 0.707)
    """
    if first.shape != second.shape:
        raise invalid("second", f"a term of shape {first.shape}", second.shape)
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
        ValueError: they are of two shapes.

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
