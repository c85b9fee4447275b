"""Ranks for several matrices, within one budget of parameters."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from keras_lora.checks import invalid


@dataclass(frozen=True)
class Candidate:
    """What each further rank of a matrix is worth, the most first, and what it costs.

    Example:

    >>> Candidate(gains=[4.0, 1.0], cost=12).highest
    2
    """

    gains: Sequence[float]
    cost: int

    @property
    def highest(self) -> int:
        return len(self.gains)


def spend(candidates: Sequence[Candidate], parameters: int, least: int) -> list[int]:
    """The rank of each candidate: rank by rank, what gains most and can be paid comes first.

    If `gains` are by parameter, and decrease as they do for singular values, no choice of the same
    size gains more; what is left of the budget is less than one rank costs.

    Args:
        candidates: The matrices.
        parameters: The size of all factors, at most.
        least: The rank that each gets, whatever it gains, if it has as many.

    Raises:
        ValueError: a budget that has no room for this.

    Example:

    >>> spend([Candidate([5.0, 1.0], 10), Candidate([3.0, 2.0], 10)], parameters=30, least=0)
    [1, 2]
    """
    ranks = [min(least, candidate.highest) for candidate in candidates]
    spent = sum(rank * candidate.cost for rank, candidate in zip(ranks, candidates, strict=True))
    needed = spent if least else min(candidate.cost for candidate in candidates)
    if parameters < needed:
        what = f"for rank {least} of each layer" if least else "for rank 1 of one layer"
        raise invalid("parameters", f"at least {needed}, {what}", parameters)
    left = parameters - spent
    heap = [(-c.gains[least], i) for i, c in enumerate(candidates) if c.highest > least]
    heapq.heapify(heap)
    while heap:
        _, i = heapq.heappop(heap)
        candidate = candidates[i]
        if candidate.cost <= left:
            left, ranks[i] = left - candidate.cost, ranks[i] + 1
            if ranks[i] < candidate.highest:
                heapq.heappush(heap, (-candidate.gains[ranks[i]], i))
    return ranks
