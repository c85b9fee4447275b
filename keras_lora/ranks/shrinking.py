"""`shrink_adapter`: the best adapter of a lower rank, in the place of one that was trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import keras
import numpy as np
from rich.console import Console
from rich.table import Table

from keras_lora.checks import check_rank, invalid, is_number
from keras_lora.inject import (
    PlannedLayer,
    check_names,
    check_no_dora,
    turn,
)
from keras_lora.lowrank.budget import spend
from keras_lora.ranks.factors import FactoredSite, factored_sites, put_factors
from keras_lora.summary import PathCell
from keras_lora.tables import new_table
from keras_lora.walker import Tree


@dataclass(frozen=True)
class ShrunkRow:
    """What `shrink_adapter` did on one matrix.

    Attributes:
        path: The path of the layer, or of the matrix where a layer has several.
        before: The rank before.
        rank: The rank now.
        relative_error: `|D - D'| / |D|`, of the update `D = s A B` and the update now.
        parameters: The size of both factors now.
        saved: How many parameters they were larger.
    """

    path: str
    before: int
    rank: int
    relative_error: float
    parameters: int
    saved: int


@dataclass(frozen=True)
class ShrinkReport:
    """What `shrink_adapter` returns.

    Attributes:
        rows: One for each adapted matrix.
        relative_error: `|D - D'| / |D|` over all of them together.
    """

    rows: Sequence[ShrunkRow]
    relative_error: float

    @property
    def parameters(self) -> int:
        """The size of all factors now."""
        return sum(row.parameters for row in self.rows)

    @property
    def parameters_before(self) -> int:
        return self.parameters + sum(row.saved for row in self.rows)

    def __rich__(self) -> Table:
        before = self.parameters_before
        title = (
            f"{self.parameters:,} of {before:,} parameters ({self.parameters / before:.1%}), "
            f"relative error {self.relative_error:.3g}"
        )
        table = new_table(title=title, pad_edge=False)
        table.add_column("layer")
        for heading in ("before", "rank", "error", "parameters"):
            table.add_column(heading, justify="right", no_wrap=True)
        for row in self.rows:
            numbers = f"{row.before}", f"{row.rank}", f"{row.relative_error:.3g}"
            table.add_row(PathCell(row.path), *numbers, f"{row.parameters:,}")
        return table


def shrink_adapter(
    model: keras.Model,
    name: str,
    *,
    energy: float | None = None,
    rank: int | None = None,
    parameters: int | None = None,
    console: Console | None = None,
) -> ShrinkReport:
    """Let the best adapter of a lower rank take the place of one that was trained.

        A B = U S V^T        A' = U_r sqrt(S_r)        B' = sqrt(S_r) V_r^T

    No adapter of these ranks is nearer to it (Eckart and Young). The rank of each layer follows
    from one of

    - `energy`: the lowest that keeps this share of the layer's `|s A B|^2`;
    - `rank`: this one, or the present one if that is lower;
    - `parameters`: at most this size in all. Directions with the largest `s_i^2` for each parameter
      that they cost come first, whatever their layer; each layer keeps one at least.

    The scale stays, and so do heads, biases and rows of tokens. It stays active or inactive, and
    nothing is traced again unless the optimizer does not go by element (as in `set_adapter`); its
    moments begin anew, since they belong to factors that are gone. A layer that has learned nothing
    keeps the first columns of its `A`, with `B = 0`. An adapter whose start has a counterpart
    becomes ordinary LoRA.

    Args:
        model: An adapted model.
        name: The adapter, active or not.
        energy: A share in (0, 1].
        rank: A positive integer.
        parameters: A positive integer.
        console: Where to print the report; standard output by default.

    Returns:
        What was done, layer by layer, and the error.

    Raises:
        ValueError: not exactly one of the three, values outside the above, a size that has no room
            for one direction of each layer, a name that the model does not have, DoRA, or values
            that are not finite.

    Example:

    >>> import keras, keras_lora as kl
    >>> from rich.console import Console
    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(5, name="up")])
    >>> model = kl.apply_lora(model, kl.LoRAConfig(targets=["up"], rank=2, alpha=2))
    >>> adapter = kl.lora_layers(model)["up"].adapters["default"]
    >>> adapter.a.assign([[4, 0], [0, 1], [0, 0]])
    >>> adapter.b.assign([[1, 0, 0, 0, 0], [0, 3, 0, 0, 0]])
    >>> report = kl.shrink_adapter(model, "default", rank=1, console=Console(quiet=True))
    >>> report.parameters, report.parameters_before, round(report.relative_error, 4)
    (8, 16, 0.6)

    Reference: Eckart and Young 1936, "The approximation of one matrix by another of lower rank".
    """
    size = _Size(energy, rank, parameters)
    with turn(model, "shrink_adapter") as tree:
        check_names(tree, [name])
        check_shrinkable(tree, name)
        report = _shrink(tree, name, size)
    (Console() if console is None else console).print(report)
    return report


def check_shrinkable(tree: Tree, name: str) -> None:
    """
    Raises:
        ValueError: an adapter with DoRA.
    """
    check_no_dora(tree, [name], "Their magnitude belongs to their A B")


@dataclass(frozen=True)
class _Size:
    """How large the adapter is to be: exactly one of the three is given."""

    energy: float | None
    rank: int | None
    parameters: int | None

    def __post_init__(self) -> None:
        given = {n: v for n, v in dataclasses.asdict(self).items() if v is not None}
        if len(given) != 1:
            raise invalid("size", "exactly one of energy=, rank= and parameters=", given)
        if self.energy is not None and not (is_number(self.energy) and 0 < self.energy <= 1):
            raise invalid("energy", "a share in (0, 1]", self.energy, "try energy=0.95")
        if self.rank is not None:
            check_rank(self.rank)
        if self.parameters is not None and (
            isinstance(self.parameters, bool) or not isinstance(self.parameters, int)
        ):
            raise invalid("parameters", "a positive integer", self.parameters)

    def ranks(self, sites: Sequence[FactoredSite]) -> list[int]:
        if self.energy is not None:
            return [site.found.rank_of(self.energy) for site in sites]
        if self.rank is not None:
            return [min(self.rank, site.highest) for site in sites]
        assert self.parameters is not None
        return spend([site.candidate for site in sites], self.parameters, least=1)


def _shrink(tree: Tree, name: str, size: _Size) -> ShrinkReport:
    sites = factored_sites(tree, name)
    ranks = size.ranks(sites)
    rows = [_row(site, rank) for site, rank in zip(sites, ranks, strict=True)]
    put_factors(tree, name, [_shrunk(site, rank) for site, rank in zip(sites, ranks, strict=True)])
    missed = sum((r.relative_error * s.norm) ** 2 for r, s in zip(rows, sites, strict=True))
    whole = sum(site.norm**2 for site in sites)
    return ShrinkReport(rows, float(np.sqrt(missed / whole)) if whole else 0.0)


def _shrunk(site: FactoredSite, rank: int) -> PlannedLayer:
    if not site.found.norm:
        a, b = site.matrices
        a, b = a[..., :rank], b[:, :rank]
        # One of both stays, so that the other goes on to learn; an embedding's `A` begins at zero.
        return site.planned(rank, a, b if not a.any() else np.zeros_like(b))
    cut = site.found.truncated(rank)
    return site.planned(rank, cut.a, cut.b)


def _row(site: FactoredSite, rank: int) -> ShrunkRow:
    before = site.bank.adapters[site.name].spec.rank
    return ShrunkRow(
        site.target.path,
        before,
        rank,
        site.found.relative_error(rank),
        rank * site.cost,
        (before - rank) * site.cost,
    )
