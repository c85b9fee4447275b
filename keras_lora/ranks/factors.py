"""The matrices that an adapter has factors for, and other factors in the place of these."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import keras
import numpy as np

from keras_lora.checks import invalid
from keras_lora.config import AdapterSpec, LoRAConfig
from keras_lora.files.keys import owned_by
from keras_lora.inject import (
    PlannedLayer,
    active_names,
    misfits,
    parameters_of,
    plan_of,
    rank_pattern,
    replace,
    switch,
    turn,
    whole_adapters,
)
from keras_lora.layers import Adapter, AdapterBank, LayerAdapter, factor_matrices
from keras_lora.lowrank.budget import Candidate
from keras_lora.lowrank.decomposing import Array, Decomposition
from keras_lora.lowrank.equations import scaling
from keras_lora.ranks.report import decomposed, has_factors
from keras_lora.walker import Target, Tree, all_targets


@dataclass(frozen=True, eq=False)
class FactoredSite:
    """A matrix that the adapter of this name has factors for."""

    target: Target
    bank: AdapterBank
    name: str

    @cached_property
    def adapter(self) -> LayerAdapter:
        """The adapter as ordinary LoRA."""
        return self.bank.ordinary(self.name)

    @cached_property
    def found(self) -> Decomposition:
        """That of `A B`, whose scale stays as it is, zero too."""
        return decomposed(self.bank, self.name, 1.0)

    @property
    def norm(self) -> float:
        """`|s A B|`, without the factor of `scale_adapter`."""
        return abs(self.adapter.spec.scaling) * self.found.norm

    @property
    def highest(self) -> int:
        return self.found.singular_values.shape[1]

    @property
    def cost(self) -> int:
        """The parameters of each rank."""
        return parameters_of(self.bank.site, 1)

    @property
    def matrices(self) -> tuple[Array, Array]:
        return factor_matrices(self.bank.site, self.adapter)

    def planned(self, rank: int, a: Array, b: Array) -> PlannedLayer:
        """An adapter with these matrices, and all else as in the present one."""
        site, old = self.bank.site, self.adapter
        alpha = old.spec.scaling / scaling(1.0, rank, old.spec.use_rslora)
        spec = dataclasses.replace(old.spec, rank=rank, alpha=alpha)
        rows = [np.array(old.tokens)] if old.tokens is not None else []
        factors = [np.asarray(x, "float32") for x in site.split().factors(a, b, site.shape)]
        return PlannedLayer(self.target, spec, [*factors, *rows])

    @property
    def candidate(self) -> Candidate:
        """What each direction adds to `|D|^2`, for each parameter."""
        squares = ((self.adapter.spec.scaling * self.found.singular_values) ** 2).sum(0)
        return Candidate((squares / self.cost).tolist(), self.cost)


def factored_sites(tree: Tree, name: str) -> list[FactoredSite]:
    targets = {target.path: target for target in all_targets(tree)}
    banks = {path: bank for path, bank in tree.banks_by_path.items() if has_factors(bank, name)}
    if not banks:
        raise invalid(
            "name", "an adapter with factors A and B", name, "it has rows of tokens alone"
        )
    return [FactoredSite(targets[path], bank, name) for path, bank in banks.items()]


def put_factors(
    tree: Tree, name: str, layers: Sequence[PlannedLayer], *, keeps_moments: bool = False
) -> None:
    """Put the new factors in the place of the old ones."""
    layers = [*layers, *_rows_alone(tree, name)]
    adapter = whole_adapters(tree, [name]).get(name, Adapter(None))
    values = [(x.variable, x.value(name)) for x in owned_by(tree, name)]
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


def _config(config: LoRAConfig | None, specs: Mapping[str, AdapterSpec]) -> LoRAConfig | None:
    """The config of a new adapter of these ranks, which are not those that "auto" found."""
    if config is None:
        return None
    ranks = rank_pattern({path: spec.rank for path, spec in specs.items() if spec.rank})
    alphas = {path: specs[path].alpha for path in ranks}
    return dataclasses.replace(config, rank_pattern=ranks, alpha_pattern=alphas, settled="")


def take_ranks(model: keras.Model, name: str, ranks: Mapping[str, int]) -> None:
    """Give an adapter these ranks, with its values and moments; the rest of it must be zero.

    Raises:
        ValueError: layers on which it is not.
    """
    with turn(model, "shrink_adapter") as tree:
        sites = factored_sites(tree, name)
        pairs = [(site, *site.matrices, ranks.get(site.target.path, 0)) for site in sites]
        wrong = [s.target.path for s, a, b, r in pairs if not r or _is_more(a, b, r)]
        if wrong:
            expected = f"the adapter that was trained, of the ranks {dict(ranks)}"
            raise invalid("adapter", expected, f"one of higher ranks on {wrong}")
        if any(a.shape[-1] != rank for _, a, _, rank in pairs):
            layers = [s.planned(r, a[..., :r], b[:, :r]) for s, a, b, r in pairs]
            put_factors(tree, name, layers, keeps_moments=True)


def _is_more(a: Array, b: Array, rank: int) -> bool:
    """Whether a product has another part than that of its first columns and rows."""
    return bool((a[..., rank:].any(1) & b[:, rank:].any(2)).any())
