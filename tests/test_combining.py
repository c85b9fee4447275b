"""Combining adapters: each method against dense matrices, and against PEFT."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from peft.utils import merge_utils
from support.combinations import (
    ANY_RANKS,
    PRUNED,
    D,
    K,
    dense_reference,
    dense_sum,
    make_terms,
    options,
)

from keras_lora.lowrank.combining import METHODS, WeightedFactors, combine
from keras_lora.lowrank.decomposing import truncate


@pytest.mark.parametrize("shared", [1, 2])
@pytest.mark.parametrize("ranks", ANY_RANKS, ids=str)
@pytest.mark.parametrize("method", ["cat", "svd"])
def test_cat_and_svd_are_the_exact_sum(method: str, ranks: list[int], shared: int) -> None:
    terms = make_terms(shared, ranks)
    a, b = combine(terms, options(method))
    rank = sum(ranks) if method == "cat" else min(sum(ranks), D, K)
    assert (a.shape, b.shape) == ((shared, D, rank), (shared, rank, K))
    assert a.dtype == b.dtype == np.float64
    np.testing.assert_allclose(a @ b, dense_sum(terms), rtol=0, atol=1e-13)


@pytest.mark.parametrize("shared", [1, 2])
@pytest.mark.parametrize("rank", [1, 2, 5, 7, 10, 11, 40])
def test_svd_is_the_best_approximation(rank: int, shared: int) -> None:
    terms = make_terms(shared, [2, 3, 5])
    total = dense_sum(terms)
    u, s, vt = np.linalg.svd(total, full_matrices=False)
    best = np.einsum("sdr,sr,srk->sdk", u[:, :, :rank], s[:, :rank], vt[:, :rank])

    a, b = combine(terms, options("svd", rank=rank))
    assert a.shape[2] == b.shape[1] == min(rank, 2 + 3 + 5)
    np.testing.assert_allclose(a @ b, best, rtol=0, atol=1e-12)
    np.testing.assert_allclose(
        np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=2), rtol=0, atol=1e-12
    )

    cut = truncate(*combine(terms, options("cat")), rank)
    np.testing.assert_array_equal(cut.a @ cut.b, a @ b)
    np.testing.assert_allclose(cut.singular_values, s[:, :10], rtol=0, atol=1e-12)
    error = np.linalg.norm(total - a @ b) / np.linalg.norm(total)
    assert cut.relative_error == pytest.approx(error, rel=1e-9, abs=1e-14)
    assert (cut.relative_error == 0) == (rank >= 10)


@pytest.mark.parametrize(("d", "k", "r"), [(2, 13, 5), (11, 2, 5), (11, 13, 17), (11, 13, 1)])
def test_truncate_takes_factors_of_any_proportions(d: int, k: int, r: int) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(1, d, r)), rng.normal(size=(1, r, k))
    cut = truncate(a, b, r)
    assert cut.a.shape[2] == min(d, k, r)
    np.testing.assert_allclose(cut.a @ cut.b, a @ b, rtol=0, atol=1e-12)
    assert cut.relative_error == 0


def test_an_adapter_minus_itself_is_zero() -> None:
    (term,) = make_terms(1, [3])
    both = [WeightedFactors(term.a, term.b, c) for c in (0.3, -0.3)]
    cut = truncate(*combine(both, options("cat")), 2)
    assert cut.relative_error == 0
    np.testing.assert_array_equal(cut.a @ cut.b, np.zeros((1, D, K)))


@pytest.mark.parametrize("shared", [1, 2])
@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("density", [0.4, 0.73, 1.0])
@pytest.mark.parametrize(
    ("method", "majority_sign"),
    [("linear", "total"), ("magnitude_prune", "total"), ("ties", "total"), ("ties", "frequency")],
)
def test_methods_on_factors_follow_their_definitions(
    method: str, majority_sign: str, density: float, count: int, shared: int
) -> None:
    terms = make_terms(shared, [3] * count)
    changes = {} if method == "linear" else {"density": density}
    a, b = combine(terms, options(method, majority_sign=majority_sign, **changes))
    assert (a.shape, b.shape) == ((shared, D, 3), (shared, 3, K))
    assert a.dtype == b.dtype == np.float64
    expected = dense_reference(terms, method, density, majority_sign)
    np.testing.assert_allclose(a @ b, expected, rtol=0, atol=1e-13)


def test_linear_is_the_sum_and_its_cross_terms() -> None:
    terms = make_terms(1, [3, 3])
    (w_1, w_2) = (math.sqrt(abs(term.coefficient)) for term in terms)
    assert [term.coefficient > 0 for term in terms] == [True, False]
    cross = w_1 * w_2 * (terms[0].a @ terms[1].b - terms[1].a @ terms[0].b)
    a, b = combine(terms, options("linear"))
    np.testing.assert_allclose(a @ b, dense_sum(terms) + cross, rtol=0, atol=1e-13)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("coefficient", [1.5, -1.5])
def test_one_adapter_keeps_its_delta_where_nothing_is_dropped(
    method: str, coefficient: float
) -> None:
    (term,) = make_terms(2, [3])
    term = WeightedFactors(term.a.astype("float32"), term.b.astype("float32"), coefficient)
    a, b = combine([term], options(method, **({"density": 1} if method in PRUNED else {})))
    np.testing.assert_allclose(a @ b, dense_sum([term]), rtol=0, atol=1e-13)


@pytest.mark.parametrize("method", METHODS)
def test_a_weight_of_zero_is_taken(method: str) -> None:
    terms = [WeightedFactors(term.a, term.b, 0.0) for term in make_terms(1, [3, 3])]
    a, b = combine(terms, options(method))
    np.testing.assert_array_equal(a @ b, np.zeros((1, D, K)))


@pytest.mark.parametrize("density", [0.4, 0.73])
@pytest.mark.parametrize(
    ("method", "theirs", "majority_sign"),
    [
        ("linear", "task_arithmetic", None),
        ("magnitude_prune", "magnitude_prune", None),
        ("ties", "ties", "total"),
        ("ties", "ties", "frequency"),
    ],
)
def test_agrees_with_peft(
    method: str, theirs: str, majority_sign: str | None, density: float
) -> None:
    terms = make_terms(2, [5, 5, 5])
    changes: dict[str, Any] = {} if method == "linear" else {"density": density}
    if majority_sign is not None:
        changes["majority_sign"] = majority_sign
    ours = combine(terms, options(method, **changes))

    coefficients = torch.tensor([term.coefficient for term in terms], dtype=torch.float64)
    for name, weights, factor in zip(
        "ab",
        (coefficients.sign() * coefficients.abs().sqrt(), coefficients.abs().sqrt()),
        ours,
        strict=True,
    ):
        for s in range(2):  # to PEFT each shared index is a layer of its own, and A is (r, d)
            tensors = [torch.tensor(getattr(term, name)[s].T) for term in terms]
            expected = getattr(merge_utils, theirs)(tensors, weights, *changes.values())
            np.testing.assert_allclose(factor[s], expected.numpy().T, rtol=0, atol=1e-14)


def ones(count: int, rank: int) -> list[WeightedFactors]:
    return [
        WeightedFactors(np.ones((2, 101, rank)), np.ones((2, rank, 103)), 1.0) for _ in range(count)
    ]


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_dare_keeps_a_fraction_and_rescales_it(density: float, method: str) -> None:
    for x in combine(ones(1, rank=7), options(method, density=density)):
        assert set(np.unique(x).tolist()) == {0.0, 1 / density}
        deviation = math.sqrt(density * (1 - density) / x.size)
        assert abs((x != 0).mean() - density) < 4 * deviation


def test_dare_drops_each_adapter_apart_and_averages_in_ties() -> None:
    density, chance = 0.5, {}
    for method in ("dare_linear", "dare_ties"):
        a, _ = combine(ones(2, rank=7), options(method, density=density))
        values, counts = np.unique(a, return_counts=True)
        chance[method] = dict(zip(values.tolist(), (counts / a.size).tolist(), strict=True))
    assert chance["dare_linear"] == pytest.approx({0.0: 0.25, 2.0: 0.5, 4.0: 0.25}, abs=0.05)
    assert chance["dare_ties"] == pytest.approx({0.0: 0.25, 2.0: 0.75}, abs=0.05)


def test_dare_linear_is_linear_in_the_mean() -> None:
    terms = make_terms(1, [2, 2])
    expected, _ = combine(terms, options("linear"))
    draws = [combine(terms, options("dare_linear", seed=seed))[0] for seed in range(2000)]
    deviation = np.std(draws, axis=0) / math.sqrt(len(draws))
    assert (np.abs(np.mean(draws, axis=0) - expected) < 5 * deviation).all()


@pytest.mark.parametrize("method", METHODS)
def test_the_same_seed_gives_the_same_factors(method: str) -> None:
    terms = make_terms(2, [3, 3])
    first, again, other = (combine(terms, options(method, seed=seed)) for seed in (5, 5, 6))
    for x, same, different in zip(first, again, other, strict=True):
        np.testing.assert_array_equal(x, same)
        assert (x != different).any() == method.startswith("dare")


@pytest.mark.parametrize(
    ("method", "undropped", "changes"),
    [
        ("dare_linear", "linear", {}),
        ("magnitude_prune", "linear", {}),
        ("dare_ties", "ties", {"density": 1.0}),
    ],
)
def test_density_one_drops_nothing(method: str, undropped: str, changes: dict[str, Any]) -> None:
    terms = make_terms(2, [3, 3, 3])
    ours = combine(terms, options(method, density=1.0))
    for x, expected in zip(ours, combine(terms, options(undropped, **changes)), strict=True):
        np.testing.assert_array_equal(x, expected)


def test_the_smallest_density_keeps_one_entry() -> None:
    for x in combine(make_terms(2, [3]), options("magnitude_prune", density=1e-6)):
        assert (x != 0).sum(axis=(1, 2)).tolist() == [1, 1]
