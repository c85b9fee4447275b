"""Which adapters of a model act and train."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import keras

from keras_lora.config import invalid
from keras_lora.inject.compiled import (
    FUNCTIONS,
    changing,
    stale_when_flags_change,
    strategy_scope,
)
from keras_lora.inject.freezing import freeze
from keras_lora.inject.optimizers import switch_optimizer
from keras_lora.inject.saving import guard_saving, models_in
from keras_lora.layers import BASE, Group, Held, LoRALayer, all_held
from keras_lora.walker import lora_layers


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


def adapter_names(layers: Mapping[str, LoRALayer]) -> list[str]:
    """All names, in the order in which they were added."""
    return list(dict.fromkeys(name for layer in layers.values() for name in layer.adapters))


def active_names(layers: Mapping[str, LoRALayer]) -> list[str]:
    return list(dict.fromkeys(n for layer in layers.values() for n in layer.active_adapters))


def check_names(model: keras.Model, names: str | Sequence[str] | None) -> list[str]:
    """The names as a list.

    Raises:
        ValueError: no adapters, a name that the model does not have, or twice the same.
    """
    known = adapter_names(adapted(model))
    wanted = [names] if isinstance(names, str) else list(names or ())
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise invalid("names", f"names among {known}", unknown)
    if len(set(wanted)) < len(wanted):
        raise invalid("names", "each name once", wanted, "scale it with scale_adapter")
    return wanted


def groups(layers: Mapping[str, LoRALayer]) -> dict[str, Group]:
    """What is known of each adapter beyond its layers. Layers made by hand have none."""
    adapters = ((n, a) for layer in layers.values() for n, a in layer.adapters.items())
    return {name: adapter.group for name, adapter in adapters if adapter.group is not None}


def switch(model: keras.Model, names: Sequence[str], trainable: bool = True) -> None:
    """Let exactly these adapters act and, if `trainable`, train with what belongs to them.

    Nothing that is compiled changes, and no optimizer is made anew, unless variables are missing
    or other variables are to train.

    Raises:
        ValueError: two of the adapters have a value for the same variable.
    """
    layers = lora_layers(model)
    trainable = trainable and bool(names)
    extra = _trained_variables(model, names if trainable else [])
    switched = active_names(layers), names
    fit = _fit(layers, names)
    if fit and _same_flags(model, layers, extra, trainable):
        activate(model, names, trainable)
        for known in known_models(model):
            switch_optimizer(known, *switched)
    else:
        stale = stale_when_flags_change() if fit else FUNCTIONS
        with changing(model, list(layers.values()), switched, stale):
            activate(model, names, trainable)
            refreeze(model, extra)
    if all_held(model.variables):
        guard_saving(model)


def activate(model: keras.Model, names: Sequence[str], trainable: bool | None = None) -> None:
    """Move adapters into the slots, and their values into the variables of the base.

    Flags of slots change as asked, those of other variables and optimizers do not.
    """
    owners = [(item, _owner(item, names)) for item in all_held(model.variables)]
    for layer in lora_layers(model).values():
        trains = layer.trains_adapters if trainable is None else trainable
        with strategy_scope(layer):
            layer.activate([n for n in names if n in layer.adapters], trains)
    for item, owner in owners:
        item.switch(owner)


def known_models(model: keras.Model) -> list[keras.Model]:
    """The models that were adapted or switched with layers of this one, and those in it.

    Where one encoder serves several models, each has an optimizer with moments of the same slots.
    """
    layers = lora_layers(model).values()
    inside = models_in(model)
    for layer in layers:
        layer._lora.models.update(inside)
    return list({id(m): m for layer in layers for m in layer._lora.models}.values())


def refreeze(model: keras.Model, extra: Iterable[keras.Variable]) -> None:
    """Freeze all but the slots that train and these variables."""
    slots = [v for x in lora_layers(model).values() for slot in x.slots for v in slot.factors]
    freeze(model, [*(v for v in slots if v.trainable), *extra])


def _owner(item: Held, names: Sequence[str]) -> str:
    """Whose value the variable is to have."""
    owners = [name for name in names if name in item.names]
    if len(owners) > 1:
        raise ValueError(
            f"Expected adapters of which one at most has a value of its own for "
            f"'{item.variable.path}' (by layers_to_save or bias). Received: {owners}. Activate one "
            "of them."
        )
    return owners[0] if owners else BASE


def _trained_variables(model: keras.Model, names: Sequence[str]) -> list[keras.Variable]:
    """The base's variables that are to train beside these adapters."""
    layers = lora_layers(model)
    known = groups(layers)
    owned = {id(item.variable) for item in all_held(model.variables)}
    ours = {id(v) for layer in layers.values() for v in layer.adapter_variables}
    # Those of layers made by hand, or read from a `.keras` file, belong to no adapter.
    nobodys = [v for v in model.trainable_variables if id(v) not in ours | owned]
    wanted = {id(v) for name in names if name in known for v in known[name].trained}
    return nobodys + [v for v in model.variables if id(v) in wanted]


def _fit(layers: Mapping[str, LoRALayer], names: Sequence[str]) -> bool:
    adapters = [[x.adapters[n].spec for n in names if n in x.adapters] for x in layers.values()]
    return all(x.fits(specs) for x, specs in zip(layers.values(), adapters, strict=True))


def _same_flags(
    model: keras.Model,
    layers: Mapping[str, LoRALayer],
    extra: Sequence[keras.Variable],
    trainable: bool,
) -> bool:
    slots = [v for layer in layers.values() for slot in layer.slots for v in slot.factors]
    expected = {id(v) for v in [*extra, *(slots if trainable else [])]}
    return expected == {id(v) for v in model.trainable_variables}
