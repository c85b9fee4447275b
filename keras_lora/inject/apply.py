"""`apply_lora`: adapting a model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import keras

from keras_lora.checks import invalid
from keras_lora.config import LoRAConfig
from keras_lora.distribution import strategy_scope
from keras_lora.inject.cloning import plain_copy
from keras_lora.inject.compiled import changing
from keras_lora.inject.gradients import settle_gradients
from keras_lora.inject.identity import check_variables
from keras_lora.inject.keras_hub_writers import guard_keras_hub_writers
from keras_lora.inject.measuring import check_data, measured_plan
from keras_lora.inject.plan import Plan, PlannedLayer, make_plan, warn_of_high_ranks
from keras_lora.inject.saving import prepare_saving
from keras_lora.inject.settling import settled
from keras_lora.inject.switching import (
    activate,
    active_names,
    allow_any_rank,
    refreeze,
    settle_ranks,
    switch,
)
from keras_lora.inject.trial import check_plan
from keras_lora.inject.turns import turn
from keras_lora.layers import (
    DEFAULT_ADAPTER,
    LoRALayer,
    add_owner,
    attach,
    check_adapter_name,
    detach,
    layer_adapter,
    remove_owner,
)
from keras_lora.walker import Tree, warn_of_heads


def apply_lora(
    model: keras.Model,
    config: LoRAConfig | None = None,
    name: str = DEFAULT_ADAPTER,
    inplace: bool = True,
    data: Any = None,
) -> keras.Model:
    """Adapt a built model: freeze it and add trainable low-rank factors to its targets.

        h = x W0 + s (x A) B

    The layers are converted in place: the objects, their names and their variables stay, so
    checkpoints of the base still fit. Afterwards exactly the adapters, the biases that
    `config.bias` selects and `config.layers_to_save` train. A fresh adapter changes no output.

    Called again with another name it adds a second adapter, which is then active and trains alone;
    `set_adapter` switches. Each adapter has its own values of the biases and layers that it trains.

    The compiled functions of every model with one of the layers are dropped and made anew when next
    needed; a compiled optimizer is replaced by a fresh one of the same settings, which excludes the
    same variables from weight decay. Functions that you compiled yourself (`tf.function`) keep the
    old graph.

    Saving an adapted model: `save_weights` and `load_weights` (and with them
    `ModelCheckpoint(save_weights_only=True)` and `BackupAndRestore`) keep base, adapters and
    optimizer, and resume exactly in a model that was adapted with the same config. `save` writes
    a `.keras` file that continues exactly if the model's config lists the adapted layers
    (Functional and Sequential models of plain layers), and otherwise raises before a file is
    touched. To save a plain model, call `merge_lora` first.

    With `rank="auto"` the rank `r` follows from the data, with `alpha="auto"` alpha from the rank:

        r = the lowest of 8, 16, 32, 64 with r c >= n, or 64        alpha = 2 r

    where `c` is the size of the factors of all targets at rank 1, and `n` how many answers one pass
    over the data has: the size of `y` (for a language model tokens, for a classifier rows), without
    those of weight zero. This budget `r c` goes to layers with `r/2` to `2 r` for each, as the
    inputs of layers vary on the first eight batches (EVA; see `allocate_ranks`); to all alike in
    a model that has adapters, and where targets are not linear. `lora_summary` says what was found.
    Of the same model and data the same is found.

    Args:
        model: A built model; also one that is compiled, trained, nested in another or made
            under a `tf.distribute` strategy.
        config: What to adapt and how; `LoRAConfig()` by default.
        name: Name of the adapter.
        inplace: False leaves the model untouched and adapts a copy; for models that can be made
            from their `get_config`. The copy is compiled as the model is, a KerasHub task with
            its defaults.
        data: For `init="eva"` and `"lora_ga"`, which begin with what they measure on data: batches
            as a dataset gives them to `fit`, of which eight at most are used. `"lora_ga"` asks for
            a compiled model, and for memory for the gradients of all target matrices. For
            `init="loftq"`: the model in floating point that `model` was before it was quantized.
            For `rank="auto"`: batches too, whose number is known.

    Returns:
        The adapted model: `model` itself, or the copy.

    Raises:
        ValueError: an unbuilt model, targets that match nothing, a name that is taken or
            malformed, a layer that cannot be adapted, or whose matrix another layer computes with,
            a layer that moves frozen variables, `"auto"` without data. The model is then as it was.

    Example:

    >>> import keras, numpy as np, keras_lora as kl
    >>> up, head = keras.layers.Dense(5, name="up"), keras.layers.Dense(2, name="head")
    >>> model = keras.Sequential([keras.Input((3,)), up, head])
    >>> model = kl.apply_lora(model, kl.LoRAConfig(rank=2, layers_to_save=["head"]))
    >>> [v.name for v in model.trainable_variables]
    ['lora_a', 'lora_b', 'kernel', 'bias']

    >>> data = [(np.ones((9, 3)), np.ones((9, 2)))]
    >>> model = kl.unload_lora(model)
    >>> model = kl.apply_lora(model, kl.LoRAConfig(rank="auto", alpha="auto"), data=data)
    >>> kl.lora_layers(model)["up"].adapters["default"].spec.scaling
    2.0

    References: Hu et al. 2021, https://arxiv.org/abs/2106.09685, section 4; Schulman et al. 2025
    (as many parameters as tokens; the scale), https://thinkingmachines.ai/blog/lora; Allen-Zhu and
    Li 2024 (two bits a parameter), https://arxiv.org/abs/2404.05405; Paischer et al. 2024 (EVA),
    https://arxiv.org/abs/2410.07170.
    """
    config = LoRAConfig() if config is None else config
    check_adapter_name(name)
    if not isinstance(config, LoRAConfig):
        raise invalid("config", "a LoRAConfig", config)
    with turn(model, "apply_lora") as tree:
        config, data = settled(tree, config, name, data)
        plan = make_plan(tree, config, name)
        measure = check_data(tree, plan, config.init, data)
        if inplace:
            changed = tree
        elif tree.adapted:
            raise invalid("inplace", "True for a model that has adapters", inplace)
        else:
            changed = Tree.of(plain_copy(tree))
            plan = make_plan(changed, config, name)
        warn_of_high_ranks(plan)
        warn_of_heads(changed, config.targets, [layer.target for layer in plan.layers])
        install(changed, plan if measure is None else measured_plan(changed, plan, measure, data))
    return changed.root


def install(tree: Tree, plan: Plan, active: bool = True, trainable: bool = True) -> None:
    """Add an adapter as planned. It is active and trains alone, or waits for `set_adapter`.

    Nothing is traced again if its layers are adapted already, and it waits or fits in their slots.
    """
    check_variables(tree)
    check_plan(tree, plan)
    layers = [planned.target.layer for planned in plan.layers]
    if all(isinstance(layer, LoRALayer) for layer in layers):
        with _taken_back(tree, plan):
            _add(tree, plan)
            if active:
                switch(tree, [plan.name], trainable)
    else:
        with changing(tree, layers):
            with _taken_back(tree, plan):
                _add(tree, plan)
                settle_ranks(tree)
                if active:
                    activate(tree, [plan.name], trainable)
            if active:
                refreeze(tree, plan.adapter.trained if trainable else ())
    prepare_saving(tree)
    settle_gradients(tree)
    guard_keras_hub_writers()


@contextlib.contextmanager
def _taken_back(tree: Tree, plan: Plan) -> Iterator[None]:
    """Take an adapter out again if an error arises while it is added."""
    before = active_names(tree)
    try:
        yield
    except BaseException:
        activate(tree, before)
        drop(tree, plan.name)
        raise


def _add(tree: Tree, plan: Plan) -> None:
    with strategy_scope(tree):
        for planned in plan.layers:
            _add_to_layer(plan, planned)
    # Inner layers last: a layer's weights contain those of the layers in it.
    owners = {id(v): x for x in tree.layers for v in x.weights} if plan.owned else {}
    for variable in plan.owned:
        item = add_owner(variable, owners[id(variable)], plan.name)
        if id(variable) in plan.values:
            item.assign(plan.name, plan.values[id(variable)])


def _add_to_layer(plan: Plan, planned: PlannedLayer) -> None:
    layer, spec = planned.target.layer, planned.spec
    adapted = layer if isinstance(layer, LoRALayer) else attach(layer)
    bank = adapted.banks[planned.target.matrix]
    if planned.factors is None:
        bank.add(plan.name, spec, plan.adapter, measured=planned.measured)
    else:
        bank.put(plan.name, layer_adapter(spec, planned.factors, plan.adapter))


def drop(tree: Tree, name: str) -> None:
    """Take an inactive adapter out of a model; a layer without adapters is plain again."""
    for layer in tree.adapted:
        banks = layer.banks.values()
        for bank in banks:
            if name in bank.adapters:
                bank.remove(name)
        if not any(bank.adapters for bank in banks):
            detach(layer)
    for variable in tree.root.variables:
        remove_owner(variable, name)
    if not tree.adapted:
        allow_any_rank(tree)
