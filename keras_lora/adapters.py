"""Several adapters on one model: activate, disable, delete, scale and combine them."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import keras
import numpy as np

from keras_lora.checks import invalid, is_finite
from keras_lora.config import AdapterSpec
from keras_lora.inject import (
    PlannedLayer,
    activate,
    active_names,
    adapter_names,
    changing,
    check_adapted,
    check_names,
    check_no_dora,
    drop,
    install,
    leaving,
    no_training,
    plan_factors,
    switch,
    unload,
    whole_adapters,
)
from keras_lora.layers import Adapter, AdapterBank, all_owned
from keras_lora.lowrank.combining import Combination, WeightedFactors, combine
from keras_lora.walker import Target, Tree, all_targets


def set_adapter(
    model: keras.Model, names: str | Sequence[str] | None, trainable: bool = True
) -> None:
    """Activate exactly the named adapters, and train them; their deltas add up.

        h = x W0 + sum_i s_i (x A_i) B_i        over the adapters named

    Only values move and nothing is traced again: `predict`, `fit` and `generate` go on with their
    compiled functions, and an inactive adapter adds nothing to the time of a step.
    A new trace is needed only where

    - more adapters are active on a layer than ever before, or one has a higher rank, or is the
      first with dropout or DoRA: the layer then gets new variables;
    - the rank differs at all, and the optimizer does not go by element (Adafactor, Lamb, Muon, and
      classes that are not Keras's): zeros beside an adapter would change its training;
    - other variables of the base train (adapters with other `layers_to_save` or `bias`), or
      `trainable` changes: `fit` (on JAX every function) is then traced again.

    The moments in the optimizers of this model and of models inside it move with the adapters, and
    so does the number of steps, on which schedules depend: an adapter that is trained, then others,
    then the first again, trains as without a break, whatever ranks, heads and layers they have.
    Adapters that are active together share one number of steps, that of the one that was trained
    longest. The learning rate stays. What trains beside the adapters and belongs to none (a layer
    made by hand) keeps moments for each of these adapters. `compile` starts anew, and so does an
    adapter that was replaced. An optimizer class of your own must keep its moments as Keras's do,
    in lists with an entry for each variable; otherwise a warning says when they are lost.

    `fit` and `train_on_batch` see to the ranks. In a training loop of your own, with an optimizer
    that does not go by element, `compile` the model with it before `set_adapter`.

    A layer that none of the named adapters is on keeps an empty slot, which adds zero and gets no
    gradient.

    Args:
        model: An adapted model.
        names: A name, several, or None for the base alone.
        trainable: Whether the adapters train, with their biases and `layers_to_save`.

    Raises:
        ValueError: no adapters, a name that the model does not have, or two adapters that each
            have a value for one variable (a head in the `layers_to_save` of both).

    Example:

    >>> import keras, keras_lora as kl
    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(5, name="up")])
    >>> config = kl.LoRAConfig(targets=["up"], rank=2)
    >>> model = kl.apply_lora(kl.apply_lora(model, config, name="fr"), config, name="de")
    >>> kl.set_adapter(model, "fr")
    >>> kl.lora_layers(model)["up"].active_adapters
    ('fr',)
    """
    tree = Tree.of(model)
    switch(tree, check_names(tree, names), trainable)


@contextlib.contextmanager
def disable_adapter(model: keras.Model) -> Iterator[keras.Model]:
    """Within the context no adapter is active: the model computes the outputs of its base.

    The outputs equal the base's up to rounding: the empty slots are still computed, so that
    nothing is traced again. No trainable flag and no optimizer changes. `fit` of the model is
    refused inside, since it would move the base's own heads and biases.

    Args:
        model: An adapted model.

    Yields:
        The same model.

    Raises:
        ValueError: the model has no adapters.

    Example:

    >>> import keras, keras_lora as kl
    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(5, name="up")])
    >>> model = kl.apply_lora(model, kl.LoRAConfig(targets=["up"], rank=2))
    >>> with kl.disable_adapter(model):
    ...     kl.lora_layers(model)["up"].active_adapters
    ()
    """
    tree = Tree.of(model)
    check_adapted(tree)
    names = active_names(tree)
    activate(tree, [])
    try:
        with no_training(tree):
            yield model
    finally:
        activate(Tree.of(model), names)  # anew: the model may have changed within the context


def delete_adapter(model: keras.Model, name: str) -> None:
    """Take an adapter out: its factors, and its values of biases and `layers_to_save`.

    The other adapters stay active or inactive. If it was the last one, the model is plain again, as
    after `unload_lora`. If some layers have no other adapter, they become plain and compiled
    functions are made anew; otherwise nothing is traced again.

    Args:
        model: An adapted model.
        name: The adapter.

    Raises:
        ValueError: the model has no such adapter.

    Example:

    >>> import keras, keras_lora as kl
    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(5, name="up")])
    >>> config = kl.LoRAConfig(targets=["up"], rank=2)
    >>> model = kl.apply_lora(kl.apply_lora(model, config, name="fr"), config, name="de")
    >>> kl.delete_adapter(model, "de")
    >>> list(kl.lora_layers(model)["up"].adapters)
    ['fr']
    """
    tree = Tree.of(model)
    (name,) = check_names(tree, [name])
    if adapter_names(tree) == [name]:
        unload(tree)
        return
    left = [n for n in active_names(tree) if n != name]
    if len(left) < len(active_names(tree)):
        switch(tree, left, any(bank.trains for bank in tree.banks))
    emptied = [x for x in tree.adapted if all(set(b.adapters) <= {name} for b in x.banks.values())]
    with changing(tree, emptied) if emptied else contextlib.nullcontext(), leaving(tree):
        drop(tree, name)


def scale_adapter(
    model: keras.Model, name: str, factor: float
) -> contextlib.AbstractContextManager[None]:
    """Let an adapter count more or less: `h = x W0 + factor * s (x A) B`.

    With DoRA the factor scales `s A B` alone, not the magnitude `m`:
    `W = m (W0 + factor * s A B) / |W0 + factor * s A B|`, as in PEFT.

    The factor lasts; at the end of a `with` statement the old factor returns. Nothing is traced
    again. Merging and saving use the factor.

    Args:
        model: An adapted model.
        name: The adapter, active or not.
        factor: A finite number; 1 is the adapter as it was trained, and -1 subtracts its delta.

    Returns:
        A context manager, for a `with` statement at whose end the old factor returns.

    Raises:
        ValueError: the model has no such adapter, or a factor that is not finite.

    Example:

    >>> import keras, keras_lora as kl
    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(5, name="up")])
    >>> model = kl.apply_lora(model, kl.LoRAConfig(targets=["up"], rank=2, alpha=2))
    >>> with kl.scale_adapter(model, "default", 0.5):
    ...     kl.lora_layers(model)["up"].adapters["default"].scaling
    0.5
    >>> kl.lora_layers(model)["up"].adapters["default"].scaling
    1.0
    """
    tree = Tree.of(model)
    (name,) = check_names(tree, [name])
    if not is_finite(factor):
        raise invalid("factor", "a finite number", factor)
    banks = [bank for bank in tree.banks if name in bank.adapters]
    before = [(bank, bank.adapters[name].scale_factor) for bank in banks]
    for bank in banks:
        bank.set_scale_factor(name, float(factor))
    return _scaled(name, before)


@contextlib.contextmanager
def _scaled(name: str, before: Sequence[tuple[AdapterBank, float]]) -> Iterator[None]:
    """A context manager made once the factor is set; the old factors return at its end."""
    try:
        yield
    finally:
        for bank, factor in before:
            if name in bank.adapters:
                bank.set_scale_factor(name, factor)


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
    waits for `set_adapter`. It gets the head or bias that one of the adapters trained.

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
            unequal ranks where they must be equal, DoRA, or two adapters with a head of their own.

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
    tree = Tree.of(model)
    names = check_names(tree, list(weights))
    options = Combination(
        method=method, rank=rank, density=density, majority_sign=majority_sign, seed=seed
    )
    _check_weights(weights)
    check_no_dora(tree, names, "Activate them together: set_adapter(model, [...])")
    values = _values_of_one(tree, names)
    targets = {target.path: target for target in all_targets(tree)}
    planned = []
    for index, (path, bank) in enumerate(tree.banks_by_path.items()):
        terms = [_term(bank, n, weights[n]) for n in names if n in bank.adapters]
        if terms:
            # A seed for each layer: otherwise layers of one shape would lose the same entries.
            own = dataclasses.replace(options, seed=seed + index)
            planned.append(_combined(targets[path], terms, own))
    trained = [v for known in whole_adapters(tree, names).values() for v in known.trained]
    plan = plan_factors(tree, name, Adapter(None, trained), planned, values)
    install(tree, plan, active=not active_names(tree))


def _term(bank: AdapterBank, name: str, weight: float) -> WeightedFactors:
    adapter, site = bank.adapters[name], bank.site
    a, b = site.split().matrices(np.array(adapter.a), np.array(adapter.b), site.shape)
    return WeightedFactors(a, b, weight * adapter.scaling)


def _combined(
    target: Target, terms: Sequence[WeightedFactors], options: Combination
) -> PlannedLayer:
    try:
        a, b = combine(terms, options)
    except ValueError as error:
        raise ValueError(f"Layer '{target.path}': {error}") from error
    rank = a.shape[-1]
    factors = target.site.split().factors(a, b, target.kernel_shape)
    return PlannedLayer(target, AdapterSpec(rank=rank, alpha=rank), factors)


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
