"""A picture of layers by ranks."""

from __future__ import annotations

import importlib
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from keras_lora.files.atomic import write_files


def write_heat_map(
    path: str | os.PathLike[str], singular_values: Mapping[str, Sequence[float]]
) -> None:
    """Write a picture: a row for each label, and a column for each rank.

    The colour is the share of the row's energy, `s_i^2 / sum_j s_j^2`, by its logarithm.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the end of the name is no kind of picture.
    """
    figure = _figure(singular_values)
    target, content = Path(path), io.BytesIO()
    figure.savefig(content, format=target.suffix[1:], dpi=120)
    write_files(target.parent, {target.name: content.getvalue()})


def _figure(singular_values: Mapping[str, Sequence[float]]) -> Any:
    try:
        matplotlib = importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise ImportError("A plot needs matplotlib: pip install 'keras-lora[plot]'.") from error
    labels, shares = list(singular_values), _shares(list(singular_values.values()))
    figure = matplotlib.Figure(figsize=(7, 1.5 + 0.16 * len(labels)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, aspect="auto", vmin=-4, vmax=0)
    axes.set_yticks(range(len(labels)), labels, fontsize=6)
    axes.set_xlabel("singular values of the update, the largest first")
    figure.colorbar(image, label="log10 of the share of the energy")
    return figure


def _shares(rows: Sequence[Sequence[float]]) -> np.ndarray:
    """`log10(s_i^2 / sum_j s_j^2)`; NaN behind the last value of a row, and where all are zero."""
    shares = np.full((len(rows), max(map(len, rows))), np.nan)
    for row, values in zip(shares, rows, strict=True):
        squares = np.square(values)
        total = squares.sum() or np.nan
        row[: len(values)] = np.log10(np.maximum(squares / total, np.finfo(float).tiny))
    return shares
