"""What an adapted layer has more than its base."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

import keras

from keras_lora.config import AdapterSpec
from keras_lora.layers.owned import OwnedValues
from keras_lora.layers.rows import Rows
from keras_lora.layers.slots import LayerAdapter, Slot


@dataclass
class LoRAState:
    """What a layer has more than its base class has. Keras tracks none of this object."""

    base_class: type
    adapters: dict[str, LayerAdapter] = field(default_factory=dict)
    slots: list[Slot] = field(default_factory=list)
    active: tuple[str, ...] = ()
    # There once an adapter has dropout; then the masks are part of the computation for good.
    seeds: keras.random.SeedGenerator | None = None
    # `|W0|^2` of each output: there once an adapter has DoRA.
    squared_norms: keras.Variable | None = None
    # What a checkpoint of this layer holds for its model: see `inject.apply`.
    owned: list[OwnedValues] = field(default_factory=list)
    # Models that were adapted or switched with this layer in them: their optimizers know of it.
    models: WeakSet[Any] = field(default_factory=WeakSet)
    # Within `with_rows`: what each row of a batch has of its own.
    rows: Rows | None = None
    # Between the constructor and `build`.
    pending: dict[str, AdapterSpec] = field(default_factory=dict)
    train_bias: bool = False
    # Why the last weights file was refused.
    refusal: str | None = None
    # Why a `.keras` file cannot hold this layer, or None: see `inject.guard_saving`.
    unsaveable: str | None = None
