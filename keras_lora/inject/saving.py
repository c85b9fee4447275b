"""Which files can hold an adapted model, and the refusal of the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NoReturn

import keras

from keras_lora.inject.freezing import own_trainable_variables
from keras_lora.layers import BASE, LoRALayer, all_owned, is_registered
from keras_lora.walker import all_layers, lora_layers, walk


def guard_saving(model: keras.Model) -> None:
    """Refuse, before a file is touched, to write a file that could not be read back.

    Keras opens the file first and serializes then, so that an error from a layer would destroy
    an older file; `LoRALayer.save_assets` is the second line, for outer models.
    """
    layers = lora_layers(model)
    _keep_owned_values(model, list(layers.values()))
    message = None if _config_holds(model, layers) else _UNSAVEABLE.format(model=model.name)
    for layer in layers.values():
        layer._lora.unsaveable = message
    for inner in models_in(model):
        if message:
            inner.save = partial(_refuse, message)
        if hasattr(inner, "save_to_preset"):
            inner.save_to_preset = partial(_refuse, _UNSAVEABLE.format(model=model.name))


def _keep_owned_values(model: keras.Model, layers: Sequence[LoRALayer]) -> None:
    """Let the first adapted layer write, into weights files, values that no variable has now."""
    for layer in layers:
        layer._lora.owned = []
    layers[0]._lora.owned = all_owned(model.variables)


def allow_saving(model: keras.Model) -> None:
    for inner in models_in(model):
        for name in {"save", "save_to_preset"} & vars(inner).keys():
            delattr(inner, name)


_UNSAVEABLE = (
    "'{model}' has adapters that no `.keras` file or preset could bring back: its config does not "
    "list the adapted layers. To save a plain model: merge_lora(model, inplace=False).save(path). "
    "To go on training later: model.save_weights(path), and then apply_lora with the same config "
    "and load_weights (in callbacks: save_weights_only=True)."
)


def _refuse(message: str, *_: Any, **__: Any) -> NoReturn:
    raise ValueError(message)


def models_in(model: keras.Model) -> list[keras.Model]:
    """A model and those that are layers of it."""
    return [part for part in all_layers(model) if isinstance(part, keras.Model)]


def _config_holds(model: keras.Model, layers: Mapping[str, LoRALayer]) -> bool:
    """Whether a model made from the config would have the same adapters and the same flags."""
    if not all(is_registered(layer) for layer in layers.values()):
        return False
    if any(_mixed_flags(node.layer) for node in walk(model)):
        return False
    # A file has one value for a variable.
    if any(item.names != {BASE, item.owner} for item in all_owned(model.variables)):
        return False
    if any(item.owner == BASE for item in all_owned(model.variables)):
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
