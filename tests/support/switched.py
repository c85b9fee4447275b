"""A model with two adapters, what each of them answers, and the contexts of a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np

import keras_lora as kl
from support.models import data, functional, randomize_adapters

CONFIG = kl.LoRAConfig(rank=2, targets=["up", "middle"])
NAMES = ("fr", "de")


def two_adapters() -> keras.Model:
    """A model with two adapters, `fr` active."""
    model = functional()
    for name in NAMES:
        kl.apply_lora(model, CONFIG, name=name)
    randomize_adapters(model)
    kl.set_adapter(model, "fr")
    return model


def answers(model: keras.Model) -> dict[str, np.ndarray]:
    """The outputs of each adapter and, under "", of the base, from merged copies."""
    found, x = {}, data(model)[0]
    for name in NAMES:
        kl.set_adapter(model, name)
        found[name] = np.array(kl.merge_lora(model, inplace=False)(x))
    kl.set_adapter(model, None)
    found[""] = np.array(model(x))
    kl.set_adapter(model, "fr")
    return found


CONTEXTS: dict[str, Callable[[keras.Model], Any]] = {
    "merged": kl.merged,
    "disable_adapter": kl.disable_adapter,
    "use_adapter": lambda model: kl.use_adapter(model, "de"),
    "scale_adapter": lambda model: kl.scale_adapter(model, "fr", 2),
}
