"""Ranks of layers as a config has them."""

from __future__ import annotations

from collections.abc import Mapping

from keras_lora.layers import Site


def rank_pattern(ranks: Mapping[str, int]) -> dict[str, int]:
    """Ranks by path, so that the first match of each path is its own.

    The path `dense` also matches `block/dense`, which therefore comes before it.

    Example:

    >>> rank_pattern({"dense": 2, "block/dense": 3})
    {'block/dense': 3, 'dense': 2}
    """
    return dict(sorted(ranks.items(), key=lambda item: -item[0].count("/")))


def highest_rank(site: Site) -> int:
    """The smaller side of a matrix: a rank above it adds nothing."""
    return min(site.split().matrix_shape(site.shape))


def parameters_of(site: Site, rank: int) -> int:
    """The size of both factors of a matrix."""
    shared, d, k = site.split().stacked_shape(site.shape)
    return shared * (d + k) * rank
