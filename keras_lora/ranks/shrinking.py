"""`shrink_adapter`: the best adapter of a lower rank, in the place of one that was trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import keras
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from keras_lora.checks import check_rank, invalid, is_number
from keras_lora.config import AdapterSpec, LoRAConfig
from keras_lora.inject import (
    PlannedLayer,
    active_names,
    check_names,
    check_no_dora,
    misfits,
    plan_of,
    replace,
    switch,
    turn,
    whole_adapters,
)
from keras_lora.layers import Adapter, AdapterBank, LayerAdapter, OwnedValues, all_owned
from keras_lora.lowrank.budget import Candidate, spend
from keras_lora.lowrank.decomposing import Array, Decomposition
from keras_lora.lowrank.equations import scaling
from keras_lora.ranks.patterns import parameters_of, rank_pattern
from keras_lora.ranks.report import decomposed, has_factors
from keras_lora.summary import PathCell
from keras_lora.walker import Target, Tree, all_targets


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
        table = Table(title=title, header_style="cyan", box=box.SIMPLE_HEAD, pad_edge=False)
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

        s A B = U S V^T        A' = U_r sqrt(S_r / s)        B' = sqrt(S_r / s) V_r^T

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
        check_no_dora(tree, [name], "Their magnitude belongs to their A B")
        report = _shrink(tree, name, size)
    (Console() if console is None else console).print(report)
    return report


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

    def ranks(self, sites: Sequence[_Site]) -> list[int]:
        if self.energy is not None:
            return [site.found.rank_of(self.energy) for site in sites]
        if self.rank is not None:
            return [min(self.rank, site.highest) for site in sites]
        assert self.parameters is not None
        return spend([site.candidate for site in sites], self.parameters, least=1)


@dataclass(frozen=True, eq=False)
class _Site:
    """A matrix that the adapter has factors for, and their decomposition."""

    target: Target
    bank: AdapterBank
    found: Decomposition

    @property
    def highest(self) -> int:
        return self.found.singular_values.shape[1]

    @property
    def cost(self) -> int:
        """The parameters of each rank."""
        return parameters_of(self.bank.site, 1)

    def matrices(self, name: str) -> tuple[Array, Array]:
        """`A` and `B` of the adapter as ordinary LoRA, as stacks of matrices."""
        adapter, site = self.bank.ordinary(name), self.bank.site
        return site.split().matrices(np.array(adapter.a), np.array(adapter.b), site.shape)

    def planned(self, old: LayerAdapter, rank: int, a: Array, b: Array) -> PlannedLayer:
        """An adapter with these matrices, and all else as in an ordinary one."""
        site = self.bank.site
        alpha = old.spec.scaling / scaling(1.0, rank, old.spec.use_rslora)
        spec = dataclasses.replace(old.spec, rank=rank, alpha=alpha)
        rows = [np.array(old.tokens)] if old.tokens is not None else []
        factors = [np.asarray(x, "float32") for x in site.split().factors(a, b, site.shape)]
        return PlannedLayer(self.target, spec, [*factors, *rows])

    @property
    def candidate(self) -> Candidate:
        """What each direction adds to `|D|^2`, for each parameter."""
        squares = (self.found.singular_values**2).sum(0)
        return Candidate((squares / self.cost).tolist(), self.cost)


def _shrink(tree: Tree, name: str, size: _Size) -> ShrinkReport:
    sites = _sites(tree, name)
    ranks = size.ranks(sites)
    rows = [_row(site, name, rank) for site, rank in zip(sites, ranks, strict=True)]
    _put(tree, name, [_shrunk(site, name, r) for site, r in zip(sites, ranks, strict=True)])
    missed = sum((r.relative_error * s.found.norm) ** 2 for r, s in zip(rows, sites, strict=True))
    whole = sum(site.found.norm**2 for site in sites)
    return ShrinkReport(rows, float(np.sqrt(missed / whole)) if whole else 0.0)


def take_ranks(model: keras.Model, name: str, ranks: Mapping[str, int]) -> None:
    """Give an adapter these ranks, with its values and moments; the rest of it must be zero.

    Raises:
        ValueError: layers on which it is not.
    """
    with turn(model, "shrink_adapter") as tree:
        sites = _sites(tree, name)
        pairs = [(site, *site.matrices(name), ranks.get(site.target.path, 0)) for site in sites]
        wrong = [s.target.path for s, a, b, r in pairs if not r or _is_more(a, b, r)]
        if wrong:
            expected = f"the adapter that was trained, of the ranks {dict(ranks)}"
            raise invalid("adapter", expected, f"one of higher ranks on {wrong}")
        if any(a.shape[-1] != rank for _, a, _, rank in pairs):
            old = {site: site.bank.ordinary(name) for site in sites}
            layers = [s.planned(old[s], r, a[..., :r], b[:, :r]) for s, a, b, r in pairs]
            _put(tree, name, layers, keeps_moments=True)


def _is_more(a: Array, b: Array, rank: int) -> bool:
    """Whether a product has another part than that of its first columns and rows."""
    return bool((a[..., rank:].any(1) & b[:, rank:].any(2)).any())


def _sites(tree: Tree, name: str) -> list[_Site]:
    targets = {target.path: target for target in all_targets(tree)}
    banks = {path: bank for path, bank in tree.banks_by_path.items() if has_factors(bank, name)}
    if not banks:
        raise invalid(
            "name", "an adapter with factors A and B", name, "it has rows of tokens alone"
        )
    return [_Site(targets[path], bank, decomposed(bank, name)) for path, bank in banks.items()]


def _shrunk(site: _Site, name: str, rank: int) -> PlannedLayer:
    adapter = site.bank.ordinary(name)
    if not site.found.norm:
        a, b = site.matrices(name)
        a, b = a[..., :rank], b[:, :rank]
        # One of both stays, so that the other goes on to learn; an embedding's `A` begins at zero.
        return site.planned(adapter, rank, a, b if not a.any() else np.zeros_like(b))
    cut, root = site.found.truncated(rank), np.sqrt(abs(adapter.scaling))
    # Of the decomposed product the scale is a part.
    return site.planned(adapter, rank, np.copysign(1, adapter.scaling) * cut.a / root, cut.b / root)


def _put(
    tree: Tree, name: str, layers: Sequence[PlannedLayer], *, keeps_moments: bool = False
) -> None:
    """Put the new factors in the place of the old ones."""
    layers = [*layers, *_rows_alone(tree, name)]
    adapter = whole_adapters(tree, [name]).get(name, Adapter(None))
    values = [(x.variable, x.value(name)) for x in _owned(tree, name)]
    specs = {layer.target.path: layer.spec for layer in layers}
    new = dataclasses.replace(adapter, config=_config(adapter.config, specs))
    plan = plan_of(name, new, layers, values)
    factors = [(x, x.adapters[name].scale_factor) for x in tree.banks if name in x.adapters]
    active, trains = active_names(tree), any(bank.trains for bank in tree.banks)
    # With an optimizer that does not go by element an adapter has a slot of its own rank.
    apart = name in active and bool(misfits(tree, plan))
    if apart:
        switch(tree, [])
    replace(tree, plan, keeps_moments=keeps_moments)
    for bank, factor in factors:
        bank.set_scale_factor(name, factor)
    if apart:
        switch(tree, active, trains)


def _rows_alone(tree: Tree, name: str) -> list[PlannedLayer]:
    """The layers on which the adapter has rows of tokens and no factors, as they are."""
    targets = {target.path: target for target in all_targets(tree)}
    found = [
        (targets[path], bank.adapters[name])
        for path, bank in tree.banks_by_path.items()
        if name in bank.adapters and not has_factors(bank, name)
    ]
    return [
        PlannedLayer(target, adapter.spec, list(map(np.array, adapter.named_factors.values())))
        for target, adapter in found
    ]


def _owned(tree: Tree, name: str) -> list[OwnedValues]:
    return [item for item in all_owned(tree.root.variables) if name in item.names]


def _config(config: LoRAConfig | None, specs: Mapping[str, AdapterSpec]) -> LoRAConfig | None:
    """The config of a new adapter of these ranks."""
    if config is None:
        return None
    ranks = rank_pattern({path: spec.rank for path, spec in specs.items() if spec.rank})
    alphas = {path: specs[path].alpha for path in ranks}
    return dataclasses.replace(config, rank_pattern=ranks, alpha_pattern=alphas)


def _row(site: _Site, name: str, rank: int) -> ShrunkRow:
    before = site.bank.adapters[name].spec.rank
    return ShrunkRow(
        site.target.path,
        before,
        rank,
        site.found.truncated(rank).relative_error,
        rank * site.cost,
        (before - rank) * site.cost,
    )
