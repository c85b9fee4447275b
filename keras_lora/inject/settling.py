"""The numbers that take the place of `"auto"` in a config."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_lora.checks import invalid
from keras_lora.config import LoRAConfig, is_auto
from keras_lora.initializers import start_of
from keras_lora.inject.allotting import allotted, with_ranks
from keras_lora.inject.measuring import batches_of, check_batches, preprocessed
from keras_lora.inject.patterns import highest_rank, parameters_of
from keras_lora.inject.plan import make_plan
from keras_lora.lowrank.equations import scaling
from keras_lora.walker import Tree

LOWEST, HIGHEST = 8, 64  # powers of two
# The scale at every rank; with rsLoRA at the lowest, and by its law above it.
SCALE = 2.0


def settled(tree: Tree, config: LoRAConfig, name: str, data: Any) -> tuple[LoRAConfig, Any]:
    """A config with numbers in the place of `"auto"`, with the reasons in words.

    Returns:
        The config, and the data that its start needs yet.

    Raises:
        ValueError: no data, or data that do not say how many answers they have.
    """
    reasons, left = [], data
    if is_auto(config.rank):
        if data is None:
            fix = "pass the dataset of fit: apply_lora(model, config, data=dataset)"
            raise invalid("data", "batches for rank='auto'", data, fix)
        config, reason = _with_rank(tree, config, name, data)
        reasons.append(reason)
        left = data if start_of(config.init).measures else None
    if is_auto(config.alpha):
        config = _with_alpha(config)
        reasons.append(f"scale {config.spec().scaling:.3g}")
    if reasons:
        config = dataclasses.replace(config, settled="; ".join(reasons))
    return config, left


def _with_rank(tree: Tree, config: LoRAConfig, name: str, data: Any) -> tuple[LoRAConfig, str]:
    """The config with the ranks of its layers."""
    check_batches(data)
    alpha = SCALE if isinstance(config.alpha, str) else config.alpha
    plan = make_plan(tree, dataclasses.replace(config, rank=1, alpha=alpha), name)
    sites = {x.target.path: x.target.site for x in plan.layers if x.spec.rank}
    cost = sum(parameters_of(site, 1) for site in sites.values())
    answers = _answers(tree.root, data)
    rank = LOWEST
    while rank < HIGHEST and rank * cost < answers:
        rank *= 2
    known = dataclasses.replace(config, rank=rank)
    whole = {path: min(rank, highest_rank(site)) for path, site in sites.items()}
    linear = all(site.kind.family == "linear" for site in sites.values())
    apart = linear and not tree.adapted
    if apart:
        budget = sum(whole[path] * parameters_of(site, 1) for path, site in sites.items())
        flat = dataclasses.replace(known, alpha=alpha)
        whole = allotted(tree, flat, data, "eva", parameters=budget, least=rank // 2)
    return _with_ranks(known, whole, alpha), _reason(rank, cost, answers, whole, apart)


def _with_ranks(config: LoRAConfig, ranks: Mapping[str, int], alpha: float) -> LoRAConfig:
    """The config with these ranks by path; no pattern if all are that of the config."""
    if set(ranks.values()) == {config.rank}:
        return config
    found = with_ranks(dataclasses.replace(config, alpha=alpha), ranks)
    if is_auto(config.alpha):
        return dataclasses.replace(found, alpha=config.alpha, alpha_pattern={})
    return found


def _with_alpha(config: LoRAConfig) -> LoRAConfig:
    """The config with `alpha` such that the scale is the stated one at each of its ranks."""
    at = LOWEST if config.use_rslora else None

    def alpha(rank: int) -> float:
        return SCALE / scaling(1.0, at or rank, config.use_rslora)

    others = {n: alpha(r) for n, r in config.rank_pattern.items() if n not in config.alpha_pattern}
    rank = config.spec(alpha=SCALE).rank
    return dataclasses.replace(
        config, alpha=alpha(rank), alpha_pattern={**config.alpha_pattern, **others}
    )


def _answers(model: keras.Model, data: Any) -> int:
    """How many values the model learns to give in one pass: the size of `y` in all batches.

    A vector of floating-point numbers, such as a label in one-hot form, is one. What has the
    weight zero is none.
    """
    batch = next(iter(batches_of(data, 1)), None)
    if batch is None:
        raise invalid("data", "at least one batch", "none")
    _, y, weights = preprocessed(model, batch)
    if y is None:
        fix = "pass (x, y) as to fit, or give a rank"
        raise invalid("data", "batches with y for rank='auto'", type(batch), fix)
    found, known = keras.tree.flatten(y), keras.tree.flatten(weights)
    pairs = zip(found, known if len(known) == len(found) else [None] * len(found), strict=True)
    return sum(_size(*pair) for pair in pairs) * _number_of_batches(data)


def _size(y: Any, weights: Any) -> int:
    y = np.asarray(ops.convert_to_numpy(y))
    shape = y.shape[:-1] if y.ndim > 1 and np.issubdtype(y.dtype, np.floating) else y.shape
    if weights is not None:
        weights = np.asarray(ops.convert_to_numpy(weights))
        if weights.shape == shape:
            return int(np.count_nonzero(weights))
    return int(np.prod(shape))


def _number_of_batches(data: Any) -> int:
    count = getattr(data, "num_batches", None)
    if count is None:
        try:
            count = len(data)
        except TypeError as error:
            fix = "pass a list of batches, or dataset.take(number), or give a rank"
            expected = "batches whose number is known, for rank='auto'"
            raise invalid("data", expected, type(data), fix) from error
    return int(count)


def _reason(rank: int, cost: int, answers: int, ranks: Mapping[str, int], apart: bool) -> str:
    """Why these ranks, in words."""
    parameters, low, high = rank * cost, min(ranks.values()), max(ranks.values())
    which = "the highest that is tried, with fewer than"
    if parameters >= answers:
        which = f"the lowest {'that is tried' if rank == LOWEST else 'power of two'}, with at least"
    by_layer = f"; {low} to {high} by layer" if low != high else ""
    why = ", as their inputs vary" if apart and by_layer else ""
    return (
        f"rank {rank}: {which} as many parameters ({parameters:,}) as the data have answers "
        f"({answers:,}){by_layer}{why}"
    )
