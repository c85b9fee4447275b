"""The files that can contain an adapted model, and the refusal of the others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

import keras

from keras_lora.inject.freezing import own_trainable_variables
from keras_lora.inject.showing import name_adapted
from keras_lora.layers import BASE, LoRALayer, LoRAVariables, all_owned, is_registered
from keras_lora.rates import build_rated
from keras_lora.walker import Layer, Tree


def prepare_saving(tree: Tree) -> None:
    """Prepare an adapted model for Keras: values to write, names to show."""
    keep_owned_values(tree)
    name_adapted(tree)


def keep_owned_values(tree: Tree) -> None:
    """Let the first adapted layer write the parked owned values into weights files."""
    layers = tree.adapted
    for layer in layers:
        layer._lora.owned = []
    layers[0]._lora.owned = all_owned(tree.root.variables)


def check_preset(model: keras.Model) -> None:
    """Refuse a preset of KerasHub, which has the config of a model without adapters.

    Raises:
        ValueError: the model has adapters.
    """
    if Tree.of(model).adapted:
        _refuse(model.name)


def check_saveable(model: Any) -> None:
    """Refuse to write a model to a file that could not be read back.

    Layers that were made by hand are as their constructors make them, wherever they are.

    Raises:
        ValueError: the model, or one inside it, was adapted, and its config does not hold that.
    """
    if not isinstance(model, keras.layers.Layer):
        return  # Keras writes optimizers and metrics in the same way
    tree = Tree.of(model)
    adapters = [adapter for bank in tree.banks for adapter in bank.adapters.values()]
    if any(adapter.adapter is not None for adapter in adapters) and not _config_holds(tree):
        _refuse(model.name)
    if adapters:
        build_rated(model)


def check_in_slots(model: Any) -> None:
    """Refuse a way to take a model's state that takes its variables alone.

    Raises:
        ValueError: adapters are not in variables, since they wait.
    """
    tree = Tree.of(model)
    waiting = {name for bank in tree.banks for name in bank.adapters.keys() - set(bank.active)}
    owned = {name for item in all_owned(tree.root.variables) for name in item.parked} - {BASE}
    if waiting | owned:
        raise ValueError(
            f"Expected a way to save that keeps the adapters that wait, {sorted(waiting | owned)}, "
            "which are in no variable of the model. Use model.save_weights (in callbacks: "
            "ModelCheckpoint with save_weights_only=True), or save_adapter for each."
        )


_UNSAVEABLE = (
    "'{model}' has adapters that no `.keras` file, preset, JSON or clone could bring back: its "
    "config does not list the adapted layers. To save a plain model: "
    "merge_lora(model, inplace=False).save(path). To go on training later: "
    "model.save_weights(path), and then apply_lora with the same config and load_weights (in "
    "callbacks: save_weights_only=True)."
)


def _refuse(name: str) -> NoReturn:
    raise ValueError(_UNSAVEABLE.format(model=name))


def _config_holds(tree: Tree) -> bool:
    """Whether a model made from the config would have the same adapters and the same flags."""
    layers = tree.adapted
    if not all(is_registered(layer) and _banks_alike(layer) for layer in layers):
        return False
    if any(_mixed_flags(tree, layer) for layer in tree.layers[1:]):
        return False
    owned = all_owned(tree.root.variables)
    # A file has one value for a variable, the present owner's, which must be an adapter.
    if any(item.owner == BASE or item.names != {BASE, item.owner} for item in owned):
        return False
    try:
        return _count_adapted(tree.root.get_config()) == len(layers)
    except Exception:  # a user's get_config may fail in any way
        return False


def _banks_alike(layer: LoRALayer) -> bool:
    """Whether a layer's config, which says its adapters once, is true of each of its matrices."""
    if isinstance(layer, LoRAVariables):
        return True  # it says so for each
    first, *others = [
        ({n: a.acting_spec for n, a in bank.adapters.items()}, bank.active, bank.room)
        for bank in layer.banks.values()
    ]
    return all(bank == first for bank in others)


def _mixed_flags(tree: Tree, layer: Layer) -> bool:
    """Whether only some of a plain layer's variables train; a config has one flag a layer."""
    if isinstance(layer, LoRALayer) or not layer.trainable or tree.children[id(layer)]:
        return False
    return any(not v.trainable for v in own_trainable_variables(tree, layer))


def _count_adapted(config: Any) -> int:
    if isinstance(config, Mapping):
        own = int({"adapters", "active", "train_bias"} <= config.keys())
        return own + sum(_count_adapted(value) for value in config.values())
    if isinstance(config, list | tuple):
        return sum(_count_adapted(value) for value in config)
    return 0
