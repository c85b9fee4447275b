"""A budget of parameters for the layers of a config, by what a few batches say of them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from keras_lora.config import LoRAConfig
from keras_lora.initializers import randomized_svd
from keras_lora.inject.measuring import Measured, check_data, measured, sketch
from keras_lora.inject.patterns import highest_rank, parameters_of, rank_pattern
from keras_lora.inject.plan import make_plan
from keras_lora.layers import Site
from keras_lora.lowrank.budget import Candidate, spend
from keras_lora.walker import Tree

# The start that measures what a method needs.
METHODS = {"eva": "eva", "gradient": "lora_ga"}
_ITERATIONS = 4
# No layer gets more than so many times the rank of the config, as in EVA.
_MOST = 2


def allotted(
    tree: Tree, config: LoRAConfig, data: Any, method: str, *, parameters: int | None, least: int
) -> dict[str, int]:
    """The rank of each target, by path; zero where a layer has nothing to gain.

    Args:
        tree: The tree of a model without adapters.
        config: What to adapt, with a rank for all layers.
        data: Batches.
        method: One of `METHODS`.
        parameters: The size of all factors, at most; None for that of the config.
        least: The rank that each layer gets, whatever it gains, if its matrix has as many.
    """
    rank = config.spec().rank
    wide = dataclasses.replace(config, rank=_MOST * rank, init=METHODS[method], train_tokens=())
    plan = make_plan(tree, wide, "allocated")
    measure = check_data(tree, plan, wide.init, data)
    assert measure is not None
    found = measured(tree, plan, measure, data)
    sites = {x.target.path: x.target.site for x in plan.layers}
    candidates = [_candidate(site, found[p], _MOST * rank, method) for p, site in sites.items()]
    if parameters is None:
        parameters = sum(rank * candidate.cost for candidate in candidates)
    return dict(zip(sites, spend(candidates, parameters, least), strict=True))


def _candidate(site: Site, found: Measured, rank: int, method: str) -> Candidate:
    cost = parameters_of(site, 1)
    return Candidate(_WORTH[method](found, min(rank, highest_rank(site)), cost), cost)


def _of_inputs(found: Measured, rank: int, _: int) -> list[float]:
    # The vectors are the directions, as long as their singular values.
    squares = np.square(found.values).sum(-1).sum(0)[:rank]
    return (squares / found.energy).tolist()


def _of_gradient(found: Measured, rank: int, cost: int) -> list[float]:
    _, values, _ = randomized_svd(found.values, rank, _ITERATIONS, sketch())
    return (np.square(values).sum(0)[:rank] / cost).tolist()


_WORTH: Mapping[str, Callable[[Measured, int, int], list[float]]] = {
    "eva": _of_inputs,
    "gradient": _of_gradient,
}


def with_ranks(config: LoRAConfig, ranks: Mapping[str, int]) -> LoRAConfig:
    """The config with these ranks by path, and the same scale `s` in each layer."""
    kept = rank_pattern({path: rank for path, rank in ranks.items() if rank})
    dropped = [f"re:{re.escape(path)}" for path, rank in ranks.items() if not rank]
    scale = config.spec().scaling
    one = {path: config.spec(rank=rank, alpha=1.0).scaling for path, rank in kept.items()}
    return dataclasses.replace(
        config,
        rank_pattern=kept,
        alpha_pattern={path: scale / one[path] for path in kept},
        exclude=[*config.exclude, *dropped],
    )
