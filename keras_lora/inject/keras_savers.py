"""Keras's savers ask this package first, before they open a file.

Keras opens a file and serializes then, so that an error from a layer destroys an older file. And a
model that is made around an adapted one does not know of the adapters. So this module wraps the
functions that all savers of Keras go through: `model.save` and `keras.saving.save_model` to files
and directories of either format, `ModelCheckpoint`, pickles and copies.

Private Keras API in this file, and why (`tests/test_private_api.py` watches each):
    `saving_lib`, `legacy_h5_format`: the modules with the functions behind
        `keras.saving.save_model`, which is the public name of only one of the ways in.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import keras

from keras_lora.inject.saving import check_saveable


def guard_keras_savers() -> None:
    """Wrap Keras's savers; called once, when this package is imported."""
    saving_lib, legacy = saver_modules()
    # The first writes files and directories, the second also pickles and copies.
    _guard(saving_lib, "save_model", check_saveable)
    _guard(saving_lib, "_serialize_model_as_json", check_saveable)
    _guard(legacy, "save_model_to_hdf5", check_saveable)


def saver_modules() -> tuple[ModuleType, ModuleType]:
    """`saving_lib` and `legacy_h5_format`, in which `keras.saving.save_model` looks names up."""
    names = keras.saving.save_model.__globals__
    return names["saving_lib"], names["legacy_h5_format"]


def _guard(module: Any, name: str, check: Callable[[Any], None]) -> None:
    function = getattr(module, name)

    @functools.wraps(function)
    def guarded(model: Any, *args: Any, **kwargs: Any) -> Any:
        check(model)
        return function(model, *args, **kwargs)

    setattr(module, name, guarded)
