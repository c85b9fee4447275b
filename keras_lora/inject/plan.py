"""What `apply_lora` is about to do, worked out and checked before anything is changed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import keras

from keras_lora.checks import invalid, warn
from keras_lora.config import AdapterSpec, LoRAConfig
from keras_lora.inject.freezing import own_trainable_variables
from keras_lora.inject.patterns import highest_rank
from keras_lora.layers import Adapter, adapter_shapes, all_owned, check_adapter_name
from keras_lora.walker import (
    Node,
    Target,
    Tree,
    all_targets,
    check_target,
    match_names,
    matches,
    select_targets,
    token_targets,
)

_Object = TypeVar("_Object")


@dataclass(frozen=True)
class PlannedLayer:
    """A layer that an adapter is to be on, with its spec and factors for that layer.

    `factors` is None where they are yet to be drawn; `measured` is what they are drawn from.
    """

    target: Target
    spec: AdapterSpec
    factors: Sequence[Any] | None = None
    measured: Any = None


@dataclass(frozen=True)
class Plan:
    """An adapter that is to be added: its name, its layers, and what else it trains and owns.

    `values` are those of the owned variables, by the id of the variable, for an adapter that
    exists already; a new adapter starts with the base's values.
    """

    name: str
    layers: Sequence[PlannedLayer]
    adapter: Adapter
    owned: Sequence[keras.Variable]
    values: Mapping[int, Any] = field(default_factory=dict)


def make_plan(tree: Tree, config: LoRAConfig, name: str) -> Plan:
    targets = select_targets(tree, config.targets, config.exclude)
    trained = match_names(config.layers_to_save, tree.nodes, "layers_to_save")
    targets = _without_trained(tree, targets, trained, config)
    check_name_is_new(tree, name)
    rows = token_targets(tree, config.train_tokens)
    _check_disjoint(tree, [*targets, *(target for target, _ in rows)], trained)
    _check_rows(tree, [target for target, _ in rows], trained)
    ranks = _by_pattern(config.rank_pattern, targets, "rank_pattern")
    alphas = _by_pattern(config.alpha_pattern, targets, "alpha_pattern")
    layers = [
        PlannedLayer(t, config.spec(rank=ranks.get(t.path), alpha=alphas.get(t.path)))
        for t in targets
    ]
    layers = _with_tokens(tree, layers, rows)
    _check_kinds(layers)
    full = [v for node in trained for v in own_trainable_variables(tree, node.layer)]
    whole = Adapter(config, unique([*_biases(tree, targets, config.bias), *full]))
    owned = unique([*whole.trained, *(v for node in trained for v in node.layer.weights)])
    return Plan(name, layers, whole, owned)


def _with_tokens(
    tree: Tree, layers: Sequence[PlannedLayer], rows: Sequence[tuple[Target, Sequence[int]]]
) -> list[PlannedLayer]:
    """The layers with the rows that train; an embedding that is no target gets the rank 0."""
    if not rows:
        return list(layers)
    found = {layer.target.path: layer for layer in layers}
    for target, tokens in rows:
        alone = PlannedLayer(target, AdapterSpec(rank=0, alpha=1.0, train_tokens=tokens))
        planned = found.get(target.path, alone)
        spec = dataclasses.replace(planned.spec, train_tokens=tokens)
        found[target.path] = dataclasses.replace(planned, spec=spec)
    order = {target.path: index for index, target in enumerate(all_targets(tree))}
    return sorted(found.values(), key=lambda layer: order[layer.target.path])


def plan_factors(
    tree: Tree,
    name: str,
    adapter: Adapter,
    layers: Sequence[PlannedLayer],
    values: Sequence[tuple[keras.Variable, Any]] = (),
) -> Plan:
    """A plan to add an adapter that exists already: layers with factors, and owned values.

    Raises:
        ValueError: a name that is taken or malformed, or layers that cannot take the factors.
    """
    check_adapter_name(name)
    check_name_is_new(tree, name)
    for layer in layers:
        check_target(layer.target)
        layer.target.site.check_tokens(layer.spec.train_tokens, layer.target.path)
    _raise_wrong(sorted(layer.target.path for layer in layers if not _takes(layer)))
    _check_kinds(layers)
    return plan_of(name, adapter, layers, values)


def plan_of(
    name: str,
    adapter: Adapter,
    layers: Sequence[PlannedLayer],
    values: Sequence[tuple[keras.Variable, Any]],
) -> Plan:
    """`plan_factors` without the checks: for an adapter that takes the place of another."""
    by_variable = {id(variable): value for variable, value in values}
    return Plan(name, layers, adapter, [variable for variable, _ in values], by_variable)


def plan_layers(
    tree: Tree, factors: Mapping[str, tuple[AdapterSpec, *tuple[Any, ...]]]
) -> list[PlannedLayer]:
    """Layers for `plan_factors`, from `{path: (spec, *factors)}`.

    Raises:
        ValueError: a path without a layer that can be adapted.
    """
    targets = [target for target in all_targets(tree) if target.path in factors]
    _raise_wrong(sorted(factors.keys() - {target.path for target in targets}))
    return [PlannedLayer(t, factors[t.path][0], factors[t.path][1:]) for t in targets]


def _raise_wrong(paths: Sequence[str]) -> None:
    if paths:
        raise ValueError(
            "Expected factors for layers that can be adapted, of the shapes that belong to their "
            f"kernels. Received others for: {paths}. Check the model that they were made for."
        )


def _takes(layer: PlannedLayer) -> bool:
    target, factors = layer.target, layer.factors or ()
    expected = adapter_shapes(target.site.split(), target.kernel_shape, layer.spec)
    return [tuple(factor.shape) for factor in factors] == expected


def _check_kinds(layers: Sequence[PlannedLayer]) -> None:
    """Refuse options that the kind of a layer does not have."""
    still = [x.target.path for x in layers if x.spec.freeze_a and x.target.site.kind.start]
    if still:
        raise invalid(
            "freeze_a",
            f"False for {still}, whose A starts at zero, so that B alone would learn nothing",
            True,
            "exclude them, or give them an adapter of their own without it",
        )
    refused = [
        x.target.path for x in layers if x.spec.use_dora and not x.target.site.kind.takes_dora
    ]
    if refused:
        raise invalid(
            "use_dora",
            f"False for {refused}, whose layers have no magnitude",
            True,
            "exclude them, or give them an adapter of their own without DoRA",
        )


def unique(objects: Iterable[_Object]) -> list[_Object]:
    """Each object once."""
    return list({id(item): item for item in objects}.values())


def check_name_is_new(tree: Tree, name: str) -> None:
    taken = [p for p, bank in tree.banks_by_path.items() if name in bank.adapters]
    if taken:
        raise ValueError(
            f"Expected a new adapter name. Received: name={name!r}, which the model has on "
            f"{taken[0]!r}{' and others' if len(taken) > 1 else ''}. Choose another name, or "
            f"remove the old one: delete_adapter(model, {name!r})."
        )


def _biases(tree: Tree, targets: Sequence[Target], which: str) -> list[keras.Variable]:
    if which == "lora_only":
        return [bias for t in targets if (bias := t.site.bias) is not None]
    return [v for v in tree.root.variables if v.name == "bias"] if which == "all" else []


def _check_disjoint(tree: Tree, targets: Sequence[Target], trained: Sequence[Node]) -> None:
    """A layer is adapted or trains in full, for all adapters alike: its kernel is frozen or not."""
    full = tree.ids_within(node.layer for node in trained)
    both = [path for path, layer in tree.adapted_by_path.items() if id(layer) in full]
    both += [t.path for t in targets if all_owned(t.layer.weights[:1])]
    if both:
        raise ValueError(
            "Expected layers that every adapter either adapts or trains in full (layers_to_save). "
            f"Received: {both}, which another adapter of {tree.root.name!r} uses the other way. "
            "Exclude them from the new one, or delete the other."
        )


def _check_rows(tree: Tree, targets: Sequence[Target], trained: Sequence[Node]) -> None:
    full = tree.ids_within(node.layer for node in trained)
    both = [target.path for target in targets if id(target.layer) in full]
    if both:
        expected = "embeddings that do not train in full"
        fix = "remove them from `layers_to_save` or from `train_tokens`"
        raise invalid("train_tokens", expected, both, fix)


def _without_trained(
    tree: Tree, targets: Sequence[Target], trained: Sequence[Node], config: LoRAConfig
) -> list[Target]:
    """A layer that trains in full takes no adapter; to ask for both by name is an error."""
    full = tree.ids_within(node.layer for node in trained)
    both = [t.path for t in targets if id(t.layer) in full]
    named = not callable(config.targets) and not isinstance(config.targets, str)
    kept = [t for t in targets if id(t.layer) not in full]
    if both and (named or not kept):
        raise ValueError(
            f"Expected each layer in `targets` or in `layers_to_save`. Received: {both} in both. "
            "Remove them from one."
        )
    return kept


def _by_pattern(
    pattern: Mapping[str, Any], targets: Sequence[Target], argument: str
) -> dict[str, Any]:
    """The value of each target that the pattern names; the first match counts."""
    unused = [name for name in pattern if not any(matches(name, t.path) for t in targets)]
    if unused:
        raise ValueError(
            f"Expected every name in `{argument}` to match a target. Received: {unused}, which "
            f"match none of {[t.path for t in targets[:20]]}. Correct or remove them."
        )
    return {
        t.path: next(value for name, value in pattern.items() if matches(name, t.path))
        for t in targets
        if any(matches(name, t.path) for name in pattern)
    }


def warn_of_high_ranks(plan: Plan) -> None:
    high = [x.target.path for x in plan.layers if x.spec.rank > highest_rank(x.target.site)]
    if high:
        warn(
            f"The rank is above the smaller side of the kernel, which costs parameters and adds "
            f"nothing, for {high}. Lower it with rank_pattern."
        )
