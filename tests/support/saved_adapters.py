"""Models with a trained adapter, and fresh ones of the same base."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np

import keras_lora as kl
from support.adapters import factors, fit
from support.cases import numpy_of
from support.models import (
    data,
    functional,
    randomize_adapters,
)

CONFIG = kl.LoRAConfig(
    rank=3, alpha=5, dropout=0.1, use_rslora=True, bias="lora_only", layers_to_save=["head"]
)


def predict(model: keras.Model) -> np.ndarray:
    return numpy_of(model.predict(data(model)[0], verbose=0))


def trained(make: Callable[[], keras.Model] = functional, **options: Any) -> keras.Model:
    model = make()
    kl.apply_lora(model, options.pop("config", CONFIG), **options)
    randomize_adapters(model)
    model.compile("adam", "mse")
    fit(model)
    return model


def same_base(make: Callable[[], keras.Model], model: keras.Model) -> keras.Model:
    """A base of the same values, whose layers have other automatic names."""
    fresh = make()
    ours = {id(v) for x in kl.lora_layers(model).values() for v in x.adapter_variables}
    with kl.disable_adapter(model):
        values = [numpy_of(v) for v in model.weights if id(v) not in ours]
        fresh.set_weights(values)
    return fresh


def fit_and_check(model: keras.Model, name: str) -> None:
    before = {n: factors(model, n) for n in ["fr", "de"]}
    model.compile("adam", "mse")
    fit(model)
    after = {n: factors(model, n) for n in ["fr", "de"]}
    assert {n for n in after if after[n] != before[n]} == {name}
