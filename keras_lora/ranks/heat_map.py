"""A picture of layers by ranks."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import numpy as np

from keras_lora.pictures import new_figure, write_figure


def write_heat_map(
    path: str | os.PathLike[str], singular_values: Mapping[str, Sequence[float]]
) -> None:
    """Write a picture: a row for each label, and a column for each rank.

    The colour is the share of the row's energy, `s_i^2 / sum_j s_j^2`, by its logarithm.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the end of the name is no kind of picture.
    """
    labels, shares = list(singular_values), _shares(list(singular_values.values()))
    figure = new_figure(7, 1.5 + 0.16 * len(labels))
    axes = figure.subplots()
    image = axes.imshow(shares, aspect="auto", vmin=-4, vmax=0)
    axes.set_yticks(range(len(labels)), labels, fontsize=6)
    axes.set_xlabel("singular values of the update, the largest first")
    figure.colorbar(image, label="log10 of the share of the energy")
    write_figure(figure, path)


def _shares(rows: Sequence[Sequence[float]]) -> np.ndarray:
    """`log10(s_i^2 / sum_j s_j^2)`; NaN behind the last value of a row, and where all are zero."""
    shares = np.full((len(rows), max(map(len, rows))), np.nan)
    for row, values in zip(shares, rows, strict=True):
        squares = np.square(values)
        total = squares.sum() or np.nan
        row[: len(values)] = np.log10(np.maximum(squares / total, np.finfo(float).tiny))
    return shares
