"""`allocate_ranks`: the rank of each layer before training, from a few batches."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np

from keras_lora.checks import invalid
from keras_lora.config import LoRAConfig
from keras_lora.initializers import randomized_svd
from keras_lora.inject import Measured, check_data, make_plan, measured, turn
from keras_lora.layers import Site
from keras_lora.lowrank.budget import Candidate, spend
from keras_lora.ranks.patterns import parameters_of, rank_pattern

# The start that measures what a method needs.
_METHODS = {"eva": "eva", "gradient": "lora_ga"}
_ITERATIONS = 4
# No layer gets more than so many times the rank of the config, as in EVA.
_MOST = 2


def allocate_ranks(
    model: keras.Model,
    data: Any,
    config: LoRAConfig | None = None,
    *,
    parameters: int | None = None,
    method: str = "eva",
) -> LoRAConfig:
    """Distribute a budget of parameters over the layers, before training.

    - `"eva"`: the directions in which the inputs `X` of a layer vary most come first, those with
      the largest share `s_i^2 / |X|^2` of their layer, where `X = U S V^T`.
    - `"gradient"`: directions of the gradient `G` of `W0` come first, those with the largest
      `s_i^2` for each parameter, where `G = U S V^T`. A step of rate `t` along the first `r` of
      them lowers the loss by `t sum_(i<=r) s_i^2` to first order, which no other change of rank
      `r` and this length does.

    A layer gets at most twice `config.rank`; one whose directions all come too late gets no
    adapter. Nothing is adapted: pass the config to `apply_lora`.

    Args:
        model: A built model without adapters; compiled, for `"gradient"`.
        data: Batches as a dataset gives them to `fit`, of which eight at most are used.
        config: What to adapt; `LoRAConfig()` by default. Linear layers alone.
        parameters: The size of all factors, at most; by default as many as with `config.rank` in
            each layer.
        method: `"eva"` or `"gradient"`.

    Returns:
        The config with `rank_pattern`, the same scale `s` in each layer, and `exclude` for layers
        that get no adapter.

    Raises:
        ValueError: another method, a budget that has no room for one direction, a config that has
            ranks of its own, or data and a model that cannot be measured.

    Example:

    >>> import keras, numpy as np, keras_lora as kl
    >>> up = keras.layers.Dense(5, activation="tanh", kernel_initializer="identity", name="up")
    >>> model = keras.Sequential([keras.Input((3,)), up, keras.layers.Dense(4, name="down")])
    >>> x = np.random.default_rng(0).normal(size=(32, 3)) * [9, 1, 1]
    >>> config = kl.LoRAConfig(targets=["up", "down"], rank=2)
    >>> config = kl.allocate_ranks(model, [x.astype("float32")], config, parameters=26)
    >>> config.rank_pattern
    {'up': 1, 'down': 2}

    References: Paischer et al. 2024 (EVA), https://arxiv.org/abs/2410.07170, section 3; Eckart and
    Young 1936, "The approximation of one matrix by another of lower rank".
    """
    config = LoRAConfig() if config is None else config
    _check(config, method)
    wide = dataclasses.replace(config, rank=_MOST * config.rank, init=_METHODS[method])
    with turn(model, "allocate_ranks") as tree:
        plan = make_plan(tree, wide, "allocated")
        measure = check_data(tree, plan, wide.init, data)
        assert measure is not None
        found = measured(tree, plan, measure, data)
    sites = {x.target.path: x.target.site for x in plan.layers}
    candidates = {
        path: _candidate(site, found[path], wide.rank, method) for path, site in sites.items()
    }
    if parameters is None:
        parameters = sum(config.rank * candidate.cost for candidate in candidates.values())
    ranks = dict(zip(sites, spend(list(candidates.values()), parameters, least=0), strict=True))
    return _with_ranks(config, ranks)


def _check(config: LoRAConfig, method: str) -> None:
    if method not in _METHODS:
        raise invalid("method", f"one of {list(_METHODS)}", method)
    if config.rank_pattern or config.alpha_pattern:
        own = {**config.rank_pattern, **config.alpha_pattern}
        raise invalid("config", "no rank_pattern and no alpha_pattern, which are found here", own)


def _candidate(site: Site, found: Measured, rank: int, method: str) -> Candidate:
    cost = parameters_of(site, 1)
    # A rank above the smaller side of a matrix adds nothing.
    rank = min(rank, *site.split().matrix_shape(site.shape))
    return Candidate(_WORTH[method](found, rank, cost), cost)


def _of_inputs(found: Measured, rank: int, _: int) -> list[float]:
    # The vectors are the directions, as long as their singular values.
    squares = np.square(found.values).sum(-1).sum(0)[:rank]
    return (squares / found.energy).tolist()


def _of_gradient(found: Measured, rank: int, cost: int) -> list[float]:
    normal = keras.initializers.RandomNormal(stddev=1.0)
    _, values, _ = randomized_svd(found.values, rank, _ITERATIONS, normal)
    return (np.square(values).sum(0)[:rank] / cost).tolist()


_WORTH: Mapping[str, Callable[[Measured, int, int], list[float]]] = {
    "eva": _of_inputs,
    "gradient": _of_gradient,
}


def _with_ranks(config: LoRAConfig, ranks: Mapping[str, int]) -> LoRAConfig:
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
