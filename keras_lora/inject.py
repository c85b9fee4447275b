"""Adapting a model and taking the adapters out again: conversions in place.

Private Keras API in this file, and why (`tests/test_private_api.py` watches each):
    `_compiled_trainable_state`: Keras warns that a flag changed after `compile`, although the
        optimizer was renewed here.
    `_kernel`: the frozen kernel itself, to fold into and to put back.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

import keras
import numpy as np
from keras import ops

from keras_lora.cloning import plain_copy
from keras_lora.compiled import fresh_optimizer, models_around, reset_functions
from keras_lora.config import AdapterSpec, LoRAConfig, invalid
from keras_lora.freezing import freeze, own_trainable_variables, thaw
from keras_lora.layers import (
    DEFAULT_ADAPTER,
    LoRALayer,
    attach,
    check_adapter_name,
    detach,
    is_registered,
)
from keras_lora.lowrank import split_equation
from keras_lora.walker import (
    Node,
    Target,
    find_targets,
    lora_layers,
    match_names,
    matches,
    walk,
)


@dataclass(frozen=True)
class _Plan:
    """All that `apply_lora` is about to do, checked before anything is changed."""

    name: str
    specs: Sequence[tuple[Target, AdapterSpec]]
    trained_layers: Sequence[Node]
    bias: str


def apply_lora(
    model: keras.Model,
    config: LoRAConfig | None = None,
    name: str = DEFAULT_ADAPTER,
    inplace: bool = True,
) -> keras.Model:
    """Adapt a built model: freeze it and add trainable low-rank factors to its targets.

        h = x W0 + s (x A) B

    The layers are converted in place: the objects, their names and their variables stay, so
    checkpoints of the base still fit. Afterwards exactly the adapters, the biases that
    `config.bias` selects and `config.layers_to_save` train. A fresh adapter changes no output.

    Called again with another name it adds a second adapter, which then acts and trains alone;
    `set_adapter` switches.

    The compiled functions of every model around the layers are dropped and made anew when next
    needed; a compiled optimizer is replaced by a fresh one of the same configuration. Functions
    that you compiled yourself (`tf.function`) keep the old graph.

    Saving an adapted model: `save_weights` and `load_weights` (and with them
    `ModelCheckpoint(save_weights_only=True)` and `BackupAndRestore`) hold base, adapters and
    optimizer, and resume exactly in a model that was adapted with the same config. `save` writes
    a `.keras` file that continues exactly where the model's config lists the adapted layers
    (Functional and Sequential models of plain layers), and otherwise raises before a file is
    touched. For a plain model: `merge_lora`.

    Args:
        model: A built model; also one that is compiled, trained, nested in another or made
            under a `tf.distribute` strategy.
        config: What to adapt and how; `LoRAConfig()` by default.
        name: Name of the adapter.
        inplace: False leaves the model untouched and adapts a copy; for models that can be made
            from their `get_config`.

    Returns:
        The adapted model: `model` itself, or the copy.

    Raises:
        ValueError: an unbuilt model, targets that match nothing, a name that is taken or
            malformed, a layer that cannot be adapted. The model is then as it was.

    Example:

    >>> import keras, keras_lora as kl
    >>> model = keras.Sequential(
    ...     [keras.Input((3,)), keras.layers.Dense(5, name="up"), keras.layers.Dense(2, name="head")]
    ... )
    >>> model = kl.apply_lora(model, kl.LoRAConfig(rank=2, layers_to_save=["head"]))
    >>> [v.name for v in model.trainable_variables]
    ['lora_a_default', 'lora_b_default', 'kernel', 'bias']

    Reference: Hu et al. 2021, https://arxiv.org/abs/2106.09685, section 4.
    """
    config = LoRAConfig() if config is None else config
    check_adapter_name(name)
    if not isinstance(config, LoRAConfig):
        raise invalid("config", "a LoRAConfig", config)
    if not isinstance(model, keras.layers.Layer):
        raise invalid("model", "a built Keras model", model)
    plan = _plan(model, config, name)
    if not inplace:
        if lora_layers(model):
            raise invalid("inplace", "True for a model that has adapters", inplace)
        model = plain_copy(model)
        plan = _plan(model, config, name)
    _warn_of_high_ranks(plan)
    with changing(model, [target.layer for target, _ in plan.specs]):
        _carry_out(plan, model)
    return model


def _plan(model: keras.Model, config: LoRAConfig, name: str) -> _Plan:
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
    specs = [
        (t, config.spec(rank=ranks.get(t.path), alpha=alphas.get(t.path))) for t in targets
    ]
    return _Plan(name, specs, trained, config.bias)


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


def _warn_of_high_ranks(plan: _Plan) -> None:
    high = []
    for target, spec in plan.specs:
        equation = getattr(target.layer, "equation", "...x,xy->...y")
        if spec.rank > min(split_equation(equation).matrix_shape(target.kernel_shape)):
            high.append(target.path)
    if high:
        warnings.warn(
            f"The rank is above the smaller side of the kernel, which costs parameters and adds "
            f"nothing, for {high}. Lower it with rank_pattern.",
            stacklevel=3,
        )


def _carry_out(plan: _Plan, model: keras.Model) -> None:
    done: list[LoRALayer] = []
    try:
        for target, spec in plan.specs:
            with _strategy_scope(target.layer):
                adapted = isinstance(target.layer, LoRALayer)
                layer = target.layer if adapted else attach(target.layer)
                done.append(layer)
                layer.add_adapter(plan.name, spec)
    except BaseException:
        _undo(done, plan.name)
        raise
    for layer in lora_layers(model).values():
        layer.activate([plan.name] if plan.name in layer.adapters else [])
    freeze(model, _selected(plan, model))
    _guard_saving(model)


def _undo(layers: Sequence[LoRALayer], name: str) -> None:
    for layer in layers:
        if name in layer.adapters:
            layer.remove_adapter(name)
        if not layer.adapters:
            detach(layer)


def _selected(plan: _Plan, model: keras.Model) -> list[keras.Variable]:
    """What trains: the new adapters, the biases asked for, and the layers trained in full."""
    layers = [target.layer for target, _ in plan.specs]
    selected = [v for layer in layers for v in layer.adapters[plan.name].variables]
    if plan.bias == "lora_only":
        selected += [layer.bias for layer in layers if layer.bias is not None]
    if plan.bias == "all":
        selected += [v for v in model.variables if v.name == "bias"]
    for node in plan.trained_layers:
        selected += own_trainable_variables(node.layer)
    return selected


def merge_lora(model: keras.Model, inplace: bool = True) -> keras.Model:
    """Fold the active adapters into the kernels and return a plain Keras model.

        W = W0 + sum_i s_i A_i B_i        summed in float32 or wider, rounded once to W0's dtype

    No class, variable or config of keras_lora is left: the model saves, loads and exports
    without this package. Every trainable flag is what it was before `apply_lora`. Adapters that
    are not active are dropped, with a warning that names them.

    Args:
        model: An adapted model.
        inplace: False leaves the adapted model as it is and returns a merged copy.

    Returns:
        The plain model: `model` itself, or the copy.

    Raises:
        ValueError: no adapters, none that acts, or a kernel that is not finite after merging.
            The model is then as it was.

    Example:

    >>> import keras, keras_lora as kl
    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(5, name="up")])
    >>> model = kl.apply_lora(model, kl.LoRAConfig(targets=["up"], rank=2))
    >>> type(kl.merge_lora(model).get_layer("up")).__name__
    'Dense'

    Reference: Hu et al. 2021, section 4.1, "No Additional Inference Latency".
    """
    layers = _mergeable(model)
    dropped = sorted({n for x in layers.values() for n in x.adapters} - _active_names(layers))
    if dropped:
        warnings.warn(f"Merging drops the adapters that are not active: {dropped}.", stacklevel=2)
    if not inplace:
        return _merged_copy(model, layers)
    with changing(model, list(layers.values())):
        for layer in layers.values():
            layer._kernel.assign(layer.kernel)
        _strip(model)
    return model


def unload_lora(model: keras.Model) -> keras.Model:
    """Drop every adapter: the base again, bit for bit, with its trainable flags.

    Layers of `layers_to_save` and biases that were trained keep what they learned: they are
    the base's own variables.

    Args:
        model: An adapted model.

    Returns:
        `model`, plain.

    Raises:
        ValueError: the model has no adapters.

    Example:

    >>> import keras, keras_lora as kl
    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(5, name="up")])
    >>> model = kl.apply_lora(model, kl.LoRAConfig(targets=["up"], rank=2))
    >>> len(kl.unload_lora(model).weights)
    2
    """
    layers = adapted(model)
    with changing(model, list(layers.values())):
        _strip(model)
    return model


@contextlib.contextmanager
def merged(model: keras.Model) -> Iterator[keras.Model]:
    """Within the context the model is merged and plain; afterwards it is as it was, bit for bit.

    The kernels are kept aside meanwhile, so the context costs their size in memory. The
    optimizer is kept too: save, evaluate or export inside, and train outside.

    Args:
        model: An adapted model.

    Yields:
        The same model, plain.

    Raises:
        ValueError: as `merge_lora`.

    Example:

    >>> import keras, keras_lora as kl
    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(5, name="up")])
    >>> model = kl.apply_lora(model, kl.LoRAConfig(targets=["up"], rank=2))
    >>> with kl.merged(model) as plain:
    ...     len(plain.weights)
    2
    >>> len(model.weights)
    4
    """
    layers = list(_mergeable(model).values())
    models = around(model, layers)
    trainable = list(model.trainable_variables)
    # A copy: on torch the array would share the memory of the variable.
    kernels = [np.array(ops.convert_to_numpy(layer._kernel), copy=True) for layer in layers]
    for layer in layers:
        layer._kernel.assign(layer.kernel)
    states = [detach(layer) for layer in layers]
    thaw(model)
    _allow_saving(model)
    refresh(models)
    try:
        yield model
    finally:
        for layer, state, kernel in zip(layers, states, kernels, strict=True):
            attach(layer, state)._kernel.assign(kernel)
        freeze(model, trainable)
        _guard_saving(model)
        refresh(models)


def _merged_copy(model: keras.Model, layers: Mapping[str, LoRALayer]) -> keras.Model:
    copy = plain_copy(model)
    twins = zip(walk(model), walk(copy), strict=True)
    for node, twin in twins:
        if node.path in layers:
            twin.layer.kernel.assign(node.layer.kernel)
    return copy


def _strip(model: keras.Model) -> None:
    for layer in lora_layers(model).values():
        detach(layer)
    thaw(model)
    _allow_saving(model)


def adapted(model: keras.Model) -> dict[str, LoRALayer]:
    """The adapted layers by path.

    Raises:
        ValueError: there are none.
    """
    layers = lora_layers(model)
    if not layers:
        raise ValueError(
            f"Expected a model with adapters. Received: {model.name!r}, which has none. It was "
            "never adapted, or its adapters were merged or unloaded: call apply_lora first."
        )
    return layers


def _active_names(layers: Mapping[str, LoRALayer]) -> set[str]:
    return {name for layer in layers.values() for name in layer.active_adapters}


def _mergeable(model: keras.Model) -> dict[str, LoRALayer]:
    """The adapted layers, once every kernel is known to be finite after merging."""
    layers = adapted(model)
    if not _active_names(layers):
        raise ValueError(
            "Expected at least one active adapter to merge. Received: a model whose adapters are "
            "all inactive. Activate one with set_adapter, or drop them with unload_lora."
        )
    # One kernel at a time, and again when it is assigned: to keep them would double the memory.
    broken = [p for p, x in layers.items() if not bool(ops.all(ops.isfinite(x.kernel)))]
    if broken:
        raise ValueError(
            f"Expected finite kernels after merging. Received: NaN or infinity in {broken}, from "
            "adapter weights (or base weights) that are not finite, or from a delta too large "
            "for the dtype of the base. Train again, or drop the adapters: unload_lora(model)."
        )
    return layers


def _strategy_scope(layer: keras.layers.Layer) -> contextlib.AbstractContextManager[Any]:
    """The `tf.distribute` scope that the layer's kernel was made in; new variables belong there."""
    strategy = getattr(layer._kernel.value, "distribute_strategy", None)
    return contextlib.nullcontext() if strategy is None else strategy.scope()


def around(model: keras.Model, layers: Sequence[keras.layers.Layer]) -> list[keras.Model]:
    """The models whose compiled functions a change of these layers makes stale."""
    found = models_around(layers)
    inside = any(m is model for m in found) or not isinstance(model, keras.Model)
    return found if inside else [*found, model]


@contextlib.contextmanager
def changing(model: keras.Model, layers: Sequence[keras.layers.Layer]) -> Iterator[None]:
    """Around a change of layers: drop what was compiled, and renew optimizers that must be."""
    models = around(model, layers)
    with _strategy_scope(layers[0]):
        renewed = [fresh_optimizer(m) for m in models]
    before = [[id(v) for v in m.trainable_variables] for m in models]
    try:
        yield
    finally:
        refresh(models)
    for m, optimizer, trained in zip(models, renewed, before, strict=True):
        if optimizer is not None and trained != [id(v) for v in m.trainable_variables]:
            m.optimizer = optimizer


def refresh(models: Sequence[keras.Model]) -> None:
    """Drop compiled functions, and let `fit` take the present flags for those of `compile`."""
    for model in models:
        reset_functions(model)
        if getattr(model, "compiled", False):
            layers = [model, *(node.layer for node in walk(model))]
            model._compiled_trainable_state = {layer: layer.trainable for layer in layers}


def _guard_saving(model: keras.Model) -> None:
    """Refuse, before a file is touched, to write a file that could not be read back.

    Keras opens the file first and serializes then, so that an error from a layer would destroy
    an older file; `LoRALayer.save_assets` is the second line, for outer models.
    """
    layers = lora_layers(model)
    message = None if _config_holds(model, layers) else _UNSAVEABLE.format(model=model.name)
    for layer in layers.values():
        layer._lora.unsaveable = message
    for inner in _models(model):
        if message:
            inner.save = partial(_refuse, message)
        if hasattr(inner, "save_to_preset"):
            inner.save_to_preset = partial(_refuse, _UNSAVEABLE.format(model=model.name))


def _allow_saving(model: keras.Model) -> None:
    for inner in _models(model):
        for name in {"save", "save_to_preset"} & vars(inner).keys():
            delattr(inner, name)


_UNSAVEABLE = (
    "'{model}' has adapters that no `.keras` file or preset could bring back: its config does not "
    "list the adapted layers. To save a plain model: merge_lora(model, inplace=False).save(path). "
    "To go on training later: model.save_weights(path), and then apply_lora with the same config "
    "and load_weights (in callbacks: save_weights_only=True)."
)


def _refuse(message: str, *args: Any, **kwargs: Any) -> NoReturn:
    raise ValueError(message)


def _models(model: keras.Model) -> list[keras.Model]:
    layers = [model, *(node.layer for node in walk(model))]
    return [layer for layer in layers if isinstance(layer, keras.Model)]


def _config_holds(model: keras.Model, layers: Mapping[str, LoRALayer]) -> bool:
    """Whether a model made from the config would have the same adapters and the same flags."""
    if not all(is_registered(layer) for layer in layers.values()):
        return False
    if any(_mixed_flags(node.layer) for node in walk(model)):
        return False
    try:
        return _count_adapted(model.get_config()) == len(layers)
    except Exception:  # a get_config of somebody else's that fails, in whatever way
        return False


def _mixed_flags(layer: keras.layers.Layer) -> bool:
    """Whether only some of a plain layer's variables train; a config has one flag a layer."""
    if isinstance(layer, LoRALayer) or not layer.trainable or any(walk(layer)):
        return False
    return any(not v.trainable for v in own_trainable_variables(layer))


def _count_adapted(config: Any) -> int:
    if isinstance(config, Mapping):
        own = int({"adapters", "active", "train_bias"} <= config.keys())
        return own + sum(_count_adapted(value) for value in config.values())
    if isinstance(config, list | tuple):
        return sum(_count_adapted(value) for value in config)
    return 0
