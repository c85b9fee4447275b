"""The distance of two deltas, against the matrices themselves in float64."""

from __future__ import annotations

import numpy as np
import pytest

from keras_lora.lowrank.combining import WeightedFactors
from keras_lora.lowrank.decomposing import Array
from keras_lora.lowrank.distances import array_distance, delta_distance

D, K = 11, 13


def term(shared: int, rank: int, coefficient: float, seed: int) -> WeightedFactors:
    rng = np.random.default_rng(seed)
    return WeightedFactors(
        rng.normal(size=(shared, D, rank)), rng.normal(size=(shared, rank, K)), coefficient
    )


def delta(term: WeightedFactors) -> Array:
    return term.coefficient * np.einsum("sdr,srk->sdk", term.a, term.b)


@pytest.mark.parametrize("shared", [1, 3])
@pytest.mark.parametrize("ranks", [(2, 2), (2, 7), (5, 23), (3, 0)])
def test_it_is_that_of_the_matrices(shared: int, ranks: tuple[int, int]) -> None:
    first, second = term(shared, ranks[0], 0.7, 1), term(shared, ranks[1], -1.3, 2)
    x, y = delta(first), delta(second)
    found = delta_distance(first, second)
    assert found.norms == pytest.approx((np.linalg.norm(x), np.linalg.norm(y)))
    assert found.distance == pytest.approx(np.linalg.norm(x - y))
    norms = np.linalg.norm(x) * np.linalg.norm(y)
    assert found.cosine == pytest.approx(np.vdot(x, y) / norms if norms else 0)
    assert found.relative == pytest.approx(np.linalg.norm(x - y) / max(found.norms))


def test_the_same_delta_in_other_factors_is_at_no_distance() -> None:
    first = term(1, 3, 2.0, 1)
    mixed = np.random.default_rng(2).normal(size=(3, 3))
    second = WeightedFactors(4 * first.a @ mixed, np.linalg.inv(mixed) @ first.b, 0.5)
    assert delta_distance(first, second).relative < 1e-14
    assert delta_distance(first, second).cosine == pytest.approx(1)


@pytest.mark.parametrize("size", [1e-6, 1e-9, 1e-12])
def test_small_distances_keep_their_digits(size: float) -> None:
    """Distances from Gram matrices lose all digits below 1e-8."""
    first = term(1, 3, 1.0, 1)
    second = WeightedFactors(first.a * (1 + size), first.b, 1.0)
    assert delta_distance(first, second).relative == pytest.approx(size, rel=1e-3)


@pytest.mark.parametrize(
    ("first", "second", "relative", "cosine"),
    [(0.0, 0.0, 0, 1), (0.0, 2.0, 1, 0), (2.0, 2.0, 0, 1), (2.0, -2.0, 2, -1), (1.0, 4.0, 0.75, 1)],
)
def test_zero_opposed_and_scaled(
    first: float, second: float, relative: float, cosine: float
) -> None:
    found = delta_distance(*(term(1, 3, c, 1) for c in (first, second)))
    assert (found.relative, found.cosine) == pytest.approx((relative, cosine), abs=1e-14)


def test_deltas_of_other_layers_are_refused() -> None:
    other = WeightedFactors(np.ones((1, D, 2)), np.ones((1, 2, K + 1)), 1.0)
    with pytest.raises(ValueError, match=r"expected factors of a delta of shape \(1, 11, 13\)"):
        delta_distance(term(1, 2, 1.0, 1), other)
    with pytest.raises(ValueError, match=r"expected an array of shape \(2,\)"):
        array_distance(np.ones(2), np.ones(3))
