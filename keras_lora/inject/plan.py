"""What `apply_lora` is about to do, worked out and checked before anything is changed."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras

from keras_lora.config import AdapterSpec, LoRAConfig
from keras_lora.layers import split_kernel
from keras_lora.walker import Node, Target, find_targets, lora_layers, match_names, matches, walk


@dataclass(frozen=True)
class Plan:
    """An adapter's name, the spec of each target, and what else trains."""

    name: str
    specs: Sequence[tuple[Target, AdapterSpec]]
    trained_layers: Sequence[Node]
    bias: str


def make_plan(model: keras.Model, config: LoRAConfig, name: str) -> Plan:
    nodes = list(walk(model))
    targets = find_targets(model, config.targets, config.exclude)
    trained = match_names(config.layers_to_save, nodes, "layers_to_save")
    targets = _without_trained(targets, trained, config)
    taken = [p for p, layer in lora_layers(model).items() if name in layer.adapters]
    if taken:
        raise ValueError(
            f"Expected a new adapter name. Received: name={name!r}, which the model has on "
            f"{taken[0]!r}{' and others' if len(taken) > 1 else ''}. Choose another name, or "
            "remove the adapters first: unload_lora(model)."
        )
    ranks = _by_pattern(config.rank_pattern, targets, "rank_pattern")
    alphas = _by_pattern(config.alpha_pattern, targets, "alpha_pattern")
    specs = [(t, config.spec(rank=ranks.get(t.path), alpha=alphas.get(t.path))) for t in targets]
    return Plan(name, specs, trained, config.bias)


def _without_trained(
    targets: Sequence[Target], trained: Sequence[Node], config: LoRAConfig
) -> list[Target]:
    """A layer that trains in full takes no adapter; to ask for both by name is an error."""
    full = {id(n.layer) for t in trained for n in [t, *walk(t.layer)]}
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
    high = []
    for target, spec in plan.specs:
        if spec.rank > min(split_kernel(target.layer).matrix_shape(target.kernel_shape)):
            high.append(target.path)
    if high:
        warnings.warn(
            f"The rank is above the smaller side of the kernel, which costs parameters and adds "
            f"nothing, for {high}. Lower it with rank_pattern.",
            stacklevel=3,
        )
