"""Combining adapters: what is refused, by name."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from support.combinations import PRUNED, D, K, make_terms, options

from keras_lora.lowrank.combining import METHODS, Combination, WeightedFactors, combine
from keras_lora.lowrank.decomposing import truncate

INVALID_OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"method": "mean"}, "method"),
    ({"method": "svd", "rank": 0}, "rank"),
    ({"method": "svd", "rank": 2.0}, "rank"),
    ({"method": "cat", "rank": 2}, "rank"),
    ({"method": "linear", "density": 0.5}, "density"),
    ({"method": "svd", "density": 0.5}, "density"),
    *[({"method": method}, "density") for method in PRUNED],
    *[
        ({"method": "ties", "density": bad}, "density")
        for bad in (0, -0.1, 1.1, math.nan, "1", True)
    ],
    ({"method": "ties", "density": 0.5, "majority_sign": "most"}, "majority_sign"),
    ({"method": "dare_ties", "density": 0.5, "seed": -1}, "seed"),
    ({"method": "dare_ties", "density": 0.5, "seed": 0.5}, "seed"),
    ({"method": "dare_ties", "density": 0.5, "seed": None}, "seed"),
]


@pytest.mark.parametrize(
    ("values", "named"), INVALID_OPTIONS, ids=[str(v) for v, _ in INVALID_OPTIONS]
)
def test_invalid_options_are_refused_by_name(values: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=f"Invalid `{named}`.*expected.*Received: {named}="):
        Combination(**values)


INVALID_FACTORS = [
    ((D, 3), (3, K), "shared"),
    ((1, D, 3), (1, 2, K), "shared"),
    ((2, D, 3), (1, 3, K), "shared"),
    ((1, 1, D, 3), (1, 3, K), "shared"),
]


@pytest.mark.parametrize(
    "make", [lambda a, b: WeightedFactors(a, b, 1.0), lambda a, b: truncate(a, b, 2)]
)
def test_invalid_factors_are_refused(make: Any) -> None:
    for a, b, expected in INVALID_FACTORS:
        with pytest.raises(ValueError, match=f"Invalid `factors`.*{expected}.*Received: factors="):
            make(np.ones(a), np.ones(b))
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="expected finite values.*33 values that are NaN"):
            make(np.full((1, D, 3), bad), np.ones((1, 3, K)))


@pytest.mark.parametrize("coefficient", [math.nan, math.inf])
def test_coefficients_are_finite(coefficient: float) -> None:
    with pytest.raises(ValueError, match="Invalid `coefficient`.*finite"):
        WeightedFactors(np.ones((1, D, 3)), np.ones((1, 3, K)), coefficient)


def test_truncate_refuses_a_bad_rank() -> None:
    with pytest.raises(ValueError, match="Invalid `rank`"):
        truncate(np.ones((1, D, 3)), np.ones((1, 3, K)), 0)


@pytest.mark.parametrize("method", METHODS)
def test_terms_that_do_not_fit_together_are_refused(method: str) -> None:
    term = WeightedFactors(np.ones((1, D, 3)), np.ones((1, 3, K)), 1.0)
    with pytest.raises(ValueError, match="Invalid `terms`: expected at least one adapter"):
        combine([], options(method))
    for a, b in [((1, 7, 3), (1, 3, K)), ((1, D, 3), (1, 3, 7)), ((2, D, 3), (2, 3, K))]:
        with pytest.raises(ValueError, match=r"one layer.*Received: terms=\[\(1, 11, 13\), \("):
            combine([term, WeightedFactors(np.ones(a), np.ones(b), 1.0)], options(method))


@pytest.mark.parametrize("method", [method for method in METHODS if method not in ("cat", "svd")])
def test_unequal_ranks_are_refused_where_factors_are_added(method: str) -> None:
    with pytest.raises(ValueError, match=r"Received: ranks=\[2, 3\].*method='cat'.*method='svd'"):
        combine(make_terms(1, [2, 3]), options(method))
