"""Several adapters on one model: which of them act, how strongly, and which are there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from types import TracebackType

import keras

from keras_lora.config import check_alpha, invalid
from keras_lora.inject import (
    activate,
    active_names,
    adapted,
    adapter_names,
    changing,
    check_names,
    drop,
    forget_optimizer_states,
    guard_saving,
    models_in,
    switch,
    unload_lora,
)


def set_adapter(
    model: keras.Model, names: str | Sequence[str] | None, trainable: bool = True
) -> None:
    """Let exactly these adapters act, and train; their deltas add up.

        h = x W0 + sum_i s_i (x A_i) B_i        over the adapters named

    Values move and nothing is traced again: `predict`, `fit` and `generate` go on with the
    functions that they have compiled, in a time that does not grow with the number of adapters.
    A new trace is needed only where

    - more adapters act on a layer than ever did, or one of a higher rank, or the first with
      dropout: the layer then gets new variables;
    - other variables of the base train (adapters with other `layers_to_save` or `bias`), or
      `trainable` is not what it was: for `fit`, and the optimizer is made anew.

    An optimizer's moments move with the adapters, of this model and of those inside it: to train
    one adapter, then another, and then the first one again is to train it without a break. A layer
    without any of these adapters keeps an empty slot, which adds zero and whose gradient is zero.

    Args:
        model: An adapted model.
        names: A name, several, or None for the base alone.
        trainable: Whether the adapters, and what belongs to them, train.

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
    switch(model, check_names(model, names), trainable)


@contextlib.contextmanager
def disable_adapter(model: keras.Model) -> Iterator[keras.Model]:
    """Within the context no adapter acts: the model computes what its base does.

    Up to the rounding of the products, which are computed as they are for adapters, so that
    nothing is traced again. No flag and no optimizer changes.

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
    names = active_names(adapted(model))
    activate(model, [])
    try:
        yield model
    finally:
        activate(model, names)


def delete_adapter(model: keras.Model, name: str) -> None:
    """Take an adapter out: its factors, and its values of biases and `layers_to_save`.

    The others act as before. Where it was the last one, the model is plain again, as after
    `unload_lora`. Layers that no other adapter uses become plain, and what is compiled is made
    anew; else nothing is traced again.

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
    (name,) = check_names(model, [name])
    layers = adapted(model)
    if adapter_names(layers) == [name]:
        unload_lora(model)
        return
    left = [n for n in active_names(layers) if n != name]
    if len(left) < len(active_names(layers)):
        switch(model, left, any(layer.trains_adapters for layer in layers.values()))
    emptied = [layer for layer in layers.values() if set(layer.adapters) == {name}]
    with changing(model, emptied) if emptied else contextlib.nullcontext():
        drop(model, name)
    guard_saving(model)
    for inner in models_in(model):
        forget_optimizer_states(inner, name)


class scale_adapter:  # noqa: N801
    """Let an adapter act more or less: `h = x W0 + factor * s (x A) B`.

    A setting, which lasts; in a `with` statement the old factor returns at the end. Nothing is
    traced again. Merging and saving use the factor.

    Args:
        model: An adapted model.
        name: The adapter, active or not.
        factor: A finite number; 1 is the adapter as it was trained, and -1 takes its delta away.

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

    def __init__(self, model: keras.Model, name: str, factor: float) -> None:
        (self._name,) = check_names(model, [name])
        _check_factor(factor)
        layers = [layer for layer in adapted(model).values() if name in layer.adapters]
        self._before = [(layer, layer.adapters[name].strength) for layer in layers]
        for layer in layers:
            layer.set_strength(name, float(factor))

    def __enter__(self) -> None:
        """The factor is set already."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for layer, strength in self._before:
            if self._name in layer.adapters:
                layer.set_strength(self._name, strength)


def _check_factor(factor: object) -> None:
    try:
        check_alpha(factor)
    except ValueError:
        raise invalid("factor", "a finite number", factor) from None
