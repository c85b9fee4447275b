"""`combine_adapters`: a new adapter from several."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import keras
import numpy as np

from keras_lora.checks import invalid, is_finite
from keras_lora.config import AdapterSpec
from keras_lora.inject import (
    PlannedLayer,
    active_names,
    check_names,
    check_no_dora,
    install,
    plan_factors,
    turn,
    whole_adapters,
)
from keras_lora.layers import Adapter, AdapterBank, LayerAdapter, all_owned, factor_matrices
from keras_lora.lowrank.combining import Combination, WeightedFactors, combine
from keras_lora.walker import Target, Tree, all_targets


def combine_adapters(
    model: keras.Model,
    weights: Mapping[str, float],
    name: str,
    method: str = "cat",
    *,
    rank: int | None = None,
    density: float | None = None,
    majority_sign: str = "total",
    seed: int = 0,
) -> None:
    """Add an adapter that is a weighted combination of others, which stay as they are.

    For each layer, over the adapters that it has, with `c_i = w_i s_i`:

    - `"cat"`: `sum_i c_i A_i B_i`, exactly; the ranks add up.
    - `"svd"`: the best approximation of this sum by rank `rank`; exact at full rank.
    - `"linear"`: `(sum_i sign(c_i) sqrt|c_i| A_i) (sum_i sqrt|c_i| B_i)`, which is the sum above
      plus cross terms `A_i B_j`.
    - `"magnitude_prune"`, `"dare_linear"`: `"linear"` of factors of which a share `density` of the
      entries is kept, the largest or a random choice.
    - `"ties"`, `"dare_ties"`: likewise, averaging the entries that have an elected sign.

    All methods except `"cat"` and `"svd"` need equal ranks.

    Adapters with DoRA cannot be combined: each divides `W0 + s A B` by a norm of its own.

    The new adapter has the scale 1. It is active at once if no adapter is active; otherwise it
    waits for `set_adapter`. It gets the heads, biases and rows of
    tokens (`train_tokens`) that one of the adapters trained.

    Args:
        model: An adapted model.
        weights: `{name: weight}`; weights may be negative.
        name: Name of the new adapter.
        method: One of the above; `keras_lora.lowrank.combining` has the equations.
        rank: For `svd`: the rank to keep; all of it by default.
        density: For the `prune`, `ties` and `dare` methods: the share of entries kept, in (0, 1].
        majority_sign: For the two `ties` methods: elect signs by `"total"` or `"frequency"`.
        seed: For the two `dare` methods: chooses the entries to drop.

    Raises:
        ValueError: unknown names or options, a name that is taken, a weight that is not finite,
            unequal ranks where they must be equal, DoRA, or two adapters with a head, or rows of
            one token, of their own.

    Example:

    >>> import keras, keras_lora as kl
    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(5, name="up")])
    >>> config = kl.LoRAConfig(targets=["up"], rank=2)
    >>> model = kl.apply_lora(kl.apply_lora(model, config, name="fr"), config, name="de")
    >>> kl.combine_adapters(model, {"fr": 0.7, "de": 0.3}, "both")
    >>> kl.lora_layers(model)["up"].adapters["both"].spec.rank
    4

    References: Yadav et al. 2023 (TIES), https://arxiv.org/abs/2306.01708; Yu et al. 2023 (DARE),
    https://arxiv.org/abs/2311.03099.
    """
    options = Combination(
        method=method, rank=rank, density=density, majority_sign=majority_sign, seed=seed
    )
    with turn(model, "combine_adapters") as tree:
        _combine(tree, weights, name, options)


def _combine(tree: Tree, weights: Mapping[str, float], name: str, options: Combination) -> None:
    names = check_names(tree, list(weights))
    _check_weights(weights)
    check_no_dora(tree, names, "Activate them together: set_adapter(model, [...])")
    values = _values_of_one(tree, names)
    targets = {target.path: target for target in all_targets(tree)}
    planned = []
    for index, (path, bank) in enumerate(tree.banks_by_path.items()):
        parts = {n: bank.adapters[n] for n in names if n in bank.adapters}
        terms = [_term(bank, n, weights[n]) for n, part in parts.items() if part.spec.rank]
        if parts:
            # A seed for each layer: otherwise layers of one shape would lose the same entries.
            own = dataclasses.replace(options, seed=options.seed + index)
            planned.append(_combined(targets[path], terms, own, _rows_of_one(path, parts)))
    trained = [v for known in whole_adapters(tree, names).values() for v in known.trained]
    plan = plan_factors(tree, name, Adapter(None, trained), planned, values)
    install(tree, plan, active=not active_names(tree))


def _term(bank: AdapterBank, name: str, weight: float) -> WeightedFactors:
    adapter = bank.ordinary(name)
    a, b = factor_matrices(bank.site, adapter)
    return WeightedFactors(a, b, weight * adapter.scaling)


def _combined(
    target: Target,
    terms: Sequence[WeightedFactors],
    options: Combination,
    rows: Mapping[int, np.ndarray],
) -> PlannedLayer:
    factors = _combined_factors(target, terms, options)
    rank, tokens = factors[0].shape[-1], sorted(rows)
    spec = AdapterSpec(rank=rank, alpha=rank or 1.0, train_tokens=tokens)
    own = [np.stack([rows[token] for token in tokens])] if tokens else []
    return PlannedLayer(target, spec, [*factors, *own])


def _combined_factors(
    target: Target, terms: Sequence[WeightedFactors], options: Combination
) -> Sequence[np.ndarray]:
    split, shape = target.site.split(), target.kernel_shape
    if not terms:
        return [np.zeros(size, "float32") for size in split.factor_shapes(shape, 0)]
    try:
        a, b = combine(terms, options)
    except ValueError as error:
        raise ValueError(f"Layer '{target.path}': {error}") from error
    return split.factors(a, b, shape)


def _rows_of_one(path: str, parts: Mapping[str, LayerAdapter]) -> dict[int, np.ndarray]:
    """The rows that adapters train in full, by token; each may be of one adapter at most."""
    found: dict[int, np.ndarray] = {}
    for part in parts.values():
        tokens = part.spec.train_tokens
        both = sorted(found.keys() & set(tokens))
        if both:
            expected = f"at most one adapter with its own rows of the tokens {both} of {path!r}"
            fix = "own values cannot be combined: leave out all of these adapters except one"
            raise invalid("weights", expected, list(parts), fix)
        found |= dict(zip(tokens, np.array(part.tokens), strict=True)) if tokens else {}
    return found


def _check_weights(weights: Mapping[str, float]) -> None:
    if not weights:
        raise invalid("weights", "at least one adapter", weights)
    for weight in weights.values():
        if not is_finite(weight):
            raise invalid("weights", "finite numbers", dict(weights))


def _values_of_one(tree: Tree, names: Sequence[str]) -> list[tuple[keras.Variable, np.ndarray]]:
    """The adapters' own values of the base's variables; each may have one owner at most."""
    values = []
    for item in all_owned(tree.root.variables):
        owners = [name for name in names if name in item.names]
        if len(owners) > 1:
            raise invalid(
                "weights",
                f"at most one adapter with its own '{item.variable.path}'",
                owners,
                "own values cannot be combined: leave out all of these adapters except one",
            )
        values += [(item.variable, item.value(name)) for name in owners]
    return values
