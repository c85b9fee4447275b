"""KerasHub's exporters to transformers write the merged model, and its presets are refused.

The exporters read the weights of layers in several ways: of an adapted GPT-2 they would write the
effective kernels, of a Gemma those of the base, without a word. A task that is made around an
adapted backbone does not know of the adapters, so the methods of the classes are wrapped.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable
from typing import Any

from keras_lora.inject.keras_savers import guard
from keras_lora.inject.merge import merged
from keras_lora.inject.saving import check_preset
from keras_lora.inject.switching import active_names
from keras_lora.walker import Tree

_Method = Callable[..., Any]
EXPORT = "export_to_transformers"
PRESET = "save_to_preset"


def guard_keras_hub_writers() -> None:
    """Wrap KerasHub's writers, if it is imported; without it, no model is one of its own."""
    keras_hub = sys.modules.get("keras_hub")
    if keras_hub is not None:
        for name in ("Backbone", "CausalLM", "Task"):
            _wrap(getattr(keras_hub.models, name))


@functools.cache  # once for each class
def _wrap(model_class: type) -> None:
    if EXPORT in vars(model_class):  # not in older versions of KerasHub
        setattr(model_class, EXPORT, _merging(getattr(model_class, EXPORT)))
    if PRESET in vars(model_class):
        guard(model_class, PRESET, check_preset)


def _merging(export: _Method) -> _Method:
    @functools.wraps(export)
    def exported(model: Any, *args: Any, **kwargs: Any) -> Any:
        active = active_names(Tree.of(model))
        with merged(model) if active else contextlib.nullcontext():
            return export(model, *args, **kwargs)

    return exported
