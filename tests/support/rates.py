"""An optimizer with learning rates by group, and a model in which each group trains."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

import keras_lora as kl
from support.optimizers import adapt, base

RATE = 0.02
RATES = {"a": 0.5, "b": 8.0, "magnitudes": 3.0, "tokens": 6.0, "heads": 0.25, "biases": 2.0}
FACTORS = {
    "up/lora_a": RATES["a"],
    "up/lora_b": RATES["b"],
    "up/lora_magnitude": RATES["magnitudes"],
    "up/bias": RATES["biases"],
    "head/kernel": RATES["heads"],
    "head/bias": RATES["heads"],
}


def place(variable: keras.Variable) -> str:
    return "/".join(variable.path.split("/")[-2:])


EVERYTHING: dict[str, Any] = {"use_dora": True, "bias": "all", "layers_to_save": ["head"]}


def everything() -> keras.Model:
    """A model in which each group trains, with values that are not zero."""
    model = base()
    adapt(model, "a", **EVERYTHING)
    rng = np.random.default_rng(1)
    for variable in model.trainable_variables:
        variable.assign(rng.normal(size=variable.shape))
    return model


def rated(**options: Any) -> Any:
    return kl.set_rates(keras.optimizers.Adam(RATE), **RATES, **options)
