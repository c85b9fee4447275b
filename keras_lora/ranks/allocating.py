"""`allocate_ranks`: the rank of each layer before training, from a few batches."""

from __future__ import annotations

from typing import Any

import keras

from keras_lora.checks import invalid
from keras_lora.config import LoRAConfig, check_settled
from keras_lora.inject import METHODS, allotted, turn, with_ranks


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
            ranks of its own or `"auto"`, or data and a model that cannot be measured.

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
    with turn(model, "allocate_ranks") as tree:
        ranks = allotted(tree, config, data, method, parameters=parameters, least=0)
    return with_ranks(config, ranks)


def _check(config: LoRAConfig, method: str) -> None:
    if method not in METHODS:
        raise invalid("method", f"one of {list(METHODS)}", method)
    check_settled(config)
    if config.rank_pattern or config.alpha_pattern:
        own = {**config.rank_pattern, **config.alpha_pattern}
        raise invalid("config", "no rank_pattern and no alpha_pattern, which are found here", own)
