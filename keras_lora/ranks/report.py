"""`rank_report`: how much of its rank an adapter uses, layer by layer."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras import ops
from rich.console import Console
from rich.table import Table

from keras_lora.checks import invalid, is_number
from keras_lora.inject import adapter_names, check_names, turn
from keras_lora.layers import AdapterBank, factor_matrices
from keras_lora.lowrank.decomposing import (
    Array,
    Decomposition,
    decompose,
    intruders,
    rank_of,
)
from keras_lora.ranks.heat_map import write_heat_map
from keras_lora.summary import PathCell, joined, template
from keras_lora.tables import new_table
from keras_lora.walker import Tree

# The share of the energy whose rank the table shows.
SHOWN_ENERGY = 0.95


@dataclass(frozen=True)
class RankRow:
    """What one adapter has learned on one matrix, from the singular values of `D = s A B`.

    Attributes:
        path: The path of the layer, or of the matrix where a layer has several.
        adapter: The adapter's name.
        rank: The rank of its factors.
        singular_values: Those of `D`, the largest first; of a layer with several matrices, such as
            experts, all of them together.
        effective_rank: `exp(-sum_i p_i log p_i)` with `p_i = s_i / sum_j s_j`, between 1 and the
            rank; 0 where nothing was learned. Of several matrices the mean.
        energies: The share of `|D|^2` that the best approximation of rank 1, 2, ... keeps.
        norm: `|D|`, the Frobenius norm.
        base_norm: `|W0|`.
        amplification: `|D| / |U^T W0 V|`: how much stronger `D` is in its own directions than `W0`
            is there; 0 where nothing was learned.
        intruders: How many of the strongest directions of `W0 + D` are like none of `W0`; None
            unless they were asked for.
    """

    path: str
    adapter: str
    rank: int
    singular_values: tuple[float, ...]
    effective_rank: float
    energies: tuple[float, ...]
    norm: float
    base_norm: float
    amplification: float
    intruders: int | None = None

    @property
    def relative_norm(self) -> float:
        """`|D| / |W0|`."""
        return self.norm / self.base_norm if self.base_norm else float("inf")

    def rank_of(self, energy: float) -> int:
        """The lowest rank that keeps this share of `|D|^2`."""
        return rank_of(self.energies, energy)


@dataclass(frozen=True)
class RankReport:
    """What `rank_report` returns.

    Attributes:
        rows: One for each adapter of each matrix.
    """

    rows: Sequence[RankRow]

    def __rich__(self) -> Table:
        lines: dict[tuple[str, str], list[RankRow]] = {}
        for row in self.rows:
            lines.setdefault((row.adapter, template(row.path)), []).append(row)
        table = new_table(pad_edge=False)
        table.add_column("layer")
        columns = self._columns()
        for heading in columns:
            table.add_column(heading, justify="right", no_wrap=True)
        for line in lines.values():
            cells = (_range(list(map(cell, line))) for cell in columns.values())
            table.add_row(PathCell(joined([row.path for row in line])), *cells)
        return table

    def _columns(self) -> Mapping[str, Callable[[RankRow], Any]]:
        """What stands below each heading."""
        names = {row.adapter for row in self.rows}
        own = {"adapter": lambda row: row.adapter} if len(names) > 1 else {}
        asked = any(row.intruders is not None for row in self.rows)
        return {
            **own,
            "rank": lambda row: row.rank,
            "effective": lambda row: row.effective_rank,
            f"for {SHOWN_ENERGY:.0%}": lambda row: row.rank_of(SHOWN_ENERGY),
            "|D| / |W0|": lambda row: row.relative_norm,
            "amplifies": lambda row: row.amplification,
            **({"intruders": lambda row: row.intruders} if asked else {}),
        }


def rank_report(
    model: keras.Model,
    name: str | None = None,
    *,
    intruders: int = 0,
    epsilon: float = 0.5,
    plot: str | os.PathLike[str] | None = None,
    console: Console | None = None,
) -> RankReport:
    """Print how much of its rank an adapter uses: for each layer the spectrum of `D = s A B`.

        A = Q_a R_a     B^T = Q_b R_b     s R_a R_b^T = U S V^T

    The singular values come from the factors, and no matrix of a kernel's shape is decomposed. An
    adapter whose effective rank is far below its rank can be made smaller (`shrink_adapter`).
    With DoRA it is the update before the magnitude; of a start with a counterpart it is
    `s (A B - A0 B0)`, of twice the rank.

    Args:
        model: An adapted model.
        name: The adapter, active or not; by default each.
        intruders: How many of the strongest directions of `W0 + D` to compare with those of `W0`.
            This decomposes both matrices, which takes seconds for a large layer.
        epsilon: The cosine below which such a direction counts as new, in (0, 1].
        plot: Where to write a picture of layers by ranks; the end of the name says of which kind,
            such as `ranks.png`. Needs the extra `plot`.
        console: Where to print; standard output by default.

    Returns:
        The figures of the table: `report.rows`.

    Raises:
        ValueError: no adapters, a name that the model does not have, values that are not finite,
            or options outside the above.
        ImportError: a plot, and matplotlib is not installed.

    Example:

    >>> import keras, keras_lora as kl
    >>> from rich.console import Console
    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(5, name="up")])
    >>> model = kl.apply_lora(model, kl.LoRAConfig(targets=["up"], rank=2, alpha=2))
    >>> adapter = kl.lora_layers(model)["up"].adapters["default"]
    >>> adapter.a.assign([[4, 0], [0, 1], [0, 0]])
    >>> adapter.b.assign([[1, 0, 0, 0, 0], [0, 3, 0, 0, 0]])
    >>> row, = kl.rank_report(model, console=Console(quiet=True)).rows
    >>> [round(value, 4) for value in row.singular_values], round(row.effective_rank, 2)
    ([4.0, 3.0], 1.98)
    >>> row.rank_of(energy=0.6), round(row.norm, 4)
    (1, 5.0)

    References: Roy and Vetterli 2007, "The effective rank"; Hu et al. 2021,
    https://arxiv.org/abs/2106.09685, section 7.3; Shuttleworth et al. 2024 (intruders),
    https://arxiv.org/abs/2410.21228.
    """
    _check(intruders, epsilon)
    with turn(model, "rank_report") as tree:
        names = check_names(tree, adapter_names(tree) if name is None else [name])
        report = RankReport(_rows(tree, names, intruders, epsilon))
    if plot is not None:
        write_heat_map(plot, {_label(row, names): row.singular_values for row in report.rows})
    (Console() if console is None else console).print(report)
    return report


def decomposed(bank: AdapterBank, name: str, scaling: float) -> Decomposition:
    """The singular values and directions of `s A B`."""
    a, b = factor_matrices(bank.site, bank.ordinary(name))
    try:
        return decompose(scaling * a, b)
    except ValueError as error:
        raise ValueError(f"Adapter {name!r}: {error}") from error


def has_factors(bank: AdapterBank, name: str) -> bool:
    """Whether the adapter has `A B` there: with rows of tokens alone it has none."""
    return name in bank.adapters and bank.adapters[name].spec.rank > 0


def _check(count: Any, epsilon: Any) -> None:
    if isinstance(count, bool) or not isinstance(count, int) or count < 0:
        raise invalid("intruders", "the number of directions to compare, or 0", count)
    if not is_number(epsilon) or not 0 < epsilon <= 1:
        raise invalid("epsilon", "a number in (0, 1]", epsilon, "try epsilon=0.5")


def _rows(tree: Tree, names: Sequence[str], count: int, epsilon: float) -> list[RankRow]:
    return [
        _row(path, bank, name, count, epsilon)
        for name in names
        for path, bank in tree.banks_by_path.items()
        if has_factors(bank, name)
    ]


def _row(path: str, bank: AdapterBank, name: str, count: int, epsilon: float) -> RankRow:
    site, adapter = bank.site, bank.adapters[name]
    found = decomposed(bank, name, adapter.scaling)
    w = ops.convert_to_numpy(site.frozen_matrix().values())
    return RankRow(
        path,
        name,
        adapter.spec.rank,
        tuple(np.sort(found.singular_values.ravel())[::-1].tolist()),
        found.effective_rank,
        tuple(found.energies.tolist()),
        found.norm,
        float(np.linalg.norm(w)),
        found.amplification(w),
        intruders(w, w + _product(found), count, epsilon) if count else None,
    )


def _product(found: Decomposition) -> Array:
    return (found.left * found.singular_values[:, None]) @ found.right.mT


def _label(row: RankRow, names: Sequence[str]) -> str:
    return row.path if len(names) == 1 else f"{row.path} ({row.adapter})"


def _range(values: Sequence[Any]) -> str:
    """The values of layers that share a line: one text, or the least and the largest."""
    least, largest = (_shown(choose(values)) for choose in (min, max))
    return least if least == largest else f"{least} to {largest}"


def _shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
