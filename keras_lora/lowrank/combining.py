"""Several adapters of one layer combined into one: the arithmetic of factors, in float64.

    delta = sum_i c_i A_i B_i        c_i = (weight of adapter i) * (its scaling s_i)

`cat` and `svd` give this sum. The other methods combine all the `A_i`, weighted by
`sign(c_i) sqrt|c_i|`, and separately all the `B_i`, weighted by `sqrt|c_i|`. So they need equal
ranks, and their `A B` differs from the sum by cross terms `A_i B_j`.

References:
    Ilharco et al. 2022, "Editing Models with Task Arithmetic", section 2.
    Yadav et al. 2023, "TIES-Merging: Resolving Interference When Merging Models", section 4.
    Yu et al. 2023, "Language Models are Super Mario: Absorbing Abilities from Homologous
    Models as a Free Lunch" (DARE), section 3.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from keras_lora.checks import check_rank, invalid
from keras_lora.lowrank.decomposing import Array, checked_factors, truncate

METHODS = ("cat", "svd", "linear", "ties", "dare_ties", "dare_linear", "magnitude_prune")
MAJORITY_SIGNS = ("total", "frequency")

_OF_ANY_RANKS = ("cat", "svd")
_DROPPING = ("dare_ties", "dare_linear")
_ELECTING = ("ties", "dare_ties")
_SPARSE = ("ties", "dare_ties", "dare_linear", "magnitude_prune")


@dataclass(frozen=True, eq=False)
class WeightedFactors:
    """One adapter's share `c A B` of the sum.

    Args:
        a: `A`, of shape `(shared, d, r)`; `shared` is 1 for an ordinary `Dense`.
        b: `B`, of shape `(shared, r, k)`.
        coefficient: `c`, the adapter's weight times its scaling; may be negative.

    Raises:
        ValueError: shapes other than these, or a value that is not finite.

    Example:

    >>> WeightedFactors(np.ones((1, 11, 2)), np.ones((1, 2, 13)), -0.5).shape
    (1, 11, 13)
    """

    a: Array
    b: Array
    coefficient: float

    def __post_init__(self) -> None:
        if not math.isfinite(self.coefficient):
            raise invalid("coefficient", "a finite number", self.coefficient)
        for name, factor in zip("ab", checked_factors(self.a, self.b), strict=True):
            object.__setattr__(self, name, factor)

    @property
    def shape(self) -> tuple[int, int, int]:
        """`(shared, d, k)`, the shape of the delta."""
        return *self.a.shape[:2], self.b.shape[2]

    @property
    def rank(self) -> int:
        return self.a.shape[2]


@dataclass(frozen=True, kw_only=True)
class Combination:
    """How to combine adapters; see `combine` for the equations.

    Args:
        method: One of `METHODS`.
        rank: For `"svd"`: the rank to truncate to, at most; `None` keeps the exact sum.
        density: The fraction of entries kept, in `(0, 1]`; needed by `"ties"`, `"dare_ties"`,
            `"dare_linear"` and `"magnitude_prune"`, and by no other method.
        majority_sign: How `"ties"` and `"dare_ties"` elect a sign: by the `"total"` of the values,
            or by the `"frequency"` of each sign.
        seed: The seed for the entries that `"dare_ties"` and `"dare_linear"` drop; not negative.

    Raises:
        ValueError: a value outside the above.

    Example:

    >>> Combination(method="ties", density=0.2).majority_sign
    'total'
    """

    method: str
    rank: int | None = None
    density: float | None = None
    majority_sign: str = "total"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise invalid("method", f"one of {METHODS}", self.method)
        if self.rank is not None:
            self._check_rank()
        self._check_density()
        if self.majority_sign not in MAJORITY_SIGNS:
            raise invalid("majority_sign", f"one of {MAJORITY_SIGNS}", self.majority_sign)
        if not _is(numbers.Integral, self.seed) or self.seed < 0:
            raise invalid("seed", "an integer, zero or more", self.seed, "try seed=0")

    def _check_rank(self) -> None:
        if self.method != "svd":
            expected = f"None for method={self.method!r}, whose rank follows from the adapters"
            raise invalid("rank", expected, self.rank, "leave it out, or use method='svd'")
        check_rank(self.rank)

    def _check_density(self) -> None:
        if self.method not in _SPARSE:
            if self.density is not None:
                expected = f"None for method={self.method!r}, which drops no entries"
                fix = f"leave it out, or use one of {_SPARSE}"
                raise invalid("density", expected, self.density, fix)
        elif not _is(numbers.Real, self.density) or not 0 < (self.density or 0) <= 1:
            expected = f"a number in (0, 1] for method={self.method!r}"
            raise invalid("density", expected, self.density, "try density=0.5")


def combine(terms: Sequence[WeightedFactors], options: Combination) -> tuple[Array, Array]:
    """Factors `A`, `B` of one adapter whose scaling is 1, from those of several.

    With `X` for `A` or `B`, `w_i = sign(c_i) sqrt|c_i|` for `A`, and `w_i = sqrt|c_i|` for `B`:

        cat              A = [c_1 A_1, c_2 A_2, ...], B = [B_1; B_2; ...]: the exact sum,
                         whose rank is the sum of the ranks
        svd              the best approximation of that sum with rank `rank` (`truncate`)
        linear           X = sum_i w_i X_i
        magnitude_prune  X = sum_i w_i trim(X_i)
        dare_linear      X = sum_i w_i drop(X_i)
        ties             X = merge_i(w_i, trim(X_i))
        dare_ties        X = merge_i(w_i, drop(X_i))

    - `trim` keeps the `int(density * size)` entries of largest magnitude (at least one) in
      each shared index; `drop` keeps each entry with probability `density`, divided by `density`.
    - `merge` elects a sign for each entry, that of `sum_i X_i` (`"total"`) or of
      `sum_i sign(X_i)` (`"frequency"`), plus at zero; the result is the sum of `w_i X_i` over
      the adapters that have this sign, divided by their number. The weights have no vote.
    - All methods except `cat` and `svd` yield cross terms. For `linear`,
      `A B = sum_i c_i A_i B_i + sum_{i != j} w_i^A w_j^B A_i B_j`.

    Args:
        terms: The adapters of one layer, at least one. Their ranks must be equal, except for `cat`
            and `svd`.
        options: The method and its parameters.

    Returns:
        `A` of shape `(shared, d, rank)` and `B` of shape `(shared, rank, k)`, in float64.

    Raises:
        ValueError: no terms, shapes that differ, or ranks that differ where they must be equal.

    Example:

    >>> term = WeightedFactors(np.ones((1, 11, 2)), np.ones((1, 2, 13)), -0.5)
    >>> a, b = combine([term, term], Combination(method="cat"))
    >>> a.shape, b.shape, float((a @ b)[0, 0, 0])
    ((1, 11, 4), (1, 4, 13), -2.0)
    """
    _check_terms(terms, options.method)
    if options.method in _OF_ANY_RANKS:
        a = np.concatenate([term.coefficient * term.a for term in terms], axis=2)
        b = np.concatenate([term.b for term in terms], axis=1)
        if options.method == "cat":
            return a, b
        cut = truncate(a, b, options.rank or a.shape[2])
        return cut.a, cut.b
    rng = np.random.default_rng(options.seed)
    coefficients = np.array([term.coefficient for term in terms])
    roots = np.sqrt(np.abs(coefficients))
    a = _combined([term.a for term in terms], np.copysign(roots, coefficients), options, rng)
    return a, _combined([term.b for term in terms], roots, options, rng)


def _combined(
    factors: Sequence[Array], weights: Array, options: Combination, rng: np.random.Generator
) -> Array:
    """One factor from all the `A_i`, or from all the `B_i`."""
    x = np.stack([_sparse(factor, options, rng) for factor in factors])
    weighted = x * weights[:, None, None, None]  # (terms, shared, m, n)
    if options.method not in _ELECTING:
        return weighted.sum(axis=0)
    votes = x if options.majority_sign == "total" else np.sign(x)
    elected = np.where(votes.sum(axis=0) >= 0, 1, -1)
    agree = np.sign(x) == elected
    return (weighted * agree).sum(axis=0) / np.maximum(agree.sum(axis=0), 1)


def _sparse(x: Array, options: Combination, rng: np.random.Generator) -> Array:
    if options.density is None:
        return x
    if options.method in _DROPPING:
        return x * (rng.random(x.shape) < options.density) / options.density
    return _trimmed(x, options.density)


def _trimmed(x: Array, density: float) -> Array:
    sizes = np.abs(x).reshape(len(x), -1)  # (shared, m * n)
    count = max(1, int(density * sizes.shape[1]))
    largest = np.argsort(-sizes, axis=1, kind="stable")[:, :count]
    kept = np.zeros(sizes.shape, bool)
    np.put_along_axis(kept, largest, True, axis=1)
    return x * kept.reshape(x.shape)


def _check_terms(terms: Sequence[WeightedFactors], method: str) -> None:
    if not terms:
        raise invalid("terms", "at least one adapter", list(terms), "name the adapters to combine")
    shapes = [term.shape for term in terms]
    if len(set(shapes)) > 1:
        expected = "adapters of one layer, of equal (shared, d, k)"
        raise invalid("terms", expected, shapes, "combine the adapters layer by layer")
    ranks = [term.rank for term in terms]
    if len(set(ranks)) > 1 and method not in _OF_ANY_RANKS:
        fix = "use method='cat' or method='svd', which take any ranks"
        raise invalid("ranks", f"equal ranks for method={method!r}", ranks, fix)


def _is(kind: type, value: object) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)
