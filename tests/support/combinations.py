"""Pairs of factors to combine, and each method on dense matrices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from keras_lora.lowrank.combining import Combination, WeightedFactors

Array = npt.NDArray[Any]

D, K = 11, 13
ANY_RANKS = [[2], [3, 3], [2, 3, 5], [2, 3, 5, 3]]
COEFFICIENTS = [0.7, -1.3, 2.0, -0.4]
PRUNED = ["magnitude_prune", "ties", "dare_linear", "dare_ties"]


def make_terms(shared: int, ranks: Sequence[int], seed: int = 0) -> list[WeightedFactors]:
    rng = np.random.default_rng(seed)
    return [
        WeightedFactors(rng.normal(size=(shared, D, r)), rng.normal(size=(shared, r, K)), c)
        for r, c in zip(ranks, COEFFICIENTS, strict=False)
    ]


def dense_sum(terms: Sequence[WeightedFactors]) -> Array:
    total = np.zeros((terms[0].a.shape[0], D, K))
    for term in terms:
        total += term.coefficient * np.einsum("sdr,srk->sdk", term.a, term.b)
    return total


def options(method: str, **changes: Any) -> Combination:
    density = {"density": 0.4} if method in PRUNED else {}
    return Combination(method=method, **{**density, **changes})


# The definitions, one entry at a time.


def largest(x: Array, density: float) -> Array:
    """For each shared index, only the entries above the largest magnitude that is dropped."""
    kept = np.zeros_like(x)
    for s in range(len(x)):
        magnitudes = sorted(np.abs(x[s]).ravel(), reverse=True)
        count = math.floor(density * len(magnitudes))
        limit = magnitudes[count] if count < len(magnitudes) else -1.0
        kept[s] = np.where(np.abs(x[s]) > limit, x[s], 0)
    return kept


def plain(x: Sequence[Array], weights: Sequence[float]) -> Array:
    return np.asarray(sum(w * x_i for w, x_i in zip(weights, x, strict=True)))


def elected(x: Sequence[Array], weights: Sequence[float], majority_sign: str) -> Array:
    merged = np.zeros_like(x[0])
    for at in np.ndindex(merged.shape):
        values = [float(x_i[at]) for x_i in x]
        votes = values if majority_sign == "total" else [math.copysign(v != 0, v) for v in values]
        positive = sum(votes) >= 0
        chosen = [i for i, v in enumerate(values) if v and (v > 0) == positive]
        if chosen:
            merged[at] = sum(weights[i] * values[i] for i in chosen) / len(chosen)
    return merged


def dense_reference(
    terms: Sequence[WeightedFactors], method: str, density: float, majority_sign: str
) -> Array:
    factors = []
    for name in "ab":
        x = [getattr(term, name) for term in terms]
        weights = [math.sqrt(abs(term.coefficient)) for term in terms]
        if name == "a":
            weights = [math.copysign(w, t.coefficient) for w, t in zip(weights, terms, strict=True)]
        if method != "linear":
            x = [largest(x_i, density) for x_i in x]
        factors.append(
            elected(x, weights, majority_sign) if method == "ties" else plain(x, weights)
        )
    return np.einsum("sdr,srk->sdk", *factors)
