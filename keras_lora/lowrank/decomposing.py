"""The singular values of a product of factors, and what follows from them.

    A = Q_a R_a     B^T = Q_b R_b     R_a R_b^T = U S V^T     A B = (Q_a U) S (Q_b V)^T

The `(d, k)` product is never formed.

References:
    Eckart and Young 1936, "The approximation of one matrix by another of lower rank".
    Roy and Vetterli 2007, "The effective rank: a measure of effective dimensionality".
    Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", section 7.3.
    Shuttleworth et al. 2024, "LoRA vs Full Fine-tuning: An Illusion of Equivalence", section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from keras_lora.checks import check_rank, invalid

Array = npt.NDArray[Any]


class Truncation(NamedTuple):
    """The factors that `truncate` returns, and the singular values before truncation.

    Attributes:
        a: `A'`, of shape `(shared, d, rank)`.
        b: `B'`, of shape `(shared, rank, k)`.
        singular_values: The singular values of `A B`, of shape `(shared, n)`, the largest first.

    Example:

    >>> Truncation(np.ones((1, 2, 1)), np.ones((1, 1, 2)), np.array([[4.0, 3.0]])).relative_error
    0.6
    """

    a: Array
    b: Array
    singular_values: Array

    @property
    def relative_error(self) -> float:
        """`|A B - A' B'| / |A B|` in the Frobenius norm, over all shared indices; 0 for 0/0."""
        return _relative_error(self.singular_values, self.a.shape[-1])


def _relative_error(singular_values: Array, rank: int) -> float:
    whole = np.linalg.norm(singular_values)
    return float(np.linalg.norm(singular_values[:, rank:]) / whole) if whole else 0.0


class Decomposition(NamedTuple):
    """The singular value decomposition of `A B` for each shared index.

    Attributes:
        left: The directions `u_i` among the inputs, of shape `(shared, d, n)`.
        singular_values: `s_i`, of shape `(shared, n)`, the largest first.
        right: The directions `v_i` among the outputs, of shape `(shared, k, n)`.

    Example:

    >>> found = decompose(np.diag([4.0, 3.0])[None], np.eye(2)[None])
    >>> found.singular_values.round(6).tolist(), round(found.effective_rank, 3)
    ([[4.0, 3.0]], 1.98)
    >>> round(found.energy(1), 6), found.rank_of(0.6), found.rank_of(0.65)
    (0.64, 1, 2)
    """

    left: Array
    singular_values: Array
    right: Array

    @property
    def effective_rank(self) -> float:
        """`exp(-sum_i p_i log p_i)` with `p_i = s_i / sum_j s_j`; the mean over shared indices.

        It is `r` for `r` equal singular values, less if they differ, and 0 for a product of zero.
        """
        total = self.singular_values.sum(1, keepdims=True)
        shares = self.singular_values / np.where(total > 0, total, 1)
        entropy = -(shares * np.log(np.where(shares > 0, shares, 1))).sum(1)
        return float(np.where(total[:, 0] > 0, np.exp(entropy), 0).mean())

    @property
    def norm(self) -> float:
        """The Frobenius norm of `A B`, over all shared indices."""
        return float(np.linalg.norm(self.singular_values))

    @property
    def energies(self) -> Array:
        """`sum_{i <= k} s_i^2 / sum_i s_i^2` for each rank `k` from 1 on; 1 for a product of 0."""
        squares = (self.singular_values**2).sum(0)
        total = squares.sum()
        return np.minimum(np.cumsum(squares) / total, 1) if total else np.ones(len(squares))

    def energy(self, rank: int) -> float:
        """The share of `|A B|^2` that the best approximation of this rank keeps, in [0, 1]."""
        energies = self.energies
        return float(energies[min(rank, len(energies)) - 1])

    def rank_of(self, energy: float) -> int:
        """The lowest rank, from 1 on, that keeps this share; rounding errors do not count."""
        return rank_of(self.energies, energy)

    def relative_error(self, rank: int) -> float:
        """That of `truncated(rank)`."""
        return _relative_error(self.singular_values, rank)

    def truncated(self, rank: int) -> Truncation:
        """`truncate` of the decomposed product."""
        check_rank(rank)
        a, b = balanced(self.left, self.singular_values, self.right.mT, rank)
        return Truncation(a, b, self.singular_values)

    def amplification(self, w: Array) -> float:
        """How much stronger `A B` is in its own directions than a matrix `W` is there.

            |A B| / |U^T W V|        in Frobenius norms, over the directions with `s_i > 0`

        Args:
            w: `W`, of shape `(shared, d, k)`.

        Returns:
            The factor; 0 for a product of zero, infinite where `W` has nothing in its directions.

        Reference:
            Hu et al. 2021, section 7.3.
        """
        if not self.norm:
            return 0.0
        kept = self.singular_values > 0
        inside = (self.left * kept[:, None]).mT.astype(w.dtype) @ w
        inside = inside @ (self.right * kept[:, None]).astype(w.dtype)
        beside = float(np.linalg.norm(inside))
        return self.norm / beside if beside else float("inf")


def decompose(a: Array, b: Array) -> Decomposition:
    """The singular value decomposition of `A B` from the factors.

    Args:
        a: `A`, of shape `(shared, d, r)`.
        b: `B`, of shape `(shared, r, k)`.

    Raises:
        ValueError: shapes other than these, or values that are not finite.

    Example:

    >>> decompose(np.ones((1, 3, 2)), np.ones((1, 2, 3))).singular_values.round(6).tolist()
    [[6.0, 0.0]]
    """
    a, b = checked_factors(a, b)
    q_a, r_a = np.linalg.qr(a)  # (shared, d, m), (shared, m, r)
    q_b, r_b = np.linalg.qr(b.mT)  # (shared, k, n), (shared, n, r)
    u, s, vt = np.linalg.svd(r_a @ r_b.mT, full_matrices=False)
    # Where adapters cancel each other, only rounding errors are left, which count as zero.
    s[s <= _rounding(r_a, r_b)] = 0
    return Decomposition(q_a @ u, s, q_b @ vt.mT)


def rank_of(energies: Sequence[float] | Array, energy: float) -> int:
    """The lowest rank, from 1 on, whose share in `Decomposition.energies` is this large."""
    enough = np.asarray(energies) >= energy - np.finfo(np.float64).eps
    return int(np.argmax(enough)) + 1 if enough.any() else len(enough)


def balanced(
    u: Array, values: Array, v: Array, rank: int, scaling: float = 1.0
) -> tuple[Array, Array]:
    """Factors of equal norm of the largest part of a matrix: `s A B = U_r S_r V_r^T`.

        A = U_r sqrt(S_r / s)      B = sqrt(S_r / s) V_r^T

    Args:
        u: `U`, of shape `(shared, d, n)`.
        values: `S`, of shape `(shared, n)`.
        v: `V^T`, of shape `(shared, n, k)`.
        rank: `r`.
        scaling: `s`, positive.

    Example:

    >>> a, b = balanced(np.eye(2)[None], np.array([[4.0, 1.0]]), np.eye(2)[None], 1, scaling=4.0)
    >>> a.tolist(), b.tolist()
    ([[[1.0], [0.0]]], [[[1.0, 0.0]]])
    """
    roots = np.sqrt(values[:, None, :rank] / scaling)  # (shared, 1, rank)
    return u[..., :rank] * roots, roots.mT * v[:, :rank]


def truncate(a: Array, b: Array, rank: int) -> Truncation:
    """The best approximation of `A B` whose rank is `rank` at most (Eckart-Young).

        A B = U S V^T        A' = U_r sqrt(S_r)        B' = sqrt(S_r) V_r^T

    Both new factors have the same norm. If `d`, `k` or the rank of the given factors is less than
    `rank`, the new factors have that lower rank.

    Args:
        a: `A`, of shape `(shared, d, r)`.
        b: `B`, of shape `(shared, r, k)`.
        rank: The highest rank of the result, for each shared index.

    Returns:
        The new factors in float64, with the singular values.

    Raises:
        ValueError: shapes other than these, values that are not finite, or a rank that is no
            positive integer.

    Reference:
        Eckart and Young 1936, "The approximation of one matrix by another of lower rank".

    Example:

    >>> a, b = np.diag([4.0, 3.0])[None], np.eye(2)[None]
    >>> cut = truncate(a, b, rank=1)
    >>> (cut.a @ cut.b).round(6).tolist(), round(cut.relative_error, 6)
    ([[[4.0, 0.0], [0.0, 0.0]]], 0.6)
    """
    check_rank(rank)
    return decompose(a, b).truncated(rank)


def intruders(w: Array, changed: Array, count: int, epsilon: float) -> int:
    """How many of the strongest directions of a changed matrix the matrix had nothing like before.

    Of the first `count` singular vectors among the outputs, `y_j` of the changed matrix is an
    intruder if `max_i |x_i . y_j| < epsilon` over all those `x_i` of `W`. This needs the
    decomposition of both `(d, k)` matrices.

    Args:
        w: `W`, of shape `(shared, d, k)`.
        changed: `W + s A B`, likewise.
        count: How many directions to look at, for each shared index.
        epsilon: The cosine below which a direction is new, in (0, 1].

    Returns:
        Their number, over all shared indices.

    Reference:
        Shuttleworth et al. 2024, https://arxiv.org/abs/2410.21228, section 3 and algorithm 1.

    Example:

    >>> w = np.diag([3.0, 2.0, 1.0])[None]
    >>> new = w + 5 * np.full((1, 3, 3), 1.0)
    >>> intruders(w, new, count=1, epsilon=0.7), intruders(w, w, count=3, epsilon=0.7)
    (1, 0)
    """
    before = np.linalg.svd(w, full_matrices=False).Vh
    after = np.linalg.svd(changed, full_matrices=False).Vh[:, :count]
    likeness = np.abs(before @ after.mT).max(axis=1)  # (shared, count)
    return int((likeness < epsilon).sum())


def _rounding(r_a: Array, r_b: Array) -> Array:
    """The size of the rounding error of `R_a R_b^T`, of shape `(shared, 1)`."""
    norm_a, norm_b = (np.linalg.norm(r, axis=(1, 2)) for r in (r_a, r_b))
    return (np.finfo(np.float64).eps * norm_a * norm_b)[:, None]


def checked_factors(a: Array, b: Array) -> tuple[Array, Array]:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.ndim != 3 or b.ndim != 3 or (a.shape[0], a.shape[2]) != b.shape[:2]:
        expected = "`a` of shape (shared, d, r) and `b` of shape (shared, r, k)"
        fix = "for an ordinary Dense add the shared axis: a[None], b[None]"
        raise invalid("factors", expected, (a.shape, b.shape), fix)
    wrong = sum(int((~np.isfinite(x)).sum()) for x in (a, b))
    if wrong:
        received = f"{wrong} values that are NaN or infinite"
        raise invalid("factors", "finite values", received, "train or load this adapter again")
    return a, b
