"""An adapter in the place of another: values change, and nothing is traced again."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import nullcontext

from keras_lora.config import AdapterSpec
from keras_lora.distribution import strategy_scope
from keras_lora.inject.moments import moving_moments
from keras_lora.inject.plan import Plan, PlannedLayer
from keras_lora.inject.switching import active_names, known_models
from keras_lora.layers import AdapterBank, all_owned, layer_adapter
from keras_lora.walker import Tree


def replace(tree: Tree, plan: Plan, *, keeps_moments: bool = False) -> None:
    """Put an adapter in the place of the one of its name; `misfits` must have found nothing.

    The moments of optimizers begin anew, unless the adapter is the same without zeros beside it.
    """
    moments = nullcontext() if keeps_moments else moving_moments(tree, known_models(tree))
    with strategy_scope(tree), moments:
        _replace(tree, plan)


def _replace(tree: Tree, plan: Plan) -> None:
    banks, active = tree.banks_by_path, active_names(tree)
    for planned in plan.layers:
        bank = banks[planned.target.path]
        spec, factors = _as_computed(bank, planned.spec), planned.factors or ()
        bank.put(plan.name, layer_adapter(spec, factors, plan.adapter))
    new = {planned.target.path for planned in plan.layers}
    for path, bank in banks.items():
        if plan.name in bank.adapters and path not in new:
            bank.remove(plan.name)
        names = [name for name in active if name in bank.adapters]
        if names != list(bank.active):
            bank.activate(names, bank.trains)
    for item in all_owned(plan.owned):
        item.replace(plan.name, plan.values[id(item.variable)])


def misfits(tree: Tree, plan: Plan) -> list[str]:
    """Reasons why an adapter cannot take the place of the one of its name without a new trace."""
    banks, active = tree.banks_by_path, active_names(tree)
    found = [_misfit(banks.get(x.target.path), x, active, plan.name) for x in plan.layers]
    owned = {
        id(item.variable) for item in all_owned(tree.root.variables) if plan.name in item.names
    }
    of_one = owned ^ {id(variable) for variable in plan.owned}
    keys = [f"{tree.variable_keys[i]}: owned by one of the two adapters only" for i in of_one]
    return [problem for problem in found if problem is not None] + keys


def loses_dropout(tree: Tree, plan: Plan) -> bool:
    """Whether an adapter has dropout on a layer that computes none."""
    banks = tree.banks_by_path
    return any(_loses_dropout(banks[x.target.path], x.spec) for x in plan.layers)


def _loses_dropout(bank: AdapterBank, spec: AdapterSpec) -> bool:
    return spec.dropout > 0 and bank.site.kind.has_dropout and not bank.has_dropout


def _misfit(
    bank: AdapterBank | None, planned: PlannedLayer, active: Sequence[str], name: str
) -> str | None:
    path, spec = planned.target.path, planned.spec
    if bank is None:
        return f"{path}: not adapted in this model"
    names = [n for n in active if n == name or n in bank.adapters]
    if name in bank.active and bank.adapters[name].spec.freeze_a != spec.freeze_a:
        return f"{path}: freeze_a={spec.freeze_a}, where the active adapter has the opposite"
    specs = [spec if n == name else bank.adapters[n].spec for n in names]
    if bank.fits([dataclasses.replace(spec, dropout=0.0) for spec in specs]):
        return None
    slots, rows = bank.slots, len(spec.train_tokens)
    reasons = {
        "DoRA among slots without a magnitude": spec.use_dora
        and any(slot.magnitude is None for slot in slots),
        f"a start with a counterpart, {spec.init!r}, among slots without": spec.has_counterpart
        and any(slot.counterpart is None for slot in slots),
        f"{rows} rows of tokens among slots of fewer": rows
        > min((slot.token_count for slot in slots), default=rows),
    }
    for reason, applies in reasons.items():
        if applies:
            return f"{path}: {reason}"
    ranks = [slot.rank for slot in bank.slots]
    own = "" if bank.pads else ", and the optimizer does not go by element"
    return f"{path}: rank {spec.rank} among slots of rank {ranks}{own}"


def _as_computed(bank: AdapterBank, spec: AdapterSpec) -> AdapterSpec:
    return dataclasses.replace(spec, dropout=0.0) if _loses_dropout(bank, spec) else spec
