"""Factors by axis, as KerasHub has them, and of whole matrices: exact both ways."""

from __future__ import annotations

import numpy as np
import pytest
from support.cases import LINEAR, Case, einsum, reference_delta
from support.keras_hub_files import normal

from keras_lora.lowrank.equations import EinsumSplit, split_equation
from keras_lora.lowrank.per_axis import from_per_axis, to_per_axis

# --- The conversion -------------------------------------------------------------------------

# Equations that no case has: the kernel's last axis is contracted, beside another contracted axis,
# and beside shared and free axes.
MORE = [
    einsum(equation, (), ())
    for equation in (
        "btnh,dnh->btd",
        "btnh,ndh->btd",
        "betd,efd->betf",
        "betnh,efnh->betf",
        "betd,efdg->betfg",
        "bde,dfe->bfe",
        "bde,gde->bge",
        "bgde,dfge->bfge",
    )
]
EQUATIONS = list(dict.fromkeys(case.equation for case in [*LINEAR, *MORE]))
SIZES = dict(zip("defghnxyc", (5, 3, 7, 2, 11, 4, 13, 17, 19), strict=True))
RANKS = (1, 2, 6, 23)


def parts(equation: str) -> tuple[EinsumSplit, tuple[int, ...]]:
    split = split_equation(equation)
    return split, tuple(SIZES.get(c, 5) for c in split.kernel)


def matrix_rank(delta: np.ndarray) -> int:
    """The rank of the delta that Keras's factors give."""
    return int(np.linalg.matrix_rank(delta.reshape(-1, delta.shape[-1])))


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("equation", EQUATIONS)
def test_from_per_axis_is_exact(equation: str, rank: int) -> None:
    split, shape = parts(equation)
    a, b = normal((*shape[:-1], rank), (rank, shape[-1]))
    big_a, big_b = from_per_axis(split, a, b)
    delta = np.tensordot(a, b, 1)
    case = Case("", lambda: None, (), equation)
    np.testing.assert_allclose(reference_delta(case, big_a, big_b, 1.0), delta, atol=1e-12)
    big_rank = big_a.shape[-1]
    assert (big_a.shape, big_b.shape) == split.factor_shapes(shape, big_rank)
    assert big_rank <= min(split.matrix_shape(shape))
    assert big_a.dtype == big_b.dtype == "float64"


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("equation", EQUATIONS)
def test_to_per_axis_is_exact_and_of_least_rank(equation: str, rank: int) -> None:
    split, shape = parts(equation)
    big_a, big_b = normal(*split.factor_shapes(shape, rank))
    a, b = to_per_axis(split, shape, big_a, big_b)
    delta = reference_delta(Case("", lambda: None, (), equation), big_a, big_b, 1.0)
    np.testing.assert_allclose(np.tensordot(a, b, 1), delta, atol=1e-11)
    assert a.shape == (*shape[:-1], len(b))
    assert len(b) == matrix_rank(delta)


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("equation", EQUATIONS)
def test_there_and_back(equation: str, rank: int) -> None:
    split, shape = parts(equation)
    a, b = normal((*shape[:-1], rank), (rank, shape[-1]))
    back_a, back_b = to_per_axis(split, shape, *from_per_axis(split, a, b))
    delta = np.tensordot(a, b, 1)
    np.testing.assert_allclose(np.tensordot(back_a, back_b, 1), delta, atol=1e-11)
    assert len(back_b) == matrix_rank(delta) <= rank


@pytest.mark.parametrize(
    ("equation", "shape", "rank", "expected"),
    [
        ("btd,dnh->btnh", (29, 3, 7), 2, 6),  # n r
        ("btd,ndh->btnh", (3, 29, 7), 2, 6),
        ("btd,dnh->btnh", (5, 3, 7), 2, 5),  # d
        ("btnh,nhd->btd", (3, 7, 29), 2, 2),  # r
        ("btnh,dnh->btd", (29, 3, 7), 2, 6),  # n r, of a contracted axis
        ("ab,bc->ac", (11, 13), 2, 2),
        ("bd,d->bd", (5,), 2, 1),
    ],
)
def test_rank_of_from_per_axis(
    equation: str, shape: tuple[int, ...], rank: int, expected: int
) -> None:
    pair = normal((*shape[:-1], rank), (rank, shape[-1]))
    big_a, _ = from_per_axis(split_equation(equation), *pair)
    assert big_a.shape[-1] == expected


@pytest.mark.parametrize("equation", ["ab,bc->ac", "btnh,nhd->btd"])
def test_equal_layouts_are_left_alone(equation: str) -> None:
    split, shape = parts(equation)
    a, b = normal((*shape[:-1], 2), (2, shape[-1]))
    for converted in (from_per_axis(split, a, b), to_per_axis(split, shape, a, b)):
        np.testing.assert_array_equal(converted[0], a)
        np.testing.assert_array_equal(converted[1], b)


@pytest.mark.parametrize("equation", EQUATIONS)
def test_zero_has_rank_one(equation: str) -> None:
    split, shape = parts(equation)
    big_a, big_b = (np.zeros(s) for s in split.factor_shapes(shape, 40))
    a, b = to_per_axis(split, shape, big_a, big_b)
    assert len(b) == 1
    assert not np.tensordot(a, b, 1).any()
