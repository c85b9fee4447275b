"""Keras's savers, its quantizer and its loaders of legacy files ask this package first.

Keras opens a file and serializes then, so that an error from a layer destroys an older file. And a
model that is made around an adapted one does not know of the adapters. So this module wraps the
functions that all savers of Keras go through: `model.save` and `keras.saving.save_model` to files
and directories of either format, `ModelCheckpoint`, pickles and copies; and the two that make a
model, or JSON, from a config.

Private Keras API in this file, and why (`tests/test_private_api.py` watches each):
    `saving_lib`, `legacy_h5_format`: the modules with the functions behind
        `keras.saving.save_model`, which is the public name of only one of the ways in.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import keras

from keras_lora.inject.identity import check_quantizable
from keras_lora.inject.saving import check_saveable
from keras_lora.layers import STATE_PREFIX
from keras_lora.walker import Tree


def guard_keras_savers() -> None:
    """Wrap Keras's savers and its quantizer; called once, when this package is imported."""
    saving_lib, legacy = saver_modules()
    # The first writes files and directories, the second also pickles and copies.
    _guard(saving_lib, "save_model", check_saveable)
    _guard(saving_lib, "_serialize_model_as_json", check_saveable)
    _guard(legacy, "save_model_to_hdf5", check_saveable)
    _guard(keras.Model, "to_json", check_saveable)
    for module in (sys.modules[keras.models.clone_model.__module__], keras.models):
        _guard(module, "clone_model", check_saveable)
    _guard(legacy, "load_weights_from_hdf5_group", check_loadable, 2)
    _guard(legacy, "load_weights_from_hdf5_group_by_name", check_loadable, 2)
    _guard(keras.Model, "quantize", check_quantizable)


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


def _guard(module: Any, name: str, check: Callable[..., None], count: int = 1) -> None:
    """Let a function call `check` with its first `count` arguments before all else."""
    function = getattr(module, name)
    signature = inspect.signature(function)

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments.values()
        check(*list(given)[:count])
        return function(*args, **kwargs)

    setattr(module, name, guarded)
