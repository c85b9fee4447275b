"""Keras's savers, its quantizer and its loaders of legacy files ask this package first.

Keras opens a file and serializes then, so that an error from a layer destroys an older file. And a
model that is made around an adapted one does not know of the adapters. So this module wraps the
functions that all savers of Keras go through: `model.save` and `keras.saving.save_model` to files
and directories of either format, `ModelCheckpoint`, pickles and copies; and the two that make a
model, or JSON, from a config.

A weights file says which adapters act, and has the optimizer's moments for them. So all of it is
checked first, and the same adapters are activated before it is loaded.

Private Keras API in this file, and why (`tests/test_private_api.py` watches each):
    `saving_lib`, `legacy_h5_format`: the modules with the functions behind
        `keras.saving.save_model`, which is the public name of only one of the ways in.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import keras

from keras_lora.inject.quantizing import guard_quantizer
from keras_lora.inject.saving import check_in_slots, check_saveable
from keras_lora.inject.switching import active_names, in_order, switch
from keras_lora.layers import STATE_PREFIX
from keras_lora.walker import Tree

_LOAD = "load_weights_only"


def guard_keras_savers() -> None:
    """Wrap Keras's savers and its quantizer; called once, when this package is imported."""
    saving_lib, legacy = saver_modules()
    # The first writes files and directories, the second also pickles and copies.
    guard(saving_lib, "save_model", check_saveable)
    guard(saving_lib, "_serialize_model_as_json", check_saveable)
    guard(legacy, "save_model_to_hdf5", check_saveable)
    guard(keras.Model, "to_json", check_saveable)
    for module in (sys.modules[keras.models.clone_model.__module__], keras.models):
        guard(module, "clone_model", check_saveable)
    guard(legacy, "load_weights_from_hdf5_group", check_loadable, 2)
    guard(legacy, "load_weights_from_hdf5_group_by_name", check_loadable, 2)
    guard_quantizer()
    # These take the variables of a model alone: the legacy format, and `OrbaxCheckpoint`.
    guard(legacy, "save_model_to_hdf5", check_in_slots)
    guard(keras.Model, "get_state_tree", check_in_slots)
    setattr(saving_lib, _LOAD, _checking(getattr(saving_lib, _LOAD)))


def saver_modules() -> tuple[ModuleType, ModuleType]:
    """`saving_lib` and `legacy_h5_format`, in which `keras.saving.save_model` looks names up."""
    names = keras.saving.save_model.__globals__
    return names["saving_lib"], names["legacy_h5_format"]


def check_loadable(group: Any, model: Any) -> None:
    """Refuse the legacy file of a base for an adapted model.

    Such a file has the weights of a layer in an order that depends on what trains.

    Raises:
        ValueError: the model has adapters, and the file has none.
    """
    adapted = isinstance(model, keras.layers.Layer) and Tree.of(model).adapted
    if adapted and group.visit(lambda name: STATE_PREFIX in name or None) is None:
        raise ValueError(
            f"'{model.name}': expected a legacy .h5 file with its adapters. Received: one without "
            "adapters. Load it into the base, and call apply_lora then."
        )


def guard(module: Any, name: str, check: Callable[..., None], count: int = 1) -> None:
    """Let a function call `check` with its first `count` arguments before all else."""
    function = getattr(module, name)
    signature = inspect.signature(function)

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments.values()
        check(*list(given)[:count])
        return function(*args, **kwargs)

    setattr(module, name, guarded)


def _checking(load: Callable[..., None]) -> Callable[..., None]:
    """`load_weights_only`, which activates the adapters that act in the file, if all of it fits."""

    @functools.wraps(load)
    def checking(
        model: Any, filepath: Any, skip_mismatch: bool = False, objects_to_skip: Any = None
    ) -> None:
        tree = Tree.of(model)
        # To skip what does not fit is to leave the rest as it is.
        if tree.adapted and not skip_mismatch:
            optimizer = getattr(model, "optimizer", None)
            plain = [x for x in tree.layers if not tree.children[id(x)] and x not in tree.adapted]
            skipped = [*(objects_to_skip or ()), *plain, optimizer]
            _activate(tree, partial(load, model, filepath, objects_to_skip=skipped))
            if optimizer is not None and optimizer.built and not model.optimizer.built:
                model.optimizer.build(model.trainable_variables)
        load(model, filepath, skip_mismatch, objects_to_skip)

    return checking


def _activate(tree: Tree, check: Callable[[], None]) -> None:
    """Activate the adapters that act in a file, where it says so.

    Raises:
        ValueError: the file has other adapters than the model.
    """
    layers = tree.adapted
    for layer in layers:
        layer._lora.checked = []
    try:
        check()
        found = [active for layer in layers for active in layer._lora.checked or ()]
    finally:
        for layer in layers:
            layer._lora.checked = None
    names, trains = in_order(names for names, _ in found), any(trains for _, trains in found)
    before = active_names(tree), any(bank.trains for bank in tree.banks)
    if found and (names, trains) != before:
        switch(tree, names, trains)
